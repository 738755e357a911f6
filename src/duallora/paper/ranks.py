"""Figure 3's numbers of a trained run: the ranks of its matrices, and that of dW on the data.

    dW C^(1/2),  C = mean of x x^T over the tokens x [in] that the layer reads on the run's held-out rows

is what dW does to the inputs that occur: directions that no input has do not count. Ranks are means over the layers, at
float32's and at float64's tolerance (`duallora.analysis.rank`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from duallora.analysis import rank, states
from duallora.config.recipe import Recipe
from duallora.grid.study import Outcome, cell_folder
from duallora.paper.reproduce import Part
from duallora.store import adapters
from duallora.store.run_folder import RunFolder
from duallora.tasks import encode_split
from duallora.train import evaluate, prepare

ROWS = 128  # held-out rows; ours

Row = dict[str, Any]


def of_study(part: Part, outcomes: Mapping[str, Outcome]) -> list[Row]:
    """The ranks of each task's and variant's chosen run of the first seed, where its adapter was kept."""
    study, rows = part.study, []
    for task in study.tasks:
        for variant in study.variants:
            if (best := study.best(outcomes, task, variant)) is None:
                continue
            folder = cell_folder(part.folder, study.cell_name(task, variant, best, study.seeds[0])).path
            if (folder / "adapter").is_dir():
                rows += [{"task": task, "variant": variant, **row} for row in of_run(folder)]
    return rows


def of_run(folder: Path) -> list[Row]:
    """One row for each of magnitude, direction, dW and "dW on the data" of a run: means over its layers."""
    found = rank.table(states.states(folder)[-1]) + on_data(folder)
    kinds = dict.fromkeys(row["matrix"] for row in found)
    of = {kind: [row for row in found if row["matrix"] == kind] for kind in kinds}
    names = ("rank", "rank_float32", "effective_rank")
    return [
        {
            "matrix": kind,
            **{name: sum(row[name] for row in rows) / len(rows) for name in names},
            "largest": sum(min(row["out"], row["in"]) for row in rows) / len(rows),
            "layers": len(rows),
        }
        for kind, rows in of.items()
    ]


@torch.no_grad()
def on_data(folder: Path) -> list[Row]:
    """The ranks of dW C^(1/2) of each adapted linear layer of a run."""
    recipe = Recipe.model_validate(RunFolder(folder).recipe())
    task = prepare.load(recipe, Console(quiet=True))
    model, tokenizer = adapters.load_adapter(folder, task.kind)
    model.eval()
    examples = evaluate.select(task, "validation", ROWS)
    rows, _ = encode_split(examples, tokenizer, task.kind, max_length=recipe.data.max_length)
    layers: dict[str, Any] = {
        name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer) and hasattr(m, "get_delta_weight")
    }
    seen: dict[str, tuple[Tensor, int]] = {}

    def look(name: str, x: Tensor) -> None:
        x = x.double().reshape(-1, x.shape[-1])
        total, count = seen.get(name, (torch.zeros(()), 0))
        seen[name] = total + x.T @ x, count + len(x)

    hooks = [m.register_forward_pre_hook(lambda m, args, name=name: look(name, args[0])) for name, m in layers.items()]
    for row in rows:  # one at a time: no padding
        model(**{key: torch.tensor(value, device=model.device)[None] for key, value in row.items() if key != "labels"})
    for hook in hooks:
        hook.remove()
    found = []
    for name, (total, count) in seen.items():
        layer = layers[name].double()  # a product in float32 has the rank of its rounding
        dW = layer.get_delta_weight("default").double()
        dW = dW.T if isinstance(layer.get_base_layer(), Conv1D) else dW
        values, vectors = torch.linalg.eigh(total / count)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        found.append({"matrix": "dW on the data", "out": dW.shape[0], "in": dW.shape[1], **rank.of_matrix(dW @ root)})
    return found
