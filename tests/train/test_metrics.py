"""Metrics against hand-computed values and the packages' own entry points."""

import pytest
import sacrebleu

from randbasis.errors import EmptyDataError
from randbasis.train.metrics import accuracy, bleu, chrf, matthews, pearson, spearman


def test_against_hand_computed():
    assert accuracy([0, 1, 1, 0], [0, 1, 0, 0]) == 0.75
    # tp 1, tn 2, fp 1, fn 0: (1*2 - 1*0) / sqrt(2 * 1 * 3 * 2)
    assert matthews([0, 1, 1, 0], [0, 1, 0, 0]) == pytest.approx(2 / 12**0.5)
    assert matthews([1, 1], [0, 1]) == 0.0
    assert pearson([1.0, 2.0, 3.0], [2.0, 4.0, 7.0]) == pytest.approx(5 / (2 * 38 / 3) ** 0.5)
    # ranks 1 2 3 against 1 3 2, with a tie halved: covariances by hand
    assert spearman([1.0, 5.0, 9.0], [0.0, 10.0, 1.0]) == pytest.approx(0.5)
    assert pearson([1.0, 1.0], [0.0, 1.0]) == 0.0
    assert spearman([1.0, 2.0], [3.0, 3.0]) == 0.0


def test_several_references_against_sacrebleu():
    texts = ["the cat sat on the mat today", "a dog ran far away home"]
    references = [["the cat sat on a mat today", "a cat sat on the mat"], ["a dog ran far away from home"]]
    streams = [["the cat sat on a mat today", "a dog ran far away from home"], ["a cat sat on the mat", None]]
    assert bleu(texts, references) == pytest.approx(sacrebleu.corpus_bleu(texts, streams).score)
    assert chrf(texts, references) == pytest.approx(sacrebleu.corpus_chrf(texts, streams).score)
    only_first = sacrebleu.corpus_bleu(texts, [streams[0]]).score
    assert bleu(texts, references) > only_first


def test_no_references():
    with pytest.raises(EmptyDataError, match="at least one reference"):
        bleu(["x"], [[]])
    with pytest.raises(EmptyDataError, match="at least one reference"):
        chrf([], [])
