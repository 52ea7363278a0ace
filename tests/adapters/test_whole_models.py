"""Merged models against base and adapter, and what is refused because half a model would come out of it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_bases import adapted, bert, gpt2, llama, saved
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from randbasis import NolaConfig, PrancConfig, RandbasisConfig, RandLoraConfig, VeraConfig
from randbasis.adapters.merging import merge_adapter
from randbasis.adapters.packed import pack_adapter
from randbasis.adapters.putting import load_packed
from randbasis.errors import BaseMismatchError, MergeError, PartialModelError
from randbasis.export import export_merged
from randbasis.train.pooled import PooledClassifier
from randbasis.tuner.saved_files import HEAD_FILE

pytestmark = pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning")
TOKENS = torch.arange(24).view(2, 12)
METHODS: dict[str, Callable[..., RandbasisConfig]] = {
    "nola": lambda **options: NolaConfig(r=2, num_basis=5, **options),
    "vera": lambda **options: VeraConfig(r=4, **options),
    "randlora": lambda **options: RandLoraConfig(r=5, **options),
    "pranc": lambda **options: PrancConfig(num_basis=3, **options),
}
QUERY = {"gpt2": "c_attn", "llama": "q_proj", "t5": "q", "bert": "query"}


def t5(**options: Any) -> PreTrainedModel:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32, **options}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def masked_bert() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return BertForMaskedLM(BertConfig(**sizes, vocab_size=32, max_position_embeddings=16)).eval()


BASES: dict[str, Callable[..., PreTrainedModel]] = {"gpt2": gpt2, "llama": llama, "t5": t5}


def logits(model: Any) -> Tensor:
    inputs = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, **inputs).logits


def resized(model: PreTrainedModel, tokens: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


def reloaded(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(__import__("transformers"), kind).from_pretrained(folder, output_loading_info=True)


def assert_whole(folder: Path, architecture: type[PreTrainedModel], want: Tensor) -> None:
    model, report = reloaded(folder)
    assert type(model) is architecture
    assert not any(report.values()), report
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("packed", [False, True], ids=["directory", "packed"])
def test_a_vocabulary_that_was_resized_is_kept(method: str, family: str, packed: bool, tmp_path: Path):
    make, base = BASES[family], saved(BASES[family](), tmp_path / "base")
    model = resized(make(), 35)
    model.name_or_path = base
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    config = METHODS[method](target_modules=[QUERY[family]], task_type=task)
    want = logits(adapted(model, config, tmp_path / "adapter"))
    source = tmp_path / "adapter"
    if packed:
        source = tmp_path / "file.safetensors"
        pack_adapter(tmp_path / "adapter", source, bits=32, base_name="base")
        with pytest.raises(BaseMismatchError, match=r"35 tokens.*32.*resize_token_embeddings\(35\)"):
            load_packed(make(), source)
        torch.testing.assert_close(logits(load_packed(resized(make(), 35), source)), want)
    done = export_merged(source, tmp_path / "merged", base=base)
    assert_whole(tmp_path / "merged", type(model), want)
    assert done.head == "merged"
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 35


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("whole", [None, ["embed_tokens"]])
def test_an_adapter_of_another_vocabulary_leaves_the_base_as_it_was(
    method: str, whole: list[str] | None, tmp_path: Path
):
    config = METHODS[method](target_modules=["q_proj"], modules_to_save=whole, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=()):
        model = get_peft_model(resized(llama(), 35), config)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    pack_adapter(tmp_path / "adapter", tmp_path / "file", bits=32)
    for load in (PeftModel.from_pretrained, load_packed):
        base = llama()
        before = {name: (type(module), module.training) for name, module in base.named_modules()}
        source = tmp_path / ("file" if load is load_packed else "adapter")
        with pytest.raises(BaseMismatchError, match=r"35 tokens.*32.*resize_token_embeddings\(35\)"):
            load(base, source)
        assert {name: (type(module), module.training) for name, module in base.named_modules()} == before
        assert all(parameter.requires_grad for parameter in base.parameters())
        torch.testing.assert_close(logits(load(resized(llama(), 35), source)), logits(model))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapted_output_layer_and_its_base_are_kept(family: str, tmp_path: Path):
    base = saved(BASES[family](tie_word_embeddings=False), tmp_path / "base")
    model = BASES[family](tie_word_embeddings=False)
    config = NolaConfig(r=2, num_basis=5, target_modules=[QUERY[family], "lm_head"])
    want = logits(adapted(model, config, tmp_path / "adapter"))
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert_whole(tmp_path / "merged", type(model), want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapper", ["_orig_mod", "module"])
def test_an_adapter_of_a_wrapped_model_keeps_the_model_whole(method: str, wrapper: str, tmp_path: Path):
    class Wrapped(nn.Module):
        def __init__(self, model: PreTrainedModel):
            super().__init__()
            self.config = model.config
            setattr(self, wrapper, model)

        def forward(self, *args: Any, **options: Any) -> Any:
            return getattr(self, wrapper)(*args, **options)

    base = saved(llama(), tmp_path / "base")
    wrapped = adapted(Wrapped(llama()), METHODS[method](target_modules=["q_proj"]), tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert_whole(tmp_path / "merged", type(llama()), logits(wrapped))


class WithValue(nn.Module):
    """A language model with a head that transformers has no class for."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.config, self.llm, self.value = model.config, model, nn.Linear(16, 1)

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.llm(*args, **options)


