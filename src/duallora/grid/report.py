"""Summaries of studies as one page: tables beside the paper's numbers, plots, and what the data can and cannot say.

The page is one HTML file that works offline, in light and dark: tables that sort, and interactive plots where plotly is
installed (`duallora.grid.figures`, report.js). The same tables go into Markdown with plots by matplotlib, between marks such as ``<!-- study:table2-mini:metrics -->`` and ``<!-- /study:table2-mini:metrics -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from duallora import plots
from duallora.config.yaml import yaml_value
from duallora.errors import ConfigError, is_number
from duallora.grid import figures, study_plots
from duallora.grid.summary import AVERAGE, decimals
from duallora.store import record
from duallora.tasks import metrics
from duallora.tasks.metrics import Metric
from duallora.terminal import command

Summary = Mapping[str, Any]
Printed = Mapping[str, Any]

MARK = re.compile(
    r"(<!-- study:(?P<name>[\w.+-]+):(?P<part>[\w-]+) -->\n).*?(<!-- /study:(?P=name):(?P=part) -->)", re.DOTALL
)
NONE = "-"  # nothing measured
PLOTLY = "the plots need plotly: pip install 'duallora[report]'"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"  # of the page


class Value(NamedTuple):
    """A cell of a table: what is read first, what stands below it, and what it is ("best", "better", "worse", "")."""

    text: str
    small: str = ""
    kind: str = ""


class Table(NamedTuple):
    """``part`` is its name in marks."""

    part: str
    title: str
    head: list[str]
    rows: list[list[Value]]
    caption: str = ""


def report(
    summaries: Sequence[Summary],
    out: Path,
    *,
    markdown: Path | None = None,
    printed: Mapping[str, Sequence[Printed]] | None = None,
) -> dict[str, Any]:
    """Writes the page ``out`` and, where asked for, the Markdown file with its plots in ``img/`` beside it.

    Of a folder, every page in it that has marks of these studies is filled.

    ``printed`` holds, by name of a study, the lines the paper prints for it: ``variant``, ``model``, ``values`` by
    column, and ``copied`` and ``note`` where there is something to say of them.

    Raises:
        ConfigError: there is Markdown to write and matplotlib is absent, two summaries have one name and scale, or what exists of the Markdown has no
            marks of them.
    """
    printed = printed or {}
    keys = [key_of(summary) for summary in summaries]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"{', '.join(twice)}: two results of one name and scale; give one of each")
    if markdown is not None:  # before the page, since a file of the user's may be refused
        pages = _pages(markdown, summaries, printed)
        with plots.figures() as Figure:
            drawn = {key_of(summary): _drawn(summary, printed, pages.values(), Figure) for summary in summaries}
            for path, text in pages.items():
                pages[path] = fill(text, summaries, printed, drawn, path)
            for path, text in pages.items():
                for key, plot in ((key, plot) for key, every in drawn.items() for plot in every):
                    if f"({_image(key, plot.name)})" in text:
                        plots.save(plot.figure, path.parent / _image(key, plot.name))
                record.write_text(path, text)
    script = plotly()
    record.write_text(out, html(summaries, printed, script))
    studies = [{"name": key_of(one), "done": one["done"], "wanted": one["wanted"]} for one in summaries]
    told = {"markdown": str(markdown)} if markdown else {}
    return {"report": str(out), "plots": bool(script), **told, "studies": studies}


def key_of(summary: Summary) -> str:
    """``table2-mini``: the stem of its file, and its name in marks."""
    return "-".join(filter(None, (summary["name"], summary["scale"])))


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(summary: Summary, printed: Sequence[Printed] = ()) -> list[Table]:
    """Every table of a study that there is something to say in."""
    own = _Tables(summary, printed)
    made = (own.metrics(), own.beside_the_paper(), own.differences(), own.chosen(), _ranks(summary), own.answers())
    return [table for table in made if table.rows]


def _ranks(summary: Summary) -> Table:
    """Those of Figure 3, of the chosen runs of the first seed."""
    head = ["variant", "task", "matrix", "rank, float32", "rank, float64", "effective rank", "largest"]
    rows = [
        [Value(row["variant"], kind="reference" if row["variant"] == summary["reference"] else ""), Value(row["task"]), Value(row["matrix"])]
        + [Value(f"{row[name]:.0f}") for name in ("rank_float32", "rank", "effective_rank", "largest")]
        for row in summary.get("ranks", ())
    ]  # fmt: skip
    caption = (
        "Means over the adapted layers, of the first seed's chosen run. Ranks at the tolerance of float32 and of float64; effective rank: exp of the "
        "entropy of the singular values. dW on the data is dW C^(1/2), C the second moment of the layer's inputs on held-out rows."
    )
    return Table("ranks", "Ranks", head, rows, caption)


class _Column(NamedTuple):
    """A task, or a metric of the only task; ``metric`` "" is the task's own."""

    heading: str
    task: str
    metric: str = ""


