"""What the docs show runs as printed, and every file and figure they name exists.

A block follows what its page says in comments before it: ``<!-- not run: WHY -->`` for all of it, ``<!-- not run (PREFIX): WHY -->``
for its lines that begin so, ``<!-- before CODE -->`` for Python that makes what the block takes for granted.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import duallora
from duallora.config.load import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"bash", "bibtex", "diff", "json", "math", "python", "text", "yaml"}


class Block(NamedTuple):
    page: Path
    language: str
    text: str
    before: str  # Python
    not_run: dict[str, str]  # beginning of a line, "" for all -> why


def blocks_of(page: Path) -> list[Block]:
    """The fences of a page, each with the comments that stand directly before it."""
    pattern = r"((?:^<!--.*?-->\n)*)^```(\w*)\n(.*?)^```$"
    blocks = []
    for comments, language, text in re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        before = "".join(re.findall(r"<!-- before\n(.*?)-->", comments, re.DOTALL))
        not_run = dict(re.findall(r"<!-- not run(?: \((.*?)\))?: (.*?) -->", comments))
        blocks.append(Block(page, language, text, before, not_run))
    return blocks


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))  # run by `make notebooks`, and their pages made of that
BLOCKS = [(f"{page.stem}-{number}", block) for page in PAGES for number, block in enumerate(blocks_of(page))]
RUN = [(name, block) for name, block in BLOCKS if "" not in block.not_run and block.page.parent.name != "notebooks"]
PYTHON = [pytest.param(block, id=name) for name, block in RUN if block.language == "python"]
SHELL = [pytest.param(block, id=name) for name, block in RUN if block.language == "bash"]


def commands_of(text: str) -> list[list[str]]:
    """The words of each duallora command of a shell block, those in front of a pipe or a semicolon."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    found = [shlex.split(part, comments=True) for line in lines for part in line.split("; ")]
    return [words[words.index("duallora") :] for words in found if "duallora" in words]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_stands_in_fences_that_name_their_language(page):
    """An indented block has a copy button and no colors, and escapes the tests below."""
    prose = re.sub(r"(?ms)^(```\w*\n.*?^```|<!--.*?-->|::: .*?)$", "", page.read_text(encoding="utf-8"))
    assert re.findall(r"(?m)(?<=\n\n) {4}\S.*", prose.replace("    options:", "")) == []
    assert {block.language for block in blocks_of(page)} <= LANGUAGES


def test_what_is_not_run_says_why_and_the_tests_it_names_exist():
    marks = [why for _, block in BLOCKS for why in block.not_run.values()]
    assert len(marks) == sum(page.read_text(encoding="utf-8").count("<!-- not run") for page in PAGES) > 0
    for name in re.findall(r"tests/[\w/]+(?:\.py)?", " ".join(marks)):
        assert (ROOT / name).exists(), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", PYTHON)
