"""The one autograd path over the kernel backends: saves x and the factors, and never keeps an [out, in] tensor.

    forward    W' = W0 + dW                y = x W'^T + b
    backward   dx = dY W'                  db = sum_t dY_t
               G  = dY^T x   [out, in]     dA, dB, dC, dD (and dm) from G, by the backend

Registered with torch.library as opaque operators, so ``torch.compile(fullgraph=True)`` takes them as they are. Eager
mode runs the same functions as a ``torch.autograd.Function``: the machinery around an operator costs the host 0.3 ms a
layer (LOG.md), as long as a GPU takes for its products. A gradient that is to be differentiated is the plain form's.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from duallora.core.equation import Update
from duallora.ops import reference
from duallora.ops.backends import pick
from duallora.ops.reference import apply_weight
from duallora.ops.tokens import nonzero_rows, sample, token_weights


def _weight_dtype(x: Tensor, W: Tensor | None) -> torch.dtype:
    """What decides which backend can serve: float64 anywhere needs the torch operators."""
    return x.dtype if W is None else torch.promote_types(x.dtype, W.dtype)


def _operator(name: str, body: Callable, returns: type) -> Any:
    """The opaque operator of a function: empty where that returns None, memory of its own for each output."""

    def run(*inputs: Any) -> Any:
        found = []
        taken = {t.untyped_storage()._cdata for t in inputs if isinstance(t, Tensor)}
        for tensor in body(*inputs):
            if tensor is None:
                tensor = next(t for t in inputs if isinstance(t, Tensor)).new_empty(0)
            elif tensor.untyped_storage()._cdata in taken:
                tensor = tensor.clone()
            taken.add(tensor.untyped_storage()._cdata)
            found.append(tensor)
        return found if returns == list[Tensor] else tuple(found)

    run.__signature__ = inspect.signature(body).replace(return_annotation=returns)  # type: ignore[attr-defined]
    return torch.library.custom_op(f"duallora::{name}", run, mutates_args=())


def _no_autocast(device: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _eager(name: str, forward: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """``apply`` of a Function made of what an operator is registered with."""

    def run(ctx: Any, *inputs: Any) -> Any:  # the form with ctx: the other one binds a signature at every call
        y, norm = forward(*inputs)
        if y._is_view():  # of what a product made inside, seen by nobody else: the model may write into y all the same
            y = y.new_empty(0).set_(y)  # the same memory
        setup_context(ctx, inputs, (y, norm))
        return y, norm

    def gradients(ctx: Any, *outputs: Any) -> Any:
        # An operator's list of tensors has a list of gradients; to a Function it is one argument without any.
        return tuple(None if isinstance(g, list) else g for g in backward(ctx, *outputs))

    methods = {"forward": staticmethod(run), "backward": staticmethod(gradients)}
    return type(name, (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]


def _traced(x: Tensor) -> bool:
    """Whether someone records what happens and should see one operator: a compiler, or a tensor without values."""
    return torch.compiler.is_compiling() or x.is_meta or torch.jit.is_tracing() or type(x) not in (Tensor, nn.Parameter)


def _to_be_differentiated(dY: Tensor) -> bool:
    """Whether a gradient is asked for that can itself be differentiated (create_graph), as for a gradient penalty."""
    return torch.is_grad_enabled() and not _traced(dY)


def _differentiable_gradients(
    y: Callable[[], Tensor], tensors: Sequence[Any], needed: Sequence[bool], dY: Tensor
) -> list:
    """Those of the plain form ``y()`` for the tensors that need one, by autograd, which can go on from there."""
    with torch.enable_grad(), _no_autocast(dY.device.type):
        wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y(), wanted, dY, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]


def _forward(
    x: Tensor,
    W: Tensor | None,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    m: Tensor | None,
    scaling: Tensor,
    fixed_sign: Tensor | None,
    initial: Sequence[Tensor],
    seed: Tensor | None,
    gradient_tokens: Tensor | None,
    magnitude: str,
    direction: str,
    ste_clip: str,
    fan_in_fan_out: bool,
    form: str,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """(y, norm); norm [out] with m, else None."""
    update = Update(A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial)
    with _no_autocast(x.device.type):  # eager mode runs this body under the caller's autocast
        build = pick(backend, update, _weight_dtype(x, W)).build_weight
        b = None if b is None else b.to(x.dtype)
        if form == "merged":
            weight, norm = build(W, update, fan_in_fan_out=fan_in_fan_out, dtype=x.dtype, m=m)
            y = apply_weight(x, weight, b, fan_in_fan_out)
        else:
            base = None if m is None else W
            delta, norm = build(base, update, fan_in_fan_out=fan_in_fan_out, dtype=x.dtype, m=m, minus_base=True)
            if form == "added" and W is not None:
                y = apply_weight(x, W.to(x.dtype), b, fan_in_fan_out)
                y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), delta if fan_in_fan_out else delta.T)
            else:
                y = apply_weight(x, delta, None, fan_in_fan_out)
    return y, norm


_forward_op = _operator("dual_linear", _forward, tuple[Tensor, Tensor])


@_forward_op.register_fake
def _(x, W, b, A, B, C, D, m, *_options):
    norm = x.new_empty(0) if m is None else m.new_empty(m.shape, dtype=torch.promote_types(A.dtype, torch.float32))
    return x.new_empty(*x.shape[:-1], B.shape[0]), norm


def _backward(
    dY: Tensor,
    x: Tensor,
    W: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    m: Tensor | None,
    norm: Tensor | None,
    scaling: Tensor,
    fixed_sign: Tensor | None,
    initial: Sequence[Tensor],
    seed: Tensor | None,
    gradient_tokens: Tensor | None,
    magnitude: str,
    direction: str,
    ste_clip: str,
    fan_in_fan_out: bool,
    form: str,
    backend: str,
    need_dx: bool,
    need_dW: bool,
    need_factors: bool,
) -> list[Tensor | None]:
    """[dx, dW, dA, dB, dC, dD, dm]; what is not needed, or does not exist, is None."""
    result: list[Tensor | None] = [None] * 7
    update = Update(A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial)
    with _no_autocast(x.device.type):
        kernel = pick(backend, update, _weight_dtype(x, W))
        dY2, x2 = dY.reshape(-1, dY.shape[-1]), x.reshape(-1, x.shape[-1])
        tokens = len(dY2)
        keep = nonzero_rows(dY2)
        if keep is not None:
            dY2, x2 = dY2[keep], x2[keep]
        # The weight for dx: in the added form the rounded sum serves, as its error does not accumulate over steps.
        options = {"fan_in_fan_out": fan_in_fan_out, "dtype": x.dtype, "m": m, "minus_base": form == "delta"}
        weight = None
        if need_dW or need_factors:
            G = _weight_gradient(dY2, x2, fan_in_fan_out, tokens, seed, gradient_tokens)
            if need_dW and W is not None:
                result[1] = _base_gradient(G, m, norm, W, form, fan_in_fan_out)
            if need_factors:
                given = {} if m is None else {"norm": norm}
                weight, *gradients = kernel.weight_and_gradients(G, W, update, **options, **given)
                result[2:7] = _cast(gradients, (A, B, C, D, m))
        if need_dx:
            if weight is None:
                weight, _ = kernel.build_weight(W, update, **options)
            by_rows = weight.T if fan_in_fan_out else weight
            if keep is None:
                result[0] = (dY2 @ by_rows).view(x.shape)
            else:
                result[0] = x.new_zeros(tokens, x.shape[-1]).index_copy_(0, keep, dY2 @ by_rows).view(x.shape)
    return result


def _cast(gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Contiguous, in the dtype of what they are gradients of."""
    return [None if f is None else g.to(f.dtype).contiguous() for g, f in zip(gradients, inputs, strict=True)]


