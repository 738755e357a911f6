"""What an adapter must do on a model, whatever its class: the checks, for Dual LoRA and for PEFT's LoRA as the judge.

The verdict on a check is True, or a text that says what was found instead. LoRA's merge rounds, so its outputs are
compared within a tolerance; Dual LoRA's must be equal to the bit.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from architectures.build import Small, floats, reason, training
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import duallora
from duallora import DualLoraConfig
from duallora.errors import ConfigError
from duallora.nn import DualLoraLinear

Verdict = bool | str
METHODS = ("duallora", "nn", "lora")
OPTIONS: dict[str, Any] = {
    "r": 2, "alpha": 8, "warmup_steps": 1, "init_std": 0.3, "direction_init_std": 0.1, "init_seed": 0
}  # fmt: skip
CONFIGS: dict[str, Callable[..., Any]] = {
    "lora": lambda targets: LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False),
    "duallora": lambda targets: DualLoraConfig(target_modules=targets, **OPTIONS),
}
STEPS = 2  # the first opens the gate


def targets(model: PreTrainedModel) -> dict[str, list[str] | str]:
    """The sets of targets: "linear", "head", "embeddings" (of the input), "positions" (all others), "convolutions"."""
    names = {module: name for name, module in model.named_modules()}
    linear = [module for module in names if isinstance(module, (nn.Linear, Conv1D))]
    sets: dict[str, list[str] | str] = {}
    if linear:
        sets["linear"] = "all-linear"
    head = _given(model.get_output_embeddings) or next(
        (m for m in reversed(linear) if not any(part.isdigit() for part in names[m].split("."))), None
    )
    if isinstance(head, (nn.Linear, Conv1D)) and head in names:
        sets["head"] = [names[head]]
    first = _given(model.get_input_embeddings)
    if isinstance(first, nn.Embedding) and first in names:
        sets["embeddings"] = [names[first]]
    sets["positions"] = [n for m, n in names.items() if isinstance(m, nn.Embedding) and m is not first]
    sets["convolutions"] = [n for m, n in names.items() if type(m) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)]
    return {name: chosen for name, chosen in sets.items() if chosen}


def _given(method: Callable[[], Any]) -> Any:
    try:
        return method()
    except (NotImplementedError, AttributeError, TypeError):
        return None


def outputs(model: nn.Module, small: Small) -> list[Tensor]:
    torch.default_generator.manual_seed(3)  # some models draw noise
    with torch.no_grad():
        return floats(model(**small.inputs))


def equal(ours: list[Tensor], theirs: list[Tensor], scale: float | None = None) -> Verdict:
    """Whether these are the same numbers: to the bit, or where ``scale`` is given within a thousandth of it."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return f"other shapes: {[tuple(t.shape) for t in ours]}, {[tuple(t.shape) for t in theirs]}"[:120]
    worst = distance(ours, theirs)
    allowed = (
        0.0
        if scale is None
        else 1e-2 * scale + 1e-5 * max((float(t.abs().max()) for t in theirs if t.numel()), default=0.0)
    )
    return worst <= allowed or f"differs by {worst:.2g}"


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The greatest difference, 0 for the same bits (deep stacks of convolutions overflow); inf for other shapes."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.numel()]
    same = [(a == b) | (a.isnan() & b.isnan()) for a, b in pairs]
    apart = [
        (a - b).abs().nan_to_num(nan=float("inf")).masked_fill(s, 0) for (a, b), s in zip(pairs, same, strict=True)
    ]
    return max((float(t.max()) for t in apart), default=0.0)


@contextmanager
def verdict(found: dict[str, Verdict], name: str) -> Iterator[None]:
    """An error inside is the verdict on this check."""
    try:
        yield
    except Exception as error:
        found[name] = ("refused: " if isinstance(error, ConfigError) else "") + reason(error)


def aligned(model: nn.Module) -> nn.Module:
    """Weights mapped from a file lie at any address, and weights may want a gradient: kernels round differently there."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval().requires_grad_(False)


def reloaded(model: PreTrainedModel, small: Small, expected: list[Tensor]) -> Verdict:
    """Save ``model``, load it with its own class, compare."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again, info = type(model).from_pretrained(folder, output_loading_info=True)
        same = equal(outputs(aligned(again), small), expected)
    missing = sorted(info["missing_keys"])
    if missing:
        return f"newly initialized: {len(missing)} such as {missing[0]}; {'equal' if same is True else same}"
    return same


