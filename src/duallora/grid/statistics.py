"""How sure a comparison is: paired bootstrap over test examples, Student's t over seeds.

The metric of a method is the mean of its values over S seeds, each scored on the same n test examples. Two things could
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

What a resample costs is the `Metric`'s to say: where it has to be called for each, there are fewer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from duallora.errors import DataError
from duallora.tasks import Example
from duallora.tasks.metrics import Metric

ROUNDS = 10_000
ROUNDS_SLOW = 300  # of a metric that is called for each resample; see `slow_rounds`
LEVEL = 0.95
APART = 0.01  # level of the test that finds a method whose spread over seeds is of another kind


class Sample(NamedTuple):
    """Values of S runs of one method on one test set."""

    values: np.ndarray
    """On the test set, [S]."""
    resampled: np.ndarray
    """On each resampled test set, [R, S]; row b of every method and seed is the same resample."""

    def of(self, columns: Sequence[int]) -> Sample:
        """Of some of the runs."""
        return Sample(self.values[columns], self.resampled[:, columns])


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
    metric: Metric, runs: Sequence[Sequence[Any]], examples: Sequence[Example], *, rounds: int = ROUNDS, seed: int = 0
) -> Sample:
    """``metric`` of ``runs`` (predictions, a sequence each seed) on ``examples`` and on ``rounds`` resamples of them.

    Equal ``seed``, ``rounds`` and number of examples give equal resamples, so two methods resampled apart are paired.

    Raises:
        DataError: no run, no example, or a run that does not have one prediction for each example.
    """
    if not runs or not len(examples):
        raise DataError(f"{len(runs)} runs on {len(examples)} examples: a bootstrap needs at least one of each")
    for predictions in runs:
        if len(predictions) != len(examples):
            raise DataError(f"{len(predictions)} predictions for {len(examples)} examples: expected one each")
    values = np.array([metric.value(predictions, examples) for predictions in runs])
    return Sample(values, metric.resample(runs, examples, rounds=rounds, seed=seed))


def slow_rounds(comparisons: int) -> int:
    """Resamples of a metric that is called for each, so that Holm's correction can still find a difference.

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
    return Sample(one.values - other.values, one.resampled - other.resampled)


def pool(values: np.ndarray, *, differences: bool) -> Pool | None:
    """The spread over seeds of methods that ran on the same seeds: ``values`` [methods, S]. None with one seed.

    Of ``differences`` between two methods it is sqrt(2) times the residual that methods and seeds leave (what a seed
    does to all alike cancels), else the spread within methods.
    """
    methods, seeds = values.shape
    if seeds < 2 or (differences and methods < 2):
        return None
    centered = values - values.mean(axis=1, keepdims=True)
    if not differences:
        degrees = methods * (seeds - 1)
        return Pool(math.sqrt((centered**2).sum() / degrees), degrees)
    degrees = (methods - 1) * (seeds - 1)
    residual = centered - centered.mean(axis=0, keepdims=True)
    return Pool(math.sqrt(2 * (residual**2).sum() / degrees), degrees)


def outlying(values: np.ndarray) -> list[int]:
    """The methods of ``values`` [methods, S] whose spread over seeds is too large to be pooled with the others'.

    Cochran's test for an outlying variance, again on those that are left until it finds none (ISO 5725-2, 7.3.3).
    """
    seeds, left, found = values.shape[1], list(range(len(values))), []
    variances = values.var(axis=1, ddof=min(1, seeds - 1))
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
    seeds = len(sample.values)
    shift = sample.resampled.mean(axis=1) - sample.values.mean()
    if seeds == 1 and pooled is None:
        return sample.values.mean() + shift
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
        spread = max(sample.values.std(ddof=1), sd, math.sqrt(own - shared)) / math.sqrt(seeds)
    student = np.random.default_rng([seed, seeds]).standard_t(degrees, size=len(shift))
    return sample.values.mean() + share * shift + student * spread


def estimate(sample: Sample, pooled: Pool | None = None, *, seed: int = 0) -> Estimate:
    """Mean over seeds, standard deviation over seeds, 95 % percentile intervals, p-value."""
    return summary(sample.values, draws(sample, pooled, seed=seed), sample.resampled.mean(axis=1))


def mean_of(samples: Sequence[Sample], pools: Sequence[Pool | None]) -> Estimate:
    """The unweighted mean over tasks (a table's last column), whose examples and seeds vary independently.

    Each task must have been resampled with a ``seed`` of its own: test sets of one size would else move together.
    ``sd`` is that of the seeds' means over tasks; with different numbers of seeds there is none.
    """
    rounds = min(len(sample.resampled) for sample in samples)
    samples = [Sample(sample.values, sample.resampled[:rounds]) for sample in samples]
    drawn = [draws(*both, seed=seed) for seed, both in enumerate(zip(samples, pools, strict=True))]
    total = np.mean(drawn, axis=0)
    models = np.mean([sample.resampled.mean(axis=1) for sample in samples], axis=0)
    alike = len({len(sample.values) for sample in samples}) == 1
    values = np.mean([sample.values if alike else [sample.values.mean()] for sample in samples], axis=0)
    return summary(values, total, models)


def summary(values: np.ndarray, total: np.ndarray, models: np.ndarray) -> Estimate:
    """The `Estimate` of ``values`` [S] from plausible values of their mean (``total``, ``models``: [R])."""
    below, above = np.count_nonzero(total <= 0), np.count_nonzero(total >= 0)
    return Estimate(
        mean=float(values.mean()),
        sd=float(values.std(ddof=1)) if len(values) > 1 else None,
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
