"""Factors of all layers at once, against each layer making its own: the same outputs, gradients and steps."""

import copy
import dataclasses
import gc
import math
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from tuner_cases import (
    PLACES,
    WIDTH,
    Case,
    adapted_layers,
    add_adapter,
    coefficients_of,
    fill,
    loss_of,
    make_config,
    outputs,
    seeded,
    tiny_llama,
    token_batch,
)

from randbasis import NolaConfig, RandbasisLinear, ops
from randbasis.methods import WeightedSum, bound
from randbasis.ops import Slab, hold
from randbasis.tuner import joint_factors, joint_pass, joint_sums
from randbasis.tuner.joint_factors import JointFactors
from randbasis.tuner.joint_sums import joint_sums as sums_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* adapted layers got no gradient"),  # they are skipped on purpose
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # PEFT asks for it
]
OF_SUMS = ("nola", "nola-plain", "nola-own-basis", "pranc")
CASES = [pytest.param(Case(place, method), id=f"{place}-{method}") for place in PLACES for method in OF_SUMS]
CASE = Case("linear", "nola")
#: Sums are added in another order where they are made together.
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-6}
Gradients = dict[str, Tensor | None]


@contextmanager
def by_layer() -> Iterator[None]:
    """The reference: every layer makes its factors itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RandbasisLinear, "_joint", lambda *_: None)
        yield


@pytest.fixture
def products(monkeypatch) -> list[tuple[str, int]]:
    """The calls of products with a basis: which way, and for how many matrices."""
    found: list[tuple[str, int]] = []
    for name, way, dimensions in (
        ("weighted_sum", "forward", 1), ("inner", "back", 2), ("combine_each", "forward", 1), ("inner_each", "back", 2),
    ):  # fmt: skip
        module = bound if hasattr(bound, name) else joint_sums
        original = getattr(module, name)

        def counted(x: Tensor, *args: Any, way=way, original=original, dimensions=dimensions) -> Tensor:
            found.append((way, math.prod(x.shape[:-dimensions])))
            return original(x, *args)

        monkeypatch.setattr(module, name, counted)
    return found


def gradients(model: nn.Module) -> Gradients:
    return {name: p.grad for name, p in model.named_parameters() if ".randbasis_" in name}


def assert_same(found: Any, wanted: Any) -> None:
    """Numbers within the tolerance, and None where there is none."""
    if isinstance(wanted, dict):
        assert {key for key, value in found.items() if value is None} == {k for k, v in wanted.items() if v is None}
        assert any(value is not None for value in wanted.values())
        for key, value in wanted.items():
            if value is not None:
                torch.testing.assert_close(found[key], value, **CLOSE)
    else:
        torch.testing.assert_close(found, wanted, **CLOSE)


def against_layers(build: Callable[[], Any], run: Callable[[Any], Any]) -> Any:
    """What a run returns, once it was compared with the same by layer: on two models that are alike."""
    found = run(build())
    with by_layer():
        wanted = run(build())
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)
    return found


def trained(model: PeftModel, batch: dict[str, Tensor] | None = None) -> tuple[Tensor, Gradients]:
    loss = loss_of(model, batch or CASE.batch())
    loss.backward()
    return loss.detach(), gradients(model)


def training(case: Case = CASE, **options: Any) -> PeftModel:
    return case.adapted(**options).train()


# --- the same numbers ---


@pytest.mark.parametrize("order", ["auto", "token", "weight"])
@pytest.mark.parametrize("case", CASES)
def test_a_training_pass(case, order, products):
    def run(model):
        return outputs(model, case.batch()), *trained(model, case.batch())

    against_layers(lambda: training(case, contraction=order), run)
    assert case.method == "nola-own-basis" or any(count > 1 for _, count in products)


@pytest.mark.parametrize("bits", [8, 2])
def test_quantized_coefficients(bits):
    against_layers(lambda: training(quantize_coefficients=bits), trained)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("storage", ["packed", "dense", "recompute"])
def test_each_storage(storage, own, products):
    """A basis of each layer's own takes part where it is not stored densely."""
    case = Case("linear", "nola-own-basis" if own else "nola")
    against_layers(lambda: training(case, basis_storage=storage), trained)
    shared = not own or storage != "dense"
    assert ("back" in {way for way, _ in products}) == shared
    assert any(count > 1 for _, count in products) == shared


