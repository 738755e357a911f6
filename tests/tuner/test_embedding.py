"""Dual LoRA on embeddings: rows of the batch against the whole weight, clip, padding, subclasses, merging."""

from __future__ import annotations

import copy

import oracle
import peft
import pytest
import torch
import torch.nn.functional as F
from adapter_building import factors, one_layer
from torch import nn
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

import duallora
from duallora import DualLoraConfig
from duallora.core.equation import dual_delta
from duallora.tuner.embedding import distinct

pytestmark = pytest.mark.filterwarnings("ignore:.*whose gate is not open")

V, D = 100, 63
IDS = torch.tensor([[3, 3, 3, 99, 5], [0, 7, 3, 5, 98]])  # 3 four times, 5 twice


@pytest.mark.parametrize("ste_clip", ["chain", "update"])
def test_layer_agrees_with_the_oracle_where_the_clip_acts_on_the_sum_over_occurrences(ste_clip):
    """One-hot rows times W' in float64 loops. Clipping each occurrence on its own would give id 3 four times too much.

    In training, too, where dropout leaves ids alone and no tokens are sampled.
    """
    _, layer = one_layer(nn.Embedding(V, D), ste_clip=ste_clip, duallora_dropout=0.9, gradient_tokens=0.1)
    assert layer.training
    y = layer(IDS)
    dY = torch.randn_like(y)
    A, B, C, D_ = (f.detach() for f in factors(layer))
    onehot = F.one_hot(IDS.flatten(), V).double()
    W = layer.get_base_layer().weight.detach()
    want, (_, _, dBt, dAt, dDt, dCt) = oracle.dual_linear(
        onehot, W.T, None, [B.T, A.T, D_.T, C.T], 0.75 * 10 / 12**0.5, dY.view(-1, D), ste_clip=ste_clip
    )
    torch.testing.assert_close(y.double().view(-1, D), want, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(y, factors(layer), dY)
    for g, w in zip(got, (dAt.T, dBt.T, dCt.T, dDt.T), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)


VARIANTS = [
    {},
    {"use_dora": True},
    {"warmup": "residual"},
    {"direction": "fixed"},
    {"direction": "xnor"},
    {"direction": "dorefa"},
    {"forward": "added", "direction": "tanh"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_rows_of_the_batch_are_rows_of_the_whole_weight(options):
    """y and all gradients as from the whole W' [V, d]; the means of xnor (a row) and dorefa (all) are not the batch's."""
    _, layer = one_layer(nn.Embedding(V, D), **options)
    leaves = factors(layer) + list(layer.duallora_m.values())
    y = layer(IDS)
    dY = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, dY, allow_unused=True)

    config = layer.duallora_config["default"]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    m = wide.pop() if config.use_dora else None
    A, B, C, D_ = wide if len(wide) == 4 else (*wide, None, None)
    kwargs = {"magnitude": config.magnitude, "direction": config.direction, "ste_clip": config.ste_clip}
    kwargs["fixed_sign"] = layer.fixed_signs.get("default")
    s = layer.scaling["default"] * (0.75 if config.warmup == "ramp" else 1)
    W = layer.get_base_layer().weight.detach().double()
    whole = W + dual_delta(A, B, C, D_, s, **kwargs)
    if config.warmup == "residual":
        whole = whole - dual_delta(*[layer.duallora_initial["default"][n].double() for n in "ABCD"], s, **kwargs)
    if m is not None:
        whole = whole * (m / whole.detach().norm(dim=1))[:, None]
    want = F.embedding(IDS, whole)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5)
    wide += [] if m is None else [m]
    for g, w in zip(got, torch.autograd.grad(want, wide, dY.double()), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-4)
    delta = layer.get_delta_weight("default")
    assert delta.shape == (V, D)
    torch.testing.assert_close(delta.double(), (whole - W).detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"forward": "added"}], ids=str)
