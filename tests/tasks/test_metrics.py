"""Every metric against cases worked by hand or another library, on the data and on each resample; names and direction."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import sacrebleu
from scipy import stats

from duallora.errors import ConfigError
from duallora.tasks import Example, metrics
from duallora.tasks.metrics import OF_KIND, Metric, Metrics

REFERENCES = [
    ("the cat sat on the mat .", "a cat was on the mat ."),
    ("there is a cheap pub near the river",),
    ("Blue Spice is a family friendly coffee shop in the city center .", "Blue Spice is in the center", "A shop ."),
    ("no match whatsoever here",),
]
TEXTS = [
    "the Cat sat on a mat .",
    "there is a cheap pub by the river",
    "Blue Spice is a coffee shop in the center .",
    "zzz",
]


def labeled(labels) -> list[Example]:
    return [Example(texts=("t",), label=label) for label in labels]


def texts(references) -> list[Example]:
    return [Example(references=tuple(own)) for own in references]


def value(name, predictions, labels) -> float:
    return metrics.get(name).value(predictions, labeled(labels))


def test_matthews_is_the_confusion_matrix_formula():
    gold, guess = [1, 1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 1, 0]
    tp, tn, fp, fn = 3, 2, 1, 1
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert value("matthews", guess, gold) == pytest.approx(100 * expected)
    assert value("matthews", [1, 1, 1], [1, 0, 1]) == 0.0  # one class only: nothing learned


def test_the_metrics_of_each_kind_of_data():
    found = OF_KIND["classify"]([0, 2, 2, 1], labeled([0, 2, 1, 1]))
    assert found == {"accuracy": 75.0, "macro_f1": pytest.approx(100 * (1 + 2 / 3 + 2 / 3) / 3)}
    found = OF_KIND["regress"]([1.0, 2.0, 9.0], labeled([1.0, 2.0, 3.0]))
    assert found == {
        "pearson": pytest.approx(100 * 8 / math.sqrt(38 * 2)),  # about the means: (-3, -2, 5), (-1, 0, 1)
        "spearman": pytest.approx(100),
        "rmse": pytest.approx(math.sqrt(12)),
    }
    assert OF_KIND["regress"]([1.0, 1.0, 1.0], labeled([1.0, 2.0, 3.0]))["pearson"] == 0.0
    rows = [Example(answer="a b", references=("a b ", "c")), Example(answer="d", references=("d",))]
    assert OF_KIND["generate"]([" c\n", "e"], rows)["exact_match"] == 50.0
    assert set(OF_KIND["generate"]([], []).values()) == {0.0}


def test_bleu_takes_rows_with_different_numbers_of_references():
    guess = ["the cat sat on the mat", "a dog barked loudly at night"]
    rows = texts([["the cat sat on a mat", "a cat sat on the mat"], ["a dog barked at night loudly"]])
    # By hand: row 1 has 5 of 6 unigrams ("the" occurs once in either reference), 5 of 5 bigrams, 4 of 4 trigrams and
    # 3 of 3 4-grams in one reference or the other; row 2 has 6 of 6, 3 of 5, 1 of 4 and 0 of 3.
    expected = 100 * math.exp(sum(map(math.log, [11 / 12, 8 / 10, 5 / 8, 3 / 6])) / 4)
    shouted = [text.upper() for text in guess]
    assert metrics.get("bleu").value(guess, rows) == pytest.approx(expected)
    assert metrics.get("bleu").value(shouted, rows) < 5
    assert metrics.get("bleu", "e2e").value(shouted, rows) == pytest.approx(
        expected
    )  # the official one is of lower case


def test_a_loss_is_per_token_of_the_right_answers():
    answers = [(-3.0, 2), (-1.0, 6)]
    assert metrics.get("loss").value(answers, ()) == 0.5
    assert metrics.get("perplexity").value(answers, ()) == pytest.approx(math.sqrt(math.e))
    drawn = metrics.get("perplexity").resample([answers], texts([["a"], ["b"]]), rounds=30)
    assert set(drawn[:, 0].round(9)) == set(np.exp([1.5, 0.5, 1 / 6]).round(9))


def oracle(name: str, guess: list, rows: list[Example]) -> float:
    """The metric by its definition or another library's."""
    if name.startswith("bleu"):
        streams = [[(*row.references, None, None)[i] for row in rows] for i in range(3)]
        streams = [own for own in streams if any(own)]
        return sacrebleu.corpus_bleu(guess, streams, lowercase=name != "bleu", tokenize="13a", force=True).score
    pairs = [(own, row.label) for own, row in zip(guess, rows, strict=True)]
    if name == "accuracy":
        return 100 * np.mean([own == gold for own, gold in pairs])
    if name == "rmse":
        return math.sqrt(np.mean([(own - gold) ** 2 for own, gold in pairs]))
    if name in ("f1", "macro_f1"):
        found = []
        for one in [1] if name == "f1" else {number for pair in pairs for number in pair}:
            said, true = [own == one for own, _ in pairs], [gold == one for _, gold in pairs]
            both = sum(map(min, said, true))
            found.append(2 * both / (sum(said) + sum(true)) if both else 0.0)
        return 100 * float(np.mean(found))
    x, y = zip(*pairs, strict=True)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return 100 * (stats.spearmanr if name == "spearman" else stats.pearsonr)(x, y).statistic


