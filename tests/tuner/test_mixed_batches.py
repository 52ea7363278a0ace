"""Mixed batches: each row of a batch with its own adapter, as if it were alone."""

import threading

import pytest
import torch
from mixed_cases import BASE, each_alone, many_adapters
from peft import PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, GenerationConfig, XLNetConfig, XLNetModel
from tuner_cases import (
    BOUNDS,
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

from randbasis.errors import AdapterNameError


def three_adapters(case: Case) -> PeftModel:
    """Two on one basis, and one on a basis, rank and law of its own."""
    model = case.adapted()
    add_adapter(model, "same_basis", case.config(), 2)
    own = {"seed": 5, "law": "normal"} | ({} if case.method.startswith("pranc") else {"r": 4})
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


def test_nothing_is_left_behind_by_a_call_that_failed():
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


GENERATION = {
    "beams": {"num_beams": 3},
    "sequences": {"num_beams": 3, "num_return_sequences": 2},
    "more sequences than beams": {"do_sample": True, "num_return_sequences": 3, "top_k": 1},
}


@pytest.mark.parametrize("where", ["arguments", "given config", "model's config"])
@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_t5])
def test_rows_that_generation_makes_of_a_prompt(build, how, where):
    """Beams and returned sequences, wherever they are set: each row still has its adapter."""
    targets = {"tiny_llama": ["q_proj", "v_proj"], "tiny_gpt2": ["c_attn"], "tiny_t5": ["q", "v", "wo"]}
    model = get_peft_model(seeded(build), make_config("nola", targets[build.__name__]))
    fill(model, seed=1, size=1.0)
    add_adapter(model, "other", make_config("vera", targets[build.__name__], seed=4), 2)
    options = {"do_sample": False, "max_new_tokens": 5, **GENERATION[how]}
    names, batch = ["default", BASE, "other"], token_batch(3, 5)
    if where == "model's config":
        model.get_base_model().generation_config.update(**options)
        options = {}
    elif where == "given config":
        options = {"generation_config": GenerationConfig(**options)}

    def made(batch, **more):
        tokens = model.generate(**batch, **options, **more)
        return torch.nn.functional.pad(tokens, (0, 16 - tokens.shape[1]))

    rows = []
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        if name == BASE:
            with model.disable_adapter():
                rows.append(made(alone))
        else:
            model.set_adapter(name)
            rows.append(made(alone))
    assert torch.equal(made(batch, adapter_names=names), torch.cat(rows))


def test_names_of_another_number_than_the_prompts_are_refused_however_many_rows_they_make():
    model = three_adapters(Case("linear", "nola"))
    with pytest.raises(AdapterNameError, match="got 3 and 6"):
        model.generate(**token_batch(6), adapter_names=["default"] * 3, num_beams=2, max_new_tokens=2)
    model.get_base_model().generation_config.num_beams = 2
    with pytest.raises(AdapterNameError, match="got 3 and 6"):
        outputs(model, token_batch(6), adapter_names=["default"] * 3)


# --- which dimension has the rows ---


def tiny_xlnet() -> XLNetModel:
    return XLNetModel(XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48, dropout=0.0))


def hidden(model: PeftModel, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).last_hidden_state


@pytest.mark.parametrize("method", ONE_EACH)
def test_layers_that_see_tokens_first(method):
    model = get_peft_model(seeded(tiny_xlnet), make_config(method, ["layer_1", "layer_2"]), adapter_name="one")
    fill(model, "one")
    add_adapter(model, "two", make_config("nola", ["layer_1", "layer_2"], seed=5), 2)
    names = ["one", "two", BASE, "two"]
    for tokens in (6, 3, 1):
        ids = token_batch(4, tokens)["input_ids"]
        mixed = hidden(model.eval(), ids, adapter_names=names)
        for row, name in enumerate(names):
            if name == BASE:
                with model.disable_adapter():
                    alone = hidden(model, ids[row : row + 1])
            else:
                model.set_adapter(name)
                alone = hidden(model, ids[row : row + 1])
            torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterNameError, match="whether rows or tokens come first; make their numbers differ"):
        hidden(model, token_batch(4, 4)["input_ids"], adapter_names=names)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_phi3, tiny_t5])
