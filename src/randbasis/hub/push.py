"""The folder that goes to a hub, and sending it."""

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from randbasis.adapters.packed import packed_of, write_adapter_dir
from randbasis.adapters.saved import AdapterLocation, SavedAdapter, open_adapter, open_folder, paths_of
from randbasis.errors import AdapterFilesError, HubError, HubNameError, RandbasisError
from randbasis.files.output_checks import check_output_folder
from randbasis.files.output_set import replaced_set
from randbasis.hub.card import CardFacts, model_card
from randbasis.train.run import SUMMARY_FILE
from randbasis.tuner.saved_files import CONFIG_FILE, TASK_FILE, WEIGHTS_FILE

CARD_FILE = "README.md"
PACKED_FILE = "packed.safetensors"
_EMPTY_CARD = "[More Information Needed]"
"""Stands in the form that PEFT writes and nobody has filled in."""
# httpx, or the fork of it that the installed hub client uses: connections that fail are of this class alone.
_CLIENT_ERROR = cast("type[Exception]", HfHubHTTPError.__bases__[0])


@dataclass(frozen=True)
class HubFolder:
    """What goes to a hub.

    Attributes:
        path: of the folder.
        files: name → bytes.
        card: text of the model card.
        own_card: whether the card is the one that lay beside the adapter, not one made from its files.
    """

    path: Path
    files: Mapping[str, int]
    card: str
    own_card: bool

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the card's text."""
        return {"folder": str(self.path), "files": dict(self.files), "own_card": self.own_card}


@dataclass(frozen=True)
class Pushed:
    """What a hub has now.

    Attributes:
        url: of the repository.
        commit: its newest commit.
        files: name → bytes of what was sent.
        own_card: as of :class:`HubFolder`.
    """

    url: str
    commit: str
    files: Mapping[str, int]
    own_card: bool

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"url": self.url, "commit": self.commit, "files": dict(self.files), "own_card": self.own_card}


def build_hub_folder(
    source: AdapterLocation,
    folder: str | Path,
    repo_id: str,
    *,
    base_name: str | None = None,
    license: str | None = None,
    packed_bits: int | None = None,
    overwrite: bool = False,
) -> HubFolder:
    """Write what goes to a hub into a folder: PEFT's two files, the task, a model card, and a packed file if asked.

    No path of this machine is in it. A ``README.md`` beside the adapter is taken as the card as it stands, unless it is
    PEFT's empty form.

    Args:
        source: where the adapter is: see :func:`randbasis.adapters.saved.open_adapter`. Of a packed one the folder is
            made as ``unpack`` does.
        folder: to write; made where there is none.
        repo_id: ``"me/e2e-nola"``, for the card.
        base_name: hub name of the base model; None takes the adapter's, which must not be a folder of this machine.
        license: of the adapter, for the card, as the hub names it; None leaves it out.
        packed_bits: 32, 16, 8, 4, 3 or 2: add a packed file of so many bits a coefficient.
        overwrite: replace the files of this package in a folder that holds something.

    Raises:
        AdapterFilesError: the directory is incomplete, damaged or foreign.
        HubNameError: a name is not one of a hub.
        PrecisionError: the coefficients do not fit the bits asked for.
        OutputExistsError: the folder is or lies in the source, or is not empty and ``overwrite`` is not given.
        SaveError: the folder could not be written.
    """
    folder = check_output_folder(folder, paths_of(source), overwrite=overwrite)
    _check_repo(repo_id, "repo_id")
    with _as_folder(source) as found:
        base = base_name or _hub_base(found)
        _check_repo(base, "base_name")
        files = _files(found, base, repo_id, license, packed_bits)
        own = files[CARD_FILE] == _own_card(found.weights.parent)
    with replaced_set(folder) as stage:
        for name, content in files.items():
            (stage / name).write_bytes(content)
    return HubFolder(folder, {name: len(content) for name, content in files.items()}, files[CARD_FILE].decode(), own)


