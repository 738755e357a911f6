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
from typing import Any, NamedTuple

import numpy as np

from duallora.errors import ConfigError, DataError, IntegrityError, is_number
from duallora.grid import statistics
from duallora.grid.statistics import ROUNDS, Estimate, Pool, Sample
from duallora.grid.study import CELLS, RESERVED, STUDY, Outcome, Outcomes, Point, Study, cell_folder, outcomes
from duallora.store import record
from duallora.tasks import Example, metrics
from duallora.tasks.metrics import Metric

KIND = "study"
AVERAGE = "average"
CURVE_POINTS = 40
CLOSE: dict[str, float] = {"rel_tol": 1e-6, "abs_tol": 1e-6}  # a recorded value and that of the recorded predictions
PROVENANCE = ("commit", "dirty", "versions", "device", "threads", "platform")


class _Runs(NamedTuple):
    """The finished cells of one task and variant at its best point, by seed."""

    point: Point
    cells: dict[int, Outcome]


class _Spreads(NamedTuple):
    """Of a task: the pooled spreads over seeds, and the variants whose own is of another kind and is used for them."""

    values: Pool | None
    differences: Pool | None
    apart: tuple[str, ...]

    def of(self, variant: str) -> Pool | None:
        return None if variant in self.apart else self.values

    def between(self, one: str, other: str) -> Pool | None:
        return None if {one, other} & set(self.apart) else self.differences


