"""dual_linear's backends against the float64 oracle, and the promises of the lean one."""

from __future__ import annotations

import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

from duallora import ops
from duallora.core.equation import DIRECTIONS, MAGNITUDES, STE_CLIPS, Update
from duallora.ops import FORMS, build_weight, dual_linear, recompute
from duallora.ops.autograd import How, _operator, flat, weight
from duallora.ops.reference import apply_weight

BACKENDS = ["reference", "recompute", "cpu"]  # triton has a file of its own
OUT, IN, R1, R2, N = 63, 100, 5, 3, 12


def make(dtype=torch.float32, out=OUT, inn=IN):
    """x, W, b, [A, B, C, D]: odd sizes, r1 != r2, in != out, leaves that require grad (W does not)."""
    torch.manual_seed(3)
    x = torch.randn(N, inn, dtype=dtype).requires_grad_()
    W = torch.randn(out, inn).to(dtype) / 10
    b = torch.randn(out, dtype=dtype).requires_grad_()
    factors = [torch.randn(s) / 2 for s in ((R1, inn), (out, R1), (R2, inn), (out, R2))]
    return x, W, b, [f.requires_grad_() for f in factors]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    want = want.detach().double()
    return float((got.detach().double() - want).norm() / want.norm().clamp(min=1e-30))