def push_to_hub(
    source: AdapterLocation,
    repo_id: str,
    *,
    base_name: str | None = None,
    license: str | None = None,
    packed_bits: int | None = None,
    private: bool | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> Pushed:
    """Send an adapter to a hub, in a repository that is made where there is none.

    Args:
        source: where the adapter is: see :func:`randbasis.adapters.saved.open_adapter`. Of a packed one the folder is
            made as ``unpack`` does.
        repo_id: ``"me/e2e-nola"``.
        base_name: see :func:`build_hub_folder`.
        license: see :func:`build_hub_folder`.
        packed_bits: see :func:`build_hub_folder`.
        private: whether a repository that is made is private; None leaves it to the hub.
        token: of the hub; None takes ``HF_TOKEN`` or the one that ``hf auth login`` saved.
        endpoint: URL of the hub; None takes ``HF_ENDPOINT`` or huggingface.co.
        revision: branch; None takes the main one.
        message: of the commit.

    Raises:
        HubError: the hub refused, or could not be reached.
        RandbasisError: as :func:`build_hub_folder`; nothing was sent.
    """
    api = HfApi(endpoint=endpoint, token=token)
    found = open_adapter(source)
    with TemporaryDirectory() as temporary:
        built = build_hub_folder(
            found, Path(temporary) / "folder", repo_id, base_name=base_name, license=license, packed_bits=packed_bits
        )
        with _explained(repo_id):
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=built.path,
                revision=revision,
                commit_message=message or f"{found.method} adapter, by randbasis",
            )
    return Pushed(str(url), commit.oid, built.files, built.own_card)


@contextmanager
def _as_folder(source: AdapterLocation) -> Generator[SavedAdapter]:
    """The adapter in a folder, where it is packed in one of its own."""
    found = open_adapter(source).ours()
    if found.whole is None:
        yield found
        return
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        write_adapter_dir(found.whole, folder, where=found.where)
        yield open_folder(folder).ours()


def has_own_card(source: str | Path) -> bool:
    """Whether a model card lies beside an adapter, which is sent as it stands."""
    return _own_card(Path(source)) is not None


def _files(found: SavedAdapter, base: str, repo_id: str, license: str | None, bits: int | None) -> dict[str, bytes]:
    folder = found.weights.parent
    config = _with_base(folder / CONFIG_FILE, base_model_name_or_path=base)
    files = {CONFIG_FILE: config, WEIGHTS_FILE: found.weights.read_bytes()}
    task: dict[str, Any] = {}
    if (folder / TASK_FILE).is_file():
        task = found.task
        files[TASK_FILE] = _with_base(folder / TASK_FILE, base_model=base)
    packed = None
    if bits is not None:
        files[PACKED_FILE] = packed_of(found, bits=bits, base_name=base).to_bytes()
        packed = PACKED_FILE, bits, len(files[PACKED_FILE])
    metrics, rows = _scores(folder)
    facts = CardFacts(repo_id, base, license, len(files[WEIGHTS_FILE]), packed, task, metrics, rows)
    files[CARD_FILE] = _own_card(folder) or model_card(found, facts).encode()
    return files


def _with_base(path: Path, **names: str) -> bytes:
    """A JSON file with the hub name of the base in place of what it says."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return (json.dumps(document | names, indent=2, ensure_ascii=False) + "\n").encode()


def _scores(path: Path) -> tuple[dict[str, float], int | None]:
    """The metrics that training left beside an adapter, with the number of rows."""
    file = path / SUMMARY_FILE
    if not file.is_file():
        return {}, None
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        scores = cast("dict[str, float | None]", summary["after"])
        return {name: float(value) for name, value in scores.items() if value is not None}, int(summary["eval_rows"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterFilesError(
            f"{file} must be what `randbasis train` wrote, but {type(error).__name__}: {error}; remove or restore it"
        ) from error


def _own_card(path: Path) -> bytes | None:
    file = path / CARD_FILE
    if not file.is_file():
        return None
    card = file.read_bytes()
    return None if _EMPTY_CARD.encode() in card else card


def _hub_base(found: SavedAdapter) -> str:
    name = found.config.base_model_name_or_path
    if not name or Path(name).exists() or Path(name).is_absolute():
        raise HubNameError(
            f"the base model must be named as the hub names it, the adapter says {name!r}, which others cannot find; "
            "give base_name (--base-name ORGANISATION/MODEL)"
        )
    return name


def _check_repo(name: str, what: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HubNameError(f"{what} must be a name on the hub such as me/e2e-nola, got {name!r} ({error})") from error


@contextmanager
def _explained(repo_id: str) -> Generator[None]:
    try:
        yield
    except RandbasisError:
        raise
    except (OSError, _CLIENT_ERROR) as error:
        if isinstance(error, OSError) and error.filename is not None:  # a file of this machine, not the hub
            raise
        raise HubError(
            f"{repo_id} could not be sent to the hub ({error}); check the name, the token (HF_TOKEN, or "
            "`hf auth login`) and the network; nothing here was changed"
        ) from error
