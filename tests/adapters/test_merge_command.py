"""Merged folders, read by plain transformers, against the model with its adapter; and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_bases import adapted, bert, gpt2, llama, saved
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedModel,
)
from typer.testing import CliRunner

from randbasis import NolaConfig, PrancConfig, RandbasisConfig, RandLoraConfig, VeraConfig
from randbasis.adapters.merging import merge_adapter
from randbasis.cli import app
from randbasis.errors import (
    AdapterFilesError,
    BaseMismatchError,
    CoefficientValueError,
    DataMissingError,
    HyperparameterError,
    OutputExistsError,
    SaveError,
)
from randbasis.files.output_set import replaced_set
from randbasis.tuner.config import LoraXsConfig
from randbasis.tuner.saved_files import HEAD_FILE

TOKENS = torch.arange(24).view(2, 12)
CONFIGS: list[RandbasisConfig] = [
    NolaConfig(r=2, num_basis=5, target_modules="all-linear", share_basis=False),
    NolaConfig(r=2, num_basis=5, target_modules=["c_attn[q,v]"]),
    VeraConfig(r=4, target_modules=["c_fc"]),
    RandLoraConfig(r=5, target_modules=["c_proj"]),
    PrancConfig(num_basis=3, target_modules=["c_attn"]),
    LoraXsConfig(r=4, target_modules=["c_attn[q,v]"]),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.method}-{sorted(config.target_modules)[0]}")
def test_language_model_against_the_adapted_one(config: RandbasisConfig, tmp_path: Path):
    base = saved(gpt2(), tmp_path / "base")
    want = adapted(gpt2(), config, tmp_path / "adapter")(TOKENS).logits
    merged = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(model(TOKENS).logits, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(gpt2()(TOKENS).logits, want, atol=1e-3)
    assert (merged.architecture, merged.head) == ("GPT2LMHeadModel", "none")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("w3 w5").input_ids == [3, 5]
    assert sorted(merged.files) == sorted(contents(tmp_path / "merged"))


def test_plain_transformers_loads_it_without_this_package(tmp_path: Path):
    base = saved(llama(), tmp_path / "base")
    adapted(llama(), NolaConfig(num_basis=4, target_modules="all-linear"), tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    code = (
        "import sys, transformers\n"
        f"transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'merged')!r})\n"
        "assert not {'randbasis', 'peft'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_classifier_keeps_its_trained_head_and_labels(tmp_path: Path):
    base = saved(bert(classes=5), tmp_path / "base")
    config = NolaConfig(num_basis=5, r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    model = bert(classes=3)
    model.bert.load_state_dict(bert(classes=5).bert.state_dict())
    want = adapted(model, config, tmp_path / "adapter")(TOKENS).logits
    labels = ["bad", "fair", "good"]
    merged = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", labels=labels)
    got = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(got(TOKENS).logits, want, rtol=1e-4, atol=1e-4)
    assert merged.head == "merged"
    assert list(got.config.id2label.values()) == labels


class Pooled(PreTrainedModel):
    """An encoder inside a classifier that transformers has no class for."""

    config_class = BertConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True

    def __init__(self, encoder: PreTrainedModel):
        super().__init__(encoder.config)
        self.encoder = encoder
        self.classifier = nn.Linear(16, 3)


def test_a_head_without_a_class_lies_beside_the_merged_encoder(tmp_path: Path):
    base = saved(bert(), tmp_path / "base")
    config = VeraConfig(
        r=4, target_modules="all-linear", exclude_modules=["classifier"], modules_to_save=["classifier"]
    )
    with torch.random.fork_rng(devices=()):
        wrapped = Pooled(bert())
    peft_model = adapted(wrapped, config, tmp_path / "adapter")
    merged = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert (merged.architecture, merged.head) == ("BertModel", "apart")
    got = AutoModel.from_pretrained(tmp_path / "merged")(TOKENS).last_hidden_state
    torch.testing.assert_close(got, peft_model.base_model.model.encoder(TOKENS).last_hidden_state, rtol=1e-4, atol=1e-4)
    head = load_file(tmp_path / "merged" / HEAD_FILE)
    trained = peft_model.base_model.model.classifier.modules_to_save["default"].weight
    torch.testing.assert_close(head["classifier.weight"], trained)


@pytest.mark.parametrize(("dtype", "stored"), [("auto", "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_dtype(dtype: str, stored: str, tmp_path: Path):
    base = saved(gpt2().bfloat16(), tmp_path / "base")
    adapted(gpt2(), CONFIGS[2], tmp_path / "adapter")
    assert merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", dtype=dtype).dtype == stored
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {f"torch.{stored}"}


def test_untouched_weights_keep_their_bits_and_the_random_state_its_own(tmp_path: Path):
    base = saved(gpt2(), tmp_path / "base")
    adapted(gpt2(), VeraConfig(r=4, target_modules=["c_fc"]), tmp_path / "adapter")
    state = torch.get_rng_state()
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert torch.equal(torch.get_rng_state(), state)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"transformer.h.{layer}.mlp.c_fc.weight" for layer in range(2)}


def test_image_classifier_of_real_weights(data_dir: Path, tmp_path: Path):
    base = str(data_dir / "vit_tiny_patch16_224")
    model = AutoModelForImageClassification.from_pretrained(base, dtype=torch.float32)
    names = [name for name, _ in model.named_modules()]
    targets = [name for name in names if name.endswith(("q_proj", "attention.query"))]
    pixels = torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224)
    with torch.no_grad():
        want = adapted(model, VeraConfig(r=8, target_modules=targets), tmp_path / "adapter")(pixels).logits
        merged = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
        got = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")(pixels).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert "preprocessor_config.json" in merged.files


# --- refusals leave everything as it was ---


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with a base, an adapter for it, and an output that is already there."""
    saved(gpt2(), tmp_path / "base")
    adapted(gpt2(), NolaConfig(num_basis=4, target_modules=["c_fc"]), tmp_path / "adapter")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("kept")
    return tmp_path


