"""What TRL hands to vLLM in a reinforcement loop is W0 + dW under the base model's names, and W0 is back after it, to the bit."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from duallora import DualLoraConfig

generation = pytest.importorskip("trl.generation.vllm_generation")
if not hasattr(generation.VLLMGeneration, "_iter_named_params"):
    pytest.skip("this TRL walks the weights otherwise", allow_module_level=True)


def small():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_the_weights_that_vllm_is_given_are_the_merged_ones(options):
    base = small()
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    model = get_peft_model(base, DualLoraConfig(r=4, target_modules="all-linear", init_weights=False, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted = model(ids).logits
    sync = generation.VLLMGeneration.__new__(generation.VLLMGeneration)
    sync.model = model
    sync._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: contextlib.nullcontext())
    given = {name: weight.clone() for name, weight in sync._iter_named_params()}
    assert given.keys() == before.keys()
    engine = small()
    engine.load_state_dict(given)
    with torch.no_grad():
        assert torch.equal(engine(ids).logits, wanted)
        assert torch.equal(model(ids).logits, wanted)
    with model.disable_adapter():
        for name, weight in base.named_parameters():
            plain = name.replace(".base_layer", "").replace("original_module.", "")
            if plain in before and "modules_to_save.default" not in name:
                assert torch.equal(weight, before[plain]), name
