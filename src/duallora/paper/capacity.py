"""Ours: what each form of dW can hold, where no data or number of steps decides.

    fit     residual = |dW - T|^2 / |T|^2       after fitting a matrix T [192, 192] on every input at once (x = I)
    bits    N (log2 64 - loss / ln 2) / n       that n trained parameters hold of N random labels, one of 64 each

T is Gaussian, has random singular vectors and the singular values k^-1/2 or k^-1, or is a block of what full fine-tuning
changed in a layer. The labels belong to random keys [N, 64], read by a frozen random MLP: three adapted layers of 64 with a
ReLU behind each, and a frozen head. The layers are the methods' own (`duallora.methods.apply`), with their defaults
for scale, start values and warm-up; the optimizer is each method's own AdamW under a cosine, full batches.

Cells are short, so they run inside this process, or a few of its kind; a finished one is a run folder like any other.
"""

from __future__ import annotations

import math
import multiprocessing
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from duallora import methods
from duallora.config.load import load_recipe
from duallora.errors import ConfigError
from duallora.grid.run import refuse_drift, study_folder
from duallora.grid.study import CELLS, STUDY, Cell, Outcome, Study, cell_folder, outcomes
from duallora.paper.variants import Variant
from duallora.store import record
from duallora.store.models import load_model, weights_fingerprint
from duallora.train import run as training

SIZE = 192  # of T; a block of a real layer: its first rows and columns
WIDTH, LABELS = 64, 64  # of the MLP
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
FEW = ("lora", "relu-sign", "relu-window", "relu-tanh", "identity-tanh", "identity-identity")  # at other ranks
CHANGES = "changes"  # the folder of what full fine-tuning changed


class Real(NamedTuple):
    """A short full fine-tuning, and the layer of whose change a block becomes T."""

    model: str
    data: str
    kind: Any
    layer: str
    settings: tuple[str, ...]


_SHORT = (
    "adapter.method=full", "eval.metrics=false", "eval.before=false", "data.eval_limit=8", "train.save_steps=1000",
    "train.report_to=[]",
)  # fmt: skip
REAL = {
    "fit-minilm": Real(
        "builtin:minilm-l6", "builtin:packages", "classify", "bert.encoder.layer.2.attention.self.query.weight",
        (*_SHORT, "data.max_length=64", "train.max_steps=40", "train.batch_size=16", "train.learning_rate=1e-4"),
    ),
    "fit-smollm2": Real(
        "builtin:smollm2-135m", "builtin:docstrings", "generate", "model.layers.14.self_attn.q_proj.weight",
        (*_SHORT, "data.max_length=96", "train.max_steps=16", "train.batch_size=8", "train.learning_rate=1e-4"),
    ),
}  # fmt: skip
POWERS = {"fit-gaussian": None, "fit-power-0.5": 0.5, "fit-power-1": 1.0}  # k^-power


