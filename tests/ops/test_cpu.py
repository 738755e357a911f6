"""The native kernel: accuracy against float64, edges, threads, compilation and its failures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from duallora.core.equation import Update
from duallora.ops import backends, build_weight, cpu, dual_linear

SIZES = [(63, 100, 5, 3), (100, 63, 1, 17), (1, 7, 1, 2), (33, 64, 16, 16), (130, 257, 33, 8), (8, 1, 2, 2)]


def make(out, inn, r1, r2, dtype=torch.float32, scale=0.3, **options):
    """(update in float32, the same in float64, W, G): products away from 0 where float32 and float64 could disagree."""
    g = torch.Generator().manual_seed(out + inn)
    factors = [torch.randn(s, generator=g) for s in ((r1, inn), (out, r1), (r2, inn), (out, r2))]
    W, G = (torch.randn(out, inn, generator=g).to(dtype) for _ in range(2))
    wide = [f.double() for f in factors]
    return Update(*factors, scale, **options), Update(*wide, scale, **options), W, G


def relative(got, want) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


@pytest.mark.parametrize("ste_clip", ["chain", "update", "none", "unit-window"])
@pytest.mark.parametrize(
    ("magnitude", "direction"),
    [("relu", "ste"), ("abs", "identity"), ("identity", "ste"), ("identity", "unit-tanh"), ("abs", "unit-tanh")],
)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weight_and_gradients_against_float64(size, dtype, tolerance, fan_in_fan_out, magnitude, direction, ste_clip):
    update, wide, W, G = make(*size, dtype, magnitude=magnitude, direction=direction, ste_clip=ste_clip)
    dW, *gradients = wide.backward(G.double())
    stored = [t.T.contiguous() if fan_in_fan_out else t for t in (W, G)]
    options = {"fan_in_fan_out": fan_in_fan_out, "dtype": dtype}
    built, _ = cpu.build_weight(stored[0], update, **options)
    rebuilt, *got, _ = cpu.weight_and_gradients(stored[1], stored[0], update, **options)
    assert torch.equal(built, rebuilt)
    want = W.double() + dW
    assert relative(built.T if fan_in_fan_out else built, want) <= tolerance
    few = min(size[:2]) == 1  # a single product has no sum over which rounding evens out
    for g, w in zip(got, gradients, strict=True):
        assert g.dtype == torch.float32
        assert relative(g, w) <= (1e-5 if few else 1e-6)


def test_sign_of_zero_and_edges_of_the_clip():
    """BA = 0 is closed, DC = 0 points down, and the clip acts at +-1, exactly: small integers, no tolerance."""
    A, B = torch.tensor([[1.0, 0.0, -1.0, 2.0]]), torch.tensor([[1.0], [0.0], [-2.0]])
    C, D = torch.tensor([[0.0, 1.0, -1.0, 2.0]]), torch.tensor([[1.0], [-1.0], [0.0]])
    update = Update(A, B, C, D, 0.5)
    delta, _ = cpu.build_weight(None, update, fan_in_fan_out=False, dtype=torch.float32)
    assert delta.tolist() == [[-0.5, 0.0, 0.0, 1.0], [0.0] * 4, [0.0, 0.0, -1.0, 0.0]]
    G = torch.tensor([[4.0, 4.0, 4.0, -4.0], [1.0] * 4, [1.0, 1.0, 0.5, 1.0]])
    for clip in ("chain", "update", "none"):
        got = cpu.weight_and_gradients(
            G, None, update._replace(ste_clip=clip), fan_in_fan_out=False, dtype=torch.float32
        )
        want = update._replace(ste_clip=clip).backward(G)
        for g, w in zip(got[1:5], want[1:], strict=True):
            assert torch.equal(g, w)


def test_nan_stays_visible():
    for name in "ABCD":
        update, _, W, _ = make(63, 100, 5, 3)
        getattr(update, name)[0, 0] = float("nan")
        weight, _ = cpu.build_weight(W, update, fan_in_fan_out=False, dtype=torch.float32)
        assert torch.equal(weight.isnan(), (W + update.delta()).isnan())
        assert weight.isnan().any()


def test_views_and_factors_of_other_types():
    """Strided W, G and factors, and bf16 factors, give what contiguous float32 copies give."""
    update, _, W, G = make(63, 100, 5, 3)
    wide = [torch.full((t.shape[0], t.shape[1] * 2), float("nan")) for t in (*update[:4], W, G)]
    for view, t in zip(wide, (*update[:4], W, G), strict=True):
        view[:, ::2] = t
    A, B, C, D, W2, G2 = (t[:, ::2] for t in wide)
    options = {"fan_in_fan_out": False, "dtype": torch.float32}
    want = cpu.weight_and_gradients(G, W, update, **options)
    got = cpu.weight_and_gradients(G2, W2, Update(A, B, C, D, 0.3), **options)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    half = [f.bfloat16() for f in update[:4]]
    a, _ = cpu.build_weight(W, Update(*half, 0.3), **options)
    b, _ = cpu.build_weight(W, Update(*(f.float() for f in half), 0.3), **options)
    assert torch.equal(a, b)


def test_the_number_of_threads_changes_no_weight_and_repeats_its_gradients():
    """W' has the same bits on any number of threads; gradients the same bits on the same number."""
    update, wide, W, G = make(513, 700, 9, 12)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(cpu.weight_and_gradients(G, W, update, fan_in_fan_out=False, dtype=torch.float32))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r[0], results[0][0]) for r in results)
    assert all(torch.equal(a, b) for a, b in zip(results[2], results[3], strict=True))
    _, *want = wide.backward(G.double())
    for result in results:
        for g, w in zip(result[1:5], want, strict=True):
            assert relative(g, w) <= 1e-6


