"""`put` against the road through a directory: the same model bit for bit, no file; a refusal changes nothing."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from tuner_cases import (
    CASES,
    ONE_EACH,
    OPTIONS,
    Case,
    add_adapter,
    fill,
    make_config,
    outputs,
    seeded,
    snapshot,
    tiny_llama,
    token_batch,
)

import randbasis
from randbasis.adapter_file import PackedAdapter, read
from randbasis.adapters import open_adapter
from randbasis.adapters.packed import pack_adapter, write_adapter_dir
from randbasis.adapters.putting import put
from randbasis.errors import (
    AdapterFilesError,
    AdapterTypeError,
    BaseMismatchError,
    MeaningError,
    MergeError,
    RandbasisError,
)

PACKAGE = str(Path(randbasis.__file__).parent)
#: Of `load_packed` through a folder, with one layer, before `put` was there.
CALLS_BEFORE = 666


def packed(case: Case, folder: Path, bits: int = 32, **options: Any) -> PackedAdapter:
    case.adapted(**options).save_pretrained(folder / "source")
    pack_adapter(folder / "source", folder / "file", bits=bits)
    return read(folder / "file")


def through_a_folder(model: Any, adapter: PackedAdapter, folder: Path, name: str = "default") -> PeftModel:
    write_adapter_dir(adapter, folder, where="test")
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), name)
        return model
    return PeftModel.from_pretrained(model, str(folder), adapter_name=name)


def state(model: PeftModel) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def options_of(model: PeftModel, name: str = "default") -> dict[str, Any]:
    found = model.peft_config[name].to_dict()
    found["modules_to_save"] = {*(found["modules_to_save"] or ())}  # PEFT adds to the list each time that it sees it
    return {key: sorted(value) if isinstance(value, set) else value for key, value in found.items()}


def assert_same(mine: PeftModel, theirs: PeftModel, name: str = "default") -> None:
    one, two = state(mine), state(theirs)
    assert list(one) == list(two)
    assert all(torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in one)
    assert options_of(mine, name) == options_of(theirs, name)
    assert type(mine) is type(theirs)
    assert mine.active_adapters == theirs.active_adapters
    for (key, p), (_, q) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert p.requires_grad == q.requires_grad, key
    assert [module.training for module in mine.modules()] == [module.training for module in theirs.modules()]


@pytest.mark.parametrize("case", CASES)
def test_as_through_a_directory(case: Case, tmp_path: Path):
    adapter = packed(case, tmp_path)
    mine, theirs = put(case.base(), adapter), through_a_folder(case.base(), adapter, tmp_path / "folder")
    assert_same(mine, theirs)
    assert torch.equal(outputs(mine, case.batch()), outputs(theirs, case.batch()))


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
@pytest.mark.parametrize("method", OPTIONS)
def test_few_bits_as_through_a_directory(method: str, bits: int, tmp_path: Path):
    case = Case("linear", method)
    adapter = packed(case, tmp_path, bits)
    assert_same(put(case.base(), adapter), through_a_folder(case.base(), adapter, tmp_path / "folder"))


@pytest.mark.parametrize("method", OPTIONS)
def test_beside_another_adapter_as_through_a_directory(method: str, tmp_path: Path):
    adapter = packed(Case("linear", method), tmp_path)
    other = Case("linear", "nola")
    mine = put(other.adapted(), adapter, "second")
    assert_same(mine, through_a_folder(other.adapted(), adapter, tmp_path / "folder", "second"), "second")
    mine.set_adapter("second")
    assert torch.equal(outputs(mine, other.batch()), outputs(put(other.base(), adapter), other.batch()))


def classifier(labels: int = 3) -> BertForSequenceClassification:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=64, num_labels=labels))


def with_head(method: str, folder: Path, **options: Any) -> PackedAdapter:
    """Of a classifier with a trained head, and biases where they are asked for."""
    config = make_config(method, ["query"], task_type="SEQ_CLS", modules_to_save=["classifier"], **options)
    model = get_peft_model(seeded(classifier), config)
    fill(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "randbasis_" not in name:
                parameter.add_(1.0)
    model.save_pretrained(folder / "source")
    pack_adapter(folder / "source", folder / "file", bits=32)
    return read(folder / "file")


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("method", ONE_EACH)
def test_heads_and_biases_as_through_a_directory(method: str, bias: str, tmp_path: Path):
    adapter = with_head(method, tmp_path, bias=bias)
    assert adapter.extra
    mine = put(seeded(classifier), adapter)
    assert_same(mine, through_a_folder(seeded(classifier), adapter, tmp_path / "folder"))
    assert type(mine).__name__ == "PeftModelForSequenceClassification"


def test_over_an_adapter_that_is_there(tmp_path: Path):
    """Its values are replaced where they mean the same, and refused where they do not."""
    case = Case("linear", "nola")
    adapter = packed(case, tmp_path)
    model = case.adapted(fill_seed=5)
    put(model, adapter)
    assert torch.equal(outputs(model, case.batch()), outputs(put(case.base(), adapter), case.batch()))
    for other in (case.adapted(seed=12), case.adapted(quantize_coefficients=4)):
        before = snapshot(other)
        with pytest.raises(MeaningError):
            put(other, adapter)
        assert snapshot(other) == before


def test_to_be_trained_further(tmp_path: Path):
    case = Case("linear", "vera")
    adapter = packed(case, tmp_path)
    model = put(case.base().train(), adapter, is_trainable=True)
    assert model.training
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "randbasis_" in name}
    half = put(case.base().bfloat16(), adapter, autocast_adapter_dtype=False)
    assert {p.dtype for name, p in half.named_parameters() if "randbasis_" in name} == {torch.bfloat16}


# --- without the disk ---


@pytest.fixture
def opened_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was opened since the list was last cleared."""
    found: list[str] = []
    watching = [True]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("open", "os.mkdir", "os.rename", "tempfile.mkdtemp", "tempfile.mkstemp"):
            found.append(f"{event} {arguments[0]}")

    sys.addaudithook(watch)
    yield found
    watching.clear()  # a hook stays for the life of the process


