"""llama.cpp's own server inside this process (package xllamacpp), and a merged model as the GGUF file that it reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

NAMES = {  # of a layer of the LLaMA architecture, in GGUF files and in transformers
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def write_gguf(model, like: Path, output: Path) -> Path:
    """The weights of a LLaMA ``model`` in float32, with the metadata (tokenizer, sizes) of the GGUF file ``like``."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(like)
    writer = GGUFWriter(output, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        of = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, of)
    writer.add_file_type(0)  # all in float32
    state = model.state_dict()
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for tensor in reader.tensors:
        layer, short = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()
        W = state[f"model.layers.{layer}.{NAMES[short]}.weight" if layer else f"{OUTSIDE[short]}.weight"].float()
        if short in heads:  # rotary pairs lie side by side here, and half a head apart in transformers
            W = W.reshape(heads[short], 2, -1, W.shape[1]).transpose(1, 2).reshape(W.shape)
        writer.add_tensor(tensor.name, W.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


class Llama:
    """A GGUF model under GGUF LoRAs, by number; computed in float32 throughout, also its cache of keys and values.

    Raises RuntimeError where llama.cpp does not load one of the files.
    """

    def __init__(self, model: Path, loras: Sequence[Path] = ()) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(model), 256, 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup, params.fit_params, params.cpuparams.n_threads, params.verbosity = False, False, 1, 1
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0) for path in loras]
        self.server, self.loras = xllamacpp.Server(params), len(loras)

    def _ask(self, ids: list[int], lora: int | None, tokens: int, most: int) -> list[dict]:
        scales = [{"id": number, "scale": float(number == lora)} for number in range(self.loras)]
        options = {"temperature": 0, "cache_prompt": False, "lora": scales}
        answer = self.server.handle_completions({"prompt": ids, "n_predict": tokens, "n_probs": most, **options})
        return answer["choices"][0]["logprobs"]["content"]

    def greedy(self, ids: list[int], tokens: int, lora: int | None = None) -> list[int]:
        """At most so many; none after a token that ends the text."""
        return [token["id"] for token in self._ask(ids, lora, tokens, 1)]

    def logprobs(self, ids: list[int], lora: int | None = None) -> Tensor:
        """Log-probabilities of the next token, [vocabulary]."""
        (token,) = self._ask(ids, lora, 1, 1 << 20)
        told = {choice["id"]: choice["logprob"] for choice in token["top_logprobs"]}
        return torch.tensor([told[number] for number in range(len(told))])
