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


@pytest.mark.parametrize("m", [1, 24, 96])
def test_the_estimate_is_unbiased_and_its_variance_within_the_bound_and_below_plain_sampling(m):
    """The mean of 1000 estimates lies within 4 standard errors of G, in the norm over all entries; E|estimate - G|^2 <=
    min R_c^2 / (m - c), and keeping the heaviest beats drawing all m tokens by weight."""
    x, dY = tokens()
    G, p = dY.double().T @ x.double(), token_weights(x, dY)
    torch.manual_seed(0)
    draws = [sample(p, m) for _ in range(1000)]
    errors = torch.stack(
        [(dY[chosen] * weight[:, None]).double().T @ x[chosen].double() - G for chosen, weight in draws]
    )
    seen = errors.square().sum((1, 2)).mean()
    assert errors.mean(0).norm() <= 4 * (seen / 1000).sqrt() + 1e-6 * G.norm()
    weights = sorted(p.double().tolist(), reverse=True)
    assert seen <= 1.05 * min(sum(weights[c:]) ** 2 / (m - c) for c in range(m))
    assert m == 1 or seen < (sum(weights) ** 2 - G.square().sum()) / m


def test_heavy_tokens_are_kept_as_they_are_and_those_of_no_weight_never_drawn():
    x, dY = tokens(heavy=5, zero=40)
    p = token_weights(x, dY)
    for _ in range(50):
        chosen, weight = sample(p, 24)
        assert set(p.topk(4).indices.tolist()) <= set(chosen[weight == 1].tolist())
        assert (dY[chosen] != 0).any(1).all()
        assert weight.isfinite().all()
    assert sample(torch.zeros(N), 5)[1].isfinite().all()


def layer(fan_in_fan_out: bool = False):
    """W, [A, B, C, D]"""
    g = torch.Generator().manual_seed(1)
    factors = [torch.randn(s, generator=g).requires_grad_() for s in ((3, IN), (OUT, 3), (5, IN), (OUT, 5))]
    W = torch.randn(OUT, IN, generator=g)
    return W.T.contiguous() if fan_in_fan_out else W, factors


@pytest.mark.parametrize(("backend", "fan_in_fan_out"), [("recompute", False), ("cpu", True)])
def test_sampled_factor_gradients_are_unbiased_and_the_rest_is_exact(backend, fan_in_fan_out):
    """Without a clip the factor gradients are linear in G, so their mean is the exact one; dx and db are exact."""
    x, dY = tokens()
    W, factors = layer(fan_in_fan_out)
    b = torch.zeros(OUT, requires_grad=True)
    leaves = [x.requires_grad_(), b, *factors]

    def gradients(seed: int = 0, **options):
        options |= {"ste_clip": "none", "fan_in_fan_out": fan_in_fan_out, "backend": backend}
        y = dual_linear(x, W, b, *factors, 0.3, **options)
        torch.manual_seed(seed)
        return torch.autograd.grad(y, leaves, dY)

    exact = gradients()
    draws = [gradients(seed, gradient_tokens=0.25) for seed in range(200)]
    assert all(map(torch.equal, draws[0][:2], exact[:2]))
    for want, *got in zip(exact[2:], *(d[2:] for d in draws), strict=True):
        stack = torch.stack(got).double()
        standard_error = (stack - want).square().sum((1, 2)).mean().sqrt() / len(got) ** 0.5
        assert (stack.mean(0) - want).norm() <= 4 * standard_error
    assert not torch.equal(draws[0][2], draws[1][2])
    assert all(map(torch.equal, gradients(0, gradient_tokens=0.25), draws[0]))


def test_with_every_token_the_gradient_is_exact_and_nothing_is_drawn():
    x, dY = tokens()
    W, factors = layer()
    state = torch.random.get_rng_state()
    exact, one, rounded_up = (
        torch.autograd.grad(dual_linear(x, W, None, *factors, 0.3, **share), factors, dY)
        for share in ({}, {"gradient_tokens": 1.0}, {"gradient_tokens": 1 - 1e-9})
    )
    assert all(map(torch.equal, one, exact))
    assert all(map(torch.equal, rounded_up, exact))
    assert torch.equal(torch.random.get_rng_state(), state)


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


def test_leaving_zero_rows_out_changes_no_gradient(monkeypatch):
    """Against the same backward with the shortcut switched off; dx is zero in those rows."""
    monkeypatch.setattr(tokens_module, "WORTH_LOOKING", 0)
    x, dY = tokens(zero=40)
    W, factors = layer()
    leaves = [x.requires_grad_(), *factors]

    def gradients(dY):
        return torch.autograd.grad(dual_linear(x, W, None, *factors, 0.3), leaves, dY)

    dropped, nothing = gradients(dY), gradients(dY * 0)
    monkeypatch.setattr(autograd, "nonzero_rows", lambda dY: None)
    torch.testing.assert_close(dropped, gradients(dY), rtol=1e-5, atol=1e-6)
    assert not dropped[0][(dY == 0).all(1)].any()
    assert not any(g.any() for g in nothing)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_the_sample_survives_a_gradient_of_nothing(n):
    """No token, or none that carries a gradient."""
    W, factors = layer()
    y = dual_linear(torch.randn(n, IN), W, None, *factors, 0.3, gradient_tokens=0.25)
    assert not any(g.any() for g in torch.autograd.grad(y, factors, torch.zeros_like(y)))
