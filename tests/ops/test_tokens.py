"""Sampled tokens: unbiased, no noisier than promised, reproducible; rows of zeros cost nothing and change nothing."""

from __future__ import annotations

import pytest
import torch

from duallora.ops import autograd, dual_linear
from duallora.ops import tokens as tokens_module
from duallora.ops.tokens import nonzero_rows, sample, token_weights

N, IN, OUT = 97, 23, 13


def tokens(heavy: int = 5, zero: int = 0, seed: int = 0):
    """x, dY whose weights spread over three orders of magnitude, with ``heavy`` giants and ``zero`` empty rows."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -3, N)[torch.randperm(N, generator=g)][:, None]
    x, dY = torch.randn(N, IN, generator=g), torch.randn(N, OUT, generator=g) * scale
    dY[:heavy] *= 20
    if zero:
        dY[torch.randperm(N, generator=g)[:zero]] = 0
    return x, dY


def estimate(x, dY, m: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    chosen, weight = sample(token_weights(x, dY), m)
    return (dY[chosen] * weight[:, None]).double().T @ x[chosen].double()


@pytest.mark.parametrize("m", [1, 7, 24, 96])
def test_the_estimate_is_unbiased(m):
    """The mean of 4000 estimates lies within 4 standard errors of G, in the norm over all entries."""
    x, dY = tokens()
    G = dY.double().T @ x.double()
    draws = torch.stack([estimate(x, dY, m, seed) for seed in range(4000)])
    error = draws.mean(0) - G
    spread = (draws - G).square().sum((1, 2)).mean().sqrt()
    assert error.norm() <= 4 * spread / 4000**0.5 + 1e-6 * G.norm()


@pytest.mark.parametrize("m", [7, 24, 60])
def test_the_variance_is_within_the_bound_and_below_plain_sampling(m):
    """E|estimate - G|^2 <= R_c^2 / k; keeping the heaviest beats drawing all m tokens by weight."""
    x, dY = tokens()
    G, p = dY.double().T @ x.double(), token_weights(x, dY)
    seen = torch.stack([(estimate(x, dY, m, seed) - G).square().sum() for seed in range(2000)]).mean()
    assert seen <= error_bound(p, m) * 1.05
    plain = (p.double().sum() ** 2 - G.square().sum()) / m
    assert seen < plain


def error_bound(p: torch.Tensor, m: int) -> float:
    """min over c of R_c^2 / (m - c), by a loop."""
    weights = sorted(p.double().tolist(), reverse=True)
    return min(sum(weights[c:]) ** 2 / (m - c) for c in range(m))


def test_heavy_tokens_are_kept_as_they_are():
    x, dY = tokens(heavy=5)
    p = token_weights(x, dY)
    for _ in range(20):
        chosen, weight = sample(p, 24)
        heaviest = p.argsort(descending=True)[:5]
        assert set(heaviest.tolist()) <= set(chosen[weight == 1].tolist())


def test_tokens_of_no_weight_are_never_drawn_and_all_zero_is_no_trouble():
    x, dY = tokens(zero=40)
    for _ in range(50):
        chosen, weight = sample(token_weights(x, dY), 24)
        assert bool((dY[chosen] != 0).any(1).all())
        assert bool(torch.isfinite(weight).all())
    chosen, weight = sample(torch.zeros(N), 5)
    assert bool(torch.isfinite(weight).all())


def factors(seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    shapes = ((3, IN), (OUT, 3), (5, IN), (OUT, 5))
    return [torch.randn(s, generator=g).requires_grad_() for s in shapes], torch.randn(OUT, IN, generator=g)


@pytest.mark.parametrize("backend", ["recompute", "cpu"])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_sampled_factor_gradients_are_unbiased_and_the_rest_is_exact(backend, fan_in_fan_out):
    """Without a clip the factor gradients are linear in G, so their mean is the exact one; dx and db are exact."""
    x, dY = tokens()
    x.requires_grad_()
    (A, B, C, D), W = factors()
    b = torch.zeros(OUT, requires_grad=True)
    W = W.T.contiguous() if fan_in_fan_out else W
    options = {"ste_clip": "none", "fan_in_fan_out": fan_in_fan_out, "backend": backend}
    leaves = [x, b, A, B, C, D]
    exact = torch.autograd.grad(dual_linear(x, W, b, A, B, C, D, 0.3, **options), leaves, dY)

    def sampled(seed: int):
        y = dual_linear(x, W, b, A, B, C, D, 0.3, **options, gradient_tokens=0.25)
        torch.manual_seed(seed)
        return torch.autograd.grad(y, leaves, dY)

    draws = [sampled(seed) for seed in range(600)]
    assert torch.equal(draws[0][0], exact[0])
    assert torch.equal(draws[0][1], exact[1])
    for name, want, *got in zip("ABCD", exact[2:], *(d[2:] for d in draws), strict=True):
        stack = torch.stack(got).double()
        standard_error = (stack - want).square().sum((1, 2)).mean().sqrt() / len(got) ** 0.5
        assert (stack.mean(0) - want).norm() <= 4 * standard_error, name
    assert not torch.equal(draws[0][2], draws[1][2])
    for again, once in zip(sampled(0), draws[0], strict=True):
        assert torch.equal(again, once)


def test_with_every_token_the_gradient_is_exact_and_nothing_is_drawn():
    x, dY = tokens()
    (A, B, C, D), W = factors()
    exact = torch.autograd.grad(dual_linear(x, W, None, A, B, C, D, 0.3), [A], dY)[0]
    state = torch.random.get_rng_state()
    for share in (1.0, 1 - 1e-9):  # rounded up to all tokens
        y = dual_linear(x, W, None, A, B, C, D, 0.3, gradient_tokens=share)
        assert torch.equal(torch.autograd.grad(y, [A], dY)[0], exact)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"gradient_tokens=0: expected a share of the tokens in \(0, 1\]"):
        dual_linear(x, W, None, A, B, C, D, 0.3, gradient_tokens=0)


def test_rows_of_zeros_are_found_exactly(monkeypatch):
    _, dY = tokens(zero=40)
    assert nonzero_rows(dY) is None  # too few to be worth a look
    monkeypatch.setattr(tokens_module, "WORTH_LOOKING", 0)
    assert nonzero_rows(dY).tolist() == [i for i in range(N) if bool((dY[i] != 0).any())]
    dY[0, :], dY[0, -1] = 0, 1e-30  # one late entry is enough
    dY[1] = 0
    kept = nonzero_rows(dY).tolist()
    assert 0 in kept
    assert 1 not in kept
    wide = torch.zeros(8, 64)
    wide[3, 40], wide[5, 2] = float("nan"), -0.0
    assert nonzero_rows(wide).tolist() == [3]
    assert nonzero_rows(torch.randn(N, OUT)) is None


@pytest.mark.parametrize("backend", ["recompute", "cpu"])
def test_leaving_zero_rows_out_changes_no_gradient(backend, monkeypatch):
    """Against the same backward with the shortcut switched off; dx is zero in those rows."""
    monkeypatch.setattr(tokens_module, "WORTH_LOOKING", 0)
    x, dY = tokens(zero=40)
    x.requires_grad_()
    (A, B, C, D), W = factors()
    leaves = [x, A, B, C, D]
    dropped = torch.autograd.grad(dual_linear(x, W, None, A, B, C, D, 0.3, backend=backend), leaves, dY)
    monkeypatch.setattr(autograd, "nonzero_rows", lambda dY: None)
    whole = torch.autograd.grad(dual_linear(x, W, None, A, B, C, D, 0.3, backend=backend), leaves, dY)
    for g, w in zip(dropped, whole, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)
    assert bool((dropped[0][(dY == 0).all(1)] == 0).all())
    nothing = torch.autograd.grad(dual_linear(x, W, None, A, B, C, D, 0.3, backend=backend), leaves, dY * 0)
    assert all(bool((g == 0).all()) for g in nothing)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_the_sample_survives_a_gradient_of_nothing(n):
    """No token, or none that carries a gradient."""
    (A, B, C, D), W = factors()
    y = dual_linear(torch.randn(n, IN), W, None, A, B, C, D, 0.3, gradient_tokens=0.25)
    assert bool((torch.autograd.grad(y, [A], torch.zeros_like(y))[0] == 0).all())
