"""Several adapters, their scales and biases on every kind of layer: sums of dW, partial merges, what PEFT offers."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from adapter_building import layers
from safetensors.torch import load_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import duallora
from duallora import DualLoraConfig
from duallora.errors import ConfigError
from duallora.tuner import DualLoraLayer

PEFT = tuple(int(part) for part in peft.__version__.split(".")[:2])
X = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))


class Kinds(nn.Module):
    """Two embeddings, one of which scales its rows, two convolutions, two linear layers, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12, padding_idx=0)
        self.scaled = Gemma3TextScaledWordEmbedding(50, 12, 0, embed_scale=1.7)
        self.conv = nn.Conv1d(12, 10, 3, padding=1, groups=2)
        self.pool = nn.Conv2d(1, 6, (10, 3))
        self.lin = nn.Linear(6, 7)
        self.out = nn.Linear(7, 5, bias=False)

    def forward(self, x: torch.Tensor, **_) -> torch.Tensor:
        h = torch.tanh(self.conv((self.embed(x) + self.scaled(x)).transpose(1, 2)))
        h = self.pool(h[:, None])[:, :, 0].mean(2)
        return self.out(torch.tanh(self.lin(h)))


TARGETS = ["embed", "scaled", "conv", "pool", "lin", "out"]


def base() -> Kinds:
    torch.manual_seed(0)
    return Kinds()


def config(**options) -> DualLoraConfig:
    return DualLoraConfig(
        **{
            "r1": 4, "r2": 3, "alpha": 10, "warmup_steps": 0, "init_std": 0.2, "direction_init_std": 0.1,
            "target_modules": TARGETS, **options,
        }
    )  # fmt: skip


def two(**options) -> peft.PeftModel:
    """Adapters "a" (init_seed 1) and "b" (2, other ranks), both active."""
    model = peft.get_peft_model(base(), config(init_seed=1, **options), adapter_name="a")
    model.add_adapter("b", config(init_seed=2, r1=2, alpha=3, **options))
    model.base_model.set_adapter(["a", "b"])
    return model.eval()


def summed(model: nn.Module, **weights: float) -> torch.Tensor:
    """The base model with W0 + sum of weight dW, put together by hand."""
    plain = base()
    for module, layer in zip([getattr(plain, n) for n in TARGETS], layers(model), strict=True):
        for name, weight in weights.items():
            module.weight.data += weight * layer.get_delta_weight(name)
    return plain(X)


@pytest.fixture(autouse=True)
def _merging_in_parts_is_meant():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Already following adapters|All adapters are already|Adapter . was)")
        warnings.filterwarnings("ignore", message=".*a larger rank adds")
        yield


@pytest.mark.parametrize("options", [{}, {"forward": "added"}, {"use_dora": True}], ids=str)
def test_active_adapters_add_their_dw(options):
    model = two(**options)
    torch.testing.assert_close(model(X), summed(model, a=1, b=1), rtol=1e-4, atol=1e-5)
    model.set_adapter("b")
    torch.testing.assert_close(model(X), summed(model, b=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("order", "options"), [("ab", {}), ("ba", {}), ("ab", {"forward": "added"}), ("ba", {"use_dora": True})], ids=str
)
def test_one_merged_and_one_active_still_add(order, options):
    """In both orders, then the second merged too, then either deleted, then all of it undone."""
    model, (first, second) = two(**options), order
    want, alone = model(X), summed(model, **{second: 1})
    close = {"rtol": 1e-4, "atol": 1e-5}
    model.merge_adapter([first])
    torch.testing.assert_close(model(X), want, **close)
    model.merge_adapter([second])
    torch.testing.assert_close(model(X), want, **close)
    for layer in layers(model):
        layer.delete_adapter(first)
        assert layer.merged_adapters == [second]
    torch.testing.assert_close(model(X), alone, **close)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), alone, **close)
    for layer in layers(model):
        layer.delete_adapter(second)
    assert torch.equal(model(X), base()(X))


