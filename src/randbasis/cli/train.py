"""``randbasis train``: a few lines over :mod:`randbasis.train`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Option

from randbasis.cli.config import CommandWithConfig, Config
from randbasis.cli.console import answer, reported
from randbasis.cli.interruption import interruptible
from randbasis.cli.options import TRAIN, check_options, given_options, spelled_options
from randbasis.cli.parameters import (
    TARGETS,
    AsJson,
    Device,
    Dtype,
    Kind,
    LabelColumn,
    Matrices,
    MatricesOfB,
    MessagesColumn,
    Overwrite,
    PairColumn,
    PromptColumn,
    Rank,
    TargetColumn,
    Targets,
    TextColumn,
    Threads,
    Tie,
    UniqueBasis,
    number_or_auto,
    of_adapter,
    of_data,
    of_loop,
    of_task,
)
from randbasis.train.loop_settings import LoopSettings
from randbasis.train.settings import AdapterSettings, DataSettings, TrainSettings

commands = typer.Typer(rich_markup_mode="markdown")


@commands.command(
    cls=CommandWithConfig,
    epilog="Example: randbasis train --task sequence-classification --model MODEL --data train.tsv --eval-data dev.tsv "
    "--text-column sentence --label-column label --method nola --rank 4 --basis 64 --seed 1 --output runs/sst2",
)
def train(
    context: typer.Context,
    task: Annotated[str, Option(help="causal-lm, sequence-classification, image-classification or embedding.")],
    model: Annotated[str, Option(help="Folder or hub name of the base.")],
    data: Annotated[
        list[str],
        Option(
            help="csv, tsv, jsonl, json or txt, also .gz; parquet; a pattern of files; hub:OWNER/NAME:SPLIT; may be "
            "given several times. Or a folder or zip of images."
        ),
    ],
    output: Annotated[Path, Option(help="Folder for adapter, task, summary and plot.")],
    config: Config = None,
    from_adapter: Annotated[
        str | None,
        Option(
            "--from",
            help="Adapter to start from: folder, packed file, URL, store:NAME@VERSION; method and options are its own.",
        ),
    ] = None,
    project: Annotated[
        bool, Option(help="Bring that adapter, a LoRA, VeRA or RandLoRA of PEFT, onto --method by least squares first.")
    ] = False,
    eval_data: Annotated[
        list[str] | None, of_data(help="Held-out rows, likewise; by default a share of the data.")
    ] = None,
    eval_fraction: Annotated[
        float,
        of_data(help="Share to hold out without --eval-data; 0 trains on all rows, without evaluation."),
    ] = DataSettings.eval_fraction,
    kind: Kind = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    prompt_column: PromptColumn = None,
    target_column: TargetColumn = None,
    messages_column: MessagesColumn = None,
    label_column: LabelColumn = None,
    label_kind: Annotated[str, of_data(help="auto, class or number (a regression).")] = DataSettings.label_kind,
    limit: Annotated[
        int | None, of_data(help="Train on that many rows, drawn by --train-seed, and evaluate on no more.")
    ] = None,
    shots: Annotated[int | None, of_data(help="Train on that many rows of each class, drawn likewise.")] = None,
    eval_limit: Annotated[int | None, of_data(help="Evaluate on that many rows, drawn likewise.")] = None,
    method: Annotated[
        str, Option(help="nola, vera, randlora, pranc, loraxs; or lora, none (a head alone).")
    ] = AdapterSettings.method,
    rank: Rank = None,
    basis: Matrices = None,
    basis_b: MatricesOfB = None,
    alpha: Annotated[float | None, of_adapter(help="Scale (nola, randlora, loraxs, lora).")] = None,
    seed: Annotated[int, of_adapter(help="Seed of the basis.")] = AdapterSettings.seed,
    law: Annotated[
        str | None, of_adapter(help="Law of the basis: sign, uniform, normal, sparse(S), hashed (nola, pranc).")
    ] = None,
    parametrization: Annotated[str | None, of_adapter(help="offset or plain (nola).")] = None,
    unique_basis: UniqueBasis = False,
    tie: Tie = AdapterSettings.tie,
    targets: Targets = TARGETS,
    dropout: Annotated[float, of_adapter(help="Dropout on the input of the adapter.")] = AdapterSettings.dropout,
    quantize_coefficients: Annotated[int | None, of_adapter(help="Train at 8, 4, 3 or 2 bits a coefficient.")] = None,
    allot: Annotated[
        str | None,
        of_adapter(help="gradient: basis matrices by layer, by the gradients before training (nola, pranc)."),
    ] = None,
    batch_size: Annotated[int, of_loop(help="Rows a step.")] = LoopSettings.batch_size,
    eval_batch_size: Annotated[int | None, of_loop(help="Rows at a time when evaluating.")] = None,
    epochs: Annotated[float, of_loop(help="Passes over the rows.")] = LoopSettings.epochs,
    max_steps: Annotated[int | None, of_loop(help="Steps, instead of epochs.")] = None,
    learning_rate: Annotated[
        float | None,
        of_loop(parser=number_or_auto, help="Of the adapter; auto: by method, task and width."),
    ] = None,
    head_learning_rate: Annotated[float | None, of_loop(parser=number_or_auto, help="Of the head; or auto.")] = None,
    warmup: Annotated[float | None, of_loop(help="Share of the steps in which the learning rate rises.")] = None,
    schedule: Annotated[str | None, of_loop(help="linear, cosine, constant, ...: how it falls.")] = None,
    weight_decay: Annotated[float, of_loop(help="Of the adapter and the head's matrices.")] = LoopSettings.weight_decay,
    max_grad_norm: Annotated[float, of_loop(help="Gradients are clipped to this norm.")] = LoopSettings.max_grad_norm,
    accumulate: Annotated[int, of_loop(help="Batches a step.")] = LoopSettings.accumulate,
    label_smoothing: Annotated[float, of_loop(help="Of the classes.")] = LoopSettings.label_smoothing,
    class_weights: Annotated[
        str | None, of_loop(help="balanced, or LABEL=NUMBER,...: how much a class counts in the loss.")
    ] = None,
    train_seed: Annotated[
        int, of_loop(help="Of head, order, dropout, and which rows are held out or taken.")
    ] = LoopSettings.train_seed,
    try_seeds: Annotated[
        int | None, of_loop(help="Begin with so many seeds of the basis, and go on with the best of them.")
    ] = None,
    try_steps: Annotated[
        int, of_loop(help="Steps of each; the loss on a tenth of the training rows decides.")
    ] = LoopSettings.try_steps,
    metric: Annotated[
        str | None, of_loop(help="accuracy, matthews, f1, f1_macro, pearson, spearman, loss, ...")
    ] = None,
    eval_every: Annotated[int | None, of_loop(help="Steps between evaluations.")] = None,
    early_stop: Annotated[int | None, of_loop(help="Stop after that many evaluations without a better metric.")] = None,
    keep: Annotated[str, of_loop(help="Save the best or the last parameters.")] = LoopSettings.keep,
    optimizer: Annotated[str, of_loop(help="adamw_torch_fused, adafactor, ...: transformers' names.")] = (
        LoopSettings.optimizer
    ),
    gradient_checkpointing: Annotated[bool, of_loop(help="Compute activations twice; takes less memory.")] = False,
    report_to: Annotated[str | None, of_loop(help="tensorboard,wandb,...: trackers of transformers.")] = None,
    logging_steps: Annotated[int | None, of_loop(help="Steps between entries of the loss.")] = None,
    save_steps: Annotated[int | None, of_loop(help="Steps between checkpoints; by default at evaluations.")] = None,
    max_length: Annotated[int | None, of_task(help="Tokens a row.")] = None,
    pooling: Annotated[
        str, of_task(help="auto or model: transformers' own class; mean, cls: randbasis alone loads it.")
    ] = TrainSettings.pooling,
    separator: Annotated[str, of_task(help="Between prompt and target.")] = TrainSettings.separator,
    prompt_template: Annotated[
        str | None, of_task(help="Prompt of several columns, 'Title: {title}\\n{body} =>', instead of --prompt-column.")
    ] = None,
    target_template: Annotated[str | None, of_task(help="The same of what has to be written.")] = None,
    chat_template: Annotated[
        Path | None, of_task(help="File with a Jinja template for messages; by default the tokenizer's own.")
    ] = None,
    loss_on: Annotated[
        str, of_task(help="answer: learn targets, or what the assistant says; all: the whole text.")
    ] = TrainSettings.loss_on,
    packing: Annotated[
        bool, of_task(help="Several rows in one sequence of --max-length, each apart from its neighbours.")
    ] = False,
    end_token: Annotated[str | None, of_task(help="Token that ends a text; by default the tokenizer's.")] = None,
    image_size: Annotated[int | None, of_task(help="Side of the images in pixels.")] = None,
    flip: Annotated[bool, of_task(help="Mirror half of the training images.")] = False,
    overwrite: Overwrite = False,
    resume: Annotated[bool, Option(help="Go on from the last checkpoint; start where there is none.")] = False,
    keep_checkpoints: Annotated[bool, Option(help="Leave the checkpoints in the output.")] = False,
    dtype: Dtype = LoopSettings.dtype,
    load_in_4bit: Annotated[bool, Option(help="Read the base with weights of 4 bits (bitsandbytes, NF4).")] = False,
    load_in_8bit: Annotated[bool, Option(help="Read the base with weights of 8 bits (bitsandbytes).")] = False,
    device: Device = LoopSettings.device,
    threads: Threads = None,
    quiet: Annotated[bool, Option(help="No progress.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a base model on a file of rows."""
    given = dict(locals())
    with reported(as_json), interruptible(output, as_json):
        from randbasis.train.method_table import method_words
        from randbasis.train.origin import check_given
        from randbasis.train.run import train as run
        from randbasis.train.settings import settings_from_words

        settings = settings_from_words(given)

        def check() -> None:
            check_options(context, TRAIN, methods=method_words())
            check_given(settings, given_options(context), spelled_options(context))

        outcome = run(settings, console=None if quiet else Console(stderr=True), check=check)
        if outcome.first:
            told = outcome.summary
            if not (quiet or as_json):  # which were warnings already
                told = {name: value for name, value in told.items() if name != "doubts"}
            answer({"output": str(output), **told}, as_json)
