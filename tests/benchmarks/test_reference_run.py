"""The check before the clock finds adapters that compute something else, in the output or in a gradient alone."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import bases, reference_run
from benchmarks.adapters import Adapter, put
from benchmarks.case import CheckFailed
from benchmarks.published_nola import PublishedNolaLinear, draw
from benchmarks.reference_run import check_inference, check_training
from randbasis import RandbasisLinear

BASE = bases.gpt2(1, 64, 128)
ALL = ("PEFT LoRA r=4", "NOLA r=4 k=8", "NOLA r=4 k=8 unique", "VeRA r=16", "RandLoRA r=32", "published NOLA r=4 k=8")


@pytest.mark.parametrize("base", [BASE, bases.llama(1, 128, 128), bases.minilm(real=False)], ids=lambda base: base.name)
def test_every_adapter_agrees_with_its_formula(base: bases.Base) -> None:
    found = check_training(base, ALL, 32)
    assert all(word in found for word in ("output", "loss", "gradient"))
    assert "gradient" not in check_inference(base, ALL, 32)


def layers_give(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Change what every adapted layer of ours gives."""
    forward = RandbasisLinear.forward
    monkeypatch.setattr(RandbasisLinear, "forward", lambda self, x, **options: change(forward(self, x, **options)))


def test_a_wrong_output_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    layers_give(monkeypatch, lambda h: 1.01 * h)
    with pytest.raises(CheckFailed, match="NOLA r=4 k=8: "):
        check_inference(BASE, ["NOLA r=4 k=8"], 32)


def test_a_wrong_gradient_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    layers_give(monkeypatch, lambda h: 2 * h - h.detach())
    with pytest.raises(CheckFailed, match="VeRA r=16: gradient"):
        check_training(BASE, ["VeRA r=16"], 32)


def test_a_layer_that_was_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Adapter.config
    monkeypatch.setattr(
        Adapter, "config", lambda self, base, **options: config(self, replace(base, targets=("c_fc",)), **options)
    )
    with pytest.raises(CheckFailed, match="4 layers must be adapted, 1 are"):
        check_inference(BASE, ["NOLA r=4 k=8"], 32)


def test_peft_adapters_are_held_against_what_they_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.layer import Linear

    delta = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 1.01 * delta(self, adapter))
    with pytest.raises(CheckFailed, match="PEFT LoRA r=4: output"):
        check_inference(BASE, ["PEFT LoRA r=4"], 32)


def test_the_environment_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(reference_run.ENVIRONMENT, "auto")
    with reference_run.plain_torch():
        assert reference_run.os.environ[reference_run.ENVIRONMENT] == "reference"
    assert reference_run.os.environ[reference_run.ENVIRONMENT] == "auto"
    monkeypatch.delenv(reference_run.ENVIRONMENT)
    with reference_run.plain_torch():
        pass
    assert reference_run.ENVIRONMENT not in reference_run.os.environ


def test_the_published_algorithm_redraws_the_same_basis_and_goes_on_from_a_fresh_seed() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = draw(7, 5, 4, 6, torch.zeros(()))
        after = torch.rand(())
        again = draw(7, 5, 4, 6, torch.zeros(()))
        assert torch.equal(first, again)
        assert not torch.equal(after, torch.rand(()))
        assert not torch.equal(first, draw(8, 5, 4, 6, torch.zeros(())))
    assert float(first.abs().max()) <= 1 / 5**0.5


def test_the_gradient_of_a_published_factor_by_finite_differences() -> None:
    layer = PublishedNolaLinear(torch.nn.Linear(6, 4), 2, 3, seed=1, started=True).double()
    x = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        assert torch.autograd.gradcheck(
            lambda a, b: torch.func.functional_call(layer, {"lora_A.coefficients": a, "lora_B.coefficients": b}, (x,)),
            (layer.lora_A.coefficients, layer.lora_B.coefficients),
        )


def test_only_coefficients_train_on_the_published_side() -> None:
    model = put("published NOLA r=4 k=8", BASE.model(), BASE)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert set(trained.values()) == {8}
    with torch.no_grad():
        batch = BASE.batch(32)
        assert torch.equal(model(**batch).logits, BASE.model()(**batch).logits)


@pytest.mark.parametrize("name", ["LoRA r=4", "NOLA", "PEFT LoRA r=4 r=8", ""])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must look like"):
        Adapter.named(name)


def test_a_rank_above_the_smaller_side_of_a_layer_is_that_side() -> None:
    model = put("PEFT LoRA r=128", bases.llama(1, 128, 128).model(), bases.llama(1, 128, 128))
    ranks = {name.split(".")[-4]: p.shape[0] for name, p in model.named_parameters() if "lora_A" in name}
    assert ranks["k_proj"] == ranks["v_proj"] == 64
    assert ranks["q_proj"] == ranks["down_proj"] == 128


def test_twins_share_frozen_tensors_and_nothing_else() -> None:
    frozen = BASE.model()
    one, other = (put(name, bases.twin(frozen), BASE, started=True) for name in ("NOLA r=4 k=8", "PEFT LoRA r=4"))
    kept = {p.data_ptr() for p in frozen.parameters()}
    for model in (one, other):
        assert {p.data_ptr() for p in model.parameters() if not p.requires_grad} <= kept
    batch = BASE.batch(32)
    with torch.no_grad():
        assert torch.equal(frozen(**batch).logits, BASE.model()(**batch).logits)
        assert not torch.equal(one(**batch).logits, other(**batch).logits)
