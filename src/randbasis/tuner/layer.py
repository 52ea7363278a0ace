"""One adapted layer for all methods: ``nn.Linear``, ``Conv1D``, slices of fused projections, quantized bases."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import (
    QuantizationBackend,
    quantization_extra_repr,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from randbasis.basis import basis_entries
from randbasis.contraction import (
    WORK_OF_A_NUMBER,
    Order,
    check_order,
    choose_order,
    fused_pair_order,
    fused_weight_order,
    fusing_refusal,
    token_order,
    token_order_of_rows,
    weight_order,
)
from randbasis.errors import AdapterNameError, ContractionError, LayerTypeError, MergeError
from randbasis.methods import Matrix, Method
from randbasis.tuner.adapted_matrix import AdaptedMatrix, AdapterOptions, batch_groups
from randbasis.tuner.base_weight import (
    BaseWeight,
    base_device,
    base_dtype,
    full_weight,
    layer_shape,
    quantization_of,
)
from randbasis.tuner.coefficients import Coefficients, Streams, straight_through
from randbasis.tuner.factor_cache import FactorCache
from randbasis.tuner.prepared_pass import Holder, PreparedPass, Term
from randbasis.tuner.targets import Part

NOISE = 0.1
"""Standard deviation of what ``init_weights=False`` adds to the starts of the coefficients, relative to the start."""


class RandbasisLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer and any number of adapters of any method of this package on it or on parts of it.

    Args:
        base_layer: the layer to adapt.
        quantization: what PEFT's quantization backends need to know of the model.

    Raises:
        LayerTypeError: the layer is not linear.
    """

    other_param_names: tuple[str, ...] = ("adapted", "options", "randbasis_streams")

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
        self.adapted: dict[str, list[AdaptedMatrix]] = {}
        self.options: dict[str, AdapterOptions] = {}
        self.randbasis_streams = nn.ModuleDict({})
        self.merged_adapters: list[str] = []
        self._cache = FactorCache()
        self._prepared_pass: PreparedPass | None = None
        self._unmerged: BaseWeight | None = None
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
        self.options[adapter] = options
        self.adapted[adapter] = [
            self._adapt(adapter, method, part, path, stream, options)
            for part, path, stream in zip(parts, paths, streams, strict=True)
        ]
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters)

    def _adapt(
        self,
        adapter: str,
        method: Method,
        part: Part,
        path: str,
        streams: tuple[int, ...],
        options: AdapterOptions,
    ) -> AdaptedMatrix:
        matrix = Matrix(part.rows, self.in_features, streams)
        attributes: dict[str, str] = {}
        starts = method.starts(part.rows, self.in_features)
        for name, shape in method.coefficient_shapes(part.rows, self.in_features).items():
            start = torch.full(shape, starts[name], dtype=torch.float32)
            if not options.init_weights:
                stream = f"{method.name}/init/{len(self.options)}/{name}/{path}"
                noise = basis_entries(method.seed, stream, "normal", (1, 1, start.numel()))
                start = start + (NOISE / 2) * (starts[name] or 1.0) * noise.view(shape).to(start.device)
            attribute = f"randbasis_{name}{part.suffix}"
            self._container(attribute)[adapter] = Coefficients(start)
            attributes[name] = attribute
        return AdaptedMatrix(part, method, matrix, attributes, method.hold(matrix))

    def _container(self, attribute: str) -> nn.ModuleDict:
        if attribute not in self.adapter_layer_names:
            setattr(self, attribute, nn.ModuleDict({}))
            self.adapter_layer_names = (*self.adapter_layer_names, attribute)
        return getattr(self, attribute)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter, but keep its dtype: coefficients are float32 beside a base in half precision."""
        target = device or base_device(self.get_base_layer())
        for name in (*self.adapter_layer_names, "randbasis_streams"):
            container = cast("nn.ModuleDict", getattr(self, name))
            if target is None or adapter_name not in container:
                continue
            if all(not tensor.is_meta for tensor in container[adapter_name].state_dict().values()):
                container[adapter_name].to(target)

    def cast_to_base(self, adapter: str) -> None:
        """Give the coefficients of an adapter the dtype of the base layer, when that is a floating dtype."""
        dtype = base_dtype(self.get_base_layer())
        for name in self.adapter_layer_names:
            container = cast("nn.ModuleDict", getattr(self, name))
            if adapter in container and dtype is not None:
                container[adapter].to(dtype=dtype)

    def matrices(self, adapter: str) -> list[AdaptedMatrix]:
        """The matrices that an adapter has on this layer, their streams as stored."""
        adapted = self.adapted.get(adapter, [])
        if adapter in self.randbasis_streams:
            stored = cast("Streams", self.randbasis_streams[adapter]).values
            for one, streams in zip(adapted, stored, strict=True):
                if one.matrix.streams != streams:
                    one.matrix = Matrix(one.matrix.out_features, one.matrix.in_features, streams)
                    one.held = one.method.hold(one.matrix)
        return adapted

    def copy_streams(self, source: str, target: str) -> None:
        """Give an adapter the stored streams of another one; nothing to do where the basis is shared."""
        if source in self.randbasis_streams:
            stored = cast("Streams", self.randbasis_streams[source])
            self.randbasis_streams[target] = Streams(stored.values).to(stored.weight.device)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's, and forget the factors that were kept."""
        super().delete_adapter(adapter_name)
        self._forget()

    def _forget(self) -> None:
        """Drop all that was kept for evaluation."""
        self._cache.clear()
        self._prepared_pass = None

    def coefficients(self, adapter: str, one: AdaptedMatrix) -> dict[str, Tensor]:
        """The coefficients of one matrix that ΔW is made of, in the method's order.

        Those that are trained, or what math (11) makes of them where the adapter has ``quantize_coefficients``.
        """
        trained = self.trained_coefficients(adapter, one)
        bits = self.options[adapter].quantize_coefficients
        return trained if bits is None else {name: straight_through(c, bits) for name, c in trained.items()}

    def trained_coefficients(self, adapter: str, one: AdaptedMatrix) -> dict[str, Tensor]:
        """The coefficient tensors of one matrix that are trained and saved, in the method's order."""
        return {name: self._holder(adapter, attribute).weight for name, attribute in one.attributes.items()}

    def _holder(self, adapter: str, attribute: str) -> Coefficients:
        return getattr(self, attribute)[adapter]

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

    def _full_delta(self, adapter: str, only: Sequence[AdaptedMatrix] | None) -> Tensor:
        """ΔW ``[out, in]`` in float32 or wider, of all matrices of the adapter or of some."""
        pieces: list[Tensor] = []
        row = 0
        for one in self.matrices(adapter) if only is None else only:
            delta = one.method.delta(self._widened(adapter, one), one.matrix)
            if row < one.part.start:
                pieces.append(delta.new_zeros(one.part.start - row, self.in_features))
            pieces.append(delta)
            row = one.part.stop
        if row < self.out_features:
            pieces.append(pieces[0].new_zeros(self.out_features - row, self.in_features))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _widened(self, adapter: str, one: AdaptedMatrix) -> dict[str, Tensor]:
        """The coefficients in float32 or wider: they are few, and sums of basis entries overflow float16."""
        return {
            name: c.to(torch.promote_types(c.dtype, torch.float32))
            for name, c in self.coefficients(adapter, one).items()
        }

    # --- merging ---

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight; :meth:`unmerge` restores its bits.

        Args:
            safe_merge: refuse a result that is not finite, and leave the weight as it was.
            adapter_names: which; None means the active ones.

        Raises:
            MergeError: the quantization of the base weight cannot be written, or safe_merge found a bad value.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapted]
        if not names:
            return
        merged = self._merged_weight(names, safe=safe_merge)
        self._replace_base_weight(merged)
        self.merged_adapters.extend(names)

    def check_merge(self, adapter_names: Sequence[str] | None, *, safe_merge: bool) -> None:
        """Raise what :meth:`merge` would raise, and merge nothing.

        Raises:
            MergeError: as :meth:`merge`.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name in self.adapted and name not in self.merged_adapters]
        backend = self.quantization_backend
        if names and (safe_merge or (backend is not None and not backend.supports_merge)):
            self._merged_weight(names, safe=safe_merge)

    def _merged_weight(self, names: Sequence[str], *, safe: bool) -> Tensor:
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise MergeError(
                f"an adapter cannot be merged into weights quantized by {backend.backend_name}: they cannot be "
                "written; load the base model in full precision and merge there"
            )
        base = self.get_base_layer()
        before = cast("Tensor", base.weight) if backend is None else full_weight(base, backend)
        with torch.no_grad():
            total = sum((self._full_delta(name, None) for name in names), start=torch.zeros((), device=before.device))
            change = total.T if self.transposed else total
            merged = (before.to(torch.promote_types(before.dtype, change.dtype)) + change).to(before.dtype)
        if safe and not bool(torch.isfinite(merged).all()):
            raise MergeError(
                f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken; "
                "merged weights must be finite, the base weight was left as it was; retrain or reload the adapter"
            )
        return merged

    def _replace_base_weight(self, merged: Tensor) -> None:
        base = self.get_base_layer()
        if self._unmerged is None:
            self._unmerged = BaseWeight.of(base, quantized=self.quantization_backend is not None)
        self.set_base_weight(merged)
        self._forget()

    def unmerge(self) -> None:
        """Restore the base weight to the bits it had before :meth:`merge`."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._unmerged.base is not self.get_base_layer():
            self.base_layer = self._unmerged.base
        self._unmerged.restore()
        self._unmerged = None
        self.merged_adapters.clear()
        self._forget()

    # --- forward ---

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``h = W0 x + Σ ΔW x`` over the active adapters.

        Args:
            x: ``[..., in]``.
            args: passed on to the base layer.
            kwargs: passed on to the base layer; ``adapter_names`` gives each row its own adapter.
        """
        prepared = self._prepared_pass
        usual = not (args or kwargs or self._disable_adapters or self.merged_adapters)
        if prepared is not None and usual and prepared.fits(x, self.active_adapters):
            return prepared.add_to(self._base_result(x), x)
        adapter_names: list[str] | None = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.adapted]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        return self._forward_active(x, active, *args, **kwargs)

    def _forward_active(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        dtype = _compute_dtype(x)
        refusal = self._fusing_refusal(dtype, bool(args or kwargs), active)
        by: dict[Order, dict[str, list[AdaptedMatrix]]] = {"token": {}, "weight": {}, "pair": {}}
        for name in active:
            for one in self.matrices(name):
                order = self._order(name, one, x.numel() // self.in_features, fused=refusal is None)
                by[order].setdefault(name, []).append(one)
        if by["weight"]:  # one sum of weights takes them all
            for name, matrices in by["pair"].items():
                together = [*by["weight"].get(name, []), *matrices]
                by["weight"][name] = sorted(together, key=lambda one: one.part.start)
        if by["weight"] and refusal is None and not self._thin(x):
            result = self._fused(x, by["weight"])
        elif by["pair"]:
            result = self._fused_pairs(x, by["pair"])
        else:
            result = self._base_result(x, *args, **kwargs)
            for name, matrices in by["weight"].items():
                delta = self._delta(name, matrices)
                result = result + weight_order(self._dropped(x, name, dtype), delta.to(dtype)).to(result.dtype)
        for name, matrices in by["token"].items():
            dropped = self._dropped(x, name, dtype)
            for one in matrices:
                prepared = {key: value.to(dtype) for key, value in self._prepared(name, one).items()}
                h = token_order(dropped, prepared, one.method, one.matrix)
                result = result + self._embed(h.to(result.dtype), one.part)
        if not args and not kwargs and self._thin(x) and result.dtype == x.dtype == dtype:
            self._prepare_pass(x, by)
        return result

    def _thin(self, x: Tensor) -> bool:
        """Whether this is a step of decoding: the sum W0 + ΔW would cost more than a second product."""
        return not (self.training or torch.is_grad_enabled()) and x.numel() < WORK_OF_A_NUMBER * self.in_features

    def _prepare_pass(self, x: Tensor, by: Mapping[Order, Mapping[str, list[AdaptedMatrix]]]) -> None:
        holders: list[Holder] = [cast("Streams", one) for one in self.randbasis_streams.values()]
        terms: list[Term] = []
        for name, matrices in by["weight"].items():
            terms.append(partial(weight_order, delta=self._delta(name, matrices).to(x.dtype)))
        for name, matrices in by["token"].items():
            terms += [self._token_term(name, one, x.dtype) for one in matrices]
        for name, matrices in (*by["weight"].items(), *by["token"].items()):
            holders += [self._holder(name, attribute) for one in matrices for attribute in one.attributes.values()]
        self._prepared_pass = PreparedPass.of(x, self.active_adapters, holders, terms)

    def _token_term(self, adapter: str, one: AdaptedMatrix, dtype: torch.dtype) -> Term:
        prepared = {key: value.to(dtype).unsqueeze(0) for key, value in self._prepared(adapter, one).items()}
        term = partial(token_order_of_rows, prepared=prepared, method=one.method, matrix=one.matrix)
        return term if one.part.rows == self.out_features else lambda x: self._embed(term(x), one.part)

    def _base_result(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        return (
            result if self.quantization_backend is None else self.quantization_backend.maybe_clone_base_result(result)
        )

    def _linear_parts(self) -> tuple[Tensor, Tensor | None]:
        """``W0`` as ``[out, in]`` and the bias of a plain base layer."""
        base = self.get_base_layer()
        weight = cast("Tensor", base.weight)
        return weight.T if self.transposed else weight, cast("Tensor | None", base.bias)

    def _delta(self, adapter: str, matrices: list[AdaptedMatrix]) -> Tensor:
        return self._cached(adapter, matrices, "delta", partial(self._full_delta, adapter, matrices))

    def _fused(self, x: Tensor, by_weight: dict[str, list[AdaptedMatrix]]) -> Tensor:
        weight, bias = self._linear_parts()
        deltas = [self._delta(name, matrices) for name, matrices in by_weight.items()]
        total = deltas[0] if len(deltas) == 1 else torch.stack(deltas).sum(0)
        return fused_weight_order(x, weight, bias, total.to(weight.dtype))

    def _fused_pairs(self, x: Tensor, by_pair: dict[str, list[AdaptedMatrix]]) -> Tensor:
        weight, bias = self._linear_parts()
        pairs: list[tuple[int, Tensor, Tensor]] = []
        for name, matrices in by_pair.items():
            for one in matrices:
                factors = one.method.factors(self._widened(name, one), one.matrix)
                assert factors.up is not None
                pairs.append((one.part.start, factors.up.to(weight.dtype), factors.down.to(weight.dtype)))
        return fused_pair_order(x, weight, bias, pairs)

    def _fusing_refusal(self, dtype: torch.dtype, extra_arguments: bool, active: list[str]) -> str | None:
        base = self.base_layer
        if self.quantization_backend is not None:
            return f"the base weight is quantized by {self.quantization_backend.backend_name}"
        if type(base) not in (nn.Linear, Conv1D) or extra_arguments:
            return f"the base layer is a {type(base).__name__} with a forward of its own"
        if base._forward_hooks or base._forward_pre_hooks:  # pyright: ignore[reportPrivateUsage]
            return "the base layer has forward hooks"
        if self.training and any(self.options[name].dropout > 0 for name in active):
            return "the adapter drops some of its inputs, the base layer none"
        if any(parameter.requires_grad for parameter in base.parameters()):
            return "the base layer is trained too"
        return fusing_refusal(cast("Tensor", base.weight), dtype)

    def _order(self, adapter: str, one: AdaptedMatrix, tokens: int, *, fused: bool) -> Order:
        wanted = self.options[adapter].contraction
        if self.quantization_backend is not None:
            if wanted == "weight":
                raise ContractionError(
                    f"contraction='weight' needs a base weight that ΔW can be added to, got one quantized by "
                    f"{self.quantization_backend.backend_name}; use contraction='token' or 'auto'"
                )
            wanted = "token"
        # Checkpointed layers run first without gradients: the same order as when they run again with them.
        training = (torch.is_grad_enabled() or self.training) and self._needs_gradient(adapter, one)
        return choose_order(
            check_order(wanted),
            one.method,
            one.matrix,
            tokens,
            training=training,
            fused=fused,
            pairs=not torch.compiler.is_compiling(),  # a compiler cannot follow a factor into what is stored
        )

    def _needs_gradient(self, adapter: str, one: AdaptedMatrix) -> bool:
        return any(c.requires_grad for c in self.trained_coefficients(adapter, one).values())

    def _dropped(self, x: Tensor, adapter: str, dtype: torch.dtype) -> Tensor:
        x = self._cast_input_dtype(x, dtype)
        p = self.options[adapter].dropout
        return functional.dropout(x, p, training=True) if p > 0 and self.training else x

    def _embed(self, h: Tensor, part: Part) -> Tensor:
        """The output of a part in the output of the layer: zeros elsewhere."""
        if part.rows == self.out_features:
            return h
        return functional.pad(h, (part.start, self.out_features - part.stop))

    def _prepared(self, adapter: str, one: AdaptedMatrix) -> dict[str, Tensor]:
        def compute() -> dict[str, Tensor]:
            return one.method.prepare(self.coefficients(adapter, one), one.matrix)

        return self._cached(adapter, [one], "prepared", compute)

    def _cached(self, adapter: str, matrices: Sequence[AdaptedMatrix], what: str, compute: Any) -> Any:
        sources = [c for one in matrices for c in self.trained_coefficients(adapter, one).values()]
        key = (what, adapter, tuple((one.part.name, one.matrix) for one in matrices))
        return self._cache.get(key, sources, compute, usable=not self.training)

    # --- mixed batches ---

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            raise AdapterNameError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. "
                f"Merged are {self.merged_adapters}."
            )
        if x.shape[0] != len(adapter_names):
            raise AdapterNameError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {x.shape[0]} respectively; give one name for each row of the batch"
            )
        result = self._base_result(x, *args, **kwargs)
        dtype = _compute_dtype(x)
        rows = self._cast_input_dtype(x, dtype).reshape(x.shape[0], -1, self.in_features)
        for group in batch_groups(adapter_names, self.matrices):
            one = group.matrix
            slots = torch.tensor(group.slots, device=x.device)
            index = torch.tensor(group.rows, device=x.device)
            everyone = len(group.rows) == len(adapter_names)
            gathered = {key: value.to(dtype)[slots] for key, value in self._stacked(group.names, one).items()}
            h = one.method.apply(rows if everyone else rows[index], gathered, one.matrix)
            h = self._embed(h, one.part).to(result.dtype).view(len(group.rows), *result.shape[1:])
            result = result + h if everyone else result.index_add(0, index, h)
        return result

    def _stacked(self, names: list[str], one: AdaptedMatrix) -> dict[str, Tensor]:
        """What the method prepares of the coefficients of several adapters, ``[len(names), ...]`` each."""

        def compute() -> dict[str, Tensor]:
            own = [self.coefficients(name, one) for name in names]
            stacked = {key: torch.stack([c[key] for c in own]) for key in own[0]}
            return one.method.prepare(stacked, one.matrix)

        sources = [c for name in names for c in self.trained_coefficients(name, one).values()]
        key = ("stacked", tuple(names), one.part.name, one.matrix)
        return self._cache.get(key, sources, compute, usable=not self.training)

    def _apply(self, *args: Any, **kwargs: Any) -> "RandbasisLinear":
        # A change of dtype or device and back may put other values at the old address in the old version.
        self._forget()
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> "RandbasisLinear":
        """Set the mode; factors kept for evaluation are dropped when training starts."""
        if mode:
            self._forget()
        return super().train(mode)

    def extra_repr(self) -> str:
        """The quantization of the base layer, for ``print(model)``."""
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "randbasis." + super().__repr__()


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype that the products are computed in: autocast's when it is on, else that of the input."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
