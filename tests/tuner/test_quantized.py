"""Bases quantized by bitsandbytes, on the CPU."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from tuner_cases import OF_SEEDS, coefficients_of, fill, loss_of, make_config, outputs

from randbasis import RandbasisLinear
from randbasis.errors import ContractionError, MergeError

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized layers to test")

BITS = pytest.mark.parametrize("bits", [8, 4])
ALL_METHODS = pytest.mark.parametrize("method", OF_SEEDS)
TARGETS = ["first", "fused[0/3,2/3]"]


class QuantizedBlock(nn.Module):
    """Two quantized layers, the second of them fused."""

    def __init__(self, bits: int, nested: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, rows in (("first", 64), ("fused", 192)):
            weight = torch.randn(rows, 64, generator=generator) / 8
            if bits == 8:
                layer = bitsandbytes.nn.Linear8bitLt(64, rows, bias=False, has_fp16_weights=False)
                layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            else:
                layer = bitsandbytes.nn.Linear4bit(64, rows, bias=False, quant_type="nf4", compute_dtype=torch.float32)
                layer.weight = bitsandbytes.nn.Params4bit(
                    weight, requires_grad=False, quant_type="nf4", compress_statistics=nested
                )
            setattr(self, name, layer)
        self.to("cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fused(torch.tanh(self.first(x)))


def inputs() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))}


def adapted(bits: int, method: str, nested: bool = True, **options) -> PeftModel:
    model = get_peft_model(QuantizedBlock(bits, nested), make_config(method, TARGETS, **options))
    fill(model)
    return model.eval()


@BITS
@ALL_METHODS
def test_output_is_the_quantized_base_plus_delta(bits, method):
    model = adapted(bits, method)
    plain = QuantizedBlock(bits).eval()
    first, fused = (m for m in model.modules() if isinstance(m, RandbasisLinear))
    with torch.no_grad():
        hidden = torch.tanh(plain.first(inputs()["x"]) + inputs()["x"] @ first._full_delta("default", None).T)
        expected = plain.fused(hidden) + hidden @ fused._full_delta("default", None).T
    torch.testing.assert_close(outputs(model, inputs()), expected, rtol=1e-3, atol=2e-3)
    assert not torch.allclose(expected, outputs(plain, inputs()), atol=1e-2)


@BITS
@ALL_METHODS
def test_every_coefficient_learns(bits, method):
    model = adapted(bits, method).train()
    loss_of(model, inputs()).backward()
    for parameter in coefficients_of(model).values():
        assert parameter.grad is not None
        assert bool(torch.isfinite(parameter.grad).all())
        assert bool((parameter.grad != 0).any())


@BITS
@ALL_METHODS
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "not_nested"])
def test_merge_and_unmerge_restore_the_output(bits, method, nested):
    """Also after a forward pass in evaluation, for which bitsandbytes may put a weight into another layout."""
    model = adapted(bits, method, nested=nested)
    before = outputs(model, inputs())
    plain = outputs(QuantizedBlock(bits, nested).eval(), inputs())
    effect = (before - plain).abs().mean()
    for _ in range(2):
        model.merge_adapter()
        merged = outputs(model, inputs())
        assert (merged - before).abs().mean() < {8: 0.1, 4: 0.8}[bits] * effect
        model.unmerge_adapter()
        assert torch.equal(outputs(model, inputs()), before)


@BITS
@ALL_METHODS
def test_reload_is_exact(bits, method, tmp_path):
    model = adapted(bits, method)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(QuantizedBlock(bits), tmp_path).eval()
    assert torch.equal(outputs(again, inputs()), outputs(model, inputs()))


@BITS
@ALL_METHODS
def test_mixed_batches(bits, method):
    model = adapted(bits, method)
    model.add_adapter("other", make_config("vera", TARGETS, seed=9))
    fill(model, "other", 2)
    model.eval()
    mixed = outputs(model, inputs(), adapter_names=["other", "__base__", "default"])
    alone = outputs(model, inputs())[2:]
    model.set_adapter("other")
    other = outputs(model, inputs())[:1]
    base = outputs(QuantizedBlock(bits).eval(), inputs())[1:2]
    torch.testing.assert_close(mixed, torch.cat([other, base, alone]), rtol=1e-3, atol=5e-3)


@BITS
@ALL_METHODS
def test_weight_order_is_refused_with_its_reason(bits, method):
    model = adapted(bits, method, contraction="weight")
    with pytest.raises(
        ContractionError, match=r"contraction='weight' needs .* quantized by .*; use contraction='token'"
    ):
        outputs(model, inputs())


@BITS
def test_safe_merge_of_broken_coefficients_leaves_the_weight(bits):
    model = adapted(bits, "nola")
    before = outputs(model, inputs())
    kept = list(coefficients_of(model).values())[-1]
    value = kept.detach().clone()
    with torch.no_grad():
        kept[0] = float("nan")
    with pytest.raises(MergeError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    with torch.no_grad():
        kept.copy_(value)
    assert torch.equal(outputs(model, inputs()), before)
