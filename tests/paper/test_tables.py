"""The paper's tables as studies: what each compares is equal in everything else, and every printed row has its run."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from duallora import methods, paper
from duallora.config.recipe import Recipe
from duallora.grid.study import Outcome
from duallora.paper import cost, printed, reproduce
from duallora.train import prepare

PAPER = {study.name: study for name in paper.HOME if name[:5] in ("table", "figur") for study in paper.studies(name, "paper")}  # fmt: skip
MINI = [study for name in paper.HOME for study in paper.studies(name, "mini")]
TABLES = [study for name, study in PAPER.items() if name.startswith("table")]
ADAPTER = {
    "r", "r1", "r2", "alpha", "method", "options", "magnitude", "direction", "target_modules", "duallora_dropout",
    "init_std", "direction_init_std",
}  # fmt: skip
# What gradient-start, ablations and capacity compare.
STARTS = {"init", "init_batches", "warmup", "gradient_tokens", "ste_clip"}


def recipes_of(study) -> dict[tuple[str, str], Recipe]:
    """Of the first cell of each task and variant."""
    found = {}
    for cell in reproduce.Part(study, Path()).first_cells():
        key = cell.tags["task"], cell.tags["variant"]
        found[key] = found.get(key) or cell.recipe()
    return found


@pytest.fixture(scope="module", params=[*PAPER.values(), *MINI], ids=lambda study: study.name)
def study(request):
    return request.param


@pytest.fixture(scope="module")
def recipes(study):
    return recipes_of(study)


def test_methods_differ_in_nothing_but_the_adapter(study, recipes):
    """Same base, rows, steps, batches, schedule, loss mask, seeds and grid: what `_unequal` of a report would list."""
    mini = study in MINI
    for task in study.tasks:
        own = [recipes[task, variant] for variant in study.variants]
        for one, other in itertools.pairwise(own):
            methods_of = {one.adapter.method, other.adapter.method}
            one_has = type(one.adapter).model_fields.keys() ^ type(other.adapter).model_fields.keys()
            same = {"adapter": {*ADAPTER, *one_has}, "train": {"learning_rate"}}
            if mini:
                same["adapter"] |= STARTS | ({"modules_to_save"} if "full" in methods_of else set())
                same["train"].add("direction_lr_ratio")
            else:
                same["adapter"].add("modules_to_save")
                if "full" in methods_of:  # see the test of 16 bits
                    same["model"] = {"dtype"}
                if methods_of & {"galore", "garare"}:  # whose command has none
                    same["train"].add("weight_decay")
            assert one.model_dump(exclude=same) == other.model_dump(exclude=same)
        if mini:
            assert own[0].model.name.startswith("builtin:") or study.name.startswith("capacity")  # which has none
            continue
        grids = [study.search_for(task, variant)["train.learning_rate"] for variant in study.variants]
        assert {len(grid) for grid in grids} == {5}  # as many tries for every method, and as far apart
        assert len({round(grid[-1] / grid[0], 1) for grid in grids}) == 1
        assert own[0].eval.test
    assert len(study.seeds) >= 3


def test_nobody_trains_the_weights_themselves_in_16_bits(recipes):
    """A step of 1e-5 on a weight of 0.02 is below half a unit of bfloat16's last place (2^-9 of it) and would be lost."""
    whole = [recipe for recipe in recipes.values() if methods.get(recipe.adapter.method).whole]
    assert {recipe.model.dtype for recipe in whole} <= {"float32", "auto"}


def test_equal_parameters_where_equality_is_claimed(study, recipes):
    """LoRA, LoRA+ and HiRA of rank r train what Dual LoRA of r1 + r2 = r does; so do all shares of Figure 2."""
    if study.name.startswith("capacity"):
        pytest.skip("see test_capacity.py")
    task = next(iter(study.tasks))
    some = [name for number, name in enumerate(study.variants) if number % 3 == 0 or not name.startswith("r1-")]
    counts = {variant: cost.shape(recipes[task, variant]).trained for variant in some}
    if study.name.startswith("figure"):
        assert len({count for variant, count in counts.items() if not variant.startswith("dora")}) == 1
    for variant, count in counts.items():
        method, _, rank = variant.rpartition("-r")
        if rank.isdigit() and method in ("lora", "lora+", "hira"):
            assert counts.get(f"duallora-r{int(rank) // 2}", count) == count
    if study.name == "table5":
        assert counts["setting3-2r"] == counts["duallora"] == counts["setting1-r"] == counts["setting2-r"]
        assert counts["setting1-2r"] == 2 * counts["duallora"] == counts["setting3-4r"]
    if study.name.startswith("gradient-start"):
        assert len(set(counts.values())) == 1


