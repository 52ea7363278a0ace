"""A run that starts from an adapter: what of its settings the adapter decides, its task, and its values in a model."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar, cast

from peft import PeftModel
from torch import nn

from randbasis.adapters.saved import SavedAdapter, open_adapter
from randbasis.errors import AdapterFilesError, SettingError
from randbasis.train.causal_lm import CausalLanguage, end_token_id
from randbasis.train.classification import TextClassification, check_smoothing
from randbasis.train.images import ImageClassification
from randbasis.train.method_table import targets_of, words_of
from randbasis.train.row_format import RowFormat
from randbasis.train.settings import COLUMN_ROLES, AdapterSettings, DataSettings, TrainSettings
from randbasis.train.task_table import TrainedTask, described_task
from randbasis.train.trained_parameters import load_adapter
from randbasis.tuner.saved_files import plain_path

AUTO = "auto"
Part = TypeVar("Part", AdapterSettings, DataSettings, TrainSettings)


def open_origin(settings: TrainSettings) -> SavedAdapter | None:
    """The adapter to start from; ``None`` where a run starts from nothing.

    Raises:
        RandbasisError: as :func:`randbasis.adapters.saved.open_adapter`.
    """
    return None if settings.from_adapter is None else open_adapter(settings.from_adapter)


def check_given(settings: TrainSettings, given: Collection[str], spelled: Mapping[str, str]) -> None:
    """As :func:`decided`, for what was written and may be a default: ``--seed 0``.

    Args:
        settings: the run.
        given: settings that somebody wrote.
        spelled: setting → how it is written.
    """
    origin = open_origin(settings)
    if origin is not None:
        decided(settings, origin, given, spelled)


def decided(
    settings: TrainSettings, origin: SavedAdapter, given: Collection[str] = (), spelled: Mapping[str, str] | None = None
) -> TrainSettings:
    """The settings with what the adapter decides: its method and options, and what a row means.

    Where it is projected, it decides the targets alone of the options.

    Args:
        settings: the run.
        origin: the adapter.
        given: settings that were written; others count where they are not the default.
        spelled: setting → how it is written, for messages.

    Raises:
        SettingError: a setting says otherwise.
    """
    rule = _Rule(origin, given, spelled or {})
    told = origin.task
    if told and told.get("task") != settings.task:
        raise rule.conflict("task", settings.task, told.get("task"))
    format = _format(told, settings, rule)
    data = rule.apply(_columns(settings.data, told, rule), _kind_of_labels(told))
    theirs = {"targets": targets_of(origin.options)} if settings.project else asdict(words_of(origin))
    adapter = rule.apply(settings.adapter, theirs)
    loop = settings.loop
    if origin.base_bits is not None and loop.bits is None:
        loop = replace(loop, **{f"load_in_{origin.base_bits}bit": True})
    return replace(rule.apply(settings, format), data=data, adapter=adapter, loop=loop)


def task_of(origin: SavedAdapter, settings: TrainSettings) -> TrainedTask:
    """The task of the adapter, on the rows of a run.

    Args:
        origin: it has a description of its task.
        settings: as :func:`decided` gives them.

    Raises:
        SettingError: the end token is another, or numbers were to be smoothed.
        RandbasisError: as :func:`randbasis.train.task_table.described_task`.
    """
    task = described_task(origin, settings.model)
    task.choose_metric(settings.loop.metric)
    if isinstance(task, ImageClassification):
        task.flip = settings.flip
        return task
    task.columns = {role: getattr(settings.data, f"{role}_column") for role in task.columns}
    if isinstance(task, CausalLanguage):
        task.with_generation = task.metric in ("bleu", "chrf")
        if settings.end_token is not None and end_token_id(task.tokenizer, settings.end_token) != task.end_id:
            own = task.tokenizer.convert_ids_to_tokens(task.end_id)
            raise _Rule(origin).conflict("end_token", settings.end_token, own)
    elif isinstance(task, TextClassification):
        check_smoothing(task.labels, settings.loop.label_smoothing, origin.where)
    return task


def put_on(model: nn.Module, origin: SavedAdapter, head: Sequence[str]) -> nn.Module:
    """The model with the coefficients and the head of an adapter, to be trained further.

    Args:
        model: the base, with a head of the right size.
        origin: the adapter.
        head: modules that are trained whole.

    Raises:
        AdapterFilesError: it has no head, and the task needs one.
        BaseMismatchError: it was made for a base, or a head, of another shape.
    """
    base = getattr(model, "name_or_path", None)
    with origin.on(base or type(model).__name__):
        adapted = load_adapter(model, origin, trainable=True)
    trained = {*map(plain_path, origin.shapes)}
    for name in head:
        if not any(path.startswith(f"{name}.") for path in trained):
            raise AdapterFilesError(
                f"{origin.where} has no head {name!r}, which was not trained with it and would be drawn anew; give an "
                "adapter that has one, or leave from out"
            )
    if isinstance(adapted, PeftModel) and base:
        config = cast(Any, adapted.peft_config[adapted.active_adapters[0]])
        config.base_model_name_or_path = base  # where it lies now
    return adapted


class _Rule:
    """An adapter's word against that of a run."""

    def __init__(self, origin: SavedAdapter, given: Collection[str] = (), spelled: Mapping[str, str] | None = None):
        self.origin = origin
        self.given = given
        self.spelled = spelled or {}

    def conflict(self, name: str, value: object, theirs: object) -> SettingError:
        """The error that names a setting."""
        return SettingError(
            f"{self.spelled.get(name, name)} {_shown(value)} conflicts with the adapter to start from, "
            f"{self.origin.where}, whose {name} is {_shown(theirs)}; leave it out, or start without that adapter"
        )

    def apply(self, part: Part, theirs: Mapping[str, Any]) -> Part:
        """Settings with the adapter's values in the place of defaults.

        Raises:
            SettingError: one was set, and to another value.
        """
        for field in fields(part):
            value = getattr(part, field.name)
            asked = value != AUTO and (value != field.default or field.name in self.given)
            if asked and field.name in theirs and _comparable(value) != _comparable(theirs[field.name]):
                raise self.conflict(field.name, value, theirs[field.name])
        return replace(part, **theirs)


