"""transformers' Trainer with two learning rates, small checkpoints, exact metrics, and a stop at the first NaN."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import prepare_data_loader  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from randbasis.errors import CheckpointError, NonFiniteLossError
from randbasis.files.saving import saving
from randbasis.train.class_weights import weighted_loss
from randbasis.train.host_names import TRAINER_NAMES
from randbasis.train.ranks import Ranks
from randbasis.train.schedule import warmed_schedule
from randbasis.train.task import Batch, Example, Task
from randbasis.train.trained_parameters import restore_parameters, save_parameters
from randbasis.tuner.host_names import check_names

check_names(TRAINER_NAMES)

STATE_FILE = "trainer_state.json"
NO_ROW = "no_row"
"""Key of an example, and of a batch, that a process computes with only to keep step with the others."""

HEAD_OF_WHOLE = "randbasis_head_of_whole"
"""Attribute of a model all of which is trained: the names of its head's modules; the rest is in the adapter's place."""


class Rows(Dataset[Example]):
    """Examples as a dataset of torch; row ``None`` stands in where a process has no row of its own left."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int | None) -> Example:
        return {**self.examples[0], NO_ROW: True} if index is None else self.examples[index]


class EpochOrder(Sampler[int]):
    """The order of the rows, a pure function of seed and epoch, so that a resumed run meets the same batches.

    With ``lengths`` the rows are shuffled, sorted by length within stretches of 50 batches, and the batches shuffled.
    """

    def __init__(self, count: int, batch_size: int, seed: int, lengths: Sequence[int] | None = None):
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.lengths = lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = permutation(self.count, generator)
        if self.lengths is None:
            return iter(order)
        lengths, stretch, size = self.lengths, 50 * self.batch_size, self.batch_size
        order = [
            row
            for start in range(0, self.count, stretch)
            for row in sorted(order[start : start + stretch], key=lambda i: -lengths[i])
        ]
        batches = [order[start : start + size] for start in range(0, self.count, size)]
        tail = batches.pop() if len(batches[-1]) < size else []
        shuffled = permutation(len(batches), generator)
        return iter([row for i in shuffled for row in batches[i]] + tail)


