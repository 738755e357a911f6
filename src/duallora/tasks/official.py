"""What the E2E challenge's scorer computes in Java: Stanford's tokenizer, and METEOR with its table of paraphrases.

Both programs lie in the wheel pycocoevalcap (104 MB, without a license of its own; METEOR is LGPL, CoreNLP GPL), which
is an optional download and no part of this package: ``pip install --no-deps pycocoevalcap==1.2``. Its folder, or
another of its layout such as that of a checkout of tuetschek/e2e-metrics, may be named by DUALLORA_PYCOCOEVALCAP. Any
Java runtime from version 8 on does.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from duallora.errors import DataError

VARIABLE = "DUALLORA_PYCOCOEVALCAP"
TOKENIZER = Path("tokenizer", "stanford-corenlp-3.4.1.jar")
METEOR = Path("meteor", "meteor-1.5.jar")
PARAPHRASES = Path("meteor", "data", "paraphrase-en.gz")  # METEOR finds it beside itself
# What COCO's scorers drop after tokenizing.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
_BREAKS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # one text, one line


def folder() -> Path | None:
    """Where the programs lie: DUALLORA_PYCOCOEVALCAP, else the installed package; None where neither is."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    found = importlib.util.find_spec("pycocoevalcap")
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


def missing() -> str:
    """What is not there of the runtime and the programs, with how to get it; nothing where all is."""
    home = folder()
    if home is None:
        return "pycocoevalcap is not installed (pip install --no-deps pycocoevalcap==1.2, 104 MB)"
    for part in (TOKENIZER, METEOR, PARAPHRASES):
        if not (home / part).is_file():
            return f"{home / part} is missing"
    if shutil.which("java") is None:
        return "no Java runtime (java) is on the path"
    return ""


def tokens(texts: Sequence[str]) -> list[list[str]]:
    """The lower-case tokens of each text by Stanford's Penn Treebank tokenizer, without punctuation, as COCO takes them."""
    lines = [_BREAKS.sub(" ", text) for text in texts]
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "texts.txt")
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        options = ["-cp", str(_home() / TOKENIZER), "edu.stanford.nlp.process.PTBTokenizer"]
        command = ["java", "-Dfile.encoding=UTF-8", *options, "-preserveLines", "-lowerCase", str(file)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise DataError(f"java {' '.join(command[-3:])} failed: {done.stderr.strip()[-300:]}")
    found = done.stdout.split("\n")[: len(texts)]
    if len(found) != len(texts):
        raise DataError(f"Stanford's tokenizer gave {len(found)} lines for {len(texts)} texts: {done.stdout[-200:]!r}")
    return [[token for token in line.split() if token not in PUNCTUATION] for line in found]


def meteor(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """METEOR 1.5 of tokenized texts over all their references, in percent, called as the scorer calls it."""
    jar = (_home() / METEOR).resolve()
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8", bufsize=1
    ) as program:
        try:
            counts = [
                _ask(program, ["SCORE", *(_plain(other) for other in others), _plain(text)])
                for text, others in zip(predictions, references, strict=True)
            ]
            _ask(program, ["EVAL", *counts])  # the first row's own value
            for _ in counts[1:]:
                _ask(program)
            return 100.0 * float(_ask(program))  # the last is the whole's
        finally:
            program.kill()
            with suppress(BrokenPipeError):
                program.stdin.close()  # type: ignore[union-attr]


def _plain(text: Sequence[str]) -> str:
    return " ".join(text).replace("|||", "").replace("  ", " ")


def _ask(program: subprocess.Popen[str], fields: Sequence[str] = ()) -> str:
    """The next line of the program, after one of ``fields`` is written to it where there are any."""
    assert program.stdin is not None
    assert program.stdout is not None
    with suppress(BrokenPipeError):  # it has ended: there is no answer
        program.stdin.write(" ||| ".join(fields) + "\n" * bool(fields))
        program.stdin.flush()
    if line := program.stdout.readline():
        return line.strip()
    raise DataError(
        "METEOR's program ended without an answer: it needs up to 2 GB of memory and a Java of version 8 or later"
    )


def _home() -> Path:
    home = folder()
    assert home is not None, "ask missing() first"
    return home
