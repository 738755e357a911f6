"""A run folder: what each file in it holds. Nothing else in the package reads or writes these files, or knows their names.

recipe.yaml        the resolved recipe
run.json           `Facts`: what runs, on what, how it stands or ended
log.jsonl, tb/     `Log`: the course of the training; the same for TensorBoard
loss.svg           its losses, drawn
checkpoints/       checkpoint-N/, each sealed (`duallora.store.checkpoint`); init/, the adapter before its first step
adapter/, model/   the result, with its sidecar (`duallora.store.adapters`); one of them
predictions.jsonl  what the model said to each test row, beside what is right
metrics.json       `Metrics`: the metrics, with what is needed to get them again
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast, get_args

from duallora.errors import ConfigError, IntegrityError, is_number
from duallora.store import checkpoint, record

if TYPE_CHECKING:
    from duallora.config.recipe import Recipe

FACTS = "run.json"
LAYOUT = 1  # of run.json; a new number whenever a file of a run is named, or means, something else
Status = Literal["running", "interrupted", "failed", "done"]
RESULTS = ("adapter", "model")
LEFT_OVER = re.compile(r"\.[\w.]+\.\d+\.tmp")  # what a kill leaves of `record.write_text`


class Fingerprints(TypedDict, total=False):
    """sha256 of what decides a run's weights: two runs with equal ones end alike."""

    recipe: str
    data: dict[str, str]  # by split
    base: str  # of the base model's weights
    tokenizer: str  # and its chat template
    plugins: dict[str, str]
    init_from: str  # of the weights that adapter.init_from names


class Facts(TypedDict, total=False):
    """run.json. ``status`` is always there; the rest as far as the run has come."""

    layout: int
    status: Status
    kind: str  # of the end: "done", or of an error (`duallora.errors`)
    error: str
    pid: int
    processes: int
    commit: str | None
    dirty: bool | None
    versions: dict[str, str | None]
    device: str
    threads: int
    platform: str
    started: str
    resumed: list[str]
    finished: str
    seed: int
    recipe: dict[str, Any]
    fingerprints: Fingerprints
    model: dict[str, Any]  # name, revision, quantization, dtype
    parameters: dict[str, int]  # trainable, total
    data: dict[str, Any]  # source, format, kind, labels, and the rows of each split
    steps: int
    loss_before: float | None
    forgetting_before: float | None  # the loss on `eval.forgetting` before training
    answers_before: list[str] | None  # to the first validation rows
    left_out: list[int]  # steps whose rows were not learned from, as their loss was a spike
    init: dict[str, float]  # start_rows, start_seconds, start_cpu_seconds of start values taken from data
    result: dict[str, Any]  # what `duallora train --json` prints


class Metrics(TypedDict, total=False):
    """metrics.json, by `record.result`; ``metrics`` has those of the test rows under "test"."""

    kind: str
    metrics: dict[str, Any]
    main_metric: str | None
    notes: dict[str, str]  # on the metrics, by split
    at_chance: dict[str, Any] | None
    answers: list[dict[str, str]]  # to the first validation rows: prompt, expected, before, after
    data: dict[str, str]
    base: str
    recipe: dict[str, Any]
    parameters: dict[str, int]


TYPES: dict[str, type] = {
    "error": str, "recipe": dict, "fingerprints": dict, "model": dict, "parameters": dict, "data": dict, "steps": int,
    "resumed": list, "init": dict, "result": dict, "processes": int,
}  # fmt: skip


