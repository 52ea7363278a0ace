"""Adapters of one base model in memory, and batches in which each row uses another one."""

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from types import MethodType
from typing import Any, Literal, cast, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from randbasis.adapter_file import PackedAdapter, Spec, read
from randbasis.bank.linear_layers import architecture_of, tokens_first
from randbasis.bank.plan import BatchPlan
from randbasis.bank.planner import Planner, Run
from randbasis.bank.prepared import PreparedAdapters
from randbasis.bank.profile import ROW_DTYPES, Profile
from randbasis.bank.resident import Lease, Resident
from randbasis.batch_rows import BASE, given_rows, rows_of_a_prompt
from randbasis.errors import AdapterNameError, BankError, BankFullError, NotResidentError, near, not_one_of
from randbasis.files.locations import Location
from randbasis.store import StoredAdapter

Source = Location | bytes | PackedAdapter | StoredAdapter
"""A packed file (path or URL), its bytes, what was read of it, or an entry of a store."""
Form = Literal["auto", "coefficients", "factors"]
"""In which form a batch takes its adapters."""
Who = str | Lease | None
"""The adapter of a row: its name, or the lease on it; ``"__base__"`` or None for the base model."""

ROW_BYTES, EXPANDED_BYTES = 1 << 30, 1 << 28
KNOWN_SPECS = 256
"""Of how many specs the profile is remembered."""


