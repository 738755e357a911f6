from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def build_llama(dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    """A fresh 2-layer LLaMA, hidden 36, with grouped heads and biases; the same weights every time."""
    torch.manual_seed(0)
    shape = {"vocab_size": 67, "hidden_size": 36, "intermediate_size": 63, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "attention_bias": True, "attn_implementation": "eager"}
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **heads, **changes})).to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # biases are 0 and weights small in a fresh model
            p.add_(torch.randn(p.shape) * (0.05 if name.endswith("bias") else 0.02))
    return model


@pytest.fixture
def llama():
    return build_llama


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows of 11 tokens, the second with 3 of padding on the left; 5 prompt tokens in front of the answers."""
    ids = torch.randint(0, 67, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    labels = ids.clone()
    labels[0, :5] = labels[1, :8] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Tiny(nn.Module):
    """One linear layer with a bias, in 10, out 7: where a formula can be read off."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(3)
        self.lin = nn.Linear(10, 7, dtype=dtype)

    def forward(self, x):
        return self.lin(x)


@pytest.fixture
def tiny():
    return Tiny


@pytest.fixture
def train():
    """A few optimizer steps with the method's own optimizer; the losses before each and after the last."""

    def run(adapted, batch, steps: int = 2, lr: float = 5e-3) -> list[float]:
        optimizer = adapted.optimizer(lr)
        adapted.model.train()
        losses = []
        for _ in range(steps):
            loss = adapted.model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        adapted.model.eval()
        with torch.no_grad():
            return [*losses, adapted.model(**batch).loss.item()]

    return run
