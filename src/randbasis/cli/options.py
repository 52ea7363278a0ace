"""No option that was given is ignored: where it would mean nothing, the command says so before it begins.

Each command has a table of what its options need beside them. What was given is what stands on the command line, not
what differs from a default, so that ``--temperature 1`` without ``--sample`` is refused, too. Of a file of options only
what differs counts: one that a run left names all of its settings, and must stay of use beside another option.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import typer

from randbasis.errors import OptionError

Words = Mapping[str, Any]
"""Parameter name → value, and what else a rule may ask for, such as the task of an adapter; what has to be looked up
is a function, which is called only where the option was given."""


@dataclass(frozen=True)
class Needs:
    """What some options need to mean anything.

    Args:
        options: names of parameters, with spaces between them.
        condition: whether they mean something beside the other words.
        when: the condition as a person reads it, behind "it needs".
    """

    options: str
    condition: Callable[[Words], bool]
    when: str


def given_options(context: typer.Context) -> dict[str, Any]:
    """Parameter name → value of what somebody wrote; a flag that is switched off asks for nothing."""
    defaults = {parameter.name: parameter.default for parameter in context.command.params}
    sources = {name: getattr(context.get_parameter_source(name), "name", "") for name in context.params}
    return {
        name: value
        for name, value in context.params.items()
        if value is not False
        and (sources[name] == "COMMANDLINE" or (sources[name] == "DEFAULT_MAP" and value != defaults[name]))
    }


def spelled_options(context: typer.Context) -> dict[str, str]:
    """Parameter name → how its option is written."""
    return {str(parameter.name): parameter.opts[0] for parameter in context.command.params}


def check_options(context: typer.Context, needs: Sequence[Needs], **facts: Any) -> None:
    """Refuse options that were given and would be ignored.

    Args:
        context: of the command.
        needs: the table of the command.
        facts: what the conditions may ask for beside the parameters.

    Raises:
        OptionError: an option has no meaning beside the others.
    """
    given, words = given_options(context), {**context.params, **facts}
    spelled = spelled_options(context)
    for need in needs:
        for name in need.options.split():
            if name in given and not need.condition(words):
                got = str(given[name]) if isinstance(given[name], Path) else given[name]
                raise OptionError(
                    f"{spelled[name]} has no meaning here, got {got!r}: it needs {need.when}; leave it out"
                )


def _task(*names: str) -> Callable[[Words], bool]:
    return lambda words: words["task"] in names


def _evaluated(words: Words) -> bool:
    """Whether a run has rows to evaluate on."""
    return bool(words["eval_data"]) or words["eval_fraction"] != 0


def _classes(words: Words) -> bool:
    return words["task"] in ("sequence-classification", "image-classification")


def _pairs(words: Words) -> bool:
    """Whether a row is a prompt and a target."""
    asked = words["prompt_column"] is not None or words["prompt_template"] is not None
    return words["task"] == "causal-lm" and asked and (words["target_column"] or words["target_template"]) is not None


def _chat(words: Words) -> bool:
    return words["task"] == "causal-lm" and words["messages_column"] is not None


def _writes(words: Words) -> bool:
    """Whether ``evaluate`` and ``predict`` generate texts."""
    return words["task"] == "causal-lm" and words["prompted"] and words.get("texts") is not False


def _to(*kinds: str) -> Callable[[Words], bool]:
    """Whether that kind of output was asked for; an unknown one is refused elsewhere."""
    return lambda words: words["to"] in kinds or words["to"] not in words["kinds"]


def _folder(*parameters: str) -> Callable[[Words], bool]:
    """Whether one of these is, or names, a folder."""

    def folder(value: Any) -> bool:
        return any(map(folder, cast("list[Any]", value))) if isinstance(value, list) else Path(value).is_dir()

    return lambda words: any(folder(words[name]) for name in parameters)


def _takes(option: str) -> Callable[[Words], bool]:
    """Whether the method has such a hyper-parameter; an unknown method is refused elsewhere."""
    return lambda words: words["method"] not in words["methods"] or option in words["methods"][words["method"]]


_ADAPTER = tuple(
    Needs(option, _takes(option), f"a method with {word}")
    for option, word in {
        "rank": "a rank",
        "basis": "basis matrices",
        "basis_b": "basis matrices of B",
        "alpha": "a scale",
        "seed": "a basis of a seed",
        "law": "a basis of a law",
        "parametrization": "parametrizations",
        "unique_basis": "a basis that layers may share",
        "tie": "coefficients that matrices may share",
        "targets": "targets",
        "dropout": "dropout",
        "quantize_coefficients": "coefficients",
        "allot": "basis matrices",
    }.items()
)
_BEAMS = Needs("length_penalty", lambda words: words["beams"] > 1, "--beams above 1")
_REPLACED = Needs("overwrite", lambda words: words["output"] is not None, "--output")

TRAIN = (
    *_ADAPTER,
    Needs("project", lambda words: words["from_adapter"] is not None, "--from"),
    Needs("try_seeds", _takes("seed"), "a method whose basis has a seed"),
    Needs("try_steps", lambda words: words["try_seeds"] is not None, "--try-seeds"),
    Needs("kind", _task("causal-lm", "sequence-classification", "embedding"), "a task with a file of rows"),
    Needs("text_pair_column", _task("sequence-classification", "embedding"), "a task with pairs of texts"),
    Needs("prompt_column target_column messages_column end_token", _task("causal-lm"), "--task causal-lm"),
    Needs("prompt_template target_template packing", _task("causal-lm"), "--task causal-lm"),
    Needs("chat_template", _chat, "--task causal-lm with --messages-column"),
    Needs("loss_on", lambda words: _chat(words) or _pairs(words), "--messages-column, or prompts and targets"),
    Needs("text_column max_length", _task("causal-lm", "sequence-classification", "embedding"), "a task with texts"),
    Needs("text_column", lambda words: not _pairs(words), "no --prompt-column and --target-column beside it"),
    Needs("label_column", _task("sequence-classification", "embedding"), "a task with labels or scores of texts"),
    Needs("label_kind shots", _classes, "a task with labels"),
    Needs("class_weights", _classes, "a task with classes"),
    Needs("class_weights", lambda words: words["label_kind"] != "number", "classes"),
    Needs("label_smoothing", lambda words: words["label_kind"] != "number", "classes"),
    Needs("pooling", _task("sequence-classification"), "--task sequence-classification"),
    Needs("separator", _pairs, "--task causal-lm with --prompt-column and --target-column"),
    Needs("separator", lambda words: words["prompt_template"] is None, "no --prompt-template beside it, which has it"),
    Needs("image_size flip", _task("image-classification"), "--task image-classification"),
    Needs("head_learning_rate", _classes, "a task with a head"),
    Needs(
        "learning_rate",
        lambda words: words["method"] != "none" or words["head_learning_rate"] is None,
        "an adapter, where --head-learning-rate is given",
    ),
    Needs("eval_fraction", lambda words: not words["eval_data"], "no --eval-data beside it"),
    Needs("eval_limit eval_batch_size eval_every early_stop metric", _evaluated, "another --eval-fraction than 0"),
    Needs("keep", lambda words: _evaluated(words) or words["keep"] == "last", "another --eval-fraction than 0"),
    Needs("epochs", lambda words: words["max_steps"] is None, "no --max-steps beside it"),
    Needs("warmup", lambda words: words["schedule"] != "constant", "another --schedule than constant"),
)
"""What options of ``train`` need; ``methods`` are the hyper-parameters of each method."""

PLAN = _ADAPTER

BUDGET = (
    Needs("write", lambda words: words["budget"] is not None, "--budget"),
    Needs("pick overwrite", lambda words: words["write"] is not None, "--write"),
    Needs(
        "method rank basis basis_b unique_basis tie task",
        lambda words: words["budget"] is None,
        "no --budget, which lists all methods and sizes",
    ),
)
"""Of ``plan``, where a budget is given, or what goes with one."""

EVALUATE = (
    Needs("kind", _task("causal-lm", "sequence-classification", "embedding"), "an adapter for a file of rows"),
    Needs("split", _task("image-classification"), "an adapter for images"),
    Needs("texts", _task("causal-lm"), "an adapter of a language model"),
    Needs("text_column", lambda words: words["task"] != "causal-lm" or not words["prompted"], "no prompts beside it"),
    Needs("max_new_tokens beams length_penalty", _writes, "texts that are generated from prompts"),
    _BEAMS,
)
"""Of ``evaluate``; ``task`` is the adapter's, ``prompted`` says whether rows have prompts."""

