"""SOURCE → MATRICES: a saved adapter, and the class of transformers that has its layers."""

import warnings
from dataclasses import dataclass

from torch import Tensor
from transformers import CONFIG_MAPPING

from randbasis.adapter_file import PackedAdapter
from randbasis.adapter_file.paths import split_path
from randbasis.adapters.base_fit import BaseFit, auto_classes, find_fit
from randbasis.adapters.base_model import linear_shapes, meta_model, read_config
from randbasis.adapters.packed import exact
from randbasis.adapters.saved import AdapterLocation, SavedAdapter, open_adapter
from randbasis.errors import DataMissingError, ExportBaseError
from randbasis.tuner.saved_files import SAVED_PREFIX, plain_path


@dataclass(frozen=True)
class Source:
    """An adapter to export.

    Attributes:
        found: as it was read.
        packed: its matrices, each with what its method is told of it and its coefficients.
        base: folder or hub name of the base, where one is known.
        fit: the class of transformers that has its layers; None where the base was not to be had.
    """

    found: SavedAdapter
    packed: PackedAdapter
    base: str | None
    fit: BaseFit | None

    @property
    def architecture(self) -> str | None:
        """``model_type`` of the base."""
        return self.found.config.base_model_type if self.fit is None else str(self.fit.config.model_type)

    @property
    def head_apart(self) -> bool:
        """Whether what was trained beside the adapter has no place in that class."""
        return bool(self.found.head) and self.fit is not None and not self.fit.head

    def path(self, key: str) -> str:
        """The path of a layer in that class: without the wrapper that the base was trained in."""
        prefix = "" if self.fit is None else self.fit.prefix
        return key.removeprefix(f"{prefix}.") if prefix else key

    @property
    def extra(self) -> dict[str, Tensor]:
        """What was trained whole beside the adapter and has a place in that class, as PEFT names it there."""
        if self.head_apart:
            return {}
        tensors = self.packed.extra
        return {SAVED_PREFIX + self.path(name.removeprefix(SAVED_PREFIX)): tensor for name, tensor in tensors.items()}


def open_source(source: AdapterLocation, base: str | None = None) -> Source:
    """Read an adapter and find the class of its base; no weights of the base are read.

    Without ``base``, the base that the adapter names is looked for on this machine alone. Where it is not there, the
    layers keep the paths that they were trained under, where those are of the class of transformers for the task; a
    warning says so.

    Args:
        source: where the adapter is: see :func:`randbasis.adapters.saved.open_adapter`.
        base: folder or hub name of the base, of which only the configuration is read.

    Raises:
        AdapterMissingError: there is no adapter.
        ExportBaseError: the base is not to be had, and without it the paths cannot be told.
        BaseMismatchError: the adapter was made for another base than ``base``.
        DataMissingError: the configuration of ``base`` cannot be read.
        RandbasisError: a file of the adapter is missing, damaged or foreign, each rule with its class.
    """
    found = open_adapter(source).ours()
    name = base or found.config.base_model_name_or_path or None
    fit = _fit(found, name, given=base is not None)
    return Source(found, exact(found, model=base, base_name=name), name, fit)


def _fit(found: SavedAdapter, name: str | None, *, given: bool) -> BaseFit | None:
    if given and name:
        with found.on(name):
            return find_fit(found, read_config(name))
    if not name:
        check_paths(found)
        return None
    try:
        config = read_config(name, local=True)
    except DataMissingError as error:
        check_paths(found)
        warnings.warn(
            f"the layers keep the paths that they were trained under, because they could not be looked up in the base "
            f"that the adapter names ({error}); name the base to have them checked",
            stacklevel=4,
        )
        return None
    return find_fit(found, config)


def check_paths(found: SavedAdapter) -> None:
    """Raise unless the class of transformers for the task of an adapter has its layers and head, told by the names.

    A reader builds the base by that class, and PEFT leaves out without a word what has no place in it.

    Raises:
        ExportBaseError: it has not, or the adapter does not say which architecture its base is of.
    """
    kind, task = found.config.base_model_type, found.config.task_type
    if not kind or kind not in CONFIG_MAPPING:
        raise _no_base(found, "and the adapter does not say which architecture that is of")
    usual = CONFIG_MAPPING[kind]()
    wanted = {split_path(key)[0] for key in found.modules} | {plain_path(name) for name in found.head}
    for auto in auto_classes(usual, task)[: 1 if task else None]:
        try:
            model = meta_model(usual, auto)
        except DataMissingError:
            continue
        layers = {split_path(name)[0] for name in linear_shapes(model)}
        parameters = {split_path(plain_path(name))[0] for name in model.state_dict()}
        if all(name in layers or split_path(name)[0] in parameters for name in wanted):
            return
    raise _no_base(found, f"and no class of transformers for {kind!r} and its task has {found.modules[0]!r} and a head")


def _no_base(found: SavedAdapter, why: str) -> ExportBaseError:
    return ExportBaseError(
        f"base must be given: {found.config.base_model_name_or_path or 'the base model'!r} is not on this machine, "
        f"{why}, so that a reader would leave out what it does not know; give the folder or hub name of the base "
        "(--base), of which only the configuration is read"
    )
