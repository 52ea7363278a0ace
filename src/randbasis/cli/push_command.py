"""``randbasis push``: a few lines over :mod:`randbasis.hub`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from randbasis.cli.console import AsJson, Overwrite, answer, reported
from randbasis.cli.options import PUSH, check_options


def push(
    context: typer.Context,
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the hub, such as me/e2e-nola.")],
    base_name: Annotated[str | None, Option(help="Hub name of the base; by default the adapter's.")] = None,
    license: Annotated[str | None, Option(help="Of the adapter, as the hub names it, such as apache-2.0.")] = None,
    packed: Annotated[int | None, Option(help="Add a packed file of 32, 16, 8, 4, 3 or 2 bits a coefficient.")] = None,
    private: Annotated[bool | None, Option(help="Of a repository that is made.", show_default=False)] = None,
    revision: Annotated[str | None, Option(help="Branch; by default the main one.")] = None,
    message: Annotated[str | None, Option(help="Of the commit.")] = None,
    dry_run: Annotated[Path | None, Option(help="Folder to write instead of sending it; prints the card.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Send an adapter to the hub, with a model card that is filled in. The token is HF_TOKEN's or `hf auth login`'s."""
    with reported(as_json):
        from randbasis.hub import build_hub_folder, has_own_card, push_to_hub

        check_options(context, PUSH, own_card=lambda: has_own_card(adapter))
        given = {"base_name": base_name, "license": license}
        if dry_run is None:
            sent = push_to_hub(
                adapter, repo_id, **given, packed_bits=packed, private=private, revision=revision, message=message
            )
            answer(sent.as_json(), as_json)
            return
        built = build_hub_folder(adapter, dry_run, repo_id, **given, packed_bits=packed, overwrite=overwrite)
        answer(built.as_json() | ({"card": built.card} if as_json else {}), as_json)
        if not as_json:
            typer.echo(f"\n{built.card}")
