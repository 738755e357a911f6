"""The docs say what the JSON says: targets judged by the worst cell, tables as they stand in the pages, plots with the floor."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from duallora.bench import methods
from duallora.errors import ConfigError, IntegrityError

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("bench_report", ROOT / "benchmarks" / "report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)
TARGETS, verdicts, words = report.TARGETS, report.verdicts, report.words
FACTS = {
    "commit": "0123456789abcdef", "dirty": False, "versions": {"torch": "2.13.0", "peft": "0.21.2"},
    "device": "a processor", "threads": 2, "backend": "cpu",
}  # fmt: skip


def timed(times: dict[str, float], **over: str) -> dict:
    """Methods as `figures` gives them, from the seconds of each."""

    def ratios(value: float) -> dict:
        found = {f"ratio_to_{key}": value / times[base] for key, base in over.items()}
        return {key: {"median": r, "quartiles": [r - 0.01, r + 0.01]} for key, r in found.items()}

    return {name: {"median_s": value, "rounds": 3, **ratios(value)} for name, value in times.items()}


def layer_cell(width: int, dtype: str, exact: float, *, tokens: int = 2048, rank: int = 16) -> dict:
    times = {methods.FLOOR: 1.0, methods.LORA: 0.8, methods.DORA: 2.0, methods.HIRA: 3.0, methods.EXACT: exact}
    key = {"width": width, "tokens": tokens, "rank": rank, "dtype": dtype}
    return {"cell": key, "load": 1.5, "methods": timed(times, lora=methods.LORA, gemms=methods.FLOOR), "skipped": {}}


def step_cell(dtype: str, exact: float, *, peak: float | None = 1.0, **key) -> dict:
    times = {methods.FLOOR: 4.4, methods.LORA: 4.0, methods.DORA: 8.0, methods.HIRA: 9.0, methods.EXACT: exact}
    times |= {methods.sampled(0.25): 4.7, methods.sampled(0.125): 4.5, methods.FAST_DORA: 5.0}
    found = timed(times, lora=methods.LORA)
    for name, method in found.items() if peak is not None else ():
        method |= {"peak_bytes": 100 << 20, "peak_ratio_to_lora": peak if name == methods.EXACT else 1.0}
    place = {"model": "builtin:smollm2-135m", "rank": 8, "rows": 8, "length": 128, "dtype": dtype}
    batch = {"tokens": [8, 100], "trained_share": 0.25, "padding_share": 0.125}
    cell = {**place, "checkpointing": False, "masked": False, **key}
    return {"cell": cell, "load": 2.0, "batch": batch, "methods": found}


def kernel_cell(error: float = 2e-7) -> dict:
    one = {"median_s": 0.002, "gflops": 55.0, "ratio_to_memcpy": {"median": 1.5, "quartiles": [1.4, 1.6]}}
    backends = {"cpu": {"errors": {"weight": 4e-8, "dA": error}, "build": one, "gradients": one}}
    key = {"width": 2048, "rank": 16, "dtype": "float32", "dora": False}
    return {"cell": key, "load": None, "backends": backends, "memcpy": {"median_s": 0.001}, "gemm": {"median_s": 0.02}}


def merge_cells() -> list[dict]:
    verbs = {"copy of the weights": 1.0, "duallora: merge": 2.5, "duallora: unmerge": 1.2}
    place = {"model": "builtin:smollm2-135m", "rank": 8, "dtype": "float32"}
    return [{"cell": {**place, "what": "merge"}, "load": 1.0, "methods": timed(verbs, copy="copy of the weights")}]


@pytest.fixture
def results() -> dict:
    layers = [("float32", 1.1, 1024), ("float32", 1.2, 2048), ("bfloat16", 1.25, 1024)]
    steps = [(5.0, 1.0, {}), (5.2, 1.01, {"checkpointing": True}), (4.8, None, {"masked": True})]
    cells = {
        "layer": [layer_cell(width, dtype, exact) for dtype, exact, width in layers],
        "step": [step_cell("float32", exact, peak=peak, **key) for exact, peak, key in steps],
        "kernel": [kernel_cell()],
        "merge": merge_cells(),
    }
    return {name: {**FACTS, "cells": found} for name, found in cells.items()}


def verdict_of(results: dict, words: str):
    (found,) = [verdict for verdict in verdicts(results) if words in verdict.what]
    return found


def test_a_target_is_judged_by_its_worst_cell(results):
    fp32 = verdict_of(results, "layer, fp32")
    assert (fp32.worst, fp32.where, fp32.met, fp32.cells) == (1.2, "2048 x 2048, r 16, fp32", 1, 2)
    assert verdict_of(results, "layer, bf16").met == 1
    exact = verdict_of(results, "equal parameters, exact")
    assert exact.worst == pytest.approx(1.3)
    assert exact.where == "fp32, checkpointing"
    assert verdict_of(results, "`gradient_tokens=0.25`").worst == pytest.approx(4.7 / 4)
    assert verdict_of(results, "`gradient_tokens=0.125`").met == 0  # 4.5 / 4 = 1.125 > 1.10
    assert verdict_of(results, "PEFT DoRA step").worst == pytest.approx(5 / 8)
    assert verdict_of(results, "`fast_dora`: SmolLM2 step / PEFT LoRA").met == 0
    assert verdict_of(results, "peak memory").worst == 1.01
    assert verdict_of(results, "merge all").worst == 2.5


def test_layers_too_small_or_of_another_rank_do_not_count_for_the_floor_but_do_against_rivals(results):
    extra = [
        layer_cell(576, "float32", 2.5),
        layer_cell(1024, "float32", 1.9, tokens=512),
        layer_cell(1024, "float32", 1.8, rank=32),
    ]
    results["layer"]["cells"] += extra
    assert verdict_of(results, "layer, fp32").cells == 2
    rival = verdict_of(results, "PEFT DoRA, equal")
    assert (rival.worst, rival.where, rival.met, rival.cells) == (1.25, "layer, 576 x 2048, r 16, fp32", 8, 9)
    results["layer"]["cells"], results["step"] = [layer_cell(1024, "float32", 2.0)], {}
    assert verdict_of(results, "PEFT DoRA, equal").met == 0  # as fast is not faster


def test_the_table_of_targets_says_no_and_where(results):
    table = report.targets(results)
    assert "| <= 1.15 | 1.20 | 2048 x 2048, r 16, fp32 | **no** (1 of 2 cells) |" in table
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == len(TARGETS) + 2
    results["merge"] = {}
    assert "| <= 3 | - |  | not measured |" in report.targets(results)


def test_cells_off_the_defaults_are_told_apart():
    """Two cells under one name would be one, and the worse of them might be the one that vanished."""
    key = step_cell("float32", 5.0)["cell"]
    others = [{"rank": 16}, {"rows": 4}, {"model": "mine"}, {"masked": True}, {"dtype": "bfloat16"}]
    assert words(key) == "fp32"
    assert len({words(key), *(words({**key, **other}) for other in others)}) == 1 + len(others)
    assert words({**key, "rank": 16, "rows": 4}) == "fp32, r 16, 4 x 128 tokens"


def test_marks_are_filled_and_what_is_not_measured_stays(results):
    page = "a\n<!-- bench:layer -->\nold\n<!-- /bench:layer -->\nb\n<!-- bench:merge -->\nold\n<!-- /bench:merge -->\n"
    results["merge"] = {}
    filled = report.fill(page, results)
    assert filled.startswith(f"a\n<!-- bench:layer -->\n{report.layers(results)}\n<!-- /bench:layer -->\nb\n")
    assert filled.endswith("<!-- bench:merge -->\nold\n<!-- /bench:merge -->\n")
    assert report.fill(filled, results) == filled
    with pytest.raises(ConfigError, match="bench:layre"):
        report.fill("<!-- bench:layre -->\n<!-- /bench:layre -->", results)


def write(results: dict, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, content in results.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_no_figure_is_shown_while_a_backend_is_wrong_or_nothing_was_measured(results, tmp_path):
    with pytest.raises(ConfigError, match="duallora bench layer"):
        report.report(tmp_path, tmp_path)
    results["kernel"]["cells"] = [kernel_cell(error=2e-6)]
    write(results, tmp_path / "results")
    (tmp_path / "README.md").write_text(page := "<!-- bench:summary -->\n<!-- /bench:summary -->\n")
    with pytest.raises(IntegrityError, match="cpu was wrong at 2048"):
        report.report(tmp_path / "results", tmp_path)
    assert (tmp_path / "README.md").read_text() == page


def test_the_command_fills_pages_and_draws_the_floor(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [("bf16-added", 0, 1.5), ("bf16-added", 1, 1.25)]
    results["quality"] = {"runs": [{"setting": name, "seed": n, "eval_loss": {"40": loss}} for name, n, loss in runs]}
    write(results, tmp_path / "results")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "performance.md").write_text((ROOT / "docs" / "performance.md").read_text())
    report.report(tmp_path / "results", tmp_path)
    assert capsys.readouterr().out.count(", target ") == len(TARGETS)
    text = (tmp_path / "docs" / "performance.md").read_text()
    assert "Not measured yet" not in text
    for line in (
        "| 2048 tokens, r = 16 | 1024 fp32 | 2048 fp32 | 1024 bf16 | saved, MiB (2048 fp32) |",
        "| duallora | 1.38 | 1.50 | 1.56 |",  # over LoRA's 0.8
        "| **duallora / three GEMMs** | 1.10 (1.09-1.11) | 1.20 (1.19-1.21) | 1.25 (1.24-1.26) |",
        "| duallora | 1.25 | 1.30 | 1.20 |",
        "| duallora | 100.0 (1.00) | 100.0 (1.01) |",
        "(fp32, masked) 25% of the 8 x 100 tokens carry loss and 12% are padding",
        "| 2048, r 16, fp32, cpu | 2e-07 | 2.00 ms, 55 GFLOP/s | 2.00 ms, 55 GFLOP/s | 1.5 | 0.100 |",
        "| duallora: merge | 2.50 |",
        "| 3 | 1.5 to 1.5 |",
        "| bf16-added | 0, 1 | 1.5000 / 1.2500 |",
    ):
        assert line in text
    for name, label in (("layer", "floor: three GEMMs"), ("step", "floor")):
        drawn = (tmp_path / "docs" / "img" / f"bench-{name}.svg").read_text()
        assert f"img/bench-{name}.svg" in text
        assert f">{label}<" in drawn
        assert "duallora" in drawn
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    report.report(tmp_path / "results", tmp_path)  # once more changes nothing, the plots included
    assert {path: path.read_bytes() for path in before} == before


def test_the_pages_show_what_the_results_say():
    """benchmarks/report.py was run after the last measurement, and nobody touched its tables since."""
    results = report.load(ROOT / "results" / "bench")
    found = report.pages(ROOT)
    assert {page.name for page in found} >= {"gpu.md", "performance.md"}
    for page in found:
        text = page.read_text()
        assert report.fill(text, results) == text, f"{page.name}: run benchmarks/report.py"
