"""Runs the Triton kernels against the float64 oracle: ``python check_triton.py interpreter|cuda GROUP ...``.

On a GPU, or in Triton's interpreter. A process of its own, because the interpreter must be chosen before triton is
imported and a wrong kernel writes where it likes. Three tricks make it strict:

* dyadic data (multiples of 1/4): BA, DC and all sums are exact, zeros included, so most comparisons are for equality;
* inputs are views into buffers of NaN, and what the kernels fill starts as NaN between guards;
* in the interpreter TF32 products read 11 bits of each operand, as the instruction does. Its own bfloat16 is also
  mended: it multiplies bit patterns and truncates.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0" if sys.argv[1] == "cuda" else "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import oracle
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor
from triton._C.libtriton import ir

from duallora.core.equation import Update
from duallora.ops import dual_linear
from duallora.ops import triton as kernels

ON_GPU = sys.argv[1] == "cuda"
if ON_GPU:
    torch.set_default_device("cuda")
ARCHITECTURE = (ON_GPU and kernels._architecture(torch.device("cuda"))) or "sm_90"
GUARD, MARK = 64, 7.0
filled: list[Tensor] = []

_new_empty = Tensor.new_empty
_dot, _cast = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.cast_impl


def _float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    a, b = _float32(a), _float32(b)
    if input_precision == ir.INPUT_PRECISION.TF32:
        a, b = (
            interpreter.TensorHandle((h.data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32), h.dtype)
            for h in (a, b)
        )
    return _dot(self, a, b, d, input_precision, max_num_imprecise_acc)


def cast_impl(self, src, dst_type):
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view(np.uint16), tl.bfloat16)
    return _cast(self, src, dst_type)


def new_empty(self, *shape, dtype=None, **options):
    """NaN between guards; the interpreter's own calls, which name a device, as they are."""
    if options:
        return _new_empty(self, *shape, dtype=dtype, **options)
    shape = shape[0] if shape and isinstance(shape[0], (tuple, list, torch.Size)) else shape
    count = int(np.prod(shape))
    flat = torch.full((count + 2 * GUARD,), float("nan"), dtype=dtype or self.dtype)
    flat[:GUARD] = flat[GUARD + count :] = MARK
    filled.append(flat)
    return flat[GUARD : GUARD + count].view(shape)


def dyadic(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape) / 4


def poisoned(t: Tensor, *, strided: bool = False) -> Tensor:
    """The same values as a view into NaN: a slice of a line, or (``strided``) of a matrix."""
    if strided:
        buffer = torch.full((t.shape[0] + 4, t.shape[1] + 9), float("nan"), dtype=t.dtype)
        view = buffer[1 : 1 + t.shape[0], 4 : 4 + t.shape[1]]
    else:
        buffer = torch.full((t.numel() + 2 * GUARD,), float("nan"), dtype=t.dtype)
        view = buffer[GUARD : GUARD + t.numel()].view(t.shape)
    return view.copy_(t)


def expected(G, W, factors, initial, s, m, minus_base, **options) -> list[Tensor | None]:
    """[W', dA, dB, dC, dD, dm, norm] [out, in], in float64."""
    values = [f.double().tolist() for f in factors]
    kinds = {k: v for k, v in options.items() if k != "ste_clip"}
    total = torch.tensor(oracle.delta(*values, s, **kinds), dtype=torch.float64)
    if initial:
        total -= torch.tensor(oracle.delta(*[f.double().tolist() for f in initial], s, **kinds), dtype=torch.float64)
    base = torch.zeros_like(total) if W is None else W.double()
    total, G = total + base, G.double()
    weight, norm, dm = total, None, None
    if m is not None:
        norm = total.pow(2).sum(1).sqrt()
        weight, dm = (m.double() / norm)[:, None] * total, (G * total).sum(1) / norm
        G = (m.double() / norm)[:, None] * G
    gradients = [
        torch.tensor(g, dtype=torch.float64) for g in oracle.delta_gradients(G.tolist(), *values, s, **options)
    ]
    return [weight - base if minus_base else weight, *gradients, dm, norm]


