"""The native kernel: accuracy against float64, edges, threads, compilation and its failures."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys

import pytest
import torch

from duallora.core.equation import Update
from duallora.ops import backends, build_weight, cpu, dual_linear

FP32 = torch.float32
PLAIN = {"fan_in_fan_out": False, "dtype": FP32}
SIZES = [(63, 100, 5, 3), (100, 63, 1, 17), (1, 7, 1, 2), (33, 64, 16, 16), (130, 257, 33, 8), (8, 1, 2, 2)]


def make(out, inn, r1, r2, dtype=FP32, scale=0.3, **options):
    """(update in float32, the same in float64, W, G): products away from 0 where float32 and float64 could disagree."""
    g = torch.Generator().manual_seed(out + inn)
    factors = [torch.randn(s, generator=g) for s in ((r1, inn), (out, r1), (r2, inn), (out, r2))]
    W, G = (torch.randn(out, inn, generator=g).to(dtype) for _ in range(2))
    wide = [f.double() for f in factors]
    return Update(*factors, scale, **options), Update(*wide, scale, **options), W, G


def relative(got, want) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


KINDS = itertools.product(
    ("relu", "abs", "identity"), ("ste", "identity", "unit-tanh"), ("chain", "update", "none", "unit-window")
)
WAYS = [
    *((dtype, size, ("relu", "ste", "chain")) for dtype in (FP32, torch.bfloat16, torch.float16) for size in SIZES),
    *((FP32, (65, 129, 17, 4), kind) for kind in KINDS),
]


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize(("dtype", "size", "kind"), WAYS, ids=str)
def test_weight_and_gradients_against_float64(dtype, size, kind, fan_in_fan_out):
    magnitude, direction, ste_clip = kind
    update, wide, W, G = make(*size, dtype, magnitude=magnitude, direction=direction, ste_clip=ste_clip)
    dW, *gradients = wide.backward(G.double())
    stored = [t.T.contiguous() if fan_in_fan_out else t for t in (W, G)]
    given = {"fan_in_fan_out": fan_in_fan_out, "dtype": dtype}
    built, _ = cpu.build_weight(stored[0], update, **given)
    rebuilt, *got, _ = cpu.weight_and_gradients(stored[1], stored[0], update, **given)
    assert torch.equal(built, rebuilt)
    tolerance = {FP32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert relative(built.T if fan_in_fan_out else built, W.double() + dW) <= tolerance
    few = min(size[:2]) == 1  # a single product has no sum over which rounding evens out
    for g, w in zip(got, gradients, strict=True):
        assert g.dtype == FP32
        assert relative(g, w) <= (1e-5 if few else 1e-6)


def test_sign_of_zero_and_edges_of_the_clip():
    """BA = 0 is closed, DC = 0 points down, and the clip acts at +-1, exactly: small integers, no tolerance."""
    A, B = torch.tensor([[1.0, 0.0, -1.0, 2.0]]), torch.tensor([[1.0], [0.0], [-2.0]])
    C, D = torch.tensor([[0.0, 1.0, -1.0, 2.0]]), torch.tensor([[1.0], [-1.0], [0.0]])
    update = Update(A, B, C, D, 0.5)
    delta, _ = cpu.build_weight(None, update, **PLAIN)
    assert delta.tolist() == [[-0.5, 0.0, 0.0, 1.0], [0.0] * 4, [0.0, 0.0, -1.0, 0.0]]
    G = torch.tensor([[4.0, 4.0, 4.0, -4.0], [1.0] * 4, [1.0, 1.0, 0.5, 1.0]])
    for clip in ("chain", "update", "none"):
        clipped = update._replace(ste_clip=clip)
        got = cpu.weight_and_gradients(G, None, clipped, **PLAIN)
        assert all(map(torch.equal, got[1:5], clipped.backward(G)[1:]))


def test_nan_stays_visible():
    for name in "ABCD":
        update, _, W, _ = make(63, 100, 5, 3)
        getattr(update, name)[0, 0] = float("nan")
        weight, _ = cpu.build_weight(W, update, **PLAIN)
        assert torch.equal(weight.isnan(), (W + update.delta()).isnan())
        assert weight.isnan().any()


def test_views_and_factors_of_other_types():
    """Strided W, G and factors, and bf16 factors, give what contiguous float32 copies give."""
    update, _, W, G = make(63, 100, 5, 3)
    wide = [torch.full((t.shape[0], t.shape[1] * 2), float("nan")) for t in (*update[:4], W, G)]
    for view, t in zip(wide, (*update[:4], W, G), strict=True):
        view[:, ::2] = t
    A, B, C, D, W2, G2 = (t[:, ::2] for t in wide)
    want = cpu.weight_and_gradients(G, W, update, **PLAIN)
    got = cpu.weight_and_gradients(G2, W2, Update(A, B, C, D, 0.3), **PLAIN)
    assert all(map(torch.equal, got, want))
    half = [f.bfloat16() for f in update[:4]]
    a, b = (cpu.build_weight(W, Update(*f, 0.3), **PLAIN)[0] for f in (half, [f.float() for f in half]))
    assert torch.equal(a, b)


def test_the_number_of_threads_changes_no_weight_and_repeats_its_gradients():
    """W' has the same bits on any number of threads; gradients the same bits on the same number."""
    update, wide, W, G = make(513, 700, 9, 12)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(cpu.weight_and_gradients(G, W, update, **PLAIN))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r[0], results[0][0]) for r in results)
    assert all(map(torch.equal, results[2], results[3]))
    _, *want = wide.backward(G.double())
    for result in results:
        for g, w in zip(result[1:5], want, strict=True):
            assert relative(g, w) <= 1e-6


