"""The fault matrix: a function a row, which injects its faults one by one and yields what came of each."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import harness
import torch
from fuzz import fuzz
from harness import SAVE, SETTINGS, STEPS, WEIGHTS, Case, Stage, digest, edit, ended, limit, tail, when
from safetensors.torch import load_file, save_file

Row = Iterator[Case]
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "bit flip": lambda content: content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :],
}  # fmt: skip


def damage(path: Path, how: str) -> None:
    content = DAMAGES[how](path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)


def kills_in_a_save(stage: Stage, long: bool) -> Row:
    """SIGKILL 0 to 25 ms after a checkpoint's folder appears, the first one's included; then --resume auto."""
    for i in range(300 if long else 24):
        number, folder = SAVE * (1 + i % (STEPS // SAVE)), stage.place()
        delay = random.Random(i).uniform(0, 0.025)
        appears = folder / "checkpoints" / f"checkpoint-{number}"
        stage.train(folder, watch=when(appears.exists, signal.SIGKILL, delay))
        yield stage.resumed(folder, f"checkpoint-{number} + {delay * 1e3:.1f} ms")
        stage.drop(folder)


def kills_anywhere(stage: Stage, long: bool) -> Row:
    """SIGKILL at a random time of a run, of merge, convert, eval and check; the verb again."""
    for i in range(150 if long else 10):
        folder, draw = stage.place(), random.Random(1000 + i)
        stage.train(folder, watch=when(lambda: True, signal.SIGKILL, draw.uniform(0.05, 1.6)))
        yield stage.resumed(folder, f"train, kill {i}")
        stage.drop(folder)
    for i in range(40 if long else 3):  # in what comes after training: evaluation, metrics, the card, plots
        folder, draw = stage.place(), random.Random(2000 + i)
        ends = folder / "checkpoints" / f"checkpoint-{STEPS}" / "MANIFEST.json"
        stage.train(folder, watch=when(ends.exists, signal.SIGKILL, draw.uniform(0, 0.5)))
        yield stage.resumed(folder, f"after training, kill {i}")
        stage.drop(folder)
    verbs = {"merge": "model.safetensors", "convert": WEIGHTS}
    for verb, file in verbs.items():
        whole = stage.place()
        took = stage.call(verb, stage.straight, "-o", whole).seconds
        for i in range(50 if long else 5):
            folder, draw = stage.place(), random.Random(f"{verb} {i}")
            kill = when(lambda: True, signal.SIGKILL, draw.uniform(0.3, 1) * took)
            stage.call(verb, stage.straight, "-o", folder, watch=kill)
            half = folder.exists() and digest(folder / file) != digest(whole / file)
            again = stage.call(verb, stage.straight, "-o", folder) if not folder.exists() else None
            strays = list(folder.parent.glob(f".{folder.name}.*"))
            fine = not half and digest(folder / file) == digest(whole / file) and not strays
            note = f"half-written {half}, left behind {strays} {tail(again.said) if again else ''}"
            yield Case(f"{verb}, kill {i}", fine, note)
            stage.drop(folder)


def told_to_stop(stage: Stage, long: bool) -> Row:
    """SIGTERM and SIGINT at random moments of training: the step is finished, saved, and resumed to the same bits."""
    for i in range(40 if long else 8):
        number, code = ((signal.SIGTERM, 143), (signal.SIGINT, 130))[i % 2]
        folder = stage.place()
        log = folder / "log.jsonl"
        done = stage.train(folder, watch=when(log.exists, number, random.Random(i).uniform(0, 0.25)))
        if done.code != code:
            yield ended(done, (code, 0), f"{number.name} {i}")
        else:
            yield stage.resumed(folder, f"{number.name} {i}")
        stage.drop(folder)
    folder = stage.place()

    def twice(pid: int) -> None:
        os.kill(pid, signal.SIGINT)
        time.sleep(0.02)
        os.kill(pid, signal.SIGINT)

    stage.train(folder, watch=when((folder / "log.jsonl").exists, twice, 0.05))
    yield stage.resumed(folder, "SIGINT twice")


def damaged_checkpoints(stage: Stage, long: bool) -> Row:
    """Each file of the newest checkpoint missing, empty, cut in half, a bit flipped: the one before is taken."""
    whole = stage.interrupted()
    newest = whole / "checkpoints" / f"checkpoint-{3 * SAVE}"
    for name in sorted(path.name for path in newest.iterdir()):
        for how in DAMAGES:
            folder = stage.place(whole)
            damage(folder / "checkpoints" / newest.name / name, how)
            yield stage.resumed(folder, f"{name} {how}")
            stage.drop(folder)
    folder = stage.place(whole)
    for path in (folder / "checkpoints").glob("*/MANIFEST.json"):
        path.write_text("[" * 100_000)
    left = sorted(path for path in folder.rglob("*"))
    yield ended(stage.train(folder, "--resume", "auto"), 4, "no whole one left", "MANIFEST.json")
    yield Case("nothing was deleted", left == sorted(path for path in folder.rglob("*")))
    folder = stage.place(whole)
    last = folder / "checkpoints" / f"checkpoint-{STEPS}"
    shutil.copytree(folder / "checkpoints" / newest.name, last)
    yield stage.resumed(folder, "an older checkpoint under the last one's name")


def weights_alone(stage: Stage, long: bool) -> Row:
    """A checkpoint whose optimizer, scheduler or generators are gone is not resumed as if it were exact."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        folder = stage.place(stage.interrupted())
        for path in (folder / "checkpoints").glob(f"*/{name}"):
            path.unlink()
        yield ended(stage.train(folder, "--resume", "auto"), 4, f"no {name}", name)


