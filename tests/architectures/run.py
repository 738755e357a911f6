"""Every model class of the installed transformers through `checks`: the figures of docs/support.md.

A class is examined in a process of its own group, so that one that crashes, hangs or asks for too much memory is
recorded and the next goes on. What the file holds is not done again.

    python tests/architectures/run.py --output results/architectures.json [--only REGEX] [--heads N] [--page docs/support.md]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import select
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

SECONDS = 240  # for one class
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
        began = time.time()
        found: dict[str, Any] = {"model_type": model_type, "class": name, "method": method}
        try:
            small = build.small(model_type, name)
            found |= {"parameters": small.model.num_parameters(), "built": "small" if small.widths else "few layers"}
            found |= checks.examine(small, method)
        except ValueError as error:
            found["not_built"] = str(error)
        except BaseException as error:
            found["failed"] = build.reason(error)
        found["seconds"] = round(time.time() - began, 2)
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
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.process.kill()
        status = self.process.wait()
        self.process = None
        why = f"the process ended with {status}" if ready else f"not finished in {SECONDS} s"
        return {"model_type": model_type, "class": name, "method": method, "failed": why}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/architectures.json"))
    parser.add_argument("--only", default="", help="a regular expression for model types and classes")
    parser.add_argument("--heads", type=int, default=1, help="classes of each model type")
    parser.add_argument("--methods", nargs="+", default=["duallora", "lora"])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
        return
    from architectures.build import registered

    lines = arguments.output.with_suffix(".jsonl")
    earlier = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    known = {(found["class"], found["method"]) for found in earlier}
    asked = Worker()
    wanted = [
        (model_type, name, method)
        for method in arguments.methods
        for model_type, names in registered().items()
        for name in names[: arguments.heads]
        if (name, method) not in known and re.search(arguments.only, f"{model_type} {name}")
    ]
    with lines.open("a") as file:
        for model_type, name, method in wanted:
            found = asked.ask(model_type, name, method)
            file.write(json.dumps(found) + "\n")
            file.flush()
            print(name, method, found.get("not_built") or found.get("failed") or found["seconds"], flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
