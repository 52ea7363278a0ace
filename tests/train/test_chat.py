"""Conversations: what of them is learned, whatever the template tells, and that generation asks the same way."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import letters_tokenizer
from typer.testing import CliRunner

from randbasis.cli import app
from randbasis.errors import ColumnError, DataMissingError, SettingError
from randbasis.train import AdapterSettings, CausalLanguage, DataSettings, LoopSettings, TrainSettings, prepare, train
from randbasis.train.chat import Chat
from randbasis.use import UseSettings, evaluate, generate, predict

TURNS = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}u {{ m.content }}{% else %}"
#: An answer has a header, "a ", and the end token; transformers' own marks; one that never begins an answer.
BEGUN = TURNS + " a {{ m.content }}</s> {% endif %}{% endfor %}{% if add_generation_prompt %} a {% endif %}"
MARKED = TURNS + (
    " a {% generation %}{{ m.content }}</s>{% endgeneration %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %} a {% endif %}"
)
BARE = TURNS + " a {{ m.content }}</s> {% endif %}{% endfor %}"
ENDLESS = TURNS + " a {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %} a {% endif %}"
TALK = [("user", "xy"), ("assistant", "bc"), ("user", "z"), ("assistant", "d")]


def talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def rows_file(folder: Path, talks: list[object], name: str = "talks.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in talks))
    return path


@pytest.fixture
def chat_run(language_model: str, tmp_path: Path) -> TrainSettings:
    letters = "abcdefgh"
    data = rows_file(tmp_path, [talk(("user", one), ("assistant", f"{one}{one}")) for one in letters])
    (tmp_path / "template.jinja").write_text(BEGUN)
    return TrainSettings(
        "causal-lm", language_model, DataSettings(data, eval=data, messages_column="messages"), tmp_path / "run",
        chat_template=tmp_path / "template.jinja", adapter=AdapterSettings("lora", rank=8),
        loop=LoopSettings(max_steps=120, batch_size=8, learning_rate=5e-2, eval_every=60, threads=1),
    )  # fmt: skip


@pytest.mark.parametrize("template", [BEGUN, MARKED, BARE], ids=["begun", "marked", "bare"])
def test_what_the_assistant_says_is_learned_and_nothing_else(template: str):
    tokenizer = letters_tokenizer()
    chat = Chat(tokenizer, template)
    ids, learned = chat.learned(talk(*TALK))
    words = tokenizer.convert_ids_to_tokens(ids)
    assert "".join(words) == "<s>u xy a bc</s> u z a d</s> "
    shown = "".join(word if one else "." * len(word) for word, one in zip(words, learned, strict=True))
    assert shown == "..........bc</s>.......d</s>."
    assert chat.prompt(talk(*TALK[:3])) == "<s>u xy a bc</s> u z a "
    assert chat.end_id == tokenizer.eos_token_id


def test_a_template_without_an_end_gets_the_end_token(chat_run: TrainSettings):
    Path(str(chat_run.chat_template)).write_text(ENDLESS)
    prepared = prepare(chat_run)
    words = prepared.task.tokenizer.convert_ids_to_tokens(prepared.train[0]["input_ids"])
    assert "".join(words) == "<s>u a a aa </s>"
    learned = [word for word, label in zip(words, prepared.train[0]["labels"], strict=True) if label != -100]
    assert learned == ["a", "a", "</s>"]


def test_the_whole_text_may_be_learned(chat_run: TrainSettings):
    for example in prepare(replace(chat_run, loss_on="all")).train:
        assert example["labels"] == example["input_ids"]
    task = prepare(replace(chat_run, loss_on="all")).task
    assert isinstance(task, CausalLanguage)
    assert task.answer_length == 3  # two letters and the end


def test_a_template_that_changes_what_was_said_is_refused():
    last_only = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(SettingError, match="continuation of its beginning"):
        Chat(letters_tokenizer(), last_only + "{{ messages | length }}").learned(talk(*TALK))


def test_a_model_without_a_template_says_so(chat_run: TrainSettings):
    with pytest.raises(SettingError, match="has no chat template; give one as a file with chat_template"):
        prepare(replace(chat_run, chat_template=None))
    with pytest.raises(DataMissingError, match="is not a file"):
        prepare(replace(chat_run, chat_template="nothing.jinja"))
    Path(str(chat_run.chat_template)).write_text("{{ raise_exception('never this') }}")
    with pytest.raises(SettingError, match="cannot be filled: never this"):
        prepare(chat_run)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("hello", "row 1 of talks.jsonl, column 'messages': messages are a list of objects"),
        ([], "messages are a list of objects"),
        ([{"from": "human", "value": "a"}], "rename them to role and content"),
        ([{"role": "user"}], "each message has a role and a content"),
        ([{"role": "user", "content": None}], "each message has a role and a content"),
        (talk(("user", "a")), "row 1 of talks.jsonl ends with a message of 'user'"),
    ],
)
def test_what_is_no_conversation(chat_run: TrainSettings, tmp_path: Path, cell: object, message: str):
    data = replace(chat_run.data, train=rows_file(tmp_path, [cell]))
    with pytest.raises(ColumnError, match=message):
        prepare(replace(chat_run, data=data))


def test_conversations_of_a_table_are_json(chat_run: TrainSettings, tmp_path: Path):
    path = tmp_path / "talks.tsv"
    path.write_text(f"messages\n{json.dumps(talk(*TALK))}\n")
    prepared = prepare(replace(chat_run, data=replace(chat_run.data, train=path)))
    assert prepared.train[0]["target"] == "d"


def test_the_same_first_messages_are_not_on_both_sides(chat_run: TrainSettings, tmp_path: Path):
    talks = [talk(("user", one), ("assistant", other)) for one in "abcdefgh" for other in "xy"]
    data = DataSettings(rows_file(tmp_path, talks), eval_fraction=0.4, messages_column="messages")
    prepared = prepare(replace(chat_run, data=data))
    assert {e["prompt"] for e in prepared.train}.isdisjoint({e["prompt"] for e in prepared.eval})
    assert len(prepared.eval) == 6


def test_a_trained_adapter_answers_in_its_own_form(chat_run: TrainSettings, tmp_path: Path):
    outcome = train(chat_run)
    use = UseSettings(adapter=outcome.output, threads=1)
    (asked,) = generate(use, ["c"])
    assert asked == {"prompt": "c", "text": "c c"}
    (gone_on,) = generate(use, messages=[talk(("user", "c"))])
    assert gone_on == {"messages": talk(("user", "c")), "text": "c c"}
    scores = evaluate(replace(use, data=chat_run.data.train))["metrics"]
    assert scores["loss"] == pytest.approx(outcome.summary["after"]["loss"], rel=1e-5)
    assert scores["chrf"] > 90
    unanswered = rows_file(tmp_path, [talk(("user", one)) for one in "cf"], "asked.jsonl")
    assert [row["prediction"] for row in predict(replace(use, data=unanswered))] == ["c c", "f f"]
    assert [row["prediction"] for row in predict(replace(use, data=chat_run.data.train))][2] == "c c"
    Path(str(chat_run.chat_template)).unlink()  # the adapter has it
    words = ["generate", "--adapter", str(outcome.output), "--threads", "1", "--messages"]
    said = CliRunner().invoke(app, [*words, json.dumps(talk(("user", "c")))], catch_exceptions=False)
    assert json.loads(said.stdout)["text"] == "c c"
    wrong = CliRunner().invoke(app, [*words, "c"], catch_exceptions=False)
    assert wrong.exit_code == 2
    assert "messages are a list of objects with role and content" in wrong.stderr


def test_messages_need_an_adapter_of_conversations(language_model: str):
    with pytest.raises(SettingError, match="trained on conversations"):
        generate(UseSettings(model=language_model), messages=[talk(("user", "a"))])
