"""What a study file may say, what it may not, and the rows that it means; the studies that ship."""

from pathlib import Path

import pytest
from study_texts import HEAD, ROWS, WriteStudy

from randbasis.compare.study import Budget, PointSpec, Study
from randbasis.compare.study_file import read_study
from randbasis.errors import DataMissingError, StudyError

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "studies").glob("*.toml"))


def test_rows_are_what_their_budgets_and_grids_multiply_to(write_study: WriteStudy, words: str):
    grid = '[[row]]\ncurve = "P"\nmethod = "pranc"\nbudgets = ["64", "1KiB"]\nbits = [8, 4]\n'
    grid += 'grid = {law = ["sign", "uniform"]}\n'
    study = write_study(HEAD + words + ROWS + grid)
    assert [row.name for row in study.rows] == [
        "base alone", "LoRA r=2", "NOLA 64 coefficients",
        "P law sign 64 B", "P law sign 1,024 B", "P law uniform 64 B", "P law uniform 1,024 B",
    ]  # fmt: skip
    last = study.rows[-1]
    assert (last.curve, last.options) == ("P law uniform", (("law", "uniform"),))
    assert last.budget == Budget(1024, "bytes", 4)  # counted at the fewest bits that are asked for
    assert study.rows[1].points == (PointSpec(16, 2), PointSpec(4, 1))
    assert [spec.name for spec in study.rows[1].points] == ["rank 2, 16 bits", "rank 1, 4 bits"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = 2", "seed = 2", r"\[study\] has no key 'seed'; did you mean seeds"),
        ("seeds = 2", "seeds = 0", "seeds must be a whole number from 1, got 0"),
        ("seeds = 2", "seeds = true", "seeds must be a whole number"),
        ("trials = 2", 'trials = 2\nanchor = "LoRA"', "anchor 'LoRA' is no row; did you mean LoRA r=2"),
        ("trials = 2", 'trials = 2\ngain_of = "NOLA"', "gain_of 'NOLA' is no row"),
        ("steps = 3", "", r"\[\[data\]\] 1 must say steps"),
        ("dev_rows", "dev_row", "has no key 'dev_row'; did you mean dev_rows"),
        ("sequence-classification", "sequence-classifying", "task 'sequence-classifying' is unknown; did you mean"),
        ('method = "none"', 'method = "lora"\nrank = 1', "the first \\[\\[row\\]\\] must be the base alone"),
        ('method = "nola"', 'method = "nolla"', "method 'nolla' is unknown; did you mean nola"),
        ("coefficients = [64]", "coeficients = [64]", "has no key 'coeficients'"),
        ("coefficients = [64]", 'coefficients = [64]\nbudgets = ["1KB"]', "keep one"),
        ("coefficients = [64]", "grid = {ranks = [1]}", "grid .* has no key 'ranks'; did you mean rank"),
        ("bits = [16, 2]", "bits = [16, 5]", "bits must be one of"),
        ("coefficients = [64]", 'budgets = ["1 GB"]', r"\[\[row\]\] 3: a budget must be bytes"),
        ("bits = [16, 2]", "points = [{rank = 1, bits = 8}]", "only a lora can be truncated"),
        ("bits = [16, 2]", "bits = [8]\npoints = [{bits = 8}]", "points or bits, got both"),
        ("bits = [16, 2]", "rate = 0", "rate must be a number above 0"),
        ("bits = [16, 2]", 'data = ["wards"]', "data 'wards' is unknown; did you mean words"),
        ("bits = [16, 2]", "points = [{bit = 8}]", "points has no key 'bit'; did you mean bits"),
        ('name = "LoRA r=2"', 'name = "base alone"', "base alone twice"),
        ("bits = [16, 2]", "start = {}\nstarts = {}", "has no key 'starts'"),
        ("bits = [16, 2]", "start = {allot = 'gradients'}", "allot 'gradients' is unknown; did you mean gradient"),
        ("bits = [16, 2]", "start = {allot = 'gradient', project = 8}", "start is allot, .* or project, got"),
        ("bits = [16, 2]", "start = {try_seeds = 4}", "try_seeds with try_steps"),
        ("bits = [16, 2]", "start = {project = 0}", "project must be a whole number from 1, got 0"),
        ("bits = [16, 2]", "allot = 'gradient'", "has no key 'allot'"),
        ("rank = 2", "rank = 2\nstart = {try_seeds = 2, try_steps = 1}", "start try_seeds is for nola, .*, got 'lora'"),
        ("[study]", "[study", "is not TOML"),
        ("[[data]]", "[data]", r"data must be tables, each under \[\[data\]\]"),
        ('name = "words"', 'name = "all"', "none may be 'all'"),
        ('name = "words"', 'name = "wo\\nrds"', "name must be text on one line"),
        ('targets = ["query", "value"]', 'targets = "query"', "targets must be a list with at least one value"),
        ("sequence-classification", "embedding", "task 'embedding' is unknown; there are: causal-lm"),
        ("limit = 32", 'limit = "32"', "limit must be a whole number, got '32'"),
        ("limit = 32", "limit = 0", "limit must be a whole number from 1, got 0"),
        ("limit = 32", "limit = 32\nimage_size = 8", "image_size is not for sequence-classification"),
        ("limit = 32", 'limit = 32\nforgetting = "story.txt"', "forgetting is not for sequence-classification"),
        ("limit = 32", "limit = 32\npacking = true", "has no key 'packing'"),
        ("limit = 32", 'limit = 32\nschedule = "steep"', "schedule 'steep' is unknown"),
        ("limit = 32", "limit = 32\nweight_decay = nan", "weight_decay must be a number, got nan"),
        ("batch_size = 8", "batch_size = -1", "batch_size must be at least 1, got -1"),
        ("coefficients = [64]", "coefficients = []", "coefficients must be a list with at least one value"),
        ("coefficients = [64]", 'coefficients = ["64"]', "coefficients must be a whole number from 1, got '64'"),
        ("coefficients = [64]", 'budgets = "512"', "budgets must be a list"),
        ("coefficients = [64]", 'budgets = ["512"]\nbudget_bits = 5', "budget_bits must be one of"),
        ("coefficients = [64]", f'budgets = ["{"9" * 400}"]', "a budget must be bytes"),
        ("coefficients = [64]", "grid = {law = []}", "law must be a list with at least one value"),
        ("coefficients = [64]", 'basis = "2"', "basis must be a whole number"),
        ("coefficients = [64]", "basis = 0", "basis must be at least 1, got 0"),
        ("coefficients = [64]", 'basis = 2\ntie = "block:0"', "block:0"),
        ("bits = [16, 2]", "bits = [4, 4]", "may be named once"),
        ("bits = [16, 2]", "bits = 4", "bits must be a list"),
        ("bits = [16, 2]", "rate = inf", "rate must be a number above 0"),
        ("bits = [16, 2]", 'data = "words"', "data must be a list"),
        ("rank = 2", "", "lora must have a rank"),
        ("rank = 2,", "rank = -1,", "points: rank must be a whole number from 1, got -1"),
        ("rank = 2,", "rank = 9,", "a rank of 2 has no leading 9 terms"),
        ("trials = 2", "trials = 2\nanchor = 3", "must say anchor as text, got 3"),
        ("[study]", "[studies]\n[study]", "the file has no key 'studies'"),
    ],
)
def test_what_a_study_may_not_say(write_study: WriteStudy, words: str, old: str, new: str, message: str):
    text = HEAD + words + ROWS
    assert old in text
    if "rate = 0" in new or "rate = inf" in new:
        text = text.replace("bits = [16, 2]\nrate = 0.05", "bits = [16, 2]")
    with pytest.raises(StudyError, match=message):
        write_study(text.replace(old, new, 1))


