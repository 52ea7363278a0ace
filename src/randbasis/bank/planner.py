"""BATCH → PLAN: which rows go through which product, in which form, at the least cost."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from randbasis.bank.forms import Form, FormName
from randbasis.bank.plan import SHORT_RUN, BatchPlan, HeadRows, Placement, PlacementKey, Term
from randbasis.bank.prepared import Prepared, PreparedAdapters
from randbasis.bank.profile import Profile
from randbasis.bank.resident import Resident
from randbasis.batch_rows import BASE

LEAST_BYTES = 1 << 20
"""That the adapters of a batch may always have side by side."""

Run = tuple[Resident | None, int]
"""An adapter, or None for the base, and how many tokens it has."""


@dataclass(slots=True)
class _Mine:
    """What one thread keeps from a plan to the next.

    Attributes:
        placements: those that no plan uses; the next packed batch finds most of its adapters in place.
        last: the plan of the last batch of rows; before it dtype, device and the adapter of each.
    """

    placements: dict[PlacementKey, Placement] = field(default_factory=dict[PlacementKey, Placement])
    last: tuple[tuple[Any, ...], BatchPlan] | None = None


class Planner:
    """Makes plans. Nothing is locked here: the bank calls under its own lock.

    Args:
        prepared: adapters in the forms that batches take them in.
        model: whose dtype and device count when a plan is made.
        form: that every batch takes, where a profile has it; None chooses by cost.
    """

    def __init__(self, prepared: PreparedAdapters, model: nn.Module, form: FormName | None) -> None:
        self._prepared, self._model = prepared, model
        self._dtype, self._device = torch.float32, torch.device("cpu")
        self._form: FormName | None = form
        self._bases: dict[Profile, Resident] = {}
        self._threads = threading.local()
        self._look()

    def rows(self, adapters: Sequence[Resident | None]) -> BatchPlan:
        """The plan of a batch with an adapter for each row; the thread's last one, where they are the same.

        Args:
            adapters: of each row; None for the base.
        """
        self._look()
        mine, wanted = self._mine(), (self._dtype, self._device, *adapters)
        if mine.last is not None and mine.last[0] == wanted:
            return mine.last[1]
        terms: list[Term] = []
        for profile, rows in _by_profile(enumerate(adapters)).items():
            users = [adapters[row] for row in rows]
            terms += self._of_rows(profile, rows, [one for one in users if one is not None], len(adapters))
        plan = BatchPlan(len(adapters), False, terms, self._heads([(one, 1) for one in adapters]))
        mine.last = wanted, plan
        return plan

    def held(self, profile: Profile, adapters: Sequence[Resident | None]) -> BatchPlan:
        """A plan of rows that keeps its tensors when its adapters change: every row takes part, the base's with zeros.

        Args:
            profile: of all adapters.
            adapters: of each row; None for the base.
        """
        self._look()
        form = self._form_of(profile) or profile.forms.get("factors") or profile.forms["coefficients"]
        placement = Placement(form)
        plan = BatchPlan(len(adapters), False, [], placement=placement, profile=profile)
        self.assign(plan, adapters)
        plan.terms.append(Term(profile, form, placement.views))
        return plan

    def assign(self, plan: BatchPlan, adapters: Sequence[Resident | None]) -> None:
        """Give the rows of a held plan other adapters, in place."""
        assert plan.placement is not None
        assert plan.profile is not None
        users = [self._base_of(plan.profile) if one is None else one for one in adapters]
        distinct = list(dict.fromkeys(users))
        made = self._prepared.get(distinct, plan.placement.form, self._dtype, self._device)
        plan.placement.rows(users, dict(zip(distinct, made, strict=True)))

    def tokens(self, runs: Sequence[Run]) -> BatchPlan:
        """The plan of packed requests, each a run of tokens.

        Args:
            runs: in the order of the tokens.
        """
        self._look()
        count = sum(tokens for _, tokens in runs)
        starts = _starts(runs)
        terms: list[Term] = []
        lent: dict[PlacementKey, Placement] = {}
        for profile, places in _by_profile((at, one) for at, (one, _) in enumerate(runs)).items():
            terms += self._of_runs(profile, [(runs[at], starts[at]) for at in places], lent)
        return BatchPlan(count, True, terms, self._heads(runs), lent=lent)

    def take_back(self, plan: BatchPlan) -> None:
        """The block of a plan ended: the next one may write where its adapters lie."""
        self._mine().placements.update(plan.lent)

    def _of_rows(self, profile: Profile, rows: list[int], users: list[Resident], count: int) -> list[Term]:
        distinct = list(dict.fromkeys(users))
        form, prepared = self._in_form(profile, distinct, {one: users.count(one) for one in distinct})
        if len(distinct) == 1:
            return [Term(profile, form, prepared[distinct[0]].views, self._index(rows, count))]
        if len(users) * form.row_bytes(self._dtype) > max(self._prepared.limit, LEAST_BYTES):
            mine: dict[Resident, list[int]] = {}
            for row, one in zip(rows, users, strict=True):
                mine.setdefault(one, []).append(row)
            return [Term(profile, form, prepared[one].views, self._index(at, count)) for one, at in mine.items()]
        placement = Placement(form)
        placement.rows(users, prepared)
        return [Term(profile, form, placement.views, self._index(rows, count))]

    def _of_runs(
        self, profile: Profile, runs: list[tuple[Run, int]], lent: dict[PlacementKey, Placement]
    ) -> list[Term]:
        tokens: dict[Resident, int] = {}
        for (one, size), _ in runs:
            assert one is not None
            tokens[one] = tokens.get(one, 0) + size
        form, prepared = self._in_form(profile, list(tokens), tokens)
        short = 1 if form.kept else SHORT_RUN
        terms: list[Term] = []
        users: list[Resident] = []
        places: list[int] = []
        for (one, size), start in runs:
            assert one is not None
            if size > short:
                terms.append(Term(profile, form, prepared[one].views, run=(start, start + size)))
            else:
                users += [one] * size
                places += range(start, start + size)
        if users:
            # Taken out while a plan uses it, for a plan within the block of another.
            key = id(profile), form.name, self._dtype, self._device
            lent[key] = placement = self._mine().placements.pop(key, None) or Placement(form)
            at = placement.arrange(users, prepared)
            rows = [0] * len(users)
            for token, place in zip(places, at, strict=True):
                rows[place] = token
            terms.append(Term(profile, form, placement.views, torch.tensor(rows, device=self._device)))
        return terms

    def _in_form(
        self, profile: Profile, distinct: list[Resident], tokens: dict[Resident, int]
    ) -> tuple[Form, dict[Resident, Prepared]]:
        form = self._form_of(profile)
        if form is None:
            factors = profile.forms.get("factors")
            new, room = 0, 0
            if factors is not None:
                new = self._prepared.missing(distinct, factors, self._dtype, self._device)
                room = self._prepared.limit // factors.row_bytes(self._dtype)
            counts = [tokens[one] for one in distinct]
            form = profile.choose_form(counts, new, room, self._dtype, self._device)
        made = self._prepared.get(distinct, form, self._dtype, self._device)
        return form, dict(zip(distinct, made, strict=True))

    def _base_of(self, profile: Profile) -> Resident:
        """The base model as an adapter: row 0, all zeros, with which every method adds nothing."""
        if profile not in self._bases:
            table = profile.table(torch.float32)
            self._bases[profile] = Resident(BASE, 0, "", profile.spec, profile, table, 0, {}, 0, pinned=True)
        return self._bases[profile]

    def _form_of(self, profile: Profile) -> Form | None:
        """The one that every batch takes."""
        return None if self._form is None else profile.forms.get(self._form)

    def _heads(self, runs: Sequence[Run]) -> dict[str, list[HeadRows]]:
        found: dict[Resident, list[int]] = {}
        start = 0
        for one, tokens in runs:
            if one is not None and one.extra:
                found.setdefault(one, []).extend(range(start, start + tokens))
            start += tokens
        heads: dict[str, list[HeadRows]] = {}
        for one, rows in found.items():
            index = torch.tensor(rows, device=self._device)
            for name in one.extra:
                heads.setdefault(name, []).append(HeadRows(one, index))
        return heads

    def _index(self, rows: list[int], count: int) -> torch.Tensor | None:
        return None if len(rows) == count else torch.tensor(rows, device=self._device)

    def _look(self) -> None:
        """What the model computes in and where: it may have been moved since."""
        parameter = next((one for one in self._model.parameters() if one.is_floating_point()), None)
        if parameter is not None:
            self._dtype, self._device = parameter.dtype, parameter.device

    def _mine(self) -> _Mine:
        mine = getattr(self._threads, "mine", None)
        if mine is None:
            mine = self._threads.mine = _Mine()
        return mine


def _by_profile(adapters: Iterable[tuple[int, Resident | None]]) -> dict[Profile, list[int]]:
    found: dict[Profile, list[int]] = {}
    for at, one in adapters:
        if one is not None:
            found.setdefault(one.profile, []).append(at)
    return found


def _starts(runs: Sequence[Run]) -> list[int]:
    starts: list[int] = []
    total = 0
    for _, tokens in runs:
        starts.append(total)
        total += tokens
    return starts
