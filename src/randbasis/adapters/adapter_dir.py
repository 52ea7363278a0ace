"""An adapter directory: ``adapter_config.json`` and ``adapter_model.safetensors``, checked before anything is built.

Only the header of the weights is read here; no pickle is ever read.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from peft import PeftConfig
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from randbasis.errors import AdapterFilesError, RandbasisError
from randbasis.tuner.config import RandbasisConfig
from randbasis.tuner.registration import PREFIX, TYPE_NAME
from randbasis.tuner.saved_files import (
    CONFIG_FILE,
    SAVED_PREFIX,
    WEIGHTS_FILE,
    check_adapter_files,
    natural_order,
    tensor_shapes,
)


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
