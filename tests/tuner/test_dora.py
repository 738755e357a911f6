"""DualLoraConfig(use_dora=True): W' = m (W0 + dW) / |W0 + dW| by output row, with m trained."""

from __future__ import annotations

import oracle
import peft
import pytest
import torch

import duallora
from duallora.tuner.linear import Linear


def layers(model) -> list[Linear]:
    return [m for m in model.modules() if isinstance(m, Linear)]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("warmup", ["ramp", "residual"])
def test_the_start_is_the_base_model_to_the_bit(llama, ids, dtype, warmup):
    base = logits(llama(dtype), ids)
    torch.manual_seed(0)
    config = duallora.DualLoraConfig(r=3, target_modules="all-linear", use_dora=True, warmup=warmup, init_seed=1)
    assert torch.equal(logits(peft.get_peft_model(llama(dtype), config), ids), base)


@pytest.mark.parametrize("forward", ["merged", "added"])
@pytest.mark.parametrize("backend", ["reference", "recompute", "cpu"])
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
    """In expectation over masks the output is that without dropout; in evaluation it is equal."""
    model = adapted(llama(), duallora_dropout=0.5)
    layer = layers(model)[0]
    x = torch.randn(2, layer.in_features)
    with torch.no_grad():
        exact = layer.eval()(x)
        layer.train()
        mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    assert (mean - exact).norm() <= 0.05 * (exact - layer.base_layer(x)).norm()


def test_cast_while_merged_comes_back_in_the_new_type(llama, ids):
    model = adapted(llama()).eval()
    base = layers(model)[0].base_layer.weight.clone()
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert torch.equal(layers(model)[0].base_layer.weight, base.bfloat16())
    model(ids)
