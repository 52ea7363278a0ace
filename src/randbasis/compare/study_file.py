"""TOML → study: every table and key is checked, so that nothing in a study file is ignored."""

import itertools
import tomllib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from math import inf, isfinite
from pathlib import Path
from types import UnionType
from typing import Any, cast, get_args, get_type_hints

from randbasis.adapters.budget import byte_count
from randbasis.compare.budgets import SIZED
from randbasis.compare.rivals import METHODS, QUANTIZABLE, RIVALS
from randbasis.compare.study import STARTS, Budget, Data, PointSpec, Row, Study
from randbasis.errors import DataMissingError, RandbasisError, StudyError, near
from randbasis.files.text_files import read_text
from randbasis.importing.least_squares import NEAREST
from randbasis.precision import BITS
from randbasis.train.loop_settings import LoopSettings
from randbasis.train.method_table import method_words
from randbasis.train.settings import ALLOTMENTS, AdapterSettings, DataSettings, TrainSettings

_OF_STUDY = ("name", "title", "claim", "seeds", "trials", "anchor", "gain_of")
_OF_RUN = (
    *("model", "task", "max_length", "pooling", "separator", "prompt_template", "target_template", "end_token"),
    *("image_size", "flip", "loss_on"),
)
_OF_LOOP = ("batch_size", "eval_batch_size", "schedule", "warmup", "weight_decay", "max_grad_norm", "label_smoothing")
_OF_ROWS = tuple(one.name for one in fields(DataSettings) if one.name != "eval_fraction")
_OF_DATA = ("name", "targets", "steps", "trial_steps", "dev_rows", "dev", "dev_words", "sample_sets", "metric")
_DATA_KEYS = (*_OF_DATA, "forgetting", *_OF_RUN, *_OF_LOOP, *_OF_ROWS)
_OF_BUDGET = ("budgets", "coefficients", "budget_bits")
_ROW_KEYS = ("name", "curve", "method", "rate", "data", "points", "bits", "start", *_OF_BUDGET)
OF_TASK: Mapping[str, tuple[str, ...]] = {
    "sequence-classification": (
        *("kind", "text_column", "text_pair_column", "label_column", "label_kind", "shots", "pooling", "max_length"),
        *("dev_words", "label_smoothing"),
    ),
    "image-classification": ("shots", "image_size", "flip", "label_smoothing"),
    "causal-lm": (
        *("kind", "prompt_column", "target_column", "messages_column", "max_length", "separator", "prompt_template"),
        *("target_template", "end_token", "loss_on", "forgetting"),
    ),
}
"""Task that can be compared → the keys of a data set that it alone, or not every task, has a use for."""
_RANKED = ("lora", "dora", "loraxs")
"""Methods without a rank of their own."""
ALLOTTED, SEEDED = (
    tuple(name for name, words in method_words().items() if word in words) for word in ("allot", "seed")
)
_PATHS = ("train", "eval", "dev", "model", "forgetting")


def read_study(path: Path, folder: Path | None = None, *, must_exist: bool = True) -> Study:
    """The study of a file.

    Args:
        path: of the TOML file.
        folder: where its models and rows are; None: beside the file.
        must_exist: whether they have to be there, which a report of what has run does not need.

    Raises:
        StudyError: it says what no study may, or leaves out what it must say.
        DataMissingError: a file that it names is not there.
    """
    if not path.is_file():
        raise DataMissingError(f"study {str(path)!r} is not a file; give the path of a .toml file (docs/comparing.md)")
    try:
        found = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"{path} is not TOML: {error}") from error
    reader = _Reader(path, folder or path.parent, must_exist)
    reader.check_keys(found, ("study", "data", "row"), "the file")
    return reader.study(found)


