"""Steps of decoding: prepared once whatever the precision, and followed whole by a compiler with a static cache."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import StaticCache
from tuner_cases import ONE_EACH, fill, make_config, seeded, tiny_llama

from randbasis.tuner.layer import RandbasisLinear
from randbasis.tuner.prepared_pass import PreparedPass

TARGETS = ["q_proj", "v_proj", "down_proj"]
PROMPT = torch.tensor([[5, 9, 3, 7, 2], [4, 4, 8, 1, 6]])
STEPS = 8


def adapted(method: str, dtype: torch.dtype = torch.float32) -> Any:
    base = seeded(tiny_llama).to(dtype)
    model = peft.get_peft_model(base, make_config(method, TARGETS)).eval()
    fill(model)
    return model


def generated(model: Any, **options: object) -> Tensor:
    return model.generate(
        input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=STEPS, min_new_tokens=STEPS,
        do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ONE_EACH)
def test_all_steps_but_two_are_prepared(method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Coefficients stay in float32 beside a base in half precision: they are cast once, not in each step."""
    model, counts = adapted(method, dtype), {"forward": 0, "prepared": 0}
    forward, add_to = RandbasisLinear.forward, PreparedPass.add_to

    def counted(kind: str, run: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[kind] += 1
            return run(*args, **kwargs)

        return call

    monkeypatch.setattr(RandbasisLinear, "forward", counted("forward", forward))
    monkeypatch.setattr(PreparedPass, "add_to", counted("prepared", add_to))
    generated(model)
    layers = len(TARGETS) * model.config.num_hidden_layers
    assert {one.dtype for one in model.parameters() if one.requires_grad} == {torch.float32}
    assert counts == {"forward": STEPS * layers, "prepared": (STEPS - 2) * layers}


@pytest.mark.parametrize("method", ONE_EACH)
def test_a_compiler_follows_generation_with_a_static_cache(method: str):
    model = adapted(method)
    expected = generated(model)
    inner = model.base_model.model
    torch._dynamo.reset()
    inner.forward = torch.compile(inner.forward, backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    found = generated(model, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the prompt, and every step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ONE_EACH)
def test_a_step_with_a_static_cache_is_recorded_in_a_cuda_graph(method: str):
    model = adapted(method).cuda()
    words, length = PROMPT.cuda(), PROMPT.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length + STEPS)

    def step(token: Tensor, place: Tensor) -> Tensor:
        return model(input_ids=token, past_key_values=cache, cache_position=place, use_cache=True).logits

    with torch.no_grad():
        model(input_ids=words, past_key_values=cache, cache_position=torch.arange(length, device="cuda"))
        token, place = words[:, -1:].clone(), torch.tensor([length], device="cuda")
        aside = torch.cuda.Stream()
        with torch.cuda.stream(aside):
            for _ in range(3):
                expected = step(token, place).clone()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step(token, place)
        graph.replay()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