def _another_token(tokenizer: Any) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["ab"] = max(vocabulary.values()) + 5
    tokenizer["model"]["merges"].append(["a", "b"])


def other_settings(stage: Stage, long: bool) -> Row:
    """A resumed run with other settings, rows, base or tokenizer is refused by name; the same run split otherwise is not."""
    whole = stage.interrupted()
    changed = "train.learning_rate=0.5 adapter.alpha=3 adapter.r1=4 seed=7 train.gradient_accumulation_steps=4"
    for setting in changed.split():
        done = stage.train(stage.place(whole), "--resume", "auto", settings=(setting,))
        yield ended(done, 2, setting, setting.partition("=")[0].rpartition(".")[2])
    same = ("train.batch_size=1", "train.gradient_accumulation_steps=4")
    done = stage.train(stage.place(whole), "--resume", "auto", settings=same)
    yield ended(done, 0, "half the batch, twice the accumulation")
    rows = stage.folder / "other.jsonl"
    harness.write_rows(rows, 41)
    yield ended(stage.train(stage.place(whole), "--resume", "auto", rows=rows), 2, "other rows")
    for file in ("model.safetensors", "tokenizer.json"):
        kept = (stage.model / file).read_bytes()
        try:
            if file.endswith("json"):
                edit(stage.model / file, _another_token)
            else:
                tensors = load_file(stage.model / file)
                save_file({k: v * 1.001 for k, v in tensors.items()}, stage.model / file, {"format": "pt"})
            yield ended(stage.train(stage.place(whole), "--resume", "auto"), (2, 4), f"another {file}")
        finally:
            (stage.model / file).write_bytes(kept)
    for setting in ("train.logging_steps=3", "train.save_steps=2"):
        yield stage.resumed(stage.place(whole), f"free: {setting}", settings=(setting,))


def non_finite(stage: Stage, long: bool) -> Row:
    """A NaN or infinite loss or gradient stops before the step; nothing that holds one is ever saved."""
    from duallora.train.loop import RunTrainer

    compute, step = RunTrainer.compute_loss, RunTrainer.training_step

    def spoiled(factor: float, at: int, gradient: bool) -> Callable[[], None]:
        def patch() -> None:
            def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
                loss = compute(self, *args, **kwargs)
                return loss * factor if self.state.global_step == at and not gradient else loss

            def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
                loss = step(self, *args, **kwargs)
                if gradient and self.state.global_step == at:
                    next(p for p in self.model.parameters() if p.requires_grad).grad.view(-1)[0] = factor
                return loss

            RunTrainer.compute_loss, RunTrainer.training_step = compute_loss, training_step  # type: ignore[method-assign]

        return patch

    for factor in (float("nan"), float("inf"), -float("inf")):
        for gradient in (False, True):
            for at in (0, 4, STEPS - 1):
                folder = stage.place()
                name = f"{'gradient' if gradient else 'loss'} x {factor} in step {at + 1}"
                done = stage.train(folder, patch=spoiled(factor, at, gradient))
                bad = [path for path in folder.rglob("*.safetensors") if not harness.finite(path)]
                yield ended(done, 5, name, f"step {at + 1}") if not bad else Case(name, False, f"non-finite in {bad}")
                yield stage.resumed(folder, name + ", resumed") if at >= SAVE else Case(name, True)
                stage.drop(folder)
    yield ended(stage.train(stage.place(), settings=("train.learning_rate=1e30",)), 5, "rate 1e30")