class _Tables:
    """The tables of one summary; ``printed`` is what the paper prints for it."""

    def __init__(self, summary: Summary, printed: Sequence[Printed]):
        self.summary, self.printed, self.reference = summary, printed, summary["reference"]
        self.lines = {line["variant"]: line for line in printed}
        self.rows = {(row["variant"], row["task"]): row for row in summary["rows"]}
        there = {variant for variant, _ in self.rows}
        self.variants = [variant for variant in summary["study"]["variants"] if variant in there]
        tasks = list(dict.fromkeys(task for _, task in self.rows))
        self.columns = [_Column(task, task) for task in tasks]
        if tasks and len(summary["tasks"]) == 1:  # of several tasks one alone may have values yet
            main = summary["tasks"][tasks[0]]["metric"]
            self.columns = [_Column(main, tasks[0])]
            for name in dict.fromkeys(name for row in summary["rows"] for name in row["every"]):
                metric = metrics.find(name)
                failures = bool(metric.group) and not metric.higher_is_better  # answers of a group that say nothing
                if name != main and metrics.is_score(name) and not metric.likelihood and not failures:
                    self.columns.append(_Column(metric.group or name, tasks[0], name))

    def metrics(self) -> Table:
        """Every variant's metrics and costs; what can be told from the reference is marked."""
        told = {(pair["task"], pair["other"]): pair["better"] for pair in self.summary["pairs"]}
        best = {column: self._best(column) for column in self.columns}
        costs = {"time / LoRA's": "cpu_ratio", "peak GB": "peak_memory"}
        costs = {head: name for head, name in costs.items() if any(name in row for row in self.summary["rows"])}
        rows = []
        for variant in self.variants:
            own = [row for (name, _), row in self.rows.items() if name == variant]
            cost = self.rows.get((variant, AVERAGE), own[0])
            trained = cost.get("parameters", {}).get("trainable")
            line = [Value(variant, kind="reference" if variant == self.reference else "")]
            line.append(Value("" if trained is None else f"{trained:,}"))
            line += [Value(f"{cost[name]:.2f}" if name in cost else "") for name in costs.values()]
            for column in self.columns:
                answer = "" if column.metric else told.get((column.task, variant), "")
                kinds = {"yes": "worse", "no": "better"}.get(answer, ""), "best" if variant in best[column] else ""
                value = self._value(variant, column)
                line.append(value._replace(kind=" ".join(filter(None, kinds))) if value.text != NONE else value)
            rows.append(line)
        splits = {facts.get("split") for facts in self.summary["tasks"].values()} - {None}
        caption = (
            f"Mean ± standard deviation over seeds on {'validation' if splits == {'validation'} else 'test'} rows, at the value "
            "chosen on validation rows; in small print the 95 % interval over other test rows and other seeds. Bold: the best mean."
        )
        if self.summary["pairs"]:
            caption += (
                f" ▲ and ▼: better or worse than {self.reference}, after Holm's correction; unmarked: cannot be told."
            )
        head = ["variant", "trained", *costs, *(column.heading for column in self.columns)]
        if "peak GB" in costs:
            caption += " Peak GB: of the GPU's memory; without a GPU of the whole process, Python and torch included."
        title = "Metrics on validation rows: there are no test rows" if splits == {"validation"} else "Metrics"
        return Table("metrics", title, head, rows, caption)

    def _value(self, variant: str, column: _Column) -> Value:
        """Mean and deviation with the interval below."""
        found = self._found(variant, column)
        if found.get("mean") is None:
            return Value(NONE)
        digits = self._metric(column).digits
        spread = f" ± {found['sd']:.{digits}f}" if found.get("sd") is not None else ""
        ends = [f"{end:.{digits}f}" for end in found.get("interval", ())]
        return Value(f"{found['mean']:.{digits}f}{spread}", " to ".join(ends))

    def _found(self, variant: str, column: _Column) -> Mapping[str, Any]:
        """What the summary has of a cell: mean, sd and interval."""
        row = self.rows.get((variant, column.task), {})
        return row.get("every", {}).get(column.metric, {}) if column.metric else row

    def _metric(self, column: _Column) -> Metric:
        """Of a column; the average has its tasks' decimals and direction."""
        tasks = self.summary["tasks"]
        task = next(iter(tasks)) if column.task == AVERAGE and AVERAGE not in tasks else column.task
        return metrics.find(column.metric or tasks.get(task, {}).get("metric"))

    def _best(self, column: _Column) -> set[str]:
        """The variants with the best mean of a column, ties included."""
        found = {variant: self._found(variant, column).get("mean") for variant in self.variants}
        means = {variant: mean for variant, mean in found.items() if mean is not None}
        higher = self._metric(column).higher_is_better
        if higher is None or not means:
            return set()
        top = (max if higher else min)(means.values())
        best = {variant for variant, mean in means.items() if mean == top}
        return best if len(best) < len(means) else set()

    def beside_the_paper(self) -> Table:
        """Our metrics and the paper's, for every line it prints; the paper's alone where it has other columns."""
        columns = [one for one in self.columns if {self._said(line, one.heading) for line in self.printed} - {None}]
        base = self.summary["study"]["base"].get("model.name")
        models = ", ".join(dict.fromkeys(line["model"] for line in self.printed if line.get("model")))
        models = f" with {models}" if models else ""
        rows = []
        for variant in dict.fromkeys([*self.lines, *self.variants]) if self.lines and columns else ():
            line = self.lines.get(variant, {})
            rows.append([Value(variant, line.get("method", ""))])
            for column in columns:
                said = self._said(line, column.heading)
                small = "" if said is None else f"paper {said:.{self._metric(column).digits}f}"
                rows[-1].append(self._value(variant, column)._replace(small=small))
        head, title = [column.heading for column in columns], "Beside the paper"
        caption = f"Ours with {base}; small print: the paper's{models}. Different models are not comparable."
        if AVERAGE in head:
            caption += " The paper's average is taken here over the columns that are shown."
        if not columns and self.rows:
            title = "What the paper prints"
            head = list(dict.fromkeys(name for line in self.printed for name in line["values"]))
            for line in self.printed:
                values = {name: f"{value:.{metrics.find(name).digits}f}" for name, value in line["values"].items()}
                own = [Value(values.get(name, NONE)) for name in head]
                rows.append([Value(line["variant"], line.get("method", "")), *own])
            comma = "," * bool(models)
            caption = (
                f"The paper's values alone{comma}{models}: it reports other tasks than are measured here with {base}."
            )
        remarks: dict[str, list[str]] = {}
        for line in self.printed:
            for text in filter(None, (line.get("copied"), line.get("note"))):
                remarks.setdefault(text, []).append(line["variant"])
        notes = [f"{', '.join(names)}: {text}." for text, names in remarks.items()]
        return Table("paper", title, ["variant", *head], rows, " ".join([caption, *notes]))

    def _said(self, line: Printed, heading: str) -> float | None:
        """The paper's value of a column; its average is that of the other columns, since ours are not always all of its."""
        values = line.get("values", {})
        if len(self.summary["tasks"]) == 1:  # of a table of tasks, whose columns are tasks
            ((task, facts),) = self.summary["tasks"].items()
            heading = task if heading == facts["metric"] and heading not in values else heading
        if heading != AVERAGE:
            return values.get(heading)
        names = [column.heading for column in self.columns if column.heading != AVERAGE]
        others = [name for name in names if metrics.find(name).higher_is_better is not False]
        return sum(values[name] for name in others) / len(others) if others and {*others} <= values.keys() else None

    def differences(self) -> Table:
        """The reference minus each other variant: ours with its answer, the paper's below."""
        pairs = {(pair["other"], pair["task"]): pair for pair in self.summary["pairs"]}
        tasks = list(dict.fromkeys(task for _, task in pairs))
        others = [variant for variant in self.variants if variant in {name for name, _ in pairs}]
        rows = [[Value(other), *(self._difference(pairs.get((other, task))) for task in tasks)] for other in others]
        caption = (
            f"{self.reference} minus the variant of the line, paired by test row and seed, with the 95 % interval. ▲: {self.reference} "
            "is better, ▼: worse, after Holm's correction; unmarked: cannot be told."
        )
        if any("paper" in cell.small for row in rows for cell in row):
            caption += " Differences of the paper are those of its printed values."
        return Table("differences", f"{self.reference} against the others", ["variant", *tasks], rows, caption)

    def _difference(self, pair: Mapping[str, Any] | None) -> Value:
        if pair is None:
            return Value(NONE)
        low, high = pair["interval"]
        digits = decimals(low, high, self._metric(_Column("", pair["task"])).digits)
        column = pair["task"] if len(self.summary["tasks"]) > 1 else self.summary["tasks"][pair["task"]]["metric"]
        mine, its = (self._said(self.lines.get(name, {}), column) for name in (self.reference, pair["other"]))
        said = f"; paper {mine - its:+.{digits}f}" if mine is not None and its is not None else ""
        kind = {"yes": "better", "no": "worse"}.get(pair["better"], "")
        return Value(f"{pair['mean']:+.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}{said}", kind)

    def answers(self) -> Table:
        """To the first validation rows, of the first seed's chosen run, beside those of the untrained model."""
        shown = {key: row["answers"] for key, row in self.rows.items() if row.get("answers")}
        rows = []
        for task in dict.fromkeys(task for _, task in shown):
            own = {variant: found for (variant, name), found in shown.items() if name == task}
            for number, row in enumerate(next(iter(own.values()))):
                after = [own[name][number]["after"] if name in own else NONE for name in self.variants]
                texts = (task, row["prompt"], row["expected"], row.get("before", NONE), *after)
                rows.append([Value(" ".join(text.split())) for text in texts])
        head = ["task", "prompt", "expected", "before", *self.variants]
        caption = (
            "The first validation rows: what is right, what the model said before training, and what it says after it."
        )
        return Table("answers", "Answers before and after", head, rows, caption)

    def chosen(self) -> Table:
        """The value each variant got on each task; ◂ and ▸ mark the ends of what was tried."""
        marks = {"smallest": " ◂", "greatest": " ▸"}
        edges = {(edge["task"], edge["variant"], edge["key"]): marks[edge["end"]] for edge in self.summary["edges"]}
        tasks = list(dict.fromkeys(row["task"] for row in self.summary["rows"] if row.get("values")))
        rows = []
        for variant in self.variants if tasks else ():
            rows.append([Value(variant)])
            for task in tasks:
                values = self.rows.get((variant, task), {}).get("values", {})
                parts = []
                for key, value in values.items():
                    name = "" if len(values) == 1 else f"{key.rpartition('.')[2]} "
                    shown = f"{value:g}{edges.get((task, variant, key), '')}" if is_number(value) else value
                    parts.append(f"{name}{shown}")
                rows[-1].append(Value(", ".join(parts) or NONE))
        keys = ", ".join(sorted({key for row in self.summary["rows"] for key in row.get("values", {})}))
        caption = f"{keys}, chosen on validation rows. ◂ and ▸: the smallest or the greatest value that was tried."
        return Table("chosen", "Chosen values", ["variant", *tasks], rows, caption)