def compare(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    if tolerance == 0:
        assert torch.equal(got, want.to(got.dtype)), f"{name}: {(got.double() - want).abs().max():.3g} off"
    else:
        error = float((got.double() - want).norm() / want.norm())
        assert error <= tolerance, f"{name}: relative error {error:.3g} > {tolerance}"


def check(
    out: int, inn: int, r1: int, r2: int, *, conv=False, W=True, dtype=torch.float32, base=None, factors=torch.float32,
    dora=False, residual=False, minus_base=False, gaussian=False, tolerance: float = 0, architecture=ARCHITECTURE,
    programs: int | None = None, **options: str,
) -> None:  # fmt: skip
    """Both passes; ``programs``: the gradient pass in about that many."""
    torch.manual_seed(out * inn + r1)
    draw = torch.randn if gaussian else dyadic
    shapes = (r1, inn), (out, r1), (r2, inn), (out, r2)
    now = [draw(*shape).to(factors) for shape in shapes]
    initial = [draw(*shape).to(factors) for shape in shapes] if residual else []
    G, W0 = (draw(out, inn) * 4).to(dtype), draw(out, inn).to(base or dtype) if W else None
    m = torch.rand(out) + 0.5 if dora else None
    s = 0.5
    weight, *gradients, norm = expected(G, W0, now, initial, s, m, minus_base, **options)

    scaling = s if conv else torch.tensor(s)
    update = Update(*map(poisoned, now), scaling, initial=tuple(map(poisoned, initial)), **options)
    stored = [None if t is None else poisoned(t.T if conv else t, strided=True) for t in (W0, G)]
    given = {"fan_in_fan_out": conv, "dtype": dtype, "m": None if m is None else poisoned(m), "minus_base": minus_base}
    kernels._architecture = lambda _device: architecture
    assert kernels.supports(update, dtype)
    filled.clear()
    built, got_norm = kernels.build_weight(stored[0], update, **given)
    if m is None:
        assert got_norm is None
    else:
        compare("norm", got_norm, norm, max(tolerance, 1e-6))
        given["norm"] = poisoned(got_norm)
    with tiles_for(programs):
        rebuilt, *got = kernels.weight_and_gradients(stored[1], stored[0], update, **given)
    for flat in filled:
        assert (flat[:GUARD] == MARK).all(), "written before a buffer"
        assert (flat[-GUARD:] == MARK).all(), "written behind a buffer"
    assert built.dtype == dtype
    assert built.shape == ((inn, out) if conv else (out, inn))
    assert torch.equal(built, rebuilt), "the two passes make different weights"
    rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    compare("W'", built.T if conv else built, weight, max(tolerance, rounding) if gaussian or dora or tolerance else 0)
    for name, g, want in zip(("dA", "dB", "dC", "dD", "dm"), got, gradients, strict=True):
        if want is None:
            assert g.numel() == 0, f"{name} should be empty"
            continue
        assert g.dtype == torch.float32
        compare(name, g, want, tolerance)


@contextlib.contextmanager
def tiles_for(programs: int | None) -> Iterator[None]:
    before = kernels.GRADIENTS
    if programs is not None:
        kernels.GRADIENTS = {
            name: {dtype: kernels.Gradients(*(t._replace(programs=programs) for t in ts)) for dtype, ts in row.items()}
            for name, row in before.items()
        }
    try:
        yield
    finally:
        kernels.GRADIENTS = before


def sizes_and_layouts():
    for size in [(63, 100, 3, 5), (1, 7, 1, 2), (65, 50, 16, 16), (64, 48, 16, 16)]:
        for conv in (False, True):
            yield partial(check, *size, conv=conv)
    for out, inn, architecture in ((40, 20, "sm_80"), (65, 50, "gfx942")):
        if not ON_GPU or architecture[:2] == ARCHITECTURE[:2]:  # not another maker's instructions
            yield partial(check, out, inn, 5, 33, architecture=architecture)


def options():
    for clip, magnitude, direction in (
        ("chain", "abs", "ste"), ("chain", "identity", "ste"), ("chain", "relu", "identity"), ("update", "relu", "ste"),
        ("update", "abs", "identity"), ("none", "relu", "ste"), ("none", "abs", "unit-tanh"), ("chain", "relu", "unit-tanh"),
        ("unit-window", "relu", "ste"), ("unit-window", "identity", "ste"),
    ):  # fmt: skip
        kinds = {"ste_clip": clip, "magnitude": magnitude, "direction": direction}
        tolerance = 1e-6 if "unit" in clip + direction else 0  # no exponential is exact
        yield partial(check, 33, 40, 4, 16, conv=clip == "update", tolerance=tolerance, **kinds)


def dora_and_residual():
    for conv, residual in itertools.product((False, True), repeat=2):
        flags = {"conv": conv, "residual": residual, "minus_base": conv == residual}
        yield partial(check, 33, 40, 5, 16, dora=True, tolerance=1e-6, **flags)
        yield partial(check, 20, 48, 16, 3, **flags)
    yield partial(check, 33, 50, 20, 16, dora=True, tolerance=1e-6, ste_clip="update")
    yield partial(check, 33, 40, 20, 16, residual=True)
    yield partial(check, 20, 33, 5, 3, W=False)


def dtypes():
    bf16, fp16 = {"dtype": torch.bfloat16}, {"dtype": torch.float16}
    for half, conv in itertools.product((bf16, fp16), (False, True)):
        clip = "none" if conv == (half is bf16) else "chain"
        yield partial(check, 33, 70, 16, 5, conv=conv, ste_clip=clip, **half)
    yield partial(check, 63, 100, 5, 16, dora=True, tolerance=4e-3, **bf16)
    yield partial(check, 33, 70, 16, 5, factors=torch.bfloat16, **bf16)
    yield partial(check, 33, 70, 16, 5, base=torch.float32, **bf16)


def large():
    """Several tiles for a program, in both directions, and one program alone: the sums in registers and in memory."""
    yield partial(check, 70, 50, 5, 3, programs=1)
    yield partial(check, 80, 64, 16, 3, conv=True, programs=1)
    yield partial(check, 70, 40, 33, 16, dora=True, tolerance=1e-6, programs=2)
    # Gaussian data: what float32 products lose, and what they would if a TF32 instruction read them whole.
    yield partial(check, 48, 80, 16, 24, gaussian=True, tolerance=1e-6)
    yield partial(check, 47, 60, 5, 16, gaussian=True, tolerance=1e-6, ste_clip="update")
    yield partial(check, 48, 80, 16, 16, gaussian=True, tolerance=4e-3, dtype=torch.bfloat16)


def nan():
    """NaN shows in W' just where the formula has it, and in the gradients at least there.

    At least: the formula's ReLU'(NaN) is torch.sign's 0, the kernel's is NaN.
    """

    def one(name: str, magnitude: str) -> None:
        torch.manual_seed(1)
        factors = {n: dyadic(*shape) for n, shape in zip("ABCD", ((16, 20), (9, 16), (5, 20), (9, 5)), strict=True)}
        G, W = dyadic(9, 20), dyadic(9, 20)
        {**factors, "G": G}[name][2, 1] = float("nan")
        update = Update(**factors, scaling=0.5, magnitude=magnitude)
        got = kernels.weight_and_gradients(G, W, update, fan_in_fan_out=False, dtype=torch.float32)
        dW, *gradients = update.backward(G)
        assert torch.equal(got[0].isnan(), (W + dW).isnan()), f"NaN in {name}"
        assert got[0].isnan().any() or name == "G"
        for g, want in zip(got[1:5], gradients, strict=True):
            assert (g.isnan() | ~want.isnan()).all(), f"NaN in {name}"

    kernels._architecture = lambda _device: ARCHITECTURE
    for name in "ABCDG":
        yield partial(one, name, "relu")
    yield partial(one, "A", "abs")


def device():
    """What only a device can show: its rounding, races, waiting for it, capture; on sizes of many programs."""
    size = (1000, 1504, 16, 12)

    def problem(dtype: torch.dtype, out: int, inn: int, r1: int, r2: int) -> tuple[Tensor, Tensor, Update]:
        # 12 bits for A and C, 6 for B and D: float32 forms BA and DC without rounding, so no sign hangs on a last bit,
        # and TF32, which has 11, does not.
        torch.manual_seed(r2)
        shapes = ((r1, inn), (out, r1), (r2, inn), (out, r2))
        bits = (12, 6, 12, 6)
        factors = [torch.randint(1 - 2**b, 2**b, shape) / 2**b for shape, b in zip(shapes, bits, strict=True)]
        return torch.randn(out, inn).to(dtype), torch.randn(out, inn).to(dtype), Update(*factors, 0.5)

    def accurate(dtype: torch.dtype, *shape: int) -> None:
        G, W, update = problem(dtype, *shape)
        exact = Update(*(factor.double() for factor in update[:4]), 0.5)
        dW, *gradients = exact.backward(G.double())
        weight, *got, _ = kernels.weight_and_gradients(G, W, update, fan_in_fan_out=False, dtype=dtype)
        rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
        compare("W'", weight, W.double() + dW, rounding)
        for name, g, want in zip(("dA", "dB", "dC", "dD"), got, gradients, strict=True):
            compare(name, g, want, rounding)

    def same_bits(dtype: torch.dtype, count: int, m: bool) -> None:
        G, W, update = problem(dtype, *size)
        given = {"fan_in_fan_out": False, "dtype": dtype, "m": torch.rand(size[0]) if m else None}
        norm = kernels.build_weight(W, update, **given)[1]
        with tiles_for(count):
            first, *more = (kernels.weight_and_gradients(G, W, update, norm=norm, **given) for _ in range(30))
        assert all(torch.equal(a, b) for again in more for a, b in zip(first, again, strict=True)), "not the same bits"

    def layer_step(through: Callable = lambda step: step, **options) -> Callable[[], list[Tensor]]:
        """A forward and backward; the same values from every call."""
        _, W, update = problem(torch.bfloat16, *size)
        x = torch.randn(96, size[1], dtype=torch.bfloat16).requires_grad_()
        leaves = [x, *(factor.requires_grad_() for factor in update[:4])]
        dY = torch.randn(96, size[0], dtype=torch.bfloat16)
        forward = through(lambda x, *factors: dual_linear(x, W, None, *factors, 0.5, **options))

        def run() -> list[Tensor]:
            y = forward(*leaves)
            # Detached: what kept the graph alive would keep its leaves' nodes on the stream of the first run.
            return [y.detach(), *torch.autograd.grad(y, leaves, dY)]

        return run

    def never_waits(**options) -> None:
        run = layer_step(**options)
        run()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def captured() -> None:
        """The same numbers from a CUDA graph, replayed."""
        run = layer_step()
        want = run()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
        for tensor in got:
            tensor.zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), "a captured step differs"

    def compiled() -> None:
        """The operators that a compiler sees give what eager mode gives."""
        eager, traced = layer_step()(), layer_step(partial(torch.compile, fullgraph=True))()
        assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True)), "a compiled step differs"

    for dtype in kernels.DTYPES:
        for shape in (size, (999, 1501, 5, 33), (1024, 768, 64, 24)):
            yield partial(accurate, dtype, *shape)
        for count, m in ((64, False), (1024, False), (1024, True)):
            yield partial(same_bits, dtype, count, m)
    for options in ({}, {"form": "added"}, {"m": torch.rand(size[0])}, {"gradient_tokens": 0.25}):
        yield partial(never_waits, **options)
    yield captured
    yield compiled


GROUPS = {f.__name__: f for f in (sizes_and_layouts, options, dora_and_residual, dtypes, large, nan, device)}

if __name__ == "__main__":
    if not ON_GPU:
        interpreter.InterpreterBuilder.create_dot = create_dot
        interpreter.InterpreterBuilder.cast_impl = cast_impl
    if sys.argv[2:] != ["device"]:  # which captures: no new tensors filled behind its back
        Tensor.new_empty = new_empty
    failures = []
    for number, case in enumerate((case for group in sys.argv[2:] for case in GROUPS[group]()), 1):
        try:
            case()
        except Exception as error:
            failures.append(f"case {number} {case}: {type(error).__name__}: {error}")
    print("\n".join(failures) or f"{number} cases")
    sys.exit(bool(failures))
