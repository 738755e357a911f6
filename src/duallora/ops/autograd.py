"""The one autograd path over the kernel backends: saves x and the factors, and never keeps an [out, in] tensor.

    forward    W' = W0 + dW                y = x W'^T + b
    backward   dx = dY W'                  db = sum_t dY_t
               G  = dY^T x   [out, in]     dA, dB, dC, dD (and dm) from G, by the backend

Eager mode runs it as a ``torch.autograd.Function``, whose machinery costs the host the least; a compiler and tensors
without values see one opaque operator of torch.library, so ``torch.compile(fullgraph=True)`` takes it as it is. A
gradient that is to be differentiated is the plain form's.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duallora.core.equation import Update
from duallora.ops import reference
from duallora.ops.backends import pick
from duallora.ops.reference import apply_weight
from duallora.ops.tokens import nonzero_rows, sample, token_weights

# Operators know no structures: an Update and a How as their schemas spell them, field by field.
_UPDATE = (
    "Tensor A, Tensor B, Tensor? C, Tensor? D, Tensor scaling, str magnitude, str direction, str ste_clip, "
    "Tensor? fixed_sign, Tensor[] initial"
)
_HOW = "str form, bool fan_in_fan_out, str backend, float gradient_tokens"


class How(NamedTuple):
    """How an update is applied: the options of :func:`duallora.ops.dual_linear` that are no part of dW."""

    form: str = "merged"
    fan_in_fan_out: bool = False
    backend: str = "auto"
    gradient_tokens: float = 1.0  # share of them, in (0, 1], that form the factors' gradient


def flat(update: Update, how: How) -> tuple[Any, ...]:
    """Both as an operator takes them. A number would be a constant of its graph, so that a moving gate recompiled."""
    return *update[:4], update.scaling_tensor(), *update[5:9], list(update.initial), *how


def of(fields: Sequence[Any]) -> tuple[Update, How]:
    """What :func:`flat` was made of."""
    return Update(*fields[:10]), How(*fields[10:14])


def _as_operators(update: Update) -> Update:
    """With the scaling of :func:`flat` where a number would be more exact: a float64 update must not depend on who runs it."""
    return update._replace(scaling=update.scaling_tensor()) if update.A.dtype == torch.float64 else update


@functools.cache
def _warn_of_float16(clips: bool) -> None:
    if clips:
        warnings.warn(
            "Training in float16: under loss scaling the straight-through clip sees gradients thousands of times too "
            "large and saturates, which distorts the direction group. Use bfloat16, or ste_clip='none'.",
            stacklevel=4,
        )


def _weight_dtype(x: Tensor, W: Tensor | None) -> torch.dtype:
    """What decides which backend can serve: float64 anywhere needs the torch operators."""
    return x.dtype if W is None or W.dtype == x.dtype else torch.promote_types(x.dtype, W.dtype)


def _operator(schema: str, body: Callable) -> Any:
    """The opaque operator of a function: empty where that gives None, memory of its own for each output."""
    name, _, signature = schema.partition("(")

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
        return found if schema.endswith("[]") else tuple(found)

    return torch.library.custom_op(f"duallora::{name}", run, mutates_args=(), schema=f"({signature}")


def _no_autocast(device: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def traced(x: Tensor) -> bool:
    """Whether someone records what happens and should see one operator: a compiler, or a tensor without values."""
    return torch.compiler.is_compiling() or x.is_meta or torch.jit.is_tracing() or type(x) not in (Tensor, nn.Parameter)


def transformed() -> bool:
    """Inside torch.func.grad, vmap and the like, which see through plain autograd alone."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _keep(ctx: Any, x: Tensor | None, W: Tensor | None, m: Any, norm: Any, update: Update, how: How) -> None:
    """Saves for the backward what :func:`_kept` gives back."""
    scaling = update.scaling if isinstance(update.scaling, Tensor) else None
    ctx.save_for_backward(x, W, m, norm, *update[:4], scaling, update.fixed_sign, *update.initial)
    ctx.set_materialize_grads(False)
    ctx.options, ctx.how = (None if scaling is not None else update.scaling, *update[5:8]), how


