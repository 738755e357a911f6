"""LoRAs of many kinds on SmolLM2, as PEFT writes them, for what `check` says of each to be held against an engine."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def lora(place: Path, tensors: dict, **config) -> Path:
    """A LoRA on layers of SmolLM2 as PEFT writes it: ``tensors`` by their name below the model."""
    place.mkdir()
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    plain |= {"bias": "none", "init_lora_weights": True, "base_model_name_or_path": "builtin:smollm2-135m"}
    told = {key: value for key, value in {**plain, **config}.items() if value is not None}
    (place / "adapter_config.json").write_text(json.dumps(told))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, place / "adapter_model.safetensors", metadata={"format": "pt"})
    return place


def factors(module: str, out: int, width: int = 576, rank: int = 2) -> dict:
    A, B = torch.randn(rank, width), torch.randn(out, rank)
    return {f"{module}.lora_A.weight": A * 0.1, f"{module}.lora_B.weight": B * 0.1}


Q = "model.layers.0.self_attn.q_proj"
CASES = {
    "plain": (factors(Q, 576), {}),
    "rsLoRA": (factors(Q, 576), {"use_rslora": True}),
    "patterns": (factors(Q, 576, rank=5), {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 7}}),
    "rank_pattern": (factors(Q, 576, rank=5), {"rank_pattern": {"q_proj": 5}}),
    "gaussian": (factors(Q, 576), {"init_lora_weights": "gaussian"}),
    "k without q and v": (factors(Q.replace("q_", "k_"), 192), {"target_modules": ["k_proj"]}),
    "up without gate": (factors("model.layers.0.mlp.up_proj", 1536), {"target_modules": ["up_proj"]}),
    "no target_modules": (factors(Q, 576), {"target_modules": None}),
    "DoRA": (
        {**factors(Q, 576), f"{Q}.lora_magnitude_vector.weight": torch.ones(576)},
        {"use_dora": True},
    ),
    "bias": ({**factors(Q, 576), f"{Q}.bias": torch.ones(576)}, {"bias": "lora_only"}),
    "lora_bias": (factors(Q, 576), {"lora_bias": True}),
    "modules_to_save": ({**factors(Q, 576), "model.norm.weight": torch.ones(576)}, {"modules_to_save": ["norm"]}),
    "new tokens": (
        {**factors(Q, 576), "model.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(2, 576)},
        {"trainable_token_indices": [7, 8]},
    ),
    "PiSSA": (factors(Q, 576), {"init_lora_weights": "pissa"}),
    "aLoRA": (factors(Q, 576), {"alora_invocation_tokens": [1, 2]}),
    "layer_replication": (factors(Q, 576), {"layer_replication": [[0, 30], [0, 2]]}),
    "QALoRA": (factors(Q, 576), {"use_qalora": True}),
    "rank 513": (factors(Q, 576, rank=513), {"r": 513}),
    "embeddings": (
        {
            "model.embed_tokens.lora_embedding_A": torch.randn(2, 49152) * 0.1,
            "model.embed_tokens.lora_embedding_B": torch.randn(576, 2) * 0.1,
        },
        {"target_modules": ["embed_tokens"]},
    ),
    "head": (factors("lm_head", 49152), {"target_modules": ["lm_head"]}),
    "convolution": (
        {f"{Q}.lora_A.weight": torch.randn(2, 576, 1, 1), f"{Q}.lora_B.weight": torch.randn(576, 2, 1, 1)},
        {},
    ),
}
