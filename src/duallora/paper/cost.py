"""What a run will cost, before any of it has run: predictions, each with the assumption it rests on.

    training   F = [2 N + 2 (N - N_b) + 2 N_w (+ 2 N) + 6 n] per token + 6 r N_a per step
               seconds = F / (MFU x peak), or 2 bytes / (MBU x bandwidth) where that is more

N are the weights in matrix products (the head of a language model too, embeddings not), N_a those with an adapter and
N_w those whose gradient [out, in] is formed: all in full fine-tuning, N_a for Dual LoRA (its factors' gradients come
from that of W'), none for LoRA. N_b are
those of the layers below the first adapted one (``layers_to_transform``; 0 elsewhere). A token costs 2 N forward, 2 N for
the gradients of activations, which end at that layer, 2 N again where activations are recomputed, and 6 n in n trained
weights that it passes through itself, as LoRA's: 4 N + 6 n for LoRA, 6 N in full. Products of factors of rank r are formed once per step. However few the tokens, a step reads all weights
twice.
Attention's own products are left out (under 2 % of a LLaMA-7B at 120 tokens). Rows are real tokens, without padding.

    generation   prompts at 2 N per token as above; then each step reads every weight once:
                 seconds = steps x bytes / (MBU x bandwidth)

MFU and MBU are assumptions, not measurements; small models at small batches, whose time goes into starting kernels, get
a fraction of it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from duallora import methods
from duallora.config.recipe import DataSection, Recipe
from duallora.errors import ConfigError
from duallora.plan.architectures import config_of
from duallora.plan.planner import Gpus, Planner
from duallora.plan.trace import at_depth, depth_of
from duallora.terminal import quiet_libraries
from duallora.train import prepare
from duallora.train.adapter import put

MFU = 0.35  # of a data sheet's peak
MFU_MEASURED = 0.7  # of a rate measured on large matrices
MBU = 0.6


class Gpu(NamedTuple):
    """Peaks of a data sheet (dense): TFLOP/s in bfloat16 (float16 where there is none) and float32, GB/s, GB."""

    bfloat16: float
    float32: float
    bandwidth: float
    memory: float
    efficiency: float = MFU


GPUS = {
    "h200": Gpu(989, 67, 4800, 141),
    "h100": Gpu(989, 67, 3350, 80),
    "a100-80gb": Gpu(312, 19.5, 2039, 80),
    "a100-40gb": Gpu(312, 19.5, 1555, 40),
    "l40s": Gpu(362, 91.6, 864, 48),
    "a6000": Gpu(155, 38.7, 768, 48),
    "v100": Gpu(125, 15.7, 900, 32),
    "rtx4090": Gpu(165, 82.6, 1008, 24),
    "rtx3090": Gpu(71, 35.6, 936, 24),
}


class Facts(NamedTuple):
    """A task's data on the hub: rows of each split, tokens of a training row, of its prompt, and steps of an answer."""

    rows: int
    validation: int
    test: int
    tokens: float
    prompt: float = 0.0
    generated: int = 0


# Rows as published. Tokens were counted with SmolLM2's tokenizer (GLUE: MiniLM's) on the data at hand, those of mnli,
# mrpc and qqp are estimates; the mixture of the eight commonsense sets is their mean.
FACTS = {
    "commonsense": Facts(146_620, 960, 22_419, 118, 111, 8),  # the eight sets of the hub
    "arc_easy": Facts(2_131, 120, 2_376, 115, 108, 8),
    "mnli": Facts(392_702, 9_815, 19_647, 39),
    "sst2": Facts(67_349, 872, 872, 13),
    "mrpc": Facts(3_668, 408, 408, 53),
    "cola": Facts(8_551, 1_043, 1_043, 13),
    "qnli": Facts(104_743, 5_463, 5_463, 51),
    "qqp": Facts(363_846, 40_430, 40_430, 30),
    "rte": Facts(2_490, 277, 277, 70),
    "stsb": Facts(5_749, 1_500, 1_500, 22),
    "e2e": Facts(42_061, 547, 630, 56, 37, 32),
}

FACTS["e2e_gpt2"] = FACTS["e2e"]
# Without a hub: made up, and of Python 3.11's standard library.
FACTS["facts"] = Facts(4_096, 4_096, 4_096, 13.4, 5.4, 8)
FACTS["arithmetic"] = Facts(8_192, 512, 512, 54, 51.3, 3)
FACTS["builtin:docstrings"] = Facts(4_270, 363, 665, 35.5, 22.7, 13)

