"""What a training run is told, as plain values: checked before any file is written and any model is read.

The command takes its defaults from here, so nothing heavy is imported.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from randbasis.errors import ColumnError, HyperparameterError, RankError, SettingError, TargetError, near
from randbasis.precision import check_training_precision
from randbasis.ties import UNTIED, check_tie
from randbasis.train.loop_settings import LoopSettings

TASKS = ("causal-lm", "sequence-classification", "image-classification", "embedding")
COLUMN_ROLES = (
    *("text_column", "text_pair_column", "prompt_column", "target_column"),
    *("messages_column", "label_column"),
)
LEARNED = ("answer", "all")
ALLOTMENTS = ("gradient",)

Source = str | Path


@dataclass(frozen=True)
class DataSettings:
    """Where the rows come from and what they mean.

    Args:
        train: a file of rows, a pattern of files or ``hub:OWNER/NAME:SPLIT``, or several of these; or a folder or zip
            of images with a folder for each class.
        eval: the same for the held-out rows. ``None``: a split that the archive names, else a share of ``train``.
        eval_fraction: the share held out when ``eval`` is not given, drawn by the seed of the run; 0 trains on all rows
            and evaluates on none.
        kind: kind of the files when their names do not tell: csv, tsv, jsonl, json, txt, parquet.
        text_column: the text (classification, or a language model of plain text).
        text_pair_column: a second text (classification of pairs, embedding).
        prompt_column: what the language model is given.
        target_column: what it has to write; a list of texts counts as several references.
        messages_column: a conversation: a list of messages with role and content.
        label_column: the class or, for a regression, the number; of an embedding, how alike two texts are.
        label_kind: ``"auto" | "class" | "number"``; auto takes labels as numbers when one has a fraction.
        limit: train on that many rows, drawn by the seed of the run, and evaluate on no more.
        shots: train on that many rows a class.
        eval_limit: evaluate on that many rows, drawn likewise; ``None``: ``limit``.
    """

    train: Source | tuple[Source, ...]
    eval: Source | tuple[Source, ...] | None = None
    eval_fraction: float = 0.1
    kind: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    prompt_column: str | None = None
    target_column: str | None = None
    messages_column: str | None = None
    label_column: str | None = None
    label_kind: str = "auto"
    limit: int | None = None
    shots: int | None = None
    eval_limit: int | None = None

    @property
    def train_sources(self) -> tuple[Source, ...]:
        """All sources of ``train``."""
        return self.train if isinstance(self.train, tuple) else (self.train,)

    @property
    def eval_sources(self) -> tuple[Source, ...]:
        """All sources of ``eval``, none where rows are held out."""
        return () if self.eval is None else self.eval if isinstance(self.eval, tuple) else (self.eval,)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that were named by themselves."""
        return tuple(name for name in self._roles().values() if name is not None)

    def check(self) -> None:
        """Refuse one column for two things.

        Raises:
            ColumnError: the text is the label, the prompt is the target, and the like.
            SettingError: the share to hold out is none.
        """
        if not 0.0 <= self.eval_fraction < 1.0:
            raise SettingError(f"eval_fraction must be in [0, 1), got {self.eval_fraction}")
        check_distinct(self._roles())

    def _roles(self) -> dict[str, str | None]:
        return {role: getattr(self, role) for role in COLUMN_ROLES}