def divergence(stage: Stage, long: bool) -> Row:
    """A run that got worse than the base, or whose gradient is 0, says so on the screen and in metrics.json."""
    folder = stage.place()
    done = stage.train(folder, settings=("train.learning_rate=1e5", "train.max_grad_norm=0"))
    said = done.said + "".join(path.read_text() for path in folder.glob("metrics.json"))
    yield Case("rate 1e5", done.code == 5 or "steps_without_gradient" in said, tail(done.said))


def full_disk(stage: Stage, long: bool) -> Row:
    """No file may grow beyond a size: exit 7 with the path, and the bits of the straight run once there is room."""
    for size in (0, 1, 100, 400, 1_000, 4_000, 10_000, 20_000, 30_000, 40_000, 60_000)[:: 1 if long else 2]:

        def patch(size: int = size) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            limit(resource.RLIMIT_FSIZE, size)()

        folder = stage.place()
        done = stage.train(folder, patch=patch)
        yield ended(done, (0, 7), f"files of at most {size:,} bytes")
        yield stage.resumed(folder, f"{size:,} bytes, then room") if done.code else Case("room enough", True)
        stage.drop(folder)


def permissions(stage: Stage, long: bool) -> Row:
    """Folders that cannot be written, odd masks."""
    for mask in (0o022, 0o027, 0o077):
        folder = stage.place()
        stage.train(folder, patch=lambda mask=mask: os.umask(mask))
        modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
        yield Case(f"umask {mask:o}", modes == {0o666 & ~mask}, str({oct(mode) for mode in modes}))
    file = stage.place()
    file.write_text("")
    yield ended(stage.train(file / "run"), (2, 7), "a file where a folder should be", within=20)
    if os.geteuid():  # root writes anywhere
        folder = stage.place()
        folder.mkdir(mode=0o500)
        yield ended(stage.train(folder / "run"), 7, "read-only folder")
    yield ended(stage.train(Path("/proc/nothing/run")), (2, 7), "a file system that takes no folder")
    rows = stage.folder / "folder.jsonl"
    rows.mkdir(exist_ok=True)
    yield ended(stage.train(stage.place(), rows=rows), (2, 3), "data is a folder")


def shared_folders(stage: Stage, long: bool) -> Row:
    """Two runs in one folder, a lock whose holder is gone, a lock that is a link, a folder of something else."""
    folder = stage.place()
    results: list[Any] = []
    log = folder / "log.jsonl"
    second = when(log.exists, lambda pid: results.append(stage.train(folder, "--resume", "auto")))
    first = stage.train(folder, watch=second)
    yield ended(results[0], 6, "a second run", "in use by another run")
    same = digest(folder / "adapter" / WEIGHTS) == stage.wanted
    yield Case("the first run", first.code == 0 and same, tail(first.said))
    yield stage.resumed(stage.place(stage.interrupted()), "the holder was killed")
    folder, target = stage.place(stage.interrupted()), stage.place()
    target.write_text("precious")
    for path in folder.glob("*.lock"):
        path.unlink()
    for name in (".lock", "run.lock"):
        (folder / name).symlink_to(target)
    stage.train(folder, "--resume", "auto")
    yield Case("a lock that is a link", target.read_text() == "precious", target.read_text()[:40])
    folder = stage.place()
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"precious")
    for resume in ("auto", "never"):
        yield ended(stage.train(folder, "--resume", resume), 2, f"a folder with a photo, {resume}", "photo.jpg")
    folder = stage.place(stage.interrupted())
    (folder / "run.json").unlink()
    yield ended(stage.train(folder, "--resume", "auto"), 2, "checkpoints without run.json", "run.json")
    folder = stage.place(stage.straight)
    damage(folder / "adapter" / WEIGHTS, "bit flip")
    yield ended(stage.train(folder, "--resume", "auto"), (2, 4), "a finished run whose adapter was flipped", WEIGHTS)
    folder = stage.place(stage.straight)
    shutil.rmtree(folder / "adapter")
    yield ended(stage.train(folder, "--resume", "auto"), (2, 4), "a finished run whose adapter is gone", "adapter")
    for content in ("[" * 100_000, "{}", "[]", '{"status": "done"}', "\x00"):
        folder = stage.place(stage.straight)
        (folder / "run.json").write_text(content)
        yield ended(stage.train(folder, "--resume", "auto"), (2, 4), f"run.json is {content[:20]!r}", "run.json")
    for content in (b"\xff\xfe\n", b"3\n", b"[1, 2]\n", b'{"step"'):
        folder = stage.place(stage.interrupted())
        log = folder / "log.jsonl"
        log.write_bytes(log.read_bytes() + content)
        yield stage.resumed(folder, f"log.jsonl ends in {content!r}")


