"""How frozen matrices are kept: who shares them, when they are freed, what a copy of them is."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch

from randbasis.basis import Basis, block_words
from randbasis.basis_storage import check_storage
from randbasis.errors import StorageError
from randbasis.ops import Slab, choose_storage, hold
from randbasis.ops import storage as storage_module
from randbasis.ops.storage import DENSE_BYTES, FREE_SHARE, PACKED, dense_bytes, free_bytes, held

CPU = torch.device("cpu")
LAWS = ("sign", "uniform", "normal", "sparse(3)")


def slab_of(name: str, *shape: int, law: str = "sign") -> Slab:
    count, rows, cols = shape or (3, 4, 130)
    return Slab(Basis.named(11, f"storage/{name}", law), count, rows, cols)


@pytest.mark.parametrize("name", ["auto", "packed", "dense", "recompute"])
def test_every_kind_is_known(name: str) -> None:
    assert check_storage(name) == name


def test_unknown_kind_names_argument_value_and_way_out() -> None:
    with pytest.raises(StorageError) as refusal:
        check_storage("pakced")
    assert "basis_storage must be one of ['auto', 'packed', 'dense', 'recompute']" in str(refusal.value)
    assert "got 'pakced'" in str(refusal.value)
    assert "did you mean packed?" in str(refusal.value)


def test_a_choice_of_the_user_stands() -> None:
    huge = slab_of("huge", 2**10, 2**10, 2**20)
    assert [choose_storage(huge, kind, shared=True) for kind in ("packed", "dense", "recompute")] == [
        "packed",
        "dense",
        "recompute",
    ]


@pytest.mark.parametrize(("shared", "share"), [(True, 1), (False, 16)])
def test_auto_goes_by_bytes(shared: bool, share: int) -> None:
    dense = DENSE_BYTES // share // 4
    packed = PACKED * DENSE_BYTES // share // 16
    sizes = [(1, 1, dense), (1, 1, dense + 1), (1, packed, 128), (1, packed + 1, 128)]
    assert [choose_storage(slab_of("auto", *size), "auto", shared=shared) for size in sizes] == [
        "dense",
        "packed",
        "packed",
        "recompute",
    ]


def test_auto_takes_a_small_part_of_what_is_free_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same slab, 32 MiB densely and 1 MiB packed, where there is much memory, some, little and none."""
    free = {"cuda:0": 80 << 30, "cuda:1": (8 << 30) - 1, "cuda:2": 60 << 20, "cuda:3": 0}
    monkeypatch.setattr(storage_module, "free_bytes", lambda device: free.get(str(device)))
    slab = slab_of("free", 64, 128, 1024)
    found = [choose_storage(slab, "auto", shared=True, device=torch.device(name)) for name in (*free, "cpu")]
    assert found == ["dense", "packed", "recompute", "recompute", "dense"]
    # One of many matrices gets a sixteenth; and a little more or less free memory decides nothing.
    assert choose_storage(slab, "auto", shared=False, device=torch.device("cuda:0")) == "packed"
    for much in (5 << 30, 7 << 30):
        free["cuda:0"] = much
        assert dense_bytes(torch.device("cuda:0")) == (4 << 30) // FREE_SHARE


def test_what_is_kept_densely_already_is_used_on_a_full_device_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "free_bytes", lambda _: 0)
    slab = slab_of("kept")
    assert choose_storage(slab, "auto", shared=True, device=torch.device("cuda")) == "recompute"
    kept = hold(slab, "dense")
    assert choose_storage(slab, "auto", shared=True, device=torch.device("cuda")) == kept.storage


def test_free_memory_counts_what_torch_reserved_and_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"mem_get_info": (1000, 9000), "memory_reserved": 500, "memory_allocated": 200}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, answer=answer: answer)
    assert free_bytes(torch.device("cuda:1")) == 1300
    assert free_bytes(CPU) is None


@pytest.mark.parametrize("law", LAWS)
def test_packed_words_are_the_words_of_the_basis(law: str) -> None:
    slab = slab_of("words", law=law)
    stored = hold(slab, "packed")
    words = stored.packed(CPU)
    assert words is not None
    assert torch.equal(words, block_words(slab.basis, (0, 3), (0, 4), (0, slab.blocks)))
    assert stored.packed(CPU) is words
    assert stored.dense(torch.float32, CPU) is None
    assert stored.nbytes == slab.packed_bytes == 3 * 4 * slab.blocks * 16


def test_a_dense_slab_is_built_once_for_each_dtype() -> None:
    stored = hold(slab_of("dense"), "dense")
    assert stored.nbytes == 0
    single = stored.dense(torch.float32, CPU)
    assert single is stored.dense(torch.float32, CPU)
    assert stored.dense(torch.bfloat16, CPU).dtype == torch.bfloat16
    assert stored.packed(CPU) is None
    assert stored.nbytes == 3 * 4 * 130 * (4 + 2)


def test_sign_takes_one_bit_an_entry() -> None:
    slab = slab_of("bits", 4, 8, 1024)
    assert slab.packed_bytes * 8 == slab.entries


def test_equal_slabs_share_one_store() -> None:
    """Slabs of different layers are different objects; the store is one."""
    first, second = hold(slab_of("shared"), "dense"), hold(slab_of("shared"), "dense")
    assert first is second
    assert hold(slab_of("shared"), "packed") is not first
    assert hold(slab_of("other"), "dense") is not first
    assert hold(slab_of("shared", law="normal"), "dense") is not first


def test_freed_when_nobody_holds_it() -> None:
    slab = slab_of("freed")
    first, second = hold(slab, "dense"), hold(slab, "dense")
    tensor = weakref.ref(first.dense(torch.float32, CPU))
    del first
    gc.collect()
    assert held(slab, "dense") is second
    assert tensor() is not None
    del second
    gc.collect()
    assert held(slab, "dense") is None
    assert tensor() is None


def test_deepcopy_and_copy_share_the_store() -> None:
    """A deep copy of a model must not double its frozen matrices."""
    stored = hold(slab_of("copy"), "packed")
    assert copy.deepcopy({"module": [stored]})["module"][0] is stored
    assert copy.copy(stored) is stored


def test_pickle_carries_the_name_and_not_the_matrices() -> None:
    slab = slab_of("pickle", 64, 64, 512)
    stored = hold(slab, "dense")
    stored.dense(torch.float32, CPU)
    data = pickle.dumps(stored)
    assert len(data) < 1000
    assert pickle.loads(data) is stored
    del stored
    gc.collect()
    again = pickle.loads(data)
    assert (again.slab, again.storage, again.nbytes) == (slab, "dense", 0)
    assert again.dense(torch.float32, CPU).shape == (64, 64, 512)


def test_threads_meet_one_tensor() -> None:
    stored = hold(slab_of("threads", 16, 16, 1024), "dense")
    start, found = threading.Barrier(8), []

    def build() -> None:
        start.wait()
        found.append(stored.dense(torch.float32, CPU))

    workers = [threading.Thread(target=build) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({id(tensor) for tensor in found}) == 1