CASES = [
    *({"magnitude": magnitude} for magnitude in MAGNITUDES),
    *({"direction": direction} for direction in DIRECTIONS),
    *({"ste_clip": clip} for clip in STE_CLIPS),
    {"direction": "fixed", "magnitude": "sigmoid"},
    {"direction": "xnor", "ste_clip": "update"},  # which clips signs alone
    {"fan_in_fan_out": True},
    {"residual": True, "fan_in_fan_out": True},
    *({"dora": True, "fan_in_fan_out": layout, "ste_clip": clip} for layout in (False, True) for clip in STE_CLIPS),
    *({"dora": True, "residual": True, "form": form, "fan_in_fan_out": form == "added"} for form in FORMS),
    *({"form": form, "fan_in_fan_out": layout} for form in ("added", "delta") for layout in (False, True)),
    {"dtype": torch.bfloat16},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_oracle(backend, case, monkeypatch):
    """y and every gradient, with row blocks that do not divide the rows; a base weight may be trained too.

    DoRA: W' = m (W0 + dW) / |W0 + dW| by output row, the norm a constant of the backward. The form "added" is the same
    function, "delta" is it less the base's product. In bfloat16 W' rounds once, and factors keep float32 gradients.
    """
    monkeypatch.setattr(recompute, "BLOCK_ELEMENTS", 10 * 23)
    options = {k: v for k, v in case.items() if k in ("magnitude", "direction", "ste_clip")}
    dtype, form, fan_in_fan_out = case.get("dtype", torch.float32), case.get("form"), case.get("fan_in_fan_out", False)
    x, W, b, factors = make(dtype, 13, 23)
    m = (torch.rand(13) + 0.5).requires_grad_() if "dora" in case else None
    if case.get("direction") == "fixed":
        factors[2:] = [None, None]
        options["fixed_sign"] = torch.randint(0, 2, (13, 23), dtype=torch.int8) * 2 - 1
    plain = [f if f is None else f.detach() for f in factors]
    initial = [f * 0.7 for f in plain] if "residual" in case else []
    dY = 3 * torch.randn(N, 13).to(dtype)  # large enough for the clip to act
    want_y, want = oracle.dual_linear(x.detach(), W, b.detach(), plain, 0.3, dY, m=m, initial=initial, **options)

    W = (W.T.contiguous() if fan_in_fan_out else W).requires_grad_(m is None and form is None)
    layer = {"m": m, "initial": initial, "fan_in_fan_out": fan_in_fan_out, "form": form or "merged"}
    y = dual_linear(x, W, b, *factors, 0.3, **layer, **options, backend=backend)
    assert y.dtype == dtype
    if form == "delta":
        y = y + apply_weight(x, W, b, fan_in_fan_out)
    leaves, wanted = [x, b, *factors, m], [want_y, *want]
    if W.requires_grad:
        dW = dY.double().T @ x.detach().double()
        leaves, wanted = [*leaves, W], [*wanted, dW.T if fan_in_fan_out else dW]
    leaves, wanted = ([t for t in tensors if t is not None] for tensors in (leaves, wanted))
    gradients = grad(y, leaves, dY)
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]
    for g, w in zip([y, *gradients], wanted, strict=True):
        assert relative(g, w) <= (4e-3 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_has_the_bits_of_the_merged_weight(backend, dtype, fan_in_fan_out):
    """Multiplying by build_weight's W' as the base layer would gives the very same bits, blocks or not."""
    _, W, b, factors = make(dtype)
    W = W.T.contiguous() if fan_in_fan_out else W
    options = {"fan_in_fan_out": fan_in_fan_out, "backend": backend}
    merged = build_weight(W, *factors, 0.3, **options)
    assert (merged.dtype, merged.shape) == (dtype, W.shape)
    assert not torch.equal(merged, W)
    for shape in ((4, 3, IN), (1, IN), (IN,)):
        x = torch.randn(shape).to(dtype)
        y = dual_linear(x, W, b, *factors, 0.3, **options)
        assert torch.equal(y, apply_weight(x, merged, b, fan_in_fan_out))
        with torch.inference_mode():
            assert torch.equal(y, dual_linear(x, W, b, *factors, 0.3, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_start_is_exact(backend):
    """With the factors at their start, dW(t) - dW(0) is zero to the bit, so y is the base layer's."""
    x, W, b, factors = make()
    initial = [f.detach().clone() for f in factors]
    assert torch.equal(dual_linear(x, W, b, *factors, 0.3, initial=initial, backend=backend), F.linear(x, W, b))


def test_added_keeps_what_bf16_rounds_away():
    """An update far below half an ulp of W0 leaves the merged bf16 weight as it was, and acts in the added form."""
    x, _, _, factors = make(torch.bfloat16)
    W = torch.ones(OUT, IN).bfloat16()
    small = [f.detach() * 0.05 for f in factors]
    assert torch.equal(build_weight(W, *small, 0.3), W)
    for form in ("delta", "added"):
        if form == "added":  # of an input with which W's own product is exactly zero
            x = x[:, :1] * torch.tensor([1.0, -1.0] * (IN // 2)).bfloat16()
        found = dual_linear(x, W, None, *small, 0.3, form=form)
        want, _ = oracle.dual_linear(x.detach(), 0 * W, None, small, 0.3, torch.zeros(N, OUT))
        assert relative(found, want) <= 1e-2


def test_kernel_backends_save_no_weight_sized_tensor():
    """x, the factors and scalars only; plain autograd keeps several [out, in] tensors (so the count can fail)."""
    x, W, b, factors = make()
    for backend in BACKENDS:
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            dual_linear(x, W, b, *factors, 0.3, backend=backend)
        kept = [t for t in saved if t.data_ptr() != W.data_ptr()]
        if backend == "reference":
            assert [t.shape for t in kept].count((OUT, IN)) >= 3
        else:
            assert sum(t.numel() for t in kept) == sum(t.numel() for t in (x, *factors)) < OUT * IN


def test_registered_operator_passes_opcheck():
    """Also of an input that is not contiguous, as a convolution's output, transposed: none promises its strides."""
    x, W, b, factors = make()
    m = (torch.rand(OUT) + 0.5).requires_grad_()
    crosswise = torch.randn(2, IN, 5).transpose(1, 2)
    update = Update(*factors, torch.tensor(0.3))
    for backend, form, dora, rows in (
        ("recompute", "merged", m, x),
        ("cpu", "added", None, crosswise),
        ("cpu", "delta", m, x),
    ):
        arguments = (rows, W, b, dora, *flat(update, How(form, backend=backend)))
        torch.library.opcheck(torch.ops.duallora.dual_linear.default, arguments)
    W, m, *factors = (t.detach() for t in (W, m, *factors))
    fields = flat(Update(*factors, 0.3), How("merged", False, "cpu"))
    backward = (torch.randn(2, 5, OUT), crosswise, W, m, m + 0.1, *fields, True, False, True)
    torch.library.opcheck(torch.ops.duallora.dual_linear_backward.default, backward)


def test_no_output_of_an_operator_shares_memory_with_another_or_an_input():
    """A backend may return views of one buffer, or its input; an operator may not, and has no None to return."""

    def body(x: torch.Tensor):
        halves = torch.stack([x, -x])
        return halves[0], halves[1], x, None

    operator = _operator("views_of_a_test(Tensor x) -> (Tensor, Tensor, Tensor, Tensor)", body)
    x = torch.arange(3.0)
    *found, nothing = operator(x)
    assert [t.tolist() for t in found] == [[0, 1, 2], [0, -1, -2], [0, 1, 2]]
    assert nothing.numel() == 0
    assert len({t.untyped_storage().data_ptr() for t in (x, *found)}) == 4


@pytest.mark.parametrize("form", ["merged", "added"])
def test_a_penalty_on_the_gradient_has_the_oracles_gradient(form):
    """f = |dL/dx|^2 with L = sum y, so df/dW' = 2 dY^T dY W', which goes on to the factors as any gradient of W' does."""
    x, W, b, factors = make()
    (first,) = grad(dual_linear(x, W, b, *factors, 0.3, form=form).sum(), x, create_graph=True)
    found = grad(first.square().sum(), factors)
    dY = torch.ones(N, OUT, dtype=torch.float64)
    G = 2 * dY.T @ first.detach().double()
    wanted = oracle.delta_gradients(G.tolist(), *(f.detach().double().tolist() for f in factors), 0.3)
    for gradient, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), torch.tensor(want).double(), rtol=1e-4, atol=1e-4)
    sampled = dual_linear(x, W, b, *factors, 0.3, form=form, gradient_tokens=0.5)
    with pytest.raises(NotImplementedError, match="gradient_tokens < 1"):
        grad(sampled.sum(), x, create_graph=True)


def test_the_weights_own_gradient_can_be_differentiated():
    _, W, _, factors = make()
    W, A, B, C, D = (t.detach().double() for t in (W, *factors))

    def merged(A, B):
        return weight(W, None, Update(A, B, C, D, 0.3), How(), torch.float64)

    assert torch.autograd.gradgradcheck(merged, (A.requires_grad_(), B.requires_grad_()), fast_mode=True)


def test_function_transforms_see_plain_autograd():
    """torch.func.grad gives what backward gives; vmap over rows gives each row's own, clipped row by row."""
    x, W, _, factors = make()
    x = x.detach()

    def loss(factors, x):
        return dual_linear(x, W, None, *factors, 0.3, ste_clip="none").square().sum()

    wanted, plain = grad(loss(factors, x), factors), tuple(f.detach() for f in factors)
    rows = torch.func.vmap(torch.func.grad(loss), (None, 0))(plain, x)
    for found in (torch.func.grad(loss)(plain, x), [row.sum(0) for row in rows]):
        torch.testing.assert_close(tuple(found), wanted, rtol=1e-4, atol=1e-4)


def test_compiles_in_one_graph_and_does_not_recompile_when_the_gate_moves():
    """The gate is a tensor: a second value of it must reuse the graph, and the result must follow it.

    So it is where the operator's first input, the base weight, is None.
    """
    x, W, b, factors = make()
    leaves = [x, *factors]

    def layer(x, gate):
        delta = weight(W, None, Update(*factors, 2.0 * gate), How("delta"), W.dtype)
        return dual_linear(x, W, b, *factors, 2.0 * gate).square().sum() + delta.sum()

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for gate in torch.tensor([0.0, 0.3]):
        with torch._dynamo.config.patch(error_on_recompile=True):
            loss = compiled(x, gate)
        want = layer(x, gate)
        assert torch.equal(loss, want)
        torch.testing.assert_close(grad(loss, leaves), grad(want, leaves))


def test_the_weight_has_a_shape_without_values():
    factors = [torch.empty(shape, device="meta") for shape in ((3, 7), (5, 3), (2, 7), (5, 2))]
    assert weight(None, None, Update(*factors, 0.3), How(), torch.float32).shape == (5, 7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_the_product_and_nothing_inside(backend):
    """y is bf16 as F.linear's would be, but BA and DC are computed in float32: signs must not flip."""
    x, W, b, factors = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dual_linear(x, W, b, *factors, 0.3, backend=backend)
        merged = build_weight(W, *factors, 0.3, backend=backend)
        assert torch.equal(y, F.linear(x, merged, b))
        reference = dual_linear(x, W, b, *factors, 0.3, backend="reference")
    assert y.dtype == torch.bfloat16
    assert merged.dtype == torch.float32
    assert torch.equal(merged, build_weight(W, *factors, 0.3, backend=backend))
    gradients, wanted = (grad(t.float().sum(), [x, b, *factors]) for t in (y, reference))
    for g, w in zip(gradients, wanted, strict=True):
        assert g.dtype == torch.float32
        assert relative(g, w) <= 1e-2


def test_bad_requests_name_the_remedy():
    """A W of another shape too: sized from W and filled from B, W' would keep uninitialized rows."""
    x, W, b, factors = make()
    for message, arguments in (
        (r"'cuda9'.*choose one of auto, reference, recompute, cpu, triton", {"backend": "cuda9"}),
        (r"x is torch\.bfloat16 but the base weight is torch\.float32: cast x", {"x": x.bfloat16()}),
        (r"W is \(64, 100\), but A \(5, 100\) and B \(63, 5\) make \(63, 100\)", {"W": torch.zeros(64, IN)}),
        (r"W is \(63, 100\), but .* make \(100, 63\)", {"fan_in_fan_out": True}),
        (r"gradient_tokens=0: expected a share of the tokens in \(0, 1\]", {"gradient_tokens": 0}),
    ):
        arguments = {"x": x, "W": W, "b": b, **arguments}
        with pytest.raises(ValueError, match=message):
            dual_linear(arguments.pop("x"), arguments.pop("W"), arguments.pop("b"), *factors, 0.3, **arguments)
    with pytest.raises(ValueError, match=r"W is \(63, 100\)"):
        build_weight(W, *factors, 0.3, fan_in_fan_out=True)


def test_float16_training_warns_once_that_the_clip_saturates():
    x, W, b, factors = make(torch.float16)
    ops.autograd._warn_of_float16.cache_clear()
    with pytest.warns(UserWarning, match="Use bfloat16, or ste_clip='none'"):
        dual_linear(x, W, b, *factors, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dual_linear(x, W, b, *factors, 0.3)
        ops.autograd._warn_of_float16.cache_clear()
        dual_linear(x, W, b, *factors, 0.3, ste_clip="none")
        with torch.no_grad():
            dual_linear(x, W, b, *factors, 0.3)
