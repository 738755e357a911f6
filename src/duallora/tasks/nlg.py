"""NIST, ROUGE-L and CIDEr with several references, as the E2E challenge's scorer computes them, without Java.

NIST is the scorer's own Python variant (its ``-p`` option, which LoRA's scripts and so the paper use) or, differing in
the second digit, the Perl script it runs by default. ROUGE-L and CIDEr follow the COCO caption code behind the scorer,
down to its quirks, each noted below; its Stanford tokenizer is replaced by `ptb_tokens` where `official` has no Java to
run it. METEOR is defined by a Java program: `official`.

References: Doddington 2002 (NIST); Lin 2004 (ROUGE-L); Vedantam et al. 2015, arXiv 1411.5726 (CIDEr); the scorer is
github.com/tuetschek/e2e-metrics.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

NGram = tuple[str, ...]


def nist(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, order: int = 5, perl: bool = False
) -> float:
    """Corpus NIST over n-grams up to ``order``; mteval-13a tokens, lower case. 0 and up, no fixed top.

    A hit (clipped by the most any one reference has) weighs log2(count of its head / its count), counted over all
    references. The brevity factor is 0.5 at 2/3 of the references' mean length.

    perl: as the Perl script mteval-v13a-sig.pl. It takes the mean length over as many references as the row with most
        has, as if the others had empty ones; the head "0" for none; and a text shorter than n for one without n-grams.
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    hits: list[Counter[NGram]] = [Counter() for _ in range(order + 1)]
    counts: list[Counter[NGram]] = [Counter() for _ in range(order + 1)]
    produced = [0] * (order + 1)
    reference_length = 0.0
    most_references = max(map(len, references), default=1)
    for text, others in zip(predictions, references, strict=True):
        guess = tokenize(text).lower().split() or ([] if perl else [""])
        golds = [tokenize(other).lower().split() for other in others]
        for n in range(1, order + 1):
            most: Counter[NGram] = Counter()
            for gold in golds:
                own = Counter(_ngrams(gold, n))
                most |= own
                counts[n].update(own)  # "+=" would copy the whole count each time
            hits[n] += Counter(_ngrams(guess, n)) & most
            # Below 0 for a text shorter than n, as in the scorer.
            produced[n] += max(0, len(guess) - n + 1) if perl else len(guess) - n + 1
        counts[0][()] += sum(map(len, golds))
        reference_length += sum(map(len, golds)) / (most_references if perl else len(golds))
    gain = 0.0
    for n in range(1, order + 1):
        weight = 0.0
        for gram, count in hits[n].items():
            head = counts[0][()] if perl and gram[:-1] == ("0",) else counts[n - 1][gram[:-1]]
            weight += count * math.log2(head / counts[n][gram])
        gain += weight / max(1, produced[n])
    ratio = produced[1] / reference_length if reference_length else 0.0
    if ratio <= 0:
        return 0.0
    beta = math.log(0.5) / math.log(1.5) ** 2
    return gain * math.exp(beta * math.log(min(1.0, ratio)) ** 2)


Tokenize = Callable[[str], list[str]]


def rouge_l(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: Tokenize | None = None
) -> float:
    """Mean over rows of the ROUGE-L F-score (beta 1.2), in percent; ``tokenize`` is `ptb_tokens` unless given.

    Precision and recall are each the best over the references, not those of one best reference.
    """
    tokenize = tokenize or ptb_tokens
    total = 0.0
    for text, others in zip(predictions, references, strict=True):
        guess = tokenize(text)
        precision = recall = 0.0
        for other in others:
            gold = tokenize(other)
            common = _longest_common_subsequence(guess, gold)
            precision = max(precision, common / max(1, len(guess)))
            recall = max(recall, common / max(1, len(gold)))
        if precision and recall:
            total += (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    return 100.0 * total / len(predictions) if predictions else 0.0


def cider(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: Tokenize | None = None
) -> float:
    """Mean over rows of CIDEr, 0 to 10: tf-idf cosine of 1- to 4-grams with clipping and a length factor.

    The document frequency of an n-gram is the number of rows one of whose references has it. ``tokenize`` is
    `ptb_tokens` unless given.
    """
    tokenize, order, sigma = tokenize or ptb_tokens, 4, 6.0
    golds = [[_all_ngrams(tokenize(other), order) for other in others] for others in references]
    frequency: Counter[NGram] = Counter()
    for own in golds:
        frequency.update({gram for gold in own for gram in gold})
    rows = math.log(max(1, len(golds)))

    def vector(grams: Counter[NGram]) -> tuple[list[dict[NGram, float]], list[float], int]:
        parts: list[dict[NGram, float]] = [{} for _ in range(order)]
        for gram, count in grams.items():
            parts[len(gram) - 1][gram] = count * (rows - math.log(max(1, frequency[gram])))
        norms = [math.sqrt(math.fsum(value**2 for value in part.values())) for part in parts]
        # The COCO code takes the number of bigrams for the length.
        return parts, norms, sum(count for gram, count in grams.items() if len(gram) == 2)

    total = 0.0
    for text, own in zip(predictions, golds, strict=True):
        guess, guess_norms, guess_length = vector(_all_ngrams(tokenize(text), order))
        for gold in own:
            parts, norms, length = vector(gold)
            factor = math.exp(-((guess_length - length) ** 2) / (2 * sigma**2))
            for n in range(order):
                shared = sum(
                    min(value, parts[n].get(gram, 0.0)) * parts[n].get(gram, 0.0) for gram, value in guess[n].items()
                )
                if guess_norms[n] and norms[n]:
                    shared /= guess_norms[n] * norms[n]
                total += 10.0 * factor * shared / (order * len(own))
    return total / len(predictions) if predictions else 0.0


# Letters and digits with inner hyphens, dots and so on stay together, as in the Penn Treebank; else one symbol.
_PIECE = re.compile(
    r"[^\W_]+(?:[-/.&_][^\W_]+|(?<=\d)[,:](?=\d)[^\W_]+)*(?:'[^\W_]+)*|'(?:s|t|re|ve|ll|d|m)(?![^\W_])|\S"
)
_CLITIC = re.compile(r"(?<=.)(n't|'(?:s|re|ve|ll|d|m))$")
_PUNCTUATION = frozenset({"'", "`", "(", ")", "[", "]", "{", "}", ".", "?", "!", ",", ":", ";", "-", '"', "…"})


def ptb_tokens(text: str) -> list[str]:
    """Lower-case tokens close to the Stanford Penn Treebank tokenizer's, without the punctuation COCO drops."""
    tokens: list[str] = []
    for piece in _PIECE.findall(text.lower().replace("\u2019", "'")):
        parts = _CLITIC.split(piece) if "'" in piece else [piece]
        tokens += [part for part in parts if part and part not in _PUNCTUATION]
    return tokens


def _all_ngrams(tokens: Sequence[str], order: int) -> Counter[NGram]:
    return Counter(gram for n in range(1, order + 1) for gram in _ngrams(tokens, n))


def _ngrams(tokens: Sequence[str], n: int) -> Iterator[NGram]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    lengths = [0] * (len(b) + 1)
    for left in a:
        diagonal = 0
        for index, right in enumerate(b, 1):
            above = lengths[index]
            lengths[index] = diagonal + 1 if left == right else max(above, lengths[index - 1])
            diagonal = above
    return lengths[-1]
