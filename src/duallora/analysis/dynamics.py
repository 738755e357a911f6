"""How far training turns and how far it stretches the weights: DoRA's analysis (arXiv 2402.09353, section 3.2).

    m_t^n = |V_t^n|     DeltaM_t = mean_n |m_t^n - m_0^n|     DeltaD_t = mean_n (1 - cos(V_t^n, W_0^n))

V_t is the merged weight at step t. n counts what the paper calls columns; every released code takes the norm of each
output unit, a row of a weight [out, in]: ``axis="out"``. ``axis="in"`` is the other reading. All in float64, because
1 - cos is of the order of 1e-5.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from scipy import stats
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from duallora.analysis.states import MODEL, State, module, require_finite, short
from duallora.errors import ConfigError
from duallora.store import adapters
from duallora.store.models import load_model
from duallora.terminal import quiet_libraries
from duallora.tuner import quantized
from duallora.tuner.layer import DualLoraLayer

Axis = Literal["out", "in"]
Row = dict[str, Any]


def change(W0: Tensor, W: Tensor, axis: Axis = "out") -> dict[str, float]:
    """``magnitude`` (DeltaM) and ``direction`` (DeltaD) from W0 to W, both [out, in]."""
    along = 1 if axis == "out" else 0
    W0, W = W0.double(), W.double()
    m0, m = (torch.linalg.vector_norm(X, dim=along) for X in (W0, W))
    # |u - w|^2 / 2 of unit vectors: 1 - cos without the cancellation.
    turned = (W / m.unsqueeze(along) - W0 / m0.unsqueeze(along)).square().sum(along) / 2
    return {"magnitude": float((m - m0).abs().mean()), "direction": float(turned.mean())}


def weights(layer: Any, adapter: str = "default") -> tuple[Tensor, Tensor]:
    """(W0, W0 + dW) [out, in] of an adapted linear layer, in float64.

    Raises:
        ConfigError: the method is no change of weights.
    """
    base = layer.get_base_layer()
    with torch.no_grad():
        if isinstance(layer, DualLoraLayer):
            W0 = layer._base_weight().double()
            W = W0 + layer.get_delta_weight(adapter).double()
        elif quantized.storage(base) is not None:
            raise ConfigError(f"{type(layer).__name__} on quantized weights: expected Dual LoRA, or plain weights")
        else:
            W0 = base.weight.double()
            merged: Any = copy.deepcopy(layer).double()
            try:
                merged.merge(adapter_names=[adapter])
            except (NotImplementedError, ValueError, AttributeError) as error:
                raise ConfigError(
                    f"{type(layer).__name__} cannot be merged, so there is no W0 + dW: {error}"
                ) from error
            W = merged.get_base_layer().weight
    return (W0.T, W.T) if isinstance(base, Conv1D) else (W0, W)


def linear_layers(model: nn.Module, adapter: str = "default") -> Iterator[tuple[str, Any]]:
    """The adapted linear layers of a model, by name."""
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and adapter in layer.active_adapters:
            base = layer.get_base_layer()
            if isinstance(base, (nn.Linear, Conv1D)):
                yield name, layer


def course(source: Path | str, states: Sequence[State], axis: Axis = "out") -> list[Row]:
    """One row a layer and state after the start; loads the base model of the adapter in ``source``.

    Raises:
        ConfigError: the base model or the method does not allow it; a checkpoint has other tensors than the result.
        IntegrityError: see `duallora.store.adapters.load_adapter`.
        NonFiniteError: a weight of a state is NaN or infinite.
    """
    if states[-1].whole:
        return [
            {"step": state.step, "layer": name, "module": module(name), **change(W0, W, axis)}
            for state, name, W0, W in whole_layers(states)
        ]
    model, _ = adapters.load_adapter(source, adapters.adapter_kind(source))
    rows: list[Row] = []
    for state in (state for state in states if state.step > 0 or len(states) == 1):
        with quiet_libraries():
            try:
                set_peft_model_state_dict(model, load_peft_weights(str(state.folder), device="cpu"))
            except RuntimeError as error:
                raise ConfigError(
                    f"{state.folder} has other tensors than {source} (the method rewrites them as it saves the result): "
                    "analyze the result alone, RUN/adapter"
                ) from error
        for name, layer in linear_layers(model):
            where = {"step": state.step, "layer": short(name), "module": module(name)}
            W0, W = weights(layer)
            require_finite(W, state.folder, short(name))
            rows.append({**where, **change(W0, W, axis)})
    return rows


def whole_layers(states: Sequence[State]) -> Iterator[tuple[State, str, Tensor, Tensor]]:
    """(state, name, W0, W), both [out, in], of each linear layer of a model that was trained as a whole, all but its head's."""
    sidecar = adapters.read_sidecar(states[-1].folder)
    base, kind = sidecar.get("base", {}), sidecar.get("kind")
    if "name" not in base or kind is None:
        raise ConfigError(
            f"{states[-1].folder} does not say what it was trained from: expected a run of duallora train"
        )
    labels = 1 if kind == "regress" else len(sidecar.get("labels", ())) or None
    with quiet_libraries():
        model, _ = load_model(base["name"], kind, num_labels=labels, revision=base.get("revision"))
    heads = tuple(f"{name}." for name in adapters.head_modules(model))
    for state in states:
        with safe_open(state.folder / MODEL, "pt") as file:
            saved = set(file.keys())
            for name, layer in model.named_modules():
                if not isinstance(layer, (nn.Linear, Conv1D)) or f"{name}.".startswith(heads):
                    continue
                if f"{name}.weight" not in saved:
                    raise ConfigError(
                        f"{state.folder} has no {name}.weight: {base['name']} is not what it was trained from"
                    )
                pair = (layer.weight.detach(), file.get_tensor(f"{name}.weight"))
                require_finite(pair[1], state.folder, f"{name}.weight")
                W0, W = (X.T if isinstance(layer, Conv1D) else X for X in pair)
                yield state, name, W0, W


def correlations(rows: Sequence[Row]) -> list[Row]:
    """Pearson's and Spearman's correlation of DeltaD and DeltaM by kind of module: over all layers and steps (``step``
    None), and over the layers of each step. Fewer than three points, or equal ones, have none. ``interval`` is Pearson's 95 % over
    other layers, drawn again from these with all their steps, which move together.
    """
    found = []
    for kind in dict.fromkeys(row["module"] for row in rows):
        of = [row for row in rows if row["module"] == kind]
        for step in (None, *sorted({row["step"] for row in of})):
            chosen = [row for row in of if step in (None, row["step"])]
            x, y = (np.array([row[name] for row in chosen]) for name in ("direction", "magnitude"))
            if len(chosen) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
                continue
            pearson, spearman = float(stats.pearsonr(x, y)[0]), float(stats.spearmanr(x, y)[0])
            layers = len({row["layer"] for row in chosen})
            drawn = np.random.default_rng(0).integers(layers, size=(1000, layers))
            u, v = (z.reshape(-1, layers).T[drawn].reshape(1000, -1) for z in (x, y))  # rows go step by step
            u, v = (z - z.mean(1, keepdims=True) for z in (u, v))
            with np.errstate(invalid="ignore"):  # a draw of equal points
                others = (u * v).sum(1) / np.sqrt((u * u).sum(1) * (v * v).sum(1))
            told = {
                "pearson": pearson,
                "interval": np.nanquantile(others, (0.025, 0.975)).tolist(),
                "spearman": spearman,
            }
            found.append({"module": kind, "step": step, "points": len(chosen), **told})
    return found