# -- Markdown ---------------------------------------------------------------------------------------------------------


def fill(
    text: str,
    summaries: Sequence[Summary],
    printed: Mapping[str, Sequence[Printed]],
    drawn: Mapping[str, Sequence[study_plots.Plot]],
    path: Path,
) -> str:
    """``text`` of ``path`` with what stands between the marks of these studies made anew; other marks stay as they are.

    ``drawn`` holds the plots of each study by its `key_of`.

    Raises:
        ConfigError: a mark of one of the studies names a part it does not have.
    """
    known = {key_of(one): parts(one, printed.get(one["name"], ()), drawn[key_of(one)]) for one in summaries}

    def replace(match: re.Match[str]) -> str:
        if match["name"] not in known:
            return match[0]
        have, part = known[match["name"]], match["part"]
        if part not in have:
            raise ConfigError(f"{path}: {match['name']} has no part {part!r}: expected one of {', '.join(have)}")
        return f"{match[1]}{have[part]}\n{match[4]}"

    return MARK.sub(replace, text)


def parts(summary: Summary, printed: Sequence[Printed], drawn: Sequence[study_plots.Plot]) -> dict[str, str]:
    """What can stand between marks, as Markdown, by name: tables, sentences, all plots or one as ``plot_NAME``."""
    made = {table.part: f"{_markdown(table)}\n\n{table.caption}" for table in tables(summary, printed)}
    made["statement"] = "\n".join(f"* {sentence}" for sentence in summary["statement"])
    made["provenance"] = _provenance(summary)
    images = {
        f"plot_{plot.name}": f"![{plot.title}]({_image(key_of(summary), plot.name)})\n\n{plot.caption}"
        for plot in drawn
    }
    return {**made, **images, "plots": "\n\n".join(images.values())}