def forms(r: int, *, flora_in: int, randlora: int, vera: int) -> dict[str, Variant]:
    """Every method with a form for a single layer, at about the parameters of LoRA at rank r; Dual LoRA has r / 2 twice.

    The other ranks are those by which FLoRA's core, RandLoRA and VeRA come nearest.
    """
    others: dict[str, tuple[int, dict[str, Any]]] = {
        "lora": (r, {}), "dora": (r, {}), "hira": (r, {}), "mora": (r, {}), "flora-core": (r, {"r_in": flora_in}),
        "randlora": (randlora, {}), "vera": (vera, {}),
    }  # fmt: skip
    found: dict[str, Variant] = {
        name: {"adapter.method": name, "adapter.r": own, **({"adapter.options": options} if options else {})}
        for name, (own, options) in others.items()
    }
    found |= {f"{magnitude}-sign": _dual(r // 2, magnitude, "ste") for magnitude in ("relu", "identity")}
    for magnitude in ("relu", "abs", "identity"):
        found[f"{magnitude}-window"] = _dual(r // 2, magnitude, "ste", ste_clip="window")
        found[f"{magnitude}-tanh"] = _dual(r // 2, magnitude, "tanh")
    found |= {f"relu-{name}": _dual(r // 2, "relu", name) for name in ("xnor", "identity")}
    found |= {"relu-fixed": _dual(r, "relu", "fixed"), "identity-identity": _dual(r // 2, "identity", "identity")}
    if r >= 8:
        found["identity-tanh-3to1"] = _dual(r // 2, "identity", "tanh", r1=3 * r // 4, r2=r // 4)
    return found


def _dual(r: int, magnitude: str, direction: str, **more: Any) -> Variant:
    settings = {"method": "duallora", "r": r, "magnitude": magnitude, "direction": direction, **more}
    return {f"adapter.{key}": value for key, value in settings.items()}


def capacity(scale: str) -> tuple[Study, ...]:
    """The fits of drawn matrices, the bits of every form, those of a few at half and twice the rank (three bits a parameter
    are offered in each), and the fits of real layers. Every value is ours."""
    base = {
        "model.name": "none", "data.path": "none",  # which a recipe has to name
        "adapter.target_modules": ["one", "two", "three"],
    }  # fmt: skip
    common: dict[str, Any] = {"search": {"train.learning_rate": list(RATES)}, "reference": "lora"}
    fit: dict[str, Any] = {"base": {**base, "train.max_steps": 300}, "metric": "residual", **common}
    fit["variants"] = forms(16, flora_in=15, randlora=6, vera=832)
    # Beside their best rate many forms store nothing, on which side of the edge hangs on the seed: all three choose.
    bits = {"base": {**base, "train.max_steps": 600}, "metric": "bits_per_parameter", "search_seeds": 3, **common}
    half, twice = forms(2, flora_in=2, randlora=22, vera=192), forms(8, flora_in=8, randlora=4, vera=960)
    return (
        Study("capacity", tasks={name: {} for name in POWERS}, **fit),
        Study("capacity-bits", tasks={"keys-768": {}}, variants=forms(4, flora_in=4, randlora=10, vera=448), **bits),
        Study("capacity-bits-r2", tasks={"keys-384": {}}, variants={name: half[name] for name in FEW}, **bits),
        Study("capacity-bits-r8", tasks={"keys-1536": {}}, variants={name: twice[name] for name in FEW}, **bits),
        Study("capacity-layers", tasks={name: {} for name in REAL}, **fit),
    )


# -- what is fitted ---------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A model without an adapter and what it is to learn; ``loss`` of the model's output."""

    model: nn.Module
    inputs: Tensor
    loss: Any
    value: Any
    """(loss, trained parameters) -> the study's metric."""


def problem(task: str, seed: int, folder: Path) -> Problem:
    """The problem of a task for one seed, which draws targets, keys and the frozen weights, but not those of a real layer."""
    if task.startswith("keys-"):
        return _labels(int(task.partition("-")[2]), seed)
    W0, T = (X * (SIZE * X.square().mean()).rsqrt() for X in _weights(task, seed, folder))  # rms 1 / sqrt(in), both
    layer = nn.Linear(SIZE, SIZE, bias=False)
    layer.weight.data = W0
    power = T.square().sum()

    def loss(y: Tensor) -> Tensor:
        return (y - W0.T - T.T).square().sum() / power

    return Problem(nn.Sequential(OrderedDict(one=layer)), torch.eye(SIZE), loss, lambda loss, parameters: loss)


def _weights(task: str, seed: int, folder: Path) -> tuple[Tensor, Tensor]:
    """(W0, T) of a task that fits a matrix."""
    if task not in REAL:
        return _drawn(task, seed)
    found = load_file(_change_file(folder, task))
    return found["W0"], found["T"]


def _drawn(task: str, seed: int) -> tuple[Tensor, Tensor]:
    """(W0, T) of a task without a model."""
    random = torch.Generator().manual_seed(seed)
    W0, T, U, V = (torch.randn(SIZE, SIZE, generator=random) for _ in range(4))
    if (power := POWERS[task]) is not None:
        T = torch.linalg.qr(U)[0] * torch.arange(1, SIZE + 1) ** -power @ torch.linalg.qr(V)[0]
    return W0, T


def _labels(count: int, seed: int) -> Problem:
    random = torch.Generator().manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name in ("one", "two", "three", "head"):
        layers[name] = layer = nn.Linear(WIDTH, LABELS if name == "head" else WIDTH, bias=False)
        nn.init.normal_(layer.weight, std=math.sqrt(2 / WIDTH), generator=random)
        if name != "head":
            layers[f"{name}_relu"] = nn.ReLU()
    keys = torch.randn(count, WIDTH, generator=random)
    labels = torch.randint(LABELS, (count,), generator=random)
    loss, bits = partial(nn.functional.cross_entropy, target=labels), partial(bits_per_parameter, count)
    return Problem(nn.Sequential(layers), keys, loss, bits)


def bits_per_parameter(keys: int, loss: float, parameters: int) -> float:
    """What n parameters hold of N labels known to ``loss`` nats each: N (log2 64 - loss / ln 2) / n."""
    return keys * (math.log2(LABELS) - loss / math.log(2)) / parameters


def left_by_svd(T: Tensor, rank: int) -> float:
    """|T_rank - T|^2 / |T|^2 of the best matrix of a rank (Eckart and Young): no dW of LoRA leaves less."""
    energy = torch.linalg.svdvals(T.double()).square()
    return float(energy[rank:].sum() / energy.sum())


# -- what full fine-tuning changes ------------------------------------------------------------------------------------


def _change_file(folder: Path, task: str) -> Path:
    return folder / CHANGES / f"{task}.safetensors"


def change(task: str, folder: Path, console: Console) -> None:
    """Leaves W0 and T [192, 192] of a real layer in the study's folder, once.

    Raises:
        ConfigError: the model is not there.
    """
    file, own = _change_file(folder, task), REAL[task]
    if file.is_file():
        return
    place = folder / CHANGES / task
    recipe = load_recipe(None, own.settings, model=own.model, data=own.data, output=place)
    model, _ = load_model(own.model, own.kind)
    before, base = dict(model.named_parameters())[own.layer].detach(), weights_fingerprint(model)
    trained = training.train(recipe, resume="auto", console=console)
    after = load_file(Path(trained["adapter"]) / "model.safetensors")[own.layer]
    W0, T = before.float(), after.float() - before.float()
    block = {"W0": W0[:SIZE, :SIZE].contiguous(), "T": T[:SIZE, :SIZE].contiguous()}
    save_file(block, file, metadata={"base": base, "layer": own.layer})
    shutil.rmtree(place)  # a whole model


def facts(study: Study, folder: Path) -> dict[str, Any]:
    """Of each fitted T: what the best matrix of LoRA's rank leaves, the mean over seeds; of a real one, where it is from."""
    found: dict[str, Any] = {}
    rank = study.variants["lora"]["adapter.r"] if "lora" in study.variants else 16
    for task in (task for task in study.tasks if not task.startswith("keys-")):
        weights = [_weights(task, seed, folder) for seed in (study.seeds[:1] if task in REAL else study.seeds)]
        found[task] = {"rank": rank, "svd": sum(left_by_svd(T, rank) for _, T in weights) / len(weights)}
        if task in REAL:
            W0, T = (float(X.square().mean().sqrt()) for X in weights[0])
            found[task] |= {"T_rms": T, "W0_rms": W0, **REAL[task]._asdict()}
    return {"targets": found} if found else {}


# -- running ----------------------------------------------------------------------------------------------------------


def spec(settings: Mapping[str, Any]) -> methods.MethodSpec:
    """The method of a cell's settings, on a plain module."""
    own = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith("adapter.")}
    name, r, targets = own.pop("method"), own.pop("r"), own.pop("target_modules")
    options = {**own.pop("options", {}), **own}
    return methods.MethodSpec(name, r=r, target_modules=targets, task_type=None, options=options)


def attach(cell_settings: Mapping[str, Any], model: nn.Module, seed: int) -> methods.Adapted:
    """The method on those of its target modules that ``model`` has; everything else is frozen."""
    torch.manual_seed(seed)
    model.requires_grad_(False)
    there = [name for name in cell_settings["adapter.target_modules"] if hasattr(model, name)]
    return methods.apply(model, spec({**cell_settings, "adapter.target_modules": there}))


def fit(settings: Mapping[str, Any], task: str, seed: int, folder: Path) -> tuple[float, int]:
    """(the metric after the last step, trained parameters) of one cell; NaN where it diverged."""
    own, steps, rate = problem(task, seed, folder), settings["train.max_steps"], settings["train.learning_rate"]
    adapted = attach(settings, own.model, seed)
    optimizer = adapted.optimizer(rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = own.loss(adapted.model(own.inputs))
        if not torch.isfinite(loss.detach()):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    parameters = sum(parameter.numel() for parameter in methods.trained(adapted.model))
    with torch.no_grad():
        return own.value(float(own.loss(adapted.model(own.inputs))), parameters), parameters


def run_cell(folder: Path, metric: str, cell: Cell) -> None:
    """Runs one cell on one thread and leaves its run folder."""
    started, cpu = time.time(), time.process_time()
    recipe, task, seed = cell.recipe().model_dump(mode="json"), cell.tags["task"], cell.tags["seed"]
    with one_thread():
        value, parameters = fit(cell.settings, task, seed, folder)
        trained = {"trainable": parameters}
        result = record.result("capacity", recipe, {}, seeds=[seed], started=started, parameters=trained)
    own = {metric: value, "train_cpu_seconds": time.process_time() - cpu}
    place, facts = cell_folder(folder, cell.name), {"seed": seed, "steps": recipe["train"]["max_steps"]}
    if not math.isfinite(value):
        facts |= {"status": "failed", "kind": "diverged", "result": {"metrics": {}}}
    else:  # the one row that there is, chosen by and reported on
        facts |= {"status": "done", "kind": "done", "result": {"metrics": own}}
        metrics = {"metrics": {**own, "test": {metric: value}}, "main_metric": metric}
        place.write_predictions([{"prediction": value, "label": 0}])
        place.write_metrics({**result, **metrics, "data": dict.fromkeys(("validation", "test"), f"{task} {seed}")})
    place.write_facts({**result, **facts})


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread: matrices of this size gain nothing by more, and sums come out alike on any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(study: Study, folder: Path, *, workers: int, console: Console) -> tuple[Study, dict[str, Outcome]]:
    """Runs what ``study`` wants and ``folder`` has not got: (the study without the layers whose model is absent, outcomes).

    Raises:
        ConfigError: the folder is another study's, or its cells were run with other settings.
        LockedError: another process works in it.
    """
    with study_folder(folder), _mapping(workers) as each:
        study = _with_models(study, folder, console)
        record.write_text(folder / STUDY, study.yaml())
        (folder / CELLS).mkdir(exist_ok=True)
        while True:
            found = outcomes(folder)
            wanted = study.wanted(found)
            refuse_drift(wanted, found)
            cells = [cell for cell in wanted if cell.name not in found or not found[cell.name].settled]
            if not cells:
                return study, found
            for number, _ in enumerate(each(partial(run_cell, folder, str(study.metric)), cells), 1):
                if number % 20 == 0 or number == len(cells):
                    console.print(f"{escape(study.name)}: {number} of {len(cells)} cells of this stage", soft_wrap=True)


@contextmanager
def _mapping(workers: int) -> Iterator[Callable[..., Iterable[None]]]:
    """A ``map`` over so many processes; of one, this one."""
    if workers == 1:
        yield map
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield pool.map


def _with_models(study: Study, folder: Path, console: Console) -> Study:
    left = dict(study.tasks)
    for task in [task for task in study.tasks if task in REAL]:
        try:
            change(task, folder, console)
        except ConfigError as error:
            console.print(f"[yellow]{task} is left out[/]: {escape(str(error))}", soft_wrap=True)
            del left[task]
    return replace(study, tasks=left)


# -- the plan ---------------------------------------------------------------------------------------------------------


def plan(studies: Iterable[Study], console: Console) -> dict[str, Any]:
    """Prints and returns every study's tasks, cells and trained parameters, before any of it has run."""
    planned = []
    for study in studies:
        task = next(iter(study.tasks))
        counted = {label: _parameters(own, study, task) for label, own in study.variants.items()}
        cells, steps = study.expected({}), study.base["train.max_steps"]
        size = f"{cells} cells of {steps} steps, more where a best rate lies at the edge"
        console.print(f"[bold]{escape(study.name)}[/]: {', '.join(study.tasks)}; {size}", soft_wrap=True)
        table = Table("form", "trained", "more than LoRA", box=SIMPLE)
        for label, count in counted.items():
            table.add_row(label, f"{count:,}", f"{count - counted['lora']:+,}" if "lora" in counted else "-")
        console.print(table)
        planned.append({"study": study.name, "tasks": list(study.tasks), "cells": cells, "trained_parameters": counted})
    return {"runs": sum(one["cells"] for one in planned), "studies": planned}


def _parameters(variant: Mapping[str, Any], study: Study, task: str) -> int:
    model = problem("fit-gaussian" if task in REAL else task, 0, Path()).model
    return sum(own.numel() for own in methods.trained(attach({**study.base, **variant}, model, 0).model))
