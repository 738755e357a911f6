"""A grid's folder as one JSON: what was run, the metrics at each best search value, and how sure the comparisons are.

Which search value is best is `duallora.grid.study`'s to say; the metrics are those on test rows, which it never reads.
Predictions, labels and texts enter the intervals and stay in the folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics as plain
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duallora.errors import ConfigError, DataError, IntegrityError, is_number
from duallora.grid import statistics
from duallora.grid.statistics import ROUNDS, Estimate, Pool, Sample
from duallora.grid.study import CELLS, RESERVED, STUDY, Cell, Outcome, Outcomes, Study, cell_folder, outcomes
from duallora.store import record
from duallora.tasks import Example, metrics
from duallora.tasks.metrics import Metric

KIND = "study"
AVERAGE = "average"
CURVE_POINTS = 40
CLOSE: dict[str, float] = {"rel_tol": 1e-6, "abs_tol": 1e-6}  # a recorded value and that of the recorded predictions
PROVENANCE = ("commit", "dirty", "versions", "device", "threads", "platform")


def summarize(
    folder: Path | str, *, scale: str | None = None, rounds: int = ROUNDS, main: bool = False
) -> dict[str, Any]:
    """What `duallora report` shows of a grid's folder, whether it is finished or not.

    ``rounds`` is the number of resamples behind the intervals, at most `statistics.slow_rounds` of metrics that need a
    call for each. ``main`` compares each task's main metric, also where another one decides on values.

    Raises:
        ConfigError: the folder holds no study.
        IntegrityError: two cells of a task were scored on different test rows.
    """
    folder = Path(folder)
    if not (folder / STUDY).is_file():
        raise ConfigError(f"{folder} holds no {STUDY}: expected the folder of `duallora grid` or `duallora reproduce`")
    study, found = Study.read(folder), outcomes(folder)
    wanted = study.wanted(found)
    tasks = {
        task: _Task(folder, study, found, task, rounds=rounds, seed=number, main=main)
        for number, task in enumerate(study.tasks)
    }
    every = list(tasks.values())
    rows = [task.row(variant) for task in every for variant in task.runs]
    _add_ratios(rows, _by_method(study, every, "lora"))
    reference = study.reference or _by_method(study, every, "duallora") if len(study.variants) > 1 else None
    # The average is over tasks whose metrics have one direction, of the variants with a value on every task.
    alike = len({metrics.find(task.facts["metric"]).higher_is_better for task in every}) == 1 < len(tasks)
    averaged = alike and AVERAGE not in tasks
    whole = [one for one in study.variants if averaged and all(one in task.samples for task in every)]
    over = {name: [task] for name, task in tasks.items()} | ({AVERAGE: every} if reference in whole else {})
    pairs = [pair for name, those in over.items() if reference for pair in _pairs(name, those, reference)]
    rows += [_average(variant, every, rows) for variant in whole]
    summary = {
        "kind": KIND,
        "name": study.name,
        "scale": scale,
        **_provenance(folder, [cell.name for cell in wanted if cell.name in found]),
        "study": _as_json(study),
        "reference": reference,
        "tasks": {name: task.facts for name, task in tasks.items()},
        "rounds": rounds,
        "wanted": len(wanted),
        "done": sum(cell.name in found and found[cell.name].status == "done" for cell in wanted),
        "cells": [_cell(cell, found.get(cell.name)) for cell in wanted],
        "rows": rows,
        "pairs": pairs,
        "curves": [curve for task in every for variant in task.runs if (curve := task.curve(variant))],
        "unequal": _unequal(study, tasks),
        "edges": [edge for task in every for edge in _edges(study, found, task)],
        "open": [[name, variant] for name, task in tasks.items() for variant, one in task.best.items() if one is None],
    }
    summary["statement"] = statement(summary)
    return _rounded(summary)


def load(path: Path | str) -> list[dict[str, Any]]:
    """The summaries of a study's JSON, of a grid's folder as it stands, or of a folder that holds either.

    Raises:
        ConfigError: there is none, or a file is of another kind.
        DataError: a file is no JSON.
    """
    path = Path(path)
    if path.is_dir():
        if (path / STUDY).is_file():
            return [summarize(path)]
        inner = [*sorted(path.glob("*.json")), *(one.parent for one in sorted(path.glob(f"*/{STUDY}")))]
        if not inner:
            raise ConfigError(f"{path} holds no study: expected {STUDY} of a grid, or studies' JSON files")
        return [summary for one in inner for summary in load(one)]
    try:
        content = record.read_json(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: expected a study's JSON, or the folder of a grid") from None
    except ValueError as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from None
    kind = content.get("kind") if isinstance(content, dict) else type(content).__name__
    if kind != KIND:
        raise ConfigError(f"{path} is of kind {kind!r}: expected a study's JSON, such as results/studies/*.json")
    return [content]


def save(summary: Mapping[str, Any], path: Path | str) -> None:
    """Writes a summary with one line for each cell, row, pair and curve, so that two versions can be compared."""
    lines = []
    for key, value in summary.items():
        if isinstance(value, list) and value:
            inner = ",\n  ".join(json.dumps(item, ensure_ascii=False) for item in value)
            lines.append(f" {json.dumps(key)}: [\n  {inner}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    record.write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


# -- what ran ---------------------------------------------------------------------------------------------------------


def _cell(cell: Cell, outcome: Outcome | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": cell.name, "tags": dict(cell.tags)}
    if outcome is None:
        return facts | {"status": "missing"}
    return facts | {
        "status": "diverged" if outcome.diverged else outcome.status,
        "metrics": _numbers(outcome.metrics),
        "test": _numbers(outcome.test),
        "parameters": dict(outcome.parameters),
        "seconds": outcome.seconds,
        "cpu_seconds": outcome.cpu_seconds,
        # Its class alone: a message may name folders or quote rows.
        **({"error": outcome.error.partition(":")[0]} if outcome.error else {}),
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if is_number(value)}


def _as_json(study: Study) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name in (item.name for item in dataclasses.fields(study) if item.name not in ("name", "places")):
        shown[name] = getattr(study, name)
        if name == "search":  # which every committed result has: of a search that is gone
            shown |= {"space": {}, "trials": 0}
    return json.loads(json.dumps(shown, default=dict))


def _provenance(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Every version of code, packages and machine among the cells, each with the number of its cells."""
    seen: dict[str, Counter[str]] = {key: Counter() for key in (*PROVENANCE, "base")}
    for name in names:
        run = cell_folder(folder, name).facts() or {}
        facts = {**run, "base": run.get("fingerprints", {}).get("base")}
        for key, counts in seen.items():
            counts[json.dumps(facts.get(key), sort_keys=True)] += 1
    return {
        key: [{"value": json.loads(value), "cells": count} for value, count in counts.most_common()]
        for key, counts in seen.items()
    }


