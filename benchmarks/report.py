"""The tables and plots of the docs from results/bench/*.json alone: ``python benchmarks/report.py``.

A page holds ``<!-- bench:NAME -->`` marks, and the text between is made here; what has not been measured leaves it as
it is. What the project set itself to reach, and what the results say of it, is a table too.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from duallora import plots as style
from duallora.bench import kernel, layer, methods
from duallora.bench.scene import Scene
from duallora.bench.store import read
from duallora.errors import ConfigError, IntegrityError
from duallora.store import record

NAMES = ("layer", "step", "kernel", "merge", "host")
QUALITY = "quality"  # written by benchmarks/quality.py: runs, not cells
GPU = "gpu"  # a folder with the files of a GPU; the others are the CPU's
_BLOCK = re.compile(r"(<!-- bench:(?P<name>\w+) -->\n).*?(<!-- /bench:(?P=name) -->)", re.DOTALL)
MIB = 1 << 20
COPY = "copy of the weights"  # benchmarks/model_merge.py


def load(folder: Path) -> Results:
    """The results in ``folder``; files of another program (without cells) count as absent.

    Raises:
        IntegrityError: a backend was found wrong, so no figure is shown.
    """
    found: dict[str, Any] = _files(folder)
    found[QUALITY] = read(folder / f"{QUALITY}.json")
    found[GPU] = _files(folder / GPU)
    return found


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    found = {name: read(folder / f"{name}.json") for name in NAMES}
    found = {name: content if content.get("cells") else {} for name, content in found.items()}
    for cell in found["kernel"].get("cells", []):
        if wrong := kernel.red(cell):
            raise IntegrityError(
                f"{folder / 'kernel.json'}: {', '.join(wrong)} was wrong at {words(cell['cell'])}; no figure is shown until "
                "`duallora bench kernel` passes"
            )
    return found


def report(folder: Path, root: Path, *, plots: bool = True) -> None:
    """Fills the marks of README.md and docs/*.md below ``root`` and draws docs/img/bench-*.svg."""
    results = load(folder)
    if not any(results[name] for name in (*NAMES, QUALITY)):
        raise ConfigError(f"{folder} holds no results: run `duallora bench layer` (step, kernel) first")
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        if (filled := fill(text, results)) != text:
            record.write_text(page, filled)
            print("tables ", page)
    for path in draw(results, root / "docs" / "img") if plots else ():
        print("plot   ", path)
    for verdict in verdicts(results):
        label = "-" if not verdict.cells else "met" if verdict.met == verdict.cells else "missed"
        print(f"{label:8}{verdict.what}: {_worst(verdict)}, target {verdict.target}")


def pages(root: Path) -> list[Path]:
    """The pages with marks."""
    every = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return [page for page in every if page.is_file() and "<!-- bench:" in page.read_text(encoding="utf-8")]


def fill(text: str, results: Results) -> str:
    """The page with the text of every mark replaced whose results are there; ConfigError for a mark without a table."""

    def replace(match: re.Match) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ConfigError(f"<!-- bench:{name} --> is no table: expected one of {', '.join(TABLES)}")
        made = TABLES[name](results)
        return match[0] if made is None else f"{match[1]}{made}\n{match[3]}"

    return _BLOCK.sub(replace, text)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    lines = [head, ["---", *["---:" if numbers else "---"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def machine(results: Results) -> str | None:
    rows = []
    for name in NAMES:
        if content := results.get(name):
            loads = [cell["load"] for cell in content["cells"] if cell.get("load") is not None]
            load_ = f"{min(loads):.1f} to {max(loads):.1f}" if loads else "?"
            commit = (content["commit"] or "none")[:10] + (", edited" if content["dirty"] else "")
            packages = f"torch {content['versions']['torch']}, PEFT {content['versions']['peft']}"
            device = _device(content)
            file = f"`results/bench/{name}.json`"
            rows.append([file, device, content["backend"], packages, commit, str(len(content["cells"])), load_])
    head = ["file", "device", "`auto` is", "versions", "commit", "cells", "load"]
    return _table(head, rows, numbers=False) if rows else None


def targets(results: Results) -> str | None:
    found = verdicts(results)
    if not any(verdict.cells for verdict in found):
        return None
    rows = [[v.what, v.target, _worst(v), v.where, _mark(v)] for v in found]
    table = _table(["what", "target", "measured, worst cell", "which", "met"], rows, numbers=False)
    return (
        f"{table}\n\nMeasured on: {'; '.join(_unique(_device(results[name]) for name in NAMES if results.get(name)))}."
    )


def _device(content: Mapping[str, Any]) -> str:
    return f"{content['device']}, {content['threads']} thread{'' if content['threads'] == 1 else 's'}"


def _worst(verdict: Verdict) -> str:
    return "-" if verdict.worst is None else f"{verdict.worst:.2f}"


def _mark(verdict: Verdict) -> str:
    if not verdict.cells:
        return "not measured"
    if verdict.met == verdict.cells:
        return "yes"
    return f"**no** ({verdict.met} of {verdict.cells} cells)" if verdict.met else "**no**"


def layers(results: Results) -> str | None:
    """A table per number of tokens at r = 16: methods by cells, time / LoRA's."""
    every = [(cell["cell"], cell) for _, cell in cells(results, "layer") if cell["cell"]["rank"] == 16]
    if not every:
        return None
    parts = []
    for tokens in sorted({key["tokens"] for key, _ in every}):
        of = [(key, cell) for key, cell in every if key["tokens"] == tokens]
        of.sort(key=lambda pair: (pair[0]["dtype"] == "bfloat16", pair[0]["width"]))
        columns = [cell for _, cell in of]
        names = _unique(name for cell in columns for name in cell["methods"])
        widest = next((cell for key, cell in reversed(of) if key["dtype"] == "float32"), None)
        head = [f"{tokens} tokens, r = 16", *(f"{key['width']} {words(key).split()[-1]}" for key, _ in of)]
        rows = [[name, *(_number(ratio(cell, name, methods.LORA)) for cell in columns)] for name in names]
        if widest is not None:
            head.append(f"saved, MiB ({widest['cell']['width']} fp32)")
            for row in rows:
                row.append(_mib(widest["methods"].get(row[0], {}).get("saved_bytes")))
        floor = [f"**{methods.EXACT} / {methods.FLOOR}**", *(_with_quartiles(cell) for cell in columns)]
        rows.append(floor + [""] * (widest is not None))
        parts.append(_table(head, rows))
    compiled = [cell["methods"][layer.COMPILED]["compile_s"] for _, cell in every if layer.COMPILED in cell["methods"]]
    if compiled:
        parts.append(f"Compiling took {min(compiled):.0f} to {max(compiled):.0f} s a shape, not counted above.")
    return "\n\n".join(parts)


def _with_quartiles(cell: Mapping[str, Any]) -> str:
    found = cell["methods"][methods.EXACT]["ratio_to_gemms"]
    return f"{found['median']:.2f} ({found['quartiles'][0]:.2f}-{found['quartiles'][1]:.2f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value / MIB:,.1f}"


def step(results: Results) -> str | None:
    """Time / LoRA's by method and scene, then peak memory."""
    every = list(cells(results, "step"))
    if not every:
        return None
    names = _unique(name for _, cell in every for name in cell["methods"])
    head, columns = ["time / LoRA's"], []
    for where, cell in every:
        head.append(where)
        seconds = f"{cell['methods'][methods.LORA]['median_s']:.2f}"
        columns.append([*(_number(ratio(cell, name, methods.LORA)) for name in names), seconds])
        if any("graph" in method for method in cell["methods"].values()):
            head.append("replayed")
            columns.append([*(_number(_replayed(cell, name, "ratio_to_lora")) for name in names), ""])
    parts = [_table(head, [list(row) for row in zip([*names, "*LoRA's step, seconds*"], *columns, strict=True)])]
    for where, cell in every:
        if cell["cell"]["masked"]:
            batch = cell["batch"]
            parts.append(
                f"In the masked batch ({where}) {batch['trained_share']:.0%} of the {' x '.join(map(str, batch['tokens']))} "
                f"tokens carry loss and {batch['padding_share']:.0%} are padding."
            )
    known = [(where, cell) for where, cell in every if "peak_bytes" in cell["methods"][methods.LORA]]
    if known:
        rows = [
            [name, *(_peak(cell["methods"].get(name)) for _, cell in known)]
            for name in names
            if any(name in cell["methods"] for _, cell in known)
        ]
        parts.append(_table(["peak above the model, MiB (/ LoRA's)", *(where for where, _ in known)], rows))
    return "\n\n".join(parts)


def _peak(method: Mapping[str, Any] | None) -> str:
    if method is None or "peak_bytes" not in method:
        return ""
    return f"{_mib(method['peak_bytes'])} ({method['peak_ratio_to_lora']:.2f})"


def kernels(results: Results) -> str | None:
    rows = []
    for where, cell in cells(results, "kernel"):
        for name, backend in cell["backends"].items():
            build, gradients = backend["build"], backend["gradients"]
            rows.append(
                [
                    f"{where}, {name}",
                    f"{max(backend['errors'].values()):.0e}",
                    *(f"{one['median_s'] * 1e3:.2f} ms, {one['gflops']:.0f} GFLOP/s" for one in (build, gradients)),
                    f"{build['ratio_to_memcpy']['median']:.1f}",
                    f"{(2 * build['median_s'] + gradients['median_s']) / (3 * cell['gemm']['median_s']):.3f}",
                ]
            )
    head = ["width, r, dtype, backend", "error", "build", "gradients", "build / memcpy"]
    head.append(f"2 builds + gradients / 3 GEMMs of {kernel.TOKENS} rows")
    return _table(head, rows) if rows else None


def merging(results: Results) -> str | None:
    merged = [(where, cell) for where, cell in cells(results, "merge") if cell["cell"]["what"] == "merge"]
    if not merged:
        return None
    names = [name for name in merged[0][1]["methods"] if name != COPY]
    rows = [[n, *(f"{cell['methods'][n]['ratio_to_copy']['median']:.2f}" for _, cell in merged)] for n in names]
    rows.append(["*one copy, ms*", *(f"{cell['methods'][COPY]['median_s'] * 1e3:.0f}" for _, cell in merged)])
    return _table(["time / one copy of the weights", *(where for where, _ in merged)], rows)


def gpu(results: Results) -> str | None:
    """One layer as launched and as a replayed graph, and a step of a model."""
    found: Results = results.get(GPU, {})
    every = list(cells(found, "layer"))
    if not every:
        return None
    head = ["time / LoRA's"]
    for where, _ in every:
        head += [where, "replayed"]
    rows = []
    for name in _unique(name for _, cell in every for name in cell["methods"]):
        row = [name]
        for _, cell in every:
            row += [_number(ratio(cell, name, methods.LORA)), _number(_replayed(cell, name, "ratio_to_lora"))]
        rows.append(row)
    rows.append([f"**{methods.EXACT} / {methods.FLOOR}**"])
    for _, cell in every:
        over = cell["methods"][methods.EXACT]["ratio_to_gemms"]["median"]
        rows[-1] += [_number(over), _number(_replayed(cell, methods.EXACT, "ratio_to_gemms"))]
    content = found["layer"]
    versions = ", ".join(f"{name} {content['versions'][name]}" for name in ("torch", "triton", "peft"))
    parts = [f"{content['device']}, {versions}; JSON in `results/bench/{GPU}/`.", _table(head, rows)]
    return "\n\n".join([*parts, *filter(None, [step(found)])])


def _replayed(cell: Mapping[str, Any], name: str, what: str) -> float | None:
    return cell["methods"].get(name, {}).get("graph", {}).get(what, {}).get("median")


def quality(results: Results) -> str | None:
    """Held-out loss by step of the runs of benchmarks/quality.py, one row a setting, seeds side by side."""
    runs = results.get(QUALITY, {}).get("runs", [])
    if not runs:
        return None
    steps = sorted({int(step) for run in runs for step in run["eval_loss"]})
    rows = []
    for name in _unique(run["setting"] for run in runs):
        of_name = [run for run in runs if run["setting"] == name]
        losses = [" / ".join(f"{run['eval_loss'][str(step)]:.4f}" for run in of_name) for step in steps]
        rows.append([name, ", ".join(str(run["seed"]) for run in of_name), *losses])
    return _table(["setting", "seeds", *(f"loss after {step} steps" for step in steps)], rows)


def summary(results: Results) -> str | None:
    """One paragraph: the widest fp32 layer at 2048 tokens and the plain step."""
    wide = [cell for _, cell in cells(results, "layer") if cell["cell"]["dtype"] == "float32"]
    wide = [cell for cell in wide if cell["cell"]["tokens"] == 2048 and cell["cell"]["rank"] == 16]
    if not wide:
        return None
    cell = max(wide, key=lambda cell: cell["cell"]["width"])
    width = cell["cell"]["width"]
    text = [
        f"Time of one layer, forward and backward, relative to PEFT's LoRA at equal parameters ({width} x {width}, 2048 "
        f"tokens, fp32, {_device(results['layer'])}, [JSON](../results/bench/layer.json)): {_list(cell)}."
    ]
    plain = [c for w, c in cells(results, "step") if w == "fp32"]
    if plain:
        text.append(
            f"A training step of SmolLM2-135M, all linear layers ([JSON](../results/bench/step.json)): {_list(plain[0])}."
        )
    on_gpu = [cell for _, cell in cells(results.get(GPU, {}), "layer") if cell["cell"]["tokens"] in (4096, 8192)]
    for cell in on_gpu:
        key, device = cell["cell"], results[GPU]["layer"]["device"]
        text.append(
            f"On a GPU ({key['width']} x {key['width']}, {key['tokens']} tokens, bf16, {device}, "
            f"[JSON](../results/bench/{GPU}/layer.json)): {_list(cell)}."
        )
    return "\n".join(text)


def _list(cell: Mapping[str, Any]) -> str:
    shown_ = {
        methods.EXACT: "Dual LoRA",
        methods.FLOOR: "its three bare products",
        methods.sampled(0.25): "with a quarter of the tokens in its gradient",
        methods.PLAIN: "plain autograd of the formula",
        methods.DORA: "PEFT's DoRA",
        methods.LORA_OWN: "PEFT's LoRA with its factors in bf16",
        methods.FAST_DORA: "the same DoRA after `fast_dora`",
        methods.HIRA: "PEFT's HiRA",
    }
    found = {text: ratio(cell, name, methods.LORA) for name, text in shown_.items()}
    return ", ".join(f"{text} {value:.2f}" for text, value in found.items() if value is not None)


TABLES: dict[str, Callable[[Results], str | None]] = {
    "machine": machine,
    "targets": targets,
    "layer": layers,
    "step": step,
    "kernel": kernels,
    "merge": merging,
    "gpu": gpu,
    "quality": quality,
    "summary": summary,
}


# -- targets -----------------------------------------------------------------------------------------------------------


Results = Mapping[str, Mapping[str, Any]]  # the name of a benchmark -> the file's content, {} where absent
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
    if "pass" in key:
        return str(key["pass"])
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


def _fast_peft(results: Results) -> Values:
    def only(key: dict) -> bool:
        return (key["dtype"], key["width"], key["tokens"]) == ("float32", 2048, 2048)

    names = {"HiRA": methods.FAST_HIRA, "LoHa": methods.FAST_LOHA}
    return _both(*((name, _over("layer", one, methods.LORA, only)) for name, one in names.items()))(results)


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
    ("`fast_peft`: layer of PEFT's HiRA, LoHa / PEFT LoRA, fp32, 2048 x 2048", 1.5, True, _fast_peft),
    ("host's time of a layer / PEFT LoRA's", 1.2, True, _over("host", methods.EXACT, methods.LORA)),
    ("merge all layers / copy the same weights once", 3, True, _merge),
]


# -- plots -------------------------------------------------------------------------------------------------------------


COLOURS = {
    methods.EXACT: "#D55E00",
    methods.sampled(0.25): "#E69F00",
    methods.PLAIN: "#999999",
    methods.LORA: "#0072B2",
    methods.DORA: "#009E73",
    methods.FAST_DORA: "#56B4E9",
    methods.HIRA: "#CC79A7",
}  # of plots.PALETTE
FLOOR_COLOUR = "#000000"


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the plots whose results are there."""
    with style.figures() as Figure:
        figures = {
            "bench-layer.svg": _layer_plot(Figure(figsize=(6.6, 2.9), layout="constrained"), results),
            "bench-step.svg": _step_plot(Figure(figsize=(6.6, 3.2), layout="constrained"), results),
        }
        return [style.save(figure, folder / name) for name, figure in figures.items() if figure is not None]


def _layer_plot(figure: Any, results: Results) -> Any:
    """Time over the three products by width, n = 2048, r = 16; one panel a dtype. None without such cells."""
    found = [cell for _, cell in cells(results, "layer") if cell["cell"]["rank"] == 16]
    found = sorted((c for c in found if c["cell"]["tokens"] == 2048), key=lambda cell: cell["cell"]["width"])
    if not found:
        return None
    dtypes = [dtype for dtype in ("float32", "bfloat16") if any(c["cell"]["dtype"] == dtype for c in found)]
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        of = [cell for cell in found if cell["cell"]["dtype"] == dtype]
        for name, color in COLOURS.items():
            points = [(cell["cell"]["width"], ratio(cell, name, methods.FLOOR)) for cell in of]
            points = [(width, value) for width, value in points if value is not None]
            if points:
                bold = 2.2 if name == methods.EXACT else 1.1
                axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=3, linewidth=bold, label=name)
        axes.axhline(1, color=FLOOR_COLOUR, linestyle="--", linewidth=1, label="floor: three GEMMs")
        axes.set(xscale="log", xlabel="width (d = k)", title=f"{dtype}, 2048 tokens")
        axes.set_xticks([cell["cell"]["width"] for cell in of], [str(cell["cell"]["width"]) for cell in of])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("time / time of the three GEMMs")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _step_plot(figure: Any, results: Results) -> Any:
    """Bars of time (fp32, bf16) and of peak memory (fp32) over LoRA's, with the floor of the time as a line."""
    found = {where: cell for where, cell in cells(results, "step") if where in ("fp32", "bf16")}
    if not found:
        return None
    panels: list[tuple[str, dict[str, float], float | None]] = []
    for where, cell in found.items():
        times = {name: ratio(cell, name, methods.LORA) or 0.0 for name in cell["methods"] if name != methods.FLOOR}
        panels.append((f"time / LoRA's, {where}", times, ratio(cell, methods.FLOOR, methods.LORA)))
    for where, cell in found.items():
        peaks = {name: one["peak_ratio_to_lora"] for name, one in cell["methods"].items() if "peak_bytes" in one}
        if peaks:
            peaks.pop(methods.FLOOR, None)
            panels.append((f"peak memory / LoRA's, {where}", peaks, None))
            break
    names = list(dict.fromkeys(name for _, values, _ in panels for name in values))[::-1]
    for axes, (title, values, floor) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        colors = [COLOURS.get(name, "#BBBBBB") for name in names]
        bars = axes.barh(names, [values.get(name, 0.0) for name in names], color=colors)
        axes.bar_label(bars, [f"{values[name]:.2f}" if name in values else "" for name in names], padding=2, fontsize=7)
        if floor is not None:
            axes.axvline(floor, color=FLOOR_COLOUR, linestyle="--", linewidth=1)
            axes.text(floor, len(names) - 0.4, "floor", ha="center", va="bottom", fontsize=7)
        axes.set_title(title, pad=12)
        axes.margins(x=0.15)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/bench"))
    parser.add_argument("--root", type=Path, default=Path(), help="checkout whose README.md and docs/ are filled in")
    parser.add_argument("--no-plots", action="store_true")
    arguments = parser.parse_args()
    report(arguments.results, arguments.root, plots=not arguments.no_plots)


if __name__ == "__main__":
    main()
