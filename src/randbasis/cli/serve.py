"""``randbasis serve`` and ``randbasis keys``: a few lines over :mod:`randbasis.serve`."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from typer import Option

from randbasis.cli.console import answer, answer_table, reported
from randbasis.cli.parameters import AsJson, Device, Dtype, Threads
from randbasis.serve.settings import KEYS_FILE, READ, ServeSettings

Keys = Annotated[Path, Option("--keys", help="File of the keys.")]
KeyName = Annotated[str, Option(help="What the key is called, in the file and in the log.")]

commands = typer.Typer(rich_markup_mode="markdown")
keys = typer.Typer(
    name="keys",
    help="Say who may ask a server for which adapters, and how fast.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@commands.command(epilog="Example: randbasis serve --model ./llama --store adapters.db --port 8000")
def serve(
    model: Annotated[str, Option(help="Folder or hub name of the base.")],
    store: Annotated[str | None, Option(help="File of the store of adapters.")] = ServeSettings.store,
    name: Annotated[
        str | None, Option(help="What clients call the base; by default the last part of --model.")
    ] = ServeSettings.name,
    host: Annotated[str, Option(help="Address to listen on.")] = ServeSettings.host,
    port: Annotated[int, Option(help="Port to listen on; 0 takes a free one.")] = ServeSettings.port,
    keys: Annotated[str, Option(help="File of keys; where it is there, every request needs one.")] = ServeSettings.keys,
    adapter_folder: Annotated[
        str | None, Option(help="Folder below which an admin may load adapters from files.")
    ] = ServeSettings.adapter_folder,
    max_batch_tokens: Annotated[
        int, Option(help="Most tokens of one pass through the model.")
    ] = ServeSettings.max_batch_tokens,
    cache_tokens: Annotated[
        int | None,
        Option(
            help="Tokens of all running requests whose keys and values are kept; by default 16384 on a CPU, else what "
            "there is room for."
        ),
    ] = ServeSettings.cache_tokens,
    queue: Annotated[int, Option(help="Most answers that are waited for; more get 429.")] = ServeSettings.queue,
    row_bytes: Annotated[
        int, Option(help="Bytes that coefficients and heads of adapters in memory may take.")
    ] = ServeSettings.row_bytes,
    expanded_bytes: Annotated[
        int, Option(help="Bytes that factors of adapters in use may take.")
    ] = ServeSettings.expanded_bytes,
    max_body: Annotated[int, Option(help="Most bytes of a request.")] = ServeSettings.max_body,
    drain_seconds: Annotated[
        float, Option(help="How long running requests may take to end after SIGTERM.")
    ] = ServeSettings.drain_seconds,
    dtype: Dtype = ServeSettings.dtype,
    device: Device = ServeSettings.device,
    threads: Threads = ServeSettings.threads,
) -> None:
    """Answer many users' adapters of one base in one batch, over HTTP as OpenAI has it; see docs/serving.md."""
    settings = ServeSettings(**locals())
    with reported(False):
        from randbasis.optional import needing

        for package in ("fastapi", "uvicorn", "prometheus_client"):
            with needing("the server", package, "serve"):
                import_module(package)
        from randbasis.serve.server import run

        run(settings)


@keys.command(epilog="Example: randbasis keys add --name acme --adapters 'acme/*' --rate 10/s")
def add(
    name: KeyName,
    adapters: Annotated[
        list[str],
        Option(help="Pattern of the adapters that it may ask for, '*' for all; the base by its name. May be repeated."),
    ],
    rate: Annotated[str | None, Option(help="How fast it may ask: 10/s, 100/min, 1000/h.")] = None,
    role: Annotated[str, Option(help="read, or admin, which may load and unload adapters.")] = READ,
    file: Keys = Path(KEYS_FILE),
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown here, once, and is nowhere else: the file has its hash."""
    with reported(as_json):
        from randbasis.serve.keys import add_key

        key, secret = add_key(file, name, adapters, rate, role)
        answer({**key.as_json(), "key": secret, "file": str(file)}, as_json)


@keys.command("list", epilog="Example: randbasis keys list")
def list_(file: Keys = Path(KEYS_FILE), as_json: AsJson = False) -> None:
    """List the keys of a file, without their secrets."""
    with reported(as_json):
        from randbasis.serve.keys import read_keys

        found = [one.as_json() for one in read_keys(file)]
        table = Table("name", "adapters", "rate", "role")
        for one in found:
            table.add_row(one["name"], ", ".join(one["adapters"]), one["rate"] or "", one["role"])
        answer_table({"keys": found}, table, as_json)


@keys.command(epilog="Example: randbasis keys remove --name acme")
def remove(name: KeyName, file: Keys = Path(KEYS_FILE), as_json: AsJson = False) -> None:
    """Take a key out: a running server refuses it from the next request on."""
    with reported(as_json):
        from randbasis.serve.keys import remove_key

        answer({**remove_key(file, name).as_json(), "file": str(file)}, as_json)
