"""A study: the same tasks, settings, search and seeds for every variant, and what is to be run next given what is done.

A cell is one `duallora train` in its own folder, FOLDER/cells/NAME; FOLDER/study.yaml is the study itself. Stage 1 runs
every search value at the first seeds and picks the best one on validation rows; stage 2 runs the other seeds there.
Both follow from the outcomes that lie on disk, so a study has no other memory.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from duallora.config.load import assemble, overlay, read_settings, resolve
from duallora.config.recipe import SECTIONS, Recipe
from duallora.config.yaml import Placed, read_yaml, yaml_value
from duallora.errors import ConfigError, is_number
from duallora.store.run_folder import Metrics, RunFolder
from duallora.tasks import metrics
from duallora.train import plugins

EXTENSIONS = 3  # steps by which a grid may grow towards a best value at its edge
RESERVED = ("after", "search")  # names beside the settings of a task or variant
SHORT = {"train.learning_rate": "lr"}  # in the names of cells
LABEL, LABEL_WORDS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,59}"), "letters, digits and . _ + - (60 at most)"
STUDY = "study.yaml"
CELLS = "cells"
FORMER = {"space", "trials"}  # keys of studies written before, empty in all that can still be read


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    ``settings`` are recipe values by dotted key; ``tags`` say where it belongs: task, variant, seed and the search
    values; ``after`` names the cell whose adapter it starts from, which has to be done before.
    """

    name: str
    settings: Mapping[str, Any]
    tags: Mapping[str, Any]
    after: str | None = None

    def recipe(self, folder: Path | str | None = None) -> Recipe:
        """Its recipe, checked; ``folder`` is the study's, without which ``after`` cannot be resolved and is left out."""
        settings = dict(self.settings)
        if self.after and folder is not None:
            settings["adapter.init_from"] = str(Path(folder) / CELLS / self.after)
        recipe = assemble([{key: (value, self.name) for key, value in settings.items()}])
        return recipe.model_copy(update={"plugins": plugins.resolved(recipe.plugins)})  # as its run records them


@dataclass(frozen=True)
class Outcome:
    """What a cell's folder says of it: ``status`` is running, done, failed or interrupted, as run.json has it.

    ``kind`` is how it ended, as run.json has it: done, diverged, out of memory, lost, stopped or failed.
    ``metrics`` are those on validation rows, ``test`` on test rows; ``seconds`` and ``cpu_seconds`` the training's.
    ``recipe`` is the resolved recipe it ran under, by section; ``same_rows`` whether its validation rows are its test rows;
    ``at_chance`` whether the run found that it learned nothing.
    """

    name: str
    status: str
    kind: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    test: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_memory: int | None = None  # bytes
    answers: Sequence[Mapping[str, str]] = ()  # to the first validation rows, before and after
    error: str | None = None
    main_metric: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    same_rows: bool = False
    at_chance: bool = False

    @property
    def diverged(self) -> bool:
        """Whether the loss, a gradient or a weight became NaN or infinite: a result of its settings, not a fault."""
        return self.kind == "diverged"

    @property
    def settled(self) -> bool:
        """Whether running the cell again could not change it."""
        return self.status == "done" or self.diverged


Outcomes = Mapping[str, Outcome]
Refuse = Callable[[str, str], None]  # path in the study, what is wrong there


