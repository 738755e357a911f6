"""The E2E metrics of a run's predictions, by duallora and by the programs behind the official scorer.

    DUALLORA_PYCOCOEVALCAP=FOLDER python benchmarks/e2e_metrics.py RUN --perl SCRIPT --output results/e2e_metrics.json

RUN: of `duallora train --task e2e --set eval.test=true`, whose predictions.jsonl is read. FOLDER: pycocoevalcap, whose
own Python classes drive the Java programs here. SCRIPT: reads lines "prediction <tab> reference <tab> ..." and prints
"NIST x" and "BLEU x" by the scoring functions of mteval-v13a-sig.pl, padding each row with empty references up to the
most any row has, as the official scorer's files do.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from duallora.store import record
from duallora.store.run_folder import RunFolder
from duallora.tasks import Example, e2e, official


def by_coco(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """METEOR, ROUGE-L and CIDEr by pycocoevalcap itself."""
    home = official.folder()
    assert home is not None
    sys.path.insert(0, str(home.parent))
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    gold = tokenizer.tokenize({i: [{"caption": text} for text in own] for i, own in enumerate(references)})
    guess = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(predictions)})
    return {
        "meteor": 100 * float(Meteor().compute_score(gold, guess)[0]),
        "rouge_l": 100 * float(Rouge().compute_score(gold, guess)[0]),
        "cider": float(Cider().compute_score(gold, guess)[0]),
    }


def by_perl(script: Path, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """NIST and BLEU by the official Perl functions."""
    rows = "".join("\t".join([text, *own]) + "\n" for text, own in zip(predictions, references, strict=True))
    done = subprocess.run(["perl", str(script)], input=rows, capture_output=True, text=True, check=True)
    found = dict(line.split() for line in done.stdout.splitlines())
    return {"nist_perl": float(found["NIST"]), "bleu": 100 * float(found["BLEU"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--perl", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    started = time.time()
    if reason := official.missing():
        raise SystemExit(reason)
    run = RunFolder(given.run)
    lines = run.predictions()
    predictions, references = [line["prediction"] for line in lines], [line["references"] for line in lines]
    examples = [Example(references=tuple(own)) for own in references]
    own = e2e.METRICS(predictions, examples)
    ours = {**own, **e2e.official_metrics(predictions, examples)[0]}
    theirs = {**by_perl(given.perl, predictions, references), **by_coco(predictions, references)}
    facts = run.metrics()
    differences = {name: abs(ours[name] - value) for name, value in theirs.items()}
    record.write_json(
        given.output,
        record.result(
            "e2e_metrics",
            {**facts["recipe"], "output": None},
            ours,
            seeds=facts["seeds"],
            started=started,
            data=facts["data"],
            base=facts["base"],
            n=len(lines),
            official=theirs,
            largest_difference=max(differences.values()),
            without_java={name: own[name] for name in ("rouge_l", "cider")},
            note="official: bleu and nist_perl by the scoring functions of mteval-v13a-sig.pl (as in a public copy of "
            "tuetschek/e2e-metrics) under Perl; meteor, rouge_l and cider by the Python classes and Java programs of "
            "pycocoevalcap 1.2. The predictions are greedy, of a run of 40 steps of 4 rows: no result of the method.",
        ),
    )
    for name in theirs:
        print(f"{name:10} {ours[name]:.10f}  official {theirs[name]:.10f}")


if __name__ == "__main__":
    main()
