"""The native CPU backend: cpu_kernel.cpp, compiled on first use for the machine it runs on.

Installing needs no compiler; the first call looks for one (``CXX``, else c++, g++, clang++), compiles in a few
seconds and keeps the library in ``DUALLORA_CACHE`` (else the user's cache folder). Processes that compile at the same
time each write a file of their own and rename it into place.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from duallora.core.equation import Update
from duallora.folders import cache_folder

_SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno"]
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAGNITUDES = {"relu": 0, "abs": 1, "identity": 2}
_DIRECTIONS = {"ste": 0, "identity": 1, "tanh": 2, "unit-tanh": 2}
_CLIPS = {"chain": 0, "update": 1, "none": 2, "window": 3, "unit-window": 3}
# Elements of [out, in] times ranks below which a second thread costs more than it brings.
_WORK_PER_THREAD = 1 << 19


class CompilerError(RuntimeError):
    """There is no C++ compiler, or it did not accept the kernel."""


# ``struct Job`` of cpu_kernel.cpp: W, G, out; rows, cols; 4 factors, 4 initial ones, 4 gradients, `_LENGTHS`; the numbers.
_JOB = struct.Struct("@3P2q19P10id")
_LENGTHS = ("row_m", "row_norm", "row_scale", "col_scale", "row_dot", "col_dot", "col_square")
_NONE = (0,) * 7


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise CompilerError("no C++ compiler was found (tried $CXX, c++, g++, clang++): install one, for example g++.")


def _processor() -> str:
    """What -march=native depends on, so that a cache shared between machines is safe."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = ("model name", "flags", "Features", "CPU part")
        return "\n".join(sorted({line for line in lines if line.startswith(told)}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def _writable_cache() -> Path:
    """Where compiled kernels are kept, for this user alone; a private temporary folder if the user's cannot be written."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="duallora-"))


def _compile(compiler: str, folder: Path, key: str) -> Path:
    """Compile into ``folder``; the file's own size is part of its name, so that one cut short is not loaded."""
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    handle, scratch = tempfile.mkstemp(suffix=".tmp", dir=folder)
    os.close(handle)
    errors = ""
    # A C driver (CXX=gcc, which PEFT's BOFT leaves behind) compiles C++ and does not link its library.
    runtime = [] if "++" in Path(compiler).name else ["-lc++" if sys.platform == "darwin" else "-lstdc++"]
    try:
        # Without OpenMP (Apple's clang) the kernel runs on one thread.
        for flags in ([*_FLAGS, native, "-fopenmp"], [*_FLAGS, native], _FLAGS):
            command = [compiler, *flags, "-o", scratch, str(_SOURCE), *runtime]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if done.returncode == 0:
                return Path(scratch).replace(folder / f"kernel-{key}-{Path(scratch).stat().st_size}.so")
            errors = errors or done.stderr
    finally:
        Path(scratch).unlink(missing_ok=True)
    raise CompilerError(f"{compiler} did not compile the kernel:\n{errors[-2000:]}")


def _compiled(folder: Path, key: str) -> Path | None:
    found = folder.glob(f"kernel-{key}-*.so")
    return next((path for path in found if path.stem.endswith(f"-{path.stat().st_size}")), None)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel, from the cache or compiled now.

    Raises:
        CompilerError: no compiler, or it failed.
    """
    compiler = _compiler()
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, errors="replace", check=False
        ).stdout
        facts = "\0".join([_SOURCE.read_text(), *_FLAGS, compiler, version, platform.machine(), _processor()])
        key, folder = hashlib.sha256(facts.encode()).hexdigest()[:24], _writable_cache()
        loaded = ctypes.CDLL(str(_compiled(folder, key) or _compile(compiler, folder, key)))
    except OSError as error:
        raise CompilerError(f"the kernel could not be compiled or loaded: {error}") from error
    loaded.duallora_run.argtypes, loaded.duallora_run.restype = [ctypes.c_char_p], None
    return loaded


def supports(update: Update, dtype: torch.dtype) -> bool:
    """Whether the kernel computes this update of weights of ``dtype``: the paper's form, its residual start, and the
    ablations that need no mean over a row, no exponential and no stored signs."""
    return (
        update.A.device.type == "cpu"
        and update.magnitude in _MAGNITUDES
        and update.direction in _DIRECTIONS
        and dtype in _DTYPES
        and update.A.dtype != torch.float64
    )


def _oriented(factors: Sequence[Tensor | None], fan_in_fan_out: bool) -> list[Tensor]:
    """[L1, R1, L2, R2] float32 and contiguous, whose products have the layout of W."""
    A, B, C, D = (factor for factor in factors if factor is not None)
    pairs = (A.T, B.T, C.T, D.T) if fan_in_fan_out else (B, A, D, C)
    return [
        f if f.dtype == torch.float32 and f.is_contiguous() else f.detach().to(torch.float32).contiguous()
        for f in pairs
    ]


def _run(
    W: Tensor | None,
    update: Update,
    factors: Sequence[Tensor],
    fan_in_fan_out: bool,
    out: Tensor | None,
    minus_base: bool,
    G: Tensor | None = None,
    gradients: Sequence[Tensor] = (),
    **lengths: Tensor,
) -> None:
    """One pass of the kernel. ``factors``, their ``gradients`` and ``lengths`` by name are contiguous, L1 R1 L2 R2."""
    L1, R1, _, R2 = factors
    initial = _oriented(update.initial, fan_in_fan_out) if update.initial else ()
    if W is not None and not W.is_contiguous():
        W = W.detach().contiguous()
    (rows, r1), cols, r2 = L1.shape, R1.shape[1], R2.shape[0]
    threads = 1
    if (work := rows * cols * (r1 + r2)) >= 2 * _WORK_PER_THREAD:
        threads = min(torch.get_num_threads(), work // _WORK_PER_THREAD)
    job = _JOB.pack(
        0 if W is None else W.data_ptr(),
        0 if G is None else G.data_ptr(),
        0 if out is None else out.data_ptr(),
        rows,
        cols,
        *(factor.data_ptr() for factor in factors),
        *((factor.data_ptr() for factor in initial) if initial else _NONE[:4]),
        *((gradient.data_ptr() for gradient in gradients) if gradients else _NONE[:4]),
        *((lengths[name].data_ptr() if name in lengths else 0 for name in _LENGTHS) if lengths else _NONE),
        0 if W is None else _DTYPES[W.dtype],
        0 if G is None else _DTYPES[G.dtype],
        0 if out is None else _DTYPES[out.dtype],
        r1,
        r2,
        _MAGNITUDES[update.magnitude],
        _DIRECTIONS[update.direction],
        _CLIPS[update.ste_clip],
        minus_base,
        threads,
        float(update.scaling),
    )
    library().duallora_run(job)


def _empty_weight(W: Tensor | None, update: Update, fan_in_fan_out: bool, dtype: torch.dtype) -> Tensor:
    """Memory for W', contiguous; like W where it can be, which asks the least of the host."""
    if W is not None and W.dtype == dtype and W.is_contiguous():
        return torch.empty_like(W)
    return torch.empty(update.weight_shape(fan_in_fan_out), dtype=dtype, device="cpu")


def build_weight(
    W: Tensor | None,
    update: Update,
    *,
    fan_in_fan_out: bool,
    dtype: torch.dtype,
    m: Tensor | None = None,
    minus_base: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(W', norm): see :mod:`duallora.ops.recompute`, whose contract this follows."""
    weight, factors = _empty_weight(W, update, fan_in_fan_out, dtype), _oriented(update[:4], fan_in_fan_out)
    if m is None:
        _run(W, update, factors, fan_in_fan_out, weight, minus_base)
        return weight, None
    m = m.detach().to(torch.float32).contiguous()
    norm = torch.empty_like(m)
    if not fan_in_fan_out:
        _run(W, update, factors, False, weight, minus_base, row_m=m, row_norm=norm)
        return weight, norm
    # An output's weights lie along a column, whose norm is known only after all rows: two passes.
    _run(W, update, factors, True, None, False, col_square=norm)
    norm = norm.sqrt_().clamp_(min=torch.finfo(torch.float32).tiny)
    _run(W, update, factors, True, weight, minus_base, col_scale=m / norm)
    return weight, norm


def weight_and_gradients(
    G: Tensor,
    W: Tensor | None,
    update: Update,
    *,
    fan_in_fan_out: bool,
    dtype: torch.dtype,
    m: Tensor | None = None,
    norm: Tensor | None = None,
    minus_base: bool = False,
) -> list[Tensor]:
    """[W', dA, dB, dC, dD, dm]: see :mod:`duallora.ops.recompute`."""
    weight, factors = _empty_weight(W, update, fan_in_fan_out, dtype), _oriented(update[:4], fan_in_fan_out)
    gradients = dL1, dR1, dL2, dR2 = [torch.empty_like(factor) for factor in factors]
    along = "col" if fan_in_fan_out else "row"
    dora: dict[str, Tensor] = {}
    if m is not None and norm is not None:
        dora = {f"{along}_scale": m.detach().to(torch.float32) / norm, f"{along}_dot": torch.empty_like(norm)}
    if not G.is_contiguous():
        G = G.detach().contiguous()
    if G.dtype not in _DTYPES:
        G = G.to(torch.float32)
    _run(W, update, factors, fan_in_fan_out, weight, minus_base, G, gradients, **dora)
    dm = torch.empty(0, device="cpu") if norm is None else dora[f"{along}_dot"] / norm
    if fan_in_fan_out:
        return [weight, dL1.T, dR1.T, dL2.T, dR2.T, dm]
    return [weight, dR1, dL1, dR2, dL2, dm]
