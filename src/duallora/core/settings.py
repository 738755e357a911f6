"""The settings of a Dual LoRA adapter: type, default, range and meaning of each, and which exclude each other.

The one owner: :class:`duallora.DualLoraConfig` has them as fields, a recipe's adapter section as keys, and
``duallora.nn`` takes those that a plain layer has. Imports nothing but the errors.
"""

# ruff: noqa: RUF009  (setting() is a field())
from __future__ import annotations

import json
import math
import operator
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from duallora.core.patterns import can_take_for_ever
from duallora.errors import ConfigError, is_number

MAX_RANK = 65536
MAX_INT = 2**31 - 1

# method of duallora.methods -> its rank (or width) where none is named; docs/methods.md says where each is from.
RANKS = {
    "lora": 16, "lora+": 16, "dora": 16, "corda": 16, "hira": 32, "randlora": 32, "vera": 256, "mora": 8, "delta-lora": 8,
    "flora-core": 8, "loreft": 8, "galore": 4, "garare": 4, "flora-optimizer": 8, "adapter-p": 256, "adapter-l": 224,
}  # fmt: skip


# What init = "lora" needs of the others: dW is 0 because B is, and LoRA's B A under signs that are all up.
LORA_START = {"magnitude": "identity", "direction": "ste", "warmup": "none", "init_std": None, "init_weights": True}


