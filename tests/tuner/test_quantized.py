"""Quantized bases: bitsandbytes, torchao and HQQ on the CPU. The oracle dequantizes with the library and adds by hand.

A library that is not installed skips its tests.
"""

from __future__ import annotations

import copy
import logging
import warnings

import oracle
import peft
import pytest
import torch
from adapter_building import layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import duallora
from duallora.errors import ConfigError
from duallora.tuner import quantized
from duallora.tuner.linear import Linear

BITSANDBYTES = ["nf4", "fp4", "int8"]
KINDS = [*BITSANDBYTES, "torchao-int8", "torchao-int4", "hqq"]
LIBRARY = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8": "bitsandbytes", "hqq": "hqq"}
EXACT = ["nf4", "torchao-int8", "hqq"]  # one of each library, and their evaluation rounds no activations
OPTIONS = {"r1": 3, "r2": 5, "alpha": 7, "target_modules": "all-linear", "warmup_steps": 4, "init_seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Widths that are no multiples of 32 or 64: bitsandbytes' packed and blocked kernels need care there."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67, hidden_size=40, intermediate_size=70, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(folder):
    """``base(kind)``: the model with every linear layer but the head quantized."""

    def build(
        kind: str, dtype: torch.dtype = torch.float32, as_loaded: bool = False, folder=folder
    ) -> LlamaForCausalLM:
        library = LIBRARY.get(kind, "torchao")
        pytest.importorskip(library, reason=f"{library} is not installed")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        if kind == "hqq":
            return hqq(LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval(), dtype)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization(kind, dtype), device_map={"": "cpu"}, dtype=dtype
        )
        if not as_loaded:  # some CPUs would pack its weights in an evaluation without adapters, see below
            quantized.keep_exact(model)
        return model

    return build


def quantization(kind, dtype=torch.float32):
    if kind.startswith("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis
        from transformers import TorchAoConfig

        int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0))
        return TorchAoConfig(Int8WeightOnlyConfig() if kind == "torchao-int8" else int4)
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=kind == "nf4",
        bnb_4bit_compute_dtype=dtype,
    )


def hqq(model, dtype):
    """transformers 5 quantizes nothing with HQQ, so its layers are put in by hand."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            config = BaseQuantizeConfig(nbits=4, group_size=8)
            setattr(model.get_submodule(parent), child, HQQLinear(module, config, compute_dtype=dtype, device="cpu"))
    return model


def library_weight(layer) -> torch.Tensor:
    """W0 [out, in] in float64, dequantized by the library (8-bit: by the formula of LLM.int8)."""
    if hasattr(layer, "W_q"):
        return layer.dequantize().double()
    weight = layer.weight
    if weight.dtype == torch.uint8:
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    if weight.dtype == torch.int8:
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.double() * scales.double()[:, None] / 127
    return weight.dequantize().double()


def adapted(model, **options):
    model = peft.get_peft_model(model, duallora.DualLoraConfig(**{**OPTIONS, **options}))
    duallora.advance_gate(model, 3)
    torch.manual_seed(3)
    for layer in layers(model):
        for A in layer.duallora_A.values():
            A.data.normal_(std=0.5)
        for B in layer.duallora_B.values():
            B.data.normal_(std=0.02)  # dW is then smaller than W0: a share of the one is none of the other
        for m in layer.duallora_m.values():
            m.data.mul_(torch.linspace(0.8, 1.3, len(m)))
    return model


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def delta(layer, adapter="default") -> torch.Tensor:
    """dW in float64 by the oracle, without DoRA."""
    factors = [factor.detach().tolist() for factor in layer._factors(adapter)]
    scaling = layer.scaling[adapter] * min(1, int(layer.duallora_step[adapter]) / OPTIONS["warmup_steps"])
    return torch.tensor(oracle.delta(*factors, scaling), dtype=torch.float64)


def stored(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in quantized.stored_tensors(model).items() if "duallora_" not in name}


def assert_same_bits(model, before) -> None:
    now = stored(model)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


# -- one layer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "use_dora"), [("nf4", False), *((kind, True) for kind in KINDS)])
def test_a_layer_is_what_the_oracle_says_of_its_dequantized_weight(base, kind, use_dora):
    """In mid-ramp, r1 != r2, with a bias: y and the gradients of x, of the factors and of m."""
    model = adapted(base(kind), use_dora=use_dora).train()
    layer = model.base_model.model.model.layers[1].self_attn.k_proj
    x = torch.randn(5, layer.in_features, requires_grad=True)
    dY = torch.randn(5, layer.out_features)
    W, bias = library_weight(layer.base_layer), layer.base_layer.bias.detach()
    m = layer.duallora_m["default"].detach() if use_dora else None
    factors = [factor.detach() for factor in layer._factors("default")]
    want, gradients = oracle.dual_linear(x.detach(), W, bias, factors, 0.75 * 7 / 15**0.5, dY, m=m)
    y = layer(x)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    leaves = [x, *layer._factors("default"), *([layer.duallora_m["default"]] if use_dora else [])]
    for got, g in zip(torch.autograd.grad(y, leaves, dY), [gradients[0], *gradients[2:]], strict=True):
        torch.testing.assert_close(got.double(), g, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "use_dora"), [("nf4", False), ("torchao-int8", True), ("hqq", True)])
def test_in_bfloat16_the_update_is_rounded_once(base, kind, use_dora):
    """The factors stay in float32; the layer's output is that of the base layer plus dW's, to bfloat16's 2^-8."""
    model = adapted(base(kind, torch.bfloat16), use_dora=use_dora)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert {factor.dtype for factor in layer._factors("default")} == {torch.float32}
    W, x = library_weight(layer.base_layer), torch.randn(7, layer.in_features, dtype=torch.bfloat16)
    m = layer.duallora_m["default"].detach() if use_dora else None
    factors = [factor.detach() for factor in layer._factors("default")]
    want, _ = oracle.dual_linear(x, W, None, factors, 0.75 * 7 / 15**0.5, torch.zeros(7, 40), m=m)
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.double() - want).norm() < 2**-7 * want.norm()


