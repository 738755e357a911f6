"""Summaries of studies as one page: tables beside the paper's numbers, plots, and what the data can and cannot say.

The page is one HTML file that works offline, in light and dark, without scripts. The same tables go into Markdown,
between marks such as ``<!-- study:table2-mini:metrics -->`` and ``<!-- /study:table2-mini:metrics -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from duallora import plots
from duallora.errors import ConfigError
from duallora.grid import study_plots
from duallora.grid.summary import AVERAGE, decimals
from duallora.store import record
from duallora.tasks import metrics

Summary = Mapping[str, Any]
Printed = Mapping[str, Any]

MARK = re.compile(
    r"(<!-- study:(?P<name>[\w.+-]+):(?P<part>[\w-]+) -->\n).*?(<!-- /study:(?P=name):(?P=part) -->)", re.DOTALL
)
NONE = "-"  # nothing measured


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
        ConfigError: matplotlib is absent, two summaries have one name and scale, or what exists of the Markdown has no
            marks of them.
    """
    printed = printed or {}
    keys = [key_of(summary) for summary in summaries]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"{', '.join(twice)}: two results of one name and scale; give one of each")
    if markdown is not None:  # before the page, since a file of the user's may be refused
        pages = _pages(markdown, summaries, printed)
        with plots.figures() as Figure:
            drawn = {key_of(summary): list(study_plots.draw(summary, Figure)) for summary in summaries}
            for path, text in pages.items():
                pages[path] = fill(text, summaries, printed, drawn, path)
            for path, text in pages.items():
                for key, plot in ((key, plot) for key, every in drawn.items() for plot in every):
                    if f"({_image(key, plot.name)})" in text:
                        plots.save(plot.figure, path.parent / _image(key, plot.name))
                record.write_text(path, text)
    record.write_text(out, html(summaries, printed))
    return {
        "report": str(out),
        **({"markdown": str(markdown)} if markdown else {}),
        "studies": [
            {"name": key_of(summary), "done": summary["done"], "wanted": summary["wanted"]} for summary in summaries
        ],
    }


def key_of(summary: Summary) -> str:
    """``table2-mini``: the stem of its file, and its name in marks."""
    return "-".join(filter(None, (summary["name"], summary["scale"])))


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(summary: Summary, printed: Sequence[Printed] = ()) -> list[Table]:
    """Every table of a study that there is something to say in."""
    made = (_metrics(summary), _beside(summary, printed), _differences(summary, printed), _chosen(summary))
    return [table for table in made if table is not None and table.rows]


def _columns(summary: Summary) -> list[tuple[str, str, str]]:
    """(heading, task, metric) of each column: the tasks, or all metrics where there is one task."""
    tasks = list(dict.fromkeys(row["task"] for row in summary["rows"]))
    if len(summary["tasks"]) != 1 or not tasks:  # of several tasks one alone may have values yet
        return [(task, task, "") for task in tasks]
    (task,) = tasks
    main = summary["tasks"][task]["metric"]
    every = dict.fromkeys(name for row in summary["rows"] for name in row["every"])
    others = [
        name
        for name in every
        if name != main and not metrics.find(name).likelihood and not name.startswith("parse_failure_rate_")
    ]
    return [(main, task, "")] + [(name.removeprefix("accuracy_"), task, name) for name in others]


def _digits(summary: Summary, task: str, name: str) -> int:
    return metrics.find(name or summary["tasks"].get(task, {}).get("metric")).digits


def _cell(summary: Summary, row: Mapping[str, Any] | None, task: str, name: str) -> Value | None:
    """Mean and deviation with the interval below; None where nothing was measured."""
    found = row if row is None or not name else row["every"].get(name)
    if found is None or found.get("mean") is None:
        return None
    digits = _digits(summary, task, name)
    spread = f" ± {found['sd']:.{digits}f}" if found.get("sd") is not None else ""
    interval = found.get("interval")
    below = f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}" if interval else ""
    return Value(f"{found['mean']:.{digits}f}{spread}", below)


