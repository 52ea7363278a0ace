"""Study files over the tiny models and rows of the training tests."""

from pathlib import Path

import pytest
from study_texts import HEAD, ROWS, WriteStudy

from randbasis.compare.study import Study
from randbasis.compare.study_file import read_study


@pytest.fixture
def write_study(tmp_path: Path) -> WriteStudy:
    """Text of a study file → study."""

    def write(text: str) -> Study:
        path = tmp_path / "study.toml"
        path.write_text(text, encoding="utf-8")
        return read_study(path)

    return write


@pytest.fixture
def words(encoder: str, sentences_csv: str, held_csv: str) -> str:
    """A data set with a head."""
    return f"""
[[data]]
name = "words"
task = "sequence-classification"
model = "{encoder}"
targets = ["query", "value"]
train = "{sentences_csv}"
eval = "{held_csv}"
text_column = "sentence"
label_column = "label"
pooling = "mean"
limit = 32
dev_rows = 12
steps = 3
trial_steps = 2
batch_size = 8
metric = "accuracy"
"""


@pytest.fixture
def letters(language_model: str, pairs_jsonl: str, tmp_path: Path) -> str:
    """A data set without a head, with what may be forgotten."""
    text = tmp_path / "story.txt"
    text.write_text("a cab <|endoftext|> " * 400)
    return f"""
[[data]]
name = "letters"
task = "causal-lm"
model = "{language_model}"
targets = ["all-linear"]
train = "{pairs_jsonl}"
eval = "{pairs_jsonl}"
prompt_column = "mr"
target_column = "ref"
limit = 8
eval_limit = 3
dev_rows = 2
max_length = 32
end_token = "</s>"
steps = 2
trial_steps = 1
batch_size = 4
metric = "bleu"
forgetting = "{text}"
"""


@pytest.fixture
def colours(vision_model: str, image_folder: Path) -> str:
    """A data set of images, of which there are two draws."""
    return f"""
[[data]]
name = "colours"
task = "image-classification"
model = "{vision_model}"
targets = ["q_proj", "v_proj"]
train = "{image_folder}"
shots = 2
dev_rows = 3
sample_sets = 2
image_size = 16
steps = 2
batch_size = 4
metric = "accuracy"
"""


@pytest.fixture
def study(write_study: WriteStudy, words: str) -> Study:
    return write_study(HEAD + words + ROWS)
