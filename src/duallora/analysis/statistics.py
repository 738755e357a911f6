"""How sure a comparison is: paired bootstrap over test examples, Student's t over seeds.

A figure of a method is the mean of its figure over S seeds, each scored on the same n test examples. Two things could
have come out otherwise, and each has its own spread:

    examples   n are a sample: resample them, the same draw for every method and seed (hence *paired*)
    seeds      S are a sample: S = 3 is too few to resample (an interval of resampled triples covers 75 % of what it
               promises 95 % for), so the mean's error is s / sqrt(S) times Student's t

With three seeds of its own a method's s is poorly known (t has 2 degrees of freedom), so methods on the same seeds
lend each other theirs: s is the pooled one (`pool`), or the method's own where that is larger, with the degrees of
freedom of the pool. A method whose spread is of another kind (`outlying`) neither lends nor borrows.

A difference between the seeds' models that comes from single examples shows in both parts, so only that part of the
bootstrap which the seeds share (their covariance) is added to the t: the model of Obuchowski and Rockette (1995, for
several readers of the same cases; degrees of freedom after Hillis 2007), with seeds for readers.

    draw = mean + sqrt(cov / var) (bootstrap mean - mean) + t max(s, e) / sqrt(S)

e^2 is the variance between seeds which single examples alone would give. Seeds can lie closer together than that by
luck; without the floor they would then seem to say more than their own test sets do.

Figures that are functions of sums over examples (accuracy, correlations, F1, BLEU) cost one matrix product for all
resamples; any other function of (predictions, gold) is called for each, with fewer resamples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from scipy import stats

from duallora.errors import DataError

ROUNDS = 10_000
ROUNDS_SLOW = 300  # of a function that is called for each resample; see `slow_rounds`
LEVEL = 0.95
APART = 0.01  # level of the test that finds a method whose spread over seeds is of another kind
BLOCK = 500  # resamples at once: bounds the memory of the counts, [BLOCK, n]

Figure = Callable[[Sequence[Any], Sequence[Any]], float]


class Score(NamedTuple):
    """A figure that depends on the examples through sums alone."""

    terms: Callable[[Sequence[Any], Sequence[Any]], np.ndarray]
    """(predictions, gold) -> what is summed, [n, m]."""
    figure: Callable[[np.ndarray], np.ndarray]
    """sums [..., m] -> figures [...]."""


class Sample(NamedTuple):
    """Figures of S runs of one method on one test set."""

    figures: np.ndarray
    """On the test set, [S]."""
    resampled: np.ndarray
    """On each resampled test set, [R, S]; row b of every method and seed is the same resample."""


class Pool(NamedTuple):
    """The standard deviation over seeds that several methods share, and its degrees of freedom."""

    sd: float
    degrees: int


class Estimate(NamedTuple):
    """A mean over seeds, or a difference of two, and how far it may be off.

    ``interval`` allows for other test examples and other seeds; ``interval_of_models`` for other test examples alone:
    it speaks of the models that were trained, not of the method. ``p`` is two-sided, for a true value of 0.
    ``sd`` is over seeds (None with one seed, where ``interval`` knows of seeds only what a pool says).
    """

    mean: float
    sd: float | None
    interval: tuple[float, float]
    interval_of_models: tuple[float, float]
    p: float


def resample(
    score: Score | Figure, runs: Sequence[Sequence[Any]], gold: Sequence[Any], *, rounds: int = ROUNDS, seed: int = 0
) -> Sample:
    """The figures of ``runs`` (predictions, a sequence each seed) on ``gold`` and on ``rounds`` resamples of its rows.

    Equal ``seed``, ``rounds`` and number of examples give equal resamples, so two methods resampled apart are paired.

    Raises:
        DataError: no run, no example, or a run that does not have one prediction for each example.
    """
    if not runs or not len(gold):
        raise DataError(f"{len(runs)} runs on {len(gold)} examples: a bootstrap needs at least one of each")
    for predictions in runs:
        if len(predictions) != len(gold):
            raise DataError(f"{len(predictions)} predictions for {len(gold)} examples: expected one each")
    random = np.random.default_rng(seed)
    if not isinstance(score, Score):
        return _resample_slowly(score, runs, gold, rounds, random)
    terms = np.stack([score.terms(predictions, gold) for predictions in runs], axis=1)  # [n, S, m]
    n, flat = len(gold), terms.reshape(len(gold), -1)
    drawn = []
    for start in range(0, rounds, BLOCK):
        counts = random.multinomial(n, np.full(n, 1 / n), size=min(BLOCK, rounds - start))
        drawn.append((counts.astype(float) @ flat).reshape(-1, *terms.shape[1:]))
    return Sample(score.figure(terms.sum(axis=0)), score.figure(np.concatenate(drawn)))


def _resample_slowly(figure: Figure, runs, gold, rounds: int, random: np.random.Generator) -> Sample:
    n = len(gold)
    rows = []
    for _ in range(rounds):
        chosen = random.integers(n, size=n).tolist()
        there = [gold[i] for i in chosen]
        rows.append([figure([predictions[i] for i in chosen], there) for predictions in runs])
    return Sample(np.array([figure(predictions, gold) for predictions in runs]), np.array(rows))


def slow_rounds(comparisons: int) -> int:
    """Resamples of a function that is called for each, so that Holm's correction can still find a difference.

    With R of them no p-value is below 2 / (R + 1), and the smallest is multiplied by ``comparisons``: 300 could never
    show anything among eight.
    """
    return max(ROUNDS_SLOW, 80 * comparisons)


def difference(one: Sample, other: Sample) -> Sample:
    """``one - other``, seed by seed and resample by resample: the seeds must be the same, in the same order.

    Raises:
        DataError: different numbers of seeds or resamples.
    """
    if one.resampled.shape != other.resampled.shape:
        raise DataError(f"{one.resampled.shape} against {other.resampled.shape} resamples and seeds: expected the same")
    return Sample(one.figures - other.figures, one.resampled - other.resampled)


def pool(figures: np.ndarray, *, differences: bool) -> Pool | None:
    """The spread over seeds of methods that ran on the same seeds: ``figures`` [methods, S]. None with one seed.

    Of ``differences`` between two methods it is sqrt(2) times the residual that methods and seeds leave (what a seed
    does to all alike cancels), else the spread within methods.
    """
    methods, seeds = figures.shape
    if seeds < 2 or (differences and methods < 2):
        return None
    centred = figures - figures.mean(axis=1, keepdims=True)
    if not differences:
        degrees = methods * (seeds - 1)
        return Pool(math.sqrt((centred**2).sum() / degrees), degrees)
    degrees = (methods - 1) * (seeds - 1)
    residual = centred - centred.mean(axis=0, keepdims=True)
    return Pool(math.sqrt(2 * (residual**2).sum() / degrees), degrees)


def outlying(figures: np.ndarray) -> list[int]:
    """The methods of ``figures`` [methods, S] whose spread over seeds is too large to be pooled with the others'.

    Cochran's test for an outlying variance, again on those that are left until it finds none (ISO 5725-2, 7.3.3).
    """
    seeds, left, found = figures.shape[1], list(range(len(figures))), []
    variances = figures.var(axis=1, ddof=min(1, seeds - 1))
    while len(left) > 1 and seeds > 1:
        widest = max(left, key=lambda index: variances[index])
        others = len(left) - 1
        bound = 1 / (1 + others / stats.f.isf(APART / len(left), seeds - 1, others * (seeds - 1)))
        if variances[widest] <= bound * variances[left].sum():
            break
        found.append(widest)
        left.remove(widest)
    return found


def draws(sample: Sample, pooled: Pool | None = None, *, seed: int = 0) -> np.ndarray:
    """Plausible values [R] of the mean over all seeds and examples there might have been: the formula above.

    Without ``pooled``, s is the sample's own, with S - 1 degrees of freedom; of one seed there is none, and the draws
    are those of the examples.
    """
    seeds = len(sample.figures)
    shift = sample.resampled.mean(axis=1) - sample.figures.mean()
    if seeds == 1 and pooled is None:
        return sample.figures.mean() + shift
    sd, degrees = pooled or Pool(0.0, seeds - 1)
    if seeds == 1:  # what the seeds share cannot be told from one of them: all of the bootstrap counts
        share, spread = 1.0, sd
    else:
        covariance = np.cov(sample.resampled, rowvar=False)
        own = covariance.trace() / seeds
        shared = (covariance.sum() - covariance.trace()) / (seeds * (seeds - 1))
        shared = min(max(0.0, shared), own)
        variance = covariance.mean()
        share = math.sqrt(min(1.0, shared / variance)) if variance > 0 else 0.0
        spread = max(sample.figures.std(ddof=1), sd, math.sqrt(own - shared)) / math.sqrt(seeds)
    student = np.random.default_rng([seed, seeds]).standard_t(degrees, size=len(shift))
    return sample.figures.mean() + share * shift + student * spread


def estimate(sample: Sample, pooled: Pool | None = None, *, seed: int = 0) -> Estimate:
    """Mean over seeds, standard deviation over seeds, 95 % percentile intervals, p-value."""
    return summary(sample.figures, draws(sample, pooled, seed=seed), sample.resampled.mean(axis=1))


def mean_of(samples: Sequence[Sample], pools: Sequence[Pool | None], *, seed: int = 0) -> Estimate:
    """The unweighted mean over tasks (a table's last column), whose examples and seeds vary independently.

    Each task must have been resampled with a ``seed`` of its own: test sets of one size would else move together.
    ``sd`` is that of the seeds' means over tasks; with different numbers of seeds there is none.
    """
    rounds = min(len(sample.resampled) for sample in samples)
    samples = [Sample(sample.figures, sample.resampled[:rounds]) for sample in samples]
    total = np.mean(
        [
            draws(sample, pooled, seed=seed + index)
            for index, (sample, pooled) in enumerate(zip(samples, pools, strict=True))
        ],
        axis=0,
    )
    models = np.mean([sample.resampled.mean(axis=1) for sample in samples], axis=0)
    if len({len(sample.figures) for sample in samples}) == 1:
        figures = np.mean([sample.figures for sample in samples], axis=0)
    else:
        figures = np.array([np.mean([sample.figures.mean() for sample in samples])])
    return summary(figures, total, models)


def summary(figures: np.ndarray, total: np.ndarray, models: np.ndarray) -> Estimate:
    """The `Estimate` of ``figures`` [S] from plausible values of their mean (``total``, ``models``: [R])."""
    below, above = np.count_nonzero(total <= 0), np.count_nonzero(total >= 0)
    return Estimate(
        mean=float(figures.mean()),
        sd=float(figures.std(ddof=1)) if len(figures) > 1 else None,
        interval=_percentiles(total),
        interval_of_models=_percentiles(models),
        p=float(min(1.0, 2.0 * (1 + min(below, above)) / (1 + len(total)))),  # never 0: R draws cannot show that
    )


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: the chance of one false "better" among all of them stays below the level."""
    adjusted = [0.0] * len(p_values)
    worst = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def verdict(difference: float, p: float) -> str:
    """Is the first better than the second, on these test sets and with these seeds? "yes", "no" or "cannot be said"."""
    if p > 1 - LEVEL:
        return "cannot be said"
    return "yes" if difference > 0 else "no"


def _hits(predictions: Sequence[Any], gold: Sequence[Any]) -> np.ndarray:
    """Equal to the label, or to the first reference."""
    truth = [one[0] if isinstance(one, (list, tuple)) else one for one in gold]
    return np.array([[guess == right, 1] for guess, right in zip(predictions, truth, strict=True)], dtype=float)


def _hits_by_group(predictions: Sequence[Any], gold: Sequence[tuple[str, Any]]) -> np.ndarray:
    """Hits and rows of each group in turn; ``gold`` names the group of each row."""
    groups = np.array([group for group, _ in gold])
    member = groups[:, None] == np.unique(groups)  # [n, groups]
    hits = _hits(predictions, [truth for _, truth in gold])[:, :1]
    return np.concatenate([member * hits, member], axis=1)


def _average(sums: np.ndarray) -> np.ndarray:
    """The plain mean over groups of the share of hits; a group that a resample has lost is left out."""
    hits, rows = np.split(sums, 2, axis=-1)
    return 100.0 * (hits / np.maximum(1.0, rows)).sum(axis=-1) / np.count_nonzero(rows, axis=-1)


def _exact(predictions: Sequence[str], gold: Sequence[Sequence[str]]) -> np.ndarray:
    pairs = zip(predictions, gold, strict=True)
    return np.array([[text.strip() in {o.strip() for o in own}, 1] for text, own in pairs], dtype=float)


def _share(sums: np.ndarray) -> np.ndarray:
    return 100.0 * sums[..., 0] / sums[..., 1]


def _f1_terms(predictions: Sequence[Any], gold: Sequence[Any]) -> np.ndarray:
    pairs = zip(predictions, gold, strict=True)
    return np.array([[guess == right == 1, (guess == 1) + (right == 1)] for guess, right in pairs], dtype=float)


def _f1(sums: np.ndarray) -> np.ndarray:
    return 200.0 * sums[..., 0] / np.maximum(1.0, sums[..., 1])


def _moments(predictions: Sequence[float], gold: Sequence[float]) -> np.ndarray:
    """1, x, y, x^2, y^2, xy of the standardised columns; a constant column becomes zeros."""
    x, y = (_standard(np.asarray(values, dtype=float)) for values in (predictions, gold))
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _standard(values: np.ndarray) -> np.ndarray:
    return np.zeros_like(values) if np.ptp(values) == 0 else (values - values.mean()) / values.std()


def _correlation(sums: np.ndarray) -> np.ndarray:
    count = sums[..., 0]
    x, y, xx, yy, xy = (sums[..., index] / count for index in range(1, 6))
    variances = np.stack([xx - x * x, yy - y * y])
    # The columns have variance 1, so a resample below 1e-12 is constant up to rounding; its figure is 0, as GLUE has it.
    defined = (variances > 1e-12).all(axis=0)
    scale = np.sqrt(np.where(defined, variances.prod(axis=0), 1.0))
    return np.where(defined, 100.0 * (xy - x * y) / scale, 0.0)


def _bleu_terms(predictions: Sequence[str], gold: Sequence[Sequence[str]], lowercase: bool) -> np.ndarray:
    scorer = BLEU(lowercase=lowercase, tokenize="13a", force=True)
    found = [
        scorer.corpus_score([text], [[own] for own in others]) for text, others in zip(predictions, gold, strict=True)
    ]
    return np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found], dtype=float)


