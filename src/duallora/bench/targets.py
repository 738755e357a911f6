"""What the project set itself to reach, and what the results say of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from duallora.bench import methods
from duallora.bench.scene import Scene

Results = Mapping[str, Mapping[str, Any]]  # "layer", "step", "kernel", "merge" -> the file's content, {} where absent
Cells = Iterator[tuple[str, dict[str, Any]]]
Values = dict[str, float]  # where -> ratio


class Verdict(NamedTuple):
    """``worst`` of all cells the target speaks of and where; ``met`` in how many of them. None: not measured."""

    what: str
    target: str
    worst: float | None
    where: str
    met: int
    cells: int


def verdicts(results: Results) -> list[Verdict]:
    found = []
    for what, limit, inclusive, measure in TARGETS:
        values = measure(results)
        where = max(values, key=lambda name: values[name], default="")
        met = sum(value <= limit if inclusive else value < limit for value in values.values())
        target = f"{'<=' if inclusive else '<'} {limit:g}" if limit != 1 else "< 1"
        found.append(Verdict(what, target, values.get(where), where, met, len(values)))
    return found


def cells(results: Results, name: str) -> Cells:
    """(words for it, cell) of every cell of that benchmark, in the order they were measured."""
    for cell in results.get(name, {}).get("cells", []):
        yield words(cell["cell"]), cell


def words(key: Mapping[str, Any]) -> str:
    """The cell's key for people: ``2048 x 2048, r 16, fp32``; ``bf16, checkpointing``."""
    parts = []
    if "width" in key:
        parts.append(f"{key['width']} x {key['tokens']}" if "tokens" in key else str(key["width"]))
        parts.append(f"r {key['rank']}")
    parts.append({"float32": "fp32", "bfloat16": "bf16"}[key["dtype"]])
    if "batch" in key:
        parts.append(f"batch {key['batch']}")
    if "width" not in key:  # a whole model
        parts += [str(key["model"])] if key["model"] != Scene.model else []
        parts += [f"r {key['rank']}"] if key["rank"] != Scene.rank else []
    if "rows" in key and (key["rows"], key["length"]) != (Scene.rows, Scene.length):
        parts.append(f"{key['rows']} x {key['length']} tokens")
    parts += [name for name in ("checkpointing", "masked", "dora") if key.get(name)]
    return ", ".join(parts)


def ratio(cell: Mapping[str, Any], name: str, over: str) -> float | None:
    """Median time of ``name`` over that of ``over`` in one cell; None where either did not run."""
    found = cell["methods"]
    if name not in found or over not in found:
        return None
    return found[name]["median_s"] / found[over]["median_s"]


def _over(benchmark: str, name: str, over: str, only: Callable[[dict], bool] = lambda key: True):
    def measure(results: Results) -> Values:
        values = {where: ratio(cell, name, over) for where, cell in cells(results, benchmark) if only(cell["cell"])}
        return {where: value for where, value in values.items() if value is not None}

    return measure


def _both(*measures: tuple[str, Callable[[Results], Values]]) -> Callable[[Results], Values]:
    def measure(results: Results) -> Values:
        return {f"{name}, {where}": value for name, one in measures for where, value in one(results).items()}

    return measure


def _large(dtype: str) -> Callable[[dict], bool]:
    return lambda key: key["dtype"] == dtype and key["tokens"] >= 2048 and key["width"] >= 1024 and key["rank"] == 16


def _peaks(results: Results) -> Values:
    return {
        where: cell["methods"][methods.EXACT]["peak_ratio_to_lora"]
        for where, cell in cells(results, "step")
        if "peak_ratio_to_lora" in cell["methods"][methods.EXACT]
    }


def _merge(results: Results) -> Values:
    return {
        where: cell["methods"][f"{methods.EXACT}: merge"]["ratio_to_copy"]["median"]
        for where, cell in cells(results, "merge")
        if cell["cell"]["what"] == "merge"
    }


def _against(rival: str) -> Callable[[Results], Values]:
    return _both(
        ("layer", _over("layer", methods.EXACT, rival)),
        ("step", _over("step", methods.EXACT, rival)),
    )


_LAYER = "layer, {}, n >= 2048, d = k >= 1024, r = 16: time / three GEMMs"
_STEP = "SmolLM2 step / PEFT LoRA step, {}"
# what, limit, whether the limit itself will do, how it is measured
TARGETS: list[tuple[str, float, bool, Callable[[Results], Values]]] = [
    (_LAYER.format("fp32"), 1.15, True, _over("layer", methods.EXACT, methods.FLOOR, _large("float32"))),
    (_LAYER.format("bf16"), 1.30, True, _over("layer", methods.EXACT, methods.FLOOR, _large("bfloat16"))),
    ("layer and step / PEFT DoRA, equal parameters", 1, False, _against(methods.DORA)),
    ("layer and step / PEFT HiRA, equal parameters", 1, False, _against(methods.HIRA)),
    (_STEP.format("equal parameters, exact"), 1.40, True, _over("step", methods.EXACT, methods.LORA)),
    (_STEP.format("`gradient_tokens=0.25`"), 1.20, True, _over("step", methods.sampled(0.25), methods.LORA)),
    (_STEP.format("`gradient_tokens=0.125`"), 1.10, True, _over("step", methods.sampled(0.125), methods.LORA)),
    ("peak memory of a step above the model / PEFT LoRA's", 1.02, True, _peaks),
    ("`fast_dora`: SmolLM2 step / PEFT DoRA step", 0.75, True, _over("step", methods.FAST_DORA, methods.DORA)),
    ("`fast_dora`: SmolLM2 step / PEFT LoRA step", 1.15, True, _over("step", methods.FAST_DORA, methods.LORA)),
    ("merge all layers / copy the same weights once", 3, True, _merge),
]
