"""An adapter directory: ``adapter_config.json`` and ``adapter_model.safetensors``, checked before anything is built.

Only the header of the weights is read here; no pickle is ever read.
"""

import json
import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from randbasis.errors import AdapterFilesError, RandbasisError
from randbasis.output_set import check_finished
from randbasis.tuner.config import RandbasisConfig
from randbasis.tuner.registration import PREFIX, TYPE_NAME

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MODEL_FILE = "config.json"
SAVED_PREFIX = "base_model.model."
"""What PEFT puts before the path of a module in the base model."""
_PLACES = frozenset({"base_layer", "original_module", "modules_to_save"})
"""What PEFT puts into the path of a parameter that an adapter, or a copy that is trained whole, stands around."""


@dataclass(frozen=True)
class AdapterDir:
    """A directory whose files are there, readable and of this package.

    Attributes:
        path: the directory.
        config: its configuration.
        shapes: tensor name → shape, as in the file.
    """

    path: Path
    config: RandbasisConfig
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def weights(self) -> Path:
        """The file of tensors."""
        return self.path / WEIGHTS_FILE

    @property
    def modules(self) -> list[str]:
        """Paths of the adapted modules in the base model, layers in their order."""
        found = dict.fromkeys(name.partition(f".{PREFIX}")[0] for name in self.shapes if f".{PREFIX}" in name)
        return sorted((name.removeprefix(SAVED_PREFIX) for name in found), key=natural_order)

    @property
    def head(self) -> dict[str, tuple[int, ...]]:
        """Parameter path → shape of what was trained whole beside the adapter."""
        return {
            name.removeprefix(SAVED_PREFIX): shape for name, shape in self.shapes.items() if f".{PREFIX}" not in name
        }

    def load(self) -> dict[str, Tensor]:
        """All tensors, by their names in the file."""
        return load_file(self.weights)

    def bare_config(self, *, head: bool = False) -> RandbasisConfig:
        """A copy of the configuration that puts the adapter on any model without a basis being stored or drawn.

        Args:
            head: keep ``modules_to_save``.
        """
        config = deepcopy(self.config)
        config.basis_storage = "recompute"
        config.init_weights = True
        config.task_type = None
        config.base_model_name_or_path = None
        if not head:
            config.modules_to_save = None
        return config


def read_adapter_dir(path: str | Path) -> AdapterDir:
    """Check an adapter directory of this package and read all of it but the values of the tensors.

    Raises:
        AdapterFilesError: a file is missing or damaged, or the adapter is of another package.
        RandbasisError: a hyper-parameter in the configuration is one that its method cannot take.
    """
    path = Path(path)
    content = check_adapter_files(path)
    kind = content.get("peft_type")
    if kind != TYPE_NAME:
        what = f"a {kind} adapter of PEFT" if kind else "no PEFT adapter (it has no peft_type)"
        raise AdapterFilesError(
            f"{path / CONFIG_FILE} must be of an adapter of randbasis (peft_type {TYPE_NAME!r}), it is {what}; "
            "give a directory that randbasis wrote, or use PEFT itself for this one"
        )
    shapes = tensor_shapes(path / WEIGHTS_FILE)
    if not any(f".{PREFIX}" in name for name in shapes):
        first = next(iter(shapes), "none at all")
        raise AdapterFilesError(
            f"{path / WEIGHTS_FILE} has no tensor of randbasis (…{PREFIX}…), the first is {first!r}; "
            f"{CONFIG_FILE} and {WEIGHTS_FILE} do not belong together"
        )
    return AdapterDir(path, _own_config(path), shapes)


def check_adapter_files(path: str | Path) -> dict[str, Any]:
    """Check that a directory has the two files of an adapter of any method, and read the configuration.

    Raises:
        AdapterFilesError: the directory or a file of it is missing, or the configuration is not a JSON object.
    """
    path = Path(path)
    check_finished(path)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise AdapterFilesError(
            f"adapter must be a directory with {CONFIG_FILE} and {WEIGHTS_FILE}, {str(path)!r} is {found}; "
            "give what save_pretrained or randbasis train wrote"
        )
    names = sorted(file.name for file in path.iterdir())
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (path / name).is_file()]
    if missing:
        raise AdapterFilesError(
            f"adapter {str(path)!r} has no {' and no '.join(missing)}{_instead(names)}; "
            "give what save_pretrained or randbasis train wrote"
        )
    return read_config_file(path)


def read_config_file(path: Path) -> dict[str, Any]:
    """The configuration of an adapter of any method.

    Raises:
        AdapterFilesError: it is not a JSON object.
    """
    try:
        content: object = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterFilesError(
            f"{path / CONFIG_FILE} must be JSON, but {error}; take the file from where the adapter was saved"
        ) from error
    if not isinstance(content, dict):
        raise AdapterFilesError(
            f"{path / CONFIG_FILE} must be a JSON object, got {type(content).__name__}; "
            "take the file from where the adapter was saved"
        )
    return cast("dict[str, Any]", content)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape of a safetensors file, from its header.

    Raises:
        AdapterFilesError: it is not a safetensors file, or it is cut short.
    """
    try:
        with cast("Any", safe_open)(path, "pt") as file:
            names: list[str] = list(file.keys())
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise AdapterFilesError(
            f"{path} must be a whole safetensors file, but {error}; copy it again from where the adapter was saved"
        ) from error


def plain_path(name: str) -> str:
    """The path in the base model of a module or parameter, without what PEFT puts before and into it."""
    parts = name.removeprefix(SAVED_PREFIX).split(".")
    return ".".join(part for part in parts if part not in _PLACES)


def anchored(paths: Collection[str], known: Collection[str]) -> str:
    """A regular expression of PEFT for layers by their paths from the root of the model, and for no others.

    Args:
        paths: of the layers.
        known: paths of all modules of the model.
    """
    columns = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    above = [column[0] for column in takewhile(lambda column: len({*column}) == 1, columns)]
    names = sorted({path.rpartition(".")[2] for path in paths})
    short = rf"{re.escape('.'.join(above))}\.(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"
    if {path for path in known if re.fullmatch(short, path)} == {*paths}:
        return short
    return "|".join(map(re.escape, paths))


def _own_config(path: Path) -> RandbasisConfig:
    try:
        return cast("RandbasisConfig", PeftConfig.from_pretrained(str(path)))
    except RandbasisError:
        raise
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise AdapterFilesError(
            f"{path / CONFIG_FILE} must hold the options of an adapter of randbasis, but {type(error).__name__}: "
            f"{error}; take the file from where the adapter was saved"
        ) from error


def _instead(names: list[str]) -> str:
    """What a directory without the files of an adapter looks like."""
    if PICKLE_FILE in names:
        return f", only {PICKLE_FILE}, a pickle, which is never read"
    if MODEL_FILE in names and CONFIG_FILE not in names:
        return f", but {MODEL_FILE}: it looks like a base model"
    return f"; it holds {', '.join(names[:10]) or 'nothing'}"


def natural_order(name: str) -> tuple[tuple[bool, int, str], ...]:
    """A key that sorts layer 2 before layer 10."""
    return tuple((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split("."))
