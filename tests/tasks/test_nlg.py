"""NIST, ROUGE-L and CIDEr against cases worked by hand."""

from __future__ import annotations

import math

import pytest

from duallora.tasks import nlg


def test_nist_worked_by_hand():
    """References "a b c d" and "a b": 6 unigrams (a 2, b 2, c 1, d 1), bigrams ab 2, bc 1, cd 1; hypothesis "a b c"."""
    # information: a log2(6/2), b log2(6/2), c log2(6/1); ab log2(2/2) = 0, bc log2(2/1); abc log2(count ab / abc) = 1
    unigrams = (2 * math.log2(3) + math.log2(6)) / 3
    bigrams = (0 + 1) / 2
    trigrams = 1 / 1
    # orders 4 and 5 have no n-gram in the hypothesis; lengths: 3 against the mean 3, so no penalty
    expected = unigrams + bigrams + trigrams
    assert nlg.nist(["a b c"], [["a b c d", "a b"]]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "references", "expected"),
    [
        ("a b c d e f", ["a b c d e f"], math.log2(6)),
        # The length factor is one half at two thirds of the reference.
        ("a b c d", ["a b c d e f"], 0.5 * math.log2(6)),
        # 2 words against references of 4 and 2, mean 3: ratio 2/3, factor 1/2; each word's count is 2 of 6.
        ("a b", ["a b x y", "a b"], 0.5 * math.log2(3)),
        # "a" thrice, at most twice in one reference: two hits of log2(5/3) over three words; mean reference length 2.5.
        ("A a a", ["a a", "a b c"], 2 * math.log2(5 / 3) / 3),
    ],
)
def test_nist_weighs_the_length_by_the_mean_clips_by_the_best_reference_and_ignores_case(text, references, expected):
    assert nlg.nist([text], [references], order=1) == pytest.approx(expected)


def test_rouge_takes_precision_and_recall_from_different_references_and_needs_order():
    # against "a b c d": LCS a b = 2, P 2/3, R 2/4; against "b": LCS 1, P 1/3, R 1/1; best P 2/3 and best R 1
    precision, recall, beta = 2 / 3, 1.0, 1.2
    expected = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert nlg.rouge_l(["a x b", "zzz"], [["a b c d", "b"], ["y"]]) == pytest.approx(50 * expected)
    assert nlg.rouge_l(["d c b a"], [["a b c d"]]) == pytest.approx(25.0)  # one word in common order, P = R = 1/4


def test_cider_worked_by_hand():
    """Two rows; row 1 hypothesis "a b" against "a b" and "a c"; row 2 right. Only orders 1 and 2 have n-grams."""
    # df: a 1 (row 1), b 1, c 1, x 1, y 1, z 1: every idf log 2 and it cancels in the cosines.
    # row 1, reference "a b": orders 1 and 2 both 1. Reference "a c": order 1: min(a)a / (norms) = 1/2; order 2: 0.
    # lengths in bigrams are equal, so the length factor is 1. The mean over four orders:
    first = 10 * ((1 + 1) / 4 + (1 / 2) / 4) / 2
    second = 10 * (1 + 1 + 1) / 4  # "x y z": orders 1 to 3
    assert nlg.cider(["a b", "x y z"], [["a b", "a c"], ["x y z"]]) == pytest.approx((first + second) / 2)


def test_cider_weighs_rare_words_clips_repeats_and_discounts_length():
    # three rows; "the" is in every row: idf log(3/3) = 0, so it gives nothing
    references = [["the cat"], ["the dog"], ["the bird"]]
    assert nlg.cider(["the", "the", "the"], references) == 0.0
    # row 1 "cat cat": order 1: min(2, 1) * 1 / (2 * 1) = 1/2, length 1 bigram against 1; order 2: cat-cat not shared
    assert nlg.cider(["cat cat", "the", "the"], references) == pytest.approx(10 * (1 / 2) / 4 / 3)
    # "cat" alone: cosine 1, zero bigrams against one: exp(-1/72)
    assert nlg.cider(["cat", "the", "the"], references) == pytest.approx(10 * math.exp(-1 / 72) / 4 / 3)


def test_tokens_follow_the_penn_treebank_without_punctuation():
    cases = {
        "It's family-friendly, isn't it?": ["it", "'s", "family-friendly", "is", "n't", "it"],
        'The "Eagle" (3.5 stars; £20-25)...': ["the", "eagle", "3.5", "stars", "£", "20-25"],
        "isn 't , really .": ["isn", "'t", "really"],
        "5-star café, 1,000 at 10:30": ["5-star", "café", "1,000", "at", "10:30"],
        "city center.Next 'quoted'": ["city", "center.next", "quoted"],
        "": [],
    }
    for text, tokens in cases.items():
        assert nlg.ptb_tokens(text) == tokens, text


def test_nothing_generated_scores_zero_and_does_not_divide_by_it():
    for score in (nlg.nist, nlg.rouge_l, nlg.cider):
        assert score([""], [["a b"]]) == 0.0
        assert score([], []) == 0.0