def summarize(folder: Path | str, *, scale: str | None = None, rounds: int = ROUNDS) -> dict[str, Any]:
    """What `duallora report` shows of a grid's folder, whether it is finished or not.

    ``rounds`` is the number of resamples behind the intervals, at most `statistics.slow_rounds` of metrics that need a
    call for each.

    Raises:
        ConfigError: the folder holds no study.
        IntegrityError: two cells of a task were scored on different test rows.
    """
    folder = Path(folder)
    if not (folder / STUDY).is_file():
        raise ConfigError(f"{folder} holds no {STUDY}: expected the folder of `duallora grid` or `duallora reproduce`")
    study = Study.read(folder)
    found = outcomes(folder)
    wanted = study.wanted(found)
    best = {pair: _best(study, found, *pair) for pair in ((t, v) for t in study.tasks for v in study.variants)}
    facts: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    samples: dict[tuple[str, str], tuple[tuple[int, ...], Sample]] = {}
    spreads: dict[str, _Spreads] = {}
    for number, task in enumerate(study.tasks):
        runs = {variant: one for variant in study.variants if (one := best[task, variant]) and one.cells}
        facts[task], sampled = _sample(folder, study, found, task, runs, rounds, number)
        if not runs:  # nothing is chosen yet, but the curves of what has run can be shown
            known = [
                found[cell.name].main_metric for cell in wanted if cell.tags["task"] == task and cell.name in found
            ]
            facts[task]["chosen_by"] = study.metric or next(filter(None, known), None)
        samples |= {(task, variant): sample for variant, sample in sampled.items()}
        spreads[task] = _spreads(study, sampled)
        facts[task]["apart"] = list(spreads[task].apart)
        rows += [
            _row(folder, task, variant, one, facts[task], sampled.get(variant), spreads[task].of(variant))
            for variant, one in runs.items()
        ]
    _add_ratios(rows, _by_method(study, best, "lora"))
    reference = study.reference or _by_method(study, best, "duallora") if len(study.variants) > 1 else None
    # The average is over tasks whose metrics have one direction, of the variants with a value on every task.
    alike = len({metrics.find(own["metric"]).higher_is_better for own in facts.values()}) == 1 < len(study.tasks)
    whole = [
        variant
        for variant in study.variants
        if alike and AVERAGE not in study.tasks and all((task, variant) in samples for task in study.tasks)
    ]
    pairs = _pairs(study, samples, spreads, reference, facts, reference in whole) if reference else []
    rows += [_average(study, variant, samples, spreads, rows) for variant in whole]
    ran = [name for name in (cell.name for cell in wanted) if name in found]
    summary = {
        "kind": KIND,
        "name": study.name,
        "scale": scale,
        **_provenance(folder, found, ran),
        "study": _plain(study),
        "reference": reference,
        "tasks": facts,
        "rounds": rounds,
        "wanted": len(wanted),
        "done": sum(cell.name in found and found[cell.name].status == "done" for cell in wanted),
        "cells": [_cell(cell.name, cell.tags, found.get(cell.name)) for cell in wanted],
        "rows": rows,
        "pairs": pairs,
        "curves": [
            curve for (task, variant), one in best.items() if one and (curve := _curve(folder, task, variant, one))
        ],
        "unequal": _unequal(study, best),
        "edges": _edges(study, found, best),
        "open": [list(pair) for pair, one in best.items() if one is None],
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
    if not isinstance(content, dict) or content.get("kind") != KIND:
        kind = content.get("kind") if isinstance(content, dict) else type(content).__name__
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


def _best(study: Study, found: Outcomes, task: str, variant: str) -> _Runs | None:
    point = study.best(found, task, variant)
    if point is None:
        return None
    cells = {}
    for seed in study.seeds:
        outcome = found.get(study.cell_name(task, variant, point, seed))
        if outcome is not None and outcome.status == "done":
            cells[seed] = outcome
    return _Runs(point, cells)


def _cell(name: str, tags: Mapping[str, Any], outcome: Outcome | None) -> dict[str, Any]:
    if outcome is None:
        return {"name": name, "tags": dict(tags), "status": "missing"}
    return {
        "name": name,
        "tags": dict(tags),
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


def _plain(study: Study) -> dict[str, Any]:
    """The study as JSON has it."""
    shown = {item.name: getattr(study, item.name) for item in dataclasses.fields(study) if item.name != "places"}
    return json.loads(json.dumps({key: value for key, value in shown.items() if key != "name"}, default=dict))


def _provenance(folder: Path, found: Outcomes, names: Iterable[str]) -> dict[str, Any]:
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


def _by_method(study: Study, best: Mapping[tuple[str, str], _Runs | None], method: str) -> str | None:
    """The variant called ``method``, else the first that trains by it."""
    if method in study.variants:
        return method
    for (_, variant), runs in sorted(best.items(), key=lambda item: list(study.variants).index(item[0][1])):
        for outcome in runs.cells.values() if runs else ():
            if outcome.recipe.get("adapter", {}).get("method") == method:
                return variant
    return None


# -- metrics ----------------------------------------------------------------------------------------------------------


def _sample(
    folder: Path, study: Study, found: Outcomes, task: str, runs: Mapping[str, _Runs], rounds: int, number: int
) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], Sample]]]:
    """(what is known of a task, the resampled values of each variant with their seeds)."""
    flat = [(variant, seed, outcome) for variant, one in runs.items() for seed, outcome in one.cells.items()]
    if not flat:
        return {"metric": study.metric, "chosen_by": study.metric}, {}
    split = "test" if all(outcome.test for _, _, outcome in flat) else "validation"
    name = _reported(study, folder, flat[0][2], split)
    facts: dict[str, Any] = {"metric": name, "chosen_by": study.metric or flat[0][2].main_metric, "split": split}
    if split == "validation":
        return {**facts, "note": "no test rows were scored (eval.test)"}, {}
    metric = _metric(flat[0][2], name)
    read = [_predictions(folder, outcome.name, metric) for _, _, outcome in flat]
    examples = read[0][1]
    for (_, _, outcome), (_, own) in zip(flat, read, strict=True):
        if own != examples:
            raise IntegrityError(
                f"{flat[0][2].name} and {outcome.name} were scored on different test rows: nothing can be compared; remove "
                "the cells of one of them and run the grid again"
            )
    facts |= {"examples": len(examples), "test_is_validation": flat[0][2].same_rows}
    rounds = rounds if metric.compute is None else min(rounds, statistics.slow_rounds(len(study.variants) - 1))
    sample = None
    if metric.statistics or metric.compute:
        sample = statistics.resample(metric, [own for own, _ in read], examples, rounds=rounds, seed=number)
    for index, (_, _, outcome) in enumerate(flat):
        recorded: Any = outcome.test.get(metric.name)
        if not is_number(recorded) or sample is None or not math.isclose(sample.values[index], recorded, **CLOSE):
            note = f"no intervals: nothing here computes {name} as {outcome.name} recorded it from its predictions"
            return {**facts, "note": note}, {}
    assert sample is not None
    facts["rounds"] = rounds
    samples = {}
    for variant, one in runs.items():
        columns = [index for index, (name, _, _) in enumerate(flat) if name == variant]
        samples[variant] = tuple(one.cells), Sample(sample.values[columns], sample.resampled[:, columns])
    return facts, samples