def of_the_base(small: Small) -> dict[str, Verdict]:
    """What the model does by itself, without an adapter."""
    found: dict[str, Verdict] = {}
    expected = outputs(small.model, small)
    found["deterministic"] = equal(outputs(small.model, small), expected)
    with verdict(found, "deepcopy"):
        found["deepcopy"] = equal(outputs(copy.deepcopy(small.model), small), expected)
    with verdict(found, "pickle"):
        found["pickle"] = equal(outputs(pickle.loads(pickle.dumps(small.model)), small), expected)  # noqa: S301
    with verdict(found, "reload"):
        found["reload"] = reloaded(copy.deepcopy(small.model), small, expected)
    return found


def train(model: nn.Module, layers: dict[str, nn.Module], small: Small) -> tuple[dict[str, list[bool]], str]:
    """Of each adapted layer, in which steps it had a gradient; and what was warned of."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)
    took_part: dict[str, list[bool]] = {name: [] for name in layers}
    with warnings.catch_warnings(record=True) as said, training(model):
        warnings.simplefilter("always")
        for _ in range(STEPS):
            torch.default_generator.manual_seed(4)
            g = torch.Generator().manual_seed(5)
            found = [t for t in floats(model(**small.inputs)) if t.requires_grad]
            if not found:
                return {name: [False] for name in layers}, NOTHING
            torch.stack([(t * torch.randn(t.shape, generator=g)).mean() for t in found]).sum().backward()
            for name, layer in layers.items():
                took_part[name].append(any(p.grad is not None for p in layer.parameters() if p.requires_grad))
            optimizer.step()
            optimizer.zero_grad()
    return took_part, " ".join(str(w.message) for w in said)


def _named(idle: list[str], said: str) -> bool:
    """Whether one warning counts them and names them, or the first few of many."""
    counted = f"{len(idle)} adapted layers got no gradient" in said
    return counted and sum(name in said for name in idle) >= min(5, len(idle))


NOTHING = "no output has a gradient"  # torch says so at backward()


def adapted(model: nn.Module, method: str, chosen: list[str] | str) -> nn.Module:
    if method == "nn":
        return duallora.nn.adapt(model, None if isinstance(chosen, str) else chosen, **OPTIONS)
    return get_peft_model(model, CONFIGS[method](chosen))


def run(small: Small, method: str, chosen: list[str] | str) -> dict[str, Any]:
    """All checks of one method on one set of targets; stops where nothing further can be asked."""
    found: dict[str, Any] = {}
    with verdict(found, "adapt"):
        model = adapted(copy.deepcopy(small.model), method, chosen)
        found["adapt"] = True
    if found["adapt"] is not True:
        return found
    kind = DualLoraLinear if method == "nn" else BaseTunerLayer
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, kind)}
    found["layers"] = len(layers)
    with verdict(found, "step"):
        took_part, said = train(model, layers, small)
        idle = [name for name, steps in took_part.items() if not steps[0]]
        found["step"] = True if said != NOTHING else NOTHING
        if idle:
            kinds = sorted({_kind(small.model, name) for name in idle})
            found |= {"idle": len(idle), "idle_kinds": kinds, "named": _named(idle, said)}
    if found["step"] is not True:
        return found
    if method != "lora":
        steps = {n: int(m.duallora_step if method == "nn" else m.duallora_step["default"]) for n, m in layers.items()}
        wrong = [n for n, step in steps.items() if step != sum(took_part[n])]  # an expert may miss a step
        found["gate"] = not wrong or f"{len(wrong)} counted otherwise than they took part, such as {wrong[0]}"
        duallora.advance_gate(model, STEPS)  # as if it had been told to: what was not trained acts as well
    scale = None
    expected = outputs(model, small)
    effect = distance(expected, outputs(small.model, small))
    found["effect"] = effect > 0 or "none"
    if method == "lora":
        scale = effect  # its merge rounds
    for name, duplicate in (("deepcopy", copy.deepcopy), ("pickle", lambda m: pickle.loads(pickle.dumps(m)))):  # noqa: S301
        with verdict(found, name):
            found[name] = equal(outputs(duplicate(model), small), expected, scale)
    if method == "nn":
        with verdict(found, "save"):
            again = adapted(copy.deepcopy(small.model), method, chosen)
            duallora.nn.load_adapter_state_dict(again, duallora.nn.adapter_state_dict(model))
            found["save"] = equal(outputs(aligned(again), small), expected)
        with verdict(found, "merged"):
            merged = duallora.nn.merge(model)
            found["merged"] = equal(outputs(merged, small), expected)
            with verdict(found, "reload"):
                found["reload"] = reloaded(merged, small, outputs(merged, small))
        return found
    with verdict(found, "merge"):
        model.merge_adapter()
        found["merge"] = equal(outputs(model, small), expected, scale)
        model.unmerge_adapter()
        found["unmerge"] = equal(outputs(model, small), expected, scale)
    model.create_or_update_model_card = lambda folder: None  # a text, and slow
    with verdict(found, "save"), tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(copy.deepcopy(small.model), folder)
        found["save"] = equal(outputs(aligned(again), small), expected, scale)
    with verdict(found, "unload"):
        found["unload"] = equal(outputs(copy.deepcopy(model).unload(), small), outputs(small.model, small), scale)
    with verdict(found, "merged"):
        merged = model.merge_and_unload()
        found["merged"] = equal(outputs(merged, small), expected, scale)
        with verdict(found, "reload"):
            found["reload"] = reloaded(merged, small, outputs(merged, small))
    if str(found["merged"]).startswith("refused"):
        found["unchanged"] = equal(outputs(model, small), expected)
    return found


def _kind(model: nn.Module, name: str) -> str:
    """Which layer of which class this is: "WavLMAttention.q_proj"."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    if child.isdigit():
        grandparent, _, middle = parent.rpartition(".")
        return f"{type(model.get_submodule(grandparent)).__name__}.{middle}.N"
    return f"{type(owner).__name__}.{child}"


