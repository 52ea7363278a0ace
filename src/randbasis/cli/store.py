"""``randbasis store``: one function a subcommand, each a few lines over :class:`randbasis.store.AdapterStore`."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from typer import Argument, Option

from randbasis.cli.console import answer, answer_table, reported
from randbasis.cli.options import STORE_ADD, STORE_GET, check_options
from randbasis.cli.parameters import AsJson, Overwrite
from randbasis.defaults import PAGE, STORE_TIMEOUT
from randbasis.errors import OptionError
from randbasis.files.output_checks import check_output_file
from randbasis.files.whole_file import write
from randbasis.methods import check_method
from randbasis.progress import passing_bar

if TYPE_CHECKING:
    from randbasis.store import AdapterStore, Record

commands = typer.Typer(
    name="store",
    help="Keep adapters in one file: by name, version, tag, base and method.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Store = Annotated[str, Argument(help="File of the store.")]
Name = Annotated[str, Argument(help="Name of the adapter.")]
Timeout = Annotated[float, Option(help="Seconds to wait for another writer.")]
Tag = Annotated[str | None, Option(help="Only those with this tag.")]
Base = Annotated[str | None, Option(help="Only those for this base, by its fingerprint.")]
Method = Annotated[str | None, Option(help="Only nola, vera, randlora, pranc or loraxs.")]


@commands.command(epilog="Example: randbasis store add adapters.db runs/*.safetensors --tag support")
def add(
    context: typer.Context,
    store: Store,
    files: Annotated[list[str], Argument(help="Packed files, as `randbasis pack` writes them, or their URLs.")],
    name: Annotated[str | None, Option(help="Name of one adapter; by default the file's, without its suffix.")] = None,
    tag: Annotated[list[str] | None, Option(help="Word to find them by; may be given several times.")] = None,
    timeout: Timeout = STORE_TIMEOUT,
    as_json: AsJson = False,
) -> None:
    """Put packed files in, all or none; under a name that is there, as its next version."""
    with reported(as_json):
        from randbasis.store import NewAdapter

        check_options(context, STORE_ADD)
        batch = [NewAdapter(name or PurePath(file).stem, file, tuple(tag or ())) for file in files]
        with _opened(store, timeout, create=True) as opened:
            _answer_records(opened.add_many(batch), as_json)


@commands.command(epilog="Example: randbasis store get adapters.db team/user-1 --output user-1.safetensors")
def get(
    context: typer.Context,
    store: Store,
    name: Annotated[str | None, Argument(help="Name of the adapter.")] = None,
    version: Annotated[int | None, Option(help="Of the adapter; by default the newest.")] = None,
    digest: Annotated[str | None, Option(help="SHA-256 of the content, instead of a name.")] = None,
    output: Annotated[
        str | None, Option(help="Packed file to write, or its URL; without it, only tell what there is.")
    ] = None,
    overwrite: Overwrite = False,
    timeout: Timeout = STORE_TIMEOUT,
    as_json: AsJson = False,
) -> None:
    """Check the hash of an adapter, and write it as a packed file."""
    with reported(as_json):
        check_options(context, STORE_GET)
        if output is not None:
            check_output_file(output, (store,), overwrite=overwrite)
        with _opened(store, timeout) as opened:
            found = opened.get(name, version=version, digest=digest)
        if output is not None:
            write(output, found.data, overwrite=overwrite)
        answer({**found.record.as_json(), "output": output}, as_json)


@commands.command("list", epilog="Example: randbasis store list adapters.db --tag support --limit 1000 --json")
def list_(
    store: Store,
    tag: Tag = None,
    base: Base = None,
    method: Method = None,
    after: Annotated[str, Option(help="Begin after this name: `next` of the page before.")] = "",
    limit: Annotated[int, Option(help="Most adapters of the page.")] = PAGE,
    timeout: Timeout = STORE_TIMEOUT,
    as_json: AsJson = False,
) -> None:
    """List the newest version of every adapter, a page at a time, by name."""
    with reported(as_json):
        if method is not None:
            check_method(method)
        with _opened(store, timeout) as opened:
            page = opened.list(tag=tag, base=base, method=method, after=after, limit=limit)
        caption = None if page.next is None else f"there are more: --after {page.next}"
        answer_table(page.as_json(), _table(page.records, caption), as_json)


@commands.command(epilog="Example: randbasis store history adapters.db team/user-1")
def history(
    store: Store,
    name: Name,
    before: Annotated[int | None, Option(help="Only versions below this one.")] = None,
    limit: Annotated[int, Option(help="Most versions.")] = PAGE,
    timeout: Timeout = STORE_TIMEOUT,
    as_json: AsJson = False,
) -> None:
    """List the versions of an adapter, newest first."""
    with reported(as_json), _opened(store, timeout) as opened:
        _answer_records(opened.history(name, before=before, limit=limit), as_json)


@commands.command(epilog="Example: randbasis store rollback adapters.db team/user-1 --to 3")
def rollback(
    store: Store,
    name: Name,
    to: Annotated[int | None, Option(help="Version; by default the one before the newest.")] = None,
    timeout: Timeout = STORE_TIMEOUT,
    as_json: AsJson = False,
) -> None:
    """Make an old version of an adapter the newest: a new version that is equal to it."""
    with reported(as_json), _opened(store, timeout) as opened:
        answer(opened.rollback(name, to).as_json(), as_json)


@commands.command(epilog="Example: randbasis store tag adapters.db team/user-1 --add support --remove trial")
def tag(
    store: Store,
    name: Name,
    add: Annotated[list[str] | None, Option(help="Tag to give it; may be given several times.")] = None,
    remove: Annotated[list[str] | None, Option(help="Tag to take from it; may be given several times.")] = None,
    version: Annotated[int | None, Option(help="Version; by default the newest.")] = None,
    timeout: Timeout = STORE_TIMEOUT,
    as_json: AsJson = False,
) -> None:
    """Give a version of an adapter tags to find it by, or take them from it."""
    with reported(as_json):
        if not add and not remove:
            raise OptionError("store tag needs --add or --remove, got neither; `store history` tells the tags")
        with _opened(store, timeout) as opened:
            answer(opened.tag(name, add=add or (), remove=remove or (), version=version).as_json(), as_json)


@commands.command(epilog="Example: randbasis store remove adapters.db team/user-1 --version 2")
def remove(
    store: Store,
    name: Name,
    version: Annotated[int | None, Option(help="Only this version; by default all.")] = None,
    timeout: Timeout = STORE_TIMEOUT,
    as_json: AsJson = False,
) -> None:
    """Take out an adapter with all its versions, or one version."""
    with reported(as_json), _opened(store, timeout) as opened:
        answer(opened.remove(name, version).as_json(), as_json)


@commands.command(epilog="Example: randbasis store gc adapters.db --keep 3")
def gc(
    store: Store,
    keep: Annotated[int, Option(help="Versions of every adapter to keep.")],
    timeout: Timeout = STORE_TIMEOUT,
    as_json: AsJson = False,
) -> None:
    """Remove all but the newest versions of every adapter, and make the file smaller."""
    with reported(as_json):
        with _opened(store, timeout) as opened, _shown("pages") as progress:
            freed = opened.gc(keep, progress)
        answer({**freed.as_json(), "file_bytes": opened.path.stat().st_size}, as_json)


@commands.command(epilog="Example: randbasis store verify adapters.db")
def verify(store: Store, timeout: Timeout = STORE_TIMEOUT, as_json: AsJson = False) -> None:
    """Hash everything again; exits with 1 where something is not as it was put in."""
    with reported(as_json):
        with _opened(store, timeout) as opened, _shown("contents") as progress:
            checked = opened.verify(progress)
        answer(checked.as_json(), as_json)
    if not checked.sound:
        raise typer.Exit(1)


@commands.command(epilog="Example: randbasis store export adapters.db backup --tag support")
def export(
    store: Store,
    output: Annotated[str, Argument(help="Folder, or file with --one-file; or a URL: s3://, ….")],
    one_file: Annotated[bool, Option("--one-file", help="Write one file, which is a store itself.")] = False,
    tag: Tag = None,
    base: Base = None,
    method: Method = None,
    newest: Annotated[bool, Option("--newest", help="Only the newest version of each adapter.")] = False,
    timeout: Timeout = STORE_TIMEOUT,
    as_json: AsJson = False,
) -> None:
    """Write adapters as a folder of packed files with a manifest; a cut-off export goes on."""
    with reported(as_json):
        if method is not None:
            check_method(method)
        with _opened(store, timeout) as opened, _shown("versions") as progress:
            done = opened.export(
                output, one_file=one_file, tag=tag, base=base, method=method, newest=newest, progress=progress
            )
        answer({**done.as_json(), "output": output}, as_json)


@commands.command("import", epilog="Example: randbasis store import adapters.db backup --prefix old/")
def import_(
    store: Store,
    source: Annotated[str, Argument(help="Folder or file that was exported, or another store; or its URL.")],
    prefix: Annotated[str, Option(help="To put before every name.")] = "",
    timeout: Timeout = STORE_TIMEOUT,
    as_json: AsJson = False,
) -> None:
    """Take in an export: names, versions, times and tags as they were; a cut-off import goes on."""
    with reported(as_json), _opened(store, timeout, create=True) as opened, _shown("versions") as progress:
        answer(opened.import_from(source, prefix=prefix, progress=progress).as_json(), as_json)


@contextmanager
def _opened(path: str, timeout: float, *, create: bool = False) -> "Generator[AdapterStore]":
    from randbasis.store import AdapterStore

    with AdapterStore(path, create=create, timeout=timeout) as store:
        yield store


@contextmanager
def _shown(what: str) -> Generator[Callable[[int, int], None]]:
    """A bar on the error stream, where that is a terminal."""
    with passing_bar() as bar:
        task = bar.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update


def _answer_records(records: "Iterable[Record]", as_json: bool) -> None:
    answer_table({"adapters": [one.as_json() for one in records]}, _table(records), as_json)


def _table(records: "Iterable[Record]", caption: str | None = None) -> Table:
    table = Table(caption=caption)
    for column in ("name", "version", "method", "bytes", "created", "tags", "digest"):
        table.add_column(column, justify="right" if column in ("version", "bytes") else "left")
    for one in records:
        created = f"{one.created_at:%Y-%m-%d %H:%M:%S}"
        row = (one.name, str(one.version), one.method, f"{one.bytes:,}", created, ", ".join(one.tags), one.digest[:12])
        table.add_row(*row)
    return table
