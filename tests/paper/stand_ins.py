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
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from duallora import paper
from duallora.config.recipe import Recipe
from duallora.errors import Interrupted
from duallora.paper import reproduce
from duallora.paper.cost import SAME_SHAPES
from duallora.plan.architectures import config_of, is_encoder
from duallora.store import checkpoint, record
from duallora.store.run_folder import RunFolder
from duallora.tasks import commonsense, glue
from duallora.train import run
from duallora.train.loop import RunTrainer

STEPS = 2
# Sizes of the stand-ins. No rank of the tables has to shrink for them: CorDA's 128 is the largest that a width bounds.
WIDTH, MLP, LAYERS, HEADS = 128, 256, 2, 8
# What differs from a cell's recipe, and why.
CHANGED = {
    "model.name": "the stand-in",
    "data.data_dir": "the rows written here",
    "data.holdout": "8 where it is set: so few rows",
    "train.max_steps": f"{STEPS}",
    "train.save_steps": "1",
    "adapter.options.K": "0 (Delta-LoRA): it moves the weights after step K, 500 by default",
}
ROWS = 72  # of each GLUE task: 8 held out, two batches of 32 trained on


def cells() -> list[dict[str, Any]]:
    """Every distinct cell: ``study``, ``task``, ``variant``, ``model``, its ``recipe``, and ``after``, the task it begins from."""
    found: dict[str, dict[str, Any]] = {}
    for name in (name for name, (_, what) in paper.HOME.items() if not what.endswith("(ours)")):
        for study in paper.studies(name, "paper"):
            part = reproduce.Part(study, Path(study.name))
            for cell in part.first_cells():
                recipe, task, variant = cell.recipe(), cell.tags["task"], cell.tags["variant"]
                after = part.after(task)
                own = recipe.model_dump(mode="json", exclude={"seed": True, "train": {"learning_rate"}})
                said = {"study": study.name, "task": task, "variant": variant, "model": recipe.model.name}
                found.setdefault(json.dumps([own, after], sort_keys=True), {**said, "recipe": recipe, "after": after})
    return list(found.values())


def key(cell: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a cell is known by."""
    return cell["study"], cell["task"], cell["variant"]


# -- models --------------------------------------------------------------------------------------------------------------

# model type -> (beginning, end, padding of the published tokenizer; None: it has none), and the form of a text and of a pair
TOKENS: dict[str, tuple[tuple[str, str, str | None], str, str]] = {
    "llama": (("<s>", "</s>", None), "<s> $A", "<s> $A <s>:1 $B:1"),
    "gpt2": (("<|endoftext|>", "<|endoftext|>", None), "$A", "$A $B:1"),
    "roberta": (("<s>", "</s>", "<pad>"), "<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "deberta-v2": (("[CLS]", "[SEP]", "[PAD]"), "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"),
}


def tokenizer_of(model_type: str) -> PreTrainedTokenizerFast:
    """A token for each byte, and the marks that the published tokenizer sets around texts; padding comes second, as RoBERTa's."""
    (first, last, padding), single, pair = TOKENS[model_type]
    marks = list(dict.fromkeys(mark for mark in (first, padding, last) if mark))
    words = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_of = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    bytes_of.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_of.decoder = decoders.ByteLevel()
    bytes_of.add_special_tokens(marks)
    bytes_of.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(mark, bytes_of.token_to_id(mark)) for mark in marks]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bytes_of, bos_token=first, eos_token=last, pad_token=padding)


