"""The layer rule: who may import whom, as data, held against the source by walking its syntax trees."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SOURCE = Path(__file__).resolve().parent.parent / "src"
PACKAGE = SOURCE / "randbasis"

#: From the bottom up: a module imports only from rows above its own here, or from its own row's folder.
#: Beside each row, the third parties that it may import.
ROWS: dict[str, set[str]] = {
    "errors": set(),
    "lazy": set(),
    "defaults": set(),
    "precision": set(),
    "ties": set(),
    "laws": set(),
    "basis_storage": set(),
    "basis": {"torch"},
    "ops": {"torch", "numpy", "numba"},
    "codes": {"torch"},
    "methods": {"torch"},
    "rounding": {"torch"},
    "contraction": {"torch"},
    "low_rank": {"torch"},
    "optional": set(),
    "progress": {"rich"},
    "files": {"fsspec", "safetensors"},
    "adapter_file": {"torch", "numpy"},
    "store": set(),
    "batch_rows": {"torch"},
    "bank": {"torch"},
    "tuner": {"torch", "peft", "transformers", "safetensors", "accelerate"},
    "adapters": {"torch", "peft", "transformers", "safetensors", "huggingface_hub"},
    "peft_import": set(),
    "export": {"torch", "peft", "transformers", "safetensors"},
    "importing": {"torch", "peft", "transformers", "safetensors"},
    "arithmetic": {"torch"},
    "train": {
        "torch", "numpy", "peft", "transformers", "safetensors", "accelerate", "PIL", "sacrebleu", "sklearn", "scipy",
        "matplotlib", "rich", "yaml", "jinja2", "huggingface_hub", "datasets", "pyarrow",
    },
    "use": {"torch"},
    "compare": {"torch", "numpy", "peft", "matplotlib", "scipy"},
    "__init__": set(),
    "hub": {"huggingface_hub"},
    "serve": {"torch", "transformers", "fastapi", "uvicorn", "prometheus_client", "pydantic"},
    "cli": {"typer", "rich", "matplotlib"},
    "__main__": set(),
}  # fmt: skip
#: Third parties that one file alone may import, whatever its row allows.
ONLY_HERE = {"triton": "randbasis.ops.triton_kernels", "gguf": "randbasis.export.gguf_lora"}


class Import(NamedTuple):
    """One import of a module: by whom, on which line, and whether for the type checker alone."""

    importer: str
    imported: str
    line: int
    types_only: bool


def module_name(file: Path) -> str:
    """`src/randbasis/ops/__init__.py` -> `randbasis.ops`."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def absolute(importer: str, dots: int, name: str) -> str:
    """The module that an import names, its leading dots resolved as Python resolves them in that file."""
    if not dots:
        return name
    above = dots - 1 if FILES[importer].name == "__init__.py" else dots
    package = importer.split(".")[: importer.count(".") + 1 - above]
    return ".".join([*package, *([name] if name else [])])


