"""Plans and inspections as a person reads them: tables on the terminal, a picture in a file."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from randbasis.adapters.budget import TOKENS, WITHOUT, Configuration
from randbasis.adapters.inspection import Inspection, MatrixReport
from randbasis.adapters.plan import Plan, PlannedMatrix
from randbasis.cli.console import shown
from randbasis.files.whole_file import whole_file
from randbasis.optional import needing
from randbasis.tuner.base_shapes import generic_path

_Matrix = TypeVar("_Matrix", PlannedMatrix, MatrixReport)

FLOOR = 1e-12
"""Singular values below this share of the norm are rounding and would stretch the axis."""

CURVES = 8
"""Layers of one kind whose spectrum is drawn, spread over the depth."""


def plan_table(plan: Plan) -> Table:
    """One row for all layers of a kind, and LoRA of rank one beside it."""
    options = _options(plan.options)
    table = Table(
        title=f"{plan.method} on {plan.architecture} ({plan.base_parameters:,} parameters)",
        caption=options,
        min_width=60,
    )
    table.add_column("matrices")
    for name in ("number", "out × in", "coefficients", "LoRA r=1"):
        table.add_column(name, justify="right")
    for name, group in _kinds(plan.matrices).items():
        one = group[0]
        shape = f"{one.out_features} × {one.in_features}"
        count = sum(matrix.coefficients for matrix in group)
        table.add_row(
            name, str(len(group)), shape, f"{count:,}", f"{len(group) * (one.out_features + one.in_features):,}"
        )
    table.add_section()
    table.add_row("total", str(len(plan.matrices)), "", f"{plan.coefficients:,}", f"{plan.lora_rank_1:,}")
    table.add_row("file, 32 bits", "", "", f"{plan.bytes:,} bytes", "")
    table.add_row("file, 16 bits", "", "", f"{plan.bytes_16bit:,} bytes", "")
    if plan.bytes_packed is not None:
        table.add_row("packed, 16 bits", "", "", f"{plan.bytes_packed:,} bytes", "")
    if plan.expert_parameters:
        table.add_row("experts, not adapted", "", "", f"{plan.expert_parameters:,} weights", "")
    return table


def budget_table(found: Sequence[Configuration], budget: int, written: Path | None) -> Table:
    """One row a configuration, the recommended first; laws of one method and precision share a row's numbers."""
    caption = (
        f"bytes of the whole packed file at the precision of the row, {WITHOUT}; "
        f"cost: of a step of {TOKENS} tokens, above the adapted layers' own"
    )
    table = Table(title=f"{len(found)} configurations of at most {budget:,} bytes", caption=caption, min_width=60)
    for name in ("method", "law", "bits", "configuration"):
        table.add_column(name)
    for name in ("coefficients", "bytes", "training memory", "cost"):
        table.add_column(name, justify="right")
    for number, one in enumerate(found, 1):
        options = ", ".join(
            f"{key} {value}" if isinstance(value, str) else f"{key} {value:g}" for key, value in one.options.items()
        )
        table.add_row(
            f"{number}. {one.method}", one.law or "", str(one.bits), options, f"{one.coefficients:,}",
            f"{one.bytes[one.bits]:,}", f"{one.training_bytes / 1e6:,.1f} MB", f"+{100 * one.cost:.0f} %",
        )  # fmt: skip
    if written is not None:
        table.caption = (
            f"{caption}\nwritten: {written}; randbasis train --config {written} --task … --data … --output …"
        )
    return table


def inspection_table(inspection: Inspection) -> Table:
    """One row for each adapted matrix."""
    options = _options(inspection.hyperparameters)
    table = Table(title=f"{inspection.config.method}: {options}", caption=_totals(inspection), min_width=60)
    table.add_column("matrix")
    for name in ("out × in", "coefficients", "‖ΔW‖", "σ₁", "effective rank"):
        table.add_column(name, justify="right")
    for one in inspection.matrices:
        spectral, rank = one.spectral_norm, one.effective_rank
        table.add_row(
            _label(one.name, one.part),
            f"{one.out_features} × {one.in_features}",
            f"{one.coefficients:,}",
            f"{one.norm:.4g}",
            "not computed" if spectral is None else f"{spectral:.4g}",
            "not computed" if rank is None else f"{rank:.1f}",
        )
    return table


def plot_inspection(inspection: Inspection, path: str | Path, *, overwrite: bool = False) -> None:
    """Norm of ΔW over the layers, a line for each kind, and spectra over their index, as PNG.

    Args:
        inspection: what to draw.
        path: the file to write.
        overwrite: replace the file.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OutputExistsError: the file exists and ``overwrite`` is not given.
        SaveError: it could not be written.
    """
    with needing("the plot", "matplotlib", "train"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    norms, spectra = figure.subplots(1, 2)
    for color, (name, group) in enumerate(_kinds(inspection.matrices).items()):
        style = {"color": f"C{color}", "label": name}
        norms.plot(range(len(group)), [one.norm for one in group], "o-", markersize=3, **style)
        for one in _spread([one for one in group if one.singular_values]):
            values = [value for value in one.singular_values or () if value > FLOOR * one.norm]
            marker = "o-" if len(values) <= 32 else "-"
            spectra.plot(range(1, len(values) + 1), values, marker, markersize=3, alpha=0.6, **style)
            style.pop("label", None)
    norms.set(xlabel="layer", ylabel="Frobenius norm of ΔW", title="norm by layer")
    spectra.set(xlabel="index", ylabel="singular value of ΔW", title="spectrum", yscale="log")
    norms.legend(frameon=False, fontsize="small")
    figure.suptitle(f"{inspection.config.method}, seed {inspection.config.seed}: {_totals(inspection)}")
    with whole_file(path, overwrite=overwrite) as temporary:
        figure.savefig(temporary, dpi=120, format=Path(path).suffix.removeprefix(".") or None)


def _options(options: Mapping[str, Any]) -> str:
    """Those that have a value."""
    words = {name: value if isinstance(value, float) else shown(value) for name, value in options.items()}
    return ", ".join(f"{name} {words[name]}" for name, value in options.items() if value is not None)


def _kinds(matrices: Iterable[_Matrix]) -> dict[str, list[_Matrix]]:
    """Matrices of the same path but for the layer numbers, and of the same shape."""
    kinds: dict[tuple[str, int, int], list[_Matrix]] = {}
    for one in matrices:
        label = _label(generic_path(one.name), one.part)
        kinds.setdefault((label, one.out_features, one.in_features), []).append(one)
    labels = [label for label, *_ in kinds]
    return {
        label if labels.count(label) == 1 else f"{label} {out} × {in_}": group
        for (label, out, in_), group in kinds.items()
    }


def _spread(group: Sequence[MatrixReport]) -> list[MatrixReport]:
    step = max(1, -(-len(group) // CURVES))
    return list(group[::step])


def _label(name: str, part: str) -> str:
    return f"{name}[{part}]" if part else name


def _totals(inspection: Inspection) -> str:
    head = f", head of {inspection.head_parameters:,}" if inspection.head_parameters else ""
    return (
        f"{inspection.coefficients:,} coefficients in {len(inspection.matrices)} matrices{head}, "
        f"{inspection.bytes:,} bytes" + (f", trained for {inspection.task.get('task')}" if inspection.task else "")
    )
