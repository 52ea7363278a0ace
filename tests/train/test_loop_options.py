"""What the options of a run do: optimizers, trackers, intervals, recomputed activations, quantized bases, devices."""

import json
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BertModel
from transformers.training_args import OptimizerNames
from tuner_cases import loss_of, tiny_gpt2, tiny_llama, token_batch

import randbasis.train.machine as machine
from randbasis import NolaConfig, PrancConfig, RandLoraConfig, VeraConfig
from randbasis.adapters.merging import merge_adapter
from randbasis.adapters.packed import pack_adapter
from randbasis.adapters.saved import open_adapter
from randbasis.errors import MissingPackageError, SettingError
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, train
from randbasis.train.loop_settings import OPTIMIZERS
from randbasis.train.trainer import AdapterTrainer
from randbasis.use import UseSettings, evaluate

SHORT = LoopSettings(max_steps=6, batch_size=8, learning_rate=1e-2, eval_every=3, threads=1, device="cpu")
NOLA = AdapterSettings(method="nola", rank=2, basis=8, seed=5)


@pytest.fixture
def run(encoder: str, sentences_csv: str, held_csv: str, tmp_path: Path) -> TrainSettings:
    data = DataSettings(sentences_csv, eval=held_csv, text_column="sentence", label_column="label")
    return TrainSettings("sequence-classification", encoder, data, tmp_path / "run", adapter=NOLA, loop=SHORT)


def with_loop(run: TrainSettings, **options: Any) -> TrainSettings:
    return replace(run, loop=replace(run.loop, **options))


def refuse_heavy_work(*args: Any, **rest: Any) -> None:
    raise AssertionError("work was begun")


# --- optimizers ---


@pytest.fixture
def optimizers(monkeypatch: pytest.MonkeyPatch) -> list[torch.optim.Optimizer]:
    """Every optimizer that a run makes."""
    made: list[torch.optim.Optimizer] = []
    create = AdapterTrainer.create_optimizer

    def noted(self: AdapterTrainer, model: Any = None) -> torch.optim.Optimizer:
        made.append(create(self, model))
        return made[-1]

    monkeypatch.setattr(AdapterTrainer, "create_optimizer", noted)
    return made


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw_torch_fused", "AdamW"), ("sgd", "SGD"), ("adafactor", "Adafactor"), ("rmsprop", "RMSprop")],
)
def test_an_optimizer_has_both_learning_rates(
    run: TrainSettings, name: str, kind: str, optimizers: list[torch.optim.Optimizer]
):
    train(with_loop(run, optimizer=name, learning_rate=3e-3, head_learning_rate=7e-2, schedule="constant", warmup=0.0))
    (made,) = {id(getattr(one, "optimizer", one)): getattr(one, "optimizer", one) for one in optimizers}.values()
    assert type(made).__name__ == kind
    assert [group["lr"] for group in made.param_groups] == [3e-3, 7e-2, 7e-2]


def test_the_known_optimizers_are_those_of_transformers():
    names = {one.value for one in OptimizerNames}
    assert set(OPTIMIZERS) <= names
    for name in names - set(OPTIMIZERS):
        assert name.startswith(("galore", "apollo", "lomo", "adalomo", "schedule_free", "adamw_torch_")), name


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"optimizer": "adamw"}, SettingError, "optimizer 'adamw' is unknown"),
        ({"optimizer": "grokadamw"}, MissingPackageError, "pip install grokadamw"),
        ({"report_to": "tensorbord"}, SettingError, "report_to 'tensorbord' is unknown"),
        ({"report_to": "tensorboard,wandb"}, MissingPackageError, "needs (tensorboard|wandb).* pip install"),
        ({"device": "cuda:99"}, SettingError, "device 'cuda:99' is not on this machine; there are: auto, cpu"),
        ({"device": "gpu"}, SettingError, "device 'gpu' is unknown to torch"),
        ({"load_in_4bit": True, "load_in_8bit": True}, SettingError, "exclude each other"),
        ({"logging_steps": 0}, SettingError, "logging_steps must be at least 1"),
        ({"save_steps": 0}, SettingError, "save_steps must be at least 1"),
    ],
)
def test_what_is_missing_is_told_before_any_work(
    run: TrainSettings, options: dict[str, Any], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("randbasis.train.run.prepare", refuse_heavy_work)
    with pytest.raises(error, match=words):
        train(with_loop(run, **options))
    assert not Path(run.output).exists()


# --- trackers and intervals ---


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int]]:
    """A tensorboard that keeps what it is told."""
    told: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, log_dir: str):
            told.append((f"dir {log_dir}", 0.0, 0))

        def add_text(self, *args: Any) -> None: ...
        def flush(self) -> None: ...
        def close(self) -> None: ...

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

    module = types.ModuleType("tensorboard")
    writer = types.ModuleType("torch.utils.tensorboard")
    writer.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboard", module)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    return told


def test_a_tracker_is_told_what_the_history_holds(run: TrainSettings, tensorboard: list[tuple[str, float, int]]):
    outcome = train(with_loop(run, report_to="tensorboard", logging_steps=2))
    history = [json.loads(line) for line in (outcome.output / "history.jsonl").read_text().splitlines()]
    losses = {(entry["step"], entry["loss"]) for entry in history if "loss" in entry}
    assert {(step, value) for name, value, step in tensorboard if name == "train/loss"} == losses
    assert {step for step, _ in losses} == {1, 2, 4, 6}
    assert {step for name, _, step in tensorboard if name == "eval/accuracy"} == {3, 6}
    (folder,) = {Path(name.removeprefix("dir ")) for name, _, _ in tensorboard if name.startswith("dir ")}
    assert folder.parent == outcome.output / "trackers"


