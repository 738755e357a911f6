"""The GGUF file holds the same update as the folder, by the names and in the order of rows that the base has there."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from duallora.errors import ConfigError
from duallora.export import convert
from duallora.store import adapters


def test_llama_cpp_reads_the_update_that_peft_reads(native, tmp_path):
    """transformers' own reader of GGUF puts the rows back, an oracle apart from the writer."""
    convert.convert(native, tmp_path / "lora", rank=3, format="gguf")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    reader = gguf.GGUFReader(tmp_path / "lora" / "adapter.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["adapter.lora.alpha"].contents() == 3.0
    assert reader.fields["general.architecture"].contents() == "llama"
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    base = AutoConfig.from_pretrained(adapters.read_config(native).base_model_name_or_path)
    back = LlamaTensorProcessor(base.to_dict())
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts |= {f"{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    names = {name.removesuffix(".lora_A.weight") for name in stored if ".lora_A" in name}
    assert len(found) == 2 * len(names) == 28
    moved = 0
    for name in names:
        layer, part = name.split(".")[4], name.rpartition(".")[2]
        place = f"blk.{layer}.{parts[part]}.weight"
        A, B = found[f"{place}.lora_a"], found[f"{place}.lora_b"]
        np.testing.assert_array_equal(A, stored[f"{name}.lora_A.weight"].numpy())
        wanted = stored[f"{name}.lora_B.weight"].numpy()
        moved += not np.array_equal(B, wanted)
        np.testing.assert_array_equal(back.process(B, place).weights, wanted)
    assert moved == 4  # q and k of two layers
    assert "adapter.gguf" in adapters.read_sidecar(tmp_path / "lora")["files"]
    adapters.load_adapter(tmp_path / "lora", "generate")


def test_what_llama_cpp_does_not_take_is_refused_and_nothing_is_left(make_adapter, tmp_path):
    folder = make_adapter("classify")
    with pytest.raises(ConfigError, match=r"llama.cpp does not take.*no lora_A or lora_B.*duallora merge"):
        convert.convert(folder, tmp_path / "lora", rank=2, format="gguf")
    assert not list(tmp_path.iterdir())
