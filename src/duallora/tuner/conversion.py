"""A Dual LoRA adapter's layers as plain LoRA: per layer the product B A of rank k that is nearest to dW [out, in].

Nearest in the outputs on some data, min |(dW - B A) C^(1/2)|_F with C the second moment of the layer's inputs
(:mod:`duallora.tuner.moments`), or in the weights, C = 1. With S S^T = C + SHRINKAGE mean(diag C), scaled to a mean diagonal
of 1, both are the theorem of Eckart and Young for dW S, from the smaller Gram matrix in float64:

    out >= in    (dW S)^T dW S = V diag(e) V^T, e falling      B = dW S V_k      A = V_k^T S^-1
    out <  in    dW S (dW S)^T = U diag(e) U^T                 B = U_k           A = U_k^T dW

|(dW - B A) S|_F^2 = e_{k+1} + ... Whatever the rounding of e, V and U are orthonormal: nothing is divided by a small
singular value, and at full rank B A = dW. dW is that of the gate as saved; with DoRA it is W' - W0.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from duallora.errors import ConfigError, NonFiniteError, check_rank
from duallora.tuner.conv import TORCH as CONVOLUTIONS
from duallora.tuner.experts import Expert, Experts
from duallora.tuner.layer import DualLoraLayer
from duallora.tuner.moments import Batches, Moments, in_groups, second_moments

Layers = Mapping[str, Any]  # Dual LoRA layers, and experts one by one

ROWS = 8192  # of dW that are widened to float64 at a time
FLOOR = 1e-12  # share of |dW S|^2 below which an eigenvalue is rounding
SHRINKAGE = 1e-3  # of C towards the unit matrix: what the rows have not shown may still come


class Converted(NamedTuple):
    """One layer: its LoRA tensors by name, and how near B A is to dW, both times S: see the module's words."""

    name: str
    tensors: dict[str, Tensor]
    shape: tuple[int, int]
    """(out, in) of dW; a convolution's kernel counts to its inputs."""
    rank: int
    rank_99: int
    """The rank that would keep 99 % of |dW S|_F^2."""
    square: float
    """|dW S|_F^2."""
    lost: float
    """|(dW - B A) S|_F^2 with the factors as they are stored."""
    tokens: int | None
    """Of how many vectors C is the mean; None where it was not asked for, 0 where the layer saw none and C = 1."""
    e: Tensor
    """The squared singular values of dW S, falling."""

    def facts(self) -> dict[str, Any]:
        energy, error = kept(self.square, self.lost)
        facts = {"name": self.name, "shape": list(self.shape), "rank": self.rank, "rank_99": self.rank_99}
        return facts | {"energy": energy, "relative_error": error}


def kept(square: float, lost: float) -> tuple[float, float]:
    """(share of |dW S|_F^2 kept, |(dW - B A) S|_F / |dW S|_F); a dW of zero is kept whole."""
    return (1 - lost / square, (lost / square) ** 0.5) if square else (1.0, 0.0)