def test_coefficients_in_half_precision():
    def build():
        model = training()
        for p in coefficients_of(model).values():
            p.data = p.data.to(torch.bfloat16)
        return model

    _, found = against_layers(build, trained)
    assert all(g.dtype == torch.bfloat16 for g in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    def run(model):
        with torch.autocast("cpu", dtype):
            loss = loss_of(model, CASE.batch())
        loss.backward()
        return loss.detach(), gradients(model)

    against_layers(lambda: training(contraction="token"), run)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("method", OF_SUMS)
def test_gradient_checkpointing(method, frozen, reentrant, products):
    def build():
        model = training(Case("linear", method))
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        if frozen:
            next(iter(coefficients_of(model).values())).requires_grad_(False)
        return model

    loss = against_layers(build, trained)[0]
    assert float(loss) > 0


def test_a_segment_that_runs_again_makes_no_product(products):
    model = training()
    trained(model)
    once = [*products]
    products.clear()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trained(model)
    assert sorted(products) == sorted(once)
    products.clear()
    losses = [loss_of(model, CASE.batch()) for _ in range(2)]
    for loss in reversed(losses):
        loss.backward()
    assert sorted(products) == sorted(2 * once)


def test_a_checkpoint_after_other_coefficients(products):
    """What was kept for segments that run again is of the coefficients of then."""

    def run(model):
        loss = loss_of(model, CASE.batch())
        with torch.no_grad():
            for p in coefficients_of(model).values():
                p.mul_(0.5)
        loss.backward()
        return loss.detach(), gradients(model)

    def build():
        model = training()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    against_layers(build, run)


@pytest.mark.parametrize("how", ["whole", "selective", "in memory of the host"])
def test_other_hooks_on_what_is_saved(how):
    keep = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default])

    def run(model):
        for _ in range(2):
            if how == "whole":
                out = checkpoint(model, X, use_reentrant=False)
            elif how == "selective":
                out = checkpoint(model, X, use_reentrant=False, context_fn=keep)
            else:
                with torch.autograd.graph.save_on_cpu():
                    out = model(X)
            sum(one.square().mean() for one in out).backward()
        return (gradients(model),)

    against_layers(branches, run)


def test_several_passes_before_one_way_back():
    def run(model):
        first, second = (loss_of(model, CASE.batch(rows)) for rows in (2, 4))
        (first + 3 * second).backward()
        third = loss_of(model, CASE.batch(1))
        fourth = loss_of(model, CASE.batch(3))
        fourth.backward()
        third.backward()
        return (gradients(model),)

    against_layers(training, run)


class Branches(nn.Module):
    """Two ways that share no layer, and a module that one of them calls twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])

    def forward(self, x: Tensor, experts: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[Tensor, Tensor]:
        right = self.right(x)
        for place in experts:
            right = right + self.experts[place](right).tanh()
        return self.left(self.left(x).tanh()), right


def branches(method: str = "nola", **options: Any) -> PeftModel:
    model = get_peft_model(seeded(Branches), make_config(method, ["left", "right", "0", "1", "2", "3"], **options))
    fill(model)
    return model.train()


X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(3))


def test_two_losses_of_one_pass():
    """Each by itself, without retain_graph: their layers are not the same."""

    def run(model):
        left, right = model(X)
        left.square().mean().backward()
        first = {name: None if g is None else g.clone() for name, g in gradients(model).items()}
        right.square().mean().backward()
        return first, gradients(model)

    first, _ = against_layers(branches, run)
    assert {name.split(".")[2] for name, g in first.items() if g is not None} == {"left"}


class Mixed(nn.Module):
    """A pass with a part under a transform, a part without gradients and a part with them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = vmap(self.right)(x)
        with torch.no_grad():
            x = self.left(x)
        return self.left(self.right(x))


def test_a_pass_in_several_modes():
    def build():
        model = get_peft_model(seeded(Mixed), make_config("nola", ["left", "right"]))
        fill(model)
        return model.train()

    def run(model):
        out = model(X)
        out.square().mean().backward()
        return out.detach(), gradients(model)

    against_layers(build, run)


