"""The page says what the summaries say: values beside the paper's, what is missing, and nothing that a browser would run."""

from __future__ import annotations

import copy
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from study_cells import made_up, run_all, study_of

from duallora import cli, plots
from duallora.errors import ConfigError
from duallora.grid import figures, report, study_plots
from duallora.grid import summary as studies

pytest.importorskip("matplotlib")

PAPER = [
    {"variant": "duallora", "method": "Dual LoRA", "model": "RoBERTa-base", "values": {"cola": 67.8, "stsb": 91.7, "average": 88.3}},
    {"variant": "lora", "method": "LoRA", "model": "RoBERTa-base", "values": {"cola": 63.9, "stsb": 91.1}, "note": "a misprint"},
    {"variant": "galore", "method": "GaLore", "model": "RoBERTa-base", "values": {"cola": 61.8}, "copied": "from another paper", "note": "a misprint"},
]  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One task and seed, since drawing takes its time."""
    folder = run_all(tmp_path_factory.mktemp("small"), study_of("cola", seeds=(0,)), made_up)
    return studies.summarize(folder, rounds=200)


def table(summary, part, printed=()):
    (found,) = (one for one in report.tables(summary, printed) if one.part == part)
    return found


def cells(found, variant):
    (row,) = (row for row in found.rows if row[0].text == variant)
    return dict(zip(found.head, row, strict=True))


class Page(HTMLParser):
    """Collects what the page links and loads, and checks that its elements close."""

    def __init__(self):
        super().__init__()
        self.tags, self.outside, self.text, self.open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open += [tag] if tag != "meta" else []
        self.outside += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value[0] != "#"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def test_the_papers_average_is_that_of_the_columns_shown_and_a_row_without_one_has_none(summary):
    """Its printed average is over eight tasks; over the two shown it is another one."""
    beside = table(summary, "paper", PAPER)
    assert cells(beside, "duallora")["average"].small == "paper 79.8"
    assert cells(beside, "galore")["average"].small == ""
    differences = table(summary, "differences", PAPER)
    assert cells(differences, "lora")["cola"].small.endswith("; paper +3.9")
    assert "paper" not in cells(differences, "dora")["cola"].small
    assert cells(table(summary, "chosen"), "duallora")["cola"].text == "0.01 ▸"  # at the edge of the search


def test_a_study_whose_first_task_alone_has_values_yet_has_the_papers_column_for_it(tmp_path):
    """The grid was stopped when CoLA was done: its column is CoLA, not Matthews."""
    folder = run_all(tmp_path, study_of("cola", "stsb", search={}), lambda cell: 0.7, stop_after=9)
    summary = studies.summarize(folder, rounds=200)
    assert {row["task"] for row in summary["rows"]} == {"cola"}
    beside = table(summary, "paper", PAPER)
    assert (beside.title, cells(beside, "lora")["cola"].small) == ("Beside the paper", "paper 63.9")
    assert "; paper +3.9" in cells(table(summary, "differences", PAPER), "lora")["cola"].small


def test_one_task_shows_all_its_metrics_and_parts_by_the_papers_names(tmp_path):
    study = study_of("commonsense", variants=("lora", "duallora"), search={}, seeds=(0,))
    summary = studies.summarize(run_all(tmp_path, study, lambda cell: 0.7), rounds=200)
    assert table(summary, "metrics").head[-3:] == ["average", "boolq", "piqa"]
    printed = [
        {"variant": "lora", "values": {"boolq": 60, "piqa": 70, "average": 80}},
        {"variant": "duallora", "values": {"boolq": 65, "piqa": 71, "average": 90}},
    ]
    assert cells(table(summary, "paper", printed), "lora")["average"].small == "paper 65.0"
    assert "paper +3.0" in cells(table(summary, "differences", printed), "lora")["commonsense"].small


def test_the_page_is_whole_and_needs_nothing_else(summary):
    """No file, no address; every sentence is on it, and every plot with its words and numbers as data."""
    found = Page()
    text = report.html([summary], {}, "/* plotly */")
    found.feed(text)
    assert found.open == []
    assert found.tags.count("script") == 3  # the numbers, plotly, ours
    assert found.outside == []
    assert "default-src 'none'" in text
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", text)
    words = "".join(found.text)
    for sentence in summary["statement"]:
        assert sentence in words
    (data,) = re.findall(r'<script type="application/json" id="plots">(.*?)</script>', text)
    drawn = json.loads(data)["made-up-mini"]["plots"]
    assert [one["name"] for one in drawn] == ["differences", "tradeoff", "loss", "sensitivity"]
    assert text.count("data-plot=") >= len(drawn)
    (sensitivity,) = (one for one in drawn if one["name"] == "sensitivity")
    for view in sensitivity["views"]:  # DoRA diverged once on each task
        assert [line["variant"] for line in view["lines"] if line["mode"] == "lost"] == ["dora"]


def test_a_base_install_has_the_page_without_plots_and_is_told_what_is_missing(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "plotly", lambda: "")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    studies.save(small, tmp_path / "small.json")
    line = ["report", str(tmp_path / "small.json"), "-o", str(tmp_path / "r.html")]
    assert cli.run(line) == 0
    assert "pip install 'duallora[report]'" in capsys.readouterr().out
    text = (tmp_path / "r.html").read_text()
    assert "pip install &#x27;duallora[report]&#x27;" in text
    assert "<figure" not in text
    assert "<table>" in text
    assert cli.run([*line, "--markdown", str(tmp_path / "r.md")]) == 2
    assert "the plots need matplotlib: pip install 'duallora[report]'\n" in capsys.readouterr().err


def test_without_test_rows_the_table_says_so_and_what_is_no_score_stays_out_of_it(small):
    """Seconds and training losses stand beside the metrics of a run, and more of them is not better."""
    found = copy.deepcopy(small)
    found["tasks"]["cola"]["split"] = "validation"
    for number, row in enumerate(found["rows"]):
        row["every"] |= {name: {"mean": 1.0 + number, "sd": 0.0} for name in ("train_loss", "train_seconds", "loss")}
    made = table(found, "metrics")
    assert made.title == "Metrics on validation rows: there are no test rows"
    assert not {"train_loss", "train_seconds"} & {*made.head}


POINTS = [(1.0, 50.0), (2.0, 60.0), (2.0, 55.0), (3.0, 60.0), (4.0, 58.0), (5.0, 70.0)]


@pytest.mark.parametrize("higher", [True, False])
def test_the_front_holds_exactly_what_no_other_point_beats(higher):
    """By the definition, a pair at a time."""
    points = [(x, {"mean": y if higher else -y, "variant": str(at)}) for at, (x, y) in enumerate(POINTS)]
    front = {row["variant"] for _, row in figures._front(points, higher)}
    beaten = {b for a in POINTS for b in POINTS if a != b and a[0] <= b[0] and a[1] >= b[1]}
    assert front == {str(at) for at, own in enumerate(POINTS) if own not in beaten} == {"0", "1", "5"}


def test_a_window_leaves_out_outliers_alone():
    """A constant has no span to go by."""
    (low, high), outside = figures.window([0.5, 0.52, 0.49, 0.51, 0.5, 0.48, 900.0])
    assert (low < 0.48 < 0.52 < high < 1, outside) == (True, 1)
    assert figures.window([1.0, 2.0, 3.0, 4.0, 5.0]) is figures.window([1.0, 1.0, 1.0, 1.0, 1.0, 2.0]) is None


def drawn(summary):
    """By part, the axes of a picture."""
    with plots.figures() as Figure:
        return {plot.name: plot.figure.axes for plot in study_plots.draw(summary, Figure)}


def on(axes, read):
    """What ``read`` finds in the lines of all axes."""
    return {found for one in axes for line in one.get_lines() for found in read(line)}


def coordinates(line):
    return zip(map(float, line.get_xdata()), line.get_ydata(), strict=True)


def test_a_picture_draws_every_value_that_the_page_does(summary):
    """Two renderers of one description; equal parameters stand side by side in a picture, at their own heights."""
    pictures = drawn(summary)
    for view in (view for plot in figures.figures(summary) for view in plot["views"]):
        lines = [line for line in view["lines"] if line["mode"] in ("lines", "markers")]
        points = {point for line in lines for point in zip(line["x"], line["y"], strict=True)}
        assert len(points) > 1
        if view["part"] == "parameters":
            assert {y for _, y in points} <= on(pictures[view["part"]], lambda line: line.get_ydata())
        else:
            assert points <= on(pictures[view["part"]], coordinates)


def test_points_are_the_means_with_their_intervals_and_hollow_where_no_sign_can_be_told(summary):
    """Means and ends of both intervals, from the summary's pairs."""
    summary = copy.deepcopy(summary)
    summary["pairs"][0]["better"] = "cannot be said"
    assert {pair["better"] for pair in summary["pairs"]} == {"yes", "cannot be said"}
    views = {plot["name"]: plot["views"] for plot in figures.figures(summary)}["differences"]
    for view, task in zip(views, ("cola", "stsb", studies.AVERAGE), strict=True):
        for pair in (pair for pair in summary["pairs"] if pair["task"] == task):
            inner, point = (line for line in view["lines"] if line["variant"] == pair["other"])
            (less, more), (x,) = point["spread"], point["x"]
            assert (x, point["filled"]) == (pair["mean"], pair["better"] == "yes")
            assert [x - less, x + more] == pytest.approx(pair["interval"], abs=1e-12)
            assert inner["x"] == pair["interval_of_models"]
    hollow = on(drawn(summary)["differences"], lambda line: coordinates(line) if line.get_mfc() == plots.GROUND else ())
    assert hollow == {(pair["mean"], pair["other"]) for pair in summary["pairs"] if pair["better"] == "cannot be said"}


