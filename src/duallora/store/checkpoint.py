"""Checkpoints that are known to be whole.

Trainer writes ``checkpoint-N`` file by file and resumes from the highest number, whole or not: a kill inside a save
leaves a folder that cannot be resumed, and a flipped bit is resumed without a word. Here ``MANIFEST.json``, written
last and atomically, lists every file with its size and sha256. A folder counts only if all of it matches.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from duallora.errors import ConfigError, IntegrityError
from duallora.store.processes import MAX_PROCESSES
from duallora.store.record import flush, follow_umask, fsync_folder, read_json, write_json

MANIFEST = "MANIFEST.json"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")  # one of them: an adapter's, or a whole model's
REQUIRED = ("optimizer.pt", "scheduler.pt", "trainer_state.json")
# What stands for them where a model is saved whole or in shards, and where FSDP or DeepSpeed save in folders of their own.
_INSTEAD = {
    WEIGHTS[0]: r".*\.(safetensors|distcp)",
    "optimizer.pt": r"optimizer\.(pt|bin)|(optimizer_\d+|global_step\d+)/.+",
}
# Trainer and PEFT pick up files of these kinds by name, so a stray one could be loaded in place of a listed one.
LOADABLE = {".bin", ".pt", ".pth", ".safetensors", ".pkl"}

# What a resumed run may change: none of it reaches a weight.
FREE_KEYS = (
    "output",
    "eval.",
    "data.eval_limit",
    "data.data_dir",
    "train.save_steps",
    "train.save_total_limit",
    "train.logging_steps",
    "train.eval_steps",
    "train.report_to",
    "train.auto_batch",
    "model.revision",
)

STEP = ("train.batch_size", "train.gradient_accumulation_steps")  # whose product is the rows of an optimizer step


def commit(folder: Path, *, step: int, fingerprints: Mapping[str, Any]) -> None:
    """Seals ``folder``: hashes and flushes every file, then writes the manifest that makes it a checkpoint."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            follow_umask(path)
            fsync_folder(path)
        elif path.name != MANIFEST:
            flush(path)
            files[path.relative_to(folder).as_posix()] = file_record(path)
    follow_umask(folder)
    fsync_folder(folder)
    body = {"step": step, **fingerprints, "files": files}
    write_json(folder / MANIFEST, {**body, "digest": _digest(body)})
    fsync_folder(folder.parent)


