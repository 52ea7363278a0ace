"""One server with the small Llama and a store of adapters, for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from served import Alone, Served, random_adapter, serving, store_of

from randbasis.adapter_file import PackedAdapter
from randbasis.serve.host_names import ENGINE_RANGE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if transformers.__version__ not in Requirement(ENGINE_RANGE["transformers"]).specifier:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(f"serving needs {ENGINE_RANGE['transformers']}"))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> Iterator[None]:
    """The engine computes in a thread of its own, which has the number of threads that was set last."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(data_dir: Path) -> str:
    return str(data_dir / "llama_stories260k")


@pytest.fixture(scope="session")
def alone(base: str) -> Alone:
    return Alone.of(base)


@pytest.fixture(scope="session")
def users(alone: Alone) -> dict[str, PackedAdapter]:
    """Adapters of three methods, of two tenants."""
    names = ("acme/a", "acme/b", "acme/c", "other/a", "other/b", "other/c")
    return {name: random_adapter(alone.model, seed) for seed, name in enumerate(names)}


@pytest.fixture(scope="session")
def store(users: dict[str, PackedAdapter], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_of(tmp_path_factory.mktemp("store") / "adapters.db", users)


@pytest.fixture(scope="session")
def served(base: str, store: Path) -> Iterator[Served]:
    with serving(base, store) as found:
        yield found
