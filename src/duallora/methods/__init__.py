"""Every method of the paper's tables behind one call: ``apply(model, MethodSpec("hira", r=32))``.

A method is a :class:`Method` in a file of this package, named once in ``HOME``; one of your own is a :class:`Method`
given to :func:`add`. docs/extending.md says how.
"""

from __future__ import annotations

import copy
import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (first: importing PEFT registers our types, which imports modules of this package)
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from duallora.errors import ConfigError

# Imported on first use: name -> module of this package that holds it in METHODS.
HOME = {
    "full": "projected",
    "lora": "low_rank",
    "lora+": "low_rank",
    "dora": "low_rank",
    "hira": "low_rank",
    "randlora": "low_rank",
    "vera": "low_rank",
    "corda": "low_rank",
    "mora": "mora",
    "delta-lora": "delta_lora",
    "galore": "projected",
    "garare": "projected",
    "flora-core": "core_space",
    "flora-optimizer": "projected",
    "adapter-p": "bottleneck",
    "adapter-l": "bottleneck",
    "prefix": "prompts",
    "prompt": "prompts",
    "p-tuning-v2": "prompts",
    "loreft": "reft",
    "duallora": "dual",
}
_added: dict[str, Method] = {}


@dataclass(frozen=True)
class MethodSpec:
    """Which method, and its settings; None is the method's own default, whose source stands with the method.

    ``options`` are the method's further settings: fields of its PEFT config, or those its page names. ``task_type`` is
    PEFT's ("CAUSAL_LM", "SEQ_CLS", ...).
    """

    name: str
    r: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    target_modules: Any = None
    task_type: str | None = "CAUSAL_LM"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One method: where it is from, what it takes, and the functions that make it.

    ``attach(model, spec, batches)`` returns the adapted model; ``spec`` holds the defaults by then. ``groups(model,
    spec, lr, weight_decay)`` returns optimizer groups and ``optimizer(model, spec, lr, weight_decay)`` an optimizer,
    where AdamW on all that is trained will not do. ``save(adapted, folder)`` replaces PEFT's own, and
    ``restore(adapted, folder)`` reads what it wrote back into the model; ``checkpoint(adapted, folder)`` adds to a checkpoint
    what an adapter's file lacks. ``calibration(spec)`` is how many rows of data the
    method starts from; ``resume(model, spec, folder)`` gives the model as it started, from what ``save`` wrote, without them.
    ``check(spec, recipe, steps)`` raises ConfigError where a run's recipe does not suit it (steps None: not known yet).
    """

    name: str
    title: str
    paper: str  # arXiv id
    equation: str
    attach: Callable[[nn.Module, MethodSpec, Iterable[Mapping[str, Any]] | None], nn.Module]
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of r, alpha, dropout, target_modules, and of options
    no_merge: str = ""  # why it cannot be merged
    no_resume: str = ""  # why training cannot go on from an adapter's file
    whole: bool = False  # trains the model's own weights: what is saved is a model
    rule: type[nn.Module] | None = None  # of a method whose layers are a Rule
    groups: Callable[..., list[dict[str, Any]]] | None = None
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    save: Callable[[Adapted, Path], None] | None = None
    checkpoint: Callable[[Adapted, Path], None] | None = None
    restore: Callable[[Adapted, Path], None] | None = None
    resume: Callable[[nn.Module, MethodSpec, Path], nn.Module] | None = None
    calibration: Callable[[MethodSpec], int] | None = None
    check: Callable[[MethodSpec, Any, int | None], None] | None = None


@dataclass
class Adapted:
    """A model with a method on it. ``model`` is a PeftModel, or the model itself where the method trains its weights."""

    model: Any
    method: Method
    spec: MethodSpec
    state: dict[str, Any] = field(default_factory=dict)  # what the method keeps for saving

    def groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Optimizer groups with the method's learning rates."""
        if self.method.groups is not None:
            return self.method.groups(self.model, self.spec, lr, weight_decay)
        return [{"params": trained(self.model), "lr": lr, "weight_decay": weight_decay}]

    def optimizer(self, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        """The method's own optimizer, else AdamW over :meth:`groups`."""
        if self.method.optimizer is not None:
            return self.method.optimizer(self.model, self.spec, lr, weight_decay)
        return torch.optim.AdamW(self.groups(lr, weight_decay), lr=lr, weight_decay=weight_decay)

    def save(self, folder: str | Path) -> None:
        """Write what :func:`load` needs: an adapter in PEFT's form, or the whole model where its weights were trained."""
        if self.method.save is not None:
            self.method.save(self, Path(folder))
        elif isinstance(self.model, PeftModel):
            # PEFT's own default asks the hub whether the vocabulary grew.
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            self.model.save_pretrained(str(folder))

    def merged(self) -> nn.Module:
        """The plain model with the method's change in its weights; the adapted model is used up.

        Raises:
            ConfigError: the method is no change of weights.
        """
        if self.method.no_merge:
            raise ConfigError(f"{self.method.title} cannot be merged: {self.method.no_merge}")
        return self.model.merge_and_unload() if isinstance(self.model, PeftModel) else self.model


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer should get."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def names() -> list[str]:
    """Every method's name."""
    return [*HOME, *_added]


def get(name: str) -> Method:
    """The method called ``name``.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name in _added:
        return _added[name]
    if name not in HOME:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4) or names()
        raise ConfigError(f"method={name!r}: no such method; nearest: {', '.join(near)}. See docs/methods.md.")
    module = importlib.import_module(f"duallora.methods.{HOME[name]}")
    return module.METHODS[name]


def add(method: Method) -> Method:
    """Make a method of your own known by its name, to :func:`apply` and to the loading of its adapters.

    Raises:
        ConfigError: the name is taken.
    """
    if method.name in HOME:
        raise ConfigError(f"method={method.name!r} is one of duallora's own: choose another name.")
    _added[method.name] = method
    return method


def apply(
    model: nn.Module,
    spec: MethodSpec,
    *,
    batches: Iterable[Mapping[str, Any]] | None = None,
    checkpoint: Path | None = None,
) -> Adapted:
    """Put the method on ``model``, in place; ``batches`` (what the model takes) calibrate those that start from data.

    ``checkpoint`` is a folder that :meth:`Adapted.save` wrote in the run that is taken up again: the start is read from it.

    Raises:
        ConfigError: an unknown method, a setting it does not take, or a model it cannot serve.
    """
    method = get(spec.name)
    spec = with_defaults(method, spec)
    if rows_wanted(method, spec) and batches is None and checkpoint is None:
        raise ConfigError(f"{method.title} starts from data: pass batches=, some dictionaries the model takes.")
    try:
        if checkpoint is not None and method.resume is not None:
            adapted = method.resume(model, copy.deepcopy(spec), checkpoint)
        else:
            adapted = method.attach(model, copy.deepcopy(spec), batches)
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"method {spec.name!r} with {_shown(spec)}: {error}") from error
    state = getattr(adapted, "_method_state", {})
    return Adapted(adapted, method, spec, state)


def rows_wanted(method: Method, spec: MethodSpec) -> int:
    """How many rows of data the method starts from; 0 where it needs none."""
    return method.calibration(with_defaults(method, spec)) if method.calibration else 0


def with_defaults(method: Method, spec: MethodSpec) -> MethodSpec:
    """``spec`` with the method's defaults where it holds None.

    Raises:
        ConfigError: a setting is given that the method does not have.
    """
    fields: dict[str, Any] = {}
    for name in ("r", "alpha", "dropout", "target_modules"):
        value = getattr(spec, name)
        if value is not None and name not in method.defaults:
            raise ConfigError(
                f"{name}={value!r}: {method.title} has no such setting; it takes {', '.join(method.defaults) or 'no setting'}."
            )
        default = method.defaults.get(name)
        fields[name] = value if value is not None else copy.deepcopy(default)
    if callable(fields["alpha"]):
        fields["alpha"] = fields["alpha"](fields["r"])
    own = {k: v for k, v in method.defaults.items() if k not in fields}
    return MethodSpec(spec.name, task_type=spec.task_type, options={**own, **spec.options}, **fields)


def check_options(spec: MethodSpec, known: Iterable[str] = ()) -> None:
    """ConfigError where ``options`` holds what is neither among the method's own defaults nor ``known``."""
    own = get(spec.name).defaults.keys() - {"r", "alpha", "dropout", "target_modules"}
    if unknown := sorted(spec.options.keys() - own - set(known)):
        takes = ", ".join(sorted({*own, *known})) or "none"
        raise ConfigError(f"options {unknown}: {spec.name} takes {takes}.")


def load(model: nn.Module, folder: str | Path) -> Any:
    """``model`` (the base as it was before training) with what :meth:`Adapted.save` wrote."""
    if (Path(folder) / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(model, str(folder))
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"{folder} holds a whole model, and {type(model).__name__} is none of transformers'.")
    attention = model.config._attn_implementation
    return type(model).from_pretrained(str(folder), dtype=model.dtype, attn_implementation=attention)


def _shown(spec: MethodSpec) -> str:
    shown = {k: getattr(spec, k) for k in ("r", "alpha", "dropout", "target_modules") if getattr(spec, k) is not None}
    return ", ".join(f"{k}={v!r}" for k, v in {**shown, **spec.options}.items())