def out_of_memory(stage: Stage, long: bool) -> Row:
    """The allocators' own words and MemoryError: the batch halves and the run ends in the same bits, or exit 8."""
    from duallora.train.loop import RunTrainer

    compute = RunTrainer.compute_loss
    for error in (
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        MemoryError(),
    ):  # fmt: skip
        for most in (1, 0):

            def patch(error: BaseException = error, most: int = most) -> None:
                def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                    if len(inputs["input_ids"]) > most:
                        raise error
                    return compute(self, model, inputs, *args, **kwargs)

                RunTrainer.compute_loss = compute_loss  # type: ignore[method-assign]

            folder = stage.place()
            name = f"{type(error).__name__}, rows that fit: {most}"
            done = stage.train(folder, settings=("train.auto_batch=true",), patch=patch)
            if most:
                close = done.code == 0 and stage.close(folder, 1e-6)
                yield Case(name, close, tail(done.said))
            else:
                yield ended(done, 8, name)


GOOD = '{"prompt": "a", "completion": "b"}\n'
BAD_ROWS: dict[str, bytes] = {
    "bad JSON": b'{"prompt": "a", \n',
    "cut last line": GOOD.encode() + b'{"prompt": "a", "completion": "b',
    "NUL": b"\x00\x00\x00\n",
    "bad UTF-8": b'{"prompt": "\xff", "completion": "b"}\n',
    "wrong type": b'{"prompt": 3, "completion": ["x"]}\n',
    "missing field": b'{"prompt": "a"}\n',
    "empty file": b"",
    "blank lines": b"\n\n\n",
    "a list": b"[1, 2, 3]\n",
    "a number of 5,000 digits": b'{"prompt": "a", "completion": ' + b"9" * 5000 + b"}\n",
    "lone surrogate": b'{"prompt": "\\ud800", "completion": "b"}\n',
    "deep JSON": b"[" * 200_000 + b"\n",
    "unknown role": b'{"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]}\n',
    "no trained token": b'{"prompt": "a", "completion": ""}\n',
}


def bad_rows(stage: Stage, long: bool) -> Row:
    """Faulty rows end 3 with file and line; a mark of order or another line ending does not; a long line is cheap."""
    for name, content in BAD_ROWS.items():
        path = stage.folder / "bad.jsonl"
        path.write_bytes((GOOD * 3).encode() * bool(content.strip()) + content)
        yield ended(stage.train(stage.place(), rows=path), 3, name, "bad.jsonl", within=20)
    good = (GOOD * 8).encode()
    for name, content in {"BOM": b"\xef\xbb\xbf" + good, "CRLF": good.replace(b"\n", b"\r\n")}.items():
        path = stage.folder / "good.jsonl"
        path.write_bytes(content)
        yield ended(stage.train(stage.place(), rows=path), 0, name)
    path = stage.folder / "long.jsonl"
    path.write_text(GOOD * 8 + json.dumps({"prompt": "ab " * 500_000, "completion": "b"}) + "\n")
    done = stage.train(stage.place(), rows=path)
    yield ended(done, (0, 3), "a row of 1.5 MB", within=8)
    more = (done.peak - stage.idle) >> 20
    yield Case("its memory", more < 300, f"{more} MiB more than idle")


