"""Shapes of known models, so that planning for them needs no download.

Values are those of ``config.json`` in the repository named first on each line; what is not listed is the default of
transformers for that model type. Only what sets shapes and memory is here: no rotary scaling, no token ids.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from duallora.errors import ConfigError
from duallora.store.models import BUILTIN, load_config


def _llama(hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, **more: Any) -> dict[str, Any]:
    """A decoder of Llama's family: the values under transformers' names."""
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, **more,
    }  # fmt: skip


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads}


def _encoder(hidden: int, mlp: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads, **more
    }  # fmt: skip


_QWEN = {"model_type": "qwen2"}
_TIED = {"tie_word_embeddings": True}
_ROBERTA = {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_DEBERTA: dict[str, Any] = {
    "model_type": "deberta-v2", "vocab_size": 128100, "type_vocab_size": 0, "max_position_embeddings": 512,
    "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "max_relative_positions": -1,
}  # fmt: skip

# name -> (repository on the hub, values)
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-7b": ("huggyllama/llama-7b", _llama(4096, 11008, 32, 32, 32, 32000)),
    "llama-13b": ("huggyllama/llama-13b", _llama(5120, 13824, 40, 40, 40, 32000)),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", _llama(4096, 11008, 32, 32, 32, 32000)),
    "llama-2-13b": ("meta-llama/Llama-2-13b-hf", _llama(5120, 13824, 40, 40, 40, 32000)),
    "llama-2-70b": ("meta-llama/Llama-2-70b-hf", _llama(8192, 28672, 80, 64, 8, 32000)),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", _llama(4096, 14336, 32, 32, 8, 128256)),
    "llama-3-70b": ("meta-llama/Meta-Llama-3-70B", _llama(8192, 28672, 80, 64, 8, 128256)),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", _llama(4096, 14336, 32, 32, 8, 128256)),
    "llama-3.1-70b": ("meta-llama/Llama-3.1-70B", _llama(8192, 28672, 80, 64, 8, 128256)),
    "llama-3.1-405b": ("meta-llama/Llama-3.1-405B", _llama(16384, 53248, 126, 128, 8, 128256)),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", _llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, **_TIED)),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", _llama(3072, 8192, 28, 24, 8, 128256, head_dim=128, **_TIED)),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", _llama(4096, 14336, 32, 32, 8, 32000, model_type="mistral")),
    "mistral-7b-v0.3": ("mistralai/Mistral-7B-v0.3", _llama(4096, 14336, 32, 32, 8, 32768, model_type="mistral")),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", _llama(896, 4864, 24, 14, 2, 151936, **_QWEN, **_TIED)),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B", _llama(1536, 8960, 28, 12, 2, 151936, **_QWEN, **_TIED)),
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B", _llama(2048, 11008, 36, 16, 2, 151936, **_QWEN, **_TIED)),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", _llama(3584, 18944, 28, 28, 4, 152064, **_QWEN)),
    "qwen2.5-14b": ("Qwen/Qwen2.5-14B", _llama(5120, 13824, 48, 40, 8, 152064, **_QWEN)),
    "qwen2.5-32b": ("Qwen/Qwen2.5-32B", _llama(5120, 27648, 64, 40, 8, 152064, **_QWEN)),
    "qwen2.5-72b": ("Qwen/Qwen2.5-72B", _llama(8192, 29568, 80, 64, 8, 152064, **_QWEN)),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", _llama(576, 1536, 30, 9, 3, 49152, **_TIED)),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M", _llama(960, 2560, 32, 15, 5, 49152, **_TIED)),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B", _llama(2048, 8192, 24, 32, 32, 49152, **_TIED)),
    "gpt2": ("openai-community/gpt2", _gpt2(768, 12, 12)),
    "gpt2-medium": ("openai-community/gpt2-medium", _gpt2(1024, 24, 16)),
    "gpt2-large": ("openai-community/gpt2-large", _gpt2(1280, 36, 20)),
    "gpt2-xl": ("openai-community/gpt2-xl", _gpt2(1600, 48, 25)),
    "roberta-base": ("FacebookAI/roberta-base", _encoder(768, 3072, 12, 12, **_ROBERTA)),
    "roberta-large": ("FacebookAI/roberta-large", _encoder(1024, 4096, 24, 16, **_ROBERTA)),
    "deberta-v3-base": ("microsoft/deberta-v3-base", _encoder(768, 3072, 12, 12, **_DEBERTA)),
    "deberta-v3-large": ("microsoft/deberta-v3-large", _encoder(1024, 4096, 24, 16, **_DEBERTA)),
    "deberta-v2-xxlarge": (
        "microsoft/deberta-v2-xxlarge",
        _encoder(1536, 6144, 48, 24, **_DEBERTA, conv_kernel_size=3, conv_act="gelu"),
    ),
}  # fmt: skip


def config_of(name: str) -> Any:
    """The transformers config of a known model (by short name or repository), a ``builtin:`` name, a folder or a hub id.

    Only the last of these may use the network, and then for the config alone.

    Raises:
        ConfigError: no such model; names the nearest.
    """
    by_repository = {repository.lower(): key for key, (repository, _) in KNOWN.items()}
    key = by_repository.get(name.lower(), name.lower())
    if key in KNOWN and not Path(name).is_dir():
        values = dict(KNOWN[key][1])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    if name.startswith("builtin:") or "/" in name or Path(name).expanduser().is_dir():
        return load_config(name)
    names = [*KNOWN, *BUILTIN]
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.0)
    raise ConfigError(
        f"unknown model {name!r}; nearest: {', '.join(near)}. Expected one of these, a folder with config.json, or a hub "
        f"id such as org/name. Known: {', '.join(names)}"
    )


def is_encoder(config: Any) -> bool:
    """Whether the model classifies rather than generates."""
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
