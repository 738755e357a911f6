"""Tiny random models in the place of those PEFT's tests fetch: a hub cache that is found without a network."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as t

REVISION = "0" * 40  # a cache names its snapshots by commit

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
GPT = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
OPT = {
    "vocab_size": 300, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "word_embed_proj_dim": 32,
}  # fmt: skip
T5 = {"vocab_size": 300, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": 300, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 256,
}  # fmt: skip
GEMMA = {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Hub id -> (model class, its configuration). Every id that a selected test of PEFT names.
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (t.OPTForCausalLM, t.OPTConfig(**OPT)),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (t.GPT2LMHeadModel, t.GPT2Config(**GPT)),
    "hf-internal-testing/tiny-random-gpt2": (t.GPT2LMHeadModel, t.GPT2Config(**GPT)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (t.GPTJForCausalLM, t.GPTJConfig(**GPT, rotary_dim=4)),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (t.LlamaForCausalLM, t.LlamaConfig(**GROUPED)),
    "peft-internal-testing/tiny-dummy-qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**GROUPED)),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (t.MistralForCausalLM, t.MistralConfig(**GROUPED)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (t.Gemma3ForCausalLM, t.Gemma3TextConfig(**GEMMA)),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        t.T5ForConditionalGeneration,
        t.T5Config(**T5, decoder_start_token_id=0),
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        t.BartForConditionalGeneration,
        t.BartConfig(**BART),
    ),
    "peft-internal-testing/tiny-random-BertModel": (t.BertModel, t.BertConfig(**SHAPE)),
    "peft-internal-testing/tiny-random-RobertaModel": (t.RobertaModel, t.RobertaConfig(**SHAPE)),
    "peft-internal-testing/tiny-random-DebertaModel": (t.DebertaModel, t.DebertaConfig(**SHAPE)),
    "peft-internal-testing/tiny-random-DebertaV2Model": (t.DebertaV2Model, t.DebertaV2Config(**SHAPE)),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        t.BertForSequenceClassification,
        t.BertConfig(**SHAPE),
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        t.RobertaForSequenceClassification,
        t.RobertaConfig(**SHAPE),
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        t.LlamaForSequenceClassification,
        t.LlamaConfig(**GROUPED, pad_token_id=0),
    ),
}


def build(hub: Path) -> None:
    """Write every model of ``MODELS`` into the hub cache ``hub``, if it is not there."""
    for name, (model_class, config) in MODELS.items():
        folder = hub / f"models--{name.replace('/', '--')}"
        if (folder / "refs" / "main").exists():
            continue
        config.update({name: value for name, value in TOKENS.items() if getattr(config, name, None) is None})
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder / "snapshots" / REVISION)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(REVISION)
