from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


@pytest.fixture
def llama():
    """A fresh 2-layer LLaMA with grouped heads; the same weights every time."""

    def build(dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
        torch.manual_seed(0)
        shape = {"vocab_size": 67, "hidden_size": 36, "intermediate_size": 63, "num_hidden_layers": 2}
        config = LlamaConfig(
            **{**shape, "num_attention_heads": 6, "num_key_value_heads": 2, "attention_bias": True, **changes}
        )
        return LlamaForCausalLM(config).to(dtype).eval()

    return build


@pytest.fixture
def gpt2():
    """A fresh 2-layer GPT-2: its projections are Conv1D, stored [in, out]."""

    def build() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=67, n_embd=36, n_layer=2, n_head=6, n_positions=32, resid_pdrop=0.0)
        return GPT2LMHeadModel(config).eval()

    return build


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 67, (3, 11), generator=torch.Generator().manual_seed(1))
