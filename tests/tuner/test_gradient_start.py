"""init_from_gradient: D C follows -dL/dW0, A and B are positive, and nothing else of the model changes."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch

import duallora
from duallora.errors import ConfigError, NonFiniteError
from duallora.tuner.linear import Linear

SMALL = {"hidden_size": 24, "intermediate_size": 27, "num_attention_heads": 4}


def layers(model) -> dict[str, Linear]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, Linear)}


def adapted(base, **options):
    torch.manual_seed(0)
    options = {"r1": 2, "r2": 3, "target_modules": "all-linear", "direction_init_std": 0.05, **options}
    return peft.get_peft_model(base, duallora.DualLoraConfig(**options))


def batches(ids, count: int = 2):
    return [{"input_ids": (ids + i) % 67, "labels": (ids + i) % 67} for i in range(count)]


def gradients(base, ids, names) -> dict[str, np.ndarray]:
    """The sum over the batches of dL/dW [out, in] in float64, by plain autograd on the base weights."""
    base = base.double()
    weights = {name: base.get_submodule(name).weight for name in names}
    for batch in batches(ids):
        base(**batch).loss.backward()
    transposed = type(base).__name__.startswith("GPT2")
    return {name: (w.grad.T if transposed else w.grad).numpy() for name, w in weights.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_signs_are_those_of_the_best_approximation_of_minus_the_gradient(request, ids, family):
    """Of so small a layer the sketch keeps everything, so the only error left is rounding."""
    if family == "llama":
        build = lambda: request.getfixturevalue("llama")(**SMALL)  # noqa: E731
        model = adapted(build())
    else:
        build = request.getfixturevalue("gpt2")
        model = adapted(build(), r2=23, target_modules=["c_attn", "c_fc"])
    duallora.init_from_gradient(model, batches(ids))
    found = layers(model)
    exact = gradients(build(), ids, found)
    for name, layer in found.items():
        U, S, Vh = np.linalg.svd(-exact[name], full_matrices=False)
        r2 = layer.r2["default"]
        best = (U[:, :r2] * S[:r2]) @ Vh[:r2]
        D, C = (getattr(layer, f"duallora_{x}")["default"].detach().double().numpy() for x in "DC")
        cosine = (D @ C * best).sum() / np.linalg.norm(D @ C) / np.linalg.norm(best)
        assert cosine > 1 - 1e-4, f"{name}: {cosine}"
        assert D.std(ddof=1) == pytest.approx(0.05, rel=1e-3)
        assert C.std(ddof=1) == pytest.approx(0.05, rel=1e-3)


def test_a_sketch_thinner_than_the_layer_still_points_down(llama, ids):
    """36 x 63 layers, 3 pairs: dW must lose loss to first order in every layer, more than random signs could."""
    base = llama(attention_bias=False, hidden_size=96, intermediate_size=130)
    model = adapted(base, r2=2, target_modules=["q_proj", "down_proj", "gate_proj"])
    duallora.init_from_gradient(model, batches(ids))
    duallora.advance_gate(model, 100)
    found = layers(model)
    exact = gradients(llama(attention_bias=False, hidden_size=96, intermediate_size=130), ids, found)
    for name, layer in found.items():
        signs = np.sign(layer.get_delta_weight("default").double().numpy())
        assert -(signs * exact[name]).sum() / np.abs(exact[name]).sum() > 0.3, name


def test_magnitudes_are_open_everywhere_and_the_model_is_unchanged(llama, ids):
    model = adapted(llama(), modules_to_save=["lm_head"], init_std=0.03).train()
    model.base_model.model.model.layers[0].eval()
    before = model(ids).logits.detach()
    modes = [m.training for m in model.modules()]
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    A = [layer.duallora_A["default"].detach().clone() for layer in layers(model).values()]
    assert duallora.init_from_gradient(model, iter(batches(ids))) is model
    assert torch.equal(model(ids).logits, before)
    assert [m.training for m in model.modules()] == modes
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    assert all(p.grad is None for p in model.parameters())
    for layer, was in zip(layers(model).values(), A, strict=True):
        A_now, B_now = layer.duallora_A["default"], layer.duallora_B["default"]
        assert torch.equal(A_now, was.abs())
        assert (B_now @ A_now > 0).all()
        assert not layer._forward_hooks
    model(input_ids=ids, labels=ids).loss.backward()  # and it trains
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kept", ["signs", "magnitudes"])
def test_each_half_can_be_left_as_it_was_drawn(llama, ids, kept):
    model, drawn = adapted(llama()), adapted(llama())
    duallora.init_from_gradient(model, batches(ids), **{kept: False})
    for layer, other in zip(layers(model).values(), layers(drawn).values(), strict=True):
        for x in "ABCD":
            same = torch.equal(getattr(layer, f"duallora_{x}")["default"], getattr(other, f"duallora_{x}")["default"])
            assert same == (x in ("CD" if kept == "signs" else "AB")), x


def test_the_same_seed_gives_the_same_start_and_the_loss_is_ones_own(llama, ids):
    def start(loss_fn=None):
        model = adapted(llama(torch.bfloat16), init_seed=5)
        duallora.init_from_gradient(model, batches(ids), loss_fn)
        return [(m.duallora_D["default"] @ m.duallora_C["default"]).detach() for m in layers(model).values()]

    once, again, other = start(), start(), start(lambda m, b: -m(**b).loss)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(once, other, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "fixed"}, "no C and D"),
        ({"warmup": "residual"}, r"rebuilds dW\(0\) from a seed"),
        ({"init": "lora", "magnitude": "identity", "warmup": "none"}, "init='lora' is a start of its own"),
    ],
)
def test_what_cannot_be_started_is_refused(llama, ids, options, message):
    with pytest.raises(ConfigError, match=message):
        duallora.init_from_gradient(adapted(llama(), **options), batches(ids))


def test_a_trained_or_merged_adapter_an_empty_calibration_and_a_bad_loss_are_refused(llama, ids):
    model = adapted(llama())
    with pytest.raises(ConfigError, match="at least one"):
        duallora.init_from_gradient(model, [])
    losses = iter([1.0, float("nan")])
    with pytest.raises(NonFiniteError, match="batch 2 is nan"):
        duallora.init_from_gradient(model, batches(ids), lambda m, b: m(**b).loss * next(losses))
    assert not any(layer.disable_adapters for layer in layers(model).values())
    duallora.advance_gate(model, 3)
    with pytest.raises(ConfigError, match="trained for 3 steps"):
        duallora.init_from_gradient(model, batches(ids))
    merged = adapted(llama())
    with pytest.warns(UserWarning, match="gate"):
        merged.merge_adapter()
    with pytest.raises(ConfigError, match="merged"):
        duallora.init_from_gradient(merged, batches(ids))
    with pytest.raises(ConfigError, match="no Dual LoRA layer"):
        duallora.init_from_gradient(llama(), batches(ids))


def test_a_layer_the_batches_never_reach_keeps_its_start_and_is_named(llama, ids):
    model = adapted(llama())
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    kept = layer.duallora_D["default"].detach().clone()

    def loss(m, batch):
        hidden = m.base_model.model.model(batch["input_ids"], output_hidden_states=True).hidden_states[1]
        return hidden.square().mean()

    with pytest.warns(UserWarning, match=r"7 of 14 layers saw no gradient.*layers\.1\.self_attn\.q_proj"):
        duallora.init_from_gradient(model, batches(ids), loss)
    assert torch.equal(layer.duallora_D["default"], kept)


def test_checkpointed_training_starts_alike(llama, ids):
    """For checkpointing PEFT makes the embeddings' output require a gradient: no layer is where the graph begins."""
    starts = []
    for checkpointing in (False, True):
        base = llama().train()
        if checkpointing:
            base.gradient_checkpointing_enable()
        model = adapted(base, init_seed=5)
        duallora.init_from_gradient(model, batches(ids))
        starts.append([m.duallora_D["default"] @ m.duallora_C["default"] for m in layers(model).values()])
    assert all(torch.equal(*pair) for pair in zip(*starts, strict=True))