class RankOrder(Sampler[int | None]):
    """One process's rows of each batch that all processes share: a batch is cut into as many pieces as there are.

    A last batch that is too short for every process to have a row gives the rest of them ``None``.

    Args:
        order: of the rows, in batches of all processes together.
        ranks: which process this is.
    """

    def __init__(self, order: EpochOrder, ranks: Ranks):
        self.order = order
        self.ranks = ranks

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.order), self.order.batch_size)
        return whole * (self.order.batch_size // self.ranks.count) + (len(self._own(list(range(rest)))) if rest else 0)

    def __iter__(self) -> Iterator[int | None]:
        rows, size = list(self.order), self.order.batch_size
        for start in range(0, len(rows), size):
            yield from self._own(rows[start : start + size])

    def _own(self, batch: list[int]) -> list[int | None]:
        share = -(-len(batch) // self.ranks.count)
        own: list[int | None] = [*batch[self.ranks.index * share : (self.ranks.index + 1) * share]]
        return own or [None]


def permutation(count: int, generator: torch.Generator) -> list[int]:
    """The numbers below ``count`` in an order that the generator decides."""
    return cast(list[int], cast(Any, torch.randperm(count, generator=generator)).tolist())


class AdapterTrainer(Trainer):
    """Trains the adapter and head of a model on the examples of a task.

    Args:
        model: a ``PeftModel``, or a model with only its head set to be trained.
        task: makes batches and scores.
        args: of transformers.
        train: examples.
        eval: examples.
        lengths: of the training examples, to group them by.
        head_learning_rate: of the parameters in ``modules_to_save``, or of all of them where there is no adapter.
        ranks: the processes of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        args: TrainingArguments,
        *,
        train: Sequence[Example],
        eval: Sequence[Example],
        lengths: Sequence[int] | None,
        head_learning_rate: float,
        ranks: Ranks,
        **rest: Any,
    ):
        self.task = task
        self.ranks = ranks
        self.row_lengths = lengths
        self.head_learning_rate = head_learning_rate
        super().__init__(
            cast(Any, model),
            args,
            data_collator=cast(Any, self._collate),
            train_dataset=Rows(train),
            eval_dataset=Rows(eval),
            **rest,
        )
        # compute_loss gives each item of a step the same weight, whatever the model's own forward would do with it.
        self.model_accepts_loss_kwargs = True

    def _collate(self, examples: Sequence[Example]) -> Batch:
        batch = self.task.training_collate(examples)
        return {**batch, NO_ROW: True} if NO_ROW in examples[0] else batch

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        data: Any = cast(Any, self).train_dataset if train_dataset is None else train_dataset
        together = self.args.train_batch_size * self.ranks.count
        order = EpochOrder(len(cast(Rows, data)), together, self.args.seed, self.row_lengths)
        return order if self.ranks.count == 1 else RankOrder(order, self.ranks)

    def get_train_dataloader(self) -> Any:
        """Batches of rows; with several processes those of this one, as :class:`RankOrder` cuts them."""
        if self.ranks.count == 1:
            return cast(Any, super()).get_train_dataloader()
        loader: DataLoader[Any] = DataLoader(
            cast(Any, self).train_dataset,
            batch_size=self.args.train_batch_size,
            sampler=self._get_train_sampler(),
            collate_fn=self._collate,
        )
        # One process of one: accelerate would cut the batches once more, and fill a short one with rows of others.
        device = self.accelerator.device
        return cast(Any, prepare_data_loader)(loader, device, num_processes=1, process_index=0, put_on_device=True)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: Any) -> int:
        return self.ranks.total(sum(self._items(batch) for batch in batch_samples))

    def _items(self, batch: Batch) -> int:
        return 0 if NO_ROW in batch else self.task.items(batch)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss whose gradients, averaged over the processes and summed over a step's batches, are those of the
        mean over all items of the step.
        """
        items = self._items(inputs)
        inputs.pop(NO_ROW, None)
        weights = self.task.class_weights
        own = self.task.loss(model, inputs)
        outputs: Any = None
        if own is not None:
            mean = own
        elif weights is None:
            mean, outputs = cast(Any, super()).compute_loss(model, inputs, return_outputs=True)
        else:
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            mean = weighted_loss(outputs.logits, inputs["labels"], weights, self.args.label_smoothing_factor)
        if items == 0:  # nothing to learn here; the others wait for gradients all the same
            loss = outputs.logits.float().sum() * 0.0
        else:
            loss = mean * (items * self.ranks.count / int(num_items_in_batch or items))
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer over three groups: adapter, head, and the head's biases and norms, which do not decay."""
        if self.optimizer is None:
            decay, groups = self.args.weight_decay, parameter_groups(cast(nn.Module, self.model))
            rates = {
                "adapter": (self.args.learning_rate, decay),
                "head": (self.head_learning_rate, decay),
                "head_vectors": (self.head_learning_rate, 0.0),
            }
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, cast(Any, self.model))
            self.optimizer = kind(
                [
                    {"params": list(group.values()), "lr": rates[name][0], "weight_decay": rates[name][1]}
                    for name, group in groups.items()
                    if group
                ],
                **options,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """See :func:`randbasis.train.schedule.warmed_schedule`."""
        if cast(Any, self.lr_scheduler) is None:
            self.lr_scheduler = warmed_schedule(self.args, optimizer or self.create_optimizer(), num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One step; the run ends here when the loss is not finite."""
        loss = super().training_step(*args, **kwargs)
        self.ranks.agreed(lambda: self._check_loss(loss))
        return loss

    def _check_loss(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise NonFiniteLossError(self._stopped(f"the loss at step {self.state.global_step + 1} is {float(loss)}"))

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The task's own scores: exact means over the rows, on the same path as the command ``evaluate``."""
        examples = cast(Rows, dataloader.dataset).examples
        with self.autocast_smart_context_manager():
            own = self.task.score(cast(nn.Module, self.model), examples, self.args.eval_batch_size)
        scores = self.ranks.of_first(own)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        return EvalLoopOutput(predictions=cast(Any, None), label_ids=None, metrics=metrics, num_samples=len(examples))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.ranks.first:  # Trainer leaves it to this method to ask
            save_parameters(cast(nn.Module, self.model), Path(output_dir or cast(str, self.args.output_dir)))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        for name, parameter in cast(nn.Module, self.model).named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise NonFiniteLossError(
                    self._stopped(f"after step {self.state.global_step} the parameter {name} is not finite")
                )
        target = Path(cast(str, self.args.output_dir)) / f"checkpoint-{self.state.global_step}"

        def save() -> None:
            with saving(target, kept="earlier checkpoints are kept", undo=lambda: self._remove(target)):
                super(AdapterTrainer, self)._save_checkpoint(model, trial)

        try:
            self.ranks.agreed(save)
        except KeyboardInterrupt:
            if not (target / STATE_FILE).exists():
                self._remove(target)
            raise

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; what the first process cannot write ends all, which would wait for it after this."""
        self.ranks.agreed(lambda: super(AdapterTrainer, self).save_model(output_dir, _internal_call))

    def _remove(self, checkpoint: Path) -> None:
        if self.ranks.first:
            shutil.rmtree(checkpoint, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_parameters(cast(nn.Module, self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        restore_parameters(cast(nn.Module, self.model), Path(cast(str, self.state.best_model_checkpoint)))

    def _stopped(self, what: str) -> str:
        kept = last_checkpoint(Path(cast(str, self.args.output_dir)))
        where = f"the last good checkpoint is {kept}" if kept else "there was no checkpoint yet"
        return f"training stopped: {what}; {where}; a lower learning rate or a longer warmup may help"


def parameter_groups(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Trained parameters by name: ``adapter``, the ``head``'s matrices, and the head's vectors.

    A head is what PEFT keeps under ``modules_to_save``; without an adapter every trained parameter is of the head, but
    where all of a model is trained (:data:`HEAD_OF_WHOLE`).
    """
    groups: dict[str, dict[str, nn.Parameter]] = {"adapter": {}, "head": {}, "head_vectors": {}}
    adapted, heads = hasattr(model, "peft_config"), getattr(model, HEAD_OF_WHOLE, None)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if heads is not None:
                head = any(name.startswith(f"{one}.") for one in heads)
            else:
                head = not adapted or ".modules_to_save." in name
            groups["adapter" if not head else "head" if parameter.ndim > 1 else "head_vectors"][name] = parameter
    return groups


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; Trainer writes the state last, so one with a state is complete."""
    complete: dict[int, Path] = {}
    for state in folder.glob(f"checkpoint-*/{STATE_FILE}"):
        try:
            complete[int(json.loads(state.read_text())["global_step"])] = state.parent
        except (json.JSONDecodeError, KeyError):
            continue
    return complete[max(complete)] if complete else None


def checkpoint_to_resume(folder: Path) -> Path:
    """As :func:`last_checkpoint`.

    Raises:
        CheckpointError: there is none.
    """
    found = last_checkpoint(folder)
    if found is None:
        raise CheckpointError(
            f"there is no complete checkpoint in {folder} to resume from; start the run without resume"
        )
    return found
