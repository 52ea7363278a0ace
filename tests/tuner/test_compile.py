"""`torch.compile` without graph breaks, forward and backward."""

import shutil

import pytest
import torch
from peft import get_peft_model
from tuner_cases import (
    ONE_EACH,
    Case,
    adapted_layers,
    coefficients_of,
    fill,
    loss_of,
    make_config,
    outputs,
    seeded,
    tiny_phi3,
    token_batch,
)

#: Each method on each kind of layer, each order with each method; compiling costs seconds.
COMPILED = [
    pytest.param(Case(place, method), order, id=f"{place}-{method}-{order}")
    for place, order in (("linear", "token"), ("conv1d", "weight"), ("c_attn", "token"), ("in_proj", "weight"))
    for method in ONE_EACH
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def adapted_block(case: Case, order: str):
    """An adapted layer of a model, and inputs for it."""
    model = case.adapted(contraction=order)
    name, layer = next(iter(adapted_layers(model).items()))
    x = torch.randn(2, 9, layer.in_features, generator=torch.Generator().manual_seed(0))
    return model, model.get_submodule(name), x


def gradients(model, call, x):
    model.zero_grad()
    loss = call(x).square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in coefficients_of(model).items() if p.grad is not None}


@pytest.mark.parametrize(("case", "order"), COMPILED)
def test_full_graph_forward_and_backward(case, order):
    model, block, x = adapted_block(case, order)
    expected = gradients(model.train(), block, x)
    assert expected[1]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(model, compiled, x), expected, rtol=1e-4, atol=1e-6)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)


def test_a_whole_language_model_with_all_methods():
    """Phi-3 with its fused projections, an adapter of each method active at once."""
    targets = ["qkv_proj[q,v]", "gate_up_proj[up]"]
    model = get_peft_model(seeded(tiny_phi3), make_config("nola", targets), adapter_name="nola")
    for method in ONE_EACH[1:]:
        model.add_adapter(method, make_config(method, targets))
    for method in ONE_EACH:
        fill(model, method)
    model.base_model.set_adapter(list(ONE_EACH))
    expected = loss_of(model.train(), token_batch())
    expected.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = loss_of(torch.compile(model, fullgraph=True, backend="aot_eager"), token_batch())
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(got) == sum(len(coefficients_of(model, method)) for method in ONE_EACH)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["nola", "randlora"])
def test_steps_do_not_recompile(method):
    """One graph serves all steps: changed coefficients are inputs of it, not constants in it."""
    model, block, x = adapted_block(Case("in_proj", method), "auto")
    model.train()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    optimizer = torch.optim.SGD(coefficients_of(model).values(), lr=0.1)
    for _ in range(3):
        loss = compiled(x).square().mean()
        torch.testing.assert_close(loss, block(x).square().mean(), rtol=1e-4, atol=1e-6)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(graphs) == 1


def test_after_another_adapter_is_chosen():
    case = Case("in_proj", "vera")
    model = case.adapted()
    model.add_adapter("other", case.config(seed=4, init_weights=False))
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(outputs(compiled, case.batch()), outputs(model, case.batch()), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C++ compiler: there is no gcc")
def test_inductor():
    model, block, x = adapted_block(Case("c_attn", "nola"), "auto")
    expected = gradients(model.train(), block, x)
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(gradients(model, compiled, x), expected, rtol=1e-3, atol=1e-5)
