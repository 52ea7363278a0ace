"""Classes or numbers from one text or two."""

import warnings
from collections.abc import Sequence
from typing import Any
from unicodedata import normalize

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification

from randbasis.adapters.base_model import read_config
from randbasis.errors import EmptyDataError, LabelError, SettingError, near
from randbasis.train.machine import Quantized
from randbasis.train.metrics import accuracy, f1, f1_macro, matthews, pearson, spearman
from randbasis.train.model_reading import heads_of, read_model, read_tokenizer
from randbasis.train.pooled import PooledClassifier
from randbasis.train.randomness import confined_randomness
from randbasis.train.settings import DataSettings, TrainSettings
from randbasis.train.tabular import Table
from randbasis.train.task import CUT, Batch, Example, Task, inference

MISSING_NAMES = ("nan", "NaN", "None", "<NA>", "NaT")
"""How Python and pandas write a value that is not there."""

CLASS_METRICS = ("accuracy", "matthews", "f1_macro", "loss")
TWO_CLASS_METRICS = ("accuracy", "matthews", "f1", "f1_macro", "loss")
NUMBER_METRICS = ("pearson", "spearman", "loss")
DEFAULT_MAX_LENGTH = 512


class TextClassification(Task):
    """Sequence classification; without ``labels`` a regression.

    Args:
        tokenizer: of the base.
        labels: names of the classes in the order of the logits, ``None`` for a regression.
        columns: ``text``, ``text_pair`` (or ``None``), ``label``: where they are in a table.
        max_length: tokens a row.
        pooling: ``"mean" | "cls" | "model"``.
    """

    name = "sequence-classification"
    peft_task_type = "SEQ_CLS"

    def __init__(
        self,
        tokenizer: Any,
        labels: tuple[str, ...] | None,
        columns: dict[str, str | None],
        max_length: int,
        pooling: str,
    ):
        self.tokenizer = tokenizer
        self.labels = labels
        self.columns = columns
        self.max_length = max_length
        self.pooling = pooling
        self.auto_class = "AutoModelForSequenceClassification" if pooling == "model" else None
        self.drawn: list[str] = []
        self.mean: float | None = None
        self.metric_names = class_metrics(len(labels)) if labels else NUMBER_METRICS
        self.choose_metric(None)

    @classmethod
    def prepare(cls, settings: TrainSettings, table: Table) -> "TextClassification":
        """The task as the training rows imply it.

        Raises:
            SettingError: no column of texts or labels was named, or numbers were to be smoothed.
            LabelError: fewer than two classes, or a label that is not a number in a regression.
        """
        data = settings.data
        if data.text_column is None or data.label_column is None:
            raise SettingError(
                f"{cls.name} needs text_column and label_column; {table.source} has {', '.join(table.columns)}"
            )
        columns = {"text": data.text_column, "text_pair": data.text_pair_column, "label": data.label_column}
        labels = classes_of(table.column(data.label_column), data, table.source, settings.loop.metric)
        check_smoothing(labels, settings.loop.label_smoothing, table.source)
        config = read_config(settings.model)
        tokenizer = read_tokenizer(settings.model)
        longest = min(allowed_length(tokenizer, config), settings.max_length or DEFAULT_MAX_LENGTH)
        pooling = settings.pooling if settings.pooling != "auto" else _own_pooling(config)
        task = cls(tokenizer, labels, columns, longest, pooling)
        if labels is None:
            numbers = [as_number(value, table.source) for value in table.column(data.label_column)]
            task.mean = sum(numbers) / len(numbers)
        task.choose_metric(settings.loop.metric)
        return task

    @classmethod
    def from_description(cls, description: dict[str, Any], model: str) -> "TextClassification":
        """The task that an adapter directory describes, on the base ``model``."""
        labels = description["labels"]
        return cls(
            read_tokenizer(model),
            tuple(labels) if labels else None,
            description["columns"],
            description["max_length"],
            description["pooling"],
        )

    def description(self) -> dict[str, Any]:
        """See :meth:`Task.description`."""
        return {
            "task": self.name,
            "labels": list(self.labels) if self.labels else None,
            "columns": self.columns,
            "max_length": self.max_length,
            "pooling": self.pooling,
        }

    def load_model(self, name: str, *, dtype: str, seed: int, quantized: Quantized | None = None) -> nn.Module:
        """See :meth:`Task.load_model`."""
        count = len(self.labels) if self.labels else 1
        with confined_randomness(seed):
            if self.pooling != "model":
                model: Any = PooledClassifier.from_encoder(
                    name, num_labels=count, pooling=self.pooling, dtype=dtype, quantized=quantized
                )
            else:
                model, self.drawn = read_model(
                    AutoModelForSequenceClassification, name, dtype, quantized=quantized, num_labels=count
                )
                model.config.problem_type = "single_label_classification" if self.labels else "regression"
                if model.config.pad_token_id is None:
                    model.config.pad_token_id = pad_id(self.tokenizer)
        if self.mean is not None:
            start_at(model, self.head_modules(model), self.mean)
        if self.labels:
            model.config.id2label = dict(enumerate(self.labels))
            model.config.label2id = {label: i for i, label in enumerate(self.labels)}
        return model

    def head_modules(self, model: nn.Module) -> list[str]:
        """See :meth:`Task.head_modules`."""
        return heads_of(model, self.drawn)

    def encode(self, table: Table, *, training: bool) -> list[Example]:
        """See :meth:`Task.encode`; the label is left out when the table has no such column and need not have it."""
        assert self.columns["text"] is not None
        assert self.columns["label"] is not None
        texts = table.texts(self.columns["text"])
        pairs = table.texts(self.columns["text_pair"]) if self.columns["text_pair"] else None
        if not texts:
            raise EmptyDataError(f"{table.source} has no rows")
        encoded = self.tokenizer(texts, pairs, verbose=False)
        examples: list[Example] = [{key: encoded[key][i] for key in encoded} for i in range(len(texts))]
        for i, example in enumerate(examples):
            example[CUT] = len(example["input_ids"]) > self.max_length
            if example[CUT]:
                pair = None if pairs is None else pairs[i]
                example |= dict(self.tokenizer(texts[i], pair, truncation=True, max_length=self.max_length))
        if training or self.columns["label"] in table.columns:
            for number, value in enumerate(table.column(self.columns["label"]), 1):
                examples[number - 1]["label"] = self._label(value, f"row {number} of {table.source}")
        return examples

    def _label(self, value: Any, where: str) -> int | float:
        if self.labels is None:
            return as_number(value, where)
        try:
            return self.labels.index(label_name(value))
        except ValueError:
            raise LabelError(
                f"label {label_name(value)!r} ({where}) was not seen in training; "
                f"{near(label_name(value), self.labels)}"
            ) from None

    def collate(self, examples: Sequence[Example]) -> Batch:
        """See :meth:`Task.collate`."""
        batch = pad_batch(examples, ("input_ids", "attention_mask", "token_type_ids"), pad_id(self.tokenizer))
        if "label" in examples[0]:
            batch["labels"] = torch.tensor(
                [e["label"] for e in examples], dtype=torch.long if self.labels else torch.float32
            )
        return batch

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """See :meth:`Task.lengths`."""
        return [len(example["input_ids"]) for example in examples]

    def score(self, model: nn.Module, examples: Sequence[Example], batch_size: int) -> dict[str, float]:
        """Loss with accuracy and Matthews' coefficient, or with Pearson's and Spearman's for a regression."""
        logits = logits_of(self, model, examples, batch_size)
        if self.labels:
            return class_scores(logits, [e["label"] for e in examples])
        expected, predicted = [float(e["label"]) for e in examples], [float(value) for value in logits.squeeze(-1)]
        return {
            "loss": float(mse_loss(logits.squeeze(-1).double(), torch.tensor(expected, dtype=torch.float64))),
            "pearson": pearson(predicted, expected),
            "spearman": spearman(predicted, expected),
        }

    def predict(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int, *, probabilities: bool = False
    ) -> list[dict[str, Any]]:
        """The label and its probability, or the number."""
        if self.labels is None and probabilities:
            raise self.no_classes()
        logits = logits_of(self, model, examples, batch_size)
        if self.labels is None:
            return [{"prediction": float(value)} for value in logits.squeeze(-1)]
        return class_answers(logits, self.labels, every=probabilities)


