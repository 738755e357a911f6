"""Data sets that lie on every machine with Python: the standard library's own functions, their docstrings, its reference.

``builtin:docstrings``: module and signature -> the first sentence of the docstring (generation).
``builtin:packages``:   signature and first sentence -> the package the function belongs to (classification).
``builtin:reference``:  paragraphs of the language reference, as `help` prints it (plain text).

The source files of the running interpreter are parsed, never imported. Splits are drawn by hashes of names, so they
are the same on every machine with the same Python; another Python has other functions, hence another fingerprint.
"""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import operator
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from duallora.errors import DataError, unknown
from duallora.tasks import metrics
from duallora.tasks.example import Example
from duallora.tasks.task import SPLITS, LazySplits, Task

NAMES = ("builtin:docstrings", "builtin:packages", "builtin:reference")

# Folders whose functions are tests, vendored copies, demonstrations, or gone in a later Python.
_SKIPPED = {
    "test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "_bundled", "_vendor", "turtledemo",
    "lib2to3", "distutils", "pydoc_data", "lib-dynload",
}  # fmt: skip

# The packages with the most functions in every Python from 3.10 on; a fixed list, so that class ids never move.
PACKAGES = (
    "asyncio", "email", "http", "idlelib", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml",
)  # fmt: skip
_MOST_PER_PACKAGE = 200  # the largest package has several times more and would make guessing it pay


@dataclass(frozen=True, slots=True)
class Function:
    """A documented function or method of the standard library."""

    module: str
    line: int
    owner: str  # the class, or ""
    signature: str  # "def name(args) -> result:"
    sentence: str  # of the docstring, the first


def load(name: str) -> Task:
    """The task behind one of `NAMES`; ConfigError for another name."""
    if name not in NAMES:
        raise unknown("data", name, NAMES)
    source = f"standard library of Python {platform.python_version()} ({sysconfig.get_path('stdlib')})"
    if name == "builtin:reference":
        paragraphs = LazySplits({split: functools.partial(_reference, split) for split in SPLITS})
        return Task(
            name=name, kind="generate", splits=paragraphs, format="text", main_metric="loss", metrics=metrics.Metrics(), source=source
        )  # fmt: skip
    generates = name == "builtin:docstrings"
    read = _docstrings if generates else _packages
    metric = metrics.Metrics("bleu", "exact_match", "bleu_first_line", "one_line")
    return Task(
        name=name,
        kind="generate" if generates else "classify",
        splits=LazySplits({split: functools.partial(read, split) for split in SPLITS}),
        format="prompt-completion" if generates else "classification",
        labels=() if generates else PACKAGES,
        metrics=metric if generates else metrics.OF_KIND["classify"],
        main_metric="bleu" if generates else "accuracy",
        generation={"max_new_tokens": 40, "num_beams": 1, "do_sample": False} if generates else {},
        source=source,
    )


def first_line(text: str) -> str:
    """The answer up to its first line break or closing quotes."""
    return text.strip().split("\n", 1)[0].split('"""', 1)[0].strip()


metrics.register(metrics.bleu("bleu_first_line", first_line))  # kinder to a model that answers and then does not stop
metrics.register(metrics.share("one_line", lambda text, row: bool(text.strip()) and text.strip() == first_line(text)))


@functools.lru_cache(maxsize=1)
def functions() -> tuple[Function, ...]:
    """Every documented function and method with a clean first sentence, by module and line; each text once."""
    root = Path(sysconfig.get_path("stdlib"))
    # Overrides repeat signature and docstring; a copy in another split would be a question with its answer.
    found: dict[tuple[str, str], Function] = {}
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are millions of objects, none of them garbage: collecting doubles the time (6 s)
    try:
        for module, path in _modules(root):
            try:
                with warnings.catch_warnings():  # invalid escapes in old modules
                    warnings.simplefilter("ignore")
                    tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, OSError):  # files written to be broken, or unreadable: not our business
                continue
            for function in _documented(tree, module):
                found.setdefault((function.signature, function.sentence), function)
    finally:
        if collecting:
            gc.enable()
    if not found:
        raise DataError(f"no readable Python source under {root}; builtin data need a Python with its library's source")
    return tuple(found.values())


def _modules(root: Path) -> list[tuple[str, Path]]:
    paths = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not _SKIPPED.intersection(parts) and not parts[0].startswith("config-"):
            paths.append((".".join(parts).removesuffix(".__init__"), path))
    return sorted(paths)


