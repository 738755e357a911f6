"""Metrics: one `Metric` for each name under which runs record a value, registered here or by the task it belongs to.

Shares, correlations, BLEU, ROUGE-L and METEOR are in percent, as the paper's tables print them. What is not defined (a
correlation with a constant) is 0, as GLUE's scorers have it: such a model has learned nothing. scipy and sacrebleu are
imported where a metric needs them: most runs never do, and their import costs each start of a run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from duallora.errors import ConfigError, unknown
from duallora.tasks import nlg
from duallora.tasks.example import Example

BLOCK = 500  # resamples at once: bounds the memory of the counts, [BLOCK, n]


@dataclass(frozen=True)
class Metric:
    """How a value comes from predictions and examples, and from resamples of them; which of two values is better.

    Give ``statistics`` and ``of_sums`` where the value depends on the rows through sums alone (a mean, a correlation,
    corpus BLEU), which makes ten thousand resamples one matrix product; else ``compute``, which is called for each. With
    neither it is made by a program outside of Python, and has no interval.
    """

    name: str
    statistics: Callable[[Sequence, Sequence[Example]], Any] | None = None
    """(predictions, examples) -> what is summed over the rows, [n, m]."""
    of_sums: Callable[[np.ndarray], Any] | None = None
    """sums [..., m] -> values [...]."""
    compute: Callable[[Sequence, Sequence[Example]], float] | None = None
    """(predictions, examples) -> value."""
    higher_is_better: bool | None = True
    """Which of two values is better; None: not known."""
    unit: Literal["percent", "nats", ""] = ""
    digits: int = 1
    """Decimals in tables."""
    likelihood: bool = False
    """Whether it is of the model's likelihood: it takes (log-likelihood, tokens) of the right answers for predictions."""
    group: str = ""
    """The `Example.group` whose rows it is taken of; of all rows where it is empty."""

    def value(self, predictions: Sequence, examples: Sequence[Example]) -> float:
        """Of n predictions and their examples; 0 of none."""
        if not len(predictions):
            return 0.0
        if self.statistics is None or self.of_sums is None:
            assert self.compute is not None, f"{self.name} is computed by a program outside of Python"
            return float(self.compute(predictions, examples))
        columns = np.asarray(self.statistics(predictions, examples), dtype=float).T
        return float(self.of_sums(np.array([math.fsum(column) for column in columns])))

    def resample(
        self, runs: Sequence[Sequence[Any]], examples: Sequence[Example], *, rounds: int, seed: int = 0
    ) -> np.ndarray:
        """Values [rounds, S] of S runs (predictions, one an example) on resamples of the n rows, the same for every run."""
        random, n = np.random.default_rng(seed), len(examples)
        if self.statistics is None or self.of_sums is None:
            draws = [random.integers(n, size=n).tolist() for _ in range(rounds)]
            return np.array([[self.value(*_take(drawn, own, examples)) for own in runs] for drawn in draws])
        rows = np.stack([np.asarray(self.statistics(own, examples), dtype=float) for own in runs], axis=1)  # [n, S, m]
        sums = []
        for start in range(0, rounds, BLOCK):
            counts = random.multinomial(n, np.full(n, 1 / n), size=min(BLOCK, rounds - start)).astype(float)
            sums.append((counts @ rows.reshape(n, -1)).reshape(-1, *rows.shape[1:]))
        return np.asarray(self.of_sums(np.concatenate(sums)))

    def of_group(self, group: str) -> Metric:
        """This metric on the rows of one ``group`` (see `Example`), as ``NAME_GROUP``."""
        statistics, compute = self.statistics, self.compute

        def masked(predictions: Sequence, examples: Sequence[Example]) -> np.ndarray:
            assert statistics is not None
            return np.asarray(statistics(predictions, examples)) * _column(row.group == group for row in examples)

        def part(predictions: Sequence, examples: Sequence[Example]) -> float:
            assert compute is not None
            return compute(*_take([at for at, row in enumerate(examples) if row.group == group], predictions, examples))

        name = f"{self.name}_{group}"
        return replace(self, name=name, group=group, statistics=statistics and masked, compute=compute and part)


