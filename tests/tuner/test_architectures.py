"""Adapters on model classes of transformers of many kinds: trained or named, merged, saved, copied, to the bit.

The whole of transformers goes through the same checks by ``make architectures``; see docs/support.md.
"""

from __future__ import annotations

import pytest
from architectures import build, checks

CLASSES = [
    ("gpt2", "GPT2LMHeadModel", "linear head positions"),  # Conv1D, tied
    ("mixtral", "MixtralForCausalLM", "linear"),  # fused experts
    ("gemma3_text", "Gemma3ForCausalLM", "linear embeddings"),  # scaled embeddings, layers of two kinds
    ("falcon", "FalconForCausalLM", "linear"),  # linear layers with a forward of their own
    ("mamba", "MambaForCausalLM", "linear convolutions"),  # reads the weights of dt_proj and conv1d
    ("albert", "AlbertForMaskedLM", "linear embeddings"),  # one layer, used again and again
    ("mobilebert", "MobileBertForMaskedLM", "linear head"),  # reads the weights of its head
    ("bart", "BartForConditionalGeneration", "head embeddings positions"),  # three tied modules
    ("t5", "T5ForConditionalGeneration", "linear head"),  # shared
    ("wav2vec2", "Wav2Vec2ForCTC", "linear convolutions"),  # writes into outputs
    ("wavlm", "WavLMForCTC", "linear"),  # reads the weights of its projections
    ("whisper", "WhisperForConditionalGeneration", "convolutions positions"),
    ("resnet", "ResNetForImageClassification", "convolutions"),
    ("qwen2_vl", "Qwen2VLForConditionalGeneration", "linear"),
]
OF_NN = ("falcon", "albert", "mobilebert", "bart", "wavlm")
CASES = [(*each, "duallora") for each in CLASSES] + [(*each, "nn") for each in CLASSES if each[0] in OF_NN]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model_type", "name", "sets", "method"), CASES)
def test_every_layer_trains_or_is_named_and_what_is_merged_saved_or_copied_computes_the_same(
    model_type, name, sets, method
):
    found = checks.examine(build.small(model_type, name), method, sets)
    assert found["targets"]
    assert checks.faults(found) == []
