"""What adapters a layer has: their matrices, coefficients and streams, and the ΔW that they make."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from randbasis.basis import basis_entries
from randbasis.errors import LayerTypeError, TieError
from randbasis.methods import Factors, Method, Site
from randbasis.tuner.adapted_part import AdaptedPart, AdapterOptions
from randbasis.tuner.base_weight import base_device, base_dtype, layer_shape, quantization_of
from randbasis.tuner.chosen_orders import ChosenOrders
from randbasis.tuner.coefficients import Coefficients, Streams, straight_through
from randbasis.tuner.factor_cache import FactorCache, limit_of
from randbasis.tuner.meaning import MEANING, HeldMeaning, Meaning
from randbasis.tuner.prepared_pass import PreparedPass
from randbasis.tuner.seen_adapters import ByAdapter
from randbasis.tuner.targets import Part

NOISE = 0.1
"""Standard deviation of what ``init_weights=False`` adds to the starts of the coefficients, relative to the start."""


def widened(coefficients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Coefficients in float32 or wider: they are few, and sums of basis entries overflow float16."""
    for c in coefficients.values():
        if c.dtype is not torch.float32:
            return {name: c.to(torch.promote_types(c.dtype, torch.float32)) for name, c in coefficients.items()}
    return coefficients


def frozen_weight(layer: nn.Module) -> Tensor:
    """``W0`` of a layer, adapted or not, as ``[out, in]``."""
    if isinstance(layer, LayerAdapters):
        return layer.frozen_weight()
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight = cast("Tensor", base.weight).detach()
    return weight.T if isinstance(base, Conv1D) else weight