class Branches(torch.nn.Module):
    """Two layers side by side; ``used`` is False: the loss sees neither."""

    def __init__(self, used: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.used = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5), used

    def forward(self, x):
        return self.a(x).sum() + (0 * self.b(x)).sqrt().sum() if self.used else x.sum()  # b: 0 * infinity


def test_no_layer_is_changed_where_one_gradient_is_not_finite():
    model = adapted(Branches(), target_modules=["a", "b"])
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"b: the calibration gradient"):
        duallora.init_from_gradient(model, [torch.ones(2, 6)], lambda m, x: m(x))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_batches_that_reach_no_layer_change_nothing_and_say_so():
    model = adapted(Branches(used=False), target_modules=["a", "b"])
    with pytest.warns(UserWarning, match="2 of 2 layers saw no gradient"):
        duallora.init_from_gradient(model, [torch.ones(2, 6)], lambda m, x: m(x))


@pytest.mark.parametrize("init_std", [None, 0.03])
def test_the_width_of_positive_factors_is_their_own_unless_one_is_given(llama, ids, init_std):
    """The Gaussian start's default would be several times too wide: positive entries add up over a layer's inputs."""
    random, started = (adapted(llama(**SMALL), init_std=init_std, init_seed=5) for _ in range(2))
    for _ in range(2):  # once more changes nothing
        duallora.init_from_gradient(started, batches(ids))
        for (name, before), after in zip(layers(random).items(), layers(started).values(), strict=True):
            for factor in ("duallora_A", "duallora_B"):
                drawn, found = (getattr(layer, factor)["default"].detach() for layer in (before, after))
                width = 1.0
                if init_std is None:
                    wanted = np.sqrt(0.4 * np.pi / (before.in_features * before.r1["default"]))
                    width = wanted / float(drawn.square().mean().sqrt())
                assert torch.allclose(found, drawn.abs() * width, rtol=1e-5), f"{name} {factor}"
