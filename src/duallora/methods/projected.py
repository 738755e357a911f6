"""Methods that train the weights themselves: full fine-tuning, and three optimizers that keep their states small.

* Full fine-tuning: AdamW on everything.
* GaLore (arXiv 2403.03507): for the targeted matrices, Adam on the projected gradient; every ``gap`` steps P = the r leading
  singular vectors of G on its smaller side:

      R = G P^T (or P^T G)      N = Adam(R)      W <- W - lr scale N P (or P N)

  r = 4, gap = 500, scale = 4: the authors' GLUE command. The moments stay as they are when P changes.
* GaRare (ICLR 2025, openreview pxclAomHat): GaLore with a random P. What could be read does not say how it is drawn; our
  reading: P ~ N(0, 1/r), so E[P P^T] = I, drawn anew every ``gap`` steps (``options={"projection": "orthogonal"}``: with
  orthonormal columns), scale = 1.
* Flora (Hao et al., arXiv 2402.03293), the optimizer: Adafactor whose momentum is kept as M = (momentum) P, P ~ N(0, 1/r) redrawn from a seed
  every ``kappa`` steps, M carried over by M <- M P^T P':

      u = G / sqrt(v)      W <- (1 - lr' decay) W - lr' clip((1 - beta1) u + beta1 M P^T)      M <- beta1 M + (1 - beta1) u P

  v factored as in Adafactor (arXiv 1804.04235), lr' = lr max(1e-3, RMS(W)), or lr with ``scale_parameter=False``. kappa = 1000 and
  these as in the authors' code, r = 8 and beta1 = 0.9 ours. With ``accumulation_rank`` r_a (off, as there) several backward passes
  add up as sum_i G_i P_a, P_a ~ N(0, 1/r_a) anew in each step, which takes their sum P_a^T for G. (Not FLoRA: see ``core_space.py``.)

As methods: all parameters are trained; what is not targeted (embeddings, norms, head) gets plain AdamW (Flora: Adafactor with whole momentum).
States are float32 whatever the weights are, and load from a state_dict as they were, so a resumed run is the same to the bit.
The whole model is saved.

As optimizers (``train.optimizer=galore``, :func:`over_factors`) they take the trained matrices of another method, Dual LoRA's factors
among them, with the same settings.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from transformers.pytorch_utils import Conv1D

from duallora.core.settings import RANKS
from duallora.errors import ConfigError, check_positive, check_rank
from duallora.methods import Method, MethodSpec, check_options, trained
from duallora.tuner.quantized import storage

PROJECTIONS = ("svd", "gaussian", "orthogonal")


class _Float32States(Optimizer):
    """States that survive load_state_dict in float32; torch would cast them to the parameter's type."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        owned = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        for number, (group, parameter) in enumerate(owned, start=1):
            self.state[parameter].update(step=0, seed=(group["seed"] << 32) + number)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for index, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    self.state[parameter][name] = value.to(parameter.device, torch.float32, copy=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One step; a closure is called first, as torch's optimizers do."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if (G := self.gradient(group, state, parameter)) is None:
                    continue
                W = parameter.float()
                change, lr = self.change(group, state, W, G.float())
                # As torch's AdamW: the decay first, then the step.
                parameter.copy_(W * (1 - lr * group["weight_decay"]) - change)
        return loss

    def gradient(self, group: dict[str, Any], state: dict[str, Any], parameter: Tensor) -> Tensor | None:
        """G of this step; None where there is none."""
        return parameter.grad

    def change(self, group: dict[str, Any], state: dict[str, Any], W: Tensor, G: Tensor) -> tuple[Tensor, float]:
        """What the step takes off W, float32, and the rate of the decay; updates ``state``."""
        raise NotImplementedError


class ProjectedAdamW(_Float32States):
    """AdamW, on the projected gradient of the matrices in groups with ``rank`` > 0 (GaLore, GaRare; see above)."""

    def __init__(
        self, params: Iterable[Any], lr: float, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, rank: int = 0, gap: int = 500, scale: float = 1.0, projection: str = "svd", seed: int = 0,
    ) -> None:  # fmt: skip
        check_rank("gap", gap)
        check_positive("scale", scale)
        if projection not in PROJECTIONS:
            raise ConfigError(f"projection={projection!r}: expected one of {', '.join(PROJECTIONS)}.")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank, "gap": gap, "scale": scale,
            "projection": projection, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults)

    def change(self, group: dict[str, Any], state: dict[str, Any], W: Tensor, G: Tensor) -> tuple[Tensor, float]:
        """lr scale Adam(G P^T) P; lr Adam(G) where nothing is projected."""
        projected = group["rank"] > 0 and G.ndim == 2
        tall = projected and G.shape[0] >= G.shape[1]
        if projected:
            if state["step"] % group["gap"] == 0:
                state["P"] = _projection(group, state, G)
            P = state["P"]
            G = G @ P if tall else P.T @ G
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(G), torch.zeros_like(G)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        m, v = state["exp_avg"].lerp_(G, 1 - beta1), state["exp_avg_sq"]
        v.mul_(beta2).addcmul_(G, G, value=1 - beta2)
        m_hat = m / (1 - beta1 ** state["step"])
        N = m_hat / ((v / (1 - beta2 ** state["step"])).sqrt() + group["eps"])
        if projected:
            N = group["scale"] * (N @ P.T if tall else P @ N)
        return group["lr"] * N, group["lr"]