BY_KERNELS = [
    {},
    {"use_dora": True},
    {"warmup": "residual"},
    {"direction": "identity"},
    {"direction": "dorefa"},
    {"direction": "tanh", "magnitude": "identity"},
    {"ste_clip": "window", "magnitude": "abs"},
]
# Torch's products of some rows of an embedding may round otherwise than those of all.
BY_OPERATORS = [{"direction": "fixed"}, {"direction": "xnor"}, {"magnitude": "sigmoid"}, {"backend": "reference"}]


@pytest.mark.filterwarnings("ignore:.*whose gate is not open")
@pytest.mark.parametrize("options", BY_KERNELS + BY_OPERATORS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_output_has_the_bits_of_the_unmerged(dtype, options):
    """Of every kind, in mid-ramp; the base weights come back bit for bit, and dW stays what it was."""
    given = {"warmup_steps": 4, "target_modules": TARGETS if options in BY_KERNELS else TARGETS[2:], **options}
    model = peft.get_peft_model(base().to(dtype), config(init_seed=1, **given)).eval()
    duallora.advance_gate(model, 3)
    for name, parameter in model.named_parameters():
        if name.endswith(("duallora_B.default", "duallora_m.default")):
            parameter.data.mul_(1.2)  # off the start of the residual form and of the lengths
    bases = [layer.get_base_layer() for layer in layers(model)]
    before, deltas = [b.weight.clone() for b in bases], [x.get_delta_weight("default") for x in layers(model)]
    want = model(X)
    assert want.dtype == dtype
    model.merge_adapter(safe_merge=True)
    assert torch.equal(model(X), want)
    assert not any(torch.equal(b.weight, was) for b, was in zip(bases, before, strict=True))
    assert all(torch.equal(x.get_delta_weight("default"), d) for x, d in zip(layers(model), deltas, strict=True))
    model.unmerge_adapter()
    assert all(torch.equal(b.weight, was) for b, was in zip(bases, before, strict=True))
    assert torch.equal(model(X), want)
    assert torch.equal(model.merge_and_unload()(X), want)


def test_hooks_of_every_kind_of_base_layer_run():
    model, seen = two(), []
    want = model(X)
    for layer in layers(model):
        layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(X), want, rtol=1e-4, atol=1e-5)
    assert len(seen) == len(TARGETS)


