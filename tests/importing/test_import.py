"""Imports of whole directories: what was written is loaded, by us and by plain PEFT and transformers, and compared."""

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from peft_adapters import TOKENS, adapted, bert, contents, gpt2, llama, logits, peft_deltas, rewrite
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedModel,
)

from randbasis import NolaConfig, PrancConfig, RandbasisConfig, RandbasisLinear, RandLoraConfig, VeraConfig
from randbasis.adapter_file import read
from randbasis.adapters.packed import pack_adapter
from randbasis.arithmetic import difference
from randbasis.errors import (
    BaseMismatchError,
    CoefficientValueError,
    DataMissingError,
    ExportRankError,
    HyperparameterError,
    OutputExistsError,
    RankError,
    ResidualError,
    UnknownMethodError,
)
from randbasis.export import export_peft_lora
from randbasis.importing import import_as_lora, import_as_merged, import_as_nearest
from randbasis.methods import Site
from randbasis.tuner.saved_files import HEAD_FILE

LINEAR = ["q_proj", "v_proj", "down_proj"]
OURS: dict[str, RandbasisConfig] = {
    "nola": NolaConfig(r=3, num_basis=6, num_basis_b=5, alpha=2.0, seed=9),
    "nola-own-basis": NolaConfig(r=3, num_basis=6, share_basis=False, seed=9, rank_pattern={"down_proj": 2}),
    "vera": VeraConfig(r=7, seed=9, law="normal"),
}
ANY = OURS | {"pranc": PrancConfig(num_basis=9, seed=9, num_basis_pattern={"down_proj": 11})}


def our_deltas(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: layer.get_delta_weight("default").detach().double()
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, RandbasisLinear)
    }


def lora_of(config: RandbasisConfig, folder: Path, alpha: float = 3.0) -> None:
    """A LoRA directory of PEFT whose ΔW are those of one of our adapters, built from the method's factors."""
    ranks = {"down_proj": 2} if config.rank_pattern else {}
    own = peft.LoraConfig(r=config.r, lora_alpha=alpha, target_modules=LINEAR, rank_pattern=ranks)
    model = peft.get_peft_model(llama(), own)
    generator = torch.Generator().manual_seed(4)
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, peft.tuners.lora.Linear):
            continue
        method = config.method_for(name)
        matrix = Site(layer.out_features, layer.in_features, method.streams(name))
        shapes = method.coefficient_shapes(layer.out_features, layer.in_features)
        values = {n: 0.3 * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
        factors = method.bind(matrix).factors(values)
        assert factors.up is not None
        layer.lora_A["default"].weight.data = factors.down.float()
        layer.lora_B["default"].weight.data = (factors.up * layer.r["default"] / alpha).float()
    model.save_pretrained(str(folder))


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    adapted(llama(), peft.LoraConfig(r=3, target_modules=LINEAR), tmp_path / "lora")
    return tmp_path / "lora"


def based(build: Any, tmp_path: Path) -> Any:
    """A base model in a folder, and itself as if loaded from there."""
    base = build()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    return base


@pytest.mark.parametrize("name", OURS)
def test_a_lora_of_the_same_seed_is_found_again(name: str, tmp_path: Path):
    lora_of(OURS[name], tmp_path / "lora")
    found = import_as_nearest(tmp_path / "lora", tmp_path / "ours", OURS[name])
    assert found.residual < 1e-6
    assert (len(found.matrices), found.head, found.source) == (6, 0, "LoRA")
    theirs = PeftModel.from_pretrained(llama(), str(tmp_path / "lora")).eval()
    ours = PeftModel.from_pretrained(llama(), str(tmp_path / "ours")).eval()
    expected = peft_deltas(theirs)
    for key, delta in our_deltas(ours).items():
        torch.testing.assert_close(delta, expected[key], rtol=0, atol=1e-6 * float(expected[key].norm()))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(ours), logits(llama()), atol=1e-2)


@pytest.mark.parametrize("name", ANY)
def test_residuals_of_any_lora_against_the_loaded_models(name: str, lora: Path, tmp_path: Path):
    found = import_as_nearest(lora, tmp_path / "ours", ANY[name])
    expected = peft_deltas(PeftModel.from_pretrained(llama(), str(lora)))
    reached = our_deltas(PeftModel.from_pretrained(llama(), str(tmp_path / "ours")))
    for one in found.matrices:
        left = (expected[one.name] - reached[one.name]).norm() / expected[one.name].norm()
        assert one.residual == pytest.approx(float(left), rel=1e-4)
    lost = math.hypot(*(float((expected[key] - reached[key]).norm()) for key in expected))
    total = lost / math.hypot(*(float(delta.norm()) for delta in expected.values()))
    assert found.residual == pytest.approx(total, rel=1e-4)
    assert total <= found.worst.residual == max(one.residual for one in found.matrices) < 1
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert found.coefficients == sum(tensor.numel() for tensor in stored.values() if tensor.is_floating_point())
    document = json.loads(json.dumps(found.as_json()))
    assert document["source_parameters"] == 2 * 3 * (32 + 32 + 32 + 16 + 32 + 48)
    assert len(document["rows"]) == document["matrices"] == 6


