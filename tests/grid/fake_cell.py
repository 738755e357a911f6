"""A cell that trains nothing: it leaves what `duallora train` leaves, and ends as ends.json beside the grid's folder says.

{cell name: [what the first start does, the second, ...]}; the last one repeats, and an absent cell is simply done.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from duallora.errors import LockedError
from duallora.store.lock import locked
from duallora.store.record import write_text
from duallora.store.run_folder import RunFolder
from duallora.train.launch import end_with_parent

folder = Path(sys.argv[sys.argv.index("-o") + 1])
run = RunFolder(folder)
assert Path(sys.argv[sys.argv.index("-c") + 1]) == run.recipe_file
given = json.loads(folder.with_name(f"{folder.name}.facts").read_text())
assert sys.argv[sys.argv.index("--resume") + 1] == "auto"  # one that was stopped goes on from its checkpoint
starts = folder.parent / f"{folder.name}.starts"
with starts.open("a") as file:
    file.write(f"{os.environ['OMP_NUM_THREADS']} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n")
turn = len(starts.read_text().splitlines())
turns = json.loads((folder.parents[2] / "ends.json").read_text()).get(folder.name, ["done"])
how = turns[min(turn, len(turns)) - 1]
numbers = {"steps": 9, "parameters": {"trainable": 3, "total": 4}}
facts = {"status": "running", "parent": os.getppid(), **given, **numbers}


def leave(status: str, code: int, error: str | None = None) -> None:
    kind = {0: "done", 5: "diverged", 8: "out of memory"}.get(code, "failed")
    result = {"metrics": {}} if status == "done" else {}
    run.write_facts({**facts, "status": status, "kind": kind, "result": result, **({"error": error} if error else {})})
    if error:
        print(json.dumps({"status": "error", "exit_code": code, "error": error.partition(": ")[2]}))
    sys.exit(code)


if how == "refused":  # before it has a run.json: as a misspelt model
    print("loading\nerror: a library's own words", file=sys.stderr)
    print(json.dumps({"status": "error", "exit_code": 2, "error": "model.name=m: no such model; expected a folder"}))
    sys.exit(2)
with ExitStack() as held:
    try:
        end_with_parent()
        held.enter_context(locked(folder))
    except LockedError:
        sys.exit(6)
    run.write_facts(facts)
    print("training", file=sys.stderr)
    if how == "diverged":
        leave("failed", 5, "NonFiniteError: the loss is nan in step 2; the step was not applied")
    if how == "silent":
        leave("running", 1)
    if how == "bad data":
        leave("failed", 3, "DataError: row 3 is empty")
    if how == "memory":
        leave("failed", 8, "OutOfMemoryError: out of memory")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "waits":
        signal.signal(signal.SIGTERM, lambda *_: leave("interrupted", 143, "Interrupted: stopped"))
        run.log.path.write_text('{"step": 4, "loss": 0.25}\n{"step": 5, "lo')
        time.sleep(60)
    for part in (folder / "adapter", run.checkpoints):
        write_text(part / "weights", "w")
    rate, seed = given["recipe"]["train"]["learning_rate"], given["recipe"]["seed"]
    score = -abs(math.log(rate / 1e-3)) + seed / 1000
    figures = {"accuracy": score, "loss": -score, "train_seconds": 1.5, "test": {"accuracy": score - 1}}
    run.write_metrics({"metrics": figures, "main_metric": "accuracy"})
    leave("done", 0)
