"""Texts to vectors whose cosine says how alike they are: pairs, with or without a score, and no head."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel

from randbasis.adapters.base_model import read_config
from randbasis.errors import EmptyDataError, SettingError
from randbasis.train.classification import DEFAULT_MAX_LENGTH, allowed_length, as_number, pad_batch, pad_id
from randbasis.train.machine import Quantized
from randbasis.train.metrics import pearson, spearman
from randbasis.train.model_reading import read_model, read_tokenizer
from randbasis.train.pooled import mean_over
from randbasis.train.randomness import confined_randomness
from randbasis.train.settings import TrainSettings
from randbasis.train.tabular import Table
from randbasis.train.task import CUT, Batch, Example, Task, inference

SCALE = 20.0
"""What a cosine is multiplied by in both losses, as in sentence-transformers."""
SIDES = "sides"
"""Key of an example: the tokens of its one text, or of its two."""
_TOKENS = ("input_ids", "attention_mask", "token_type_ids")
_ROWS_AT_ONCE = 1024


class Embedding(Task):
    """Sentence embeddings: the mean of an encoder's hidden states, trained on pairs of texts.

    Without scores the pairs are alike, and each text is told from the other pairs of its batch; with scores the order
    of the cosines is to be that of the scores.

    Args:
        tokenizer: of the base.
        columns: ``text``, ``text_pair``, and ``label``, the score, or ``None``.
        max_length: tokens a text.
    """

    name = "embedding"
    peft_task_type = "FEATURE_EXTRACTION"
    needs_answers = False
    of_whole_batches = True

    def __init__(self, tokenizer: Any, columns: dict[str, str | None], max_length: int):
        self.tokenizer = tokenizer
        self.columns = columns
        self.max_length = max_length
        self.auto_class = "AutoModel"
        self.metric_names = ("spearman", "pearson") if columns["label"] else ("loss", "accuracy")
        self.choose_metric(None)

    @classmethod
    def prepare(cls, settings: TrainSettings, table: Table) -> "Embedding":
        """The task as the settings imply it.

        Raises:
            SettingError: two columns of texts were not named, or labels were to be smoothed.
        """
        data = settings.data
        if data.text_column is None or data.text_pair_column is None:
            raise SettingError(
                f"{cls.name} needs text_column and text_pair_column; {table.source} has {', '.join(table.columns)}"
            )
        if settings.loop.label_smoothing:
            raise SettingError(f"label_smoothing needs classes, {cls.name} has none; leave it out")
        tokenizer = read_tokenizer(settings.model)
        longest = min(allowed_length(tokenizer, read_config(settings.model)), settings.max_length or DEFAULT_MAX_LENGTH)
        columns = {"text": data.text_column, "text_pair": data.text_pair_column, "label": data.label_column}
        task = cls(tokenizer, columns, longest)
        task.choose_metric(settings.loop.metric)
        return task

    @classmethod
    def from_description(cls, description: dict[str, Any], model: str) -> "Embedding":
        """The task that an adapter directory describes, on the base ``model``."""
        return cls(read_tokenizer(model), description["columns"], description["max_length"])

    def description(self) -> dict[str, Any]:
        """See :meth:`Task.description`."""
        return {"task": self.name, "columns": self.columns, "max_length": self.max_length}

    def load_model(self, name: str, *, dtype: str, seed: int, quantized: Quantized | None = None) -> nn.Module:
        """See :meth:`Task.load_model`; there is no head to draw."""
        with confined_randomness(seed):
            return read_model(AutoModel, name, dtype, quantized=quantized)[0]

    def head_modules(self, model: nn.Module) -> list[str]:
        """None: the vectors are the encoder's."""
        return []

    def unused_modules(self, model: nn.Module) -> list[str]:
        """The pooler, which reads the first token alone."""
        modules = cast("Iterator[tuple[str, nn.Module]]", model.named_modules())
        return [name for name, module in modules if name.startswith("pooler") and not [*module.children()]]

    def encode(self, table: Table, *, training: bool) -> list[Example]:
        """See :meth:`Task.encode`; without ``training`` rows may have one text and no score."""
        names = [self.columns["text"] or "", self.columns["text_pair"] or ""]
        if not training and names[1] not in table.columns:
            names.pop()
        if not table.rows:
            raise EmptyDataError(f"{table.source} has no rows")
        sides = [self._tokens(table.texts(name)) for name in names]
        examples: list[Example] = [
            {SIDES: [tokens for tokens, _ in row], CUT: any(cut for _, cut in row)} for row in zip(*sides, strict=True)
        ]
        score = self.columns["label"]
        if score is not None and (training or score in table.columns):
            for number, (example, value) in enumerate(zip(examples, table.column(score), strict=True), 1):
                example["label"] = as_number(value, f"row {number} of {table.source}")
        return examples

    def _tokens(self, texts: list[str]) -> list[tuple[Example, bool]]:
        whole = self.tokenizer(texts, verbose=False)["input_ids"]
        kept = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        return [({key: kept[key][i] for key in kept}, len(ids) > self.max_length) for i, ids in enumerate(whole)]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """The first texts of all examples, then the second ones, as one batch."""
        sides = [example[SIDES][side] for side in range(len(examples[0][SIDES])) for example in examples]
        batch = pad_batch(sides, _TOKENS, pad_id(self.tokenizer))
        if "label" in examples[0]:
            batch["labels"] = torch.tensor([example["label"] for example in examples], dtype=torch.float32)
        return batch

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """See :meth:`Task.lengths`."""
        return [max(len(side["input_ids"]) for side in example[SIDES]) for example in examples]

    def items(self, batch: Batch) -> int:
        """See :meth:`Task.items`: pairs."""
        return len(batch["input_ids"]) // 2

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See :meth:`Task.loss`."""
        first, second = normalize(_vectors(model, batch), dim=-1).chunk(2)
        if "labels" in batch:
            return cosent((first * second).sum(-1), batch["labels"])
        return contrastive(first, second)

    def score(self, model: nn.Module, examples: Sequence[Example], batch_size: int) -> dict[str, float]:
        """Correlation of cosines and scores; without scores loss and accuracy of finding each text's partner among all.

        Raises:
            EmptyDataError: there are no pairs.
        """
        if not examples or len(examples[0][SIDES]) < 2:
            raise EmptyDataError("there are no pairs of texts to evaluate")
        first, second = normalize(self.vectors(model, examples, batch_size).double(), dim=-1).unbind(1)
        if "label" in examples[0]:
            cosines = [float(value) for value in (first * second).sum(-1)]
            expected = [float(example["label"]) for example in examples]
            return {"spearman": spearman(cosines, expected), "pearson": pearson(cosines, expected)}
        loss, found = 0.0, 0
        for start in range(0, len(first), _ROWS_AT_ONCE):
            logits = SCALE * first[start : start + _ROWS_AT_ONCE] @ second.T
            own = torch.arange(start, start + len(logits))
            loss += float(cross_entropy(logits, own, reduction="sum"))
            found += int((logits.argmax(-1) == own).sum())
        return {"loss": loss / len(first), "accuracy": found / len(first)}

    def predict(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int, *, probabilities: bool = False
    ) -> list[dict[str, Any]]:
        """The cosine of each pair; of single texts their vectors, as ``embedding``."""
        if probabilities:
            raise self.no_classes()
        vectors = self.vectors(model, examples, batch_size)
        if vectors.shape[1] == 1:
            return [{"embedding": cast("list[float]", cast(Any, row[0]).tolist())} for row in vectors]
        first, second = normalize(vectors, dim=-1).unbind(1)
        return [{"prediction": float(value)} for value in (first * second).sum(-1)]

    def vectors(self, model: nn.Module, examples: Sequence[Example], batch_size: int) -> Tensor:
        """``[examples, texts of each, width]`` in float32 on the CPU, in the order of the examples."""
        rows: dict[int, Tensor] = {}
        with inference(model):
            for places, batch in self.batches(model, examples, batch_size):
                sides = cast("tuple[Tensor, ...]", cast(Any, _vectors(model, batch).cpu()).split(len(places)))
                found = torch.stack(sides, 1)
                rows.update(zip(places, found, strict=True))
        return torch.stack([rows[i] for i in range(len(examples))])


def contrastive(first: Tensor, second: Tensor) -> Tensor:
    """Multiple negatives ranking loss of unit vectors: cross-entropy of finding each text's partner in the batch."""
    return cross_entropy(SCALE * first @ second.T, torch.arange(len(first), device=first.device))


def cosent(cosines: Tensor, scores: Tensor) -> Tensor:
    """CoSENT: log(1 + Σ exp(20 (cos_i - cos_j))) over the pairs i, j of which j has the higher score."""
    gaps = SCALE * (cosines[:, None] - cosines[None, :])
    wrong = gaps.masked_fill(scores[:, None] >= scores[None, :], float("-inf")).flatten()
    return torch.cat([gaps.new_zeros(1), wrong]).logsumexp(0)


def _vectors(model: nn.Module, batch: Batch) -> Tensor:
    tokens = {name: value for name, value in batch.items() if name in _TOKENS}
    return mean_over(model(**tokens).last_hidden_state.float(), batch["attention_mask"])
