"""The docs say what the JSON says: targets judged by the worst cell, tables as they stand in the pages, plots with the floor."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from duallora.bench import methods
from duallora.errors import ConfigError, IntegrityError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "bench"
spec = importlib.util.spec_from_file_location("bench_report", ROOT / "benchmarks" / "report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)


@pytest.fixture
def results() -> dict:
    return report.load(RESULTS)


def cell_of(results: dict, benchmark: str, **key) -> dict:
    return next(cell for cell in results[benchmark]["cells"] if key.items() <= cell["cell"].items())


def slowed(results: dict, benchmark: str, name: str = methods.EXACT, **key) -> dict:
    """The cell of that key, in which the method takes a hundred times as long."""
    cell = cell_of(results, benchmark, **key)
    cell["methods"][name]["median_s"] *= 100
    return cell


def verdict_of(results: dict, words: str):
    (found,) = [verdict for verdict in report.verdicts(results) if words in verdict.what]
    return found


@pytest.mark.parametrize(
    ("words", "benchmark", "name", "over", "where"),
    [
        ("layer, fp32", "layer", methods.EXACT, methods.FLOOR, "2048 x 2048, r 16, fp32"),
        ("layer, bf16", "layer", methods.EXACT, methods.FLOOR, "2048 x 2048, r 16, bf16"),
        ("PEFT DoRA, equal", "layer", methods.EXACT, methods.DORA, "layer, 2048 x 2048, r 16, fp32"),
        ("equal parameters, exact", "step", methods.EXACT, methods.LORA, "fp32"),
        ("`gradient_tokens=0.125`", "step", methods.sampled(0.125), methods.LORA, "fp32"),
        ("`fast_dora`: SmolLM2 step / PEFT DoRA", "step", methods.FAST_DORA, methods.DORA, "fp32"),
        ("host's time", "host", methods.EXACT, methods.LORA, "forward"),
    ],
)
def test_a_target_is_judged_by_its_worst_cell(results, words, benchmark, name, over, where):
    key = (
        {"width": 2048, "tokens": 2048} if benchmark == "layer" else {"pass": "forward"} if benchmark == "host" else {}
    )
    before = verdict_of(results, words)
    cell = slowed(results, benchmark, name, dtype="bfloat16" if "bf16" in where else "float32", **key)["methods"]
    after = verdict_of(results, words)
    assert (after.worst, after.where) == (cell[name]["median_s"] / cell[over]["median_s"], where)
    assert after.cells == before.cells > after.met
    assert f"| {after.worst:.2f} | {where} | **no**" in report.targets(results)


def test_layers_too_small_or_of_another_rank_do_not_count_for_the_floor_but_do_against_rivals(results):
    wide = cell_of(results, "layer", width=1024, tokens=2048, dtype="float32")
    of_rivals = results["layer"]["cells"] = [wide]
    for key in ({"width": 576}, {"tokens": 512}, {"rank": 32}):
        cell = json.loads(json.dumps(wide))
        cell["cell"] |= key
        of_rivals.append(cell)
    before, rival = verdict_of(results, "layer, fp32"), verdict_of(results, "PEFT DoRA, equal")
    cell = slowed(results, "layer", tokens=512)
    assert verdict_of(results, "layer, fp32") == before
    assert verdict_of(results, "PEFT DoRA, equal").where == "layer, 1024 x 512, r 16, fp32"
    cell["methods"][methods.EXACT] = dict(cell["methods"][methods.DORA])
    assert verdict_of(results, "PEFT DoRA, equal").met == rival.met - 1  # as fast is not faster
    results["merge"] = {}
    assert "| <= 3 | - |  | not measured |" in report.targets(results)


def test_cells_off_the_defaults_are_told_apart(results):
    """Two cells under one name would be one, and the worse of them might be the one that vanished."""
    key = cell_of(results, "step", dtype="float32")["cell"]
    others = [{"rank": 16}, {"rows": 4}, {"model": "mine"}, {"masked": True}, {"dtype": "bfloat16"}]
    assert report.words(key) == "fp32"
    assert len({report.words(key), *(report.words({**key, **other}) for other in others)}) == 1 + len(others)
    assert report.words({**key, "rank": 16, "rows": 4}) == "fp32, r 16, 4 x 128 tokens"


def test_marks_are_filled_and_what_is_not_measured_stays(results):
    page = "a\n<!-- bench:layer -->\nold\n<!-- /bench:layer -->\nb\n<!-- bench:merge -->\nold\n<!-- /bench:merge -->\n"
    results["merge"] = {}
    filled = report.fill(page, results)
    assert filled.startswith(f"a\n<!-- bench:layer -->\n{report.layers(results)}\n<!-- /bench:layer -->\nb\n")
    assert filled.endswith("<!-- bench:merge -->\nold\n<!-- /bench:merge -->\n")
    with pytest.raises(ConfigError, match="bench:layre"):
        report.fill("<!-- bench:layre -->\n<!-- /bench:layre -->", results)


def test_no_figure_is_shown_while_a_backend_is_wrong_or_nothing_was_measured(tmp_path):
    with pytest.raises(ConfigError, match="duallora bench layer"):
        report.report(tmp_path, tmp_path)
    content = json.loads((RESULTS / "kernel.json").read_text())
    content["cells"][0]["backends"]["cpu"]["errors"]["dA"] = 2e-6
    (tmp_path / "kernel.json").write_text(json.dumps(content))
    (tmp_path / "README.md").write_text(page := "<!-- bench:summary -->\n<!-- /bench:summary -->\n")
    with pytest.raises(IntegrityError, match="cpu was wrong at 576"):
        report.report(tmp_path, tmp_path)
    assert (tmp_path / "README.md").read_text() == page


def test_the_command_fills_pages_and_draws_the_floor(tmp_path, capsys):
    """As they are committed: it was run after the last measurement, and nobody touched its tables since."""
    pytest.importorskip("matplotlib")
    pages = [page.relative_to(ROOT) for page in report.pages(ROOT)]
    assert {page.name for page in pages} >= {"gpu.md", "performance.md"}
    (tmp_path / "docs").mkdir()
    for page in pages:
        emptied = re.sub(r"(<!-- bench:\w+ -->\n).*?(<!-- /bench)", r"\1\2", (ROOT / page).read_text(), flags=re.S)
        (tmp_path / page).write_text(emptied)
    report.report(RESULTS, tmp_path)
    assert capsys.readouterr().out.count(", target ") == len(report.TARGETS)
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), f"{page}: run benchmarks/report.py"
    for name, label in (("layer", "floor: three GEMMs"), ("step", "floor")):
        drawn = (tmp_path / "docs" / "img" / f"bench-{name}.svg").read_text()
        assert f"img/bench-{name}.svg" in (tmp_path / "docs" / "performance.md").read_text()
        assert f">{label}<" in drawn
        assert "duallora" in drawn
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    report.report(RESULTS, tmp_path)  # once more changes nothing, the plots included
    assert {path: path.read_bytes() for path in before} == before