class RunFolder:
    """The folder ``path`` of one run, which need not exist yet."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.log = Log(self.path / "log.jsonl")
        self.recipe_file = self.path / "recipe.yaml"
        self.tensorboard = self.path / "tb"
        self.checkpoints = self.path / "checkpoints"
        self.init = self.checkpoints / "init"
        self.curve = self.path / "loss.svg"

    @classmethod
    def around(cls, path: Path | str) -> RunFolder | None:
        """The run whose folder, result or checkpoint ``path`` is; None where it belongs to no run."""
        path = Path(path).expanduser().absolute()
        folders = (path, *path.parents[:2]) if path.is_dir() else ()
        return next((run for run in map(cls, folders) if run.exists()), None)

    def exists(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / FACTS).is_file()

    # -- run.json ------------------------------------------------------------------------------------------------------

    def facts(self) -> Facts | None:
        """run.json, or None where no run has begun here.

        Raises:
            ConfigError: another version of this package wrote it.
            IntegrityError: it is damaged.
        """
        file = self.path / FACTS
        found = _object(file)
        if found is None:
            return None
        if found.get("layout") != LAYOUT:
            raise ConfigError(
                f"{self.path} is the run of another version of duallora (layout {found.get('layout')} in run.json, expected "
                f"{LAYOUT}). Its adapter still loads, from {self.path / 'adapter'}; for all else use the version that made "
                "it, or train again in another folder with -o"
            )
        result = found.get("result", {})
        off = [key for key, kind in TYPES.items() if not isinstance(found.get(key, kind()), kind)]
        wrong = [f"{key} is {found[key]!r:.40}" for key in off]
        if found.get("status") not in get_args(Status):
            wrong.append(f"status is {found.get('status')!r:.40}, expected one of {', '.join(get_args(Status))}")
        elif found["status"] == "done" and not (isinstance(result, dict) and isinstance(result.get("metrics"), dict)):
            wrong.append("status is done, but the result is missing")
        if wrong:
            raise _damaged(file, wrong[0])
        return cast(Facts, found)

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        record.write_json(self.path / FACTS, {"layout": LAYOUT, **facts})

    def claim(self, *, resume: bool) -> Facts | None:
        """The facts of the run to go on with, or None where a new one may begin; deletes what a kill left half-written.

        Raises:
            ConfigError: the folder holds another run (without ``resume``), a run without run.json, or something else.
        """
        facts = self.facts()
        names = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        if facts is not None:
            taken = facts["status"] == "done" or self.results() or checkpoint.sealed(self.checkpoints)
            if taken and not resume:
                raise ConfigError(
                    f"{self.path} holds another run; continue it with --resume auto, or choose another folder with -o"
                )
        elif found := [one for one in names if one not in (".lock", "recipe.yaml") and not LEFT_OVER.fullmatch(one)]:
            own = [name for name in found if name in (*RESULTS, "checkpoints", "log.jsonl", "metrics.json", "tb")]
            raise ConfigError(
                f"{self.path} holds {own[0]} but no run.json, so what ran there is not known; restore run.json, or choose "
                "another folder with -o"
                if own
                else f"{self.path} is not empty (it holds {found[0]}) and is no run; choose another folder with -o"
            )
        for name in filter(LEFT_OVER.fullmatch, names):
            (self.path / name).unlink(missing_ok=True)
        return facts if resume else None

    # -- the other files -----------------------------------------------------------------------------------------------

    def recipe(self) -> dict[str, Any]:
        """The settings of the run, by run.json; raises as `facts`, and ConfigError where this version has others."""
        from duallora.config.recipe import recorded

        facts, file = self.facts() or Facts(), self.path / FACTS
        if "recipe" not in facts:
            raise _damaged(file, "the recipe is missing")
        return recorded(facts["recipe"], str(file))

    def write_recipe(self, recipe: Recipe) -> None:
        from duallora.config.recipe import recipe_yaml

        record.write_text(self.recipe_file, recipe_yaml(recipe))

    def metrics(self) -> Metrics | None:
        """metrics.json, or None before the run is done; IntegrityError where it is damaged."""
        file = self.path / "metrics.json"
        found = _object(file)
        if found is not None and not isinstance(found.get("metrics"), dict):
            raise _damaged(file, "the metrics are missing")
        return cast(Metrics, found)

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        record.write_json(self.path / "metrics.json", metrics)

    def predictions(self) -> list[dict[str, Any]] | None:
        """Of each test row, in order; None where none were kept. IntegrityError where the file is damaged."""
        file = self.path / "predictions.jsonl"
        try:
            return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise _damaged(file, error) from None

    def write_predictions(self, lines: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        record.write_text(self.path / "predictions.jsonl", text)

    def copy_record(self, target: Path) -> None:
        """Copies all but checkpoints, TensorBoard's files and the lock into ``target``."""
        left = shutil.ignore_patterns(self.checkpoints.name, self.tensorboard.name, ".lock")
        shutil.copytree(self.path, target, ignore=left)

    def results(self) -> list[Path]:
        """The folders of adapter or model that are there."""
        return [self.path / name for name in RESULTS if (self.path / name).is_dir()]