@pytest.mark.parametrize("kind", EXACT)
def test_training_keeps_no_dequantized_weight_for_the_backward(base, kind):
    """Beyond what the base layer itself keeps, no tensor of W0's size is saved, with DoRA neither."""
    model = adapted(base(kind), use_dora=True, duallora_dropout=0.1).train()
    layer = model.base_model.model.model.layers[0].mlp.up_proj

    def saved(module) -> int:
        large = []
        x = torch.randn(2, layer.in_features, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (large.append(t.shape) if t.numel() == layer.in_features * layer.out_features else None, t)[1],
            lambda t: t,
        ):
            module(x)
        return len(large)

    forwards = 2  # dropout gives the DoRA path an input, and a base product, of its own
    assert saved(layer) <= forwards * saved(layer.base_layer)


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_quantized_model_to_the_bit(base, ids, kind):
    model = base(kind)
    want = logits(model, ids)
    model = peft.get_peft_model(model, duallora.DualLoraConfig(**OPTIONS, use_dora=kind in EXACT))
    assert torch.equal(logits(model, ids), want)


# -- the model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "hqq"])  # a class of torch's, and one that is not
def test_all_linear_means_every_quantized_layer_and_not_the_head(base, kind):
    model = adapted(base(kind))
    assert len(layers(model)) == 14
    assert not isinstance(model.base_model.model.lm_head, BaseTunerLayer)
    assert all(parameter.requires_grad == ("duallora_" in name) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("kind", [*EXACT, "int8"])
def test_trained_saved_and_reloaded_it_gives_the_same_bits(base, ids, tmp_path, kind):
    """Prepared as PEFT prescribes, with gradient checkpointing."""
    model = peft.prepare_model_for_kbit_training(base(kind))
    model = peft.get_peft_model(model, duallora.DualLoraConfig(**OPTIONS)).train()
    before = stored(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.05
    assert_same_bits(model, before)
    want = logits(model.eval(), ids)
    model.save_pretrained(tmp_path)
    for lean in (False, True):
        fresh = peft.prepare_model_for_kbit_training(base(kind))
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=lean).eval()
        assert torch.equal(logits(loaded, ids), want)


@pytest.mark.parametrize("kind", ["nf4", "hqq"])
def test_checkpointing_changes_no_gradient_and_autocast_little(base, ids, kind):
    """HQQ's own backward takes no mixed types, with or without adapters."""
    found = {}
    for mode in ("plain", "checkpointed", *(["autocast"] if kind != "hqq" else [])):
        model = adapted(base(kind)).train()
        if mode == "checkpointed":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found[mode] = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert torch.equal(found["plain"], found["checkpointed"])
    if kind != "hqq":
        assert (found["autocast"] - found["plain"]).norm() < 0.1 * found["plain"].norm()


def test_two_adapters_add_up_and_rows_choose_theirs(base, ids):
    """One of them with DoRA, whose change of W0 must not count the other's."""
    model = adapted(base("nf4"))
    model.add_adapter("other", duallora.DualLoraConfig(**{**OPTIONS, "r1": 2, "r2": 4, "init_seed": 2}, use_dora=True))
    for layer in layers(model):
        layer.duallora_B["other"].data.normal_(std=0.1)
        layer.duallora_m["other"].data.mul_(1.2)
    duallora.advance_gate(model, 3)
    model.eval()
    single = []
    for name in ("default", "other"):
        model.base_model.set_adapter(name)
        single.append(logits(model, ids))
    rows = logits(model, ids, adapter_names=["other", "__base__", "default"])
    with model.disable_adapter():
        plain = logits(model, ids)
    for row, want in zip(rows, (single[1][0], plain[1], single[0][2]), strict=True):
        torch.testing.assert_close(row, want, rtol=1e-4, atol=1e-4)
    model.base_model.set_adapter(["default", "other"])
    layer = layers(model)[3]
    W = library_weight(layer.base_layer) + sum(layer.get_delta_weight(name).double() for name in ("default", "other"))
    x = torch.randn(4, layer.in_features)
    want = x.double() @ W.T + (0 if layer.base_layer.bias is None else layer.base_layer.bias.double())
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), want, rtol=1e-4, atol=1e-4)


