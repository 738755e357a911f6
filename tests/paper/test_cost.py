"""Predicted cost against sums done by hand."""

from __future__ import annotations

import math

import pytest

from duallora import paper
from duallora.config.load import load_recipe
from duallora.errors import ConfigError
from duallora.paper import cost
from duallora.paper.cost import Gpu, Shape

LLAMA = ["model.name=yahma/llama-7b-hf", "model.dtype=bfloat16", "data.max_length=272"]
TARGETS = "adapter.target_modules=[q_proj, k_proj, v_proj, up_proj, down_proj]"
LORA = ["adapter.method=lora", TARGETS, "adapter.r=32"]
FACTORS = 32 * 32 * (3 * 2 * 4096 + 2 * (4096 + 11008))  # of rank 32 in 32 layers
ROUND = Gpu(100.0, 10.0, 1000.0, 80.0, efficiency=0.5)  # 50 TFLOP/s get used in bfloat16


def recipe(*overrides: str, task: str = "commonsense"):
    return load_recipe(None, [*LLAMA, *overrides], task=task)


def test_shapes_of_llama_7b_by_hand():
    """Two and three layers carried on to 32 give the whole model: 4 d^2 + 3 d f a layer, the head, the embeddings."""
    d, f, layers, vocabulary = 4096, 11008, 32, 32000
    linear = layers * (4 * d * d + 3 * d * f) + d * vocabulary
    adapted = layers * (3 * d * d + 2 * d * f)
    norms = (2 * layers + 1) * d
    found = cost.shape(recipe(TARGETS, "adapter.r=16"))
    assert found == Shape(linear + d * vocabulary + norms, linear, adapted, FACTORS)
    assert cost.shape(recipe("adapter.method=full")) == Shape(found.base, linear, 0, found.base)
    assert cost.shape(recipe(*LORA)) == found


def test_layers_below_the_first_adapted_one_are_passed_forward_alone():
    """One layer of 32, the last but one: a 32nd of the factors, and 30 layers that no gradient reaches."""
    d, f = 4096, 11008
    one = recipe(*LORA, "adapter.layers_to_transform=[30]", "train.max_steps=9")
    whole, found = cost.shape(recipe(*LORA)), cost.shape(one)
    below = 30 * (4 * d * d + 3 * d * f)
    assert found == Shape(whole.base, whole.linear, 3 * d * d + 2 * d * f, FACTORS // 32, below)
    predicted = cost.cost(one, ROUND)
    per_token = 4 * found.linear - 2 * found.below + 6 * found.trained
    assert predicted.training == pytest.approx(predicted.tokens * per_token / 50e12)


@pytest.mark.parametrize(
    ("overrides", "products"),
    [
        (LORA, lambda n, a: 4 * n + 6 * FACTORS),
        (["adapter.method=full"], lambda n, a: 6 * n),
        ([*LORA, "train.gradient_checkpointing=true"], lambda n, a: 6 * n + 6 * FACTORS),
        # 2 N_a more for the gradient of W', and three products of rank 32 in each step of 8 rows of 118 tokens
        (["adapter.r=16", TARGETS], lambda n, a: 4 * n + 2 * a + 6 * 32 * a / (8 * 118)),
    ],
    ids=["lora", "full", "recomputed", "duallora"],
)
def test_training_time_by_hand(overrides, products):
    one = recipe(*overrides, "train.max_steps=1000", "train.batch_size=8")
    shape, found = cost.shape(one), cost.cost(one, ROUND)
    assert (found.steps, found.tokens) == (1000, 1000 * 8 * 118)
    assert found.training == pytest.approx(found.tokens * products(shape.linear, shape.adapted) / 50e12)
    in_float32 = cost.cost(one.model_copy(update={"model": one.model.model_copy(update={"dtype": "float32"})}), ROUND)
    assert in_float32.training == pytest.approx(10 * found.training)


def test_a_step_is_no_faster_than_two_readings_of_the_weights():
    one = recipe(TARGETS, "train.max_steps=1000", "train.batch_size=1", "data.max_length=8")
    shape, found = cost.shape(one), cost.cost(one, ROUND)
    assert found.tokens * 6 * shape.linear / 50e12 < found.training
    assert found.training == pytest.approx(1000 * 2 * 2 * shape.base / 600e9)


def test_steps_follow_the_rows_that_are_left():
    """An epoch of CoLA without 855 rows in batches of 32."""
    settings = ["model.name=FacebookAI/roberta-base", "data.holdout=855", "train.batch_size=32", "train.epochs=2"]
    one = load_recipe(None, settings, task="cola")
    assert cost.cost(one, ROUND).steps == 2 * math.ceil((8551 - 855) / 32)


def test_generating_reads_every_weight_at_each_step():
    """One step of one row more is one more reading of 13.5 GB at 60 % of 1,000 GB/s; tests count only where they are scored."""
    settings = [TARGETS, "train.max_steps=1", "data.eval_limit=16", "eval.batch_size=16", "eval.test=true"]
    short, long = (cost.cost(recipe(*settings, f"eval.max_new_tokens={n}"), ROUND) for n in (1, 2))
    weights = 2 * cost.shape(recipe(TARGETS)).base
    assert long.scoring - short.scoring == pytest.approx(2 * weights / 600e9)  # validation and test, a batch each
    without = cost.cost(recipe(*settings[:-1], "eval.max_new_tokens=1"), ROUND)
    assert without.scoring < short.scoring


def test_the_loss_is_taken_as_often_as_the_recipe_says():
    """After training; before it; every three steps of ten."""
    settings = [TARGETS, "train.max_steps=10", "eval.metrics=false"]
    once, before, on_the_way = (
        cost.cost(recipe(*settings, *more), ROUND).scoring
        for more in (["eval.before=false"], ["eval.before=true"], ["eval.before=false", "train.eval_steps=3"])
    )
    assert (before / once, on_the_way / once) == pytest.approx((2, 4))


def test_memory_is_the_planners():
    """LoRA on LLaMA-7B in bfloat16 holds the 13.5 GB of weights and does not fit a card of 12 GB; no figure for HiRA."""
    gpu = cost.GPUS["a100-80gb"]
    one = recipe(*LORA, "train.batch_size=2", "train.gradient_checkpointing=true")
    assert 13.5e9 < cost.memory(one, gpu) < 24e9
    assert cost.memory(recipe(TARGETS, "adapter.method=hira", "adapter.r=32"), gpu) is None


def test_every_method_has_a_price():
    """The two tables that hold all methods, those that train everything among them, on their first models."""
    for name in ("table2", "table4"):
        study = paper.studies(name, "paper")[0]
        cells = {cell.tags["variant"]: cell for cell in study.wanted({})}
        assert cells.keys() == study.variants.keys()
        for cell in cells.values():
            assert 0 < cost.cost(cell.recipe(), cost.GPUS["h100"]).hours < 2000


def test_an_unknown_gpu_or_data_set_is_refused_and_this_machine_is_timed():
    assert 1e-4 < cost.gpu_named("CPU").float32 < 1000
    with pytest.raises(ConfigError, match=r"'b300': expected one of h200, .* or cpu"):
        cost.gpu_named("b300")
    with pytest.raises(ConfigError, match="'boolq' is not known here"):
        cost.cost(recipe(task="boolq"), ROUND)
