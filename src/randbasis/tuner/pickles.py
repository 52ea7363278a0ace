"""No pickle of ours is read: PEFT and transformers take ``adapter_model.bin`` where they find no safetensors file.

Both have one function that opens such a file, whatever led to it: a folder, a subfolder, a hub, an adapter loaded over
another. It is asked to leave those that lie beside a configuration of this package; all others are read as ever.
"""

import json
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, cast

from peft.utils import save_and_load
from transformers import modeling_utils

from randbasis.errors import AdapterFilesError
from randbasis.tuner.registration import TYPE_NAME
from randbasis.tuner.saved_files import CONFIG_FILE, WEIGHTS_FILE

_READERS: tuple[tuple[Any, str], ...] = ((save_and_load, "torch_load"), (modeling_utils, "load_state_dict"))


def refuse_pickles() -> None:
    """Have PEFT and transformers refuse pickled coefficients of ours; repeated calls change nothing."""
    for module, name in _READERS:
        read = cast("Callable[..., Any]", getattr(module, name))
        if not hasattr(read, "refuses_our_pickles"):
            setattr(module, name, _refusing(read))


def _refusing(read: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(read)
    def reader(file: Any, *args: Any, **kwargs: Any) -> Any:
        path: Any = file
        if isinstance(path, str | os.PathLike):
            _check_no_pickle(Path(cast("Any", path)))
        return read(file, *args, **kwargs)

    cast("Any", reader).refuses_our_pickles = True
    return reader


def _check_no_pickle(file: Path) -> None:
    """Raise if a file holds coefficients of ours in another form than safetensors.

    Raises:
        AdapterFilesError: it does.
    """
    stem = WEIGHTS_FILE.partition(".")[0]
    if not file.name.startswith(stem) or file.suffix == Path(WEIGHTS_FILE).suffix:
        return
    try:
        config: object = json.loads(file.with_name(CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(config, dict) and cast("dict[str, Any]", config).get("peft_type") == TYPE_NAME:
        raise AdapterFilesError(
            f"the coefficients of an adapter must be in {WEIGHTS_FILE}, got {str(file)!r}, a pickle, which can run any "
            "code and is never read; save the adapter again where it was made, with safe_serialization=True"
        )
