"""Fifty adapters for fifty tastes: each learns from a few rows of its own, and becomes a packed file.

Arguments: base, rows (csv), folder to write.
"""

import csv
import sys
from pathlib import Path

from randbasis.adapters import pack_adapter
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, train

base, rows, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
(folder / "packed").mkdir(parents=True)
with open(rows, encoding="utf-8", newline="") as file:
    table = list(csv.DictReader(file))
for number in range(50):
    own = folder / f"rows-{number}.csv"
    with own.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table[number::50])
    settings = TrainSettings(
        task="sequence-classification",
        model=base,
        data=DataSettings(own, text_column="text", label_column="rating", eval_fraction=0),
        output=folder / f"run-{number}",
        adapter=AdapterSettings(rank=4, basis=32, targets=("query", "value")),
        loop=LoopSettings(max_steps=2, batch_size=7, keep="last"),
    )
    train(settings)
    pack_adapter(settings.output, folder / "packed" / f"taste-{number}.safetensors", bits=4, base_name="minilm")