def test_what_it_does_not_compute_goes_to_the_torch_operators():
    update, _, W, _ = make(63, 100, 5, 3)
    for change in ({"magnitude": "sigmoid"}, {"direction": "xnor"}, {"direction": "dorefa"}):
        assert backends.pick("cpu", update._replace(**change), FP32) is backends.recompute
    assert backends.pick("cpu", update, torch.float64) is backends.recompute
    assert backends.pick("auto", update, torch.bfloat16) is cpu
    assert backends.pick("recompute", update, FP32) is backends.recompute
    wide = [f.double() for f in update[:4]]
    assert build_weight(W.double(), *wide, 0.3, backend="cpu").dtype == torch.float64


LAYER = """
import sys, torch, warnings
from duallora import dual_linear
warnings.simplefilter("always")
t = torch.arange(12.).view(3, 4) - 5
f = (torch.ones(2, 4), torch.ones(3, 2), torch.ones(1, 4), torch.ones(3, 1))
for backend in sys.argv[1:]:
    try:
        print(dual_linear(torch.ones(1, 4), t, None, *f, 0.5, backend=backend).tolist())
    except RuntimeError as error:
        print(type(error).__name__, error)
"""
RIGHT = "[[-10.0, 6.0, 22.0]]"


def start(*backends: str, **env: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", LAYER, *backends], env={**os.environ, **env}, **pipes)


def test_without_a_compiler_auto_says_so_once_and_asking_for_the_kernel_raises(tmp_path):
    out, err = start("cpu", "auto", "auto", PATH=str(tmp_path), CXX="", DUALLORA_CACHE=str(tmp_path)).communicate()
    raised, *right = out.splitlines()
    assert raised.startswith("CompilerError no C++ compiler was found"), err
    assert right == [RIGHT] * 2
    assert err.count("no C++ compiler was found") == 1
    assert "install one, for example g++" in err


def test_a_compiler_that_fails_shows_its_own_words(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'internal compiler error: out of patience' >&2\nexit 1\n")
    broken.chmod(0o755)
    out, err = start("auto", CXX=str(broken), DUALLORA_CACHE=str(tmp_path)).communicate()
    assert out.splitlines() == [RIGHT], err
    assert "out of patience" in err
    assert not list(tmp_path.glob("*.so"))


def test_first_uses_at_the_same_time_leave_one_whole_library(tmp_path):
    """Of a compiler that takes no time: it hands out the library that these tests run on."""
    quick = tmp_path / "c++"
    quick.write_text(
        f'#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && cp "{cpu.library()._name}" "$2"; shift; done\n'
    )
    quick.chmod(0o755)
    env = {"CXX": str(quick), "DUALLORA_CACHE": str(tmp_path / "cache")}
    for process in [start("cpu", **env) for _ in range(2)]:
        out, err = process.communicate()
        assert out.splitlines() == [RIGHT], err
    (built,) = (tmp_path / "cache").iterdir()
    # A library cut short, by a full disk say, is compiled again.
    built.write_bytes(built.read_bytes()[:1000])
    out, err = start("cpu", **env).communicate()
    assert out.splitlines() == [RIGHT], err
    assert built.stat().st_size > 1000


def test_a_c_driver_and_a_cache_that_cannot_be_written_will_do(tmp_path):
    """CXX=gcc compiles C++ but does not link its library; PEFT's BOFT leaves it in the environment."""
    driver = shutil.which("gcc") or shutil.which("clang")
    if driver is None:
        pytest.skip("no gcc, no clang")
    out, err = start("cpu", CXX=driver, DUALLORA_CACHE=__file__, TMPDIR=str(tmp_path)).communicate()
    assert out.splitlines() == [RIGHT], err


def test_an_update_with_no_gradient_asked_costs_no_gradient_pass(monkeypatch):
    """A frozen adapter's backward builds W' for dx and does not form G."""
    update, _, W, _ = make(63, 100, 5, 3)

    def refuse(*args, **kwargs):
        raise AssertionError("formed G for nobody")

    monkeypatch.setattr(cpu, "weight_and_gradients", refuse)
    x = torch.randn(4, 100, requires_grad=True)
    y = dual_linear(x, W, None, *update[:4], 0.3, backend="cpu")
    (dx,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(dx, (W + update.delta()).sum(0).expand(4, -1), rtol=1e-5, atol=1e-5)
