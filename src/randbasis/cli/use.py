"""``randbasis evaluate``, ``predict`` and ``generate``: a few lines over :mod:`randbasis.use`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from randbasis.cli.console import answer, reported
from randbasis.cli.options import EVALUATE, GENERATE, PREDICT, check_options
from randbasis.cli.parameters import (
    Adapter,
    AsJson,
    Base,
    Batch,
    Beams,
    Device,
    Dtype,
    Kind,
    LabelColumn,
    LengthPenalty,
    Limit,
    MessagesColumn,
    NewTokens,
    Overwrite,
    PairColumn,
    PromptColumn,
    Rows,
    Split,
    TargetColumn,
    TextColumn,
    Threads,
    of_texts,
)
from randbasis.files.output_checks import check_output_file
from randbasis.progress import tracking
from randbasis.train.settings import GenerationSettings
from randbasis.use.settings import UseSettings, use_from_words

Answers = Annotated[
    Path | None, Option(help="File to write, .jsonl, .json, .csv or .tsv; by default JSON lines on the output stream.")
]

commands = typer.Typer(rich_markup_mode="markdown")


@commands.command(epilog="Example: randbasis evaluate --adapter runs/sst2 --data dev.tsv.gz")
def evaluate(
    context: typer.Context,
    adapter: Adapter = None,
    data: Rows = None,
    model: Base = None,
    kind: Kind = None,
    split: Split = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    prompt_column: PromptColumn = None,
    target_column: TargetColumn = None,
    messages_column: MessagesColumn = None,
    label_column: LabelColumn = None,
    texts: Annotated[
        bool | None, Option(help="Generate texts for BLEU and chrF; by default if there are prompts.")
    ] = None,
    max_new_tokens: NewTokens = None,
    beams: Beams = GenerationSettings.beams,
    length_penalty: LengthPenalty = GenerationSettings.length_penalty,
    limit: Limit = None,
    batch_size: Batch = UseSettings.batch_size,
    dtype: Dtype = UseSettings.dtype,
    device: Device = UseSettings.device,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Score an adapter: loss, accuracy, Matthews, Pearson and Spearman; BLEU and chrF with several references."""
    given = dict(locals())
    with reported(as_json):
        from randbasis.use.evaluation import evaluate as run

        settings = use_from_words(given).opened()
        check_options(context, EVALUATE, **settings.facts())
        answer(run(settings, texts=texts, track=tracking("batches")), as_json)


@commands.command(epilog="Example: randbasis predict --adapter runs/sst2 --data reviews.csv --output answers.jsonl")
def predict(
    context: typer.Context,
    adapter: Adapter = None,
    data: Rows = None,
    model: Base = None,
    output: Answers = None,
    kind: Kind = None,
    split: Split = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    prompt_column: PromptColumn = None,
    messages_column: MessagesColumn = None,
    max_new_tokens: NewTokens = None,
    beams: Beams = GenerationSettings.beams,
    length_penalty: LengthPenalty = GenerationSettings.length_penalty,
    limit: Limit = None,
    batch_size: Batch = UseSettings.batch_size,
    probabilities: Annotated[bool, Option("--probabilities", help="Those of every class.")] = False,
    overwrite: Overwrite = False,
    dtype: Dtype = UseSettings.dtype,
    device: Device = UseSettings.device,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Answer every row of a file: a class with its probability, a number, or a text."""
    given = dict(locals())
    with reported(as_json):
        from randbasis.use.evaluation import predict as run

        settings = use_from_words(given)
        check_answers(output, settings, overwrite=overwrite)
        settings = settings.opened()
        check_options(context, PREDICT, **settings.facts())
        answer_rows(run(settings, track=tracking("batches")), output, as_json, overwrite=overwrite)


@commands.command(epilog="Example: randbasis generate --adapter runs/e2e --prompt 'name[Alimentum], area[city centre]'")
def generate(
    context: typer.Context,
    adapter: Adapter = None,
    prompt: Annotated[
        list[str] | None,
        Option(help="A prompt, or the first message of a conversation; may be given several times."),
    ] = None,
    messages: Annotated[
        list[str] | None, Option(help='A conversation, as JSON: [{"role": "user", "content": ...}, ...].')
    ] = None,
    data: Rows = None,
    model: Base = None,
    output: Answers = None,
    kind: Kind = None,
    prompt_column: PromptColumn = None,
    messages_column: MessagesColumn = None,
    max_new_tokens: NewTokens = None,
    beams: Beams = GenerationSettings.beams,
    length_penalty: LengthPenalty = GenerationSettings.length_penalty,
    sample: Annotated[bool, of_texts(help="Draw from the distribution.")] = False,
    temperature: Annotated[float, of_texts(help="Of the distribution.")] = GenerationSettings.temperature,
    top_k: Annotated[int, of_texts(help="Draw among that many tokens; 0 for all.")] = GenerationSettings.top_k,
    top_p: Annotated[
        float, of_texts(help="Draw among the fewest tokens of that probability.")
    ] = GenerationSettings.top_p,
    repetition_penalty: Annotated[
        float, of_texts(help="Above 1 makes used tokens less probable.")
    ] = GenerationSettings.repetition_penalty,
    seed: Annotated[int, of_texts(help="Seed of the sampling.")] = GenerationSettings.seed,
    limit: Limit = None,
    batch_size: Batch = UseSettings.batch_size,
    overwrite: Overwrite = False,
    dtype: Dtype = UseSettings.dtype,
    device: Device = UseSettings.device,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Write texts from prompts: greedy, beam search or sampling."""
    given = dict(locals())
    with reported(as_json):
        from randbasis.train.chat import conversation
        from randbasis.use.evaluation import generate as run

        check_options(context, GENERATE)
        asked = [conversation(one) for one in messages or []]
        settings = use_from_words(given)
        check_answers(output, settings, overwrite=overwrite)
        rows = run(settings, prompt or [], messages=asked, track=tracking("batches"))
        answer_rows(rows, output, as_json, overwrite=overwrite)


def check_answers(output: Path | None, settings: UseSettings, *, overwrite: bool) -> None:
    """Refuse a file that cannot be written before anything is read."""
    if output is not None:
        from randbasis.use.answer_files import form_of

        check_output_file(output, settings.sources(), overwrite=overwrite)
        form_of(output)


def answer_rows(rows: list[dict[str, Any]], output: Path | None, as_json: bool, *, overwrite: bool) -> None:
    """Many results: into a file of the form that its name says, or as JSON lines onto the output stream."""
    from randbasis.use.answer_files import json_line, write_rows

    if output is not None:
        write_rows(rows, output, overwrite=overwrite)
        answer({"output": str(output), "rows": len(rows)}, as_json)
    elif as_json:
        typer.echo(json_line({"rows": rows}))
    else:
        for row in rows:
            typer.echo(json_line(row))