def test_training_goes_on_after_an_evaluation(base, ids):
    """On CPUs with AVX512-BF16 bitsandbytes repacks the weights of an evaluated model: dequantized they would be noise,
    widths that are no multiples of 32 fail, and the next training step has no gradient for x."""
    model = base("nf4", as_loaded=True)
    want = [library_weight(module) for module in model.modules() if quantized.storage(module)]
    model = adapted(model, target_modules=["q_proj"])
    logits(model.eval(), ids)
    got = [library_weight(module) for module in model.modules() if quantized.storage(module)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "duallora_B" in n)


# -- merging ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*shared one weight", "ignore:Merg(ed|ing)")
def test_a_tied_head_merged_on_4_bit_layers_reloads_as_in_memory(tmp_path, ids):
    """Loaded, bitsandbytes would round the scales of its layers for an evaluation on some CPUs: of any model, not ours."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    shape = {"vocab_size": 67, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization("nf4"))
    model = adapted(base, target_modules=["lm_head", "q_proj"])
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    quantized.keep_exact(again)
    assert not again.config.tie_word_embeddings
    assert torch.equal(again(ids).logits, merged(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_quantizes_the_sum_says_what_is_lost_and_comes_back(base, folder, ids, kind, tmp_path):
    """The merged weight is the library's own quantization of W0 + dW; the warning's figures are those of float64."""
    model = adapted(base(kind)).eval()
    before, unmerged = stored(model), logits(model, ids)
    W0 = {name: library_weight(module.base_layer) for name, module in named_layers(model)}
    dW = {name: delta(module) for name, module in named_layers(model)}
    with pytest.warns(UserWarning, match="Merged into quantized weights") as caught:
        model.merge_adapter()
    caught = [w for w in caught if "quantized" in str(w.message)]
    assert len(caught) == 1, "one for the call, not one for each layer"
    plain = LlamaForCausalLM.from_pretrained(folder)
    for name in W0:
        plain.get_submodule(name).weight.data.copy_(W0[name] + dW[name])
    plain.save_pretrained(tmp_path)
    lost, anew = {}, base(kind, folder=tmp_path)
    for name, module in named_layers(model):
        W = library_weight(module.base_layer)
        same = (W - library_weight(anew.get_submodule(name))).abs() < 1e-5
        assert same.double().mean() > 0.99  # a sum in the middle between two values of the grid may go either way
        lost[name] = float((W - W0[name] - dW[name]).norm() / dW[name].norm())
    worst = max(lost, key=lost.__getitem__)
    assert 0 < lost[worst] < 0.5
    middle = sorted(lost.values())[len(lost) // 2]
    assert f"{middle:.0%} of dW at the median of 14 layers, {lost[worst]:.0%} in {worst}" in str(caught[0].message)
    merged = logits(model, ids)
    assert not torch.equal(merged, unmerged)
    layer = layers(model)[0]
    torch.testing.assert_close(layer.get_delta_weight("default").double(), delta(layer), rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert_same_bits(model, before)
    assert torch.equal(logits(model, ids), unmerged)


@pytest.mark.filterwarnings("ignore:Merged into quantized weights")
@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_under_way_uses_the_weight_of_its_forward(base, ids, kind):
    """8-bit layers multiply by what their state holds when the backward runs."""
    grads = []
    for merged in (False, True):
        model = adapted(base(kind)).train()
        loss = model(input_ids=ids, labels=ids).loss
        if merged:
            model.merge_adapter()
            logits(model, ids)
            model.unmerge_adapter()
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[0][name], grad) for name, grad in grads[1].items())


def named_layers(model):
    return [(name, module) for name, module in model.base_model.model.named_modules() if isinstance(module, Linear)]


@pytest.mark.filterwarnings("ignore:Merged into quantized weights")
@pytest.mark.parametrize("kind", EXACT)
def test_merging_in_two_calls_is_merging_in_one(base, ids, kind):
    """The second merge starts from W0 and not from the rounded sum; deleting one leaves the other merged."""
    model = adapted(base(kind), target_modules=["q_proj", "down_proj"])
    before = stored(model)
    other = {**OPTIONS, "r1": 2, "r2": 4, "init_seed": 2, "target_modules": ["q_proj"], "init_weights": False}
    model.add_adapter("other", duallora.DualLoraConfig(**{**other, "init_std": 0.3}))
    model.base_model.set_adapter(["default", "other"])
    model.eval().merge_adapter()
    both = stored(model)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    alone = stored(model)
    model.merge_adapter(["other"])
    assert_same_bits(model, both)
    for layer in layers(model):
        if "other" in layer.duallora_A:
            layer.delete_adapter("other")
    assert layers(model)[0].merged_adapters == ["default"]
    assert_same_bits(model, alone)
    model.unmerge_adapter()
    assert_same_bits(model, before)


@pytest.mark.filterwarnings("ignore:Merged into quantized weights")
@pytest.mark.parametrize("kind", [*EXACT, "int8"])
def test_unloading_leaves_the_librarys_own_layers_with_their_bias(base, ids, kind):
    model = adapted(base(kind), use_dora=kind in EXACT).eval()
    classes = [type(layer.base_layer) for layer in layers(model)]
    model.merge_adapter()
    want = logits(model, ids)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Merged into quantized weights"):
        merged = model.merge_and_unload()
    assert torch.equal(logits(merged, ids), want)
    found = [module for module in merged.modules() if quantized.storage(module)]
    assert [type(module) for module in found] == classes
    assert not any("duallora" in name for name in merged.state_dict())
    taken_off = adapted(base(kind)).unload()
    assert torch.equal(logits(taken_off, ids), logits(base(kind), ids))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_the_adapter_is_the_same_and_merges_to_the_bit(base, ids, tmp_path, kind):
    model = adapted(base(kind), use_dora=kind in EXACT).eval()
    want = [layer.get_delta_weight("default") for layer in layers(model)]
    W0 = [library_weight(layer.base_layer) for layer in layers(model)]
    quantized = logits(model, ids)
    assert duallora.dequantize(model) is model
    assert all(type(layer.base_layer) is nn.Linear for layer in layers(model))
    for layer, W, dW in zip(layers(model), W0, want, strict=True):
        torch.testing.assert_close(layer.base_layer.weight.double(), W, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(layer.get_delta_weight("default"), dW, rtol=1e-5, atol=1e-6)
    plain = logits(model, ids)
    # bitsandbytes' 8-bit kernel rounds x to 8 bits as well; the others compute with the dequantized weight.
    assert (plain - quantized).norm() < (0.02 if kind == "int8" else 1e-5) * quantized.norm()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Merged into")
        merged = model.merge_and_unload()
    assert torch.equal(logits(merged, ids), plain)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), plain)


@pytest.mark.parametrize(("kind", "when"), [("nf4", "after"), *((kind, "within") for kind in KINDS)])
def test_a_merge_that_fails_leaves_the_layer_with_the_weight_it_had(base, kind, when, monkeypatch):
    """The library runs out of memory within its quantization, or as what it made is read."""
    model = adapted(base(kind), target_modules=["k_proj"])
    layer, before = layers(model)[1], stored(model)
    x = torch.randn(3, layer.in_features)
    want = layer(x)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    if when == "after":
        read = quantized.read
        monkeypatch.setattr(quantized, "read", lambda base: read(base) if torch.equal(base(x), plain) else fail())
        plain = layer.base_layer(x)
    elif kind == "hqq":
        monkeypatch.setattr(type(layer.base_layer), "quantize", fail)
    elif kind.startswith("torchao"):
        layer.requantize = fail
    else:
        monkeypatch.setattr(type(layer.base_layer.weight), "_quantize" if kind != "int8" else "to", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        layer.merge()
    monkeypatch.undo()
    assert not layer.merged
    assert_same_bits(model, before)
    assert torch.equal(layer(x), want)


def test_dequantizing_replaces_all_layers_or_none(base, monkeypatch):
    """Some torchao tensors turn out unreadable only when they are read."""
    model, read = base("torchao-int8"), quantized.read
    before, last = stored(model), model.model.layers[1].mlp.down_proj

    def read_all_but_one(layer):
        if layer is last:
            raise ConfigError("cannot be dequantized")
        return read(layer)

    monkeypatch.setattr(quantized, "read", read_all_but_one)
    with pytest.raises(ConfigError, match="cannot be dequantized"):
        duallora.dequantize(model)
    assert_same_bits(model, before)


@pytest.mark.filterwarnings("error:Merged into quantized weights")
def test_a_merge_whose_warning_is_an_error_is_known_to_be_merged(base):
    """So is a copy of it, and dequantizing it is refused."""
    model = adapted(base("nf4"), target_modules=["k_proj"])
    before = stored(model)
    with pytest.raises(UserWarning, match="Merged into"):
        layers(model)[0].merge()
    for twin in (copy.deepcopy(model), model):
        assert layers(twin)[0].merged
        with pytest.raises(ConfigError, match="unmerge_adapter"):
            duallora.dequantize(twin)
        twin.unmerge_adapter()
        assert_same_bits(twin, before)


def test_a_broken_adapter_leaves_the_quantized_weights_alone(base):
    model = adapted(base("nf4"))
    before, last = stored(model), layers(model)[-1]
    last.duallora_B["default"].data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        last.merge(safe_merge=True)
    assert not last.merged
    assert_same_bits(model, before)


# -- what cannot be read or written ------------------------------------------------------------------------------------


class GPTQ(nn.Module):
    """The outside of GPTQModel's layers: no weight attribute, codes [in, out], a forward of its own."""

    __module__ = "gptqmodel.nn_modules.qlinear.torch"

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, None
        self.register_buffer("qweight", torch.randint(-8, 8, (in_features, out_features), dtype=torch.int32))

    def forward(self, x):
        return x @ self.qweight.to(x.dtype) / 16


