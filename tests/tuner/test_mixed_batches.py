"""Mixed batches: each row of a batch with its own adapter, as if it were alone."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification
from tuner_cases import (
    CASES,
    ONE_EACH,
    OPTIONS,
    PLACES,
    PLAIN_CASES,
    Case,
    adapted_layers,
    add_adapter,
    fill,
    make_config,
    outputs,
    seeded,
    tiny_gpt2,
    tiny_llama,
    tiny_phi3,
    tiny_t5,
    token_batch,
)

from randbasis import METHODS
from randbasis.errors import AdapterNameError

BASE = "__base__"


def each_alone(model: PeftModel, batch: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    """Every row by itself, with its adapter set as the only one."""
    before = model.active_adapter
    rows = []
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        if name == BASE:
            with model.disable_adapter():
                rows.append(outputs(model, alone))
        else:
            model.set_adapter(name)
            rows.append(outputs(model, alone))
    model.set_adapter(before)
    return torch.cat(rows)


def three_adapters(case: Case) -> PeftModel:
    """Two on one basis, and one on a basis, rank and law of its own."""
    model = case.adapted()
    add_adapter(model, "same_basis", case.config(), 2)
    own = {"seed": 5, "law": "normal"} | ({} if case.method == "pranc" else {"r": 4})
    add_adapter(model, "own_basis", case.config(**own), 3)
    return model


ORDERS = [
    ["default", "same_basis", "own_basis", BASE, "same_basis"],
    [BASE, BASE, "own_basis", "own_basis", "default"],
    ["same_basis"] * 5,
    [BASE] * 5,
]


@pytest.mark.parametrize("case", CASES)
def test_rows_are_as_if_alone(case):
    model = three_adapters(case)
    batch = case.batch(5)
    for names in ORDERS:
        mixed = outputs(model, batch, adapter_names=names)
        torch.testing.assert_close(mixed, each_alone(model, batch, names), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", PLAIN_CASES)
def test_rows_differ_and_base_rows_are_the_base_model(case):
    model = three_adapters(case)
    one = case.batch(1)
    batch = {key: value.repeat(4, *(1,) * (value.dim() - 1)) for key, value in one.items()}
    mixed = outputs(model, batch, adapter_names=[BASE, "default", "same_basis", "own_basis"])
    torch.testing.assert_close(mixed[:1], outputs(case.base(), one), rtol=1e-5, atol=1e-5)
    for first in range(4):
        for second in range(first):
            assert (mixed[first] - mixed[second]).abs().max() > 1e-2


@pytest.mark.parametrize("place", PLACES)
def test_all_methods_in_one_batch(place):
    case = Case(place, "nola")
    model = get_peft_model(case.base(), case.config(), adapter_name="nola")
    fill(model, "nola")
    for seed, method in enumerate(OPTIONS, start=20):
        if method != "nola":
            add_adapter(model, method, make_config(method, case.targets, seed=seed), seed)
    model.eval()
    names = [*OPTIONS, BASE, "vera"]
    batch = case.batch(len(names))
    mixed = outputs(model, batch, adapter_names=names)
    torch.testing.assert_close(mixed, each_alone(model, batch, names), rtol=1e-4, atol=1e-4)


def test_adapters_on_different_modules_and_slices():
    model = get_peft_model(seeded(tiny_gpt2), make_config("nola", ["c_attn[q]"]), adapter_name="q")
    fill(model, "q")
    add_adapter(model, "v", make_config("nola", ["c_attn[v]"]), 2)
    add_adapter(model, "whole", make_config("vera", ["c_attn", "c_fc"]), 3)
    names = ["q", "v", "whole", BASE, "q"]
    batch = token_batch(5)
    mixed = outputs(model.eval(), batch, adapter_names=names)
    torch.testing.assert_close(mixed, each_alone(model, batch, names), rtol=1e-4, atol=1e-4)


def test_the_active_adapter_and_disabled_adapters_do_not_matter():
    model = three_adapters(Case("linear", "vera"))
    batch, names = token_batch(3), ["own_basis", BASE, "default"]
    first = outputs(model, batch, adapter_names=names)
    model.set_adapter("same_basis")
    assert torch.equal(outputs(model, batch, adapter_names=names), first)
    assert not torch.allclose(outputs(model, batch), first, atol=1e-3)


def test_hooks_are_gone_after_a_call_that_failed():
    model = three_adapters(Case("linear", "nola"))
    expected = outputs(model, token_batch(2))
    with pytest.raises(RuntimeError):
        outputs(model, {"input_ids": torch.zeros(2, 0, dtype=torch.long), "position_ids": torch.zeros(3, 1)},
                adapter_names=["default", BASE])  # fmt: skip
    assert torch.equal(outputs(model, token_batch(2)), expected)
    assert not any(layer._forward_pre_hooks for layer in adapted_layers(model).values())


def test_modules_to_save_follow_the_names():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(**sizes, vocab_size=64, num_labels=3)
    options = {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    model = get_peft_model(seeded(BertForSequenceClassification, config), make_config("nola", ["query"], **options))
    fill(model)
    add_adapter(model, "other", make_config("vera", ["query"], **options), 2)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["other"].weight.add_(1.0)
    names, batch = ["other", "default", BASE, "other"], token_batch(4)
    mixed = outputs(model.eval(), batch, adapter_names=names)
    torch.testing.assert_close(mixed, each_alone(model, batch, names), rtol=1e-4, atol=1e-4)


# --- generation ---


def generated(model: PeftModel, batch: dict[str, torch.Tensor], **options) -> torch.Tensor:
    tokens = model.generate(**batch, max_new_tokens=6, do_sample=False, **options)
    return torch.nn.functional.pad(tokens, (0, 16 - tokens.shape[1]))


def generated_alone(model: PeftModel, batch: dict[str, torch.Tensor], names: list[str], **options) -> torch.Tensor:
    rows = []
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        if name == BASE:
            with model.disable_adapter():
                rows.append(generated(model, alone, **options))
        else:
            model.set_adapter(name)
            rows.append(generated(model, alone, **options))
    return torch.cat(rows)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_phi3, tiny_t5])
@pytest.mark.parametrize("method", ONE_EACH)
def test_generation_of_each_row_as_if_alone(build, beams, method):
    targets = {"tiny_llama": ["q_proj", "v_proj"], "tiny_gpt2": ["c_attn[q,v]", "c_fc"], "tiny_phi3": ["qkv_proj[v]"],
               "tiny_t5": ["q", "v", "wo"]}[build.__name__]  # fmt: skip
    model = get_peft_model(seeded(build), make_config(method, targets))
    fill(model, seed=1, size=1.0)
    add_adapter(model, "other", make_config("nola", targets, seed=4), 2)
    fill(model, "other", 2, size=2.0)
    names, batch = ["default", BASE, "other", "default"], token_batch(4, 5)
    expected = generated_alone(model, batch, names, num_beams=beams)
    mixed = generated(model, batch, num_beams=beams, adapter_names=names)
    assert torch.equal(mixed, expected)
    with model.disable_adapter():
        assert not torch.equal(generated(model, batch, num_beams=beams), expected)


# --- batched, not looped ---


class CountedOps(TorchDispatchMode):
    """How many tensor operations a block runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def many_adapters(case: Case, count: int) -> PeftModel:
    model = case.adapted()
    for seed in range(1, count):
        add_adapter(model, f"number_{seed}", case.config(), seed + 1)
    return model


