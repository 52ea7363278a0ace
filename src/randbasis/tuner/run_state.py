"""What is known of an adapter between its configuration and a model; none of it is a hyper-parameter."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from randbasis.errors import AdapterFilesError, BaseMismatchError


@dataclass(frozen=True)
class StoredLayers:
    """The layers that coefficients are at hand for, when an adapter is put on a model to take them.

    Attributes:
        paths: in the base model.
        where: the adapter, for messages.
    """

    paths: frozenset[str]
    where: str

    def check(self, picked: Collection[str]) -> None:
        """Raise unless these are the layers that the options of the adapter pick from a model.

        Raises:
            AdapterFilesError: a layer would be adapted that there are no coefficients for.
            BaseMismatchError: there are coefficients for a layer that would not be adapted.
        """
        missing, extra = sorted({*picked} - self.paths), sorted(self.paths - {*picked})
        if missing:
            raise AdapterFilesError(
                f"{self.where}: the adapter must have the coefficients of all layers that it adapts in this model, "
                f"{len(missing)} are missing, the first is {missing[0]!r}; put it on the base model it was made for"
            )
        if extra:
            raise BaseMismatchError(
                f"{self.where}: the adapter has coefficients of {len(extra)} layers that this model does not have, or "
                f"that are no targets of its options, the first is {extra[0]!r}; put it on the base model it was made "
                "for"
            )


@dataclass(frozen=True)
class RunState:
    """How far an adapter has come on its way onto a model; never saved but for ``made_for``.

    Attributes:
        made_for: fields of the saved configuration that tell the model that it was put on last.
        folder: what the configuration was read from, until the coefficients beside it are loaded.
        stored: the layers that coefficients are at hand for, while it is put on a model to take them.
        restored: whether it took stored coefficients, so that a refusal of others leaves it where it is.
    """

    made_for: Mapping[str, Any] = field(default_factory=dict[str, Any])
    folder: Path | None = None
    stored: StoredLayers | None = None
    restored: bool = False