def convert(
    model: PeftModel,
    batches: Iterable[Mapping[str, Any]] | None,
    rank: int,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Returns the active Dual LoRA adapter as a plain LoRA: its configuration and tensors, as PEFT saves them.

    Args:
        model: holds the adapter; it is left as it is.
        batches: a few batches of the adapter's own kind of data, each what ``model(**batch)`` takes; some thousand tokens
            do. The outputs on them are kept as near as the rank allows. None keeps the weights near instead, which
            can take four times the rank for the same outputs (docs/serving.md).
        rank: that of every layer, from 1; layers with fewer dimensions are padded with zeros. lora_alpha is equal to it,
            so that the scale is 1.
        dtype: of the tensors; None is that of dW, float32 at least.

    Raises:
        ConfigError: there is no Dual LoRA layer, a layer is of a kind that no LoRA can hold, or a batch does not fit.
        NonFiniteError: a dW, a factor in ``dtype`` or what a layer reads is NaN or infinite.

    Example:
        >>> config, tensors = duallora.convert(model, batches, 16)
        >>> lora = get_peft_model(base, config)
        >>> set_peft_model_state_dict(lora, tensors)
    """
    check_rank("rank", rank)
    adapter = model.active_adapter
    layers = {name: layer for name, layer in dual_layers(model).items() if adapter in layer.duallora_A}
    if not layers:
        raise ConfigError(f"the adapter {adapter!r} has no Dual LoRA layer: expected a model that get_peft_model made")
    given = None if batches is None else list(batches)
    done = list(convert_layers(model, layers, rank, given, dtype, adapter))
    if said := too_few(done):
        warnings.warn(said, stacklevel=2)
    return lora_config(model, layers, rank, adapter), together(done) | carried(model, adapter)


def dual_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by their name in the base model; fused experts one by one, as ``name[number]``.

    Raises ConfigError for experts where PEFT's LoRA has them in another layout (before 0.19).
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found: dict[str, Any] = {}
    for name, module in base.named_modules():
        if isinstance(module, Experts):
            if tuple(map(int, peft.__version__.split(".")[:2])) < (0, 19):
                raise ConfigError(
                    f"{name}: LoRA on experts in PEFT {peft.__version__} has another layout: upgrade to peft >= 0.19"
                )
            found |= {f"{name}[{expert.number}]": expert for expert in module.singly()}
        elif isinstance(module, DualLoraLayer):
            found[name] = module
    return found


def together(done: Iterable[Converted]) -> dict[str, Tensor]:
    """The tensors of all layers, those of experts as PEFT's LoRA stacks them: A [experts * r, in], B [out, r * experts],
    r the slower."""
    tensors = {name: tensor for layer in done for name, tensor in layer.tensors.items()}
    plain = {name: tensor for name, tensor in tensors.items() if "[" not in name}
    fused: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name in tensors.keys() - plain.keys():
        layer, number, leaf = re.split(r"\[(\d+)\]", name)
        fused[layer + leaf][int(number)] = tensors[name]
    for name, factors in fused.items():
        ordered = [factors[e] for e in range(len(factors))]
        plain[name] = torch.cat(ordered) if "lora_A" in name else torch.stack(ordered, -1).flatten(1)
    return plain


def with_moments(
    model: nn.Module, layers: Layers, batches: Batches | None
) -> Iterator[tuple[str, Any, Moments | None]]:
    """Each layer with C of what it reads, a bounded group of them per pass over ``batches``; None without any."""
    if batches is None:
        yield from ((name, layer, None) for name, layer in layers.items())
        return
    for name, layer in layers.items():
        if isinstance(layer, Expert):  # what it reads is cut out inside of the model's own forward
            yield name, layer, Moments(torch.zeros(0), 0)
    for group in in_groups({name: layer for name, layer in layers.items() if not isinstance(layer, Expert)}):
        found = second_moments(model, group, batches)
        for name in group:
            yield name, layers[name], found.pop(name)


def convert_layers(
    model: nn.Module,
    layers: Layers,
    rank: int | Mapping[str, int],
    batches: Batches | None = None,
    dtype: torch.dtype | None = None,
    adapter: str = "default",
) -> Iterator[Converted]:
    """The layers as `convert_layer` has them, in their order; ``rank`` of all, or of each by its name."""
    for name, layer, moments in with_moments(model, layers, batches):
        yield convert_layer(name, layer, rank if isinstance(rank, int) else rank[name], dtype, moments, adapter)


@torch.no_grad()
def convert_layer(
    name: str,
    layer: Any,
    rank: int,
    dtype: torch.dtype | None = None,
    moments: Moments | None = None,
    adapter: str = "default",
) -> Converted:
    """The layer's LoRA factors; ``dtype=None`` is that of its own, float32 at least.

    Raises:
        ConfigError: a convolution that PEFT's LoRA does not follow (groups, dilation, padding mode).
        NonFiniteError: dW or a factor is NaN or infinite.
    """
    base = layer.get_base_layer()
    _refuse_odd_convolution(name, base)
    M = delta_matrix(name, layer, adapter)
    S = root(moments)
    *factors, e = low_rank(M, rank, S)
    stored = dtype or M.dtype
    A, B = (factor.to(stored) for factor in factors)
    if not bool(torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise NonFiniteError(f"{name}: its factors overflow in {stored}; use --dtype bfloat16 or float32")
    square = lost = 0.0
    right = A.double()
    for rows, left in zip(M.to(A.device).split(ROWS), B.split(ROWS), strict=True):
        wide = rows.double()
        square += float(_times(wide, S).square().sum())
        lost += float(_times(wide - left.double() @ right, S).square().sum())
    A, B = A.cpu().contiguous(), B.cpu().contiguous()
    prefix = f"base_model.model.{name}"
    if isinstance(base, nn.Embedding):
        tensors = {f"{prefix}.lora_embedding_A": A, f"{prefix}.lora_embedding_B": B}
    else:
        if isinstance(base, CONVOLUTIONS):
            A = A.reshape(rank, *base.weight.shape[1:])
            B = B.reshape(*B.shape, *[1] * (base.weight.dim() - 2))
        tensors = {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}
    tokens = None if moments is None else moments.tokens
    return Converted(name, tensors, (M.shape[0], M.shape[1]), rank, rank_for(e, 0.99), square, lost, tokens, e)


def too_few(done: Iterable[Converted]) -> str:
    """What to say where the rows cannot settle the rank asked for; '' where they can."""
    layers = list(done)
    blind = [layer.name for layer in layers if layer.tokens == 0]
    short = [layer for layer in layers if layer.tokens and layer.tokens < min(layer.rank, *layer.shape)]
    said = []
    if short:
        fewest = min(short, key=lambda layer: layer.tokens or 0)
        said.append(
            f"{fewest.name} read {fewest.tokens} tokens of the calibration rows, fewer than the rank {fewest.rank}: the rest "
            "of its rank keeps weights; give more rows"
        )
    if blind:
        said.append(
            f"{len(blind)} layers are fused experts or read none of the calibration rows, and keep weights (first: {blind[0]})"
        )
    return "; ".join(said)


def delta_matrix(name: str, layer: Any, adapter: str = "default") -> Tensor:
    """dW as the matrix [out, in] that LoRA's B A stands for: an embedding's is [dim, tokens], a kernel is flattened.

    Raises NonFiniteError if it holds NaN or infinities.
    """
    dW = layer.get_delta_weight(adapter)
    if not bool(torch.isfinite(dW).all()):
        raise NonFiniteError(f"dW of {name} holds NaN or infinite values: the adapter is broken; nothing was written")
    base = layer.get_base_layer()
    if isinstance(base, CONVOLUTIONS):
        return dW.flatten(1)
    if isinstance(base, nn.Embedding) or layer.fan_in_fan_out:
        return dW.T
    return dW


def root(moments: Moments | None) -> Tensor | None:
    """S with S S^T = C + SHRINKAGE mean(diag C), over the mean diagonal: lower triangular [in, in], or [in] where C is
    diagonal, float64. None stands for the unit matrix: there is no C, or it is zero."""
    if moments is None or moments.tokens == 0:
        return None
    C = moments.C
    diagonal = C if C.ndim == 1 else C.diagonal()
    mean = diagonal.mean()
    if float(mean) == 0:
        return None
    if C.ndim == 1:
        return (C / mean + SHRINKAGE).sqrt()
    C = C / mean
    C.diagonal().add_(SHRINKAGE)
    return torch.linalg.cholesky(C)


def eigenvalues(M: Tensor, S: Tensor | None = None) -> Tensor:
    """The squared singular values of M S, for M [m, n], falling, float64 on the CPU."""
    return torch.linalg.eigvalsh(_gram(M, S)).flip(0).clamp(min=0).cpu()


def rank_for(e: Tensor, energy: float) -> int:
    """The smallest k with which the k largest of the falling ``e`` hold that share of their sum; 0 if all are 0."""
    total = float(e.sum())
    if total == 0:
        return 0
    tail = e.flip(0).cumsum(0).flip(0)  # summed from the small end; tail[k] is lost with rank k
    return int((tail > max(1 - energy, FLOOR) * total).sum())


def low_rank(M: Tensor, rank: int, S: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(A [rank, n], B [m, rank], e): (M - B A) S is the smallest, zero-padded beyond min(m, n); float64.

    ``S``: of `root`, [n, n] or [n]. ``e``: the squared singular values of M S.
    """
    e, V = torch.linalg.eigh(_gram(M, S))
    e, V = e.flip(0).clamp(min=0), V.flip(1)[:, :rank]
    tall = M.shape[0] >= M.shape[1]
    right = V
    if tall and S is not None:
        right = S[:, None] * V if S.ndim == 1 else S @ V
    P = torch.cat([rows.double() @ right for rows in (M if tall else M.T).to(V.device).split(ROWS)])
    B, A = (P, _divided(V.T, S)) if tall else (V, P.T)
    padding = rank - A.shape[0]
    if padding > 0:
        A, B = nn.functional.pad(A, (0, 0, 0, padding)), nn.functional.pad(B, (0, padding))
    return A, B, e.cpu()


def _times(X: Tensor, S: Tensor | None) -> Tensor:
    """X S."""
    if S is None:
        return X
    return X * S if S.ndim == 1 else X @ S


def _divided(X: Tensor, S: Tensor | None) -> Tensor:
    """X S^-1."""
    if S is None:
        return X
    return X / S if S.ndim == 1 else torch.linalg.solve_triangular(S, X, upper=False, left=False)


def _gram(M: Tensor, S: Tensor | None = None) -> Tensor:
    """(M S)^T M S, or M S (M S)^T where that is smaller, in float64."""
    if M.shape[0] >= M.shape[1]:
        return _times(_times(_gram_of_columns(M), S).T, S)
    if S is None or S.ndim == 1:
        return _gram_of_columns(M.T, S)
    wide = M.to(S.device).double() @ S
    return wide @ wide.T


def _gram_of_columns(M: Tensor, scales: Tensor | None = None) -> Tensor:
    """M^T M, each row of M times its scale first."""
    if M.device.type == "mps":  # has no float64
        M = M.cpu()
    G = torch.zeros(M.shape[1], M.shape[1], dtype=torch.float64, device=M.device)
    for at in range(0, len(M), ROWS):
        rows = M[at : at + ROWS].double()
        if scales is not None:
            rows = rows * scales[at : at + ROWS, None]
        G.addmm_(rows.T, rows)
    return G


def smallest_ranks(model: nn.Module, layers: Layers, energy: float, batches: Batches | None = None) -> dict[str, int]:
    """Per layer the smallest rank, at least 1, with which it keeps ``energy`` of its |dW S|_F^2."""
    found = with_moments(model, layers, batches)
    return {name: max(1, rank_for(eigenvalues(delta_matrix(name, layer), root(C)), energy)) for name, layer, C in found}


def most_useful_rank(layers: Layers) -> int:
    """min(out, in) of the widest layer: no layer has more."""
    factors = [(layer.duallora_A["default"], layer.duallora_B["default"]) for layer in layers.values()]
    return max(min(A.shape[1], B.shape[0]) for A, B in factors)


def _refuse_odd_convolution(name: str, base: nn.Module) -> None:
    if not isinstance(base, CONVOLUTIONS):
        return
    followed = {"groups": 1, "dilation": (1,) * len(base.dilation), "padding_mode": "zeros"}
    for what, value in followed.items():
        if getattr(base, what) != value:
            raise ConfigError(
                f"{name} is a {type(base).__name__} with {what}={getattr(base, what)}, which PEFT's LoRA does not follow: "
                "no plain LoRA equals this adapter. Use duallora merge instead"
            )


def lora_config(
    model: PeftModel, layers: Iterable[str], rank: int | Mapping[str, int], adapter: str = "default"
) -> LoraConfig:
    """The configuration of the conversion: the layers by their last part where that selects no other module.

    ``rank`` is that of all layers, or of each by its name: the largest is r, the others patterns. alpha is the rank.
    """
    most = rank if isinstance(rank, int) else max(rank.values())
    others = {} if isinstance(rank, int) else {name: own for name, own in rank.items() if own != most}
    config: Any = model.peft_config[adapter]
    names = [name for name in layers if "[" not in name]  # experts are target_parameters
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    base = model.get_base_model()
    selected = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in suffixes]
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        r=most,
        lora_alpha=most,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=suffixes if len(selected) == len(names) else sorted(names),
        target_parameters=config.target_parameters,
        trainable_token_indices=config.trainable_token_indices,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in dual_layers(model).values()),
        bias={"duallora_only": "lora_only"}.get(config.bias, config.bias),
        modules_to_save=list(dict.fromkeys(config.modules_to_save)) if config.modules_to_save else None,
    )


def carried(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """What was trained in full, heads and biases, by its name in the file."""
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: t.detach().cpu().contiguous().clone() for name, t in state.items() if "duallora_" not in name}