def _weight_gradient(
    dY: Tensor,
    x: Tensor,
    fan_in_fan_out: bool,
    tokens: int,
    seed: Tensor | None,
    gradient_tokens: Tensor | None,
) -> Tensor:
    """dL/dW' in the layout of W from ``gradient_tokens`` of the ``tokens``.

    Some of the tokens may be gone as zeros; the share counts from all of them.
    """
    wanted = tokens if gradient_tokens is None else max(1, math.ceil(float(gradient_tokens) * tokens))
    if seed is not None and wanted < len(dY):
        chosen, weight = sample(token_weights(x, dY), wanted, int(seed))
        dY, x = (dY[chosen] * weight[:, None]).to(dY.dtype), x[chosen]
    return x.T @ dY if fan_in_fan_out else dY.T @ x


def _base_gradient(
    G: Tensor, m: Tensor | None, norm: Tensor | None, W: Tensor, form: str, fan_in_fan_out: bool
) -> Tensor:
    """dL/dW0, for whoever trains the base weight as well."""
    scaled = G
    if m is not None:
        assert norm is not None
        c = m / norm
        scaled = G * (c if fan_in_fan_out else c[:, None])
    if form == "delta":
        scaled = scaled - G
    return scaled.to(W.dtype).clone(memory_format=torch.contiguous_format)