@pytest.mark.parametrize("method", OPTIONS)
def test_no_file_is_touched(method: str, tmp_path: Path, opened_files: list[str]):
    case = Case("linear", method)
    adapter, base = packed(case, tmp_path), case.base()
    put(case.base(), adapter)  # what is imported late is imported now
    opened_files.clear()
    put(base, adapter)
    assert opened_files == []
    (tmp_path / "seen").write_text("")
    assert opened_files == [f"open {tmp_path / 'seen'}"]


def test_no_file_is_touched_with_a_head(tmp_path: Path, opened_files: list[str]):
    adapter, base = with_head("nola", tmp_path), seeded(classifier)
    put(seeded(classifier), adapter)
    opened_files.clear()
    put(base, adapter)
    assert opened_files == []


def calls(run: Callable[[], Any]) -> int:
    """Python calls into the package, but for PEFT's walks through its modules."""
    found, walks = 0, os.sep + "seen_adapters.py"

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal found
        file = frame.f_code.co_filename
        found += event == "call" and file.startswith(PACKAGE + os.sep) and not file.endswith(walks)

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def one_layer() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(64, 64)))


@pytest.mark.parametrize("method", ONE_EACH)
def test_fewer_than_two_fifths_of_the_calls(method: str, tmp_path: Path):
    get_peft_model(one_layer(), make_config(method, ["0"])).save_pretrained(tmp_path / "source")
    pack_adapter(tmp_path / "source", tmp_path / "file")
    adapter = read(tmp_path / "file")
    put(one_layer(), adapter)
    base = one_layer()
    assert calls(lambda: put(base, adapter)) < CALLS_BEFORE * 2 / 5


def test_over_an_adapter_that_is_there_to_be_trained_further(tmp_path: Path):
    case = Case("linear", "vera")
    adapter = packed(case, tmp_path)
    model = put(case.base(), adapter)
    put(model, adapter, is_trainable=True)
    fresh = put(case.base(), adapter, is_trainable=True)
    assert options_of(model) == options_of(fresh)
    for (key, mine), (_, theirs) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert mine.requires_grad == theirs.requires_grad, key


# --- refusals ---


@pytest.mark.parametrize("method", ONE_EACH)
def test_a_refusal_leaves_the_model_as_it_was(method: str, tmp_path: Path):
    adapter = packed(Case("linear", method), tmp_path)
    wide = seeded(tiny_llama, intermediate_size=56)
    deep = seeded(tiny_llama, num_hidden_layers=3)  # its options pick a layer that it has no coefficients for
    for base, error in ((wide, BaseMismatchError), (Case("conv1d", "nola").base(), BaseMismatchError),
                        (deep, AdapterFilesError)):  # fmt: skip
        before = snapshot(base)
        with pytest.raises(error):
            put(base, adapter)
        assert snapshot(base) == before
    model = get_peft_model(deep, make_config("nola", ["q_proj"]))
    add_adapter(model, "second", make_config("vera", ["q_proj"]), 2)
    before, expected = snapshot(model), outputs(model, token_batch())
    with pytest.raises(AdapterFilesError, match=r"model\.layers\.2"):
        put(model, adapter, "third")
    assert snapshot(model) == before
    assert set(model.peft_config) == {"default", "second"}
    assert torch.equal(outputs(model, token_batch()), expected)


