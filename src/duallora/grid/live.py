"""What a grid shows while it works: a table that redraws in a terminal, a line for each event elsewhere."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
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
        study, done = self.study, sum(outcome.settled for outcome in self.found.values())
        counts = {"task": len(study.tasks), "variant": len(study.variants), "seed": len(study.seeds)}
        size = " x ".join(f"{count} {word}{'s' * (count != 1)}" for word, count in counts.items())
        cells = f"{study.expected(self.found)} cells, {done} done"
        self.say("grid", f"[bold]{escape(study.name)}[/]: {size}, {cells}, in [bold]{shown(self.folder)}[/]")
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
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
        metric = self.study.metric or now.main_metric or "loss"
        values = {"validation": now.metrics.get(metric), "test": now.test.get(metric)}
        told = [f"{split} {metric} {value:.4g}" for split, value in values.items() if isinstance(value, (int, float))]
        self.say("done", f"{cell.name}  {', '.join(told)}  [dim]{clock(took)}[/]")

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
        own = [outcomes[cell.name] for cell in wanted if cell.name in outcomes]
        done, diverged = sum(one.status == "done" for one in own), sum(one.diverged for one in own)
        queued = max(0, self.study.expected(outcomes) - done - diverged - len(running) - len(failed))
        places = {name: progress(cell_folder(self.folder, name)) for name in running}
        counts = [(queued, "queued", "none"), (len(running), "running", "cyan"), (done, "done", "green")]
        counts += [(diverged, "diverged", "yellow"), (len(failed), "failed", "red")]
        shown_counts = [f"[{style}]{n} {word}[/]" for n, word, style in counts if n or word in ("queued", "done")]
        line = f"{', '.join(shown_counts)}  [dim]{self._left(queued, places.values())}[/]"
        if not self.live:
            self.say("cells", line)
            return
        head = Table.grid()
        head.add_column(width=LABEL_WIDTH, style="bold cyan")
        head.add_row("cells", line)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column(" " * LABEL_WIDTH, no_wrap=True)
        for title in ("running", "step", "loss", "time"):
            justify: Any = "left" if title == "running" else "right"
            table.add_column(title, justify=justify, no_wrap=True, overflow="ellipsis")
        for name in list(running)[:ROWS]:
            step, steps, loss = places[name]
            where = "starts" if step is None else f"{step}/{steps}"
            table.add_row("", name, where, "" if loss is None else f"{loss:.3f}", clock(now - self.began[name]))
        if len(running) > ROWS:
            table.add_row("", f"[dim]and {len(running) - ROWS} more[/]")
        self.live.update(Group(head, table, Text("")), refresh=True)

    def _left(self, queued: int, places: Collection[Place]) -> str:
        if not self.took:
            return "--:-- left"
        each = sum(self.took) / len(self.took)
        under_way = sum(1 - (step or 0) / max(steps or 1, 1) for step, steps, _ in places)
        return f"about {clock(each * (queued + under_way) / max(self.workers, len(places)))} left"


def show_best(console: Console, study: Study, found: Mapping[str, Outcome]) -> dict[str, Any]:
    """A line for each task and variant with its best search value; returns those, and the mean metrics there."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("task", "variant", "best", "metric", "validation", "test", "seeds"):
        table.add_column(title, justify="right" if title in ("validation", "test", "seeds") else "left")
    chosen: dict[str, Any] = {}
    for task, variant in itertools.product(study.tasks, study.variants):
        best = study.best(found, task, variant)
        if best is None:
            table.add_row(task, variant, "[yellow]open[/]", "", "", "", "")
            continue
        cells = [found[cell.name] for cell in study.cells_at(found, task, variant, best) if cell.name in found]
        done = [cell for cell in cells if cell.status == "done"]
        metric = study.metric or next((cell.main_metric for cell in done if cell.main_metric), "")
        means = {}
        for split, recorded in (("validation", [c.metrics for c in done]), ("test", [c.test for c in done])):
            if values := [held[metric] for held in recorded if is_number(held.get(metric))]:
                means[split] = sum(values) / len(values)
        chosen.setdefault(task, {})[variant] = {"values": dict(best.values), "metric": metric, **means}
        shown_means = [f"{means[split]:.4g}" if split in means else "" for split in ("validation", "test")]
        point = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in best.values.items())
        table.add_row(task, variant, escape(point), metric, *shown_means, f"{len(done)}/{len(study.seeds)}")
    console.print(table)
    if same := ", ".join(task for task in study.tasks if _chosen_on_test(study, found, task)):
        console.print(
            f"[yellow]{same}: validation and test are the same rows, so the test metrics are those that chose: set "
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
