"""``gradient_tokens_by="spectrum"``: one budget of tokens over all layers, spent where it lowers the error most.

Some layers see a few heavy tokens and need little else, others see many alike. Each backward reports, for a few shares
of the tokens, a bound on the relative error a layer's sampled gradient would have (:func:`duallora.ops.tokens.error_bounds`).
After each optimizer step the shares that minimise the sum of these errors within the budget become the next step's.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from duallora.ops.tokens import FRACTIONS


def spend(errors: Tensor, costs: Tensor, fraction: float) -> list[float]:
    """The shares out of FRACTIONS, one per layer, that minimise the summed error at a mean share of ``fraction``.

    Args:
        errors: [layers, len(FRACTIONS)] relative squared error of each layer at each share.
        costs: [layers] cost of a token in each layer, in * out.
        fraction: mean share over the layers, weighted by cost, that must not be exceeded.
    """
    errors, costs = errors.double().nan_to_num(nan=0.0, posinf=0.0), costs.double()
    shares = torch.tensor(FRACTIONS, dtype=torch.float64)
    budget = max(fraction, FRACTIONS[0]) * costs.sum()
    low, high = 0.0, 1.0
    # The price of a token: at a higher price every layer takes fewer. Bisect for the lowest one within the budget.
    price = lambda bid: bid / (1 - bid) * errors.sum() / costs.sum()  # noqa: E731
    chosen = torch.zeros(len(costs), dtype=torch.int64)
    for _ in range(60):
        middle = (low + high) / 2
        wanted = (errors + price(middle) * costs[:, None] * shares).argmin(dim=1)
        if (costs * shares[wanted]).sum() <= budget * (1 + 1e-9):
            high, chosen = middle, wanted
        else:
            low = middle
    # What the steps between shares leave over goes, one step up at a time, where it still lowers the error most.
    left = budget - (costs * shares[chosen]).sum()
    while True:
        higher = (chosen + 1).clamp(max=len(FRACTIONS) - 1)
        layers = torch.arange(len(costs))
        price_up = costs * (shares[higher] - shares[chosen])
        gain = torch.where(
            (higher > chosen) & (price_up <= left), errors[layers, chosen] - errors[layers, higher], torch.tensor(0.0)
        )
        best = int(gain.argmax())
        if gain[best] <= 0:
            return [FRACTIONS[i] for i in chosen.tolist()]
        left -= price_up[best]
        chosen[best] += 1


_layers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # -> order of arrival
_order = itertools.count()
_hooks: list[Any] = []


def account(layer: Any) -> None:
    """Let ``layer`` take part, with each of its adapters that has a probe."""
    _layers.setdefault(layer, next(_order))
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_after_optimizer_step))


def _after_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    budgets: dict[int, list[tuple[Any, str]]] = {}
    for layer in [layer for reference in _layers.keyrefs() if (layer := reference()) is not None]:
        for adapter, probe in layer.token_probes.items():
            factors = [p for p in layer._factors(adapter) if p is not None]
            if any(id(p) in owned for p in factors) and probe.grad is not None:  # no gradient of another thread's
                # Adapters of one model share their config object, and with it the budget.
                budgets.setdefault(id(layer.duallora_config[adapter]), []).append((layer, adapter))
    for members in budgets.values():
        members.sort(key=lambda member: _layers[member[0]])
        errors = torch.stack([layer.token_probes[adapter].grad.cpu() for layer, adapter in members])
        costs = torch.tensor([layer.in_features * layer.out_features for layer, _ in members])
        layer, adapter = members[0]
        shares = spend(errors, costs, layer.duallora_config[adapter].gradient_tokens)
        for (layer, adapter), share in zip(members, shares, strict=True):
            layer.set_token_share(adapter, share)
            layer.token_probes[adapter].grad = None
