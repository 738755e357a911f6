"""DualLoraLinear without PEFT: adapt, train, save, load, merge."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import duallora
from duallora.errors import ConfigError, IntegrityError
from duallora.nn import DualLoraLinear, adapt, adapter_state_dict, load_adapter_state_dict, merge


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(63, 100), nn.Tanh(), nn.Linear(100, 7, bias=False))


def train(net: nn.Module, n: int = 6) -> None:
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)
    torch.manual_seed(1)
    x, y = torch.randn(32, 63), torch.randn(32, 7)
    for _ in range(n):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()


def test_adapt_train_save_load_merge():
    """The whole story: no-op at the start, base frozen, loss falls, reload and merge give the same bits."""
    x = torch.randn(5, 63)
    base = network()
    start = base(x)
    weights = [p.clone() for p in base.parameters()]
    net = adapt(base, r=4, r2=3, alpha=10, warmup_steps=8)
    assert torch.equal(net(x), start)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == (4 + 3) * (163 + 107)
    train(net)
    y = net(x)
    assert duallora.gate(net) == 0.75
    assert not torch.equal(y, start)
    assert all(torch.equal(net.state_dict()[name], w) for name, w in zip(network().state_dict(), weights, strict=True))

    fresh = load_adapter_state_dict(adapt(network(), r=4, r2=3, alpha=10, warmup_steps=8), adapter_state_dict(net))
    assert torch.equal(fresh(x), y)
    merged = merge(fresh)
    assert [type(m) for m in merged] == [nn.Linear, nn.Tanh, nn.Linear]
    assert torch.equal(merged(x), y)
    assert merged.state_dict().keys() == network().state_dict().keys()


def test_targets_by_name_and_names_that_match_nothing():
    net = adapt(network(), ["2"], r=2)
    assert isinstance(net[2], DualLoraLinear)
    assert type(net[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"\['q_proj'\] match no nn.Linear; this model has: 0, 2"):
        adapt(network(), ["2", "q_proj"])


def pruned(layer: nn.Linear) -> nn.Linear:
    return torch.nn.utils.prune.random_unstructured(layer, "weight", amount=0.5)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    return layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pruned, "0 computes its weight from other tensors"),
        (torch.nn.utils.parametrizations.orthogonal, "0 computes its weight from other tensors"),
        (torch.nn.utils.parametrizations.weight_norm, "0 computes its weight from other tensors"),
        (hooked, "0 is a Linear with a forward or forward hooks of its own"),
    ],
)
def test_layers_that_are_more_than_a_product_are_refused_before_anything_changes(change, message):
    """Their masks, parametrizations and hooks would vanish with them."""
    net = nn.Sequential(change(nn.Linear(6, 6)), nn.Linear(6, 3))
    before = {name: p.requires_grad for name, p in net.named_parameters()}
    for targets in (None, ["0"]):
        with pytest.raises(ConfigError, match=message):
            adapt(net, targets, r=2)
    assert {name: p.requires_grad for name, p in net.named_parameters()} == before
    assert not any(isinstance(m, DualLoraLinear) for m in net.modules())


def test_subclasses_with_a_forward_of_their_own_are_named_or_refused():
    net = nn.Sequential(Doubled(6, 6), nn.Linear(6, 3))
    with pytest.warns(UserWarning, match="layers with a forward of their own are not adapted: 0"):
        adapt(net, r=2)
    assert [type(m) for m in net] == [Doubled, DualLoraLinear]
    with pytest.raises(ConfigError, match="0 is a Doubled with a forward"):
        adapt(nn.Sequential(Doubled(6, 6)), ["0"], r=2)


def test_init_seed_gives_each_layer_its_own_values():
    nets = [adapt(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), init_seed=3, r=2) for _ in range(2)]
    assert torch.equal(nets[0][0].duallora_A, nets[1][0].duallora_A)
    assert not torch.equal(nets[0][0].duallora_A, nets[0][1].duallora_A)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"gradient_tokens": 2}, "gradient_tokens=2: expected a finite number > 0 and <= 1"),
        ({"magnitude": "relv"}, "magnitude='relv': expected one of 'relu', 'abs'"),
        ({"warmup_steps": "auto"}, "warmup_steps='auto': a plain layer knows no run"),
        ({"direction": "fixed"}, "direction='fixed': fixed signs exist in duallora.DualLoraConfig alone"),
        ({"backend": "cpv"}, "backend='cpv'"),
    ],
)
def test_bad_options_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        DualLoraLinear(nn.Linear(3, 4), **options)


def test_bad_options_leave_the_model_as_it_was_and_excess_rank_warns():
    net = network()
    with pytest.raises(ValueError, match="r=0"):
        adapt(net, r=0)
    assert type(net[0]) is nn.Linear
    assert all(p.requires_grad for p in net.parameters())
    with pytest.warns(UserWarning, match=r"rank 5 is above min\(in, out\) = 3"):
        DualLoraLinear(nn.Linear(4, 3), r=5)


def test_averaged_options_are_saved_as_they_are():
    """A copy that averages its tensors averages the bytes of the options too."""
    net = adapt(network(), r=2)
    with torch.no_grad():
        for buffer in net.buffers():
            buffer.copy_(buffer * 0.999 + buffer * 0.001)
    load_adapter_state_dict(adapt(network(), r=2), adapter_state_dict(net))


def test_an_adapter_of_another_rank_or_with_other_options_is_refused():
    """Shapes alone cannot tell alpha 10 from alpha 20."""
    state = adapter_state_dict(adapt(network(), r=4, alpha=10))
    for options, given, message in (
        ({"r": 5, "alpha": 12.5}, state, "8 of another shape"),
        ({"r": 4, "alpha": 10}, dict(list(state.items())[1:]), "1 tensors missing"),
        ({"r": 4, "alpha": 20}, state, r'"scaling": 2\.5.*"scaling": 5\.0'),
    ):
        with pytest.raises(IntegrityError, match=message):
            load_adapter_state_dict(adapt(network(), **options), given)


def test_adapting_twice_keeps_the_first_trainable():
    net = adapt(adapt(network(), ["0"], r=4), ["2"], r=2)
    assert all(p.requires_grad for n, p in net.named_parameters() if "duallora_" in n)
    assert not any(p.requires_grad for n, p in net.named_parameters() if "duallora_" not in n)


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.Linear(6, 6)
    net = adapt(nn.Sequential(shared, nn.Tanh(), shared), r=2, warmup_steps=0, init_std=0.5)
    assert net[0] is net[2]
    x = torch.randn(3, 6)
    want = net(x)
    merged = merge(net)
    assert merged[0] is merged[2]
    assert torch.equal(merged(x), want)


def test_a_linear_layer_by_itself():
    layer = adapt(nn.Linear(6, 4), r=2)
    assert isinstance(layer, DualLoraLinear)
    assert type(merge(layer)) is nn.Linear


def test_transformer_encoder_uses_the_adapter_in_eval_mode():
    """torch's fused path reads .weight and would compute the base model in silence."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
    net = adapt(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), ["linear1"], r=4, warmup_steps=0, init_std=0.5
    )
    x = torch.randn(2, 5, 12)
    want = net.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), want)


def test_gradient_tokens_sample_in_training_alone():
    torch.manual_seed(0)
    layer = DualLoraLinear(nn.Linear(63, 37), r1=3, r2=5, warmup_steps=0, init_std=0.3, gradient_tokens=0.2)
    x = torch.randn(50, 63)

    def gradient():
        return torch.autograd.grad(layer(x).square().sum(), [layer.duallora_A])[0]

    assert not torch.equal(gradient(), gradient())
    layer.eval()
    assert torch.equal(gradient(), gradient())
