"""The command: a subcommand is a few lines over the library. Exit codes: :mod:`randbasis.cli.console`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import track
from typer import Option

from randbasis.cli.compare import average, diff
from randbasis.cli.console import AsJson, Overwrite, answer, answer_table, reported
from randbasis.cli.export_command import export
from randbasis.cli.import_command import import_
from randbasis.cli.options import EVALUATE, GENERATE, INSPECT, PACK, PLAN, PREDICT, TRAIN, check_options
from randbasis.cli.push_command import push
from randbasis.cli.quantize_command import quantize
from randbasis.cli.store_command import store

app = typer.Typer(
    name="randbasis",
    help="Fine-tunes in kilobytes: an adapter is a seed and a few thousand coefficients.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # rich markup would drop the brackets of c_attn[q,v]
    add_completion=False,
    pretty_exceptions_enable=False,
)
of_data = partial(Option, rich_help_panel="Data")
of_adapter = partial(Option, rich_help_panel="Adapter")
of_loop = partial(Option, rich_help_panel="Optimisation")
of_task = partial(Option, rich_help_panel="Task")
of_texts = partial(Option, rich_help_panel="Texts")

Adapter = Annotated[
    str | None,
    Option(
        help="Folder of a training run; or any adapter of a language model: "
        "folder, packed file, URL, store:NAME@VERSION."
    ),
]
Base = Annotated[str | None, Option(help="Folder or hub name of the base; by default the one the adapter names.")]
Rows = Annotated[str | None, of_data(help="csv, tsv, jsonl, json or txt, also .gz; or a folder or zip of images.")]
Kind = Annotated[str | None, of_data("--format", help="csv, tsv, jsonl, json, txt; when the name does not tell.")]
Split = Annotated[str | None, of_data(help="Split of an archive of images, such as test.")]
Limit = Annotated[int | None, of_data(help="Use that many rows.")]
Batch = Annotated[int, Option(help="Rows at a time.")]
Dtype = Annotated[str, Option(help="Of the base: float32, bfloat16, float16.")]
Device = Annotated[str, Option(help="auto or cpu.")]
Threads = Annotated[int | None, Option(help="Threads of torch.")]
TextColumn = Annotated[str | None, of_data(help="Column of the text, by name, or by index from 0 without a header.")]
PairColumn = Annotated[str | None, of_data(help="Column of a second text.")]
PromptColumn = Annotated[str | None, of_data(help="Column of what the language model is given.")]
TargetColumn = Annotated[str | None, of_data(help="Column of what it has to write.")]
LabelColumn = Annotated[str | None, of_data(help="Column of the class or number.")]
NewTokens = Annotated[int | None, of_texts(help="Longest answer; by default the longest of training.")]
Beams = Annotated[int, of_texts(help="Beams of a beam search; 1 is greedy.")]
LengthPenalty = Annotated[float, of_texts(help="Exponent of the length in a beam's score.")]


@app.callback()
def randbasis() -> None:
    """Fine-tunes in kilobytes: an adapter is a seed and a few thousand coefficients."""


@app.command(
    epilog="Example: randbasis train --task sequence-classification --model MODEL --data train.tsv --eval-data dev.tsv "
    "--text-column sentence --label-column label --method nola --rank 4 --basis 64 --seed 1 --output runs/sst2"
)
def train(
    context: typer.Context,
    task: Annotated[str, Option(help="causal-lm, sequence-classification or image-classification.")],
    model: Annotated[str, Option(help="Folder or hub name of the base.")],
    data: Annotated[str, Option(help="csv, tsv, jsonl, json or txt, also .gz; or a folder or zip of images.")],
    output: Annotated[Path, Option(help="Folder for adapter, task, summary and plot.")],
    eval_data: Annotated[str | None, of_data(help="Held-out rows; by default a share of the data.")] = None,
    eval_fraction: Annotated[float, of_data(help="Share to hold out without --eval-data.")] = 0.1,
    kind: Kind = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    prompt_column: PromptColumn = None,
    target_column: TargetColumn = None,
    label_column: LabelColumn = None,
    label_kind: Annotated[str, of_data(help="auto, class or number (a regression).")] = "auto",
    limit: Annotated[int | None, of_data(help="Train on that many rows.")] = None,
    shots: Annotated[int | None, of_data(help="Train on that many rows of each class.")] = None,
    eval_limit: Annotated[int | None, of_data(help="Evaluate on that many rows.")] = None,
    method: Annotated[str, Option(help="nola, vera, randlora, pranc; or lora, none (a head alone).")] = "nola",
    rank: Annotated[int | None, of_adapter(help="Rank (nola, vera, randlora, lora).")] = None,
    basis: Annotated[int | None, of_adapter(help="Basis matrices (nola, pranc).")] = None,
    basis_b: Annotated[
        int | None, of_adapter(help="Basis matrices of B, where another number than of A (nola).")
    ] = None,
    alpha: Annotated[float | None, of_adapter(help="Scale (nola, randlora, lora).")] = None,
    seed: Annotated[int, of_adapter(help="Seed of the basis.")] = 0,
    law: Annotated[str | None, of_adapter(help="Law of the basis: sign, uniform, normal, sparse(S).")] = None,
    parametrization: Annotated[str | None, of_adapter(help="offset or plain (nola).")] = None,
    unique_basis: Annotated[bool, of_adapter(help="A basis of its own for each layer (nola).")] = False,
    targets: Annotated[str, Option(help="all-linear, or NAME,NAME, slices too: c_attn[q,v].")] = "all-linear",
    dropout: Annotated[float, of_adapter(help="Dropout on the input of the adapter.")] = 0.0,
    quantize_coefficients: Annotated[int | None, of_adapter(help="Train at 8, 4, 3 or 2 bits a coefficient.")] = None,
    batch_size: Annotated[int, of_loop(help="Rows a step.")] = 16,
    eval_batch_size: Annotated[int | None, of_loop(help="Rows at a time when evaluating.")] = None,
    epochs: Annotated[float, of_loop(help="Passes over the rows.")] = 3.0,
    max_steps: Annotated[int | None, of_loop(help="Steps, instead of epochs.")] = None,
    learning_rate: Annotated[float, of_loop(help="Of the adapter.")] = 1e-2,
    head_learning_rate: Annotated[float | None, of_loop(help="Of the head; by default as the adapter.")] = None,
    warmup: Annotated[float, of_loop(help="Share of the steps in which the learning rate rises.")] = 0.06,
    schedule: Annotated[str, of_loop(help="linear, cosine, constant, ...: how it falls.")] = "linear",
    weight_decay: Annotated[float, of_loop(help="Of the adapter and the head's matrices.")] = 0.0,
    max_grad_norm: Annotated[float, of_loop(help="Gradients are clipped to this norm.")] = 1.0,
    accumulate: Annotated[int, of_loop(help="Batches a step.")] = 1,
    label_smoothing: Annotated[float, of_loop(help="Of the classes.")] = 0.0,
    train_seed: Annotated[int, of_loop(help="Head, order, dropout and held-out rows.")] = 0,
    metric: Annotated[str | None, of_loop(help="accuracy, matthews, pearson, spearman, loss, bleu, ...")] = None,
    eval_every: Annotated[int | None, of_loop(help="Steps between evaluations.")] = None,
    early_stop: Annotated[int | None, of_loop(help="Stop after that many evaluations without a better metric.")] = None,
    keep: Annotated[str, of_loop(help="Save the best or the last parameters.")] = "best",
    max_length: Annotated[int | None, of_task(help="Tokens a row.")] = None,
    pooling: Annotated[str, of_task(help="Of a text encoder: auto, mean, cls, or the model's own head.")] = "auto",
    separator: Annotated[str, of_task(help="Between prompt and target.")] = " => ",
    end_token: Annotated[str | None, of_task(help="Token that ends a text; by default the tokenizer's.")] = None,
    image_size: Annotated[int | None, of_task(help="Side of the images in pixels.")] = None,
    flip: Annotated[bool, of_task(help="Mirror half of the training images.")] = False,
    overwrite: Overwrite = False,
    resume: Annotated[bool, Option(help="Go on from the last checkpoint in the output.")] = False,
    keep_checkpoints: Annotated[bool, Option(help="Leave the checkpoints in the output.")] = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
    threads: Threads = None,
    quiet: Annotated[bool, Option(help="No progress.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a base model on a file of rows."""
    given = dict(locals())
    with reported(as_json):
        from randbasis.train.adapter import method_words
        from randbasis.train.run import train as run
        from randbasis.train.settings import settings_from_words

        outcome = run(
            settings_from_words(given),
            console=None if quiet else Console(stderr=True),
            check=lambda: check_options(context, TRAIN, methods=method_words()),
        )
        if outcome.first:
            answer({"output": str(output), **outcome.summary}, as_json)


