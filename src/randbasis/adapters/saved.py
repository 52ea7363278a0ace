"""AN ADAPTER AT REST: the one reader of a folder, a packed file, a URL and a store entry.

:func:`open_adapter` checks what it finds and reads all of it but the values of the tensors; no pickle is ever read. A
folder may hold an adapter of this package, one of PEFT's own methods, or a head alone, as ``train --method none``
leaves it; the other places hold packed files, which are of this package.
"""

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from randbasis.adapter_file import PackedAdapter, read
from randbasis.adapters.spec_options import config_of, named_tensors
from randbasis.adapters.store_entry import StoreEntry
from randbasis.errors import (
    AdapterFilesError,
    AdapterMissingError,
    BaseMismatchError,
    PackedFileMissingError,
    PartialModelError,
    RandbasisError,
    TargetError,
)
from randbasis.files.locations import Location, local_path
from randbasis.files.output_set import check_finished
from randbasis.store import StoredAdapter
from randbasis.tuner.config import RandbasisConfig
from randbasis.tuner.coverage import names_any
from randbasis.tuner.registration import PREFIX, TYPE_NAME
from randbasis.tuner.saved_files import (
    BASE_BITS,
    CONFIG_FILE,
    HEAD_FILE,
    SAVED_PREFIX,
    TASK_FILE,
    WEIGHTS_FILE,
    check_adapter_files,
    natural_order,
    tensor_shapes,
)