def _metrics(summary: Summary) -> Table | None:
    """Every variant's metrics and costs; what can be told from the reference is marked."""
    columns = _columns(summary)
    told = {(pair["task"], pair["other"]): pair["better"] for pair in summary["pairs"]}
    best = {column: _best(summary, *column[1:]) for column in columns}
    ratios = any("cpu_ratio" in row for row in summary["rows"])
    rows = []
    for variant in _variants(summary):
        own = {row["task"]: row for row in summary["rows"] if row["variant"] == variant}
        cost = own.get(AVERAGE) or next(iter(own.values()))
        line = [
            Value(variant, kind="reference" if variant == summary["reference"] else ""),
            Value(_count(cost.get("parameters", {}).get("trainable"))),
        ]
        if ratios:
            line.append(Value(f"{cost['cpu_ratio']:.2f}" if "cpu_ratio" in cost else ""))
        for column in columns:
            _, task, name = column
            value = _cell(summary, own.get(task), task, name)
            if value is None:
                line.append(Value(NONE))
                continue
            kind = {"yes": "worse", "no": "better"}.get(told.get((task, variant), ""), "") if not name else ""
            line.append(value._replace(kind=" ".join(filter(None, (kind, "best" if variant in best[column] else "")))))
        rows.append(line)
    head = ["variant", "trained", *(["time / LoRA's"] if ratios else []), *(heading for heading, *_ in columns)]
    caption = (
        f"{_what(summary)}; in small print the 95 % interval over other test rows and other seeds. Bold: the best mean."
    )
    if summary["pairs"]:
        caption += (
            f" ▲ and ▼: better or worse than {summary['reference']}, after Holm's correction; unmarked: cannot be told."
        )
    return Table("metrics", "Metrics", head, rows, caption)


def _what(summary: Summary) -> str:
    splits = {facts.get("split") for facts in summary["tasks"].values()} - {None}
    rows = "validation rows" if splits == {"validation"} else "test rows"
    return f"Mean ± standard deviation over seeds on {rows}, at the value chosen on validation rows"


def _variants(summary: Summary) -> list[str]:
    """Those with a row, in the study's order."""
    there = {row["variant"] for row in summary["rows"]}
    return [variant for variant in summary["study"]["variants"] if variant in there]


def _best(summary: Summary, task: str, name: str) -> set[str]:
    """The variants with the best mean of a column, ties included."""
    means = {}
    for row in summary["rows"]:
        value = (row["every"].get(name, {}) if name else row).get("mean") if row["task"] == task else None
        if value is not None:
            means[row["variant"]] = value
    first = task if task in summary["tasks"] else next(iter(summary["tasks"]))  # the average has its tasks' direction
    higher = metrics.find(name or summary["tasks"][first]["metric"]).higher_is_better
    if higher is None or not means:
        return set()
    end = max if higher else min
    best = {variant for variant, mean in means.items() if mean == end(means.values())}
    return best if len(best) < len(means) else set()


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _beside(summary: Summary, printed: Sequence[Printed]) -> Table | None:
    """Our metrics and the paper's, for every line it prints; the paper's alone where it has other columns."""
    lines = {line["variant"]: line for line in printed}
    if not lines or not summary["rows"]:
        return None
    columns = [
        column for column in _columns(summary) if any(_said(summary, line, column[0]) is not None for line in printed)
    ]
    base = summary["study"]["base"].get("model.name")
    models = ", ".join(dict.fromkeys(line["model"] for line in printed if line.get("model")))
    rows = []
    if columns:
        ours = {(row["variant"], row["task"]): row for row in summary["rows"]}
        for variant in dict.fromkeys([*lines, *_variants(summary)]):
            line = lines.get(variant, {})
            cells = [Value(variant, line.get("method", ""))]
            for heading, task, name in columns:
                value = _cell(summary, ours.get((variant, task)), task, name)
                said = _said(summary, line, heading)
                cells.append(
                    Value(
                        value.text if value else NONE,
                        f"paper {said:.{_digits(summary, task, name)}f}" if said is not None else "",
                    )
                )
            rows.append(cells)
        head = [heading for heading, *_ in columns]
        caption = f"Ours with {base}; small print: the paper's{f' with {models}' if models else ''}. Different models are not comparable."
        if AVERAGE in head:
            caption += " The paper's average is taken here over the columns that are shown."
    else:
        head = list(dict.fromkeys(name for line in printed for name in line["values"]))
        rows = [
            [
                Value(line["variant"], line.get("method", "")),
                *(
                    Value(f"{line['values'][name]:.{metrics.find(name).digits}f}" if name in line["values"] else NONE)
                    for name in head
                ),
            ]
            for line in printed
        ]
        caption = f"The paper's values alone{f', with {models}' if models else ''}: it reports other tasks than are measured here with {base}."
    remarks: dict[str, list[str]] = {}
    for line in printed:
        for text in filter(None, (line.get("copied"), line.get("note"))):
            remarks.setdefault(text, []).append(line["variant"])
    notes = [f"{', '.join(names)}: {text}." for text, names in remarks.items()]
    return Table(
        "paper",
        "Beside the paper" if columns else "What the paper prints",
        ["variant", *head],
        rows,
        " ".join([caption, *notes]),
    )