def _kept(ctx: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Update, How]:
    """(x, W, m, norm, update, how)"""
    x, W, m, norm, A, B, C, D, scaling, fixed_sign, *initial = ctx.saved_tensors
    number, magnitude, direction, ste_clip = ctx.options
    number = number if scaling is None else scaling
    return x, W, m, norm, Update(A, B, C, D, number, magnitude, direction, ste_clip, fixed_sign, initial), ctx.how


def _differentiated(dY: Tensor) -> bool:
    """Whether a gradient is asked for that can itself be differentiated (create_graph), as for a gradient penalty."""
    return torch.is_grad_enabled() and not traced(dY)


def _differentiable_gradients(
    y: Callable[[], Tensor], tensors: Sequence[Any], needed: Sequence[bool], dY: Tensor
) -> list:
    """Those of the plain form ``y()`` for the tensors that need one, by autograd, which can go on from there."""
    with torch.enable_grad(), _no_autocast(dY.device.type):
        wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y(), wanted, dY, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]


def _options(how: How, dtype: torch.dtype, m: Tensor | None) -> dict[str, Any]:
    """Of both passes of a kernel."""
    return {"fan_in_fan_out": how.fan_in_fan_out, "dtype": dtype, "m": m, "minus_base": how.form == "delta"}


def _gradients(
    kernel: Any, G: Tensor, W: Tensor | None, update: Update, norm: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, list[Tensor | None]]:
    """(W', [dm, dA, dB, dC, dD]): contiguous, in the dtype of what they are gradients of; None of what there is not."""
    m = options["m"]
    unit = update.unit()
    weight, *found, dm = kernel.weight_and_gradients(G, W, unit, **options, norm=None if m is None else norm)
    if unit is not update:
        found[2:] = update.of_unit(unit, *found[2:])
    inputs = [m, *update[:4]]
    return weight, [
        None if f is None else g if g.dtype == f.dtype and g.is_contiguous() else g.to(f.dtype).contiguous()
        for g, f in zip([dm, *found], inputs, strict=True)
    ]


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


def _norm_like(m: Tensor | None, A: Tensor) -> Tensor:
    return A.new_empty(0) if m is None else m.new_empty(m.shape, dtype=torch.promote_types(A.dtype, torch.float32))


# -- y = x W'^T + b ----------------------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """The factors stand beside the update that holds them, because autograd looks at tensors alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor | None, b: Tensor | None, m: Tensor | None,
        A: Tensor, B: Tensor, C: Tensor | None, D: Tensor | None, update: Update, how: How,
    ) -> Any:  # fmt: skip
        """y; without ``ctx`` (y, norm): norm [out] with m, else None."""
        merged, fan_in_fan_out = how.form == "merged", how.fan_in_fan_out
        build = pick(how.backend, update, _weight_dtype(x, W)).build_weight
        if b is not None and b.dtype != x.dtype:
            b = b.to(x.dtype)
        base = W if merged or m is not None else None
        unit = update.unit()
        weight, norm = build(base, unit, fan_in_fan_out=fan_in_fan_out, dtype=x.dtype, m=m, minus_base=not merged)
        if merged and not fan_in_fan_out:
            y = F.linear(x, weight, b)  # itself, not apply_weight: a frame less for nearly every layer there is
        elif how.form == "added" and W is not None:
            y = apply_weight(x, W.to(x.dtype), b, fan_in_fan_out)
            y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight if fan_in_fan_out else weight.T)
        else:
            y = apply_weight(x, weight, b if merged else None, fan_in_fan_out)
        if ctx is None:
            return y, norm
        _keep(ctx, x, W, m, norm, update, how)
        if y._is_view():  # of what a product made inside, seen by nobody else: the model may write into y all the same
            y = y.new_empty(0).set_(y)  # type: ignore[call-overload]  # the same memory
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor | None) -> Any:
        return *_product_gradients(ctx, dY), None, None


# Past the look at torch.func's transforms, which `product` has taken already.
_apply_product: Any = super(torch.autograd.Function, _Product).apply