@app.command(epilog="Example: randbasis evaluate --adapter runs/sst2 --data dev.tsv.gz")
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
    label_column: LabelColumn = None,
    texts: Annotated[
        bool | None, Option(help="Generate texts for BLEU and chrF; by default if there are prompts.")
    ] = None,
    max_new_tokens: NewTokens = None,
    beams: Beams = 1,
    length_penalty: LengthPenalty = 1.0,
    limit: Limit = None,
    batch_size: Batch = 32,
    dtype: Dtype = "float32",
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Score an adapter: loss, accuracy, Matthews, Pearson and Spearman; BLEU and chrF with several references."""
    given = dict(locals())
    with reported(as_json):
        from randbasis.use.evaluation import evaluate as run
        from randbasis.use.evaluation import use_from_words

        settings = use_from_words(given)
        check_options(context, EVALUATE, **settings.facts())
        answer(run(settings, texts=texts), as_json)


@app.command(epilog="Example: randbasis predict --adapter runs/sst2 --data reviews.csv --output answers.jsonl")
def predict(
    context: typer.Context,
    adapter: Adapter = None,
    data: Rows = None,
    model: Base = None,
    output: Annotated[Path | None, Option(help="File of JSON lines; by default the output stream.")] = None,
    kind: Kind = None,
    split: Split = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    prompt_column: PromptColumn = None,
    max_new_tokens: NewTokens = None,
    beams: Beams = 1,
    length_penalty: LengthPenalty = 1.0,
    limit: Limit = None,
    batch_size: Batch = 32,
    overwrite: Overwrite = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Answer every row of a file: a class with its probability, a number, or a text."""
    given = dict(locals())
    with reported(as_json):
        from randbasis.use.evaluation import predict as run
        from randbasis.use.evaluation import refuse_existing, use_from_words

        refuse_existing(output, (data, adapter, model), overwrite=overwrite)
        settings = use_from_words(given)
        check_options(context, PREDICT, **settings.facts())
        answer_rows(run(settings), output, as_json, overwrite=overwrite)