class _Reader:
    """What is read knows where it stands, for messages."""

    def __init__(self, path: Path, folder: Path, must_exist: bool) -> None:
        self.path = path
        self.folder = folder
        self.must_exist = must_exist

    def study(self, found: Mapping[str, Any]) -> Study:
        head = found.get("study", {})
        self.check_keys(head, _OF_STUDY, "[study]")
        data = tuple(self.data(one, f"[[data]] {i + 1}") for i, one in enumerate(self.tables(found, "data")))
        names = [one.name for one in data]
        rows = [
            row for i, one in enumerate(self.tables(found, "row")) for row in self.rows(one, f"[[row]] {i + 1}", names)
        ]
        if not data or not rows:
            raise StudyError(f"{self.path} must have at least one [[data]] and one [[row]]; see docs/comparing.md")
        if rows[0].method != "none":
            raise StudyError(
                f'{self.path}: the first [[row]] must be the base alone (method = "none"): it chooses the head\'s '
                f"learning rate, got {rows[0].method!r}; put such a row first"
            )
        twice = next((row.name for i, row in enumerate(rows) if row.name in [one.name for one in rows[:i]]), None)
        if twice is not None or len(set(names)) < len(names):
            raise StudyError(f"{self.path}: names must differ, got {twice or names} twice; give a row a `name`")
        stems = ["all", *(one.stem for one in data)]
        if len(set(stems)) < len(stems):
            raise StudyError(
                f"{self.path}: names of data sets must differ in letters or digits, and none may be 'all', since their "
                f"pictures are named after them, got {names}"
            )
        study = Study(
            name=self.word(head, "name", "[study]", default=self.path.stem),
            title=self.word(head, "title", "[study]", default=self.path.stem),
            claim=self.word(head, "claim", "[study]", default=""),
            seeds=self.number(head, "seeds", "[study]", default=3),
            trials=self.number(head, "trials", "[study]", default=4),
            rows=tuple(rows),
            data=data,
            anchor=self.name(head, "anchor", "[study]") if "anchor" in head else None,
            gain_of=self.name(head, "gain_of", "[study]") if "gain_of" in head else None,
        )
        curves = [row.curve for row in rows]
        for key, known in (("anchor", curves), ("gain_of", [row.name for row in rows])):
            if head.get(key) is not None and head[key] not in known:
                raise StudyError(f"{self.path}: [study] {key} {head[key]!r} is no row; {near(head[key], known)}")
        return study

    def data(self, found: Mapping[str, Any], where: str) -> Data:
        self.check_keys(found, _DATA_KEYS, where)
        for key in ("name", "task", "model", "train", "steps", "metric", "targets"):
            if key not in found:
                raise StudyError(f"{self.path}: {where} must say {key}; see docs/comparing.md")
        task = self.word(found, "task", where)
        if task not in OF_TASK:
            raise StudyError(f"{self.path}: {where}: task {task!r} is unknown; {near(task, tuple(OF_TASK))}")
        own = [key for keys in OF_TASK.values() for key in keys]
        unused = [key for key in found if key in own and key not in OF_TASK[task]]
        if unused:
            raise StudyError(f"{self.path}: {where}: {', '.join(unused)} is not for {task}; leave it out")
        if "eval" not in found and task != "image-classification":
            raise StudyError(f"{self.path}: {where} must say eval, the test rows; see docs/comparing.md")
        for kind in (LoopSettings, DataSettings, TrainSettings):
            self.check_types(found, kind, where)
        for key in ("limit", "shots", "eval_limit"):
            if key in found:
                self.number(found, key, where)
        values = {key: self.there(value, f"{where}: {key}") if key in _PATHS else value for key, value in found.items()}
        steps = self.number(found, "steps", where)
        loop = LoopSettings(
            max_steps=steps, threads=1, device="cpu", **{key: values[key] for key in _OF_LOOP if key in values}
        )
        base = TrainSettings(
            data=DataSettings(**{key: values[key] for key in _OF_ROWS if key in values}),
            loop=loop,
            output="",
            **{key: values[key] for key in _OF_RUN if key in values},
        )
        with self.telling(where):
            base.check()
        return Data(
            name=self.name(found, "name", where),
            base=base,
            targets=tuple(self.words(found, "targets", where)),
            steps=steps,
            trial_steps=self.number(found, "trial_steps", where, default=steps),
            dev_rows=self.number(found, "dev_rows", where, default=200),
            metric=self.word(found, "metric", where),
            dev=values.get("dev"),
            dev_words=self.number(found, "dev_words", where, default=1),
            sample_sets=self.number(found, "sample_sets", where, default=1),
            forgetting=values.get("forgetting"),
            folder=str(self.folder),
        )

    def rows(self, found: Mapping[str, Any], where: str, names: Sequence[str]) -> Iterator[Row]:
        """One row a budget and a combination of the grid."""
        method = self.word(found, "method", where)
        if method not in METHODS:
            raise StudyError(f"{self.path}: {where}: method {method!r} is unknown; {near(method, METHODS)}")
        options = {key: value for key, value in found.items() if key not in (*_ROW_KEYS, "grid")}
        self.check_keys(options, METHODS[method], f"{where} (method {method!r})")
        grid = found.get("grid", {})
        self.check_keys(grid, METHODS[method], f"{where}: grid (method {method!r})")
        for one in (options, *({key: value} for key in grid for value in self.several(grid, key, f"{where}: grid"))):
            self.check_options(one, method, where)
        if method in _RANKED and "rank" not in {*options, *grid} and not {"budgets", "coefficients"} & {*found}:
            raise StudyError(f"{self.path}: {where}: {method} must have a rank, or budgets that decide it")
        for key in ("name", "curve"):
            if key in found:
                self.name(found, key, where)
        curve = found.get("curve", found.get("name", method))
        where_run = tuple(self.words(found, "data", where))
        for name in where_run:
            if name not in names:
                raise StudyError(f"{self.path}: {where}: data {name!r} is unknown; {near(name, names)}")
        start = self.start(found, where, method)
        points = self.points(found, where)
        budgets = self.budgets(found, where, method, points)
        for chosen in itertools.product(*(self.several(grid, key, where) for key in grid)):
            of_grid = dict(zip(grid, chosen, strict=True))
            told = ", ".join(f"{key} {value}" for key, value in of_grid.items())
            for budget, called in budgets:
                name = (
                    found.get("name", curve)
                    if not (budget or told)
                    else " ".join((curve, *filter(None, (told, called))))
                )
                own = tuple(sorted((options | of_grid).items()))
                line = curve if not told else f"{curve} {told}"
                yield Row(name, line, method, own, budget, points, self.rate(found, where), where_run, start)

    def start(self, found: Mapping[str, Any], where: str, method: str) -> tuple[tuple[str, Any], ...]:
        told = found.get("start", {})
        self.check_keys(told, STARTS, f"{where}: start")
        ways = [key for key in ("allot", "try_seeds", "project") if key in told]
        if told and (len(ways) != 1 or ("try_steps" in told) != ("try_seeds" in told)):
            raise StudyError(
                f"{self.path}: {where}: start is allot, try_seeds with try_steps, or project, got {[*told]}; keep one"
            )
        known = {"allot": ALLOTTED, "try_seeds": SEEDED, "project": NEAREST}
        for key in ways:
            if method not in known[key]:
                raise StudyError(
                    f"{self.path}: {where}: start {key} is for {', '.join(known[key])}, got {method!r}; leave it out"
                )
            if key == "allot" and told[key] not in ALLOTMENTS:
                raise StudyError(f"{self.path}: {where}: allot {told[key]!r} is unknown; {near(told[key], ALLOTMENTS)}")
        for key in told:
            if key != "allot":
                self.number(told, key, f"{where}: start")
        return tuple(sorted(told.items()))

    def points(self, found: Mapping[str, Any], where: str) -> tuple[PointSpec, ...]:
        if "points" in found and "bits" in found:
            raise StudyError(f"{self.path}: {where} may have points or bits, got both; keep one")
        for one in self.several(found, "points", where):
            self.check_keys(one, ("rank", "bits"), f"{where}: points")
            for key in one:
                self.number(one, key, f"{where}: points")
        specs = [PointSpec(**one) for one in found.get("points", [])]
        specs += [PointSpec(bits) for bits in self.several(found, "bits", where)]
        if specs and found["method"] not in QUANTIZABLE:
            raise StudyError(
                f"{self.path}: {where}: only {', '.join(QUANTIZABLE)} can be stored at fewer bits than they were "
                f"trained at, got {found['method']!r}, whose file holds more than coefficients; leave them out"
            )
        for one in specs:
            self.bits(one.bits, "bits", where)
            if one.rank is not None and found["method"] != "lora":
                raise StudyError(
                    f"{self.path}: {where}: only a lora can be truncated to a rank, got {found['method']!r}"
                )
            if one.rank is not None and one.rank > found.get("rank", one.rank):
                raise StudyError(f"{self.path}: {where}: a rank of {found['rank']} has no leading {one.rank} terms")
        if len(set(specs)) < len(specs):
            raise StudyError(f"{self.path}: {where}: each way to store a run may be named once, got one twice")
        return tuple(specs)

    def budgets(
        self, found: Mapping[str, Any], where: str, method: str, points: Sequence[PointSpec]
    ) -> list[tuple[Budget | None, str]]:
        given = [key for key in ("budgets", "coefficients") if key in found]
        if not given:
            return [(None, "")]
        if len(given) > 1 or method not in SIZED:
            raise StudyError(
                f"{self.path}: {where}: budgets are bytes or coefficients of one of {', '.join(SIZED)}, got {given} "
                f"of {method!r}; keep one, or name the size itself (rank, basis, …)"
            )
        if given == ["coefficients"]:
            counts = self.several(found, "coefficients", where)
            for count in counts:
                self.number({"coefficients": count}, "coefficients", where)
            return [(Budget(count, "coefficients"), f"{count:,} coefficients") for count in counts]
        bits = self.bits(found.get("budget_bits", min((one.bits for one in points), default=16)), "budget_bits", where)
        with self.telling(where):
            sizes = [byte_count(text) for text in self.several(found, "budgets", where)]
        return [(Budget(size, "bytes", bits), f"{size:,} B") for size in sizes]

    def rate(self, found: Mapping[str, Any], where: str) -> float | None:
        rate = found.get("rate")
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < inf):
            raise StudyError(f"{self.path}: {where}: rate must be a number above 0, got {rate!r}")
        return rate

    # --- values ---

    @contextmanager
    def telling(self, where: str) -> Generator[None]:
        """An error of what a run is told is one of the study."""
        try:
            yield
        except RandbasisError as error:
            raise StudyError(f"{self.path}: {where}: {error}") from error

    def tables(self, found: Mapping[str, Any], key: str) -> list[Any]:
        value = found.get(key, [])
        if not isinstance(value, list):
            raise StudyError(f"{self.path}: {key} must be tables, each under [[{key}]], got one under [{key}]")
        for i, one in enumerate(tables := cast("list[Any]", value)):
            self.check_keys(one, one, f"[[{key}]] {i + 1}")
        return tables

    def check_types(self, found: Mapping[str, Any], kind: type, where: str) -> None:
        """Values must have the types that a run declares; paths are looked at where they are read."""
        for name, hint in get_type_hints(kind).items():
            if name in found and name not in _PATHS and not _fits(found[name], hint):
                raise StudyError(f"{self.path}: {where}: {name} must be {_expected(hint)}, got {found[name]!r}")

    def check_options(self, options: Mapping[str, Any], method: str, where: str) -> None:
        if method in RIVALS:
            for key, value in options.items():
                if not _fits(value, bool | int | float):
                    raise StudyError(f"{self.path}: {where}: {key} must be a number, true or false, got {value!r}")
            return
        self.check_types(options, AdapterSettings, where)
        with self.telling(where):
            AdapterSettings(method, **options).check()

    def several(self, found: Mapping[str, Any], key: str, where: str) -> list[Any]:
        """A list with something in it, since an empty one would drop the row in silence; none where the key is not."""
        if key not in found:
            return []
        value = found[key]
        if not isinstance(value, list) or not value:
            raise StudyError(f"{self.path}: {where}: {key} must be a list with at least one value, got {value!r}")
        return cast("list[Any]", value)

    def words(self, found: Mapping[str, Any], key: str, where: str) -> list[str]:
        several = self.several(found, key, where)
        for value in several:
            if not isinstance(value, str):
                raise StudyError(f"{self.path}: {where}: {key} must be a list of texts, got {several!r}")
        return several

    def name(self, found: Mapping[str, Any], key: str, where: str) -> str:
        """Text that fits into a line of a table."""
        value = self.word(found, key, where)
        if not value.strip() or not value.isprintable():
            raise StudyError(f"{self.path}: {where}: {key} must be text on one line, got {value!r}")
        return value

    def bits(self, value: Any, key: str, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value not in BITS:
            raise StudyError(f"{self.path}: {where}: {key} must be one of {list(BITS)}, got {value!r}")
        return value

    def check_keys(self, found: Any, known: Sequence[str], where: str) -> None:
        if not isinstance(found, Mapping):
            raise StudyError(f"{self.path}: {where} must be a table, got {found!r}; see docs/comparing.md")
        for key in cast("Mapping[str, Any]", found):
            if key not in known:
                raise StudyError(f"{self.path}: {where} has no key {key!r}; {near(key, known)}")

    def there(self, value: Any, where: str) -> Any:
        """A path below the folder, as far as the file is there."""
        if isinstance(value, list) and value:
            return tuple(self.there(one, where) for one in cast("list[Any]", value))
        if not isinstance(value, str) or not value:
            raise StudyError(f"{self.path}: {where} must be a path, got {value!r}")
        path = self.folder / value
        if self.must_exist and not path.exists():
            raise DataMissingError(
                f"{self.path}: {where} names {value!r}, and there is no {path}; give the folder of models and data "
                "with --data"
            )
        return str(path)

    def word(self, found: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
        value = found.get(key, default)
        if not isinstance(value, str):
            raise StudyError(f"{self.path}: {where} must say {key} as text, got {value!r}")
        return value

    def number(self, found: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
        value = found.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise StudyError(f"{self.path}: {where}: {key} must be a whole number from 1, got {value!r}")
        return value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a study file has a type that a field declares; a whole number is a number, too."""
    if isinstance(hint, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    if isinstance(value, (int, float)):
        return (hint is float and isfinite(value)) or (hint is int and isinstance(value, int))
    return hint is str and isinstance(value, str)


def _expected(hint: Any) -> str:
    told = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return " or ".join(told[one] for one in (get_args(hint) or (hint,)) if one in told)
