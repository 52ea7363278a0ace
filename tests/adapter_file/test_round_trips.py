"""Adapter → bytes → adapter, by property; and files that are whole or absent."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from packed_cases import BASE, CASES, METHODS, PRECISIONS, adapter_of, content, heads, matrices, numbers

from randbasis.adapter_file import PackedAdapter, Spec, SpecMatrix, group_matrices, read, verify
from randbasis.errors import (
    BaseMismatchError,
    CoefficientCountError,
    CoefficientValueError,
    OutputExistsError,
    PrecisionError,
    SaveError,
    SpecValueError,
    StreamValueError,
)
from randbasis.files import whole_file
from randbasis.methods import Method, Nola, Pranc, RandLora, Site, Vera

SEEDS = st.integers(0, 2**64 - 1)
LAWS = st.sampled_from(("sign", "uniform", "normal", "sparse(3)", "sparse(2.5)"))
SMALL = st.integers(1, 6)
ALPHAS = st.floats(2**-10, 1e6, width=32)
ANY_METHOD = st.one_of(
    st.builds(Nola, r=SMALL, num_basis=SMALL, num_basis_b=SMALL | st.none(), alpha=ALPHAS, seed=SEEDS, law=LAWS),
    st.builds(Vera, r=SMALL, d_initial=ALPHAS, seed=SEEDS, law=LAWS),
    st.builds(RandLora, r=SMALL, alpha=ALPHAS | st.none(), seed=SEEDS, law=LAWS),
    st.builds(Pranc, num_basis=SMALL, share_basis=st.booleans(), seed=SEEDS, law=LAWS),
)
LAYERS = st.sets(st.integers(0, 40), min_size=1, max_size=6).map(sorted)


@settings(max_examples=60)
@given(
    method=ANY_METHOD,
    layers=LAYERS,
    precision=st.sampled_from(PRECISIONS),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    seed=st.integers(0, 99),
    with_heads=st.booleans(),
)
def test_what_is_read_is_what_was_written(method, layers, precision, dtype, seed, with_heads):
    adapted = matrices(method, layers)
    count = sum(one.count for one in adapted)
    values = numbers(count, seed, dtype)
    adapter = adapter_of(method, *precision, values=values, adapted=adapted, extra=heads() if with_heads else None)
    data = adapter.to_bytes()
    again = PackedAdapter.from_bytes(data)
    assert content(again) == content(adapter)
    assert again.to_bytes() == data
    assert sorted((one.name, one.part) for one in again.spec.matrices) == sorted((m.name, m.part) for m in adapted)
    if precision[0] == 32:
        assert again.values().dtype == dtype
        assert torch.equal(again.values(), values)
    packed_again = PackedAdapter.of(
        adapter.spec, again.values(), streams=adapter.streams, extra=dict(reversed(again.extra.items()))
    )
    assert packed_again.to_bytes() == data


@pytest.mark.parametrize("name", METHODS)
def test_each_matrix_gets_its_own_coefficients_and_streams(name: str):
    method = METHODS[name]
    adapter = adapter_of(method)
    position = 0
    for one, delta in PackedAdapter.from_bytes(adapter.to_bytes()).matrices():
        assert list(delta.coefficients) == list(one.method.coefficient_shapes(one.rows, one.in_features))
        for key, values in delta.coefficients.items():
            assert tuple(values.shape) == one.shapes[key]
            assert torch.equal(values.reshape(-1), adapter.coefficients[position : position + values.numel()])
            position += values.numel()
        assert delta.bound.site == Site(one.rows, one.in_features, method.streams(f"{one.name}[{one.part}]"))
    assert position == adapter.spec.count


def test_hundreds_of_layers_are_few_lines():
    method = Nola(r=16, num_basis=4, alpha=16.0)
    each = [f"mlp.experts.{expert}.{name}" for expert in range(32) for name in ("up", "down")]
    names = [f"model.layers.{layer}.{name}" for layer in range(61) for name in each]
    groups = group_matrices(SpecMatrix(name, "", 0, 8, 8, 4, method) for name in names)
    spec = Spec(method, BASE, groups, 16)
    assert (len(groups), spec.size, spec.count) == (2, len(names), 8 * len(names))
    assert len(str(spec.document("", None))) < 1000


def test_whole_numbers_have_one_spelling():
    first, second = (adapter_of(Nola(r=2, num_basis=5, num_basis_b=3, alpha=alpha)) for alpha in (2, 2.0))
    assert first.to_bytes() == second.to_bytes()


def test_the_way_a_basis_is_kept_is_not_in_the_file():
    kept = [adapter_of(Vera(r=3, basis_storage=kind)).to_bytes() for kind in ("auto", "recompute")]
    assert PackedAdapter.from_bytes(kept[0]).spec.method == Vera(r=3)
    assert b"basis_storage" not in kept[1]


# --- what cannot be packed ---


def test_values_that_do_not_fit_are_refused():
    method = METHODS["nola"]
    for values, bits, error in (
        (numbers(55), 32, CoefficientCountError),
        (torch.full((56,), float("nan")), 32, CoefficientValueError),
        (torch.full((56,), 7e4), 16, PrecisionError),
        (numbers(56).double() * 1e40, 32, PrecisionError),
        (numbers(56), 5, PrecisionError),
    ):
        with pytest.raises(error):
            adapter_of(method, bits, values=values)


def test_dtypes_that_a_file_cannot_hold_are_refused():
    with pytest.raises(PrecisionError, match="complex64"):
        adapter_of(METHODS["nola"], extra={"a": torch.zeros(1, dtype=torch.complex64)}).to_bytes()


def test_matrices_that_overlap_are_not_written():
    method = METHODS["pranc"]
    adapted = [SpecMatrix("a", "q", 0, 3, 6, 4, method), SpecMatrix("a", "1/3", 2, 2, 6, 4, method)]
    with pytest.raises(SpecValueError, match="overlap"):
        adapter_of(method, adapted=adapted).to_bytes()


# --- the base ---


def test_a_model_of_another_shape_is_told_by_its_first_matrices():
    spec = CASES["nola"].spec
    shapes = dict(spec.shapes)
    spec.check_base(shapes, "llama", "f")
    spec.check_base({f"wrapped.{name}": shape for name, shape in shapes.items()}, None, "f")
    wrong = shapes | {"model.layers.1.c_attn": (24, 4)}
    del wrong["score"]
    with pytest.raises(
        BaseMismatchError, match=r"2 of 5 layers differ .*c_attn is 12×4 there and 24×4 here.*score .*not"
    ):
        spec.check_base(wrong, "llama", "f")
    with pytest.raises(BaseMismatchError, match=r"'llama'.*'mistral'.*acme/tiny-llama"):
        spec.check_base(shapes, "mistral", "f")


def test_the_fingerprint_is_of_the_base_and_not_of_the_adapter():
    prints = {CASES[name].spec.fingerprint for name in METHODS}
    assert len(prints) == 1
    other: Method = METHODS["nola"]
    moved = adapter_of(other, adapted=matrices(other, (0, 2)))
    assert moved.spec.fingerprint not in prints


# --- files ---


def test_a_file_is_written_and_verified(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    CASES["heads"].write(path)
    found = verify(path)
    assert found.canonical
    assert found.bytes == path.stat().st_size == found.as_json()["bytes"]
    assert content(read(path)) == content(CASES["heads"])
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path: Path):
    path = tmp_path / "a"
    CASES["nola"].write(path)
    before = path.read_bytes()
    with pytest.raises(OutputExistsError):
        CASES["vera"].write(path)
    assert path.read_bytes() == before
    CASES["vera"].write(path, overwrite=True)
    assert path.read_bytes() == CASES["vera"].to_bytes()
    with pytest.raises(OutputExistsError):
        CASES["vera"].write(tmp_path, overwrite=True)


STEPS = ("write", "fsync", "replace", "flush_directory")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("old", [b"old content", None], ids=["replacing", "new"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_write_that_stops_leaves_the_old_file_or_the_new(tmp_path, monkeypatch, step, old, error):
    path, new = tmp_path / "a", CASES["nola"].to_bytes()
    if old is not None:
        path.write_bytes(old)

    def stop(*_, **__):
        raise error

    if step == "write":
        opened = Path.open
        monkeypatch.setattr(Path, "open", lambda self, *a: _HalfWritten(opened(self, *a), error))
    elif step == "fsync":
        monkeypatch.setattr(os, "fsync", stop)
    elif step == "replace":
        monkeypatch.setattr(Path, "replace", stop)
    else:
        monkeypatch.setattr(whole_file, "flush_directory", stop)
    with pytest.raises(SaveError if isinstance(error, OSError) else KeyboardInterrupt):
        whole_file.write(path, new, overwrite=True)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == (["a"] if old or step == "flush_directory" else [])
    if path.exists():
        assert path.read_bytes() == (new if step == "flush_directory" else old)


class _HalfWritten:
    """A file whose disk is full after half of what is written."""

    def __init__(self, file, error):
        self.file, self.error = file, error

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *reason):
        return self.file.__exit__(*reason)

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        raise self.error


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path):
    """No chance to clean up: the process dies between the flush and the rename, and in the middle of the bytes."""
    path = tmp_path / "a"
    CASES["nola"].write(path)
    before = path.read_bytes()
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom randbasis.files import whole_file\n"
        "Path.replace = lambda *_: os._exit(9)\n"
        "whole_file.write(sys.argv[1], b'new' * 1000, overwrite=True)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert path.read_bytes() == before
    left = [file for file in tmp_path.iterdir() if file != path]
    assert [file.suffix for file in left] == [".part"]


def test_bytes_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch):
    calls: list[str] = []
    fsync, replace, flush = os.fsync, Path.replace, whole_file.flush_directory
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (calls.append("rename"), replace(self, to))[1])
    monkeypatch.setattr(whole_file, "flush_directory", lambda path: (calls.append("directory"), flush(path))[1])
    whole_file.write(tmp_path / "a", b"x")
    assert calls == ["fsync", "rename", "directory", "fsync"]


@pytest.mark.parametrize("change", [lambda s: s - 1 - s, lambda s: s + 2**32, lambda s: s.float(), lambda s: s.int()])
def test_streams_that_are_none_are_not_wrapped_into_others(change):
    adapter = adapter_of(METHODS["nola-own-basis"])
    with pytest.raises(StreamValueError, match="the adapter to write: streams must be int64 with values of 32 bits"):
        replace(adapter, streams=change(adapter.streams)).to_bytes()


@pytest.mark.parametrize(
    ("bits", "group"), [(0, 0), (5, 0), (True, 0), (4.0, 0), (None, 0), (4, -1), (4, 2.5), (4, "3")]
)
def test_a_precision_that_there_is_not_is_refused_by_its_own_class(bits, group):
    adapter = adapter_of(METHODS["vera"], 4)
    with pytest.raises(PrecisionError, match="must be"):
        adapter.at(bits, group)
    with pytest.raises(PrecisionError, match=r"the adapter to write: .* must be"):
        replace(adapter, spec=replace(adapter.spec, bits=bits, group=group)).to_bytes()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_what_is_no_real_number_is_not_cut_to_one(dtype):
    spec = adapter_of(METHODS["vera"]).spec
    with pytest.raises(PrecisionError, match=f"must be floating, got {dtype}"):
        PackedAdapter.of(spec, numbers(spec.count).to(dtype))
