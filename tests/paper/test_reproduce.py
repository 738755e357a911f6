"""The verb `reproduce`: the plan it prints, the commands it names, and a whole table run through it."""

from __future__ import annotations

import json
import re
import shlex
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from duallora import cli
from duallora.config.load import load_recipe
from duallora.errors import ConfigError, GridError
from duallora.grid.study import Outcome, Study
from duallora.paper import ablations, ranks, reproduce, table2
from duallora.paper.variants import methods
from duallora.store.adapters import load_adapter
from duallora.tasks import hold_out, load_task


@pytest.fixture
def cola(tmp_path, monkeypatch) -> Path:
    """A data folder with a CoLA of 40 rows whose label is whether the sentence is short."""
    folder = tmp_path / "data" / "glue" / "CoLA"
    folder.mkdir(parents=True)
    words = ["the cat sat", "the cat sat on the mat and then it slept"]
    for name, count in (("train.tsv", 40), ("dev.tsv", 12)):
        rows = [f"src\t{number % 2}\t\t{words[number % 2]} {number}" for number in range(count)]
        (folder / name).write_text("\n".join(rows) + "\n")
    monkeypatch.setenv("DUALLORA_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small_table(tiny_encoder_folder, monkeypatch) -> None:
    """Table 2's mini scale with a random model of two layers."""
    mini = small("table2", tiny_encoder_folder, [("duallora", 8)], {"train.learning_rate": [1e-3]})
    monkeypatch.setattr(table2, "_mini", lambda: mini)


@pytest.fixture(autouse=True)
def here(monkeypatch) -> None:
    """Cells run in this process; those of their own are the grid's tests' to start."""

    class Here:
        def __init__(self, workers: int):
            self.codes: list[tuple[str, int]] = []

        def free(self) -> bool:
            return not self.codes

        def start(self, name: str, arguments: list[str], log: Path) -> None:
            self.codes.append((name, cli.run(arguments[2:])))

        def ended(self) -> list[tuple[str, int]]:
            ended, self.codes = self.codes, []
            return ended

        def close(self) -> None:
            pass

    monkeypatch.setattr("duallora.grid.run.Local", Here)


def small(name: str, model: Path, rows: list[tuple[str, int]], search: dict) -> Study:
    """A study of a random model on four rows of CoLA."""
    base = {
        "model.name": str(model), "data.max_length": 64, "train.max_steps": 3, "train.batch_size": 4,
        "train.report_to": [], "eval.test": True,
    }  # fmt: skip
    tasks = {"cola": {"data.task": "cola", "data.holdout": 8}}
    variants = methods(rows, ["query", "value"])
    return Study(name, base, tasks, variants, search=search, seeds=(0,), reference=next(iter(variants)))


def run(capsys, *arguments: str) -> dict:
    code = cli.run(["reproduce", *arguments, "--json"])
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == out["exit_code"]
    return out


def test_a_table_ends_with_its_figures_beside_the_paper_and_is_not_run_twice(cola, small_table, capsys):
    """The second time nothing is left to do, and it ends with the same summary."""
    command = ["table2", "--scale", "mini", "-o", "runs/t"]
    first = run(capsys, *command)
    assert first["status"] == "done", first
    done = {path: path.stat().st_mtime_ns for path in Path("runs/t/cells").glob("*/metrics.json")}
    assert [path.parent.name for path in done] == ["cola-duallora-r8-lr0.001-seed0"]
    summary = json.loads(Path("results/studies/table2-mini.json").read_text())
    assert (summary["name"], summary["scale"], summary["wanted"], summary["done"]) == ("table2", "mini", 1, 1)
    assert cli.run(["reproduce", *command]) == 0
    shown = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert json.loads(Path("results/studies/table2-mini.json").read_text())["rows"] == summary["rows"]
    # The paper's CoLA of RoBERTa-base stands beside ours.
    assert re.search(r"duallora-r8 \(Dual LoRA\) +-?\d+\.\d \(paper 67\.8\)", shown)


def test_a_dry_run_writes_nothing_and_its_commands_are_the_cells(cola, small_table, capsys, tmp_path):
    out = run(capsys, "table2", "--scale", "mini", "--dry-run", "-o", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "results").exists()
    assert (out["runs"], len(out["commands"])) == (1, 1)
    parts = [*reproduce.parts("table2", "mini"), *reproduce.parts("table5", "paper")]
    cells = [cell for part in parts for cell in part.first_cells()]
    lines = [*out["commands"], *reproduce.commands(parts[1:])]
    assert len(cells) == 1 + 7 * 5
    for line, cell in zip(lines, cells, strict=True):
        words = shlex.split(line)
        assert words[:2] == ["duallora", "train"]
        overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        assert load_recipe(None, overrides) == cell.recipe()
        assert Path(words[-1]).name == cell.name


def test_the_plan_counts_what_the_study_expects():
    """The runs by task and by variant add up to the grid's own number, and the hours to their sum."""
    chosen = reproduce.parts("table2", "paper", ["study=table2-roberta-base", "variant=lora-r8", "variant=full"])
    planned = reproduce.plan(chosen, "cpu")
    assert planned["runs"] == chosen[0].study.expected({}) == 8 * 2 * (5 + 4)
    lines = planned["studies"][0]["lines"]
    assert planned["hours"] == pytest.approx(sum(line["runs"] * line["hours"] for line in lines))
    assert {line["hours"] > 0 and line["memory"] is None for line in lines} == {True}


def test_a_narrow_terminal_shows_every_figure_of_the_plan():
    """The figures of Table 2's largest tasks, and the rates tried, in 80 columns."""
    only = ["study=table2-roberta-base", "task=mnli", "task=cola", "variant=full", "variant=lora-r8"]
    chosen = reproduce.parts("table2", "paper", only)
    planned = reproduce.plan(chosen, "a100-80gb")
    console = Console(width=80, file=StringIO())
    reproduce.show_plan(console, chosen, planned)
    shown = console.file.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert f"{planned['studies'][0]['lines'][0]['tokens']:,}" in shown
    assert all(rate in "".join(shown.split()) for rate in ("0.000125", "0.0016", "8e-05"))


def test_the_models_after_one_whose_runs_failed_are_run_too(cola, small_table, capsys, monkeypatch):
    """The failed ones are told at the end, with an exit code of their own."""
    ran = []

    def run_study(study, folder, **options):
        ran.append(study.name)
        folder.mkdir(parents=True)
        (folder / "study.yaml").write_text(study.yaml())
        return {"lost": Outcome("lost", "failed", error="MemoryError: too large")} if len(ran) == 1 else {}

    monkeypatch.setattr("duallora.grid.run.run", run_study)
    two = ["table2", "--scale", "paper", "--yes", "--only", "task=cola", "--only", "variant=full", "-o", "runs/t"]
    assert cli.run(["reproduce", *two]) == GridError("").exit_code
    assert ran == ["table2-roberta-base", "table2-roberta-large", "table2-deberta-xxl"]
    assert "lost: MemoryError: too large" in capsys.readouterr().err


def test_the_paper_scale_asks_first(cola, capsys, monkeypatch):
    monkeypatch.setattr("typer.confirm", lambda *args, **kwargs: False)
    few = ["--only", "variant=ste", "--gpu", "cpu"]
    assert cli.run(["reproduce", "table3", "--scale", "paper", *few, "-o", "runs/t3"]) == 2
    assert "--yes" in capsys.readouterr().err
    assert not Path("runs/t3").exists()


def test_a_part_of_a_table_does_not_take_its_place(cola, small_table, capsys, monkeypatch):
    """Its summary stays with the runs, so that a committed one is not overwritten by half of itself."""
    monkeypatch.setattr("duallora.grid.run.run", lambda *args, **kwargs: {})
    Path("runs/t").mkdir(parents=True)
    part = reproduce.parts("table2", "mini", folder=Path("runs/t"))[0]
    Path("runs/t/study.yaml").write_text(part.study.yaml())
    out = run(capsys, "table2", "--scale", "mini", "--only", "task=cola", "-o", "runs/t")
    assert out["summaries"] == {"table2": "runs/t/summary.json"}
    assert not Path("results").exists()


def test_commands_of_a_task_that_waits_say_for_what():
    chosen = reproduce.parts(
        "table2", "paper", ["study=table2-roberta-base", "task=mnli", "task=rte", "variant=lora-r8"]
    )
    lines = reproduce.commands(chosen)
    assert len(lines) == 2 * 5
    assert ["adapter.init_from=" in line and "BEST-OF-MNLI" in line for line in lines] == [False] * 5 + [True] * 5


def test_figure_3_ends_with_the_ranks_of_its_runs(cola, tiny_encoder_folder, monkeypatch, capsys):
    """In the summary: of magnitude, direction, dW and dW on the data; the first query layer's by numpy, from its embeddings."""

    mini = small("figure3", tiny_encoder_folder, [("duallora", 2), ("lora", 4)], {})
    monkeypatch.setattr(ablations, "figure3", lambda scale: mini)
    assert run(capsys, "figure3", "--scale", "mini", "-o", "runs/f")["status"] == "done"
    rows = json.loads(Path("results/studies/figure3-mini.json").read_text())["ranks"]
    found = {(row["variant"], row["matrix"]): row for row in rows}
    matrices = ("magnitude", "direction", "dW", "dW on the data")
    assert found.keys() == {("lora-r4", m) for m in matrices[2:]} | {("duallora-r2", m) for m in matrices}
    assert found["lora-r4", "dW"]["rank"] == 4 >= found["lora-r4", "dW on the data"]["rank"]
    assert 4 < found["duallora-r2", "dW"]["rank"] <= found["duallora-r2", "dW"]["largest"] == 32

    folder = Path("runs/f/cells/cola-duallora-r2-seed0")
    model, tokenizer = load_adapter(folder, "classify")
    body = model.get_base_model()
    texts = [example.texts[0] for example in hold_out(load_task("cola"), 8).splits["validation"]]
    assert all(text in (cola / "data/glue/CoLA/train.tsv").read_text() for text in texts)
    with torch.no_grad():
        X = np.concatenate(
            [body.bert.embeddings(tokenizer(t, return_tensors="pt")["input_ids"])[0].double().numpy() for t in texts]
        )
    layer = body.bert.encoder.layer[0].attention.self.query
    A, B, C, D = (getattr(layer, f"duallora_{n}")["default"].detach().double().numpy() for n in "ABCD")
    dW = np.maximum(B @ A, 0) * np.where(D @ C > 0, 1, -1)
    values, vectors = np.linalg.eigh(X.T @ X / len(X))
    S = np.linalg.svd(dW @ (vectors * np.sqrt(values.clip(0))) @ vectors.T, compute_uv=False)
    first = ranks.on_data(folder)[0]
    assert first["rank_float32"] == (S[0] * 32 * np.finfo(np.float32).eps < S).sum()
    p = S / S.sum()
    assert first["effective_rank"] == pytest.approx(np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()), rel=1e-3)


