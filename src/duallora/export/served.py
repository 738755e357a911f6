"""An adapter made ready for an engine once: merged, or as a plain LoRA, in a cache keyed by all that it was made from."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console
from rich.markup import escape

from duallora.errors import ConfigError, DataError
from duallora.export import card, check, convert, merge
from duallora.folders import cache_folder
from duallora.store import adapters, checkpoint, models, record, untrusted
from duallora.terminal import command, say, shown
from duallora.train import score

MADE = "made.json"  # beside what the cache holds: what it was made from, and the hash of every file


def sound(source: str, console: Console) -> Path | None:
    """The folder of an adapter whose files `check` finds sound; None for a model, compared with the hashes it has."""
    folder = adapters.find(source)
    for note in check.require_sound(folder) if folder else ():
        say(console, "note", note)
    is_adapter = folder is not None and adapters.is_adapter(folder)
    trained = None if is_adapter else adapters.trained_for(source)
    kind = adapters.adapter_kind(source) if is_adapter else trained.kind if trained else "generate"
    if kind != "generate":
        raise ConfigError(
            f"{source} was trained to {kind}, no text to serve. Use {command('predict', source, 'FILE', '-o', 'answers.csv')}"
        )
    return folder if is_adapter else None


def made(folder: Path, rank: int | None, console: Console) -> Path:
    """The adapter in ``folder`` merged into its base, or as a LoRA of ``rank``: as the cache holds it, else made now.

    The LoRA keeps the outputs near on the run's own training rows, which are part of the key, where they can be read.
    What lies there under the same key but is damaged, or was made from anything else, is made anew.
    """
    facts = {"rank": rank, "adapter": _hashes(folder), "base": base(folder)}
    if rank is not None:
        facts["rows"] = _rows(folder, console)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    place = cache_folder() / "served" / key[:32]
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        if place.exists():
            with suppress(OSError, ValueError):
                if record.read_json(place / MADE) == {**facts, "files": _hashes(place / "model")}:
                    say(console, "cached", shown(place))
                    return place / "model"
            say(console, "cache", f"{shown(place)} is damaged, or of other content, and is made anew")
            shutil.rmtree(place)
        with merge.beside(place) as building:
            if rank is None:
                done = merge.merge(folder, building / "model", console=Console(quiet=True))
                say(console, "merged", f"logits differ from the adapter's by at most {done['max_logit_difference']:g}")
            else:
                _convert(folder, building / "model", rank, bool(facts["rows"]), console)
            record.write_json(building / MADE, {**facts, "files": _hashes(building / "model")})
    return place / "model"


def _convert(folder: Path, output: Path, rank: int, calibrate: bool, console: Console) -> None:
    done = convert.convert(folder, output, rank=rank, calibrate=calibrate, console=Console(quiet=True))
    norm = "|dW x|² on its training rows" if calibrate else "|dW|²"
    say(console, "lora", f"{shown(folder)}: {done['energy']:.2%} of {norm} kept at rank {done['rank']}")
    if kl := done["held_out"].get("conversion", {}).get("kl"):
        say(console, "held out", f"KL {kl:.2e} from the adapter")


def _rows(folder: Path, console: Console) -> dict[str, str] | None:
    """The fingerprints of the run's own rows; None, which is said, where there are none to calibrate on."""
    if not score.recipe_file(folder):
        return None
    try:
        task = score.choose(str(folder), Console(quiet=True)).task
    except (ConfigError, DataError) as error:
        say(
            console,
            "rows",
            f"[yellow]by the weights alone: the run's own rows cannot be read ({escape(str(error))})[/]",
        )
        return None
    return {name: task.fingerprint(name) for name in task.splits}


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of a folder's files by name, but for its card."""
    files = (path for path in folder.glob("*") if path.is_file() and path.name != "README.md")
    return {path.name: checkpoint.file_record(path)["sha256"] for path in files}


def base(folder: Path) -> dict[str, Any]:
    """The base of an adapter: where it is, and its content."""
    name, revision = adapters.base_name(folder), untrusted.read(folder).get("revision")
    return {"place": models.resolve(name), "revision": revision, "content": _content(name, revision)}


def _content(model: str, revision: str | None = None) -> Any:
    """The hashes of a model folder's files, or the commit of a hub id."""
    place = Path(models.resolve(model))
    return _hashes(place) if place.is_dir() else models.load_config(model, revision=revision)._commit_hash


def lora(folder: Path, rank: int, console: Console) -> Path:
    """An adapter as a LoRA: as it is, the largest conversion that lies with it, of ``rank`` at most, else made."""
    path = folder
    if untrusted.read(folder)["peft_type"] == "DUALLORA":
        left = [path for path, facts in card.conversions(folder).values() if facts["rank"] <= rank]
        path = left[-1] if left else made(folder, rank, console)
        if left:
            check.require_sound(path)
            say(console, "found", f"{shown(path)}, made by {command('convert')}")
    if reasons := check.vllm(untrusted.read(path), adapters.check_adapter(path)).reasons:
        raise ConfigError(f"vLLM does not take {shown(folder)}: {'; '.join(reasons)}. Serve it alone, merged")
    return path


def named_lora(source: Path, served: str, rank: int, console: Console) -> Path | None:
    """The Dual LoRA run or adapter ``source`` as a LoRA for a server of the model ``served``; None for another method's.

    Raises:
        ConfigError: it belongs to another base, generates no text, or vLLM does not take it.
        IntegrityError, NonFiniteError: it is damaged or hostile.
    """
    folder = sound(str(source), console)
    if folder is None or untrusted.read(folder)["peft_type"] != "DUALLORA":
        return None
    its = base(folder)
    # Offline, vLLM calls a hub's model by its folder in the cache, whose own name is the commit.
    if served != its["place"] and its["content"] not in (Path(served).name, _content(served)):
        raise ConfigError(f"its base model is {its['place']}, not the one that is served ({served})")
    return lora(folder, rank, console)