@pytest.mark.parametrize("of", [str, Path.read_bytes, open_adapter, lambda path: None])
def test_what_is_not_read_is_refused_with_the_call_that_reads_it(of: Callable[[Path], Any], tmp_path: Path):
    case = Case("linear", "nola")
    packed(case, tmp_path)
    model, given = case.base(), of(tmp_path / "file")
    with pytest.raises(AdapterTypeError, match=rf"got {type(given).__name__}; use load_packed\(model, file\)"):
        put(model, given)
    assert not hasattr(model, "peft_config")


def test_a_name_that_no_adapter_can_have_is_refused(tmp_path: Path):
    case = Case("linear", "nola")
    adapter, base = packed(case, tmp_path), case.base()
    before = snapshot(base)
    with pytest.raises(RandbasisError, match="no dot"):
        put(base, adapter, "a.b")
    assert snapshot(base) == before


def test_a_head_of_another_size_is_refused(tmp_path: Path):
    adapter = with_head("nola", tmp_path)
    base = seeded(classifier, 5)
    before = snapshot(base)
    with pytest.raises(BaseMismatchError, match=r"'classifier.bias' of shape \[3\].*got shape \[5\]"):
        put(base, adapter)
    assert snapshot(base) == before


HEAD = "base_model.model.lm_head.weight"
BY_HAND: dict[str, Callable[[PackedAdapter], dict[str, Any]]] = {
    "fewer": lambda one: {"coefficients": torch.ones_like(one.coefficients[1:])},
    "more": lambda one: {"coefficients": torch.ones(len(one.coefficients) + 1)},
    "integers": lambda one: {"coefficients": torch.ones_like(one.coefficients).long()},
    "a matrix": lambda one: {"coefficients": torch.ones_like(one.coefficients)[None]},
    "not finite": lambda one: {"coefficients": one.coefficients * torch.nan},
    "scales": lambda one: {"scales": torch.ones(3)},
    "streams": lambda one: {"streams": torch.zeros(6, 2, dtype=torch.int64)},
    "a head": lambda one: {"extra": {HEAD: torch.full((64, 32), torch.inf)}},
}


@pytest.mark.parametrize("way", BY_HAND)
@pytest.mark.parametrize("there", [True, False], ids=["over one that is there", "new"])
def test_one_made_by_hand_is_compared_before_anything_is_written(way: str, there: bool, tmp_path: Path):
    case = Case("linear", "vera")
    adapter = packed(case, tmp_path)
    model = put(case.base(), adapter) if there else case.base()
    before = snapshot(model)
    with pytest.raises(RandbasisError):
        put(model, replace(adapter, **BY_HAND[way](adapter)))
    assert snapshot(model) == before


@pytest.mark.parametrize("change", [lambda s: s[1:], lambda s: s.T, lambda s: s - 2**33, lambda s: s.double()])
def test_streams_made_by_hand_are_compared_before_anything_is_written(change: Any, tmp_path: Path):
    case = Case("linear", "nola-own-basis")
    adapter = packed(case, tmp_path)
    model = put(case.base(), adapter)
    before = snapshot(model)
    with pytest.raises(RandbasisError, match="streams"):
        put(model, replace(adapter, streams=change(adapter.streams)))
    assert snapshot(model) == before


@pytest.mark.parametrize("road", ["put", "folder"])
def test_a_merged_one_is_not_replaced_behind_the_weights(road: str, tmp_path: Path):
    case = Case("linear", "vera")
    adapter = packed(case, tmp_path)
    model = put(case.base(), adapter)
    expected, other = outputs(model, case.batch()), replace(adapter, coefficients=adapter.coefficients + 1)
    write_adapter_dir(other, tmp_path / "other", where="test")
    load = put if road == "put" else lambda model, _: model.load_adapter(str(tmp_path / "other"), "default")
    model.merge_adapter()
    with pytest.raises(MergeError, match=r"'default' is, into '.*layers\.0.*unmerge_adapter first"):
        load(model, other)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, case.batch()), expected)
    load(model, other)
    assert not torch.equal(outputs(model, case.batch()), expected)
