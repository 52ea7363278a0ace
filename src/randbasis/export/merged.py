"""ADAPTER + BASE → MODEL: :func:`randbasis.adapters.merging.merge_adapter` for directories and packed files alike."""

from collections.abc import Sequence
from pathlib import Path

from randbasis.adapters.adapter_dir import read_adapter_dir
from randbasis.adapters.merging import Merged, merge_adapter
from randbasis.errors import ExportBaseError
from randbasis.export.source import adapter_directory
from randbasis.files.locations import Location
from randbasis.files.output_set import check_output


def export_merged(
    source: Location,
    output: str | Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    labels: Sequence[str] | None = None,
) -> Merged:
    """Add an adapter to the weights of its base and save a model that plain transformers loads.

    Args:
        source: adapter directory, or path or URL of a packed file.
        output: folder to write.
        base: folder or hub name of the base; None takes the one that the adapter names.
        dtype: ``"auto"`` (as the base is stored), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        overwrite: replace ``output`` when it exists.
        labels: names of the classes, when a classifier head was trained.

    Raises:
        ExportSourceError: there is no adapter.
        ExportBaseError: neither the caller nor the adapter names a base.
        RandbasisError: as :func:`randbasis.adapters.merging.merge_adapter`.
    """
    check_output(output, (source,), overwrite=overwrite, model=True)
    with adapter_directory(source) as path:
        model = base or read_adapter_dir(path).config.base_model_name_or_path
        if not model:
            raise ExportBaseError(
                f"base must be named to merge {str(source)!r}, which names none; give the folder or hub name of the "
                "model that the adapter was trained on"
            )
        return merge_adapter(model, path, output, dtype=dtype, overwrite=overwrite, labels=labels)
