"""Training: gradient checkpointing, transformers' Trainer with resume, TRL's SFTTrainer, several processes."""

import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from tuner_cases import (
    CASES,
    ONE_EACH,
    OPTIONS,
    Case,
    adapted_layers,
    bits,
    coefficients_of,
    loss_of,
    make_config,
    outputs,
    seeded,
    tiny_gpt2,
    tiny_llama,
    token_batch,
)

LANGUAGE_CASES = [parameter for parameter in CASES if parameter.values[0].place != "in_proj"]


# --- gradient checkpointing ---


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("case", LANGUAGE_CASES)
def test_gradient_checkpointing_gives_the_same_gradients(case, reentrant):
    found = []
    for checkpointing in (False, True):
        model = case.adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        loss_of(model, case.batch()).backward()
        found.append({name: p.grad for name, p in coefficients_of(model).items()})
    assert found[0]
    # A reentrant segment runs again with factors of its own layer alone, whose sums are added in another order.
    another_order = reentrant and case.method not in ("vera", "randlora", "loraxs")
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if another_order else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found[1], found[0], **tolerance)


@pytest.mark.parametrize("method", ONE_EACH)
def test_gradient_checkpointing_with_dropout_draws_the_same_mask_again(method):
    found = []
    for checkpointing in (False, True):
        model = Case("linear", method).adapted(dropout=0.3).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        loss_of(model, token_batch()).backward()
        found.append({name: p.grad for name, p in coefficients_of(model).items()})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("method", OPTIONS)
def test_a_few_steps_lower_the_loss(method):
    model = get_peft_model(seeded(tiny_llama), make_config(method, "all-linear")).train()
    batch = token_batch() | {"labels": token_batch()["input_ids"]}
    optimizer = torch.optim.AdamW(coefficients_of(model).values(), lr=0.05)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = []
    for _ in range(25):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


# --- transformers' Trainer ---


class Sentences(Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 64, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


def trainer_for(model: PeftModel, folder, **options) -> Trainer:
    common = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.02, "seed": 3}
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(folder), **{**common, **quiet, **options})
    return Trainer(model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences())


@pytest.mark.parametrize("method", [*ONE_EACH, "nola-own-basis"])
def test_resuming_gives_the_same_run(method, tmp_path):
    """With dropout, so that the random state must be restored too."""

    def fresh() -> PeftModel:
        return get_peft_model(seeded(tiny_gpt2), make_config(method, ["c_attn[q,v]", "c_fc"], dropout=0.1))

    whole = fresh()
    trainer_for(whole, tmp_path / "whole").train()
    stopped = trainer_for(fresh(), tmp_path / "stopped")
    stopped.add_callback(StopAt(3))
    stopped.train()
    assert bits(coefficients_of(stopped.model)) != bits(coefficients_of(whole))
    resumed = fresh()
    trainer_for(resumed, tmp_path / "stopped").train(resume_from_checkpoint=True)
    assert bits(coefficients_of(resumed)) == bits(coefficients_of(whole))
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    assert not (checkpoint / "model.safetensors").exists()
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 40_000


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model = get_peft_model(seeded(tiny_llama), make_config("nola", ["q_proj", "down_proj"]))
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "learning_rate": 20.0}
    trainer = trainer_for(model, tmp_path, **options)
    trainer.train()
    best = PeftModel.from_pretrained(seeded(tiny_llama), trainer.state.best_model_checkpoint)
    assert bits(coefficients_of(model)) == bits(coefficients_of(best))
    again = outputs(model.eval(), token_batch())
    assert torch.equal(again, outputs(best.eval(), token_batch()))


def test_half_precision_training(tmp_path):
    base = seeded(tiny_llama).to(torch.bfloat16)
    model = get_peft_model(base, make_config("vera", ["q_proj", "v_proj"]))
    trainer_for(model, tmp_path, bf16=True, gradient_checkpointing=True).train()
    assert {p.dtype for p in coefficients_of(model).values()} == {torch.float32}
    assert any(bool((p != 0).any()) for n, p in coefficients_of(model).items() if "vera_b" in n)


# --- TRL ---


def test_sft_trainer_of_trl(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install randbasis[dev]")
    datasets = pytest.importorskip("datasets", reason="datasets comes with TRL")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i + 4 for i in range(60)}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    data = datasets.Dataset.from_dict({"text": [" ".join(f"w{(i * j) % 60}" for j in range(6)) for i in range(8)]})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=0.05, report_to=[],
        disable_tqdm=True, logging_strategy="no", use_cpu=True, bf16=False, max_length=16, dataloader_num_workers=0,
    )  # fmt: skip
    config = make_config("nola", ["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(
        model=seeded(tiny_llama), args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=config
    )
    assert isinstance(trainer.model, PeftModel)
    assert adapted_layers(trainer.model)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(seeded(tiny_llama), tmp_path / "saved")
    assert bits(coefficients_of(again)) == bits({n: p.float() for n, p in coefficients_of(trainer.model).items()})
    assert any(bool((p != 0).any()) for p in coefficients_of(again).values())


# --- several processes ---

_WORKER = """
import sys, torch
import torch.distributed as dist
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from torch.nn.parallel import DistributedDataParallel
from tuner_cases import Case, ONE_EACH, coefficients_of, loss_of
dist.init_process_group("gloo")
rank = dist.get_rank()
for method in ONE_EACH:
    case = Case("in_proj", method)
    whole, model = case.adapted().train(), case.adapted(fill_seed=1 + rank).train()
    parallel = DistributedDataParallel(model)  # sends the coefficients of rank 0 to all
    steps = [torch.optim.SGD(coefficients_of(m).values(), lr=0.1) for m in (whole, model)]
    for step in range(2):
        x = torch.randn(4, 6, 24, generator=torch.Generator().manual_seed(step))
        loss_of(whole, {"x": x}).backward()
        loss_of(parallel, {"x": x[2 * rank : 2 * rank + 2]}).backward()
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
    for mine, single in zip(coefficients_of(model).values(), coefficients_of(whole).values(), strict=True):
        torch.testing.assert_close(mine, single, rtol=1e-4, atol=1e-6)
dist.barrier()
dist.destroy_process_group()
print(f"equal {rank}")
"""


def test_two_processes_train_as_one(request, console_environment, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    command = [sys.executable, "-W", "ignore", str(script), str(request.path.parent.parent / "support")]
    port = str(20_000 + os.getpid() % 20_000)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
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
    results = [worker.communicate(timeout=240) for worker in workers]
    for rank, (out, err) in enumerate(results):
        assert out.endswith(f"equal {rank}\n"), err[-3000:]
