"""A plain Trainer with SealedCheckpoints: whatever a kill or a damage leaves, the resumed run is the straight one."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import duallora
from duallora.errors import IntegrityError, NonFiniteError
from duallora.store import checkpoint

STEPS, SAVE = 6, 2


def train(model, output, *callbacks, whole=False, **settings):
    torch.manual_seed(0)
    network = LlamaForCausalLM.from_pretrained(model)
    if not whole:
        network = get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj"]))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 200, (40, 12))]
    arguments = TrainingArguments(
        str(output), max_steps=STEPS, save_steps=SAVE, per_device_train_batch_size=4, report_to=[], disable_tqdm=True,
        use_cpu=True, **{"learning_rate": 1e-3, **settings},
    )  # fmt: skip
    trainer = Trainer(network, arguments, train_dataset=rows, callbacks=[duallora.SealedCheckpoints(), *callbacks])
    trainer.train(resume_from_checkpoint=duallora.latest_verified(output))
    return {name: weight.detach().clone() for name, weight in network.named_parameters() if weight.requires_grad}


def steps(output):
    return sorted(step for step, _ in checkpoint.checkpoints(output))


@pytest.fixture(scope="module")
def straight(tiny_causal_folder, tmp_path_factory):
    """(the weights of an uninterrupted run, its folder)"""
    folder = tmp_path_factory.mktemp("straight")
    return train(tiny_causal_folder, folder), folder


class Killed(BaseException):
    pass


def test_what_an_earlier_attempt_left_is_no_part_of_an_epochs_checkpoint(tiny_causal_folder, tmp_path):
    stray = tmp_path / "checkpoint-5" / "rng_state_1.pth"
    stray.parent.mkdir()
    stray.write_bytes(b"of another run")
    train(tiny_causal_folder, tmp_path, save_strategy="epoch", gradient_accumulation_steps=2)  # an epoch has 5 steps
    assert not stray.exists()
    assert checkpoint.verify(stray.parent) is None


@pytest.mark.parametrize(("step", "whole"), [(SAVE, True), (2 * SAVE, False)])
def test_a_save_that_did_not_finish_is_passed_over(
    step, whole, tiny_causal_folder, straight, tmp_path, monkeypatch, caplog
):
    wanted = train(tiny_causal_folder, tmp_path / "straight", whole=True) if whole else straight[0]
    commit = checkpoint.commit

    def broken(folder, **facts):
        if folder.name == f"checkpoint-{step}":
            (folder / "optimizer.pt").write_bytes(b"half")
            raise Killed
        commit(folder, **facts)

    monkeypatch.setattr(checkpoint, "commit", broken)
    with pytest.raises(Killed):
        train(tiny_causal_folder, tmp_path / "run", whole=whole)
    monkeypatch.setattr(checkpoint, "commit", commit)
    found = train(tiny_causal_folder, tmp_path / "run", whole=whole)
    assert f"checkpoint-{step}: MANIFEST.json is missing" in caplog.text
    assert same(found, wanted)


def killed(run):
    """``run()`` in a process of its own, which must end by SIGKILL."""
    pid = os.fork()
    if not pid:
        try:
            run()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


class Kill(TrainerCallback):
    """SIGKILL in the step after the second save."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2 * SAVE:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_process_goes_on_to_the_same_bits(tiny_causal_folder, straight, tmp_path):
    killed(lambda: train(tiny_causal_folder, tmp_path, Kill()))
    assert steps(tmp_path) == [SAVE, 2 * SAVE]
    assert same(train(tiny_causal_folder, tmp_path), straight[0])


def test_every_damage_is_found_and_named(straight, tmp_path, caplog):
    newest = f"checkpoint-{STEPS}"
    for name in sorted(path.name for path in (straight[1] / newest).iterdir()):
        folder = shutil.copytree(straight[1], tmp_path / name)
        path = folder / newest / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert duallora.latest_verified(folder) == str(folder / f"checkpoint-{STEPS - SAVE}")
        assert name in caplog.text
    for path in folder.glob("*/MANIFEST.json"):
        path.write_text("{}")
    with pytest.raises(IntegrityError, match="none of the 3 checkpoints"):
        duallora.latest_verified(folder)
    assert duallora.latest_verified(tmp_path / "nothing here") is None


def test_old_checkpoints_go_only_when_a_new_one_is_whole(tiny_causal_folder, tmp_path):
    class Look(TrainerCallback):
        seen: list = []  # noqa: RUF012

        def on_step_end(self, args, state, control, **kwargs):
            self.seen.append(steps(tmp_path))

        def on_save(self, args, state, control, **kwargs):  # after the seal, as it was added after it
            self.seen.append(steps(tmp_path))

    train(tiny_causal_folder, tmp_path, Look(), save_total_limit=1)
    assert Look.seen == [[], [], [2], [2], [2], [4], [4], [4], [6]]


def test_weights_without_an_optimizer_are_not_resumed(tiny_causal_folder, tmp_path):
    train(tiny_causal_folder, tmp_path, save_only_model=True)
    with pytest.raises(IntegrityError, match=r"optimizer\.pt was not saved, so an exact resume is impossible"):
        duallora.latest_verified(tmp_path)


def test_no_step_with_a_gradient_that_is_not_finite_is_applied(tiny_causal_folder, tmp_path):
    class Spoil(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.model = model
            self.weight = next(p for p in model.parameters() if p.requires_grad)
            self.weight.register_hook(lambda gradient: gradient * (float("nan") if state.global_step == 3 else 1))

        def on_step_begin(self, args, state, control, **kwargs):
            self.before = self.weight.detach().clone()

    spoil = Spoil()
    with pytest.raises(NonFiniteError, match="gradient norm is nan in step 4; the step was not applied"):
        train(tiny_causal_folder, tmp_path, spoil)
    assert torch.equal(spoil.weight, spoil.before)
    assert steps(tmp_path) == [2]


def test_a_weight_that_is_not_finite_is_never_saved(tiny_causal_folder, tmp_path):
    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = float("inf")

    with pytest.raises(NonFiniteError, match="holds NaN or infinite values at step 4"):
        train(tiny_causal_folder, tmp_path, Spoil())
    assert steps(tmp_path) == [2]
    for path in tmp_path.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_trls_trainer_is_as_safe(tiny_causal_folder, tiny_tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": f"{i} and 1 are", "completion": f" {i + 1}"} for i in range(24)])

    def fit(output, *callbacks):
        torch.manual_seed(0)
        arguments = trl.SFTConfig(
            str(output), max_steps=STEPS, save_steps=SAVE, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            disable_tqdm=True, bf16=False, max_length=32, learning_rate=1e-2,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            LlamaForCausalLM.from_pretrained(tiny_causal_folder), arguments, train_dataset=rows, processing_class=tiny_tokenizer,
            peft_config=duallora.DualLoraConfig(r=2, target_modules=["q_proj"], warmup_steps=3),
            callbacks=[duallora.SealedCheckpoints(), *callbacks],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=duallora.latest_verified(output))
        return {name: weight.detach() for name, weight in trainer.model.named_parameters() if weight.requires_grad}

    wanted = fit(tmp_path / "straight")
    killed(lambda: fit(tmp_path / "run", Kill()))
    assert steps(tmp_path / "run") == [SAVE, 2 * SAVE]
    assert same(fit(tmp_path / "run"), wanted)
