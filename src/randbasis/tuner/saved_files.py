"""What the two files of a saved adapter are called, how its tensors are, and what is checked before they are read.

Only the header of the weights is read here; no pickle is ever read.
"""

import json
import re
from collections.abc import Collection
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open

from randbasis.adapter_file.contents import SAVED_PREFIX
from randbasis.errors import AdapterFilesError
from randbasis.files.output_set import check_finished

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
HEAD_FILE = "head.safetensors"
"""A head alone, where no adapter was trained, or one that the class of an exported or merged model has no place for."""
TASK_FILE = "task.json"
"""What `randbasis train` writes beside an adapter: labels, columns and lengths, which are needed to use it again."""
BASE_CONFIG = "base-config"
"""Folder in an exported LoRA, for the configuration of the base with the classes that the adapter answers with."""
BASE_BITS = "base_bits"
"""Key in the description of a task: how many bits the weights of the base had in training, where it was quantized."""
MODEL_FILE = "config.json"
_PLACES = frozenset({"base_layer", "original_module", "modules_to_save"})
"""What PEFT puts into the path of a parameter that an adapter, or a copy that is trained whole, stands around."""


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
    return ".".join([part for part in parts if part not in _PLACES])


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


def _instead(names: list[str]) -> str:
    """What a directory without the files of an adapter looks like."""
    if PICKLE_FILE in names:
        return f", only {PICKLE_FILE}, a pickle, which is never read"
    if MODEL_FILE in names and CONFIG_FILE not in names:
        return f", but {MODEL_FILE}: it looks like a base model"
    return f"; it holds {', '.join(names[:10]) or 'nothing'}"


def natural_order(name: str) -> tuple[tuple[bool, int, str], ...]:
    """A key that sorts layer 2 before layer 10."""
    return tuple([(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")])
