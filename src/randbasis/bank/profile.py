"""Adapters that differ in their coefficients alone: what they have in common, and the tables of their rows."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from randbasis.adapter_file import PackedAdapter, SpecMatrix
from randbasis.adapter_file.contents import SAVED_PREFIX
from randbasis.bank.forms import CoefficientForm, FactorForm, Form, FormName
from randbasis.bank.linear_layers import architecture_of, layer_shape, linear_shapes
from randbasis.bank.table import Table
from randbasis.contraction import work_of_a_number
from randbasis.errors import BankError, BaseMismatchError
from randbasis.methods import Bound
from randbasis.methods.bound import Site

ROW_DTYPES = (torch.float16, torch.bfloat16)
"""Dtypes in which a row is kept as it is stored; all else becomes float32."""


PASSES = 16
"""Passes that factors are expected to serve once they are made: a short answer's tokens."""

_EXPERT = re.compile(r"experts|expert_\d+")


@dataclass(frozen=True, slots=True)
class Place:
    """One adapted matrix of a profile on a layer of the model.

    Attributes:
        index: in the order of the spec.
        one: what the spec says of it.
        bound: the method there.
    """

    index: int
    one: SpecMatrix
    bound: Bound[Any]


class Profile:
    """What adapters have in common that are rows of one table. Made by the bank, and never changed but for its tables.

    Args:
        adapter: the first of its kind.
        model: the base model.
        modules: its modules by their paths.
        where: the adapter, for messages.

    Attributes:
        spec: of the first adapter.
        places: module path → matrices there.
        heads: paths of the modules whose parameters were trained whole.
        forms: in which a batch can take these adapters.
        tables: dtype → rows.

    Raises:
        BankError: the method needs the base weight, or a layer is an expert.
        BaseMismatchError: the model is not the one that the adapter was made for.
    """

    def __init__(self, adapter: PackedAdapter, model: nn.Module, modules: Mapping[str, nn.Module], where: str) -> None:
        spec = adapter.spec
        if spec.method.needs_base:
            raise BankError(
                f"{where}: an adapter in a bank must be of a method that draws its matrices from a seed, got one of "
                f"{spec.method.name!r}, which makes them of the base weights; put it on the model (randbasis.put)"
            )
        _check_unrouted(spec.shapes, where)
        shapes = {name: shape for name in spec.shapes if (shape := layer_shape(modules.get(name, model))) is not None}
        if shapes != spec.shapes:
            shapes = linear_shapes(modules)
        spec.check_base(shapes, architecture_of(model), where)
        self.spec = spec
        self.heads = tuple(self.heads_of(adapter.extra))
        _check_heads(self.heads_of(adapter.extra), modules, where)
        streams = None if adapter.streams is None else cast("list[list[int]]", adapter.streams.tolist())
        self.places: dict[str, list[Place]] = {}
        bounds: list[Bound[Any]] = []
        for index, one in enumerate(spec.matrices):
            mine = one.method.streams() if streams is None else tuple(streams[index])
            device = _device_of(modules[one.name])
            bound = one.method.bind(Site(one.rows, one.in_features, mine, device))
            bounds.append(bound)
            self.places.setdefault(one.name, []).append(Place(index, one, bound))
        self.forms: dict[FormName, Form] = {"coefficients": CoefficientForm(spec)}
        if all(bound.sums for bound in bounds):
            self.forms["factors"] = FactorForm(spec, bounds)
        self.tables: dict[torch.dtype, Table] = {}
        self._bounds = bounds

    @staticmethod
    def key(adapter: PackedAdapter) -> tuple[Any, ...]:
        """Equal for adapters of one profile."""
        spec, streams = adapter.spec, adapter.streams
        drawn = None if streams is None else streams.numpy().tobytes()
        return spec.method, spec.groups, spec.tie, spec.base.architecture, spec.extra, drawn

    def table(self, dtype: torch.dtype) -> Table:
        """The rows of a dtype."""
        if dtype not in self.tables:
            self.tables[dtype] = Table(self.spec.count, dtype)
        return self.tables[dtype]

    def choose_form(self, tokens: Sequence[int], new: int, room: int, dtype: torch.dtype, device: torch.device) -> Form:
        """The form that costs least for one pass.

        Cost is multiply-adds, and for each number that a batched product reads of its own factors what the device does
        in that time.

        Args:
            tokens: of each adapter in the batch.
            new: how many of them are not there in the form of factors.
            room: how many fit there at once.
            dtype: that the model computes in.
            device: of the model.
        """
        shared, factors = self.forms["coefficients"], self.forms.get("factors")
        if not isinstance(factors, FactorForm) or len(tokens) > room:
            return shared
        if any(bound.disjoint for bound in self._bounds):  # the other form makes the factors of each row in each pass
            return factors
        if dtype == torch.float16:  # sums of a basis whose entries go to 255 leave its range where they are not scaled
            return factors
        total = sum(tokens)
        number = work_of_a_number(device, dtype) / 2  # read, not written
        by_basis = sum(bound.shared_cost(total) for bound in self._bounds)
        by_factors = sum(bound.token_cost(total, training=False) for bound in self._bounds)
        by_factors += new * factors.work / PASSES + len(tokens) * factors.numbers * number
        return factors if by_factors <= by_basis else shared

    def heads_of(self, extra: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Tensors that were trained whole, by module path and parameter."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in extra.items():
            path, _, parameter = name.removeprefix(SAVED_PREFIX).rpartition(".")
            found.setdefault(path, {})[parameter] = tensor
        return found


def _check_unrouted(paths: Iterable[str], where: str) -> None:
    """Raise where a layer sees those tokens alone that were sent to it: of whose rows they are, nothing tells."""
    routed = next((path for path in paths if any(_EXPERT.fullmatch(part) for part in path.split("."))), None)
    if routed is not None:
        raise BankError(
            f"{where}: an adapter in a bank must be for layers that see all tokens of a batch, got one for {routed!r}, "
            "one expert of several; put it on the model (randbasis.put), or leave experts out of target_modules"
        )


def _check_heads(heads: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, nn.Module], where: str) -> None:
    """Raise unless each module that was trained whole is there; a linear head may have another number of outputs."""
    for path, tensors in heads.items():
        module = modules.get(path)
        known = {} if module is None else {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, tensor in tensors.items():
            shape = tuple(known[name].shape) if name in known else None
            fits = shape is not None and (
                shape[1:] == tuple(tensor.shape[1:]) if isinstance(module, nn.Linear) else shape == tuple(tensor.shape)
            )
            if not fits:
                found = "nothing" if shape is None else f"shape {list(shape)}"
                raise BaseMismatchError(
                    f"{where}: the model must have a parameter {f'{path}.{name}'!r} of shape {list(tensor.shape)}, "
                    f"which was trained beside the adapter, got {found}; load it on a model with the same head"
                )


def _device_of(module: nn.Module) -> torch.device | None:
    weight = getattr(module, "weight", None)
    return weight.device if isinstance(weight, Tensor) else None