def test_code_blocks_run_as_printed(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    head, *merge = block.text.partition("merged = model.merge_and_unload()\n")
    exec(compile(block.before, "before", "exec"), names)
    exec(compile(head, "docs", "exec"), names)
    if "Trainer(model, TrainingArguments" in head:  # plain PEFT and Trainer: no call of ours but the config
        assert duallora.gate(names["model"]) == 1.0
    exec(compile("".join(merge), "docs", "exec"), names)


@pytest.fixture(scope="module")
def program():
    from duallora.cli.app import app

    return typer.main.get_command(app)


@pytest.mark.parametrize(
    "words", [w for _, b in BLOCKS if b.language == "bash" for w in commands_of(b.text)], ids=" ".join
)
def test_every_command_that_is_shown_has_the_options_it_is_shown_with(words, program):
    name, *words = words
    while isinstance(program, typer.core.TyperGroup):
        name, *words = words
        program = program.commands[name]
    program.make_context(name, words)  # raises where an option is unknown or an argument is missing


# What the docs' commands take for granted: files of the columns that they name.
TABLES = {
    "mine": [{"prompt": f"{a} plus {b} is", "completion": str(a + b)} for a in range(6) for b in range(6)],
    "tickets": [{"question": f"Where is order {n}?", "category": "shipping" if n % 3 else "billing"} for n in range(36)],
    "chats": [{"messages": [{"role": "user", "content": f"{n} plus {n}?"}, {"role": "assistant", "content": f"{n + n}"}]} for n in range(24)],
    "reviews": [{"review": f"a {'good' if n % 2 else 'bad'} film, number {n}", "stars": n % 2} for n in range(36)],
}  # fmt: skip
RUNS = {  # trained once, for the pages to go on from
    "mine": "--data mine.csv",
    "chats": "--data chats.jsonl",
    "tickets": "--data tickets.csv --columns prompt=question,completion=category",
    "reviews": "--model builtin:minilm-l6 --data reviews.csv --columns text=review,label=stars",
}
SHORT = "--set train.max_steps=2 --set data.eval_limit=4"  # of every `duallora train`


@pytest.fixture(scope="session")
def walked(tmp_path_factory, shared_data):
    """A folder with the docs' files and runs, a `duallora` whose training is two steps, and the environment to call it."""
    work = tmp_path_factory.mktemp("docs") / "clone"
    work.mkdir()
    for name, rows in TABLES.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with (work / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    shutil.copy(work / "mine.csv", work / "test.csv")
    new = [{"prompt": "1 plus 9 is", "question": "Where is it?", "review": "a good film"}] * 3
    (work / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
    (work / "new.csv").write_text("prompt,question,review\n" + ",".join(new[0].values()) + "\n")
    (work / "recipe.yaml").write_text(
        "model: {name: builtin:minilm-l6}\ndata: {path: reviews.jsonl, columns: {text: review, label: stars}}\ntrain: {max_steps: 2}\n"
    )
    (work / "grid.yaml").write_text(
        "name: short\nbase: recipe.yaml\nvariants: {lora: {method: lora}, duallora: {r: 4}}\nseeds: [0]\n"
    )
    for name in ("examples", "results"):
        (work / name).symlink_to(ROOT / name)
    (work.parent / "shared").mkdir()
    (work.parent / "shared" / "data").symlink_to(shared_data)
    for block in blocks_of(ROOT / "docs" / "extending.md"):
        if block.language == "python":
            (work / re.match(r'"""(\w+\.py):', block.text)[1]).write_text(block.text)
    program = tmp_path_factory.mktemp("bin") / "duallora"
    program.write_text(
        f'#!/bin/sh\nverb=$1; shift\n[ "$verb" = train ] && set -- {SHORT} "$@"\n'
        f'exec "{sys.executable}" -m duallora "$verb" "$@"\n'
    )
    program.chmod(0o755)
    paths = [str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "PATH": os.pathsep.join(paths), "DUALLORA_DATA": str(shared_data)}
    for name, options in RUNS.items():
        shell(f"duallora train {options} -o runs/{name}", work, environment)
    return work, environment


def shell(script: str, folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(["bash", "-e", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{script}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


@pytest.mark.data
@pytest.mark.pretrained
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not os.environ.get("DUALLORA_SLOW"), reason="minutes: make docs-code")
@pytest.mark.parametrize("block", SHELL)
def test_commands_run_as_printed(block, walked, tmp_path):
    """In a copy of the folder, so that the blocks of a page need no order; those that write runs/mine begin without it."""
    folder, environment = walked
    work = tmp_path / "clone"
    shutil.copytree(folder, work, symlinks=True)
    (tmp_path / "shared").symlink_to(folder.parent / "shared")
    if "-o runs/mine\n" in block.text.replace("  ", "\n").replace(" \n", "\n"):
        shutil.rmtree(work / "runs")
    lines = [line for line in block.text.splitlines(True) if not line.startswith(tuple(block.not_run))]
    shell("".join(lines), work, environment)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_ran_from_top_to_bottom_and_their_pages_hold_what_they_said(path):
    """`make notebooks` runs them; here: nothing failed, nothing tells of the machine, and the page is the notebook's."""
    text = path.read_text(encoding="utf-8")
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(outputs) > 3
    assert [output for output in outputs if output["output_type"] == "error"] == []
    said = json.dumps(outputs)
    assert re.findall(r"/(?:home|root|tmp|usr|work|Users)/|\\u001b|Traceback|Error:", said) == []
    page, images = runpy.run_path(str(ROOT / "tools" / "notebooks.py"))["page"](path)
    folder = ROOT / "docs" / "notebooks"
    assert (folder / f"{path.stem}.md").read_text(encoding="utf-8") == page, "python tools/notebooks.py --pages"
    assert all((folder / name).read_text(encoding="utf-8") == content for name, content in images.items())


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
    for one in facts["cells"]:
        if one["method"] == "duallora":
            assert one["at_chance"] is None, one
            assert (one["value"] < one["chance"]) == (one["metric"] == "loss"), one
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
    here = {"python_version": version}
    pins = [pin for pin in map(Requirement, lines) if not pin.marker or pin.marker.evaluate(here)]
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
    ours = [message for message in quoted if not message.startswith(("KeyError", "TypeError"))]
    assert [message for message in ours if message not in source] == []


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert named == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}


def test_the_page_of_the_api_explains_every_field_as_help_does():
    """A docstring that is put together when it is imported is not what the docs' builder reads."""
    import peft

    from duallora import DualLoraConfig

    of_peft = {field.name for field in dataclasses.fields(peft.PeftConfig)}  # which are others in other releases
    fields = re.findall(r"(?m)^    (\w+): (.*)$", (DualLoraConfig.__doc__ or "").partition("Args:\n")[2])
    assert len(fields) > 30
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").splitlines()
    assert [name for name, words in fields if name not in of_peft and f"* `{name}`: {words}" not in page] == []