_backward_op = _operator("dual_linear_backward", _backward, list[Tensor])


@_backward_op.register_fake
def _(dY, x, W, A, B, C, D, m, *options):
    need_dx, need_dW, need_factors = options[-3:]
    return [
        x.new_empty(x.shape) if need_dx else x.new_empty(0),  # contiguous, whatever the strides of x
        W.new_empty(W.shape) if need_dW and W is not None else x.new_empty(0),
        *(x.new_empty(0) if f is None or not need_factors else f.new_empty(f.shape) for f in (A, B, C, D, m)),
    ]


def _setup_context(ctx, inputs, output) -> None:
    x, W, _b, *factors, m, scaling, fixed_sign, initial, seed, gradient_tokens = inputs[:13]
    ctx.save_for_backward(x, W, *factors, m, output[1], scaling, fixed_sign, seed, gradient_tokens, *initial)
    if output[1] is not None:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.options = inputs[13:]


def _autograd(ctx, dY: Tensor | None, _dnorm):
    nothing = (None,) * len(ctx.needs_input_grad)
    if dY is None:
        return nothing
    x, W, A, B, C, D, m, norm, scaling, fixed_sign, seed, gradient_tokens, *initial = ctx.saved_tensors
    need_x, need_W, need_b, *need_factors = ctx.needs_input_grad[:8]
    if _to_be_differentiated(dY):
        if seed is not None:
            raise NotImplementedError("gradient_tokens < 1 samples its gradient, which has no derivative: set it to 1.")
        magnitude, direction, ste_clip, fan_in_fan_out, form, _ = ctx.options
        update = Update(A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial)
        dx, dW, *factors = _differentiable_gradients(
            lambda: reference.dual_linear(x, W, None, update, m, form, fan_in_fan_out),
            (x, W, A, B, C, D, m), (need_x, need_W, *need_factors), dY,
        )  # fmt: skip
    else:
        backward: Callable = _backward_op if _traced(dY) else _backward
        dx, dW, *factors = backward(
            dY, x, W, A, B, C, D, m, norm, scaling, fixed_sign, initial, seed, gradient_tokens, *ctx.options,
            need_x, need_W, any(need_factors),
        )  # fmt: skip
    db = dY.reshape(-1, dY.shape[-1]).sum(0) if need_b else None
    gradients = [g if needed else None for g, needed in zip(factors, need_factors, strict=True)]
    # scaling, fixed_sign | initial | seed, gradient_tokens | options
    rest = [None, None, [None] * len(initial), None, None, *[None] * len(ctx.options)]
    return dx if need_x else None, dW if need_W else None, db, *gradients, *rest


_forward_op.register_autograd(_autograd, setup_context=_setup_context)
_forward_eager = _eager("DualLinear", _forward, _setup_context, _autograd)