def test_sensitivity_has_every_cell_once_with_the_mean_of_the_seeds_that_chose_and_their_choice(summary):
    """Validation rows filled, test rows hollow, and the diverged cell at its rate; later seeds are elsewhere and out of the mean."""
    summary = copy.deepcopy(summary)
    for cell in summary["cells"]:
        cell["metrics"] = {name: value - cell["tags"]["seed"] for name, value in cell.get("metrics", {}).items()}
    for number, row in enumerate(row for row in summary["rows"] if "values" in row):
        row["values"]["train.learning_rate"] = (1e-3, 3e-3)[number % 2]
    views = {plot["name"]: plot["views"] for plot in figures.figures(summary)}["sensitivity"]
    assert [view["part"] for view in views] == ["sensitivity-cola", "sensitivity-stsb"]
    key, metrics = "train.learning_rate", {"cola": "matthews", "stsb": "pearson"}
    for view, (task, metric) in zip(views, metrics.items(), strict=True):
        for variant in summary["study"]["variants"]:
            cells = [c for c in summary["cells"] if (c["tags"]["task"], c["tags"]["variant"]) == (task, variant)]
            own = [line for line in view["lines"] if line["variant"] == variant]
            for filled, split in ((True, "metrics"), (False, "test")):
                (line,) = (line for line in own if line.get("filled") is filled)
                there = [(c["tags"][key], c[split][metric]) for c in cells if c["status"] == "done"]
                assert [*zip(line["x"], line["y"], strict=True)] == there
            searched = {c["tags"][key]: c["metrics"][metric] for c in cells if c["tags"]["seed"] == 0 and c["metrics"]}
            (line,) = (line for line in own if line["mode"] == "lines")
            assert dict(zip(line["x"], line["y"], strict=True)) == pytest.approx(searched)
            (line,) = (line for line in own if line["mode"] == "chosen")
            (row,) = (r for r in summary["rows"] if (r["task"], r["variant"]) == (task, variant))
            assert line["x"] == [row["values"][key]]
            lost = [c["tags"][key] for c in cells if c["status"] == "diverged"]
            assert [line["x"] for line in own if line["mode"] == "lost"] == ([lost] if lost else [])


