"""Run PEFT's own tests on this package's configs and report every failure with its reason.

    python tests/conformance/run_peft_tests.py                           all four methods
    python tests/conformance/run_peft_tests.py --method nola             one method
    python tests/conformance/run_peft_tests.py --quick                   one table row of PEFT's, 56 tests a method
    python tests/conformance/run_peft_tests.py --target peft:LoraConfig  any config class: what PEFT's own would score

The tests come from the source distribution of the installed PEFT; no line of them is in this repository. Everything
is kept in ``.cache/conformance``, so that only the first run needs a package registry.

Exit code: 0 when every failure is expected, else 1. Expected are layer types that this package does not adapt, adapters
saved as a pickle, and tests whose own training diverges (``DIVERGES``). They are counted and listed as failures.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

from stand_ins import write_stand_ins

HERE = Path(__file__).resolve().parent
TARGETS = {
    "nola": "randbasis:NolaConfig",
    "vera": "randbasis:VeraConfig",
    "randlora": "randbasis:RandLoraConfig",
    "pranc": "randbasis:PrancConfig",
}
FILES = [
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_quantization",
]
QUICK_ROW = "Vanilla MLP 4 VeRA"
# What PEFT's tests import beyond PEFT; without dependencies, since several would bring another torch or torchvision.
PACKAGES = [
    "certifi",
    "charset_normalizer",
    "diffusers",
    "idna",
    "importlib_metadata",
    "parameterized",
    "requests",
    "urllib3",
    "zipp",
]
# The test trains by plain gradient descent at one fixed rate; PEFT's RandLoRA meets the same infinities in it.
DIVERGES = {("RandLoraConfig", "test_disable_adapters")}
EXPECTED = ("unsupported layer type", "refused on purpose", "the test's own training diverges")
LAYER_TYPE = re.compile(r"\b(Embedding|Conv[123]d|MultiheadAttention|NonDynamicallyQuantizableLinear)\b")


def pip(*arguments: str) -> bool:
    """Run pip of this interpreter, whose own message says what went wrong, and tell whether it succeeded."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=False).returncode == 0


def prepare_tests(cache: Path) -> Path:
    """Return a folder with the ``tests`` of the installed PEFT and the stand-ins for its hub models."""
    version = importlib.metadata.version("peft")
    folder = cache / f"peft-{version}"
    if not (folder / "tests" / "__init__.py").exists():
        if not (cache / f"peft-{version}.tar.gz").exists():
            arguments = [f"peft=={version}", "--no-binary", "peft", "--no-deps", "--dest", str(cache)]
            if not pip("download", *arguments):
                sys.exit(f"the source distribution of peft {version}, which holds its tests, could not be downloaded")
        with tarfile.open(cache / f"peft-{version}.tar.gz") as sdist:
            tests = [member for member in sdist if member.name.startswith(f"peft-{version}/tests/")]
            sdist.extractall(cache, members=tests, filter="data")
        (folder / "tests" / "__init__.py").touch()
    write_stand_ins(folder)
    return folder


def prepare_packages(cache: Path) -> Path:
    """Return a folder to put on ``PYTHONPATH`` with what PEFT's tests import; the environment stays as it is."""
    folder = cache / f"packages-{sys.implementation.cache_tag}"
    present = {found.name.replace("-", "_").lower() for found in importlib.metadata.distributions(path=[str(folder)])}
    missing = sorted(set(PACKAGES) - present)
    if missing and not pip("install", "--no-deps", "--target", str(folder), *missing):
        sys.exit(f"what PEFT's tests import could not be installed: {', '.join(missing)}")
    if "bitsandbytes" not in present and not pip("install", "--no-deps", "--target", str(folder), "bitsandbytes"):
        print("bitsandbytes could not be installed here, so test_quantization has nothing to run")
    return folder


def run_pytest(target: str, folder: Path, packages: Path, files: list[str], workers: int, only: str) -> dict[str, Any]:
    """Run the converted tests on one config class and return the outcome of each by its pytest id."""
    results = folder / "results.json"
    results.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(HERE), str(packages)])),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider"]
    command += ["-p", "peft_conformance", "--conformance-target", target, "--conformance-results", str(results)]
    command += ["--conformance-only", only, "-n", str(workers), "-q", "--tb=no", "-W", "ignore", "-r", "N"]
    command += [f"tests/{file}.py" for file in files]
    finished = subprocess.run(command, cwd=folder, env=environment, check=False)
    if finished.returncode not in (0, 1):  # 1: some test failed, which is a result
        sys.exit(f"pytest could not run PEFT's tests on {target}: exit code {finished.returncode}")
    return json.loads(results.read_text())


