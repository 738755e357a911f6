"""Dual LoRA for plain PyTorch modules, without PEFT.

adapt(model, ["q_proj", "v_proj"], r=8, warmup_steps=100)   # freezes the model, replaces its linear layers
...train the parameters that require grad with any torch optimizer; the gate opens by itself...
torch.save(adapter_state_dict(model), "adapter.pt")
merge(model)                                                # plain nn.Linear again
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from duallora.core.equation import DIRECTIONS, MAGNITUDES, STE_CLIPS, dual_delta, dual_scaling
from duallora.core.gate import Gate, ramp, track
from duallora.core.init import DIRECTION_STD, draw_factors, layer_seed
from duallora.errors import ConfigError, IntegrityError, check_positive, check_rank, check_steps, is_number
from duallora.ops import build_weight, check_backend, dual_linear, keep_off_the_fast_path
from duallora.ops.cache import EvalCache, Watch
from duallora.ops.reference import apply_weight


class DualLoraLinear(nn.Module):
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
        magnitude, direction, ste_clip: as in :func:`duallora.dual_delta`; fixed signs exist in DualLoraConfig only.
        gradient_tokens, backend: as in :func:`duallora.dual_linear`.

    Raises:
        ConfigError (a ValueError): a value out of range.
    """

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
        direction_init_std: float = DIRECTION_STD,
        init_seed: int | None = None,
        magnitude: str = "relu",
        direction: str = "ste",
        ste_clip: str = "chain",
        gradient_tokens: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        r1, r2 = (r if r1 is None else r1), (r if r2 is None else r2)
        alpha = 2 * r if alpha is None else alpha
        for name, rank in (("r", r), ("r1", r1), ("r2", r2)):
            check_rank(name, rank)
        if init_std is not None:
            check_positive("init_std", init_std)
        for name, number in (("alpha", alpha), ("direction_init_std", direction_init_std)):
            check_positive(name, number)
        check_steps("warmup_steps", warmup_steps)
        for value, allowed in ((magnitude, MAGNITUDES), (direction, DIRECTIONS[:-1]), (ste_clip, STE_CLIPS)):
            if value not in allowed:
                raise ConfigError(f"{value!r} is unknown: choose one of {', '.join(allowed)}.")
        if not is_number(gradient_tokens) or not 0 < gradient_tokens <= 1:
            raise ConfigError(f"gradient_tokens={gradient_tokens!r}: expected a share of the tokens in (0, 1].")
        check_backend(backend)  # now, not in the first forward
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r1, self.r2, self.scaling, self.warmup_steps = r1, r2, dual_scaling(alpha, r1, r2), warmup_steps
        self.options: dict[str, Any] = {"magnitude": magnitude, "direction": direction, "ste_clip": ste_clip}
        self.backend, self.gradient_tokens = backend, gradient_tokens
        self._eval_cache = EvalCache()
        limit = min(base.in_features, base.out_features)
        if max(r1, r2) > limit:
            warnings.warn(
                f"rank {max(r1, r2)} is above min(in, out) = {limit} of this layer; a larger rank adds parameters but no "
                "freedom.",
                stacklevel=2,
            )
        base.requires_grad_(False)
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        A, B, C, D = draw_factors(
            layer_seed(init_seed, ""), self.out_features, self.in_features, r1, r2,
            init_std=init_std, direction_init_std=direction_init_std,
        )  # fmt: skip
        self.duallora_A, self.duallora_B = nn.Parameter(A.to(device)), nn.Parameter(B.to(device))
        self.duallora_C, self.duallora_D = nn.Parameter(C.to(device)), nn.Parameter(D.to(device))
        self.register_buffer("duallora_step", torch.zeros((), dtype=torch.int64, device=device))
        # Saved with the factors, so that they are not loaded under another scale or formula.
        options = {"scaling": self.scaling, "warmup_steps": warmup_steps, **self.options}
        self.register_buffer("duallora_options", torch.tensor(list(json.dumps(options).encode()), dtype=torch.uint8))
        track(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._eval_cache = EvalCache()  # copy.copy would share it
        track(self)

    def _arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        scaling = self.scaling * ramp(self.duallora_step, self.warmup_steps)  # type: ignore[arg-type]
        return self.duallora_A, self.duallora_B, self.duallora_C, self.duallora_D, scaling

    def gates(self, active_only: bool = False) -> Iterator[Gate]:
        """The layer's one gate (see :mod:`duallora.core.gate`)."""
        factors = [self.duallora_A, self.duallora_B, self.duallora_C, self.duallora_D]
        yield Gate("", self.duallora_step, self.warmup_steps, factors, False)  # type: ignore[arg-type]

    def get_delta_weight(self) -> Tensor:
        """dW [out, in] at the present gate, float32."""
        with torch.no_grad():
            return dual_delta(*self._arguments(), **self.options)

    def merged(self) -> nn.Linear:
        """A plain ``nn.Linear`` with W0 + dW, whose output has the very bits of this layer's."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        weight = build_weight(self.weight, *self._arguments(), **self.options, backend=self.backend)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = self.bias
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] for x [..., in]."""
        if self._may_keep(x):
            kept = self._eval_cache.find(x)
            if kept is None:
                watch = self._watch()
                with torch.inference_mode(False):
                    kept = build_weight(self.weight, *self._arguments(), **self.options, backend=self.backend)
                if watch is not None:
                    self._eval_cache.keep(kept, watch, whole=True)
            return apply_weight(x, kept, self.bias, False)
        sampled = self.gradient_tokens < 1 and self.training
        seed = torch.randint(1 << 62, (), dtype=torch.int64, device="cpu") if sampled else None
        return dual_linear(
            x, self.weight, self.bias, *self._arguments(), **self.options,
            gradient_tokens=self.gradient_tokens, seed=seed, backend=self.backend,
        )  # fmt: skip

    def _may_keep(self, x: Tensor) -> bool:
        """Whether this is an evaluation whose W' can be kept (see :mod:`duallora.ops.cache`)."""
        return not (
            self.training
            or torch.is_grad_enabled()
            or x.device.type != "cpu"
            or x.dtype != self.weight.dtype
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        )

    def _watch(self) -> Watch | None:
        own, parameters, buffers = vars(self), self._parameters, self._buffers
        attributes = [(name, copy.copy(own[name])) for name in ("scaling", "warmup_steps", "options", "backend")]
        names = [name for name in parameters if name.startswith("duallora_")]
        objects = [(parameters, name, parameters[name]) for name in names]
        tensors: list[tuple[dict, Any]] = [(parameters, name) for name in names]
        tensors.append((buffers, "duallora_step"))
        if not all(d[k].device.type == "cpu" and d[k].is_contiguous() for d, k in [*tensors, (parameters, "weight")]):
            return None
        return Watch(self, attributes, [], objects, tensors, [(parameters, "weight")])

    def train(self, mode: bool = True) -> DualLoraLinear:
        """Training mode; going to training gives the memory of the evaluation cache back."""
        if mode:
            self._eval_cache.drop()
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, r1={self.r1}, r2={self.r2}"


def adapt(model: nn.Module, target_modules: Iterable[str] | None = None, **options: Any) -> nn.Module:
    """Freeze ``model`` and replace its linear layers by :class:`DualLoraLinear`, in place; returns ``model``.

    A second call adapts further layers; a model that is itself an ``nn.Linear`` comes back as the new layer.

    Args:
        target_modules: last parts of the names of the ``nn.Linear`` layers to adapt; None = every one of them.
        options: as for :class:`DualLoraLinear`; with ``init_seed`` each layer gets a stream of its own.

    Raises:
        ConfigError: a name matches no linear layer.
    """
    if isinstance(model, nn.Linear):
        return DualLoraLinear(model, **options)
    targets = None if target_modules is None else set(target_modules)
    found: dict[str, nn.Linear] = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Linear and (targets is None or any(f".{name}".endswith(f".{t}") for t in targets))
    }
    missing = [t for t in sorted(targets or ()) if not any(f".{name}".endswith(f".{t}") for name in found)]
    if missing or not found:
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if type(m) is nn.Linear})
        raise ConfigError(
            f"target_modules={missing or targets} match no nn.Linear; this model has: {', '.join(linear)}."
        )
    init_seed = options.pop("init_seed", None)
    adapted: dict[nn.Linear, DualLoraLinear] = {}  # a layer used in two places stays one layer
    for name, linear_layer in found.items():
        if linear_layer not in adapted:
            seed = None if init_seed is None else layer_seed(init_seed, name)
            adapted[linear_layer] = DualLoraLinear(linear_layer, init_seed=seed, **options)
    for name, parameter in model.named_parameters():
        if ".duallora_" not in f".{name}":  # factors of an earlier call stay trainable
            parameter.requires_grad_(False)
    for name, linear_layer in found.items():
        model.set_submodule(name, adapted[linear_layer])
        keep_off_the_fast_path(model.get_submodule(name.rpartition(".")[0]), adapted[linear_layer])
    return model


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The factors and gate counters of ``model``, by full name: what to save."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".duallora_" in f".{name}"}


def load_adapter_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Load what :func:`adapter_state_dict` gave into a model adapted with the same options; returns ``model``.

    Raises:
        IntegrityError: a tensor is missing, unexpected or of another shape, or the adapter was trained with other
            options.
    """
    own = adapter_state_dict(model)
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
    """Replace every :class:`DualLoraLinear` of ``model`` by the merged ``nn.Linear``, in place; returns ``model``."""
    if isinstance(model, DualLoraLinear):
        return model.merged()
    merged: dict[DualLoraLinear, nn.Linear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, DualLoraLinear):
            if module not in merged:
                merged[module] = module.merged()
            model.set_submodule(name, merged[module])
    return model