def file_record(path: Path) -> dict[str, Any]:
    """``{"sha256": hex, "size": bytes}`` of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "size": path.stat().st_size}


def compare_files(folder: Path, files: Mapping[str, Any], ignore: Sequence[Path] = ()) -> str | None:
    """The first difference between ``folder``, but for the folders ``ignore``, and the recorded ``files``, or None."""
    for name, expected in files.items():
        path = folder / name
        try:
            own = (
                str(PurePosixPath(name)) == name and not {"..", "/"} & {*PurePosixPath(name).parts} and "\\" not in name
            )
            own = own and path.parent.resolve().is_relative_to(folder.resolve()) and is_own(path)
        except (OSError, ValueError):  # no name that a file can have
            own = False
        if not own:
            return f"{name[:80]!r} is not a plain file of this folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected.get("size"):
            return f"{name} has {path.stat().st_size:,} bytes, {expected.get('size')} expected"
        if file_record(path)["sha256"] != expected.get("sha256"):
            return f"{name} is damaged (its sha256 is not the recorded one)"
    for path in sorted(folder.rglob("*")):
        if path.suffix in LOADABLE and path.relative_to(folder).as_posix() not in files and path.parent not in ignore:
            return f"{path.relative_to(folder)} was added after the folder was written"
    return None


def is_own(path: Path) -> bool:
    """Whether a file is no link, or one as the hub's cache lays them: inside of its own repository's folder.

    There ``models--ORG--NAME/snapshots/REVISION/FILE`` is a link to ``models--ORG--NAME/blobs/HASH``. A link that leads
    anywhere else could show a file of this machine as part of a stranger's adapter.
    """
    if not path.is_symlink():
        return True
    snapshot = path.parent.resolve()
    repository = snapshot.parent.parent
    in_cache = snapshot.parent.name == "snapshots" and repository.name.startswith("models--")
    return in_cache and path.resolve().parent == repository / "blobs"


def verify(folder: Path) -> str | None:
    """Why ``folder`` (``checkpoint-N``) cannot be resumed from, in one line, or None if it is whole."""
    if not is_sealed(folder):
        return f"{MANIFEST} is missing: the save did not finish"
    try:
        manifest = read_json(folder / MANIFEST)
        digest = manifest.pop("digest")
        files = manifest["files"]
        whole = digest == _digest(manifest) and isinstance(files, dict) and isinstance(manifest["step"], int)
        whole = whole and manifest.get("processes", 1) in range(1, MAX_PROCESSES + 1)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        return f"{MANIFEST} is damaged"
    if folder.name != f"checkpoint-{manifest['step']}":
        return f"{MANIFEST} is that of step {manifest['step']}: the folder was copied or renamed"
    for name in (WEIGHTS[0], *REQUIRED, *rng_files(manifest.get("processes", 1))):
        if not any(re.fullmatch(_INSTEAD.get(name, re.escape(name)), found) for found in files):
            return f"{name} was not saved, so an exact resume is impossible"
    return compare_files(folder, files)


def rng_files(processes: int) -> list[str]:
    """The files in which Trainer keeps the state of each process's generators."""
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{index}.pth" for index in range(processes)]


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """``(step, path)`` of each ``checkpoint-N`` folder, newest first, whole or not."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(((step_of(path), path) for path in paths if path.is_dir() and step_of(path) >= 0), reverse=True)


def step_of(path: Path) -> int:
    """N of ``checkpoint-N``; -1 where the name is another."""
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number != path.name and number.isdecimal() else -1


def is_sealed(folder: Path) -> bool:
    """Whether its save came to its end; it may have been damaged since."""
    return (folder / MANIFEST).is_file()


def sealed(folder: Path) -> list[tuple[int, Path]]:
    """Those `checkpoints` that are."""
    return [(step, path) for step, path in checkpoints(folder) if is_sealed(path)]


def newest_verified(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint below ``folder`` and one line for each newer one that was passed over."""
    reasons: list[str] = []
    for _, path in checkpoints(folder):
        reason = verify(path)
        if reason is None:
            return path, reasons
        reasons.append(f"{path.name}: {reason}")
    return None, reasons


def require_resumable(folder: Path) -> tuple[Path | None, list[str]]:
    """`newest_verified`, but raises IntegrityError where checkpoints were sealed and none is whole. Deletes nothing."""
    path, reasons = newest_verified(folder)
    if path is None and sealed(folder):
        raise IntegrityError(
            f"none of the {len(reasons)} checkpoints in {folder} can be resumed:\n  "
            + "\n  ".join(reasons)
            + "\nnothing was deleted; restore one from a backup, or start again in another folder with -o"
        )
    return path, reasons


def rotate(folder: Path, keep: int | None, spare: Path | None = None) -> None:
    """Deletes what is older than the ``keep`` newest whole checkpoints, but ``spare``; broken folders do not count as kept."""
    if keep is None:
        return
    kept = 0
    for _, path in checkpoints(folder):
        if kept >= keep and path.name != (spare and spare.name):
            # The manifest goes first: a kill in between leaves a folder that is plainly not a checkpoint.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
        elif verify(path) is None:
            kept += 1


def drift(before: Mapping[str, Any], after: Mapping[str, Any], free: tuple[str, ...] = FREE_KEYS) -> list[str]:
    """``key: old -> new`` for each setting but the ``free`` ones, whose change does not make a resumed run another run.

    Smaller batches and as much more accumulation are the same run: the rows of each optimizer step are the same.
    """
    old, new = flatten(before), flatten(after)
    same = _step_rows(old) == _step_rows(new)
    changed = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(free + (STEP if same else ())):
            changed.append(f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}")
    return changed


def _step_rows(settings: Mapping[str, Any]) -> int | None:
    return math.prod(settings[key] for key in STEP) if all(key in settings for key in STEP) else None


def refuse_drift(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raises ConfigError listing every change of `drift`."""
    changed = drift(before, after)
    if changed:
        raise ConfigError(
            "this run was started with other settings, so it cannot be resumed exactly:\n  "
            + "\n  ".join(changed)
            + "\nset them back, or start a new run in another folder with -o"
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