def reason_of(test: str, entry: dict[str, Any]) -> str:
    """Say in one line why a test failed; a layer type that is refused as such is named."""
    if entry.get("diverged") and any(cls in test and f"::{name}[" in test for cls, name in DIVERGES):
        return "the test's own training diverges, as for PEFT's config of this method"
    message = entry.get("message", "").strip() or "no message"
    if "_pickle[" in test and "a pickle, which is never read" in message:
        return "refused on purpose: a pickle is never read"
    if entry.get("exception") == "randbasis.errors.LayerTypeError":
        layer = LAYER_TYPE.search(message)
        return f"unsupported layer type: {layer[1] if layer else message.splitlines()[0]}"
    kind = entry.get("exception", "crash").removeprefix("builtins.")
    return f"{kind}: {message.splitlines()[0]} ({entry.get('place', 'no traceback')})"


def summary(outcomes: dict[str, Any], files: list[str]) -> dict[str, Any]:
    """Count one method's outcomes by file and list its failures and its reasons to skip."""
    counts = {file: Counter({"passed": 0, "failed": 0, "skipped": 0}) for file in files}
    for test, entry in outcomes.items():
        counts[Path(test.split("::")[0]).stem][entry["outcome"]] += 1
    failures = {test: reason_of(test, entry) for test, entry in outcomes.items() if entry["outcome"] == "failed"}
    skips = Counter(entry["message"] for entry in outcomes.values() if entry["outcome"] == "skipped")
    return {"counts": counts, "failures": failures, "skips": dict(skips.most_common())}


def render(report: dict[str, Any]) -> str:
    """Write the report as text: the table, then every failure, then the reasons to skip."""
    width = max(len(method) for method in report)
    lines = [f"{'method':<{width}}  {'file':<30} {'passed':>7} {'failed':>7} {'skipped':>8}"]
    for method, result in report.items():
        total = sum(result["counts"].values(), Counter())
        for file, count in [*result["counts"].items(), ("all", total)]:
            lines.append(
                f"{method:<{width}}  {file:<30} {count['passed']:>7} {count['failed']:>7} {count['skipped']:>8}"
            )
    for method, result in report.items():
        lines += ["", f"{method}: failures by reason"]
        lines += [f"{number:>5}  {why}" for why, number in Counter(result["failures"].values()).most_common()]
        lines += [f"       {test.split('::', 1)[1]}\n         {why}" for test, why in result["failures"].items()]
        lines += ["", f"{method}: skipped by PEFT's tests"]
        lines += [f"{number:>5}  {why}" for why, number in result["skips"].items()]
    return "\n".join(lines)


def faults(report: dict[str, Any]) -> list[str]:
    """Name what must not be: a failure for a reason that is not expected, and a file without any test."""
    found = []
    for method, result in report.items():
        other = [why for why in result["failures"].values() if not why.startswith(EXPECTED)]
        empty = [file for file, count in result["counts"].items() if not sum(count.values())]
        found += [f"{method}: {len(other)} unexpected failures"] if other else []
        found += [f"{method}: no test of {file} was converted" for file in empty]
    return found


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Run PEFT's own tests on randbasis configs.")
    parser.add_argument("--method", choices=TARGETS, action="append", help="a method to test; default: all")
    parser.add_argument("--target", metavar="MODULE:CLASS", help="test this config class instead")
    parser.add_argument("--file", choices=FILES, action="append", help="a test file of PEFT; default: all")
    parser.add_argument("--quick", action="store_true", help="only one table row of test_custom_models")
    parser.add_argument("--workers", type=int, default=3, help="processes of pytest-xdist (default: 3)")
    parser.add_argument("--cache", type=Path, default=HERE.parents[1] / ".cache" / "conformance")
    return parser.parse_args()


def main() -> int:
    """Prepare, run each target, write the report, return the exit code."""
    arguments = parse_arguments()
    cache = arguments.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    folder, packages = prepare_tests(cache), prepare_packages(cache)
    wanted = FILES[:1] if arguments.quick else arguments.file or FILES
    files = [file for file in wanted if (folder / "tests" / f"{file}.py").exists()]
    print("".join(f"this version of PEFT has no {file}\n" for file in wanted if file not in files), end="")
    only = QUICK_ROW if arguments.quick else ""
    targets = {arguments.target: arguments.target} if arguments.target else TARGETS
    chosen = {name: targets[name] for name in (not arguments.target and arguments.method) or targets}
    report = {}
    for name, target in chosen.items():
        print(f"{name}: PEFT's tests on {target}", flush=True)
        report[name] = summary(run_pytest(target, folder, packages, files, arguments.workers, only), files)
    text = render(report)
    (cache / "report.json").write_text(json.dumps(report, indent=1))
    (cache / "report.txt").write_text(text + "\n")
    print(text)
    found = faults(report)
    print("\n".join(["", *found, f"report: {cache / 'report.txt'}"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
