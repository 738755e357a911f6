"""dual_linear's backends against the float64 oracle, and the promises of the lean one."""

from __future__ import annotations

import itertools
import warnings

import oracle
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from duallora import ops
from duallora.core.equation import DIRECTIONS, MAGNITUDES, STE_CLIPS, Update
from duallora.ops import FORMS, build_weight, dual_linear, recompute
from duallora.ops.autograd import How, _operator, flat, weight
from duallora.ops.reference import apply_weight

BACKENDS = ["reference", "recompute", "cpu"]  # triton has a file of its own
OUT, IN, R1, R2, N = 63, 100, 5, 3, 12


def make(dtype=torch.float32, out=OUT, inn=IN, n=N, fixed=False, fan_in_fan_out=False):
    """x, W, b, [A, B, C, D], fixed_sign: odd sizes, r1 != r2, in != out, leaves that require grad (W does not)."""
    torch.manual_seed(3)
    x = torch.randn(n, inn, dtype=dtype).requires_grad_()
    W = torch.randn(out, inn).to(dtype) / 10
    if fan_in_fan_out:
        W = W.T.contiguous()
    b = torch.randn(out, dtype=dtype).requires_grad_()
    factors: list = [torch.randn(s) / 2 for s in ((R1, inn), (out, R1), (R2, inn), (out, R2))]
    signs = None
    if fixed:
        factors[2:] = [None, None]
        signs = torch.randint(0, 2, (out, inn), dtype=torch.int8) * 2 - 1
    return x, W, b, [None if f is None else f.requires_grad_() for f in factors], signs


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    got = got.detach()
    want = want.detach().double()
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("magnitude", "direction", "ste_clip"),
    [(m, d, c) for m, d, c in itertools.product(MAGNITUDES, DIRECTIONS, STE_CLIPS) if m == "relu" or c == "chain"],
)
def test_agrees_with_the_oracle(backend, magnitude, direction, ste_clip, monkeypatch):
    """Relative error of y and of every gradient <= 2e-6 in float32, with row blocks that do not divide the rows."""
    monkeypatch.setattr(recompute, "BLOCK_ELEMENTS", 10 * 23)
    x, W, b, factors, signs = make(out=13, inn=23, fixed=direction == "fixed")
    dY = torch.randn(N, 13)
    options = {"magnitude": magnitude, "direction": direction, "ste_clip": ste_clip, "fixed_sign": signs}
    y = dual_linear(x, W, b, *factors, 0.3, **options, backend=backend)
    want_y, want = oracle.dual_linear(
        x.detach(), W, b.detach(), [f if f is None else f.detach() for f in factors], 0.3, dY, **options
    )
    leaves = [x, b, *(f for f in factors if f is not None)]
    got = torch.autograd.grad(y, leaves, dY)
    assert relative(y, want_y) <= 2e-6
    for g, w in zip(got, (w for w in want if w is not None), strict=True):
        assert relative(g, w) <= 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_base_with_float32_factors(backend):
    """W' rounds to bf16 once; the gradients stay within bf16's 2^-8, and factors keep float32 gradients."""
    x, W, b, factors, _ = make(torch.bfloat16)
    dY = torch.randn(N, OUT).bfloat16()
    y = dual_linear(x, W, b, *factors, 0.3, backend=backend)
    want_y, want = oracle.dual_linear(x.detach(), W, b.detach(), [f.detach() for f in factors], 0.3, dY)
    got = torch.autograd.grad(y, [x, b, *factors], dY)
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in got[2:]] == [torch.float32] * 4
    for g, w in zip([y, *got], [want_y, *want], strict=True):
        assert relative(g, w) <= 4e-3


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4, 3, IN), (1, IN), (IN,)])
def test_forward_has_the_bits_of_the_merged_weight(backend, dtype, fan_in_fan_out, shape):
    """Multiplying by build_weight's W' as the base layer would gives the very same bits, blocks or not."""
    _, W, b, factors, _ = make(dtype, fan_in_fan_out=fan_in_fan_out)
    x = torch.randn(shape).to(dtype)
    options = {"fan_in_fan_out": fan_in_fan_out, "backend": backend}
    y = dual_linear(x, W, b, *factors, 0.3, **options)
    merged = build_weight(W, *factors, 0.3, **options)
    assert merged.dtype == dtype
    assert merged.shape == W.shape
    assert not torch.equal(merged, W)
    assert torch.equal(y, apply_weight(x, merged, b, fan_in_fan_out))