class LayerAdapters(nn.Module, BaseTunerLayer):
    """A frozen linear layer and what its adapters are made of; ``RandbasisLinear`` computes with them.

    Args:
        base_layer: the layer to adapt.
        quantization: what PEFT's quantization backends need to know of the model.

    Raises:
        LayerTypeError: the layer is not linear.
    """

    other_param_names: tuple[str, ...] = ("adapted", "options", "randbasis_streams", MEANING)

    def __init__(self, base_layer: nn.Module, quantization: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        inner = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        shape = layer_shape(inner)
        if shape is None:
            raise LayerTypeError(
                f"only linear layers can be adapted (nn.Linear, Conv1D, quantized linear), got {type(inner).__name__}; "
                "leave it out of target_modules, or train it whole with modules_to_save"
            )
        self.base_layer = base_layer
        self.out_features, self.in_features = shape
        self.transposed = isinstance(inner, Conv1D)
        self.adapter_layer_names: tuple[str, ...] = ()
        self.adapted: dict[str, list[AdaptedPart]] = {}
        self.options: dict[str, AdapterOptions] = {}
        self.path = ""
        """Module path in the model, once there is an adapter."""
        self.randbasis_streams = ByAdapter()
        self.randbasis_meaning = ByAdapter()
        self.merged_adapters: list[str] = []
        self.rows_first = False
        """Whether ``[rows, tokens, in]`` is known to be the shape of its inputs; the model's tuner says so."""
        self._cache = FactorCache(limit_of(self.out_features, self.in_features))
        self._prepared_pass: PreparedPass | None = None
        self._chosen: ChosenOrders | None = None
        self._disable_adapters = False
        self.quantization_backend: QuantizationBackend | None = quantization_of(inner, quantization)

    # --- adapters on this layer ---

    def update_layer(
        self, adapter: str, method: Method, parts: Sequence[Part], key: str, options: AdapterOptions
    ) -> None:
        """Put an adapter on this layer, with its coefficients at their starts.

        Args:
            adapter: its name.
            method: its hyper-parameters here.
            parts: output rows that it adapts.
            key: module path, which names the streams of a basis that is not shared.
            options: what it asks of every layer.
        """
        paths = [f"{key}[{part.name}]" if part.name else key for part in parts]
        streams = [method.streams(path) for path in paths]
        if not method.shares_basis:
            self.randbasis_streams[adapter] = Streams(streams)
        self.options[adapter], self.path = options, key
        self.adapted[adapter] = [
            self._adapt(adapter, method, part, path, stream, options)
            for part, path, stream in zip(parts, paths, streams, strict=True)
        ]
        self._chosen = None
        self._move_adapter_to_device_of_base_layer(adapter)
        self.let_train(adapter, adapter in self.active_adapters)

    def _adapt(
        self,
        adapter: str,
        method: Method,
        part: Part,
        path: str,
        streams: tuple[int, ...],
        options: AdapterOptions,
    ) -> AdaptedPart:
        rows, suffix = part.rows, part.suffix
        weight = self.frozen_weight()[part.start : part.stop] if method.needs_base else None
        site = Site(rows, self.in_features, streams, base_device(self.get_base_layer()))
        bound = method.bind(site, weight)
        attributes: dict[str, str] = {}
        starts = method.starts(rows, self.in_features)
        for name, shape in method.coefficient_shapes(rows, self.in_features).items():
            start = torch.full(shape, starts[name], dtype=torch.float32)
            if not options.init_weights:
                stream = f"{method.name}/init/{len(self.options)}/{name}/{path}"
                noise = basis_entries(method.seed, stream, "normal", (1, 1, start.numel()))
                start = start + (NOISE / 2) * (starts[name] or 1.0) * noise.view(shape).to(start.device)
            attribute = f"randbasis_{name}{suffix}"
            self._container(attribute)[adapter] = Coefficients(start)
            attributes[name] = attribute
        return AdaptedPart(part, bound, attributes)

    def frozen_weight(self) -> Tensor:
        """``W0`` as ``[out, in]``."""
        return frozen_weight(self.get_base_layer())

    def _container(self, attribute: str) -> nn.ModuleDict:
        if attribute not in self.adapter_layer_names:
            setattr(self, attribute, ByAdapter())
            self.adapter_layer_names = (*self.adapter_layer_names, attribute)
        return getattr(self, attribute)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter, but keep its dtype: coefficients are float32 beside a base in half precision."""
        target = device or base_device(self.get_base_layer())
        for name in (*self.adapter_layer_names, "randbasis_streams", MEANING):
            held = _held(self, name).get(adapter_name)
            if target is None or held is None:
                continue
            devices = {tensor.device for tensor in (*held.parameters(), *held.buffers())}
            if devices != {target} and torch.device("meta") not in devices:
                held.to(target)

    def hold_meaning(self, adapter: str, meaning: Meaning | None) -> None:
        """Hold what the coefficients of an adapter mean, for all of its layers; None where another layer does."""
        if adapter in self.randbasis_meaning:
            del self.randbasis_meaning[adapter]
        if meaning is not None:
            held, device = HeldMeaning(adapter, meaning), base_device(self.get_base_layer())
            self.randbasis_meaning[adapter] = held if device is None else held.to(device)

    def cast_to_base(self, adapter: str) -> None:
        """Give the coefficients of an adapter the dtype of the base layer, when that is a floating dtype."""
        dtype = base_dtype(self.get_base_layer())
        for name in self.adapter_layer_names:
            container = cast("nn.ModuleDict", getattr(self, name))
            if adapter in container and dtype is not None:
                container[adapter].to(dtype=dtype)

    def matrices(self, adapter: str) -> list[AdaptedPart]:
        """The matrices that an adapter has on this layer, their streams as stored."""
        adapted = self.adapted.get(adapter, [])
        if adapter in self.randbasis_streams:
            stored = cast("Streams", self.randbasis_streams[adapter]).values
            for one, streams in zip(adapted, stored, strict=True):
                if one.bound.site.streams != streams:
                    one.bound = one.bound.method.bind(replace(one.bound.site, streams=streams))
        return adapted

    def copy_streams(self, source: str, target: str) -> None:
        """Give an adapter the stored streams of another one; nothing to do where the basis is shared."""
        if source in self.randbasis_streams:
            stored = cast("Streams", self.randbasis_streams[source])
            self.randbasis_streams[target] = Streams(stored.values).to(stored.weight.device)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's, several times quicker."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for attribute in self.adapter_layer_names:
            for name, coefficients in _held(self, attribute).items():
                _let_train(coefficients, name in names and not inference_mode)
        self._active_adapter = names

    def let_train(self, adapter: str, wanted: bool) -> None:
        """Have the coefficients of one adapter train, or leave them frozen; those of others stay as they are."""
        for attribute in self.adapter_layer_names:
            held = _held(self, attribute)
            if adapter in held:
                _let_train(held[adapter], wanted)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's, and forget the factors that were kept."""
        super().delete_adapter(adapter_name)
        self._forget()

    def _forget(self) -> None:
        """Drop all that was kept, and what was decided."""
        self._cache.clear()
        self._prepared_pass = self._chosen = None

    def coefficients(self, adapter: str, one: AdaptedPart) -> dict[str, Tensor]:
        """The coefficients of one matrix that ΔW is made of, in the method's order.

        Those that are trained, or what math (11) makes of them where the adapter has ``quantize_coefficients``.
        """
        trained = self.trained_coefficients(adapter, one)
        if one.owner is not None:
            trained = {name: self.here(c) for name, c in trained.items()}
        bits = self.options[adapter].quantize_coefficients
        return trained if bits is None else {name: straight_through(c, bits) for name, c in trained.items()}

    def trained_coefficients(self, adapter: str, one: AdaptedPart) -> dict[str, Tensor]:
        """The coefficient tensors of one matrix that are trained and saved, in the method's order."""
        layer = self if one.owner is None else one.owner  # as `holder`: each call counts here
        if torch.compiler.is_compiling():
            return {name: getattr(layer, attribute)[adapter].weight for name, attribute in one.attributes.items()}
        found: dict[str, Tensor] = {}
        for name, attribute in one.attributes.items():
            # By torch's own dictionaries: its accessors cost many times a look into them.
            holder = cast("nn.Module", cast("nn.Module", layer._modules[attribute])._modules[adapter])
            weight = holder._parameters.get("weight")
            found[name] = cast("Tensor", holder.weight) if weight is None else weight  # a parametrization, say
        return found

    def here(self, c: Tensor) -> Tensor:
        """Coefficients that another layer holds, math (26), on the device of this one.

        Raises:
            TieError: that layer has them only while it runs itself.
        """
        device = base_device(self.get_base_layer())
        if isinstance(c, DTensor) or (c.is_meta and device is not None and device != c.device):
            raise TieError(
                "tie needs coefficients that all layers which share them can read, got some that are sharded, or "
                "offloaded until the layer that holds them runs; shard the model as one unit (one call of fully_shard, "
                "on the whole model), keep that layer on its device, or train with tie='matrix'"
            )
        return c if device is None or c.device == device else c.to(device)

    def containers(self, adapter: str) -> list[nn.ModuleDict]:
        """Where the coefficients and stored streams of an adapter on this layer lie, under its name."""
        found: list[nn.ModuleDict] = [self.randbasis_streams] if adapter in self.randbasis_streams else []
        for one in self.adapted.get(adapter, ()):
            found += [cast("nn.ModuleDict", getattr(one.holder(self), name)) for name in one.attributes.values()]
        return found

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """ΔW is additive, so it can be written as a LoRA pair (exactly where the rank allows)."""
        return True

    # --- ΔW ---

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``ΔW`` of an adapter in the layout and dtype of the base weight; zero rows where no part is adapted.

        Args:
            adapter: its name.
        """
        delta = self._full_delta(adapter, None)
        delta = delta.to(base_dtype(self.get_base_layer()) or delta.dtype)
        return delta.T if self.transposed else delta

    def _full_delta(self, adapter: str, only: Sequence[AdaptedPart] | None, dtype: torch.dtype | None = None) -> Tensor:
        """ΔW ``[out, in]`` of all matrices of the adapter or of some.

        In float32 or wider, but with ``dtype`` in that, as exact as products in it need.
        """
        pieces: list[Tensor] = []
        row = 0
        for one in self.matrices(adapter) if only is None else only:
            factors = self._joint(adapter, one) if one.bound.sums else None
            delta = one.bound.matrix(self._widened(adapter, one), dtype) if factors is None else factors.matrix()
            if row < one.part.start:
                pieces.append(delta.new_zeros(one.part.start - row, self.in_features))
            pieces.append(delta)
            row = one.part.stop
        if row < self.out_features:
            pieces.append(pieces[0].new_zeros(self.out_features - row, self.in_features))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _joint(self, adapter: str, one: AdaptedPart) -> Factors | None:
        """Factors that were made for all layers at once; None where this one makes its own."""
        return None

    def _widened(self, adapter: str, one: AdaptedPart) -> Mapping[str, Tensor]:
        return widened(self.coefficients(adapter, one))

    # --- moves ---

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        # A change of dtype or device and back may put other values at the old address in the old version.
        self._forget()
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; factors kept for evaluation are dropped when training starts."""
        if mode:
            self._forget()
        return super().train(mode)


def _held(layer: nn.Module, attribute: str) -> dict[str, nn.Module]:
    """What a container of a layer holds, by name: torch's own accessors cost many times a look into a dictionary."""
    return cast("dict[str, nn.Module]", vars(vars(layer)["_modules"][attribute])["_modules"])


def _let_train(coefficients: nn.Module, wanted: bool) -> None:
    for parameter in vars(coefficients)["_parameters"].values():
        if parameter.requires_grad is not wanted and parameter.is_leaf:
            parameter.requires_grad_(wanted)