class Log:
    """log.jsonl: one object for each logging step, on the disk at once. NaN is written as NaN.

    A training line has ``gate``, ``loss``, ``seconds`` and ``tokens_per_second``; a validation line ``eval_loss``; the
    last line of a run that diverged ``stopped_in_step``.
    """

    NUMBERS = ("loss", "seconds", "tokens_per_second")

    def __init__(self, path: Path):
        self.path = path

    def append(self, step: int, logs: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **logs, "time": record.now()}) + "\n")

    def lines(self, tail: int | None = None) -> list[dict[str, Any]]:
        """The whole lines, of the last ``tail`` bytes only if given; what is no line of a log is passed over."""
        return [line for line in self._read(tail) if line is not None]

    def drop_after(self, step: int) -> Path | None:
        """Forgets lines past ``step``, which are about to be taken again; where a damaged log has been set aside."""
        if not self.path.exists():
            return None
        found, aside = self._read(), None
        cut = found[-1:] == [None] and not self.path.read_bytes().endswith(b"\n")  # by a kill
        if None in (found[:-1] if cut else found):
            aside = self.path.with_suffix(".damaged.jsonl")
            self.path.replace(aside)
        kept = [line for line in found if line is not None and line["step"] <= step]
        record.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        return aside

    def losses(self) -> Iterator[tuple[int, float]]:
        """(step, training loss) of each line that has one."""
        return ((line["step"], line["loss"]) for line in self.lines() if is_number(line.get("loss")))

    def last_loss(self, steps: int) -> float | None:
        """The mean training loss of the last ``steps`` steps, or of as many more as the oldest of their lines tells of."""
        lines = [line for line in self.lines() if "gate" in line]
        before = [0, *(line["step"] for line in lines)]
        found = [(line["loss"], line["step"] - step) for line, step in zip(lines, before, strict=False)]
        while len(found) > 1 and sum(count for _, count in found[1:]) >= steps:
            del found[0]
        return sum(loss * count for loss, count in found) / sum(count for _, count in found) if found else None

    def summary(self) -> dict[str, Any]:
        """The last loss, and the time and speed of the training steps."""
        steps = [line for line in self.lines() if "gate" in line]
        if not steps:
            return {}
        seconds = sum(line.get("seconds", 0.0) for line in steps)
        tokens = sum(line.get("tokens_per_second", 0.0) * line.get("seconds", 0.0) for line in steps)
        return {
            "train_loss": steps[-1]["loss"],
            "train_seconds": round(seconds, 1),
            "train_cpu_seconds": round(sum(line.get("cpu_seconds", 0.0) for line in steps), 1),
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        }

    def _read(self, tail: int | None = None) -> list[dict[str, Any] | None]:
        """Each line, None for one that is not whole."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            if tail is not None:
                file.seek(max(0, file.seek(0, 2) - tail))
            return [self._line(text) for text in file.read().splitlines()]

    def _line(self, text: bytes) -> dict[str, Any] | None:
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                wanted = self.NUMBERS if "gate" in line and "loss" in line else ()
                return line if all(isinstance(line.get(name, 0.0), (int, float)) for name in wanted) else None
        return None


def _object(file: Path) -> dict[str, Any] | None:
    try:
        found = record.read_json(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _damaged(file, error) from None
    if not isinstance(found, dict):
        raise _damaged(file, f"it holds a {type(found).__name__}, expected an object")
    return found


def _damaged(file: Path, what: object) -> IntegrityError:
    return IntegrityError(f"{file} is damaged: {what}; restore it, or move {file.parent} away and run it again")
