"""Counts of math §4 from configurations alone, and file sizes against files."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import save_file
from small_bases import adapted, config_folder, gpt2, llama, saved
from transformers import MixtralConfig
from typer.testing import CliRunner

from randbasis import NolaConfig, PrancConfig, RandbasisConfig, RandLoraConfig, VeraConfig
from randbasis.adapters.base_model import linear_shapes, meta_model, read_config
from randbasis.adapters.packed import pack_adapter
from randbasis.adapters.plan import plan, safetensors_bytes
from randbasis.cli import app
from randbasis.errors import DataMissingError, HyperparameterError, SliceError, TargetError
from randbasis.train.default_choices import choose


def gpt2_sizes(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads}


def llama_sizes(layers: int, width: int, inner: int, heads: int, groups: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }


def encoder_sizes(kind: str, layers: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
    }


MODELS = {
    "gpt2-medium": gpt2_sizes(24, 1024, 16),
    "gpt2-large": gpt2_sizes(36, 1280, 20),
    "llama-7b": llama_sizes(32, 4096, 11008, 32, 32),
    "llama-13b": llama_sizes(40, 5120, 13824, 40, 40),
    "llama2-70b": llama_sizes(80, 8192, 28672, 64, 8),
    "vit-base": encoder_sizes("vit", 12, 768, 12),
    "vit-large": encoder_sizes("vit", 24, 1024, 16),
    "roberta-base": encoder_sizes("roberta", 12, 768, 12),
    "roberta-large": encoder_sizes("roberta", 24, 1024, 16),
}
QV_SLICES = "c_attn[q,v]"
SEVEN = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
SIX = "query,key,value,attention.output.dense,intermediate.dense,output.dense"
#: transformers has renamed the layers of its ViT; these are the new names and the old ones.
VIT_NAMES = {"fc1,fc2": r"re:.*layer\.\d+\.(intermediate|output)\.dense", "q_proj,v_proj": "query,value"}


class Row(NamedTuple):
    model: str
    targets: str
    method: str
    options: dict[str, int]
    count: int


ROWS = [
    Row("gpt2-medium", QV_SLICES, "nola", {"basis": 1000}, 96_000),
    Row("gpt2-medium", QV_SLICES, "nola", {"basis": 500}, 48_000),
    Row("gpt2-large", QV_SLICES, "nola", {"basis": 1000}, 144_000),
    Row("gpt2-large", QV_SLICES, "nola", {"basis": 500}, 72_000),
    Row("gpt2-large", QV_SLICES, "nola", {"basis": 250}, 36_000),
    Row("gpt2-medium", "c_attn[q],c_attn[v]", "lora", {"rank": 1}, 98_304),
    Row("gpt2-large", QV_SLICES, "lora", {"rank": 1}, 184_320),
    Row("gpt2-medium", QV_SLICES, "vera", {"rank": 1024}, 98_304),
    Row("gpt2-large", QV_SLICES, "vera", {"rank": 1024}, 165_888),
    Row("llama-7b", SEVEN, "lora", {"rank": 1}, 2_498_560),
    Row("llama-13b", "all-linear", "lora", {"rank": 1}, 3_911_680),
    Row("llama2-70b", SEVEN, "lora", {"rank": 1}, 12_943_360),
    Row("llama-7b", SEVEN, "nola", {"rank": 16, "basis": 128}, 57_344),
    Row("llama-13b", SEVEN, "nola", {"rank": 16, "basis": 256}, 143_360),
    Row("llama2-70b", "all-linear", "nola", {"rank": 16, "basis": 512}, 573_440),
    Row("vit-large", "fc1,fc2", "nola", {"basis": 1024}, 98_304),
    Row("vit-base", "fc1,fc2", "nola", {"basis": 1024}, 49_152),
    Row("roberta-base", "query,value", "vera", {"rank": 1024}, 43_008),
    Row("roberta-large", "query,value", "vera", {"rank": 256}, 61_440),
    Row("vit-base", "q_proj,v_proj", "vera", {"rank": 256}, 24_576),
    Row("vit-large", "q_proj,v_proj", "vera", {"rank": 256}, 61_440),
    Row("llama-7b", "all-linear", "vera", {"rank": 1024}, 1_589_248),
    Row("llama-13b", "all-linear", "vera", {"rank": 1024}, 2_416_640),
    Row("roberta-base", SIX, "randlora", {"rank": 64}, 718_848),
    Row("roberta-base", "all-linear", "randlora", {"rank": 64}, 718_848),
    Row("roberta-large", SIX, "randlora", {"rank": 100}, 1_780_416),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("configurations")
    return {name: config_folder(root / name, **options) for name, options in MODELS.items()}


def in_this_version(row: Row, folder: Path) -> str:
    shapes = linear_shapes(meta_model(read_config(str(folder))))
    old = row.targets in VIT_NAMES and not any(key.endswith(row.targets.split(",")[0]) for key in shapes)
    return VIT_NAMES[row.targets] if old else row.targets


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model}-{row.method}-{row.count}")
def test_counts_of_the_papers(row: Row, folders: dict[str, Path]):
    words = [
        "plan",
        str(folders[row.model]),
        "--method",
        row.method,
        "--targets",
        in_this_version(row, folders[row.model]),
    ]
    for option, value in row.options.items():
        words += [f"--{option}", str(value)]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["coefficients"] == row.count
    assert document["coefficients"] == sum(one["coefficients"] for one in document["rows"])
    assert 4 * row.count < document["bytes"] < 4 * row.count + 200 * 2 * document["matrices"] + 100
    assert 2 * row.count < document["bytes_16bit"] < document["bytes"]
    assert not [one["name"] for one in document["rows"] if "lm_head" in one["name"] or "pooler" in one["name"]]


def test_the_sizes_of_a_task_are_those_that_train_takes(folders: dict[str, Path]):
    words = ["plan", str(next(iter(folders.values()))), "--json", "--task"]
    runs = {task: CliRunner().invoke(app, [*words, task]) for task in ("causal-lm", "sequence-classification", "no")}
    basis = {task: choose("nola", task, None)["basis"].value for task in list(runs)[:2]}
    assert basis == {task: json.loads(runs[task].stdout)["options"]["num_basis"] for task in basis}
    assert len(set(basis.values())) == 2
    assert (runs["no"].exit_code, "task 'no' is unknown" in runs["no"].stderr) == (2, True), runs["no"].stderr


CONFIGS: list[RandbasisConfig] = [
    NolaConfig(r=2, num_basis=3, num_basis_b=5, target_modules="all-linear"),
    NolaConfig(
        r=2, num_basis=3, target_modules=["c_attn[q,v]", "c_fc"], share_basis=False, num_basis_pattern={"c_fc": 7}
    ),
    VeraConfig(r=4, target_modules=["c_attn[0:16]", "c_proj"], rank_pattern={"c_proj": 6}),
    RandLoraConfig(r=3, target_modules="all-linear", layers_to_transform=None),
    PrancConfig(num_basis=4, target_modules=["c_attn[v]"], layers_to_transform=[1]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_against_the_saved_adapter(config: RandbasisConfig, tmp_path: Path):
    """Coefficients as get_peft_model trains them, bytes as save_pretrained writes them."""
    base = saved(gpt2(), tmp_path / "base")
    planned = plan(base, config)
    peft_model = adapted(gpt2(), config, tmp_path / "adapter")
    assert planned.coefficients == sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert planned.bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert planned.base_parameters == sum(p.numel() for p in gpt2().parameters())
    packed = tmp_path / "packed.safetensors"
    pack_adapter(tmp_path / "adapter", packed, base_name="base")
    assert planned.bytes_packed == packed.stat().st_size


def test_the_output_layer_and_experts_are_told(tmp_path: Path):
    """An output layer of its own counts; experts in three-dimensional weights are said not to be adapted."""
    base = saved(llama(), tmp_path / "llama")
    assert plan(base, VeraConfig(r=4, target_modules=["q_proj"])).base_parameters == llama().num_parameters()
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}  # fmt: skip
    MixtralConfig(**sizes, architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path / "moe")
    config = NolaConfig(r=4, num_basis=8, target_modules=["q_proj", "v_proj"])
    planned = plan(tmp_path / "moe", config)
    assert planned.expert_parameters == 2 * 4 * (2 * 24 * 16 + 16 * 24)
    assert plan(base, config).expert_parameters == 0


@pytest.mark.parametrize("r", [1, 4])
def test_lora_against_peft_lora(r: int, tmp_path: Path):
    base = saved(llama(), tmp_path / "base")
    config = LoraConfig(r=r, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2})
    peft_model = get_peft_model(llama(), config)
    peft_model.save_pretrained(str(tmp_path / "adapter"))
    planned = plan(base, config)
    assert planned.coefficients == sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert planned.bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size


def test_file_size_against_safetensors(tmp_path: Path):
    tensors = {
        "b": torch.zeros(3, 5, dtype=torch.float16),
        "a": torch.zeros(7, dtype=torch.bfloat16),
        "ä.weight": torch.zeros(2, 1),
        "s": torch.zeros(1, 2, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "file.safetensors", metadata={"format": "pt"})
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert safetensors_bytes(specs) == (tmp_path / "file.safetensors").stat().st_size


def test_slices_follow_the_heads_of_grouped_attention(tmp_path: Path):
    folder = config_folder(tmp_path / "phi", model_type="phi3", num_hidden_layers=1, hidden_size=64,
                           intermediate_size=96, num_attention_heads=8, num_key_value_heads=2)  # fmt: skip
    planned = plan(folder, VeraConfig(r=4, target_modules=["qkv_proj[q,k]", "gate_up_proj[up]"]))
    assert [(one.part, one.out_features) for one in planned.matrices] == [("q", 64), ("k", 16), ("up", 96)]


def test_a_head_to_train_is_not_counted(folders: dict[str, Path]):
    with_head = NolaConfig(num_basis=8, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    assert plan(folders["llama-7b"], with_head).coefficients == 32 * 16


def test_a_plan_changes_neither_its_configuration_nor_the_random_state(folders: dict[str, Path]):
    config = NolaConfig(num_basis=8, target_modules="all-linear")
    before, state = config.to_dict(), torch.get_rng_state()
    assert plan(folders["gpt2-medium"], config).matrices[0].out_features == 3 * 1024
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


REFUSALS: list[tuple[PeftConfig | None, type[Exception], str]] = [
    (NolaConfig(target_modules=["c_attm"]), TargetError, "c_attn"),
    (NolaConfig(target_modules=["c_attn[w]"]), SliceError, "'w'"),
    (NolaConfig(target_modules=["c_attn[1/7]"]), SliceError, "3072"),
    (IA3Config(target_modules=["c_attn"], feedforward_modules=[]), HyperparameterError, "IA3Config"),
    (None, HyperparameterError, "no adapter"),
]


@pytest.mark.parametrize(("config", "error", "named"), REFUSALS, ids=lambda value: getattr(value, "__name__", None))
def test_a_plan_refuses_what_training_would(
    config: PeftConfig | None, error: type[Exception], named: str, folders: dict[str, Path]
):
    with pytest.raises(error, match=named):
        plan(folders["gpt2-medium"], config)


def test_no_model_at_all_is_an_error(tmp_path: Path):
    with pytest.raises(DataMissingError, match="config"):
        plan(tmp_path / "nowhere", NolaConfig())
    with pytest.raises(DataMissingError, match="no_such_type"):
        plan(config_folder(tmp_path / "odd", model_type="no_such_type"), NolaConfig())


def test_command_shows_a_table_with_lora_beside_it(folders: dict[str, Path]):
    words = ["plan", str(folders["gpt2-medium"]), "--basis", "500", "--targets", QV_SLICES]
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, words)
    assert result.exit_code == 0
    assert {"transformer.h.*.attn.c_attn[q]", "transformer.h.*.attn.c_attn[v]", "48,000", "98,304"} <= set(
        result.stdout.split()
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "nolla"],
        ["--targets", "c_attm"],
        ["--rank", "0"],
        ["--method", "vera", "--basis", "4"],
        ["--basiss", "4"],
    ],
    ids=" ".join,
)
def test_command_exits_with_2_on_bad_usage(words: list[str], folders: dict[str, Path]):
    result = CliRunner().invoke(app, ["plan", str(folders["gpt2-medium"]), *words])
    assert result.exit_code == 2
    assert not result.stdout
    assert "rror" in result.stderr


def test_command_help_has_an_example():
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["plan", "--help"])
    assert result.exit_code == 0
    assert "Example: randbasis plan" in result.stdout
