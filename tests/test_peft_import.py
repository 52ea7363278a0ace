"""`import randbasis` registers with PEFT in either order, and loads nothing heavy before it has to."""

import subprocess
import sys

import pytest

#: Whether PEFT reads our configurations, asked without a name of ours.
CHECK = """
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
assert PeftType("RANDBASIS") is PeftType.RANDBASIS
assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.RANDBASIS].__name__ == "RandbasisModel"
config = PeftConfig.from_peft_type(peft_type="RANDBASIS", method="nola", num_basis=3)
assert (type(config).__name__, config.num_basis) == ("NolaConfig", 3)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "imports",
    [
        "import randbasis, peft",
        "import peft, randbasis",
        "import randbasis\nfrom peft.tuners.lora import LoraConfig",
        "from randbasis import *",
        "import randbasis, transformers\nfrom transformers.integrations import peft",
    ],
)
def test_peft_knows_the_methods(imports: str):
    run(f"{imports}\n{CHECK}")


def test_peft_sees_nothing_of_it():
    run(
        "import sys\nbefore = list(sys.meta_path)\nimport randbasis\nassert len(sys.meta_path) == len(before) + 1\n"
        "import importlib; importlib.reload(randbasis); assert len(sys.meta_path) == len(before) + 1\n"
        "import importlib.util as u; assert u.find_spec('peft').loader.get_source('peft')\n"
        "import peft\nassert not [one for one in sys.meta_path if type(one).__module__.startswith('randbasis')]\n"
        "assert type(peft.__loader__).__name__ == type(peft.__spec__.loader).__name__ == 'SourceFileLoader'\n"
    )


def test_a_configuration_is_unpickled_where_nothing_was_imported():
    pickled = run("import pickle, randbasis; print(pickle.dumps(randbasis.NolaConfig(num_basis=3)).hex())").strip()
    run(f"import pickle\nconfig = pickle.loads(bytes.fromhex('{pickled}'))\nassert config.num_basis == 3\n{CHECK}")


def test_a_peft_that_cannot_be_registered_with_is_still_a_peft():
    """The import of a third party does not fail for our sake; what needs us says why."""
    said = run(
        "import importlib.util, sys, warnings\nimport randbasis\n"
        "spec = importlib.util.find_spec('peft')\nrun = spec.loader._loader.exec_module\n"
        "def worn(module):\n    run(module)\n    del module.tuners.tuners_utils.BaseTuner._prepare_model\n"
        "spec.loader._loader.exec_module = worn\n"
        "peft = sys.modules['peft'] = importlib.util.module_from_spec(spec)\n"
        "with warnings.catch_warnings(record=True) as told:\n    warnings.simplefilter('always')\n"
        "    spec.loader.exec_module(peft)\n"
        "print([str(one.message) for one in told if 'not registered with PEFT' in str(one.message)])\n"
        "try:\n    randbasis.NolaConfig\nexcept randbasis.RandbasisError as error:\n    print(type(error).__name__)\n"
    )
    assert "_prepare_model" in said
    assert said.rstrip().endswith("RegistrationError")


def test_a_failed_import_of_peft_leaves_word_for_the_next():
    run(
        "import sys, randbasis\nsys.modules['accelerate'] = None\n"
        "try:\n    import peft\nexcept ImportError:\n    pass\nelse:\n    raise AssertionError\n"
        "for name in [name for name in sys.modules if name.startswith('peft')]:\n    del sys.modules[name]\n"
        f"del sys.modules['accelerate']\n{CHECK}"
    )


def test_a_wrong_name_says_what_is_near():
    import randbasis

    with pytest.raises(AttributeError, match="no attribute 'NolaConfg'; did you mean NolaConfig"):
        randbasis.NolaConfg  # noqa: B018
    with pytest.raises(ImportError, match="NolaConfg"):
        exec("from randbasis import NolaConfg")


def test_dir_lists_the_public_names_before_they_are_loaded():
    run(
        "import sys, randbasis\nassert set(randbasis.__all__) <= set(dir(randbasis))\n"
        "assert 'torch' not in sys.modules\n"
        "assert randbasis.tuner.NolaConfig is randbasis.NolaConfig\nassert 'NolaConfig' in vars(randbasis)\n"
    )