def cases(name: str):
    random = np.random.default_rng(11)
    if name.startswith("bleu"):
        yield TEXTS, texts(REFERENCES)
        return
    many = 4 if name == "macro_f1" else 2
    yield random.integers(0, many, 7), labeled(random.integers(0, many, 7).tolist())  # one class alone is common
    yield np.ones(50, dtype=int), labeled(random.integers(0, many, 50).tolist())
    yield random.integers(0, many, 9), labeled([0] * 9)
    if name in ("pearson", "spearman", "rmse"):
        yield random.random(40) * 1e-3 + 100, labeled((random.random(40) * 5).tolist())


@pytest.mark.parametrize(
    "name", ["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman", "rmse", "bleu", "bleu of e2e"]
)
def test_values_and_resamples_are_those_of_the_definition(name):
    """Constant columns, lost classes and rows with unlike numbers of references included; equal draws for every run."""
    metric = metrics.get(*name.split(" of "))
    for guess, rows in cases(name):
        guess, n = list(guess), len(rows)
        assert metric.value(guess, rows) == pytest.approx(oracle(name, guess, rows), abs=1e-6)
        found = metric.resample([guess, guess], rows, rounds=30, seed=5)
        assert found.shape == (30, 2)
        assert found[:, 0] == pytest.approx(found[:, 1], abs=1e-9)
        random = np.random.default_rng(5)
        if metric.compute:
            drawn = [random.integers(n, size=n) for _ in range(30)]
        else:
            drawn = [np.repeat(np.arange(n), counts) for counts in random.multinomial(n, np.full(n, 1 / n), size=30)]
        for own, chosen in zip(found[:, 0], drawn, strict=True):
            expected = oracle(name, [guess[i] for i in chosen], [rows[i] for i in chosen])
            assert own == pytest.approx(expected, abs=1e-6)


def test_an_average_over_groups_weighs_groups_and_not_rows():
    """boolq 2 of 3, piqa 1 of 1: 83.3, where the rows alone give 75; a resample without piqa is boolq alone."""
    gold = [("boolq", "true"), ("piqa", "solution1"), ("boolq", "true"), ("boolq", "false")]
    rows = [Example(references=(answer,), group=group) for group, answer in gold]
    guess = ["true", "solution1", "false", "false"]
    average = metrics.get("average")
    assert average.value(guess, rows) == pytest.approx(100 * (2 / 3 + 1) / 2)
    counts = np.random.default_rng(3).multinomial(4, [0.25] * 4, size=200)
    seen = set()
    found = average.resample([guess], rows, rounds=200, seed=3)
    for own, (first, solution, second, third) in zip(found[:, 0], counts, strict=True):
        parts = [100.0] * bool(solution)
        if boolq := first + second + third:
            parts.append(100 * (first + third) / boolq)
        seen.add(len(parts))
        assert own == pytest.approx(np.mean(parts))
    assert seen == {1, 2}


@pytest.mark.parametrize("name", ["accuracy", "spearman"])
def test_a_group_has_its_own_value_by_the_name_it_is_recorded_under(name):
    """Whether the metric is of sums or computed anew: the rows of the others do not count."""
    random = np.random.default_rng(1)
    rows = [replace(row, group="ab"[i % 2]) for i, row in enumerate(labeled(random.integers(0, 3, 20).tolist()))]
    guess = random.integers(0, 3, 20).tolist()
    found = Metrics(name, by_group=[name])(guess, rows)
    assert list(found) == [name, f"{name}_a", f"{name}_b"]
    assert found[f"{name}_a"] == metrics.get(f"{name}_a").value(guess, rows)
    assert found[f"{name}_a"] == pytest.approx(oracle(name, guess[::2], rows[::2]))
    assert list(Metrics(name, by_group=[name])(guess[::2], rows[::2])) == [name]


def test_direction_unit_and_digits_go_by_name():
    for name in ("loss", "perplexity", "rmse", "parse_failure_rate", "parse_failure_rate_boolq", "loss_before"):
        assert metrics.find(name).higher_is_better is False, name
    for name in ("accuracy", "accuracy_norm", "bleu_first_line", "meteor", "nist_perl", "average"):
        assert metrics.find(name).higher_is_better is True, name
    assert [metrics.find(name).unit for name in ("bleu", "loss", "nist")] == ["percent", "nats", ""]
    assert metrics.find("accuracy_boolq").digits == 1
    assert metrics.find("unheard_of").higher_is_better is None
    with pytest.raises(ConfigError, match=r"unknown metric 'acuracy'; nearest: accuracy\. Expected one of accuracy, "):
        metrics.get("acuracy")


def test_duallora_s_own_names_are_taken_and_a_task_may_have_its_own_meaning_of_one():
    with pytest.raises(ConfigError, match="'accuracy' is one of duallora's own"):
        metrics.add(Metric("accuracy", compute=lambda predictions, examples: 0.0))
    mine = metrics.add(Metric("accuracy", compute=lambda predictions, examples: 7.0), task="a-toy")
    assert metrics.get("accuracy", "a-toy") is mine
    assert metrics.get("accuracy") is metrics.get("accuracy", "sst2") is not mine
