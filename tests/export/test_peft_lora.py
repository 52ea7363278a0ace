"""LoRA directories, loaded by plain PEFT in a process without this package, against the adapters that they are of."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_bases import adapted, bert, gpt2, llama, saved
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from randbasis import NolaConfig, PrancConfig, RandbasisConfig, RandLoraConfig, VeraConfig
from randbasis.adapters.packed import exact, pack_adapter
from randbasis.adapters.putting import load_packed
from randbasis.adapters.saved import open_folder
from randbasis.errors import (
    AdapterFilesError,
    AdapterMissingError,
    BaseMismatchError,
    DataMissingError,
    ExportRankError,
    HyperparameterError,
    OutputExistsError,
    SaveError,
)
from randbasis.export import export_peft_lora
from randbasis.train.pooled import PooledClassifier

TOKENS = torch.arange(24).view(2, 12)


def phi3() -> PreTrainedModel:
    """Query, key and value are one layer, and gate and up another."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Phi3ForCausalLM(Phi3Config(**sizes, **heads, bos_token_id=0, eos_token_id=0, pad_token_id=0)).eval()


def scoring_llama(classes: int = 3) -> PreTrainedModel:
    """A decoder whose head scores the last token."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**sizes, **heads, num_labels=classes, pad_token_id=31)).eval()


def vit(classes: int = 3) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=classes)).eval()


@dataclass
class Case:
    make: Callable[[], PreTrainedModel]
    config: RandbasisConfig
    auto: str = "AutoModelForCausalLM"
    options: dict[str, Any] = field(default_factory=dict)
    rank: int | None = None
    ranks: tuple[int, ...] = ()
    inputs: dict[str, Any] = field(default_factory=lambda: {"input_ids": TOKENS})


SCORE: dict[str, Any] = {"modules_to_save": ["score"], "exclude_modules": ["score"], "task_type": "SEQ_CLS"}
SCORED: dict[str, Any] = {"auto": "AutoModelForSequenceClassification", "options": {"num_labels": 3}}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)}
HEAD: dict[str, Any] = {"modules_to_save": ["classifier"], "exclude_modules": ["classifier"], "task_type": "SEQ_CLS"}
CLASSIFIER: dict[str, Any] = {"auto": "AutoModelForSequenceClassification", "options": {"num_labels": 3}}
CASES = {
    "nola": Case(llama, NolaConfig(r=3, num_basis=5, alpha=2.0, target_modules="all-linear"), ranks=(3,)),
    "nola of some layers": Case(
        llama, NolaConfig(r=3, num_basis=5, target_modules=["q_proj"], layers_to_transform=[1]), ranks=(3,)
    ),
    "vera by a pattern": Case(llama, VeraConfig(r=20, target_modules=r".*\.[01]\.mlp\.(up|down)_proj"), ranks=(20,)),
    "conv1d and slices": Case(
        gpt2,
        NolaConfig(
            r=2, num_basis=5, share_basis=False, target_modules=["c_attn[q,v]", "c_fc"], rank_pattern={"1.mlp.c_fc": 3}
        ),
        ranks=(2, 3, 4),
    ),
    "quantized in training": Case(
        llama, NolaConfig(r=3, num_basis=9, target_modules=["q_proj", "v_proj"], quantize_coefficients=3), ranks=(3,)
    ),
    "slices": Case(phi3, VeraConfig(r=5, target_modules=["qkv_proj[q,v]", "gate_up_proj[up]"]), ranks=(5, 10)),
    "head": Case(
        lambda: bert(classes=3),
        NolaConfig(r=2, num_basis=5, target_modules=["query"], **HEAD),
        **CLASSIFIER,
        ranks=(2,),
    ),
    "head and biases": Case(
        lambda: bert(classes=3),
        VeraConfig(r=4, target_modules="all-linear", bias="all", **HEAD),
        **CLASSIFIER,
        ranks=(4,),
    ),
    "nola of a decoder that scores": Case(
        scoring_llama, NolaConfig(r=2, num_basis=5, target_modules=["q_proj"], **SCORE), **SCORED, ranks=(2,)
    ),
    "vera of a regression": Case(
        lambda: bert(classes=1),
        VeraConfig(r=4, target_modules=["value"], **HEAD),
        auto="AutoModelForSequenceClassification",
        options={"num_labels": 1},
        ranks=(4,),
    ),
    "randlora of images": Case(
        vit,
        RandLoraConfig(
            r=4, target_modules="all-linear", modules_to_save=["classifier"], exclude_modules=["classifier"]
        ),
        auto="AutoModelForImageClassification",
        options={"num_labels": 3},
        rank=16,
        ranks=(16,),
        inputs=PIXELS,
    ),
    "pranc of a decoder that scores": Case(
        scoring_llama, PrancConfig(num_basis=3, target_modules=["v_proj"], **SCORE), **SCORED, rank=16, ranks=(8,)
    ),
    "randlora of full rank": Case(llama, RandLoraConfig(r=5, target_modules="all-linear"), rank=16, ranks=(8, 16)),
    "pranc of full rank": Case(gpt2, PrancConfig(num_basis=5, target_modules=["c_attn[q]"]), rank=16, ranks=(16,)),
}
REAL = ["MiniLM", "stories", "ViT", "MiniLM under a head", "packed"]


def real_cases(data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Pretrained weights; the adapters as if trained; what they answer; and their exports."""
    made: dict[str, dict[str, Any]] = {}

    def case(name: str, auto: str, model: Any, config: RandbasisConfig, inputs: dict[str, Any]) -> Any:
        peft_model = adapted(model, config, folder / name / "adapter")
        export_peft_lora(folder / name / "adapter", folder / name / "lora")
        base = model.name_or_path
        made[name] = {
            "auto": auto,
            "base": base,
            "options": {},
            "inputs": inputs,
            "adapter": str(folder / name / "lora"),
        }
        return peft_model

    with torch.no_grad():
        inputs: dict[str, Any] = {"input_ids": torch.arange(1000, 1024).view(2, 12)}
        encoder = AutoModel.from_pretrained(str(data / "minilm_l6_h384"), dtype=torch.float32)
        small = NolaConfig(r=4, num_basis=32, target_modules=["query", "value"])
        made_by = case("MiniLM", "AutoModel", encoder, small, inputs)
        made["MiniLM"]["want"] = made_by(**inputs)[0]

        with torch.random.fork_rng(devices=()):
            pooled = PooledClassifier.from_encoder(encoder.name_or_path, num_labels=2, pooling="mean", dtype="float32")
        under = VeraConfig(
            r=8, target_modules="all-linear", modules_to_save=["classifier"], exclude_modules=["classifier"]
        )
        made_by = case("MiniLM under a head", "AutoModel", pooled, under, inputs)
        made["MiniLM under a head"]["want"] = made_by.get_base_model().encoder(**inputs)[0]

        words = {"input_ids": TOKENS + 3}
        stories = AutoModelForCausalLM.from_pretrained(str(data / "llama_stories260k"))
        made_by = case("stories", "AutoModelForCausalLM", stories, VeraConfig(r=8, target_modules="all-linear"), words)
        made["stories"]["want"] = made_by(**words)[0]

        stories = AutoModelForCausalLM.from_pretrained(str(data / "llama_stories260k"))
        case(
            "packed", "AutoModelForCausalLM", stories, NolaConfig(r=8, num_basis=64, target_modules="all-linear"), words
        )
        file = folder / "packed.safetensors"
        pack_adapter(folder / "packed" / "adapter", file, bits=4, base_name="stories")
        export_peft_lora(file, folder / "packed" / "lora", base=made["packed"]["base"], overwrite=True)
        plain = AutoModelForCausalLM.from_pretrained(made["packed"]["base"])
        made["packed"]["want"] = load_packed(plain, file).eval()(**words)[0]

        pixels = {"pixel_values": torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224)}
        auto = "AutoModelForImageClassification"
        vit = AutoModelForImageClassification.from_pretrained(str(data / "vit_tiny_patch16_224"), dtype=torch.float32)
        made_by = case("ViT", auto, vit, NolaConfig(r=4, num_basis=16, target_modules="all-linear"), pixels)
        made["ViT"]["want"] = made_by(**pixels)[0]
    return made