def _product_gradients(ctx: Any, dY: Tensor | None) -> list[Tensor | None]:
    """Those of x, W, b, m, A, B, C, D."""
    if dY is None:
        return [None] * 8
    x, W, m, norm, update, how = _kept(ctx)
    need_x, need_W, need_b, *needed = ctx.needs_input_grad[:8]
    if _differentiated(dY):
        if how.gradient_tokens < 1:
            raise NotImplementedError("gradient_tokens < 1 samples its gradient, which has no derivative: set it to 1.")
        dx, dW, *rest = _differentiable_gradients(
            lambda: reference.dual_linear(x, W, None, update, m, how.form, how.fan_in_fan_out),
            (x, W, m, *update[:4]), (need_x, need_W, *needed), dY,
        )  # fmt: skip
    elif traced(dY):
        dx, dW, *rest = _backward_op(dY, x, W, m, norm, *flat(update, how), need_x, need_W, any(needed))
    else:
        dx, dW, *rest = _backward(dY, x, W, m, norm, update, how, need_x, need_W, any(needed))
    db = dY.reshape(-1, dY.shape[-1]).sum(0) if need_b and how.form != "delta" else None  # which has no bias
    rest = [g if need else None for g, need in zip(rest, needed, strict=True)]
    return [dx if need_x else None, dW if need_W else None, db, *rest]


def _backward(
    dY: Tensor, x: Tensor, W: Tensor | None, m: Tensor | None, norm: Tensor | None, update: Update, how: How,
    need_dx: bool, need_dW: bool, need_factors: bool,
) -> list[Tensor | None]:  # fmt: skip
    """[dx, dW, dm, dA, dB, dC, dD]; what is not needed, or does not exist, is None."""
    result: list[Tensor | None] = [None] * 7
    form, fan_in_fan_out = how.form, how.fan_in_fan_out
    with _no_autocast(x.device.type):
        kernel = pick(how.backend, update, _weight_dtype(x, W))
        dY2, x2 = (dY, x) if x.ndim == 2 else (dY.reshape(-1, dY.shape[-1]), x.reshape(-1, x.shape[-1]))
        tokens = len(dY2)
        keep = nonzero_rows(dY2)
        if keep is not None:
            dY2, x2 = dY2[keep], x2[keep]
        # The weight for dx: in the added form the rounded sum serves, as its error does not accumulate over steps.
        options = _options(how, x.dtype, m)
        weight = None
        if need_dW or need_factors:
            G = _weight_gradient(dY2, x2, tokens, how)
            if need_dW and W is not None:
                result[1] = _base_gradient(G, m, norm, W, form, fan_in_fan_out)
            if need_factors:
                weight, result[2:7] = _gradients(kernel, G, W, update, norm, options)
        if need_dx:
            if weight is None:
                weight, _ = kernel.build_weight(W, update.unit(), **options)
            by_rows = weight.T if fan_in_fan_out else weight
            if keep is None:
                dx = torch.mm(dY2, by_rows)
                result[0] = dx if x.ndim == 2 else dx.view(x.shape)
            else:
                result[0] = x.new_zeros(tokens, x.shape[-1]).index_copy_(0, keep, dY2 @ by_rows).view(x.shape)
    return result


def _weight_gradient(dY: Tensor, x: Tensor, tokens: int, how: How) -> Tensor:
    """dL/dW' in the layout of W from ``how.gradient_tokens`` of the ``tokens``.

    Some of the tokens may be gone as zeros; the share counts from all of them.
    """
    wanted = max(1, math.ceil(how.gradient_tokens * tokens))
    if how.gradient_tokens < 1 and wanted < len(dY):
        chosen, weight = sample(token_weights(x, dY), wanted)
        dY, x = (dY[chosen] * weight[:, None]).to(dY.dtype), x[chosen]
    return torch.mm(x.t(), dY) if how.fan_in_fan_out else torch.mm(dY.t(), x)


def _product_body(x, W, b, m, *fields):
    update, how = of(fields)
    with _no_autocast(x.device.type):
        return _Product.forward(None, x, W, b, m, *update[:4], update, how)