@app.command(epilog="Example: randbasis generate --adapter runs/e2e --prompt 'name[Alimentum], area[city centre]'")
def generate(
    context: typer.Context,
    adapter: Adapter = None,
    prompt: Annotated[list[str] | None, Option(help="A prompt; may be given several times.")] = None,
    data: Rows = None,
    model: Base = None,
    output: Annotated[Path | None, Option(help="File of JSON lines; by default the output stream.")] = None,
    kind: Kind = None,
    prompt_column: PromptColumn = None,
    max_new_tokens: NewTokens = None,
    beams: Beams = 1,
    length_penalty: LengthPenalty = 1.0,
    sample: Annotated[bool, of_texts(help="Draw from the distribution.")] = False,
    temperature: Annotated[float, of_texts(help="Of the distribution.")] = 1.0,
    top_k: Annotated[int, of_texts(help="Draw among that many tokens; 0 for all.")] = 0,
    top_p: Annotated[float, of_texts(help="Draw among the fewest tokens of that probability.")] = 1.0,
    repetition_penalty: Annotated[float, of_texts(help="Above 1 makes used tokens less probable.")] = 1.0,
    seed: Annotated[int, of_texts(help="Seed of the sampling.")] = 0,
    limit: Limit = None,
    batch_size: Batch = 32,
    overwrite: Overwrite = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Write texts from prompts: greedy, beam search or sampling."""
    given = dict(locals())
    with reported(as_json):
        from randbasis.use.evaluation import generate as run
        from randbasis.use.evaluation import refuse_existing, use_from_words

        check_options(context, GENERATE)
        refuse_existing(output, (data, adapter, model), overwrite=overwrite)
        answer_rows(run(use_from_words(given), prompt or []), output, as_json, overwrite=overwrite)


@app.command(
    epilog="Example: randbasis plan MODEL --method nola --basis 64 --targets query,value. MODEL may be a folder with "
    "nothing but a config.json."
)
def plan(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub name of the base; only its config.json is read.")],
    method: Annotated[str, Option(help="nola, vera, randlora, pranc; or lora.")] = "nola",
    rank: Annotated[int | None, Option(help="Rank (nola, vera, randlora, lora).")] = None,
    basis: Annotated[int | None, Option(help="Basis matrices (nola, pranc).")] = None,
    basis_b: Annotated[int | None, Option(help="Basis matrices of B, where another number than of A (nola).")] = None,
    unique_basis: Annotated[bool, Option(help="A basis of its own for each layer (nola).")] = False,
    targets: Annotated[str, Option(help="all-linear, or NAME,NAME, slices too: c_attn[q,v].")] = "all-linear",
    as_json: AsJson = False,
) -> None:
    """Count what an adapter would have, and its bytes, from a configuration alone."""
    with reported(as_json):
        from randbasis.adapters.plan import plan as run
        from randbasis.cli.report import plan_table
        from randbasis.train.adapter import method_words, peft_config
        from randbasis.train.settings import AdapterSettings, named_targets

        check_options(context, PLAN, methods=method_words())
        names = named_targets(targets)
        settings = AdapterSettings(method, rank, basis, basis_b, unique_basis=unique_basis, targets=names)
        planned = run(model, peft_config(settings, task_type="CAUSAL_LM", head=[]))
        answer_table(planned.as_json(), plan_table(planned), as_json)


@app.command(epilog="Example: randbasis inspect runs/sst2 --plot spectra.png")
def inspect(
    context: typer.Context,
    adapter: Annotated[str, typer.Argument(help="Folder, packed file, URL, or store:NAME@VERSION.")],
    model: Annotated[str | None, Option(help="Folder or hub name of the base; only its config.json is read.")] = None,
    plot: Annotated[Path | None, Option(help="PNG of norms and spectra to write.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Tell method, seed and counts of an adapter, and norm and spectrum of each change of a weight."""
    with reported(as_json):
        from randbasis.adapters.inspection import inspect_adapter
        from randbasis.cli.report import inspection_table, plot_inspection
        from randbasis.use.evaluation import refuse_existing

        check_options(context, INSPECT)
        refuse_existing(plot, (adapter, model), overwrite=overwrite)
        progress = partial(track, description="matrices", console=Console(stderr=True), transient=True)
        found = inspect_adapter(adapter, model, track=progress)
        if plot is not None:
            plot_inspection(found, plot)
        answer_table(found.as_json(), inspection_table(found), as_json)


@app.command(epilog="Example: randbasis merge --model MODEL --adapter runs/e2e --output merged --dtype bfloat16")
def merge(
    model: Annotated[str, Option(help="Folder or hub name of the base.")],
    adapter: Annotated[str, Option(help="Folder, packed file, URL, or store:NAME@VERSION.")],
    output: Annotated[Path, Option(help="Folder for the model and its tokenizer.")],
    dtype: Annotated[str, Option(help="auto (as the base is stored), float32, bfloat16, float16.")] = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Add an adapter to the weights of its base: a model that plain transformers loads."""
    with reported(as_json):
        from randbasis.adapters.merging import merge_adapter

        merged = merge_adapter(model, adapter, output, dtype=dtype, overwrite=overwrite)
        answer(merged.as_json(), as_json)


@app.command(epilog="Example: randbasis pack runs/e2e e2e.safetensors --bits 4")
def pack(
    context: typer.Context,
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    file: Annotated[str, typer.Argument(help="File to write; or a URL: s3://, hf://, ….")],
    bits: Annotated[int, Option(help="Of a coefficient: 32 (as it is), 16, 8, 4, 3, 2.")] = 16,
    group: Annotated[int, Option(help="Coefficients that share a scale; 0 for one scale a vector.")] = 0,
    bfloat16: Annotated[bool, Option(help="With 16 bits, bfloat16 instead of float16.")] = False,
    model: Annotated[str | None, Option(help="Folder or hub name of the base; only its config.json is read.")] = None,
    base_name: Annotated[str | None, Option(help="Name of the base to write; by default the adapter's.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter as one file: a seed, a spec and the coefficients."""
    given = {"bits": bits, "group": group, "bfloat16": bfloat16, "model": model, "base_name": base_name}
    with reported(as_json):
        from randbasis.adapters.packed import pack_adapter

        check_options(context, PACK)
        answer(pack_adapter(adapter, file, **cast(Any, given), overwrite=overwrite).as_json(), as_json)


@app.command(epilog="Example: randbasis unpack e2e.safetensors runs/again")
def unpack(
    file: Annotated[str, typer.Argument(help="Packed file, or its URL.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    base_name: Annotated[str | None, Option(help="Folder or hub name of the base; by default the file's.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a packed file as an adapter folder, which PEFT loads."""
    with reported(as_json):
        from randbasis.adapters.packed import unpack_adapter

        adapter = unpack_adapter(file, output, base_name=base_name, overwrite=overwrite)
        answer({"output": str(output), "coefficients": adapter.spec.count, "bits": adapter.spec.bits}, as_json)


@app.command(epilog="Example: randbasis verify e2e.safetensors --json")
def verify(
    file: Annotated[str, typer.Argument(help="Packed file, or its URL.")],
    as_json: AsJson = False,
) -> None:
    """Check every rule and digest of a packed file, and tell what it holds."""
    with reported(as_json):
        from randbasis.adapter_file import verify as run

        answer(run(file).as_json(), as_json)


# Commands that have a module of their own, in the order of the help.
app.command(epilog="Example: randbasis quantize runs/e2e e2e-4.safetensors --bits 4")(quantize)
app.command(epilog="Example: randbasis export runs/e2e lora --to peft-lora")(export)
app.command("import", epilog="Example: randbasis import LORA runs/nola --to nola --rank 8 --basis 128")(import_)
app.command(epilog="Example: randbasis diff runs/a runs/b --json")(diff)
app.command(epilog="Example: randbasis average runs/a runs/b --weights 0.5,0.5 --output runs/mean")(average)
app.command(epilog="Example: randbasis push runs/e2e me/e2e-nola --license apache-2.0 --dry-run folder")(push)
app.add_typer(store)


def answer_rows(rows: list[dict[str, Any]], output: Path | None, as_json: bool, *, overwrite: bool) -> None:
    """Many results: into a file of JSON lines, or onto the output stream."""
    from randbasis.use.evaluation import json_line, write_lines

    if output is not None:
        write_lines(rows, output, overwrite=overwrite)
        answer({"output": str(output), "rows": len(rows)}, as_json)
    elif as_json:
        typer.echo(json_line({"rows": rows}))
    else:
        for row in rows:
            typer.echo(json_line(row))


def main() -> None:
    """Entry point of the command."""
    app()
