"""How much the rows of each class count in the loss."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from randbasis.errors import SettingError, near

BALANCED = "balanced"


def class_weights(told: str, labels: Sequence[str] | None, rows: Sequence[int]) -> Tensor:
    """The weight of each class, so that the mean over the training rows is 1: only their ratios matter.

    Args:
        told: ``"balanced"``, each class as much as any other; or ``LABEL=NUMBER`` for every class, with commas between.
        labels: the names of the classes.
        rows: the class of each training row.

    Raises:
        SettingError: there are no classes, or the weights are not one positive number for each.
    """
    if not labels:
        raise SettingError(f"class_weights {told!r} needs classes, and the labels are numbers; leave it out")
    counts = Counter(rows)
    if told == BALANCED:
        weights = [1.0 / counts[i] if counts[i] else 0.0 for i in range(len(labels))]
    else:
        numbers = _numbers(told, labels)
        weights = [numbers[label] for label in labels]
    mean = sum(weights[i] * count for i, count in counts.items()) / len(rows)
    return torch.tensor([weight / mean for weight in weights])


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Σ weight · cross-entropy / rows: divided by the rows and not by their weights, so that batches weigh alike."""
    losses = cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    return (weights.to(losses.device)[labels] * losses).mean()


def _numbers(told: str, labels: Sequence[str]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for part in told.split(","):
        label, _, number = part.rpartition("=")
        try:
            numbers[label.strip()] = float(number)
        except ValueError:
            numbers[label.strip()] = float("nan")
    strange = next((name for name in numbers if name not in labels), None)
    if strange is not None:
        raise SettingError(
            f"class_weights must be {BALANCED!r} or LABEL=NUMBER for each class, got {told!r}; {near(strange, labels)}"
        )
    wrong = [label for label in labels if not 0 < numbers.get(label, 0.0) < float("inf")]
    if wrong:
        raise SettingError(f"class_weights must give each class a number above 0, got {told!r} for {wrong[0]!r}")
    return numbers
