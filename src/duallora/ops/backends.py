"""Which backend computes what.

``cpu`` and ``triton`` are kernels for the paper's form on their device, ``recompute`` is the same pass written with torch
operators, for any device and every ablation; the three follow one contract (see :mod:`duallora.ops.recompute`).
``reference`` is plain autograd.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType

import torch

from duallora.core.equation import Update
from duallora.ops import recompute

BACKENDS = ("auto", "reference", "recompute", "cpu", "triton")


@functools.cache
def kernel(name: str) -> ModuleType:
    """The module of the kernel backend ``name``.

    Raises:
        RuntimeError: it cannot run here: no C++ compiler ("cpu"), no triton ("triton").
    """
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise RuntimeError("backend='triton' needs the triton package: pip install triton.")
    module = importlib.import_module(f"duallora.ops.{name}")
    if name == "cpu":
        module.library()  # compiles on first use
    return module


def check_backend(name: str) -> None:
    """Raise if there is no such backend, or it was asked for by name and cannot run here.

    Raises:
        ValueError: no such backend. RuntimeError: it needs something this machine lacks.
    """
    check_backend_name(name)
    if name in ("cpu", "triton"):
        kernel(name)


def check_backend_name(name: str) -> None:
    """Raises ValueError if there is no such backend."""
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown: choose one of {', '.join(BACKENDS)}.")


@functools.cache
def fastest(device: str) -> ModuleType:
    """What "auto" means on a type of device. Warns once where the kernels cannot run."""
    name = {"cpu": "cpu", "cuda": "triton"}.get(device)  # ROCm calls itself cuda too
    if name is None:
        return recompute
    try:
        return kernel(name)
    except RuntimeError as error:
        warnings.warn(f"Dual LoRA runs on plain torch operators, which is slower: {error}", stacklevel=2)
        return recompute


def pick(name: str, update: Update, dtype: torch.dtype) -> ModuleType:
    """The module to use for ``update`` of weights of ``dtype``: the one asked for, or ``recompute`` for what it does
    not compute (float64; the ablations with a mean over a row, a sigmoid or stored signs)."""
    if name == "recompute":
        return recompute
    module = fastest(update.A.device.type) if name == "auto" else kernel(name)
    return module if module.supports(update, dtype) else recompute
