"""The adapter layer as PEFT users see it: no-op start, merged bits, exact unmerge, several adapters."""

from __future__ import annotations

import re

import oracle
import peft
import pytest
import torch
from adapter_building import AWKWARD, adapted, layers, train
from torch import nn

import duallora
from duallora import DualLoraConfig
from duallora.errors import ConfigError
from duallora.nn import DualLoraLinear

pytestmark = pytest.mark.filterwarnings("ignore:.*whose gate is not open")


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}


@pytest.mark.parametrize("warmup", ["ramp", "residual"])
@pytest.mark.parametrize(
    ("dtype", "use_dora"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)], ids=str
)
def test_start_is_the_base_model_to_the_bit(llama, ids, dtype, use_dora, warmup):
    base = llama(dtype)
    want = base(ids).logits
    model = adapted(base, warmup=warmup, use_dora=use_dora)
    assert torch.equal(model(ids).logits, want)
    assert use_dora or model.get_nb_trainable_parameters()[0] == sum(
        7 * (m.in_features + m.out_features) for m in layers(model)
    )


@pytest.mark.parametrize("forward", ["merged", "added"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_layer_agrees_with_the_oracle_in_mid_ramp(request, ids, architecture, forward):
    """Linear and Conv1D, biases, r1 != r2, gate 3/4: y and dx of one layer against slow float64 loops."""
    base = request.getfixturevalue(architecture)()
    model = adapted(base, forward=forward, target_modules=["q_proj"] if architecture == "llama" else ["c_attn"])
    train(model, ids)
    layer = layers(model)[0]
    assert layer.duallora_step["default"] == 3
    x = torch.randn(5, layer.in_features, requires_grad=True)
    y = layer(x)
    dY = torch.randn_like(y)
    W = layer.get_base_layer().weight.detach()
    W = W.T if architecture == "gpt2" else W
    factors = [getattr(layer, f"duallora_{name}")["default"].detach() for name in "ABCD"]
    scaling = 0.75 * 10 / 12**0.5
    want, gradients = oracle.dual_linear(x.detach(), W, layer.bias.detach(), factors, scaling, dY)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    leaves = [x, *(getattr(layer, f"duallora_{name}")["default"] for name in "ABCD")]
    for got, g in zip(torch.autograd.grad(y, leaves, dY), [gradients[0], *gradients[2:]], strict=True):
        torch.testing.assert_close(got.double(), g, rtol=1e-4, atol=1e-4)


def test_merged_bits_hold_for_conv1d_and_under_autocast(gpt2, llama, ids):
    for build in (gpt2, llama):
        model = adapted(build(), target_modules=["c_attn", "c_proj", "c_fc"] if build is gpt2 else "all-linear")
        train(model, ids)
        want = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            want_autocast = model(ids).logits
        model.merge_adapter()
        assert torch.equal(model(ids).logits, want)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model(ids).logits, want_autocast)


def test_unmerge_is_exact_when_gate_and_factors_moved_in_between(llama, ids):
    """Subtracting dW again would leave the base off: the gate opened, the adapter was retrained, another loaded."""
    model = adapted(llama(torch.bfloat16))
    train(model, ids)
    before = base_weights(model)
    for disturb in (
        lambda: duallora.advance_gate(model, 1),
        lambda: [p.data.add_(0.1) for n, p in model.named_parameters() if "duallora_" in n],
        lambda: [m.duallora_step["default"].fill_(99) for m in layers(model)],
        lambda: model.disable_adapter_layers() or model.enable_adapter_layers(),
    ):
        model.merge_adapter()
        disturb()
        model.unmerge_adapter()
        assert all(torch.equal(w, before[n]) for n, w in base_weights(model).items())


def test_gate_is_frozen_while_merged(llama, ids):
    model = adapted(llama())
    train(model, ids, steps=1)
    model.merge_adapter()
    duallora.advance_gate(model)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()  # gradients of the last backward
    assert duallora.gate(model) == 0.25


def test_disabling_gives_the_base_and_unmerges(llama, ids):
    base = llama()
    want = base(ids).logits
    model = adapted(base)
    train(model, ids)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, want)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, want)
    assert not torch.equal(model(ids).logits, want)