@pytest.mark.parametrize("case", PLAIN_CASES)
def test_operations_do_not_grow_with_the_number_of_adapters(case, monkeypatch):
    """One product serves all adapters of a kind: the same operations for 2 and for 8 distinct adapters."""
    model = many_adapters(case, 8)
    batch = case.batch(8)
    applied = []
    kind = METHODS[case.method]
    original = kind.apply
    monkeypatch.setattr(kind, "apply", lambda self, *args: applied.append(1) or original(self, *args))
    found = []
    for distinct in (2, 8):
        names = (["default", *(f"number_{i}" for i in range(1, distinct))] * 8)[:8]
        outputs(model, batch, adapter_names=names)  # fills the cache of factors
        applied.clear()
        with CountedOps() as ops:
            outputs(model, batch, adapter_names=names)
        found.append((len(applied), ops.count))
    assert found[0] == found[1]
    parts = sum(len(layer.matrices("default")) for layer in adapted_layers(model).values())
    assert found[0][0] == parts


@pytest.mark.parametrize("method", ONE_EACH)
def test_factors_of_a_mixed_batch_are_kept(method, monkeypatch):
    model = many_adapters(Case("linear", method), 3)
    names = ["default", "number_1", "number_2", BASE]
    prepared = []
    kind = METHODS[method]
    original = kind.prepare
    monkeypatch.setattr(kind, "prepare", lambda self, *args: prepared.append(1) or original(self, *args))
    first = outputs(model, token_batch(4), adapter_names=names)
    assert len(prepared) == len(adapted_layers(model))  # once a layer, for all three adapters
    prepared.clear()
    assert torch.equal(outputs(model, token_batch(4), adapter_names=names), first)
    assert not prepared
    fill(model, "number_1", seed=77)
    changed = outputs(model, token_batch(4), adapter_names=names)
    assert len(prepared) == len(adapted_layers(model))
    assert torch.equal(changed[[0, 2, 3]], first[[0, 2, 3]])
    assert not torch.allclose(changed[1], first[1], atol=1e-3)
    torch.testing.assert_close(changed, each_alone(model, token_batch(4), names), rtol=1e-4, atol=1e-4)


