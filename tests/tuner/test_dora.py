"""DualLoraConfig(use_dora=True): W' = m (W0 + dW) / |W0 + dW| by output row, with m trained."""

from __future__ import annotations

import copy
import warnings

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


def test_conv1d_agrees_with_linear(gpt2, ids):
    """GPT-2's [in, out] weights: the norm is per output all the same."""
    model = adapted(gpt2(), target_modules=["c_attn"])
    layer = layers(model)[0]
    W = layer.base_layer.weight.T.double()
    factors = [f.detach() for f in layer._factors("default")]
    dW = duallora.dual_delta(*(f.double() for f in factors), layer.scaling["default"])
    m = layer.duallora_m["default"].detach().double()
    want = (W + dW) * (m / (W + dW).norm(dim=1))[:, None]
    with torch.no_grad():
        merged = layer._merged_weight(layer.base_layer.weight, ["default"])
    torch.testing.assert_close(merged.T.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.get_delta_weight("default").T.double(), want - W, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_changes_no_bit_and_unmerging_restores(llama, ids, dtype):
    model = adapted(llama(dtype)).eval()
    before, base = logits(model, ids), layers(model)[0].base_layer.weight.clone()
    delta = layers(model)[0].get_delta_weight("default")
    model.merge_adapter()
    assert torch.equal(logits(model, ids), before)
    assert torch.equal(layers(model)[0].get_delta_weight("default"), delta)
    model.unmerge_adapter()
    assert torch.equal(layers(model)[0].base_layer.weight, base)
    assert torch.equal(logits(copy.deepcopy(model).merge_and_unload(), ids), before)


def test_saved_and_loaded_with_its_lengths(llama, ids, tmp_path):
    model = adapted(llama()).eval()
    before = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(loaded, ids), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lean = peft.PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(lean, ids), before)


def test_two_adapters_add_what_each_changes(llama, ids):
    model = adapted(llama())
    plain = {"r": 2, "target_modules": ["q_proj"], "init_weights": False, "init_std": 0.3}
    model.add_adapter("plain", duallora.DualLoraConfig(**plain))
    model.eval()
    model.base_model.set_adapter(["default", "plain"])
    layer = layers(model)[0]
    both = layer.get_delta_weight("default") + layer.get_delta_weight("plain")
    x = torch.randn(2, layer.in_features)
    want = torch.nn.functional.linear(x, layer.base_layer.weight + both, layer.base_layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
    names = ["default", "plain", "__base__"]
    rows = model(ids, adapter_names=names).logits
    for i, name in enumerate(names[:2]):
        model.base_model.set_adapter(name)
        torch.testing.assert_close(rows[i], logits(model, ids)[i], rtol=1e-3, atol=1e-4)


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


def test_training_moves_the_lengths_and_the_factors(llama, ids):
    model = adapted(llama()).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    first = last = None
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        first, last = first or float(loss), float(loss)
    assert last < first
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_one_of_two_merged_changes_no_output(llama, ids, mode):
    """What is merged must not enter the lengths of the other adapter."""
    model = adapted(llama())
    torch.manual_seed(5)
    other = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_weights": False, "init_std": 0.3}
    model.add_adapter("other", duallora.DualLoraConfig(**other, use_dora=True))
    model.base_model.set_adapter(["default", "other"])
    getattr(model, mode)()
    before = logits(model, ids)
    model.merge_adapter(["other"])
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-3, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-3, atol=1e-4)


def test_cast_while_merged_comes_back_in_the_new_type(llama, ids):
    model = adapted(llama()).eval()
    base = layers(model)[0].base_layer.weight.clone()
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert torch.equal(layers(model)[0].base_layer.weight, base.bfloat16())
    model(ids)