def _take(places: Sequence[int], predictions: Sequence, examples: Sequence[Example]) -> tuple[list, list[Example]]:
    return [predictions[at] for at in places], [examples[at] for at in places]


class Metrics:
    """The metrics of a task by their names: what `Task.metrics` calls with predictions and examples.

    Args:
        names: what is taken of all rows; the first ones stand first in tables.
        by_group: what is taken of each group too, where the rows are of several.
        task: where the task's own metrics have names that are others' too.
    """

    def __init__(self, *names: str, by_group: Sequence[str] = (), task: str = "") -> None:
        self.names, self.by_group, self.task = names, by_group, task

    def __call__(self, predictions: Sequence, examples: Sequence[Example]) -> dict[str, float]:
        """Values by name."""
        chosen = [get(name, self.task) for name in self.names]
        groups = list(dict.fromkeys(row.group for row in examples))
        if len(groups) > 1:
            chosen += [get(name, self.task).of_group(group) for group in groups for name in self.by_group]
        return {metric.name: metric.value(predictions, examples) for metric in chosen}


_OWN: dict[tuple[str, str], Metric] = {}  # by task ("" for any) and name
_added: dict[tuple[str, str], Metric] = {}
_BOOKKEEPING = ("train_", "tokens_", "start_", "rows_", "steps_", "spikes", "left_out")  # what runs record besides


def add(metric: Metric, task: str = "") -> Metric:
    """Make a metric of your own known by its name, or by that of a task of yours and its name; returns it.

    Raises:
        ConfigError: the name is taken.
    """
    if (task, metric.name) in _OWN:
        raise ConfigError(f"metric {metric.name!r} is one of duallora's own: choose another name.")
    _added[task, metric.name] = metric
    return metric


def find(name: str | None, task: str | None = None) -> Metric:
    """The metric that a run (on ``task``) records as ``name``; of a name that nobody has made known nothing is known.

    Of NAME_PART, such as accuracy_boolq, accuracy_norm or loss_before, it is NAME on the rows of the group PART.
    """
    name = name or ""
    every = {**_added, **_OWN}
    if found := every.get((task or "", name)) or every.get(("", name)):
        return found
    head = max((own for of, own in every if of in ("", task) and name.startswith(f"{own}_")), key=len, default=None)
    return find(head, task).of_group(name[len(head) + 1 :]) if head else Metric(name, higher_is_better=None)


def is_score(name: str, task: str | None = None) -> bool:
    """Whether ``name`` says how good a run is: the seconds, tokens and counts of steps beside its metrics do not."""
    return find(name, task).higher_is_better is not None or not name.startswith(_BOOKKEEPING)


def get(name: str, task: str | None = None) -> Metric:
    """As `find`; ConfigError for a name that nobody has made known."""
    if (found := find(name, task)).higher_is_better is not None:
        return found
    more = ", or one that a plug-in adds with duallora.tasks.metrics.add (docs/extending.md)"
    raise unknown("metric", name, sorted({own for _, own in (*_OWN, *_added)}), more)


def register(metric: Metric, task: str = "") -> Metric:
    """Registers one of duallora's own; returns it."""
    _OWN[task, metric.name] = metric
    return metric


# -- shares -----------------------------------------------------------------------------------------------------------


def share(name: str, hit: Callable[[Any, Example], bool], *, higher_is_better: bool = True) -> Metric:
    """The share of rows of which ``hit(prediction, example)`` holds, in percent."""

    def statistics(predictions: Sequence, examples: Sequence[Example]) -> np.ndarray:
        hits = _column(hit(own, row) for own, row in zip(predictions, examples, strict=True))
        return np.hstack([hits, np.ones_like(hits)])

    return Metric(name, statistics, percent, higher_is_better=higher_is_better, unit="percent")


