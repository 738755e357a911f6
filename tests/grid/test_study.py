"""What a study asks for: two stages, a grid that grows towards its best value, names, files, and its errors."""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duallora import cli
from duallora.errors import ConfigError, IntegrityError
from duallora.grid.study import CELLS, Outcome, Study, cell_folder, outcomes
from duallora.store import record

LR = "train.learning_rate"
BASE = {"model.name": "m", "train.max_steps": 7}


def study(**changes) -> Study:
    given = {
        "name": "odd",
        "base": BASE,
        "tasks": {"cola": {"task": "cola"}, "rte": {"task": "rte"}},
        "variants": {"lora": {"method": "lora", "r": 6}, "duallora": {"r1": 3, "r2": 5}},
        "search": {"learning_rate": [3e-4, 1e-3, 3e-3, 1e-2]},
        "seeds": [4, 0, 9],
    }
    return Study(**{**given, **changes})


def single(**changes) -> Study:
    """One task and variant."""
    return study(**{"tasks": {"cola": {"task": "cola"}}, "variants": {"a": {}}, **changes})


def done(name: str, score: float, **more) -> Outcome:
    return Outcome(name, "done", metrics={"accuracy": score, "loss": -score}, main_metric="accuracy", **more)


def diverged(name: str) -> Outcome:
    return Outcome(name, "failed", "diverged", error="NonFiniteError: the loss is nan in step 3")


def run_all(one: Study, score, order=None) -> dict[str, Outcome]:
    """Runs what is wanted until nothing is left; ``score(cell)`` is its metric on validation rows, None for NaN."""
    found: dict[str, Outcome] = {}
    for _ in range(1000):
        left = [cell for cell in one.wanted(found) if cell.name not in found]
        if not left:
            return found
        for cell in left if order is None else [order.choice(left)]:
            value = score(cell)
            found[cell.name] = diverged(cell.name) if value is None else done(cell.name, value)
    raise AssertionError("never ends")


def tried(found: dict[str, Outcome], prefix: str) -> list[float]:
    return sorted({float(name.split("-lr")[1].split("-")[0]) for name in found if name.startswith(prefix)})


def near(peak: float):
    """A score with one maximum over the learning rate."""
    return lambda cell: -abs(math.log(cell.tags[LR] / peak))


def test_the_other_seeds_run_at_the_best_value_alone():
    one = study()
    first = one.wanted({})
    assert {cell.tags["seed"] for cell in first} == {4}
    assert len(first) == 2 * 2 * 4
    peaks = {"lora": 1.1e-3, "duallora": 2.9e-3}
    found = run_all(one, lambda cell: near(peaks[cell.tags["variant"]])(cell))
    later = {name for name in found if not name.endswith("seed4")}
    assert later == {
        f"{task}-{variant}-lr{rate}-seed{seed}"
        for task, seed in itertools.product(["cola", "rte"], [0, 9])
        for variant, rate in [("lora", "0.001"), ("duallora", "0.003")]
    }
    assert one.best(found, "rte", "lora").values == {LR: 1e-3}


def test_what_is_wanted_in_the_end_does_not_depend_on_the_order_in_which_cells_end():
    def score(cell):
        # Different peaks beyond both edges, and a corner that diverges.
        if cell.tags[LR] > 0.05 and cell.tags["task"] == "rte":
            return None
        return near(4e-2)(cell) + sum(map(ord, cell.name)) % 7 / 100

    straight = run_all(study(), score)
    for seed in range(3):
        assert run_all(study(), score, random.Random(seed)) == straight


@pytest.mark.parametrize(
    ("peak", "values"),
    [
        (1e-3, []),
        (1e-2, [0.03]),  # at the edge: one step beyond decides
        (2.5e-2, [0.03, 0.1]),
        (1.0, [0.03, 0.1, 0.3]),  # three steps and no more
        (1e-7, [9e-6, 3e-5, 9e-5]),
    ],
)
def test_a_grid_grows_by_its_own_factor_until_its_best_value_is_inside(peak, values):
    """By hand: the factor is (0.01 / 0.0003)^(1/3) = 3.218, and values keep one digit as the grid's own."""
    assert tried(run_all(single(), near(peak)), "cola") == sorted([3e-4, 1e-3, 3e-3, 1e-2, *values])
    assert tried(run_all(single(extend=False), near(peak)), "cola") == [3e-4, 1e-3, 3e-3, 1e-2]


