"""What each adapted layer adds in one pass: made once a batch, asked by every layer.

Rows of the base are not touched. Rows of one profile go through one batched product; where that would take more memory
than is allowed, each adapter's rows go by themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from randbasis.bank.forms import Form, FormName, View
from randbasis.bank.prepared import Prepared
from randbasis.bank.profile import Profile
from randbasis.bank.resident import Resident
from randbasis.errors import AdapterNameError, BankError

SHORT_RUN = 16
"""Tokens up to which a run of one adapter takes its coefficients token by token, beside those of others."""


class Placement:
    """The adapters of the rows of one product, side by side. Rows that keep their adapter are not copied again.

    Attributes:
        form: of a profile.
    """

    def __init__(self, form: Form) -> None:
        self.form = form
        self._order: list[Resident] = []
        self._whole: tuple[Tensor, ...] = ()
        self._views: dict[int, list[View]] = {}

    def arrange(self, wanted: Sequence[Resident], prepared: Mapping[Resident, Prepared]) -> list[int]:
        """Place one adapter for each row; returns the place of each, from 0 to their number.

        Args:
            wanted: the adapter of each row.
            prepared: each of them in the form.
        """
        count, before = len(wanted), self._order
        kept: dict[Resident, list[int]] = {}
        for place, resident in enumerate(before[:count]):
            kept.setdefault(resident, []).append(place)
        places = [kept[one].pop() if kept.get(one) else -1 for one in wanted]
        taken = set(places)
        holes = iter([place for place in range(count) if place not in taken])
        changed: list[tuple[int, Resident]] = []
        for at, one in enumerate(wanted):
            if places[at] < 0:
                places[at] = next(holes)
                changed.append((places[at], one))
        order: list[Resident] = [*wanted]
        for at, place in enumerate(places):
            order[place] = wanted[at]
        self._order = order
        self._copy(count, changed, prepared)
        return places

    def rows(self, wanted: Sequence[Resident], prepared: Mapping[Resident, Prepared]) -> None:
        """Place the adapter of each row at the place of the row."""
        before, self._order = self._order, [*wanted]
        changed = [(at, one) for at, one in enumerate(wanted) if at >= len(before) or before[at] is not one]
        self._copy(len(wanted), changed, prepared)

    @property
    def views(self) -> list[View]:
        """What each matrix needs, of all places."""
        count = len(self._order)
        if count not in self._views:
            self._views[count] = self.form.views([one.narrow(self.form.axis, 0, count) for one in self._whole])
        return self._views[count]

    def _copy(self, count: int, changed: Sequence[tuple[int, Resident]], prepared: Mapping[Resident, Prepared]) -> None:
        # As in the forms that are copied: what an earlier pass without inference mode made is written in any.
        with torch.inference_mode(False), torch.no_grad():
            axis = self.form.axis
            if not self._whole or self._whole[0].shape[axis] < count:
                self._whole, self._views = self._side_by_side(prepared), {}
            elif 2 * len(changed) > count:
                for whole, made in zip(self._whole, self._side_by_side(prepared), strict=True):
                    whole.narrow(axis, 0, count).copy_(made)
            else:
                for place, one in changed:
                    for whole, tensor in zip(self._whole, prepared[one].tensors, strict=True):
                        whole.narrow(axis, place, 1).copy_(tensor)

    def _side_by_side(self, prepared: Mapping[Resident, Prepared]) -> tuple[Tensor, ...]:
        groups = zip(*(prepared[one].tensors for one in self._order), strict=True)
        return tuple([torch.cat(group, self.form.axis) for group in groups])


PlacementKey = tuple[int, FormName, torch.dtype, torch.device]
"""The id of a profile, the form, and what the model computes in and where."""


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """Rows (or tokens) of one profile that one product serves.

    Attributes:
        profile: of their adapters.
        form: in which they are there.
        views: what each matrix needs, of each of these rows or of all alike.
        rows: which rows they are; None for all.
        run: the first token and the one after the last, where they are a run of one adapter.
    """

    profile: Profile
    form: Form
    views: list[View]
    rows: Tensor | None = None
    run: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class HeadRows:
    """Rows of one adapter with modules that were trained whole.

    Attributes:
        resident: the adapter.
        rows: which rows.
    """

    resident: Resident
    rows: Tensor


@dataclass(slots=True, eq=False)
class BatchPlan:
    """What one pass adds. Made by :meth:`AdapterBank.rows` or :meth:`AdapterBank.tokens`; layers ask it.

    Attributes:
        count: rows of the batch, or tokens where they are packed.
        packed: whether all requests lie in one row, token after token.
        terms: the products.
        heads: rows with heads of their own, by module path.
        reached: whether a layer asked.
        placement: the adapters of its rows, where they may be changed in place.
        profile: of all of them then.
        lent: where the adapters of its short runs lie, as long as its block lasts.
    """

    count: int
    packed: bool
    terms: list[Term]
    heads: dict[str, list[HeadRows]] = field(default_factory=dict[str, list[HeadRows]])
    reached: bool = False
    placement: Placement | None = None
    profile: Profile | None = None
    lent: dict[PlacementKey, Placement] = field(default_factory=dict[PlacementKey, Placement])

    def fits(self, x: Tensor) -> bool:
        """Whether the input of a layer has the rows of this batch."""
        return x.shape[0] == self.count if not self.packed else x.dim() > 1 and x.shape[:-1].numel() == self.count

    def add(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """The result of a layer of the base, plus ``ΔW x`` of each row.

        Args:
            name: module path of the layer.
            x: its input, ``[rows, …, in]``; ``[1, tokens, in]`` where it is packed.
            result: what it gave.
        """
        self.reached = True
        tokens = x.reshape(self.count, -1, x.shape[-1])
        total = result.reshape(self.count, -1, result.shape[-1])
        fresh = False
        for term in self.terms:
            for place in term.profile.places.get(name, ()):
                view, start, stop = term.views[place.index], place.one.start, place.one.start + place.one.rows
                whole = stop - start == total.shape[-1]
                if term.rows is None and term.run is None:
                    h = term.form.apply(place.bound, tokens, view).to(total.dtype)
                    if whole:
                        total, fresh = total + h, True
                        continue
                    at: tuple[Tensor | slice, ...] = (slice(None),)
                elif term.run is not None:
                    mine = tokens[slice(*term.run)].transpose(0, 1)
                    h = term.form.apply(place.bound, mine, view).to(total.dtype).transpose(0, 1)
                    at = (slice(*term.run),)
                else:
                    assert term.rows is not None
                    h = term.form.apply(place.bound, tokens[term.rows], view).to(total.dtype)
                    if whole:
                        total, fresh = total.index_add(0, term.rows, h), True
                        continue
                    at = (term.rows,)
                total, fresh = total if fresh else total.clone(), True
                part = (*at, slice(None), slice(start, stop))
                total[part] = total[part] + h
        return total.view(result.shape)

    def replace(self, name: str, module: nn.Module, x: Tensor, result: Tensor) -> Tensor:
        """The result of a module that was trained whole: that of each row's own parameters.

        Args:
            name: module path.
            module: of the base.
            x: its input, rows first.
            result: what the base's parameters gave.

        Raises:
            BankError: adapters in one batch have heads of different sizes.
        """
        self.reached = True
        flat = x.reshape(self.count, *x.shape[2:]) if self.packed else x
        total = result.reshape(self.count, *result.shape[2:]) if self.packed else result
        made: list[tuple[HeadRows, Tensor]] = []
        for part in self.heads[name]:
            own = {key: tensor.to(x.device) for key, tensor in part.resident.extra[name].items()}
            own = {key: one.to(result.dtype) if one.is_floating_point() else one for key, one in own.items()}
            everyone = part.rows.shape[0] == self.count
            made.append((part, functional_call(module, own, (flat if everyone else flat[part.rows],))))
        if sum(part.rows.shape[0] for part, _ in made) == self.count:  # the size of the base's head says nothing
            total = total.new_empty(self.count, *made[0][1].shape[1:])
        for part, one in made:
            if one.shape[1:] != total.shape[1:]:
                raise BankError(
                    f"adapters of one batch must have heads of one size at {name!r}, got {one.shape[-1]} outputs for "
                    f"{part.resident.name!r} and {total.shape[-1]} beside it; send them in batches of their own"
                )
            total = total.index_copy(0, part.rows, one.to(total.dtype))
        return total.view(*result.shape[:-1], total.shape[-1])

    def check_reached(self) -> None:
        """Raise unless a layer asked, where there was something to add."""
        if (self.terms or self.heads) and not self.reached:
            raise AdapterNameError(
                "the adapters of a batch must reach an adapted layer in the thread of the call, got a call in which "
                "none ran there, so the result does not depend on them; call the model in the thread that plans"
            )
