"""Intervals cover what they promise, and equal scipy's where scipy has them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from duallora.errors import DataError
from duallora.grid import statistics
from duallora.grid.statistics import Sample, difference, draws, estimate, holm, mean_of, resample, verdict
from duallora.tasks import Example, metrics

ACCURACY, MATTHEWS, PEARSON = map(metrics.get, ("accuracy", "matthews", "pearson"))


def rows(labels):
    return [Example(label=label) for label in labels]


def two_way(random, n, seeds, *, seed_sd, example_sd, both_sd, rounds=400):
    """A Sample of means of Y[i, s] = seed + example + both, all Gaussian around 0, and of its resamples."""
    values = (
        random.normal(0, seed_sd, seeds) + random.normal(0, example_sd, (n, 1)) + random.normal(0, both_sd, (n, seeds))
    )
    counts = random.multinomial(n, np.full(n, 1 / n), size=rounds)
    return Sample(values.mean(axis=0), counts @ values / n)


@pytest.mark.parametrize(
    ("seed_sd", "example_sd", "both_sd", "at_most"),
    [
        (0.0, 1.0, 0.0, 0.98),  # the examples alone: as close to 95 % as a bootstrap of 60 comes
        (1.0, 0.0, 0.0, 0.98),  # the seeds alone
        (0.1, 1.0, 1.0, 1.0),  # all of it: never less than promised
        (0.0, 0.0, 1.0, 1.0),
    ],
)
def test_intervals_cover_the_truth_as_often_as_they_say(seed_sd, example_sd, both_sd, at_most):
    """In 600 made-up studies of 60 examples and 3 seeds, whose truth is 0."""
    random = np.random.default_rng(7)
    hits, resampled_seeds, repeats = 0, 0, 600
    for _ in range(repeats):
        sample = two_way(random, 60, 3, seed_sd=seed_sd, example_sd=example_sd, both_sd=both_sd)
        low, high = estimate(sample, seed=int(random.integers(1 << 30))).interval
        hits += low <= 0 <= high
        if seed_sd == 1.0:  # why the seeds are not resampled
            triples = sample.resampled[np.arange(400)[:, None], random.integers(3, size=(400, 3))].mean(axis=1)
            low, high = np.percentile(triples, [2.5, 97.5])
            resampled_seeds += low <= 0 <= high
    # Three standard errors of a share of 95 % in 600 are 2.7 points.
    assert 0.95 - 0.027 <= hits / repeats <= at_most
    assert resampled_seeds / repeats < 0.85


@pytest.mark.parametrize(("noisy", "between"), [(1.0, (0.94, 0.995)), (3.0, (0.82, 0.92))])
def test_methods_lend_each_other_their_spread_over_seeds(noisy, between):
    """Six methods, three seeds: narrower than each alone and still right, unless one is three times as noisy."""
    random = np.random.default_rng(9)
    hits, widths, alone, repeats = 0, [], [], 800
    for _ in range(repeats):
        values = random.normal(0, 1, (1, 3)) + random.normal(0, 1, (6, 3)) * np.array([1, noisy, 1, 1, 1, 1])[:, None]
        own = values[0] - values[1]
        sample = Sample(own, np.tile(own, (1500, 1)))
        shared = statistics.pool(values, differences=True)
        assert shared.degrees == 10
        low, high = estimate(sample, shared, seed=int(random.integers(1 << 30))).interval
        hits += low <= 0 <= high
        widths.append(high - low)
        alone.append(2 * 4.303 * stats.sem(own))
    assert between[0] <= hits / repeats <= between[1]
    assert np.mean(widths) < 0.75 * np.mean(alone)


def test_an_outlying_spread_is_cochrans():
    """His 1 % point for six variances of three values each is 0.7218 (table of ISO 5725-2)."""
    shape = np.array([-1.0, 0.0, 1.0]) + np.array([[70.0], [60.0], [50.0], [40.0], [30.0], [20.0]])
    for share, found in ((0.721, []), (0.7225, [4])):
        values = shape.copy()
        values[4] = 30 + (values[4] - 30) * np.sqrt(5 * share / (1 - share))
        assert statistics.outlying(values) == found
    values[4] = 30 + (values[4] - 30) * 3
    values[1] = 60 + (values[1] - 60) * 1000  # beside it the other does not show before it is gone
    assert statistics.outlying(values) == [1, 4]
    assert statistics.outlying(np.zeros((6, 3))) == []
    assert statistics.outlying(values[:, :1]) == []
    assert statistics.outlying(values[:1]) == []


@pytest.mark.parametrize(("noise", "found"), [(1.0, (0.0, 0.02)), (30.0, (0.95, 1.0))])
def test_a_method_of_another_spread_spoils_no_interval(noise, found):
    """The pair of two others is covered as promised, by no wider interval than without it; so are its own pairs."""
    random = np.random.default_rng(10)
    hits, apart, ratios, repeats = {0: 0, 2: 0}, 0, [], 600
    for _ in range(repeats):
        values = random.normal(0, 1, (1, 3)) + random.normal(0, 1, (6, 3)) * np.array([1, 1, noise, 1, 1, 1])[:, None]
        out = statistics.outlying(values)
        apart += out == [2]
        shared = statistics.pool(np.delete(values, out, axis=0), differences=True)
        for one in hits:
            own = values[one] - values[1]
            sample = Sample(own, np.tile(own, (1000, 1)))
            used = None if {one, 1} & set(out) else shared
            low, high = estimate(sample, used, seed=int(random.integers(1 << 30))).interval
            hits[one] += low <= 0 <= high
        ratios.append(shared.sd / statistics.pool(np.delete(values, 2, axis=0), differences=True).sd)
    assert found[0] <= apart / repeats <= found[1]
    assert min(hits.values()) / repeats >= 0.95 - 0.027
    assert np.median(ratios) == pytest.approx(1, abs=0.1)


def test_a_pool_is_the_residual_of_methods_and_seeds():
    """Against the textbook's sums of squares, and against the pair's own spread where there are two methods."""
    values = np.array([[70.0, 72.5, 71.0], [80.0, 81.0, 86.0], [60.5, 63.0, 61.0], [75.0, 75.5, 79.0]])
    pooled = statistics.pool(values, differences=True)
    total = ((values - values.mean()) ** 2).sum()
    methods, seeds = (number * ((values.mean(axis) - values.mean()) ** 2).sum() for number, axis in ((3, 1), (4, 0)))
    assert pooled == (pytest.approx(np.sqrt(2 * (total - methods - seeds) / 6)), 6)
    assert statistics.pool(values, differences=False) == (pytest.approx(np.sqrt(values.var(1, ddof=1).mean())), 8)
    two = statistics.pool(values[:2], differences=True)
    assert two == (pytest.approx((values[0] - values[1]).std(ddof=1)), 2)
    assert statistics.pool(values[:, :1], differences=True) is None
    assert statistics.pool(values[:1], differences=True) is None
    # A method noisier than the pool keeps its own spread.
    wild = Sample(np.array([0.0, 10.0, 20.0]), np.tile([0.0, 10.0, 20.0], (20_000, 1)))
    interval = estimate(wild, statistics.Pool(1.0, 10)).interval
    assert interval == pytest.approx(stats.t.interval(0.95, 10, loc=10, scale=10 / np.sqrt(3)), abs=0.6)


def test_one_seed_gives_the_percentile_bootstrap_of_scipy():
    random = np.random.default_rng(3)
    gold = random.integers(0, 2, 63).tolist()
    guess = [value if random.random() < 0.7 else 1 - value for value in gold]
    pairs = (np.array(guess), np.array(gold))

    def correlation(x, y):
        return 100 * np.corrcoef(x, y)[0, 1]

    found = estimate(resample(MATTHEWS, [guess], rows(gold)))
    known = stats.bootstrap(
        pairs, correlation, paired=True, vectorized=False, method="percentile",
        n_resamples=4000, rng=np.random.default_rng(1),
    )  # fmt: skip
    assert found.mean == pytest.approx(correlation(*pairs))
    assert found.sd is None
    # The 2.5 % point of 4,000 draws is off by sqrt(.025 * .975 / 4000) / density, about .06 sd.
    assert found.interval == pytest.approx(tuple(known.confidence_interval), abs=0.25 * known.standard_error)
    assert found.interval == found.interval_of_models


def test_seeds_that_agree_leave_the_bootstrap_of_the_examples():
    gold = [0, 1, 1, 0, 1, 0, 1, 1, 0] * 7
    guess = [0, 1, 0, 0, 1, 1, 1, 1, 0] * 7
    alone, thrice = (estimate(resample(ACCURACY, [guess] * seeds, rows(gold))) for seeds in (1, 3))
    assert thrice.interval == pytest.approx(alone.interval)
    assert thrice.sd == 0


def test_seeds_that_differ_by_exactly_nothing_but_themselves_give_students_t():
    """Without examples' noise the interval is the textbook's: mean +- t s / sqrt(3)."""
    values = np.array([1.0, 2.0, 4.5])
    sample = Sample(values, np.tile(values, (200_000, 1)))
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    assert estimate(sample).interval == pytest.approx((low, high), rel=0.03)
    assert estimate(sample).p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=0.03)
    assert estimate(sample).interval_of_models == (2.5, 2.5)


def test_a_single_seed_takes_its_spread_from_the_pool():
    """The other seeds of a method diverged: what the variants that came through say of seeds still holds for it."""
    sample = Sample(np.array([3.0]), np.full((100_000, 1), 3.0))
    assert estimate(sample, statistics.Pool(2.0, 10)).interval == pytest.approx(
        stats.t.interval(0.95, 10, loc=3, scale=2), rel=0.03
    )
    assert estimate(sample).interval == (3, 3)


def test_slow_metrics_are_resampled_often_enough_for_a_difference_to_be_found():
    """No draw on the other side of 0 gives 2 / (R + 1); of 300 that is lost among eight comparisons."""
    for comparisons in range(1, 60):
        least = 2 / (statistics.slow_rounds(comparisons) + 1)
        assert verdict(1.0, holm([least, *[1.0] * (comparisons - 1)])[0]) == "yes"
    assert verdict(1.0, holm([2 / 301, *[1.0] * 7])[0]) == "cannot be said"


def test_lucky_seeds_do_not_say_more_than_their_test_set():
    """Errors on different examples but equal accuracies: sd over seeds 0, and yet the truth is not known."""
    gold = [1] * 60
    runs = [[int(not start <= i < start + 12) for i in range(60)] for start in (0, 20, 40)]
    found = estimate(resample(ACCURACY, runs, rows(gold)))
    assert found.sd == 0
    assert found.interval[0] < found.interval_of_models[0] < 80 < found.interval_of_models[1] < found.interval[1]


def test_what_examples_do_to_single_seeds_is_counted_once():
    """It shows in the bootstrap and between the seeds; with the spread known, the mean's error is the textbook's."""
    random = np.random.default_rng(2)
    sample = two_way(random, 1000, 3, seed_sd=0, example_sd=0, both_sd=1, rounds=5000)
    alone = 1 / np.sqrt(1000)
    spread = max(sample.values.std(ddof=1), alone)
    assert spread < 1.3 * alone
    known = draws(sample, statistics.Pool(alone, 10**6))
    assert known.std() == pytest.approx(spread / np.sqrt(3), rel=0.06)
    together = two_way(random, 1000, 3, seed_sd=0, example_sd=1, both_sd=0, rounds=5000)
    assert draws(together).std() == pytest.approx(alone, rel=0.06)


def test_identical_predictions_differ_by_exactly_nothing():
    gold = [0.5, 1.25, 3.0, 4.0, 2.5, 5.0]
    runs = [[0.4, 1.0, 3.5, 4.5, 2.0, 4.0], [1.4, 1.0, 3.0, 3.5, 2.0, 5.0], [0.0, 2.0, 3.5, 4.5, 2.5, 4.0]]
    one, other = (resample(PEARSON, runs, rows(gold), rounds=500) for _ in range(2))
    found = estimate(difference(one, other))
    assert (found.mean, found.sd, found.interval, found.p) == (0, 0, (0, 0), 1)
    assert verdict(found.mean, found.p) == "cannot be said"


def test_a_metric_without_sums_is_resampled_as_one_with_them():
    """The slow way and the fast one agree in distribution."""
    random = np.random.default_rng(4)
    gold = random.integers(0, 2, 90).tolist()
    runs = [[value if random.random() < 0.8 else 1 - value for value in gold] for _ in range(2)]

    def accuracy(guess, there):
        return 100 * np.mean([g == row.label for g, row in zip(guess, there, strict=True)])

    anew = metrics.Metric("anew", compute=accuracy)
    slow, fast = (resample(metric, runs, rows(gold), rounds=600) for metric in (anew, ACCURACY))
    assert slow.values == pytest.approx(fast.values)
    assert slow.resampled.mean(axis=0) == pytest.approx(fast.resampled.mean(axis=0), abs=0.7)  # 4 sd of a mean of 600
    assert slow.resampled.std(axis=0) == pytest.approx(fast.resampled.std(axis=0), rel=0.15)


def test_pairing_takes_away_what_both_methods_share():
    """Nearly the same errors: the difference is known far better than either value."""
    random = np.random.default_rng(5)
    gold = [1] * 400
    common = random.random(400) < 0.7
    one = [int(value) for value in common]
    other = one.copy()
    for index in [i for i in range(400) if not one[i]][:12]:
        one[index] = 1
    both = [resample(ACCURACY, [guess], rows(gold)) for guess in (one, other)]
    apart = both[0].resampled - np.random.default_rng(0).permutation(both[1].resampled)
    paired = estimate(difference(*both))
    assert paired.mean == pytest.approx(3.0)
    assert np.ptp(paired.interval) < 0.5 * np.ptp(np.percentile(apart, [2.5, 97.5]))
    assert paired.interval[0] > 0
    assert verdict(paired.mean, paired.p) == "yes"
    assert verdict(-paired.mean, paired.p) == "no"


def test_a_mean_over_tasks_is_as_uncertain_as_independent_tasks_make_it():
    """Four tasks of one size and of equal noise: half the width, not the same width."""
    random = np.random.default_rng(8)
    gold = random.integers(0, 2, 200).tolist()
    runs = [[value if random.random() < 0.8 else 1 - value for value in gold] for _ in range(4)]
    samples = [resample(ACCURACY, [run], rows(gold), seed=index, rounds=4000) for index, run in enumerate(runs)]
    single = np.mean([np.ptp(estimate(sample).interval) for sample in samples])
    whole = mean_of(samples, [None] * 4)
    assert np.ptp(whole.interval) == pytest.approx(single / 2, rel=0.1)
    assert whole.mean == pytest.approx(np.mean([sample.values[0] for sample in samples]))
    uneven = mean_of([samples[0], resample(ACCURACY, runs[1:3], rows(gold), rounds=4000)], [None] * 2)
    assert uneven.sd is None
    assert uneven.mean == pytest.approx((samples[0].values[0] + np.mean([s.values[0] for s in samples[1:3]])) / 2)


def test_holm_by_hand():
    """0.01 x 4, 0.02 x 3, then 0.03 x 2 = 0.06 again, then 0.9; never above 1, never out of order."""
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
    assert verdict(1.0, 0.06) == "cannot be said"


def test_equal_seeds_give_equal_intervals_and_runs_must_fit_their_examples():
    gold = rows([0, 1, 1, 0, 1] * 9)
    runs = [[0, 1, 0, 0, 1] * 9, [1, 1, 0, 0, 1] * 9]
    assert estimate(resample(ACCURACY, runs, gold)) == estimate(resample(ACCURACY, runs, gold))
    assert (draws(resample(ACCURACY, runs, gold)) != draws(resample(ACCURACY, runs, gold, seed=1))).any()
    with pytest.raises(DataError, match="44 predictions for 45 examples"):
        resample(ACCURACY, [runs[0], runs[1][1:]], gold)
    with pytest.raises(DataError, match="0 runs"):
        resample(ACCURACY, [], gold)
    with pytest.raises(DataError, match="expected the same"):
        difference(resample(ACCURACY, runs, gold), resample(ACCURACY, runs[:1], gold))