@given(
    peak=st.floats(1e-5, 0.5),
    grid=st.lists(st.sampled_from([1e-4, 3e-4, 2e-3, 5e-3, 7e-3, 9e-3, 1e-2]), min_size=2, unique=True),
)
@settings(max_examples=30, deadline=None)
def test_the_best_value_has_tried_neighbours_on_both_sides_or_the_grid_has_grown_three_times(peak, grid):
    one = single(search={LR: grid})
    found = run_all(one, near(peak))
    rates, best = tried(found, "cola"), one.best(found, "cola", "a").values[LR]
    assert -abs(math.log(best / peak)) == max(-abs(math.log(rate / peak)) for rate in rates)
    assert rates[0] < best < rates[-1] or len(rates) == len(grid) + 3


@pytest.mark.parametrize(
    ("key", "values", "sign", "tried"),
    [
        ("adapter.r", [2, 4], -1, [1, 2, 4]),  # below 1 there is none
        ("adapter.r", [1, 2, 3, 4], -1, [1, 2, 3, 4]),  # 1 / 1.59 is 1 again
        ("adapter.duallora_dropout", [0.3, 0.6], 1, [0.3, 0.6]),  # 1.2 is no dropout
    ],
)
def test_a_grid_grows_to_values_that_the_recipe_takes_and_that_are_new(key, values, sign, tried):
    one = single(search={key: values})
    points = one.points(run_all(one, lambda cell: sign * cell.tags[key]), "cola", "a")
    assert [point.values[key] for point in points] == tried


def test_two_keys_make_a_product_that_grows_where_its_best_lies_at_an_edge():
    one = single(search={LR: [1e-3, 2e-3, 4e-3], "weight_decay": [0.1, 0.2, 0.4]})
    found = run_all(one, lambda c: -abs(c.tags[LR] - 2e-3) - abs(c.tags["train.weight_decay"] - 0.8))
    assert len([name for name in found if name.endswith("seed4")]) == 3 * 5
    assert one.best(found, "cola", "a").values == {LR: 2e-3, "train.weight_decay": 0.8}


def test_a_diverged_cell_is_the_worst_value_and_a_failed_one_leaves_the_question_open():
    one = single()
    found = run_all(one, lambda cell: None if cell.tags[LR] > 2e-3 else -1e9 * cell.tags[LR])
    assert one.best(found, "cola", "a").values == {LR: 9e-6}
    first = {cell.name: done(cell.name, 1.0) for cell in one.wanted({})}
    broken = {**first, "cola-a-lr0.003-seed4": Outcome("cola-a-lr0.003-seed4", "failed", error="DataError: x")}
    assert one.best(broken, "cola", "a") is None
    assert {cell.name for cell in one.wanted(broken)} == set(first)
    # Where every cell diverges the grid goes down three times and then gives up.
    found = run_all(one, lambda cell: None)
    assert tried(found, "cola") == [9e-6, 3e-5, 9e-5, 3e-4, 1e-3, 3e-3, 1e-2]
    assert one.best(found, "cola", "a") is None
    assert not any(name.endswith("seed0") for name in found)


def test_equal_scores_go_to_the_middle_and_do_not_grow_the_grid():
    one = single(search={LR: [1e-4, 1e-3, 1e-2]})
    found = run_all(one, lambda cell: 0.0)
    assert tried(found, "cola") == [1e-4, 1e-3, 1e-2]
    assert one.best(found, "cola", "a").values == {LR: 1e-3}


def test_the_chosen_metric_decides_losses_the_other_way_round_and_nan_is_the_worst():
    small = single(search={LR: [1e-3, 2e-3]}, extend=False)
    values = {0.001: {"accuracy": 60.0, "loss": 0.5}, 0.002: {"accuracy": 70.0, "loss": 0.9}}

    def best(one: Study, values) -> float:
        cells = one.wanted({})
        found = {c.name: Outcome(c.name, "done", metrics=values[c.tags[LR]], main_metric="accuracy") for c in cells}
        return one.best(found, "cola", "a").values[LR]

    assert best(small, values) == 0.002
    assert best(replace(small, metric="loss"), values) == 0.001
    assert best(small, {0.001: {"accuracy": -5.0}, 0.002: {"accuracy": math.nan}}) == 0.001
    assert best(replace(small, metric="rmse"), {0.001: {"rmse": 0.4}, 0.002: {"rmse": 0.6}}) == 0.001
    with pytest.raises(ConfigError, match=r"cola-a-lr0.001-seed4: no validation metric f1 .* it has accuracy, loss"):
        best(replace(small, metric="f1"), values)


