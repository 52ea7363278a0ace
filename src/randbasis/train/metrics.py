"""The metrics, as scikit-learn, scipy and sacrebleu compute them."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from randbasis.errors import EmptyDataError
from randbasis.optional import needing


def accuracy(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """The share of equal entries."""
    return sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(expected)


def matthews(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Matthews' correlation coefficient for any number of classes; 0 where it is not defined."""
    return float(_package("sklearn.metrics").matthews_corrcoef(expected, predicted))


def f1(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """F1 of the second of two classes; 0 where it is neither answered nor expected."""
    return float(_package("sklearn.metrics").f1_score(expected, predicted, pos_label=1, zero_division=0.0))


def f1_macro(predicted: Sequence[int], expected: Sequence[int], classes: int) -> float:
    """The mean of every class's F1, which is 0 for a class that is neither answered nor expected."""
    score = _package("sklearn.metrics").f1_score
    return float(score(expected, predicted, labels=list(range(classes)), average="macro", zero_division=0.0))


def pearson(predicted: Sequence[float], expected: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    if len(set(predicted)) < 2 or len(set(expected)) < 2:
        return 0.0
    return float(_package("scipy.stats").pearsonr(predicted, expected).statistic)


def spearman(predicted: Sequence[float], expected: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where one side is constant."""
    if len(set(predicted)) < 2 or len(set(expected)) < 2:
        return 0.0
    return float(_package("scipy.stats").spearmanr(predicted, expected).statistic)


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of sacrebleu (0 to 100) with any number of references a text."""
    return float(_package("sacrebleu.metrics").BLEU().corpus_score(list(texts), _streams(references)).score)


def chrf(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ChrF of sacrebleu (0 to 100) with any number of references a text."""
    return float(_package("sacrebleu.metrics").CHRF().corpus_score(list(texts), _streams(references)).score)


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References as sacrebleu takes them: stream i holds reference i of every text, ``None`` where there are fewer."""
    if not references or not all(references):
        raise EmptyDataError("BLEU and chrF need a text and at least one reference for each prompt; there are none")
    most = max(map(len, references))
    return [[own[i] if i < len(own) else None for own in references] for i in range(most)]


def _package(name: str) -> Any:
    """A package of the extra ``train``, imported when it is first needed."""
    package = name.partition(".")[0]
    with needing("this metric", package, "train", distribution="scikit-learn" if package == "sklearn" else ""):
        return import_module(name)