def classes_of(
    values: Sequence[Any], data: DataSettings, source: str, metric: str | None = None
) -> tuple[str, ...] | None:
    """The sorted names of the classes, or ``None`` when the labels are numbers to be predicted.

    Raises:
        LabelError: fewer than two classes.
        SettingError: an unknown kind of labels.
    """
    if data.label_kind not in ("auto", "class", "number"):
        raise SettingError(f"label_kind {data.label_kind!r} is unknown; there are: auto, class, number")
    if data.label_kind != "number" and "" in map(label_name, values):
        row = 1 + list(map(label_name, values)).index("")
        raise LabelError(f"row {row} of {source} has an empty label; fill it in or remove the row")
    if data.label_kind == "number" or (
        data.label_kind == "auto" and (metric in ("pearson", "spearman") or _fractional(values))
    ):
        return None
    names = sorted({label_name(value) for value in values})
    check_label_names(names, source, said=data.label_kind == "class")
    if len(names) < 2:
        raise LabelError(f"{source} has only one label, {names[0]!r}; at least two are needed to tell apart")
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    return tuple(names)


def check_smoothing(labels: tuple[str, ...] | None, smoothing: float, source: str) -> None:
    """Raises SettingError where numbers were to be smoothed."""
    if labels is None and smoothing:
        raise SettingError(
            f"label_smoothing {smoothing} has no meaning here: the labels of {source} are numbers to be predicted, and "
            "it needs classes; leave it out, or say label_kind class"
        )