class Flora(_Float32States):
    """Adafactor with compressed momentum for the matrices in groups with ``rank`` > 0 (see above)."""

    def __init__(
        self, params: Iterable[Any], lr: float, *, beta1: float = 0.9, decay_rate: float = 0.8, eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0, weight_decay: float = 0.0, scale_parameter: bool = True, rank: int = 0, kappa: int = 1000,
        accumulation_rank: int | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        check_rank("kappa", kappa)
        defaults = {
            "lr": lr, "beta1": beta1, "decay_rate": decay_rate, "eps": eps, "clip_threshold": clip_threshold,
            "weight_decay": weight_decay, "scale_parameter": scale_parameter, "rank": rank, "kappa": kappa,
            "accumulation_rank": accumulation_rank, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults)
        if accumulation_rank is not None:
            check_rank("accumulation_rank", accumulation_rank)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                raise ConfigError(
                    f"accumulation_rank={accumulation_rank} takes the gradients away before processes share them: "
                    "expected one process, or leave it out"
                )
            for group in self.param_groups:
                for parameter in group["params"] if group["rank"] > 0 else ():
                    parameter.register_post_accumulate_grad_hook(functools.partial(self._compress, group))

    def _compress(self, group: dict[str, Any], parameter: Tensor) -> None:
        """After a backward: the gradient goes into the compressed sum."""
        assert parameter.grad is not None
        G, parameter.grad = parameter.grad.float(), None
        state = self.state[parameter]
        P = self._accumulation(group, state, G.shape, G.device)
        state["packed"] = state.get("packed", 0) + (G @ P if G.shape[0] >= G.shape[1] else P.T @ G)

    def _accumulation(self, group: dict[str, Any], state: dict[str, Any], shape: Any, device: Any) -> Tensor:
        return _gaussian(~state["seed"], state["step"], min(shape), group["accumulation_rank"], device)

    def gradient(self, group: dict[str, Any], state: dict[str, Any], parameter: Tensor) -> Tensor | None:
        """The compressed sum unpacked, where there is one."""
        if (packed := state.pop("packed", None)) is None:
            return parameter.grad
        P = self._accumulation(group, state, parameter.shape, parameter.device)
        return packed @ P.T if parameter.shape[0] >= parameter.shape[1] else P @ packed

    def change(self, group: dict[str, Any], state: dict[str, Any], W: Tensor, G: Tensor) -> tuple[Tensor, float]:
        """lr' clip((1 - beta1) u + beta1 M P^T)."""
        state["step"] += 1
        beta1, beta2 = group["beta1"], 1 - state["step"] ** -group["decay_rate"]
        u = G / _second_moment(state, G * G + group["eps"][0], beta2).sqrt()
        if group["rank"] > 0 and G.ndim == 2:
            tall = G.shape[0] >= G.shape[1]
            epoch, r = (state["step"] - 1) // group["kappa"], group["rank"]
            P = _gaussian(state["seed"], epoch, min(G.shape), r, G.device)
            M = state.setdefault("exp_avg", G.new_zeros((G.shape[0], r) if tall else (r, G.shape[1])))
            update = (1 - beta1) * u + beta1 * (M @ P.T if tall else P @ M)
            if state["step"] % group["kappa"] == 0:  # from here on in the next projection
                P_next = _gaussian(state["seed"], epoch + 1, min(G.shape), r, G.device)
                M.copy_(M @ P.T @ P_next if tall else P_next.T @ (P @ M))
                P = P_next
            M.mul_(beta1).add_(u @ P if tall else P.T @ u, alpha=1 - beta1)
        else:
            update = state.setdefault("exp_avg", torch.zeros_like(G)).lerp_(u, 1 - beta1)
        update = update / max(1.0, float(_rms(update)) / group["clip_threshold"])
        lr = group["lr"] * (max(group["eps"][1], float(_rms(W))) if group["scale_parameter"] else 1.0)
        return lr * update, lr


def _second_moment(state: dict[str, Any], squared: Tensor, beta2: float) -> Tensor:
    """v: factored into row and column means for matrices (Adafactor), whole otherwise."""
    if squared.ndim != 2:
        return state.setdefault("exp_avg_sq", torch.zeros_like(squared)).lerp_(squared, 1 - beta2)
    row = state.setdefault("row", squared.new_zeros(squared.shape[0])).lerp_(squared.mean(1), 1 - beta2)
    column = state.setdefault("column", squared.new_zeros(squared.shape[1])).lerp_(squared.mean(0), 1 - beta2)
    return torch.outer(row / row.mean(), column)


def _rms(x: Tensor) -> Tensor:
    return x.pow(2).mean().sqrt()


def _gaussian(seed: int, epoch: int, size: int, rank: int, device: torch.device) -> Tensor:
    """P [size, rank] ~ N(0, 1/rank), the same on every device."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    return (torch.randn(size, rank, generator=generator) / math.sqrt(rank)).to(device)


def _projection(group: dict[str, Any], state: dict[str, Any], G: Tensor) -> Tensor:
    """P [smaller side of G, rank]."""
    rank = min(group["rank"], *G.shape)
    if group["projection"] == "svd":
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        return (Vh[:rank].T if G.shape[0] >= G.shape[1] else U[:, :rank]).contiguous()
    P = _gaussian(state["seed"], state["step"] // group["gap"], min(G.shape), rank, G.device)
    return torch.linalg.qr(P)[0].contiguous() if group["projection"] == "orthogonal" else P


def targeted(model: Any, target_modules: Any) -> list[Tensor]:
    """The weights of the linear layers that ``target_modules`` names: name endings, one regular expression, or "all-linear".

    The last is every linear layer of the trunk: no output layer, no new head.

    Raises:
        ConfigError: nothing is named.
    """
    trunk = getattr(model, "base_model_prefix", "")
    inside = model.get_submodule(trunk) if trunk and hasattr(model, trunk) else model
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    within = {id(m) for m in inside.modules()}
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        if target_modules == "all-linear":
            chosen = id(module) in within and module is not output
        elif isinstance(target_modules, str):
            chosen = re.fullmatch(target_modules, name) is not None
        else:
            chosen = any(name == ending or name.endswith(f".{ending}") for ending in target_modules)
        if chosen:
            found.append(module.weight)
    if not found:
        raise ConfigError(f"target_modules={target_modules!r} names no linear layer of {type(model).__name__}.")
    return found


def attach(model: nn.Module, spec: MethodSpec, batches: Any = None) -> nn.Module:
    """Every parameter trains; the work is the optimizer's."""
    if any(storage(module) for module in model.modules()):
        raise ConfigError(f"{spec.name} trains the weights themselves, and this model's are quantized: load it without")
    if spec.target_modules is not None:
        check_rank("r", spec.r)
        targeted(model, spec.target_modules)
    check_options(spec)
    return model.requires_grad_(True)


def groups(model: nn.Module, spec: MethodSpec, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The targeted matrices with their rank, and the rest."""
    matrices = targeted(model, spec.target_modules)
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained(model) if id(p) not in chosen]
    return [
        {"params": matrices, "lr": lr, "weight_decay": weight_decay, "rank": spec.r},
        {"params": rest, "lr": lr, "weight_decay": weight_decay, "rank": 0},
    ]


def optimizer(model: nn.Module, spec: MethodSpec, lr: float, weight_decay: float) -> Optimizer:
    """The method's own, over the targeted matrices and the rest."""
    kind: Any = Flora if spec.name == "flora-optimizer" else ProjectedAdamW
    return kind(groups(model, spec, lr, weight_decay), lr, weight_decay=weight_decay, **spec.options)


def check_flora(spec: MethodSpec, recipe: Any, steps: int | None) -> None:
    """ConfigError where gradients that were taken away would be clipped, or none are added up."""
    rank, train = spec.options["accumulation_rank"], recipe.train
    if rank is not None and train.gradient_accumulation_steps == 1:
        raise ConfigError(
            f"accumulation_rank={rank} compresses the sum over several passes, and train.gradient_accumulation_steps=1: "
            "expected 2 or more, or leave it out"
        )
    if rank is not None and train.max_grad_norm:
        raise ConfigError(
            f"train.max_grad_norm={train.max_grad_norm} cannot see gradients that accumulation_rank={rank} keeps compressed: "
            "expected train.max_grad_norm=0 (Adafactor clips its own steps)"
        )


def over_factors(name: str, groups: Iterable[Mapping[str, Any]], title: str) -> Optimizer:
    """The optimizer of the method ``OPTIMIZERS[name]``, with its own settings, over optimizer groups of another method's parameters.

    Matrices [m, n] with min(m, n) above its rank are projected, all else is not.

    Raises:
        ConfigError: nothing is; ``title`` is the method's name in it.
    """
    settings = dict(METHODS[OPTIMIZERS[name]].defaults)
    rank = settings.pop("r")
    del settings["target_modules"]
    apart: list[dict[str, Any]] = []
    for group in groups:
        matrices = [p for p in group["params"] if p.ndim == 2 and min(p.shape) > rank]
        chosen = {id(p) for p in matrices}
        rest = [p for p in group["params"] if id(p) not in chosen]
        apart += [{**group, "params": own, "rank": r} for own, r in ((matrices, rank), (rest, 0)) if own]
    if not any(group["rank"] for group in apart):
        raise ConfigError(
            f"train.optimizer={name} projects onto rank {rank}, and no matrix that {title} trains is larger on both sides: expected a "
            "higher adapter.r, or another optimizer"
        )
    kind: Any = Flora if name == "flora" else ProjectedAdamW
    return kind(apart, apart[0]["lr"], **settings)


OPTIMIZERS = {"galore": "galore", "garare": "garare", "flora": "flora-optimizer"}
FULL = Method("full", "Full fine-tuning", "1711.05101", "W <- W - lr AdamW(G)", attach, whole=True)
GALORE = Method(
    "galore", "GaLore", "2403.03507", "W <- W - lr scale Adam(G P^T) P, P from the SVD of G", attach,
    {"r": RANKS["galore"], "target_modules": "all-linear", "gap": 500, "scale": 4.0, "projection": "svd", "seed": 0},
    groups=groups, optimizer=optimizer, whole=True,
)  # fmt: skip
GARARE = Method(
    "garare", "GaRare", "OpenReview pxclAomHat", "GaLore with random P", attach,
    {"r": RANKS["garare"], "target_modules": "all-linear", "gap": 500, "scale": 1.0, "projection": "gaussian", "seed": 0},
    groups=groups, optimizer=optimizer, whole=True,
)  # fmt: skip
FLORA_OPTIMIZER = Method(
    "flora-optimizer", "Flora (gradient compressor)", "2402.03293", "Adafactor, momentum kept as M P^T", attach,
    {
        "r": RANKS["flora-optimizer"], "target_modules": "all-linear", "kappa": 1000, "beta1": 0.9, "scale_parameter": True,
        "accumulation_rank": None, "seed": 0,
    },
    groups=groups, optimizer=optimizer, whole=True, check=check_flora,
)  # fmt: skip
METHODS = {m.name: m for m in (FULL, GALORE, GARARE, FLORA_OPTIMIZER)}
