"""Options and arguments that several commands have: one type each, with its help."""

from functools import partial
from typing import Annotated

from typer import Option

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

AsJson = Annotated[bool, Option("--json", help="One JSON document on the output stream.")]
Overwrite = Annotated[bool, Option(help="Replace what is in the output.")]