def _documented(tree: ast.Module, module: str) -> Iterator[Function]:
    stack: list[tuple[ast.stmt, str]] = [(node, "") for node in reversed(tree.body)]
    while stack:
        node, owner = stack.pop()
        if isinstance(node, ast.ClassDef):
            stack += [(child, node.name) for child in reversed(node.body)]
        elif isinstance(node, ast.If | ast.Try):  # definitions that depend on the platform
            stack += [(child, owner) for child in reversed([*node.body, *node.orelse])]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            sentence = first_sentence(ast.get_docstring(node) or "")
            if sentence and (signature := _signature(node)):
                yield Function(module, node.lineno, owner, signature, sentence)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    signature = f"{prefix} {node.name}({ast.unparse(node.args)}){result}:"
    return signature if len(signature) <= 160 and signature.isascii() else ""


def first_sentence(docstring: str) -> str:
    """The first sentence, closed with a full stop, or '' where there is no clean one.

    Clean: plain ASCII prose of 3 to 30 words in the first paragraph, no code, no field lists, no signature in words.
    """
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    sentence = re.split(r"(?<=[a-z0-9)\]'\"`][.!])\s+(?=[A-Z(])", paragraph, maxsplit=1)[0].strip()
    if not sentence.isascii() or not sentence.isprintable() or not 3 <= len(sentence.split()) <= 30:
        return ""
    if len(sentence) > 160 or not re.match(r"[A-Z][a-z]+\b(?!\()", sentence) or sentence[-1] in ":,;-([{":
        return ""
    if re.search(r">>>|:param|:return|@param|->|::|\bXXX\b|\bTODO\b|\"\"\"|\s[-*=]{2,}\s|\s\*\s", sentence):
        return ""
    return sentence if sentence[-1] in ".!?" else sentence + "."


def _docstrings(split: str) -> tuple[Example, ...]:
    own = [function for function in functions() if _split_name(_hash(function.module)) == split]
    # In the order of a hash, so that the first rows are a fair sample of the modules and not those that begin with _a.
    own.sort(key=lambda function: _hash(f"{function.module}:{function.owner}.{function.signature}"))
    examples = []
    for one in own:
        # Reads as a file about to go on with the docstring's text, which every model of code has seen often.
        head, indent = (f"class {one.owner}:\n", "    ") if one.owner else ("", "")
        prompt = f'# Module {one.module}\n{head}{indent}{one.signature}\n{indent}    """'
        where = f"{one.module}:{one.line}"
        examples.append(Example(prompt=prompt, answer=one.sentence, references=(one.sentence,), where=where))
    return tuple(examples)


def _packages(split: str) -> tuple[Example, ...]:
    by_package: dict[str, dict[int, Example]] = {name: {} for name in PACKAGES}
    for function in functions():
        package = function.module.split(".")[0]
        text = f"{function.signature.removesuffix(':')}: {function.sentence}"
        # Drawn by what the row says, so that one function under two classes never stands in two splits.
        draw = _hash(f"{function.signature.split('(')[0]}|{function.sentence}")
        taken = any(draw in rows for rows in by_package.values())
        if package in by_package and package not in text.lower() and not taken:
            where = f"{function.module}:{function.line}"
            by_package[package][draw] = Example(texts=(text,), label=PACKAGES.index(package), where=where)
    rows = sorted(
        (row for own in by_package.values() for row in sorted(own.items(), key=_first)[:_MOST_PER_PACKAGE]), key=_first
    )
    return tuple(example for draw, example in rows if _split_name(draw) == split)


_first = operator.itemgetter(0)


@functools.lru_cache(maxsize=1)
def _paragraphs() -> tuple[str, ...]:
    """Those of pydoc's topics that are about as long as a paragraph is, each once; the file is parsed, not imported."""
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); builtin:reference needs a Python with its documentation"
        ) from error
    topics = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    blocks = (" ".join(block.split()) for topic in topics for block in str(topic.value).split("\n\n"))
    return tuple(dict.fromkeys(block for block in blocks if 200 <= len(block) <= 800))


def _reference(split: str) -> tuple[Example, ...]:
    found = sorted((_hash(text), text) for text in _paragraphs())
    return tuple(
        Example(answer=text, references=(text,), where=f"pydoc_data.topics, {text[:30]}...")
        for draw, text in found
        if _split_name(draw) == split
    )


def _split_name(draw: int) -> str:
    share = draw // 100 % 100
    return "test" if share < 10 else "validation" if share < 18 else "train"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