_product_op = _operator(
    f"dual_linear(Tensor x, Tensor? W, Tensor? b, Tensor? m, {_UPDATE}, {_HOW}) -> (Tensor, Tensor)", _product_body
)


@_product_op.register_fake
def _(x, W, b, m, A, B, *_fields):
    return x.new_empty(*x.shape[:-1], B.shape[0]), _norm_like(m, A)


def _backward_body(dY, x, W, m, norm, *fields):
    return _backward(dY, x, W, m, norm, *of(fields), *fields[14:])


_backward_op = _operator(
    f"dual_linear_backward(Tensor dY, Tensor x, Tensor? W, Tensor? m, Tensor? norm, {_UPDATE}, {_HOW}, "
    "bool need_dx, bool need_dW, bool need_factors) -> Tensor[]",
    _backward_body,
)


@_backward_op.register_fake
def _(dY, x, W, m, norm, A, B, C, D, *fields):
    need_dx, need_dW, need_factors = fields[-3:]
    return [
        x.new_empty(x.shape) if need_dx else x.new_empty(0),  # contiguous, whatever the strides of x
        W.new_empty(W.shape) if need_dW and W is not None else x.new_empty(0),
        *(x.new_empty(0) if f is None or not need_factors else f.new_empty(f.shape) for f in (m, A, B, C, D)),
    ]


def _nothing(ctx: Any) -> list[Any]:
    """For what follows the factors among the inputs of an operator: a list for a list of tensors, else None."""
    return [[None] * len(n) if isinstance(n, (list, tuple)) else None for n in ctx.needs_input_grad]


def _keep_of_operator(ctx: Any, x: Tensor | None, W: Tensor | None, m: Any, norm: Tensor, fields: Sequence) -> None:
    ctx.mark_non_differentiable(norm)
    _keep(ctx, x, W, m, norm, *of(fields))


def _product_context(ctx, inputs, output) -> None:
    x, W, _b, m, *fields = inputs
    _keep_of_operator(ctx, x, W, m, output[1], fields)


_product_op.register_autograd(
    lambda ctx, dY, _dnorm: (*_product_gradients(ctx, dY), *_nothing(ctx)[8:]), setup_context=_product_context
)


def product(x: Tensor, W: Tensor | None, b: Tensor | None, m: Tensor | None, update: Update, how: How) -> Tensor:
    """:func:`duallora.ops.dual_linear` of arguments that are known to fit together, as a layer's are."""
    if x.dtype == torch.float16 and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _warn_of_float16(update.direction == "ste" and update.ste_clip != "none")
    if how.backend == "reference" or transformed():
        return reference.dual_linear(x, W, b, update, m, how.form, how.fan_in_fan_out)
    autocast = torch.is_autocast_enabled(x.device.type)
    if autocast and x.dtype != torch.float64:  # autocast leaves float64 alone
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif W is not None and x.dtype != W.dtype:
        raise ValueError(f"x is {x.dtype} but the base weight is {W.dtype}: cast x, or run under torch.autocast.")
    if traced(x):
        return _product_op(x, W, b, m, *flat(update, how))[0]
    update = _as_operators(update)
    inputs = (x, W, b, m, *update[:4], update, how)
    if not autocast:
        return _apply_product(*inputs) if torch.is_grad_enabled() else _Product.forward(None, *inputs)[0]
    with torch.autocast(x.device.type, enabled=False):
        return _apply_product(*inputs)


# -- W' itself -----------------------------------------------------------------------------------------------------------


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, W: Tensor | None, m: Tensor | None, A: Tensor, B: Tensor, C: Tensor | None, D: Tensor | None,
        update: Update, how: How, dtype: torch.dtype,
    ) -> Any:  # fmt: skip
        """W' in the layout of W (W' - W in the form "delta"); without ``ctx`` (W', norm)."""
        build = pick(how.backend, update, dtype if W is None else W.dtype).build_weight
        weight, norm = build(W, update.unit(), **_options(how, dtype, m))
        if ctx is None:
            return weight, norm
        _keep(ctx, None, W, m, norm, update, how)
        ctx.dtype = dtype
        return weight

    @staticmethod
    def backward(ctx: Any, G: Tensor | None) -> Any:
        return *_weight_gradients(ctx, G), None, None, None