def test_search_seeds_are_averaged():
    one = single(search={LR: [1e-3, 2e-3]}, search_seeds=2, extend=False)
    scores = {(1e-3, 4): 9.0, (1e-3, 0): 1.0, (2e-3, 4): 6.0, (2e-3, 0): 5.0}  # means 5.0 and 5.5
    found = run_all(one, lambda cell: scores.get((cell.tags[LR], cell.tags["seed"]), 0.0))
    assert len(found) == 5
    assert one.best(found, "cola", "a").values == {LR: 2e-3}


def test_without_a_search_every_seed_is_wanted_at_once_even_where_one_diverges():
    one = study(search={})
    every = {"-".join(parts) for parts in itertools.product(one.tasks, one.variants, ("seed4", "seed0", "seed9"))}
    assert {cell.name for cell in one.wanted({})} == every
    assert run_all(one, lambda cell: None if cell.tags["seed"] == 4 else 1.0).keys() == every


def test_the_expected_number_of_cells_is_what_it_comes_to_where_no_grid_grows():
    one = study(search_seeds=2)
    found = run_all(one, near(1e-3))
    assert one.expected({}) == len(found) == one.expected(found) == 2 * 2 * (4 * 2 + 1)


def test_a_task_after_another_starts_each_cell_from_the_same_variant_and_seed_at_its_best_value():
    one = study(tasks={"mnli": {"task": "mnli"}, "rte": {"task": "rte", "after": "mnli"}})
    assert {cell.tags["task"] for cell in one.wanted({})} == {"mnli"}
    found: dict[str, Outcome] = {}
    while left := [c for c in one.wanted(found) if c.name not in found]:
        assert all(found[cell.after].status == "done" for cell in left if cell.after is not None)
        found[left[-1].name] = done(left[-1].name, near(1e-3)(left[-1]))  # rte's first, as soon as they can be run
    cells = {cell.name: cell for cell in one.wanted(found)}
    assert cells["rte-duallora-lr0.01-seed4"].after == "mnli-duallora-lr0.001-seed4"
    assert cells["rte-lora-lr0.001-seed9"].after == "mnli-lora-lr0.001-seed9"
    start = cells["rte-lora-lr0.001-seed9"].recipe("/shared/grid").adapter.init_from
    assert start == "/shared/grid/cells/mnli-lora-lr0.001-seed9"
    with pytest.raises(ConfigError, match=r"after: 'qqp' is not accepted; it belongs to a task and names one .*: cola"):
        study(tasks={"cola": {"task": "cola"}, "rte": {"task": "rte", "after": "qqp"}})
    with pytest.raises(ConfigError, match="after"):
        study(variants={"lora": {"after": "cola"}})


def test_later_layers_win_and_take_what_they_exclude_with_them():
    one = study(
        base={**BASE, "adapter": {"r": 2, "alpha": 3.0}, "train.lr_warmup_ratio": 0.1, "data.path": "mine.jsonl"},
        tasks={"cola": {"task": "cola", "r": 4}},
        variants={"a": {"r": 8, "lr_warmup_steps": 11}, "b": {"adapter.options": {"lr_ratio": 16.0}, "method": "lora+"}},
        search={},
    )  # fmt: skip
    a, b = (next(c for c in one.wanted({}) if c.tags["variant"] == v).recipe() for v in "ab")
    assert (a.adapter.r, a.adapter.alpha, a.train.lr_warmup_steps, a.train.lr_warmup_ratio) == (8, 3.0, 11, None)
    assert (b.adapter.r, b.train.lr_warmup_ratio, b.data.task, b.data.path) == (4, 0.1, "cola", None)
    ratios = study(variants={"b": {"method": "lora+"}}, search={"adapter.options.lr_ratio": [4.0, 16.0]})
    assert [c.recipe().adapter.options for c in ratios.wanted({})][:2] == [{"lr_ratio": 4.0}, {"lr_ratio": 16.0}]


def test_a_search_of_its_own_replaces_the_studys():
    one = study(variants={"lora": {"search": {LR: [1e-5, 2e-5]}}, "none": {"search": None}, "rest": {}})
    rates = {(c.tags["variant"], c.tags.get(LR)) for c in one.wanted({})}
    assert {rate for variant, rate in rates if variant == "lora"} == {1e-5, 2e-5}
    assert {rate for variant, rate in rates if variant == "none"} == {None}
    assert len(rates) == 2 + 1 + 4


