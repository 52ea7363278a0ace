"""Which rows are trained on and which are held out: pure functions of the rows and a seed."""

from collections.abc import Sequence

import numpy as np

from randbasis.errors import EmptyDataError, SettingError


def hold_out(groups: Sequence[object], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split rows into a training and a held-out part.

    Args:
        groups: one value a row; rows of equal value stay together, so that no prompt is in both parts.
        fraction: the share of groups to hold out, in (0, 1).
        seed: decides which.

    Returns:
        The indices of the training rows and of the held-out rows, each in the order of the data.

    Raises:
        SettingError: the fraction is not in (0, 1).
        EmptyDataError: there are too few groups to leave one on each side.
    """
    if not 0.0 < fraction < 1.0:
        raise SettingError(f"eval_fraction must be between 0 and 1, got {fraction}")
    names = list(dict.fromkeys(groups))
    count = max(1, round(fraction * len(names)))
    if count >= len(names):
        raise EmptyDataError(
            f"cannot hold out {fraction} of {len(names)} distinct rows and train on the rest; give more rows"
        )
    held = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]}
    rows = range(len(groups))
    return [i for i in rows if groups[i] not in held], [i for i in rows if groups[i] in held]


def sample(count: int, limit: int, seed: int) -> list[int]:
    """``limit`` of ``count`` row indices, drawn without replacement and given in the order of the data."""
    if limit < 1:
        raise SettingError(f"a limit of rows must be at least 1, got {limit}")
    if limit >= count:
        return list(range(count))
    return sorted(int(i) for i in np.random.default_rng(seed).permutation(count)[:limit])


def few_shot(labels: Sequence[object], shots: int, seed: int) -> list[int]:
    """``shots`` row indices of each label, in the order of the data.

    Raises:
        SettingError: ``shots`` is below 1.
        EmptyDataError: a label has fewer rows.
    """
    if shots < 1:
        raise SettingError(f"shots must be at least 1, got {shots}")
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    for label in sorted(set(labels), key=str):
        rows = [i for i, value in enumerate(labels) if value == label]
        if len(rows) < shots:
            raise EmptyDataError(f"label {label!r} has {len(rows)} rows; {shots} shots were asked for")
        chosen += [rows[int(i)] for i in generator.permutation(len(rows))[:shots]]
    return sorted(chosen)
