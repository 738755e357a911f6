"""A training step of a whole language model, set up alike for every method."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duallora.bench import methods
from duallora.bench.store import default_device
from duallora.errors import ConfigError, NonFiniteError
from duallora.store.models import load_model
from duallora.tasks import encode_split, load_data
from duallora.tasks.encode import IGNORE, Collator

LEARNING_RATE = 1e-5  # small: the hundreds of steps of a benchmark must not lead anywhere


@dataclass(frozen=True)
class Scene:
    """What is trained on what.

    rank: Dual LoRA's r; LoRA and the others have 2r.
    masked: rows of `builtin:docstrings` with the loss on the answers and padding, as in training; else random tokens
        [rows, length] with the loss on all of them, so that no row of dY is zero and dropping zeros gains nothing.
    """

    model: str = "builtin:smollm2-135m"
    rank: int = 8
    rows: int = 8
    length: int = 128
    dtype: str = "float32"
    checkpointing: bool = False
    masked: bool = False
    device: str | None = None


class Trial(NamedTuple):
    step: Callable[[], None]
    parameters: int


class Stage:
    """The base model and one batch; `trial` puts a method on a copy that shares the base weights."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.device = default_device(scene.device)
        dtype: Any = scene.dtype
        base, tokenizer = load_model(scene.model, "generate", dtype=dtype)
        self.base = base.to(self.device).requires_grad_(False)
        self.batch = _masked(scene, tokenizer) if scene.masked else _full(scene, self.base.config.vocab_size)
        self.batch = {name: tensor.to(self.device) for name, tensor in self.batch.items()}

    def names(self) -> list[str]:
        """Every method here, the floor first."""
        return [methods.FLOOR, *self._methods()]

    def _methods(self) -> Mapping[str, methods.Method]:
        return methods.methods(self.scene.rank, "all-linear", getattr(torch, self.scene.dtype))

    def trial(self, name: str, *, capturable: bool = False) -> Trial:
        """A training step (forward, backward, AdamW) under the method of that name.

        ``capturable``, on a GPU: nothing in it waits for the device, so that it can become a CUDA graph.
        """
        if name not in self.names():
            raise ConfigError(f"no method {name!r}: expected one of {', '.join(self.names())}")
        model = share(self.base)
        if self.scene.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = bare(model) if name == methods.FLOOR else methods.adapt(model, self._methods()[name])
        model.train()
        optimizer = torch.optim.AdamW(methods.trained(model), lr=LEARNING_RATE, capturable=capturable)

        def step() -> None:
            loss = model(**self.batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if not capturable and not torch.isfinite(loss):
                raise NonFiniteError(f"{name}: the loss is {loss.item()}; its times would mean nothing")

        return Trial(step, 0 if name == methods.FLOOR else methods.count(model))

    def model_bytes(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self.base.parameters())

    def facts(self) -> dict[str, Any]:
        """Shape of the batch and the shares of its tokens that carry loss or are padding."""
        labels, mask = self.batch["labels"], self.batch["attention_mask"]
        return {
            "tokens": list(labels.shape),
            "trained_share": float((labels != IGNORE).float().mean()),
            "padding_share": float((mask == 0).float().mean()),
        }


def share(model: nn.Module) -> Any:
    """A copy of the modules over the very same weights: ten methods fit where one model does."""
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


def _full(scene: Scene, vocabulary: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (scene.rows, scene.length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def _masked(scene: Scene, tokenizer: Any) -> dict[str, Tensor]:
    examples = list(load_data("builtin:docstrings").splits["train"])
    chosen = random.Random(0).sample(examples, scene.rows)
    rows, _ = encode_split(chosen, tokenizer, "generate", max_length=scene.length)
    return Collator(tokenizer)(rows)


class _ThreeProducts(torch.autograd.Function):
    """y = x W^T, dx = dY W, and G = dY^T x, which is computed and thrown away."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(x, W)
        return F.linear(x, W)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> Any:  # type: ignore[override]
        x, W = ctx.saved_tensors
        _ = dY.flatten(0, -2).T @ x.flatten(0, -2)
        return dY @ W if ctx.needs_input_grad[0] else None, None, None


class _BareLinear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.anchor = nn.Parameter(torch.zeros((), device=linear.weight.device))  # so that autograd comes by

    def forward(self, x: Tensor) -> Tensor:
        y = _ThreeProducts.apply(x, self.linear.weight, self.anchor)
        return y if self.linear.bias is None else y + self.linear.bias


def bare(model: Any) -> Any:
    """The floor: every linear layer but the head does the three products and nothing else."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child is not head and not isinstance(parent, _BareLinear):
                setattr(parent, name, _BareLinear(child))
    return model