def test_a_head_of_nobody_lies_beside_a_whole_language_model(tmp_path: Path):
    base = saved(llama(), tmp_path / "base")
    config = NolaConfig(r=2, num_basis=5, target_modules=["q_proj"], modules_to_save=["value"])
    with torch.random.fork_rng(devices=()):
        model = adapted(WithValue(llama()), config, tmp_path / "adapter")
    done = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert done.head == "apart"
    assert load_file(tmp_path / "merged" / HEAD_FILE).keys() == {"value.weight", "value.bias"}
    assert_whole(tmp_path / "merged", type(llama()), logits(model))


def test_the_head_of_the_base_is_kept_by_an_adapter_of_its_backbone(tmp_path: Path):
    saved(llama(), tmp_path / "llama")
    backbone = LlamaModel.from_pretrained(tmp_path / "llama")
    adapted(backbone, NolaConfig(r=2, num_basis=5, target_modules=["q_proj"]), tmp_path / "adapter")
    want = llama()
    PeftModel.from_pretrained(want.model, tmp_path / "adapter").merge_and_unload()
    merge_adapter(str(tmp_path / "llama"), tmp_path / "adapter", tmp_path / "merged")
    assert_whole(tmp_path / "merged", type(llama()), logits(want))


def test_an_encoder_under_a_head_of_ours_keeps_the_masked_head_of_its_base(tmp_path: Path):
    base = saved(masked_bert(), tmp_path / "base")
    with torch.random.fork_rng(devices=()):
        pooled = PooledClassifier.from_encoder(base, num_labels=2, pooling="mean", dtype="float32")
    config = VeraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"])
    encoder = adapted(pooled, config, tmp_path / "adapter").base_model.model.encoder
    done = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert (done.architecture, done.head) == ("BertForMaskedLM", "apart")
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        want = encoder(TOKENS).last_hidden_state
    torch.testing.assert_close(merged.bert(TOKENS).last_hidden_state, want, rtol=1e-4, atol=1e-4)
    assert all(
        torch.equal(new, old) for new, old in zip(merged.cls.parameters(), masked_bert().cls.parameters(), strict=True)
    )


# --- checkpoints that are not whole ---


def edited(base: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> str:
    file = base / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    return str(base)


def without(end: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}


def under(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def with_more(end: str, name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {name: next(t for n, t in tensors.items() if n.endswith(end)).clone()}


def longer(end: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {n: torch.cat([t, t[:3]]) if n.endswith(end) else t for n, t in tensors.items()}


BROKEN = {
    "a weight is missing": (without("layers.1.mlp.up_proj.weight"), r"no weights for model\.layers\.1\.mlp\.up_proj"),
    "the output layer is missing": (without("lm_head.weight"), r"no weights for lm_head\.weight"),
    "torch.compile's names": (under("_orig_mod."), r"begin with '_orig_mod\.'.*model\._orig_mod"),
    "DataParallel's names": (under("module."), r"begin with 'module\.'"),
    "more layers": (
        with_more("layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"),
        r"it has model\.layers\.2\.mlp\.up_proj\.weight too",
    ),
    "another head": (with_more("norm.weight", "value.weight"), r"it has value\.weight too"),
    "a resized vocabulary": (longer("embed_tokens.weight"), r"embed_tokens\.weight of shape \[32, 16\] and not \[35"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name(method: str, case: str, tmp_path: Path):
    edit, named = BROKEN[case]
    saved(llama(tie_word_embeddings=False), tmp_path / "base")
    model = llama(tie_word_embeddings=False)
    adapted(model, METHODS[method](target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path / "adapter")
    base = edited(tmp_path / "base", edit)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model.safetensors").write_text("old")
    with pytest.raises(PartialModelError, match=named):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "there", overwrite=True)
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["model.safetensors"]


def test_a_head_that_the_adapter_brings_may_be_missing_but_nothing_else(tmp_path: Path):
    config = NolaConfig(r=2, num_basis=5, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    model = bert(classes=3)
    base = Path(saved(bert(classes=3), tmp_path / "base"))
    want = logits(adapted(model, config, tmp_path / "adapter"))
    edited(base, lambda tensors: without("classifier.weight")(without("classifier.bias")(tensors)))
    merge_adapter(str(base), tmp_path / "adapter", tmp_path / "merged")
    assert_whole(tmp_path / "merged", type(model), want)
    edited(base, without("pooler.dense.weight"))
    with pytest.raises(PartialModelError, match=r"bert\.pooler\.dense\.weight"):
        merge_adapter(str(base), tmp_path / "adapter", tmp_path / "other")


@pytest.mark.parametrize("method", METHODS)
def test_a_sum_that_is_not_finite_in_the_dtype_is_refused(method: str, tmp_path: Path):
    """The base and the change fit into float16, and their sum does not."""
    model = llama().half()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.fill_(65504.0)
    saved(model, tmp_path / "base")
    with torch.random.fork_rng(devices=()):
        peft_model = get_peft_model(llama(), METHODS[method](target_modules=["q_proj"]))
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(20.0)
    peft_model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(MergeError, match="finite"):
        merge_adapter(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged", dtype="float16")
    assert not (tmp_path / "merged").exists()


def test_the_tokenizer_that_lies_beside_the_adapter_goes_with_the_model(tmp_path: Path):
    base = saved(llama(), tmp_path / "base")
    adapted(llama(), NolaConfig(num_basis=4, target_modules=["q_proj"]), tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / name).write_bytes((tmp_path / "base" / name).read_bytes() + b"\n")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_plain_transformers_reads_what_was_merged(tmp_path: Path):
    base = saved(llama(), tmp_path / "base")
    adapted(llama(), NolaConfig(num_basis=4, target_modules=["q_proj"]), tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    code = (
        "import sys, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'merged')!r})\n"
        "assert not {'randbasis', 'peft'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")),
        logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")),
        rtol=1e-4,
        atol=1e-4,
    )