def _reported(study: Study, folder: Path, outcome: Outcome, split: str) -> str | None:
    """What the tables show: the study's metric where rows tell it, else the task's main one."""
    values = outcome.test if split == "test" else outcome.metrics
    metric = _metric(outcome, study.metric)
    if metric.likelihood:
        there = split == "test" and "tokens" in _lines(folder, outcome.name)[0]
    else:
        there = study.metric in values
    return study.metric if there or outcome.main_metric not in values else outcome.main_metric


def _metric(outcome: Outcome, name: str | None) -> Metric:
    """What the run recorded as ``name``."""
    return metrics.find(name, outcome.recipe.get("data", {}).get("task"))


def _predictions(folder: Path, name: str, metric: Metric) -> tuple[list[Any], list[Example]]:
    """(what the metric takes for predictions, the rows) of a cell."""
    lines = _lines(folder, name)
    try:
        examples = [
            Example(references=tuple(line["references"]), group=line.get("group", ""))
            if "references" in line
            else Example(label=line["label"], group=line.get("group", ""))
            for line in lines
        ]
        if metric.likelihood:
            return [(line["log_likelihood"], line["tokens"]) for line in lines], examples
        return [line["prediction"] for line in lines], examples
    except (KeyError, TypeError) as error:
        place = folder / CELLS / name
        raise IntegrityError(
            f"the predictions of {place} are damaged ({error!r}): remove it and run the grid again"
        ) from None


def _lines(folder: Path, name: str) -> list[dict[str, Any]]:
    found = cell_folder(folder, name).predictions()
    if found is None:
        place = folder / CELLS / name
        raise IntegrityError(f"the predictions of {place} are gone: remove it and run the grid again")
    return found


def _row(
    folder: Path,
    task: str,
    variant: str,
    runs: _Runs,
    facts: Mapping[str, Any],
    sampled: tuple[tuple[int, ...], Sample] | None,
    pooled: Pool | None,
) -> dict[str, Any]:
    metric, test = facts["metric"], facts.get("split") == "test"
    every = [_numbers(outcome.test if test else outcome.metrics) for outcome in runs.cells.values()]
    values = [own[metric] for own in every if metric in own]
    first = next(iter(runs.cells.values()))
    row = {
        "task": task,
        "variant": variant,
        "metric": metric,
        "values": dict(runs.point.values),
        "seeds": list(runs.cells),
        "by_seed": values,
        **_spread(values),
        "validation": _mean(outcome.metrics.get(str(facts["chosen_by"])) for outcome in runs.cells.values()),
        "every": {name: _spread([one[name] for one in every if name in one]) for name in every[0]},
        "parameters": dict(first.parameters),
        "steps": (cell_folder(folder, first.name).facts() or {}).get("steps"),
        "seconds": _mean(outcome.seconds for outcome in runs.cells.values()),
        "cpu_seconds": _mean(outcome.cpu_seconds for outcome in runs.cells.values()),
    }
    return {**row, **_estimated(statistics.estimate(sampled[1], pooled))} if sampled else row


def _spreads(study: Study, sampled: Mapping[str, tuple[tuple[int, ...], Sample]]) -> _Spreads:
    """From the variants whose every seed came through."""
    whole = {name: sample.values for name, (seeds, sample) in sampled.items() if len(seeds) == len(study.seeds)}
    if not whole:
        return _Spreads(None, None, ())
    apart = [list(whole)[index] for index in statistics.outlying(np.stack(list(whole.values())))]
    alike = np.stack([values for name, values in whole.items() if name not in apart])
    return _Spreads(statistics.pool(alike, differences=False), statistics.pool(alike, differences=True), tuple(apart))


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": _mean(values), "sd": plain.stdev(values) if len(values) > 1 else None}


def _mean(values: Iterable[Any]) -> float | None:
    known = [value for value in values if is_number(value)]
    return plain.fmean(known) if known else None


def _estimated(estimate: Estimate) -> dict[str, Any]:
    return {name: value for name, value in estimate._asdict().items() if name != "p"}


def _add_ratios(rows: list[dict[str, Any]], baseline: str | None) -> None:
    """``cpu_ratio``: processor time of training over that of LoRA on the same task."""
    time = {row["task"]: row["cpu_seconds"] for row in rows if row["variant"] == baseline}
    for row in rows:
        if row["cpu_seconds"] and time.get(row["task"]):
            row["cpu_ratio"] = row["cpu_seconds"] / time[row["task"]]