def dual_linear(
    x: Tensor,
    W: Tensor | None,
    b: Tensor | None,
    update: Update,
    m: Tensor | None,
    form: str,
    fan_in_fan_out: bool,
    gradient_tokens: float | Tensor,
    seed: Tensor | None,
    backend: str,
) -> Tensor:
    """:func:`duallora.dual_linear`, by the kernel backends."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # autocast leaves float64 alone
        x = x.to(torch.get_autocast_dtype(device))
    elif W is not None and x.dtype != W.dtype:
        raise ValueError(f"x is {x.dtype} but the base weight is {W.dtype}: cast x, or run under torch.autocast.")
    scaling = update.scaling
    if not isinstance(scaling, Tensor):
        scaling = torch.full((), scaling, dtype=torch.float32, device=x.device)  # filled there: no copy to wait for
    tokens: Tensor | None = None
    if seed is not None:
        tokens = gradient_tokens if isinstance(gradient_tokens, Tensor) else torch.tensor(gradient_tokens, device="cpu")
    y, _norm = (_forward_op if _traced(x) else _forward_eager)(
        x, W, b, *update[:4], m, scaling, update.fixed_sign, list(update.initial), seed, tokens,
        update.magnitude, update.direction, update.ste_clip, fan_in_fan_out, form, backend,
    )  # fmt: skip
    return y


def _weight(
    W: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    m: Tensor | None,
    scaling: Tensor,
    fixed_sign: Tensor | None,
    initial: Sequence[Tensor],
    magnitude: str,
    direction: str,
    ste_clip: str,
    fan_in_fan_out: bool,
    minus_base: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """(W' in the layout of W, norm); norm [out] with m, else None."""
    update = Update(A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial)
    build = pick(backend, update, dtype if W is None else W.dtype).build_weight
    return build(W, update, fan_in_fan_out=fan_in_fan_out, dtype=dtype, m=m, minus_base=minus_base)


_weight_op = _operator("dual_weight", _weight, tuple[Tensor, Tensor])


@_weight_op.register_fake
def _(
    W, A, B, C, D, m, _scaling, _fixed_sign, _initial, _magnitude, _direction, _clip, fan_in_fan_out, _minus, dtype, _b
):
    norm = A.new_empty(0) if m is None else m.new_empty(m.shape, dtype=torch.promote_types(A.dtype, torch.float32))
    shape = (A.shape[1], B.shape[0]) if fan_in_fan_out else (B.shape[0], A.shape[1])
    return A.new_empty(shape, dtype=dtype), norm


def _weight_backward(
    G: Tensor,
    W: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    m: Tensor | None,
    norm: Tensor | None,
    scaling: Tensor,
    fixed_sign: Tensor | None,
    initial: Sequence[Tensor],
    magnitude: str,
    direction: str,
    ste_clip: str,
    fan_in_fan_out: bool,
    minus_base: bool,
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor | None]:
    """[dA, dB, dC, dD, dm]; what does not exist is None."""
    update = Update(A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial)
    kernel = pick(backend, update, dtype if W is None else W.dtype)
    given = {} if m is None else {"norm": norm}
    _, *gradients = kernel.weight_and_gradients(
        G.contiguous(), W, update, fan_in_fan_out=fan_in_fan_out, dtype=dtype, m=m, minus_base=minus_base, **given
    )
    return _cast(gradients, (A, B, C, D, m))


_weight_backward_op = _operator("dual_weight_backward", _weight_backward, list[Tensor])


@_weight_backward_op.register_fake
def _(G, W, A, B, C, D, m, *_options):
    return [G.new_empty(0) if f is None else f.new_empty(f.shape) for f in (A, B, C, D, m)]


def _weight_context(ctx, inputs, output) -> None:
    W, *factors, m, scaling, fixed_sign, initial = inputs[:9]
    ctx.save_for_backward(W, *factors, m, output[1], scaling, fixed_sign, *initial)
    if output[1] is not None:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.options = inputs[9:]


def _weight_autograd(ctx, G: Tensor | None, _dnorm):
    if G is None:
        return (None,) * len(ctx.needs_input_grad)
    W, A, B, C, D, m, norm, scaling, fixed_sign, *initial = ctx.saved_tensors
    need_W, *need_factors = ctx.needs_input_grad[:6]
    if _to_be_differentiated(G):
        magnitude, direction, ste_clip, fan_in_fan_out, minus_base, dtype, _ = ctx.options
        update = Update(A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial)
        dW, *found = _differentiable_gradients(
            lambda: reference.build_weight(
                W, update, fan_in_fan_out=fan_in_fan_out, dtype=dtype, m=m, minus_base=minus_base
            )[0],
            (W, A, B, C, D, m), (need_W, *need_factors), G,
        )  # fmt: skip
        return dW, *found, None, None, [None] * len(initial), *[None] * len(ctx.options)
    gradients: list[Tensor | None] = [None] * 5
    if any(need_factors):
        gradients = (_weight_backward_op if _traced(G) else _weight_backward)(
            G, W, A, B, C, D, m, norm, scaling, fixed_sign, initial, *ctx.options
        )  # fmt: skip
        gradients = [g if needed else None for g, needed in zip(gradients, need_factors, strict=True)]
    fan_in_fan_out, minus_base = ctx.options[3:5]
    dW = _base_gradient(G, m, norm, W, "delta" if minus_base else "merged", fan_in_fan_out) if need_W else None
    return dW, *gradients, None, None, [None] * len(initial), *[None] * len(ctx.options)


_weight_op.register_autograd(_weight_autograd, setup_context=_weight_context)
_weight_eager = _eager("DualWeight", _weight, _weight_context, _weight_autograd)


def dual_weight(
    W: Tensor | None,
    update: Update,
    m: Tensor | None,
    fan_in_fan_out: bool,
    minus_base: bool,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """:func:`duallora.ops.dual_weight`, by the kernel backends."""
    scaling = update.scaling
    if not isinstance(scaling, Tensor):
        scaling = torch.full((), scaling, dtype=torch.float32, device=update.A.device)
    weight, _norm = (_weight_op if _traced(update.A) else _weight_eager)(
        W, *update[:4], m, scaling, update.fixed_sign, list(update.initial),
        update.magnitude, update.direction, update.ste_clip, fan_in_fan_out, minus_base, dtype, backend,
    )  # fmt: skip
    return weight
