"""The states of an adapter that a run has left on disk, read layer by layer and without its base model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from duallora.core.equation import Update
from duallora.core.init import draw_factors, draw_signs, layer_seed
from duallora.errors import ConfigError, IntegrityError, NonFiniteError
from duallora.store import checkpoint
from duallora.store.adapters import read_sidecar
from duallora.store.run_folder import RunFolder

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODEL = "model.safetensors"  # in its place where a method trains the whole model


@dataclass(frozen=True)
class State:
    """One saved adapter or whole model; ``step`` counts optimizer steps (0 at the start)."""

    step: int
    folder: Path

    @property
    def whole(self) -> bool:
        """Whether it is a whole model."""
        return not (self.folder / WEIGHTS).is_file()


def states(source: Path | str) -> list[State]:
    """What a run folder holds, in the order of training: the start, the checkpoints, the result. The folder of an adapter
    or a whole model is a single state.

    Raises:
        ConfigError: ``source`` holds no adapter.
    """
    folder = Path(source)
    if _holds(folder):
        return [State(_steps(folder), folder)]
    run = RunFolder(folder)
    found = {step: path for step, path in checkpoint.sealed(run.checkpoints) if _holds(path)}
    if _holds(run.init):
        found[0] = run.init
    found |= {_steps(result): result for result in run.results() if _holds(result)}
    if not found:
        raise ConfigError(
            f"{folder} holds no adapter: expected a run folder (with adapter/, model/ or checkpoints/) or an adapter's "
            f"folder (with {WEIGHTS})"
        )
    return [State(step, found[step]) for step in sorted(found)]


def _holds(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (WEIGHTS, MODEL))


def _steps(folder: Path) -> int:
    return int(read_sidecar(folder).get("steps", 0))  # another tool's adapter says nothing of it


class Adapter:
    """One state, open for reading: the layers' names, and each layer's tensors in float64."""

    def __init__(self, state: State):
        self.state = state
        try:
            self.config: dict[str, Any] = json.loads((state.folder / CONFIG).read_text(encoding="utf-8"))
            self._file = safe_open(state.folder / WEIGHTS, "pt")
        except (OSError, ValueError, SafetensorError) as error:
            raise IntegrityError(f"{state.folder}: the adapter cannot be read: {error}; take a fresh copy") from error
        by_number = sorted(self._file.keys(), key=lambda name: re.sub(r"\d+", lambda n: n[0].zfill(9), name))
        self._names = dict.fromkeys(by_number)  # in that order, and looked up without a search

    def layers(self) -> list[str]:
        """The names of the Dual LoRA layers, by number; fused experts one by one, as ``name[number]``."""
        found = []
        for name in self._names:
            if name.endswith(".duallora_A"):
                shape = self._file.get_slice(name).get_shape()
                layer = name.removesuffix(".duallora_A")
                found += [layer] if len(shape) == 2 else [f"{layer}[{e}]" for e in range(shape[0])]
        return found

    def low_rank_layers(self) -> list[str]:
        """The names of plain LoRA's layers."""
        return [name.removesuffix(".lora_A.weight") for name in self._names if name.endswith(".lora_A.weight")]

    def tensor(self, name: str) -> Tensor:
        """One tensor of the file, floating-point ones in float64.

        Raises:
            NonFiniteError: it holds NaN or infinite values.
        """
        value: Tensor = self._file.get_tensor(name)
        require_finite(value, self.state.folder, name)
        return value.double() if value.is_floating_point() else value

    def update(self, layer: str) -> Update:
        """dW of a layer without its scale (which moves no rank and no sign), as `core.equation` has it."""
        layer, _, number = layer.removesuffix("]").partition("[")
        at: Any = int(number) if number else ...
        A, B = (self.tensor(f"{layer}.duallora_{name}")[at] for name in "AB")
        config, seed = self.config, f"{layer}.duallora_seed"
        names = config.get("magnitude", "relu"), config.get("direction", "ste")
        if names[1] == "fixed":
            signs = draw_signs(int(self.tensor(seed)), B.shape[0], A.shape[1])
            return Update(A, B, None, None, 1.0, *names, fixed_sign=signs)
        C, D = (self.tensor(f"{layer}.duallora_{name}")[at] for name in "CD")
        initial: tuple[Tensor, ...] = ()
        if seed in self._names:  # warmup="residual": dW(t) - dW(0)
            start = int(self.tensor(seed))
            drawn = draw_factors(
                layer_seed(start, number) if number else start, B.shape[0], A.shape[1], A.shape[0], C.shape[0],
                init_std=config["init_std"], direction_init_std=config["direction_init_std"], on_bf16_grid=True,
            )  # fmt: skip
            initial = tuple(factor.double() for factor in drawn)
        return Update(A, B, C, D, 1.0, *names, initial=initial)

    def low_rank(self, layer: str) -> tuple[Tensor, Tensor]:
        """(B [out, r], A [r, in]) of a plain LoRA layer."""
        return self.tensor(f"{layer}.lora_B.weight"), self.tensor(f"{layer}.lora_A.weight")


def require_finite(value: Tensor, folder: Path, name: str) -> None:
    """Raise NonFiniteError where there is no rank, sign or angle to tell of."""
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(
            f"{folder}: {name} holds NaN or infinite values; leave this state out, its training diverged"
        )


def short(layer: str) -> str:
    """A layer's name in the base model."""
    return layer.removeprefix("base_model.model.")


def module(layer: str) -> str:
    """What a layer is in its block: ``q_proj`` of ``model.layers.3.self_attn.q_proj``."""
    return layer.rpartition(".")[2]


def magnitude(update: Update) -> Tensor:
    """ReLU(B A), or what the method has in its place, [out, in]."""
    (out, into), like = update.shape, update.A
    C, D = like.new_ones(1, into), like.new_ones(out, 1)
    return update._replace(C=C, D=D, direction="identity", fixed_sign=None, initial=()).delta()


def direction(update: Update) -> Tensor:
    """Sign(D C), or what the method has in its place, [out, in]."""
    (out, into), like = update.shape, update.A
    A, B = like.new_ones(1, into), like.new_ones(out, 1)
    return update._replace(A=A, B=B, magnitude="identity", initial=()).delta()


def row_blocks(update: Update, elements: int = 1 << 22) -> Iterator[Update]:
    """``update`` in blocks of rows, so that no more than about ``elements`` of a product live at once."""
    out, into = update.shape
    height = max(1, elements // into)
    for first in range(0, out, height):
        yield update.rows(slice(first, min(first + height, out)))