LABELS = st.from_regex(r"[a-c]([-.][a-b0])?(-lr0\.1|-r1|-B)?", fullmatch=True)
VALUES = st.lists(st.sampled_from([0.1, 1e-1, 0.01, 1e-5, 1.0, 2.0]), min_size=1, max_size=3, unique=True)


@given(
    st.lists(LABELS, min_size=1, max_size=4, unique=True),
    st.lists(st.tuples(LABELS, st.booleans()), min_size=1, max_size=4, unique_by=lambda pair: pair[0]),
    VALUES,
    st.lists(st.integers(0, 12), min_size=1, max_size=3, unique=True),
)
@settings(max_examples=50, deadline=None)
def test_no_two_cells_have_one_name_whatever_the_labels(tasks, variants, values, seeds):
    """Labels may hold hyphens, and even look like search values; what cannot be told apart is refused."""
    try:
        one = study(
            tasks={label: {"task": "cola"} for label in tasks},
            variants={label: {"search": {}} if own else {} for label, own in variants},
            search={LR: values},
            seeds=seeds,
        )
    except ConfigError as error:
        assert "one name" in str(error)  # noqa: PT017
        return
    every = [
        one.cell_name(task, variant, point, seed).casefold()
        for task, variant in itertools.product(one.tasks, one.variants)
        for point in one.points({}, task, variant)
        for seed in seeds
    ]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": {"a": {"task": "cola"}, "a-b": {"task": "cola"}}, "variants": {"b-c": {}, "c": {}}},
        {"variants": {"X": {}, "x": {}}},
        {"variants": {"x": {}, "x-lr0.1": {"search": {}}}},
    ],
)
def test_labels_that_could_be_mistaken_are_refused(changes):
    with pytest.raises(ConfigError, match="one name"):
        study(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": {"rank": 3}}, "study odd, base.rank: unknown key rank; did you mean adapter.r?"),
        ({"variants": {"a": {"r": "8"}}}, 'study odd, variants.a.adapter.r: adapter.r: "8" is not accepted'),
        ({"search": {LR: [1e-3, -1.0]}}, "search.train.learning_rate: train.learning_rate: -1.0 is not accepted"),
        ({"search": {LR: 1e-3}}, "expected a list of values"),
        ({"search": {"lr_scheduler": ["a b", "a_b"]}}, "read alike"),
        ({"variants": {"a b": {}}}, "label 'a b'"),
        ({"variants": {}}, "variants: expected at least one"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": [True]}, "different whole numbers"),
        ({"search_seeds": 4}, "search_seeds: 4 is not accepted; expected 1 to 3"),
        ({"base": {"seed": 3}}, "seed is the grid's own to set; see seeds"),
        ({"base": {"output": "x"}}, "output is the grid's own to set"),
        ({"base": {"r": 3, "adapter.r": 4}}, "adapter.r is set twice"),
        ({"reference": "dora"}, "'dora' is not accepted; expected a variant: lora, duallora"),
        ({"name": "a/b"}, "'a/b' is not accepted"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_at_once_with_its_place(changes, words):
    with pytest.raises(ConfigError) as error:
        study(**changes)
    assert words in str(error.value)


GRID = """\
base: recipe.yaml
tasks:
  cola: {data.task: cola}
variants:
  lora:
    adapter:
      method: lora
      r: 6
  "1e3": {alpha: 7}
  "on": {adapter.options: {}, train.report_to: []}
search: {learning_rate: [1e-4, 2.5e-3]}
seeds: [3]
"""


def test_a_grid_file_takes_a_recipe_as_its_base_and_reads_back_what_is_written(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {name: there}\ntrain: {max_steps: 5}\noutput: runs/x\nseed: 4\n")
    (tmp_path / "my.grid.yaml").write_text(GRID)
    one = Study.read(tmp_path / "my.grid.yaml")
    assert one.name == "my.grid"
    assert one.base == {"model.name": "there", "train.max_steps": 5}
    assert one.variants["lora"] == {"adapter.method": "lora", "adapter.r": 6}
    assert {cell.settings["seed"] for cell in one.wanted({})} == {3}
    (tmp_path / "study.yaml").write_text(one.yaml())
    assert Study.read(tmp_path) == one
    (tmp_path / "study.yaml").write_text(f"{one.yaml()}space: {{}}\ntrials: 0\n")  # as versions with Optuna wrote it
    assert Study.read(tmp_path) == one


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("      r: 6", "      rr: 6", "grid.yaml:8: unknown key adapter.rr; did you mean adapter.r"),
        ("alpha: 7", "alpha: -7", "grid.yaml:9: adapter.alpha: -7 is not accepted; expected finite number > 0 or null"),
        ("seeds: [3]", "seed: [3]", "grid.yaml:12: unknown key seed; known here: name, base"),
        ("2.5e-3]", "'2']", "grid.yaml:11: train.learning_rate: \"2\" is not accepted"),
        ("seeds: [3]", "space: {r: {low: 2, high: 8}}", "space: spaces to draw trials from (Optuna's) are gone"),
        ("base: recipe.yaml", "base: none.yaml", "none.yaml: no such file"),
        ("cola: {data.task: cola}", "cola: {data.task: 3}", "grid.yaml:3: data.task: 3 is not accepted"),
        ("base: recipe.yaml", "base: bad.yaml", "bad.yaml:2: train.max_steps: 0 is not accepted; expected integer >= 1"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_told_with_its_line(old, new, words, tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {name: there}\n")
    (tmp_path / "bad.yaml").write_text("train:\n  max_steps: 0\n")
    (tmp_path / "grid.yaml").write_text(GRID.replace(old, new))
    with pytest.raises(ConfigError) as error:
        Study.read(tmp_path / "grid.yaml")
    assert words in str(error.value)


def test_a_method_that_is_not_there_is_told_before_any_cell(tmp_path, capsys):
    """Its name may be a plug-in's, so the recipe cannot check it."""
    (tmp_path / "recipe.yaml").write_text("model: {name: there}\n")
    (tmp_path / "grid.yaml").write_text(GRID.replace("method: lora", "method: lorra"))
    assert cli.run(["grid", "-c", str(tmp_path / "grid.yaml"), "-o", str(tmp_path / "runs")]) == 2
    assert "method='lorra': no such method; nearest: " in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_not_there_is_not_taken_for_a_recipe(tmp_path):
    for path, words in [(tmp_path / "grid.yaml", "no such file"), (tmp_path, "holds no study.yaml")]:
        with pytest.raises(ConfigError, match=rf"{words}.* expected .*grid\.yaml") as error:
            Study.read(path)
        assert "config show" not in str(error.value)  # which writes a recipe


def test_the_grids_of_the_documentation_are_read(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "grid.md").read_text()
    (grid,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "grid.yaml").write_text(grid)
    assert Study.read(tmp_path / "grid.yaml").expected({}) == 2 * 3 * (4 + 2) == 36


def test_outcomes_are_what_the_cells_folders_say(tmp_path):
    for name, status in [("a", "done"), ("b", "failed"), ("c", "running")]:
        run = {
            "status": status,
            "result": {"metrics": {}},
            "parameters": {"trainable": 5, "total": 9},
            "recipe": study().wanted({})[0].recipe().model_dump(mode="json"),
        }
        cell_folder(tmp_path, name).write_facts({**run, "kind": "diverged"} if name == "b" else run)
    metrics = {"accuracy": 70.0, "train_seconds": 2.5, "train_cpu_seconds": 2.0, "test": {"accuracy": 65.0}}
    record.write_json(tmp_path / CELLS / "a" / "metrics.json", {"metrics": metrics, "main_metric": "accuracy"})
    (tmp_path / CELLS / "d").mkdir()
    found = outcomes(tmp_path)
    assert {name: (item.status, item.settled) for name, item in found.items()} == {
        "a": ("done", True), "b": ("failed", True), "c": ("running", False),
    }  # fmt: skip
    assert (found["a"].test, found["a"].metrics["accuracy"], found["a"].cpu_seconds) == ({"accuracy": 65.0}, 70.0, 2.0)
    assert "test" not in found["a"].metrics
    for data, same in [({"validation": "x", "test": "y"}, False), ({"validation": "x", "test": "x"}, True)]:
        record.write_json(tmp_path / CELLS / "a" / "metrics.json", {"metrics": metrics, "data": data})
        assert outcomes(tmp_path)["a"].same_rows is same
    (tmp_path / CELLS / "c" / "run.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"c.run\.json is damaged"):
        outcomes(tmp_path)