def _bleu(sums: np.ndarray) -> np.ndarray:
    def one(row: np.ndarray) -> float:
        counts = row.round().astype(int).tolist()
        return BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp").score

    return np.apply_along_axis(one, -1, sums)


def _tokens(answers: Sequence[tuple[float, int]], gold: Sequence[Any]) -> np.ndarray:
    """Of answers as `duallora.train.evaluate.Answer` has them."""
    return np.array([[-log_likelihood, tokens] for log_likelihood, tokens in answers], dtype=float)


def _per_token(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


# By the names the tasks give their figures. Tasks differ in whether BLEU reads capitals: `matching` finds out.
SCORES: dict[str, tuple[Score, ...]] = {
    "accuracy": (Score(_hits, _share),),
    "average": (Score(_hits_by_group, _average),),
    "exact_match": (Score(_exact, _share),),
    "f1": (Score(_f1_terms, _f1),),
    "matthews": (Score(_moments, _correlation),),
    "pearson": (Score(_moments, _correlation),),
    "loss": (Score(_tokens, _per_token),),
    "bleu": tuple(Score(functools.partial(_bleu_terms, lowercase=case), _bleu) for case in (True, False)),
}


def matching(metric: str, predictions: Sequence[Any], gold: Sequence[Any], recorded: float) -> Score | None:
    """The score called ``metric`` that gives the ``recorded`` figure for these predictions; None where none does.

    ``gold`` holds labels, lists of references or, for the average over parts of a task, (part, label or references). For
    the loss ``predictions`` are (log-likelihood, tokens) of the right answers.
    """
    for score in SCORES.get(metric, ()):
        try:
            found = float(score.figure(score.terms(predictions, gold).sum(axis=0)))
        except (TypeError, ValueError, AttributeError):  # of another kind: texts where numbers are expected
            continue
        if math.isclose(found, recorded, rel_tol=1e-6, abs_tol=1e-6):
            return score
    return None