def test_the_70b_row_fits_cards_of_80_gb_by_one_setting(capsys):
    """In bfloat16 no GPU of 80 GB holds its weights; with a 4-bit base every run fits one, DoRA's too, the largest."""
    one = "--only study=table1-llama3-70b-instruct --only variant=dora-r16 --only variant=duallora-r8"
    line = f"table1 --scale paper {one} --gpu h100 --dry-run --set model.quantization=bnb-4bit"
    packed = run(capsys, *line.split())
    lines = packed["studies"][0]["lines"]
    assert {2 * line["base_parameters"] > 140e9 for line in lines} == {True}
    assert all(35e9 < line["memory"] < 80e9 for line in lines)
    assert all("model.quantization=bnb-4bit" in line for line in packed["commands"])
    with pytest.raises(ConfigError, match=r"expected KEY=VALUE.*did you mean model.quantization"):
        reproduce.parts("table1", "paper", settings=["model.quantisation=bnb-4bit"])
    with pytest.raises(ConfigError, match=r"--set train\.learning_rate: table1-llama-7b has it searched"):
        reproduce.parts("table1", "paper", settings=["train.learning_rate=1e-3"])


def test_only_that_leaves_nothing_names_what_there_is():
    with pytest.raises(ConfigError, match=r"names what is not in table3.*variant: dorefa, ste, xnor"):
        reproduce.parts("table3", "mini", ["variant=lora-r8", "variant=ste"])
    with pytest.raises(ConfigError, match=r"leaves nothing of binding.*task: arithmetic, "):
        reproduce.parts("binding", "mini", ["study=binding-glue", "task=facts"])
    with pytest.raises(ConfigError, match="expected task=NAME"):
        reproduce.parts("table3", "mini", ["cola"])
    with pytest.raises(ConfigError, match="after: 'mnli'"):  # an adapter it would start from
        reproduce.parts("table2", "paper", ["study=table2-roberta-base", "task=rte"])
    with pytest.raises(ConfigError, match="nearest: table2"):
        reproduce.parts("tabel2", "mini")