@pytest.mark.parametrize("reference", ["r-2", "lora"])
def test_a_varied_number_is_the_axis_and_others_are_dashed_at_their_means(tmp_path, reference):
    variants = {f"r-{r}": {"adapter.r": r} for r in (8, 2, 4)} | {"lora": {"adapter.method": "lora", "adapter.r": 4}}
    study = study_of("cola", variants=variants, search={}, seeds=(0,), reference=reference)
    found = studies.summarize(run_all(tmp_path, study, lambda cell: 0.7 + 0.02 * len(cell.name)), rounds=200)
    means = {row["variant"]: row["mean"] for row in found["rows"]}
    (view,) = {plot["name"]: plot["views"] for plot in figures.figures(found)}["settings"]
    mean, *points, other = view["lines"]
    assert (mean["x"], mean["y"]) == ([2, 4, 8], [means[f"r-{r}"] for r in (2, 4, 8)])
    assert [(line["x"], line["y"]) for line in points] == [([r], [means[f"r-{r}"]]) for r in (2, 4, 8)]
    assert (other["variant"], other["dash"], other["y"]) == ("lora", True, [means["lora"]] * 2)
    assert {*zip(mean["x"], mean["y"], strict=True)} <= on(drawn(found)["settings"], coordinates)


def test_two_searched_keys_have_a_view_and_an_axis_each(summary):
    """A rate and a scale on one axis would say nothing."""
    found = copy.deepcopy(summary)
    found["study"]["variants"]["lora"]["search"] = {"adapter.alpha": [4, 8]}
    for number, cell in enumerate(cell for cell in found["cells"] if cell["tags"]["variant"] == "lora"):
        cell["tags"]["adapter.alpha"] = 4 + 4 * (number % 2)
    views = {plot["name"]: plot["views"] for plot in figures.figures(found)}["sensitivity"]
    by_key = {(view["part"], view["x"]): {line["variant"] for line in view["lines"]} for view in views}
    both = {"alpha": {"lora"}, "learning rate": {"duallora", "dora"}}
    assert by_key == {(f"sensitivity-{task}", key): own for task in ("cola", "stsb") for key, own in both.items()}
    assert len(drawn(found)["sensitivity-cola"]) == 3


