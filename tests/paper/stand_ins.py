"""Every cell of the paper-scale studies, run on a stand-in: a random model of its base's architecture, and rows written here.

A cell is a variant on a task with a base model; equal recipes count once, and one seed and one search value serve. Each is trained
for two steps in one go, and once more, stopped by a signal after step 1 and resumed: both have to end at the same bits and the
same scores. MRPC, RTE and STS-B begin from the stand-in's run on MNLI, as theirs do. The architecture is the published config with
smaller sizes; everything else is the recipe's own, but for `CHANGED`. Nothing is downloaded. `make stand-ins` writes
results/stand_ins.json.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import SIZES, save_model, write_rows

from duallora import paper
from duallora.config.recipe import Recipe
from duallora.errors import Interrupted
from duallora.paper import reproduce
from duallora.paper.cost import SAME_SHAPES
from duallora.plan.architectures import config_of
from duallora.store import checkpoint, record
from duallora.store.run_folder import RunFolder
from duallora.train import run
from duallora.train.loop import RunTrainer

STEPS = 2
# What differs from a cell's recipe, and why.
CHANGED = {
    "model.name": "the stand-in",
    "data.data_dir": "the rows written here",
    "data.holdout": "8 where it is set: so few rows",
    "train.max_steps": f"{STEPS}",
    "train.save_steps": "1",
    "adapter.options.K": "0 (Delta-LoRA): it moves the weights after step K, 500 by default",
}


def cells() -> list[dict[str, Any]]:
    """Every distinct cell: ``study``, ``task``, ``variant``, ``model``, its ``recipe``, and ``after``, the task it begins from (``after_cell``)."""
    found: dict[str, dict[str, Any]] = {}
    by_name: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name in (name for name, (_, what) in paper.HOME.items() if not what.endswith("(ours)")):
        for study in paper.studies(name, "paper"):
            part = reproduce.Part(study, Path(study.name))
            for cell in part.first_cells():
                recipe, task, variant = cell.recipe(), cell.tags["task"], cell.tags["variant"]
                after = part.after(task)
                own = recipe.model_dump(mode="json", exclude={"seed": True, "train": {"learning_rate"}})
                said = {"study": study.name, "task": task, "variant": variant, "model": recipe.model.name}
                first = after and by_name[study.name, after, variant]
                found.setdefault(
                    json.dumps([own, after], sort_keys=True),
                    {**said, "recipe": recipe, "after": after, "after_cell": first},
                )
                by_name[study.name, task, variant] = {**said, "recipe": recipe}
    return list(found.values())


def key(cell: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a cell is known by."""
    return cell["study"], cell["task"], cell["variant"]


# -- running -------------------------------------------------------------------------------------------------------------


class Fault(Exception):
    """A cell ran and did not do what it should."""


@contextmanager
def stopped_in_first_step() -> Iterator[None]:
    """Runs within get SIGTERM while they take their first step, as from a queue that ends a job."""
    plain = RunTrainer.training_step

    def training_step(self: Any, *arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *arguments, **options)

    with mock.patch.object(RunTrainer, "training_step", training_step):
        yield


def stand_in(cell: Mapping[str, Any], folder: Path) -> Recipe:
    """The cell's recipe with what `CHANGED` names; ``folder`` has its model and the rows."""
    own: Recipe = cell["recipe"]
    adapter = {"options": {**own.adapter.options, "K": 0}} if own.adapter.method == "delta-lora" else {}
    parts: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder / "model")},
        "adapter": adapter,
        "data": {"data_dir": str(folder / "data"), "holdout": own.data.holdout and 8},
        "train": {"max_steps": STEPS, "save_steps": 1},
    }
    values = {**own.model_dump(mode="json"), "output": str(folder / "run")}
    return Recipe.model_validate({**values, **{part: {**values[part], **new} for part, new in parts.items()}})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def unscored(recipe: Recipe, output: Path) -> Recipe:
    evaluation = recipe.eval.model_copy(update={"metrics": False, "test": False})
    return recipe.model_copy(update={"output": str(output), "eval": evaluation})