def test_memory_is_predicted_where_it_is_the_most_of_a_variant_alone(monkeypatch):
    """Table 2's tasks have eight sizes of a step on XXL, of which three are outdone by none; each prediction takes a trace."""
    from duallora.paper import cost

    asked = []

    def memory(recipe, machine):
        asked.append((recipe.model.name, recipe.train.batch_size, recipe.data.max_length))
        return 1e6 * recipe.train.batch_size * recipe.data.max_length

    monkeypatch.setattr(cost, "memory", memory)
    monkeypatch.setattr(cost, "shape", lambda recipe: cost.Shape(10**8, 10**8, 10**7, 10**6))
    chosen = reproduce.parts("table2", "paper", ["variant=lora-r8"])
    found = reproduce.plan(chosen, "h100")
    for part, one in zip(chosen, found["studies"], strict=True):
        every = [memory(cell.recipe(), None) for cell in part.first_cells()]
        told = [line["memory"] for line in one["lines"] if line["memory"] is not None]
        assert max(told) == max(every)
        sizes = {(cell.recipe().train.batch_size, cell.recipe().data.max_length) for cell in part.first_cells()}
        best = {s for s in sizes if not any(o != s and o[0] >= s[0] and o[1] >= s[1] for o in sizes)}
        assert len(set(told)) == len({rows * length for rows, length in best})
        assert len(best) < len(sizes)