@pytest.mark.parametrize("backend", BACKENDS)
def test_trainable_base_weight_gets_its_gradient(backend):
    x, W, b, factors, _ = make()
    W.requires_grad_()
    (dW,) = torch.autograd.grad(dual_linear(x, W, b, *factors, 0.3, backend=backend).square().sum() / 2, [W])
    y = dual_linear(x, W, b, *factors, 0.3, backend=backend)
    torch.testing.assert_close(dW, y.T @ x, rtol=1e-4, atol=1e-4)


def test_residual_start_is_exact_in_both_backends():
    """With the factors at their start, dW(t) - dW(0) is zero to the bit, so y is the base layer's."""
    x, W, b, factors, _ = make()
    initial = [f.detach().clone() for f in factors]
    for backend in BACKENDS:
        y = dual_linear(x, W, b, *factors, 0.3, initial=initial, backend=backend)
        assert torch.equal(y, apply_weight(x, W, b, False))
        moved = dual_linear(x, W, b, *(f * 1.5 for f in factors), 0.3, initial=initial, backend=backend)
        want, gradients = oracle.dual_linear(
            x.detach(), W, b.detach(), [f.detach() * 1.5 for f in factors], 0.3, torch.ones(N, OUT), initial=initial
        )
        assert relative(moved, want) <= 2e-6
        dx, *got = torch.autograd.grad(moved, [x, *factors], torch.ones(N, OUT))
        assert relative(dx, gradients[0]) <= 2e-6
        for g, w in zip(got, gradients[2:], strict=True):
            assert relative(g, 1.5 * w) <= 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("ste_clip", STE_CLIPS)
@pytest.mark.parametrize("residual", [False, True])
def test_dora_agrees_with_the_oracle(backend, fan_in_fan_out, ste_clip, residual):
    """W' = m (W0 + dW) / |W0 + dW| by output row, the norm constant in the backward; gradients of x, b, factors and m."""
    x, W, b, factors, _ = make()
    m = (torch.rand(OUT) + 0.5).requires_grad_()
    dY = torch.randn(N, OUT) * 3  # large enough for the clip to act
    initial = [f.detach() * 0.7 for f in factors] if residual else []
    stored = W.T.contiguous() if fan_in_fan_out else W
    y = dual_linear(
        x, stored, b, *factors, 0.3, m=m, initial=initial, ste_clip=ste_clip, fan_in_fan_out=fan_in_fan_out, backend=backend
    )  # fmt: skip
    plain = [f.detach() for f in factors]
    want_y, want = oracle.dual_linear(
        x.detach(), W, b.detach(), plain, 0.3, dY, m=m.detach(), initial=initial, ste_clip=ste_clip
    )
    got = torch.autograd.grad(y, [x, b, *factors, m], dY)
    for g, w in zip([y, *got], [want_y, *want], strict=True):
        assert relative(g, w) <= 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_the_three_forms_are_one_function(backend, fan_in_fan_out, dora):
    """added = merged, and delta = merged minus the base product, in y and in every gradient."""
    x, W, b, factors, _ = make(fan_in_fan_out=fan_in_fan_out)
    m = (torch.rand(OUT) + 0.5).requires_grad_() if dora else None
    leaves = [x, *factors] + ([m] if m is not None else [])
    dY = torch.randn(N, OUT)

    def run(form):
        y = dual_linear(x, W, b, *factors, 0.3, m=m, form=form, fan_in_fan_out=fan_in_fan_out, backend=backend)
        if form == "delta":
            y = y + apply_weight(x, W, b, fan_in_fan_out)
        return [y, *torch.autograd.grad(y, leaves, dY)]

    merged = run("merged")
    for form in ("added", "delta"):
        for g, w in zip(run(form), merged, strict=True):
            assert relative(g, w) <= 2e-6