def _said(summary: Summary, line: Printed, heading: str) -> float | None:
    """The paper's value of a column; its average is that of the other columns, since ours are not always all of its."""
    values = line.get("values", {})
    if len(summary["tasks"]) == 1:  # of a table of tasks, whose columns are tasks
        ((task, facts),) = summary["tasks"].items()
        heading = task if heading == facts["metric"] and heading not in values else heading
    if heading != AVERAGE:
        return values.get(heading)
    others = [
        other
        for other, *_ in _columns(summary)
        if other != AVERAGE and metrics.find(other).higher_is_better is not False
    ]
    if not others or not all(other in values for other in others):
        return None
    return sum(values[other] for other in others) / len(others)


def _differences(summary: Summary, printed: Sequence[Printed]) -> Table | None:
    """The reference minus each other variant: ours with its answer, the paper's below."""
    if not summary["pairs"]:
        return None
    reference = summary["reference"]
    lines = {line["variant"]: line for line in printed}
    tasks = list(dict.fromkeys(pair["task"] for pair in summary["pairs"]))
    single = len(summary["tasks"]) == 1
    rows = []
    for other in _variants(summary):
        own = {pair["task"]: pair for pair in summary["pairs"] if pair["other"] == other}
        if not own:
            continue
        cells = [Value(other)]
        for task in tasks:
            pair = own.get(task)
            if pair is None:
                cells.append(Value(NONE))
                continue
            low, high = pair["interval"]
            digits = decimals(low, high, _digits(summary, task, ""))
            column = summary["tasks"][task]["metric"] if single else task
            mine, its = (_said(summary, lines.get(name, {}), column) for name in (reference, other))
            said = f"; paper {mine - its:+.{digits}f}" if mine is not None and its is not None else ""
            kind = {"yes": "better", "no": "worse"}.get(pair["better"], "")
            cells.append(Value(f"{pair['mean']:+.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}{said}", kind))
        rows.append(cells)
    caption = (
        f"{reference} minus the variant of the line, paired by test row and seed, with the 95 % interval. ▲: {reference} is better, ▼: "
        "worse, after Holm's correction; unmarked: cannot be told."
    )
    if any("paper" in cell.small for row in rows for cell in row):
        caption += " Differences of the paper are those of its printed values."
    return Table("differences", f"{reference} against the others", ["variant", *tasks], rows, caption)