@pytest.mark.parametrize("keep", ["best", "last"])
def test_checkpoints_are_made_every_so_many_steps(run: TrainSettings, keep: str, monkeypatch: pytest.MonkeyPatch):
    saved: list[int] = []
    save = AdapterTrainer._save_checkpoint

    def noted(self: AdapterTrainer, model: Any, trial: Any) -> None:
        saved.append(self.state.global_step)
        save(self, model, trial)

    monkeypatch.setattr(AdapterTrainer, "_save_checkpoint", noted)
    scores: Iterator[float] = iter([0.0, 0.1, 0.5, 0.4, 0.3])
    monkeypatch.setattr(
        "randbasis.train.classification.TextClassification.score",
        lambda *_: {"accuracy": next(scores), "matthews": 0.5, "loss": 1.0, "f1": 0.5, "f1_macro": 0.5},
    )
    outcome = train(with_loop(run, max_steps=12, eval_every=3, save_steps=4, keep=keep))
    # Evaluated after 3, 6, 9 and 12: those after 3 and 6 are each the best so far.
    assert saved == ([3, 4, 6, 8, 12] if keep == "best" else [4, 8, 12])
    assert outcome.summary["best_step"] == (6 if keep == "best" else 12)


# --- activations that are computed twice ---


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("base", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("kind", [NolaConfig, VeraConfig, RandLoraConfig, PrancConfig, LoraConfig])
def test_gradients_are_the_same_with_recomputed_activations(kind: Any, base: Any, reentrant: bool):
    options = {"r": 2} if kind in (VeraConfig, RandLoraConfig, LoraConfig) else {}
    torch.manual_seed(0)
    model = get_peft_model(base(), kind(target_modules="all-linear", **options)).train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    plain = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = gradients(model)
    assert plain.keys() == again.keys()
    assert max(float(value.abs().max()) for value in plain.values()) > 0
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-7)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    loss_of(model, token_batch()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_a_run_with_recomputed_activations_ends_in_the_same_place(
    run: TrainSettings, pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = replace(run, pooling=pooling)
    plain = train(run)
    import torch.utils.checkpoint as checkpoints

    calls: list[bool] = []
    checkpoint = checkpoints.checkpoint

    def noted(*args: Any, **rest: Any) -> Any:
        calls.append(rest["use_reentrant"])
        return checkpoint(*args, **rest)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", noted)
    again = train(replace(with_loop(run, gradient_checkpointing=True), output=tmp_path / "again"))
    assert again.summary["after"] == pytest.approx(plain.summary["after"], rel=1e-4)
    assert calls
    assert not any(calls)


# --- quantized bases ---


@pytest.fixture
def wide_run(run: TrainSettings, encoder: str, tmp_path: Path) -> TrainSettings:
    """On a base whose matrices are as wide as bitsandbytes wants them on the CPU."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantized bases")
    config = AutoConfig.from_pretrained(encoder, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "wide")
    return replace(run, model=str(tmp_path / "wide"))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_trained_on_and_read_again(
    wide_run: TrainSettings, bits: int, held_csv: str, tmp_path: Path
):
    import bitsandbytes

    run = wide_run
    loop = {f"load_in_{bits}bit": True, "head_learning_rate": 1e-2}
    run = replace(run, adapter=replace(run.adapter, alpha=8.0))
    outcome = train(with_loop(run, **loop, max_steps=20, eval_every=10))
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    kinds = {name: type(module) for name, module in outcome.model.named_modules()}
    assert any(one is kind for one in kinds.values())
    assert not any(one is kind for name, one in kinds.items() if "classifier" in name), "the head is trained whole"
    assert outcome.summary["after"]["loss"] < outcome.summary["before"]["loss"]
    pack_adapter(outcome.output, tmp_path / "packed.safetensors", base_name="wide")
    for adapter in (outcome.output, tmp_path / "packed.safetensors"):
        assert open_adapter(adapter).base_bits == bits
    again = evaluate(UseSettings(adapter=outcome.output, data=held_csv, threads=1, device="cpu"))
    assert again["metrics"] == pytest.approx(outcome.summary["after"], rel=1e-3, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_merging_says_that_the_base_was_quantized(wide_run: TrainSettings, tmp_path: Path):
    outcome = train(with_loop(wide_run, load_in_4bit=True, max_steps=2, eval_every=2))
    with pytest.warns(UserWarning, match="trained on a base with weights of 4 bits"):
        merge_adapter(wide_run.model, outcome.output, tmp_path / "merged")


def test_a_quantizer_that_is_missing_is_told_before_any_work(run: TrainSettings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("randbasis.train.run.prepare", refuse_heavy_work)
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"load_in_8bit needs bitsandbytes, .* pip install bitsandbytes"):
        train(with_loop(run, load_in_8bit=True))


# --- devices ---


def test_the_second_of_two_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert machine.torch_device("cuda:1") == torch.device("cuda", 1)
    assert machine.torch_device("auto") == torch.device("cuda")
    assert not machine.runs_on_cpu(LoopSettings(device="cuda:1"))
    assert machine.runs_on_cpu(LoopSettings(device="cpu:0"))
    with pytest.raises(SettingError, match="there are: auto, cpu, cuda:0, cuda:1"):
        machine.torch_device("cuda:2")
    with pytest.raises(SettingError, match="2 processes take one each"):
        machine.check_machine(LoopSettings(device="cuda:1"), processes=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_named_device_is_trained_on(run: TrainSettings):
    last = f"cuda:{torch.cuda.device_count() - 1}"
    outcome = train(with_loop(run, device=last))
    assert next(outcome.model.parameters()).device == torch.device(last)
