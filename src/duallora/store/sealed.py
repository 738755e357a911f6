"""Sealed checkpoints for any Trainer, with any model: a callback that seals them and a function that finds the last whole one.

    trainer = SFTTrainer(model, args, train_dataset=rows, callbacks=[duallora.SealedCheckpoints()])
    trainer.train(resume_from_checkpoint=duallora.latest_verified(args.output_dir))

A run that was killed, whenever that was, goes on from its last whole checkpoint, or begins anew where there is none.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from duallora.errors import NonFiniteError
from duallora.store import checkpoint
from duallora.store.processes import Processes

logger = logging.getLogger(__name__)


def latest_verified(folder: str | Path) -> str | None:
    """The newest ``checkpoint-N`` below ``folder`` that is whole: every file has the size and sha256 it was saved with.

    Args:
        folder: a Trainer's ``output_dir``, trained with :class:`SealedCheckpoints`.

    Returns:
        Its path, for ``Trainer.train(resume_from_checkpoint=...)``; None where no save has come to its end, which that
        argument takes for a new start. What is passed over is logged as a warning, with the reason.

    Raises:
        IntegrityError: checkpoints were sealed and each is damaged; nothing is deleted.
    """
    found, reasons = checkpoint.require_resumable(Path(folder))
    for reason in reasons:
        logger.warning("passed over %s", reason)
    return None if found is None else str(found)


class SealedCheckpoints(TrainerCallback):
    """Seals each checkpoint that Trainer writes, and stops a run before a value that is not finite reaches one.

    ``MANIFEST.json``, written last, lists every file with its size and sha256. Old checkpoints are deleted only once a new
    one is whole: ``save_total_limit`` is taken over from the arguments of the Trainer, which would delete before. Of several
    processes, the first one seals when all have written. Weights go into checkpoints with the state of the optimizer
    (not with ``save_only_model=True``), or nothing could be resumed exactly.

    Args:
        facts: JSON values to keep in the manifest, such as the fingerprints of data and base model.
        check_gradients: raise before a step whose gradients are not finite. Mixed precision in float16 finds such
            steps itself and skips them, so it is not looked at.

    Raises:
        NonFiniteError: from training; the step was not applied, or the checkpoint not kept.
    """

    def __init__(self, facts: Mapping[str, Any] | None = None, *, check_gradients: bool = True):
        self.facts, self.check_gradients = dict(facts or {}), check_gradients
        self.keep: int | None = None
        self.processes = Processes()

    def on_train_begin(self, args, state, control, **kwargs):
        self.processes = Processes(args.process_index, args.world_size)
        self.folder = Path(args.output_dir)
        if args.save_total_limit is not None:
            self.keep, args.save_total_limit = max(1, args.save_total_limit), None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.check_gradients and not args.fp16:
            norm = gradient_norm(model)
            bad = max(not finite for (finite,) in self.processes.all_gather([float(norm - norm == 0)]))
            if bad:
                raise NonFiniteError(
                    f"the gradient norm is {norm} in step {state.global_step + 1}; the step was not applied. Lower "
                    f"learning_rate (it is {args.learning_rate:g}) or look at the rows; earlier checkpoints are intact"
                )

    def on_step_end(self, args, state, control, **kwargs):
        # A folder of this number from an earlier, broken attempt may hold files this save will not overwrite.
        if control.should_save:
            stale = self.folder / f"checkpoint-{state.global_step}"
            if self.processes.main and stale.exists():
                shutil.rmtree(stale)
            self.processes.barrier()

    on_epoch_end = on_step_end  # where a save is due with save_strategy="epoch"

    def on_save(self, args, state, control, model=None, **kwargs):
        folder = self.folder / f"checkpoint-{state.global_step}"
        try:
            require_finite(model, f"step {state.global_step}")
        except NonFiniteError:
            if self.processes.main:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        self.processes.barrier()
        if self.processes.main:
            checkpoint.commit(
                folder, step=state.global_step, fingerprints={**self.facts, "processes": self.processes.world_size}
            )
            best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
            checkpoint.rotate(self.folder, self.keep, spare=best)
        self.processes.barrier()  # nobody leaves before it is sealed


def gradient_norm(model: torch.nn.Module) -> float:
    """The norm of all gradients together; NaN or infinite where one of them is."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def require_finite(model: torch.nn.Module, when: str) -> None:
    """Raises NonFiniteError naming the first trainable weight that holds a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(
                f"{name} holds NaN or infinite values at {when}; nothing of it was saved. "
                "Lower train.learning_rate or train.max_grad_norm and resume from the last checkpoint"
            )