def test_what_it_does_not_compute_goes_to_the_torch_operators():
    update, _, W, _ = make(63, 100, 5, 3)
    for other in (
        update._replace(magnitude="sigmoid"),
        update._replace(direction="xnor"),
        update._replace(direction="dorefa"),
    ):
        assert not cpu.supports(other, torch.float32)
        assert backends.pick("cpu", other, torch.float32) is backends.recompute
    assert backends.pick("cpu", update, torch.float64) is backends.recompute
    assert backends.pick("auto", update, torch.bfloat16) is cpu
    assert backends.pick("recompute", update, torch.float32) is backends.recompute
    wide = [f.double() for f in update[:4]]
    assert build_weight(W.double(), *wide, 0.3, backend="cpu").dtype == torch.float64


def script(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )


LAYER = """
import torch, warnings
from duallora import dual_linear
warnings.simplefilter("always")
t = torch.arange(12.).view(3, 4) - 5
f = (torch.ones(2, 4), torch.ones(3, 2), torch.ones(1, 4), torch.ones(3, 1))
for _ in range(2):
    print(dual_linear(torch.ones(1, 4), t, None, *f, 0.5, backend=BACKEND).tolist())
"""


def test_without_a_compiler_auto_says_so_once_and_goes_on(tmp_path):
    done = script("BACKEND = 'auto'" + LAYER, PATH=str(tmp_path), CXX="", DUALLORA_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[[-10.0, 6.0, 22.0]]"] * 2
    assert done.stderr.count("no C++ compiler was found") == 1
    assert "install one, for example g++" in done.stderr


def test_without_a_compiler_asking_for_the_kernel_raises(tmp_path):
    done = script("BACKEND = 'cpu'" + LAYER, PATH=str(tmp_path), CXX="", DUALLORA_CACHE=str(tmp_path))
    assert done.returncode == 1
    assert "CompilerError: no C++ compiler was found" in done.stderr


def test_a_c_driver_will_do(tmp_path):
    """CXX=gcc compiles C++ but does not link its library; PEFT's BOFT leaves it in the environment."""
    driver = shutil.which("gcc") or shutil.which("clang")
    if driver is None:
        pytest.skip("no gcc, no clang")
    done = script("BACKEND = 'cpu'" + LAYER, CXX=driver, DUALLORA_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[[-10.0, 6.0, 22.0]]"] * 2


def test_a_compiler_that_fails_shows_its_own_words(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'internal compiler error: out of patience' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = script("BACKEND = 'auto'" + LAYER, CXX=str(broken), DUALLORA_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "out of patience" in done.stderr
    assert not list(tmp_path.glob("*.so"))


@pytest.fixture(scope="module")
def compiler():
    if not shutil.which("c++") and not shutil.which("g++"):
        pytest.skip("no C++ compiler")


def test_first_uses_at_the_same_time_leave_one_whole_library(tmp_path, compiler):
    code = "BACKEND = 'cpu'" + LAYER
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "DUALLORA_CACHE": str(tmp_path)},
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in running:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert out.splitlines() == ["[[-10.0, 6.0, 22.0]]"] * 2
    (built,) = tmp_path.iterdir()
    # A library cut short, by a full disk say, is compiled again.
    built.write_bytes(built.read_bytes()[:1000])
    done = script(code, DUALLORA_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert built.stat().st_size > 1000


def test_an_unwritable_cache_falls_back_to_a_folder_of_its_own(tmp_path, compiler):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    done = script("BACKEND = 'cpu'" + LAYER, DUALLORA_CACHE=str(blocked), TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_an_update_with_no_gradient_asked_costs_no_gradient_pass(monkeypatch):
    """A frozen adapter's backward builds W' for dx and does not form G."""
    update, _, W, _ = make(63, 100, 5, 3)

    def refuse(*args, **kwargs):
        raise AssertionError("formed G for nobody")

    monkeypatch.setattr(cpu, "weight_and_gradients", refuse)
    x = torch.randn(4, 100, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = dual_linear(x, W, None, *update[:4], 0.3, backend="cpu")
    (dx,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(dx, (W + update.delta()).sum(0).expand(4, -1), rtol=1e-5, atol=1e-5)
