"""Dual LoRA on convolutions: against slow loops, the base layer's own convolution, subclasses, merging."""

from __future__ import annotations

import copy

import oracle
import peft
import pytest
import torch
import torch.nn.functional as F
from adapter_building import factors, one_layer
from torch import nn

import duallora
from duallora import DualLoraConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*whose gate is not open")

SCALING = 0.75 * 10 / 12**0.5


def test_layer_agrees_with_the_oracle():
    """As a linear layer on the patches that the kernel sees: y, dx and the factors' gradients, which are never sampled."""
    geometry = {"stride": (2, 1), "dilation": (1, 2), "padding": (1, 3)}
    _, layer = one_layer(nn.Conv2d(3, 5, (2, 3), **geometry), gradient_tokens=0.1)
    assert layer.training
    x = torch.randn(2, 3, 6, 7, requires_grad=True)
    y = layer(x)
    dY = torch.randn_like(y)
    patches = F.unfold(x.detach(), (2, 3), **geometry).transpose(1, 2).reshape(-1, 18)
    base = layer.get_base_layer()
    want, (dpatches, _, *gradients) = oracle.dual_linear(
        patches, base.weight.detach().flatten(1), base.bias.detach(), [f.detach() for f in factors(layer)], SCALING,
        dY.flatten(2).transpose(1, 2).reshape(-1, 5),
    )  # fmt: skip
    torch.testing.assert_close(y.double().flatten(2), want.view(2, -1, 5).transpose(1, 2), rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(y, [x, *factors(layer)], dY)
    dx = F.fold(dpatches.view(2, -1, 18).transpose(1, 2), (6, 7), (2, 3), **geometry)
    for g, w in zip(got, [dx, *gradients], strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)
    assert not layer.supports_lora_conversion()


KINDS = {
    "1d": lambda: (nn.Conv1d(6, 9, 3, stride=2, padding=1, bias=False), (2, 6, 11)),
    "2d-groups": lambda: (nn.Conv2d(6, 9, 3, groups=3, padding="same", padding_mode="reflect"), (2, 6, 7, 5)),
    "2d-depthwise": lambda: (nn.Conv2d(6, 12, (5, 3), groups=6, padding=2, dilation=(1, 2)), (2, 6, 9, 8)),
    "2d-1x1": lambda: (nn.Conv2d(7, 5, 1), (2, 7, 4, 4)),
    "2d-channels-last": lambda: (nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (2, 4, 6, 6)),
    "3d": lambda: (nn.Conv3d(3, 4, (2, 3, 1), groups=1, padding_mode="circular", padding=(1, 1, 0)), (2, 3, 4, 5, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_geometry_convolves_with_w0_plus_dw(kind):
    """The expected dW is the oracle's, in the layout of the kernel; the convolution is the base layer's."""
    base, shape = KINDS[kind]()
    x = torch.randn(shape)
    for forward in ("auto", "added"):
        _, layer = one_layer(copy.deepcopy(base), forward=forward)
        delta = torch.tensor(oracle.delta(*[f.double().tolist() for f in factors(layer)], SCALING))
        want = copy.deepcopy(base)
        want.weight.data += delta.view(base.weight.shape)
        torch.testing.assert_close(layer(x), want(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.get_delta_weight("default"), (want.weight - base.weight), rtol=1e-4, atol=1e-5)


def test_dora_scales_whole_kernels():
    """m starts at the length of each flattened kernel, so the start is the base layer; then rows of W0 + dW have it."""
    base, shape = KINDS["2d-groups"]()
    x = torch.randn(shape)
    want = base(x)
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(base), DualLoraConfig(r=2, target_modules=["0"], use_dora=True))
    layer = model.base_model.model[0]
    torch.testing.assert_close(layer.duallora_m["default"].detach(), base.weight.flatten(1).norm(dim=1).detach())
    torch.testing.assert_close(model(x), want, rtol=1e-6, atol=1e-6)
    _, layer = one_layer(base, use_dora=True)
    layer.duallora_m["default"].data.mul_(1.5)
    lengths = (base.weight + layer.get_delta_weight("default")).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, layer.duallora_m["default"].detach())


class Standardized(nn.Conv2d):
    """Not linear in its weight, with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, self.weight - mean, self.bias, padding=1)


class Named(nn.Conv2d):
    """A subclass that changes nothing."""


def test_a_subclass_runs_its_own_forward_on_w0_plus_dw():
    base = Standardized(3, 4, 3)
    want = copy.deepcopy(base)
    _, layer = one_layer(base)
    want.weight.data += layer.get_delta_weight("default")
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(layer(x), want(x))
    y = layer(x)
    assert all(g.any() for g in torch.autograd.grad(y.square().sum(), factors(layer)))
    layer.merge()
    assert torch.equal(layer(x), y)
    layer.unmerge()
    rows = layer(x, adapter_names=["default", "__base__"])
    torch.testing.assert_close(rows, torch.stack([y[0], base(x)[1]]))


def test_what_a_subclass_cannot_do_is_refused():
    """Its forward is not known to be linear, so dW cannot go beside it."""
    with pytest.raises(duallora.errors.ConfigError, match=r"Standardized with a forward of its own.*dropout=0\.1"):
        one_layer(Standardized(3, 4, 3), duallora_dropout=0.1)
    one_layer(Named(3, 4, 3), duallora_dropout=0.1)
    _, layer = one_layer(Standardized(3, 4, 3), forward="added")
    with pytest.raises(duallora.errors.ConfigError, match="can only run on W0"):
        layer(torch.randn(1, 3, 5, 5))


def test_dropout_acts_on_the_update_alone():
    base, shape = KINDS["2d-groups"]()
    model, layer = one_layer(base, duallora_dropout=0.5)
    x = torch.randn(shape)
    assert not torch.equal(model.train()(x), model(x))
    want = model.eval()(x)
    layer.merge()
    assert torch.equal(model(x), want)
    _, layer = one_layer(KINDS["1d"]()[0], duallora_dropout=0.999999, init_weights=False)
    layer.train()
    x = torch.randn(KINDS["1d"]()[1])
    assert torch.equal(layer(x), layer.base_layer(x))  # all of the path's input dropped, nothing of the base layer's


def test_autocast_and_merging_agree():
    base, shape = KINDS["2d-groups"]()
    model, layer = one_layer(base)
    x = torch.randn(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(x)
        assert want.dtype == torch.bfloat16
        layer.merge()
        assert torch.equal(model(x), want)


@pytest.mark.parametrize(
    "module", [nn.ConvTranspose2d(3, 4, 3), nn.EmbeddingBag(7, 3), nn.LayerNorm(3), nn.Bilinear(3, 3, 2)], ids=repr
)
def test_other_kinds_of_modules_are_refused_by_name(module):
    kind = type(module).__name__
    with pytest.raises(duallora.errors.ConfigError, match=rf"'0' is a {kind}; Dual LoRA adapts .*exclude_modules"):
        peft.get_peft_model(nn.Sequential(module), DualLoraConfig(r=2, target_modules=["0"]))
