"""Figures from predictions and examples, one function per kind of task.

Shares, accuracies, correlations, BLEU and F1 are in percent, as the paper's tables print them. A figure that is not
defined (a correlation with a constant) is 0, as GLUE's scorers have it: such a model has learnt nothing. scipy and
sacrebleu are imported where a figure needs them: most runs never do, and their import costs each start of a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from duallora.tasks.example import Example


def classification(predictions: Sequence[int], examples: Sequence[Example]) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur (macro)."""
    gold = [example.label for example in examples]
    classes = {*gold, *predictions}
    return {
        "accuracy": accuracy(predictions, gold),
        "macro_f1": sum(f1(predictions, gold, positive=name) for name in classes) / max(1, len(classes)),
    }


def regression(predictions: Sequence[float], examples: Sequence[Example]) -> dict[str, float]:
    """Pearson and Spearman correlation (percent) and the root mean square error (on the targets' own scale)."""
    from scipy import stats

    gold = np.array([example.label for example in examples], dtype=float)
    guess = np.asarray(predictions, dtype=float)
    return {
        "pearson": correlation(guess, gold),
        "spearman": correlation(stats.rankdata(guess), stats.rankdata(gold)),
        "rmse": float(np.sqrt(np.mean((guess - gold) ** 2))) if len(gold) else 0.0,
    }


def generation(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """BLEU over all references and the share of predictions equal to one of them (both stripped)."""
    references = [example.references for example in examples]
    exact = [
        text.strip() in {other.strip() for other in own} for text, own in zip(predictions, references, strict=True)
    ]
    return {"bleu": bleu(predictions, references), "exact_match": percent(exact)}


def accuracy(predictions: Sequence, gold: Sequence) -> float:
    """Share of equal pairs, in percent."""
    return percent([guess == truth for guess, truth in zip(predictions, gold, strict=True)])


def f1(predictions: Sequence, gold: Sequence, *, positive=1) -> float:
    """Harmonic mean of precision and recall of the class ``positive``, in percent."""
    pairs = list(zip(predictions, gold, strict=True))
    hits = sum(guess == truth == positive for guess, truth in pairs)
    named = sum((guess == positive) + (truth == positive) for guess, truth in pairs)
    return 200.0 * hits / named if named else 0.0


def matthews(predictions: Sequence[int], gold: Sequence[int]) -> float:
    """Matthews correlation of two binary vectors (0/1), in percent: their Pearson correlation."""
    return correlation(np.asarray(predictions, dtype=float), np.asarray(gold, dtype=float))


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation in percent; 0 where one side is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return 100.0 * float(np.corrcoef(x, y)[0, 1])


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], *, lowercase: bool = False) -> float:
    """Corpus BLEU-4 in percent (sacrebleu, tokenizer 13a, exponential smoothing), rows with any number of references."""
    if not predictions:
        return 0.0
    import sacrebleu

    most = max(len(own) for own in references)
    # sacrebleu wants one list per reference number; None marks "no such reference".
    streams: list[Any] = [[own[index] if index < len(own) else None for own in references] for index in range(most)]
    return sacrebleu.corpus_bleu(list(predictions), streams, lowercase=lowercase, tokenize="13a", force=True).score


def percent(hits: Sequence[bool]) -> float:
    """Share of true values, in percent; 0 of nothing is 0."""
    return 100.0 * math.fsum(hits) / len(hits) if hits else 0.0