@dataclass(frozen=True)
class AdapterSettings:
    """Which adapter, in the words of the command; of ``None`` a run takes :mod:`randbasis.train.default_choices`.

    Args:
        method: nola, vera, randlora, pranc, loraxs; ``lora`` for comparison; ``none`` for a frozen base with a trained
            head.
        rank: the rank (vera, randlora, nola, loraxs, lora).
        basis: the number of basis matrices (nola, pranc), those of A.
        basis_b: the number of basis matrices of B (nola).
        alpha: the scale.
        seed: the seed of the basis.
        law: the law of the entries of the basis.
        parametrization: ``offset`` or ``plain`` (nola).
        unique_basis: a basis of its own for each layer (nola).
        tie: ``matrix``, ``block:N`` or ``model``: which matrices share their coefficients, math (26) (nola, pranc).
        targets: names of modules, slices included (``c_attn[q,v]``), ``("all-linear",)`` for every linear layer, or
            ``("re:PATTERN",)`` for a regular expression. Empty: what PEFT knows for the architecture.
        dropout: dropout on the input of the adapter.
        quantize_coefficients: bits of the coefficients that the forward pass computes with, math (11).
        allot: ``"gradient"`` gives each matrix basis matrices by the size of its gradient before training, as many in
            all (nola, pranc); see :mod:`randbasis.train.allotment`. ``None``: all the same number.
    """

    method: str = "nola"
    rank: int | None = None
    basis: int | None = None
    basis_b: int | None = None
    alpha: float | None = None
    seed: int = 0
    law: str | None = None
    parametrization: str | None = None
    unique_basis: bool = False
    tie: str = UNTIED
    targets: tuple[str, ...] = ("all-linear",)
    dropout: float = 0.0
    quantize_coefficients: int | None = None
    allot: str | None = None

    def check(self) -> None:
        """Refuse what no method can take.

        Raises:
            RankError: a rank or a number of basis matrices below 1.
            HyperparameterError: a dropout outside [0, 1).
            PrecisionError: a number of bits that coefficients cannot be trained at.
            SettingError: another way to allot basis matrices.
            TieError: a tie that is none.
        """
        if self.allot not in (None, *ALLOTMENTS):
            raise SettingError(f"allot {self.allot!r} is unknown; {near(self.allot or '', ALLOTMENTS)}")
        check_training_precision(self.quantize_coefficients)
        check_tie(self.tie)
        for name, value in (("rank", self.rank), ("basis", self.basis), ("basis_b", self.basis_b)):
            if value is not None and value < 1:
                raise RankError(f"{name} must be at least 1, got {value}")
        if not 0.0 <= self.dropout < 1.0:
            raise HyperparameterError(f"dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class TrainSettings:
    """A whole run.

    Args:
        task: one of :data:`TASKS`.
        model: a folder or a name on the hub.
        data: the rows.
        adapter: the adapter.
        loop: the optimisation.
        output: folder for the adapter, its head, the summary and the plot.
        from_adapter: an adapter to start from: a folder, a packed file, its URL, ``store:NAME@VERSION``. Method,
            options and the meaning of rows are the adapter's; a setting that says otherwise is refused.
        project: bring that adapter, one of PEFT's LoRA, VeRA or RandLoRA, onto the method and options of ``adapter`` by
            least squares, and train those; see :mod:`randbasis.train.projection`.
        overwrite: replace an adapter that is already in ``output``.
        resume: go on from the last checkpoint in ``output``.
        keep_checkpoints: leave the checkpoints in ``output`` after the run.
        max_length: tokens a row; ``None``: what model and tokenizer allow, at most 512.
        pooling: of a text encoder: ``"auto" | "model" | "mean" | "cls"``. ``model`` is the class that transformers has
            for the task, which transformers and PEFT load; ``mean`` and ``cls`` are one linear layer of ours on the
            hidden states, which randbasis alone can load. ``auto`` is ``model`` where transformers has such a class.
        separator: text between a prompt and its target; a template of the prompt has it itself.
        prompt_template: of several columns, ``"Title: {title}\\n{body} =>"``, instead of a prompt column.
        target_template: the same of what has to be written, instead of a target column.
        chat_template: file with a Jinja template for conversations; ``None``: the tokenizer's own.
        loss_on: ``"answer"`` learns targets, or what the assistant says; ``"all"`` the whole text.
        packing: put several rows into one sequence of ``max_length``, each apart from its neighbours.
        end_token: token that ends a text; ``None``: the tokenizer's end-of-text token.
        image_size: side in pixels; ``None``: the model's own.
        flip: mirror half of the training images.
    """

    task: str
    model: str
    data: DataSettings
    output: str | Path
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    from_adapter: str | Path | None = None
    project: bool = False
    overwrite: bool = False
    resume: bool = False
    keep_checkpoints: bool = False
    max_length: int | None = None
    pooling: str = "auto"
    separator: str = " => "
    prompt_template: str | None = None
    target_template: str | None = None
    chat_template: str | Path | None = None
    loss_on: str = "answer"
    packing: bool = False
    end_token: str | None = None
    image_size: int | None = None
    flip: bool = False

    def check(self) -> None:
        """Refuse a run that cannot be started; reads nothing.

        Raises:
            SettingError: the task is unknown, or a value is out of range.
            RankError: a rank or a number of basis matrices below 1.
        """
        check_task(self.task)
        if self.pooling not in ("auto", "model", "mean", "cls"):
            raise SettingError(f"pooling {self.pooling!r} is unknown; there are: auto, model, mean, cls")
        for name, value in (("max_length", self.max_length), ("image_size", self.image_size)):
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")
        if self.loss_on not in LEARNED:
            raise SettingError(f"loss_on {self.loss_on!r} is unknown; there are: {', '.join(LEARNED)}")
        if self.overwrite and self.resume:
            raise SettingError("overwrite and resume exclude each other; give one")
        if self.project and self.from_adapter is None:
            raise SettingError("project needs an adapter to start from, got none; name it with from")
        for name, value in (("allot", self.adapter.allot), ("try_seeds", self.loop.try_seeds)):
            if value is not None and self.from_adapter is not None:
                raise SettingError(f"{name} is for a run that starts anew, got {value!r} beside from; leave it out")
        self.data.check()
        self.adapter.check()
        self.loop.check()

    def as_json(self) -> dict[str, Any]:
        """The settings as plain values, for the summary."""
        return {name: _plain(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class GenerationSettings:
    """How a text is chosen; the default is greedy.

    Args:
        max_new_tokens: ``None``: the longest target seen in training.
        beams: beams of a beam search.
        length_penalty: exponent of the length in a beam's score.
        sample: draw from the distribution instead of taking the most probable.
        temperature: of the distribution.
        top_k: draw among that many tokens, 0 for all.
        top_p: draw among the fewest tokens of that probability.
        repetition_penalty: above 1 makes tokens that were used less probable.
        seed: of the sampling.
    """

    max_new_tokens: int | None = None
    beams: int = 1
    length_penalty: float = 1.0
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            SettingError: a value is out of range; the message names it.
        """
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise SettingError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.beams < 1 or self.top_k < 0 or not 0 <= self.seed < 2**32:
            raise SettingError(
                f"beams must be at least 1, top_k at least 0, seed in [0, 2**32); got {self.beams}, "
                f"{self.top_k}, {self.seed}"
            )
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise SettingError(
                f"temperature and repetition_penalty must be above 0 and top_p in (0, 1]; got "
                f"{self.temperature}, {self.repetition_penalty}, {self.top_p}"
            )

    def for_transformers(self, room: int) -> dict[str, Any]:
        """The arguments of ``generate`` where ``room`` tokens are left."""
        chosen: dict[str, Any] = {
            "max_new_tokens": min(self.max_new_tokens or 128, room),
            "num_beams": self.beams,
            "do_sample": self.sample,
            "repetition_penalty": self.repetition_penalty,
            "use_cache": True,
        }
        if self.beams > 1:
            chosen["length_penalty"] = self.length_penalty
        if self.sample:
            chosen |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return chosen


def check_task(name: str) -> None:
    """Raises SettingError when there is no such task."""
    if name not in TASKS:
        raise SettingError(f"task {name!r} is unknown; {near(name, TASKS)}")


def check_distinct(columns: Mapping[str, str | None]) -> None:
    """Raises ColumnError when two roles have one column: what is to be found would be given."""
    roles: dict[str, str] = {}
    for role, name in columns.items():
        if name is not None and roles.setdefault(name, role) != role:
            raise ColumnError(f"{role} and {roles[name]} are both {name!r}; name a column for each")


def settings_from_words(words: Mapping[str, Any]) -> TrainSettings:
    """The settings of a run from one flat mapping, as the command gives them; other words are left out.

    ``data`` and ``eval_data`` are the files, one or a list of them; ``targets`` may be one string of names separated by
    commas.
    """
    flat = {**words, "train": _one_or_more(words["data"]), "eval": _one_or_more(words.get("eval_data"))}
    targets = flat.get("targets")
    if isinstance(targets, str):
        flat["targets"] = named_targets(targets)

    def parts(kind: type[DataSettings | AdapterSettings | LoopSettings | TrainSettings]) -> dict[str, Any]:
        return {field.name: flat[field.name] for field in fields(kind) if field.name in flat}

    own = {name: value for name, value in parts(TrainSettings).items() if name != "data"}
    return TrainSettings(
        data=DataSettings(**parts(DataSettings)),
        adapter=AdapterSettings(**parts(AdapterSettings)),
        loop=LoopSettings(**parts(LoopSettings)),
        **own,
    )


def _one_or_more(files: Any) -> Any:
    several = cast(list[Any], files) if isinstance(files, list) else [files]
    return tuple(several) if len(several) > 1 else several[0] if several else None


def named_targets(text: str) -> tuple[str, ...]:
    """The names of ``"q_proj,v_proj"``.

    Raises:
        TargetError: there is none.
    """
    from randbasis.tuner.targets import split_names  # with PEFT

    names = tuple(split_names(text))
    if not names:
        raise TargetError(f"targets must name at least one module, got {text!r}; leave it out for all-linear")
    return names


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in cast(dict[str, Any], value).items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in cast(tuple[Any, ...], value)]
    return str(value) if isinstance(value, Path) else value
