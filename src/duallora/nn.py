"""Dual LoRA for plain PyTorch modules, without PEFT.

adapt(model, ["q_proj", "v_proj"], r=8, warmup_steps=100)   # freezes the model, replaces its linear layers
...train the parameters that require grad with any torch optimizer; the gate opens by itself...
torch.save(adapter_state_dict(model), "adapter.pt")
merge(model)                                                # plain nn.Linear again
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from duallora import ties
from duallora.core.equation import Update, dual_scaling
from duallora.core.gate import (
    Gate,
    Gated,
    gated,
    named,
    new_counter,
    track,
    track_copy,
    uncast,
    warn_never_trained,
    watch_forward,
)
from duallora.core.init import draw_factors, layer_seed, warn_of_rank
from duallora.core.settings import Settings, check
from duallora.errors import ConfigError, IntegrityError
from duallora.ops import check_backend
from duallora.ops.autograd import How, product, weight
from duallora.ops.fold import Foldable
from duallora.ops.read import read_weight
from duallora.ops.reference import apply_weight


def _check_base(base: nn.Linear, name: str = "the layer") -> None:
    """Raise ConfigError unless ``base`` computes x W^T + b from a weight and a bias of its own and does nothing else."""
    derived = [key for key in ("weight", "bias") if getattr(base, key) is not None and key not in base._parameters]
    if derived or parametrize.is_parametrized(base):
        raise ConfigError(
            f"{name} computes its {' and '.join(derived) or 'weight'} from other tensors (pruned or parametrized), which a "
            "Dual LoRA layer would not: make it permanent first (torch.nn.utils.prune.remove, "
            "parametrize.remove_parametrizations, remove_weight_norm), or use duallora.DualLoraConfig with PEFT."
        )
    if (
        type(base).forward is not nn.Linear.forward
        or "forward" in vars(base)
        or base._forward_pre_hooks
        or base._forward_hooks
    ):
        raise ConfigError(
            f"{name} is a {type(base).__name__} with a forward or forward hooks of its own, which a Dual LoRA layer would not "
            "run: remove them, or leave it out of target_modules."
        )


class DualLoraLinear(Gated, Foldable, nn.Module):
    """y = x (W0 + dW)^T + b around an ``nn.Linear``: W0 [out, in] and b [out] frozen, the factors of dW trained.

    The weight and bias are shared with ``base`` and keep its names, so a checkpoint of the base model still loads.
    Factors are float32 whatever the dtype of W0.

    Args:
        base: the layer to adapt; frozen in place.
        r: rank of both groups, >= 1. r1, r2: of the magnitude and the direction group; None = r.
        alpha: numerator of the scaling alpha/sqrt(r1 r2), > 0 and finite; None = 2 r.
        warmup_steps: optimizer steps until dW is fully on, >= 0; it starts at 0 (with 0 it starts fully on).
        init_std, direction_init_std: standard deviation of A, B and of C, D at the start, > 0; None for A, B is
            :func:`duallora.core.init.magnitude_std`.
        init_seed: seed of the initial values; None = torch's global generator.
        init: "gaussian", or "lora": plain LoRA until a sign turns; with magnitude="identity" and warmup_steps=0.
        magnitude, direction, ste_clip: as in :func:`duallora.dual_delta`; fixed signs exist in DualLoraConfig only.
        gradient_tokens, backend: as in :func:`duallora.dual_linear`.

    Raises:
        ConfigError (a ValueError): a value out of range.
    """

    duallora_step: Tensor
    duallora_options: Tensor

    def __init__(
        self,
        base: nn.Linear,
        *,
        r: int = 16,
        r1: int | None = None,
        r2: int | None = None,
        alpha: float | None = None,
        warmup_steps: int = 100,
        init_std: float | None = None,
        direction_init_std: float = Settings.direction_init_std,
        init_seed: int | None = None,
        init: str = "gaussian",
        magnitude: str = "relu",
        direction: str = "ste",
        ste_clip: str = "chain",
        gradient_tokens: float = 1.0,
        backend: str = "auto",
    ) -> None:
        check(locals())
        super().__init__()
        _check_base(base)
        if direction == "fixed":
            raise ConfigError("direction='fixed': fixed signs exist in duallora.DualLoraConfig alone.")
        if warmup_steps == "auto":
            raise ConfigError(
                "warmup_steps='auto': a plain layer knows no run; give a number of steps, a tenth of yours."
            )
        check_backend(backend)  # whether it is there: now, not in the first forward
        r1, r2 = (r if r1 is None else r1), (r if r2 is None else r2)
        alpha = 2 * r if alpha is None else alpha
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r1, self.r2, self.scaling, self.warmup_steps = r1, r2, dual_scaling(alpha, r1, r2), warmup_steps
        self.options: dict[str, Any] = {"magnitude": magnitude, "direction": direction, "ste_clip": ste_clip}
        self.backend, self.gradient_tokens = backend, gradient_tokens
        self._folded: Tensor | None = None  # W0 + dW, inside duallora.folded
        warn_of_rank(max(r1, r2), self.out_features, self.in_features)
        base.requires_grad_(False)
        self._parameters["weight"] = base._parameters["weight"]  # the name itself reads W0 + dW
        self.bias = base.bias
        device = base.weight.device
        A, B, C, D = draw_factors(
            layer_seed(init_seed, ""), self.out_features, self.in_features, r1, r2,
            init_std=init_std, direction_init_std=direction_init_std, init=init,
        )  # fmt: skip
        self.duallora_A, self.duallora_B = nn.Parameter(A.to(device)), nn.Parameter(B.to(device))
        self.duallora_C, self.duallora_D = nn.Parameter(C.to(device)), nn.Parameter(D.to(device))
        self.register_buffer("duallora_step", new_counter(device=device))
        self.register_buffer("duallora_options", self._stored_options())
        self.module_name, self.family = "", 0
        track(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._folded = None  # the original's to unfold
        track_copy(self)

    def _apply(self, *args: Any, **kwargs: Any) -> DualLoraLinear:
        step = self.duallora_step
        super()._apply(*args, **kwargs)
        self.duallora_step = uncast(step, self.duallora_step)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Written anew: in a copy whose tensors are averaged, bytes are too.
        destination[f"{prefix}duallora_options"] = self._stored_options().to(self.duallora_options.device)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.duallora_step = uncast(self.duallora_step, self.duallora_step)  # int64 in version 0.1

    def _stored_options(self) -> Tensor:
        """Saved with the factors, so that they are not loaded under another scale or formula: JSON, as bytes."""
        options = {"scaling": self.scaling, "warmup_steps": self.warmup_steps, **self.options}
        return torch.tensor(list(json.dumps(options).encode()), dtype=torch.uint8)

    def _update(self) -> Update:
        """dW at the present gate."""
        if self.warmup_steps and not torch.compiler.is_compiling():
            watch_forward(self, "")
        scaling = gated(self.scaling, self.duallora_step, self.warmup_steps)
        return Update(self.duallora_A, self.duallora_B, self.duallora_C, self.duallora_D, scaling, **self.options)

    def gates(self, active_only: bool = False) -> Iterator[Gate]:
        """The layer's one gate (see :mod:`duallora.core.gate`)."""
        factors = [self.duallora_A, self.duallora_B, self.duallora_C, self.duallora_D]
        yield Gate("", self.duallora_step, self.warmup_steps, factors, False, self.family)

    @property
    def weight(self) -> Tensor:
        """W0 + dW, for a parent that reads it instead of calling the layer; W0 is the parameter of this name."""
        if self._folded is not None:
            return self._folded
        return read_weight(self._base_weight(), self._built)

    def _base_weight(self) -> Tensor:
        W = self._parameters["weight"]
        assert W is not None
        return W

    def get_delta_weight(self) -> Tensor:
        """dW [out, in] at the present gate, float32."""
        with torch.no_grad():
            return self._update().delta()

    def _built(self) -> Tensor:
        """W0 + dW, differentiable."""
        W = self._base_weight()
        return weight(W, None, self._update(), How(backend=self.backend), W.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain ``nn.Linear`` with W0 + dW, whose output has the very bits of this layer's."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight = nn.Parameter(self._built(), requires_grad=False)
        linear.bias = self.bias
        return linear

    @torch.no_grad()
    def fold(self, shared: Container[int]) -> None:
        """Keep W0 + dW beside W0 and compute with it."""
        self._folded = self._built()

    def unfold(self) -> None:
        """Compute with W0 and dW again."""
        self._folded = None

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] for x [..., in]."""
        if self._folded is not None:
            return apply_weight(x, self._folded, self.bias, False)
        how = How(backend=self.backend, gradient_tokens=self.gradient_tokens if self.training else 1.0)
        return product(x, self._base_weight(), self.bias, None, self._update(), how)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, r1={self.r1}, r2={self.r2}"


def adapt(model: nn.Module, target_modules: Iterable[str] | None = None, **options: Any) -> nn.Module:
    """Freeze ``model`` and replace its linear layers by :class:`DualLoraLinear`, in place; returns ``model``.

    A second call adapts further layers; a model that is itself an ``nn.Linear`` comes back as the new layer.

    Args:
        target_modules: last parts of the names of the ``nn.Linear`` layers to adapt; None = every one of them, but for
            subclasses with a forward of their own, which a warning names.
        options: as for :class:`DualLoraLinear`; with ``init_seed`` each layer gets a stream of its own.

    Raises:
        ConfigError: a name matches no linear layer, or one that is pruned, parametrized, hooked or a subclass with a
            forward of its own; nothing was changed.
    """
    if isinstance(model, nn.Linear):
        return DualLoraLinear(model, **options)
    targets = None if target_modules is None else set(target_modules)
    found: dict[str, nn.Linear] = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and (targets is None or any(f".{name}".endswith(f".{t}") for t in targets))
    }
    if targets is None:
        others = [name for name, module in found.items() if type(module).forward is not nn.Linear.forward]
        found = {name: module for name, module in found.items() if name not in others}
        if others:
            warnings.warn(f"layers with a forward of their own are not adapted: {named(others)}.", stacklevel=2)
    missing = [t for t in sorted(targets or ()) if not any(f".{name}".endswith(f".{t}") for name in found)]
    if missing or not found:
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ConfigError(
            f"target_modules={missing or targets} match no nn.Linear; this model has: {', '.join(linear)}."
        )
    for name, linear_layer in found.items():
        _check_base(linear_layer, name)
    init_seed = options.pop("init_seed", None)
    adapted: dict[nn.Linear, DualLoraLinear] = {}  # a layer used in two places stays one layer
    for name, linear_layer in found.items():
        if linear_layer not in adapted:
            seed = None if init_seed is None else layer_seed(init_seed, name)
            adapted[linear_layer] = DualLoraLinear(linear_layer, init_seed=seed, **options)
            adapted[linear_layer].module_name, adapted[linear_layer].family = name, id(model)
    for name, parameter in model.named_parameters():
        if ".duallora_" not in f".{name}":  # factors of an earlier call stay trainable
            parameter.requires_grad_(False)
    for name, linear_layer in found.items():
        model.set_submodule(name, adapted[linear_layer])
    ties.put_in_containers(model, adapted)
    return model


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The factors and gate counters of ``model``, by full name: what to save."""
    warn_never_trained("Saving", _layers(model), "")
    return _own(model)


