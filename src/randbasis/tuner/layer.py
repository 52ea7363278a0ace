"""One adapted layer for all methods: ``nn.Linear``, ``Conv1D``, slices of fused projections, quantized bases."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, cast

import torch
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
    weight_order,
    work_of_a_number,
)
from randbasis.errors import AdapterNameError, ContractionError
from randbasis.ops import traced
from randbasis.tuner.adapted_part import AdaptedPart
from randbasis.tuner.base_weight import forward_of_its_own
from randbasis.tuner.chosen_orders import ChosenOrders
from randbasis.tuner.fused_rounding import rounded_sum, rounding_of, say_exact
from randbasis.tuner.joint_factors import factors_of
from randbasis.tuner.mergeable_layer import MergeableLayer
from randbasis.tuner.mixed_batch import BatchGroup, MixedBatch, batch_groups, batch_of
from randbasis.tuner.prepared_pass import Place, PreparedPass, Term, decodes
from randbasis.tuner.row_plan import RowGroup, RowPlan, SeenRows, plannable
from randbasis.tuner.snapshot import Snapshot
from randbasis.tuner.targets import Part

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class RandbasisLinear(MergeableLayer):
    """A frozen linear layer and any number of adapters of any method of this package on it or on parts of it.

    Args:
        base_layer: the layer to adapt.
        quantization: what PEFT's quantization backends need to know of the model.

    Raises:
        LayerTypeError: the layer is not linear.
    """

    # --- forward ---

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``h = W0 x + Σ ΔW x`` over the active adapters.

        Args:
            x: ``[..., in]``.
            args: passed on to the base layer.
            kwargs: passed on to the base layer; ``adapter_names`` gives each row its own adapter.
        """
        mixed = batch_of(self)
        plain = not (mixed or args or kwargs or self._disable_adapters or self.merged_adapters)
        prepared = self._prepared_pass
        if prepared is not None:
            usual = plain and not self.training
            if usual and prepared.fits(x, self.active_adapters, rows_first=self.rows_first):
                return prepared.add_to(self._base_result(x), x)
            if not prepared.snapshot.by_value and not decodes(x, rows_first=self.rows_first):
                self._forget()
        if mixed is None and not (x.is_cpu or torch.compiler.is_compiling()):
            self._cache.end_rows(decoding=decodes(x, rows_first=self.rows_first))
        if plain:
            return self._forward_active(x)
        adapter_names: list[str] | None = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            mixed = MixedBatch(tuple(adapter_names), 1, "rows first", frozenset())
        if mixed is not None:
            return self._forward_mixed(x, mixed, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self._forward_active(x, *args, **kwargs)

    def _forward_active(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = None if args or kwargs else self._state(x)
        chosen = None if state is None else self._chosen  # which a compiler would guard against any change
        if chosen is None or chosen.state != state:
            chosen = self._choose(x, state, extra_arguments=bool(args or kwargs))
            if state is not None:
                self._chosen = chosen
        elif cast("nn.Module", self._modules["randbasis_streams"])._modules:
            for name in self.active_adapters:
                self.matrices(name)  # what is stored wins, whenever it is written
        dtype = chosen.dtype
        if chosen.weight and chosen.fused and not chosen.thin:
            result = self._fused(x, chosen)
        elif chosen.pair:
            result = self._fused_pairs(x, chosen)
        else:
            result = self._base_result(x, *args, **kwargs)
            for name, parts in chosen.weight.items():
                delta = self._delta(name, parts, decoding=chosen.decoding, dtype=dtype)
                result = result + weight_order(self._dropped(x, name, dtype), delta.to(dtype)).to(result.dtype)
        for name, parts in chosen.token.items():
            dropped = self._dropped(x, name, dtype)
            for one in parts:
                h = token_order(dropped, self._token_prepared(name, one, chosen), one.bound)
                result = result + self._embed(h.to(result.dtype), one.part)
        if chosen.thin and not args and not kwargs and result.dtype == x.dtype == dtype:
            self._prepare_pass(x, chosen)
        return result

    # --- which order ---

    def _state(self, x: Tensor) -> tuple[Any, ...] | None:
        """All that the orders depend on, by torch's own dictionaries; None where a compiler or a tracer looks on."""
        if torch.compiler.is_compiling() or cast("Any", torch)._C._get_tracing_state() is not None:
            return None
        base = cast("nn.Module", self._modules["base_layer"])
        inside = vars(base)
        if inside["_modules"]:
            return None
        grad, device = torch.is_grad_enabled(), x.device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        found: list[Any] = [
            *(x.numel(), x.dtype, device, x.dim() == 3 and x.shape[1] == 1, self.rows_first, self.training, grad),
            *(autocast, type(base), type(base).forward, "forward" in inside, "_hf_hook" in inside),
            *map(bool, map(inside.__getitem__, _HOOKS)),
        ]
        for parameter in inside["_parameters"].values():
            found += (None,) if parameter is None else (parameter.dtype, parameter.requires_grad)
        active = self._active_adapter
        for name in (active,) if isinstance(active, str) else active:
            found += name, self.options.get(name)
            for one in self.adapted.get(name, ()) if grad or self.training else ():
                owner = self if one.owner is None else one.owner  # as `holder`: each call counts here
                for attribute in one.attributes.values():
                    holder = cast("Any", owner._modules[attribute])._modules[name]
                    weight = holder._parameters.get("weight")
                    found.append(holder.weight.requires_grad if weight is None else weight.requires_grad)
        return tuple(found)

    def _choose(self, x: Tensor, state: tuple[Any, ...] | None, *, extra_arguments: bool) -> ChosenOrders:
        dtype = _compute_dtype(x)
        active = [name for name in self.active_adapters if name in self.adapted]
        rounding = rounding_of(self, active)
        refusal = self._fusing_refusal(dtype, extra_arguments, active, rounded=rounding is not None)
        fused = refusal is None
        if rounding is not None and refusal is not None:
            say_exact(refusal)
        by: dict[Order, dict[str, list[AdaptedPart]]] = {"token": {}, "weight": {}, "pair": {}}
        for name in active:
            for one in self.matrices(name):
                by[self._order(name, one, x, fused=fused)].setdefault(name, []).append(one)
        if by["weight"]:  # one sum of weights takes them all
            for name, parts in by.pop("pair").items():
                together = [*by["weight"].get(name, []), *parts]
                by["weight"][name] = sorted(together, key=lambda one: one.part.start)
        decoding = decodes(x, rows_first=self.rows_first)
        orders = by["token"], by["weight"], by.get("pair", {})
        return ChosenOrders(state, dtype, fused, rounding if fused else None, self._thin(x), decoding, *orders)

    def _thin(self, x: Tensor) -> bool:
        """Whether this is a step of decoding: the sum W0 + ΔW would cost more than a second product."""
        if self.training or torch.is_grad_enabled() or traced():
            return False
        return x.numel() < WORK_OF_A_NUMBER * self.in_features

    def _fusing_refusal(
        self, dtype: torch.dtype, extra_arguments: bool, active: list[str], *, rounded: bool
    ) -> str | None:
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
        return fusing_refusal(cast("Tensor", base.weight), dtype, rounded=rounded)

    def _order(self, adapter: str, one: AdaptedPart, x: Tensor, *, fused: bool) -> Order:
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
            one.bound,
            x.numel() // self.in_features,
            training=training,
            fused=fused,
            pairs=not torch.compiler.is_compiling(),  # a compiler cannot follow a factor into what is stored
            kept=(x.device.type == "cpu" or decodes(x, rows_first=self.rows_first)) and not traced(),
            number=work_of_a_number(x.device, _compute_dtype(x)),
        )

    def _needs_gradient(self, adapter: str, one: AdaptedPart) -> bool:
        return any(c.requires_grad for c in self.trained_coefficients(adapter, one).values())

    # --- the terms ---

    def _prepare_pass(self, x: Tensor, chosen: ChosenOrders) -> None:
        names = dict.fromkeys((*chosen.weight, *chosen.token))
        places = [Place.of(container, name) for name in names for container in self.containers(name)]
        snapshot = Snapshot.of([place.tensor for place in places])  # before the values are used
        if snapshot is None or not (snapshot.by_value or chosen.decoding):
            return
        terms: list[Term] = []
        for name, parts in chosen.weight.items():
            delta = self._delta(name, parts, decoding=chosen.decoding).to(x.dtype)
            terms.append(partial(weight_order, delta=delta))
        for name, parts in chosen.token.items():
            terms += [self._token_term(name, one, chosen) for one in parts]
        active = list(self.active_adapters)
        self._prepared_pass = PreparedPass(active, x.dtype, x.device, x.numel(), places, snapshot, terms)

    def _token_term(self, adapter: str, one: AdaptedPart, chosen: ChosenOrders) -> Term:
        term = partial(token_order, prepared=self._token_prepared(adapter, one, chosen), bound=one.bound)
        return term if one.part.rows == self.out_features else lambda x: self._embed(term(x), one.part)

    def _token_prepared(self, adapter: str, one: AdaptedPart, chosen: ChosenOrders) -> dict[str, Tensor]:
        prepared = self._prepared(adapter, one, chosen.decoding)
        return {key: value.to(chosen.dtype).unsqueeze(0) for key, value in prepared.items()}

    def _base_result(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        return (
            result if self.quantization_backend is None else self.quantization_backend.maybe_clone_base_result(result)
        )

    def _linear_parts(self) -> tuple[Tensor, Tensor | None]:
        """``W0`` as ``[out, in]`` and the bias of a plain base layer."""
        parameters = cast("nn.Module", self._modules["base_layer"])._parameters
        weight = cast("Tensor", parameters["weight"])
        return weight.T if self.transposed else weight, parameters.get("bias")

    def _delta(
        self, adapter: str, parts: Sequence[AdaptedPart], *, decoding: bool, dtype: torch.dtype | None = None
    ) -> Tensor:
        # What is kept for later passes is exact; what serves one step of training is made for its product.
        compute = partial(self._full_delta, adapter, parts, dtype if self.training else None)
        return self._cached(adapter, parts, "delta", compute, decoding)

    def _fused(self, x: Tensor, chosen: ChosenOrders) -> Tensor:
        weight, bias = self._linear_parts()
        by_weight, dtype = chosen.weight.items(), chosen.dtype if chosen.rounding else None
        deltas = [self._delta(name, parts, decoding=chosen.decoding, dtype=dtype) for name, parts in by_weight]
        total = deltas[0] if len(deltas) == 1 else torch.stack(deltas).sum(0)
        summed = None
        if chosen.rounding is not None:
            x, summed = x.to(weight.dtype), rounded_sum(self, chosen.rounding, chosen.weight)
        return fused_weight_order(x, weight, bias, total.to(weight.dtype), summed)

    def _fused_pairs(self, x: Tensor, chosen: ChosenOrders) -> Tensor:
        weight, bias = self._linear_parts()
        pairs: list[tuple[int, Tensor, Tensor]] = []
        for name, parts in chosen.pair.items():
            for one in parts:
                factors = self._joint(name, one) if one.bound.sums else None
                if factors is None:
                    factors = one.bound.factors(self._widened(name, one))
                assert factors.up is not None
                pairs.append((one.part.start, factors.up.to(weight.dtype), factors.down.to(weight.dtype)))
        summed = None
        if chosen.rounding is not None:
            x, summed = x.to(weight.dtype), rounded_sum(self, chosen.rounding, chosen.pair)
        return fused_pair_order(x, weight, bias, pairs, summed)

    def _dropped(self, x: Tensor, adapter: str, dtype: torch.dtype) -> Tensor:
        x = self._cast_input_dtype(x, dtype)
        p = self.options[adapter].dropout
        return functional.dropout(x, p, training=True) if p > 0 and self.training else x

    def _embed(self, h: Tensor, part: Part) -> Tensor:
        """The output of a part in the output of the layer: zeros elsewhere."""
        if part.rows == self.out_features:
            return h
        return functional.pad(h, (part.start, self.out_features - part.stop))

    def _prepared(self, adapter: str, one: AdaptedPart, decoding: bool) -> dict[str, Tensor]:
        def compute() -> dict[str, Tensor]:
            factors = self._joint(adapter, one) if one.bound.sums else None
            if factors is None:
                return one.bound.prepare(self._widened(adapter, one))
            return one.bound.prepared(factors)

        return self._cached(adapter, [one], "prepared", compute, decoding)

    _joint = factors_of

    def _cached(
        self, adapter: str, matrices: Sequence[AdaptedPart], what: str, compute: Callable[[], Any], decoding: bool
    ) -> Any:
        if self.training:
            return compute()
        key, sources = self._key(what, adapter, matrices)
        return self._cache.get(key, sources, compute, usable=True, decoding=decoding)

    def _key(
        self, what: str, adapter: str, matrices: Sequence[AdaptedPart]
    ) -> tuple[tuple[Hashable, ...], list[Tensor]]:
        """What is made of the coefficients of an adapter, by all that it depends on but their values, and these."""
        sources = [c for one in matrices for c in self.trained_coefficients(adapter, one).values()]
        made_of = tuple((one.part.name, one.bound) for one in matrices)
        return (what, adapter, self.options[adapter].quantize_coefficients, made_of), sources

    # --- mixed batches ---

    def _forward_mixed(self, x: Tensor, batch: MixedBatch, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            raise AdapterNameError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. "
                f"Merged are {self.merged_adapters}."
            )
        plan = self._row_plan(x, batch)
        return plan.add_to(self._base_result(x, *args, **kwargs), self._cast_input_dtype(x, plan.dtype))

    def _row_plan(self, x: Tensor, batch: MixedBatch) -> RowPlan:
        """The one that this thread keeps, or a new one."""
        dtype, decoding = _compute_dtype(x), decodes(x, rows_first=self.rows_first)
        if self.training or not plannable():
            dimension, groups = self._row_groups(x, batch, dtype, decoding)
            return RowPlan(None, {}, dimension, dtype, groups)
        batch.reached = True
        plan = self._cache.rows.plan
        asked = batch.names, batch.repeats, batch.layout, x.shape, x.dtype, x.device, dtype, self.adapter_layer_names
        if plan is None or not plan.fits(asked, self.options):
            seen = SeenRows.of(self._containers_of(batch.distinct), batch.distinct)  # before the values are used
            dimension, groups = self._row_groups(x, batch, dtype, decoding)
            plan = RowPlan(asked, dict(self.options), dimension, dtype, groups, seen)
            self._cache.keep_rows(plan, decoding=decoding)
        return plan

    def _containers_of(self, adapters: Sequence[str]) -> list[nn.ModuleDict]:
        """All containers of this layer, and those of other layers that hold coefficients of these adapters."""
        own = [self.randbasis_streams, *(getattr(self, name) for name in self.adapter_layer_names)]
        tied = [one for name in adapters for one in self.adapted.get(name, ()) if one.owner is not None]
        own += [getattr(one.holder(self), attribute) for one in tied for attribute in one.attributes.values()]
        return list({id(container): container for container in own}.values())

    def _row_groups(
        self, x: Tensor, batch: MixedBatch, dtype: torch.dtype, decoding: bool
    ) -> tuple[int, list[RowGroup]]:
        dimension, names = batch.rows_of(x, x.dim() - 1)
        groups: list[RowGroup] = []
        for group in batch_groups(names, self.matrices):
            index = None if len(group.rows) == len(names) else torch.tensor(group.rows, device=x.device)
            gathered = self._gathered(group, dtype, decoding=decoding)
            groups.append(RowGroup(group.like.bound, group.like.part, index, gathered))
        return dimension, groups

    def _gathered(self, group: BatchGroup, dtype: torch.dtype, *, decoding: bool) -> dict[str, Tensor]:
        """What the method prepares of the coefficients of the adapter of each row, ``[rows, ...]``; 1 where all agree.

        Each adapter has an entry of its own in the cache, whatever the other rows use; only rows are cast.
        """
        one = group.like

        def compute(places: list[int]) -> list[dict[str, Tensor]]:
            own = [self._widened(group.names[place], group.own[place]) for place in places]
            stacked = {key: torch.stack([c[key] for c in own]) for key in own[0]}
            together = one.bound.prepare(stacked)
            return [{key: value[at].clone() for key, value in together.items()} for at in range(len(places))]

        wanted = [self._key("prepared", name, [own]) for name, own in zip(group.names, group.own, strict=True)]
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
