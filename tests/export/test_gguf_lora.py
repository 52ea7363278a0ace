"""LoRA adapters in GGUF, read back by the gguf package, against the exported pairs and against the rotation itself."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_bases import adapted, bert, gpt2, llama, saved
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from randbasis import NolaConfig, RandbasisConfig, RandLoraConfig, VeraConfig
from randbasis.errors import (
    ExportArchitectureError,
    ExportBaseError,
    ExportHeadError,
    MissingPackageError,
    OutputExistsError,
    SaveError,
)
from randbasis.export import export_gguf_lora
from randbasis.export.gguf_lora import FAMILIES, gguf_names, gguf_rows

gguf = pytest.importorskip("gguf", reason="gguf is not installed: no GGUF files to write or read")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def made(folder: Path, base: Any, config: RandbasisConfig) -> Path:
    base.name_or_path = saved(base, folder / "base")
    adapted(base, config, folder / "adapter")
    return folder / "adapter"


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items() if field.types}


def tensors(file: Path) -> dict[str, Tensor]:
    """Values in float32; GGUF keeps the sizes of a shape in reverse."""
    read: dict[str, Tensor] = {}
    for one in gguf.GGUFReader(file).tensors:
        values = gguf.dequantize(one.data, one.tensor_type)
        read[one.name] = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(*reversed(one.shape.tolist()))
    return read


def interleaved(rows: int, heads: int) -> list[int]:
    """Where each row of llama.cpp's weight is in that of transformers, written out."""
    size = rows // heads
    return [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_names_values_and_rows_of_a_llama(dtype: str, data_dir: Path, tmp_path: Path):
    base = AutoModelForCausalLM.from_pretrained(str(data_dir / "llama_stories260k"))
    adapted(base, NolaConfig(r=3, num_basis=6, target_modules="all-linear"), tmp_path / "adapter")
    done = export_gguf_lora(tmp_path / "adapter", tmp_path / "lora.gguf", dtype=dtype)
    said, got = fields(tmp_path / "lora.gguf"), tensors(tmp_path / "lora.gguf")
    assert (said["general.architecture"], said["general.type"], said["adapter.type"]) == ("llama", "adapter", "lora")
    assert said["adapter.lora.alpha"] == 3.0
    assert said["general.base_model.0.name"] == "llama_stories260k"
    assert len(got) == 2 * len(done.pairs) == 2 * 5 * 7
    heads = {"q_proj": 8, "k_proj": 4}
    for pair in done.pairs:
        _, _, layer, kind = pair.name.split(".", 3)
        name = f"blk.{layer}.{NAMES[kind]}.weight"
        assert torch.equal(got[f"{name}.lora_a"], pair.down.float())
        count = heads.get(kind.split(".")[1])
        want = pair.up.float()
        assert torch.equal(got[f"{name}.lora_b"], want if count is None else want[interleaved(len(want), count)])
    assert {f"torch.{done.dtype}"} == {str(pair.up.dtype) for pair in done.pairs}


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_reordered_rows_rotate_as_the_others_do(heads: int):
    """llama.cpp rotates neighbours, transformers rotates the halves of a head: after the reordering both are one."""
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=heads)
    generator = torch.Generator().manual_seed(0)
    up, x = torch.randn(8 * heads, 5, generator=generator), torch.randn(5, generator=generator)
    angles = torch.randn(4, generator=generator)
    cos, sin = angles.cos(), angles.sin()

    def rotated_halves(h: Tensor) -> Tensor:
        first, second = h.view(heads, 2, 4).unbind(1)
        return torch.stack([first * cos - second * sin, second * cos + first * sin], 1).reshape(-1)

    def rotated_neighbours(h: Tensor) -> Tensor:
        first, second = h.view(heads, 4, 2).unbind(2)
        return torch.stack([first * cos - second * sin, second * cos + first * sin], 2).reshape(-1)

    ours = gguf_rows(up, "model.layers.0.self_attn.k_proj", config, FAMILIES["llama"])
    want = rotated_halves(up @ x)
    got = rotated_neighbours(ours @ x)
    # A score is a product over a head, so any one order of its entries will do, but it must be one.
    torch.testing.assert_close(got, want[interleaved(8 * heads, heads)])


def test_only_the_rows_that_are_rotated_move():
    config, up = LlamaConfig(num_attention_heads=4, num_key_value_heads=2), torch.randn(64, 3)
    for kind in ("v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"):
        assert gguf_rows(up, f"model.layers.0.x.{kind}", config, FAMILIES["llama"]) is up
    for family in ("qwen2", "gemma2", "phi3", "gpt2"):
        assert gguf_rows(up, "model.layers.0.self_attn.q_proj", config, FAMILIES[family]) is up
    heads = gguf_rows(up, "model.layers.0.self_attn.q_proj", config, FAMILIES["mistral"])
    assert torch.equal(heads, up[interleaved(64, 4)])


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_has_tensors_for_its_blocks(architecture: str):
    config = PreTrainedConfig(num_hidden_layers=3, tie_word_embeddings=True)
    attention, feed = ("self_attn.o_proj", "mlp.down_proj")
    paths = {f"model.layers.2.{attention}": "attn_output", f"model.layers.2.{feed}": "ffn_down"}
    if architecture == "gpt2":
        paths = {"transformer.h.2.attn.c_attn": "attn_qkv", "transformer.h.2.mlp.c_proj": "ffn_down"}
    if architecture == "starcoder2":
        paths = {"model.layers.2.self_attn.v_proj": "attn_v", "model.layers.2.mlp.c_fc": "ffn_up"}
    names = gguf_names(config, FAMILIES[architecture], list(paths))
    assert names == {path: f"blk.2.{name}.weight" for path, name in paths.items()}


