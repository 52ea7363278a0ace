"""A run as a file: the options of ``train`` by their names, as they are read and as they are written beside an adapter.

Only words and values here; which options there are, and of which type, the command knows.
"""

import json
from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from randbasis.errors import DataFormatError, DataMissingError, SettingError
from randbasis.files.text_files import read_text
from randbasis.train.settings import TrainSettings

CONFIG_FILE = "run.yaml"
"""Written beside an adapter; :data:`randbasis.files.our_files.ADAPTER_SET` has it."""
OF_THIS_CALL = ("output", "overwrite", "resume")
"""What says where and how a run is started, and not which it is."""
OPTION_NAMES = {"train": "data", "eval": "eval_data", "kind": "format", "from_adapter": "from"}
"""What the command calls a setting otherwise."""
FOR_PYTHON = ("group_by_length",)
"""What the command has no option for; written where it is not the default, so that the command says what it lacks."""


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file with their values; dashes in keys are underscores.

    Raises:
        DataMissingError: there is no such file.
        DataFormatError: it is no text in UTF-8, not what its name says, or holds no keys.
        SettingError: a key stands there twice, with dashes and underscores or not.
    """
    if not path.is_file():
        raise DataMissingError(f"config {str(path)!r} is not a file; give the path of a .yaml or .json file")
    text = read_text(path)
    pairs = _json_pairs(text, path) if path.suffix == ".json" else _yaml_pairs(text, path)
    found: dict[str, Any] = {}
    for key, value in pairs:
        name = str(key).replace("-", "_")
        if name in found:
            raise SettingError(f"{path}: {key!r} stands there twice; keep one")
        found[name] = value
    return found


def config_text(settings: TrainSettings) -> str:
    """What ``train --config`` makes the same run of: every option that has a value, and nothing else."""
    import yaml

    return yaml.safe_dump(_words(settings), sort_keys=False, allow_unicode=True, width=10_000)


def _words(settings: TrainSettings) -> dict[str, Any]:
    """Option → value, of what was decided."""
    words: dict[str, Any] = {}
    for part in (settings, settings.data, settings.adapter, settings.loop):
        for one in fields(part):
            value = getattr(part, one.name)
            silent = value is None or (value == one.default and (value is False or one.name in FOR_PYTHON))
            if not silent and not is_dataclass(value) and one.name not in OF_THIS_CALL:
                words[OPTION_NAMES.get(one.name, one.name)] = _plain(value)
    words["targets"] = ",".join(settings.adapter.targets)
    return words


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in cast(tuple[Any, ...], value)]
    return str(value) if isinstance(value, Path) else value


def _json_pairs(text: str, path: Path) -> list[tuple[Any, Any]]:
    try:
        content: Any = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise DataFormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, _Pairs):
        raise _no_keys(path, content)
    return [(key, value.as_mapping() if isinstance(value, _Pairs) else value) for key, value in content]


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON with all of its keys, where Python would keep the last of equal ones."""

    def as_mapping(self) -> dict[str, Any]:
        return dict(self)


def _yaml_pairs(text: str, path: Path) -> list[tuple[Any, Any]]:
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise _no_keys(path, None if node is None else cast(object, loader.construct_document(node)))
        loader.flatten_mapping(node)
        pairs = cast(list[tuple[Any, Any]], node.value)
        return [(_key(loader, key, path), loader.construct_object(value, deep=True)) for key, value in pairs]
    except yaml.YAMLError as error:
        raise DataFormatError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


def _key(loader: Any, node: Any, path: Path) -> Hashable:
    key: object = loader.construct_object(node, deep=True)
    if not isinstance(key, str):
        raise SettingError(f"{path}: the key {key!r} is a {type(key).__name__}; keys are the names of options")
    return key


def _no_keys(path: Path, content: object) -> DataFormatError:
    held = "nothing" if content is None else f"a {type(content).__name__}"
    return DataFormatError(f"{path} holds {held}; options and their values are needed, such as 'rank: 4'")
