"""What a grid shows while it works: a table that redraws in a terminal, a line for each event elsewhere."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from duallora.errors import DualLoraError, is_number
from duallora.grid.study import CELLS, Cell, Outcome, Study, cell_folder
from duallora.store.run_folder import RunFolder
from duallora.terminal import LABEL_WIDTH, clock, say, shown

TABLE_EVERY = 0.5  # seconds between looks at the cells' logs
LINE_EVERY = 60.0  # where there is no terminal to redraw
ROWS = 16  # running cells that the table has room for
TAIL = 4096  # bytes from the end of a log in which its last line lies


class Show:
    """The counts of cells (queued, running, done, failed), where each running one stands, and the time left."""

    def __init__(self, console: Console, study: Study, folder: Path, workers: int, found: Mapping[str, Outcome]):
        self.console, self.study, self.folder, self.workers, self.found = console, study, folder, workers, found
        self.began: dict[str, float] = {}
        self.took: list[float] = []  # seconds of the cells that were done here
        self.drawn = self.spoken = time.monotonic()
        self.live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Show:
        parts = [
            f"{len(group)} {word}{'s' * (len(group) != 1)}"
            for group, word in [
                (self.study.tasks, "task"),
                (self.study.variants, "variant"),
                (self.study.seeds, "seed"),
            ]
        ]
        done = sum(outcome.settled for outcome in self.found.values())
        self.say(
            "grid",
            f"[bold]{escape(self.study.name)}[/]: {' x '.join(parts)}, {self.study.expected(self.found)} cells, {done} done, "
            f"in [bold]{shown(self.folder)}[/]",
        )
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def say(self, label: str, message: str) -> None:
        say(self.console, label, message)

    def started(self, cell: Cell) -> None:
        self.began[cell.name] = time.monotonic()
        if not self.live:
            self.say("starts", cell.name)

    def settled(self, cell: Cell, now: Outcome) -> None:
        took = time.monotonic() - self.began[cell.name]
        if now.diverged:
            self.say("diverged", f"[yellow]{cell.name}[/] ({escape((now.error or '').split(';')[0])})")
            return
        self.took.append(took)
        figure = self._figure(now)
        self.say("done", f"{cell.name}  {figure}  [dim]{clock(took)}[/]")

    def gave_up(self, cell: Cell, reason: str) -> None:
        log = self.folder / CELLS / f"{cell.name}.log"
        self.say("failed", f"[red]{cell.name}: {escape(reason)}[/] [dim](see {shown(log)})[/]")

    def update(
        self,
        wanted: Sequence[Cell],
        outcomes: Mapping[str, Outcome],
        running: Mapping[str, Cell],
        failed: Mapping[str, str],
    ) -> None:
        """Redraws, or says a line, if it is time to."""
        now = time.monotonic()
        if now - self.drawn < TABLE_EVERY if self.live else now - self.spoken < LINE_EVERY:
            return
        self.drawn = self.spoken = now
        done = sum(cell.name in outcomes and outcomes[cell.name].status == "done" for cell in wanted)
        diverged = sum(cell.name in outcomes and outcomes[cell.name].diverged for cell in wanted)
        total = self.study.expected(outcomes)
        queued = max(0, total - done - diverged - len(running) - len(failed))
        places = {name: progress(cell_folder(self.folder, name)) for name in running}
        left = self._left(queued, places.values())
        counts = [(queued, "queued", ""), (len(running), "running", "cyan"), (done, "done", "green")]
        counts += [(diverged, "diverged", "yellow"), (len(failed), "failed", "red")]
        parts = [
            f"[{style}]{count} {word}[/]" if style else f"{count} {word}"
            for count, word, style in counts
            if count or word in ("queued", "done")
        ]
        line = f"{', '.join(parts)}  [dim]{left}[/]"
        if not self.live:
            self.say("cells", line)
            return
        head = Table.grid()
        head.add_column(width=LABEL_WIDTH, style="bold cyan")
        head.add_column()
        head.add_row("cells", line)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column(" " * LABEL_WIDTH, no_wrap=True)
        for title, side in (("running", "left"), ("step", "right"), ("loss", "right"), ("time", "right")):
            table.add_column(title, justify=side, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
        for name in list(running)[:ROWS]:
            step, steps, loss = places[name]
            where = "starts" if step is None else f"{step}/{steps}"
            figure = "" if loss is None else f"{loss:.3f}"
            table.add_row("", name, where, figure, clock(now - self.began[name]))
        if len(running) > ROWS:
            table.add_row("", f"[dim]and {len(running) - ROWS} more[/]")
        self.live.update(Group(head, table, Text("")), refresh=True)

    def _left(self, queued: int, places: Collection[Place]) -> str:
        if not self.took:
            return "--:-- left"
        each = sum(self.took) / len(self.took)
        under_way = sum(1 - (step or 0) / max(steps or 1, 1) for step, steps, _ in places)
        return f"about {clock(each * (queued + under_way) / max(self.workers, len(places)))} left"

    def _figure(self, now: Outcome) -> str:
        metric = self.study.metric or now.main_metric or "loss"
        parts = []
        for split, figures in (("validation", now.metrics), ("test", now.test)):
            if isinstance(figures.get(metric), (int, float)):
                parts.append(f"{split} {metric} {figures[metric]:.4g}")
        return ", ".join(parts)


def show_best(console: Console, study: Study, found: Mapping[str, Outcome]) -> dict[str, Any]:
    """A line for each task and variant with its best search value; returns those, and the mean figures there."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("task", "variant", "best", "metric", "validation", "test", "seeds"):
        table.add_column(title, justify="right" if title in ("validation", "test", "seeds") else "left")
    chosen: dict[str, Any] = {}
    for task in study.tasks:
        for variant in study.variants:
            best = study.best(found, task, variant)
            if best is None:
                table.add_row(task, variant, "[yellow]open[/]", "", "", "", "")
                continue
            cells = [found[cell.name] for cell in study.cells_at(found, task, variant, best) if cell.name in found]
            done = [cell for cell in cells if cell.status == "done"]
            metric = study.metric or next((cell.main_metric for cell in done if cell.main_metric), "")
            means = {}
            for split, figures in (("validation", [c.metrics for c in done]), ("test", [c.test for c in done])):
                values = [held[metric] for held in figures if is_number(held.get(metric))]
                if values:
                    means[split] = sum(values) / len(values)
            chosen.setdefault(task, {})[variant] = {"values": dict(best.values), "metric": metric, **means}
            shown_values = [f"{means[split]:.4g}" if split in means else "" for split in ("validation", "test")]
            point = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in best.values.items())
            table.add_row(task, variant, escape(point), metric, *shown_values, f"{len(done)}/{len(study.seeds)}")
    console.print(table)
    if same := ", ".join(task for task in study.tasks if _chosen_on_test(study, found, task)):
        console.print(
            f"[yellow]{same}: validation and test are the same rows, so the test figures are those that chose: set "
            "data.holdout to choose by held-out training rows[/]",
            soft_wrap=True,
        )
    return chosen


def _chosen_on_test(study: Study, found: Mapping[str, Outcome], task: str) -> bool:
    """Whether a search of this task compared values on the rows that it reports on."""
    return any(
        found[cell.name].same_rows
        for variant in study.variants
        if len(points := study.points(found, task, variant)) > 1
        for cell in study.cells_at(found, task, variant, points[0])
        if cell.name in found
    )


Place = tuple[int | None, int | None, float | None]


def progress(cell: RunFolder) -> Place:
    """(step, steps, loss) of a running cell by its own log; None for what it has not written yet."""
    try:
        run = cell.facts()
    except DualLoraError:
        return None, None, None
    if run is None or run["status"] not in ("running", "done"):  # of an earlier attempt
        return None, None, None
    lines = cell.log.lines(TAIL)
    losses = [line["loss"] for line in lines if isinstance(line.get("loss"), float)]
    return max((line["step"] for line in lines), default=0), run.get("steps"), losses[-1] if losses else None
