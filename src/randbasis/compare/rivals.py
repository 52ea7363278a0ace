"""OPTIONS → CONFIGURATION: methods of this package in the words of the command, PEFT's own by their arguments.

The rivals are PEFT's code as it is installed. Where PEFT has no default of a rate, the middle of the rates
that are tried comes from :data:`RATES`, with where it is from; every method is given as many rates around it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import peft
from peft import PeftConfig

from randbasis.compare.budgets import NOLA_RANK, Shape
from randbasis.compare.study import NO_ADAPTER, WHOLE
from randbasis.train.default_choices import HEAD_ALONE, choose
from randbasis.train.method_table import METHOD_NAMES, method_words, peft_config
from randbasis.train.settings import AdapterSettings

RIVALS: Mapping[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "dora": ("LoraConfig", {"use_dora": True}, ("rank", "alpha")),
    "vblora": ("VBLoRAConfig", {"save_only_topk_weights": True}, ("r", "num_vectors", "vector_length", "topk")),
    "unilora": ("UniLoraConfig", {}, ("r", "theta_d_length")),
    "fourierft": ("FourierFTConfig", {}, ("n_frequency", "scaling")),
    "tinylora": ("TinyLoraConfig", {}, ("r", "u", "weight_tying", "save_projection")),
    "peft-vera": ("VeraConfig", {}, ("r", "d_initial", "save_projection")),
    "peft-randlora": ("RandLoraConfig", {}, ("r", "randlora_alpha", "sparse", "very_sparse", "save_projection")),
}
"""Method → PEFT's configuration, what is always set there, and the options that a row may give."""

RATES: Mapping[str, tuple[str, float]] = {
    "dora": ("lora", 1.0),
    "peft-vera": ("vera", 1.0),
    "peft-randlora": ("randlora", 1.0),
    "vblora": ("lora", 3.0),
    "unilora": ("vera", 1.0),
    "fourierft": ("vera", 10.0),
    "tinylora": ("loraxs", 1.0),
}
"""Method → the method whose default rate is the middle of those that are tried, and the share of it. VB-LoRA's
authors take the rates of LoRA's order (1e-3 for the bank, arXiv 2405.15179, table 7), Uni-LoRA's 5e-3, FourierFT's
those of VeRA's order (5e-2 on GLUE, arXiv 2405.03003, table 9); TinyLoRA is LoRA-XS with tied, projected entries. The
shares of these three are larger than that: at 64 wide on E2E their best rate was the largest of those around it."""

TRAINED_AT = "quantize_coefficients"
"""Option of the bits that a method is trained at; what LoRA lacks, :mod:`randbasis.compare.lora_precision` adds."""
SEED_AND_COEFFICIENTS = ("unilora", "fourierft")
"""Rivals whose file holds coefficients and nothing else, so that it can hold codes of few bits as well."""
QUANTIZABLE = (*(name for name in METHOD_NAMES if name != NO_ADAPTER), "dora", *SEED_AND_COEFFICIENTS)
"""Methods that can be stored at fewer bits than they were trained at."""
OF_FOURIER = 150.0 / 768**2
"""FourierFT's scale an entry of ΔW: PEFT's default is for the 768 x 768 matrices of RoBERTa-base, and the inverse
transform divides by the number of entries; on matrices of 64 x 64 it would start with noise larger than the weights."""

METHODS: Mapping[str, tuple[str, ...]] = {
    **{name: tuple(sorted(words - {"targets", "seed", "allot"})) for name, words in method_words().items()},
    "lora": ("alpha", "dropout", TRAINED_AT, "rank"),
    **{name: options for name, (_, _, options) in RIVALS.items()},
    WHOLE: (),
}
"""Method → the options that a row may give; where training starts is said by its ``start``."""


def configuration(
    method: str,
    options: Mapping[str, Any],
    shapes: Sequence[Shape],
    *,
    targets: tuple[str, ...],
    seed: int,
    **kept: Any,
) -> PeftConfig | None:
    """The PEFT configuration of a row.

    Args:
        method: of the row.
        options: its options with the size that its budget means.
        shapes: the adapted matrices.
        targets: modules that the adapter is put on.
        seed: of the basis.
        kept: ``task_type`` and ``head``, the modules that are trained and saved whole.

    Returns:
        None where there is no adapter.
    """
    if method in (NO_ADAPTER, WHOLE):
        return None
    if method not in RIVALS:
        words = AdapterSettings(method=method, targets=targets, seed=seed, **_own(method, dict(options)))
        return peft_config(words, task_type=kept["task_type"], head=kept["head"])
    name, fixed, _ = RIVALS[method]
    arguments = fixed | _of_rival(method, dict(options), shapes, seed)
    head: list[str] = kept["head"]
    config: Any = getattr(peft, name)
    if targets == ("all-linear",) and head and "exclude_modules" in config.__dataclass_fields__:
        arguments["exclude_modules"] = head
    return config(
        **arguments,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        task_type=kept["task_type"],
        modules_to_save=head or None,
    )


def _own(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Scales of 1 at every budget where the method has one and the row says nothing."""
    if method == "nola":
        options.setdefault("rank", NOLA_RANK)
    if method in ("nola", "lora", "loraxs"):
        options.setdefault("alpha", float(options["rank"]))
    if method == "lora":
        options.pop(TRAINED_AT, None)
    return options


def _of_rival(method: str, options: dict[str, Any], shapes: Sequence[Shape], seed: int) -> dict[str, Any]:
    if method == "dora":
        rank = options["rank"]
        return {"r": rank, "lora_alpha": options.get("alpha", rank)}
    if method == "vblora" and "vector_length" not in options:
        # It must divide every side of every matrix; the authors' 256 does for models of the usual widths.
        sides = math.gcd(*(side for shape in shapes for side in shape))
        options["vector_length"] = max(n for n in range(1, min(256, sides) + 1) if sides % n == 0)
    if method == "fourierft" and "scaling" not in options:
        entries = [out * in_ for out, in_ in shapes]
        options["scaling"] = float(f"{OF_FOURIER * sum(entries) / len(entries):.2g}")
    seeds = {"unilora": "proj_seed", "fourierft": "random_loc_seed", "tinylora": "projection_seed"}
    seeds |= {"peft-vera": "projection_prng_key", "peft-randlora": "projection_prng_key"}
    return options | ({seeds[method]: seed} if method in seeds else {})


def middle_rate(method: str, task: str, width: int | None) -> float:
    """The learning rate in the middle of those that a row tries where it names none: ``train``'s own default.

    Args:
        method: of the row.
        task: of the data set.
        width: of the hidden states of the base.
    """
    if method == NO_ADAPTER:
        return HEAD_ALONE
    if method == WHOLE:
        # By the law of LoRA's rate, which gives what is usual for whole fine-tuning, 5e-5 to 1e-4 at width 768.
        return float(f"{_default('lora', task, width) / 10:.1g}")
    of, share = RATES.get(method, (method, 1.0))
    return float(f"{_default(of, task, width) * share:.2g}")


def _default(method: str, task: str, width: int | None) -> float:
    return float(choose(method, task, width)["learning_rate"].value)