def test_a_layer_only_its_library_can_read_is_adapted_and_not_merged():
    torch.manual_seed(0)
    net = nn.Sequential(GPTQ(12, 20), nn.Tanh(), GPTQ(20, 7))
    model = adapted(net, target_modules="all-linear")
    assert len(layers(model)) == 2
    layer, x = layers(model)[0], torch.randn(3, 12, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(
        y.double(), (x @ layer.base_layer.qweight.float() / 16 + x @ delta(layer).T.float()).double()
    )
    torch.autograd.grad(y.sum(), [x, *layer._factors("default")])
    torch.testing.assert_close(layer.get_delta_weight("default").double(), delta(layer), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="GPTQModel layer, which cannot be dequantized"):
        duallora.dequantize(model)
    with pytest.raises(ConfigError, match="use_dora=False"):
        adapted(nn.Sequential(GPTQ(12, 20)), target_modules=["0"], use_dora=True)


def test_what_cannot_be_merged_is_refused_before_the_first_layer_loses_its_adapter():
    """Adapters that are not on such a layer merge."""
    model = adapted(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), GPTQ(20, 7)), target_modules=["0", "2"])
    x, names = torch.randn(3, 12), [name for name, _ in model.named_modules()]
    want = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match=r"GPTQModel weight cannot be dequantized.*duallora merge"):
            merge()
        assert [name for name, _ in model.named_modules()] == names
        assert not any(layer.merged for layer in layers(model))
    assert torch.equal(model(x), want)
    model.add_adapter("plain", duallora.DualLoraConfig(**{**OPTIONS, "target_modules": ["0"]}))
    model.merge_adapter(["plain"])
    assert layers(model)[0].merged_adapters == ["plain"]
    assert model.unload()[2].in_features == 20


def test_torchao_weights_of_an_unknown_configuration_are_not_written(ids):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7)).requires_grad_(False)
    torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
    model = adapted(net, target_modules=["0"])
    x = torch.randn(3, 12)
    want = model(x)
    with pytest.raises(ConfigError, match="TorchAoConfig"):
        model.merge_adapter()
    assert torch.equal(model(x), want)
    torch.testing.assert_close(duallora.dequantize(model)(x), want)


def test_a_quantized_embedding_is_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    net = nn.Sequential(bitsandbytes.nn.EmbeddingNF4(64, 64).to("cpu"))
    with pytest.raises(ConfigError, match="Params4bit"):
        adapted(net, target_modules=["0"])
