"""The model card of an adapter: what it is, what it holds and how to load it, in words and as metadata of a hub."""

import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData

from randbasis.adapters.saved import SavedAdapter
from randbasis.tuner.config import RandbasisConfig
from randbasis.tuner.meaning import MEANING
from randbasis.tuner.registration import PREFIX

_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""PEFT's task type → the class of transformers that makes its base; ``AutoModel`` for any other."""
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
    "embedding": "sentence-similarity",
    "causal-lm": "text-generation",
    "sequence-classification": "text-classification",
    "image-classification": "image-classification",
}
"""PEFT's task type, or the task of ``randbasis train`` → pipeline tag of the hub."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside what the adapter's own files say.

    Attributes:
        repo_id: of the hub, ``"me/e2e-nola"``.
        base_name: hub name of the base model.
        license: identifier of the hub, such as ``"apache-2.0"``; None leaves it out.
        weights_bytes: of ``adapter_model.safetensors``.
        packed: name of the packed file, its bits and its bytes, where there is one.
        task: what ``randbasis train`` wrote of the task; empty for an adapter of another origin.
        metrics: name → value on held-out rows.
        eval_rows: how many those were.
    """

    repo_id: str
    base_name: str
    license: str | None
    weights_bytes: int
    packed: tuple[str, int, int] | None = None
    task: Mapping[str, Any] = field(default_factory=dict[str, Any])
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    eval_rows: int | None = None


def model_card(found: SavedAdapter, facts: CardFacts) -> str:
    """The text of ``README.md``: metadata for the hub and Markdown for the reader.

    Args:
        found: the adapter.
        facts: what its files do not say.
    """
    config = found.config
    data = ModelCardData(
        base_model=facts.base_name,
        library_name="peft",
        license=facts.license,
        pipeline_tag=_pipeline(config, facts.task),
        metrics=sorted(facts.metrics.keys() - {"loss"}) or None,
        tags=["peft", "randbasis", config.method, f"base_model:adapter:{facts.base_name}", "transformers"],
    )
    parts = [_introduction(found, facts), _table(_rows(found, facts)), _loading(found, facts)]
    if facts.metrics:
        parts.append(_results(facts))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _introduction(found: SavedAdapter, facts: CardFacts) -> str:
    config = found.config
    frozen = (
        "The frozen matrices between which they stand are not stored, but made of the base model's weights (digest "
        f"{config.base_weights}); on weights of another digest it is refused."
        if config.method_cls.needs_base
        else "The random matrices that they combine are not stored, but redrawn from seed "
        f"{config.seed}, bit for bit, on any machine."
    )
    return (
        f"# {facts.repo_id.rpartition('/')[2]}\n\n"
        f"A {_citation(config)[0]} adapter of [{facts.base_name}](https://huggingface.co/{facts.base_name}): "
        f"{_coefficients(found):,} trained coefficients. {frozen}"
    )


def _rows(found: SavedAdapter, facts: CardFacts) -> Iterable[tuple[str, str]]:
    config = found.config
    yield "method", ", ".join(_citation(config))
    for name, value in config.hyperparameters().items():
        if value is not None:
            yield name, _shown(value)
    yield "adapted matrices", f"{len(found.modules)} layers: {_shown(config.target_modules)}"
    if config.target_slices:
        yield "parts", _shown({name: ", ".join(parts) for name, parts in config.target_slices.items()})
    yield "coefficients", f"{_coefficients(found):,}"
    if found.head:
        yield "trained beside them", f"{sum(map(prod, found.head.values())):,} parameters of the head"
    yield "`adapter_model.safetensors`", f"{facts.weights_bytes:,} bytes"
    if facts.packed is not None:
        name, bits, size = facts.packed
        yield f"`{name}`", f"{size:,} bytes, {bits} bits a coefficient"


