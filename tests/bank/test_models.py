"""A bank on other families: encoders with heads of their own, images, encoder and decoder, quantized layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from support.tuner_cases import OF_SEEDS, fill, make_config, outputs, seeded, tiny_llama, tiny_t5, token_batch
from torch import nn

from randbasis import put
from randbasis.adapter_file import PackedAdapter
from randbasis.adapters import open_adapter
from randbasis.adapters.packed import packed_of
from randbasis.bank import AdapterBank
from randbasis.errors import BankError, BaseMismatchError

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def encoder(kind: str, labels: int = 3) -> Any:
    made = getattr(transformers, f"{kind}ForSequenceClassification")
    return seeded(made, made.config_class(**SIZES, num_labels=labels))


def vit() -> Any:
    config = transformers.ViTConfig(
        **{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=16, patch_size=8
    )
    return seeded(transformers.ViTForImageClassification, config)


def image_batch(rows: int = 4) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(rows))}


def t5_batch(rows: int = 4) -> dict[str, torch.Tensor]:
    return {**token_batch(rows), "decoder_input_ids": token_batch(rows)["input_ids"][:, :5]}


def trained(base: nn.Module, config: Any, folder: Path, seed: int) -> PackedAdapter:
    """An adapter, and whatever is saved with it, with numbers of its own."""
    model = get_peft_model(base, config)
    fill(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.normal_(generator=generator)
    model.save_pretrained(folder / f"a{seed}")
    return packed_of(open_adapter(folder / f"a{seed}"), bits=32)


def check(build: Callable[[], Any], config: Callable[[], Any], batch: Callable[..., Any], folder: Path) -> None:
    users = [trained(build(), config(), folder, seed) for seed in (1, 2)]
    base, rows = build(), batch(4)
    plain = outputs(base, rows)
    bank = AdapterBank(base)
    for at, user in enumerate(users):
        bank.load(f"u{at}", user)
    found = outputs(base, rows, adapter_names=["u1", "__base__", "u0", "u1"])
    for row, user in enumerate((users[1], None, users[0], users[1])):
        expected = plain if user is None else outputs(put(build(), user), rows)
        torch.testing.assert_close(found[row], expected[row], rtol=3e-4, atol=3e-5)
    assert not torch.allclose(found[0], plain[0], atol=1e-3)
    assert torch.equal(found[1], plain[1])


@pytest.mark.parametrize("method", OF_SEEDS)
@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_encoders_with_a_head_for_each_adapter(kind: str, method: str, tmp_path: Path) -> None:
    config = lambda: make_config(method, ["query", "value"], task_type="SEQ_CLS")  # noqa: E731
    check(lambda: encoder(kind), config, token_batch, tmp_path)


@pytest.mark.parametrize("method", OF_SEEDS)
def test_images(method: str, tmp_path: Path) -> None:
    targets = "all-linear" if method != "pranc" else ["o_proj", "output.dense", "dense"]
    check(vit, lambda: make_config(method, targets), image_batch, tmp_path)


@pytest.mark.parametrize("method", OF_SEEDS)
def test_encoder_and_decoder(method: str, tmp_path: Path) -> None:
    config = lambda: make_config(method, ["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")  # noqa: E731
    check(lambda: seeded(tiny_t5), config, t5_batch, tmp_path)


def test_a_block_that_was_trained_whole(tmp_path: Path) -> None:
    config = lambda: make_config("nola", ["q_proj"], modules_to_save=["mlp"])  # noqa: E731
    check(lambda: seeded(tiny_llama), config, token_batch, tmp_path)


def test_encoder_and_decoder_generate(tmp_path: Path) -> None:
    config = lambda: make_config("nola", ["q", "v", "wo"])  # noqa: E731
    users = [trained(seeded(tiny_t5), config(), tmp_path, seed) for seed in (1, 2)]
    base, batch = seeded(tiny_t5), token_batch(3)
    bank = AdapterBank(base)
    for at, user in enumerate(users):
        bank.load(f"u{at}", user)
    for beams in (1, 3):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}
        made = base.generate(**batch, adapter_names=["u1", "__base__", "u0"], **options)
        for row, user in enumerate((users[1], None, users[0])):
            model = seeded(tiny_t5) if user is None else put(seeded(tiny_t5), user)
            assert made[row].tolist() == model.generate(**batch, **options)[row].tolist()


def test_heads_of_another_size_than_the_base(tmp_path: Path) -> None:
    config = lambda: make_config("vera", ["query"], task_type="SEQ_CLS")  # noqa: E731
    five, also = (trained(encoder("Bert", 5), config(), tmp_path, seed) for seed in (1, 2))
    base, batch = encoder("Bert", 3), token_batch(2)
    bank = AdapterBank(base)
    bank.load("five", five)
    bank.load("also", also)
    found = outputs(base, batch, adapter_names=["also", "five"])
    assert found.shape == (2, 5)
    torch.testing.assert_close(found[1], outputs(put(encoder("Bert", 5), five), batch)[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(BankError, match="heads of one size"):
        outputs(base, batch, adapter_names=["five", "__base__"])
    with pytest.raises(BaseMismatchError, match="classifier"):
        AdapterBank(seeded(transformers.BertModel, transformers.BertConfig(**SIZES))).load("five", five)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", OF_SEEDS)
def test_layers_quantized_by_bitsandbytes(bits: int, method: str, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized layers")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(192, 64, generator=generator) / 8
            if bits == 8:
                self.fused = bitsandbytes.nn.Linear8bitLt(64, 192, bias=False, has_fp16_weights=False)
                self.fused.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            else:
                self.fused = bitsandbytes.nn.Linear4bit(64, 192, bias=False, compute_dtype=torch.float32)
                self.fused.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            self.to("cpu")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fused(x)

    model = get_peft_model(Block(), make_config(method, ["fused[0/3,2/3]"]))
    fill(model)
    model.save_pretrained(tmp_path / "a")
    user = packed_of(open_adapter(tmp_path / "a"), bits=32)
    base = Block().eval()
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    plain = outputs(base, {"x": x})
    bank = AdapterBank(base)
    bank.load("a", user)
    found = outputs(base, {"x": x}, adapter_names=["a", "__base__", "a"])
    delta = torch.zeros(192, 64)
    for one, change in user.matrices():
        delta[one.start : one.start + one.rows] = change.matrix()
    torch.testing.assert_close(found[[0, 2]], (plain + x @ delta.T)[[0, 2]], rtol=1e-3, atol=1e-4)
    assert torch.equal(found[1], plain[1])
