"""What the command takes where nothing is said is what the library takes, and is written down once."""

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from randbasis import cli
from randbasis.adapters.inspection import inspect_adapter
from randbasis.adapters.packed import pack_adapter, unpack_adapter
from randbasis.adapters.quantization import quantize_adapter
from randbasis.arithmetic import average_adapters
from randbasis.export import export_gguf_lora, export_merged, export_peft_lora
from randbasis.hub import build_hub_folder, push_to_hub
from randbasis.importing import import_as_lora, import_as_merged, import_as_nearest
from randbasis.serve.keys import make_key
from randbasis.serve.settings import ServeSettings
from randbasis.store import AdapterStore
from randbasis.train.loop_settings import LoopSettings
from randbasis.train.settings import AdapterSettings, DataSettings, GenerationSettings, TrainSettings
from randbasis.use.settings import UseSettings

USE = (UseSettings, GenerationSettings)
LIBRARY: dict[str, tuple[Callable[..., Any], ...]] = {
    "train": (TrainSettings, DataSettings, AdapterSettings, LoopSettings),
    "evaluate": USE,
    "predict": USE,
    "generate": USE,
    "plan": (AdapterSettings,),
    "inspect": (inspect_adapter,),
    "pack": (pack_adapter,),
    "unpack": (unpack_adapter,),
    "quantize": (quantize_adapter,),
    "export": (export_merged,),
    "merge": (export_merged,),
    "import": (AdapterSettings, import_as_lora, import_as_merged, import_as_nearest),
    "push": (build_hub_folder, push_to_hub),
    "average": (average_adapters,),
    "serve": (ServeSettings,),
    "keys add": (make_key,),
    "store add": (AdapterStore, AdapterStore.add_many),
    "store get": (AdapterStore, AdapterStore.get),
    "store list": (AdapterStore, AdapterStore.list),
    "store history": (AdapterStore, AdapterStore.history),
    "store rollback": (AdapterStore, AdapterStore.rollback),
    "store tag": (AdapterStore, AdapterStore.tag),
    "store remove": (AdapterStore, AdapterStore.remove),
    "store gc": (AdapterStore, AdapterStore.gc),
    "store verify": (AdapterStore,),
    "store export": (AdapterStore, AdapterStore.export),
    "store import": (AdapterStore, AdapterStore.import_from),
}
NOT_GIVEN = (None, False, "")


def commands(group: Any = None, before: str = "") -> Iterator[tuple[str, Any]]:
    """Name → command, those of groups after the group's name."""
    for name, command in (group or typer.main.get_command(cli.app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} ")
        else:
            yield before + name, command


def defaults_of(source: Callable[..., Any]) -> dict[str, Any]:
    """Parameter → default, of those that have one."""
    if is_dataclass(source):
        return {one.name: one.default for one in fields(source) if one.default is not MISSING}
    parameters = inspect.signature(source).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", LIBRARY)
def test_no_default_differs_from_the_librarys(name: str):
    library = {key: value for source in LIBRARY[name] for key, value in defaults_of(source).items()}
    library["targets"] = ",".join(AdapterSettings.targets)
    shared = {one.name: one.default for one in COMMANDS[name].params if one.name in library}
    assert shared
    assert {key: value or None for key, value in shared.items()} == {
        key: library[key] or None if key in library else value for key, value in shared.items()
    }


def test_every_command_is_compared():
    assert set(COMMANDS) - set(LIBRARY) == {"verify", "diff", "compare", "keys list", "keys remove"}, (
        "what has a default of its own is in LIBRARY"
    )


@pytest.mark.parametrize("file", sorted(Path(cli.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_no_default_is_written_a_second_time(file: Path):
    """None, False and "" say that nothing was given; any other default is a name of the library's."""
    written = [
        f"{file.name}:{default.lineno} {function.name}: {ast.unparse(default)}"
        for function in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(function, ast.FunctionDef) and function.decorator_list
        for default in (*function.args.defaults, *function.args.kw_defaults)
        if default is not None and isinstance(default, ast.Constant) and default.value not in NOT_GIVEN
    ]
    assert not written


def test_a_lora_that_is_exported_is_float32_where_nothing_is_said():
    for run in (export_peft_lora, export_gguf_lora):
        assert defaults_of(run)["dtype"] == "float32"