def _chosen(summary: Summary) -> Table | None:
    """The value each variant got on each task, with the number of values tried; ◂ and ▸ mark the ends of what was tried."""
    edges = {(edge["task"], edge["variant"], edge["key"]): edge["end"] for edge in summary["edges"]}
    tasks = list(dict.fromkeys(row["task"] for row in summary["rows"] if row.get("values")))
    rows = []
    for variant in _variants(summary):
        own = {row["task"]: row for row in summary["rows"] if row["variant"] == variant}
        cells = [Value(variant)]
        for task in tasks:
            values = own.get(task, {}).get("values", {})
            parts = []
            for key, value in values.items():
                mark = {"smallest": " ◂", "greatest": " ▸"}.get(edges.get((task, variant, key), ""), "")
                name = "" if len(values) == 1 else f"{key.rpartition('.')[2]} "
                parts.append(f"{name}{value:g}{mark}" if isinstance(value, (int, float)) else f"{name}{value}")
            cells.append(Value(", ".join(parts) or NONE))
        rows.append(cells)
    keys = {key for row in summary["rows"] for key in row.get("values", {})}
    if not tasks:
        return None
    caption = f"{', '.join(sorted(keys))}, chosen on validation rows. ◂ and ▸: the smallest or the greatest value that was tried."
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
    known = {
        key_of(summary): parts(summary, printed.get(summary["name"], ()), drawn[key_of(summary)])
        for summary in summaries
    }

    def replace(match: re.Match[str]) -> str:
        if match["name"] not in known:
            return match[0]
        have = known[match["name"]]
        if match["part"] not in have:
            raise ConfigError(
                f"{path}: {match['name']} has no part {match['part']!r}: expected one of {', '.join(have)}"
            )
        return f"{match[1]}{have[match['part']]}\n{match[4]}"

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


def html(summaries: Sequence[Summary], printed: Mapping[str, Sequence[Printed]]) -> str:
    """The whole page."""
    links = "".join(
        f'<a href="#{escape(key_of(summary))}">{escape(key_of(summary))} {_chip(summary)}</a>' for summary in summaries
    )
    with plots.figures(inline=True) as Figure:
        sections = "".join(_section(summary, printed.get(summary["name"], ()), Figure) for summary in summaries)
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Studies</title><style>\n{style}</style></head>\n<body>"
        f"<header><h1>Studies</h1><p>Methods compared under one protocol: the same search, steps, data order and seeds for each; "
        f"values chosen on validation rows, metrics of test rows.</p><nav>{links}</nav></header>\n<main>{sections}</main></body></html>\n"
    )


def _chip(summary: Summary) -> str:
    ran = sum(cell["status"] in ("done", "diverged") for cell in summary["cells"])
    whole = ran == summary["wanted"] and not summary["open"]
    text = f"{ran} cells" if whole else f"{ran} of {summary['wanted']} cells"
    return f'<span class="chip{"" if whole else " partial"}">{text}</span>'


def _section(summary: Summary, printed: Sequence[Printed], Figure: Any) -> str:
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in summary["statement"])
    made = tables(summary, printed)
    first = [_html_table(table) for table in made if table.part in ("metrics", "differences")]
    rest = [_html_table(table) for table in made if table.part not in ("metrics", "differences")]
    drawn = "".join(_html_plot(plot) for plot in study_plots.draw(summary, Figure))
    settings = json.dumps(summary["study"], indent=1, ensure_ascii=False)
    return (
        f'<section id="{escape(key_of(summary))}"><h2>{escape(key_of(summary))} {_chip(summary)}</h2>'
        f'<p class="facts">{escape(_provenance(summary))}</p>'
        f'<div class="statement"><h3>What the data can and cannot say</h3><ul>{sentences}</ul></div>'
        f"{''.join(first)}{drawn}{''.join(rest)}"
        f"<details><summary>The study's settings</summary><pre>{escape(settings)}</pre></details></section>"
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in table.head)
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


def _html_plot(plot: study_plots.Plot) -> str:
    return (
        f'<figure><h3>{escape(plot.title)}</h3><div class="scroll">{plots.svg(plot.figure)}</div>'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )
