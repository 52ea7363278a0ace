"""Tiny models, our methods, and every pair of the two: what the tests of the tuner are run on."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

from randbasis import (
    METHODS,
    Nola,
    NolaConfig,
    PrancConfig,
    RandbasisConfig,
    RandbasisLinear,
    RandLora,
    RandLoraConfig,
    VeraConfig,
    basis_entries,
    parse_law,
)
from randbasis.methods import LoraXs
from randbasis.methods.bound_loraxs import BoundLoraXs
from randbasis.methods.bound_nola import BoundNola
from randbasis.methods.bound_pranc import BoundPranc
from randbasis.methods.bound_randlora import BoundRandLora
from randbasis.methods.bound_vera import BoundVera
from randbasis.tuner.config import LoraXsConfig
from randbasis.tuner.layer_adapters import frozen_weight

#: What each method is where it is bound.
BOUNDS = {
    "nola": BoundNola,
    "pranc": BoundPranc,
    "randlora": BoundRandLora,
    "vera": BoundVera,
    "loraxs": BoundLoraXs,
}
VOCABULARY = 64
WIDTH = 24
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class FusedBlock(nn.Module):
    """A plain torch model with two fused projections, as vision transformers and `MultiheadAttention` name them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.in_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        for projection in (self.qkv, self.in_proj):
            query, key, value = projection(x).chunk(3, dim=-1)
            x = self.norm(x + nn.functional.scaled_dot_product_attention(query, key, value))
        return self.head(x)


def tiny_gpt2(**options: Any) -> GPT2LMHeadModel:
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **quiet, **SPECIAL, **options}))


LLAMA_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA_SIZES, **SPECIAL, **options}))


def tiny_phi3() -> Phi3ForCausalLM:
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}
    return Phi3ForCausalLM(Phi3Config(**LLAMA_SIZES, **SPECIAL, **quiet))


def tiny_t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(**sizes, **special))


def seeded(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Any:
    """The same random weights at every call, in evaluation mode, without moving the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return build(*args, **kwargs).eval()


def token_batch(rows: int = 4, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def vector_batch(rows: int = 4) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 6, WIDTH, generator=torch.Generator().manual_seed(rows))}


@dataclass(frozen=True)
class Place:
    """Where an adapter sits: a model and its targets."""

    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    batch: Callable[..., dict[str, Tensor]] = token_batch


PLACES = {
    "linear": Place(tiny_llama, ("q_proj", "v_proj", "down_proj")),
    "conv1d": Place(tiny_gpt2, ("c_attn", "c_proj", "c_fc")),
    "c_attn": Place(tiny_gpt2, ("c_attn[q]", "c_attn[v]")),
    "qkv_proj": Place(tiny_phi3, ("qkv_proj[q,v]", "gate_up_proj[up]")),
    "in_proj": Place(FusedBlock, ("qkv[0/3,2/3]", "in_proj[1/3]"), vector_batch),
}

#: Small enough to be quick, and no number divides another by accident.
OPTIONS: dict[str, tuple[type[RandbasisConfig], dict[str, Any]]] = {
    "nola": (NolaConfig, {"r": 3, "num_basis": 6, "num_basis_b": 5}),
    "nola-plain": (NolaConfig, {"r": 3, "num_basis": 6, "parametrization": "plain", "law": "normal"}),
    "nola-own-basis": (NolaConfig, {"r": 3, "num_basis": 6, "share_basis": False}),
    "vera": (VeraConfig, {"r": 7}),
    "randlora": (RandLoraConfig, {"r": 5, "scaling": "paper", "law": "sparse(3)"}),
    "pranc": (PrancConfig, {"num_basis": 6, "law": "uniform"}),
    "loraxs": (LoraXsConfig, {"r": 4}),
    "nola-hashed": (NolaConfig, {"r": 3, "num_basis": 6, "num_basis_b": 5, "law": "hashed"}),
    "pranc-hashed": (PrancConfig, {"num_basis": 6, "law": "hashed"}),
}
#: Those that share coefficients, math (26): each has tests of its own beside those of its method.
TIED: dict[str, tuple[type[RandbasisConfig], dict[str, Any]]] = {
    "nola-tied": (NolaConfig, {"r": 3, "num_basis": 6, "num_basis_b": 5, "tie": "model"}),
    "nola-tied-blocks": (NolaConfig, {"r": 3, "num_basis": 6, "parametrization": "plain", "tie": "block:1"}),
    "pranc-tied": (PrancConfig, {"num_basis": 6, "law": "normal", "tie": "block:1"}),
    "pranc-tied-whole": (PrancConfig, {"num_basis": 6, "tie": "model"}),
}
#: One of each method, for tests in which its options do not matter.
ONE_EACH = ("nola", "vera", "randlora", "pranc", "loraxs")


#: Those whose ΔW coefficients alone give.
OF_SEEDS = tuple(name for name in ONE_EACH if not METHODS[name].needs_base)


def make_config(method: str, targets: Any = None, **options: Any) -> RandbasisConfig:
    config_class, common = (OPTIONS | TIED)[method]
    listed = list(targets) if isinstance(targets, tuple) else targets
    return config_class(**{"seed": 11, "target_modules": listed, **common, **options})


@dataclass(frozen=True)
class Case:
    """One method in one place."""

    place: str
    method: str

    @property
    def targets(self) -> tuple[str, ...]:
        return PLACES[self.place].targets

    def base(self) -> Any:
        return seeded(PLACES[self.place].build)

    def config(self, **options: Any) -> RandbasisConfig:
        return make_config(self.method, options.pop("target_modules", self.targets), **options)

    def batch(self, rows: int = 4) -> dict[str, Tensor]:
        return PLACES[self.place].batch(rows)

    def adapted(self, fill_seed: int = 1, **options: Any) -> PeftModel:
        """The base with a trained-looking adapter, in evaluation mode."""
        model = get_peft_model(self.base(), self.config(**options))
        fill(model, seed=fill_seed)
        return model.eval()


CASES = [pytest.param(Case(place, method), id=f"{place}-{method}") for place in PLACES for method in OPTIONS]
TIED_CASES = [pytest.param(Case(place, method), id=f"{place}-{method}") for place in PLACES for method in TIED]
#: Without those whose ΔW is made of the base weight too.
CASES_OF_SEEDS = [one for one in CASES if one.values[0].method != "loraxs"]
#: For costly tests: each method in each place, without the variants of NOLA.
PLAIN_CASES = [pytest.param(Case(place, method), id=f"{place}-{method}") for place in PLACES for method in ONE_EACH]


def coefficients_of(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The coefficients of one adapter, by their name in the model."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".randbasis_" in name and name.endswith(f".{adapter}.weight")
    }


@torch.no_grad()
def fill(model: nn.Module, adapter: str = "default", seed: int = 1, size: float = 0.3) -> None:
    """Give an adapter the coefficients of an imagined training, so that ΔW is far from 0."""
    generator = torch.Generator().manual_seed(seed)
    found = coefficients_of(model, adapter)
    assert found, f"there is no adapter {adapter!r}"
    for parameter in found.values():
        parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def add_adapter(model: PeftModel, adapter: str, config: RandbasisConfig, seed: int) -> None:
    """Add an adapter with coefficients of its own."""
    model.add_adapter(adapter, config)
    fill(model, adapter, seed)
    model.eval()


@torch.no_grad()
def outputs(model: nn.Module, batch: Mapping[str, Any], **kwargs: Any) -> Tensor:
    """Logits, whatever the model wraps them in."""
    result = model(**batch, **kwargs)
    return result if isinstance(result, Tensor) else result.logits


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """A smooth number that depends on every output."""
    result = model(**batch)
    logits = result if isinstance(result, Tensor) else result.logits
    return logits.double().square().mean() if logits.dtype == torch.float64 else logits.float().square().mean()


def adapted_layers(model: nn.Module) -> dict[str, RandbasisLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RandbasisLinear)}


def bits(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The exact content of tensors, for comparisons in which NaN equals itself."""
    return {name: tensor.detach().clone().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def snapshot(model: nn.Module) -> tuple[str, dict[str, bytes], dict[str, bool]]:
    """Everything that a refused call must leave as it was: structure, numbers, what trains."""
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.numel()}
    return repr(model), bits(state), {name: p.requires_grad for name, p in model.named_parameters()}


def naive_delta(
    config: RandbasisConfig, path: str, coefficients: Mapping[str, Tensor], out: int, in_: int, weight: Tensor
) -> Tensor:
    """ΔW by the formulas of math §2, written plainly in float64 on the basis, or the base weight, alone."""
    method = config.method_for(path.partition("[")[0])

    def basis(role: str, count: int, rows: int, cols: int) -> Tensor:
        law = parse_law(method.law).of(count)
        name = f"{method.name}/{role}" + ("" if method.shares_basis else f"/{path}")
        return law.variance**-0.5 * basis_entries(method.seed, name, law, (count, rows, cols)).double()

    c = {name: tensor.detach().double() for name, tensor in coefficients.items()}
    if isinstance(method, Nola):
        k, l_, r = method.num_basis, method.basis_b, method.r
        wide, tall = basis("A", k, r, in_), basis("B", l_, r, out).mT
        a, b = torch.einsum("k,krc->rc", c["nola_a"], wide), torch.einsum("k,kor->or", c["nola_b"], tall)
        if method.parametrization == "plain":
            return method.alpha / r * (b / (3 * out * r) ** 0.5) @ (a / (3 * in_ * r) ** 0.5)
        offset = basis("A0", 1, r, in_)[0] / (3 * in_) ** 0.5
        return method.alpha / r * (b / (3 * l_) ** 0.5) @ (offset + a / (3 * k) ** 0.5)
    if isinstance(method, LoraXs):
        # By the eigenvectors of W Wᵀ; Σ Vᵀ is Uᵀ W.
        left = torch.linalg.eigh(weight.double() @ weight.double().T)[1].flip(1)[:, : method.r]
        left = left * torch.stack([column[column.abs().argmax()].sign() for column in left.T])
        return method.alpha / method.r * left @ c["loraxs_r"] @ left.T @ weight.double()
    if method.name == "vera":
        r = c["vera_d"].numel()
        a, b = basis("A", 1, r, in_)[0] * (2 / in_) ** 0.5, basis("B", 1, r, out)[0].T * (2 / r) ** 0.5
        return torch.diag(c["vera_b"]) @ b @ torch.diag(c["vera_d"]) @ a
    if isinstance(method, RandLora):
        smaller, larger, r = min(out, in_), max(out, in_), method.r
        lam, gamma = c["randlora_lambda"], c["randlora_gamma"]
        a, b = basis("A", 1, r, smaller)[0], basis("B", len(lam), r, larger).mT
        terms = [b[j] @ torch.diag(lam[j]) @ a @ torch.diag(gamma[j]) for j in range(len(lam))]
        alpha = 20 * r if method.alpha is None else method.alpha
        scaling = 2 / len(lam) ** 0.5 if method.scaling == "paper" else alpha / r
        total = scaling * torch.stack(terms).sum(0)
        return total if out >= in_ else total.T
    k = c["pranc_a"].numel()
    return torch.einsum("k,koi->oi", c["pranc_a"], basis("W", k, out, in_)) / k**0.5


def parts_by_hand(targets: Iterable[str], key: str, out: int) -> list[tuple[str, int, int]]:
    """Rows of each part in the tiny models, written out: name in brackets, first row, row after the last."""
    rows = {
        "c_attn": {"q": (0, 32), "k": (32, 64), "v": (64, 96)},
        "qkv_proj": {"q": (0, 32), "k": (32, 48), "v": (48, 64)},
        "gate_up_proj": {"gate": (0, 48), "up": (48, 96)},
        "qkv": {"0/3": (0, 24), "1/3": (24, 48), "2/3": (48, 72)},
        "in_proj": {"0/3": (0, 24), "1/3": (24, 48), "2/3": (48, 72)},
    }
    last = key.rpartition(".")[2]
    wanted = [
        part
        for target in targets
        if target.partition("[")[0] == last and "[" in target
        for part in target.partition("[")[2].rstrip("]").split(",")
    ]
    return [(part, *rows[last][part]) for part in wanted] or [("", 0, out)]


def shared_coefficients(model: nn.Module, tie: str, path: str, name: str, adapter: str = "default") -> nn.Parameter:
    """The one tensor of that name that the group of a module has: its block's of the tiny models, or the model's."""
    block = re.search(r"^.*?\.\d+\.", path)
    wanted = "" if tie == "model" else block[0] if block else ""
    found = {
        key.rpartition(f".randbasis_{name}")[0]: parameter
        for key, parameter in coefficients_of(model, adapter).items()
        if f".randbasis_{name}" in key and wanted in key
    }
    if tie != "model" and not block:
        found = {key: parameter for key, parameter in found.items() if not re.search(r"\.\d+\.", key)}
    (only,) = found.values()
    return only


def naive_deltas(model: PeftModel, case: Case, adapter: str = "default") -> dict[str, Tensor]:
    """The whole ΔW `[out, in]` in float64 of every adapted layer of a model, by module path in the base model."""
    config = model.peft_config[adapter]
    assert isinstance(config, RandbasisConfig)
    found: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model.get_base_model()).items():
        total = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
        for part, start, stop in parts_by_hand(case.targets, name, layer.out_features):
            path = f"{name}[{part}]" if part else name
            tail = "_" + part.replace("/", "_") if part else ""
            names = METHODS[config.method].coefficient_shapes(config.method_for(name), stop - start, layer.in_features)
            if config.tie == "matrix":
                mine = {n: layer.get_submodule(f"randbasis_{n}{tail}.{adapter}").weight for n in names}
            else:
                mine = {n: shared_coefficients(model, config.tie, name, n, adapter) for n in names}
            weight = frozen_weight(layer)[start:stop]
            total[start:stop] = naive_delta(config, path, mine, stop - start, layer.in_features, weight)
        found[name] = total
    return found


def pair_works() -> bool:
    """Whether the installed transformers takes the installed PEFT for its own adapter methods."""
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError:
        return False
    return True


needs_pair = pytest.mark.skipif(
    not pair_works(),
    reason=f"transformers {transformers.__version__} wants PEFT >= {MIN_PEFT_VERSION}, here is {peft.__version__}",
)
"""For tests of transformers' own adapter methods, which refuse a PEFT that is too old for them."""
