"""Running a study: its cells as processes of this machine or tasks of a Ray cluster, until nothing is left to be run.

What is done is read from the cells' folders, so a grid that was stopped or killed goes on with the same command. A cell
is the program itself, `duallora train -c CELL/recipe.yaml --resume auto -o CELL --json`: beside its folder CELL.log holds
what it says, and CELL.json the line of its last start, which tells why it failed.
"""

from __future__ import annotations

import itertools
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console
from rich.markup import escape

from duallora.config.recipe import fingerprint
from duallora.errors import ConfigError, GridError, Interrupted, LockedError, LostProcessError, OutOfMemoryError
from duallora.grid.live import Show
from duallora.grid.pools import POLL, Cluster, Local, Pool
from duallora.grid.study import CELLS, STUDY, Cell, Outcome, Study, cell_folder, outcome, outcomes
from duallora.store.checkpoint import drift
from duallora.store.lock import locked
from duallora.store.record import read_json, write_text
from duallora.store.run_folder import RunFolder
from duallora.train.launch import Stopping

Keep = Literal["none", "best", "all"]
PROGRAM = ("-m", "duallora.cli")
KEEPS = get_args(Keep)
LOST = {  # exit codes after which another try may do
    OutOfMemoryError.exit_code: OutOfMemoryError.kind,
    LostProcessError.exit_code: "one of its processes is gone",
    130: "ended by SIGINT",
    137: "ended by SIGKILL",
    143: "ended by SIGTERM",
}
LOCK_EVERY = 5.0  # seconds between tries of a cell whose folder a process of an earlier grid still holds
LOCK_TRIES = 120


def run(
    study: Study,
    folder: Path | str,
    *,
    workers: int = 1,
    ray: str | None = None,
    console: Console | None = None,
    retries: int = 1,
    keep: Keep = "best",
    reuse: Sequence[Path | str] = (),
) -> dict[str, Outcome]:
    """Runs what ``study`` wants and ``folder`` has not got, and returns the outcome of every cell by name.

    A cell that fails for good is among them with status "failed" and the reason as ``error``; the others go on. One that
    diverged (NaN) is an outcome like any other. A failed one is tried again the next time.

    Args:
        workers: cells at once; each has its share of the cores as threads unless OMP_NUM_THREADS is set, and one GPU of
            its own where there are some.
        ray: address of a Ray cluster that sees ``folder``, or "local" for one of this machine.
        retries: how often a cell that was killed, or ran out of memory, is tried again.
        keep: whose adapters stay: those of no cell, of the best search value's cells, of all. Checkpoints stay with
            "all" alone; records, logs and predictions always.
        reuse: folders of other studies. A finished run there with the same recipe is copied and not run again; so the
            method itself is trained once for all the tables it is a row of.

    Raises:
        ConfigError: the folder is not a study's, a cell in it was run with other settings, or one of ``reuse`` is no study's.
        LockedError: another grid works in it.
        Interrupted: SIGINT or SIGTERM came; the running cells have saved checkpoints.
    """
    if keep not in KEEPS:
        raise ConfigError(f"keep={keep!r}: expected {', '.join(KEEPS)}")
    if workers < 1 or retries < 0:
        raise ConfigError(f"workers={workers}, retries={retries}: expected a worker at least and no negative number")
    folder, console = Path(folder), console or Console()
    with ExitStack() as held:
        held.enter_context(study_folder(folder))
        found = outcomes(folder)
        refuse_drift(study.wanted(found), found)
        write_text(folder / STUDY, study.yaml())
        (folder / CELLS).mkdir(exist_ok=True)
        pool: Pool = Local(workers) if ray is None else Cluster(ray, workers)
        held.callback(pool.close)
        stopping = held.enter_context(Stopping(noted=True))
        show = held.enter_context(Show(console, study, folder, workers, dict(found)))
        return _Grid(study, folder, found, pool, stopping, show, retries, keep, _finished(reuse)).go()