def test_every_kind_of_layer_compiles_whole():
    model = peft.get_peft_model(base(), config(init_seed=1))
    factors = [p for p in model.parameters() if p.requires_grad]
    torch._dynamo.reset()
    y, want = torch.compile(model, fullgraph=True, backend="aot_eager")(X), model(X)
    assert torch.equal(y, want)
    dY = torch.randn_like(y)
    for g, w in zip(*(torch.autograd.grad(t, factors, dY) for t in (y, want)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_both_merged_have_the_bits_of_both_unmerged():
    model = two()
    want = model(X)
    model.merge_adapter()
    assert torch.equal(model(X), want)
    model.unmerge_adapter()
    for layer in layers(model):  # whatever the order of merging
        layer.merge(adapter_names=["b"])
        layer.merge(adapter_names=["a"])
    torch.testing.assert_close(model(X), want, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(model(X), want)
    with model.disable_adapter():
        assert torch.equal(model(X), base()(X))


@pytest.mark.parametrize("options", [{}, {"forward": "added", "use_dora": True}], ids=str)
def test_one_adapter_per_row_on_every_kind_of_layer(options):
    model = two(**options)
    alone = {"__base__": base()(X)}
    for name in "ab":
        model.set_adapter(name)
        alone[name] = model(X)
    names = ["b", "__base__", "a"]
    mixed = model(X, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="got 2 and 3"):
        model(X, adapter_names=names[:2])
    with pytest.raises(ValueError, match=r"non-existing adapter.*nobody"):
        model(X, adapter_names=["nobody", "a", "b"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(X, adapter_names=names)
    model.eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        model(X, adapter_names=names)


@pytest.mark.parametrize("options", [{}, {"forward": "added", "warmup": "residual", "init_weights": False}], ids=str)
def test_scaled_adapters_give_the_exact_weighted_sum(options):
    """What stands in for add_weighted_adapter: forward, merge and get_delta_weight follow, negative weights too."""
    model = two(**options)
    plain = [layer.get_delta_weight("a") for layer in layers(model)]
    assert all(delta.any() for delta in plain)
    want = summed(model, a=0.7, b=-0.4)
    with torch.no_grad():
        model(X)  # kept weights must notice
    model.set_scale("a", 0.7)
    model.set_scale("b", -0.4)
    for layer, delta in zip(layers(model), plain, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("a"), 0.7 * delta)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(X), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(X), want, rtol=1e-4, atol=1e-5)


def test_scale_layer_and_its_way_back():
    model = two()
    want = {s: summed(model, a=s, b=s) for s in (1, 6)}
    close = {"rtol": 1e-4, "atol": 1e-5}
    for layer in layers(model):
        layer.scale_layer(2)
        layer.scale_layer(3)
        layer.set_scale("nobody", 9)  # as PEFT's LoRA layers: not here, nothing to do
    torch.testing.assert_close(model(X), want[6], **close)
    for layer in layers(model):
        layer.unscale_layer(3)
        layer.unscale_layer()
    torch.testing.assert_close(model(X), want[1], **close)
    with torch.no_grad():
        model(X)
    for layer in layers(model):  # the way PEFT's and diffusers' own helpers do it
        layer.scaling = {name: 6 * value for name, value in layer.scaling.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(X), want[6], **close)
    model.merge_adapter()
    with pytest.raises(ConfigError, match=r"adapter 'a' is merged.*unmerge_adapter\(\) first"):
        model.set_scale("a", 2)
    with pytest.raises(ConfigError, match="no adapter 'c' to scale: this model has a, b"):
        model.set_scale("c", 2)


def test_a_scale_that_is_refused_changes_nothing():
    """One of the layers is merged, or the number is none."""
    model = two()
    before = [dict(layer.scaling) for layer in layers(model)]
    for scale in (float("nan"), float("inf"), "2", None, True):
        with pytest.raises(ConfigError, match=f"scale={scale!r} for adapter 'a': expected a finite number"):
            model.set_scale("a", scale)
    layers(model)[-1].merge(adapter_names=["a"])
    with pytest.raises(ConfigError, match="'a' is merged"):
        model.set_scale("a", 2)
    assert [layer.scaling for layer in layers(model)] == before


def test_scaled_dora_has_its_lengths_still():
    """W' = m (W0 + scale dW) / |W0 + scale dW|, as an adapter of scale * alpha has it."""
    model, want = (peft.get_peft_model(base(), config(init_seed=1, use_dora=True, alpha=a)) for a in (10, 4))
    model.set_scale("default", 0.4)
    for got, expected in zip(layers(model), layers(want), strict=True):
        torch.testing.assert_close(got.get_delta_weight("default"), expected.get_delta_weight("default"))


def test_add_weighted_adapter_says_what_does_the_same():
    model = two()
    with pytest.raises(ConfigError, match=r"\['a', 'b'\].*ReLU and Sign do not add.*set_scale.*convert each to LoRA"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c", combination_type="linear")
    assert set(model.peft_config) == {"a", "b"}


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()


SAVES_BIASES = hasattr(peft.tuners.tuners_utils.BaseTuner, "_get_learnable_bias_state_dict")


@pytest.mark.parametrize("bias", ["none", "all", "duallora_only"])
def test_biases_are_trained_saved_and_kept_on_merging_as_in_lora(tmp_path, bias):
    """Which ones: by PEFT's LoRA with the same targets. LoRA's bias lives in the base layer: disabling leaves it."""
    targets = {"target_modules": ["conv", "out"]}
    if bias != "none" and not SAVES_BIASES:
        with pytest.raises(ConfigError, match=f"does not save the biases of bias='{bias}'.*upgrade"):
            peft.get_peft_model(base(), config(bias=bias, **targets))
        return
    model = peft.get_peft_model(base(), config(bias=bias, **targets))
    trained = sorted(n for n, p in model.named_parameters() if n.endswith("bias") and p.requires_grad)
    assert len(trained) == {"none": 0, "all": 3, "duallora_only": 1}[bias]
    if SAVES_BIASES:
        lora = peft.LoraConfig(r=2, bias=bias.replace("duallora", "lora"), **targets)
        names = peft.get_peft_model(base(), lora).named_parameters()
        assert trained == sorted(n for n, p in names if n.endswith("bias") and p.requires_grad)
    train(model)
    model.eval()
    want = model(X)
    model.merge_adapter()
    assert torch.equal(model(X), want)
    model.unmerge_adapter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with model.disable_adapter():
            assert torch.equal(model(X), base()(X)) == (bias == "none")
    assert any("does not produce the same output" in str(w.message) for w in caught) == (bias != "none")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(n for n in saved if n.endswith("bias")) == trained
    assert torch.equal(peft.PeftModel.from_pretrained(base(), tmp_path)(X), want)
    assert torch.equal(model.merge_and_unload()(X), want)


@pytest.mark.parametrize(
    "put", [peft.get_peft_model, lambda model, config: peft.inject_adapter_in_model(config, model)]
)
def test_on_a_model_that_has_a_lora_the_two_add_up(put):
    """The LoRA layer holds the base layer itself: given ours in its place, each would be inside of the other."""
    lora = peft.LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False)
    with torch.no_grad():
        one = put(base(), lora)
        before = one(X)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(peft_config|second time)")
            both = put(one, DualLoraConfig(r=2, target_modules=["lin", "out"], warmup_steps=1, init_std=0.3))
        assert torch.equal(both(X), before)
        duallora.advance_gate(both)
        found = both(X)
        assert not torch.allclose(found, before)
        assert len(layers(both)) == 2
        for layer in layers(both):
            layer.merge()
        torch.testing.assert_close(both(X), found)
        for layer in layers(both):
            layer.unmerge()
        assert torch.equal(both(X), found)


def test_merged_adapters_cannot_be_deleted_behind_the_models_back():
    model = two()
    model.merge_adapter(["a"])
    if PEFT >= (0, 21):
        with pytest.raises(ValueError, match="merged"):
            model.delete_adapter("a")
    model.unmerge_adapter()
    model.delete_adapter("a")
    torch.testing.assert_close(model(X), summed(model, b=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_two_adapters_save_and_load_beside_each_other(tmp_path, low_cpu_mem_usage):
    model = two()
    want = model(X)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        base(), tmp_path / "a", adapter_name="a", low_cpu_mem_usage=low_cpu_mem_usage
    )
    again.load_adapter(tmp_path / "b", "b", low_cpu_mem_usage=low_cpu_mem_usage)
    again.base_model.set_adapter(["a", "b"])
    assert torch.equal(again(X), want)


@pytest.mark.parametrize(("factor", "broken"), [("A", float("nan")), ("B", float("inf")), ("D", float("inf"))])
def test_safe_merge_refuses_what_is_not_finite_and_leaves_every_kind_of_layer_untouched(factor, broken):
    """In whichever factor it sits: a sign hides an infinite one."""
    for target in TARGETS:
        model = peft.get_peft_model(base(), config(target_modules=[target]))
        (layer,) = layers(model)
        before = layer.get_base_layer().weight.clone()
        getattr(layer, f"duallora_{factor}")["default"].data[-1, 0] = broken
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(layer.get_base_layer().weight, before)


def test_all_linear_says_that_fused_experts_stay_as_they_are():
    """transformers 5 keeps them in 3-d parameters, which no module name reaches."""
    shape = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    experts = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    model = MixtralForCausalLM(MixtralConfig(**shape, **experts))
    if not any(p.dim() == 3 for p in model.parameters()):
        pytest.skip("this transformers release keeps experts as modules")
    with pytest.warns(UserWarning, match=r"does not reach the experts.*4 fused parameters such as '.*experts\."):
        adapted = peft.get_peft_model(model, DualLoraConfig(r=2, target_modules="all-linear"))
    assert {n.rpartition(".")[2] for n, m in adapted.named_modules() if isinstance(m, DualLoraLayer)} >= {"q_proj"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not reach the experts")
        peft.get_peft_model(base(), DualLoraConfig(r=2, target_modules="all-linear"))
