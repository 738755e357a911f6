"""Parents that read a layer's weight instead of calling it get W0 + dW, and the adapter is trained through it."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from duallora import DualLoraConfig
from duallora.errors import ConfigError
from duallora.nn import adapt, merge


class Reader(nn.Module):
    """Looks at the type and the device first, as T5 does, and never calls its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.table, self.conv = nn.Linear(6, 5), nn.Embedding(7, 6), nn.Conv1d(5, 4, 3)

    def forward(self, ids):
        x = F.embedding(ids, self.table.weight).to(self.proj.weight.device, self.proj.weight.dtype)
        assert self.proj.weight.shape == (self.proj.out_features, self.proj.in_features) == (5, 6)
        y = F.linear(x, self.proj.weight, self.proj.bias)
        return F.conv1d(y.mT, self.conv.weight, self.conv.bias, self.conv.stride)


class Caller(Reader):
    """The same by calls."""

    def forward(self, ids):
        return self.conv(self.proj(self.table(ids)).mT)


IDS = torch.tensor([[0, 3, 6, 3], [1, 1, 2, 5]])


def adapted(kind: type[nn.Module], **options):
    torch.manual_seed(0)
    options = {"r": 2, "init_seed": 3, "warmup": "none", "init_std": 0.5, **options}
    return peft.get_peft_model(kind(), DualLoraConfig(target_modules=["proj", "table", "conv"], **options))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"magnitude": "abs", "forward": "added"}])
def test_reading_computes_and_trains_what_calling_does(options):
    reader, caller = adapted(Reader, **options), adapted(Caller, **options)
    torch.testing.assert_close(reader(IDS), caller(IDS))
    ours, theirs = gradients(reader), gradients(caller)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)
        assert gradient.any(), name


def test_merged_and_unmerged_are_the_same_bits_and_disabled_is_the_base():
    reader = adapted(Reader).eval()
    torch.manual_seed(0)
    base = Reader()
    with reader.disable_adapter():
        assert torch.equal(reader(IDS), base(IDS))
    y = reader(IDS)
    assert not torch.equal(y, base(IDS))
    assert torch.equal(copy.deepcopy(reader)(IDS), y)
    reader.merge_adapter()
    assert torch.equal(reader(IDS), y)
    reader.unmerge_adapter()
    assert torch.equal(reader(IDS), y)
    assert torch.equal(reader.merge_and_unload()(IDS), y)


def test_writing_reaches_the_base_weight():
    """Code that sets a weight up means the stored one; a write to W0 + dW would be lost."""
    reader = adapted(Reader)
    proj = reader.base_model.model.proj
    with torch.no_grad():
        proj.weight.zero_()
        proj.weight[1, 2] = 3.0
        proj.weight.data += 1
    want = torch.ones(5, 6)
    want[1, 2] = 4.0
    assert torch.equal(proj.base_layer.weight, want)


def test_what_cannot_act_on_a_weight_that_is_read_is_refused():
    with pytest.raises(ConfigError, match=r"proj: its parent reads.*duallora_dropout=0.5 cannot act"):
        adapted(Caller, duallora_dropout=0.5).base_model.model.proj.weight + 0
    mixed = adapted(Reader).eval()
    with pytest.raises(ConfigError, match="rows of a batch cannot have adapters of their own"):
        mixed(IDS, adapter_names=["default", "__base__"])
    with pytest.raises(ConfigError, match="rows of a batch cannot"):  # and it is over afterwards
        mixed(IDS, adapter_names=["default", "__base__"])
    mixed(IDS)


def test_a_compiler_reads_it_too():
    reader = adapted(Reader).eval()
    compiled = torch.compile(reader, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), reader(IDS))


class Router(nn.Linear):
    """As a mixture's: scores and logits."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = super().forward(x)
        return logits.softmax(-1), logits


class ByHand(nn.Linear):
    """As Falcon's: rounded otherwise than torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2) @ self.weight.T + self.bias