def test_labels_cannot_leave_their_element(small):
    """Names and notes come from files that others wrote."""
    evil = json.loads(json.dumps(small).replace("made-up", "<script>alert(1)</script>"))
    evil["statement"][0] = "<img src=x>"
    text = report.html([evil], {evil["name"]: [{**PAPER[0], "note": "<b>note</b>"}]}, "/* plotly */")
    assert text.count("<script") == 3  # the page's own
    assert "<img" not in text
    assert "<b>" not in text


def test_a_new_page_holds_every_part_and_its_plots_lie_beside_it(small, tmp_path):
    """Diverged runs, of DoRA once, are crosses in the plot of the search and nowhere else."""
    report.report([small], tmp_path / "r.html", markdown=tmp_path / "r.md", printed={"made-up": PAPER})
    text = (tmp_path / "r.md").read_text()
    parts = ["provenance", "statement", "metrics", "paper", "differences", "chosen", "plots"]
    assert [match["part"] for match in report.MARK.finditer(text)] == parts
    drawn = {path.name: path.read_text().lower() for path in (tmp_path / "img").iterdir()}
    assert drawn.keys() == set(re.findall(r"\]\(img/([^)]+)\)", text))
    crosses = {name for name, plot in drawn.items() if "stroke: #c62828" in plot}
    assert crosses == {"study-made-up-sensitivity-cola.svg"}


def test_prose_around_marks_and_marks_of_other_studies_stay(small, tmp_path):
    mine = tmp_path / "mine.md"
    mine.write_text(
        "# My words\n<!-- study:made-up:metrics -->\nold\n<!-- /study:made-up:metrics -->\nMore.\n"
        "<!-- study:other-mini:metrics -->\nkept\n<!-- /study:other-mini:metrics -->\n"
    )
    report.report([small], tmp_path / "r.html", markdown=mine)
    text = mine.read_text()
    assert text.startswith("# My words\n")
    assert [part in text for part in ("\nMore.\n", "\nkept\n", "\nold\n")] == [True, True, False]
    assert "| duallora |" in text.replace("**", "")
    assert not (tmp_path / "img").exists()  # no plot was asked for
    report.report([small], tmp_path / "r.html", markdown=mine)
    assert mine.read_text() == text


def test_a_file_without_marks_is_left_alone_and_two_results_of_one_name_are_refused(small, tmp_path):
    mine = tmp_path / "mine.md"
    mine.write_text("# My words\n")
    with pytest.raises(ConfigError, match="has no mark of these studies, such as <!-- study:made-up:metrics -->"):
        report.report([small], tmp_path / "r.html", markdown=mine)
    assert mine.read_text() == "# My words\n"
    assert not (tmp_path / "r.html").exists()
    with pytest.raises(ConfigError, match="made-up: two results of one name"):
        report.report([small, small], tmp_path / "r.html")
    mine.write_text("<!-- study:made-up:metrcs -->\n<!-- /study:made-up:metrcs -->\n")
    with pytest.raises(ConfigError, match="no part 'metrcs': expected one of metrics, "):
        report.report([small], tmp_path / "r.html", markdown=mine)


