"""DualLoraConfig(use_dora=True): W' = m (W0 + dW) / |W0 + dW| by output row, with m trained."""

from __future__ import annotations

import oracle
import peft
import pytest
import torch
from adapter_building import layers

import duallora


def adapted(model, **options):
    torch.manual_seed(0)
    defaults = {"r1": 3, "r2": 5, "alpha": 7, "target_modules": ["q_proj", "down_proj"], "use_dora": True}
    options = {**defaults, "init_weights": False, "init_std": 0.3, **options}
    model = peft.get_peft_model(model, duallora.DualLoraConfig(**options))
    for layer in layers(model):
        layer.duallora_m["default"].data.mul_(torch.linspace(0.8, 1.3, layer.out_features))
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    ("forward", "backend"), [("merged", "reference"), ("added", "reference"), ("added", "recompute"), ("merged", "cpu")]
)
def test_a_layer_is_what_the_oracle_says(llama, forward, backend):
    """Output and the gradients of x, bias-free factors and m."""
    layer = layers(adapted(llama(), forward=forward, backend=backend))[0].train()
    x = torch.randn(4, layer.in_features, requires_grad=True)
    dY = torch.randn(4, layer.out_features)
    factors = layer._factors("default")
    m = layer.duallora_m["default"]
    y = layer(x)
    want_y, want = oracle.dual_linear(
        x.detach(), layer.base_layer.weight, layer.base_layer.bias, [f.detach() for f in factors],
        layer.scaling["default"], dY, m=m.detach(),
    )  # fmt: skip
    torch.testing.assert_close(y.double(), want_y, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(y, [x, *factors, m], dY)
    for g, w in zip(got, [want[0], *want[2:]], strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)


def test_dropout_acts_on_the_update_alone(llama):
    """With all of the update's input dropped the output is the base layer's."""
    layer = layers(adapted(llama(), duallora_dropout=0.999999))[0].train()
    x = torch.randn(2, layer.in_features)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not torch.allclose(layer.eval()(x), layer.base_layer(x))


def test_cast_while_merged_comes_back_in_the_new_type(llama, ids):
    model = adapted(llama()).eval()
    base = layers(model)[0].base_layer.weight.clone()
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert torch.equal(layers(model)[0].base_layer.weight, base.bfloat16())
    model(ids)