class Range(NamedTuple):
    """The values that a number may take; None is no bound. The names are pydantic's and annotated_types'."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def holds(self, value: float) -> bool:
        tests = (operator.ge, operator.gt, operator.le, operator.lt)
        return all(bound is None or test(value, bound) for test, bound in zip(tests, self, strict=True))

    def __str__(self) -> str:
        signs = (">=", ">", "<=", "<")
        bounds = [f"{sign} {bound:g}" for sign, bound in zip(signs, self, strict=True) if bound not in (None, MAX_INT)]
        return " and ".join(bounds)


Rank = Annotated[int, Range(ge=1, le=MAX_RANK)]
Positive = Annotated[float, Range(gt=0)]
Index = Annotated[int, Range(ge=0, le=MAX_INT)]


def share_of(steps: int) -> int:
    """Warm-up steps of a run of ``steps`` optimizer steps (>= 1): a tenth, and at least 10, but no more than a third of it."""
    return max(math.ceil(steps / 10), min(10, steps // 3))


def setting(default: Any, meaning: str) -> Any:
    """A field with its meaning; a mutable default is copied for each object."""
    metadata = {"help": meaning}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    """What decides an adapter, dW = gate * alpha / sqrt(r1 r2) * ReLU(B A) . Sign(D C)."""

    r: Rank = setting(16, "Rank of both groups (paper: 16 for LLaMA, 8 for GLUE).")
    r1: Rank | None = setting(None, "Rank of the magnitude group B A; null is r (paper: r1 = r2).")
    r2: Rank | None = setting(None, "Rank of the direction group D C; null is r (paper: r1 = r2).")
    alpha: Positive | None = setting(None, "Scale: dW is multiplied by alpha / sqrt(r1 r2); null is 2 r (as DoRA).")
    duallora_dropout: Annotated[float, Range(ge=0, lt=1)] = setting(
        0.0,
        "Dropout on the input of the dW path (paper's commonsense and GLUE runs: 0; E2E: 0.1); embeddings have none.",
    )
    target_modules: list[str] | str | None = setting(
        None, 'Modules to adapt: "all-linear", a list of name endings, or one regular expression (PEFT).'
    )
    target_parameters: list[str] | None = setting(
        None, "Fused experts to adapt, 3-d parameters by the ends of their names, such as experts.down_proj (PEFT)."
    )
    exclude_modules: list[str] | str | None = setting(None, "Modules to leave out, written as target_modules (PEFT).")
    modules_to_save: list[str] | None = setting(
        None, "Modules trained in full and saved with the adapter, such as a new head (PEFT)."
    )
    trainable_token_indices: list[Index] | dict[str, list[Index]] | None = setting(
        None, "Tokens whose embeddings are trained, new ones say; or such lists by the embeddings' names (PEFT)."
    )
    layers_to_transform: list[Index] | Index | None = setting(
        None, "Layer numbers, counted from 0, to adapt; null is all of them (PEFT)."
    )
    rank_pattern: dict[str, Rank | tuple[Rank, Rank]] = setting(
        {}, "Other ranks, r or [r1, r2], for modules by name or regular expression (PEFT)."
    )
    alpha_pattern: dict[str, Positive] = setting({}, "Other alphas for modules by name or regular expression (PEFT).")
    init_std: Positive | None = setting(
        None,
        "Standard deviation of A and B at the start; null goes by a layer's width and r1 (paper: Gaussian, no value).",
    )
    init: Literal["gaussian", "lora"] = setting(
        "gaussian",
        "Start of the factors: random (paper), or LoRA's, with B at 0 and every sign up (ours; needs magnitude identity, "
        "direction ste, warmup none).",
    )
    # Twenty steps of a rate of 1e-3. At a tenth of it a third of the signs turn at once with each of the first steps, all
    # by the same few rows, and some seeds end with a model that gives every input one answer (LOG.md).
    direction_init_std: Positive = setting(
        0.02,
        "Standard deviation of C and D at the start: how easily signs flip (with 0.002 some seeds learn nothing), and "
        "their size where it counts (xnor, dorefa, identity); with init lora, r2 times its square is D C.",
    )
    init_seed: Annotated[int, Range(ge=0, le=2**63 - 1)] | None = setting(
        None, "Seed of the start values, a stream for each layer; null draws from torch's generator."
    )
    warmup: Literal["ramp", "residual", "none"] = setting(
        "ramp", "How dW starts at 0: the gate climbs to 1 (ramp), dW(0) is subtracted (residual), or it does not."
    )
    warmup_steps: Index | Literal["auto"] = setting(
        "auto",
        "Optimizer steps until the gate is 1 (paper: a warm-up; its base recipe: 100). With auto, transformers' Trainer and its "
        "kin take a tenth of their run, at least 10 and no more than a third of it; any other loop 100.",
    )
    magnitude: Literal["relu", "abs", "sigmoid", "identity"] = setting(
        "relu", "Function on B A (paper: relu; Table 6: abs, sigmoid; Setting 1: identity)."
    )
    direction: Literal["ste", "tanh", "xnor", "dorefa", "identity", "fixed"] = setting(
        "ste",
        "Sign of D C and its gradient (paper: ste, Eq. 7; Table 3: xnor, dorefa; Settings 2, 3: identity, fixed), or tanh of "
        "D C over the root mean square of its row (ours).",
    )
    ste_clip: Literal["chain", "update", "none", "window"] = setting(
        "chain",
        "What the sign's gradient clips to [-1, 1]: chain is Eq. 7, update is Eq. 12; window: that of tanh (ours).",
    )
    forward: Literal["auto", "merged", "added"] = setting(
        "auto",
        "One GEMM on W0 + dW (merged: the merged model's bits), or a second one for dW (added: dropout, quantized "
        "or sharded bases).",
    )
    backend: Literal["auto", "reference", "recompute", "cpu", "triton"] = setting(
        "auto", "Code that computes the layer: kernels (cpu, triton), torch operators (recompute), plain autograd."
    )
    use_dora: bool = setting(False, "Train the length of every output row apart from its direction (DoRA, 2402.09353).")
    gradient_tokens: Annotated[float, Range(gt=0, le=1)] = setting(
        1.0,
        "Share of the tokens that form the factors' gradient, unbiased; 1 is exact, less is faster on CPUs and noisier "
        "(experimental; linear layers).",
    )
    bias: Literal["none", "all", "duallora_only"] = setting("none", "Biases to train (paper: none).")


def explained(fields: Iterable[Field[Any]], hints: Mapping[str, Any]) -> str:
    """Each field, its meaning, the values it takes and its default, as a docstring lists arguments."""
    lines = []
    for one in fields:
        values = _words(hints[one.name]) if one.name in vars(Settings)["__dataclass_fields__"] else ""
        default = one.default if one.default_factory is MISSING else one.default_factory()
        facts = "; ".join(filter(None, [values, f"default {default!r}"]))
        meaning = one.metadata.get("help", "of PEFT").rstrip(".")
        lines.append(f"    {one.name}: {meaning}. {facts[0].upper()}{facts[1:]}.")
    return "Args:\n" + "\n".join(lines).replace("null", "None")


@cache
def hints() -> dict[str, Any]:
    """The type of each setting by name, its range included."""
    return get_type_hints(Settings, include_extras=True)


def check(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value that its setting does not take, or for settings that exclude each other."""
    for name, value in values.items():
        hint = hints().get(name)
        entries = {f"{name}[{key!r}]": held for key, held in value.items()} if isinstance(value, Mapping) else {}
        if entries and get_origin(hint) is dict:
            hint = get_args(hint)[1]
        for shown, held in (entries or {name: value}).items():
            if hint is not None and not _fits(held, hint):
                raise ConfigError(f"{shown}={held!r}: expected {_words(hint)}.")
    for problem in contradictions(values):
        raise ConfigError(f"{problem}.")