# -- one task ---------------------------------------------------------------------------------------------------------


class _Task:
    """Of one task: each variant's best point, its finished cells there by seed, and their resampled metric.

    ``pool`` and ``pool_between`` are the spreads over seeds that the variants share; those ``apart`` have their own.
    """

    def __init__(self, folder: Path, study: Study, found: Outcomes, name: str, *, rounds: int, seed: int, main: bool):
        self.folder, self.study, self.name, self.main = folder, study, name, main
        self.best = {variant: study.best(found, name, variant) for variant in study.variants}
        self.runs: dict[str, dict[int, Outcome]] = {}
        for variant, point in self.best.items():
            cells = {own: found.get(study.cell_name(name, variant, point, own)) for own in study.seeds if point}
            if done := {own: cell for own, cell in cells.items() if cell is not None and cell.status == "done"}:
                self.runs[variant] = done
        self.samples: dict[str, Sample] = {}
        if self.runs:
            self.facts = self._take_samples(rounds, seed)
        else:  # nothing is chosen yet, but the curves of what has run can be shown
            ran = [found[cell.name] for cell in study.wanted(found) if cell.tags["task"] == name and cell.name in found]
            own = next((outcome.main_metric for outcome in ran if outcome.main_metric), None)
            self.facts = {"metric": study.metric, "chosen_by": study.metric or own}
        whole = {one: own.values for one, own in self.samples.items() if len(own.values) == len(study.seeds)}
        apart = [list(whole)[index] for index in statistics.outlying(np.stack([*whole.values()]))] if whole else []
        alike = np.array([values for one, values in whole.items() if one not in apart])
        self.pool, self.pool_between = (
            statistics.pool(alike, differences=differences) if whole else None for differences in (False, True)
        )
        self.facts["apart"] = apart

    def _take_samples(self, rounds: int, seed: int) -> dict[str, Any]:
        """Fills ``samples``, and returns what is known of the task."""
        flat = [(variant, outcome) for variant, own in self.runs.items() for outcome in own.values()]
        first = flat[0][1]
        split = "test" if all(outcome.test for _, outcome in flat) else "validation"
        metric = _metric(first, self._reported(first, split))
        facts: dict[str, Any] = {
            "metric": metric.name,
            "chosen_by": self.study.metric or first.main_metric,
            "split": split,
        }
        if split == "validation":
            return {**facts, "note": "no test rows were scored (eval.test)"}
        read = [self._predictions(outcome, metric) for _, outcome in flat]
        examples = read[0][1]
        for (_, outcome), (_, own) in zip(flat, read, strict=True):
            if own != examples:
                raise IntegrityError(
                    f"{first.name} and {outcome.name} were scored on different test rows: nothing can be compared; remove "
                    "the cells of one of them and run the grid again"
                )
        facts |= {"examples": len(examples), "test_is_validation": first.same_rows}
        rounds = rounds if metric.compute is None else min(rounds, statistics.slow_rounds(len(self.study.variants) - 1))
        sample = None
        if metric.statistics or metric.compute:
            sample = statistics.resample(metric, [own for own, _ in read], examples, rounds=rounds, seed=seed)
        for index, (_, outcome) in enumerate(flat):
            value: Any = outcome.test.get(metric.name)
            if sample is None or not is_number(value) or not math.isclose(sample.values[index], value, **CLOSE):
                note = f"nothing here computes {metric.name} as {outcome.name} recorded it from its predictions"
                return {**facts, "note": f"no intervals: {note}"}
        assert sample is not None
        for variant in self.runs:
            columns = [index for index, (own, _) in enumerate(flat) if own == variant]
            self.samples[variant] = sample.of(columns)
        return {**facts, "rounds": rounds}

    def _reported(self, outcome: Outcome, split: str) -> str | None:
        """What the tables show: the study's metric where rows tell it, else (or if so asked) the task's main one."""
        values, name = outcome.test if split == "test" else outcome.metrics, self.study.metric
        if self.main and outcome.main_metric in values:
            return outcome.main_metric
        if _metric(outcome, name).likelihood:
            there = split == "test" and "tokens" in self._lines(outcome)[0]
        else:
            there = name in values
        return name if there or outcome.main_metric not in values else outcome.main_metric

    def _predictions(self, outcome: Outcome, metric: Metric) -> tuple[list[Any], list[Example]]:
        """(what the metric takes for predictions, the rows) of a cell."""
        lines = self._lines(outcome)
        try:
            examples = [
                Example(
                    label=None if "references" in line else line["label"],
                    references=tuple(line.get("references", ())),
                    group=line.get("group", ""),
                )
                for line in lines
            ]
            if metric.likelihood:
                return [(line["log_likelihood"], line["tokens"]) for line in lines], examples
            return [line["prediction"] for line in lines], examples
        except (KeyError, TypeError) as error:
            raise self._damaged(outcome, f"damaged ({error!r})") from None

    def _lines(self, outcome: Outcome) -> list[dict[str, Any]]:
        if (found := cell_folder(self.folder, outcome.name).predictions()) is None:
            raise self._damaged(outcome, "gone")
        return found

    def _damaged(self, outcome: Outcome, what: str) -> IntegrityError:
        cell = self.folder / CELLS / outcome.name
        return IntegrityError(f"the predictions of {cell} are {what}: remove it and run the grid again")

    def spread(self, *variants: str) -> Pool | None:
        """The pooled spread over seeds of a variant, or of the difference of two."""
        pooled = self.pool if len(variants) == 1 else self.pool_between
        return None if {*variants} & {*self.facts["apart"]} else pooled

    def difference(self, one: str, other: str) -> tuple[list[int], Sample] | None:
        """The seeds that both variants have, and the difference on them; None without any."""
        if not {one, other} <= self.samples.keys():
            return None
        seeds = {variant: list(self.runs[variant]) for variant in (one, other)}
        if not (common := [seed for seed in seeds[one] if seed in seeds[other]]):
            return None
        mine, its = (self.samples[variant].of([own.index(seed) for seed in common]) for variant, own in seeds.items())
        return common, statistics.difference(mine, its)

    def row(self, variant: str) -> dict[str, Any]:
        point, runs, metric = self.best[variant], self.runs[variant], self.facts["metric"]
        assert point is not None
        test = self.facts["split"] == "test"
        every = [_numbers(outcome.test if test else outcome.metrics) for outcome in runs.values()]
        values = [own[metric] for own in every if metric in own]
        first = next(iter(runs.values()))
        row = {
            "task": self.name,
            "variant": variant,
            "metric": metric,
            "values": dict(point.values),
            "seeds": list(runs),
            "by_seed": values,
            **_mean_and_sd(values),
            "validation": _mean(outcome.metrics.get(str(self.facts["chosen_by"])) for outcome in runs.values()),
            "every": {name: _mean_and_sd([one[name] for one in every if name in one]) for name in every[0]},
            "parameters": dict(first.parameters),
            "steps": (cell_folder(self.folder, first.name).facts() or {}).get("steps"),
            "seconds": _mean(outcome.seconds for outcome in runs.values()),
            "cpu_seconds": _mean(outcome.cpu_seconds for outcome in runs.values()),
            **({"answers": [dict(one) for one in first.answers]} if first.answers else {}),
        }
        if (peak := _mean(outcome.peak_memory for outcome in runs.values())) is not None:
            row["peak_memory"] = peak / 1e9
        if variant in self.samples:
            row |= _estimated(statistics.estimate(self.samples[variant], self.spread(variant)))
        return row

    def curve(self, variant: str) -> dict[str, Any] | None:
        """Training loss by step, the mean over seeds of the steps that all of them logged, in at most 40 bins."""
        runs = self.runs[variant]
        logs = [dict(cell_folder(self.folder, outcome.name).log.losses()) for outcome in runs.values()]
        steps = sorted(set.intersection(*map(set, logs)))
        if len(steps) < 2:
            return None
        width = math.ceil(len(steps) / CURVE_POINTS)
        bins = [steps[start : start + width] for start in range(0, len(steps), width)]
        return {
            "task": self.name,
            "variant": variant,
            "seeds": list(runs),
            "steps": [own[-1] for own in bins],
            "loss": [plain.fmean(log[step] for log in logs for step in own) for own in bins],
        }