def small_case(case: Case, folder: Path) -> dict[str, Any]:
    model = case.make()
    model.name_or_path = saved(case.make(), folder / "base")
    with torch.no_grad():
        want = adapted(model, case.config, folder / "adapter")(**case.inputs)[0]
    done = export_peft_lora(folder / "adapter", folder / "lora", rank=case.rank)
    assert tuple(sorted({pair.rank for pair in done.pairs})) == case.ranks
    assert done.error < 1e-7
    base = {"auto": case.auto, "base": str(folder / "base"), "options": case.options}
    return {**base, "inputs": case.inputs, "adapter": str(folder / "lora"), "want": want}


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of a case → what plain PEFT answers in another process, and what it should."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("exports")
    cases = {name: small_case(case, folder / name) for name, case in CASES.items()}
    cases |= real_cases(request.getfixturevalue("data_dir"), folder) if has_data(request) else {}
    torch.save(
        {name: {k: v for k, v in case.items() if k != "want"} for name, case in cases.items()}, folder / "cases.pt"
    )
    command = [sys.executable, str(Path(__file__).with_name("load_without_us.py")), "cases.pt", "answers.pt"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    got = torch.load(folder / "answers.pt")
    return {name: (got[name], case["want"]) for name, case in cases.items()}


def has_data(request: pytest.FixtureRequest) -> bool:
    try:
        return bool(request.getfixturevalue("data_dir"))
    except pytest.skip.Exception:
        return False


@pytest.mark.parametrize("name", CASES)
def test_plain_peft_gives_the_same_logits(name: str, answers: dict[str, tuple[Tensor, Tensor]]):
    got, want = answers[name]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=6e-6)


