"""The equation, against pencil and paper and against a slow float64 oracle."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch

from duallora.core.equation import (
    DIRECTIONS,
    MAGNITUDES,
    STE_CLIPS,
    Update,
    add_update,
    dual_delta,
    dual_scaling,
    sign,
)

# A 2x3 case by hand, r1 = 2, r2 = 1, with every branch: BA > 0 under DC > 0, DC = 0 and DC < 0; BA = 0; BA < 0.
#   BA = [[1, 2, 0], [2, 3, -1]]      DC = [[3, 0, -1], [-6, 0, 2]]      s = 1/2
A = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
B = torch.tensor([[1.0, 0.0], [2.0, -1.0]])
C = torch.tensor([[3.0, 0.0, -1.0]])
D = torch.tensor([[1.0], [-2.0]])
S = 0.5
G = torch.tensor([[1.0, 1.0, 1.0], [1.0, 4.0, 1.0]])


def factors(requires_grad: bool = True) -> list[torch.Tensor]:
    return [f.clone().requires_grad_(requires_grad) for f in (A, B, C, D)]


def test_delta_by_hand():
    """Sign(0) = -1, ReLU cuts BA <= 0, the scale multiplies: torch.sign, >= or a dropped scale would show."""
    expected = torch.tensor([[0.5, -1.0, 0.0], [-1.0, -1.5, 0.0]])
    assert torch.equal(dual_delta(A, B, C, D, S), expected)
    assert torch.equal(dual_delta(A, B, C, D, torch.tensor(S)), expected)


@pytest.mark.parametrize(
    ("ste_clip", "dC"),
    [("chain", [-1.5, -1.0, 0.0]), ("update", [-1.5, -2.0, 0.0]), ("none", [-1.5, -11.0, 0.0])],
)
def test_gradients_by_hand(ste_clip, dC):
    """G M = [[.5, 1, 0], [1, 6, 0]]: Eq. 7 clips it, Eq. 12 clips G, "none" neither. dP = s G Sign(DC) 1[BA > 0]."""
    dD = torch.tensor([[1.5], [3.0]])
    expected = [
        torch.tensor([[-0.5, -4.5, 0.0], [0.5, 2.0, 0.0]]),
        torch.tensor([[-0.5, -0.5], [-4.5, -2.0]]),
        torch.tensor([dC]),
        dD,
    ]
    leaves = factors()
    autograd = torch.autograd.grad(dual_delta(*leaves, S, ste_clip=ste_clip), leaves, G)
    dW, *by_hand = Update(A, B, C, D, S, ste_clip=ste_clip).backward(G)
    assert torch.equal(dW, dual_delta(A, B, C, D, S))
    for want, got, got_by_hand in zip(expected, autograd, by_hand, strict=True):
        assert torch.equal(got, want)
        assert torch.equal(got_by_hand, want)


def test_ablations_by_hand():
    """Table 6's magnitudes, Table 3's directions (XNOR: a mean per output row; DoReFa: one mean), Settings 1 to 3."""
    P, Q = B @ A, D @ C
    signs = torch.tensor([[1.0, -1, -1], [-1, -1, 1]])
    assert torch.equal(sign(Q), signs)
    assert torch.equal(dual_delta(A, B, C, D, S, magnitude="abs"), S * P.abs() * signs)
    assert torch.equal(dual_delta(A, B, C, D, S, magnitude="identity"), S * P * signs)
    assert torch.allclose(dual_delta(A, B, C, D, S, magnitude="sigmoid"), S / (1 + torch.exp(-P)) * signs)
    M = S * P.clamp(min=0)
    assert torch.equal(dual_delta(A, B, C, D, S, direction="identity"), M * Q)
    assert torch.allclose(dual_delta(A, B, C, D, S, direction="xnor"), M * signs * torch.tensor([[4 / 3], [8 / 3]]))
    assert torch.allclose(dual_delta(A, B, C, D, S, direction="dorefa"), M * signs * 2.0)
    fixed = torch.tensor([[1, 1, -1], [-1, 1, 1]], dtype=torch.int8)
    assert torch.equal(dual_delta(A, B, None, None, S, direction="fixed", fixed_sign=fixed), M * fixed)


KINDS = [
    (magnitude, direction, clip)
    for magnitude, direction, clip in itertools.product(MAGNITUDES, DIRECTIONS, STE_CLIPS)
    if clip == "chain" or direction == "ste" or (direction == "xnor" and magnitude == "relu")  # which knows no clip
]


@pytest.mark.parametrize(("magnitude", "direction", "ste_clip"), KINDS)
def test_every_option_agrees_with_the_oracle(magnitude, direction, ste_clip):
    """Output and all gradients, autograd's and the hand-derived ones, with gradients large enough to be clipped."""
    torch.manual_seed(1)
    out, inn, r1, r2, s = 5, 7, 3, 2, 0.7
    leaves: list = [torch.randn(size, dtype=torch.float64) for size in ((r1, inn), (out, r1), (r2, inn), (out, r2))]
    options = {"magnitude": magnitude, "direction": direction}
    in_oracle = dict(options)
    if direction == "fixed":
        leaves[2:] = [None, None]
        options["fixed_sign"] = torch.randint(0, 2, (out, inn)) * 2 - 1
        in_oracle["fixed_sign"] = options["fixed_sign"].tolist()
    upstream = 2 * torch.randn(out, inn, dtype=torch.float64)
    lists = [None if f is None else f.tolist() for f in leaves]
    wanted = oracle.delta(*lists, s, **in_oracle)
    wanted_gradients = oracle.delta_gradients(upstream.tolist(), *lists, s, **in_oracle, ste_clip=ste_clip)
    wanted = [torch.tensor(w, dtype=torch.float64) for w in (wanted, *wanted_gradients) if w is not None]

    present = [f.requires_grad_() for f in leaves if f is not None]
    dW = dual_delta(*leaves, s, **options, ste_clip=ste_clip)
    autograd = [dW, *torch.autograd.grad(dW, present, upstream)]
    by_hand = [t for t in Update(*leaves, s, **options, ste_clip=ste_clip).backward(upstream) if t is not None]
    for found in (autograd, by_hand):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_residual_subtracts_the_update_of_the_initial_factors():
    """dW(t) - dW(0) is exactly zero at the start, and is the difference afterwards."""
    now = [f + 0.25 for f in factors(False)]
    assert torch.equal(dual_delta(A, B, C, D, S, initial=factors(False)), torch.zeros(2, 3))
    expected = dual_delta(*now, S) - dual_delta(A, B, C, D, S)
    assert torch.equal(dual_delta(*now, S, initial=factors(False)), expected)


