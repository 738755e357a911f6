"""The same faults on transformers' own Trainer: one script, resumed as its documentation says, or by what is sealed."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import harness
import rows
import torch
from harness import SAVE, STEPS, WEIGHTS, digest, fork, when
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import duallora


def train(model: Path, output: Path, sealed: bool, rate: float = 1e-3) -> int:
    """A LoRA of the stage's model on fixed tokens, with a checkpoint every SAVE steps."""
    torch.manual_seed(0)
    network = get_peft_model(LlamaForCausalLM.from_pretrained(model), LoraConfig(r=2, target_modules=["q_proj"]))
    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 200, (80, 24))]
    arguments = TrainingArguments(
        str(output), max_steps=STEPS, save_steps=SAVE, per_device_train_batch_size=4, learning_rate=rate, report_to=[],
        disable_tqdm=True, use_cpu=True, save_total_limit=3, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(network, arguments, train_dataset=data, callbacks=[duallora.SealedCheckpoints()] * sealed)
    last = get_last_checkpoint(str(output)) if output.exists() else None
    found = duallora.latest_verified(output) if sealed else last
    trainer.train(resume_from_checkpoint=found)
    network.save_pretrained(str(output / "adapter"))
    return 0


def compare(folder: Path, long: bool, sealed: bool = False) -> dict[str, dict[str, int]]:
    """{row of the matrix: tried, survived} for a Trainer by itself, or with `duallora.SealedCheckpoints`."""
    model = folder / "model"
    harness.build_model(model)

    def run(output: Path, **how: Any) -> harness.Result:
        rate = how.pop("rate", 1e-3)
        return fork(lambda: train(model, output, sealed, rate), **how)

    straight = folder / "straight"
    assert run(straight).code == 0
    wanted = digest(straight / "adapter" / WEIGHTS)

    def resumed(output: Path) -> bool:
        return run(output).code == 0 and digest(output / "adapter" / WEIGHTS) == wanted

    kills = []
    for i in range(60 if long else 12):
        output, delay = folder / f"kill{i}", random.Random(i).uniform(0, 0.025)
        appears = output / f"checkpoint-{SAVE * (1 + i % (STEPS // SAVE))}"
        run(output, watch=when(appears.exists, signal.SIGKILL, delay))
        kills.append(resumed(output))
    damaged = []
    whole = folder / "interrupted"
    run(whole, watch=when((whole / f"checkpoint-{STEPS}").exists, signal.SIGKILL))
    shutil.rmtree(whole / f"checkpoint-{STEPS}", ignore_errors=True)
    newest = f"checkpoint-{STEPS - SAVE}"
    for name in sorted(path.name for path in (whole / newest).iterdir()):
        if name in ("README.md", "training_args.bin"):  # nothing of a resumed run is in them
            continue
        for how in rows.DAMAGES:
            output = folder / f"{name}-{how}"
            shutil.copytree(whole, output)
            rows.damage(output / newest / name, how)
            damaged.append(resumed(output))
    output = folder / "rate"
    done = run(output, rate=1e30)
    saved = [path for path in output.rglob("*.safetensors") if not harness.finite(path)]
    stopped = [done.code != 0 and not saved]
    counts = {"kill inside a save": kills, "damaged checkpoint": damaged, "NaN, infinity": stopped}
    return {name: {"tried": len(found), "survived": sum(found)} for name, found in counts.items()}
