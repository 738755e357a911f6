"""A start that knows where down is: signs and magnitudes drawn from the gradient at W0 instead of from a Gaussian.

    G = dL/dW0      D C = the best rank-r2 approximation of -G, rescaled      A, B = |N(0, std^2)|

Ours, not the paper's. It was to spare training the flips that random signs need; measured, it does not
(docs/reproduction/gradient-start.md). G itself is never formed: a layer's share of a batch, dY^T x, enters two thin sketches of it
(Tropp, Yurtsever, Udell and Cevher, arXiv 1609.00048, section 4), and being linear these sum over batches, so one backward
a batch is all it takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from duallora.core.gate import named
from duallora.core.init import layer_seed, positive_std
from duallora.errors import ConfigError, NonFiniteError
from duallora.tuner.layer import DualLoraLayer
from duallora.tuner.linear import Linear

OVERSAMPLING = 4  # columns of a sketch per wanted singular pair


class _Sketch:
    """G seen through Y = G P [out, k] and Z = Q^T G [l, in] with Gaussian P [in, k], Q [out, l]."""

    def __init__(self, layer: Linear, rank: int, seed: int, device: torch.device):
        out, into = layer.out_features, layer.in_features
        k = min(OVERSAMPLING * rank + 16, out, into)
        generator = torch.Generator("cpu").manual_seed(seed)
        self.P = torch.randn(into, k, generator=generator).to(device)
        self.Q = torch.randn(out, min(2 * k + 1, out), generator=generator).to(device)
        self.Y = torch.zeros(out, k, device=device)
        self.Z = torch.zeros(self.Q.shape[1], into, device=device)

    def add(self, x: Tensor, dY: Tensor) -> None:
        """G += dY^T x, for x [n, in] and dY [n, out]."""
        x, dY = x.float(), dY.float()
        self.Y.addmm_(dY.T, x @ self.P)
        self.Z.addmm_((dY @ self.Q).T, x)

    def descent(self, rank: int) -> tuple[Tensor, Tensor]:
        """(D [out, rank], C [rank, in]) with D C the sketched best approximation of -G."""
        basis, _ = torch.linalg.qr(self.Y)
        core = torch.linalg.lstsq(self.Q.T @ basis, self.Z, driver="gelsd" if self.Z.is_cpu else None).solution
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        root = S[:rank].sqrt()
        return -(basis @ U[:, :rank]) * root, root[:, None] * Vh[:rank]


def init_from_gradient(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    signs: bool = True,
    magnitudes: bool = True,
) -> nn.Module:
    """Starts the active adapters from the gradient of a few calibration batches; call it before training.

    Args:
        model: holds Dual LoRA adapters (``get_peft_model``). Dropout is off and every adapter disabled meanwhile, so the
            gradient is that of the base model; nothing else of it changes and no ``.grad`` is left behind.
        batches: what ``loss_fn`` takes, at least one; a batch costs a forward and a backward. None is kept.
        loss_fn: ``(model, batch) -> loss``; by default ``model(**batch).loss``.
        signs: D, C from the leading r2 singular pairs of -G, with the standard deviation ``direction_init_std``.
        magnitudes: A, B positive, so that ReLU(B A) is open everywhere; where ``init_std`` is None as wide as
            :func:`duallora.core.init.positive_std` has it.

    Linear and Conv1D layers only; the others keep their Gaussian start, and so does a layer that saw no gradient (with a
    warning). The ramp still makes dW = 0 at the start.

    Raises:
        ConfigError: no such layer, a merged or trained adapter, fixed signs, or ``warmup="residual"`` (whose dW(0) is
            rebuilt from a seed).
        NonFiniteError: a gradient is NaN or infinite.
    """
    chosen = {
        name: (layer, adapters)
        for name, layer in model.named_modules()
        if isinstance(layer, Linear) and (adapters := [a for a in layer.active_adapters if a in layer.duallora_A])
    }
    if not chosen:
        raise ConfigError("the model has no Dual LoRA layer with an active adapter: call get_peft_model first.")
    for name, (layer, adapters) in chosen.items():
        for adapter in adapters:
            _check(name, layer, adapter)
    sketches: dict[str, _Sketch] = {}
    for name, (layer, adapters) in chosen.items():
        rank = max(layer.r2[adapter] for adapter in adapters)
        seed = layer_seed(layer.duallora_config[adapters[0]].init_seed, name)
        sketches[name] = _Sketch(layer, rank, seed, layer.duallora_A[adapters[0]].device)
    count = 0
    with _calibrating(model, [(layer, sketches[name]) for name, (layer, _) in chosen.items()]):
        for count, batch in enumerate(batches, 1):
            loss = loss_fn(model, batch) if loss_fn else model(**batch).loss
            if not torch.isfinite(loss):
                raise NonFiniteError(
                    f"the loss of calibration batch {count} is {loss.item()}: expected a finite number."
                )
            if loss.requires_grad:
                loss.backward()  # to the activations where the graph begins: no parameter requires a gradient
    if not count:
        raise ConfigError("batches is empty: init_from_gradient needs at least one calibration batch.")
    for name, sketch in sketches.items():  # all of them before any layer is changed
        if not sketch.Y.isfinite().all() or not sketch.Z.isfinite().all():
            raise NonFiniteError(
                f"{name}: the calibration gradient is NaN or infinite. Calibrate in float32 or bfloat16."
            )
    blind = []
    for name, (layer, adapters) in chosen.items():
        sketch = sketches.pop(name)
        if not sketch.Y.any():
            blind.append(name)
            continue
        for adapter in adapters:
            _start(layer, adapter, sketch, signs, magnitudes)
    if blind:
        warnings.warn(
            f"{len(blind)} of {len(chosen)} layers saw no gradient in {count} calibration batches and keep their Gaussian "
            f"start: {named(blind)}. Use batches that reach them.",
            stacklevel=2,
        )
    return model


def _check(name: str, layer: Linear, adapter: str) -> None:
    config = layer.duallora_config[adapter]
    if config.direction == "fixed":
        raise ConfigError(f"{name}: direction='fixed' has no C and D to start; use another direction.")
    if config.init == "lora":
        raise ConfigError(f"{name}: init='lora' is a start of its own, whose B = 0: use init='gaussian'.")
    if config.warmup == "residual":
        raise ConfigError(f"{name}: warmup='residual' rebuilds dW(0) from a seed, which knows no gradient: use 'ramp'.")
    if layer.merged:
        raise ConfigError(f"{name}: adapter {layer.merged_adapters} is merged: unmerge first.")
    if config.init_weights and int(layer.duallora_step[adapter]) > 0:
        raise ConfigError(
            f"{name}: adapter {adapter!r} was trained for {int(layer.duallora_step[adapter])} steps, which a new start "
            "would throw away: call init_from_gradient before training."
        )


@contextmanager
def _calibrating(model: nn.Module, layers: list[tuple[Linear, _Sketch]]) -> Iterator[None]:
    """Base model alone, no parameter trained, each layer's x and dY into its sketch."""

    def watch(module: nn.Module, args: Any, output: Tensor, sketch: _Sketch) -> Tensor:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        if not output.requires_grad:  # nothing trained lies before this layer: the graph begins here
            output = output.detach().requires_grad_() * 1  # no leaf, which the model might write to
        output.register_hook(lambda dY: sketch.add(x, dY.reshape(-1, dY.shape[-1])))
        return output

    adapted = [m for m in model.modules() if isinstance(m, DualLoraLayer)]
    disabled = [layer._disable_adapters for layer in adapted]
    modes = [(m, m.training) for m in model.modules()]
    trained = [p for p in model.parameters() if p.requires_grad]
    handles = [layer.register_forward_hook(partial(watch, sketch=sketch)) for layer, sketch in layers]
    try:
        model.eval()
        for layer in adapted:
            layer._disable_adapters = True
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        for layer, was in zip(adapted, disabled, strict=True):
            layer._disable_adapters = was
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _start(layer: Linear, adapter: str, sketch: _Sketch, signs: bool, magnitudes: bool) -> None:
    A, B, C, D = (getattr(layer, name)[adapter] for name in layer.adapter_layer_names[:4])
    if signs:
        rank, std = layer.r2[adapter], layer.duallora_config[adapter].direction_init_std
        found_D, found_C = sketch.descent(rank)
        for factor, found in ((D.T, found_D.T), (C, found_C)):
            # Fewer pairs than r2 (a layer narrower than its rank): the others keep their Gaussian values.
            factor[: len(found)] = (found * (std / found.std().clamp_min(1e-30))).to(factor.dtype)
    if magnitudes:
        for factor in (A, B):
            factor.abs_()
            if layer.duallora_config[adapter].init_std is None:
                rms = factor.float().square().mean().sqrt()
                factor.mul_(positive_std(layer.in_features, layer.r1[adapter]) / rms)