def test_conv1d_and_ranks_that_differ(tmp_path: Path):
    """Where ranks differ, alpha is 0: llama.cpp then scales by nothing, and not by one alpha over each rank."""
    source = made(tmp_path, gpt2(), VeraConfig(r=5, target_modules=["c_attn[q,v]", "c_fc"]))
    done = export_gguf_lora(source, tmp_path / "lora.gguf")
    assert fields(tmp_path / "lora.gguf")["adapter.lora.alpha"] == 0.0
    got = tensors(tmp_path / "lora.gguf")
    assert got["blk.1.attn_qkv.weight.lora_a"].shape == (10, 16)
    assert got["blk.1.attn_qkv.weight.lora_b"].shape == (48, 10)
    assert got["blk.1.ffn_up.weight.lora_b"].shape == (64, 5)
    (first,) = (pair for pair in done.pairs if pair.name == "transformer.h.1.attn.c_attn")
    assert torch.equal(got["blk.1.attn_qkv.weight.lora_b"], first.up)


def test_two_exports_are_the_same_bytes(tmp_path: Path):
    source = made(tmp_path, llama(), NolaConfig(r=2, num_basis=4, target_modules=["q_proj"]))
    for name in ("one", "two"):
        export_gguf_lora(source, tmp_path / f"{name}.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_an_output_layer_of_its_own(tmp_path: Path):
    source = made(tmp_path, llama(), VeraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    export_gguf_lora(source, tmp_path / "lora.gguf")
    assert tensors(tmp_path / "lora.gguf")["output.weight.lora_b"].shape == (32, 2)


def test_truncation(tmp_path: Path):
    source = made(tmp_path, llama(), RandLoraConfig(r=5, target_modules=["q_proj"]))
    done = export_gguf_lora(source, tmp_path / "lora.gguf", rank=2)
    assert {pair.rank for pair in done.pairs} == {2}
    assert 0.1 < done.error < 1


# --- refusals ---


def test_architectures_layers_and_heads_without_a_place_are_refused(tmp_path: Path):
    cases: list[tuple[Any, RandbasisConfig, type[Exception], str]] = [
        (bert(), VeraConfig(r=2, target_modules=["query"]), ExportArchitectureError, "one of llama, mistral.*'bert'"),
        (
            gpt2(),
            VeraConfig(r=2, target_modules=["c_fc", "lm_head"]),
            ExportArchitectureError,
            "'lm_head' must have a tensor of its own in GGUF's 'gpt2', it has none",
        ),
        (
            llama(),
            VeraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
            ExportHeadError,
            "no place for what was trained whole.*lm_head",
        ),
    ]
    for index, (base, config, error, named) in enumerate(cases):
        source = made(tmp_path / str(index), base, config)
        with pytest.raises(error, match=named):
            export_gguf_lora(source, tmp_path / "lora.gguf")
    assert not (tmp_path / "lora.gguf").exists()


def test_a_base_that_is_not_here_is_asked_for(tmp_path: Path):
    source = made(tmp_path, llama(), VeraConfig(r=2, target_modules=["q_proj"]))
    (tmp_path / "base").rename(tmp_path / "moved")
    with (
        pytest.warns(UserWarning, match="keep the paths"),
        pytest.raises(ExportBaseError, match=r"must be on this machine.*config\.json is enough"),
    ):
        export_gguf_lora(source, tmp_path / "lora.gguf")
    for file in (tmp_path / "moved").iterdir():
        if file.name != "config.json":
            file.unlink()
    export_gguf_lora(source, tmp_path / "lora.gguf", base=str(tmp_path / "moved"))


def test_an_existing_file_needs_overwrite_and_a_failed_write_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = made(tmp_path, llama(), VeraConfig(r=2, target_modules=["q_proj"]))
    (tmp_path / "lora.gguf").write_text("kept")
    with pytest.raises(OutputExistsError, match="overwrite"):
        export_gguf_lora(source, tmp_path / "lora.gguf")
    with pytest.raises(OutputExistsError, match="another name"):
        export_gguf_lora(source, tmp_path / "base", overwrite=True)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
        with pytest.raises(SaveError, match="No space left"):
            export_gguf_lora(source, tmp_path / "lora.gguf", overwrite=True)
    assert (tmp_path / "lora.gguf").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "lora.gguf"]
    export_gguf_lora(source, tmp_path / "lora.gguf", overwrite=True)
    assert tensors(tmp_path / "lora.gguf")


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = made(tmp_path, llama(), VeraConfig(r=2, target_modules=["q_proj"]))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackageError, match=r"install randbasis\[gguf\]"):
        export_gguf_lora(source, tmp_path / "lora.gguf")