def is_right(prediction: Any, example: Example) -> bool:
    """Whether a prediction is the label or, where there is none, the first reference."""
    return prediction == (example.references[0] if example.label is None else example.label)


def _column(values: Any) -> np.ndarray:
    return np.array([[float(value)] for value in values])


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.maximum(1.0, sums[..., 1])


def percent(sums: np.ndarray) -> np.ndarray:
    """Of two sums, [..., 2], the first as a share of the second."""
    return 100.0 * _mean(sums)


def _groups(predictions: Sequence, examples: Sequence[Example]) -> np.ndarray:
    """Hits of each group, then rows of each."""
    groups = np.array([row.group for row in examples])
    member = groups[:, None] == np.unique(groups)  # [n, groups]
    return np.hstack([member * _column(map(is_right, predictions, examples)), member])


def _mean_of_groups(sums: np.ndarray) -> np.ndarray:
    """The plain mean over groups of the share of hits; a group that a resample has lost is left out."""
    hits, rows = np.split(sums, 2, axis=-1)
    return 100.0 * (hits / np.maximum(1.0, rows)).sum(axis=-1) / np.maximum(1, np.count_nonzero(rows, axis=-1))


def _f1_of(classes: Sequence[Any] | None, predictions: Sequence, examples: Sequence[Example]) -> np.ndarray:
    """Of each class the hits, then how often it is said or true; None: of every class that occurs."""
    said, true = list(predictions), [row.label for row in examples]
    names = np.array(sorted({*said, *true}) if classes is None else classes)
    is_said, is_true = (np.array(own)[:, None] == names for own in (said, true))  # [n, classes]
    return np.hstack([is_said & is_true, is_said.astype(float) + is_true])


def _f1(sums: np.ndarray) -> np.ndarray:
    """The mean over the classes that occur of the harmonic mean of precision and recall."""
    hits, named = np.split(sums, 2, axis=-1)
    return 200.0 * (hits / np.maximum(1.0, named)).sum(axis=-1) / np.maximum(1, np.count_nonzero(named, axis=-1))


register(share("accuracy", is_right))
register(share("exact_match", lambda text, row: text.strip() in {other.strip() for other in row.references}))
register(Metric("average", _groups, _mean_of_groups, unit="percent"))
register(Metric("f1", functools.partial(_f1_of, [1]), _f1, unit="percent"))  # of the positive class
register(Metric("macro_f1", functools.partial(_f1_of, None), _f1, unit="percent"))

# -- numbers ----------------------------------------------------------------------------------------------------------