class Point(NamedTuple):
    """One place of the search: ``values`` by dotted key, ``label`` as it stands in the names of cells."""

    label: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """Tasks x variants, each tuned over ``search`` alike and repeated over ``seeds``.

    Args:
        name: of the study.
        base: settings of every cell by dotted recipe key (short unique endings such as ``r`` serve too).
        tasks: label -> settings. ``after: LABEL`` beside them starts each cell from the adapter of the same variant and
            seed on that task, at its best search value. ``search`` there, or in a variant, replaces the study's.
        variants: label -> settings, over the task's.
        search: key -> values; several keys make a product. Empty: nothing is tuned.
        seeds: of all cells in the end; the first ``search_seeds`` of them run at every search value.
        extend: whether a grid of numbers grows, by its own factor, while its best value lies at its edge (at most
            three times).
        metric: validation metric that decides; None is each task's main one.
        reference: variant that the others are compared with.

    Raises:
        ConfigError: a key, value or label is wrong (with its place), or two cells would have one name.
    """

    name: str
    base: Mapping[str, Any] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"data": {}})
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"duallora": {}})
    search: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    search_seeds: int = 1
    extend: bool = True
    metric: str | None = None
    reference: str | None = None
    places: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Where a setting stands in a file, by its path in the study, such as "variants.lora.adapter.r"."""

    def __post_init__(self) -> None:
        problems: list[str] = []

        def refuse(path: str, message: str) -> None:
            problems.append(f"{self._where(path)}: {message}")

        for step in (self._check_form, self._resolve_keys, self._check_names):
            step(refuse)
            if problems:
                raise ConfigError(*dict.fromkeys(problems))
        for task, variant in itertools.product(self.tasks, self.variants):
            for point in self.points({}, task, variant):
                problems += self._refused(task, variant, point)
        if problems:
            raise ConfigError(*dict.fromkeys(problems))

    # -- what is to be run ---------------------------------------------------------------------------------------------

    def wanted(self, outcomes: Outcomes) -> list[Cell]:
        """Every cell that the study asks for as far as ``outcomes`` tell, the finished ones too, task by task."""
        cells: dict[str, Cell] = {}
        for task in self.tasks:
            stages: tuple[list[Cell], list[Cell]] = [], []
            for variant in self.variants:
                for point in self.points(outcomes, task, variant):
                    stages[0].extend(self.cells_at(outcomes, task, variant, point, self.seeds[: self.search_seeds]))
                if best := self.best(outcomes, task, variant):
                    stages[1].extend(self.cells_at(outcomes, task, variant, best))
            cells |= {cell.name: cell for stage in stages for cell in stage if cell.name not in cells}
        return list(cells.values())

    def expected(self, outcomes: Outcomes) -> int:
        """How many cells it will come to if no grid grows further and nothing fails."""
        later = len(self.seeds) - self.search_seeds
        pairs = itertools.product(self.tasks, self.variants)
        return sum(self.search_seeds * len(self.points(outcomes, *pair)) + later for pair in pairs)

    def points(self, outcomes: Outcomes, task: str, variant: str) -> list[Point]:
        """The points of the search tried for one task and variant, or to be tried, as far as ``outcomes`` tell."""
        return self._grid(outcomes, task, variant)[0]

    def best(self, outcomes: Outcomes, task: str, variant: str) -> Point | None:
        """The point with the best mean metric on validation rows, or None while that is open or if none came through.

        A diverged cell counts as the worst; ties go to the middle of the grid, then to the smaller value.
        """
        return self._grid(outcomes, task, variant)[1]

    def score(self, outcomes: Outcomes, task: str, variant: str, point: Point) -> float | None:
        """The mean metric of a point on validation rows, greater is better; None while its first seeds are not settled.

        Raises:
            ConfigError: a finished cell lacks the metric that decides, or nobody has made that metric known.
        """
        scores = []
        for seed in self.seeds[: self.search_seeds]:
            outcome = outcomes.get(self.cell_name(task, variant, point, seed))
            if outcome is None or not outcome.settled:
                return None
            scores.append(-math.inf if outcome.diverged else self._value(outcome))
        return sum(scores) / len(scores)

    def cells_at(
        self, outcomes: Outcomes, task: str, variant: str, point: Point, seeds: Sequence[int] | None = None
    ) -> list[Cell]:
        """The cells of ``seeds`` (None: all) at one point that can be run: what they come after must be done."""
        cells = []
        for seed in self.seeds if seeds is None else seeds:
            after: str | None = None
            if (before := self.tasks[task].get("after")) is not None:
                best = self.best(outcomes, before, variant)
                after = best and self.cell_name(before, variant, best, seed)
                if after is None or after not in outcomes or outcomes[after].status != "done":
                    continue
            settings = {key: value for key, (value, _) in self._placed(task, variant, point, seed).items()}
            tags = {"task": task, "variant": variant, "seed": seed, **point.values}
            cells.append(Cell(self.cell_name(task, variant, point, seed), settings, tags, after))
        return cells

    def cell_name(self, task: str, variant: str, point: Point, seed: int) -> str:
        """``cola-lora-lr0.001-seed0``: no two cells of a study have one name, whatever the case of letters."""
        return "-".join(filter(None, (task, variant, point.label, f"seed{seed}")))

    # -- the search ----------------------------------------------------------------------------------------------------

    def search_for(self, task: str, variant: str) -> Mapping[str, Sequence[Any]]:
        """The search of one task and variant: the variant's own, else the task's, else the study's."""
        layers = (self.variants[variant], self.tasks[task])
        return next((own["search"] for own in layers if "search" in own), self.search)

    def _grid(self, outcomes: Outcomes, task: str, variant: str) -> tuple[list[Point], Point | None]:
        """(points of the grid as far as it has grown, the best one of it or None while that is open)."""
        search = self.search_for(task, variant)
        grid = {key: sorted(values) if _grows(values) else list(values) for key, values in search.items()}
        steps = {key: _step(values) for key, values in grid.items() if _grows(values)} if self.extend else {}
        for extension in range(EXTENSIONS + 1):
            points = _product(grid)
            if len(points) == 1:
                return points, points[0]
            scores = [self.score(outcomes, task, variant, point) for point in points]
            if None in scores:
                return points, None
            best = _best(points, scores, grid)
            # Where every cell diverged or is at chance the smallest values are the ones to go on from.
            at = points[0] if best is None or self._at_chance(outcomes, task, variant, points) else best
            more = {
                key: value
                for key, step in steps.items()
                if (value := _beyond(grid[key], at.values[key], step)) is not None
                and not self._refused(task, variant, Point(at.label, {**at.values, key: value}))
            }
            if not more or extension == EXTENSIONS:
                return points, best
            grid = {key: sorted([*values, more[key]]) if key in more else values for key, values in grid.items()}
        raise AssertionError("unreachable")

    def _at_chance(self, outcomes: Outcomes, task: str, variant: str, points: Sequence[Point]) -> bool:
        """Whether no cell of the search has learned anything, as its run found."""
        names = [self.cell_name(task, variant, at, seed) for at in points for seed in self.seeds[: self.search_seeds]]
        return all(outcomes[name].diverged or outcomes[name].at_chance for name in names)

    def _refused(self, task: str, variant: str, point: Point) -> tuple[str, ...]:
        """What the recipe's schema has against a point: a dropout does not grow to 1."""
        try:
            assemble([self._placed(task, variant, point, self.seeds[0])])
        except ConfigError as error:
            return error.problems
        return ()

    def _value(self, outcome: Outcome) -> float:
        metric = self.metric or outcome.main_metric
        if metric is None or metric not in outcome.metrics:
            have = ", ".join(name for name, value in outcome.metrics.items() if is_number(value)) or "none"
            raise ConfigError(
                f"{outcome.name}: no validation metric {metric or ''} to choose by; it has {have}. Set the study's metric to "
                "one of them, or eval.metrics to true"
            )
        value = outcome.metrics[metric]
        if not is_number(value):  # a correlation with a constant has no value
            return -math.inf
        return value if metrics.get(metric, outcome.recipe.get("data", {}).get("task")).higher_is_better else -value

    def _placed(self, task: str, variant: str, point: Point, seed: int) -> dict[str, Placed]:
        """The settings of a cell, each with its place."""
        own = {f"tasks.{task}": self.tasks[task], f"variants.{variant}": self.variants[variant]}
        search = [f"{path}.search" for path, values in own.items() if "search" in values] or ["search"]
        layers = {"base": self.base, **own, search[-1]: point.values}
        placed = [
            {key: (value, self._where(f"{path}.{key}")) for key, value in layer.items() if key not in RESERVED}
            for path, layer in layers.items()
        ]
        return overlay([*placed, {"seed": (seed, self._where("seeds"))}])

    def _where(self, path: str) -> str:
        """The place of a setting: file and line, or its path in a study that was made in Python."""
        return self.places.get(path) or f"study {self.name}, {path}"

    # -- checks --------------------------------------------------------------------------------------------------------

    def _check_form(self, refuse: Refuse) -> None:
        for group in ("base", "tasks", "variants", "search"):
            if not isinstance(getattr(self, group), Mapping):
                return refuse(group, f"{group}: expected a mapping")
        for group in ("tasks", "variants"):
            if not getattr(self, group):
                refuse(group, f"{group}: expected at least one")
            for label, values in getattr(self, group).items():
                if not LABEL.fullmatch(str(label)):
                    refuse(f"{group}.{label}", f"label {label!r}: expected {LABEL_WORDS}")
                if not isinstance(values, Mapping):
                    refuse(f"{group}.{label}", f"{group}.{label}: expected a mapping of settings")
        seeds = list(self.seeds) if isinstance(self.seeds, Sequence) and not isinstance(self.seeds, str) else []
        whole = all(type(seed) is int and seed >= 0 for seed in seeds)
        most = max(1, len(seeds))
        for key, accepted, expected in (
            ("name", isinstance(self.name, str) and LABEL.fullmatch(self.name), LABEL_WORDS),
            ("seeds", seeds and whole and len(set(seeds)) == len(seeds), "a list of different whole numbers >= 0"),
            ("search_seeds", type(self.search_seeds) is int and 1 <= self.search_seeds <= most, f"1 to {most}"),
            ("extend", type(self.extend) is bool, "true or false"),
            ("metric", self.metric is None or isinstance(self.metric, str), "the name of a metric"),
            ("reference", self.reference in (None, *self.variants), f"a variant: {', '.join(map(str, self.variants))}"),
        ):
            if not accepted:
                refuse(key, f"{key}: {getattr(self, key)!r} is not accepted; expected {expected}")

    def _resolve_keys(self, refuse: Refuse) -> None:
        """Every setting under its full dotted key."""
        resolved: dict[str, Any] = {
            "base": self._settings("base", self.base, refuse),
            "search": self._search_of("search", self.search, refuse),
            "seeds": tuple(self.seeds),
        }
        for group in ("tasks", "variants"):
            labels = getattr(self, group).items()
            resolved[group] = {label: self._settings(f"{group}.{label}", own, refuse) for label, own in labels}
        for name, values in resolved.items():
            object.__setattr__(self, name, values)

    def _settings(self, path: str, values: Mapping[str, Any], refuse: Refuse) -> dict[str, Any]:
        """The settings by dotted key; sections written as mappings are opened."""
        flat: dict[str, Any] = {}
        for key, value in values.items():
            opened = key in SECTIONS and isinstance(value, Mapping)
            flat |= {f"{key}.{leaf}": held for leaf, held in value.items()} if opened else {key: value}
        kept: dict[str, Any] = {}
        for key in [key for key in RESERVED if key in flat and path != "base"]:
            kept[key] = value = flat.pop(key)
            if key == "search":
                kept[key] = self._search_of(f"{path}.search", value or {}, refuse)
            elif not path.startswith("tasks.") or value not in self.tasks or "after" in self.tasks[value]:
                free = ", ".join(task for task, own in self.tasks.items() if "after" not in own)
                words = f"it belongs to a task and names one that is after no other: {free}"
                refuse(f"{path}.after", f"after: {value!r} is not accepted; {words}")
        return {**kept, **self._resolved(path, flat, refuse)}

    def _resolved(self, path: str, values: Mapping[str, Any], refuse: Refuse) -> dict[str, Any]:
        """``values`` under their full dotted keys."""
        found: dict[str, Any] = {}
        for key, value in values.items():
            full, entry = resolve(str(key))
            name = f"{full}.{entry}" if full and entry else full
            if name is None:
                refuse(f"{path}.{key}", entry)
            elif name in ("seed", "output"):
                refuse(f"{path}.{key}", f"{name} is the grid's own to set" + "; see seeds" * (name == "seed"))
            elif name in found:
                refuse(f"{path}.{key}", f"{name} is set twice; keep one")
            else:
                found[name] = value
                if f"{path}.{key}" in self.places:
                    self.places[f"{path}.{name}"] = self.places[f"{path}.{key}"]
        return found

    def _search_of(self, path: str, search: Any, refuse: Refuse) -> dict[str, tuple[Any, ...]]:
        if not isinstance(search, Mapping):
            refuse(path, f"{path}: expected a mapping of keys to lists of values")
            return {}
        found = {}
        for key, values in self._resolved(path, search, refuse).items():
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                refuse(f"{path}.{key}", f"{key}: {values!r} is not accepted; expected a list of values")
                continue
            if len({_text(value) for value in values}) < len(values):
                refuse(f"{path}.{key}", f"{key}: two of the values {list(values)} read alike")
            found[key] = tuple(values)
        return found

    def _check_names(self, refuse: Refuse) -> None:
        """Cells are told apart by name: what follows task and variant is as many parts, without a hyphen, as keys."""
        seen: dict[str, tuple[tuple[str, str], list[str]]] = {}
        for pair in itertools.product(self.tasks, self.variants):
            names = list(_names(self.search_for(*pair)).values())
            prefix, parts = "-".join(pair).casefold(), [name.casefold() for name in names]
            for other, (pair_of_other, parts_of_other) in seen.items():
                (short, short_parts), (long, long_parts) = sorted([(prefix, parts), (other, parts_of_other)])
                more = long[len(short) + 1 :].split("-") if long.startswith(f"{short}-") else []
                like_values = [name for name, part in zip(short_parts, more, strict=False) if part.startswith(name)]
                if short == long or (more and len(like_values) == len(more) == len(short_parts) - len(long_parts)):
                    one, two = (f"task {task} with variant {variant}" for task, variant in (pair, pair_of_other))
                    refuse("variants", f"{one} and {two} could have a cell of one name; rename one")
            seen[prefix] = pair, parts

    # -- on disk -------------------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, path: Path | str) -> Study:
        """The study of a grid.yaml (or of a folder's study.yaml).

        Raises:
            ConfigError: with every problem found, each naming file, line, key, value and what is allowed.
        """
        path = Path(path)
        if path.is_dir() and not (path / STUDY).exists():
            raise ConfigError(f"{path} holds no {STUDY}: expected the folder of a grid, or a grid.yaml (docs/grid.md)")
        if not path.exists():
            raise ConfigError(f"{path}: no such file; expected a grid.yaml (docs/grid.md), or the folder of a grid")
        path = path / STUDY if path.is_dir() else path
        content = read_yaml(path, depth=3)
        for key in FORMER & content.keys():
            if content.pop(key)[0]:
                raise ConfigError(
                    f"{path}: {key}: spaces to draw trials from (Optuna's) are gone; write a search instead"
                )
        known = [item.name for item in fields(cls) if item.name != "places"]
        if problems := [
            f"{where}: unknown key {key}; known here: {', '.join(known)}"
            for key, (_, where) in content.items()
            if key not in known
        ]:
            raise ConfigError(*problems)
        places: dict[str, str] = {}
        values = {key: _unplaced(value, where, key, places) for key, (value, where) in content.items()}
        if isinstance(values.get("base"), str):
            read = read_settings(path.parent / values["base"])
            values["base"] = {key: value for key, (value, _) in read.items() if key not in ("seed", "output")}
            places |= {f"base.{key}": where for key, (_, where) in read.items()}
        for group in {"base", "tasks", "variants", "search"} & values.keys():
            values[group] = {} if values[group] is None else values[group]
        for group in ("tasks", "variants"):
            if isinstance(values.get(group), dict):
                values[group] = {label: {} if own is None else own for label, own in values[group].items()}
        values.setdefault("name", re.sub(r"[^A-Za-z0-9._+-]", "-", path.stem).lstrip("-._+") or "grid")
        return cls(**values, places=places)

    def yaml(self) -> str:
        """The study as YAML that `read` reads back."""
        lines = []
        for name in (item.name for item in fields(self) if item.name != "places"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                lines.append(f"{name}: {yaml_value(value)}")
                continue
            lines.append(f"{name}:" + " {}" * (not value))
            for key, held in value.items():
                lines.append(f"  {_key(key)}: {yaml_value(dict(held) if isinstance(held, Mapping) else held)}")
        return "\n".join(lines) + "\n"


# -- outcomes ---------------------------------------------------------------------------------------------------------


def cell_folder(folder: Path | str, name: str) -> RunFolder:
    """The run folder of a cell."""
    return RunFolder(Path(folder) / CELLS / name)


def outcomes(folder: Path | str) -> dict[str, Outcome]:
    """The outcomes of every cell that has begun below a study's folder, by name."""
    found = (outcome(folder, path.name) for path in sorted(Path(folder).glob(f"{CELLS}/*")) if path.is_dir())
    return {item.name: item for item in found if item is not None}


def outcome(folder: Path | str, name: str) -> Outcome | None:
    """The outcome of one cell; None before it has begun."""
    cell = cell_folder(folder, name)
    run = cell.facts()
    if run is None:
        return None
    result = (cell.metrics() if run["status"] == "done" else None) or Metrics()
    values, data = dict(result.get("metrics", {})), result.get("data", {})
    return Outcome(
        name,
        run["status"],
        kind=run.get("kind", ""),
        test=values.pop("test", None) or {},
        metrics=values,
        parameters=run.get("parameters") or {},
        seconds=_sum(values, "start_seconds", "train_seconds"),
        cpu_seconds=_sum(values, "start_cpu_seconds", "train_cpu_seconds"),
        peak_memory=values.get("train_peak_memory"),
        answers=result.get("answers", ()),
        error=run.get("error"),
        main_metric=result.get("main_metric"),
        recipe=cell.recipe(),
        same_rows="test" in data and data["test"] == data.get("validation"),
        at_chance=bool(result.get("at_chance")),
    )


def _sum(values: Mapping[str, Any], *names: str) -> float | None:
    """What a start from data took is part of what the method costs."""
    return sum(found) if (found := [values[name] for name in names if is_number(values.get(name))]) else None


# -- numbers and names ------------------------------------------------------------------------------------------------


def _grows(values: Sequence[Any]) -> bool:
    return len(values) > 1 and all(is_number(value) and value > 0 for value in values)


def _step(values: Sequence[float]) -> float:
    """The factor between neighbors of a sorted grid, on the average."""
    return (values[-1] / values[0]) ** (1 / (len(values) - 1))


def _beyond(values: Sequence[float], at: float, step: float) -> float | None:
    """The value one step outside of a sorted grid if ``at`` is its edge, or None.

    It has as few digits as the grid's own values, unless that would move it by more than a tenth.
    """
    if at not in (values[0], values[-1]):
        return None
    exact = at * step if at == values[-1] else at / step
    if all(isinstance(value, int) for value in values):
        beyond: float = round(exact)
        if values[0] <= beyond <= values[-1]:  # below 1 there is none
            return None
    else:
        digits = max(len(Decimal(repr(value)).normalize().as_tuple().digits) for value in values)
        rounded = (float(f"{exact:.{count - 1}e}") for count in range(digits, 18))
        outside = (value for value in rounded if not values[0] <= value <= values[-1])
        beyond = next(value for value in outside if abs(value / exact - 1) <= 0.1)
    return beyond if beyond > 0 else None


def _best(points: Sequence[Point], scores: Sequence[float | None], grid: Mapping[str, Sequence[Any]]) -> Point | None:
    """The point of the greatest score; of equal ones the nearest to the middle of the grid, then the first."""
    ranked = []
    for number, (point, score) in enumerate(zip(points, scores, strict=True)):
        off_center = sum(abs(own.index(point.values[key]) - (len(own) - 1) / 2) for key, own in grid.items())
        if score is not None and score > -math.inf:
            ranked.append((score, -off_center, -number, point))
    return max(ranked)[3] if ranked else None


def _product(grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    names, points = _names(grid), []
    for values in itertools.product(*grid.values()):
        own = dict(zip(grid, values, strict=True))
        points.append(Point("-".join(f"{names[key]}{_text(value)}" for key, value in own.items()), own))
    return points


def _names(keys: Collection[str]) -> dict[str, str]:
    """What each key of a search is called in the names of cells."""
    leaves = {key: key.rpartition(".")[2] for key in keys}
    alone = {leaf for leaf, count in Counter(leaves.values()).items() if count == 1}
    return {key: _plain(SHORT.get(key, leaf) if leaf in alone else key) for key, leaf in leaves.items()}


def _text(value: Any) -> str:
    """A value as it stands in a name: numbers without exponent, text and lists without anything but letters and digits."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, (int, float)):
        return format(Decimal(repr(value)), "f").replace("-", "m")
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return _plain(text)


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+]+", "_", text).strip("_")[:40]


def _key(label: str) -> str:
    """A label or dotted key as a YAML key; quoted where YAML would read it as another kind."""
    return yaml_value(str(label)) if re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", str(label)) else json.dumps(str(label))


def _unplaced(value: Any, where: str, path: str, places: dict[str, str]) -> Any:
    """The plain value of what `read_yaml` read; ``places`` takes the line of every path in it."""
    places[path] = where
    if not isinstance(value, dict):
        return value
    plain = {}
    for key, item in value.items():
        # Below the depth that is read with places stand plain values.
        inner, line = item if isinstance(item, tuple) else (item, where)
        plain[key] = _unplaced(inner, line, f"{path}.{key}", places)
    return plain