def _drawn(
    summary: Summary, printed: Mapping[str, Sequence[Printed]], texts: Iterable[str], Figure: Any
) -> list[study_plots.Plot]:
    """The plots that ``texts`` have marks for; all of them where a mark asks for all, or for what there is not, to list them."""
    marks = {match["part"] for text in texts for match in MARK.finditer(text) if match["name"] == key_of(summary)}
    single = marks - parts(summary, printed.get(summary["name"], ()), ()).keys()
    drawn = list(study_plots.draw(summary, Figure, single))
    return drawn if "plots" not in marks and len(drawn) == len(single) else list(study_plots.draw(summary, Figure))


def _pages(path: Path, summaries: Sequence[Summary], printed: Mapping[str, Sequence[Printed]]) -> dict[Path, str]:
    """The text of the file, or of a folder's files with marks of these studies; marks alone where there is no file yet."""
    if path.exists():
        files = sorted(path.glob("*.md")) if path.is_dir() else [path]
        texts = {file: file.read_text(encoding="utf-8") for file in files}
        known = set(map(key_of, summaries))
        marked = {f: text for f, text in texts.items() if known & {match["name"] for match in MARK.finditer(text)}}
        if not marked:
            names = ", ".join(f"<!-- study:{key}:metrics -->" for key in sorted(known))
            raise ConfigError(
                f"{path} exists and has no mark of these studies, such as {names}: add marks, or name another file"
            )
        return marked
    sections = ["# Studies\n"]
    for summary in summaries:
        key = key_of(summary)
        sections.append(f"## {key}\n")
        made = [table.part for table in tables(summary, printed.get(summary["name"], ()))]
        for part in ("provenance", "statement", *made, "plots"):
            sections.append(f"<!-- study:{key}:{part} -->\n<!-- /study:{key}:{part} -->\n")
    return {path: "\n".join(sections)}