BAD_SETTINGS = (
    "nosuch=1", "train.learnin_rate=1e-3", "train.max_steps=0", "train.max_steps=-1", "train.max_steps=1.5", "train.max_steps=1e30",
    "train.learning_rate=nan", "train.learning_rate=-1", "train.learning_rate=inf", "train.learning_rate=x", "adapter.r=0",
    "adapter.r1=99999999999999999999", "adapter.warmup_steps=1e30", "adapter.alpha=nan", "adapter.alpha=-1",
    "adapter.target_modules=nosuch", "adapter.target_modules=(((", "adapter.target_modules=[]", "adapter.modules_to_save=[nosuch]",
    "adapter.modules_to_save=[null]", "adapter.alpha_pattern=text", "train.batch_size=0", "seed=" + "9" * 5000, "seed=-1",
    "train.report_to=[nosuch]", "data.max_length=0", "adapter.start=runs/x", "adapter.magnitude=cosine", "train.optimizer=nosuch",
)  # fmt: skip


def bad_settings(stage: Stage, long: bool) -> Row:
    """Unknown keys, wrong types, values out of range, bombs: exit 2 with the key, and nothing half-written."""
    for setting in BAD_SETTINGS:
        folder = stage.place()
        key = setting.partition("=")[0].rpartition(".")[2]
        yield ended(stage.train(folder, settings=(setting,)), (2, 3), setting[:40], key, within=20)
        yield Case(f"{setting[:40]}: no folder", not folder.exists(), str(sorted(folder.rglob("*")))[:200])
    bombs = {
        "aliases": "a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]\n", "object": "seed: !!python/object/apply:os.system ['true']\n",
        "duplicate": "seed: 1\nseed: 2\n", "deep": "[" * 50_000, "binary": "\x00\x01", "scalar": "3", "a list": "- 1\n",
    }  # fmt: skip
    for name, text in bombs.items():
        path = stage.folder / "recipe.yaml"
        path.write_text(text)
        yield ended(stage.call("train", "-c", path), 2, f"recipe: {name}", "recipe.yaml", within=10)
    yield ended(stage.call("train", "-c", stage.folder / "none.yaml"), 2, "recipe: missing", "none.yaml")
    yield ended(stage.train(stage.folder / ("n" * 300)), (2, 7), "an output of 300 letters", within=20)


def _adapter(stage: Stage) -> Path:
    return stage.place(stage.straight / "adapter")


def damaged_adapters(stage: Stage, long: bool) -> Row:
    """A weights file with a lying header, empty, or of text: refused with its name at no cost of memory."""
    source = (stage.straight / "adapter" / WEIGHTS).read_bytes()
    yield ended(stage.call("check", stage.straight / "adapter"), 0, "sound")
    lying = (1 << 60).to_bytes(8, "little") + source[8:]
    for name, content in {"header of 2^60": lying, "empty": b"", "text": b"hello"}.items():
        folder = _adapter(stage)
        (folder / WEIGHTS).write_bytes(content)
        yield ended(stage.call("check", folder), 4, name, WEIGHTS, within=10)


def killed_grids(stage: Stage, long: bool) -> Row:
    """A cell, or the grid itself, is killed: called again, it ends with every cell's bits."""
    grid, whole = stage.folder / "grid.yaml", stage.place()
    settings = dict(setting.split("=") for setting in SETTINGS if setting[-1].isdigit())
    base = {name: json.loads(value) for name, value in settings.items()}
    base |= {"model.name": str(stage.model), "data.path": str(stage.rows)}
    variants = {"a": {"adapter.r1": 2}, "b": {"adapter.r1": 3}}
    grid.write_text(
        json.dumps({"name": "kills", "base": base, "tasks": {"sums": {}}, "variants": variants, "seeds": [0]})
    )

    def run(folder: Path, **how: Any) -> harness.Result:
        return stage.call("grid", "-c", grid, "-o", folder, "--keep", "all", seconds=300, **how)

    yield ended(run(whole), 0, "undisturbed")
    wanted = {path.relative_to(whole): digest(path) for path in whole.glob(f"cells/*/adapter/{WEIGHTS}")}
    yield Case("both cells", len(wanted) == 2, str(sorted(wanted)))
    for i in range(12 if long else 2):
        folder, draw = stage.place(), random.Random(f"grid {i}")

        def sealed(folder: Path = folder) -> bool:
            return any(folder.glob("cells/*/checkpoints/*/MANIFEST.json"))

        def kill(pid: int, folder: Path = folder, parent: bool = i % 2 == 0) -> None:
            cells = [json.loads(path.read_text())["pid"] for path in folder.glob("cells/*/run.json")]
            for victim in [pid] if parent else cells:
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)

        run(folder, watch=when(sealed, kill, draw.uniform(0, 0.5)))
        time.sleep(1.0)  # an orphaned cell ends by itself
        done = run(folder)
        found = {path.relative_to(folder): digest(path) for path in folder.glob(f"cells/*/adapter/{WEIGHTS}")}
        fine = done.code == 0 and found == wanted
        yield Case(f"{'grid' if i % 2 == 0 else 'cell'}, kill {i}", fine, f"exit {done.code}: {tail(done.said)}")


