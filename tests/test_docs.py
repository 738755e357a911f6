"""What the docs show runs as printed, and every figure file they name exists.

Python that needs a hub or a running server is fenced as ``py`` and not run here.
"""

from __future__ import annotations

import itertools
import json
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from duallora.config.load import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", BLOCKS)
def test_code_blocks_run_as_printed(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs", "exec"), {"__name__": "__main__"})


def test_trainer_example_opens_the_gate_by_itself(tmp_path, monkeypatch):
    """The ten lines with plain PEFT and Trainer: no call of ours but the config."""
    monkeypatch.chdir(tmp_path)
    block = next(b.values[0] for b in BLOCKS if "Trainer(model" in b.values[0])
    names: dict = {"__name__": "__main__"}
    exec(compile(block.replace("merged = model.merge_and_unload()\n", ""), "docs", "exec"), names)
    import duallora

    assert duallora.gate(names["model"]) == 1.0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_results_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for name in re.findall(r"`(results/[\w/]+\.json)`", text):
        facts = json.loads((ROOT / name).read_text())
        assert facts, name


def test_no_run_of_the_robustness_table_is_at_chance_and_the_page_shows_it():
    """The worst seed decides: of every task, model and method it is on the right side of a constant answer."""
    facts = json.loads((ROOT / "results" / "robustness.json").read_text())
    names = runpy.run_path(str(ROOT / "benchmarks" / "robustness.py"))
    assert names["markdown"](facts["rows"]) in (ROOT / "docs" / "results.md").read_text()
    own = [one for one in facts["cells"] if one["method"] == "duallora"]
    assert [one for one in own if one["at_chance"] is not None] == []
    for one in own:
        better = one["value"] < one["chance"] if one["metric"] == "loss" else one["value"] > one["chance"]
        assert better, one
    defaults = load_recipe(None, data="mine.csv")
    for row in facts["rows"]:
        if row["method"] == "duallora":
            then = {k: v for k, v in row["recipe"]["adapter"].items() if k not in ("options", "gradient_tokens_by")}
            now = defaults.adapter.model_dump()  # which may have gained settings since
            assert then == {name: now[name] for name in then}
            for name in ("learning_rate", "lr_warmup_ratio", "lr_warmup_steps", "batch_size", "optimizer"):
                assert row["recipe"]["train"][name] == getattr(defaults.train, name), (row["task"], name)


def test_every_test_the_support_table_names_exists():
    files = {p.name: p.read_text() for p in (ROOT / "tests").rglob("test_*.py")}
    text = "".join(files.values())
    named = re.findall(r"`(test_\w+)(\.py)?`", (ROOT / "docs" / "support.md").read_text())
    assert named
    for name, is_file in named:
        assert name + is_file in files if is_file else f"def {name}(" in text, name


VERSIONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("version", VERSIONS)
def test_every_python_has_one_pin_for_each_requirement(version):
    """Two that apply contradict each other; tests/install/resolve.py asks an index for the rest of it."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line.split(" #")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    pins = [
        pin for pin in map(Requirement, lines) if not pin.marker or pin.marker.evaluate({"python_version": version})
    ]
    count = Counter(canonicalize_name(pin.name) for pin in pins)
    assert set(count.values()) == {1}, count.most_common(5)
    required = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    names = {canonicalize_name(Requirement(line).name) for line in required} - {project["name"]}
    assert names <= count.keys(), names - count.keys()


def test_readme_names_the_pythons_that_are_resolved_for():
    assert len(VERSIONS) > 1
    assert f"Python {VERSIONS[0]} to {VERSIONS[-1]}" in (ROOT / "README.md").read_text()


def test_the_table_of_faults_is_that_of_its_record():
    record = json.loads((ROOT / "results" / "faults.json").read_text())
    names = runpy.run_path(str(ROOT / "tests" / "faults" / "page.py"))
    assert names["table"](record) in (ROOT / "docs" / "reliability.md").read_text()
    assert record["recipe"]["long"]
    rows = {row["row"]: row for row in record["metrics"]["rows"]}
    assert len(rows) > 20
    assert {name: row["lost"] for name, row in rows.items() if row["lost"]} == {}
    assert all(row["tried"] == row["survived"] + row["lost"] for row in rows.values())


def test_every_message_that_is_explained_is_one_that_is_printed():
    """As the source has it, put together where a line breaks."""
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 10
    assert [message for message in quoted if message not in source and not message.startswith("KeyError")] == []


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert named == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