def examine(small: Small, method: str, only: str = "") -> dict[str, Any]:
    """What the model does by itself, and each set of targets (those of ``only``) under ``method``; nothing where it is not
    deterministic."""
    base = of_the_base(small)
    sets = targets(small.model) if base["deterministic"] is True else {}
    sets = {name: chosen for name, chosen in sets.items() if not only or name in only.split()}
    if method == "nn":  # adapts linear layers of torch
        linear = {n for n, m in small.model.named_modules() if type(m) is nn.Linear}
        sets = {name: c for name, c in sets.items() if linear and (isinstance(c, str) or {*c} <= linear)}
    return {"base": base, "targets": {name: run(small, method, chosen) for name, chosen in sets.items()}}


def outcome(base: dict[str, Verdict], verdicts: dict[str, Any]) -> str:
    """ "passed"; "refused", with a reason; "nothing to train", which torch says itself; or "fault"."""
    if _wrong(base, verdicts):
        return "fault"
    if any(str(value).startswith("refused") for value in verdicts.values()):
        return "refused"
    return "nothing to train" if verdicts.get("step") == NOTHING else "passed"


def faults(found: dict[str, Any]) -> list[str]:
    """What must not be, in words."""
    sets = found["targets"].items()
    return [f"{name}, {check}: {v}" for name, verdicts in sets for check, v in _wrong(found["base"], verdicts).items()]


def _wrong(base: dict[str, Verdict], verdicts: dict[str, Any]) -> dict[str, Any]:
    """All that is not True, but for what the base model cannot do either and what is refused with a reason."""
    wrong = {}
    for check, value in verdicts.items():
        if check in ("layers", "idle", "idle_kinds", "effect") or value is True or base.get(check, True) is not True:
            continue
        if str(value).startswith("refused") or verdicts.get("step") == NOTHING:
            continue
        if check == "named":
            value = f"{verdicts['idle']} of {verdicts['layers']} untrained: {', '.join(verdicts['idle_kinds'])}"
        wrong[check] = value
    return wrong
