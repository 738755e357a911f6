"""Dual LoRA on fused experts: against slow loops over experts, in the models that have them, to the bit."""

from __future__ import annotations

import warnings

import oracle
import peft
import pytest
import torch
import transformers
from adapter_building import AWKWARD, factors, one_layer, train
from torch import nn

import duallora
from duallora import DualLoraConfig
from duallora.analysis.states import Adapter, State
from duallora.errors import ConfigError
from duallora.export import convert
from duallora.tuner import conversion, experts
from duallora.tuner.experts import Experts

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*whose gate is not open"),
    pytest.mark.filterwarnings("ignore:.*a larger rank adds"),
    pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 fuses no Mixtral"),
]

SCALING = 0.75 * 10 / 12**0.5  # of one_layer: gate, alpha, sqrt(r1 r2)
SHAPE = {
    "vocab_size": 67,
    "hidden_size": 36,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
ROUTED = {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 20}
MODELS = {
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 8},
    "mixtral": ROUTED,
    "gpt_oss": {**ROUTED, "head_dim": 8},
    "llama4_text": {**ROUTED, "num_experts_per_tok": 1, "intermediate_size_mlp": 30, "interleave_moe_layer_step": 1, "head_dim": 6},
}  # fmt: skip
TARGETS = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}


def build(kind: str = "mixtral", implementation: str | None = None, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **MODELS[kind], "pad_token_id": 0, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 3:  # Llama 4 begins with zeros
            nn.init.normal_(parameter, std=0.05)
    if implementation:
        model.set_experts_implementation(implementation)
    return model


def adapted(model: nn.Module, **options) -> peft.PeftModel:
    torch.manual_seed(7)
    return peft.get_peft_model(model, DualLoraConfig(**{**AWKWARD, **TARGETS, **options}))


def fused(model: nn.Module) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]


class Mixture(nn.Module):
    """Three experts [out, in] or [in, out], and tokens that are sorted by expert."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 7, 5) if is_transposed else torch.randn(3, 5, 7))

    def forward(self, x: torch.Tensor, chosen: tuple[int, ...] = (0, 1, 2)) -> torch.Tensor:
        return torch.stack([x[e] @ (self.up[e] if self.is_transposed else self.up[e].T) for e in chosen])


def mixture(is_transposed: bool = False, **options) -> tuple[peft.PeftModel, Experts]:
    return one_layer(Mixture(is_transposed), target_modules=[], target_parameters=["0.up"], **options)


@pytest.mark.parametrize(
    ("is_transposed", "backend"), [(False, "auto"), (True, "auto"), (False, "reference"), (True, "recompute")]
)
def test_each_expert_agrees_with_the_oracle(is_transposed, backend):
    """y, dx and the gradients of each expert by itself: the clip must not see the others', nor a row of another layout."""
    _, layer = mixture(is_transposed, backend=backend)
    assert all(not torch.equal(factor[0], factor[1]) for factor in factors(layer))  # a stream of the seed each
    x = torch.randn(3, 6, 7, requires_grad=True)
    y = layer(x)
    dY = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, *factors(layer)], dY)
    for e in range(3):
        W = layer.get_base_layer().up.detach()[e]
        want, (dx, _, *gradients) = oracle.dual_linear(
            x[e].detach(), W.T if is_transposed else W, None, [f[e].detach() for f in factors(layer)], SCALING, dY[e]
        )
        torch.testing.assert_close(y[e].double(), want, rtol=1e-5, atol=1e-5)
        for g, w in zip(got, [dx, *gradients], strict=True):
            torch.testing.assert_close(g[e].double(), w, rtol=1e-4, atol=1e-4)


def test_experts_that_no_token_takes_are_not_built(monkeypatch):
    """Of 128 experts a token takes eight; the others get a gradient of zero, not none."""
    _, layer = mixture()
    built = []
    real = experts.weight
    monkeypatch.setattr(experts, "weight", lambda *given: built.append(1) or real(*given))
    layer(torch.randn(3, 6, 7), (1,)).sum().backward()
    assert len(built) == 1
    for factor in factors(layer):
        assert factor.grad[1].any()
        assert not factor.grad[[0, 2]].any()