def test_a_checkpoint_around_a_layer_alone():
    """No pass, and the same number of saved tensors in both runs."""

    def run(model):
        left = model.get_base_model().left
        checkpoint(left, X, use_reentrant=False).square().mean().backward()
        model(X)[0].square().mean().backward()
        return (gradients(model),)

    against_layers(branches, run)


def test_second_derivatives():
    def run(model):
        p = next(iter(coefficients_of(model).values()))
        x = X.clone().requires_grad_()
        (of_x,) = torch.autograd.grad(model(x)[0].square().mean(), x, create_graph=True)
        of_x.square().sum().backward()
        return p.grad.clone(), gradients(model)

    against_layers(lambda: branches(contraction="token"), run)


# --- layers that are skipped ---


@pytest.mark.parametrize("method", OF_SUMS)
def test_skipped_layers_have_no_gradient(method):
    """None, as by layer: an optimizer with weight decay leaves them alone."""

    def run(model):
        optimizer = torch.optim.SGD(coefficients_of(model).values(), lr=0.01, weight_decay=0.5, momentum=0.9)
        found = []
        for experts in ((0, 1, 2, 3), (0, 2), (1,), (), (1, 3), (0, 1, 2, 3)):
            sum(out.square().mean() for out in model(X, experts=experts)).backward()
            found.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad()
            found.append({name: p.detach().clone() for name, p in coefficients_of(model).items()})
        return found

    found = against_layers(lambda: branches(method), run)
    assert [sum(g is None for g in one.values()) > 0 for one in found[::2]] == [False, True, True, True, True, False]


def test_who_was_skipped_is_left_out_of_the_next_product(products):
    model = branches(share_basis=True)
    experts = [(0, 1, 2, 3), (0,), (0,), (0, 1), (0, 1), (0, 1)]
    made = []
    for chosen in experts:
        products.clear()
        sum(out.square().mean() for out in model(X, experts=chosen)).backward()
        made.append(sorted({count for way, count in products if way == "forward"}))
    assert made == [[6], [6], [3], [1, 3], [4], [4]]


# --- what trains, and what is active ---


def test_some_coefficients_frozen():
    def build():
        model = training()
        for place, p in enumerate(coefficients_of(model).values()):
            p.requires_grad_(place % 3 != 0)
        return model

    _, found = against_layers(build, trained)
    assert any(g is None for g in found.values())


def test_several_adapters():
    def build():
        model = training()
        add_adapter(model, "second", CASE.config(), seed=2)
        add_adapter(model, "third", CASE.config(seed=5), seed=3)
        add_adapter(model, "fourth", Case("linear", "vera").config(), seed=4)
        model.base_model.set_adapter(["default", "second", "third", "fourth"])
        return model.train()

    against_layers(build, trained)


def test_an_adapter_is_set_between_passes():
    def build():
        model = training()
        add_adapter(model, "second", CASE.config(), seed=2)
        return model.train()

    def run(model):
        found = []
        for name in ("default", "second", "default"):
            model.set_adapter(name)
            found.append(outputs(model, CASE.batch()))
            found.append(trained(model)[1])
            model.zero_grad()
        model.base_model.set_adapter(["default", "second"])
        with model.disable_adapter():
            found.append(outputs(model, CASE.batch()))
        return *found, *trained(model)

    against_layers(build, run)


def test_an_adapter_is_set_in_the_middle_of_a_pass():
    def build():
        model = training()
        add_adapter(model, "second", CASE.config(), seed=2)
        layers = list(adapted_layers(model).values())
        layers[0].register_forward_hook(lambda *_: [one.set_adapter("second") for one in layers[1:]] and None)
        return model.train()

    against_layers(build, trained)


def in_place(c: Tensor) -> None:
    with torch.no_grad():
        c.mul_(0.5)


def other_memory(c: Tensor) -> None:
    c.data = 0.5 * c.data