def merge_words(made: Path, output: str = "merged", adapter: str = "adapter", base: str = "base") -> list[str]:
    folders = {"--model": base, "--adapter": adapter, "--output": output}
    return ["merge", *(word for option, name in folders.items() for word in (option, str(made / name)))]


def test_an_existing_output_needs_overwrite(made: Path):
    before = contents(made)
    with pytest.raises(OutputExistsError, match="overwrite"):
        merge_adapter(str(made / "base"), made / "adapter", made / "there")
    assert CliRunner().invoke(app, merge_words(made, "there")).exit_code == 2
    assert contents(made) == before
    result = CliRunner().invoke(app, [*merge_words(made, "there"), "--overwrite", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["matrices"] == 2
    assert (made / "there" / "mine.txt").read_text() == "kept"
    assert sorted(path.name for path in made.iterdir()) == ["adapter", "base", "there"]


@pytest.mark.parametrize("output", ["base", "adapter", "base/config.json"])
def test_what_is_read_is_never_replaced(output: str, made: Path):
    before = contents(made)
    with pytest.raises(OutputExistsError, match=r"for both|must not lie inside of"):
        merge_adapter(str(made / "base"), made / "adapter", made / output, overwrite=True)
    assert contents(made) == before


OTHER_BASES = {
    "another shape": (lambda: gpt2(n_embd=32), r"'transformer\.h\.0\.mlp\.c_fc', 64×16 there and 128×32"),
    "another architecture": (llama, r"'transformer\.h\.0\.mlp\.c_fc'.* no such layer"),
    "fewer layers": (lambda: gpt2(n_layer=1), r"'transformer\.h\.1\.mlp\.c_fc'.* no such layer"),
    "more layers": (lambda: gpt2(n_layer=3), r"'transformer\.h\.2\.mlp\.c_fc', which the adapter has no coefficients"),
}


@pytest.mark.parametrize("case", OTHER_BASES)
def test_another_base_is_refused(case: str, made: Path):
    make, named = OTHER_BASES[case]
    saved(make(), made / "other")
    before = contents(made)
    with pytest.raises(BaseMismatchError, match=named):
        merge_adapter(str(made / "other"), made / "adapter", made / "there", overwrite=True)
    assert contents(made) == before
    assert CliRunner().invoke(app, merge_words(made, base="other")).exit_code == 2


def test_missing_and_foreign_adapters_are_refused(made: Path):
    with torch.random.fork_rng(devices=()):
        get_peft_model(gpt2(), LoraConfig(r=1, target_modules=["c_fc"])).save_pretrained(str(made / "lora"))
    for adapter, named in (
        ("nowhere", "nowhere"),
        ("base", "no adapter_config.json"),
        ("lora", "LORA adapter of PEFT"),
    ):
        with pytest.raises(AdapterFilesError, match=named):
            merge_adapter(str(made / "base"), made / adapter, made / "merged")
        assert CliRunner().invoke(app, merge_words(made, adapter=adapter)).exit_code == 2
    assert not (made / "merged").exists()


def test_a_missing_base_and_an_unknown_dtype_are_refused(made: Path):
    with pytest.raises(DataMissingError, match="nowhere"):
        merge_adapter(str(made / "nowhere"), made / "adapter", made / "merged")
    with pytest.raises(HyperparameterError, match="float32"):
        merge_adapter(str(made / "base"), made / "adapter", made / "merged", dtype="float31")
    (made / "base" / "model.safetensors").unlink()
    with pytest.raises(DataMissingError, match="weights"):
        merge_adapter(str(made / "base"), made / "adapter", made / "merged")
    assert not (made / "merged").exists()


def test_values_that_are_not_finite_are_refused(made: Path):
    model = gpt2()
    peft_model = get_peft_model(model, NolaConfig(num_basis=4, target_modules=["c_fc"]))
    next(p for p in peft_model.parameters() if p.requires_grad).data.fill_(torch.inf)
    peft_model.save_pretrained(str(made / "broken"))
    with pytest.raises(CoefficientValueError, match="not finite"):
        merge_adapter(str(made / "base"), made / "broken", made / "there", overwrite=True)
    assert contents(made / "there") == {"mine.txt": b"kept"}


def test_a_failed_write_keeps_what_was_there(made: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    before = contents(made)
    with pytest.raises(SaveError, match="No space left"):
        merge_adapter(str(made / "base"), made / "adapter", made / "there", overwrite=True)
    assert contents(made) == before
    assert CliRunner().invoke(app, [*merge_words(made, "there"), "--overwrite"]).exit_code == 1


def test_an_interrupted_write_keeps_what_was_there(tmp_path: Path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").write_text("old")

    def interrupted() -> None:
        with replaced_set(tmp_path / "there") as stage:
            (stage / "new").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(tmp_path) == {"there/old": b"old"}
    with replaced_set(tmp_path / "there") as stage:
        (stage / "new").write_text("whole")
    assert contents(tmp_path) == {"there/new": b"whole", "there/old": b"old"}


def test_bare_encoder(tmp_path: Path):
    base = saved(bert(), tmp_path / "base")
    want = adapted(bert(), NolaConfig(num_basis=5, target_modules=["query", "value"]), tmp_path / "adapter")(TOKENS)
    merged = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    got = BertModel.from_pretrained(tmp_path / "merged")(TOKENS)
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, rtol=1e-4, atol=1e-4)
    assert merged.architecture == "BertModel"
