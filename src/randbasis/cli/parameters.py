"""Options and arguments that several commands have: one type each, with its help."""

from functools import partial
from typing import Annotated

from typer import Argument, BadParameter, Option

from randbasis.train.settings import AdapterSettings

AUTO = "auto"
"""Of a number that is chosen where none is given."""


def number_or_auto(word: str | float) -> float | None:
    """A number of the command line, ``None`` for ``auto``."""
    try:
        return None if word == AUTO else float(word)
    except ValueError:
        raise BadParameter(f"{word!r} must be a number, or {AUTO}") from None


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
Rows = Annotated[
    str | None,
    of_data(
        help="csv, tsv, jsonl, json or txt, also .gz; parquet; a pattern of files; hub:OWNER/NAME:SPLIT. Or a folder "
        "or zip of images."
    ),
]
Kind = Annotated[
    str | None, of_data("--format", help="csv, tsv, jsonl, json, txt, parquet; when the name does not tell.")
]
Split = Annotated[str | None, of_data(help="Split of an archive of images, such as test.")]
Limit = Annotated[int | None, of_data(help="Use that many rows, drawn by seed 0.")]
Batch = Annotated[int, Option(help="Rows at a time.")]
Dtype = Annotated[str, Option(help="Of the base: float32, bfloat16, float16.")]
Device = Annotated[str, Option(help="auto, or a device of torch: cpu, cuda:1.")]
Threads = Annotated[int | None, Option(help="Threads of torch.")]
TextColumn = Annotated[str | None, of_data(help="Column of the text, by name, or by index from 0 without a header.")]
PairColumn = Annotated[str | None, of_data(help="Column of a second text.")]
PromptColumn = Annotated[str | None, of_data(help="Column of what the language model is given.")]
TargetColumn = Annotated[str | None, of_data(help="Column of what it has to write.")]
MessagesColumn = Annotated[
    str | None, of_data(help="Column of a conversation: a list of messages with role and content.")
]
LabelColumn = Annotated[str | None, of_data(help="Column of the class or number.")]
NewTokens = Annotated[int | None, of_texts(help="Longest answer; by default the longest of training.")]
Beams = Annotated[int, of_texts(help="Beams of a beam search; 1 is greedy.")]
LengthPenalty = Annotated[float, of_texts(help="Exponent of the length in a beam's score.")]

Rank = Annotated[int | None, of_adapter(help="Rank (nola, vera, randlora, loraxs, lora).")]
Matrices = Annotated[int | None, of_adapter(help="Basis matrices (nola, pranc).")]
MatricesOfB = Annotated[int | None, of_adapter(help="Basis matrices of B, where another number than of A (nola).")]
UniqueBasis = Annotated[bool, of_adapter(help="A basis of its own for each layer (nola).")]
Tie = Annotated[
    str, of_adapter(help="Which matrices share coefficients: matrix (none), block:N, model (all) (nola, pranc).")
]
Targets = Annotated[str, of_adapter(help="all-linear, or NAME,NAME, slices too: c_attn[q,v].")]
TARGETS = ",".join(AdapterSettings.targets)

Group = Annotated[
    int, Option("--group-size", "--group", help="Coefficients that share a scale; 0 for one scale a vector.")
]
Shapes = Annotated[str | None, Option("--model", help="Folder or hub name of the base; only its config.json is read.")]
WrittenName = Annotated[str | None, Option("--base-name", help="Name of the base to write; by default the adapter's.")]
Stored = Annotated[str, Argument(help="Folder, packed file, URL, or store:NAME@VERSION.")]

AsJson = Annotated[bool, Option("--json", help="One JSON document on the output stream.")]
Overwrite = Annotated[bool, Option(help="Replace what is in the output.")]