def failing_calls(stage: Stage, long: bool) -> Row:
    """The k-th write, flush or rename of a run fails or kills it (strace, where it is installed)."""
    if shutil.which("strace") is None:
        return
    import subprocess
    import sys

    code = "from duallora import cli; import sys; sys.exit(cli.run(sys.argv[1:]))"
    for call in ("fsync", "rename"):
        for k in range(1, 13 if long else 2):
            for fault in ("error=ENOSPC", "signal=SIGKILL"):
                folder = stage.place()
                argv = ["train", "--model", stage.model, "--data", stage.rows, "-o", folder]
                argv += [word for setting in SETTINGS for word in ("--set", setting)]
                inject = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject={call}:{fault}:when={k}"]
                command = [*inject, sys.executable, "-c", code, *map(str, argv)]
                done = subprocess.run(command, capture_output=True, text=True, cwd=stage.folder, timeout=300)
                name = f"{call} {k}: {fault}"
                if fault.startswith("error") and done.returncode not in (0, 7):
                    yield Case(name, False, f"exit {done.returncode}: {tail(done.stdout + done.stderr)}")
                else:
                    yield stage.resumed(folder, name)
                stage.drop(folder)


def other_tensors(stage: Stage, long: bool) -> Row:
    """Missing, unexpected, misshapen tensors, another dtype, NaN, zero; another base."""
    sidecar = "duallora.json"
    changes: dict[str, tuple[Callable[[dict], Any], int | tuple[int, ...]]] = {
        "missing": (lambda t: t.pop(sorted(t)[0]), 4),
        "unexpected": (lambda t: t.update(extra=torch.zeros(2)), 4),
        "shape": (lambda t: t.update({sorted(t)[0]: torch.zeros(3, 3)}), 4),
        "integers": (lambda t: t.update({k: v.to(torch.int32) for k, v in t.items()}), 4),
        "NaN": (lambda t: t[sorted(t)[0]].view(-1)[:1].fill_(float("nan")), (4, 5)),
        "infinite": (lambda t: t[sorted(t)[0]].view(-1)[:1].fill_(float("inf")), (4, 5)),
    }
    for name, (change, code) in changes.items():
        folder = _adapter(stage)
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
        (folder / sidecar).unlink(missing_ok=True)
        for verb in (("check", folder), ("merge", folder, "-o", stage.place())):
            yield ended(stage.call(*verb), code, f"{name}: {verb[0]}", within=20)
    other = stage.folder / "other-model"
    harness.build_model(other, num_hidden_layers=3) if not other.exists() else None
    for verb in ("check", "merge"):
        more = ("-o", stage.place()) if verb == "merge" else ()
        yield ended(stage.call(verb, _adapter(stage), "--base", other, *more), (2, 4), f"another base: {verb}")