def test_the_rate_that_a_row_was_published_with_is_among_those_tried():
    """LoRA 3e-4, DoRA 1e-4 and 2e-4 (DoRA's scripts), HiRA 1e-3 (its README); LoRA's 2e-4 on E2E, and its GLUE scripts."""
    for name, study in PAPER.items():
        if name.startswith("table1-"):
            assert {3e-4, 1e-4, 2e-4, 1e-3} <= {*study.search["train.learning_rate"]}
        if name.startswith("table4-"):
            assert 2e-4 in study.search["train.learning_rate"]
    glue = {"base": {"mnli": 5e-4, "cola": 4e-4}, "large": {"qnli": 2e-4, "rte": 4e-4}}
    for size, tasks in glue.items():
        for task, rate in tasks.items():
            assert rate in PAPER[f"table2-roberta-{size}"].tasks[task]["search"]["train.learning_rate"]
    authors = {"full": 3e-5, "galore": 3e-5, "garare": 3e-5, "vera-r1024": 1e-2, "randlora-r64": 1e-4}
    roberta = PAPER["table2-roberta-base"]
    for task, (variant, rate) in itertools.product(roberta.tasks, authors.items()):
        label = next(own for own in roberta.variants if own.startswith(variant.partition("-r")[0]))
        grid = roberta.search_for(task, label)["train.learning_rate"]
        assert grid[1] <= rate <= grid[-2], (task, variant)  # it lies within, with a step below
    assert {6e-5, 1.2e-4} <= {*PAPER["table2-deberta-xxl"].tasks["sst2"]["search"]["train.learning_rate"]}


def test_every_printed_row_has_a_variant():
    """A row that nobody can run again would have to say so in ``copied``; there is none."""
    both = [(study, row) for study in TABLES for row in reproduce.printed_rows(study.name)]
    assert [row for _, row in both] == [row for table in printed.FILES for row in printed.rows(table)]
    assert [row for study, row in both if row.variant not in study.variants] == []


def shown(row: printed.Row, recipe: Recipe) -> tuple[float, str]:
    """The count of a row's variant in the row's unit, and the digits it is printed with."""
    counted = cost.shape(recipe)
    if row.method == "FFT":
        return counted.trained / 1e6, "1"
    percent = 100 * counted.trained / (counted.base + counted.trained)
    return (percent if row.table in (1, 3, 5) else counted.trained / 1e6), "3" if "70B" in row.model else "2"


# What no count gives: known misprints and inherited figures; see docs/methods.md. Our count beside the printed one.
DIFFER = {
    (1, "LLaMA3-8B", "DoRA", 16): (0.36, 0.35),
    (2, "RoBERTa-base", "VeRA", None): (0.16, 0.3),
    (2, "DeBERTa-XXL", "DoRA", 32): (9.58, 9.4),
    (3, "", "STE (ours)", None): (0.83, 1.64),
    (3, "", "XNOR-Net", None): (0.83, 1.64),
    (3, "", "Dorefa-Net", None): (0.83, 1.64),
    (5, "", "Setting 3(r=32)", None): (0.83, 0.84),
    (4, "GPT2-M", "Prefix", None): (0.34, 0.35),
    (4, "GPT2-L", "Prefix", None): (0.74, 0.77),
    (4, "GPT2-M", "LoRA", 4): (0.39, 0.35),
    (4, "GPT2-M", "LoRA", 8): (0.79, 0.70),
    (4, "GPT2-M", "LoRA+", 8): (0.79, 0.70),
    (4, "GPT2-M", "DoRA", 8): (0.86, 0.71),
    (4, "GPT2-M", "Dual LoRA", 4): (0.79, 0.70),
    (4, "GPT2-L", "LoRA", 4): (0.74, 0.77),
    (4, "GPT2-L", "LoRA", 8): (1.47, 1.54),
    (4, "GPT2-L", "LoRA+", 8): (1.47, 1.54),
    (4, "GPT2-L", "DoRA", 8): (1.61, 1.56),
    (4, "GPT2-L", "Dual LoRA", 4): (1.47, 1.54),
}
UNCOUNTED = {"FFT", "GaLore", "GaRare"}  # everything is trained


@pytest.mark.parametrize("study", TABLES, ids=lambda study: study.name)
def test_a_run_trains_as_many_parameters_as_its_row_says(study):
    """Counted by the train verb's own code on the published shapes; half a unit of the printed figure's last digit."""
    task, recipes = next(iter(study.tasks)), recipes_of(study)
    for row in reproduce.printed_rows(study.name):
        if row.trainable is None or row.method in UNCOUNTED:
            continue
        ours, digits = shown(row, recipes[task, row.variant])
        text = f"{row.trainable:g}"
        half = 0.5 * 10.0 ** -len(text.partition(".")[2]) if row.table == 2 else 0.5 * 10.0 ** -int(digits)
        key = (row.table, row.model, row.method, row.rank)
        if key in DIFFER:
            assert (round(ours, 2), row.trainable) == DIFFER[key]
            assert abs(ours - row.trainable) > half
            assert row.note, key
        else:
            assert abs(ours - row.trainable) <= half + 1e-9, (key, ours)


