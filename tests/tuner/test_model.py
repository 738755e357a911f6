"""The PEFT contract: targeting, saving, loading, Trainer, checkpointing, compile."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from adapter_building import AWKWARD, adapted, train
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import duallora
from duallora import DualLoraConfig
from duallora.tuner import Linear, param_groups


def layers(model: nn.Module) -> dict[str, Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear)}


PEFT = tuple(int(part) for part in peft.__version__.split(".")[:2])

VARIANTS = [
    {},
    {"warmup": "residual"},
    {"direction": "fixed"},
    {"bias": "duallora_only"},
    {"init_weights": False},
    {"use_dora": True},
    {"direction": "tanh", "magnitude": "abs"},
    {"init": "lora", "magnitude": "identity", "warmup": "none"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_save_in_mid_ramp_and_reload(llama, ids, tmp_path, options):
    """The gate travels with the weights; what is rebuilt from a seed comes back, whatever the generator's state."""
    if options.get("bias") and PEFT < (0, 21):
        pytest.skip("PEFT before 0.21 saves '..._only' biases of its own methods alone")
    model = adapted(llama(), **options)
    train(model, ids)
    want = model(ids).logits
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*whose gate is not open")
        model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("initial" in name for name in tensors)
    torch.manual_seed(999)
    # tanh's row lengths come from torch's small products, which round by where in memory a factor lies.
    tolerance = 1e-6 if options.get("direction") == "tanh" else 0
    for low_cpu_mem_usage in (False, True):
        again = peft.PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(again(ids).logits, want, rtol=0, atol=tolerance)
    if options == {}:
        assert duallora.gate(again) == 0.75
        trainable = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
        train(trainable, ids, steps=1)
        assert {int(m.duallora_step["default"]) for m in layers(trainable).values()} == {4}


@pytest.mark.skipif(PEFT < (0, 20), reason="this transformers release needs PEFT >= 0.20 for its adapter calls")
def test_auto_classes_and_transformers_own_adapter_calls(llama, ids, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), warmup_steps=2)
    train(model, ids)
    want = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(auto(ids).logits, want)

    plain = llama()
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(plain(ids).logits, want)
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(direct(ids).logits, want)
    added = llama()
    added.add_adapter(DualLoraConfig(**{**AWKWARD, "init_weights": False}), adapter_name="new")
    assert not torch.equal(added(ids).logits, llama()(ids).logits)
    added.disable_adapters()
    assert torch.equal(added(ids).logits, llama()(ids).logits)


def test_targeting(llama):
    """rank_pattern, alpha_pattern, layers_to_transform, exclude_modules and all-linear as in PEFT's LoRA."""
    patterns = {"rank_pattern": {"k_proj": 2, "v_proj": [1, 5]}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}
    model = adapted(llama(), target_modules=["q_proj", "k_proj", "v_proj"], **patterns)
    for name, layer in layers(model).items():
        want = {"q": (4, 3), "k": (2, 2), "v": (1, 5)}[name[-6]]
        assert (layer.r1["default"], layer.r2["default"]) == want
        assert layer.duallora_A["default"].shape == (want[0], 36)
        assert layer.duallora_D["default"].shape == (layer.out_features, want[1])
        alpha = 3 if name.endswith("layers.1.self_attn.q_proj") else 10
        assert layer.scaling["default"] == pytest.approx(alpha / (want[0] * want[1]) ** 0.5)
    one = adapted(llama(), target_modules=["q_proj"], layers_to_transform=[1])
    assert [n[-26:] for n in layers(one)] == ["model.layers.1.self_attn.q_proj"[-26:]]
    every = adapted(llama(), exclude_modules=["down_proj"])
    assert {n.rpartition(".")[2] for n in layers(every)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
    }  # fmt: skip
    default = adapted(llama(), target_modules=None)
    assert {n.rpartition(".")[2] for n in layers(default)} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="not found in the base model"):
        adapted(llama(), target_modules=["query"])
    with pytest.raises(ValueError, match=r"'model\.norm' is a LlamaRMSNorm; Dual LoRA adapts torch\.nn\.Linear"):
        adapted(llama(), target_modules=["model.norm"])


@pytest.mark.parametrize(
    "options",
    [{}, {"direction": "tanh", "magnitude": "abs"}, {"init": "lora", "magnitude": "identity", "warmup": "none"}],
    ids=str,
)
def test_compiles_without_recompiling_as_the_gate_moves(llama, ids, options):
    model = adapted(llama(num_hidden_layers=1), **options)
    train(model, ids, steps=1)
    layer = next(iter(layers(model).values()))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, layer.in_features)
    for _ in range(3):
        with torch._dynamo.config.patch(error_on_recompile=True):
            y = compiled(x)
        assert torch.equal(y, layer(x))
        duallora.advance_gate(model)
    assert torch.equal(layer(x), y) == (options.get("warmup") == "none")


