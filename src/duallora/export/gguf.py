"""A plain LoRA as the GGUF file that llama.cpp takes with --lora, written by the `gguf` package.

    general.type = adapter      adapter.type = lora      adapter.lora.alpha
    blk.0.attn_q.weight.lora_a [rank, in]      .lora_b [out, rank]      scale = alpha / rank

Names are those that `gguf` gives the base model's own tensors. Where the base's query and key rows are stored in another
order there (architecture "llama": the two halves of a head interleaved, as its rotation reads them), so are those of lora_b.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from duallora.errors import ConfigError, IntegrityError
from duallora.export import check
from duallora.store import adapters, models, untrusted

FILE = "adapter.gguf"
# transformers' model_type -> GGUF's architecture; others may store fused or transposed weights and are refused.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "phi3": "phi3",
}  # fmt: skip
INTERLEAVED = {"llama"}


def write(folder: Path) -> Path:
    """Writes the LoRA that lies in ``folder`` as ``adapter.gguf`` beside it and returns the path.

    Raises:
        ConfigError: llama.cpp takes no such adapter, or its base is of an architecture that is not known here.
        IntegrityError: a tensor belongs to no weight of the base, or the file does not read back as it was written.
    """
    import gguf

    config = untrusted.read(folder)
    if reasons := check.llamacpp(config, adapters.check_adapter(folder)).reasons:
        raise ConfigError(f"llama.cpp does not take this adapter: {'; '.join(reasons)}. Use duallora merge")
    base = models.load_config(adapters.base_name(folder), revision=config.get("revision"))
    architecture = ARCHITECTURES.get(base.model_type)
    if architecture is None:
        raise ConfigError(
            f"--format gguf: the base is a {base.model_type}, expected one of {', '.join(ARCHITECTURES)}. Use duallora merge, "
            "and convert the merged folder by llama.cpp's own convert_hf_to_gguf.py"
        )
    tensors = _named(load_file(folder / adapters.WEIGHTS), base, architecture)
    path = folder / FILE
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    if read.keys() != tensors.keys() or not all(np.array_equal(read[name], tensors[name]) for name in read):
        raise IntegrityError(f"{path} does not read back as it was written; nothing was kept")
    return path


def _named(stored: dict[str, Tensor], base: Any, architecture: str) -> dict[str, np.ndarray]:
    import gguf

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, base.num_hidden_layers)
    found = {}
    for name, tensor in stored.items():
        module, _, part = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        known = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if known is None:
            raise IntegrityError(
                f"{module} is no weight of a {architecture} model: expected an adapter of {base.model_type}"
            )
        if architecture in INTERLEAVED and part == "lora_B" and module.endswith(("q_proj", "k_proj")):
            heads = base.num_attention_heads if module.endswith("q_proj") else base.num_key_value_heads
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        found[f"{known}.{part.lower()}"] = tensor.float().contiguous().numpy()
    return found