def test_what_is_not_quantized_by_peft_has_no_bits(write_study: WriteStudy, words: str):
    with pytest.raises(StudyError, match="'vblora', whose file holds more than coefficients"):
        write_study(HEAD + words + ROWS + '[[row]]\nname = "VB"\nmethod = "vblora"\nbits = [8]\n')
    with pytest.raises(StudyError, match="budgets are bytes or coefficients of one of"):
        write_study(HEAD + words + ROWS + '[[row]]\nname = "VB"\nmethod = "vblora"\ncoefficients = [8]\n')


def test_files_must_be_there_but_for_a_report(words: str, tmp_path: Path):
    path = tmp_path / "study.toml"
    path.write_text(HEAD + words.replace("held.csv", "nowhere.csv") + ROWS)
    with pytest.raises(DataMissingError, match="nowhere"):
        read_study(path)
    assert read_study(path, must_exist=False).data[0].name == "words"
    with pytest.raises(DataMissingError, match="is not a file"):
        read_study(tmp_path / "other.toml")


@pytest.fixture(params=SHIPPED, ids=lambda path: path.stem)
def shipped(request: pytest.FixtureRequest) -> Study:
    return read_study(request.param, must_exist=False)


def test_every_study_of_the_issue_ships():
    assert {path.stem for path in SHIPPED} >= {
        "glue", "fewshot", "generation", "rank", "full_rank", "laws", "shared", "pranc", "budgets", "precision",
    }  # fmt: skip


def test_a_shipped_study_names_a_claim_and_has_three_seeds(shipped: Study):
    assert len(shipped.claim.split()) > 10
    assert shipped.seeds >= 3
    assert shipped.trials >= 4


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_study_is_called_as_its_file_and_its_data_are_there(path: Path, data_dir: Path, root: Path):
    assert read_study(path, data_dir).name == path.stem
    assert f"study-{path.stem} " in (root / "Makefile").read_text(encoding="utf-8")
