"""Targets that a model goes past: refused, left out, or called after all, against what the model computes."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tuner_cases import (
    OF_SEEDS,
    ONE_EACH,
    adapted_layers,
    fill,
    make_config,
    needs_pair,
    outputs,
    seeded,
    snapshot,
    tiny_gpt2,
    tiny_llama,
    token_batch,
)

from randbasis.errors import BypassedLayerError, MergeError, ShardedBaseError

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def build(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        kind = getattr(transformers, name)
        return seeded(kind, kind.config_class(**options))

    return make


class Reads(nn.Module):
    """A model that goes past its layers, each in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.own, self.held = (nn.Linear(16, 16) for _ in range(4))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.same = self.held

    def _project(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.read.weight, self.read.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.called.weight.dtype or not isinstance(self.called.weight, Tensor):
            x = x.to(self.called.weight.dtype)
        x = self.held(self._project(self.called(x)))
        return self.attention(x, x, x, need_weights=False)[0] + self.same(x)


class ReadsByOtherNames(nn.Module):
    """Weights of layers that have a name of their own, or none, where they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.renamed = nn.Linear(16, 16), nn.Linear(16, 16)
        self.looped, self.counted, self.own = (nn.ModuleList([nn.Linear(16, 16) for _ in range(2)]) for _ in range(3))
        self.keyed = nn.ModuleDict({"first": nn.Linear(16, 16), "second": nn.Linear(16, 16)})

    def forward(self, x: Tensor) -> Tensor:
        projection = self.renamed
        own = self.own
        x = nn.functional.linear(self.called(x), projection.weight, projection.bias)
        for layer in self.looped:
            x = nn.functional.linear(x, layer.weight)
        for number in range(2):
            x = nn.functional.linear(x, self.counted[number].weight)
        x = nn.functional.linear(x, self.keyed["first"].weight)
        for layer in own:
            x = layer(x.to(layer.weight.device))
        return self.keyed["second"](x)


class Asks(nn.Module):
    """Looks at weights and calls the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(16, 16), nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        there = self.first.weight is not None
        x = self.first(x.to(self.first.weight.data.dtype)) if there else x
        if self.layers[0].weight is None or self.layers[0].weight.data.is_cuda:
            return x
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype))
        return x


MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
BYPASSED = {
    "a function of weights": (lambda: seeded(Reads), ["called", "read"], "'read'.*Reads reads its weight"),
    "a name of its own": (lambda: seeded(ReadsByOtherNames), ["called", "renamed"], "'renamed'.*reads its weight"),
    "a loop": (lambda: seeded(ReadsByOtherNames), ["own.1", "looped.1"], "'looped.1'.*reads its weight"),
    "a number": (lambda: seeded(ReadsByOtherNames), ["own.0", "counted.0"], "'counted.0'.*reads its weight"),
    "a key": (lambda: seeded(ReadsByOtherNames), ["keyed.second", "keyed.first"], "'keyed.first'.*reads its weight"),
    "attention of torch": (lambda: seeded(Reads), ["called", "out_proj"], "MultiheadAttention reads its weight"),
    "two names": (lambda: seeded(Reads), ["called", "held"], "one module in several places, held and same"),
    "siglip": (
        build("SiglipVisionModel", **SMALL, image_size=16, patch_size=8),
        ["q_proj", "head.attention.out_proj"],
        "MultiheadAttention reads",
    ),
    "mobilebert": (
        build("MobileBertForMaskedLM", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
              num_attention_heads=4, embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
        ["query", "predictions.dense"],
        "MobileBertLMPredictionHead reads",
    ),
    "mamba out_proj": (build("MambaForCausalLM", **MAMBA), ["in_proj", "out_proj"], "MambaMixer reads"),
    "mamba dt_proj": (build("MambaForCausalLM", **MAMBA), ["in_proj", "dt_proj"], "MambaMixer reads"),
    "falcon_mamba": (build("FalconMambaForCausalLM", **MAMBA), ["in_proj", "x_proj"], "FalconMambaMixer reads"),
    "rwkv": (
        build("RwkvForCausalLM", vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
        ["attention.key", "attention.output"],
        "RwkvModel reads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize("name", BYPASSED)
def test_targets_that_are_read_and_not_called_are_refused(name, method):
    make, targets, message = BYPASSED[name]
    model = make()
    before = snapshot(model)
    with pytest.raises(BypassedLayerError, match=message):
        get_peft_model(model, make_config(method, targets))
    assert snapshot(model) == before
    get_peft_model(model, make_config(method, targets[:1]))


@pytest.mark.parametrize(
    ("kind", "attribute"),
    [
        ("wavlm.modeling_wavlm.WavLMAttention", "q_proj"),
        ("nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer", "out_proj"),
        ("bamba.modeling_bamba.BambaMixer", "out_proj"),
        ("zamba2.modeling_zamba2.Zamba2MambaMixer", "out_proj"),
        ("jamba.modeling_jamba.JambaMambaMixer", "dt_proj"),
        ("mamba2.modeling_mamba2.Mamba2Mixer", "out_proj"),
        ("falcon_h1.modeling_falcon_h1.FalconH1Mixer", "out_proj"),
        ("granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer", "out_proj"),
    ],
)
def test_classes_of_transformers_that_read_a_weight(kind, attribute):
    module, _, name = f"transformers.models.{kind}".rpartition(".")
    if attribute == "dt_proj" and transformers.__version__.startswith("5.14."):
        pytest.skip("called there, with its bias taken off")
    owner = nn.Module.__new__(getattr(pytest.importorskip(module), name))
    nn.Module.__init__(owner)
    setattr(owner, attribute, nn.Linear(8, 8))
    root = nn.Sequential(owner)
    with pytest.raises(BypassedLayerError, match=f"{name} reads its weight"):
        get_peft_model(root, make_config("nola", [attribute]))


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (lambda: seeded(Asks), "all-linear"),
        (lambda: seeded(tiny_gpt2), "all-linear"),
        (lambda: seeded(tiny_llama), "all-linear"),
        (build("BloomModel", hidden_size=32, n_layer=1, n_head=4, vocab_size=64), "all-linear"),
        (build("T5Model", d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=64), "all-linear"),
        (build("DebertaModel", **SMALL, vocab_size=64, pos_att_type=["c2p"], relative_attention=True), ["in_proj"]),
        (build("RwkvForCausalLM", vocab_size=64, hidden_size=32, num_hidden_layers=2, rescale_every=0), "all-linear"),
    ],
)  # fmt: skip
def test_weights_that_are_only_asked_about_are_no_bypass(make, targets, recwarn):
    get_peft_model(make(), make_config("nola", targets))
    assert not [w for w in recwarn if "leaves out" in str(w.message)]


def test_all_linear_leaves_out_what_is_bypassed_and_says_so(tmp_path):
    with pytest.warns(
        UserWarning, match=r"leaves out 3 linear layers \(attention.out_proj: Multi.*held: .*read: Reads"
    ):
        model = get_peft_model(seeded(Reads), make_config("nola", "all-linear"))
    assert set(adapted_layers(model)) == {"base_model.model.called", "base_model.model.own"}
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(seeded(Reads), tmp_path)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=mask)


@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["layers.1.linear1"]])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_torch_computes_with_the_adapter(padded, targets, method):
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]]) if padded else None
    model = get_peft_model(seeded(Encoder), make_config(method, targets))
    fill(model)
    keep = ~mask if mask is not None else torch.ones(3, 5, dtype=torch.bool)
    trained = model.train()(x, mask)[keep]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, mask)[keep], trained, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(seeded(Encoder)(x, mask)[:, :3], model(x, mask)[:, :3], atol=1e-3)
        model.merge_adapter()
        torch.testing.assert_close(model(x, mask)[keep], trained, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        base = model.unload()
        assert base.encoder.use_nested_tensor
        assert all(layer.activation_relu_or_gelu for layer in base.encoder.layers)


# --- base layers that do more than W x + b ---


def _clamped(layer: nn.Module) -> None:
    plain = layer.forward
    layer.forward = lambda x: plain(x).clamp(-0.1, 0.1)


def _by_accelerate(layer: nn.Module) -> None:
    class Clamp(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output.clamp(-0.1, 0.1)

    add_hook_to_module(layer, Clamp())


OWN = {
    "forward on the instance": _clamped,
    "accelerate": _by_accelerate,
    "hook": lambda layer: layer.register_forward_hook(lambda m, args, out: out.clamp(-0.1, 0.1)),
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda m, args: (args[0] * 3,)),
    "parametrization": lambda layer: nn.utils.parametrizations.weight_norm(layer),
}


@pytest.mark.parametrize("method", ONE_EACH)
@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("first", ["base", "adapter"])
@pytest.mark.parametrize("contraction", ["auto", "token", "weight"])
def test_what_a_base_layer_does_besides_is_done_in_every_mode(kind, first, contraction, method):
    if (kind, first) == ("parametrization", "adapter"):
        pytest.skip("it puts another class in place of the layer's")
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    base, config = (
        seeded(nn.Sequential, OrderedDict(fc=nn.Linear(16, 16))),
        make_config(method, ["fc"], contraction=contraction),
    )
    layer = base[0]
    if first == "base":
        OWN[kind](layer)
        want = base(x).detach()
        model = get_peft_model(base, config)
    else:
        model = get_peft_model(base, config)
        OWN[kind](layer)
        want = layer(x).detach()
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), want, rtol=1e-5, atol=1e-6)
    fill(model)
    trained = model.train()(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained, rtol=1e-4, atol=1e-5)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(MergeError, match=r"the base layer 'fc' has .*remove it first"):
                merge()
        torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", OF_SEEDS)
