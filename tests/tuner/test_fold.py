"""duallora.folded: merged to the bit inside, as before to the bit after; what cannot be, stays unmerged."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from adapter_building import layers
from torch import nn

import duallora
from duallora.nn import adapt
from duallora.nn import merge as merge_plain
from duallora.tuner import DualLoraLayer

IDS = torch.randint(0, 67, (3, 11), generator=torch.Generator().manual_seed(1))


def config(**options) -> duallora.DualLoraConfig:
    given = {"r1": 3, "r2": 5, "target_modules": "all-linear", "init_weights": False, "init_std": 0.3, "init_seed": 1}
    return duallora.DualLoraConfig(**(given | options))


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 6, 3), nn.Linear(6 * 7 * 7, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        images = 0.01 * (ids[:, None, :9, None] * torch.arange(1, 10)).float().expand(-1, 3, -1, -1) / 67
        return self.out(self.conv(images).flatten(1))


def injected(model):
    peft.inject_adapter_in_model(config(), model)
    return model


def two_adapters(model):
    model = peft.get_peft_model(model, config())
    model.add_adapter("other", config(r=4, r1=None, r2=None, init_seed=2))
    model.base_model.set_adapter(["default", "other"])
    return model


CASES = {
    "PeftModel": lambda llama: peft.get_peft_model(llama(), config()),
    "injected": lambda llama: injected(llama()),
    "DoRA": lambda llama: peft.get_peft_model(llama(), config(use_dora=True)),
    "residual start": lambda llama: peft.get_peft_model(llama(), config(warmup="residual", init_weights=True)),
    "two adapters": lambda llama: two_adapters(llama(torch.bfloat16)),
    "embedding tied to the head": lambda llama: peft.get_peft_model(
        llama(tie_word_embeddings=True), config(target_modules=["embed_tokens", "q_proj"])
    ),
    "convolution": lambda llama: peft.get_peft_model(Pixels(), config(target_modules=["conv", "out"])),
    "duallora.nn": lambda llama: adapt(llama(), r1=3, r2=5, warmup_steps=4, init_std=0.3, init_seed=1),
}


def output(model) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS)
    return getattr(found, "logits", found)


def merged(model):
    model = copy.deepcopy(model)
    if isinstance(model, peft.PeftModel):
        return model.merge_and_unload()
    for layer in layers(model):
        layer.merge()
    return merge_plain(model)


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(params=CASES)
def model(request, llama):
    found = CASES[request.param](llama).eval()
    if request.param == "duallora.nn":
        duallora.advance_gate(found, 2)
    return found


def fail_inside(model) -> None:
    with duallora.folded(model):
        raise KeyError


def test_the_bits_inside_are_the_merged_models_and_those_after_are_those_before(model):
    """Also after an exception; the weights lie where they lay, so nothing that points at them goes wrong."""
    before, places, unmerged = state(model), [p.data_ptr() for p in model.parameters()], output(model)
    want = output(merged(model))
    with duallora.folded(model) as inside:
        assert inside is model
        assert torch.equal(output(model), want)
        assert torch.equal(unmerged, want)
    with pytest.raises(KeyError):
        fail_inside(model)
    assert_same(state(model), before)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert torch.equal(output(model), unmerged)


def test_nothing_is_built_inside_and_a_token_is_that_of_the_merged_model(llama, monkeypatch):
    model = CASES["PeftModel"](llama).eval()
    want = merged(model).generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.inference_mode(), duallora.folded(model):
        monkeypatch.setattr(DualLoraLayer, "_build", None)
        got = model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(got, want)


def test_training_goes_on_as_if_nothing_had_been(model):
    """Steps with an evaluation between them end bit for bit where they end without it; an open gate does not move."""
    runs = [model, copy.deepcopy(model)]
    for index, run in enumerate(runs):
        optimizer = torch.optim.SGD([p for p in run.train().parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            if index:
                with duallora.folded(run.eval()):
                    output(run)
                run.train()
            found = run(IDS)
            getattr(found, "logits", found).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(*(state(run) for run in runs))


def stays(model) -> None:
    """No layer is merged inside, and the output is what it is outside."""
    want, held = output(model), [list(layer.merged_adapters) for layer in layers(model)]
    with duallora.folded(model):
        assert [layer.merged_adapters for layer in layers(model)] == held
        assert torch.equal(output(model), want)
    assert [layer.merged_adapters for layer in layers(model)] == held


@pytest.mark.parametrize("form", ["added", "dropout", "merged before", "disabled", "a base layer with a hook", "lora"])
def test_what_merging_would_change_or_has_merged_already_is_left_as_it_is(form, llama):
    options = {"added": {"forward": "added"}, "dropout": {"duallora_dropout": 0.5}}.get(form, {})
    given = (
        config(**options) if form != "lora" else peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    model = peft.get_peft_model(llama(torch.bfloat16), given).eval()
    if form == "merged before":
        model.add_adapter("other", config(init_seed=2))
        model.merge_adapter(["other"])
    elif form == "disabled":
        model.base_model.disable_adapter_layers()
    elif form == "a base layer with a hook":
        for layer in layers(model):
            layer.base_layer.register_forward_hook(lambda module, args, y: y * 2)
    elif form == "dropout":
        model.train()
        with duallora.folded(model):
            assert not any(layer.merged for layer in layers(model))
        return
    stays(model)


def test_a_quantized_base_is_left_as_it_is(llama):
    """Merging would round W0 + dW to its grid."""
    torchao = pytest.importorskip("torchao.quantization")
    base = llama()
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    stays(peft.get_peft_model(base, config(target_modules=["q_proj"])).eval())


def test_an_adapter_switched_off_or_deleted_inside_leaves_the_base_as_it_was(llama):
    model = CASES["PeftModel"](llama).eval()
    base = output(llama())
    with duallora.folded(model), model.disable_adapter():
        assert torch.equal(output(model), base)
    with duallora.folded(model):
        model.add_adapter("other", config(init_seed=2))
        model.delete_adapter("default")
    assert not any(layer.merged for layer in layers(model))
    with model.disable_adapter():
        assert torch.equal(output(model), base)


def test_a_part_of_a_model_folds_without_the_rest_that_shares_its_weight(llama):
    model = CASES["embedding tied to the head"](llama).eval()
    inner = model.get_base_model()
    head, before = inner.lm_head, inner.lm_head.weight.clone()
    with duallora.folded(inner.model):
        assert torch.equal(head.weight, before)
    assert head.weight is inner.model.embed_tokens.base_layer.weight


def test_a_copy_made_inside_stands_on_its_own():
    model = adapt(nn.Sequential(nn.Linear(7, 5)), r=2, warmup_steps=0, init_std=0.5)
    with duallora.folded(model):
        copied = copy.deepcopy(model)
    x = torch.randn(3, 7)
    with torch.no_grad():
        copied[0].duallora_A.mul_(2)
        assert not torch.equal(copied(x), model(x))