def pickles(stage: Stage, long: bool) -> Row:
    """A pickle that touches a file when it is read, in every place where one could be: the file never appears."""
    canary = stage.folder / "canary"
    content = b"cbuiltins\nopen\n(S'" + str(canary).encode() + b"'\nS'w'\ntR."
    for name in ("adapter_model.bin", "pytorch_model.bin", WEIGHTS, "training_args.bin"):
        folder = _adapter(stage)
        if name.endswith("model.bin"):
            (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(content)
        done = stage.call("check", folder)
        fine = not canary.exists() and "weights_only" not in done.said
        fine = fine and (done.code == 4 or name == "training_args.bin")
        yield Case(f"adapter: {name}", fine, f"exit {done.code}: {tail(done.said)}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        folder = stage.place(stage.interrupted())
        for path in (folder / "checkpoints").glob("checkpoint-*"):
            (path / name).write_bytes(content)
        stage.train(folder, "--resume", "auto")
        yield Case(f"checkpoint: {name}", not canary.exists())
    base = stage.place(stage.model)
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(content)
    done = stage.begin(base)
    yield ended(done, (2, 4), "base: pytorch_model.bin")
    yield Case("its words", not canary.exists() and "weights_only" not in done.said, tail(done.said))


def strangers_code(stage: Stage, long: bool) -> Row:
    """auto_map with a file of Python beside it, in each config of adapter and base, with `y` waiting on stdin."""
    canary = stage.folder / "ran"
    code = f"open({str(canary)!r}, 'w')\nclass Evil: pass\n"
    kinds = {
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"},
        "config.json": {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"},
        "adapter_config.json": {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}},
        "processor_config.json": {"auto_map": {"AutoProcessor": "evil.Evil"}},
        "generation_config.json": {"custom_generate": "evil.py"},
    }  # fmt: skip

    def answers_yes() -> None:
        read, write = os.pipe()
        os.write(write, b"y\n" * 50)
        os.close(write)
        os.dup2(read, 0)

    for name, change in kinds.items():
        for where in ("adapter", "base"):
            folder = stage.place(stage.straight / "adapter" if where == "adapter" else stage.model)
            (folder / "evil.py").write_text(code)
            path = folder / name
            path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **change}))
            if where == "adapter":
                verbs: list[tuple] = [("check", folder), ("eval", folder, "--data", stage.rows)]
            else:
                verbs = [("train", "--model", folder, "--data", stage.rows, "-o", stage.place(), "--dry-run")]
            for verb in verbs:
                done = stage.call(*verb, patch=answers_yes, seconds=30)
                asked = "trust_remote_code=True" in done.said or "[y/N]" in done.said
                fine = not (canary.exists() or asked or done.hung)
                yield Case(f"{where} {name}: {verb[0]}", fine, f"exit {done.code}: {tail(done.said)}")


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"


def bombs(stage: Stage, long: bool) -> Row:
    """Templates without end, catastrophic patterns, deep and huge JSON beside an adapter or a base: 10 s and an exit code."""
    chats = stage.folder / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n' * 8)
    growth = "{% set x = 'a' * 99999999 %}{{ x * 99999 }}"
    for name, template in {"loops": LOOPS, "growth": growth, "syntax": "{% for %}"}.items():
        for file in ("chat_template.jinja", "tokenizer_config.json"):
            folder = stage.place(stage.model)
            if file.endswith("jinja"):
                (folder / file).write_text(template)
            else:
                (folder / "chat_template.jinja").unlink(missing_ok=True)
                edit(folder / file, lambda found, template=template: {**found, "chat_template": template})
            done = stage.begin(folder, rows=chats, seconds=40)
            yield ended(done, (2, 3, 4), f"template {name} in {file}", within=15)
    for field, value in {
        "target_modules": "(a+)+$" + "|(b*)*c" * 50, "target_modules ": ["x" * 100_000], "r": 10**9, "r1": -1, "alpha": "x",
        "alpha_pattern": "text", "modules_to_save": 1, "modules_to_save ": [None], "base_model_name_or_path": 3, "peft_type": [],
        "task_type": {}, "layers_pattern": "(a|a)*$", "exclude_modules": "(a+)+$", "inference_mode": "no", "warmup_steps": 1e30,
        "rank_pattern": {"(a+)+$" * 20: 4},
    }.items():  # fmt: skip
        folder = _adapter(stage)
        edit(folder / "adapter_config.json", lambda found, field=field, value=value: {**found, field.strip(): value})
        (folder / "duallora.json").unlink(missing_ok=True)
        done = stage.call("check", folder, seconds=30)
        yield ended(done, (0, 2, 4), f"{field.strip()} = {str(value)[:30]}", within=10)
    texts = {"deep": "[" * 200_000, "a list": "[]", "a number": "3", "empty": "", "binary": "\x00\xff"}
    texts["nested"] = '{"a":' * 50_000
    for file in ("adapter_config.json", "duallora.json", "tokenizer.json", "tokenizer_config.json"):
        for name, text in texts.items():
            folder = _adapter(stage)
            (folder / file).write_text(text)
            done = stage.call("eval", folder, "--data", stage.rows, seconds=30)
            yield ended(done, (0, 2, 4), f"{file}: {name}", within=15)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        for name, text in texts.items():
            folder = stage.place(stage.model)
            (folder / file).write_text(text)
            yield ended(stage.begin(folder), (0, 2, 4), f"base {file}: {name}", within=15)
    folder = stage.place(stage.model)
    evil = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    edit(folder / "tokenizer.json", lambda found: {**found, "pre_tokenizer": evil})
    rows = stage.folder / "aaa.jsonl"
    rows.write_text((json.dumps({"prompt": "a" * 60 + "!", "completion": "b"}) + "\n") * 4)
    yield ended(stage.begin(folder, rows=rows), (0, 2, 4), "regex bomb", within=15)
    folder = stage.place(stage.model)
    edit(folder / "tokenizer.json", lambda found: found["model"]["vocab"].update({"Q": 10**6}))
    rows.write_text((json.dumps({"prompt": "Q" * 5, "completion": "Q"}) + "\n") * 4)
    yield ended(stage.begin(folder, rows=rows), (2, 4), "token ids beyond the vocabulary")