def test_dropout_acts_on_the_update_alone_and_only_in_training(llama, ids):
    """Gate at 0: dropout must not touch the base path. Then eval mode runs the merged form again."""
    base = llama()
    want = base(ids).logits
    model = adapted(base, duallora_dropout=0.5).train()
    torch.testing.assert_close(model(ids).logits, want)
    train(model, ids)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    want = model(ids).logits
    model.merge_adapter()
    assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("patch", ["forward hook", "backward hook", "forward"])
def test_hooks_and_patched_forwards_of_the_base_layer_run(llama, patch):
    """And forward="merged" says why it cannot be."""
    for forward in ("auto", "merged"):
        layer = layers(adapted(llama(), forward=forward, target_modules=["q_proj"]))[0]
        base, seen = layer.base_layer, []
        if patch == "forward":
            original = base.forward
            base.forward = lambda x, seen=seen, original=original: seen.append(1) or original(x)
        else:
            register = base.register_forward_hook if patch == "forward hook" else base.register_full_backward_hook
            register(lambda *_, seen=seen: seen.append(1))
        x = torch.randn(2, layer.in_features, requires_grad=True)
        if forward == "auto":
            layer(x).sum().backward()
            assert seen == [1]
        else:
            with pytest.raises(ValueError, match="forward='merged' needs a plain resident weight"):
                layer(x)


def test_unloading_for_good_keeps_no_second_copy_of_the_weights(llama, ids):
    model = peft.get_peft_model(llama(), DualLoraConfig(**AWKWARD))
    train(model, ids)
    want = model(ids).logits
    before = {layer: layer.get_base_layer().weight.clone() for layer in layers(model)}
    merged = model.merge_and_unload()
    for layer, W0 in before.items():
        assert not torch.equal(layer.get_base_layer().weight, W0)
        kept = [t for t in vars(layer).values() if isinstance(t, torch.Tensor) and t.shape == W0.shape]
        assert not any(torch.equal(t, W0) for t in kept)
        with pytest.raises(ConfigError, match="merged this layer for good"):
            layer.unmerge()
    lora = peft.get_peft_model(merged, peft.LoraConfig(r=2, target_modules=["v_proj"]))  # another method takes over
    assert torch.equal(lora(ids).logits, want)
    assert not any("duallora" in name for name, _ in lora.named_parameters())


def test_dead_layer_and_excess_rank_are_named():
    """A 1x2 layer starts dead for some seeds (a property of the method), as for this one."""
    with pytest.warns(UserWarning, match=r"ReLU\(B A\) is zero everywhere"):
        peft.get_peft_model(nn.Sequential(nn.Linear(2, 1)), DualLoraConfig(r=1, target_modules=["0"], init_seed=2))
    with pytest.warns(UserWarning, match=r"0: rank 5 is above min\(in, out\) = 3"):
        peft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), DualLoraConfig(r=5, target_modules=["0"]))


@pytest.mark.parametrize("layer", ["duallora.tuner", "duallora.nn"])
def test_three_frames_lead_from_a_layer_to_its_product(llama, layer):
    """Depth is a cost: layer.forward -> product -> the autograd function, on the backend that a user gets."""
    import traceback

    if layer == "duallora.nn":
        layer = DualLoraLinear(nn.Linear(6, 5), r=2)
    else:
        layer = layers(adapted(llama(), target_modules=["q_proj"]))[0]
    frames: list[str] = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.linear:
                inside = [f for f in traceback.extract_stack() if "duallora" in f.filename and "/src/" in f.filename]
                frames.extend(f.name for f in inside)
            return func(*args, **(kwargs or {}))

    with Spy():
        layer.train()(torch.randn(2, layer.in_features))
    assert frames == ["forward", "product", "forward"]


def test_bf16_base_keeps_float32_factors(llama, ids):
    model = adapted(llama(torch.bfloat16))
    factors = [p for n, p in model.named_parameters() if "duallora_" in n]
    assert {p.dtype for p in factors} == {torch.float32}
    train(model, ids)
    assert model(ids).logits.dtype == torch.bfloat16


def test_a_layer_shows_the_groups_that_it_has(llama):
    """PEFT's way of printing a layer, without the empty dictionaries of what this adapter does not use."""
    plain, dora = (layers(adapted(llama(), use_dora=use_dora))[0] for use_dora in (False, True))
    assert "()" not in re.sub(r"Identity\(\)", "", repr(plain))
    assert all(f"(duallora_{name}):" in repr(plain) for name in ("A", "B", "C", "D", "step"))
    assert "(duallora_m):" not in repr(plain)
    assert "(duallora_m):" in repr(dora)