class AdapterBank:
    """Many adapters on one model: rows of tables in memory, and a batch whose rows each use another one.

    The model stays as it is: forward hooks on the layers that adapters name add ``ΔW x`` where a batch asks for it, and
    ``adapter_names`` of a call of the model or of ``generate`` gives each row its adapter, ``"__base__"`` for none.
    :meth:`close` takes all of that off again.

    One lock guards tables, names and plans. :meth:`load` changes a free row and then what the name means; who has a
    lease keeps the version that it began with, and its row is free after the last lease. Where ``row_bytes`` are used
    up, the adapter that was used longest ago and is neither pinned nor leased goes.

    Args:
        model: plain, in evaluation mode; any that its adapters can be put on.
        row_bytes: that adapters may take in all, coefficients and heads.
        expanded_bytes: that factors of adapters in use may take in all, math (24).
        form: ``"coefficients"`` forces math (23) for NOLA and PRANC, ``"factors"`` (24); ``"auto"`` takes what costs
            less, batch by batch.

    Raises:
        BankError: an argument is out of range, or the model has adapters of PEFT on it or is in a bank already.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        row_bytes: int = ROW_BYTES,
        expanded_bytes: int = EXPANDED_BYTES,
        form: Form = "auto",
    ) -> None:
        _check_arguments(model, row_bytes, expanded_bytes, form)
        self.model = model
        self._row_bytes = row_bytes
        self._modules = dict(cast("Any", model.named_modules()))
        self._profiles: dict[tuple[Any, ...], Profile] = {}
        self._known: dict[int, tuple[Spec, Profile]] = {}
        self._residents: OrderedDict[str, Resident] = OrderedDict()  # used longest ago first
        self._counts = {"loads": 0, "hits": 0, "misses": 0, "evictions": 0}
        self._used_bytes = 0
        self._lock = threading.RLock()
        self._calls = threading.local()
        self._handles: dict[str, Any] = {}
        self._plain: dict[str, Any] = {}  # methods that were put on the instance before
        self._prepared = PreparedAdapters(expanded_bytes)
        self._planner = Planner(self._prepared, model, None if form == "auto" else form)
        self._attach_model()

    # --- adapters ---

    def load(self, name: str, source: Source, *, version: int | None = None, pin: bool = False) -> Resident:
        """Read and check an adapter, and put it under a name; the next batch that names it uses it.

        Args:
            name: what rows call it; one that is there is replaced, and whoever has a lease on it keeps it.
            source: path, URL or bytes of a packed file, a packed adapter, or an entry of a store.
            version: for those who ask; None takes that of the store entry, else one more than the last of this name.
            pin: whether it may not be evicted.

        Raises:
            AdapterNameError: no adapter can have this name.
            PackedFileMissingError: there is no file.
            PackedFileError: it breaks a rule of the format; each rule has its class.
            BaseMismatchError: it was made for another model.
            BankError: its method makes its matrices of the base weights, it is for one expert of several, or the bank
                is closed.
            BankFullError: it does not fit beside what is pinned or in use. The bank is as it was after any of these.
        """
        _check_name(name)
        if _BANKS.get(self.model) is not self:
            raise BankError("a bank that is closed takes no adapters, got one to load; make another AdapterBank(model)")
        adapter, digest, stored = _opened(source)
        where = f"adapter {name!r}"
        with self._lock, torch.inference_mode(False), torch.no_grad():
            profile = self._profile(adapter, where)
            dtype = adapter.coefficients.dtype
            table = profile.table(dtype if dtype in ROW_DTYPES else torch.float32)
            heads = profile.heads_of(adapter.extra)
            extra = sum(one.numel() * one.element_size() for one in adapter.extra.values())
            before = self._residents.get(name)
            self._make_room(name, table.row_bytes + extra, before)
            if version is None:
                version = stored if stored is not None else 1 if before is None else before.version + 1
            slot = table.put(adapter.values())
            made = Resident(
                name, version, digest, adapter.spec, profile, table, slot, heads, table.row_bytes + extra, pin
            )
            self._used_bytes += made.nbytes
            if before is not None:
                self._drop(before)
            self._residents[name] = made
            self._counts["loads"] += 1
        return made

    def unload(self, name: str) -> None:
        """Take an adapter out; batches that use it now end with it.

        Raises:
            NotResidentError: there is none of this name.
        """
        with self._lock:
            self._drop(self._resident(name))

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter from being evicted, or let it be.

        Raises:
            NotResidentError: there is none of this name.
        """
        with self._lock:
            self._resident(name).pinned = pinned

    def lease(self, name: str) -> Lease:
        """The right to use the version that a name means now, until it is released.

        Raises:
            NotResidentError: there is none of this name.
        """
        with self._lock:
            found = self._residents.get(name)
            if found is None:
                self._counts["misses"] += 1
            else:
                self._counts["hits"] += 1
            resident = self._resident(name)
            self._residents.move_to_end(name)
            resident.leases += 1
        return Lease(resident, self._end)

    def __contains__(self, name: object) -> bool:
        return name in self._residents

    def __len__(self) -> int:
        return len(self._residents)

    def residents(self) -> tuple[Resident, ...]:
        """All adapters, the one that was used longest ago first."""
        with self._lock:
            return tuple(self._residents.values())

    def stats(self) -> dict[str, float]:
        """Counters since the start (loads, hits, misses and evictions; adapters expanded, and the seconds of that), and
        what is there now: adapters, profiles, bytes of their rows and heads, bytes of expanded factors.
        """
        with self._lock:
            return {
                **self._counts,
                "expanded": self._prepared.made,
                "expansion_seconds": self._prepared.seconds,
                "adapters": len(self._residents),
                "profiles": len(self._profiles),
                "resident_bytes": self._used_bytes,
                "expanded_bytes": self._prepared.nbytes,
            }

    # --- batches ---

    @contextmanager
    def rows(self, adapters: Sequence[Who], *, repeats: int = 1) -> Generator[BatchPlan]:
        """A block in which a batch of this thread has an adapter for each row.

        Args:
            adapters: name of, or lease on, the adapter of each row.
            repeats: rows that generation makes of each (beams, returned sequences), one after the other.

        Raises:
            NotResidentError: there is no adapter of a name.
            AdapterNameError: a layer saw another number of rows, or, at the end, no layer was called.
        """
        with self._leased(adapters) as residents:
            with self._lock:
                plans = [self._planner.rows(residents)]
                if repeats > 1:
                    plans.append(self._planner.rows([one for one in residents for _ in range(repeats)]))
            with self._sending(plans):
                yield plans[-1]

    @contextmanager
    def tokens(self, runs: Sequence[tuple[Who, int]]) -> Generator[BatchPlan]:
        """A block in which a batch of this thread is requests packed into one row, each a run of tokens.

        Args:
            runs: name of, or lease on, an adapter, and how many tokens it has, in the order of the tokens.

        Raises:
            NotResidentError: there is no adapter of a name.
            BankError: a number of tokens is below 0.
            AdapterNameError: a layer saw another number of tokens, or, at the end, no layer was called.
        """
        if any(count < 0 for _, count in runs):
            raise BankError(f"runs must have 0 tokens or more each, got {[count for _, count in runs]}; count them")
        with self._leased([who for who, _ in runs]) as residents:
            found: list[Run] = [(one, count) for one, (_, count) in zip(residents, runs, strict=True)]
            with self._lock:
                plan = self._planner.tokens(found)
            try:
                with self._sending([plan]):
                    yield plan
            finally:
                self._planner.take_back(plan)

    def hold(self, adapters: Sequence[Who]) -> BatchPlan:
        """A plan of rows whose tensors stay where they are when its rows get other adapters: for a CUDA graph.

        Every row takes part, those of the base by adding zeros. Send it with :meth:`using`, change it with
        :meth:`assign`.

        Args:
            adapters: name of, or lease on, the adapter of each row; all of one profile, without heads of their own.

        Raises:
            NotResidentError: there is no adapter of a name.
            BankError: adapters are of several profiles, or none is named, or one has a head.
        """
        with self._leased(adapters) as residents, self._lock:
            profiles = {one.profile for one in residents if one is not None}
            if len(profiles) != 1:
                raise BankError(
                    f"a plan that is held must be of adapters of one profile (method, options, seed, targets), got "
                    f"{len(profiles)}; hold one plan a profile, or send batches with bank.rows"
                )
            (profile,) = profiles
            _check_headless(residents)
            return self._planner.held(profile, residents)

    def assign(self, plan: BatchPlan, adapters: Sequence[Who]) -> None:
        """Give the rows of a plan of :meth:`hold` other adapters of its profile, in place.

        Raises:
            NotResidentError: there is no adapter of a name.
            BankError: the plan is not held, or has another number of rows, or an adapter is of another profile.
        """
        with self._leased(adapters) as residents, self._lock:
            if plan.placement is None or plan.count != len(adapters):
                raise BankError(
                    f"a plan of bank.hold with {len(adapters)} rows must be given, got "
                    + (f"one with {plan.count} rows" if plan.placement is not None else "one that is not held")
                )
            other = next((one for one in residents if one is not None and one.profile is not plan.profile), None)
            if other is not None:
                raise BankError(f"adapter {other.name!r} is of another profile than the plan; hold a plan for it")
            _check_headless(residents)
            self._planner.assign(plan, residents)

    @contextmanager
    def using(self, plan: BatchPlan) -> Generator[BatchPlan]:
        """A block in which batches of this thread go by a plan of :meth:`hold`.

        Raises:
            BankError: the plan is not held: others change after their block.
            AdapterNameError: a layer saw another number of rows, or, at the end, no layer was called.
        """
        if plan.placement is None:
            raise BankError("a plan of bank.hold must be given, got one that is not held; send it with bank.rows")
        with self._sending([plan]):
            yield plan

    # --- on and off ---

    def close(self) -> None:
        """Take hooks and ``adapter_names`` off the model; adapters are gone."""
        with self._lock:
            for handle in self._handles.values():
                handle.remove()
            self._handles.clear()
            for name, method in self._plain.items():
                if method is None:
                    delattr(self.model, name)
                else:
                    setattr(self.model, name, method)
            self._plain.clear()
            self._residents.clear()
            _BANKS.pop(self.model, None)

    def __enter__(self) -> "AdapterBank":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> "AdapterBank":
        return self

    # --- inside ---

    def _resident(self, name: str) -> Resident:
        if name not in self._residents:
            raise NotResidentError(
                f"an adapter must be loaded before a batch names it, got {name!r}; {near(name, self._residents)}: "
                "bank.load(name, source)"
            )
        return self._residents[name]

    def _profile(self, adapter: PackedAdapter, where: str) -> Profile:
        known = self._known.get(id(adapter.spec))
        if known is not None and known[0] is adapter.spec and adapter.streams is None:
            return known[1]
        key = Profile.key(adapter)
        if key not in self._profiles:
            profile = Profile(adapter, self.model, self._modules, where)
            for name in (*profile.places, *profile.heads):
                if name not in self._handles:
                    hook = _LayerHook(self._calls, name)
                    self._handles[name] = self._modules[name].register_forward_hook(hook, with_kwargs=True)
            self._profiles[key] = profile
        if adapter.streams is None:
            # Files of one kind share their spec, and hashing one costs as much as copying the row.
            while len(self._known) >= KNOWN_SPECS:
                del self._known[next(iter(self._known))]
            self._known[id(adapter.spec)] = adapter.spec, self._profiles[key]
        return self._profiles[key]

    def _make_room(self, name: str, wanted: int, before: Resident | None) -> None:
        """Evict until an adapter fits; nothing where it cannot."""
        free = self._row_bytes - self._used_bytes
        if before is not None and not before.leases:
            free += before.nbytes
        victims: list[Resident] = []
        for one in self._residents.values():
            if free >= wanted:
                break
            if one is not before and not one.pinned and not one.leases:
                victims.append(one)
                free += one.nbytes
        if free < wanted:
            raise BankFullError(
                f"adapter {name!r} needs {wanted} bytes and the bank has {max(0, free)} of row_bytes={self._row_bytes} "
                "beside what is pinned or in use; unpin or unload adapters, or make the bank with more row_bytes"
            )
        for one in victims:
            self._drop(one)
            self._counts["evictions"] += 1

    def _drop(self, resident: Resident) -> None:
        if self._residents.get(resident.name) is resident:
            del self._residents[resident.name]
        resident.replaced = True
        if not resident.leases:
            self._free(resident)

    def _free(self, resident: Resident) -> None:
        resident.table.free(resident.slot)
        self._prepared.forget(resident)
        self._used_bytes -= resident.nbytes

    def _end(self, resident: Resident) -> None:
        with self._lock:
            resident.leases -= 1
            if resident.replaced and not resident.leases:
                self._free(resident)

    def _again(self, lease: Lease) -> Lease:
        """Another lease on the same, since the first may end while its batch is made: the row is then another's."""
        with self._lock:
            if not lease.holds(self._end):
                raise NotResidentError(
                    f"a lease must be of this bank and not released when a batch uses it, got one on "
                    f"{lease.resident.name!r} that is not; take one with bank.lease(name)"
                )
            lease.resident.leases += 1
        return Lease(lease.resident, self._end)

    @contextmanager
    def _leased(self, adapters: Sequence[Who]) -> Generator[list[Resident | None]]:
        """The resident of each row, in use for the block: a name counts as one lease however often it is there."""
        own: dict[str | Lease, Lease] = {}
        try:
            for who in adapters:
                if who is not None and who != BASE and who not in own:
                    own[who] = self._again(who) if isinstance(who, Lease) else self.lease(who)
            yield [None if who is None or who == BASE else own[who].resident for who in adapters]
        finally:
            for lease in own.values():
                lease.release()

    @contextmanager
    def _sending(self, plans: list[BatchPlan]) -> Generator[None]:
        before = getattr(self._calls, "plans", None)
        for plan in plans:
            plan.reached = False
        self._calls.plans = plans
        try:
            yield
        finally:
            self._calls.plans = before
        if not any(plan.reached for plan in plans):
            plans[0].check_reached()

    def _attach_model(self) -> None:
        """Methods of the instance, so that a copy of the model is called as itself."""
        for name in ("forward", "generate"):
            if hasattr(type(self.model), name):
                own = self._plain[name] = vars(self.model).get(name)
                setattr(self.model, name, MethodType(_with_names(self, name, own), self.model))
        _BANKS[self.model] = self


