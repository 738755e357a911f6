"""fast_peft against PEFT's own LoHa and HiRA: same output, gradients and files; PEFT's own way where it must be."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from duallora.errors import ConfigError
from duallora.ops import autograd
from duallora.tuner.fast_peft import fast_peft

IN, OUT = 63, 100
HIRA = pytest.mark.skipif(not hasattr(peft, "HiraConfig"), reason="PEFT has no HiRA")
METHODS = ["loha", pytest.param("hira", marks=HIRA)]


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.fc = layer

    def forward(self, x):
        return self.fc(x)


def config(method, **options):
    if method == "loha":
        return peft.LoHaConfig(r=5, alpha=7, target_modules=["fc"], init_weights=False, **options)
    return peft.HiraConfig(r=5, target_modules=["fc"], init_weights=False, **options)


def pair(method, layer=None, dtype=torch.float32, **options):
    """(PEFT's model, the same one taken over)"""
    torch.manual_seed(0)
    model = peft.get_peft_model(Net((layer or nn.Linear(IN, OUT)).to(dtype)), config(method, **options)).train()
    for name, factor in model.named_parameters():
        if factor.requires_grad:
            factor.data = torch.randn(factor.shape).to(factor) * (0.3 if "hada" in name else 0.1)
    return model, fast_peft(copy.deepcopy(model))


def results(model, x, dY):
    x = x.detach().requires_grad_()
    y = model(x)
    factors = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y, [x, *factors], dY)]


def inputs(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(2, 9, IN).to(dtype), torch.randn(2, 9, OUT).to(dtype)


@pytest.fixture
def calls(monkeypatch):
    """How often our product was taken."""
    seen = []
    whole = autograd._Product.forward
    monkeypatch.setattr(autograd._Product, "forward", staticmethod(lambda *a: (seen.append(1), whole(*a))[1]))
    return seen


@pytest.mark.parametrize(
    ("method", "kind", "dtype"),
    [
        ("loha", "linear", torch.float32), ("loha", "without bias", torch.bfloat16),
        pytest.param("hira", "linear", torch.bfloat16, marks=HIRA),
        pytest.param("hira", "conv1d", torch.float32, marks=HIRA),
    ],
)  # fmt: skip
def test_output_and_gradients_are_peft_s(method, kind, dtype, calls):
    layer = {"linear": nn.Linear(IN, OUT), "without bias": nn.Linear(IN, OUT, bias=False), "conv1d": Conv1D(OUT, IN)}
    plain, fast = pair(method, layer[kind], dtype)
    for got, want in zip(results(fast, *inputs(dtype)), results(plain, *inputs(dtype)), strict=True):
        assert got.dtype == want.dtype
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 6e-3)
    assert calls == [1]


@pytest.mark.parametrize("method", METHODS)
def test_files_and_later_adapters_are_peft_s(method, tmp_path, calls):
    plain, fast = pair(method)
    fast.save_pretrained(tmp_path)
    x, _ = inputs()
    again = peft.PeftModel.from_pretrained(Net(copy.deepcopy(plain.get_base_model().fc.base_layer)), tmp_path)
    torch.testing.assert_close(again(x), plain(x))
    assert plain.state_dict().keys() == fast.state_dict().keys()
    fast.add_adapter("second", config(method))
    fast.set_adapter("second")
    calls.clear()
    other = fast(x)
    assert calls == [1]
    assert not torch.allclose(other, plain(x))
    with fast.disable_adapter():
        assert torch.equal(fast(x), plain.get_base_model().fc.base_layer(x))
    copied = pickle.loads(pickle.dumps(fast))  # noqa: S301
    torch.testing.assert_close(copied(x), other)


@pytest.mark.parametrize("method", METHODS)
def test_merging_is_peft_s(method, calls):
    plain, fast = pair(method)
    x, _ = inputs()
    for model in (plain, fast):
        model.merge_adapter()
    assert torch.equal(fast(x), plain(x))
    for model in (plain, fast):
        model.unmerge_adapter()
    assert calls == []
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
    assert calls == [1]


def hooked(model):
    model.base_model.model.fc.base_layer.register_forward_hook(lambda module, args, y: 2 * y)


def trained(model):
    model.base_model.model.fc.base_layer.weight.requires_grad_()


@pytest.mark.parametrize("change", [hooked, trained], ids=lambda change: change.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_what_acts_otherwise_goes_peft_s_own_way(method, change, calls):
    plain, fast = pair(method)
    for model in (plain, fast):
        change(model)
    x, _ = inputs()
    assert torch.equal(fast(x), plain(x))
    assert calls == []


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("loha", {"rank_dropout": 0.5}),
        ("loha", {"module_dropout": 0.5}),
        pytest.param("hira", {"hira_dropout": 0.5}, marks=HIRA),
    ],
)
def test_dropout_is_drawn_as_peft_draws_it_and_not_at_all_in_evaluation(method, options, calls):
    plain, fast = pair(method, **options)
    x, _ = inputs()
    outputs = []
    for model in (plain, fast):
        torch.manual_seed(3)
        outputs.append(model(x))
    assert torch.equal(*outputs)
    assert calls == []
    torch.testing.assert_close(fast.eval()(x), plain.eval()(x), rtol=1e-5, atol=1e-5)
    assert calls == [1]


@pytest.mark.parametrize("method", METHODS)
def test_under_autocast(method):
    plain, fast = pair(method)
    x, _ = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = fast(x), plain(x)
    assert (got.double() - want.double()).norm() / want.double().norm() < 1e-2


def test_a_model_without_these_methods_is_refused():
    with pytest.raises(ConfigError, match="found no linear layer of LoHa, HiRA or DoRA in this PeftModel"):
        fast_peft(peft.get_peft_model(Net(nn.Linear(IN, OUT)), peft.LoraConfig(target_modules=["fc"])))


def test_dora_is_taken_over_too_and_convolutions_are_counted():
    lora = peft.get_peft_model(Net(nn.Linear(IN, OUT)), peft.LoraConfig(target_modules=["fc"], use_dora=True))
    fast_peft(lora)
    assert type(lora.base_model.model.fc.lora_variant["default"]).__name__ == "FastDoraVariant"
    net = nn.ModuleDict({"fc": nn.Linear(IN, OUT), "conv": nn.Conv2d(3, 4, 3)})
    loha = peft.get_peft_model(net, peft.LoHaConfig(target_modules=["fc", "conv"]))
    with pytest.warns(UserWarning, match="left 1 layers to PEFT's own code: 1 x Conv2d"):
        fast_peft(loha)