def test_the_padding_row_stays_and_gets_no_gradient(options):
    """dW is of low rank inside: without care the row of padding_idx would move as A and C move."""
    base = nn.Embedding(V, D, padding_idx=5)
    base.weight.data[5] = 0.5
    model, layer = one_layer(base, **options)
    y = model(IDS)
    assert torch.equal(y[0, 4], torch.full((D,), 0.5))
    y[IDS == 5].sum().backward()
    assert all(not f.grad.any() for f in factors(layer) if f.grad is not None)
    assert not layer.get_delta_weight("default")[5].any()
    layer.merge()
    assert torch.equal(model(IDS), y) or options.get("forward") == "added"
    assert torch.equal(layer.get_base_layer().weight[5], torch.full((D,), 0.5))


def test_gradients_are_scaled_by_frequency_where_the_base_layer_asks_for_it():
    _, plain = one_layer(nn.Embedding(V, D))
    _, scaled = one_layer(nn.Embedding(V, D, scale_grad_by_freq=True))
    dY = 1e-3 * torch.randn(2, 5, D)  # below the clip, so that the gradient is linear in it
    counts = torch.tensor([(i == IDS).sum() for i in IDS.flatten()]).view(2, 5, 1)
    want = torch.autograd.grad(plain(IDS), factors(plain), dY / counts)
    for g, w in zip(torch.autograd.grad(scaled(IDS), factors(scaled), dY), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


def test_max_norm_is_refused():
    with pytest.raises(duallora.errors.ConfigError, match=r"'0' has max_norm=1\.0, which rewrites.*set max_norm=None"):
        one_layer(nn.Embedding(V, D, max_norm=1.0))


class Normed(nn.Embedding):
    """Not linear in its weight."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.normalize(super().forward(ids), dim=-1)


class Unseen(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_subclass_does_to_the_adapted_rows_what_it_does_to_its_own(dtype):
    """A norm acts on W0 + dW: to the bit what the subclass itself gives with the merged weight."""
    base = Normed(V, D).to(dtype)
    merged = copy.deepcopy(base)
    model, layer = one_layer(base)
    merged.weight.data = (base.weight.float() + layer.get_delta_weight("default")).to(dtype)
    assert torch.equal(model(IDS), merged(IDS))
    _, added = one_layer(copy.deepcopy(base), forward="added")
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(added(IDS), merged(IDS), rtol=tolerance, atol=tolerance * 8)


def test_positions_worked_out_inside_the_base_layer_are_adapted():
    """OPT's takes an attention mask, not ids."""
    base = OPTLearnedPositionalEmbedding(V - 2, D)
    _, layer = one_layer(copy.deepcopy(base))
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    want = copy.deepcopy(base)
    want.weight.data += layer.get_delta_weight("default")
    torch.testing.assert_close(layer(mask, 0), want(mask, 0))
    assert not torch.equal(layer(mask, 0), base(mask, 0))


def test_a_base_layer_that_looks_up_by_itself_is_refused():
    """Rather than left silently unadapted."""
    model, _ = one_layer(Unseen(V, D))
    with pytest.raises(duallora.errors.ConfigError, match=r"Unseen does not look its weight up through F\.emb"):
        model(IDS)


def test_distinct_ids_have_the_same_rows_where_the_graph_is_compiled():
    """The compiled form must not depend on the values for its shapes; dW of an id is then computed once as well."""
    torch._dynamo.reset()
    compiled = torch.compile(distinct, fullgraph=True, backend="eager")
    for ids in (IDS, torch.zeros(2, 5, dtype=torch.int64), torch.randperm(V)[:10].view(2, 5)):
        rows, where = compiled(ids)
        assert rows.shape == (10,)
        assert torch.equal(rows[where], ids)
        assert len(where.unique()) == len(ids.unique())
        rows, where = distinct(ids)
        assert torch.equal(rows[where], ids)
        assert len(rows) == len(ids.unique())


def test_positions_shared_by_the_batch_take_one_adapter_per_row(gpt2, ids):
    """GPT-2 looks its positions up once for all rows."""
    torch.manual_seed(0)
    options = {"warmup_steps": 0, "init_std": 0.3, "target_modules": ["wpe", "wte", "c_attn"]}
    model = peft.get_peft_model(gpt2(), DualLoraConfig(r1=4, r2=3, init_seed=1, **options))
    model.add_adapter("other", DualLoraConfig(r=2, init_seed=2, **options))
    model.eval()
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model(ids).logits
    names = ["other", "default", "other"]
    mixed = model(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-5)
