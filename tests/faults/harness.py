"""Runs of the command line in forked processes, each with a fault of its own; a tiny model and rows to run them on.

A fork of one process that has everything imported starts in milliseconds, so that hundreds of kills take minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", NO_COLOR="1", COLUMNS="200")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import build_tokenizer
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from duallora import cli
from duallora.export import convert, merge  # noqa: F401  what the verbs import is there before the first fork
from duallora.train import evaluate, run  # noqa: F401

WEIGHTS = "adapter_model.safetensors"
STEPS, SAVE = 12, 3
SETTINGS = (
    f"train.max_steps={STEPS}", f"train.save_steps={SAVE}", "train.batch_size=2", "train.gradient_accumulation_steps=2",
    "train.lr_scheduler=constant", "adapter.r1=2", "adapter.r2=2", "data.max_length=64", "train.logging_steps=1",
)  # fmt: skip


class Result(NamedTuple):
    """How a process ended: its exit code, or -signal; what it said; seconds of the processor; peak resident bytes."""

    code: int
    said: str
    seconds: float
    peak: int
    hung: bool = False


class Case(NamedTuple):
    """One injected fault, whether what was promised came about, and what was seen if not."""

    name: str
    survived: bool
    note: str = ""


Watch = Callable[[int], None]  # is called with the process id every millisecond until the process ends


def fork(body: Callable[[], int], watch: Watch | None = None, seconds: float = 120) -> Result:
    """Runs ``body`` in a fork; killed, and ``hung``, after that many seconds."""
    began, hung, said = time.monotonic(), False, b""
    sys.stdout.flush()
    read, write = os.pipe()  # not a file: limits on files are for the run, not for what it says
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()
            os.close(read)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(write, 1)
            os.dup2(write, 2)
            code = body()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    os.set_blocking(read, False)
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        with suppress(BlockingIOError):
            while block := os.read(read, 1 << 16):
                said += block
        if ended:
            break
        if watch is not None:
            watch(pid)
        if time.monotonic() - began > seconds and not hung:
            hung = True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.001)
    os.close(read)
    took = usage.ru_utime + usage.ru_stime  # not of the clock, which other work makes slow
    return Result(os.waitstatus_to_exitcode(status), said.decode(errors="replace"), took, usage.ru_maxrss * 1024, hung)


def when(happens: Callable[[], bool], then: int | Callable[[int], None], delay: float = 0.0) -> Watch:
    """Sends a signal, or calls, once ``happens()`` and ``delay`` seconds later."""
    seen: list[float] = []

    def watch(pid: int) -> None:
        if not seen and happens():
            seen.append(time.monotonic())
        if len(seen) == 1 and time.monotonic() - seen[0] >= delay:
            seen.append(0.0)
            os.kill(pid, then) if isinstance(then, int) else then(pid)

    return watch


def limit(kind: int, most: int) -> Callable[[], None]:
    """A patch that bounds a resource of the process."""
    return lambda: resource.setrlimit(kind, (most, most))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"


def finite(path: Path) -> bool:
    """Whether no tensor of a file holds a NaN or an infinity."""
    return all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


class Stage:
    """A folder with a model, rows, an uninterrupted run of them, and a place for each case."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        self.model, self.rows = folder / "model", folder / "rows.jsonl"
        folder.mkdir(parents=True)
        build_model(self.model)
        write_rows(self.rows, 40)
        self.straight = folder / "straight"
        done = self.train(self.straight)
        assert done.code == 0, done.said
        self.wanted = digest(self.straight / "adapter" / WEIGHTS)
        self.idle = self.call("--version").peak  # what a fork holds that does nothing

    def place(self, copy: Path | None = None) -> Path:
        """A new folder's path; with ``copy`` a copy of that folder lies there."""
        self.count += 1
        path = self.folder / f"case{self.count}"
        if copy is not None:
            shutil.copytree(copy, path)
        return path

    def call(
        self, *argv: Any, patch: Callable[[], Any] | None = None, watch: Watch | None = None, seconds: float = 120
    ) -> Result:
        """``duallora argv`` in a fork, after ``patch()`` there."""

        def body() -> int:
            os.chdir(self.folder)
            if patch is not None:
                patch()
            return cli.run([str(argument) for argument in argv])

        return fork(body, watch, seconds)

    def train(
        self, output: Path, *more: Any, settings: tuple[str, ...] = (), rows: Path | None = None, **how: Any
    ) -> Result:
        """``duallora train`` of the stage's model and rows."""
        argv = ["train", "--model", self.model, "--data", rows or self.rows, "-o", output]
        for setting in (*SETTINGS, *settings):
            argv += ["--set", setting]
        return self.call(*argv, *more, **how)

    def begin(self, model: Path, *more: Any, rows: Path | None = None, seconds: float = 30) -> Result:
        """``duallora train`` of another model, into a new folder."""
        argv = ["train", "--model", model, "--data", rows or self.rows, "-o", self.place()]
        return self.call(*argv, *more, seconds=seconds)

    def resumed(self, output: Path, name: str, **how: Any) -> Case:
        """Whether ``--resume auto`` ends with the bits of the uninterrupted run."""
        done = self.train(output, "--resume", "auto", **how)
        fine = done.code == 0 and digest(output / "adapter" / WEIGHTS) == self.wanted
        return Case(name, fine, "" if fine else f"exit {done.code}: {tail(done.said)}")

    def interrupted(self) -> Path:
        """A run that was killed after its third checkpoint, made once."""
        path = self.folder / "interrupted"
        if not path.exists():
            sealed = path / "checkpoints" / f"checkpoint-{3 * SAVE}" / "MANIFEST.json"
            self.train(path, watch=when(sealed.exists, signal.SIGKILL))
            assert sealed.exists()
            assert not (path / "adapter" / WEIGHTS).exists(), "the run ended before it could be killed"
        return path

    def close(self, output: Path, atol: float) -> bool:
        """Whether a run ended with the weights of the uninterrupted one, but for rounding."""
        found, wanted = (load_file(folder / "adapter" / WEIGHTS) for folder in (output, self.straight))
        near = (torch.allclose(found[name], wanted[name], atol=atol, rtol=0) for name in wanted)
        return found.keys() == wanted.keys() and all(near)

    def drop(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)


def tail(text: str, most: int = 160) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-most:]


def ended(result: Result, code: int | tuple[int, ...], name: str, *words: str, within: float | None = None) -> Case:
    """Whether a process ended with this exit code, said these words, and was no traceback."""
    codes = (code,) if isinstance(code, int) else code
    wrong = []
    if result.hung or result.code not in codes:
        wrong.append("hung" if result.hung else f"exit {result.code}, expected {code}")
    if "Traceback (most recent call last)" in result.said or "fault in duallora" in result.said:
        wrong.append("a traceback or a fault in duallora")
    wrong += [f"does not say {word!r}" for word in words if word not in " ".join(result.said.split())]
    if within is not None and result.seconds > within:
        wrong.append(f"took {result.seconds:.1f} s")
    return Case(name, not wrong, "; ".join([*wrong, tail(result.said)]) if wrong else "")


def build_model(folder: Path, **changed: Any) -> None:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    marks = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    LlamaForCausalLM(LlamaConfig(**{**sizes, **changed}, **marks)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, count: int) -> None:
    rows = [{"prompt": f"What is {i} plus {i % 7}?", "completion": f"It is {i + i % 7}."} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrites a JSON file."""
    found = json.loads(path.read_text())
    path.write_text(json.dumps(change(found) or found))