def save_model(name: str, folder: Path) -> None:
    """The stand-in of a published model, saved: its config with smaller sizes, heads grouped as it has them."""
    values = config_of(SAME_SHAPES.get(name, name)).to_dict()
    kind = values.pop("model_type")
    values.pop("head_dim", None)  # follows from the others
    heads = values.get("num_attention_heads")
    sizes = {
        "hidden_size": WIDTH, "n_embd": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "n_layer": LAYERS,
        "num_attention_heads": HEADS, "n_head": HEADS, "pooler_hidden_size": WIDTH,
        "num_key_value_heads": heads and HEADS * values.get("num_key_value_heads", heads) // heads,
    }  # fmt: skip
    tokenizer = tokenizer_of(kind)
    ids = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    values |= {key: size for key, size in sizes.items() if key in values} | ids | {"vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(kind, **values)
    set_seed(0)
    (AutoModel if is_encoder(config) else AutoModelForCausalLM).from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -- rows ----------------------------------------------------------------------------------------------------------------


def write_rows(folder: Path) -> None:
    """Every task's files in its own form."""

    def write(file: str, lines: Iterable[str]) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")

    for one in glue.PROTOCOLS.values():
        columns = one.header or ("index", *one.columns, one.label)

        def line(number: int, one: glue.Protocol = one, columns: tuple[str, ...] = columns) -> str:
            label = one.labels[number % len(one.labels)] if one.labels else f"{number % 11 / 2:.3f}"
            said = {column: f"Row {number} says {place}." for place, column in enumerate(one.columns)}
            return "\t".join({**said, one.label: label}.get(column, str(number)) for column in columns)

        for file, count in {"train.tsv": ROWS, **dict.fromkeys(one.dev, 8)}.items():
            header = [] if one.header else ["\t".join(columns)]
            write(f"glue/{one.folder}/{file}", [*header, *map(line, range(count))])
    for task in commonsense.PROTOCOLS.values():
        named = "/".join(task.answers)
        for file, count in ((task.train_files[0], 6), (task.test_files[0], 1)):
            golds = itertools.islice(itertools.cycle(task.answers), count)
            rows = [
                {"instruction": f"Pick {number}.\n\nAnswer format: {named}", "input": "", "output": f"the correct answer is {gold}", "answer": gold}
                for number, gold in enumerate(golds)
            ]  # fmt: skip
            write(f"commonsense/{task.folder}/{file}", [json.dumps(rows)])
    for file, count in (("train", 24), ("valid", 2), ("test", 2)):
        write(f"e2e_nlg/{file}.txt", [f"name : {n} | food : {n % 3}||{n} serves {n % 3} ." for n in range(count)])


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
    """The cell's recipe with what `CHANGED` names; ``folder`` has its model, the rows, and the run it begins from."""
    own: Recipe = cell["recipe"]
    adapter = {"init_from": str(folder / cell["after"] / cell["variant"])} if cell["after"] else {}
    if own.adapter.method == "delta-lora":
        adapter |= {"options": {**own.adapter.options, "K": 0}}
    parts: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder / "model")},
        "adapter": adapter,
        "data": {"data_dir": str(folder / "data"), "holdout": own.data.holdout and 8},
        "train": {"max_steps": STEPS, "save_steps": 1},
    }
    values = {**own.model_dump(mode="json"), "output": str(folder / cell["task"] / cell["variant"])}
    return Recipe.model_validate({**values, **{part: {**values[part], **new} for part, new in parts.items()}})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def attempt(recipe: Recipe, whole: Path) -> dict[str, Any]:
    """Two steps in one go into ``whole``, and in two goes into the recipe's own folder; the scores, or `Fault`."""
    quiet, folder = Console(file=io.StringIO()), RunFolder(str(recipe.output))
    unscored = recipe.eval.model_copy(update={"metrics": False, "test": False})
    straight = run.train(recipe.model_copy(update={"output": str(whole), "eval": unscored}), console=quiet)
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


def run_study(own: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every cell of one study, told as it ends."""
    torch.set_num_threads(1)
    os.environ.pop("DUALLORA_DATA", None)
    done = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "data")
        save_model(own[0]["model"], folder / "model")
        for cell in own:
            began = time.time()
            found: dict[str, Any] = {key: cell[key] for key in ("study", "task", "variant", "model", "after")}
            try:
                found |= {"ok": True, **attempt(stand_in(cell, folder), folder / "whole")}
            except Exception as error:
                first_line = (str(error).splitlines() or [""])[0].replace(name, "")
                found |= {"ok": False, "failed": f"{type(error).__name__}: {first_line}"}
            found["seconds"] = round(time.time() - began, 1)
            shutil.rmtree(folder / "whole", ignore_errors=True)
            if cell["task"] != "mnli":  # which others begin from
                shutil.rmtree(folder / cell["task"], ignore_errors=True)
            print(f"{'/'.join(key(cell))}: {found.get('failed', 'ok')} ({found['seconds']} s)", flush=True)
            done.append(found)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="?", default="", help="cells whose STUDY/TASK/VARIANT begins so")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="studies at once")
    arguments = parser.parse_args()
    started = time.time()
    chosen = [cell for cell in cells() if "/".join(key(cell)).startswith(arguments.only)]
    studies = [list(own) for _, own in itertools.groupby(chosen, key=lambda cell: cell["study"])]
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("fork")) as pool:
        tried = {own[0]["study"]: pool.submit(run_study, own) for own in sorted(studies, key=len, reverse=True)}
        done = [cell for own in studies for cell in tried[own[0]["study"]].result()]
    failed = [cell for cell in done if not cell["ok"]]
    print(f"{len(done)} cells, {len(failed)} failed")
    if arguments.output:
        sizes = {"width": WIDTH, "mlp": MLP, "layers": LAYERS, "heads": HEADS}
        recipe = {"steps": STEPS, "stopped_after": 1, "sizes": sizes, "changed": CHANGED, "ranks_changed": []}
        counts = {"cells": len(done), "failed": len(failed)}
        found = record.result("stand_ins", recipe, counts, seeds=[0], started=started, cells=done)
        record.write_json(arguments.output, found)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
