"""The update of Dual LoRA (arXiv 2512.03402, Eq. 9) and its gradient, written once.

    dW = s * ReLU(B A) . Sign(D C)            s = gate * alpha / sqrt(r1 r2)

    A [r1, in]   B [out, r1]   magnitude group        P = B A  [out, in]      M = s * magnitude(P)
    C [r2, in]   D [out, r2]   direction group        Q = D C  [out, in]      dW = M . direction(Q)

A soft direction (ours, docs/method.md) is tanh(Q / rms(Q)) with the root mean square of each row of Q: D C is D' C with
D' = D / rms, which small products of the factors give (:func:`unit_rows`), so that every backend sees a plain tanh.

Forward, merge, conversion, analysis and the kernels' tests all take it from :class:`Update`; backends that do not keep
the [out, in] tensors for autograd call :meth:`Update.backward`, the same formula differentiated by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Magnitude = Literal["relu", "abs", "sigmoid", "identity"]
Direction = Literal["ste", "tanh", "xnor", "dorefa", "identity", "fixed"]
SteClip = Literal["chain", "update", "none", "window"]

MAGNITUDES: tuple[str, ...] = get_args(Magnitude)
DIRECTIONS: tuple[str, ...] = get_args(Direction)
STE_CLIPS: tuple[str, ...] = get_args(SteClip)

# value(P) and derivative(P); the derivatives at 0 are torch's own: ReLU'(0) = |.|'(0) = 0.
_MAGNITUDE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (torch.relu, lambda P: torch.relu(P).sign_()),
    "abs": (torch.abs, torch.sign),
    "sigmoid": (torch.sigmoid, lambda P: torch.sigmoid(P) * (1 - torch.sigmoid(P))),
    "identity": (lambda P: P, torch.ones_like),
}


def dual_scaling(alpha: float, r1: int, r2: int) -> float:
    """alpha / sqrt(r1 r2), Eq. 9. Setting 3 of the paper (``direction="fixed"``) has no r2 and passes r1 twice."""
    return alpha / math.sqrt(r1 * r2)


def sign(Q: Tensor) -> Tensor:
    """+1 where Q > 0, else -1 (Eq. 6): Sign(0) = -1, unlike ``torch.sign``; NaN stays NaN.

    Written without a mask: ``torch.where`` on random signs mispredicts its branch and takes ten times as long on CPU.
    """
    return torch.sign(Q).sub_(0.5).sign_().add_(Q, alpha=0)  # torch.sign(NaN) is 0; 0 * NaN is NaN


def quantize(Q: Tensor, direction: str) -> Tensor:
    """The straight-through directions: Sign(Q), for XNOR-Net times the mean |Q| of its output row (Eq. 13), for
    DoReFa-Net times the mean |Q| over all (Eq. 14). And tanh(Q), of rows of root mean square 1."""
    if direction == "unit-tanh":
        return torch.tanh(Q)
    S = sign(Q)
    if direction == "xnor":
        return S.mul_(Q.abs().mean(dim=1, keepdim=True))
    if direction == "dorefa":
        return S.mul_(Q.abs().mean())
    return S


def unit_rows(C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """(D', rms): D' = D / rms [out, r2], with which the rows of D' C have the root mean square 1, and rms [out, 1].

    rms_i^2 = d_i (C C^T) d_i^T / in. Differentiable in both; no [out, in] tensor is made. A row of zeros stays one and has
    no gradient.
    """
    square = ((D @ (C @ C.T)) * D).sum(1, keepdim=True) / C.shape[1]
    rms = square.clamp_min(torch.finfo(square.dtype).tiny).sqrt().masked_fill(square <= 0, math.inf)
    return D / rms, rms


def clip_direction_gradient(G: Tensor, M: Tensor, Q: Tensor, direction: str, ste_clip: str) -> Tensor:
    """dL/dQ from G = dL/d(dW): the straight-through gradient of the direction group.

    ``"chain"`` (Eq. 7) clips dL/dSign(Q) = G M; ``"update"`` (Eq. 12) clips G and multiplies by M after; ``"none"``
    clips nothing; ``"window"`` (ours) takes the gradient of tanh(Q / rms) with the rms held fixed. XNOR-Net and DoReFa-Net
    pass the gradient unclipped (Eq. 13, 14). ``clamp`` keeps NaN.
    """
    if direction == "unit-tanh" or (direction == "ste" and ste_clip == "unit-window"):
        return (1 - torch.tanh(Q).square_()).mul_(G).mul_(M)
    if direction == "ste" and ste_clip == "chain":
        return (G * M).clamp_(-1, 1)
    if direction == "ste" and ste_clip == "update":
        return G.clamp(-1, 1) * M
    return G * M


class _Directed(torch.autograd.Function):
    """M . direction(Q) for the quantized directions, with the straight-through gradient for Q."""

    generate_vmap_rule = True

    @staticmethod
    def forward(M: Tensor, Q: Tensor, direction: str, ste_clip: str) -> Tensor:
        return M * quantize(Q, direction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        M, Q, ctx.direction, ctx.ste_clip = inputs
        ctx.save_for_backward(M, Q)

    @staticmethod
    def backward(ctx, G):
        M, Q = ctx.saved_tensors
        return G * quantize(Q, ctx.direction), clip_direction_gradient(G, M, Q, ctx.direction, ctx.ste_clip), None, None


class Update(NamedTuple):
    """One dW in the making: the arguments of :func:`dual_delta`, as backends hand them around."""

    A: Tensor
    B: Tensor
    C: Tensor | None
    D: Tensor | None
    scaling: float | Tensor
    magnitude: str = "relu"
    direction: str = "ste"
    ste_clip: str = "chain"
    fixed_sign: Tensor | None = None
    initial: Sequence[Tensor] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of dW."""
        return self.B.shape[0], self.A.shape[1]

    def weight_shape(self, fan_in_fan_out: bool) -> tuple[int, int]:
        """Of W0 + dW as the base layer stores it: (out, in), or (in, out)."""
        return self.shape[::-1] if fan_in_fan_out else self.shape

    @property
    def dtype(self) -> torch.dtype:
        """Half-precision products would flip signs near 0, so dW is computed in float32 at least."""
        return torch.promote_types(self.A.dtype, torch.float32)

    def scaling_tensor(self) -> Tensor:
        """The scaling as [] on the device of the factors; a number is filled in there, no copy to wait for."""
        if isinstance(self.scaling, Tensor):
            return self.scaling
        return torch.full((), self.scaling, dtype=torch.float32, device=self.A.device)

    def check(self) -> None:
        """Raise ValueError for an unknown option, or for factors whose shapes do not make one [out, in]."""
        for name, allowed in (("magnitude", MAGNITUDES), ("direction", DIRECTIONS), ("ste_clip", STE_CLIPS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}.")
        A, B, C, D = self[:4]
        fixed = self.direction == "fixed"
        groups = {"A": A, "B": B, "fixed_sign": self.fixed_sign} if fixed else {"A": A, "B": B, "C": C, "D": D}
        shapes = {name: None if t is None else tuple(t.shape) for name, t in groups.items()}
        fits = all(shape is not None and len(shape) == 2 for shape in shapes.values()) and A.shape[0] == B.shape[1]
        if fits and fixed:
            fits = shapes["fixed_sign"] == self.shape
        elif fits and C is not None and D is not None:
            fits = C.shape[0] == D.shape[1] and (D.shape[0], C.shape[1]) == self.shape
        if not fits:
            raise ValueError(
                f"direction={self.direction!r} got {shapes}: expected A [r1, in], B [out, r1], and C [r2, in], D [out, r2] "
                "(with 'fixed': fixed_sign [out, in])."
            )

    def rows(self, rows: slice | Tensor) -> Update:
        """The update of these output rows alone: B and D are cut, A and C shared."""
        return self._replace(
            B=self.B[rows],
            D=None if self.D is None else self.D[rows],
            fixed_sign=None if self.fixed_sign is None else self.fixed_sign[rows],
            initial=[factor[rows] if i % 2 else factor for i, factor in enumerate(self.initial)],
        )

    @property
    def has_unit_rows(self) -> bool:
        """Whether the direction is one of D C over the root mean square of its rows."""
        return self.direction == "tanh" or (self.direction == "ste" and self.ste_clip == "window")

    def unit(self) -> Update:
        """As the backends take it: where :attr:`has_unit_rows`, the same dW from D / rms instead of D; else itself."""
        if not self.has_unit_rows:
            return self
        C, D = self.C, self.D
        assert C is not None
        assert D is not None
        soft = self.direction == "tanh"
        unit, rms = unit_rows(C.to(self.dtype), D.to(self.dtype))
        initial = self.initial
        if initial:
            A0, B0, C0, D0 = initial
            initial = (A0, B0, C0, unit_rows(C0.to(self.dtype), D0.to(self.dtype))[0])
        if not soft:
            unit = D / rms.detach()
        return self._replace(
            D=unit,
            initial=initial,
            direction="unit-tanh" if soft else "ste",
            ste_clip="none" if soft else "unit-window",
        )

    def of_unit(self, unit: Update, dC: Tensor, dD: Tensor) -> tuple[Tensor, Tensor]:
        """(dL/dC, dL/dD) from those of :meth:`unit`, whose D' depends on C and D by the rms as well.

            k_i = d'_i . dL/dd'_i / in    dL/dD = (dL/dD' - k D' C C^T) / rms    dL/dC += - D'^T k D' C

        The window of the hard direction holds the rms fixed: k = 0.
        """
        assert self.C is not None
        assert self.D is not None
        C, wide = self.C.to(dC.dtype), unit.D.to(dD.dtype) if unit.D is not None else dD
        _, rms = unit_rows(C, self.D.to(dD.dtype))
        if self.direction == "tanh":
            k = (wide * dD).sum(1, keepdim=True) / C.shape[1]
            dC = dC - ((wide * k).T @ wide) @ C
            dD = dD - k * (wide @ (C @ C.T))
        return dC, dD / rms

    def delta(self) -> Tensor:
        """dW [out, in], differentiable in the factors: see :func:`dual_delta`."""
        if self.has_unit_rows:
            with torch.autocast(self.A.device.type, enabled=False):
                return self.unit().delta()
        A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial = self
        dtype = self.dtype
        with torch.autocast(A.device.type, enabled=False):
            M = scaling * _MAGNITUDE[magnitude][0](B.to(dtype) @ A.to(dtype))
            if direction == "fixed":
                assert fixed_sign is not None
                dW = M * fixed_sign.to(dtype)
            else:
                assert C is not None
                assert D is not None
                Q = D.to(dtype) @ C.to(dtype)
                dW = M * Q if direction == "identity" else _Directed.apply(M, Q, direction, ste_clip)
            return dW - self._at_start().delta() if initial else dW

    def _at_start(self) -> Update:
        """dW(0), of the factors in ``initial``."""
        A, B, C, D = self.initial
        return Update(A, B, C, D, self.scaling, self.magnitude, self.direction)

    def backward(self, G: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(dW, dA, dB, dC, dD) from G = dL/d(dW) [out, in], by hand: Eq. 10 to 12.

            dP = s G . direction(Q) . magnitude'(P)       dB = dP A^T     dA = B^T dP
            dQ = clip(G . M)  (see clip_direction_gradient)    dD = dQ C^T     dC = D^T dQ

        dW itself comes with them, because a backward that rebuilds it needs both and shares most of the work. All in the
        dtype :meth:`delta` computes in; agrees with autograd of it to rounding.
        """
        if self.has_unit_rows:
            with torch.autocast(self.A.device.type, enabled=False):
                unit = self.unit()
                dW, dA, dB, dC, dD = unit.backward(G)
                assert dC is not None
                assert dD is not None
                return dW, dA, dB, *self.of_unit(unit, dC, dD)
        A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial = self
        dtype = self.dtype
        with torch.autocast(A.device.type, enabled=False):
            G, A, B = G.to(dtype), A.to(dtype), B.to(dtype)
            value, derivative = _MAGNITUDE[magnitude]
            P = B @ A
            M = scaling * value(P)
            slope = scaling * derivative(P)
            dC = dD = None
            if direction == "fixed":
                assert fixed_sign is not None
                S = fixed_sign.to(dtype)
            else:
                assert C is not None
                assert D is not None
                C, D = C.to(dtype), D.to(dtype)
                Q = D @ C
                S = Q if direction == "identity" else quantize(Q, direction)
                dQ = clip_direction_gradient(G, M, Q, direction, ste_clip)
                dC, dD = D.T @ dQ, dQ @ C.T
            dP = slope.mul_(S).mul_(G)  # in place: these passes over [out, in] are what the backward costs
            dW = M.mul_(S)
            if initial:
                dW -= self._at_start().delta()
            return dW, B.T @ dP, dP @ A.T, dC, dD


def dual_delta(
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    scaling: float | Tensor,
    *,
    magnitude: str = "relu",
    direction: str = "ste",
    ste_clip: str = "chain",
    fixed_sign: Tensor | None = None,
    initial: Sequence[Tensor] = (),
) -> Tensor:
    """dW = scaling * magnitude(B A) . direction(D C), Eq. 9. Differentiable in A, B, C, D.

    Args:
        A: [r1, in]. B: [out, r1]. The magnitude group.
        C: [r2, in]. D: [out, r2]. The direction group; None for ``direction="fixed"``.
        scaling: gate * alpha / sqrt(r1 r2); a float or a 0-dim tensor (so that a moving gate does not recompile).
        magnitude: "relu" (the paper), "abs", "sigmoid" (its Table 6), "identity" (its Setting 1).
        direction: "ste" (the paper), "tanh" (ours, soft: tanh of D C over the root mean square of its row), "xnor", "dorefa"
            (its Table 3), "identity" (Setting 2: the plain product),
            "fixed" (Setting 3: the signs in ``fixed_sign``).
        ste_clip: see :func:`clip_direction_gradient`.
        fixed_sign: [out, in] of +-1, any dtype; for ``direction="fixed"`` only.
        initial: (A, B, C, D) at the start, whose dW is subtracted (``warmup="residual"``; not with fixed signs).

    Returns:
        dW [out, in], in the dtype of the factors but float32 at least.

    Raises:
        ValueError: an unknown option, or factors whose shapes do not fit together.
    """
    update = Update(A, B, C, D, scaling, magnitude, direction, ste_clip, fixed_sign, initial)
    update.check()
    return update.delta()


def add_update(W: Tensor, *updates: Tensor) -> Tensor:
    """W' = W0 + sum of the updates, summed in float32 at least and rounded once to the dtype of W."""
    dtype = torch.promote_types(W.dtype, updates[0].dtype)
    total = W.to(dtype)
    for dW in updates:
        total = total + dW
    return total.to(W.dtype)
