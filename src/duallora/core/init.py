"""Initial values of the factors, reproducible from one stored integer.

The paper draws all four from a Gaussian and leaves its width open. The defaults were measured
(docs/reproduction/start-values.md, docs/results.md): A and B as `magnitude_std` has them, C and D as `Settings.direction_init_std`. Sign is scale-free, so the width of C
and D only sets how easily signs flip: Adam's steps have the size of the learning rate, whatever the gradient.
"""

from __future__ import annotations

import hashlib
import math
import warnings

import torch
from torch import Tensor


def layer_seed(init_seed: int | None, module_name: str) -> int:
    """Seed of one layer: from ``init_seed`` and the layer's name, or from torch's global generator if None."""
    if init_seed is None:
        return int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))
    digest = hashlib.sha256(f"{init_seed}:{module_name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


def magnitude_std(in_features: int, r1: int) -> float:
    """Standard deviation of A and B by which the entries of ReLU(B A) start at 0.1 / sqrt(in_features) (rms).

    Their signs are random then, so with a scaling of 2 every output of the layer starts with a noise of a fifth of its
    input's rms, at any width and rank. Ours: 0.05 did better than 0.02 at 384 inputs and r1 = 8 and at 576 and 4, where this
    gives 0.0505 and 0.0543; other widths follow from the noise being the same.
    """
    return math.sqrt(0.1 * math.sqrt(2 / (in_features * r1)))


def positive_std(in_features: int, r1: int) -> float:
    """Standard deviation of A and B by which the entries of |A| |B| start at 0.8 / in_features (mean).

    All positive, and with the signs of a matrix of low rank, they add up over a layer's inputs where those of a Gaussian
    start cancel. Ours: 0.02 did as well as a Gaussian start at 384 inputs and r1 = 8, where this gives 0.0202, and 0.05
    destroyed the model.
    """
    return math.sqrt(0.8 * math.pi / (2 * in_features * r1))


def warn_of_rank(rank: int, out_features: int, in_features: int, name: str = "", remedy: str = "") -> None:
    """A warning for a rank above that of any [out, in] matrix."""
    limit = min(out_features, in_features)
    if rank > limit:
        warnings.warn(
            f"{name}rank {rank} is above min(in, out) = {limit} of this layer; a larger rank adds parameters but no "
            f"freedom.{remedy}",
            stacklevel=3,
        )


def draw_factors(
    seed: int,
    out_features: int,
    in_features: int,
    r1: int,
    r2: int | None,
    *,
    init_std: float | None,
    direction_init_std: float,
    init: str = "gaussian",
    on_bf16_grid: bool = False,
) -> list[Tensor]:
    """[A, B, C, D] (only [A, B] if r2 is None), float32 on CPU, N(0, init_std^2) and N(0, direction_init_std^2).

    ``init_std`` None is :func:`magnitude_std`. ``init`` "lora" is :func:`as_lora` of these.
    ``on_bf16_grid`` rounds each value to bfloat16, so that the factors survive a cast to bfloat16 unchanged and dW(0)
    can be rebuilt bit for bit from the seed (``warmup="residual"``).
    """
    if init_std is None:
        init_std = magnitude_std(in_features, r1)
    generator = torch.Generator("cpu").manual_seed(seed)
    shapes = [((r1, in_features), init_std), ((out_features, r1), init_std)]
    if r2 is not None:
        shapes += [((r2, in_features), direction_init_std), ((out_features, r2), direction_init_std)]
    factors = [
        torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32) * std for shape, std in shapes
    ]
    if init == "lora":
        A, B, C, D = factors
        as_lora(A, B, C, D, direction_init_std, generator)
    return [factor.bfloat16().float() for factor in factors] if on_bf16_grid else factors


def as_lora(A: Tensor, B: Tensor, C: Tensor, D: Tensor, std: float, generator: torch.Generator) -> None:
    """LoRA's start, in place: A uniform as PEFT's, B = 0, and D C = r2 std^2 everywhere, so that every sign is up.

    The first row of C and the first column of D hold sqrt(r2) ``std``, the other columns of D are 0. The other rows of C
    stay Gaussian, so that those columns have a gradient, as LoRA's B has by its A. Steps of the size of a learning rate
    (Adam's) move D C by up to their number times rate times the sum over a column of |C|, which grows as r2 does: no
    sign turns before std / (2 rate) of them.
    """
    A.uniform_(-1, 1, generator=generator).div_(math.sqrt(A.shape[1]))
    B.zero_()
    C[0] = math.sqrt(len(C)) * std
    D.zero_()
    D[:, 0] = C[0, 0]


def draw_signs(seed: int, out_features: int, in_features: int) -> Tensor:
    """[out, in] int8 of +-1 with equal chance: the frozen direction of the paper's Setting 3 (appendix B.1)."""
    generator = torch.Generator("cpu").manual_seed(seed + 1)
    bits = torch.randint(0, 2, (out_features, in_features), generator=generator, dtype=torch.int8, device="cpu")
    return bits * 2 - 1