class _LayerHook:
    """A forward hook: what this thread's batch adds in one layer, or what replaces its result."""

    def __init__(self, calls: threading.local, name: str) -> None:
        self._calls, self._name = calls, name

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], result: Tensor
    ) -> Tensor | None:
        plans: list[BatchPlan] | None = getattr(self._calls, "plans", None)
        if plans is None:
            return None
        x: Tensor = args[0] if args else next(iter(named.values()))
        plan = next((one for one in plans if one.fits(x)), None)
        if plan is None:
            raise _wrong_rows(plans[0], self._name, x)
        if self._name in plan.heads:
            self._calls.plans = None  # the module is called again, with other parameters
            try:
                result = plan.replace(self._name, module, x, result)
            finally:
                self._calls.plans = plans
        return plan.add(self._name, x, result) if plan.terms else result

    def __deepcopy__(self, memo: dict[int, Any]) -> "_LayerHook":
        return self

    def __reduce__(self) -> Any:
        raise BankError(
            "a model in a bank cannot be pickled, since what its layers add is in the bank; close the bank first: "
            "bank.close()"
        )


_BANKS: WeakKeyDictionary[nn.Module, AdapterBank] = WeakKeyDictionary()
"""Model → its bank."""


def _with_names(bank: AdapterBank, name: str, own: Callable[..., Any] | None) -> Callable[..., Any]:
    """A method of a model that takes ``adapter_names`` too."""

    def called(model: nn.Module, *args: Any, adapter_names: Sequence[Who] | None = None, **kwargs: Any) -> Any:
        plain = own if own is not None else getattr(type(model), name).__get__(model)
        if adapter_names is None:
            return plain(*args, **kwargs)
        _check_rows(adapter_names, given_rows(args, kwargs))
        repeats = rows_of_a_prompt(model, kwargs) if name == "generate" else 1
        with bank.rows(adapter_names, repeats=repeats):
            return plain(*args, **kwargs)

    plain = getattr(bank.model, name)
    called.__doc__, called.__name__ = plain.__doc__, name
    # The library asks for the arguments that a method takes.
    seen = inspect.signature(getattr(type(bank.model), name))
    extra = inspect.Parameter("adapter_names", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = [*seen.parameters.values()]
    at = next((at for at, one in enumerate(parameters) if one.kind is one.VAR_KEYWORD), len(parameters))
    called.__signature__ = seen.replace(parameters=[*parameters[:at], extra, *parameters[at:]])  # pyright: ignore[reportFunctionMemberAccess]
    return called


def _opened(source: Source) -> tuple[PackedAdapter, str, int | None]:
    """What is to be loaded, its digest, and its version where a store gave it one."""
    if isinstance(source, StoredAdapter):
        return source.packed(), source.record.digest, source.record.version
    if isinstance(source, bytes):
        return PackedAdapter.from_bytes(source), sha256(source).hexdigest(), None
    if not isinstance(source, PackedAdapter):
        source = read(source)
    else:
        source.check("the adapter to load")
    return source, sha256(source.to_bytes()).hexdigest(), None


def _check_arguments(model: nn.Module, row_bytes: int, expanded_bytes: int, form: str) -> None:
    for name, value, least in (("row_bytes", row_bytes, 1), ("expanded_bytes", expanded_bytes, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise BankError(
                f"{name} must be a number of bytes, {least} or more, got {value!r}; use for example 1 << 30"
            )
    if form not in get_args(Form):
        raise BankError(not_one_of("form", form, get_args(Form)))
    if hasattr(model, "peft_config"):
        raise BankError(
            f"a bank stands on a plain model, got a {type(model).__name__} with adapters of PEFT on it; give the base "
            "model (PeftModel.unload), and load the adapters into the bank"
        )
    if model in _BANKS:
        raise BankError(
            "a model is in one bank at a time, got one that is in a bank already; use that one, or close it first"
        )
    if tokens_first(model):
        raise BankError(
            "layers of a model in a bank must see the rows of a batch first, got a "
            f"{architecture_of(model) or type(model).__name__!r}, some of whose layers see tokens first; make its "
            "attention with batch_first=True, or send one batch for each adapter"
        )
    if model.training:
        raise BankError("a model in a bank must be in evaluation mode, got one in training mode; call model.eval()")


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name or name == BASE:
        raise AdapterNameError(
            f"an adapter in a bank must have a name that is not empty and not {BASE!r}, which stands for the base "
            f"model, got {name!r}; use for example 'user-1'"
        )


def _check_rows(names: Sequence[Who], rows: int | None) -> None:
    if rows is not None and rows != len(names):
        raise AdapterNameError(
            f"adapter_names must have one name for each row of the batch, got {len(names)} for {rows} rows; "
            f"give {BASE!r} for rows of the base model"
        )


def _check_headless(residents: Sequence[Resident | None]) -> None:
    whole = next((one for one in residents if one is not None and one.extra), None)
    if whole is not None:
        raise BankError(
            f"a plan that is held cannot replace modules that were trained whole, got {whole.name!r} with "
            f"{', '.join(sorted(whole.extra))}; send such adapters with bank.rows"
        )


def _wrong_rows(plan: BatchPlan, name: str, x: Tensor) -> AdapterNameError:
    unit = "tokens" if plan.packed else "rows"
    return AdapterNameError(
        f"layer {name!r} must see the {plan.count} {unit} of the batch first, got an input of shape {list(x.shape)}; "
        "give one adapter for each row, and leave layers that see no rows out of target_modules"
    )