@pytest.mark.parametrize("name", ANY)
def test_the_written_directory_packs(name: str, lora: Path, tmp_path: Path):
    llama().save_pretrained(tmp_path / "base")
    import_as_nearest(lora, tmp_path / "ours", ANY[name], model=str(tmp_path / "base"))
    pack_adapter(tmp_path / "ours", tmp_path / "ours.safetensors", bits=32, base_name="base")
    spec = read(tmp_path / "ours.safetensors").spec
    assert (spec.size, spec.method.name, spec.base.architecture) == (6, ANY[name].method, "llama")


def test_a_head_comes_along(tmp_path: Path):
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    adapted(bert(), config, tmp_path / "lora")
    found = import_as_nearest(tmp_path / "lora", tmp_path / "ours", NolaConfig(r=2, num_basis=4))
    assert found.head == 2
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "ours"))
    heads = [name for name in theirs if "classifier" in name]
    assert len(heads) == 2
    assert all(torch.equal(ours[name], theirs[name]) for name in heads)
    model = PeftModel.from_pretrained(bert(), str(tmp_path / "ours"))
    trained = model.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(trained, theirs["base_model.model.classifier.weight"])


def test_conv1d_layers_and_regular_expressions(tmp_path: Path):
    config = peft.LoraConfig(r=2, target_modules=r".*\.(c_attn|c_fc)", fan_in_fan_out=True)
    expected = peft_deltas(adapted(gpt2(), config, tmp_path / "lora"))
    found = import_as_nearest(tmp_path / "lora", tmp_path / "ours", VeraConfig(r=64))
    model = PeftModel.from_pretrained(gpt2(), str(tmp_path / "ours"))
    for one in found.matrices:
        delta = our_deltas(model)[one.name].T
        left = (expected[one.name] - delta).norm() / expected[one.name].norm()
        assert one.residual == pytest.approx(float(left), rel=1e-4)


@pytest.mark.parametrize("config", [peft.VeraConfig, peft.RandLoraConfig], ids=["vera", "randlora"])
@pytest.mark.parametrize("name", OURS)
def test_vera_and_randlora_of_peft_become_the_nearest_too(name: str, config: Any, tmp_path: Path):
    expected = peft_deltas(adapted(based(llama, tmp_path), config(r=5, target_modules=LINEAR), tmp_path / "theirs"))
    found = import_as_nearest(tmp_path / "theirs", tmp_path / "ours", OURS[name])
    reached = our_deltas(PeftModel.from_pretrained(llama(), str(tmp_path / "ours")))
    for one in found.matrices:
        left = (expected[one.name] - reached[one.name]).norm() / expected[one.name].norm()
        assert one.residual == pytest.approx(float(left), rel=1e-4)
        assert one.residual < 1


def test_a_residual_above_the_limit_writes_nothing(lora: Path, tmp_path: Path):
    (tmp_path / "ours").mkdir()
    with pytest.raises(ResidualError, match=r"limit 0\.5 .* is 0\.9\d+ away and was not written"):
        import_as_nearest(lora, tmp_path / "ours", OURS["nola"], limit=0.5)
    assert not contents(tmp_path / "ours")
    assert import_as_nearest(lora, tmp_path / "ours", OURS["nola"], limit=1.0).residual < 1


def test_what_cannot_be_imported_is_refused(lora: Path, tmp_path: Path):
    with pytest.raises(UnknownMethodError, match="'nola', 'vera', 'pranc', got 'randlora'"):
        import_as_nearest(lora, tmp_path / "ours", RandLoraConfig(r=3))
    with pytest.raises(OutputExistsError, match="must not be the folder that is read from"):
        import_as_nearest(lora, lora, OURS["nola"], overwrite=True)
    gpt2().save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="no such linear layer"):
        import_as_nearest(lora, tmp_path / "ours", OURS["nola"], model=str(tmp_path / "other"))
    rewrite(lora, lambda tensors: next(iter(tensors.values())).fill_(math.nan))
    with pytest.raises(CoefficientValueError, match="must be finite"):
        import_as_nearest(lora, tmp_path / "ours", OURS["nola"])
    assert not (tmp_path / "ours").exists()


VERA = peft.VeraConfig(r=5, target_modules=LINEAR)
RANDLORA = peft.RandLoraConfig(r=5, target_modules=LINEAR, randlora_alpha=10)


def test_vera_of_peft_as_lora_is_exact(tmp_path: Path):
    model = adapted(based(llama, tmp_path), VERA, tmp_path / "vera")
    written = import_as_lora(tmp_path / "vera", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert written.error < 1e-6
    assert {pair.rank for pair in written.pairs} == {5}
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.target_modules) == (5, 5, set(LINEAR))