def test_the_command_reads_files_and_running_grids(tmp_path, capsys, monkeypatch):
    """Half a grid is shown as half a grid."""
    monkeypatch.chdir(tmp_path)
    folder = run_all(tmp_path / "grids" / "half", study_of("cola"), made_up, stop_after=4)
    assert cli.run(["report", str(folder), "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    assert payload["studies"] == [{"name": "made-up", "done": 4, "wanted": 11}]
    text = (tmp_path / "report.html").read_text()
    assert "4 of 11 cells" in text
    assert "Not finished: 4 of the 11 cells" in text
    assert "What the paper prints" not in text
    assert cli.run(["report", str(tmp_path / "absent")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_pages_of_the_papers_tables_say_what_the_committed_studies_say(tmp_path, capsys):
    """Every table and every plot, to the byte; matplotlib's version stands in a plot, and another one draws another path."""
    import matplotlib

    committed = Path(__file__).resolve().parents[2] / "docs" / "reproduction"
    every = [*committed.parents[1].glob("*.md"), *committed.parent.rglob("*.md")]
    assert {page.parent for page in every if report.MARK.search(page.read_text())} == {committed}
    pages = {page.name: page.read_text() for page in committed.glob("*.md")}
    (tmp_path / "again").mkdir()
    for name, text in pages.items():  # nothing is left between the marks
        (tmp_path / "again" / name).write_text(report.MARK.sub(r"\1\4", text))
    results = str(committed.parents[1] / "results" / "studies")
    arguments = ["report", results, "-o", str(tmp_path / "r.html"), "--markdown", str(tmp_path / "again")]
    assert cli.run(arguments) == 0, capsys.readouterr().err
    assert {page.name: page.read_text() for page in (tmp_path / "again").glob("*.md")} == pages
    drawn, there = (
        {plot.name: plot.read_text() for plot in (one / "img").iterdir()} for one in (tmp_path / "again", committed)
    )
    assert drawn.keys() == there.keys()
    same = [name for name, text in there.items() if f"Matplotlib v{matplotlib.__version__}," in text]
    assert {name: drawn[name] == there[name] for name in same} == dict.fromkeys(same, True)


def test_ranks_are_a_table_and_a_plot_where_a_study_has_them(summary):
    row = {"task": "cola", "variant": "duallora", "matrix": "dW", "layers": 2}
    row |= {"rank": 384.0, "rank_float32": 379.4, "effective_rank": 115.6, "largest": 384.0}
    assert "ranks" not in {table.part for table in report.tables(summary)}
    (shown,) = table({**summary, "ranks": [row]}, "ranks").rows
    assert [value.text for value in shown] == ["duallora", "cola", "dW", "379", "384", "116", "384"]


def test_memory_is_a_column_and_a_pareto_plot_and_answers_stand_before_and_after(tmp_path):
    """Of runs that recorded them: the mean peak over seeds in GB, and the first rows' answers, whatever is in them."""
    study = study_of("e2e", variants=("lora", "duallora"), search={}, seeds=(0, 1))
    folder = run_all(tmp_path, study, lambda cell: 0.7)
    for path in folder.glob("cells/*/metrics.json"):
        found, lora = json.loads(path.read_text()), "-lora-" in path.parent.name
        found["metrics"]["train_peak_memory"] = (3 if lora else 5) * 10**9 + 10**8 * int(path.parent.name[-1])
        said = "LoRA's" if lora else "<b>a | b</b>\nnext"
        found["answers"] = [{"prompt": "name[x] |", "expected": "x is", "before": "nothing", "after": said}]
        path.write_text(json.dumps(found))
    summary = studies.summarize(folder, rounds=200)
    own = table(summary, "metrics")
    assert [cells(own, name)["peak GB"].text for name in ("lora", "duallora")] == ["3.05", "5.05"]
    assert not cells(own, "duallora")["peak GB"].kind
    assert any(plot["title"] for plot in figures.figures(summary) if "peak memory in GB" in json.dumps(plot))
    said = table(summary, "answers")
    assert said.head == ["task", "prompt", "expected", "before", "lora", "duallora"]
    texts = ["e2e", "name[x] |", "x is", "nothing", "LoRA's", "<b>a | b</b> next"]
    assert [value.text for value in said.rows[0]] == texts
    assert "&lt;b&gt;a | b&lt;/b&gt; next" in report.html([summary], {})
    assert "name[x] \\|" in report.parts(summary, (), ())["answers"]