@pytest.mark.parametrize("to_disk", [False, True], ids=["to CPU", "to disk"])
def test_offloaded_bases_compute_with_the_coefficients(to_disk, method, tmp_path):
    want_model = get_peft_model(seeded(tiny_llama), make_config(method, ["q_proj", "down_proj"]))
    fill(want_model)
    want_model.save_pretrained(tmp_path / "adapter")
    want = outputs(want_model.eval(), token_batch())
    base = seeded(tiny_llama)
    plain = outputs(base, token_batch())
    disk_offload(base, tmp_path / "weights", torch.device("cpu")) if to_disk else cpu_offload(base, torch.device("cpu"))
    model = get_peft_model(base, make_config(method, ["q_proj", "down_proj"]))
    assert not any(p.is_meta for name, p in model.named_parameters() if ".randbasis_" in name)
    torch.testing.assert_close(outputs(model.eval(), token_batch()), plain)
    fill(model)
    torch.testing.assert_close(outputs(model.eval(), token_batch()), want)
    if not to_disk:
        model.merge_adapter()
        torch.testing.assert_close(outputs(model, token_batch()), want, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(outputs(model, token_batch()), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ONE_EACH)
def test_a_base_that_is_cut_in_pieces_is_refused(method):
    """As a tensor-parallel base has it: half of the rows in this process, and a layer that still says them all."""
    base = seeded(tiny_llama)
    layer = base.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight[:16].clone())
    before = snapshot(base)
    with pytest.raises(
        ShardedBaseError, match=r"q_proj' must have its whole weight.*load the base model without tp_plan"
    ):
        get_peft_model(base, make_config(method, ["q_proj"]))
    assert snapshot(base) == before


# --- the first backward pass ---


def _weights(layer: nn.Linear) -> Tensor:
    return layer.weight


class Sly(nn.Module):
    """Goes past a layer in a way that no reading of its class shows."""

    def __init__(self, segments: bool = False) -> None:
        super().__init__()
        self.called, self.gone, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2)
        self.segments = segments

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.called, x.requires_grad_(), use_reentrant=True) if self.segments else self.called(x)
        return self.head(nn.functional.linear(x, _weights(self.gone)))