@pytest.mark.parametrize("name", REAL)
def test_plain_peft_gives_the_same_logits_on_real_weights(
    name: str, answers: dict[str, tuple[Tensor, Tensor]], data_dir: Path
):
    got, want = answers[name]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# --- what is written ---


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with a base, an adapter for it, and an output that is already there."""
    model = gpt2()
    model.name_or_path = saved(gpt2(), tmp_path / "base")
    adapted(model, NolaConfig(r=2, num_basis=4, target_modules=["c_attn[q]", "c_fc"]), tmp_path / "adapter")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("kept")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_configuration_says_no_more_than_it_must(made: Path):
    export_peft_lora(made / "adapter", made / "lora")
    config = LoraConfig.from_pretrained(str(made / "lora"))
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (2, 2, {}, {})
    assert (sorted(config.target_modules), config.fan_in_fan_out, config.bias) == (["c_attn", "c_fc"], True, "none")
    assert config.base_model_name_or_path == str(made / "base")
    tensors = load_file(made / "lora" / "adapter_model.safetensors")
    path = "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"
    assert tensors[path].shape == (48, 2)
    assert not tensors[path][16:].any()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_rank_of_a_name_stands_once_where_all_its_layers_agree(made: Path):
    model = gpt2()
    config = NolaConfig(
        r=2, num_basis=4, target_modules=["c_attn", "c_fc"], rank_pattern={"c_fc": 3, "1.attn.c_attn": 5}
    )
    adapted(model, config, made / "adapter")
    export_peft_lora(made / "adapter", made / "lora", base=str(made / "base"))
    got = LoraConfig.from_pretrained(str(made / "lora"))
    assert (got.r, got.rank_pattern) == (3, {"transformer.h.0.attn.c_attn": 2, "transformer.h.1.attn.c_attn": 5})
    assert got.rank_pattern == got.alpha_pattern


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(dtype: str, made: Path):
    done = export_peft_lora(made / "adapter", made / "lora", dtype=dtype)
    tensors = load_file(made / "lora" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
    assert 1e-5 < done.error < 1e-2


def test_two_exports_are_the_same_bytes(made: Path):
    for name in ("one", "two"):
        export_peft_lora(made / "adapter", made / name)
    assert contents(made / "one") == contents(made / "two")


def test_a_head_without_a_class_lies_beside_the_lora(data_dir: Path, tmp_path: Path):
    base = str(data_dir / "minilm_l6_h384")
    with torch.random.fork_rng(devices=()):
        model = PooledClassifier.from_encoder(base, num_labels=2, pooling="mean", dtype="float32")
    config = VeraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    trained = adapted(model, config, tmp_path / "adapter").base_model.model.classifier.modules_to_save["default"]
    done = export_peft_lora(tmp_path / "adapter", tmp_path / "lora")
    assert done.head == "apart"
    assert torch.equal(load_file(tmp_path / "lora" / "head.safetensors")["classifier.weight"], trained.weight)
    names = load_file(tmp_path / "lora" / "adapter_model.safetensors").keys()
    assert all(name.startswith("base_model.model.encoder.layer.") for name in names)


def test_a_base_that_is_not_here_keeps_the_paths_and_is_told(made: Path):
    (made / "base").rename(made / "moved")
    with pytest.warns(UserWarning, match=r"keep the paths that they were trained under.*name the base"):
        export_peft_lora(made / "adapter", made / "lora")
    model = PeftModel.from_pretrained(gpt2(), made / "lora")
    want = PeftModel.from_pretrained(gpt2(), made / "adapter")
    torch.testing.assert_close(model(TOKENS).logits, want(TOKENS).logits)
    config = json.loads((made / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(made / "base")


def test_a_packed_file_that_does_not_say_how_peft_picks_its_layers(made: Path):
    """A writer without PEFT leaves that out: the layers are picked by their paths."""
    adapted(gpt2(), NolaConfig(r=2, num_basis=4, target_modules=["c_fc"]), made / "whole")
    packed = exact(open_folder(made / "whole"))
    replace(packed, spec=replace(packed.spec, peft={})).write(made / "file.safetensors")
    export_peft_lora(made / "file.safetensors", made / "lora", base=str(made / "base"))
    config = LoraConfig.from_pretrained(str(made / "lora"))
    assert sorted(config.target_modules) == [f"transformer.h.{layer}.mlp.c_fc" for layer in range(2)]
    want = load_packed(gpt2(), made / "file.safetensors")(TOKENS).logits
    torch.testing.assert_close(PeftModel.from_pretrained(gpt2(), made / "lora")(TOKENS).logits, want)


# --- refusals leave everything as it was ---


def test_an_existing_output_needs_overwrite_and_a_source_is_never_replaced(made: Path):
    before = contents(made)
    with pytest.raises(OutputExistsError, match="overwrite"):
        export_peft_lora(made / "adapter", made / "there")
    with pytest.raises(OutputExistsError, match="for both"):
        export_peft_lora(made / "adapter", made / "adapter", overwrite=True)
    assert contents(made) == before
    export_peft_lora(made / "adapter", made / "there", overwrite=True)
    assert sorted(contents(made / "there")) == ["adapter_config.json", "adapter_model.safetensors", "mine.txt"]


def test_what_is_no_adapter_is_refused(made: Path):
    with torch.random.fork_rng(devices=()):
        get_peft_model(gpt2(), LoraConfig(r=1, target_modules=["c_fc"])).save_pretrained(str(made / "foreign"))
    for source, error, named in (
        ("nowhere", AdapterMissingError, "nothing at"),
        ("base", AdapterFilesError, "no adapter_config.json"),
        ("foreign", AdapterFilesError, "LORA adapter of PEFT"),
    ):
        with pytest.raises(error, match=named):
            export_peft_lora(made / source, made / "lora")
    assert not (made / "lora").exists()


def test_a_wrong_base_dtype_and_rank_are_refused(made: Path):
    saved(llama(), made / "other")
    adapted(gpt2(), RandLoraConfig(r=3, target_modules=["c_fc"]), made / "full")
    for source, options, error, named in (
        ("adapter", {"base": str(made / "other")}, BaseMismatchError, "made for another base model"),
        ("adapter", {"base": str(made / "nowhere")}, DataMissingError, "nowhere"),
        ("adapter", {"dtype": "float31"}, HyperparameterError, "dtype must be one of"),
        ("adapter", {"dtype": "auto"}, HyperparameterError, "dtype must be one of"),
        ("full", {}, ExportRankError, "rank must be given for randlora"),
    ):
        with pytest.raises(error, match=named):
            export_peft_lora(made / source, made / "lora", **options)
    assert not (made / "lora").exists()


def test_a_full_disk_keeps_what_was_there(made: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LoraConfig, "save_pretrained", full)
    before = contents(made)
    with pytest.raises(SaveError, match="No space left"):
        export_peft_lora(made / "adapter", made / "there", overwrite=True)
    assert contents(made) == before
