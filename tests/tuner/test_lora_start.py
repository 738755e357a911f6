"""init="lora": plain LoRA for as long as every sign is up, and no longer."""

from __future__ import annotations

import peft
import pytest
import torch
from adapter_building import adapted, layers, train
from torch import nn

from duallora import DualLoraConfig, DualLoraLinear
from duallora.errors import ConfigError

START = {"init": "lora", "magnitude": "identity", "warmup": "none"}


def signs_up(model: nn.Module) -> float:
    """The share of entries with D C > 0."""
    found = [(x.duallora_D["default"] @ x.duallora_C["default"] > 0).flatten() for x in layers(model)]
    return float(torch.cat(found).float().mean())


@pytest.mark.parametrize(("architecture", "optimizer"), [("llama", torch.optim.AdamW), ("gpt2", torch.optim.SGD)])
def test_trained_beside_lora_it_is_lora_until_a_sign_turns(request, ids, architecture, optimizer):
    """Linear and Conv1D, r1 != r2, whose scales are alpha / r1 and alpha / sqrt(r1 r2); 6 steps, all weights and logits."""
    build, targets = request.getfixturevalue(architecture), ["c_attn", "c_proj", "q_proj", "v_proj", "down_proj"]
    lora = peft.get_peft_model(build(), peft.LoraConfig(r=4, lora_alpha=10, target_modules=targets))
    dual = peft.get_peft_model(
        build(), DualLoraConfig(r1=4, r2=9, alpha=15, target_modules=targets, direction_init_std=3.0, **START)
    )
    theirs = [m for m in lora.modules() if hasattr(m, "lora_A")]
    assert len(theirs) == len(layers(dual)) > 2
    for x, y in zip(layers(dual), theirs, strict=True):
        x.duallora_A["default"].data.copy_(y.lora_A["default"].weight)
        assert not x.duallora_B["default"].any()
    assert torch.equal(dual(ids).logits, build()(ids).logits)
    steppers = [optimizer([p for p in m.parameters() if p.requires_grad], lr=2e-3) for m in (lora, dual)]
    for _ in range(6):
        for model, stepper in zip((lora, dual), steppers, strict=True):
            stepper.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            stepper.step()
        torch.testing.assert_close(dual(ids).logits, lora(ids).logits, rtol=0, atol=1e-6)
    assert signs_up(dual) == 1
    assert not torch.allclose(lora(ids).logits, build()(ids).logits, atol=1e-3)
    for x, y in zip(layers(dual), theirs, strict=True):
        torch.testing.assert_close(x.duallora_A["default"], y.lora_A["default"].weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(x.duallora_B["default"], y.lora_B["default"].weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("r2", [1, 8])
def test_no_sign_turns_in_half_the_steps_that_the_margin_is_wide_and_some_do_later(llama, ids, r2):
    """Steps of 1e-2 from a width of 0.1, at any rank; the columns of D that began at 0 have moved, too."""
    model = adapted(llama(), r1=4, r2=r2, direction_init_std=0.1, **START)
    assert signs_up(model) == 1
    train(model, ids, steps=5)
    assert signs_up(model) == 1
    assert all(x.duallora_D["default"].all() for x in layers(model))
    train(model, ids, steps=15)
    assert 0.5 < signs_up(model) < 1
    x = layers(model)[0]
    A, B, C, D = (getattr(x, f"duallora_{name}")["default"].detach().double() for name in "ABCD")
    want = 10 / (4 * r2) ** 0.5 * (B @ A) * torch.where(D @ C > 0, 1.0, -1.0)
    torch.testing.assert_close(x.get_delta_weight("default").double(), want, rtol=1e-4, atol=1e-7)


def test_a_plain_layer_and_layers_of_other_kinds_start_so_too():
    x = torch.randn(3, 5)
    base = nn.Linear(5, 7)
    layer = DualLoraLinear(base, r1=2, r2=3, init="lora", magnitude="identity", warmup_steps=0)
    assert torch.equal(layer(x), nn.functional.linear(x, base._parameters["weight"], base.bias))
    layer(x).square().sum().backward()
    assert layer.duallora_B.grad.all()
    assert not layer.duallora_A.grad.any()  # as LoRA's, before B has moved
    with pytest.raises(ConfigError, match=r"warmup_steps = 100 would not be LoRA .* use warmup_steps = 0, or"):
        DualLoraLinear(nn.Linear(5, 7), init="lora", magnitude="identity")
    kinds = nn.Sequential(nn.Embedding(9, 6), nn.Conv1d(4, 6, 3))
    model = peft.get_peft_model(kinds, DualLoraConfig(r1=2, r2=3, target_modules=["0", "1"], **START))
    assert signs_up(model) == 1
    assert all(not layer.get_delta_weight("default").any() for layer in layers(model))


def test_with_dora_it_starts_as_dora(llama, ids):
    model = adapted(llama(), use_dora=True, **START)
    torch.testing.assert_close(model(ids).logits, llama()(ids).logits, rtol=0, atol=1e-5)