def escapes(stage: Stage, long: bool) -> Row:
    """Names that lead out of a folder, in sidecar, manifest, index and output."""
    outside = stage.folder / "outside.safetensors"
    shutil.copy(stage.straight / "adapter" / WEIGHTS, outside)
    for name in ("../outside.safetensors", str(outside), "a\x00b", "..", "C:\\x", "x" * 300, "ﬁle.safetensors"):
        folder = _adapter(stage)
        path = folder / "duallora.json"
        found = json.loads(path.read_text())
        found["files"] = {**found.get("files", {}), name: {"sha256": digest(outside), "size": outside.stat().st_size}}
        path.write_text(json.dumps(found))
        yield ended(stage.call("check", folder), (2, 4), f"sidecar names {name[:20]!r}")
    for value in ([], "x", 3, None, {"a": []}):
        folder = _adapter(stage)
        edit(folder / "duallora.json", lambda found, value=value: {**found, "files": value})
        yield ended(stage.call("check", folder), (2, 4), f"files = {value}")
    folder = _adapter(stage)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(outside)
    yield ended(stage.call("check", folder), 4, "weights are a link that leads outside")


def determinism(stage: Stage, long: bool) -> Row:
    """The same run twice, elsewhere, under other hash seeds and threads, has the same bits."""
    for i in range(10 if long else 2):
        folder = stage.place() / "deep" / f"run {i}"
        done = stage.train(folder)
        yield Case(f"again {i}", digest(folder / "adapter" / WEIGHTS) == stage.wanted, tail(done.said))
    folder = stage.place()
    done = stage.train(folder, patch=lambda: torch.set_num_threads(2))
    yield Case("two threads, within 1e-5", done.code == 0 and stage.close(folder, 1e-5), tail(done.said))


def merges(stage: Stage, long: bool) -> Row:
    """merge, again and again, and convert at every rank: the same bytes, bounded ranks."""
    sums = set()
    for _ in range(20 if long else 3):
        folder = stage.place()
        stage.call("merge", stage.straight, "-o", folder)
        sums.add(digest(folder / "model.safetensors"))
    yield Case("merge", len(sums) == 1 and "missing" not in sums, str(sums))
    folder = stage.place()
    done = stage.call("convert", stage.straight, "-o", folder, "--rank", "99999")
    size = sum(path.stat().st_size for path in folder.rglob("*")) if folder.exists() else 0
    yield Case("convert --rank 99999", done.code in (0, 2) and size < 4 << 20, f"exit {done.code}, {size >> 10} KiB")
    yield ended(stage.call("merge", stage.straight, "-o", stage.straight), 2, "merge into the run itself")


MATRIX: dict[str, Callable[[Stage, bool], Row]] = {
    "kill inside a save": kills_in_a_save,
    "kill anywhere: train, merge, convert": kills_anywhere,
    "SIGTERM, SIGINT": told_to_stop,
    "damaged checkpoint": damaged_checkpoints,
    "weights without optimizer state": weights_alone,
    "other settings, rows, base, tokenizer": other_settings,
    "NaN, infinity": non_finite,
    "divergence": divergence,
    "full disk": full_disk,
    "permissions, masks": permissions,
    "shared, foreign and damaged run folders": shared_folders,
    "out of memory": out_of_memory,
    "bad rows": bad_rows,
    "bad settings": bad_settings,
    "kill in a grid": killed_grids,
    "the k-th fsync or rename": failing_calls,
    "damaged adapter": damaged_adapters,
    "other tensors, NaN, another base": other_tensors,
    "pickles": pickles,
    "a stranger's code": strangers_code,
    "a stranger's bombs": bombs,
    "names that lead outside": escapes,
    "determinism": determinism,
    "merge, convert": merges,
    "fuzz": fuzz,
}