def _metric(outcome: Outcome, name: str | None) -> Metric:
    """What the run recorded as ``name``."""
    return metrics.find(name, outcome.recipe.get("data", {}).get("task"))


def _mean_and_sd(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": _mean(values), "sd": plain.stdev(values) if len(values) > 1 else None}


def _mean(values: Iterable[Any]) -> float | None:
    known = [value for value in values if is_number(value)]
    return plain.fmean(known) if known else None


def _estimated(estimate: Estimate) -> dict[str, Any]:
    return {name: value for name, value in estimate._asdict().items() if name != "p"}


# -- between variants and over tasks ----------------------------------------------------------------------------------


def _by_method(study: Study, tasks: Sequence[_Task], method: str) -> str | None:
    """The variant called ``method``, else the first that trains by it."""
    if method in study.variants:
        return method
    for variant in study.variants:
        cells = (outcome for task in tasks for outcome in task.runs.get(variant, {}).values())
        if any(outcome.recipe.get("adapter", {}).get("method") == method for outcome in cells):
            return variant
    return None


def _add_ratios(rows: list[dict[str, Any]], baseline: str | None) -> None:
    """``cpu_ratio``: processor time of training over that of LoRA on the same task."""
    time = {row["task"]: row["cpu_seconds"] for row in rows if row["variant"] == baseline}
    for row in rows:
        if row["cpu_seconds"] and time.get(row["task"]):
            row["cpu_ratio"] = row["cpu_seconds"] / time[row["task"]]


def _average(variant: str, tasks: Sequence[_Task], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of a variant over all tasks."""
    own = [row for row in rows if row["variant"] == variant]
    ratios, peaks = ([row[name] for row in own if name in row] for name in ("cpu_ratio", "peak_memory"))
    estimate = statistics.mean_of([task.samples[variant] for task in tasks], [task.spread(variant) for task in tasks])
    return {
        "task": AVERAGE,
        "variant": variant,
        "metric": AVERAGE,
        "parameters": own[0]["parameters"],
        "cpu_seconds": sum(row["cpu_seconds"] or 0.0 for row in own),
        **({"peak_memory": max(peaks)} if peaks else {}),
        **({"cpu_ratio": plain.geometric_mean(ratios)} if ratios else {}),
        **_estimated(estimate),
    }


def _pairs(name: str, tasks: Sequence[_Task], reference: str) -> list[dict[str, Any]]:
    """The reference against every other variant over ``tasks``, with Holm's correction among them."""
    pairs = []
    for other in (variant for variant in tasks[0].study.variants if variant != reference):
        found = [one for task in tasks if (one := task.difference(reference, other))]
        if len(found) < len(tasks):
            continue
        differences = [sample for _, sample in found]
        # Two that predict the same everywhere are one method, whatever the others' seeds do.
        pools = [
            task.spread(reference, other) if own.resampled.any() else None
            for task, own in zip(tasks, differences, strict=True)
        ]
        over_all = len(tasks) > 1
        estimate = statistics.mean_of(differences, pools) if over_all else statistics.estimate(differences[0], pools[0])
        pairs.append({"task": name, "one": reference, "other": other, "seeds": found[0][0], **estimate._asdict()})
    higher = metrics.find(tasks[0].facts["metric"]).higher_is_better
    for pair, p in zip(pairs, statistics.holm([pair["p"] for pair in pairs]), strict=True):
        pair |= {"p_adjusted": p, "better": statistics.verdict(pair["mean"] if higher else -pair["mean"], p)}
    return pairs


# -- what is equal and what is not ------------------------------------------------------------------------------------


def _unequal(study: Study, tasks: Mapping[str, _Task]) -> dict[str, dict[str, Any]]:
    """Settings outside of ``adapter`` and the search that differ between variants, and searches that do.

    By key, then variant.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, task in tasks.items():
        settings: dict[str, dict[str, Any]] = {}
        for variant, runs in task.runs.items():
            for key, value in _flat(next(iter(runs.values())).recipe):
                settings.setdefault(key, {})[variant] = value
        searched = {key for variant in study.variants for key in study.search_for(name, variant)}
        for key, values in settings.items():
            if key not in searched and len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
                found.setdefault(key, {}).update(values)
        searches = {variant: _values(study.search_for(name, variant)) for variant in study.variants}
        if len(set(searches.values())) > 1:
            found.setdefault("search", {}).update(searches)
    return found


def _flat(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, value in recipe.items():
        if section in ("adapter", "seed", "output", *RESERVED):
            continue
        if isinstance(value, Mapping):
            yield from ((f"{section}.{key}", held) for key, held in value.items())
        else:
            yield section, value


def _values(values: Mapping[str, Any]) -> str:
    """``train.learning_rate=0.001`` for people."""
    return ", ".join(
        f"{key}={'|'.join(map(_short, value)) if isinstance(value, (list, tuple)) else _short(value)}"
        for key, value in values.items()
    )


def _short(value: Any) -> str:
    return f"{value:g}" if is_number(value) else str(value)


def _edges(study: Study, found: Outcomes, task: _Task) -> Iterator[dict[str, Any]]:
    """Best values that lie at an end of what was tried, where more than one number was."""
    for variant, best in task.best.items():
        for key, value in best.values.items() if best else ():
            points = study.points(found, task.name, variant)
            tried = {point.values[key] for point in points if is_number(point.values[key])}
            if len(tried) > 1 and value in (min(tried), max(tried)):
                end = "smallest" if value == min(tried) else "greatest"
                yield {"task": task.name, "variant": variant, "key": key, "value": value, "end": end}


# -- in words ---------------------------------------------------------------------------------------------------------


def statement(summary: Mapping[str, Any]) -> list[str]:
    """What the data can say and what they cannot, in sentences, from the summary alone."""
    parts = (_completeness, _protocol, _comparisons, _limits_of_seeds, _limits_of_values, _limits_of_cells)
    return [sentence for part in parts for sentence in part(summary)]


def _completeness(summary: Mapping[str, Any]) -> Iterator[str]:
    counts = Counter(cell["status"] for cell in summary["cells"])
    done, wanted, diverged = summary["done"], summary["wanted"], counts["diverged"]
    tail = f"; {diverged} diverged, which counts as the worst value of their search" if diverged else ""
    if done + diverged < wanted or summary["open"]:
        lost = f", {counts['failed']} of them failed" if counts["failed"] else ""
        rest = f"{wanted - done - diverged} are not{lost}. What follows may change."
        yield f"Not finished: {done} of the {wanted} cells wanted so far are done{tail}, {rest}"
    else:
        yield f"All {wanted} cells have run{tail}."
    if summary["open"]:
        yield f"No best value yet, or every one diverged: {', '.join(' '.join(pair) for pair in summary['open'])}."


def _protocol(summary: Mapping[str, Any]) -> Iterator[str]:
    study, how = summary["study"], ""
    if study["search"] and "search" in summary["unequal"]:
        how = "values that differ between variants"
    elif study["search"]:
        grows = ", one step further while the best lay at the edge" * study["extend"]
        how = f"the same values for every variant and task ({_values(study['search'])}{grows})"
    means = f"values are means over {_count(len(study['seeds']), 'seed')}"
    if how:
        first = _count(study["search_seeds"], "seed")
        yield f"Search: {how}, chosen on validation rows with {first}; {means} at the chosen value."
    else:
        yield f"Nothing was tuned; {means}."
    if differing := {key: values for key, values in summary["unequal"].items() if key != "search"}:
        parts = [f"{key} ({_grouped(values)})" for key, values in differing.items()]
        yield f"Beyond the method and the search, the variants differ in {'; '.join(parts)}."


def _grouped(values: Mapping[str, Any]) -> str:
    """``0; lora: 0.1``: what most variants have, then the others."""
    usual = Counter(map(_short, values.values())).most_common(1)[0][0]
    others = [f"{variant}: {_short(value)}" for variant, value in values.items() if _short(value) != usual]
    return "; ".join([usual, *others])


def _comparisons(summary: Mapping[str, Any]) -> Iterator[str]:
    words = {"yes": "is better than", "no": "is worse than", "cannot be said": "cannot be told from"}
    counts = Counter(pair["task"] for pair in summary["pairs"])
    for task in counts:
        pairs = [pair for pair in summary["pairs"] if pair["task"] == task]
        facts = summary["tasks"].get(task)
        rows = f"{task} ({facts['metric']}, {_count(facts['examples'], 'test row')}): " if facts else "Over all tasks, "
        told = {answer: [_difference(pair) for pair in pairs if pair["better"] == answer] for answer in words}
        parts = [f"{words[answer]} {', '.join(those)}" for answer, those in told.items() if those]
        yield f"{rows}{pairs[0]['one']} {'; '.join(parts)}."
    if counts:
        yield (
            "In brackets the 95 % interval of the difference over other test rows and other seeds. A difference counts where its "
            f"p-value is below 5 % after Holm's correction for the comparisons on one task (at most {max(counts.values())}), so an "
            "interval without 0 may still not."
        )


def decimals(low: float, high: float, usual: int = 1) -> int:
    """Of a difference with that interval: ``usual`` where it is wide, more where it is narrow."""
    return 3 if 0 < high - low < 0.1 else 2 if high - low < 1 else usual


def _difference(pair: Mapping[str, Any]) -> str:
    digits = decimals(*pair["interval"])
    mean, low, high = (f"{round(value, digits) + 0.0:+.{digits}f}" for value in (pair["mean"], *pair["interval"]))
    return f"{pair['other']} ({mean} [{low}, {high}])"


def _limits_of_seeds(summary: Mapping[str, Any]) -> Iterator[str]:
    rows, seeds = summary["rows"], len(summary["study"]["seeds"])
    if seeds == 1:
        yield "One seed: the intervals allow for other test rows and say nothing of how much another seed would change."
    elif seeds < 5 and summary["pairs"]:
        yield (
            f"{seeds} seeds say little of the spread over seeds, so it is pooled over the variants of a task: the intervals trust that "
            "it is about equally large for all of them, or take a variant's own where that is larger."
        )
    most = {
        task: max((len(row["seeds"]) for row in rows if row["task"] == task), default=0) for task in summary["tasks"]
    }
    if seeds > 1 and (alone := [task for task, count in most.items() if count == 1]):
        yield f"{', '.join(alone)}: one seed so far, so the intervals allow for other test rows alone."
    for task, facts in summary["tasks"].items():
        if apart := facts.get("apart"):
            sds = {row["variant"]: row["sd"] for row in rows if row["task"] == task and row.get("sd") is not None}
            usual = math.sqrt(plain.fmean(sd**2 for name, sd in sds.items() if name not in apart))
            named = " and ".join(f"{name} (sd {sds[name]:.2f})" for name in apart)
            yield (
                f"On {task} {named} {'varies' if len(apart) == 1 else 'vary'} more over seeds than the others ({usual:.2f}; Cochran's "
                "test): each has its own spread, from few seeds, and the others are pooled without it."
            )


def _limits_of_values(summary: Mapping[str, Any]) -> Iterator[str]:
    if same := [task for task, facts in summary["tasks"].items() if facts.get("test_is_validation")]:
        yield f"{', '.join(same)}: validation and test are the same rows, so the metrics are those that chose the values: too good by that."
    for task, facts in summary["tasks"].items():
        if facts.get("note"):
            yield f"{task}: {facts['note']}."
    if edges := [
        f"{own['variant']} on {own['task']} ({own['key']}={_short(own['value'])})" for own in summary["edges"]
    ]:
        yield f"At the edge of what was tried, so perhaps not the best: {', '.join(edges)}."


def _limits_of_cells(summary: Mapping[str, Any]) -> Iterator[str]:
    diverged = [cell["tags"] for cell in summary["cells"] if cell["status"] == "diverged"]
    lost = {(tags["task"], tags["variant"], tags["seed"]) for tags in diverged}
    for row in summary["rows"]:
        missing = [seed for seed in summary["study"]["seeds"] if seed not in row.get("seeds", [seed])]
        if gone := [str(seed) for seed in missing if (row["task"], row["variant"], seed) in lost]:
            where = f"{row['variant']} on {row['task']}"
            yield f"{where} diverged at its chosen value with seed {', '.join(gone)}: its mean is over the others."
    for key, words in (
        ("commit", "versions of the code"),
        ("device", "machines"),
        ("threads", "numbers of threads"),
        ("versions", "sets of packages"),
        ("base", "base models"),
    ):
        if len(summary[key]) > 1:
            listed = ", ".join(f"{_version(key, entry['value'])} ({entry['cells']} cells)" for entry in summary[key])
            yield f"The cells are of {len(summary[key])} {words}: {listed}."
    if any(entry["value"] for entry in summary["dirty"]):
        yield "Some cells ran from a checkout with changes that are in no commit."


def _version(key: str, value: Any) -> str:
    if key == "versions":
        return " ".join(f"{name} {version}" for name, version in sorted((value or {}).items()))
    return str(value)[:12] if key in ("commit", "base") else str(value)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _rounded(value: Any) -> Any:
    """Numbers to six digits: more would only be noise in comparisons of files."""
    if isinstance(value, Mapping):
        return {key: _rounded(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(held) for held in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