@pytest.mark.parametrize(
    ("kind", "implementation", "warmup"),
    [
        ("qwen3_moe", "eager", "ramp"), ("mixtral", "grouped_mm", "residual"), ("gpt_oss", "batched_mm", "ramp"),
        ("llama4_text", None, "residual"),
    ],
)  # fmt: skip
def test_models_with_fused_experts_train_save_reload_and_merge_to_the_bit(kind, implementation, warmup, ids, tmp_path):
    model = adapted(build(kind, implementation), warmup=warmup)
    assert len(fused(model)) == 4
    with model.disable_adapter():
        base = model(ids).logits
    assert torch.equal(model(ids).logits, base) or warmup == "residual"
    train(model, ids)
    assert duallora.gate(model) == (0.75 if warmup == "ramp" else 1)
    assert all(factor.grad.any() for layer in fused(model) for factor in factors(layer))
    y = model(ids).logits
    assert (y - base).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    adapter = Adapter(State(3, tmp_path / "adapter"))  # as analyze reads it
    assert len(adapter.layers()) == 2 + 4 * 5
    for outer in (layer for layer in fused(model) if isinstance(layer.base_layer, Experts)):
        name = next(name for name, module in model.named_modules() if module is outer)
        read = adapter.update(f"{name}[4]").delta() * outer.scaling["default"] * duallora.gate(model)
        stored = outer.get_delta_weight("default")[4]
        torch.testing.assert_close(read.T if outer.fan_in_fan_out else read, stored.double(), rtol=1e-4, atol=1e-7)
    for low in (False, True):
        again = peft.PeftModel.from_pretrained(build(kind, implementation), tmp_path / "adapter", low_cpu_mem_usage=low)
        assert torch.equal(again(ids).logits, y)
    with duallora.folded(model):
        assert all(layer.merged for layer in fused(model))
        assert torch.equal(model(ids).logits, y)
    model.merge_adapter()
    assert torch.equal(model(ids).logits, y)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base)
    merged = model.merge_and_unload()
    assert not fused(merged)
    assert torch.equal(merged(ids).logits, y)
    merged.save_pretrained(tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    if implementation:
        plain.set_experts_implementation(implementation)
    assert torch.equal(plain(ids).logits, y)


def test_two_adapters_add_and_one_can_be_merged_scaled_or_deleted(ids):
    model = adapted(build())
    model.add_adapter("second", DualLoraConfig(**{**AWKWARD, **TARGETS, "r1": 2}))
    assert len(fused(model)) == 4
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        train(model, ids)
    model.base_model.set_adapter(["default", "second"])
    both = model(ids).logits
    layer = fused(model)[0]
    W = layer.get_base_layer().get_parameter(layer.weight_name)
    total = W + sum(layer.get_delta_weight(adapter) for adapter in ("default", "second"))
    torch.testing.assert_close(getattr(layer, layer.weight_name) + 0, total)
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(ids).logits, both)
    model.unmerge_adapter()
    model.set_adapter("second")
    alone = model(ids).logits
    model.set_scale("second", 0.5)
    assert not torch.equal(model(ids).logits, alone)
    model.set_scale("second", 1.0)
    model.delete_adapter("default")
    assert torch.equal(model(ids).logits, alone)


def test_bf16_experts_keep_float32_factors_and_checkpointing_repeats_the_forward(ids):
    model = adapted(build(implementation="eager").bfloat16())
    assert {factor.dtype for layer in fused(model) for factor in factors(layer)} == {torch.float32}
    train(model, ids)
    y = model(ids).logits
    model.train()
    trained = [factor for layer in fused(model) for factor in factors(layer)]
    plain = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    repeated = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained)
    assert all(torch.equal(g, w) for g, w in zip(repeated, plain, strict=True))
    merged = model.eval().merge_and_unload()
    assert torch.equal(merged(ids).logits, y)


def test_experts_compile_without_a_break_or_a_new_graph_as_the_gate_moves():
    model, layer = mixture()
    x = torch.randn(3, 6, 7)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    before = compiled(x)
    torch.testing.assert_close(before, layer(x))
    duallora.advance_gate(model, 1)
    torch.testing.assert_close(compiled(x), layer(x))
    assert not torch.equal(compiled(x), before)
    assert len(graphs) == 1


