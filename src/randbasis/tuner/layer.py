"""One adapted layer for all methods: ``nn.Linear``, ``Conv1D``, slices of fused projections, quantized bases."""

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import (
    check_adapters_to_merge,
    onload_layer,  # pyright: ignore[reportUnknownVariableType]
)
from peft.utils.quantization_utils import quantization_extra_repr
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

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
from randbasis.errors import AdapterNameError, ContractionError, MergeError
from randbasis.ops import traced
from randbasis.tuner.adapted_layer import AdaptedLayer
from randbasis.tuner.adapted_matrix import AdaptedMatrix, BatchGroup, batch_groups
from randbasis.tuner.base_weight import BaseWeight, forward_of_its_own, full_weight, offloaded, write_weight
from randbasis.tuner.mixed_batch import MixedBatch, batch_of
from randbasis.tuner.prepared_pass import Place, PreparedPass, Term, decodes
from randbasis.tuner.snapshot import Snapshot
from randbasis.tuner.targets import Part


class RandbasisLinear(AdaptedLayer):
    """A frozen linear layer and any number of adapters of any method of this package on it or on parts of it.

    Args:
        base_layer: the layer to adapt.
        quantization: what PEFT's quantization backends need to know of the model.

    Raises:
        LayerTypeError: the layer is not linear.
    """

    def __init__(self, base_layer: nn.Module, quantization: Mapping[str, Any] | None = None) -> None:
        super().__init__(base_layer, quantization)
        self._unmerged: BaseWeight | None = None

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
        self._check_writable()
        with self._weight_at_hand():
            merged = self._merged_weight(names, safe=safe_merge)
            self._replace_base_weight(merged)
        self.merged_adapters.extend(names)

    def check_merge(self, adapter_names: Sequence[str] | None, *, safe_merge: bool, key: str = "") -> None:
        """Raise what :meth:`merge` would raise, and merge nothing.

        Args:
            adapter_names: as of :meth:`merge`.
            safe_merge: as of :meth:`merge`.
            key: module path, for the message.

        Raises:
            MergeError: as :meth:`merge`.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name in self.adapted and name not in self.merged_adapters]
        backend = self.quantization_backend
        if names:
            self._check_writable(key)
        if names and (safe_merge or (backend is not None and not backend.supports_merge)):
            with self._weight_at_hand():
                self._merged_weight(names, safe=safe_merge)

    def _check_writable(self, key: str = "") -> None:
        """Raise unless the base layer with W0 + ΔW computes what the base layer and the adapter compute together."""
        own = forward_of_its_own(self.get_base_layer())
        if own is not None:
            raise MergeError(
                f"an adapter can only be merged into a layer that computes W x + b, the base layer {key!r} has {own}, "
                "which ΔW is added after and would go through when merged; remove it first, or keep the adapter beside "
                "the weights"
            )

    def _weight_at_hand(self) -> AbstractContextManager[None]:
        """Within it an offloaded base weight is where it is computed with, and what is written to it is kept."""
        base = self.get_base_layer()
        absent = offloaded(base) and cast("Tensor", base.weight).is_meta
        return cast("Any", onload_layer)(self) if absent else nullcontext()

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
        if self.quantization_backend is None:
            write_weight(base, merged)
        else:
            self.set_base_weight(merged)
        self._forget()

    def unmerge(self) -> None:
        """Restore the base weight to the bits it had before :meth:`merge`."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._unmerged.base is not self.get_base_layer():
            self.base_layer = self._unmerged.base
        with self._weight_at_hand():
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
        mixed = batch_of(self)
        prepared = self._prepared_pass
        if prepared is not None:
            usual = not (mixed or args or kwargs or self._disable_adapters or self.merged_adapters or self.training)
            if usual and prepared.fits(x, self.active_adapters, rows_first=self.rows_first):
                return prepared.add_to(self._base_result(x), x)
            if not prepared.snapshot.by_value and not self._decodes(x):
                self._forget()
        adapter_names: list[str] | None = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            mixed = MixedBatch(adapter_names, 1, "rows first", frozenset())
        if mixed is not None:
            return self._forward_mixed(x, mixed, *args, **kwargs)
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
                order = self._order(name, one, x, fused=refusal is None)
                by[order].setdefault(name, []).append(one)
        if by["weight"]:  # one sum of weights takes them all
            for name, matrices in by["pair"].items():
                together = [*by["weight"].get(name, []), *matrices]
                by["weight"][name] = sorted(together, key=lambda one: one.part.start)
        decoding = self._decodes(x)
        if by["weight"] and refusal is None and not self._thin(x):
            result = self._fused(x, by["weight"])
        elif by["pair"]:
            result = self._fused_pairs(x, by["pair"])
        else:
            result = self._base_result(x, *args, **kwargs)
            for name, matrices in by["weight"].items():
                delta = self._delta(name, matrices, decoding=decoding)
                result = result + weight_order(self._dropped(x, name, dtype), delta.to(dtype)).to(result.dtype)
        for name, matrices in by["token"].items():
            dropped = self._dropped(x, name, dtype)
            for one in matrices:
                prepared = {key: value.to(dtype) for key, value in self._prepared(name, one, decoding).items()}
                h = token_order(dropped, prepared, one.method, one.matrix)
                result = result + self._embed(h.to(result.dtype), one.part)
        if not args and not kwargs and self._thin(x) and result.dtype == x.dtype == dtype:
            self._prepare_pass(x, by)
        return result

    def _thin(self, x: Tensor) -> bool:
        """Whether this is a step of decoding: the sum W0 + ΔW would cost more than a second product."""
        if self.training or torch.is_grad_enabled() or traced():
            return False
        return x.numel() < WORK_OF_A_NUMBER * self.in_features

    def _prepare_pass(self, x: Tensor, by: Mapping[Order, Mapping[str, list[AdaptedMatrix]]]) -> None:
        places = [Place.of(self.randbasis_streams, name) for name in self.randbasis_streams]
        for name, matrices in (*by["weight"].items(), *by["token"].items()):
            attributes = [attribute for one in matrices for attribute in one.attributes.values()]
            places += [Place.of(getattr(self, attribute), name) for attribute in attributes]
        snapshot = Snapshot.of([place.tensor for place in places])  # before the values are used
        decoding = self._decodes(x)
        if snapshot is None or not (snapshot.by_value or decoding):
            return
        terms: list[Term] = []
        for name, matrices in by["weight"].items():
            terms.append(partial(weight_order, delta=self._delta(name, matrices, decoding=decoding).to(x.dtype)))
        for name, matrices in by["token"].items():
            terms += [self._token_term(name, one, x.dtype, decoding) for one in matrices]
        active = list(self.active_adapters)
        self._prepared_pass = PreparedPass(active, x.dtype, x.device, x.numel(), places, snapshot, terms)

    def _decodes(self, x: Tensor) -> bool:
        return decodes(x, rows_first=self.rows_first)

    def _token_term(self, adapter: str, one: AdaptedMatrix, dtype: torch.dtype, decoding: bool) -> Term:
        prepared = {key: value.to(dtype).unsqueeze(0) for key, value in self._prepared(adapter, one, decoding).items()}
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

    def _delta(self, adapter: str, matrices: list[AdaptedMatrix], *, decoding: bool) -> Tensor:
        return self._cached(adapter, matrices, "delta", partial(self._full_delta, adapter, matrices), decoding)

    def _fused(self, x: Tensor, by_weight: dict[str, list[AdaptedMatrix]]) -> Tensor:
        weight, bias = self._linear_parts()
        deltas = [self._delta(name, matrices, decoding=self._decodes(x)) for name, matrices in by_weight.items()]
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
        if "forward" in vars(base):  # a hook of accelerate, which brings the weight, included
            return "the base layer has a forward of its own"
        if (own := forward_of_its_own(base)) is not None:
            return f"the base layer has {own}"
        if base._backward_hooks or base._backward_pre_hooks:  # pyright: ignore[reportPrivateUsage]
            return "the base layer has backward hooks"
        if self.training and any(self.options[name].dropout > 0 for name in active):
            return "the adapter drops some of its inputs, the base layer none"
        if any(parameter.requires_grad for parameter in base.parameters()):
            return "the base layer is trained too"
        return fusing_refusal(cast("Tensor", base.weight), dtype)

    def _order(self, adapter: str, one: AdaptedMatrix, x: Tensor, *, fused: bool) -> Order:
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
        training = training and not traced()  # one graph, whether or not gradients are wanted of this recording
        return choose_order(
            check_order(wanted),
            one.method,
            one.matrix,
            x.numel() // self.in_features,
            training=training,
            fused=fused,
            pairs=not torch.compiler.is_compiling(),  # a compiler cannot follow a factor into what is stored
            kept=(x.device.type == "cpu" or self._decodes(x)) and not traced(),
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

    def _prepared(self, adapter: str, one: AdaptedMatrix, decoding: bool) -> dict[str, Tensor]:
        def compute() -> dict[str, Tensor]:
            return one.method.prepare(self._widened(adapter, one), one.matrix)

        return self._cached(adapter, [one], "prepared", compute, decoding)

    def _cached(
        self, adapter: str, matrices: Sequence[AdaptedMatrix], what: str, compute: Callable[[], Any], decoding: bool
    ) -> Any:
        key, sources = self._key(what, adapter, matrices)
        return self._cache.get(key, sources, compute, usable=not self.training, decoding=decoding)

    def _key(
        self, what: str, adapter: str, matrices: Sequence[AdaptedMatrix]
    ) -> tuple[tuple[Hashable, ...], list[Tensor]]:
        """What is made of the coefficients of an adapter, by all that it depends on but their values, and these."""
        sources = [c for one in matrices for c in self.trained_coefficients(adapter, one).values()]
        made_of = tuple((one.part.name, one.method, one.matrix) for one in matrices)
        return (what, adapter, self.options[adapter].quantize_coefficients, made_of), sources

    # --- mixed batches ---

    def _forward_mixed(self, x: Tensor, batch: MixedBatch, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            raise AdapterNameError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. "
                f"Merged are {self.merged_adapters}."
            )
        dimension, names = batch.rows_of(x, x.dim() - 1)
        result = self._base_result(x, *args, **kwargs)
        if dimension:
            result, x = result.transpose(0, dimension), x.transpose(0, dimension)
        dtype = _compute_dtype(x)
        rows = self._cast_input_dtype(x, dtype).reshape(x.shape[0], -1, self.in_features)
        for group in batch_groups(names, self.matrices):
            one = group.matrix
            index = torch.tensor(group.rows, device=x.device)
            everyone = len(group.rows) == len(names)
            gathered = self._gathered(group, dtype, decoding=self._decodes(x))
            h = one.method.apply(rows if everyone else rows[index], gathered, one.matrix)
            h = self._embed(h, one.part).to(result.dtype).view(len(group.rows), *result.shape[1:])
            result = result + h if everyone else result.index_add(0, index, h)
        return result.transpose(0, dimension) if dimension else result

    def _gathered(self, group: BatchGroup, dtype: torch.dtype, *, decoding: bool) -> dict[str, Tensor]:
        """What the method prepares of the coefficients of the adapter of each row, ``[rows, ...]``; 1 where all agree.

        Each adapter has an entry of its own in the cache, whatever the other rows use; only rows are cast.
        """
        one = group.matrix

        def compute(places: list[int]) -> list[dict[str, Tensor]]:
            own = [self._widened(group.names[place], one) for place in places]
            stacked = {key: torch.stack([c[key] for c in own]) for key in own[0]}
            together = one.method.prepare(stacked, one.matrix)
            return [{key: value[at].clone() for key, value in together.items()} for at in range(len(places))]

        wanted = [self._key("prepared", name, [one]) for name in group.names]
        made = self._cache.get_all(wanted, compute, usable=not self.training, decoding=decoding)
        slots = group.slots if len(made) > 1 else [0]
        return {key: torch.stack([made[slot][key] for slot in slots]).to(dtype) for key in made[0]}

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