def check_label_names(names: Sequence[str], source: str, *, said: bool) -> None:
    """Refuse names that are hardly meant as classes, unless the user ``said`` that the labels are classes.

    Raises:
        LabelError: a missing value as pandas writes it, or names that differ by case, spaces or form alone.
    """
    alike: dict[str, str] = {}
    for name in () if said else names:
        if name in MISSING_NAMES:
            raise LabelError(
                f"{source} has the label {name!r}, which is how a missing value is written; fill it in or remove the "
                "rows, or say label_kind class if it is the name of a class"
            )
        other = alike.setdefault(_folded(name), name)
        if other != name:
            raise LabelError(
                f"the labels {other!r} and {name!r} of {source} differ in their spelling alone; write them alike, or "
                "say label_kind class if they are two classes"
            )


def _folded(name: str) -> str:
    """A name without what two spellings of one class differ by: case, spaces, forms of a letter or of a number."""
    try:
        return repr(float(name))
    except ValueError:
        return " ".join(normalize("NFKC", name).casefold().split())


def label_name(value: Any) -> str:
    """A label as the name of its class."""
    return str(value).strip()


def as_number(value: Any, where: str) -> float:
    """A label as a finite number.

    Raises:
        LabelError: it is not one.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if number != number or number in (float("inf"), float("-inf")):
        raise LabelError(f"label {value!r} ({where}) is not a finite number; for classes use label_kind class")
    return number


def logits_of(task: Task, model: nn.Module, examples: Sequence[Example], batch_size: int) -> Tensor:
    """Logits ``[examples, labels]`` in float32 on the CPU, in the order of the examples."""
    if not examples:
        raise EmptyDataError("there are no rows to evaluate")
    rows: dict[int, Tensor] = {}
    with inference(model):
        for places, batch in task.batches(model, examples, batch_size):
            batch.pop("labels", None)
            rows.update(zip(places, model(**batch).logits.float().cpu(), strict=True))
    return torch.stack([rows[i] for i in range(len(examples))])


def class_metrics(classes: int) -> tuple[str, ...]:
    """The names of what :func:`class_scores` gives."""
    return TWO_CLASS_METRICS if classes == 2 else CLASS_METRICS


def class_scores(logits: Tensor, expected: list[int]) -> dict[str, float]:
    """Mean cross-entropy in nats, accuracy, Matthews' coefficient, F1 over the classes and, of two, of the second."""
    predicted = [int(value) for value in logits.argmax(-1)]
    return {
        "loss": float(cross_entropy(logits.double(), torch.tensor(expected))),
        "accuracy": accuracy(predicted, expected),
        "matthews": matthews(predicted, expected),
        **({"f1": f1(predicted, expected)} if logits.shape[-1] == 2 else {}),
        "f1_macro": f1_macro(predicted, expected, logits.shape[-1]),
    }


def class_answers(logits: Tensor, labels: Sequence[str], *, every: bool = False) -> list[dict[str, Any]]:
    """The most probable class of each row and its probability; with ``every`` those of all classes by name, too."""
    chances = logits.double().softmax(-1)
    best = chances.max(-1)
    answers: list[dict[str, Any]] = [
        {"prediction": labels[int(i)], "probability": float(p)} for p, i in zip(best.values, best.indices, strict=True)
    ]
    for answer, row in zip(answers, chances if every else [], strict=every):
        answer["probabilities"] = {label: float(p) for label, p in zip(labels, row, strict=True)}
    return answers


def start_at(model: nn.Module, heads: Sequence[str], mean: float) -> None:
    """Let a head of one number predict the mean of the labels, or most of its training goes into finding that."""
    layers = [layer for name in heads for layer in model.get_submodule(name).modules()]
    for layer in layers:
        if isinstance(layer, nn.Linear) and layer.out_features == 1 and "bias" in dict(layer.named_parameters()):
            nn.init.constant_(layer.bias, mean)


def pad_batch(examples: Sequence[Example], keys: Sequence[str], padding: int, *, left: bool = False) -> Batch:
    """Lists of token ids and masks as tensors ``[batch, longest]``; the keys that the examples lack are left out."""
    longest = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": padding, "labels": -100}
    batch: Batch = {}
    for key in keys:
        if key not in examples[0]:
            continue
        rows: list[list[int]] = []
        for example in examples:
            pad = [fill.get(key, 0)] * (longest - len(example[key]))
            rows.append(pad + example[key] if left else example[key] + pad)
        batch[key] = torch.tensor(rows)
    return batch


def pad_id(tokenizer: Any) -> int:
    """A token id for padding; what it is does not matter, since the attention mask hides it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def allowed_length(tokenizer: Any, config: Any) -> int:
    """The longest row that tokenizer and model take, as far as they say."""
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    return min(int(limit) for limit in limits if limit is not None and limit > 0)


def _own_pooling(config: Any) -> str:
    """``model``, so that transformers and PEFT load what was trained; ``mean`` where transformers has no such class."""
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return "model"
    warnings.warn(
        f"transformers has no class for sequence classification with a {config.model_type}: its hidden states are "
        "averaged under a head of randbasis (pooling mean), which randbasis alone can load",
        stacklevel=2,
    )
    return "mean"


def _fractional(values: Sequence[Any]) -> bool:
    try:
        return any(float(value) != int(float(value)) for value in values)
    except (TypeError, ValueError, OverflowError):
        return False