def _format(told: Mapping[str, Any], settings: TrainSettings, rule: _Rule) -> dict[str, Any]:
    """What the adapter decides of a text or an image."""
    decides = {name: told[name] for name in ("max_length", "pooling", "image_size") if name in told}
    if told.get("task") != CausalLanguage.name:
        return decides
    own = RowFormat.from_record(told)
    if settings.chat_template is not None and RowFormat.of(settings).chat_template != own.chat_template:
        raise rule.conflict("chat_template", settings.chat_template, own.chat_template)
    decides |= {name: getattr(own, name) for name in ("prompt_template", "target_template", "loss_on")}
    if told["columns"].get("prompt") is not None:
        decides["separator"] = own.separator
    return decides


def _columns(data: DataSettings, told: Mapping[str, Any], rule: _Rule) -> DataSettings:
    """The columns of the adapter's rows, under the names that the run gives them."""
    if "columns" not in told:
        return data
    theirs: dict[str, str | None] = {f"{role}_column": name for role, name in told["columns"].items()}
    own = {role: getattr(data, role) for role in COLUMN_ROLES}
    for role, name in own.items():
        if name is not None and theirs.get(role) is None:
            raise rule.conflict(role, name, None)
    merged = replace(data, **{role: name or theirs.get(role) for role, name in own.items()})
    merged.check()
    return merged


def _kind_of_labels(told: Mapping[str, Any]) -> dict[str, str]:
    return {"label_kind": "class" if told["labels"] else "number"} if "labels" in told else {}


def _comparable(value: object) -> object:
    return {*cast("tuple[object, ...]", value)} if isinstance(value, tuple) else value


def _shown(value: object) -> str:
    return ",".join(map(str, cast("tuple[object, ...]", value))) if isinstance(value, tuple) else repr(value)