def contradictions(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What of ``values`` excludes what or is no pattern, with a remedy; names are written with ``prefix``."""

    def say(name: str) -> str:
        return f"{prefix}{name} = {json.dumps(values[name])}"

    if values.get("forward") == "merged" and values.get("duallora_dropout", 0) > 0:
        yield (
            f"{say('forward')} cannot apply {say('duallora_dropout')}: the merged weight has one input for both paths. Use "
            f'{prefix}forward = "auto" or "added", or a dropout of 0'
        )
    if values.get("backend") == "reference" and values.get("gradient_tokens", 1) < 1:
        yield (
            f"{say('backend')} is plain autograd, which cannot sample {say('gradient_tokens')}: use "
            f'{prefix}backend = "auto"'
        )
    if values.get("warmup") == "residual" and values.get("direction") == "fixed":
        yield f'{say("warmup")} is not defined for {say("direction")}: use {prefix}warmup = "ramp"'
    if values.get("target_parameters"):
        for name, odd in (
            ("use_dora", True), ("duallora_dropout", values.get("duallora_dropout")), ("forward", "added"), ("direction", "fixed"),
        ):  # fmt: skip
            if odd and values.get(name) == odd:
                yield (
                    f"{prefix}target_parameters cannot have {say(name)}: the experts' own forward runs on W0 + dW, one for "
                    f"each; leave {prefix}{name} at its default, or train without {prefix}target_parameters"
                )
    if values.get("init") == "lora":
        wanted: dict[str, Any] = dict(LORA_START)
        if "warmup" not in values:  # a plain layer, whose ramp is its steps
            wanted["warmup_steps"] = 0
        if wrong := [name for name, value in wanted.items() if values.get(name, value) != value]:
            remedy = ", ".join(f"{prefix}{name} = {json.dumps(wanted[name])}" for name in wrong)
            yield (
                f"{say('init')} starts as LoRA does, and {' and '.join(map(say, wrong))} would not be LoRA (of B A = 0, relu "
                f'and abs have no gradient): use {remedy}, or {prefix}init = "gaussian"'
            )
    if values.get("layers_to_transform") is not None and isinstance(values.get("target_modules"), str):
        yield (
            f"{prefix}layers_to_transform needs {prefix}target_modules as a list of names, such as [q_proj, v_proj]; it is "
            f"{json.dumps(values['target_modules'])}"
        )
    for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        held = values.get(name)
        for expression in [held] if isinstance(held, str) else held if isinstance(held, Mapping) else ():
            try:
                re.compile(str(expression))
            except (re.error, RecursionError) as error:
                yield (
                    f"{prefix}{name} holds {json.dumps(expression)}, which is no regular expression ({error}); expected one as "
                    "Python's re takes it, such as .*q_proj, or names of modules"
                )
                continue
            if can_take_for_ever(str(expression)):
                yield (
                    f"{prefix}{name} holds {json.dumps(expression)[:80]}, which repeats what itself repeats and can take for "
                    "ever to match; expected one without nested repeats, or names of modules"
                )


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the type and in the range; of names and their lists PEFT is the judge."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Annotated:
        kind, bounds = arguments
        return is_number(value) and (kind is float or isinstance(value, int)) and bounds.holds(value)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if hint in (bool, types.NoneType):
        return isinstance(value, hint)
    return value is None or not is_number(value)


def _words(hint: Any) -> str:
    """The values that a type and range allow, for people."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(option) for option in arguments)
    if origin is Annotated:
        kind, bounds = arguments
        return f"{'a whole' if kind is int else 'a finite'} number {bounds}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple:
        return f"a list of {len(arguments)} of them"
    if origin is list and arguments != (str,):
        return "a list of whole numbers"
    plain = {bool: "True or False", types.NoneType: "None", str: "text", dict: "a mapping"}
    return plain.get(origin or hint, "a list of names")
