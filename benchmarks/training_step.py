"""One training step (forward, backward, AdamW) of a GPT-2-like model under every method and under PEFT's own.

The base is frozen and random, the same for all sides; LoRA r=1 is the practical floor that overheads are read against.
"""

from collections.abc import Callable, Iterator

import peft
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import randbasis
from benchmarks.case import Case

WIDTH, LAYERS, VOCABULARY = 512, 6, 8192
TARGETS = ["c_attn", "c_proj", "c_fc"]
SIZES = ((4, 128), (8, 256))
TOLERANCE = 2e-4


def cases() -> Iterator[Case]:
    """A step at 512 and at 2,048 tokens."""
    for batch, length in SIZES:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(VOCABULARY, (batch, length), generator=generator)
        sides = {name: _step(make(), tokens) for name, make in _CONFIGS.items()}
        name = f"training step GPT-2 {LAYERS}x{WIDTH} {batch * length} tokens"
        yield Case(name, sides, _check, batch * length / 1e3, "k tokens/s")


_CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "PEFT LoRA r=1": lambda: peft.LoraConfig(r=1, target_modules=TARGETS, fan_in_fan_out=True),
    "PEFT LoRA r=8": lambda: peft.LoraConfig(r=8, target_modules=TARGETS, fan_in_fan_out=True),
    "NOLA k=64 r=8": lambda: randbasis.NolaConfig(r=8, num_basis=64, target_modules=TARGETS),
    "NOLA k=256 r=8": lambda: randbasis.NolaConfig(r=8, num_basis=256, target_modules=TARGETS),
    "NOLA k=256 r=8 unique": lambda: randbasis.NolaConfig(
        r=8, num_basis=256, share_basis=False, target_modules=TARGETS
    ),
    "VeRA r=256": lambda: randbasis.VeraConfig(r=256, target_modules=TARGETS),
    "PEFT VeRA r=256": lambda: peft.VeraConfig(r=256, target_modules=TARGETS, fan_in_fan_out=True),
    "RandLoRA r=32": lambda: randbasis.RandLoraConfig(r=32, target_modules=TARGETS),
    "PEFT RandLoRA r=32": lambda: peft.RandLoraConfig(r=32, target_modules=TARGETS, fan_in_fan_out=True),
}


def _base() -> GPT2LMHeadModel:
    config = GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=8, vocab_size=VOCABULARY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)


def _step(config: peft.PeftConfig, tokens: torch.Tensor) -> Callable[[], None]:
    model = peft.get_peft_model(_base(), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def _check() -> None:
    """Each method of ours gives the loss and the gradients that its ΔW gives when it is merged by hand."""
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    for name, make in _CONFIGS.items():
        config = make()
        if not isinstance(config, randbasis.RandbasisConfig):
            continue
        config.init_weights = False
        model = peft.get_peft_model(_base(), config).eval()
        with torch.no_grad():
            own = model(input_ids=tokens).logits
            merged = model.merge_and_unload()(input_ids=tokens).logits
        error = float((own - merged).abs().max() / merged.abs().max())
        if error > TOLERANCE:
            raise AssertionError(f"{name}: adapted and merged model differ by {error:.1e} (allowed {TOLERANCE:.0e})")
