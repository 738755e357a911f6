"""Every model class of the installed transformers through `checks`: the figures of docs/support.md.

A class is examined in a process of its own group, so that one that crashes, hangs or asks for too much memory is
recorded and the next goes on. What the working file (.jsonl, beside the figures) holds is not done again.

    python tests/architectures/run.py --output results/architectures.json [--page docs/support.md] [--only REGEX [--again]]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from duallora.store import record

SECONDS = 60  # of processor time for one class
WAIT = 1800  # seconds on a clock, after which a class hangs
MEMORY = 12 << 30


def worker() -> None:
    """Reads a class a line, answers with a line of JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    import torch
    import transformers
    from architectures import build, checks

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for line in sys.stdin:
        model_type, name, method = line.split()
        began = time.process_time()
        resource.setrlimit(resource.RLIMIT_CPU, (int(began) + SECONDS, resource.RLIM_INFINITY))
        found: dict[str, Any] = {"model_type": model_type, "class": name, "method": method}
        try:
            small = build.small(model_type, name)
            found |= {"parameters": small.model.num_parameters(), "built": "small" if small.widths else "few layers"}
            found |= checks.examine(small, method)
        except ValueError as error:
            found["not_built"] = str(error)
        except BaseException as error:
            found["failed"] = build.reason(error)
        found["seconds"] = round(time.process_time() - began, 2)
        print(json.dumps(found), file=answers, flush=True)


class Worker:
    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, model_type: str, name: str, method: str) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{model_type} {name} {method}\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], WAIT)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.process.kill()
        status = self.process.wait()
        self.process = None
        which = {"model_type": model_type, "class": name, "method": method}
        if status == -signal.SIGXCPU:
            return {**which, "not_built": f"time: it takes more than {SECONDS} s of processor time, small as it is"}
        return {**which, "failed": f"the process ended with {status}" if ready else f"hung for {WAIT} s"}


# -- figures -----------------------------------------------------------------------------------------------------------


def summary(lines: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Counts for each method and set of targets, and of each class what is not as it should be."""
    from architectures import checks

    classes: dict[str, dict[str, Any]] = {}
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for line in lines:
        entry = classes.setdefault(
            line["class"], {"class": line["class"], "model_type": line["model_type"], "methods": {}}
        )
        entry |= {name: line[name] for name in ("parameters", "built", "not_built") if name in line}
        if "targets" not in line:
            if "failed" in line:
                entry["methods"][line["method"]] = {"failed": line["failed"]}
            continue
        if base := {check: value for check, value in line["base"].items() if value is not True}:
            entry["base"] = base
        found = entry["methods"].setdefault(line["method"], {})
        for name, verdicts in line["targets"].items():
            odd = {check: value for check, value in verdicts.items() if value is not True}
            outcome = checks.outcome(line["base"], verdicts)
            found[name] = {"outcome": outcome, **odd}
            of_set = counts.setdefault(line["method"], {}).setdefault(name, {})
            of_set[outcome] = of_set.get(outcome, 0) + 1
    rows = sorted(classes.values(), key=lambda entry: (entry["model_type"], entry["class"]))
    for entry in rows:
        if "built" in entry:  # a method may have taken too long where others did not
            entry.pop("not_built", None)
    not_built = [entry for entry in rows if "not_built" in entry]
    metrics = {
        "classes_tried": len(rows),
        "classes_built": sum("built" in entry for entry in rows),
        "classes_not_built": len(not_built),
        "model_types_built": len({entry["model_type"] for entry in rows if "built" in entry}),
        "ended_or_hung": sum("failed" in found for entry in rows for found in entry["methods"].values()),
        "sets": counts,
    }
    return metrics, rows


SETS = {
    "linear": 'every linear layer (`"all-linear"`)',
    "head": "the head",
    "embeddings": "the input embeddings",
    "positions": "all other embeddings",
    "convolutions": "the convolutions",
}
METHODS = {"duallora": "Dual LoRA (PEFT)", "nn": "`duallora.nn`", "lora": "PEFT's LoRA"}


def table(metrics: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown: a row for each set of targets, then why models could not be built."""
    built, kinds = metrics["classes_built"], metrics["model_types_built"]
    text = [
        f"{metrics['classes_tried']} classes tried, {built} built ({kinds} model types), {metrics['classes_not_built']} not.",
        "",
        "| targets | "
        + " | ".join(f"{title}: passed / classes | refused | faults" for title in METHODS.values())
        + " |",
        "|---|" + "---:|---:|---:|" * len(METHODS),
    ]
    for name, title in SETS.items():
        cells = []
        for method in METHODS:
            count = metrics["sets"].get(method, {}).get(name, {})
            cells.append(
                f"{count.get('passed', 0)} / {sum(count.values())} | {count.get('refused', 0)} | {count.get('fault', 0)}"
            )
        text.append(f"| {title} | " + " | ".join(cells) + " |")
    causes: dict[str, int] = {}
    for entry in rows:
        if reason := entry.get("not_built"):
            missing = re.search(r"requires the (\w+) library|pip install (\w+)", reason)
            stage = reason.partition(":")[0]
            cause = f"needs {missing[1] or missing[2]}, which is not installed" if missing else WHY.get(stage, stage)
            causes[cause] = causes.get(cause, 0) + 1
    if causes:
        text += [
            "",
            "Not built: "
            + "; ".join(f"{cause}: {n}" for cause, n in sorted(causes.items(), key=lambda c: -c[1]))
            + ".",
        ]
    return "\n".join(text)


WHY = {
    "class": "the class is not where transformers says",
    "config": "the config refuses the small sizes",
    "model": "its parts do not fit each other at these sizes",
    "forward": "it asks for inputs that the sweep does not know how to make",
    "time": "it takes more than a minute of processor time, small as it is",
}


def fill(page: Path, text: str) -> None:
    begin, end = "<!-- architectures -->", "<!-- /architectures -->"
    before, _, rest = page.read_text().partition(begin)
    record.write_text(page, f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/architectures.json"))
    parser.add_argument("--page", type=Path, help="page whose table is filled in, such as docs/support.md")
    parser.add_argument("--only", default="", help="a regular expression for model types and classes")
    parser.add_argument("--again", action="store_true", help="examine what --only matches though the file holds it")
    parser.add_argument("--heads", type=int, default=1, help="classes of each model type")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="none: only the figures from what is there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
        return
    from architectures.build import registered

    started, path = time.time(), arguments.output.with_suffix(".jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(line["class"], line["method"]): line for line in lines}
    asked = Worker()
    with path.open("a") as file:
        for method in arguments.methods:
            for model_type, names in registered().items():
                for name in names[: arguments.heads]:
                    matches = re.search(arguments.only, f"{model_type} {name}")
                    if not matches or ((name, method) in known and not arguments.again):
                        continue
                    found = asked.ask(model_type, name, method) | record.git_state(Path(__file__).parent)
                    known[name, method] = found
                    file.write(json.dumps(found) + "\n")
                    file.flush()
                    print(name, method, found.get("not_built") or found.get("failed") or found["seconds"], flush=True)
    metrics, rows = summary(list(known.values()))
    facts = record.result(
        "architectures", {"heads": arguments.heads}, metrics, seeds=[0], started=started, classes=rows
    )
    # The working file may hold runs of other commits: those behind each method's verdicts.
    facts["commits"] = {m: sorted({line["commit"] for line in known.values() if line["method"] == m}) for m in METHODS}
    record.write_json(arguments.output, facts)
    if arguments.page:
        fill(arguments.page, table(metrics, rows))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