def test_a_deleted_adapter_leaves_no_factors_behind():
    case = Case("linear", "nola")
    model = many_adapters(case, 3)
    names = ["default", "number_1", "number_2", BASE]
    outputs(model, token_batch(4), adapter_names=names)
    model.delete_adapter("number_2")
    add_adapter(model, "number_2", case.config(seed=3), 50)
    mixed = outputs(model, token_batch(4), adapter_names=names)
    torch.testing.assert_close(mixed, each_alone(model, token_batch(4), names), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ONE_EACH)
def test_half_precision_bases(method, dtype):
    case = Case("linear", method)
    model = get_peft_model(case.base().to(dtype), case.config())
    fill(model)
    add_adapter(model, "other", case.config(seed=3), 2)
    names = ["other", BASE, "default", "other"]
    mixed = outputs(model.eval(), token_batch(4), adapter_names=names)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, each_alone(model, token_batch(4), names), rtol=5e-2, atol=2e-2)


# --- refusals ---


def test_names_that_cannot_be_used():
    model = three_adapters(Case("linear", "nola"))
    expected = outputs(model, token_batch(2))
    with pytest.raises(AdapterNameError, match=r"non-existing adapter\(s\): defualt; did you mean default"):
        outputs(model, token_batch(2), adapter_names=["defualt", BASE])
    with pytest.raises(AdapterNameError, match="list with one name for each row, got the string 'default'"):
        outputs(model, token_batch(2), adapter_names="default")
    with pytest.raises(AdapterNameError, match="same as the number of inputs, but got 3 and 2"):
        outputs(model, token_batch(2), adapter_names=["default"] * 3)
    assert torch.equal(outputs(model, token_batch(2)), expected)


def test_training_mode_is_refused():
    model = three_adapters(Case("linear", "nola")).train()
    with pytest.raises(AdapterNameError, match=r"training mode. Call model.eval\(\) first"):
        outputs(model, token_batch(2), adapter_names=["default", BASE])


def test_merged_adapters_are_refused():
    model = three_adapters(Case("linear", "nola"))
    model.merge_adapter(["default"])
    with pytest.raises(AdapterNameError, match="merged"):
        outputs(model, token_batch(2), adapter_names=["default", BASE])
    model.unmerge_adapter()
    outputs(model, token_batch(2), adapter_names=["default", BASE])
