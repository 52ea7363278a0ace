"""The studies of ``docs/results.md``: real data, small pretrained models, rows alike in all but the method."""

from dataclasses import replace
from pathlib import Path

from randbasis.errors import DataMissingError
from randbasis.train.loop_settings import LoopSettings
from randbasis.train.settings import DataSettings, TrainSettings
from studies.study import Row, Setting, Study

STUDIES = ("sst2", "vision", "e2e", "quantization")

HEAD_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
LORA_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
NOLA_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
VERA_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RANDLORA_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)

ADAPTERS = (
    Row("LoRA r=1", "lora", 1.0, LORA_RATES),
    Row("LoRA r=4", "lora", 4.0, LORA_RATES),
    Row("NOLA, half of LoRA r=1", "nola", 0.5, NOLA_RATES),
    Row("NOLA, as LoRA r=1", "nola", 1.0, NOLA_RATES),
    Row("VeRA, as LoRA r=1", "vera", 1.0, VERA_RATES),
    Row("RandLoRA, as LoRA r=4", "randlora", 4.0, RANDLORA_RATES),
)
HALF_DECADES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
AFTERWARDS = (16, 8, 4, 3)
"""Bits that trained coefficients are quantized to, as in the paper's table."""
NOLA_SHARE = 144_000 / 184_320
"""Coefficients of NOLA for one of LoRA r=1 in that table: GPT-2 L, query and value."""
QUANTIZED = (
    Row("frozen", "none", 0.0),
    Row("LoRA r=1", "lora", 1.0, afterwards=AFTERWARDS),
    Row("LoRA r=1, QAT 3 bits", "lora", 1.0, bits=3),
    Row("LoRA r=1, QAT 2 bits", "lora", 1.0, bits=2),
    Row("NOLA", "nola", NOLA_SHARE, afterwards=AFTERWARDS),
    Row("NOLA, QAT 3 bits", "nola", NOLA_SHARE, bits=3),
    Row("NOLA, QAT 2 bits", "nola", NOLA_SHARE, bits=2),
)
WITH_HEAD = (Row("frozen + head", "none", 0.0, HEAD_RATES), *ADAPTERS)
WITHOUT_HEAD = (
    Row("frozen, nothing trained", "none", 0.0, ()),
    Row("LoRA r=1", "lora", 1.0, LORA_RATES[:4]),
    Row("LoRA r=4", "lora", 4.0, LORA_RATES[:4]),
    Row("NOLA, half of LoRA r=1", "nola", 0.5, NOLA_RATES[1:]),
    Row("NOLA, as LoRA r=1", "nola", 1.0, NOLA_RATES[1:]),
    Row("VeRA, as LoRA r=1", "vera", 1.0, VERA_RATES[:4]),
    Row("RandLoRA, as LoRA r=4", "randlora", 4.0, RANDLORA_RATES[:4]),
)


def study_named(name: str, data: Path | None = None) -> Study:
    """One of :data:`STUDIES`.

    Args:
        name: which.
        data: the folder of data sets and models; ``None`` for a study that is reported on and not run.

    Raises:
        DataMissingError: something that the study reads is not there.
    """
    made = {"sst2": _sst2, "vision": _vision, "e2e": _e2e, "quantization": _quantization}
    study = made[name](data or Path())
    if data is None:
        return study
    for setting in study.settings:
        base = setting.base
        for path in (base.model, *base.data.train_sources, *base.data.eval_sources, setting.dev):
            if path is not None and not Path(path).exists():
                raise DataMissingError(
                    f"study {name!r} reads {path}, which is not there; give the folder of data sets and models"
                )
    return study


