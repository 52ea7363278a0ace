"""A bank against PEFT's way: each row alone, and the merged model, are the oracle of a mixed batch."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tuner_cases import (
    CASES_OF_SEEDS,
    OF_SEEDS,
    TIED,
    Case,
    outputs,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from randbasis import put
from randbasis.adapter_file import PackedAdapter
from randbasis.adapters import open_adapter
from randbasis.adapters.packed import packed_of
from randbasis.bank import AdapterBank
from randbasis.errors import (
    AdapterNameError,
    BankError,
    BankFullError,
    BaseMismatchError,
    NotResidentError,
    RandbasisError,
)
from randbasis.store import AdapterStore


def packed(case: Case, folder: Path, seed: int, bits: int = 32, **options: Any) -> PackedAdapter:
    """An adapter with coefficients of its own, as a packed file has it."""
    path = folder / f"{case.method}-{seed}"
    case.adapted(fill_seed=seed, **options).save_pretrained(path)
    return packed_of(open_adapter(path), bits=bits)


def alone(case: Case, adapter: PackedAdapter | None, batch: dict[str, Tensor], *, merged: bool = False) -> Tensor:
    """What the model gives with one adapter on it, as PEFT puts it there or merged into the weights."""
    model = case.base()
    if adapter is not None:
        on = put(model, adapter)
        model = on.merge_and_unload() if merged else on
    return outputs(model, batch)


def assert_rows(found: Tensor, case: Case, users: Sequence[PackedAdapter | None], batch: dict[str, Tensor]) -> None:
    own = {id(user): alone(case, user, batch) for user in users}
    for row, user in enumerate(users):
        if user is None:
            assert torch.equal(found[row], own[id(user)][row]), "a row of the base must be the base's to the bit"
        else:
            torch.testing.assert_close(found[row], own[id(user)][row], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        *(pytest.param(*case.values, {}, id=case.id) for case in CASES_OF_SEEDS),
        *(pytest.param(Case("linear", method), {}, id=f"linear-{method}") for method in TIED),
        *(
            pytest.param(Case("linear", method), {"law": "hashed"}, id=f"linear-{method}-hashed")
            for method in ("nola-tied", "pranc-tied-whole")
        ),
    ],
)
@pytest.mark.parametrize("form", ["auto", "coefficients", "factors"])
def test_each_row_is_that_of_its_adapter_alone(case: Case, options: dict[str, Any], form: Any, tmp_path: Path) -> None:
    users = [packed(case, tmp_path, seed, **options) for seed in (1, 2, 3)]
    base = case.base()
    bank = AdapterBank(base, form=form)
    for at, user in enumerate(users):
        bank.load(f"u{at}", user)
    batch = case.batch(6)
    names = ["u1", "__base__", "u0", "u2", "u1", "u0"]
    found = outputs(base, batch, adapter_names=names)
    chosen = [None if name == "__base__" else users[int(name[1])] for name in names]
    assert_rows(found, case, chosen, batch)
    torch.testing.assert_close(found[0], alone(case, users[1], batch, merged=True)[0], rtol=2e-4, atol=2e-5)
    assert not torch.allclose(found[0], alone(case, None, batch)[0], atol=1e-3), "the adapter must matter"
    every = outputs(base, batch, adapter_names=["u2"] * 6)
    torch.testing.assert_close(every, alone(case, users[2], batch), rtol=2e-4, atol=2e-5)
    shuffled = [5, 3, 0, 1, 4, 2]
    again = outputs(base, {k: v[shuffled] for k, v in batch.items()}, adapter_names=[names[i] for i in shuffled])
    torch.testing.assert_close(again, found[shuffled], rtol=1e-5, atol=1e-5)
    bank.close()
    assert torch.equal(outputs(base, batch), alone(case, None, batch))


@pytest.mark.parametrize("form", ["coefficients", "factors"])
@pytest.mark.parametrize("method", OF_SEEDS)
def test_packed_tokens_are_those_of_their_request_alone(method: str, form: Any, tmp_path: Path) -> None:
    """Every layer of the bank sees `[1, tokens, width]`; attention is left out, so that tokens do not meet."""
    case = Case("linear", method)
    users = [packed(case, tmp_path, seed) for seed in (1, 2)]
    base = case.base()
    layer, name = base.model.layers[0].self_attn.q_proj, "model.layers.0.self_attn.q_proj"
    x = torch.randn(1, 30, layer.in_features, generator=torch.Generator().manual_seed(3))
    plain = layer(x)
    bank = AdapterBank(base, form=form)
    leases = []
    for at, user in enumerate(users):
        bank.load(f"u{at}", user)
        leases.append(bank.lease(f"u{at}"))
    deltas = [{one.name: delta.matrix() for one, delta in user.matrices()}[name] for user in users]
    for runs in (
        [(leases[0], 1), (None, 2), (leases[1], 1), ("u0", 19), (leases[1], 7)],
        [(leases[1], 1), (leases[0], 1), (leases[1], 1), (None, 27)],
        [(leases[1], 1), (leases[0], 1), (leases[1], 1), (leases[0], 1), (None, 26)],
    ):
        with bank.tokens(runs):
            found = layer(x)
        start = 0
        for who, size in runs:
            mine = slice(start, start + size)
            if who is None:
                assert torch.equal(found[:, mine], plain[:, mine])
            else:
                user = 0 if who == "u0" else leases.index(who)
                expected = plain[:, mine] + x[:, mine] @ deltas[user].T
                torch.testing.assert_close(found[:, mine], expected, rtol=2e-4, atol=2e-5)
            start += size


def test_base_and_64_users_of_four_methods_in_one_batch(tmp_path: Path) -> None:
    cases = [Case("linear", method) for method in OF_SEEDS]
    users: dict[str, tuple[Case, PackedAdapter]] = {}
    for case in cases:
        for seed in range(16):
            users[f"{case.method}/{seed}"] = case, packed(case, tmp_path, seed)
    base = cases[0].base()
    bank = AdapterBank(base)
    for name, (_, adapter) in users.items():
        bank.load(name, adapter.to_bytes())
    names = [*users, "__base__"]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    names = [names[at] for at in order]
    batch = cases[0].batch(len(names))
    found = outputs(base, batch, adapter_names=names)
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        case, adapter = users.get(name, (cases[0], None))
        expected = alone(case, adapter, one)
        torch.testing.assert_close(found[row : row + 1], expected, rtol=3e-4, atol=3e-5)
    assert bank.stats()["profiles"] == 4


@pytest.mark.parametrize("method", OF_SEEDS)
def test_generation_decodes_each_row_as_alone(method: str, tmp_path: Path) -> None:
    case = Case("linear", method)
    users = [packed(case, tmp_path, seed) for seed in (1, 2)]
    base = case.base()
    bank = AdapterBank(base)
    bank.load("a", users[0])
    bank.load("b", users[1])
    batch = case.batch(4)
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    for beams in (1, 2):
        made = base.generate(**batch, adapter_names=["b", "__base__", "a", "b"], num_beams=beams, **options)
        for row, user in enumerate((users[1], None, users[0], users[1])):
            model = case.base()
            model = model if user is None else put(model, user)
            expected = model.generate(**batch, num_beams=beams, **options)
            assert made[row].tolist() == expected[row].tolist()


def test_a_hot_swap_changes_the_rows_of_its_adapter_alone(tmp_path: Path) -> None:
    case = Case("linear", "nola")
    old, new, other = (packed(case, tmp_path, seed) for seed in (1, 2, 3))
    base = case.base()
    bank = AdapterBank(base)
    bank.load("a", old)
    bank.load("b", other)
    batch = case.batch(3)
    names = ["a", "b", "__base__"]
    first = outputs(base, batch, adapter_names=names)
    lease = bank.lease("a")
    resident = bank.load("a", new)
    assert (lease.resident.version, resident.version) == (1, 2)
    second = outputs(base, batch, adapter_names=names)
    assert torch.equal(second[1:], first[1:])
    assert_rows(second, case, [new, other, None], batch)
    with bank.rows([lease, "b", None]):
        assert torch.equal(outputs(base, batch), first), "who has a lease stays on the version that it began with"
    slot = lease.resident.slot
    lease.release()
    lease.release()
    assert bank.load("c", old).slot == slot, "the row of a version is free after its last lease"


def test_a_bad_file_leaves_everything_as_it_was(tmp_path: Path) -> None:
    case = Case("linear", "nola")
    good = packed(case, tmp_path, 1)
    base = case.base()
    bank = AdapterBank(base, row_bytes=3 * good.spec.count * 4)
    bank.load("a", good)
    batch = case.batch(2)
    first = outputs(base, batch, adapter_names=["a", "a"])
    before = bank.stats()
    data = bytearray(good.to_bytes())
    data[-3] ^= 1
    foreign = packed(Case("conv1d", "nola"), tmp_path, 5)
    for bad in (
        bytes(data),
        b"",
        tmp_path / "nowhere.safetensors",
        foreign,
        packed(Case("linear", "loraxs"), tmp_path, 1),
    ):
        with pytest.raises(RandbasisError):
            bank.load("a", bad)
    assert bank.stats() == before
    assert torch.equal(outputs(base, batch, adapter_names=["a", "a"]), first)


def test_least_recently_used_goes_and_pinned_or_leased_stays(tmp_path: Path) -> None:
    case = Case("linear", "vera")
    adapter = packed(case, tmp_path, 1)
    bank = AdapterBank(case.base(), row_bytes=3 * adapter.spec.count * 4)
    bank.load("pinned", adapter, pin=True)
    bank.load("leased", adapter)
    bank.load("idle", adapter)
    with bank.lease("leased"):
        bank.load("new", adapter)
        assert [one.name for one in bank.residents()] == ["pinned", "leased", "new"]
        bank.lease("new")
        with pytest.raises(BankFullError, match="row_bytes"):
            bank.load("more", adapter)
    bank.load("more", adapter)
    assert "leased" not in bank
    bank.pin("pinned", False)
    bank.load("most", adapter)
    assert "pinned" not in bank
    assert bank.stats()["evictions"] == 3


def test_rows_are_kept_as_stored_and_ten_thousand_loads_leave_memory_flat(tmp_path: Path) -> None:
    case = Case("linear", "nola")
    adapters = [packed(case, tmp_path, seed, bits=16).to_bytes() for seed in range(4)]
    base = case.base()
    bank = AdapterBank(base, row_bytes=64 * 2 * PackedAdapter.from_bytes(adapters[0]).spec.count)
    batch = case.batch(2)
    expected = [alone(case, PackedAdapter.from_bytes(one), batch) for one in adapters]
    slow: list[Any] = []
    for at in range(4):
        bank.load(f"s{at}", adapters[at])
        slow.append(bank.lease(f"s{at}"))
    table = slow[0].resident.table
    assert table.dtype == torch.float16
    for count in range(10_000):
        bank.load(f"u{count % 500}", adapters[count % 4])
        if count == 1_000:
            settled = table.nbytes
        if count % 1_000 == 7:
            with bank.rows(slow[:2]):
                found = outputs(base, batch)
            for row in range(2):
                torch.testing.assert_close(found[row], expected[row][row], rtol=2e-4, atol=2e-5)
    assert table.nbytes == settled
    assert len(bank) <= 64
    assert bank.stats()["resident_bytes"] <= 64 * 2 * slow[0].resident.spec.count


def test_two_threads_send_their_own_rows_while_a_third_loads(tmp_path: Path) -> None:
    case = Case("linear", "randlora")
    users = [packed(case, tmp_path, seed) for seed in (1, 2)]
    base = case.base()
    bank = AdapterBank(base)
    for at, user in enumerate(users):
        bank.load(f"u{at}", user)
    batch = case.batch(3)
    expected = [alone(case, user, batch) for user in users]
    failed: list[str] = []
    stop = threading.Event()

    def send(mine: int) -> None:
        for _ in range(40):
            found = outputs(base, batch, adapter_names=[f"u{mine}", f"u{1 - mine}", "__base__"])
            for row, user in ((0, mine), (1, 1 - mine)):
                if not torch.allclose(found[row], expected[user][row], rtol=2e-4, atol=2e-5):
                    failed.append(f"thread {mine}, row {row}")

    def load() -> None:
        while not stop.is_set():
            bank.load("other", users[0])

    loader = threading.Thread(target=load)
    senders = [threading.Thread(target=send, args=(at,)) for at in range(2)]
    loader.start()
    for thread in senders:
        thread.start()
    for thread in senders:
        thread.join()
    stop.set()
    loader.join()
    assert not failed


def test_entries_of_a_store_bring_their_version(tmp_path: Path) -> None:
    case = Case("linear", "nola")
    with AdapterStore(tmp_path / "adapters.db") as store:
        store.add("acme/bot", packed(case, tmp_path, 1))
        record = store.add("acme/bot", packed(case, tmp_path, 2))
        bank = AdapterBank(case.base())
        resident = bank.load("acme/bot", store.get("acme/bot"))
    assert (resident.version, resident.digest) == (2, record.digest)


def test_all_new_adapters_of_a_batch_are_expanded_in_one_call_a_shape(tmp_path: Path, monkeypatch: Any) -> None:
    from randbasis.methods.bound import WeightedSum

    case = Case("linear", "nola")
    base = case.base()
    bank = AdapterBank(base, form="factors")
    for seed in range(5):
        bank.load(f"u{seed}", packed(case, tmp_path, seed))
    calls: list[int] = []
    plain = WeightedSum.of
    monkeypatch.setattr(WeightedSum, "of", lambda self, c: (calls.append(c.shape[0]), plain(self, c))[1])
    outputs(base, case.batch(5), adapter_names=[f"u{at}" for at in range(5)])
    # q_proj, v_proj and down_proj of two layers: widths 32 and 48 of A, 32 and 16 of B.
    assert len(calls) == 4
    assert sum(calls) == 5 * 2 * 6
    calls.clear()
    outputs(base, case.batch(5), adapter_names=[f"u{at}" for at in (4, 2, 0, 1, 3)])
    assert not calls, "factors are kept"


def test_a_plan_is_made_once_for_the_same_names(tmp_path: Path) -> None:
    case = Case("linear", "nola")
    base = case.base()
    bank = AdapterBank(base)
    bank.load("a", packed(case, tmp_path, 1))
    with bank.rows(["a", None]) as first:
        outputs(base, case.batch(2))
    with bank.rows(["a", None]) as second:
        outputs(base, case.batch(2))
    assert first is second


@pytest.mark.parametrize("method", OF_SEEDS)
def test_a_held_plan_changes_in_place(method: str, tmp_path: Path) -> None:
    """What a CUDA graph needs: the same tensors at the same addresses, whoever the rows are."""
    case = Case("linear", method)
    users = [packed(case, tmp_path, seed) for seed in (1, 2)]
    base, batch = case.base(), case.batch(3)
    bank = AdapterBank(base)
    bank.load("a", users[0])
    bank.load("b", users[1])
    plan = bank.hold(["a", "__base__", "b"])
    places = [view for term in plan.terms for view in term.views]
    addresses = [{name: tensor.data_ptr() for name, tensor in view.items()} for view in places]
    for names in (["a", "__base__", "b"], ["b", "a", "__base__"], ["b", "b", "b"]):
        bank.assign(plan, names)
        with bank.using(plan):
            found = outputs(base, batch)
        assert_rows(found, case, [{"a": users[0], "b": users[1]}.get(name) for name in names], batch)
    assert [{name: tensor.data_ptr() for name, tensor in view.items()} for view in places] == addresses
    with pytest.raises(BankError, match="2 rows"):
        bank.assign(plan, ["a", "b"])
    with pytest.raises(BankError, match="one profile"):
        bank.hold(["__base__"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", OF_SEEDS)
def test_a_step_in_a_cuda_graph_serves_other_users(method: str, tmp_path: Path) -> None:
    case = Case("linear", method)
    users = [packed(case, tmp_path, seed) for seed in (1, 2)]
    base = case.base().cuda()
    bank = AdapterBank(base)
    bank.load("a", users[0])
    bank.load("b", users[1])
    layer, x = base.model.layers[0].mlp.down_proj, torch.randn(2, 1, 48, device="cuda")
    plan = bank.hold(["a", "b"])
    with bank.using(plan), torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layer(x)
    for names in (["a", "b"], ["b", "a"], ["b", "__base__"]):
        bank.assign(plan, names)
        graph.replay()
        with bank.rows(names), torch.no_grad():
            torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", OF_SEEDS)
def test_half_precision(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case("linear", method)
    users = [packed(case, tmp_path, seed) for seed in (1, 2)]
    batch = case.batch(3)
    exact = [alone(case, user, batch) for user in users]
    base = case.base().to(dtype)
    bank = AdapterBank(base)
    bank.load("a", users[0])
    bank.load("b", users[1])
    found = outputs(base, batch, adapter_names=["a", "b", "a"]).float()
    size = exact[0].abs().max()
    for row, user in enumerate((0, 1, 0)):
        assert (found[row] - exact[user][row]).abs().max() < 0.06 * size


@pytest.mark.parametrize("method", OF_SEEDS)
def test_one_graph_of_the_compiler_serves_other_users(method: str, tmp_path: Path) -> None:
    case = Case("linear", method)
    users = [packed(case, tmp_path, seed) for seed in (1, 2, 3)]
    base, batch = case.base(), case.batch(3)
    bank = AdapterBank(base)
    for at, user in enumerate(users):
        bank.load(f"u{at}", user)
    torch.compiler.reset()
    counted = CompileCounter()
    compiled = torch.compile(base, backend=counted, fullgraph=True)
    for names in (["u0", "u1", None], ["u2", "u0", None], ["u1", "u2", None]):
        with bank.rows(names):
            torch.testing.assert_close(outputs(compiled, batch), outputs(base, batch))
    assert counted.frame_count == 1


def test_refusals(tmp_path: Path) -> None:
    case = Case("linear", "nola")
    adapter = packed(case, tmp_path, 1)
    base = case.base()
    bank = AdapterBank(base)
    bank.load("a", adapter)
    batch = case.batch(3)
    with pytest.raises(NotResidentError, match="'b'"):
        outputs(base, batch, adapter_names=["a", "b", "a"])
    with pytest.raises(AdapterNameError, match="2 for 3 rows"):
        outputs(base, batch, adapter_names=["a", "a"])
    with pytest.raises(AdapterNameError, match="stands for the base"):
        bank.load("__base__", adapter)
    with pytest.raises(AdapterNameError, match="must reach"), bank.rows(["a"]):
        pass
    with pytest.raises(NotResidentError):
        bank.unload("b")
    with pytest.raises(BankError, match="in a bank already"):
        AdapterBank(base)
    with pytest.raises(BankError, match="evaluation"):
        AdapterBank(case.base().train())
    with pytest.raises(BankError, match="plain model"):
        AdapterBank(case.adapted())
    with pytest.raises(BankError, match="row_bytes"):
        AdapterBank(case.base(), row_bytes=-1)
    with pytest.raises(BankError, match="'factor'"):
        AdapterBank(case.base(), form="factor")  # pyright: ignore[reportArgumentType]
    with pytest.raises(BaseMismatchError):
        bank.load("other", packed(Case("conv1d", "nola"), tmp_path, 2))
    assert [one.name for one in bank.residents()] == ["a"]