def test_as_many_rows_as_tokens_where_rows_are_known_to_come_first(build):
    targets = {"tiny_llama": ["q_proj"], "tiny_gpt2": ["c_attn"], "tiny_phi3": ["qkv_proj[v]"], "tiny_t5": ["q", "wo"]}
    model = get_peft_model(seeded(build), make_config("nola", targets[build.__name__]))
    fill(model)
    add_adapter(model, "other", make_config("vera", targets[build.__name__]), 2)
    batch, names = token_batch(4, 4), ["default", BASE, "other", "default"]
    if build is tiny_t5:
        batch["decoder_input_ids"] = batch["input_ids"]
    mixed = outputs(model, batch, adapter_names=names)
    torch.testing.assert_close(mixed, each_alone(model, batch, names), rtol=1e-4, atol=1e-4)


def test_as_many_rows_as_tokens_are_refused_in_a_model_that_nobody_knows():
    model = three_adapters(Case("in_proj", "nola"))
    x = torch.randn(6, 6, 24, generator=torch.Generator().manual_seed(0))
    names = ["default", BASE] * 3
    with pytest.raises(AdapterNameError, match="add a row with the name '__base__'"):
        outputs(model, {"x": x}, adapter_names=names)
    with pytest.raises(AdapterNameError, match="got 6 and 4"):
        outputs(model, {"x": x[:4]}, adapter_names=names)  # tokens first, perhaps
    mixed = outputs(model, {"x": torch.cat([x, x[:1]])}, adapter_names=[*names, BASE])
    torch.testing.assert_close(mixed[:6], each_alone(model, {"x": x}, names), rtol=1e-4, atol=1e-4)


# --- threads ---


@pytest.mark.parametrize("method", ONE_EACH)
def test_threads_do_not_see_each_others_names(method):
    """Mixed and plain calls at the same time on one model, in step at every layer."""
    model = three_adapters(Case("linear", method))
    batch = token_batch(3)
    orders = [["default", "same_basis", BASE], ["own_basis", BASE, "default"], None]
    expected = [outputs(model, batch, **({"adapter_names": names} if names else {})) for names in orders]
    entered = threading.Barrier(len(orders), timeout=30)
    layers = model.get_base_model().model.layers

    def together(*_: object) -> None:
        entered.wait()

    hooks = [layer.register_forward_pre_hook(together) for layer in layers]
    found: list[list[torch.Tensor]] = [[] for _ in orders]

    def work(place: int) -> None:
        names = orders[place]
        for _ in range(5):
            found[place].append(outputs(model, batch, **({"adapter_names": names} if names else {})))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(orders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for hook in hooks:
        hook.remove()
    for mine, wanted in zip(found, expected, strict=True):
        assert len(mine) == 5
        for one in mine:
            torch.testing.assert_close(one, wanted, rtol=1e-6, atol=1e-6)


def test_names_that_reach_no_layer_are_refused():
    """As when the layers run in threads that the call did not come from: the answer would be the active adapter's."""
    model = three_adapters(Case("in_proj", "nola"))

    class Elsewhere(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = []
            with torch.no_grad():
                thread = threading.Thread(target=lambda: found.append(self.inner(x).detach()))
                thread.start()
                thread.join()
            return found[0]

    for name in ("qkv", "in_proj"):
        setattr(model.base_model.model, name, Elsewhere(getattr(model.base_model.model, name)))
    with pytest.raises(AdapterNameError, match="none ran there"):
        outputs(model, Case("in_proj", "nola").batch(3), adapter_names=["default", BASE, "default"])


# --- batched, not looped ---


class CountedOps(TorchDispatchMode):
    """How many tensor operations a block runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", PLAIN_CASES)
def test_operations_do_not_grow_with_the_number_of_adapters(case, monkeypatch):
    """One product serves all adapters of a kind: the same operations for 2 and for 8 distinct adapters."""
    model = many_adapters(case, 8)
    batch = case.batch(8)
    applied = []
    kind = BOUNDS[case.method]
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
    kind = BOUNDS[method]
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


@pytest.mark.parametrize("method", ONE_EACH)
def test_shuffled_batches_find_the_factors_of_every_adapter(method, monkeypatch):
    """One entry an adapter, whoever shares its batch: nothing is prepared twice, and memory grows with adapters."""
    model = many_adapters(Case("linear", method), 4)
    prepared = []
    kind = BOUNDS[method]
    original = kind.prepare
    monkeypatch.setattr(kind, "prepare", lambda self, *args: prepared.append(1) or original(self, *args))
    adapters = ["default", "number_1", "number_2", "number_3", BASE]
    outputs(model, token_batch(5), adapter_names=adapters)
    prepared.clear()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = torch.randint(len(adapters), (6,), generator=generator).tolist()
        outputs(model, token_batch(6), adapter_names=[adapters[row] for row in rows])
    assert not prepared
    for layer in adapted_layers(model).values():
        assert len(layer._cache._kept) == 4
        assert layer._cache.nbytes <= layer._cache.limit


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
