"""Swapping a loaded adapter's weights for another's, of another rank and scale, under a compiled model."""

from __future__ import annotations

import peft
import pytest
import torch
from adapter_building import adapted, train

import duallora
from duallora.errors import ConfigError

NARROW = {"r1": 2, "r2": 5, "alpha": 3.0, "warmup_steps": 2, "target_modules": ["q_proj", "embed_tokens"]}
WIDE = {"r1": 6, "r2": 3, "alpha": 11.0, "warmup_steps": 3, "target_modules": ["q_proj", "embed_tokens"]}


@pytest.fixture
def saved(llama, ids, tmp_path):
    """Folders of two adapters, and what each computes."""

    def save(name: str, seed: int, wide: bool = False, **options) -> tuple[str, torch.Tensor]:
        sizes = {"num_hidden_layers": 1, "hidden_size": 48 if wide else 36}
        model = adapted(llama(**sizes), init_seed=seed, **options)
        train(model, ids)
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name), model.eval()(ids).logits

    return save


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_adapters_of_other_ranks_and_scales_are_swapped_without_a_new_graph(llama, ids, saved, tmp_path):
    narrow, y_narrow = saved("narrow", 1, **NARROW)
    wide, y_wide = saved("wide", 2, **WIDE)
    assert not close(y_narrow, y_wide)
    model = peft.PeftModel.from_pretrained(llama(num_hidden_layers=1), narrow).eval()
    duallora.prepare_hotswap(model, rank=7)
    assert close(model(ids).logits, y_narrow)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with torch.inference_mode():
        assert close(compiled(ids).logits, y_narrow)
        count = len(graphs)
        for folder, y in ((wide, y_wide), (narrow, y_narrow), (wide, y_wide)):
            duallora.hotswap(compiled, folder)
            assert close(compiled(ids).logits, y)
    assert len(graphs) == count
    model.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(llama(num_hidden_layers=1), tmp_path / "again").eval()
    assert close(again(ids).logits, y_wide)
    model.set_scale("default", 0.5)
    model.set_scale("default", 1.0)
    assert close(model(ids).logits, y_wide)
    assert close(model.merge_and_unload()(ids).logits, y_wide)


def test_a_scale_that_was_set_is_neither_saved_nor_made_the_unit_by_preparing(llama, ids, saved, tmp_path):
    narrow, y = saved("narrow", 1, **NARROW)
    model = peft.PeftModel.from_pretrained(llama(num_hidden_layers=1), narrow).eval()
    model.set_scale("default", 0.5)
    half = model(ids).logits
    duallora.prepare_hotswap(model, rank=7)
    assert close(model(ids).logits, half)
    model.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(llama(num_hidden_layers=1), tmp_path / "again").eval()
    assert close(again(ids).logits, y)
    model.set_scale("default", 1.0)
    assert close(model(ids).logits, y)
    assert not close(half, y)


def test_without_preparation_the_adapter_grows_and_the_other_one_stays(llama, ids, saved):
    narrow, y_narrow = saved("narrow", 1, **NARROW, use_dora=True)
    wide, y_wide = saved("wide", 2, **WIDE, use_dora=True)
    model = peft.PeftModel.from_pretrained(llama(num_hidden_layers=1), narrow, adapter_name="one").eval()
    model.load_adapter(narrow, adapter_name="two")
    duallora.hotswap(model, wide, adapter_name="two")
    assert close(model(ids).logits, y_narrow)
    model.set_adapter("two")
    assert close(model(ids).logits, y_wide)


def test_what_cannot_be_swapped_is_refused_and_nothing_changes(llama, ids, saved):
    first, y = saved("first", 1, **NARROW)
    model = peft.PeftModel.from_pretrained(llama(num_hidden_layers=1), first).eval()
    for number, (options, message) in enumerate(
        (
            ({"target_modules": ["q_proj"]}, "do not adapt the same layers"),
            ({"magnitude": "abs"}, "has magnitude='abs', the adapter here 'relu'"),
            ({"warmup": "residual"}, "warmup='residual' rebuilds"),
        )
    ):
        with pytest.raises(ConfigError, match=message):
            duallora.hotswap(model, saved(str(number), 2, **{**NARROW, **options})[0])
    with pytest.warns(UserWarning, match="gate is not open"):
        half, _ = saved("half", 3, **{**NARROW, "warmup_steps": 9})
    with pytest.raises(
        ConfigError, match="gate of the new adapter stands at 3 of 9 steps, and this one's warm-up has 2"
    ):
        duallora.hotswap(model, half)
    one_target = {**NARROW, "target_modules": ["q_proj"]}
    other = peft.PeftModel.from_pretrained(llama(num_hidden_layers=1), saved("narrow", 1, **one_target)[0])
    with pytest.raises(ConfigError, match=r"duallora_A is \[2, 48\], here \[2, 36\]: it is another base model's"):
        duallora.hotswap(other, saved("wide", 1, wide=True, **one_target)[0])
    with pytest.raises(ConfigError, match="no Dual LoRA adapter 'other'"):
        duallora.hotswap(model, first, adapter_name="other")
    with pytest.raises(ConfigError, match=r"rank=4: adapter 'default' has rank 5"):
        duallora.prepare_hotswap(model, rank=4)
    assert torch.equal(model(ids).logits, y)
    W = model.get_input_embeddings().base_layer.weight.data
    before = W.clone()
    W.zero_()
    with pytest.raises(ConfigError, match=r"holds another model.embed_tokens"):
        duallora.hotswap(model, first)
    W.copy_(before)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="is merged: unmerge first"):
        duallora.hotswap(model, first)
