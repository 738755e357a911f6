"""The merged folder is the adapter's model, in plain transformers, or there is no folder."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from duallora import DualLoraConfig
from duallora.errors import ConfigError, DiskError, IntegrityError, NonFiniteError
from duallora.export import merge
from duallora.store import adapters, record
from duallora.tuner import DualLoraModel


def entries(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize(
    ("kind", "factory"), [("generate", AutoModelForCausalLM), ("classify", AutoModelForSequenceClassification)]
)
def test_plain_transformers_gives_the_adapters_logits_bit_for_bit(trained, console, tmp_path, kind, factory):
    output = tmp_path / "deep" / "merged"
    result = merge.merge(trained(kind), output, console=console)
    assert result["max_logit_difference"] == 0.0
    assert "identical" in console.file.getvalue()
    assert entries(output.parent) == ["merged"]
    plain = factory.from_pretrained(output).eval()
    assert not any("duallora" in name for name, _ in plain.named_modules())
    tokenizer = AutoTokenizer.from_pretrained(output)
    adapted, _ = adapters.load_adapter(trained(kind), kind)
    base, _ = adapters.load_adapter(adapted.peft_config["default"].base_model_name_or_path, kind)
    inputs = tokenizer("12 plus 30 is poor", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, adapted(**inputs).logits, rtol=0, atol=1e-6)
        if kind == "generate":
            assert not torch.equal(plain(**inputs).logits, base(**inputs).logits)
        loaded, _ = adapters.load_adapter(output, kind)
        assert torch.equal(loaded(**inputs).logits, plain(**inputs).logits)
    if kind == "classify":
        assert plain.config.id2label == {0: "bad", 1: "good"}
    assert record.read_json(output / "duallora.json")["merged_from"]["steps"] == 8
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge.merge(output, tmp_path / "again", console=console)


def test_another_dtype_is_written_and_its_rounding_reported(trained, console, tmp_path):
    (tmp_path / "merged").mkdir()  # an empty folder is no obstacle
    result = merge.merge(trained(), tmp_path / "merged", dtype="bfloat16", console=console)
    assert result["dtype"] == "bfloat16"
    assert 0 < result["max_logit_difference"] < 0.05
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_a_taken_output_is_refused_and_left_alone(trained, console, tmp_path, taken):
    output = tmp_path / "merged"
    if taken == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "mine").touch()
    with pytest.raises(ConfigError, match="-o"):
        merge.merge(trained(), output, console=console)
    assert entries(tmp_path) == ["merged"]
    assert output.is_file() or entries(output) == ["mine"]


def test_a_merge_that_went_wrong_is_noticed_and_nothing_kept(trained, console, tmp_path, monkeypatch):
    """The comparison must look at the disk and at the unmerged adapter, not at two copies of the same mistake."""
    right = DualLoraModel.merge_and_unload

    def wrong(self, **options):
        model = right(self, **options)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(3)
        return model

    monkeypatch.setattr(DualLoraModel, "merge_and_unload", wrong)
    with pytest.raises(IntegrityError, match="logits differ"):
        merge.merge(trained(), tmp_path / "merged", console=console)
    assert entries(tmp_path) == []


def tied_head(folder, base):
    """An adapter on the head of a model that shares its weight with the embeddings, its gate open."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(base, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "base")
    again = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = DualLoraConfig(r=3, warmup="none", init_std=0.3, target_modules=["lm_head"], task_type="CAUSAL_LM")
    peft.get_peft_model(again, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


def test_a_tied_head_is_merged_alone(tiny_causal_folder, console, tmp_path):
    with pytest.warns(UserWarning, match=r"embed_tokens and lm_head shared one weight"):
        result = merge.merge(tied_head(tmp_path, tiny_causal_folder), tmp_path / "merged", console=console)
    assert result["max_logit_difference"] == 0.0
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(
        saved["model.embed_tokens.weight"],
        load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"],
    )
    assert not torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])


def test_a_weight_that_would_be_drawn_anew_is_noticed(tiny_causal_folder, console, tmp_path, monkeypatch):
    right = PreTrainedModel.save_pretrained

    def without_head(self, folder, **options):
        right(self, folder, **options)
        tensors = load_file(f"{folder}/model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})

    adapter = tied_head(tmp_path, tiny_causal_folder)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", without_head)
    with (
        pytest.warns(UserWarning, match="shared one weight"),
        pytest.raises(IntegrityError, match=r"lacks 1 weights \(lm_head\.weight\), which would be drawn anew"),
    ):
        merge.merge(adapter, tmp_path / "merged", console=console)
    assert entries(tmp_path) == ["adapter", "base"]


def test_a_broken_adapter_is_not_merged(trained, console, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(trained() / "adapter", adapter)
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in sorted(tensors) if name.endswith("duallora_B"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    (adapter / "duallora.json").unlink()
    with pytest.raises(NonFiniteError, match="cannot be merged"):
        merge.merge(adapter, tmp_path / "merged", console=console)
    assert entries(tmp_path) == ["adapter"]


def test_a_full_disk_is_said_and_nothing_is_left(trained, console, tmp_path, monkeypatch):
    """safetensors reports it as an error of its own, not as an OSError."""

    def full(*_args, **_kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(DiskError, match=r"merged cannot be written.*No space left"):
        merge.merge(trained(), tmp_path / "merged", console=console)
    assert entries(tmp_path) == []