def _sst2(data: Path) -> Study:
    base = TrainSettings(
        task="sequence-classification",
        model=str(data / "minilm_l6_h384"),
        data=DataSettings(
            train=data / "glue" / "sst2" / "train.tsv.gz",
            eval=data / "glue" / "sst2" / "dev.tsv.gz",
            text_column="sentence",
            label_column="label",
            limit=8000,
        ),
        loop=LoopSettings(batch_size=16, eval_batch_size=64, max_steps=500, threads=1),
        output="",
        pooling="mean",
        max_length=64,
    )
    setting = Setting("SST-2", base, targets=("query", "value"), seeds=3, sweep_steps=120, dev_rows=400, dev_words=12)
    return Study("sst2", "SST-2 on MiniLM-L6-H384", WITH_HEAD, (setting,), ("accuracy", "loss"))


def _vision(data: Path) -> Study:
    settings: list[Setting] = []
    for name, archive, size in (
        ("flowers12", data / "flowers12" / "flowers12_224.zip", 64),
        ("cifar10", data / "cifar10" / "cifar10_subset.zip", 96),
    ):
        for shots in (10, 5):
            base = TrainSettings(
                task="image-classification",
                model=str(data / "vit_tiny_patch16_224"),
                data=DataSettings(train=archive, shots=shots, eval_limit=500),
                loop=LoopSettings(batch_size=32, eval_batch_size=64, max_steps=40, schedule="cosine", threads=1),
                output="",
                image_size=size,
                flip=True,
            )
            settings.append(
                Setting(
                    f"{name}, {shots} shots",
                    base,
                    targets=("q_proj", "v_proj"),
                    seeds=6,
                    sweep_steps=40,
                    dev_rows=20,
                    sample_sets=3,
                    rates_of=None if shots == 10 else f"{name}, 10 shots",
                )
            )
    return Study("vision", "Few-shot images on ViT-Tiny/16", WITH_HEAD, tuple(settings), ("accuracy", "loss"))


def _e2e(data: Path) -> Study:
    settings: list[Setting] = []
    for model, length, steps in (("llama_stories260k", 160, 300), ("llama_babyllama105", 208, 150)):
        base = TrainSettings(
            task="causal-lm",
            model=str(data / model),
            data=DataSettings(
                train=data / "e2e" / "trainset.csv.gz",
                eval=data / "e2e" / "testset_w_refs.csv.gz",
                prompt_column="mr",
                target_column="ref",
                limit=4000,
                eval_limit=64,
            ),
            loop=LoopSettings(batch_size=8, eval_batch_size=64, max_steps=steps, threads=1),
            output="",
            max_length=length,
            end_token="</s>",
        )
        settings.append(
            Setting(
                f"E2E, {model}",
                base,
                targets=("all-linear",),
                seeds=3,
                sweep_steps=60,
                dev_rows=32,
                dev=str(data / "e2e" / "devset.csv.gz"),
            )
        )
    return Study("e2e", "E2E on two tiny language models", WITHOUT_HEAD, tuple(settings), ("bleu", "loss", "chrf"))


def _quantization(data: Path) -> Study:
    """The settings of the other studies and the learning rates chosen there; training at few bits has its own sweep."""
    settings = (
        replace(_e2e(data).settings[0], rates=_quantized_rates(lora=3e-2, nola=3e-2)),
        replace(_sst2(data).settings[0], rates=_quantized_rates(lora=3e-3, nola=1e-2, head=1e-2)),
    )
    return Study("quantization", "Coefficients of few bits", QUANTIZED, settings, ("accuracy", "bleu", "loss"))


def _quantized_rates(
    *, lora: float, nola: float, head: float | None = None
) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """One rate for full precision; up to a decade to either side of it, too, for training at few bits."""
    rates: dict[str, tuple[float, ...]] = {} if head is None else {QUANTIZED[0].name: (head,)}
    for row in QUANTIZED[1:]:
        rate = lora if row.method == "lora" else nola
        at = HALF_DECADES.index(rate)
        rates[row.name] = (rate,) if row.bits is None else HALF_DECADES[at - 2 : at + 3]
    return tuple(rates.items())