def _columns(predictions: Sequence[float], examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(predictions, dtype=float), np.array([row.label for row in examples], dtype=float)


def _moments(predictions: Sequence[float], examples: Sequence[Example], read: Callable = np.asarray) -> np.ndarray:
    """1, x, y, x^2, y^2, xy of the standardized columns; a constant column becomes zeros."""
    columns = map(read, _columns(predictions, examples))
    x, y = (np.zeros_like(own) if np.ptp(own) == 0 else (own - own.mean()) / own.std() for own in columns)
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _correlation(sums: np.ndarray) -> np.ndarray:
    count = np.maximum(1.0, sums[..., 0])
    x, y, xx, yy, xy = (sums[..., index] / count for index in range(1, 6))
    variances = np.stack([xx - x * x, yy - y * y])
    # The columns have variance 1, so a resample below 1e-12 is constant up to rounding.
    defined = (variances > 1e-12).all(axis=0)
    scale = np.sqrt(np.where(defined, variances.prod(axis=0), 1.0))
    return np.where(defined, 100.0 * (xy - x * y) / scale, 0.0)


def _spearman(predictions: Sequence[float], examples: Sequence[Example]) -> float:
    from scipy.stats import rankdata

    return float(_correlation(_moments(predictions, examples, rankdata).sum(axis=0)))


def _numbers(predictions: Sequence[float], examples: Sequence[Example]) -> np.ndarray:
    return np.hstack([_column(predictions), np.ones((len(predictions), 1))])


def _squares(predictions: Sequence[float], examples: Sequence[Example]) -> np.ndarray:
    guess, gold = _columns(predictions, examples)
    return np.stack([(guess - gold) ** 2, np.ones_like(gold)], axis=1)


register(Metric("pearson", _moments, _correlation, unit="percent"))
# Of two classes, 0 and 1, it is their Pearson correlation.
register(Metric("matthews", _moments, _correlation, unit="percent"))
register(Metric("spearman", compute=_spearman, unit="percent"))
register(Metric("rmse", _squares, lambda sums: np.sqrt(_mean(sums)), higher_is_better=False, digits=2))

# What `duallora.paper.capacity` measures: of one problem, hence of one row.
register(Metric("residual", _numbers, _mean, higher_is_better=False, digits=3))
register(Metric("bits_per_parameter", _numbers, _mean, digits=2))

# -- texts ------------------------------------------------------------------------------------------------------------


def bleu(name: str = "bleu", read: Callable[[str], str] = str, *, lowercase: bool = False) -> Metric:
    """Corpus BLEU-4 (sacrebleu, tokenizer 13a, exponential smoothing) of ``read(text)`` over all references of a row."""

    def statistics(predictions: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
        from sacrebleu.metrics.bleu import BLEU

        scorer = BLEU(lowercase=lowercase, tokenize="13a", force=True)
        found = [
            scorer.corpus_score([read(text)], [[other] for other in row.references])
            for text, row in zip(predictions, examples, strict=True)
        ]
        return np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found], dtype=float)

    return Metric(name, statistics, _bleu, unit="percent")


def _bleu(sums: np.ndarray) -> np.ndarray:
    from sacrebleu.metrics.bleu import BLEU

    def one(row: np.ndarray) -> float:
        counts = row.round().astype(int).tolist()
        return BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp").score

    return np.apply_along_axis(one, -1, sums)


def _of_references(scorer: Callable[..., float], **options: Any) -> Callable[[Sequence, Sequence[Example]], float]:
    return lambda predictions, examples: scorer(predictions, [row.references for row in examples], **options)


def _rouge_l(predictions: Sequence[str], examples: Sequence[Example]) -> list[list[float]]:
    return [[nlg.rouge_l([text], [row.references]), 1] for text, row in zip(predictions, examples, strict=True)]


register(bleu())
register(Metric("nist", compute=_of_references(nlg.nist), digits=2))
register(Metric("nist_perl", compute=_of_references(nlg.nist, perl=True)))
register(Metric("rouge_l", _rouge_l, _mean, unit="percent"))
register(Metric("cider", compute=_of_references(nlg.cider), digits=2))
register(Metric("meteor", unit="percent"))

# -- likelihood -------------------------------------------------------------------------------------------------------


def _tokens(answers: Sequence[tuple[float, int]], examples: Sequence[Example]) -> np.ndarray:
    return np.array([[-log_likelihood, tokens] for log_likelihood, tokens in answers], dtype=float)


_loss = Metric("loss", _tokens, _mean, higher_is_better=False, unit="nats", digits=3, likelihood=True)
register(_loss)
register(
    Metric("forgetting", higher_is_better=False, unit="nats", digits=3)
)  # of the loss on text that is not trained on
register(
    replace(_loss, name="perplexity", unit="", digits=2, of_sums=lambda sums: np.exp(np.minimum(_mean(sums), 700.0)))
)


# Of data without metrics of its own, by its kind; the first of each ranks models.
OF_KIND = {
    "generate": Metrics("bleu", "exact_match"),
    "classify": Metrics("accuracy", "macro_f1"),
    "regress": Metrics("pearson", "spearman", "rmse"),
}