def _own(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".duallora_" in f".{name}"}


def _layers(model: nn.Module) -> list[DualLoraLinear]:
    return [module for module in model.modules() if isinstance(module, DualLoraLinear)]


def load_adapter_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Load what :func:`adapter_state_dict` gave into a model adapted with the same options; returns ``model``.

    Raises:
        IntegrityError: a tensor is missing, unexpected or of another shape, or the adapter was trained with other
            options.
    """
    own = _own(model)
    missing, unexpected = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    options = [n for n in own.keys() & state_dict.keys() if n.endswith("duallora_options")]
    for name in options:
        ours, theirs = (bytes(d[name].tolist()).decode() for d in (own, state_dict))
        if ours != theirs:
            raise IntegrityError(
                f"the adapter was trained with {theirs}, but this model was adapted with {ours} ({name})."
            )
    wrong = [name for name in own.keys() & state_dict.keys() if own[name].shape != state_dict[name].shape]
    if missing or unexpected or wrong:
        raise IntegrityError(
            f"the adapter does not fit this model: {len(missing)} tensors missing {missing[:3]}, {len(unexpected)} "
            f"unexpected {unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}. Adapt the model with the options "
            "it was trained with."
        )
    model.load_state_dict(dict(state_dict), strict=False)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Replace every :class:`DualLoraLinear` of ``model`` by the merged ``nn.Linear``, in place; returns ``model``.

    A layer whose weight other modules share gets one of its own. A model of transformers is left so that
    ``save_pretrained`` saves what it computes.

    Raises:
        ConfigError: it shares weights in a way that cannot be saved once they came apart; nothing was merged.
    """
    if isinstance(model, DualLoraLinear):
        return model.merged()
    warn_never_trained("Merging", _layers(model), "")
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    owners = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, DualLoraLinear)}
    untying = ties.plan(model, before, before | {f"{name}.weight": id(module) for name, module in owners.items()})
    merged: dict[DualLoraLinear, nn.Linear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, DualLoraLinear):
            if module not in merged:
                merged[module] = module.merged()
            model.set_submodule(name, merged[module])
    ties.put_in_containers(model, merged)
    if untying:
        untying.apply(model, stacklevel=2)
    return model