def _weight_gradients(ctx: Any, G: Tensor | None) -> list[Tensor | None]:
    """Those of W, m, A, B, C, D."""
    if G is None:
        return [None] * 6
    _, W, m, norm, update, how = _kept(ctx)
    need_W, *needed = ctx.needs_input_grad[:6]
    if _differentiated(G):
        options = _options(how, ctx.dtype, m)
        return _differentiable_gradients(
            lambda: reference.build_weight(W, update, **options)[0], (W, m, *update[:4]), (need_W, *needed), G
        )
    gradients: list[Tensor | None] = [None] * 5
    if any(needed):
        if traced(G):
            gradients = _weight_backward_op(G, W, m, norm, *flat(update, how), ctx.dtype)
        else:
            gradients = _weight_backward(G, W, m, norm, update, how, ctx.dtype)
        gradients = [g if need else None for g, need in zip(gradients, needed, strict=True)]
    dW = _base_gradient(G, m, norm, W, how.form, how.fan_in_fan_out) if need_W else None
    return [dW, *gradients]


def _weight_backward(
    G: Tensor, W: Tensor | None, m: Tensor | None, norm: Tensor | None, update: Update, how: How, dtype: torch.dtype
) -> list[Tensor | None]:
    """[dm, dA, dB, dC, dD]; what does not exist is None."""
    kernel = pick(how.backend, update, dtype if W is None else W.dtype)
    return _gradients(kernel, G.contiguous(), W, update, norm, _options(how, dtype, m))[1]


def _weight_body(W, m, *fields):
    update, how = of(fields)
    return _Weight.forward(None, W, m, *update[:4], update, how, fields[14])


_weight_op = _operator(
    f"dual_weight(Tensor? W, Tensor? m, {_UPDATE}, {_HOW}, ScalarType dtype) -> (Tensor, Tensor)", _weight_body
)


@_weight_op.register_fake
def _(W, m, *fields):
    update, how = of(fields)
    return update.A.new_empty(update.weight_shape(how.fan_in_fan_out), dtype=fields[14]), _norm_like(m, update.A)


_weight_backward_op = _operator(
    f"dual_weight_backward(Tensor G, Tensor? W, Tensor? m, Tensor? norm, {_UPDATE}, {_HOW}, ScalarType dtype) "
    "-> Tensor[]",
    lambda G, W, m, norm, *fields: _weight_backward(G, W, m, norm, *of(fields), fields[14]),
)


@_weight_backward_op.register_fake
def _(G, W, m, norm, A, B, C, D, *_fields):
    return [G.new_empty(0) if f is None else f.new_empty(f.shape) for f in (m, A, B, C, D)]


def _weight_context(ctx, inputs, output) -> None:
    W, m, *fields = inputs
    _keep_of_operator(ctx, None, W, m, output[1], fields)
    ctx.dtype = fields[14]


_weight_op.register_autograd(
    lambda ctx, G, _dnorm: (*_weight_gradients(ctx, G), *_nothing(ctx)[6:]), setup_context=_weight_context
)


def weight(W: Tensor | None, m: Tensor | None, update: Update, how: How, dtype: torch.dtype) -> Tensor:
    """W' itself (W' - W in the form "delta"; W None is 0), rounded once to ``dtype``; differentiable in W, m and the factors.

    For layers whose product is not a matrix product. Where a kernel computes it, each entry has the same bits whatever
    rows come along. The arguments are known to fit together.
    """
    if how.form == "delta" and m is None:
        W = None
    if how.backend == "reference" or transformed():
        return reference.build_weight(W, update, **_options(how, dtype, m))[0]
    if traced(update.A):
        return _weight_op(W, m, *flat(update, how), dtype)[0]
    update = _as_operators(update)
    return _Weight.apply(W, m, *update[:4], update, how, dtype)
