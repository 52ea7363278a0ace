"""What every test shares: threads, offline hubs, real data, and a watch on the global random state."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

# Before anything imports a hub client: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

# Without a GPU, Triton kernels are tested in its interpreter: Triton wants to know before it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent
#: Tests of the arithmetic, which has no business with ambient randomness. Layers of torch draw their starts from it.
CORE_TESTS = ("basis", "ops", "methods", "contraction")
#: Tests of models so small that more threads than one only wait for each other.
SMALL_MODELS = ("tuner", "adapters")

pytest_plugins = ["silent_hub", "tiny_runs"]

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
# No deadline: a shared machine is slow at times, and a timed test says nothing about the code.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("repeatable")


#: The packages whose versions decide what other people's machines do.
TOLD = ("torch", "transformers", "peft", "accelerate", "trl", "numpy", "safetensors", "huggingface_hub")


def pytest_report_header() -> str:
    found = {one.name: one.version for one in distributions() if one.name in TOLD}
    return "versions: " + ", ".join(f"{name} {found.get(name, 'missing')}" for name in TOLD)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was not run, and why: one line a reason."""
    reasons = Counter[str]()
    for report in terminalreporter.getreports("skipped"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.section("not run")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count}: {reason}")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def console_environment() -> dict[str, str]:
    """An environment for subprocesses in which `randbasis` and `python` are the ones running these tests."""
    binaries = str(Path(sys.executable).parent)
    return os.environ | {"PATH": binaries + os.pathsep + os.environ.get("PATH", ""), "COLUMNS": "120", "NO_COLOR": "1"}


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real models and data sets."""
    folder = Path(os.environ.get("RANDBASIS_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set RANDBASIS_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of a server on this machine that talks as S3 does."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_folder(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An ``s3://`` folder that is empty, with the environment in which any client finds it."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{os.urandom(8).hex()}"
    s3fs.S3FileSystem().mkdir(bucket)
    yield f"s3://{bucket}/folder"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def memory_folder() -> Iterator[str]:
    """A ``memory://`` folder that is empty."""
    from fsspec.implementations.memory import MemoryFileSystem

    folder = f"/{os.urandom(8).hex()}"
    yield f"memory:/{folder}"
    files = MemoryFileSystem()
    if files.exists(folder):
        files.rm(folder, recursive=True)


@pytest.fixture(params=["memory", "s3"])
def remote_folder(request: pytest.FixtureRequest) -> str:
    """An empty folder behind a URL, in memory and on the server."""
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.path.relative_to(ROOT / "tests").parts[0] not in SMALL_MODELS:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _global_random_state_untouched(request: pytest.FixtureRequest) -> Iterator[None]:
    """A core test that moves torch's global generator fails: bases and their products must not know it exists."""
    place = request.path.relative_to(ROOT / "tests").parts[0].removeprefix("test_")
    if not place.startswith(CORE_TESTS):
        yield
        return
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the global random state of torch was moved"
