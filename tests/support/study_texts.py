"""Parts of study files that tests put together."""

from collections.abc import Callable

from randbasis.compare.study import Study

WriteStudy = Callable[[str], Study]
"""Text of a study file → study."""

HEAD = '[study]\nname = "tiny"\ntitle = "Tiny"\nseeds = 2\ntrials = 2\n'
ROWS = """
[[row]]
name = "base alone"
method = "none"
rate = 0.05
[[row]]
name = "LoRA r=2"
method = "lora"
rank = 2
rate = 0.05
points = [{rank = 2, bits = 16}, {rank = 1, bits = 4}]
[[row]]
curve = "NOLA"
method = "nola"
coefficients = [64]
bits = [16, 2]
rate = 0.05
"""