def _markdown(table: Table) -> str:
    def text(value: Value) -> str:
        mark = {"better": " ▲", "worse": " ▼"}.get(value.kind.split()[0] if value.kind else "", "")
        main = f"**{value.text}**" if {"best", "reference"} & set(value.kind.split()) else value.text
        small = f" ({value.small})" if value.small else ""
        return f"{main}{mark}{small}".replace("|", "\\|")

    lines = [
        table.head,
        ["---", *["---:"] * (len(table.head) - 1)],
        *([text(value) for value in row] for row in table.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _image(key: str, name: str) -> str:
    return f"img/study-{key}-{name}.svg"


def _provenance(summary: Summary) -> str:
    """Code, machine and packages in a line."""
    facts = []
    for key, word in (("commit", "commit "), ("device", ""), ("threads", "threads ")):
        facts.append(word + ", ".join(str(entry["value"])[: 12 if key == "commit" else None] for entry in summary[key]))
    for entry in summary["versions"]:
        facts.append(", ".join(f"{name} {version}" for name, version in (entry["value"] or {}).items() if version))
    return "; ".join(facts) + "."


# -- HTML -------------------------------------------------------------------------------------------------------------


def plotly() -> str:
    """plotly's own JavaScript as its package brings it, "" where that is not installed."""
    found = find_spec("plotly")
    file = Path(found.origin).parent / "package_data" / "plotly.min.js" if found and found.origin else None
    return file.read_text(encoding="utf-8") if file and file.is_file() else ""


def html(summaries: Sequence[Summary], printed: Mapping[str, Sequence[Printed]], plotly: str = "") -> str:
    """The whole page; ``plotly`` is its script, "" for a page without plots, which says so."""
    links, sections, drawn = "", "", {}
    for summary in summaries:
        key, shown = key_of(summary), figures.figures(summary) if plotly else []
        links += f'<a href="#{escape(key)}">{escape(key)} {_chip(summary)}</a>'
        sections += _section(summary, printed.get(summary["name"], ()), shown)
        if plotly:
            drawn[key] = {"inks": figures.inks(summary), "plots": shown}
    style, script = ((Path(__file__).parent / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    data = json.dumps(drawn, ensure_ascii=False).replace("<", "\\u003c")
    missing = "" if plotly else f'<p class="facts">{escape(PLOTLY)}</p>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>Studies</title><style>\n{style}</style></head>\n<body>"
        f"<header><h1>Studies</h1><p>Methods compared under one protocol: the same search, steps, data order and seeds for each; "
        f"values chosen on validation rows, metrics of test rows where there are any.</p>{missing}<nav>{links}</nav></header>\n"
        f'<main>{sections}</main>\n<script type="application/json" id="plots">{data}</script>\n'
        + (f"<script>{plotly}</script>\n" if plotly else "")
        + f"<script>\n{script}</script></body></html>\n"
    )


def _chip(summary: Summary) -> str:
    ran = sum(cell["status"] in ("done", "diverged") for cell in summary["cells"])
    whole = ran == summary["wanted"] and not summary["open"]
    text = f"{ran} cells" if whole else f"{ran} of {summary['wanted']} cells"
    return f'<span class="chip{"" if whole else " partial"}">{text}</span>'


def _section(summary: Summary, printed: Sequence[Printed], drawn: Sequence[Mapping[str, Any]]) -> str:
    key = escape(key_of(summary))
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in summary["statement"])
    made = tables(summary, printed)
    first = [_html_table(table) for table in made if table.part in ("metrics", "differences")]
    rest = [_html_table(table) for table in made if table.part not in ("metrics", "differences")]
    shown = "".join(map(_html_plot, drawn))
    if shown:
        shown = f'<div class="variants" role="group" aria-label="Variants of {key} in the plots"></div>{shown}'
    settings = json.dumps(summary["study"], indent=1, ensure_ascii=False)
    return (
        f'<section id="{key}"><h2>{key} {_chip(summary)}</h2>'
        f'<p class="facts">{escape(_provenance(summary))}</p>'
        f'<div class="statement"><h3>What the data can and cannot say</h3><ul>{sentences}</ul></div>'
        f"{''.join(first)}{shown}{''.join(rest)}{_recipes(summary)}"
        f"<details><summary>The study's settings</summary><pre>{escape(settings)}</pre></details></section>"
    )


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in table.head)
    rows = "".join(f"<tr>{''.join(_html_cells(row))}</tr>" for row in table.rows)
    return (
        f'<h3>{escape(table.title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="caption">{escape(table.caption)}</p>'
    )


def _html_cells(row: Sequence[Value]) -> Iterator[str]:
    for number, value in enumerate(row):
        tag = "td" if number else "th"
        kind = f' class="{value.kind}"' if value.kind else ""
        small = f"<small>{escape(value.small)}</small>" if value.small else ""
        yield f"<{tag}{kind}><span>{escape(value.text)}</span>{small}</{tag}>"


def _html_plot(plot: Mapping[str, Any]) -> str:
    alt = escape(plot["views"][0]["alt"])
    return (
        f'<figure><h3>{escape(plot["title"])}</h3><div class="controls"></div>'
        f'<div class="plot" data-plot="{escape(plot["name"])}" role="img" tabindex="0" aria-label="{alt}">'
        f"<noscript>{alt}</noscript></div><figcaption>{escape(plot['caption'])}</figcaption></figure>"
    )


def _recipes(summary: Summary) -> str:
    """The command of each variant's best value on each task, for the study's first seed."""
    study, lines = summary["study"], []
    for row in summary["rows"]:
        if row["task"] not in study["tasks"] or "values" not in row:
            continue
        layers = (study["base"], study["tasks"][row["task"]], study["variants"][row["variant"]], row["values"])
        own = {key: value for layer in layers for key, value in layer.items() if key not in ("search", "after")}
        seeds = ", ".join(map(str, row.get("seeds", study["seeds"])))
        settings = (word for key, value in own.items() for word in ("--set", f"{key}={yaml_value(value)}"))
        lines.append(f"# {row['task']}, {row['variant']}, seeds {seeds}\n{command('train', *settings)}")
    text = escape("\n\n".join(lines))
    return f"<details><summary>The recipe of each run</summary><pre>{text}</pre></details>" if lines else ""
