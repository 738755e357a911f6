"""Adapters on model classes of transformers of many kinds: trained or named, merged, saved, copied, to the bit.

The whole of transformers goes through the same checks by ``make architectures``; see docs/support.md.
"""

from __future__ import annotations

import pytest
from architectures import build, checks

CLASSES = [
    ("gpt2", "GPT2LMHeadModel"),  # Conv1D, tied
    ("mixtral", "MixtralForCausalLM"),  # fused experts
    ("gemma3_text", "Gemma3ForCausalLM"),  # scaled embeddings, layers of two kinds
    ("falcon", "FalconForCausalLM"),  # linear layers with a forward of their own
    ("mamba", "MambaForCausalLM"),  # reads the weights of dt_proj and conv1d
    ("albert", "AlbertForMaskedLM"),  # one layer, used again and again
    ("mobilebert", "MobileBertForMaskedLM"),  # reads the weights of its head
    ("bart", "BartForConditionalGeneration"),  # three tied modules
    ("t5", "T5ForConditionalGeneration"),  # shared
    ("wav2vec2", "Wav2Vec2ForCTC"),  # writes into outputs
    ("wavlm", "WavLMForCTC"),  # reads the weights of its projections
    ("whisper", "WhisperForConditionalGeneration"),
    ("resnet", "ResNetForImageClassification"),
    ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
]
OF_NN = ("falcon", "albert", "mobilebert", "bart", "wavlm")
CASES = [(*each, "duallora") for each in CLASSES] + [(*each, "nn") for each in CLASSES if each[0] in OF_NN]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model_type", "name", "method"), CASES)
def test_every_layer_trains_or_is_named_and_what_is_merged_saved_or_copied_computes_the_same(model_type, name, method):
    found = checks.examine(build.small(model_type, name), method)
    assert found["targets"]
    assert checks.faults(found) == []
