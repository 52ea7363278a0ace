"""Pytest plugin: PEFT's own tests, pointed at one configuration class of this package.

``@pytest.mark.parametrize`` keeps a reference to the list it was given, so the tables of PEFT's tests can be rewritten
in place before pytest expands them. A row written for the template becomes a row for the target, every other row
goes, and a test with no converted table is deselected. Two templates:

- ``VeraConfig`` classes with their keyword arguments: VeRA supports the layer types that this package supports;
- ``LoraConfig`` *instances* (the mixed-batch and embedding tables) and, in tables of bare classes without VeRA,
  the ``LoraConfig`` class.

``run_peft_tests.py`` prepares the tests and calls pytest with the options below.
"""

import dataclasses
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, VeraConfig

RENAMED = {
    "init_lora_weights": "init_weights",
    "vera_dropout": "dropout",
    "lora_dropout": "dropout",
    "lora_alpha": "alpha",
}
# Fields that say what a config is, not how it is set.
IDENTITY = {"peft_type", "peft_version", "auto_mapping", "runtime_config"}

# PEFT leaves these out for VeRA, whose adapters share one matrix pair and whose options are few. Ours differ.
OWN_CASES = [
    ("dropout", "MLP", {"target_modules": ["lin0", "lin1"], "dropout": 0.1}),
    ("another seed", "MLP", {"target_modules": ["lin0", "lin1"], "seed": 2**40 + 7}),
    ("rank 1", "MLP", {"target_modules": ["lin0"], "r": 1}),
    ("weight order", "MLP", {"target_modules": ["lin0", "lin1"], "contraction": "weight"}),
    ("recomputed basis", "EmbConv1D", {"target_modules": ["conv1d"], "basis_storage": "recompute"}),
    ("another law", "MLP", {"target_modules": ["lin1"], "law": "uniform"}),
    ("one basis a matrix", "MLP", {"target_modules": ["lin0", "lin1"], "share_basis": False}),
    ("paper scaling", "MLP", {"target_modules": ["lin0", "lin1"], "scaling": "paper"}),
    ("Conv1D and Linear", "EmbConv1D", {"target_modules": ["conv1d", "lin0"]}),
]

# These never use the config class they are given.
UNUSED_ARGUMENT = {"test_add_weighted_adapter_cat_with_rank_pattern"}
# This one combines adapters by what only LoRA's factors mean: PEFT skips it for every class that is not LoRA's.
LORA_ARITHMETIC = {"test_weighted_combination_of_adapters"}
# This one asks for a second adapter of another rank.
NEEDS_RANK = {"test_adding_multiple_adapters_with_bias_raises"}


def load_target(name: str) -> type[PeftConfig]:
    """Return the config class that ``module:Class`` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def converted_kwargs(kwargs: dict[str, Any], target: type[PeftConfig]) -> dict[str, Any]:
    """Rename keyword arguments to ``target``'s names and leave out what it has no field for."""
    fields = {field.name for field in dataclasses.fields(target) if field.init} - IDENTITY
    renamed = {RENAMED.get(name, name) if RENAMED.get(name) in fields else name: v for name, v in kwargs.items()}
    return {name: value for name, value in renamed.items() if name in fields}


def changed_fields(config: PeftConfig) -> dict[str, Any]:
    """Return what ``config`` sets away from its class's defaults."""
    default = vars(type(config)())
    return {name: value for name, value in vars(config).items() if value != default[name]}


def is_config_class(value: object) -> bool:
    """Tell whether ``value`` is a PEFT config class."""
    return inspect.isclass(value) and issubclass(value, PeftConfig)


def row_values(row: Any) -> tuple[Any, ...]:
    """Return the values of one table row, which may be a tuple, a ``pytest.param`` or one bare value."""
    return tuple(getattr(row, "values", row)) if isinstance(row, (tuple, list)) else (row,)


def converted_row(row: Any, target: type[PeftConfig], template: type[PeftConfig]) -> Any | None:
    """Return ``row`` for ``target``, or None when the row is not written for a template."""
    values = row_values(row)
    classes = [value for value in values if is_config_class(value)]
    instances = [value for value in values if isinstance(value, PeftConfig)]
    from_class = classes == [template]
    from_instances = bool(instances) and all(type(config) is LoraConfig for config in instances)
    if from_class == from_instances:
        return None

    def convert(value: Any) -> Any:
        if is_config_class(value):
            return target
        if isinstance(value, PeftConfig):
            return target(**converted_kwargs(changed_fields(value), target))
        return converted_kwargs(value, target) if isinstance(value, dict) and from_class else value

    new = tuple(convert(value) for value in values)
    return new if isinstance(row, (tuple, list)) else new[0]


def own_rows(names: str, target: type[PeftConfig]) -> list[tuple[Any, ...]]:
    """Return the extra rows for a table with the arguments ``names``; a case whose option ``target`` lacks goes."""
    arguments = [name.strip() for name in names.split(",")]
    if arguments == ["test_name", "model_id", "config_cls", "config_kwargs"]:
        return [
            (f"own {case}", model, target, kwargs)
            for case, model, kwargs in OWN_CASES
            if converted_kwargs(kwargs, target) == kwargs
        ]
    if arguments == ["test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"]:
        pair = [{"target_modules": [layer], "init_weights": False} for layer in ("lin0", "lin1")]
        return [("own different layers", "own", target, *pair)]
    return []