PREDICT = (
    *(need for need in EVALUATE if need.options != "texts"),
    Needs("probabilities", lambda words: words["classes"], "an adapter that answers with classes"),
    _REPLACED,
)

GENERATE = (
    Needs(
        "data kind prompt_column messages_column limit",
        lambda words: not words["prompt"] and not words["messages"],
        "no --prompt or --messages beside it",
    ),
    Needs("kind prompt_column limit", lambda words: words["data"] is not None, "--data"),
    Needs("temperature top_k top_p seed", lambda words: words["sample"], "--sample"),
    _BEAMS,
    _REPLACED,
)

INSPECT = (Needs("overwrite", lambda words: words["plot"] is not None, "--plot"),)

_SCALES = "8, 4, 3 or 2 bits, whose codes have scales"

_OF_A_FOLDER = (Needs("model", _folder("adapter"), "an adapter folder; a packed file tells its shapes"),)

PACK = (
    *_OF_A_FOLDER,
    Needs("base_name", _folder("adapter"), "an adapter folder; a packed file keeps its name of the base"),
    Needs("group", lambda words: words["bits"] not in (32, 16), _SCALES),
    Needs("bfloat16", lambda words: words["bits"] == 16, "--bits 16"),
)

QUANTIZE = (
    Needs("bits overwrite base_name", lambda words: words["output"] is not None, "an output"),
    Needs("group", lambda words: words["bits"] != 16, _SCALES),
    *_OF_A_FOLDER,
    Needs(
        "base_name",
        lambda words: _folder("adapter")(words) or not words["output"].endswith(".safetensors"),
        "an adapter folder to read or to write; a packed file that is rounded keeps its name of the base",
    ),
)