_TOLD = 400
"""Letters of a message on targets where a base has none of them: it lists every layer."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter that is in no model.

    Attributes:
        where: what it was read from, for messages.
        options: its configuration as PEFT's file of it says; empty of a head alone.
        folder: where it lies, if that is a folder.
        whole: its content, if it was a packed file.
    """

    where: str
    options: Mapping[str, Any]
    folder: Path | None = None
    whole: PackedAdapter | None = None

    @property
    def kind(self) -> str:
        """``peft_type`` of its configuration; empty of a head alone."""
        return str(self.options.get("peft_type") or "")

    def ours(self) -> "SavedAdapter":
        """Itself, if it is an adapter of this package.

        Raises:
            AdapterFilesError: it is not, or its two files do not belong together.
            RandbasisError: a hyper-parameter in the configuration is one that its method cannot take.
        """
        if self.is_head:
            raise AdapterFilesError(
                f"{self.where} must be an adapter of randbasis, it has no {CONFIG_FILE} and holds a trained head "
                "alone, which changes no layer; give the folder of a run with another method than none"
            )
        if self.kind != TYPE_NAME:
            what = f"a {self.kind} adapter of PEFT" if self.kind else "no PEFT adapter (it has no peft_type)"
            raise AdapterFilesError(
                f"{self.where}: {CONFIG_FILE} must be of an adapter of randbasis (peft_type {TYPE_NAME!r}), it is "
                f"{what}; give an adapter that randbasis wrote, or use PEFT itself for this one"
            )
        if not self.modules:
            first = next(iter(self.shapes), "none at all")
            raise AdapterFilesError(
                f"{self.weights} has no tensor of randbasis (…{PREFIX}…), the first is {first!r}; "
                f"{CONFIG_FILE} and {WEIGHTS_FILE} do not belong together"
            )
        _ = self.config
        return self

    # --- what it is ---

    @property
    def is_head(self) -> bool:
        """Whether it is a head alone."""
        return self.folder is not None and not (self.folder / CONFIG_FILE).is_file()

    @cached_property
    def config(self) -> RandbasisConfig:
        """The configuration of an adapter of this package."""
        return _own_config(self.folder) if self.whole is None else config_of(self.whole.spec, self.where)

    @cached_property
    def about(self) -> Mapping[str, Any]:
        """What training wrote of it: ``task``, ``method`` and ``base_model``; empty where it wrote nothing.

        Raises:
            AdapterFilesError: the file is not a JSON object, or its task is none.
        """
        if self.folder is None or not (self.folder / TASK_FILE).is_file():
            return {}
        about = _read_json(self.folder / TASK_FILE)
        if not isinstance(about.get("task", {}), dict):
            raise AdapterFilesError(
                f"{self.folder / TASK_FILE}: task must be an object, got {about['task']!r}; take the file from where "
                "the adapter was trained"
            )
        return about

    @property
    def task(self) -> dict[str, Any]:
        """A copy of the description of its task; empty where nobody wrote one, as for adapters of other tools."""
        return deepcopy(self.about.get("task", {}) if self.whole is None else dict(self.whole.spec.task))

    @property
    def method(self) -> str:
        """As the command names it; for adapters of other tools as PEFT does."""
        own = self.about.get("method") or self.options.get("method")
        return str(own or self.kind or "none")

    @property
    def base_bits(self) -> int | None:
        """Bits of a weight of the base that it was trained on, where that was quantized when it was read."""
        return self.task.get(BASE_BITS)

    @property
    def base_model(self) -> str:
        """Folder or hub name of the base that it was made for; empty where it does not say."""
        return str(self.about.get("base_model") or self.options.get("base_model_name_or_path") or "")

    @contextmanager
    def on(self, base: str) -> Generator[None]:
        """Around what puts the adapter on a base, or only looks whether it fits: where not, both are named.

        Args:
            base: folder or hub name of a base, perhaps another than the one that the adapter names.

        Raises:
            BaseMismatchError: it does not fit.
            PartialModelError: the base is not whole, by the class that the adapter was trained in.
        """
        try:
            yield
        except (BaseMismatchError, PartialModelError, TargetError) as error:
            if base == self.base_model:
                raise
            own = repr(self.base_model) if self.base_model else "a base that it does not name"
            told = str(error)
            if isinstance(error, TargetError) and len(told) > _TOLD:
                told = f"{told[:_TOLD]} …"
            kind = PartialModelError if isinstance(error, PartialModelError) else BaseMismatchError
            raise kind(f"{self.where} was made for {own}, and does not fit {base!r}: {told}") from error

    # --- its tensors ---

    @property
    def weights(self) -> Path:
        """The file of tensors in a folder."""
        return (self.folder or Path()) / (HEAD_FILE if self.is_head else WEIGHTS_FILE)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor name → shape, under the names that they have in a folder."""
        if self.whole is None:
            return tensor_shapes(self.weights)
        return {name: tuple(tensor.shape) for name, tensor in named_tensors(self.whole).items()}

    @property
    def modules(self) -> list[str]:
        """Paths of the modules in the base model that an adapter of this package adapts, layers in their order."""
        found = dict.fromkeys(name.partition(f".{PREFIX}")[0] for name in self.shapes if f".{PREFIX}" in name)
        return sorted((name.removeprefix(SAVED_PREFIX) for name in found), key=natural_order)

    @property
    def head(self) -> dict[str, tuple[int, ...]]:
        """Parameter path → shape of what was trained whole beside an adapter of this package."""
        return {
            name.removeprefix(SAVED_PREFIX): shape for name, shape in self.shapes.items() if f".{PREFIX}" not in name
        }

    def load(self) -> dict[str, Tensor]:
        """All tensors, under the names that they have in a folder."""
        return load_file(self.weights) if self.whole is None else named_tensors(self.whole)

    @property
    def bytes(self) -> int:
        """Size of the file of tensors, or of the packed file."""
        return self.weights.stat().st_size if self.whole is None else len(self.whole.to_bytes())

    def bare_config(self, model: nn.Module, *, head: bool = False) -> RandbasisConfig:
        """A copy of the configuration that puts the adapter on a model without a basis being stored or drawn.

        Args:
            model: it may lack the head, which the configuration keeps out of the targets: PEFT warns of a name to
                exclude that a model has not.
            head: keep ``modules_to_save``.
        """
        config = deepcopy(self.config)
        config.basis_storage = "recompute"
        config.init_weights = True
        config.task_type = None
        config.base_model_name_or_path = None
        if not head:
            config.modules_to_save = None
        if config.exclude_modules is not None and not isinstance(config.exclude_modules, str):
            paths = [path for path, _ in cast("Iterator[tuple[str, nn.Module]]", model.named_modules())]
            config.exclude_modules = [name for name in config.exclude_modules if names_any(name, paths)] or None
        return config


AdapterLocation = Location | bytes | PackedAdapter | StoredAdapter | SavedAdapter
"""Where an adapter may be: what :func:`open_adapter` takes."""


def open_adapter(location: AdapterLocation) -> SavedAdapter:
    """Look at an adapter, wherever it is.

    Args:
        location: a folder; a packed file, by its path, its URL or its bytes; ``store:NAME`` or ``store:NAME@VERSION``,
            in the store that the environment variable ``RANDBASIS_STORE`` names, else ``adapters.db`` in the working
            directory; or an adapter that is at hand: packed, from a store, or saved.

    Raises:
        AdapterMissingError: there is nothing.
        AdapterFilesError: a file of a folder is missing or damaged.
        PackedFileError: a packed file breaks a rule of the format; each rule has its class.
        StoreMissingError: there is no store.
        NotStoredError: the store has no such adapter or version.
        RemoteError: a URL could not be reached.
    """
    if isinstance(location, SavedAdapter):
        return location
    if isinstance(location, PackedAdapter):
        return _of_packed(location, "the packed adapter")
    if isinstance(location, bytes):
        return _of_packed(PackedAdapter.from_bytes(location), "the packed adapter")
    if (entry := StoreEntry.named(location)) is not None:
        location = entry.read()
    if isinstance(location, StoredAdapter):
        return _of_packed(location.packed(), f"store:{location.record.name}@{location.record.version}")
    path = local_path(location)
    if path is not None and path.is_dir():
        return open_folder(path)
    if path is not None and not path.is_file():
        raise AdapterMissingError(
            f"adapter must be a folder, a packed file, its URL, or store:NAME, there is nothing at {str(location)!r}; "
            "give what save_pretrained, `randbasis train` or `randbasis pack` wrote"
        )
    return _of_packed(read(location), str(location))


def open_packed(location: AdapterLocation) -> SavedAdapter:
    """As :func:`open_adapter`, of what is packed.

    Raises:
        PackedFileMissingError: a folder or nothing is there.
        RandbasisError: as :func:`open_adapter`.
    """
    if isinstance(location, str | Path) and StoreEntry.named(location) is None:
        return _of_packed(read(location), str(location))
    found = open_adapter(location)
    if found.whole is None:
        raise PackedFileMissingError(
            f"a packed adapter must be given, {found.where!r} is a folder; `randbasis pack` makes a file of it"
        )
    return found


def paths_of(*adapters: AdapterLocation) -> list[Location]:
    """The files, folders and URLs that they are read from by name, over which nothing must be written."""
    found: list[Location] = []
    for one in adapters:
        entry = StoreEntry.named(one)
        found += entry.files if entry is not None else [one] if isinstance(one, str | Path) else []
    return found


def open_folder(path: str | Path) -> SavedAdapter:
    """As :func:`open_adapter`, of a folder alone.

    Raises:
        AdapterFilesError: it is none, or a file in it is missing or damaged.
    """
    path = Path(path)
    check_finished(path)
    options: Mapping[str, Any] = {}
    if (path / CONFIG_FILE).exists() or not (path / HEAD_FILE).is_file():
        options = check_adapter_files(path)
    found = SavedAdapter(str(path), options, folder=path)
    _ = found.shapes
    return found


def common_task(sources: Sequence[SavedAdapter]) -> dict[str, Any]:
    """The task of an adapter that is made of others: theirs where they have one and the same, else nothing."""
    first = sources[0].task
    return {} if any(one.task != first for one in sources[1:]) else first


def write_task(folder: Path, base_model: str | None, method: str, task: Mapping[str, Any]) -> None:
    """Write what a folder says of its adapter's task, where there is one.

    Args:
        folder: of the adapter.
        base_model: folder or hub name of the base.
        method: as the command names it.
        task: its description.
    """
    if task:
        about = {"base_model": base_model or "", "method": method, "task": dict(task)}
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        (folder / TASK_FILE).write_text(text, encoding="utf-8")


def _of_packed(packed: PackedAdapter, where: str) -> SavedAdapter:
    options = {
        "peft_type": TYPE_NAME,
        "method": packed.spec.method.name,
        "base_model_name_or_path": packed.spec.base.name,
    }
    return SavedAdapter(where, options, whole=packed)


def _own_config(path: Path | None) -> RandbasisConfig:
    try:
        return cast("RandbasisConfig", PeftConfig.from_pretrained(str(path)))
    except RandbasisError:
        raise
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise AdapterFilesError(
            f"{path}: {CONFIG_FILE} must hold the options of an adapter of randbasis, but {type(error).__name__}: "
            f"{error}; take the file from where the adapter was saved"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterFilesError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterFilesError(f"{path} holds a {type(content).__name__}; an object is needed")
    return cast(dict[str, Any], content)