def types_only_lines(tree: ast.AST) -> set[int]:
    """The lines under `if TYPE_CHECKING:`."""
    guards = (n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING"))
    return {line for guard in guards for line in range(guard.lineno, (guard.body[-1].end_lineno or 0) + 1)}


def imported_modules(importer: str, node: ast.AST) -> Iterator[str]:
    """The modules that one syntax node imports, `importlib.import_module("literal")` included."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = absolute(importer, node.level, node.module or "")
        for alias in node.names:
            yield submodule if (submodule := f"{module}.{alias.name}") in FILES else module
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        for written in (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)):
            name = str(written).lstrip(".")
            yield absolute(importer, len(str(written)) - len(name), name)


def imports_of(importer: str) -> Iterator[Import]:
    """Every import of one of our modules, wherever in the file it stands."""
    tree = ast.parse(FILES[importer].read_text(encoding="utf-8"))
    typed = types_only_lines(tree)
    for node in ast.walk(tree):
        for imported in imported_modules(importer, node):
            yield Import(importer, imported, node.lineno, node.lineno in typed)


IMPORTS = [found for importer in FILES for found in imports_of(importer)]


def row_of(module: str) -> str:
    """`randbasis.ops.cpu` -> `ops`; the package itself -> `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


def is_ours(module: str) -> bool:
    return module.split(".")[0] == "randbasis"


def test_every_module_has_a_row():
    assert {row_of(module) for module in FILES} <= set(ROWS), "add the new module to ROWS, where it belongs"


def test_a_module_imports_only_from_rows_above_its_own():
    order = list(ROWS)
    wrong = [
        f"{i.importer}:{i.line} imports {i.imported}"
        for i in IMPORTS
        if is_ours(i.imported) and order.index(row_of(i.imported)) > order.index(row_of(i.importer))
    ]
    assert not wrong


def test_third_parties_stay_in_the_rows_that_may_know_them():
    wrong = []
    for i in IMPORTS:
        top = i.imported.split(".")[0]
        allowed = ROWS[row_of(i.importer)] | {name for name, home in ONLY_HERE.items() if i.importer == home}
        if not is_ours(top) and top not in sys.stdlib_module_names and top not in allowed:
            wrong.append(f"{i.importer}:{i.line} imports {i.imported}")
    assert not wrong


def test_rows_allow_no_third_party_that_they_do_not_need():
    """An import, or the first word of a quoted path where one is imported by its name."""
    wrong = []
    for row, allowed in ROWS.items():
        text = "\n".join(file.read_text(encoding="utf-8") for module, file in FILES.items() if row_of(module) == row)
        needed = {name for name in allowed if re.search(rf'^\s*(?:import|from) {name}\b|"{name}\.', text, re.M)}
        wrong += [(row, name) for name in allowed - needed]
    assert not wrong


def test_what_is_imported_is_declared(root: Path):
    """By the package or one of its extras for users: what another package brings along today is not promised."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: texts for name, texts in project["optional-dependencies"].items() if name != "dev"}
    texts = [*project["dependencies"], *(text for one in extras.values() for text in one)]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    homes = packages_distributions()
    tops = {i.imported.split(".")[0] for i in IMPORTS} - {*sys.stdlib_module_names, "randbasis"}
    lacking = {top for top in tops if declared.isdisjoint(map(canonicalize_name, homes.get(top, ())))}
    assert not lacking


def test_the_rule_is_told_as_it_is_held(root: Path):
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = re.search(r"^```text\n(errors .*)\n```$", text, re.M)
    assert told is not None
    assert re.split(r"\s*◀\s*|,\s*", told[1]) == [row for row in ROWS if not row.startswith("__")]


def test_no_import_cycle():
    graph = {module: set[str]() for module in FILES}
    for i in IMPORTS:
        if i.imported in FILES and not i.types_only:
            graph[i.importer].add(i.imported)
    graphlib.TopologicalSorter(graph).prepare()


def test_methods_do_not_import_each_other():
    contract = {"randbasis.methods.method", "randbasis.methods.bound"}
    wrong = [
        f"{i.importer}:{i.line} imports {i.imported}"
        for i in IMPORTS
        if row_of(i.importer) == row_of(i.imported) == "methods"
        and i.importer not in {*contract, "randbasis.methods", "randbasis.methods.table"}
        and i.imported not in contract
        and i.importer != i.imported.replace(".methods.", ".methods.bound_")
    ]
    assert not wrong


def test_no_file_is_a_drawer_without_a_label():
    labels = {"utils", "util", "common", "helpers", "misc"}
    assert not [str(file) for file in FILES.values() if file.stem.strip("_") in labels]


#: The module that imports triton stands for it: bitsandbytes, which peft loads, imports triton where it is installed.
@pytest.mark.parametrize("heavy", ["randbasis.ops.triton_kernels", "vllm", "fastapi", "matplotlib", "gguf"])
def test_import_randbasis_does_not_load(heavy: str):
    code = f"import sys, randbasis; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_import_randbasis_leaves_the_global_random_state():
    code = (
        "import random, numpy, torch\n"
        "def state(): return [random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()]\n"
        "before = state()\nimport randbasis\nfor name in randbasis.__all__: getattr(randbasis, name)\n"
        "assert before == state()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