def convert_table(names: str, table: list[Any], target: type[PeftConfig]) -> bool:
    """Rewrite one parametrize table in place for ``target``; tell whether it is a table of configs."""
    values = [value for row in table for value in row_values(row)]
    if not any(is_config_class(value) or isinstance(value, PeftConfig) for value in values):
        return False
    only_classes = all(is_config_class(row) for row in table)
    template = LoraConfig if only_classes and VeraConfig not in values else VeraConfig
    extra = own_rows(names, target) if VeraConfig in values else []
    rows = [converted_row(row, target, template) for row in table]
    table[:] = [row for row in rows if row is not None] + extra
    return True


def functions_of(module: Any) -> Iterator[Any]:
    """Yield the module's test functions and the test methods of its classes, inherited ones included."""
    for name, value in vars(module).items():
        if inspect.isclass(value) and name.startswith("Test"):
            yield from (f for holder in value.__mro__ for n, f in vars(holder).items() if n.startswith("test"))
        elif inspect.isfunction(value) and name.startswith("test"):
            yield value


def holds_not_finite(values: dict[str, Any]) -> bool:
    """Tell whether one of a function's local variables is a tensor with a value that is not finite."""
    tensors = [value for value in values.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return any(not bool(torch.isfinite(tensor).all()) for tensor in tensors)


class Conformance:
    """The hooks: rewrite the tables, keep the converted tests, unlock them, write down what came out."""

    def __init__(self, target: type[PeftConfig], results: Path, only: str) -> None:
        self.target = target
        self.results = results
        self.only = only
        self.tables: dict[int, tuple[list[Any], bool]] = {}  # the list is kept so that nothing else takes its id
        self.outcomes: dict[str, dict[str, Any]] = {}

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        if not isinstance(collector, pytest.Module):
            return
        for function in functions_of(collector.obj):
            for mark in getattr(function, "pytestmark", []):
                if mark.name == "parametrize" and isinstance(mark.args[1], list):
                    self.convert_once(str(mark.args[0]), mark.args[1])

    def convert_once(self, names: str, table: list[Any]) -> None:
        """Convert a table that several tests share when the first of them comes by."""
        if id(table) not in self.tables:
            self.tables[id(table)] = (table, convert_table(names, table, self.target))

    def is_chosen(self, item: pytest.Item) -> bool:
        """Tell whether one of the item's tables holds the target now."""
        if item.originalname in UNUSED_ARGUMENT or self.only not in item.name:
            return False
        tables = [self.tables.get(id(mark.args[1]), ([], False)) for mark in item.iter_markers("parametrize")]
        return any(converted and table for table, converted in tables)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if self.is_chosen(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    @pytest.fixture(autouse=True)
    def unlock(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run what PEFT skips by the class or its name: mixed batches, beam search, ``Conv1D`` and DeBERTa."""
        test = request.node.originalname
        ranked = "r" in {field.name for field in dataclasses.fields(self.target)}
        if test in LORA_ARITHMETIC or (test in NEEDS_RANK and not ranked):
            return
        for module in (request.module, importlib.import_module("tests.testing_common")):
            if hasattr(module, "LoraConfig"):
                monkeypatch.setattr(module, "LoraConfig", self.target)
        monkeypatch.setattr(request.module, "skip_deberta_lora_tests", lambda *_: None, raising=False)
        if self.target.__name__ == "RandLoraConfig" and hasattr(request.module, "RandLoraConfig"):
            # PEFT's tests train RandLoRA with a learning rate of its own, for its scaling of 20.
            monkeypatch.setattr(request.module, "RandLoraConfig", self.target)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Iterator[None]:
        report = yield
        if report.failed and call.excinfo is not None:
            kind, place = call.excinfo.type, call.excinfo.traceback[-1]
            report.user_properties += [
                ("exception", f"{kind.__module__}.{kind.__qualname__}"),
                ("message", str(call.excinfo.value)),
                ("place", f"{Path(place.path).name}:{place.lineno + 1}"),
                ("diverged", holds_not_finite(place.frame.f_locals)),
            ]
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when in ("setup", "teardown") and report.passed:
            return
        entry: dict[str, Any] = {"outcome": report.outcome, **dict(report.user_properties)}
        if report.skipped:
            expected = getattr(report, "wasxfail", None)
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            entry["message"] = reason if expected is None else f"expected failure: {expected}"
        self.outcomes[report.nodeid] = entry

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput"):  # with xdist the controller alone has seen every report
            self.results.write_text(json.dumps(self.outcomes, indent=1, sort_keys=True))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--conformance-target", required=True, help="the config class under test, as module:Class")
    group.addoption("--conformance-results", required=True, type=Path, help="the JSON file to write")
    group.addoption("--conformance-only", default="", help="run only the tests whose name holds this text")


def pytest_configure(config: pytest.Config) -> None:
    target = load_target(config.getoption("--conformance-target"))
    results = config.getoption("--conformance-results")
    hooks = Conformance(target, results, config.getoption("--conformance-only"))
    config.pluginmanager.register(hooks, "randbasis-conformance")