def test_added_keeps_what_bf16_rounds_away():
    """An update far below half an ulp of W0 leaves the merged bf16 weight as it was, and acts in the added form."""
    x, _, _, factors, _ = make(torch.bfloat16)
    W = torch.ones(OUT, IN).bfloat16()
    small = [f.detach() * 0.05 for f in factors]
    assert torch.equal(build_weight(W, *small, 0.3), W)
    delta = dual_linear(x, None, None, *small, 0.3)
    want, _ = oracle.dual_linear(x.detach(), torch.zeros(OUT, IN), None, small, 0.3, torch.zeros(N, OUT))
    assert relative(delta, want) <= 1e-2
    x = x.detach()[:, :1] * torch.tensor([1.0, -1.0] * (IN // 2))  # W's own product is exactly zero
    x = x.bfloat16()
    added = dual_linear(x, W, None, *small, 0.3, form="added")
    want, _ = oracle.dual_linear(x, torch.zeros(OUT, IN), None, small, 0.3, torch.zeros(N, OUT))
    assert relative(added, want) <= 1e-2


def saved_shapes(backend: str) -> list[torch.Size]:
    shapes: list[torch.Size] = []
    x, W, b, factors, _ = make()

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() != W.data_ptr():
            shapes.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dual_linear(x, W, b, *factors, 0.3, backend=backend)
    return shapes


def test_kernel_backends_save_no_weight_sized_tensor():
    """x, the factors and scalars only; plain autograd keeps several [out, in] tensors (so the count can fail)."""
    for backend in ("recompute", "cpu"):
        lean = saved_shapes(backend)
        assert (OUT, IN) not in lean
        assert (IN, OUT) not in lean
        assert sum(s.numel() for s in lean) <= N * IN + (R1 + R2) * (OUT + IN) + 1
    assert saved_shapes("reference").count((OUT, IN)) >= 3


def test_registered_operator_passes_opcheck():
    x, W, b, factors, _ = make()
    m = (torch.rand(OUT) + 0.5).requires_grad_()
    update = Update(*factors, torch.tensor(0.3))
    for backend in ("recompute", "cpu"):
        for how in (How(form, backend=backend) for form in FORMS):
            for dora in (None, m):
                arguments = (x, W, b, dora, *flat(update, how))
                torch.library.opcheck(torch.ops.duallora.dual_linear.default, arguments)
    x, W, m, *factors = (t.detach() for t in (x, W, m, *factors))
    fields = flat(Update(*factors, 0.3), How("merged", False, "cpu"))
    backward = (torch.randn(N, OUT), x, W, m, m + 0.1, *fields, True, False, True)
    torch.library.opcheck(torch.ops.duallora.dual_linear_backward.default, backward)
    crosswise = torch.randn(2, IN, 5).transpose(1, 2)  # strides the result does not have
    torch.library.opcheck(
        torch.ops.duallora.dual_linear_backward.default, (torch.randn(2, 5, OUT), crosswise, *backward[2:])
    )


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
    x, W, b, factors, _ = make()
    (first,) = torch.autograd.grad(dual_linear(x, W, b, *factors, 0.3, form=form).sum(), x, create_graph=True)
    found = torch.autograd.grad(first.square().sum(), factors)
    dY = torch.ones(x.numel() // x.shape[-1], W.shape[0], dtype=torch.float64)
    G = 2 * dY.T @ first.detach().double().reshape(-1, x.shape[-1])
    wanted = oracle.delta_gradients(G.tolist(), *(f.detach().double().tolist() for f in factors), 0.3)
    for gradient, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), torch.tensor(want).double(), rtol=1e-4, atol=1e-4)


def test_the_weights_own_gradient_can_be_differentiated():
    _, W, _, factors, _ = make()
    A, B, C, D = (f.detach().double().requires_grad_() for f in factors)
    W = W.detach().double()

    def penalty(B):
        y = weight(W, None, Update(A, B, C, D, 0.3), How(), torch.float64).sum()
        return torch.autograd.grad(y, A, create_graph=True)[0].square().sum()

    (found,) = torch.autograd.grad(penalty(B), B)
    direction, step = torch.randn_like(B), 1e-7
    numeric = (penalty(B + step * direction) - penalty(B - step * direction)) / (2 * step)
    torch.testing.assert_close((found * direction).sum(), numeric.detach(), rtol=1e-5, atol=1e-6)


def test_a_sampled_gradient_has_no_derivative():
    x, W, b, factors, _ = make()
    y = dual_linear(x, W, b, *factors, 0.3, gradient_tokens=0.5)
    with pytest.raises(NotImplementedError, match="gradient_tokens < 1"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_function_transforms_see_plain_autograd():
    """torch.func.grad gives what backward gives; vmap over rows gives each row's own, clipped row by row."""
    x, W, _, factors, _ = make()
    x, W = x.detach(), W.detach()

    def loss(factors, x):
        return dual_linear(x, W, None, *factors, 0.3, ste_clip="none").square().sum()

    loss(factors, x).backward()
    for found, f in zip(torch.func.grad(loss)(tuple(f.detach() for f in factors), x), factors, strict=True):
        torch.testing.assert_close(found, f.grad, rtol=1e-4, atol=1e-4)
    rows = torch.func.vmap(torch.func.grad(loss), (None, 0))(tuple(f.detach() for f in factors), x)
    for found, f in zip(rows, factors, strict=True):
        torch.testing.assert_close(found.sum(0), f.grad, rtol=1e-4, atol=1e-4)


def test_a_weight_without_a_base_compiles():
    """The operator's first input is None then."""
    _, W, _, factors, _ = make()
    torch._dynamo.reset()

    def delta(*factors):
        return weight(W, None, Update(*factors, 0.3), How("delta"), W.dtype)

    got, want = torch.compile(delta, fullgraph=True, backend="aot_eager")(*factors), delta(*factors)
    assert torch.equal(got, want)
    for g, w in zip(*(torch.autograd.grad(t.sum(), factors) for t in (got, want)), strict=True):
        assert torch.equal(g, w)


def test_the_weight_has_a_shape_without_values():
    factors = [torch.empty(shape, device="meta") for shape in ((3, 7), (5, 3), (2, 7), (5, 2))]
    assert weight(None, None, Update(*factors, 0.3), How(), torch.float32).shape == (5, 7)


def test_compiles_in_one_graph_and_does_not_recompile_when_the_gate_moves():
    """The gate is a tensor: a second value of it must reuse the graph, and the result must follow it."""
    x, W, b, factors, _ = make()
    torch._dynamo.reset()

    def layer(x, gate):
        return dual_linear(x, W, b, *factors, 2.0 * gate).square().sum()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step in (0.0, 0.3):
        gate = torch.tensor(step)
        with torch._dynamo.config.patch(error_on_recompile=True):
            loss = compiled(x, gate)
        want = layer(x, gate)
        assert torch.equal(loss, want)
        for g, w in zip(
            torch.autograd.grad(loss, [x, *factors]), torch.autograd.grad(want, [x, *factors]), strict=True
        ):
            torch.testing.assert_close(g, w)


def test_inductor_takes_input_of_any_strides():
    """A convolution's output, transposed, is not contiguous; the fake kernel must not promise its strides."""
    _, W, b, factors, _ = make()
    x0 = torch.randn(2, IN, 5, requires_grad=True)
    torch._dynamo.reset()

    def layer(x0):
        return dual_linear(torch.tanh(x0).transpose(1, 2), W, b, *factors, 0.3).square().sum()

    got = torch.autograd.grad(torch.compile(layer, fullgraph=True)(x0), [x0, *factors])
    for g, w in zip(got, torch.autograd.grad(layer(x0), [x0, *factors]), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_the_product_and_nothing_inside(backend):
    """y is bf16 as F.linear's would be, but BA and DC are computed in float32: signs must not flip."""
    x, W, b, factors, _ = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dual_linear(x, W, b, *factors, 0.3, backend=backend)
        merged = build_weight(W, *factors, 0.3, backend=backend)
        assert torch.equal(y, torch.nn.functional.linear(x, merged, b))
    assert y.dtype == torch.bfloat16
    assert merged.dtype == torch.float32
    assert torch.equal(merged, build_weight(W, *factors, 0.3, backend=backend))
    gradients = torch.autograd.grad(y.float().sum(), [x, b, *factors])
    assert all(g.dtype == torch.float32 for g in gradients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference = dual_linear(x, W, b, *factors, 0.3, backend="reference")
    for g, w in zip(gradients, torch.autograd.grad(reference.float().sum(), [x, b, *factors]), strict=True):
        assert relative(g, w) <= 1e-2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_gradient(use_reentrant):
    x, W, b, factors, _ = make()
    plain = torch.autograd.grad(dual_linear(x, W, b, *factors, 0.3).square().sum(), factors)
    loss = checkpoint(lambda t: dual_linear(t, W, b, *factors, 0.3), x, use_reentrant=use_reentrant).square().sum()
    loss.backward()
    assert all(torch.equal(f.grad, g) for f, g in zip(factors, plain, strict=True))


def test_bad_requests_name_the_remedy():
    x, W, b, factors, _ = make()
    with pytest.raises(ValueError, match=r"'cuda9'.*choose one of auto, reference, recompute, cpu, triton"):
        dual_linear(x, W, b, *factors, 0.3, backend="cuda9")
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16 but the base weight is torch\.float32: cast x"):
        dual_linear(x.bfloat16(), W, b, *factors, 0.3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_of_another_shape_is_refused(backend):
    """Sized from W and filled from B, W' would keep uninitialized rows."""
    x, W, b, factors, _ = make()
    with pytest.raises(ValueError, match=r"W is \(64, 100\), but A \(5, 100\) and B \(63, 5\) make \(63, 100\)"):
        dual_linear(x, torch.zeros(64, IN), b, *factors, 0.3, backend=backend)
    with pytest.raises(ValueError, match=r"W is \(63, 100\)"):
        build_weight(W, *factors, 0.3, backend=backend, fan_in_fan_out=True)


def test_float16_training_warns_once_that_the_clip_saturates():
    x, W, b, factors, _ = make(torch.float16)
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


def test_inference_mode():
    x, W, b, factors, _ = make()
    with torch.inference_mode():
        y = dual_linear(x, W, b, *factors, 0.3)
    assert torch.equal(y, dual_linear(x, W, b, *factors, 0.3))