class Positions(nn.Embedding):
    """As ProphetNet's: its parent calls a method of it as well."""

    def looked_up(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids + 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.looked_up(ids) * 3


class Listed(nn.Module):
    """As MaskFormer's: calls its layers from a list that is no module; two from a tuple and a dict of another parent."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [nn.Linear(6, 6), nn.Tanh(), Router(6, 5), ByHand(5, 6)]
        for number, layer in enumerate(self.held):
            self.add_module(str(number), layer)
        self.places = Positions(9, 6)
        self.inner = nn.Identity()
        self.inner.pair, self.inner.by_name = (self.held[2], 1), {"last": self.held[3]}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        first, tanh, _, _ = self.held
        router, last = self.inner.pair[0], self.inner.by_name["last"]
        x = self.places(ids) + self.places.looked_up(ids)
        scores, logits = router(tanh(first(x)))
        return last(scores + logits)


def by_plain_autograd(ids: torch.Tensor, dW: dict[str, torch.Tensor], net: Listed) -> torch.Tensor:
    W = {n: net.get_submodule(n).weight + dW[n] for n in ("0", "2", "3", "places")}
    x = 3 * W["places"][ids + 1] + W["places"][ids + 1]
    logits = torch.tanh(x @ W["0"].T + net.held[0].bias) @ W["2"].T + net.held[2].bias
    return 2 * (logits.softmax(-1) + logits) @ W["3"].T + net.held[3].bias


def test_layers_with_a_forward_a_method_or_a_place_of_their_own_are_adapted():
    torch.manual_seed(0)
    net = Listed().requires_grad_(False)
    base = copy.deepcopy(net)
    ids = torch.arange(7)
    targets = r"0|2|3|places"
    model = peft.get_peft_model(net, DualLoraConfig(r1=3, r2=2, warmup="none", init_std=0.5, target_modules=targets))
    layers = {n: model.base_model.model.get_submodule(n) for n in ("0", "2", "3", "places")}
    dW = {n: layer.get_delta_weight("default").detach().requires_grad_() for n, layer in layers.items()}
    want = by_plain_autograd(ids, dW, base)
    got = model(ids)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    for name, layer in layers.items():
        # dW is linear in B where ReLU is on: its gradient is that of dW, through the layer's own formula.
        A, B = layer.duallora_A["default"].detach(), layer.duallora_B["default"].detach().requires_grad_()
        C, D = layer.duallora_C["default"].detach(), layer.duallora_D["default"].detach()
        scaling = layer.scaling["default"] if hasattr(layer, "scaling") else 1.0
        oracle = scaling * torch.relu(B @ A) * torch.where(D @ C > 0, 1.0, -1.0)
        oracle.backward(dW[name].grad)
        torch.testing.assert_close(layer.duallora_B["default"].grad, B.grad)
    clone = copy.deepcopy(model)
    got = got.detach()
    with torch.no_grad():
        merged = model.merge_and_unload()
        assert torch.equal(merged(ids), got)
        assert [type(layer) for layer in merged.held] == [nn.Linear, nn.Tanh, Router, ByHand]
        assert [type(merged.inner.pair[0]), type(merged.inner.by_name["last"])] == [Router, ByHand]
        assert torch.equal(clone(ids), got)
        assert torch.equal(clone.unload()(ids), base(ids))


def test_without_peft_a_list_is_followed_too():
    torch.manual_seed(0)
    net = Listed().requires_grad_(False)
    x = torch.arange(7)
    before = net(x)
    adapt(net, ["0"], r=3, warmup_steps=0, init_std=0.5)
    want = net(x)
    assert not torch.equal(want, before)
    assert torch.equal(merge(net)(x), want)
    assert type(net.held[0]) is nn.Linear


def test_an_output_of_several_tensors_cannot_be_added_to():
    torch.manual_seed(0)
    config = DualLoraConfig(r=2, warmup="none", target_modules=["2"], duallora_dropout=0.5)
    model = peft.get_peft_model(Listed().requires_grad_(False), config).train()
    with pytest.raises(ConfigError, match="Router, whose output is a tuple: Dual LoRA can only run it on W0"):
        model(torch.arange(7))
    assert model.eval()(torch.arange(7)).shape == (7, 6)
