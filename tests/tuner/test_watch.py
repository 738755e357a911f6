"""duallora.watch: what it logs is what the factors say, by the formula written out here; what cannot learn is named."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from adapter_building import layers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

import duallora
from duallora.tuner.watch import PATIENCE, Watcher

IN, HIDDEN, OUT = 23, 4, 3  # few rows: all of them are looked at


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)

    reentrant = None  # of the gradient checkpointing; None: there is none

    def body(self, x):
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x, labels=None):
        if self.reentrant is None:
            y = self.body(x)
        else:
            y = checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant)
        return {"loss": (y - labels).square().mean(), "logits": y}


def adapted(**options):
    torch.manual_seed(0)
    options = {"r": 3, "target_modules": ["first", "second"], "warmup_steps": 4, "init_seed": 5, **options}
    return get_peft_model(Net(), duallora.DualLoraConfig(**options))


def trainer_of(model, tmp_path, steps=6, **options):
    g = torch.Generator().manual_seed(1)
    rows = [{"x": torch.randn(IN, generator=g), "labels": torch.randn(OUT, generator=g)} for _ in range(16)]
    options = {"max_steps": steps, "logging_steps": 1, "learning_rate": 0.05, "report_to": [], **options}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=4, **options)
    return Trainer(model, arguments, train_dataset=rows)


def factors(layer):
    return [getattr(layer, f"duallora_{name}")["default"].detach().double() for name in "ABCD"]


def test_what_is_logged_is_what_the_factors_say(tmp_path):
    model = adapted()
    trainer = duallora.watch(trainer_of(model, tmp_path))
    seen = []

    class Look(duallora.tuner.watch.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                seen.append([factors(layer) for layer in layers(model)])

    trainer.add_callback(Look())
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logged) == len(seen) == 6
    before = None
    for number, (line, now) in enumerate(zip(logged, seen, strict=True), start=1):
        zero = [float((B @ A <= 0).double().mean()) for A, B, _, _ in now]
        assert line["frozen_share"] == pytest.approx(sum(zero) / 2, abs=1e-6)
        assert line["gate"] == pytest.approx(min(1, number / 4))
        up = [D @ C > 0 for _, _, C, D in now]
        if before is None:
            assert "sign_flips" not in line
        else:
            changed = [float((one != other).double().mean()) for one, other in zip(up, before, strict=True)]
            assert line["sign_flips"] == pytest.approx(sum(changed) / 2, abs=1e-6)
        before = up
        squares = base = 0.0
        for layer, (A, B, C, D) in zip(layers(model), now, strict=True):
            scale = min(1, number / 4) * 2  # alpha = 2 r
            dW = scale * torch.clamp(B @ A, min=0) * torch.where(D @ C > 0, 1.0, -1.0)
            squares += float(dW.square().sum())
            base += float(layer.base_layer.weight.double().square().sum())
        assert line["update_size"] == pytest.approx((squares / base) ** 0.5, rel=1e-4)
        assert "layers_without_gradient" not in line
    assert len({line.get("sign_flips") for line in logged}) > 2  # signs did move in this run


def test_a_layer_that_cannot_learn_is_counted_and_named_once(tmp_path, caplog):
    model = adapted()
    first = layers(model)[0]
    with torch.no_grad():
        first.duallora_A["default"].abs_()
        first.duallora_B["default"].abs_().neg_()
    with caplog.at_level(logging.WARNING):
        trainer = duallora.watch(trainer_of(model, tmp_path, steps=PATIENCE + 2))
        trainer.train()
    last = [line for line in trainer.state.log_history if "loss" in line][-1]
    assert last["layers_without_gradient"] == 1
    assert last["frozen_share"] > 0.5
    (said,) = [record.message for record in caplog.records if "dead" in record.message]
    assert said.startswith("1 layers are dead")
    assert "first" in said


def test_a_ramp_that_the_run_does_not_reach_the_end_of_is_said_before_it_begins(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        duallora.watch(trainer_of(adapted(warmup_steps=100), tmp_path, steps=6)).train()
        duallora.watch(trainer_of(adapted(warmup_steps=6), tmp_path, steps=6)).train()
    (said,) = [record.message for record in caplog.records if "warmup_steps" in record.message]
    assert "this run has 6 optimizer steps, but warmup_steps=100: its gate ends at 0.06" in said
    assert "Set warmup_steps to 2" in said


def test_watching_changes_no_weight_and_no_draw(tmp_path):
    found = []
    for look in (lambda trainer: trainer, duallora.watch):
        model = adapted(duallora_dropout=0.2)
        look(trainer_of(model, tmp_path)).train()
        found.append([factor for layer in layers(model) for factor in factors(layer)])
    for plain, watched in zip(*found, strict=True):
        assert torch.equal(plain, watched)


@pytest.mark.parametrize(
    "options", [{"direction": "fixed"}, {"magnitude": "abs"}, {"direction": "identity"}, {"use_dora": True}]
)
def test_what_a_form_does_not_have_is_not_logged(options):
    found = Watcher(adapted(**options)).measure()
    assert ("frozen_share" in found) == ("magnitude" not in options)
    assert json.dumps(found)


@pytest.mark.parametrize(
    ("clip", "scale", "reentrant"), [("chain", 300.0, None), ("chain", 300.0, False), ("update", 30.0, True)]
)
def test_the_share_that_is_clipped_is_that_of_the_gradient_of_every_entry(
    clip, scale, reentrant, tmp_path, monkeypatch
):
    """The oracle: autograd's gradient for W' written out, of the factors before the step that is logged."""
    model = adapted(ste_clip=clip, warmup="none")
    model.base_model.model.reentrant = reentrant
    start = [factors(layer) for layer in layers(model)]
    watcher = Watcher(model)
    monkeypatch.setattr(duallora.tuner.watch, "Watcher", lambda _: watcher)
    trainer = duallora.watch(trainer_of(model, tmp_path, steps=1))
    trainer.compute_loss = lambda model, inputs, **kwargs: scale * model(**inputs)["loss"]
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trainer.train()
    (batch,) = seen
    shifted, net = [], model.base_model.model
    for layer, (A, B, C, D) in zip(layers(model), start, strict=True):
        dW = 2 * torch.clamp(B @ A, min=0) * torch.where(D @ C > 0, 1.0, -1.0)
        shifted.append((layer.base_layer.weight.double() + dW).requires_grad_())
    y = torch.tanh(batch["x"].double() @ shifted[0].T + net.first.base_layer.bias) @ shifted[1].T
    loss = scale * (y + net.second.base_layer.bias - batch["labels"]).square().mean()
    shares = []
    for G, (A, B, _, _) in zip(torch.autograd.grad(loss, shifted), start, strict=True):
        M = 2 * torch.clamp(B @ A, min=0)
        shares.append(float(((G * M if clip == "chain" else G * (M > 0)).abs() > 1).double().mean()))
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    assert 0.02 < sum(shares) / 2 < 0.8
    assert len(watcher.clipped) == 2  # both layers, also what comes last in a block that is run again
    assert line["clip_share"] == pytest.approx(sum(shares) / 2, abs=0.004)


def test_nothing_stays_hooked_and_inputs_that_are_gone_are_not_told_of(tmp_path):
    model = adapted()
    trainer = duallora.watch(trainer_of(model, tmp_path, logging_steps=3))
    first, hooked = layers(model)[0], []
    model.register_forward_pre_hook(lambda module, args: hooked.append(len(first._forward_hooks)))
    trainer.train()
    assert hooked == [0, 0, 1, 0, 0, 1]
    assert not first._forward_hooks
    assert all("clip_share" in line for line in trainer.state.log_history if "loss" in line)
    watcher = Watcher(adapted())
    watcher._look_at_gradient(0, lambda: None, torch.ones(2, HIDDEN))
    assert "clip_share" not in watcher.measure()


@pytest.mark.parametrize(
    ("rate", "turn", "words"),
    [
        (0.02, 1, None),
        (1e-12, 1, "the signs of D C stand still"),
        (1e-12, -1, "the signs of D C do not settle: 100% turned"),
    ],
)
def test_signs_that_stand_still_or_do_not_settle_are_said_once(rate, turn, words, tmp_path, caplog):
    class Turn(duallora.tuner.watch.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for layer in layers(model):
                layer.duallora_D["default"].data.mul_(turn)

    trainer = trainer_of(adapted(), tmp_path, steps=20, learning_rate=rate, lr_scheduler_type="constant")
    trainer.add_callback(Turn())
    with caplog.at_level(logging.WARNING):
        duallora.watch(trainer).train()
    said = [record.message for record in caplog.records if "D C" in record.message]
    assert [words] * (words is not None) == [message[: len(words)] for message in said]


def test_a_model_without_such_layers_is_refused(tmp_path):
    model = get_peft_model(Net(), LoraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match="has no Dual LoRA layer to watch"):
        duallora.watch(trainer_of(model, tmp_path))


def test_shards_are_left_alone():
    """A factor of another type than a tensor's own, as FSDP2's: nothing is said of its layer, nor asked of it."""

    class Shard(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if "matmul" in str(function):
                raise AssertionError("a product of a shard")
            return super().__torch_function__(function, types, args, kwargs or {})

    model = adapted()
    watcher = Watcher(model)
    for layer in layers(model):
        for name in "ABCD":
            held = getattr(layer, f"duallora_{name}")
            held["default"] = nn.Parameter(held["default"].detach().as_subclass(Shard))
    assert type(layers(model)[0].duallora_A["default"]) is not nn.Parameter
    watcher.on_pre_optimizer_step(None, type("State", (), {"global_step": 0, "logging_steps": 1}), None)
    assert watcher.measure() == {"gate": 0.0}