# Models that share the shapes of an architecture the planner knows.
SAME_SHAPES = {
    "yahma/llama-7b-hf": "llama-7b",
    "yahma/llama-13b-hf": "llama-13b",
    "meta-llama/Meta-Llama-3-70B-Instruct": "llama-3-70b",
    "builtin:smollm2-135m": "smollm2-135m",
}

# Products per token beyond LoRA's, as multiples of the adapted weights: from the equation and who computes it.
_DENSE = {
    "duallora": 2,  # the gradient of W'; forward and input gradient are those of W0's own product
    "hira": 6,  # PEFT multiplies by W0 * (B A) apart: forward and both gradients
    "randlora": 12,  # PEFT multiplies by two factors of full rank
}
_STARTS = ("init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "corda_method", "calibration")
_FORMED = ("duallora", "dora", "hira")  # a product [out, in] of the factors in every step, with its gradients


class Shape(NamedTuple):
    """Weights of a base model (all, in matrix products), those an adapter sits on, what is trained without heads, and
    those in products of the layers below the first adapted one, which no gradient reaches."""

    base: int
    linear: int
    adapted: int
    trained: int
    below: int = 0


class Cost(NamedTuple):
    """One run: optimizer steps, tokens trained on, and predicted seconds of training and of scoring."""

    steps: int
    tokens: int
    training: float
    scoring: float

    @property
    def hours(self) -> float:
        return (self.training + self.scoring) / 3600


def gpu_named(name: str) -> Gpu:
    """A GPU's data, or this processor's as just measured for "cpu".

    Raises:
        ConfigError: no such GPU in ``GPUS``.
    """
    found = this_machine() if name.lower() == "cpu" else GPUS.get(name.lower())
    if found is None:
        raise ConfigError(f"--gpu {name!r}: expected one of {', '.join(GPUS)} or cpu")
    return found


@cache
def this_machine() -> Gpu:
    """The processor's speed in one float32 product and one copy, as torch does them here."""

    def seconds(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(4):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)

    a, b = torch.rand(768, 768), torch.rand(16 << 20)
    peak = 2 * 768**3 / seconds(lambda: a @ a) / 1e12
    return Gpu(peak, peak, 2 * b.nbytes / seconds(b.clone) / 1e9, math.inf, MFU_MEASURED)


def cost(recipe: Recipe, gpu: Gpu) -> Cost:
    """The cost of one run of ``recipe``, by the formulas at the top.

    Raises:
        ConfigError: the size of its data is not known here.
    """
    known, counted, options = facts(recipe), shape(recipe), recipe.train
    held_out = recipe.data.holdout or 0
    rows = min(known.rows - held_out, recipe.data.limit or known.rows)
    steps, _ = prepare.schedule(recipe, rows)
    length = min(known.tokens, recipe.data.max_length)
    tokens = round(steps * options.batch_size * options.gradient_accumulation_steps * length)
    method = recipe.adapter.method
    whole = methods.get(method).whole
    per_token = (6 if options.gradient_checkpointing else 4) * counted.linear - 2 * counted.below
    per_token += 2 * counted.linear if whole else _DENSE.get(method, 0) * counted.adapted
    per_token += 0 if whole or method in ("duallora", "hira") else 6 * counted.trained  # x passes through the factors
    per_step = 6 * _rank(recipe) * counted.adapted if method in _FORMED else 0
    half = recipe.model.dtype in ("bfloat16", "float16")
    rate = gpu.efficiency * 1e12 * (gpu.bfloat16 if half else gpu.float32)
    read = counted.base * (2 if half else 4) / (MBU * 1e9 * gpu.bandwidth)
    training = max((tokens * per_token + steps * per_step) / rate, 2 * steps * read)

    limit, token = recipe.data.eval_limit or math.inf, 2 * counted.linear / rate
    validation = min(held_out or known.validation, limit)
    test = min(known.test, limit) if recipe.eval.test else 0
    passes = 1 + recipe.eval.before + (steps // options.eval_steps if options.eval_steps else 0)
    scoring = passes * validation * length * token  # the loss after, before, on the way
    if recipe.eval.metrics and known.generated:
        answer = min(known.generated, recipe.eval.max_new_tokens or known.generated)
        for count in (validation, test):
            scoring += count * known.prompt * token + math.ceil(count / recipe.eval.batch_size) * answer * read
    elif recipe.eval.metrics:
        scoring += test * length * token
    return Cost(steps, tokens, training, scoring)


def memory(recipe: Recipe, gpu: Gpu) -> float | None:
    """Predicted bytes of one run on one such GPU, rows at their longest; None where the planner does not know the method."""
    method = recipe.adapter.method
    if method not in ("lora", "lora+", "dora", "duallora") or gpu.memory == math.inf:
        return None
    method = "lora" if method == "lora+" else method
    adapter = recipe.adapter
    targets = adapter.target_modules or "all-linear"
    planner = _planner(
        recipe.model.name, recipe.model.dtype, recipe.train.gradient_checkpointing, _rank(recipe) // 2,
        targets if isinstance(targets, str) else tuple(targets), gpu.memory, recipe.model.quantization,
    )  # fmt: skip
    return planner.need(method, "single", recipe.train.batch_size, recipe.data.max_length).total


@cache
def _planner(
    model: str, dtype: str, checkpointing: bool, rank: int, targets: Any, gigabytes: float, packed: str | None
) -> Planner:
    targets = targets if isinstance(targets, str) else list(targets)
    kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    form: Any = "none" if packed is None else "4bit" if packed == "bnb-4bit" else "8bit"
    config, machine = config_of(SAME_SHAPES.get(model, model)), Gpus(1, gigabytes)
    return Planner(config, machine, form, dtype=kind, rank=rank, targets=targets, checkpointing=checkpointing)


def facts(recipe: Recipe) -> Facts:
    """What is known of the recipe's data.

    Raises:
        ConfigError: nothing is.
    """
    name = recipe.data.task or recipe.data.path or ""
    if name not in FACTS:
        raise ConfigError(f"the size of {name!r} is not known here; known: {', '.join(FACTS)}")
    return FACTS[name]


def shape(recipe: Recipe) -> Shape:
    """Counted by the train verb's own code on models of two and of three layers without weights, and carried on."""
    adapter = recipe.adapter.model_dump_json()
    return _shape(recipe.model.name, "generate" if facts(recipe).generated else "classify", adapter)


@cache
def _shape(model: str, kind: Literal["generate", "classify"], adapter: str) -> Shape:
    config = config_of(SAME_SHAPES.get(model, model))
    section = json.loads(adapter)
    if section["method"] in ("lora", "corda"):  # LoRA's factors, wherever they start
        options = {name: value for name, value in section["options"].items() if name not in _STARTS}
        section |= {"method": "lora", "options": options}
    chosen, depth = section.pop("layers_to_transform", None), depth_of(config)
    layers = range(depth) if chosen is None else [chosen] if isinstance(chosen, int) else chosen
    recipe = Recipe(adapter=section, data=DataSection(task="any"))
    low, high = (_count(recipe, kind, at_depth(config, depth)) for depth in (2, 3))
    counts = (depth, depth, len(layers), len(layers))
    sizes = (few + (n - 2) * (more - few) for few, more, n in zip(low, high, counts, strict=False))
    return Shape(*sizes)._replace(below=min(layers) * (high.linear - low.linear))


def _count(recipe: Recipe, kind: Literal["generate", "classify"], config: Any) -> Shape:
    with quiet_libraries(), torch.device("meta"):
        factory: Any = AutoModelForCausalLM if kind == "generate" else AutoModelForSequenceClassification
        model = factory.from_config(config)
        base = model.num_parameters()
        weights = [m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
        adapted = put(model, recipe, kind, lr_warmup=1).model
    heads = {id(p) for m in adapted.modules() if isinstance(m, ModulesToSaveWrapper) for p in m.parameters()}
    layers = [m.get_base_layer() for m in adapted.modules() if isinstance(m, BaseTunerLayer)]
    return Shape(
        base,
        sum(weights),
        sum(layer.weight.numel() for layer in layers if isinstance(layer, (nn.Linear, Conv1D))),
        sum(p.numel() for p in methods.trained(adapted) if id(p) not in heads),
    )


def _rank(recipe: Recipe) -> int:
    """Columns of the factors of one module: Dual LoRA has two groups."""
    adapter = recipe.adapter
    return (adapter.r1 or adapter.r) + (adapter.r2 or adapter.r) if adapter.method == "duallora" else adapter.r or 0
