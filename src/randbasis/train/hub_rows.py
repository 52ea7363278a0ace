"""Rows of a data set in the form of the library datasets: on a hub, or in a folder here."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from randbasis.adapters.hub_reach import why_unreachable
from randbasis.errors import DataFormatError, DataMissingError, RemoteError, near
from randbasis.optional import needing
from randbasis.train.tabular import Row, Table

HUB = "hub:"
"""What the name of such a data set begins with."""
PATIENCE = 10.0
"""Seconds until a hub that does not answer counts as unreachable; the library would ask six times, in 23 seconds."""
# httpx, or the fork of it that the installed hub client uses: connections that fail are of this class alone.
_CLIENT_ERROR = cast("type[Exception]", HfHubHTTPError.__bases__[0])


def read_hub_rows(name: str) -> Table:
    """The rows of ``hub:OWNER/NAME``, ``hub:OWNER/NAME/CONFIGURATION`` or ``hub:FOLDER``, each with ``:SPLIT`` behind.

    The number of a class becomes its name where the data set has names.

    Raises:
        MissingPackageError: the library datasets is not installed.
        DataMissingError: there is no such data set, configuration or split, or the split is not named and not the only.
        RemoteError: the hub could not be reached.
        DataFormatError: the library cannot read it.
    """
    with needing("a data set of a hub", "datasets", "data"):
        import datasets
    where, configuration, split = _parts(name)
    if not Path(where).is_dir() and not constants.HF_HUB_OFFLINE:
        _look(where, name)
    library = cast(Any, datasets)
    with _quiet(library), _explained(name, library):
        splits: list[str] = library.get_dataset_split_names(where, configuration)
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            said = "names no split" if split is None else f"has no split {split!r}"
            bare = name.removesuffix(f":{split}")
            raise DataMissingError(f"{name} {said}; give one as {bare}:SPLIT; {near(split or '', splits)}")
        data = library.load_dataset(where, configuration, split=split)
    return Table(tuple(data.column_names), _named(data), name)


def _parts(name: str) -> tuple[str, str | None, str | None]:
    """Where, which configuration and which split."""
    rest, _, split = name.removeprefix(HUB).partition(":")
    pieces = rest.split("/")
    if Path(rest).is_dir() or len(pieces) < 3:
        return rest, None, split or None
    if len(pieces) > 3:
        raise DataMissingError(
            f"data {name!r} is neither a folder here nor OWNER/NAME or OWNER/NAME/CONFIGURATION of a hub"
        )
    return "/".join(pieces[:2]), pieces[2], split or None


def _look(where: str, name: str) -> None:
    """Ask the hub whether it has that data set."""
    if reason := why_unreachable():
        raise RemoteError(f"{name}: {reason}; with HF_HUB_OFFLINE=1 what was fetched before is used")
    try:
        HfApi().dataset_info(where, timeout=PATIENCE)
    except RepositoryNotFoundError as error:
        raise DataMissingError(
            f"the hub has no data set {where!r}, or not for you; mend the name, or log in (hf auth login)"
        ) from error
    except (OSError, _CLIENT_ERROR) as error:
        told = " ".join(str(error).split())
        raise RemoteError(
            f"{name}: the hub could not be reached ({told}); with HF_HUB_OFFLINE=1 what was fetched before is used"
        ) from error


@contextmanager
def _explained(name: str, library: Any) -> Generator[None]:
    """What the library raises as one line of ours."""
    try:
        yield
    except DataMissingError:
        raise
    except (OSError, ValueError, RuntimeError, library.exceptions.DatasetsError) as error:
        told = " ".join(str(error).split())[:400]
        kind = DataMissingError if isinstance(error, OSError) else DataFormatError
        raise kind(f"{name} cannot be read: {told}") from error


@contextmanager
def _quiet(library: Any) -> Generator[None]:
    """Without the library's bars; ours tell of the run."""
    shown = not library.are_progress_bars_disabled()
    library.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bars()


def _named(data: Any) -> list[Row]:
    names = {column: feature.names for column, feature in data.features.items() if hasattr(feature, "int2str")}
    rows = cast("list[Row]", data.to_list())
    for row in rows:
        for column, known in names.items():
            value: Any = row[column]
            if isinstance(value, int):
                row[column] = known[value] if value >= 0 else None  # how data sets hide the labels of a test
    return rows