@contextmanager
def study_folder(folder: Path) -> Iterator[None]:
    """Holds a folder that is a study's, or empty.

    Raises:
        ConfigError: it is neither.
        LockedError: another process works in it.
    """
    if folder.is_dir() and not (folder / STUDY).exists() and any(entry.name != ".lock" for entry in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no {STUDY}; choose another folder with -o")
    with locked(folder, STUDY):
        yield


def require_all(found: Mapping[str, Outcome], folder: Path | str) -> None:
    """GridError if cells have failed for good, with the reason of each."""
    failed = {name: item.error for name, item in found.items() if item.status == "failed" and not item.diverged}
    if failed:
        lines = "".join(f"\n  {name}: {error}" for name, error in failed.items())
        raise GridError(
            f"{len(failed)} of {len(found)} cells failed:{lines}\nThe same command tries these again, and these alone. "
            f"What they said is in {Path(folder) / CELLS}/NAME.log"
        )


@dataclass
class _Grid:
    """What a grid knows while it runs, beyond what lies on disk."""

    study: Study
    folder: Path
    outcomes: dict[str, Outcome]
    pool: Pool
    stopping: Stopping
    show: Show
    retries: int
    keep: Keep
    elsewhere: Mapping[str, Path]
    running: dict[str, Cell] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # given up, with the reason
    tries: Counter[str] = field(default_factory=Counter)
    waits: dict[str, float] = field(default_factory=dict)  # until when a cell in a locked folder is left alone
    lock_tries: Counter[str] = field(default_factory=Counter)
    told = False  # the cells, to stop

    def go(self) -> dict[str, Outcome]:
        self._tidy()
        wanted = self._wanted()
        while True:
            waiting = [cell for cell in wanted if self._may_run(cell)]
            ready = [cell for cell in waiting if self.waits.get(cell.name, 0.0) <= time.monotonic()]
            if self.stopping.number is None:
                while ready and self.pool.free():
                    self._start(ready.pop(0))
            elif self.running:
                self._stop()
            if not self.running and (not waiting or self.stopping.number is not None):
                break
            ended = self.pool.ended()
            for name, code in ended:
                self._end(self.running.pop(name), code)
            if ended:
                self._tidy()
                wanted = self._wanted()
            self.show.update(wanted, self.outcomes, self.running, self.failed)
            if not ended:
                time.sleep(POLL)
        if self.stopping.number is not None:
            done = sum(cell.name in self.outcomes and self.outcomes[cell.name].settled for cell in wanted)
            raise Interrupted(
                self.stopping.number,
                f"stopped with {done} of {self.study.expected(self.outcomes)} cells done; the same command continues",
            )
        self._tidy(ended=True)
        given_up = {name: Outcome(name, "failed", error=reason) for name, reason in self.failed.items()}
        return {cell.name: given_up.get(cell.name) or self.outcomes[cell.name] for cell in wanted}

    def _wanted(self) -> list[Cell]:
        while True:
            wanted = self.study.wanted(self.outcomes)
            refuse_drift(wanted, self.outcomes)
            taken = [cell for cell in wanted if cell.name not in self.outcomes and self._take_over(cell)]
            if not taken:
                return wanted

    def _take_over(self, cell: Cell) -> bool:
        """Whether the cell has been run in another study, whose folder it then is a copy of."""
        if not self.elsewhere or cell.name in self.running or cell.name in self.failed:
            return False
        source = self.elsewhere.get(fingerprint(cell.recipe(self.folder.resolve())))
        if source is None:
            return False
        place = self.folder / CELLS / cell.name
        beside = place.with_name(f".{cell.name}.tmp")
        for rest in (beside, place):  # of a copy cut short; of a cell that was killed before its run.json
            shutil.rmtree(rest, ignore_errors=True)
        RunFolder(source).copy_record(beside)
        beside.rename(place)
        if found := outcome(self.folder, cell.name):
            self.outcomes[cell.name] = found
        self.show.say("reused", f"{cell.name}: {escape(str(source))}")
        return True

    def _may_run(self, cell: Cell) -> bool:
        if cell.name in self.running or cell.name in self.failed:
            return False
        return cell.name not in self.outcomes or not self.outcomes[cell.name].settled

    # -- one cell ------------------------------------------------------------------------------------------------------

    def _start(self, cell: Cell) -> None:
        place = cell_folder(self.folder.resolve(), cell.name)
        place.write_recipe(cell.recipe(self.folder.resolve()))
        log = place.path.with_name(f"{cell.name}.log")
        options = ["-c", str(place.recipe_file), "--resume", "auto", "-o", str(place.path), "--json"]
        self.pool.start(cell.name, [*PROGRAM, "train", *options], log)
        self.running[cell.name] = cell
        self.show.started(cell)

    def _end(self, cell: Cell, code: int) -> None:
        name = cell.name
        now = outcome(self.folder, name)
        if code == 0 or (now is not None and now.diverged):
            if now is None or not now.settled:
                self._give_up(cell, f"it ended well, but its run.json says {now.status if now else 'nothing'}")
                return
            self.outcomes[name] = now
            self.show.settled(cell, now)
            return
        if now is not None:
            self.outcomes[name] = now
        if self.stopping.number is not None:
            return
        if code == LockedError.exit_code and self.lock_tries[name] < LOCK_TRIES:
            if not self.lock_tries[name]:
                self.show.say("waits", f"{name}: a process of an earlier grid still writes to its folder")
            self.lock_tries[name] += 1
            self.waits[name] = time.monotonic() + LOCK_EVERY
        elif (code < 0 or code in LOST) and self.tries[name] < self.retries:
            self.tries[name] += 1
            self.show.say("lost", f"[yellow]{name}: {_how(code)}; tried again, from its last checkpoint[/]")
        else:
            self._give_up(cell, self._reason(name, code))

    def _give_up(self, cell: Cell, reason: str) -> None:
        self.failed[cell.name] = reason
        self.show.gave_up(cell, reason)

    def _reason(self, name: str, code: int) -> str:
        if code < 0 or code in LOST:
            return _how(code) + (f", {self.tries[name] + 1} times" if self.tries[name] else "")
        with suppress(OSError, ValueError, KeyError):  # it may have left no line
            return read_json(self.folder / CELLS / f"{name}.json")["error"]
        return f"exit code {code}"

    def _stop(self) -> None:
        if not self.told:
            self.told = True
            self.show.say(
                "stopping", f"{len(self.running)} running cells save a checkpoint first; once more ends them now"
            )
            self.pool.stop()

    def _tidy(self, *, ended: bool = False) -> None:
        """Deletes the adapters and checkpoints that `keep` does not ask for, and that no later cell starts from."""
        if self.keep == "all":
            return
        study = self.study
        sources = set() if ended else {own["after"] for own in study.tasks.values() if "after" in own}
        for task, variant in itertools.product(study.tasks, study.variants):
            points = study.points(self.outcomes, task, variant)
            scores = [study.score(self.outcomes, task, variant, point) for point in points]
            top = max((score for score in scores if score is not None), default=None)
            for point, score in zip(points, scores, strict=True):
                stay = score in (None, top) and (self.keep == "best" or task in sources)
                for cell in study.cells_at(self.outcomes, task, variant, point):
                    if cell.name in self.outcomes and self.outcomes[cell.name].settled:
                        place = cell_folder(self.folder, cell.name)
                        for part in (place.checkpoints, *(() if stay else place.results())):
                            shutil.rmtree(part, ignore_errors=True)


def _finished(folders: Sequence[Path | str]) -> dict[str, Path]:
    """The settled cells of other studies by the fingerprint of their recipe."""
    found = {}
    for folder in map(Path, folders):
        if not (folder / STUDY).is_file():
            raise ConfigError(f"reuse: {folder} holds no {STUDY}; expected the folder of a grid")
        for name, item in outcomes(folder).items():
            cell = cell_folder(folder, name)
            recipe = (cell.facts() or {}).get("fingerprints", {}).get("recipe")
            if item.settled and recipe is not None:
                found[recipe] = cell.path
    return found


def _how(code: int) -> str:
    """How a cell was lost, in words."""
    return LOST[code] if code in LOST else f"ended by {signal.Signals(-code).name}"


def refuse_drift(cells: Sequence[Cell], found: Mapping[str, Outcome]) -> None:
    """ConfigError where a cell on disk was run with other settings than the study now gives it."""
    for cell in cells:
        before = dict(found[cell.name].recipe) if cell.name in found else {}
        after = cell.recipe().model_dump(mode="json") if before else {}
        if cell.after and before:  # by its name: the folder may have been moved
            earlier = before["adapter"]["init_from"]
            before["adapter"] = {**before["adapter"], "init_from": earlier and Path(earlier).name}
            after["adapter"]["init_from"] = cell.after
        if changed := drift(before, after, free=("output",)):
            raise ConfigError(
                f"the cell {cell.name} was run with other settings than the study now says:\n  "
                + "\n  ".join(changed)
                + f"\nset them back, choose another folder with -o, or remove {CELLS}/{cell.name} to run it again"
            )
