"""The conversion of PEFT's tables, on tables written here: no source distribution and no network needed."""

from dataclasses import dataclass, field

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, VeraConfig
from peft_conformance import convert_table, converted_kwargs, functions_of, holds_not_finite
from run_peft_tests import faults, reason_of, summary


@dataclass
class Target(PeftConfig):
    r: int = 4
    alpha: float = 1.0
    dropout: float = 0.0
    seed: int = 0
    init_weights: bool = True
    target_modules: list[str] | str | None = None
    computed: int = field(default=0, init=False)


CUSTOM_MODEL_NAMES = "test_name, model_id, config_cls, config_kwargs"


def converted(names: str, table: list) -> list:
    assert convert_table(names, table, Target)
    return table


def test_keeps_only_the_template_rows_of_a_class_table():
    table = [
        (LoraConfig, {"target_modules": None, "r": 2}),
        (VeraConfig, {"target_modules": None, "r": 8, "vera_dropout": 0.05, "projection_prng_key": 255}),
    ]
    assert converted("config_cls,config_kwargs", table) == [(Target, {"target_modules": None, "r": 8, "dropout": 0.05})]


def test_rewrites_the_list_that_the_mark_holds():
    table = [("VeRA", "MLP", VeraConfig, {"target_modules": "lin0"})]
    mark = pytest.mark.parametrize(CUSTOM_MODEL_NAMES, table).mark
    convert_table(CUSTOM_MODEL_NAMES, table, Target)
    assert mark.args[1][0] == ("VeRA", "MLP", Target, {"target_modules": "lin0"})


def test_adds_own_rows_only_for_options_that_the_target_has():
    table = converted(CUSTOM_MODEL_NAMES, [("VeRA", "MLP", VeraConfig, {"target_modules": "lin0"})])
    names = [row[0] for row in table]
    assert "own another seed" in names
    assert "own weight order" not in names  # Target has no field contraction


def test_turns_lora_instances_into_target_instances_with_what_they_set():
    table = [
        ("mixed", LoraConfig(target_modules=["lin0"], init_lora_weights=False), LoraConfig(r=16, lora_alpha=3)),
        ("mixed", IA3Config(target_modules=["lin0"], feedforward_modules=[]), LoraConfig()),
        ("mixed", AdaLoraConfig(total_step=1), AdaLoraConfig(total_step=1)),
    ]
    ((name, first, second),) = converted("test_name, config0, config1", table)
    assert name == "mixed"
    assert (set(first.target_modules), first.init_weights, first.r) == ({"lin0"}, False, 4)
    assert (second.r, second.alpha, second.init_weights) == (16, 3, True)


@pytest.mark.parametrize(
    ("table", "expected"),
    [([IA3Config, VeraConfig, LoraConfig], [Target]), ([IA3Config, LoraConfig], [Target]), ([IA3Config], [])],
)
def test_tables_of_bare_classes(table, expected):
    assert converted("config_cls", table) == expected


def test_leaves_tables_without_configs_alone():
    table = ["float16", "bfloat16"]
    assert not convert_table("dtype", table, Target)
    assert table == ["float16", "bfloat16"]


def test_never_passes_what_the_target_has_no_argument_for():
    assert converted_kwargs({"computed": 1, "peft_type": "LORA", "save_projection": True, "r": 3}, Target) == {"r": 3}


def test_finds_inherited_test_methods():
    class Base:
        def test_inherited(self): ...

    class TestChild(Base):
        def test_own(self): ...

    def test_free(): ...

    module = type("module", (), {"TestChild": TestChild, "test_free": test_free, "Base": Base})
    assert {function.__name__ for function in functions_of(module)} == {"test_inherited", "test_own", "test_free"}


def test_report_separates_expected_failures_from_faults():
    refused = {"outcome": "failed", "exception": "randbasis.errors.LayerTypeError", "message": "got Conv2d(3, 4)"}
    wrong = {"outcome": "failed", "exception": "builtins.AssertionError", "message": "", "place": "t.py:7"}
    assert reason_of("a.py::t1", refused) == "unsupported layer type: Conv2d"
    assert reason_of("a.py::t1", wrong) == "AssertionError: no message (t.py:7)"
    good = summary({"tests/a.py::t1": refused, "tests/a.py::t2": {"outcome": "passed"}}, ["a"])
    assert good["counts"]["a"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert faults({"nola": good}) == []
    bad = summary({"tests/a.py::t1": wrong}, ["a", "b"])
    assert faults({"nola": bad}) == ["nola: 1 unexpected failures", "nola: no test of b was converted"]


def test_refused_pickle_is_expected_only_where_the_test_is_about_pickles():
    refused = {"outcome": "failed", "exception": "e.E", "message": "only x.bin, a pickle, which is never read; give"}
    assert reason_of("a.py::T::test_save_pretrained_pickle[row]", refused).startswith("refused on purpose")
    assert reason_of("a.py::T::test_save_pretrained[row]", refused).startswith("e.E: only x.bin")


def test_divergence_excuses_one_test_of_one_method_and_only_with_values_that_are_not_finite():
    failed = {"outcome": "failed", "exception": "builtins.AssertionError", "diverged": True}
    known = "a.py::T::test_disable_adapters[row-MLP-RandLoraConfig-k]"
    assert reason_of(known, failed).startswith("the test's own training diverges")
    assert reason_of(known, failed | {"diverged": False}).startswith("AssertionError")
    assert reason_of(known.replace("RandLora", "Nola"), failed).startswith("AssertionError")
    assert reason_of(known.replace("disable", "delete"), failed).startswith("AssertionError")
    assert holds_not_finite({"a": torch.tensor([1.0, float("nan")]), "b": 1})
    assert not holds_not_finite({"a": torch.tensor([1.0]), "b": torch.tensor([1])})