def _step(model: nn.Module) -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    model(x).square().sum().backward()


def _warnings(record: Any) -> list[str]:
    return [str(w.message) for w in record if "got no gradient" in str(w.message)]


@pytest.mark.parametrize("method", ONE_EACH)
def test_the_first_backward_pass_names_layers_without_a_gradient_once(method, recwarn):
    model = get_peft_model(Sly(), make_config(method, ["called", "gone"]))
    for _ in range(3):
        _step(model)
        model.zero_grad()
    (message,) = _warnings(recwarn)
    assert message.startswith("1 of 2 adapted layers got no gradient in the first backward pass: gone. ")
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters() if p.requires_grad)  # later steps are free


def test_a_trained_head_is_enough_to_see_that_no_coefficient_trains(recwarn):
    model = get_peft_model(Sly(), make_config("nola", ["gone"], modules_to_save=["head"]))
    _step(model)
    assert len(_warnings(recwarn)) == 1


@pytest.mark.parametrize("method", ONE_EACH)
def test_models_that_call_every_layer_hear_nothing(method, recwarn):
    model = get_peft_model(seeded(tiny_llama), make_config(method, "all-linear"))
    model.add_adapter("frozen", make_config(method, ["q_proj"]))
    model.train()
    for _ in range(2):  # one step of two batches
        model(**token_batch(), labels=token_batch()["input_ids"]).loss.backward()
    model.set_adapter("frozen")
    model(**token_batch(), labels=token_batch()["input_ids"]).loss.backward()
    assert not _warnings(recwarn)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_models_hear_nothing(reentrant, recwarn):
    model = get_peft_model(seeded(tiny_llama), make_config("nola", "all-linear")).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(2):
        model(**token_batch(), labels=token_batch()["input_ids"]).loss.backward()
    assert not _warnings(recwarn)


def test_a_checkpointed_segment_does_not_judge_for_the_rest(recwarn):
    model = get_peft_model(Sly(segments=True), make_config("nola", ["called", "gone"], modules_to_save=["head"]))
    for _ in range(3):
        _step(model)
    (message,) = _warnings(recwarn)
    assert message.startswith("1 of 2 adapted layers got no gradient in the first backward pass: gone. ")


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("method", ONE_EACH)
def test_a_backward_pass_that_runs_out_of_memory_judges_nothing(method, segments, recwarn):
    """accelerate and the Trainer then go on with a smaller batch, and every layer is reached."""
    model = get_peft_model(seeded(tiny_llama), make_config(method, "all-linear")).train()
    if segments:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": True})

    def full(gradient: Tensor) -> None:
        raise torch.OutOfMemoryError

    def train() -> None:
        model(**token_batch(), labels=token_batch()["input_ids"]).loss.backward()

    first = next(p for name, p in model.named_parameters() if p.requires_grad and "layers.0" in name)
    handle = first.register_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        train()
    assert any(p.grad is not None for p in model.parameters())  # it had begun
    handle.remove()
    for _ in range(3):
        model.zero_grad()
        train()
    assert not _warnings(recwarn)


@needs_pair
def test_transformers_own_way_in_is_watched_too(recwarn):
    base = seeded(tiny_llama)
    base.add_adapter(make_config("nola", ["q_proj", "v_proj"]))
    layer = base.model.layers[0].self_attn.v_proj
    base.model.layers[0].self_attn.forward = _past(base.model.layers[0].self_attn, layer)
    base(**token_batch(), labels=token_batch()["input_ids"]).loss.backward()
    (message,) = _warnings(recwarn)
    assert "layers.0.self_attn.v_proj" in message


def _past(attention: nn.Module, layer: nn.Module) -> Callable[..., Any]:
    plain = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        attention.v_proj = layer.base_layer
        try:
            return plain(*args, **kwargs)
        finally:
            attention.v_proj = layer

    return forward