def test_half_precision_factors_are_computed_in_float32():
    """BA = 257 - 256 is 1; in bf16 257 rounds to 256 and the entry would be 0."""
    A16 = torch.tensor([[1.0], [1.0]], dtype=torch.bfloat16)
    B16 = torch.tensor([[256.0, -255.0]], dtype=torch.bfloat16)
    C16, D16 = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    dW = dual_delta(A16, B16, C16, D16, 1.0)
    assert dW.dtype == torch.float32
    assert dW.item() == 1.0
    outside = dual_delta(A / 3, B / 7, C, D, 1 / 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = dual_delta(A / 3, B / 7, C, D, 1 / 3)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("name", "ABCD")
def test_nan_factors_show_in_the_update(name):
    """A broken row or column of a factor breaks every entry it enters; a sign must not hide it."""
    factors = {n: torch.randn(s) for n, s in zip("ABCD", ((3, 5), (4, 3), (2, 5), (4, 2)), strict=True)}
    factors[name][0, 0] = float("nan")
    wanted = torch.zeros(4, 5, dtype=torch.bool)
    wanted[(slice(None), 0) if name in "AC" else 0] = True
    assert torch.equal(dual_delta(**factors, scaling=S).isnan(), wanted)


def test_nan_gradients_stay_nan():
    """clamp keeps NaN; the paper's Eq. 8 read literally would turn it into 1 and hide a broken run."""
    broken = G.clone()
    broken[0, 0] = float("nan")
    for ste_clip in STE_CLIPS:
        assert Update(A, B, C, D, S, ste_clip=ste_clip).backward(broken)[3].isnan().any()


def test_scaling_and_rounding_once():
    assert dual_scaling(32, 16, 16) == 2
    assert dual_scaling(32, 2, 30) == pytest.approx(4.131182235954578)
    W = torch.tensor([[1.0]], dtype=torch.bfloat16)
    third = torch.tensor([[0.003]])  # 1.003 rounds down to 1, 1.006 up to 1.0078125
    assert add_update(W, third).item() == 1.0
    assert add_update(W, third, third).item() == 1.0078125


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "stee"}, "direction='stee' is unknown: choose one of ste, tanh, xnor"),
        ({"ste_clip": "eq12"}, "ste_clip='eq12'"),
        ({"magnitude": "relv"}, "magnitude='relv'"),
        ({"C": None}, r"'C': None.*expected A \[r1, in\], B \[out, r1\]"),
        ({"B": torch.ones(2, 3)}, r"'B': \(2, 3\)"),
        ({"D": torch.ones(3, 1)}, r"'D': \(3, 1\)"),
        ({"direction": "fixed"}, "'fixed_sign': None"),
    ],
)
def test_bad_arguments_name_what_does_not_fit(change, message):
    """A misspelt option must not become another method in silence, nor a wrong shape uninitialized memory."""
    arguments = {"A": A, "B": B, "C": C, "D": D, **change}
    options = {k: arguments.pop(k) for k in ("direction", "ste_clip", "magnitude") if k in arguments}
    with pytest.raises(ValueError, match=message):
        dual_delta(**arguments, scaling=1.0, **options)


@pytest.mark.parametrize("kind", [{"direction": "tanh"}, {"ste_clip": "window"}])
def test_a_row_of_zeros_points_nowhere_and_stays(kind):
    """Its rms is 0: finite values, and no gradient that another row would have to share."""
    torch.manual_seed(0)
    leaves = [torch.randn(size).requires_grad_() for size in ((2, 5), (4, 2), (3, 5), (4, 3))]
    with torch.no_grad():
        leaves[3][1] = 0
    dW = dual_delta(*leaves, 1.0, **kind)
    gradients = torch.autograd.grad(dW.square().sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[3][1].any()
    if "direction" in kind:
        assert not dW[1].any()
