"""The names of PEFT and transformers that the package relies on: all of them stand in the tables that import checks."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import transformers
from packaging.requirements import Requirement
from transformers import LlamaConfig, LlamaForCausalLM

import randbasis
from randbasis.errors import RegistrationError, VersionPairError
from randbasis.serve.host_names import ENGINE_NAMES, ENGINE_RANGE
from randbasis.train.host_names import TRAINER_NAMES
from randbasis.tuner import host_names
from randbasis.tuner.host_names import PEFT_NAMES, TESTED, TRANSFORMERS_NAMES, HostName, check_names

HOSTS = ("peft", "transformers", "accelerate")
NAMES = (*PEFT_NAMES, *TRANSFORMERS_NAMES, *TRAINER_NAMES, *ENGINE_NAMES)
LISTED = {f"{one.module}.{one.name}" for one in NAMES}
#: What both packages document as their public face moves with notice; only what lies deeper is listed.
PUBLIC = {"peft", "transformers", "accelerate", "transformers.modeling_outputs", "transformers.trainer_utils"}
FILES = sorted((Path(randbasis.__file__).parent).rglob("*.py"))


def listed(name: str) -> bool:
    """Whether a name or something below it is in the tables."""
    return any(known == name or known.startswith(f"{name}.") for known in LISTED)


def modules() -> list[str]:
    root = Path(randbasis.__file__).parent.parent
    return [".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for file in FILES]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FILES[0].parent)))
def test_every_inner_name_that_is_imported_is_listed(file: Path):
    missing = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in HOSTS
        if node.module not in PUBLIC
        for alias in node.names
        if not listed(f"{node.module}.{alias.name}") and not inspect.ismodule(_attribute(node.module, alias.name))
    ]
    assert not missing, "add these to the tables of host_names.py"


def _attribute(module: str, name: str) -> object:
    return getattr(importlib.import_module(module), name, importlib.import_module(module))


@pytest.mark.parametrize("module", [m for m in modules() if not m.endswith(("__main__", "gguf_lora"))])
def test_every_override_is_listed(module: str):
    own = importlib.import_module(module)
    missing = []
    for _, kind in inspect.getmembers(own, inspect.isclass):
        if kind.__module__ != module:
            continue
        hosts = [base for base in kind.__mro__[1:] if base.__module__.split(".")[0] in HOSTS]
        for name in vars(kind):
            if name.startswith("__") or name in ("_abc_impl", "model", "prefix", "tuner_layer_cls"):
                continue
            of = [base for base in hosts if name in vars(base) and callable(vars(base)[name])]
            if of and not any(listed(f"{base.__module__}.{base.__qualname__}.{name}") or _by_mixin(base, name)
                              for base in of):  # fmt: skip
                missing.append(f"{of[0].__module__}.{of[0].__qualname__}.{name}")
    assert not missing, "add these to the tables of host_names.py"


def _by_mixin(base: type, name: str) -> bool:
    """PeftConfig's methods stand in a class above it."""
    return base.__qualname__ == "PeftConfigMixin" and f"peft.PeftConfig.{name}" in LISTED


def test_no_name_stands_twice():
    assert len(LISTED) == len(NAMES)


@pytest.mark.parametrize("one", NAMES, ids=lambda one: f"{one.module}.{one.name}")
def test_every_listed_name_is_there(one: HostName):
    if one in ENGINE_NAMES and transformers.__version__ not in Requirement(ENGINE_RANGE["transformers"]).specifier:
        pytest.skip(f"serving needs {ENGINE_RANGE['transformers']}")
    assert one.fault() is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (HostName("peft.tuners.tuners_utils", "BaseTuner._gone", "targets"), "has no .*BaseTuner._gone"),
        (HostName("peft.gone", "anything", "targets"), "has no peft.gone.anything"),
        (HostName("peft", "get_peft_model", "targets", ("modell",)), "without parameter 'modell'"),
    ],
)
def test_a_missing_name_is_named_with_its_version_and_the_way_out(name: HostName, said: str):
    with pytest.raises(RegistrationError, match=f"peft {peft.__version__} .*{said}.*targets.*install 'peft>="):
        check_names([name])


def test_import_checks_before_anything_is_used():
    """An inner name that is gone is a RegistrationError of `import randbasis`, not an ImportError somewhere."""
    code = (
        "import peft.tuners.tuners_utils as t\ndel t.BaseTuner._prepare_model\n"
        "try:\n    import randbasis\nexcept RuntimeError as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"RegistrationError peft {peft.__version__} has no ")
    assert "_prepare_model" in done.stdout


def test_a_pair_that_cannot_work_says_which_can(monkeypatch: pytest.MonkeyPatch):
    from transformers.integrations import peft as integration

    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "99.0")
    monkeypatch.setattr(integration, "check_peft_version", transformers.utils.check_peft_version)
    host_names.name_pair()
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = LlamaForCausalLM(config)
    with pytest.raises(VersionPairError, match=r"PEFT >= 99\.0, installed is .*pip install 'transformers>=.*get_peft"):
        model.add_adapter(randbasis.NolaConfig(num_basis=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="PEFT >= 99"):
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    peft.get_peft_model(model, randbasis.NolaConfig(num_basis=4, target_modules=["q_proj"]))


def test_a_pair_that_works_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    from transformers.integrations import peft as integration

    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.1")
    monkeypatch.setattr(integration, "check_peft_version", transformers.utils.check_peft_version)
    host_names.name_pair()
    assert integration.check_peft_version is transformers.utils.check_peft_version


def test_the_ranges_that_work_in_full_lie_in_those_of_the_package(root: Path):
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    ranges = {Requirement(text).name: Requirement(text) for text in wanted}
    for text in TESTED.values():
        tested = Requirement(text)
        floor = [s for s in tested.specifier if s.operator == ">="]
        assert floor
        assert floor == [s for s in ranges[tested.name].specifier if s.operator == ">="]


def test_the_page_is_up_to_date(root: Path):
    done = subprocess.run(
        [sys.executable, str(root / "docs" / "host_names.py")], capture_output=True, text=True, check=True
    )
    page = (root / "docs" / "host-names.md").read_text(encoding="utf-8")
    assert page == done.stdout, "docs/host-names.md is stale: run `make docs`"
