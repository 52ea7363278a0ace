"""The contract of a task: rows to examples, examples to batches, a model to scores and answers."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from randbasis.errors import SettingError, near
from randbasis.progress import Track
from randbasis.train.machine import Quantized
from randbasis.train.tabular import Table

Example = dict[str, Any]
Batch = dict[str, Any]

CUT = "cut"
"""Key of an example: whether its text was longer than the maximum length."""

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


def count_cut(examples: Sequence[Example]) -> dict[str, int]:
    """How many rows were cut at the maximum length, and of how many nothing is left to learn."""
    gone = sum(1 for e in examples if isinstance(e.get("labels"), list) and set(e["labels"]) == {-100})
    return {"rows": sum(bool(e.get(CUT)) for e in examples), "targets": gone}


def warn_of_cut(task: "Task", examples: Sequence[Example], what: str) -> dict[str, int]:
    """:func:`count_cut`, said aloud where it is not zero; ``what`` the examples are, such as ``"rows of a.csv"``."""
    cut = count_cut(examples)
    if cut["rows"]:
        whole = f", of {cut['targets']} of them the whole target" if cut["targets"] else ""
        warnings.warn(
            f"{cut['rows']} of {len(examples)} {what} are longer than {task.longest()} and were cut{whole}",
            stacklevel=3,
        )
    return cut


class Task(ABC):
    """One kind of problem, with all that is needed to do it again from an adapter directory.

    ``description`` is written beside the adapter; the class method of the same file that reads it gives an equal task.
    """

    name: ClassVar[str]
    peft_task_type: ClassVar[str | None]
    auto_class: str | None
    """The class of transformers that makes the model; ``None`` for one of ours, which transformers does not know."""
    metric_names: tuple[str, ...]
    metric: str
    needs_answers: ClassVar[bool] = True
    """Whether rows can be scored only against answers."""
    of_whole_batches: ClassVar[bool] = False
    """Whether the loss of a row depends on its neighbours in a batch, so that processes cannot share one."""
    class_weights: Tensor | None = None
    """Of the loss that is trained with; what is scored does not know of them."""
    track: Track = staticmethod(iter)
    """Shows how far scores and answers have come."""

    def choose_metric(self, metric: str | None) -> None:
        """Set the metric that checkpoints are compared by; ``None`` takes the first.

        Raises:
            SettingError: the task has no such metric.
        """
        if metric is not None and metric not in self.metric_names:
            raise SettingError(
                f"metric {metric!r} does not apply to {self.name} here; {near(metric, self.metric_names)}"
            )
        self.metric = metric or self.metric_names[0]

    @property
    def greater_is_better(self) -> bool:
        """Whether a greater value of ``metric`` is a better one."""
        return self.metric not in LOWER_IS_BETTER

    @abstractmethod
    def load_model(self, name: str, *, dtype: str, seed: int, quantized: Quantized | None = None) -> nn.Module:
        """The frozen base, at few bits where ``quantized`` says so, with a fresh head drawn from ``seed``."""

    @abstractmethod
    def head_modules(self, model: nn.Module) -> list[str]:
        """Names of the modules that are trained whole, none for a language model."""

    def unused_modules(self, model: nn.Module) -> list[str]:
        """Names of the modules whose result is not used, so that nothing of them should be adapted."""
        return []

    def loss(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """The mean loss over the items of a batch; ``None``: the model's own."""
        return None

    @abstractmethod
    def encode(self, table: Table, *, training: bool) -> list[Example]:
        """Rows as examples; without ``training`` the answers may be missing where the task allows it."""

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Examples as one batch, padded to its longest, with ``labels`` where the examples have them."""

    @abstractmethod
    def score(self, model: nn.Module, examples: Sequence[Example], batch_size: int) -> dict[str, float]:
        """The metrics of the task; exact means over all examples, whatever the batch size."""

    @abstractmethod
    def predict(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int, *, probabilities: bool = False
    ) -> list[dict[str, Any]]:
        """One answer an example, in their order; with ``probabilities`` those of every class.

        Raises:
            SettingError: probabilities are asked for where there are no classes.
        """

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What ``from_description`` of its class needs, as plain values."""

    def loaded_by(self) -> str:
        """Who can load what was trained, for the summary."""
        if self.auto_class is None:
            return "randbasis alone"
        return f"randbasis; PEFT and {self.auto_class} after import randbasis"

    def no_classes(self) -> SettingError:
        """The error where probabilities of classes are asked for and there are none."""
        return SettingError(f"probabilities are of classes, and the adapter was trained for {self.name} without any")

    def longest(self) -> str:
        """What of a text is kept, for messages."""
        return f"{getattr(self, 'max_length', '')} tokens (max_length)"

    def items(self, batch: Batch) -> int:
        """How many items the loss of a batch is the mean over: rows here, learned tokens for a language model."""
        return len(batch["labels"])

    def lengths(self, examples: Sequence[Example]) -> list[int] | None:
        """Lengths to group rows by, ``None`` where all are alike."""
        return None

    def groups(self, table: Table) -> Sequence[object]:
        """One value a row; rows of equal value are trained on or held out together."""
        return range(len(table.rows))

    def training_collate(self, examples: Sequence[Example]) -> Batch:
        """As :meth:`collate`, with augmentation where the task has any."""
        return self.collate(examples)

    def batches(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> Iterator[tuple[list[int], Batch]]:
        """Batches on the device of the model, rows of like length together, with the places of their examples."""
        device = next(model.parameters()).device
        lengths = self.lengths(examples)
        order = sorted(range(len(examples)), key=lambda i: -lengths[i]) if lengths else list(range(len(examples)))
        for start in self.track(range(0, len(order), batch_size)):
            places = order[start : start + batch_size]
            batch = self.collate([examples[i] for i in places])
            yield (
                places,
                {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()},
            )


@contextmanager
def inference(model: nn.Module) -> Generator[None]:
    """Evaluation mode without gradients for a block; the mode of every module is put back after it.

    A base in half precision runs under autocast, as it does in training, so that its float32 head fits.
    """
    training = [module for module in model.modules() if module.training]
    half = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}
    device = next(model.parameters()).device.type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, dtype=half.pop()) if half else nullcontext():
            yield
    finally:
        for module in training:
            module.training = True