@pytest.mark.parametrize("write", [in_place, other_memory])
def test_coefficients_are_written_in_the_middle_of_a_pass(write):
    def build():
        model = training()
        first, *_, last = adapted_layers(model).values()
        weights = [c for one in last.adapted["default"] for c in last.trained_coefficients("default", one).values()]
        first.register_forward_hook(lambda *_: [write(c) for c in weights] and None)
        return model

    def run(model):
        return outputs(model, CASE.batch()), outputs(model, CASE.batch())

    first, second = against_layers(build, run)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_streams_are_written_in_the_middle_of_a_pass(checkpointing):
    def build():
        model = training(Case("linear", "nola-own-basis"), basis_storage="packed")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        first, *_, last = adapted_layers(model).values()
        streams = last.randbasis_streams["default"].weight
        done = []

        def write(*_: object) -> None:
            if not done:
                done.append(streams.add_(1))

        first.register_forward_hook(write)
        return model

    against_layers(build, trained)


# --- coefficients change between passes ---


def through_data(model: PeftModel, _: Any) -> None:
    for p in coefficients_of(model).values():
        p.data.mul_(0.5)


def new_parameters(model: PeftModel, _: Any) -> None:
    for layer in adapted_layers(model).values():
        for attribute in layer.adapter_layer_names:
            leaf = layer.get_submodule(f"{attribute}.default")
            leaf.weight = nn.Parameter(0.5 * leaf.weight.detach())


def loaded(assign: bool) -> Callable[[PeftModel, Any], None]:
    def load(model: PeftModel, _: Any) -> None:
        state = {name: 0.5 * p.detach() for name, p in coefficients_of(model).items()}
        state |= {name: tensor for name, tensor in model.state_dict().items() if "randbasis_meaning" in name}
        model.load_state_dict(state, strict=False, assign=assign)
        model.requires_grad_(False)
        for p in coefficients_of(model).values():
            p.requires_grad_()

    return load


def from_a_folder(model: PeftModel, folder: Any) -> None:
    CASE.adapted(fill_seed=8).save_pretrained(folder)
    model.load_adapter(str(folder), "default", is_trainable=True)


def cast_and_back(model: PeftModel, _: Any) -> None:
    model.base_model._cast_adapter_dtype("default", autocast_adapter_dtype=True)
    model.to(torch.bfloat16).to(torch.float32)


def fused_steps(kind: type[torch.optim.Optimizer]) -> Callable[[PeftModel, Any], None]:
    def steps(model: PeftModel, _: Any) -> None:
        optimizer = kind(coefficients_of(model).values(), lr=0.1, fused=True)
        for _ in range(3):
            trained(model)
            optimizer.step()
            optimizer.zero_grad()

    return steps


CHANGES = {
    "through_data": through_data,
    "new_parameters": new_parameters,
    "load_state_dict": loaded(assign=False),
    "load_state_dict_assign": loaded(assign=True),
    "load_adapter": from_a_folder,
    "cast": cast_and_back,
    "sgd_fused": fused_steps(torch.optim.SGD),
    "adamw_fused": fused_steps(torch.optim.AdamW),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_coefficients_are_seen(change, checkpointing, tmp_path):
    def build():
        model = training()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def run(model):
        before = outputs(model, CASE.batch())
        trained(model)
        model.zero_grad()
        CHANGES[change](model, tmp_path)
        loss, found = trained(model.train())
        assert not torch.allclose(outputs(model, CASE.batch()), before)
        return before, loss, found

    against_layers(build, run)


def test_evaluation_inside_of_training():
    def run(model):
        found = []
        for step in range(3):
            loss = loss_of(model, CASE.batch())
            with torch.no_grad():
                found.append(outputs(model, CASE.batch(2)))
            model.eval()
            found.append(outputs(model, CASE.batch(3)))
            with torch.inference_mode():
                found.append(model(**CASE.batch(3)).logits.clone())
            model.train()
            loss.backward()
            found.append({name: g.clone() for name, g in gradients(model).items()})
            through_data(model, step)
        return found

    against_layers(training, run)


@pytest.mark.parametrize("case", CASES)
def test_evaluation_makes_a_product_once_a_change(case, products):
    model = case.adapted()
    outputs(model, case.batch())
    once = len(products)
    for rows in (4, 2, 1):
        outputs(model, case.batch(rows))
    assert len(products) == once
    through_data(model, None)
    products.clear()
    found = outputs(model, case.batch())
    assert 0 < len(products) == once
    with by_layer():
        assert_same(found, outputs(copy.deepcopy(model), case.batch()))
    if case.method != "nola-own-basis":
        assert once < sum(len(one.bound.sums) for la in adapted_layers(model).values() for one in la.adapted["default"])


# --- other ways into a model, and several at once ---


def test_a_part_of_a_model_called_by_itself(products):
    """A model of transformers inside of another one is a pass of its own; a layer alone makes its own factors."""

    def run(model):
        inner = model.get_base_model()
        ids = CASE.batch()["input_ids"]
        hidden = inner.model(input_ids=ids).last_hidden_state
        hidden.square().mean().backward()
        first = {name: None if g is None else g.clone() for name, g in gradients(model).items()}
        inner.model.layers[1].mlp(hidden.detach()).square().mean().backward()
        return hidden.detach(), first, gradients(model)

    against_layers(training, run)
    assert max(count for _, count in products) > 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_is_cut_short(error):
    def run(model):
        def fail(*_: object) -> None:
            raise error

        handle = list(adapted_layers(model).values())[3].register_forward_pre_hook(fail)
        with pytest.raises(error):
            loss_of(model, CASE.batch())
        handle.remove()
        through_data(model, None)
        return trained(model)

    against_layers(training, run)
    assert len(joint_factors._passes()) <= (error is KeyboardInterrupt)
    outputs(training(), CASE.batch())


def test_a_copy_trains_by_itself():
    def run(model):
        trained(model)
        other = copy.deepcopy(model)
        through_data(other, None)
        other.zero_grad()
        return *trained(other), *trained(model)

    against_layers(training, run)
    model = training()
    other = copy.deepcopy(model)
    (ours,), (theirs,) = ({id(h.__self__) for h in owners(one)} for one in (model, other))
    assert ours != theirs


def owners(model: nn.Module) -> list[Any]:
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook for hook in hooks if isinstance(getattr(hook, "__self__", None), JointFactors)]