def _average(
    study: Study,
    variant: str,
    samples: Mapping[tuple[str, str], Any],
    spreads: Mapping[str, _Spreads],
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The row of a variant over all tasks."""
    own = [row for row in rows if row["variant"] == variant]
    ratios = [row["cpu_ratio"] for row in own if "cpu_ratio" in row]
    estimate = statistics.mean_of(
        [samples[task, variant][1] for task in study.tasks], [spreads[task].of(variant) for task in study.tasks]
    )
    return {
        "task": AVERAGE,
        "variant": variant,
        "metric": AVERAGE,
        "parameters": own[0]["parameters"],
        "cpu_seconds": sum(row["cpu_seconds"] or 0.0 for row in own),
        **({"cpu_ratio": plain.geometric_mean(ratios)} if ratios else {}),
        **_estimated(estimate),
    }


def _pairs(
    study: Study,
    samples: Mapping[tuple[str, str], Any],
    spreads: Mapping[str, _Spreads],
    reference: str,
    facts: Mapping[str, Any],
    average: bool,
) -> list[dict[str, Any]]:
    """The reference against every other variant, task by task and over all tasks; Holm's correction within each."""
    pairs = []
    for task in [*study.tasks, *([AVERAGE] if average else [])]:
        of_task = []
        higher = metrics.find(facts[next(iter(study.tasks)) if task == AVERAGE else task]["metric"]).higher_is_better
        for other in study.variants:
            tasks = list(study.tasks) if task == AVERAGE else [task]
            if other == reference or not all((name, who) in samples for name in tasks for who in (reference, other)):
                continue
            found = [_paired(samples[name, reference], samples[name, other]) for name in tasks]
            if not all(seeds for seeds, _ in found):
                continue
            differences = [sample for _, sample in found]
            # Two that predict the same everywhere are one method, whatever the others' seeds do.
            pools = [
                spreads[name].between(reference, other) if own.resampled.any() else None
                for name, own in zip(tasks, differences, strict=True)
            ]
            if task == AVERAGE:
                estimate = statistics.mean_of(differences, pools)
            else:
                estimate = statistics.estimate(differences[0], pools[0])
            pair = {"task": task, "one": reference, "other": other, "seeds": found[0][0], **estimate._asdict()}
            of_task.append(pair)
        for pair, p in zip(of_task, statistics.holm([pair["p"] for pair in of_task]), strict=True):
            gain = pair["mean"] if higher else -pair["mean"]
            pairs.append({**pair, "p_adjusted": p, "better": statistics.verdict(gain, p)})
    return pairs


def _paired(
    one: tuple[tuple[int, ...], Sample], other: tuple[tuple[int, ...], Sample]
) -> tuple[list[int], Sample | Any]:
    """The seeds both have, and the difference on them."""
    common = [seed for seed in one[0] if seed in other[0]]

    def of(seeds: tuple[int, ...], sample: Sample) -> Sample:
        columns = [seeds.index(seed) for seed in common]
        return Sample(sample.values[columns], sample.resampled[:, columns])

    return common, statistics.difference(of(*one), of(*other)) if common else None


def _curve(folder: Path, task: str, variant: str, runs: _Runs) -> dict[str, Any] | None:
    """Training loss by step, the mean over seeds of the steps that all of them logged, in at most 40 bins."""
    logs = [dict(cell_folder(folder, outcome.name).log.losses()) for outcome in runs.cells.values()]
    steps = sorted(set.intersection(*map(set, logs))) if logs else []
    if len(steps) < 2:
        return None
    width = math.ceil(len(steps) / CURVE_POINTS)
    bins = [steps[start : start + width] for start in range(0, len(steps), width)]
    return {
        "task": task,
        "variant": variant,
        "seeds": list(runs.cells),
        "steps": [own[-1] for own in bins],
        "loss": [plain.fmean(log[step] for log in logs for step in own) for own in bins],
    }


# -- what is equal and what is not ------------------------------------------------------------------------------------


def _unequal(study: Study, best: Mapping[tuple[str, str], _Runs | None]) -> dict[str, dict[str, Any]]:
    """Settings outside of ``adapter`` and the search that differ between variants, and searches that do.

    By key, then variant.
    """
    found: dict[str, dict[str, Any]] = {}
    for task in study.tasks:
        settings: dict[str, dict[str, Any]] = {}
        for variant in study.variants:
            runs = best[task, variant]
            recipe = next((outcome.recipe for outcome in runs.cells.values()), None) if runs else None
            for key, value in _flat(recipe or {}):
                settings.setdefault(key, {})[variant] = value
        searched = {key for variant in study.variants for key in study.search_for(task, variant)} | set(study.space)
        for key, values in settings.items():
            if key not in searched and len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
                found.setdefault(key, {}).update(values)
        searches = {variant: _values(study.search_for(task, variant)) for variant in study.variants}
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


def _edges(study: Study, found: Outcomes, best: Mapping[tuple[str, str], _Runs | None]) -> list[dict[str, Any]]:
    """Best values that lie at an end of what was tried, where more than one number was."""
    edges = []
    for (task, variant), runs in best.items():
        if runs is None:
            continue
        points = study.points(found, task, variant)
        for key, value in runs.point.values.items():
            tried = {point.values[key] for point in points if is_number(point.values[key])}
            if len(tried) > 1 and value in (min(tried), max(tried)):
                end = "smallest" if value == min(tried) else "greatest"
                edges.append({"task": task, "variant": variant, "key": key, "value": value, "end": end})
    return edges


# -- in words ---------------------------------------------------------------------------------------------------------


def statement(summary: Mapping[str, Any]) -> list[str]:
    """What the data can say and what they cannot, in sentences, from the summary alone."""
    return [*_completeness(summary), *_protocol(summary), *_comparisons(summary), *_limits(summary)]


def _completeness(summary: Mapping[str, Any]) -> Iterator[str]:
    counts = Counter(cell["status"] for cell in summary["cells"])
    done, wanted, diverged = summary["done"], summary["wanted"], counts["diverged"]
    tail = f"; {diverged} diverged, which counts as the worst value of their search" if diverged else ""
    if done + diverged < wanted or summary["open"]:
        lost = f", {counts['failed']} of them failed" if counts["failed"] else ""
        yield (
            f"Not finished: {done} of the {wanted} cells wanted so far are done{tail}, {wanted - done - diverged} are not{lost}. "
            "What follows may change."
        )
    else:
        yield f"All {wanted} cells have run{tail}."
    if summary["open"]:
        yield f"No best value yet, or every one diverged: {', '.join(' '.join(pair) for pair in summary['open'])}."


def _protocol(summary: Mapping[str, Any]) -> Iterator[str]:
    study = summary["study"]
    seeds = len(study["seeds"])
    if study["space"]:
        how = f"{study['trials']} trials drawn by Optuna for each variant and task"
    elif study["search"]:
        how = f"the same values for every variant and task ({_values(study['search'])}"
        how += ", one step further while the best lay at the edge)" if study["extend"] else ")"
        if "search" in summary["unequal"]:
            how = "values that differ between variants"
    else:
        how = ""
    first = f"with {study['search_seeds']} seed{'s' * (study['search_seeds'] > 1)}"
    if how:
        yield f"Search: {how}, chosen on validation rows {first}; values are means over {_count(seeds, 'seed')} at the chosen value."
    else:
        yield f"Nothing was tuned; values are means over {_count(seeds, 'seed')}."
    if differing := {key: values for key, values in summary["unequal"].items() if key != "search"}:
        parts = [f"{key} ({_grouped(values)})" for key, values in differing.items()]
        yield f"Beyond the method and the search, the variants differ in {'; '.join(parts)}."


def _grouped(values: Mapping[str, Any]) -> str:
    """``0; lora: 0.1``: what most variants have, then the others."""
    usual = Counter(map(_short, values.values())).most_common(1)[0][0]
    others = [f"{variant}: {_short(value)}" for variant, value in values.items() if _short(value) != usual]
    return "; ".join([usual, *others])


def _comparisons(summary: Mapping[str, Any]) -> Iterator[str]:
    for task in dict.fromkeys(pair["task"] for pair in summary["pairs"]):
        pairs = [pair for pair in summary["pairs"] if pair["task"] == task]
        reference = pairs[0]["one"]
        facts = summary["tasks"].get(task, {})
        where = f"Over all tasks, {reference}" if task == AVERAGE and not facts else (
            f"{task} ({facts.get('metric')}, {facts.get('examples'):,} test rows): {reference}"
        )  # fmt: skip
        parts = []
        for answer, words in (("yes", "is better than"), ("no", "is worse than")):
            if those := [pair for pair in pairs if pair["better"] == answer]:
                parts.append(f"{words} {', '.join(map(_difference, those))}")
        if those := [pair for pair in pairs if pair["better"] == "cannot be said"]:
            parts.append(f"cannot be told from {', '.join(map(_difference, those))}")
        yield f"{where} {'; '.join(parts)}."
    if summary["pairs"]:
        count = max(Counter(pair["task"] for pair in summary["pairs"]).values())
        yield (
            "In brackets the 95 % interval of the difference over other test rows and other seeds. A difference counts where its "
            f"p-value is below 5 % after Holm's correction for the comparisons on one task (at most {count}), so an interval "
            "without 0 may still not."
        )


def decimals(low: float, high: float, usual: int = 1) -> int:
    """Of a difference with that interval: ``usual`` where it is wide, more where it is narrow."""
    return 3 if 0 < high - low < 0.1 else 2 if high - low < 1 else usual


def _difference(pair: Mapping[str, Any]) -> str:
    low, high = pair["interval"]
    digits = decimals(low, high)
    mean, low, high = (f"{round(value, digits) + 0.0:+.{digits}f}" for value in (pair["mean"], low, high))
    return f"{pair['other']} ({mean} [{low}, {high}])"


def _limits(summary: Mapping[str, Any]) -> Iterator[str]:
    study = summary["study"]
    seeds = len(study["seeds"])
    if seeds == 1:
        yield "One seed: the intervals allow for other test rows and say nothing of how much another seed would change."
    elif seeds < 5 and summary["pairs"]:
        yield (
            f"{seeds} seeds say little of the spread over seeds, so it is pooled over the variants of a task: the intervals trust that "
            "it is about equally large for all of them, or take a variant's own where that is larger."
        )
    most = {
        task: max((len(row["seeds"]) for row in summary["rows"] if row["task"] == task), default=0)
        for task in summary["tasks"]
    }
    if seeds > 1 and (alone := [task for task, count in most.items() if count == 1]):
        yield f"{', '.join(alone)}: one seed so far, so the intervals allow for other test rows alone."
    for task, facts in summary["tasks"].items():
        sds = {row["variant"]: row.get("sd") for row in summary["rows"] if row["task"] == task}
        if apart := facts.get("apart"):
            usual = math.sqrt(plain.fmean(sd**2 for name, sd in sds.items() if sd is not None and name not in apart))
            named = " and ".join(f"{name} (sd {sds[name]:.2f})" for name in apart)
            yield (
                f"On {task} {named} {'varies' if len(apart) == 1 else 'vary'} more over seeds than the others ({usual:.2f}; Cochran's test): "
                "each has its own spread, from few seeds, and the others are pooled without it."
            )
    same = [task for task, facts in summary["tasks"].items() if facts.get("test_is_validation")]
    if same:
        yield f"{', '.join(same)}: validation and test are the same rows, so the metrics are those that chose the values: too good by that."
    for task, facts in summary["tasks"].items():
        if facts.get("note"):
            yield f"{task}: {facts['note']}."
    if summary["edges"]:
        edges = [
            f"{edge['variant']} on {edge['task']} ({edge['key']}={_short(edge['value'])})" for edge in summary["edges"]
        ]
        yield f"At the edge of what was tried, so perhaps not the best: {', '.join(edges)}."
    short = [row for row in summary["rows"] if "seeds" in row and len(row["seeds"]) < seeds]
    lost = {
        (cell["tags"]["task"], cell["tags"]["variant"], cell["tags"]["seed"])
        for cell in summary["cells"]
        if cell["status"] == "diverged"
    }
    for row in short:
        gone = [
            seed for seed in study["seeds"] if seed not in row["seeds"] and (row["task"], row["variant"], seed) in lost
        ]
        if gone:
            yield f"{row['variant']} on {row['task']} diverged at its chosen value with seed {', '.join(map(str, gone))}: its mean is over the others."
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
    return f"{number} {what}{'s' * (number != 1)}"


def _rounded(value: Any) -> Any:
    """Numbers to six digits: more would only be noise in comparisons of files."""
    if isinstance(value, Mapping):
        return {key: _rounded(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(held) for held in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
