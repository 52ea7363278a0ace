"""ADAPTER + BASE → MODEL: :func:`randbasis.adapters.merging.merge_adapter` with the base that the adapter names."""

from collections.abc import Sequence
from pathlib import Path

from randbasis.adapters.merging import Merged, merge_adapter
from randbasis.adapters.saved import AdapterLocation, open_adapter, paths_of
from randbasis.defaults import MERGED_DTYPE
from randbasis.errors import ExportBaseError
from randbasis.files.output_checks import check_output_folder


def export_merged(
    source: AdapterLocation,
    output: str | Path,
    *,
    base: str | None = None,
    dtype: str = MERGED_DTYPE,
    overwrite: bool = False,
    labels: Sequence[str] | None = None,
) -> Merged:
    """Add an adapter to the weights of its base and save a model that plain transformers loads.

    Args:
        source: where the adapter is: see :func:`randbasis.adapters.saved.open_adapter`.
        output: folder to write.
        base: folder or hub name of the base; None takes the one that the adapter names.
        dtype: ``"auto"`` (as the base is stored), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        overwrite: replace ``output`` when it exists.
        labels: names of the classes, when a classifier head was trained; None takes those of the adapter's task.

    Raises:
        AdapterMissingError: there is no adapter.
        ExportBaseError: neither the caller nor the adapter names a base.
        RandbasisError: as :func:`randbasis.adapters.merging.merge_adapter`.
    """
    check_output_folder(output, paths_of(source), overwrite=overwrite, model=True)
    found = open_adapter(source).ours()
    model = base or found.config.base_model_name_or_path
    if not model:
        raise ExportBaseError(
            f"base must be named to merge {found.where!r}, which names none; give the folder or hub name of the "
            "model that the adapter was trained on"
        )
    return merge_adapter(model, found, output, dtype=dtype, overwrite=overwrite, labels=labels)