def attempt(recipe: Recipe, whole: Path) -> dict[str, Any]:
    """Two steps in one go into ``whole``, and in two goes into the recipe's own folder; the scores, or `Fault`."""
    quiet, folder = Console(file=io.StringIO()), RunFolder(str(recipe.output))
    straight = run.train(unscored(recipe, whole), console=quiet)
    try:
        with stopped_in_first_step():
            run.train(recipe, console=quiet)
        raise Fault("it did not stop after its first step")
    except Interrupted:
        kept, reasons = checkpoint.newest_verified(folder.checkpoints)
    if kept is None or checkpoint.step_of(kept) != 1 or reasons:
        raise Fault(f"its checkpoint is {kept and kept.name}, expected a whole checkpoint-1; {reasons}")
    first = tensors(kept)
    resumed = run.train(recipe, resume="auto", console=quiet)
    one, other = tensors(Path(straight["adapter"])), tensors(Path(resumed["adapter"]))
    if not one or one.keys() != other.keys() or not all(torch.equal(one[name], other[name]) for name in one):
        raise Fault("the resumed run ended at other weights than the straight one")
    if straight["metrics"]["loss"] != resumed["metrics"]["loss"]:
        raise Fault(f"the loss is {resumed['metrics']['loss']} resumed and {straight['metrics']['loss']} straight")
    if all(torch.equal(first[name], value) for name, value in one.items() if name in first):
        raise Fault("its second step changed no weight")
    scored, main = resumed["metrics"], (folder.metrics() or {})["main_metric"]
    scores = {"validation": scored.get(main), "test": scored["test"].get(main), "loss": scored["loss"]}
    if bad := [split for split, value in scores.items() if value is None or not math.isfinite(value)]:
        raise Fault(f"no finite {main} or loss of {', '.join(bad)}: {scores}")
    return {"metric": main, **scores}


def run_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """What became of a cell, in a folder of its own; the run that it begins from is taken before."""
    torch.set_num_threads(1)
    os.environ.pop("DUALLORA_DATA", None)
    began = time.time()
    found: dict[str, Any] = {part: cell[part] for part in ("study", "task", "variant", "model", "after")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            write_rows(folder / "data")
            save_model(cell["model"], folder / "model")
            recipe = stand_in(cell, folder)
            if cell["after"]:
                first = stand_in(cell["after_cell"], folder)
                run.train(unscored(first, folder / "first"), console=Console(file=io.StringIO()))
                own = recipe.adapter.model_copy(update={"init_from": str(folder / "first")})
                recipe = recipe.model_copy(update={"adapter": own})
            found |= {"ok": True, **attempt(recipe, folder / "whole")}
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0].replace(name, "")
            found |= {"ok": False, "failed": f"{type(error).__name__}: {first_line}"}
    return {**found, "seconds": round(time.time() - began, 1)}


def by_kind(chosen: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells so that every method and every task of an architecture comes early."""
    seen: Counter[tuple[str, str]] = Counter()
    rank = []
    for cell in chosen:
        kind = config_of(SAME_SHAPES.get(cell["model"], cell["model"])).model_type
        keys = [(kind, cell["recipe"].adapter.method), (kind, cell["task"])]
        rank.append(min(seen[one] for one in keys))
        seen.update(keys)
    return [cell for _, cell in sorted(zip(rank, chosen, strict=True), key=lambda pair: pair[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="?", default="", help="cells whose STUDY/TASK/VARIANT begins so")
    parser.add_argument("--output", type=Path, help="written after every cell; a run of the same commit goes on there")
    parser.add_argument("--workers", type=int, default=1, help="cells at once")
    arguments = parser.parse_args()
    started, every, done = time.time(), cells(), {}
    before = record.read_json(arguments.output) if arguments.output and arguments.output.is_file() else {}
    state = record.git_state(Path(__file__).parent)  # before the record itself is what has changed
    if before.get("commit") == state["commit"]:
        done = {key(cell): cell for cell in before["cells"] if cell["ok"]}
    chosen = [cell for cell in every if "/".join(key(cell)).startswith(arguments.only) and key(cell) not in done]
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("fork")) as pool:
        for future in as_completed([pool.submit(run_cell, cell) for cell in by_kind(chosen)]):
            found = future.result()
            done[key(found)] = found
            print(f"{'/'.join(key(found))}: {found.get('failed', 'ok')} ({found['seconds']} s)", flush=True)
            if arguments.output:
                in_order = [done[key(cell)] for cell in every if key(cell) in done]
                counts = {"cells": len(every), "ok": sum(cell["ok"] for cell in in_order)}
                recipe = {"steps": STEPS, "stopped_after": 1, "sizes": SIZES, "changed": CHANGED, "ranks_changed": []}
                found = record.result("stand_ins", recipe, counts, seeds=[0], started=started, cells=in_order)
                record.write_json(arguments.output, {**found, **state})
    failed = sum(not cell["ok"] for cell in done.values())
    print(f"{len(done)} of {len(every)} cells, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