def _loading(found: SavedAdapter, facts: CardFacts) -> str:
    parts = ["## How to load it", "```sh\npip install randbasis\n```"]
    if facts.task.get("pooling", "model") == "model" and facts.task.get("task") != "image-classification":
        parts.append(_peft_snippet(found, facts))
    if facts.task:
        parts.append(_task_snippet(facts))
    if facts.packed is not None:
        parts.append(_packed_snippet(facts))
    return "\n\n".join(parts)


def _peft_snippet(found: SavedAdapter, facts: CardFacts) -> str:
    auto = _AUTO.get(str(found.config.task_type), "AutoModel")
    labels = [shape[0] for name, shape in found.head.items() if name.endswith(".weight")]
    options = (
        f", num_labels={labels[-1]}"
        if auto.endswith(("SequenceClassification", "TokenClassification")) and labels
        else ""
    )
    return (
        "```python\n"
        "import randbasis  # adds the method to PEFT\n"
        "from peft import PeftModel\n"
        f"from transformers import {auto}\n\n"
        f'base = {auto}.from_pretrained("{facts.base_name}"{options})\n'
        f'model = PeftModel.from_pretrained(base, "{facts.repo_id}")\n'
        "```"
    )


def _task_snippet(facts: CardFacts) -> str:
    return (
        "With its head and its task, as it was trained by `randbasis train`:\n\n"
        "```python\n"
        "import randbasis\n"
        "from huggingface_hub import snapshot_download\n\n"
        f'adapter = randbasis.load(snapshot_download("{facts.repo_id}"))\n'
        f"{_asking(facts)}\n"
        "```\n\n"
        "or, for a file of rows, `randbasis predict --adapter FOLDER --data rows.csv` on the folder that "
        f"`hf download {facts.repo_id} --local-dir FOLDER` wrote."
    )


def _asking(facts: CardFacts) -> str:
    """How the adapter is asked, as its task takes rows."""
    if facts.task.get("task") == "causal-lm":
        return 'adapter.generate(["a prompt"])'
    if facts.task.get("task") == "image-classification":
        return 'adapter.predict(["image.png"])'
    pair = (facts.task.get("columns") or {}).get("text_pair") is not None
    return 'adapter.predict([("a text", "another")])' if pair else 'adapter.predict(["a text"])'


def _packed_snippet(facts: CardFacts) -> str:
    name = facts.packed[0] if facts.packed else ""
    return (
        "The same coefficients in one packed file, for servers and stores:\n\n"
        "```python\n"
        "from randbasis.adapter_file import read\n\n"
        f'packed = read("hf://{facts.repo_id}/{name}")\n'
        "```"
    )


def _results(facts: CardFacts) -> str:
    rows = f" on {facts.eval_rows:,} held-out rows" if facts.eval_rows else ""
    values = _table((name, f"{value:.4f}") for name, value in facts.metrics.items())
    return f"## Results\n\nOf the saved parameters{rows}:\n\n{values}"


def _citation(config: RandbasisConfig) -> list[str]:
    """Name, authors, year and paper of a method, as the first line of its file says; else its name alone."""
    told = inspect.getdoc(sys.modules[type(config.method_for("")).__module__]) or config.method
    return [part.strip() for part in told.partition(":")[0].split(",")]


def _coefficients(found: SavedAdapter) -> int:
    beside = (f".{PREFIX}streams.", f".{MEANING}.")
    return sum(
        prod(shape)
        for name, shape in found.shapes.items()
        if f".{PREFIX}" in name and not any(one in name for one in beside)
    )


def _pipeline(config: RandbasisConfig, task: Mapping[str, Any]) -> str | None:
    return _PIPELINES.get(str(task.get("task"))) or _PIPELINES.get(str(config.task_type))


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)])


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_shown(item)}" for name, item in cast("dict[str, Any]", value).items())
    if isinstance(value, list | set | tuple):
        return ", ".join(sorted(map(str, cast("Iterable[Any]", value))))
    return str(value)