def test_randlora_of_peft_as_lora_is_the_nearest_of_its_rank(tmp_path: Path):
    model = adapted(based(llama, tmp_path), RANDLORA, tmp_path / "randlora")
    expected = peft_deltas(model)
    with pytest.raises(ExportRankError, match="RandLoRA, whose ΔW has full rank"):
        import_as_lora(tmp_path / "randlora", tmp_path / "lora")
    with pytest.raises(RankError, match="rank must be a positive integer"):
        import_as_lora(tmp_path / "randlora", tmp_path / "lora", rank=0)
    written = import_as_lora(tmp_path / "randlora", tmp_path / "lora", rank=4)
    for pair in written.pairs:
        values = torch.linalg.svdvals(expected[pair.name])
        best = float(values[4:].norm() / values.norm())
        assert pair.error == pytest.approx(best, rel=1e-4)
    found = peft_deltas(PeftModel.from_pretrained(llama(), str(tmp_path / "lora")))
    lost = math.hypot(*(float((found[key] - expected[key]).norm()) for key in expected))
    assert written.error == pytest.approx(lost / math.hypot(*(float(d.norm()) for d in expected.values())), rel=1e-4)
    with pytest.raises(ResidualError, match="the nearest LoRA of rank 4"):
        import_as_lora(tmp_path / "randlora", tmp_path / "never", rank=4, limit=0.01)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("rank", [16, 32])
def test_randlora_as_lora_of_the_whole_rank_gives_its_logits(rank: int, tmp_path: Path):
    # The narrowest layer has 16 rows, the others 32.
    model = adapted(based(llama, tmp_path), RANDLORA, tmp_path / "randlora")
    import_as_lora(tmp_path / "randlora", tmp_path / "lora", rank=rank)
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path / "lora")).eval()
    same = torch.allclose(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)
    assert same == (rank == 32)


@pytest.mark.parametrize(
    "config", [VERA, RANDLORA, peft.LoraConfig(r=3, target_modules=LINEAR)], ids=lambda c: c.peft_type.value
)
def test_merged_gives_the_logits_of_peft(config: peft.PeftConfig, tmp_path: Path):
    model = adapted(based(llama, tmp_path), config, tmp_path / "adapter")
    merged = import_as_merged(tmp_path / "adapter", tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(loaded), logits(llama()), atol=1e-2)
    assert (merged.architecture, merged.matrices, merged.head) == ("LlamaForCausalLM", 6, "none")


def test_merged_conv1d_in_another_dtype(tmp_path: Path):
    config = peft.VeraConfig(r=5, target_modules=["c_attn", "c_fc"])
    model = adapted(based(gpt2, tmp_path), config, tmp_path / "adapter")
    import_as_merged(tmp_path / "adapter", tmp_path / "merged", dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert loaded.dtype == torch.bfloat16
    torch.testing.assert_close(logits(loaded).float(), logits(model), rtol=0.1, atol=0.1)


def test_merged_classifier_keeps_the_trained_head(tmp_path: Path):
    config = peft.VeraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    model = adapted(based(bert, tmp_path), config, tmp_path / "adapter")
    merged = import_as_merged(tmp_path / "adapter", tmp_path / "merged")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert (merged.architecture, merged.head) == ("BertForSequenceClassification", "merged")


class Pooled(PreTrainedModel):
    """An encoder inside a classifier that transformers has no class for."""

    config_class = BertConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__(encoder.config)
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, 3)


def test_a_head_without_a_class_lies_beside_the_merged_encoder(tmp_path: Path):
    encoder = bert().bert
    encoder.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=["query"], modules_to_save=["classifier"])
    with torch.random.fork_rng(devices=()):
        wrapped = Pooled(encoder)
    model = adapted(wrapped, config, tmp_path / "adapter")
    merged = import_as_merged(tmp_path / "adapter", tmp_path / "merged", model=str(tmp_path / "base"))
    assert (merged.architecture, merged.head) == ("BertModel", "apart")
    loaded = AutoModel.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = model.base_model.model.encoder(TOKENS).last_hidden_state
        torch.testing.assert_close(loaded(TOKENS).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    trained = model.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(load_file(tmp_path / "merged" / HEAD_FILE)["classifier.weight"], trained)


def test_what_cannot_be_merged_is_refused(lora: Path, tmp_path: Path):
    with pytest.raises(HyperparameterError, match="dtype must be one of"):
        import_as_merged(lora, tmp_path / "merged", dtype="float8")
    with pytest.raises(DataMissingError, match="does not name its base model"):
        import_as_merged(lora, tmp_path / "merged")
    gpt2().save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="no class of transformers for 'gpt2'"):
        import_as_merged(lora, tmp_path / "merged", model=str(tmp_path / "other"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", OURS)
def test_an_exported_adapter_comes_back(name: str, tmp_path: Path):
    model = peft.get_peft_model(llama(), type(OURS[name])(**OURS[name].to_dict() | {"target_modules": LINEAR}))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(tmp_path / "ours"))
    export_peft_lora(tmp_path / "ours", tmp_path / "lora")
    import_as_nearest(tmp_path / "lora", tmp_path / "back", OURS[name], limit=1e-6)
    apart = difference(tmp_path / "ours", tmp_path / "back")
    assert apart.other_basis is None
    assert apart.total.relative is not None
    assert apart.total.relative < 1e-6