def test_one_owner_for_all_adapters_until_the_last_is_gone():
    model = CASE.adapted()
    add_adapter(model, "second", CASE.config(), seed=2)
    assert len(owners(model)) == 2  # LlamaForCausalLM and the LlamaModel inside
    base = model.unload()
    assert not owners(base)
    left = [hook for module in base.modules() for hook in module._forward_hooks.values()]
    assert not [hook for hook in left if isinstance(getattr(hook, "__self__", None), JointFactors)]
    assert not any(module._forward_hooks_always_called for module in base.modules())


def test_threads():
    """Two passes at once, each with its own."""
    model, barrier = training(), threading.Barrier(2)

    def meet(*_: object) -> None:
        barrier.wait(20)

    list(adapted_layers(model).values())[2].register_forward_pre_hook(meet)
    found: dict[int, list[Tensor]] = {}

    def call(rows: int) -> None:
        ours = list(coefficients_of(model).values())
        found[rows] = list(torch.autograd.grad(loss_of(model, CASE.batch(rows)), ours))

    threads = [threading.Thread(target=call, args=(rows,)) for rows in (2, 4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(found) == 2
    with by_layer():
        for rows, got in found.items():
            alone = training()
            wanted = torch.autograd.grad(loss_of(alone, CASE.batch(rows)), list(coefficients_of(alone).values()))
            for one, other in zip(got, wanted, strict=True):
                assert_same(one, other)


# --- where it cannot serve ---


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What was said of layers that make their factors themselves."""
    joint_pass.say_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found: list[str] = []
        yield found
        found += [str(one.message) for one in caught]
    joint_pass.say_once.cache_clear()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_transforms_and_tracers():
    model = branches()
    with by_layer():
        expected = model(X)
    ours = {name: p.detach() for name, p in coefficients_of(model).items()}

    def loss(c: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, c, (x,))[1].square().mean()

    def wanted(x: Tensor) -> dict[str, Tensor]:
        for p in coefficients_of(model).values():
            p.grad = None
        with by_layer():
            model(x)[1].square().mean().backward()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in coefficients_of(model).items()}

    torch.testing.assert_close(grad(loss)(ours, X), wanted(X), **CLOSE)
    each = vmap(grad(loss), in_dims=(None, 0))(ours, X[:, None])
    torch.testing.assert_close({n: g[1] for n, g in each.items()}, wanted(X[1:2]), **CLOSE)
    given = {name: p.clone().requires_grad_() for name, p in ours.items()}
    of_given = torch.autograd.grad(loss(given, X), list(given.values()), materialize_grads=True)
    torch.testing.assert_close(dict(zip(given, of_given, strict=True)), wanted(X), **CLOSE)
    with FlopCounterMode(display=False):
        torch.testing.assert_close(model(X), expected, **CLOSE)
    traced = make_fx(lambda x: model(x)[1])(X)
    torch.testing.assert_close(traced(2 * X), model(2 * X)[1], **CLOSE)
    recorded = torch.jit.trace(model, (X,), check_trace=False)
    torch.testing.assert_close(recorded(2 * X)[1], model(2 * X)[1], **CLOSE)


def test_a_compiled_model_with_passes_before_and_after():
    model = branches()
    expected = model(X)[1]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X)[1], expected, **CLOSE)
    assert not joint_factors._passes()
    against_layers(lambda: model, lambda m: (m(X)[1].detach(),))
    torch.compiler.reset()


def test_a_layer_that_is_compiled_in_a_pass():
    def run(model):
        inner = model.get_base_model()
        inner.right = torch.compile(inner.right, backend="aot_eager", fullgraph=True)
        sum(out.square().mean() for out in model(X)).backward()
        return (gradients(model),)

    against_layers(branches, run)
    torch.compiler.reset()


def test_a_reentrant_checkpoint_is_said_once():
    joint_pass.say_once.cache_clear()
    model = training()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.warns(UserWarning, match="a reentrant checkpoint .* use_reentrant=False"):
        trained(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="torch|transformers")
        trained(model)


def test_too_many_numbers_are_refused(monkeypatch, products):
    joint_pass.say_once.cache_clear()
    monkeypatch.setattr(joint_pass, "LEAST_NUMBERS", 300)
    monkeypatch.setattr(joint_pass, "SHARE_OF_THE_BASE", 1000)
    with pytest.warns(UserWarning, match=r"would have [0-9,]+ numbers, more than"):
        against_layers(training, trained)
    assert {count for _, count in products} == {1, 2}  # the smallest group fits


def test_hooks_of_coefficients_are_called_with_gradients_alone():
    model = branches()
    for p in coefficients_of(model).values():
        p.register_hook(lambda g: 2 * g)

    def run(model):
        sum(out.square().mean() for out in model(X, experts=(0, 2))).backward()
        found = gradients(model)
        model.zero_grad()
        return (found,)

    against_layers(lambda: model, run)


def test_coefficients_that_are_made_when_they_are_read():
    class Half(nn.Module):
        def forward(self, c: Tensor) -> Tensor:
            return c / 2

    def build():
        model = branches()
        for layer in adapted_layers(model).values():
            nn.utils.parametrize.register_parametrization(
                layer.get_submodule("randbasis_nola_a.default"), "weight", Half()
            )
        return model

    def run(model):
        sum(out.square().mean() for out in model(X)).backward()
        return ({name: p.grad for name, p in model.named_parameters() if p.requires_grad},)

    against_layers(build, run)


# --- the node of autograd ---


def slabs(slab: Slab, count: int) -> list[Slab]:
    """Slabs that differ in their stream alone."""
    return [dataclasses.replace(slab, basis=dataclasses.replace(slab.basis, stream=i)) for i in range(count)]


def small_sum(storage: str, **options: Any) -> WeightedSum:
    config = NolaConfig(r=3, num_basis=5, basis_storage=storage, target_modules=["left"], **options)
    (layer,) = adapted_layers(get_peft_model(seeded(Branches), config)).values()
    return layer.adapted["default"][0].bound.sums["nola_a"]


@pytest.mark.parametrize("storage", ["dense", "packed", "recompute"])
def test_gradients_of_joint_sums(storage):
    one = small_sum(storage)
    drawn = torch.Generator().manual_seed(0)
    coefficients = [torch.randn(5, dtype=torch.float64, generator=drawn).requires_grad_() for _ in range(3)]
    others = [dataclasses.replace(one, basis=hold(other, one.basis.storage)) for other in slabs(one.basis.slab, 3)]
    for sums in [one] * 3, others:
        for each, c, made in zip(sums, coefficients, sums_of(sums, coefficients), strict=True):
            torch.testing.assert_close(made, each.of(c))
        assert torch.autograd.gradcheck(lambda *c, sums=sums: sums_of(sums, c), coefficients)
        assert torch.autograd.gradgradcheck(lambda *c, sums=sums: [s.tanh() for s in sums_of(sums, c)], coefficients)


def test_what_is_kept_for_checkpoints_goes_with_the_way_back():
    model = training()
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def kept() -> list[Tensor]:
        gc.collect()
        values = [one for one in gc.get_objects() if type(one) is joint_sums.Values]
        return [one.sums for one in values if one.sums is not None]

    loss = loss_of(model, CASE.batch())
    assert kept()
    loss.backward()
    assert not kept()
    loss = loss_of(model, CASE.batch())
    assert kept()
    del loss
    assert not kept()


# --- how many calls ---


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("storage", ["auto", "recompute"])
def test_calls_of_a_training_step_of_32_layers(storage, checkpointing, products, monkeypatch):
    """At most ten a distinct shape, forward and back, whatever the depth; A⁰ is counted where it is drawn."""
    base = seeded(lambda: tiny_llama(num_hidden_layers=32))
    config = NolaConfig(r=2, num_basis=4, target_modules="all-linear", basis_storage=storage, init_weights=False)
    model = get_peft_model(base, config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    drawn: list[int] = []
    multiply = ops._multiply
    monkeypatch.setattr(ops, "_multiply", lambda x, *args: drawn.append(x.shape[0]) or multiply(x, *args))
    trained(model, token_batch(1, 3))
    layers = adapted_layers(model)
    shapes = {(layer.out_features, layer.in_features) for layer in layers.values()}
    assert len(layers) == 32 * 7
    assert max(count for _, count in products) > 32
    assert {way for way, _ in products} == {"forward", "back"}
    assert len(products) <= 10 * len(shapes)
    assert len(drawn) <= 10 * len(shapes)
    assert (storage == "recompute") == bool(drawn)


# --- several processes ---

_WORKER = """
import sys, warnings, torch
import torch.distributed as dist
torch.set_num_threads(1)
sys.path[:0] = sys.argv[1:3]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from test_joint_factors import assert_same, branches, by_layer
from tuner_cases import coefficients_of
dist.init_process_group("gloo")
rank = dist.get_rank()

def steps(wrap, experts, inputs):
    model = branches()
    parallel = wrap(model)
    optimizer = torch.optim.AdamW(coefficients_of(model).values(), lr=0.1, weight_decay=0.5)
    for step in range(4):
        x = torch.randn(6, 24, generator=torch.Generator().manual_seed(step))
        sum(out.square().mean() for out in parallel(inputs(x), experts=experts(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for n, p in coefficients_of(model).items()}

def halves(x):
    return x[3 * rank : 3 * rank + 3]

def ddp(model):
    return DistributedDataParallel(model, find_unused_parameters=True)

def experts(step):  # some are called by one process alone, some by none
    return ((0, 1), (0, 2))[(rank + step) % 2]

found = steps(ddp, experts, halves)
with by_layer():
    assert_same(found, steps(ddp, experts, halves))
whole = steps(lambda model: model, lambda _: (0, 1, 2, 3), lambda x: x)
assert_same(steps(ddp, lambda _: (0, 1, 2, 3), halves), whole)

mesh = init_device_mesh("cpu", (2,))
def sharded(model):
    inner = model.get_base_model()
    for part in (inner.left, inner.right, *inner.experts):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
def sharded_at_once(model):
    fully_shard(model, mesh=mesh)
    return model
for wrap in (sharded, sharded_at_once):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from randbasis.tuner import joint_pass
        joint_pass.say_once.cache_clear()
        found = steps(wrap, lambda _: (0, 1, 2, 3), halves)
    assert_same(found, whole)
    assert sum("coefficients are sharded" in str(one.message) for one in caught) == 1, [str(c.message) for c in caught]
dist.barrier()
dist.destroy_process_group()
print(f"equal {rank}")
"""


def test_two_processes(request, console_environment, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    here = request.path.parent
    command = [sys.executable, "-W", "ignore", str(script), str(here.parent / "support"), str(here)]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 20_000), "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            command,
            env=console_environment | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, (out, err) in enumerate([worker.communicate(timeout=240) for worker in workers]):
        assert out.endswith(f"equal {rank}\n"), err[-3000:]
