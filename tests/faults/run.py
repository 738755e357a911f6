"""The fault matrix as a command (``make faults``, ``make faults-long``): a line for each row, results/faults.json.

    python tests/faults/run.py [--long] [--rows WORD ...] [--output FILE] [--page FILE]

Exit 1 where a case was lost. Every case of a row is injected anew; which are tried does not depend on the machine.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import harness
import page
import plain
import rows

from duallora.store import record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="hundreds of kills, thousands of damaged files")
    words = "rows whose name holds one of these words"
    parser.add_argument("--rows", nargs="+", default=[""], metavar="WORD", help=words)
    parser.add_argument("--output", type=Path, help="where the record goes")
    parser.add_argument("--page", type=Path, help="a page whose table is made of that record")
    arguments = parser.parse_args()
    chosen = {name: row for name, row in rows.MATRIX.items() if any(word in name for word in arguments.rows)}
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    commit = record.environment()["commit"]
    found, began, started = [], time.monotonic(), time.time()
    try:
        stage = harness.Stage(folder / "stage")
        beside, sealed = {}, {}
        if arguments.rows == [""]:
            beside = plain.compare(folder / "plain", arguments.long)
            sealed = plain.compare(folder / "sealed", arguments.long, sealed=True)
        heads = f"{'tried':>6}{'survived':>9}{'lost':>6}{'seconds':>9}"
        print(f"{'':42}{heads}   plain Trainer, and with SealedCheckpoints", flush=True)
        for name, row in chosen.items():
            start, cases = time.monotonic(), []
            try:
                cases += row(stage, arguments.long)
            except Exception as error:  # the row itself is at fault: counted as lost, the others go on
                cases.append(harness.Case("the row", False, repr(error)))
            lost = [case for case in cases if not case.survived]
            line = {"row": name, "tried": len(cases), "survived": len(cases) - len(lost), "lost": len(lost)}
            line |= {"commit": commit, "losses": [case.name for case in lost]}
            if name in beside:
                line |= {"plain_trainer": beside[name], "sealed_trainer": sealed[name]}
            found.append(line)
            others = (beside[name], sealed[name]) if name in beside else ()
            trainer = ", ".join("{survived} of {tried}".format(**other) for other in others)
            seconds = time.monotonic() - start
            numbers = f"{line['tried']:6}{line['survived']:9}{line['lost']:6}{seconds:9.0f}"
            print(f"{name:42}{numbers}   {trainer}", flush=True)
            for case in lost:
                print(f"    {case.name}: {case.note}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{sum(line['tried'] for line in found):,} cases in {time.monotonic() - began:.0f} s", flush=True)
    if arguments.output:
        settings = {"long": arguments.long, "steps": harness.STEPS, "save_steps": harness.SAVE}
        if arguments.output.exists() and arguments.rows != [""]:  # the others stay as they were measured
            again = {line["row"]: line for line in found}
            before = record.read_json(arguments.output)["metrics"]["rows"]
            measured = {**{line["row"]: line for line in before}, **again}
            found = [measured[name] for name in rows.MATRIX if name in measured]
        result = record.result("faults", settings, {"rows": found}, seeds=[0], started=started)
        record.write_json(arguments.output, result)
        if arguments.page:
            page.write(arguments.page, result)
    return any(line["lost"] for line in found)


if __name__ == "__main__":
    sys.exit(main())
