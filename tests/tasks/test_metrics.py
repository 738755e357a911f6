"""Figures of the classification, regression and generation tasks, worked by hand."""

from __future__ import annotations

import math

import pytest
import sacrebleu

from duallora.tasks import Example, metrics


def labelled(*labels) -> list[Example]:
    return [Example(texts=("t",), label=label) for label in labels]


def test_matthews_is_the_confusion_matrix_formula():
    gold, guess = [1, 1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 1, 0]
    tp, tn, fp, fn = 3, 2, 1, 1
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.matthews(guess, gold) == pytest.approx(100 * expected)
    assert metrics.matthews([1, 1, 1], [1, 0, 1]) == 0.0  # one class only: nothing learnt


def test_f1_counts_the_positive_class():
    gold, guess = [1, 1, 0, 0, 0], [1, 0, 1, 1, 0]  # tp 1, fp 2, fn 1
    assert metrics.f1(guess, gold) == pytest.approx(100 * 2 * 1 / (2 * 1 + 2 + 1))
    assert metrics.f1([0], [0]) == 0.0


def test_classification_figures():
    figures = metrics.classification([0, 2, 2, 1], labelled(0, 2, 1, 1))
    assert figures["accuracy"] == 75.0
    assert figures["macro_f1"] == pytest.approx(100 * (1 + 2 / 3 + 2 / 3) / 3)


def test_regression_figures_and_constant_predictions():
    figures = metrics.regression([1.0, 2.0, 9.0], labelled(1.0, 2.0, 3.0))
    assert figures["spearman"] == pytest.approx(100)
    assert figures["pearson"] == pytest.approx(100 * 8 / math.sqrt(38 * 2))  # about the means: (-3, -2, 5), (-1, 0, 1)
    assert figures["rmse"] == pytest.approx(math.sqrt(12))
    assert metrics.regression([1.0, 1.0, 1.0], labelled(1.0, 2.0, 3.0))["pearson"] == 0.0


def test_bleu_takes_rows_with_different_numbers_of_references():
    texts = ["the cat sat on the mat", "a dog barked loudly at night"]
    references = [["the cat sat on a mat", "a cat sat on the mat"], ["a dog barked at night loudly"]]
    # By hand: row 1 has 5 of 6 unigrams ("the" occurs once in either reference), 5 of 5 bigrams, 4 of 4 trigrams and
    # 3 of 3 4-grams in one reference or the other; row 2 has 6 of 6, 3 of 5, 1 of 4 and 0 of 3.
    precisions = [11 / 12, 8 / 10, 5 / 8, 3 / 6]
    expected = 100 * math.exp(sum(map(math.log, precisions)) / 4)
    assert metrics.bleu(texts, references) == pytest.approx(expected)
    streams = [[own[0] for own in references], [own[-1] for own in references]]
    assert metrics.bleu(texts, references) == pytest.approx(sacrebleu.corpus_bleu(texts, streams).score)
    shouted = [text.upper() for text in texts]
    assert metrics.bleu(shouted, references, lowercase=True) == pytest.approx(expected)
    assert metrics.bleu(shouted, references) < 5
    assert metrics.bleu([], []) == 0.0


def test_generation_figures_strip_both_sides():
    rows = [Example(answer="a b", references=("a b ", "c")), Example(answer="d", references=("d",))]
    assert metrics.generation([" c\n", "e"], rows)["exact_match"] == 50.0