def test_a_parent_that_reads_the_experts_gets_w0_plus_dw(ids):
    model = adapted(build())
    train(model, ids)
    outer, inner = fused(model)[:2]
    assert inner is outer.base_layer
    for layer in (outer, inner):
        read = getattr(outer, layer.weight_name) + 0
        raw = layer.get_base_layer().get_parameter(layer.weight_name)
        torch.testing.assert_close(read - raw, layer.get_delta_weight("default"), rtol=0, atol=1e-6)
    assert not hasattr(outer, "weight")


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"duallora_dropout": 0.1}, {"forward": "added"}, {"direction": "fixed"}],
    ids=lambda options: next(iter(options)),
)
def test_what_experts_cannot_have_is_refused_by_name(options):
    with pytest.raises(ConfigError, match=f"target_parameters cannot have {next(iter(options))}"):
        DualLoraConfig(target_parameters=["experts.down_proj"], **options)


def test_unknown_layouts_and_names_are_refused_before_anything_changes(ids):
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 5, 7))

    model = nn.Sequential(Strange(), nn.Linear(3, 3))
    config = DualLoraConfig(r=2, target_modules=["1"], target_parameters=["0.up"])
    with pytest.raises(ConfigError, match=r"'0\.up' \[3, 5, 7\], of unknown layout.*is_transposed"):
        peft.get_peft_model(model, config)
    assert type(model[1]) is nn.Linear
    model = build()
    for names, message in (
        (["experts.down_proj", "experts.up"], r"\['experts.up'\].*experts.down_proj, experts.gate_up_proj"),
        (["q_proj.weight"], r"q_proj.weight' \[36, 36\], of unknown layout.*target_modules"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapted(model, target_parameters=names)
        assert not any(hasattr(module, "duallora_A") for module in model.modules())
    both = adapted(model).eval()
    with pytest.raises(ConfigError, match=r"reaches .*gate_up_proj.* in one adapter of this model and not in another"):
        both.add_adapter("second", DualLoraConfig(target_modules=[], target_parameters=["experts.down_proj"]))
    with pytest.raises(ConfigError, match="experts see tokens, not the rows"):
        both(ids, adapter_names=["default"] * len(ids))


def test_experts_alone_need_no_target_modules_and_take_patterns_of_rank():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        model = adapted(build(), target_modules=None, rank_pattern={"experts.down_proj": [2, 1]}, alpha_pattern={})
    ranks = {layer.weight_name: (layer.r1["default"], layer.r2["default"]) for layer in fused(model)}
    assert ranks == {"down_proj": (2, 1), "gate_up_proj": (4, 3)}
    assert {type(m) for m in model.modules() if hasattr(m, "duallora_A")} == {Experts}
    with pytest.warns(UserWarning, match="'up_proj' in rank_pattern or alpha_pattern matches no adapted layer"):
        adapted(build(), alpha_pattern={"up_proj": 3, "gate_up_proj": 5})


@pytest.mark.skipif(not hasattr(peft.tuners.lora.layer, "ParamWrapper"), reason="this PEFT has no LoRA on parameters")
@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text"])
def test_experts_convert_to_peft_loras_of_full_rank_that_compute_the_same(kind, ids, tmp_path):
    """Written and read as duallora convert does; a mixed up expert, rank or side would show."""
    model = adapted(build(kind), r1=2, r2=2)
    train(model, ids, steps=4)
    y = model(ids).logits
    layers = convert.dual_layers(model)
    assert {name: list(layer.duallora_A["default"].shape) for name, layer in layers.items() if name.endswith("[4]")}
    done = list(conversion.convert_layers(model, layers, 36))
    assert max(layer.facts()["relative_error"] for layer in done) < 1e-5
    tensors = conversion.together(done)
    convert._write(tmp_path, convert.lora_config(model, list(layers), 36), tensors)
    plain = convert._load(build(kind), tmp_path, tensors)
    assert sum(type(module).__name__ == "ParamWrapper" for module in plain.modules()) == 4
    torch.testing.assert_close(plain(ids).logits, y, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain.unload()(ids).logits, y, rtol=1e-2, atol=1e-3)
