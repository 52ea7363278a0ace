"""How a run optimises, as plain values: what the command takes its defaults from, so that nothing heavy is imported."""

from dataclasses import dataclass

from randbasis.errors import SettingError, near

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
DTYPES = ("float32", "bfloat16", "float16")
OPTIMIZERS = (
    *("adamw_torch_fused", "adamw_torch", "sgd", "adagrad", "rmsprop", "adafactor"),
    *("adamw_bnb_8bit", "adamw_8bit", "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "grokadamw", "stable_adamw"),
)
"""Names of transformers. Not here: those that project the gradients of whole matrices, or step inside of the backward
pass (GaLore, APOLLO, LOMO), those that evaluate other weights than they train (schedule-free), and other machines'."""


@dataclass(frozen=True)
class LoopSettings:
    """How to optimise.

    Args:
        batch_size: rows a step.
        eval_batch_size: rows a batch of evaluation; ``None``: four times ``batch_size``.
        epochs: passes over the rows, when ``max_steps`` is not given.
        max_steps: steps.
        learning_rate: of the adapter; ``None``, here and below: by method, task and width of the base, see
            :mod:`randbasis.train.default_choices`.
        head_learning_rate: of the head.
        warmup: share of the steps in which the learning rate rises.
        schedule: how it falls, a name of transformers.
        weight_decay: of the adapter and of the head's matrices.
        max_grad_norm: gradients are clipped to this norm.
        accumulate: batches a step.
        train_seed: head, order of the rows, dropout, held-out rows.
        try_seeds: train so many seeds of the basis for ``try_steps`` steps first, and go on with the best of them; see
            :mod:`randbasis.train.seed_trials`.
        try_steps: steps of each.
        metric: which metric chooses the best checkpoint; ``None``: the task's first.
        eval_every: steps between evaluations; ``None``: each epoch, or five times in ``max_steps``.
        early_stop: stop after that many evaluations without a better metric.
        keep: ``"best"`` or ``"last"``.
        optimizer: one of :data:`OPTIMIZERS`.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        report_to: trackers of transformers, with commas between them.
        logging_steps: steps between entries of the training loss; ``None``: a hundred entries a run.
        save_steps: steps between checkpoints; ``None``: at each evaluation. A new best is always saved.
        group_by_length: rows of like length share a batch.
        label_smoothing: of the classes.
        class_weights: ``"balanced"``, or ``LABEL=NUMBER`` for each class, with commas between: how much a class counts
            in the loss.
        threads: threads of torch; ``None`` leaves them.
        dtype: of the base model; coefficients and head stay float32.
        load_in_4bit: read the base with weights of 4 bits (NF4 of bitsandbytes).
        load_in_8bit: the same with 8 bits.
        device: ``"auto"`` or a device of torch: ``"cpu"``, ``"cuda:1"``.
    """

    batch_size: int = 16
    eval_batch_size: int | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    warmup: float | None = None
    schedule: str | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    accumulate: int = 1
    train_seed: int = 0
    try_seeds: int | None = None
    try_steps: int = 20
    metric: str | None = None
    eval_every: int | None = None
    early_stop: int | None = None
    keep: str = "best"
    optimizer: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    report_to: str | None = None
    logging_steps: int | None = None
    save_steps: int | None = None
    group_by_length: bool = True
    label_smoothing: float = 0.0
    class_weights: str | None = None
    threads: int | None = None
    dtype: str = "float32"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    device: str = "auto"

    @property
    def bits(self) -> int | None:
        """Of a weight of the base; ``None`` for those of ``dtype``."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in ``report_to``."""
        return tuple(name for part in (self.report_to or "").split(",") if (name := part.strip()) not in ("", "none"))

    def check(self) -> None:
        """Refuse what cannot be trained with.

        Raises:
            SettingError: a value is out of range; the message names it.
        """
        at_least_one = {
            "batch_size": self.batch_size,
            "eval_batch_size": self.eval_batch_size,
            "max_steps": self.max_steps,
            "accumulate": self.accumulate,
            "eval_every": self.eval_every,
            "early_stop": self.early_stop,
            "threads": self.threads,
            "logging_steps": self.logging_steps,
            "save_steps": self.save_steps,
            "try_steps": self.try_steps,
        }
        for name, value in at_least_one.items():
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")
        not_negative = {
            "learning_rate": self.learning_rate,
            "head_learning_rate": self.head_learning_rate,
            "weight_decay": self.weight_decay,
            "train_seed": self.train_seed,
        }
        for name, value in not_negative.items():
            if value is not None and not 0 <= value < float("inf"):
                raise SettingError(f"{name} must be a finite number not below 0, got {value}")
        if not 0 < self.epochs < float("inf"):
            raise SettingError(f"epochs must be a finite number above 0, got {self.epochs}")
        if self.train_seed >= 2**32:
            raise SettingError(f"train_seed must be below 2**32 (numpy's limit), got {self.train_seed}")
        if self.try_seeds is not None and self.try_seeds < 2:
            raise SettingError(f"try_seeds must be at least 2, got {self.try_seeds}; leave it out for one seed")
        if self.warmup is not None and not 0.0 <= self.warmup < 1.0:
            raise SettingError(f"warmup is a share of the steps in [0, 1), got {self.warmup}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise SettingError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        choices = {
            "schedule": (self.schedule, SCHEDULES),
            "dtype": (self.dtype, DTYPES),
            "optimizer": (self.optimizer, OPTIMIZERS),
            "keep": (self.keep, ("best", "last")),
        }
        for name, (value, known) in choices.items():
            if value is not None and value not in known:
                raise SettingError(f"{name} {value!r} is unknown; {near(value, known)}")
        if self.load_in_4bit and self.load_in_8bit:
            raise SettingError("load_in_4bit and load_in_8bit exclude each other; give one")