def test_the_figures_are_the_papers():
    """Figure 2: LLaMA3-8B, 15 ratios of 32 and three lines; Figure 3: LLaMA2-7B, LoRA beside Dual LoRA. From its text, by hand."""
    two, three = PAPER["figure2"], PAPER["figure3"]
    assert two.base["model.name"] == "meta-llama/Meta-Llama-3-8B"
    assert three.base["model.name"] == "meta-llama/Llama-2-7b-hf"
    ranks = [(r.adapter.r1, r.adapter.r2) for r in recipes_of(two).values() if r.adapter.method == "duallora"]
    assert ranks == [(2, 30), (4, 28), (6, 26), (8, 24), (10, 22), (12, 20), (14, 18), (16, 16), (18, 14), (20, 12), (22, 10),
                     (24, 8), (26, 6), (28, 4), (30, 2)]  # fmt: skip
    assert [v for v in two.variants if not v.startswith("r1-")] == ["lora-r32", "dora-r32", "hira-r32"]
    assert [*three.variants] == ["duallora-r16", "lora-r32"]
    (mini,) = [study for study in MINI if study.name == "figure2"]
    assert [v for v in mini.variants if not v.startswith("r1-")] == ["lora-r16", "dora-r16", "hira-r16"]


def test_mrpc_rte_and_stsb_start_from_the_same_methods_mnli_adapter():
    study = PAPER["table2-roberta-base"]
    assert {task for task, own in study.tasks.items() if own.get("after") == "mnli"} == {"mrpc", "rte", "stsb"}
    assert {cell.tags["task"] for cell in study.wanted({})}.isdisjoint({"mrpc", "rte", "stsb"})


def test_steps_are_those_of_the_scripts():
    """HiRA's README batch on the rows it trained on; LoRA's CoLA script for RoBERTa-base on what is not held out."""
    llama, roberta = PAPER["table1-llama-7b"], PAPER["table2-roberta-base"]
    recipe = recipes_of(llama)["commonsense", "duallora-r16"]
    assert prepare.schedule(recipe, 170_300) == (31_932, 100)  # 10,644 batches of 16 in each of three epochs
    recipe = recipes_of(roberta)["cola", "lora-r8"]
    assert prepare.schedule(recipe, 8_551 - 855) == (80 * 241, 1157)  # 7,696 / 32 = 240.5; 6 % of 19,280 is 1,156.8


def test_table_4_trains_as_loras_scripts_do():
    """Label smoothing 0.1, <|endoftext|> as separator, the printed prefix; LoRA's README: alpha 32 at r = 4, so B A counts eight times; DoRA and Dual LoRA have that alpha, not that of their rank."""
    for name in ("table4-gpt2-m", "table4-gpt2-l"):
        for (_, variant), recipe in recipes_of(PAPER[name]).items():
            assert (recipe.train.label_smoothing, recipe.data.task) == (0.1, "e2e_gpt2")
            if variant == "prefix":
                assert cost.shape(recipe).trained == {"table4-gpt2-m": 344_064, "table4-gpt2-l": 737_280}[name]
            if variant.startswith(("lora", "dora", "duallora")):
                assert recipe.adapter.alpha == 32, variant


@pytest.mark.parametrize(
    ("scores", "at_chance", "new"),
    [((0.0,) * 5, True, {2.5e-6}), ((0.1, 0.0, 0.3, 0.2, 0.0), True, {2.5e-6}), ((0.0,) * 5, False, set()), ((0, 0, 0, 0, 3.0), False, {1.6e-4})],
)  # fmt: skip
def test_a_search_at_chance_everywhere_goes_down(scores, at_chance, new):
    """Whatever noise says of the middle; a best value at the edge is followed, as before."""
    study = PAPER["table2-roberta-base"]
    rates = (5e-6, 1e-5, 2e-5, 4e-5, 8e-5)

    def points(outcomes):
        return {point.values["train.learning_rate"]: point for point in study.points(outcomes, "cola", "full")}

    outcomes = {}
    for rate, score in zip(rates, scores, strict=True):
        name = study.cell_name("cola", "full", points({})[rate], study.seeds[0])
        found = {"metrics": {"matthews": score}, "main_metric": "matthews", "at_chance": at_chance}
        outcomes[name] = Outcome(name, "done", "done", **found)
    assert points(outcomes).keys() - rates == new