def test_saving_and_merging_with_a_closed_gate_say_so(llama, ids, tmp_path):
    model = adapted(llama())
    with pytest.warns(UserWarning, match="gate is at 0 .*no effect.*advance_gate"):
        model.save_pretrained(tmp_path)
    train(model, ids, steps=2)
    with pytest.warns(UserWarning, match=r"gate is at 0.50 \(step 2 of 4\)"):
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"Merging .* gate is at 0.50"):
        model.merge_adapter()
    model.unmerge_adapter()
    train(model, ids, steps=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gate")
        model.save_pretrained(tmp_path)
        model.merge_adapter()


def test_counters_and_seeds_keep_their_types(llama):
    """Old PEFT casts every buffer to the base dtype: a bf16 counter would stick at 256, a seed lose its low bits."""
    model = adapted(llama(torch.bfloat16), warmup="residual")
    for layer in layers(model).values():
        assert layer.duallora_step["default"].dtype == torch.float32
        assert layer.duallora_seed["default"].dtype == torch.int64


@pytest.mark.parametrize("options", [{"direction": "fixed"}, {"warmup": "residual"}])
def test_seeds_and_signs_outlive_a_copy_whose_tensors_are_averaged(llama, ids, options, tmp_path):
    """An average of equal integers is no integer: the signs would be 0, the seed another one."""
    model = adapted(llama(), init_std=0.5, **options)
    duallora.advance_gate(model, 1000)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    for _ in range(3):
        ema.update_parameters(model)
    with torch.no_grad():
        want = model.eval()(ids).logits
        torch.testing.assert_close(ema.module.eval()(ids).logits, want)
        ema.module.save_pretrained(tmp_path)
        torch.testing.assert_close(peft.PeftModel.from_pretrained(llama(), tmp_path)(ids).logits, want)


def test_an_average_of_unequal_seeds_is_refused(llama):
    """The mean of two seeds is the seed of other signs than either's."""
    model = adapted(llama(), direction="fixed")
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seeds = [name for name in saved if "duallora_seed" in name]
    model.load_state_dict(saved | {name: saved[name].bfloat16() for name in seeds})  # an average of equal ones
    assert all(torch.equal(model.state_dict()[name], saved[name]) for name in seeds)
    with pytest.raises(RuntimeError, match=f"{len(seeds) * '(?s:.*)not an average of equal seeds'}"):
        model.load_state_dict(saved | {name: saved[name].float() * 0.9 for name in seeds})


def test_fan_in_fan_out_is_corrected_with_a_word(llama, gpt2, ids):
    with pytest.warns(UserWarning, match="fan_in_fan_out=True has no effect"):
        adapted(llama(), target_modules=["q_proj"], fan_in_fan_out=True)
    model = adapted(gpt2(), target_modules=["c_attn"])
    assert next(iter(layers(model).values())).duallora_A["default"].shape == (4, 36)


def test_param_groups(llama):
    model = adapted(llama())
    groups = param_groups(model, lr=1e-3, direction_lr_ratio=4.0)
    assert [g["lr"] for g in groups] == [1e-3, 4e-3]
    names = {id(p): n for n, p in model.named_parameters()}
    assert all("duallora_C" in names[id(p)] or "duallora_D" in names[id(p)] for p in groups[1]["params"])
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="direction_lr_ratio=0"):
        param_groups(model, lr=1e-3, direction_lr_ratio=0)
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), lr=1e-3)


def test_peft_converts_to_lora(llama, ids):
    """dW is additive, so PEFT's own conversion accepts it (approximately: dW is of full rank)."""
    conversion = pytest.importorskip("peft.tuners.lora.conversion")
    model = adapted(llama(), warmup_steps=1)
    train(model, ids)
    config, state = conversion.convert_to_lora(model, rank=12, adapter_name="default")
    assert len(state) == 2 * len(layers(model))
    assert config.r == 12


def test_one_head_and_one_beam_per_row(llama, ids):
    """adapter_names reaches modules_to_save too, and generate's beams."""
    model = adapted(llama(), modules_to_save=["lm_head"], warmup_steps=1)
    train(model, ids)
    model.add_adapter("other", DualLoraConfig(**{**AWKWARD, "modules_to_save": ["lm_head"]}))
    model.set_adapter("other")
    train(model, ids)
    model.eval()
    names = ["other", "default", "__base__"]
    mixed = model(ids, adapter_names=names).logits
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(ids).logits[row], rtol=1e-4, atol=1e-5)
    model.generate(input_ids=ids, adapter_names=names, num_beams=2, max_new_tokens=3, pad_token_id=0)


def test_init_seed_reproduces_the_adapter_whatever_the_generators_state(llama):
    def values(state: int) -> torch.Tensor:
        base = llama()
        torch.manual_seed(state)
        model = peft.get_peft_model(base, DualLoraConfig(**AWKWARD, init_seed=3))
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "duallora_" in name])

    assert torch.equal(values(1), values(2))


def test_the_saved_counter_decides_the_gate(llama, ids):
    """An adapter made with its gate open acts in full when loaded into one made with its gate shut."""
    model, other = adapted(llama(), init_weights=False), adapted(llama())
    peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(model))
    assert duallora.gate(other) == 1.0
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_weights_without_their_counter_say_so(llama, ids):
    """Savers that walk named_parameters() lose the buffer, and the adapter would act as nothing."""
    model = adapted(llama())
    train(model, ids, steps=4)
    state = {k: v for k, v in peft.get_peft_model_state_dict(model).items() if "duallora_step" not in k}
    with pytest.warns(UserWarning, match=r"hold no step counter.*stays at step 0 of 4.*advance_gate"):
        peft.set_peft_model_state_dict(adapted(llama()), state)