DIFF = (Needs("base", _folder("first", "second"), "an adapter folder; packed files tell their shapes"),)
AVERAGE = (
    Needs("base", _folder("adapters"), "an adapter folder; packed files tell their shapes"),
    Needs("heads", lambda words: words["with_heads"](), "adapters with something that was trained whole beside them"),
)
"""Of ``average``; ``with_heads`` tells whether an adapter has a head."""

EXPORT = (Needs("rank", _to("peft-lora", "gguf-lora"), "--to peft-lora or gguf-lora"),)
"""Of ``export``; ``kinds`` are what ``to`` may be."""

IMPORT = (
    Needs("basis_b alpha parametrization", _to("nola"), "--to nola"),
    Needs("basis unique_basis", _to("nola", "pranc"), "--to nola or pranc"),
    Needs("seed law refine", _to("nola", "vera", "pranc"), "--to nola, vera or pranc"),
    Needs("rank", _to("nola", "vera", "peft-lora"), "--to nola, vera or peft-lora"),
    Needs("limit", _to("nola", "vera", "pranc", "peft-lora"), "--to nola, vera, pranc or peft-lora"),
    Needs("limit", lambda words: words["refine"] is None, "no --refine beside it, which trains what is left"),
    Needs("refine_steps quiet", lambda words: words["refine"] is not None, "--refine"),
    Needs("dtype", _to("merged"), "--to merged"),
)
"""Of ``import``; ``kinds`` as for ``export``."""

PUSH = (
    Needs("private revision message", lambda words: words["dry_run"] is None, "no --dry-run beside it"),
    Needs("overwrite", lambda words: words["dry_run"] is not None, "--dry-run"),
    Needs("license", lambda words: not words["own_card"](), "a card that is made, and the adapter has a README.md"),
)
"""Of ``push``; ``own_card`` tells whether a card lies beside the adapter, which is sent as it stands."""

STORE_GET = (
    _REPLACED,
    Needs("version", lambda words: words["digest"] is None, "no --digest beside it"),
)
STORE_ADD = (Needs("name", lambda words: len(words["files"]) == 1, "one file alone; add them one by one"),)
