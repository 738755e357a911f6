"""An adapter behind a serving engine: made ready once, in a cache keyed by content, then handed to vLLM or transformers.

One adapter is merged into its base; several become plain LoRAs over theirs, which vLLM alone can serve.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from rich.console import Console
from rich.markup import escape

from duallora.errors import ConfigError, DualLoraError
from duallora.export import card, check, convert, merge
from duallora.folders import cache_folder
from duallora.store import adapters, checkpoint, models, record, untrusted
from duallora.terminal import command, say, shown

Engine = Literal["vllm", "transformers"]
MADE = "made.json"  # beside what the cache holds: what it was made from, and the hash of every file


def prepare(
    sources: Sequence[str],
    *,
    engine: Engine | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    rank: int = 64,
    arguments: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Makes ``sources`` ready and returns ``{"engine", "models", "command"}``: the ids served, and what to execute.

    A source is a run, an adapter, or a model's folder or hub id; NAME=SOURCE names it. ``engine=None`` takes vLLM where
    it is installed, else transformers. ``rank`` is that of the LoRAs which several adapters become, and ``arguments`` go
    to the engine as they are.

    Raises:
        ConfigError: the engine is not installed, or cannot serve these sources.
        IntegrityError, NonFiniteError: an adapter is damaged or hostile, or belongs to another base.
    """
    console = console or Console()
    named: dict[str, str] = {}
    for item in sources:
        name, _, source = ("", "", item) if Path(item).exists() else item.rpartition("=")
        name = name or Path(source).absolute().name
        if name in named:
            raise ConfigError(f"{named[name]} and {source} are both called {name!r}: write other={source}")
        named[name] = source
    engine, program = installed(engine, len(named))
    folders = {name: _sound(source, console) for name, source in named.items()}
    if len(named) > 1:
        ids, served = list(named), _loras(folders, rank, console)
    else:
        ((name, folder),) = folders.items()
        model = str(made(folder, None, console) if folder else models.resolve(named[name]))
        ids, served = ([name], [model, "--served-model-name", name]) if engine == "vllm" else ([model], [model])
    words = [program, "serve", *served, "--host", host, "--port", str(port), *arguments]
    say(console, "serving", escape(f"{', '.join(ids)} at http://{host}:{port}/v1"))
    say(console, "engine", escape(command(*words[1:], program=program)))
    return {"engine": engine, "models": ids, "command": words}


def installed(engine: Engine | None, count: int = 1) -> tuple[Engine, str]:
    """(engine, program) for ``count`` sources; ConfigError with the install command where it is not here."""
    here = sysconfig.get_path("scripts")  # of this environment, which need not be on PATH
    vllm = shutil.which("vllm", path=here) or shutil.which("vllm")
    if vllm and engine != "transformers":
        return "vllm", vllm
    if engine == "vllm" or count > 1:
        raise ConfigError("vLLM, which alone serves several adapters at once, is not installed: pip install vllm")
    program = shutil.which("transformers", path=here)
    missing = [name for name in ("fastapi", "uvicorn", "openai", "transformers.cli") if find_spec(name) is None]
    if missing or not program:
        raise ConfigError(f"no engine is installed (no {', '.join(missing)}): pip install 'duallora[serve]', or vllm")
    return "transformers", program


def _sound(source: str, console: Console) -> Path | None:
    """The folder of an adapter whose files `check` finds sound; None for a model, compared with the hashes it has."""
    folder = adapters.find(source)
    for note in check.require_sound(folder) if folder else ():
        say(console, "note", note)
    is_adapter = folder is not None and (folder / "adapter_config.json").is_file()
    trained = None if is_adapter else adapters.trained_for(source)
    kind = adapters.adapter_kind(source) if is_adapter else trained.kind if trained else "generate"
    if kind != "generate":
        raise ConfigError(f"{source} was trained to {kind}, no text to serve. Use {command('eval', source)}")
    return folder if is_adapter else None


def made(folder: Path, rank: int | None, console: Console) -> Path:
    """The adapter in ``folder`` merged into its base, or as a LoRA of ``rank``: as the cache holds it, else made now.

    What lies there under the same key but is damaged, or was made from anything else, is made anew.
    """
    facts = {"rank": rank, "adapter": _hashes(folder), "base": _base(folder)}
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
                done = convert.convert(folder, building / "model", rank=rank, console=Console(quiet=True))
                say(console, "converted", f"{shown(folder)}: {done['energy']:.2%} of |dW|² kept at rank {done['rank']}")
            record.write_json(building / MADE, {**facts, "files": _hashes(building / "model")})
    return place / "model"


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of a folder's files by name, but for its card."""
    files = (path for path in folder.glob("*") if path.is_file() and path.name != "README.md")
    return {path.name: checkpoint.file_record(path)["sha256"] for path in files}


def _base(folder: Path) -> dict[str, Any]:
    """The base of an adapter: where it is, and its content."""
    config, told = untrusted.read(folder), adapters.read_sidecar(folder).get("base", {})
    name, revision = str(config.get("base_model_name_or_path") or told.get("name")), config.get("revision")
    return {"place": models.resolve(name), "revision": revision, "content": _content(name, revision)}


def _content(model: str, revision: str | None = None) -> Any:
    """The hashes of a model folder's files, or the commit of a hub id."""
    place = Path(models.resolve(model))
    return _hashes(place) if place.is_dir() else models.load_config(model, revision=revision)._commit_hash


def _lora(folder: Path, rank: int, console: Console) -> Path:
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
    folder = _sound(str(source), console)
    if folder is None or untrusted.read(folder)["peft_type"] != "DUALLORA":
        return None
    base = _base(folder)
    # Offline, vLLM calls a hub's model by its folder in the cache, whose own name is the commit.
    if served != base["place"] and base["content"] not in (Path(served).name, _content(served)):
        raise ConfigError(f"its base model is {base['place']}, not the one that is served ({served})")
    return _lora(folder, rank, console)


def _loras(folders: dict[str, Path | None], rank: int, console: Console) -> list[str]:
    """vLLM's words for several adapters, each as a LoRA, over the one base that they must have."""
    bases = [_base(folder) for folder in folders.values() if folder]
    if len(bases) < len(folders) or any(base["content"] != bases[0]["content"] for base in bases):
        raise ConfigError(f"{', '.join(folders)} are not adapters of one base model: serve them one by one")
    loras = {name: _lora(folder, rank, console) for name, folder in folders.items() if folder}
    most = max(check.vllm_rank(untrusted.read(lora)) for lora in loras.values())
    options = ["--revision", bases[0]["revision"]] if bases[0]["revision"] else []
    options += ["--enable-lora", "--max-lora-rank", str(most), "--max-loras", str(len(loras))]
    return [bases[0]["place"], *options, "--lora-modules", *(f"{name}={lora}" for name, lora in loras.items())]


def chat(source: str, arguments: Sequence[str] = (), *, console: Console | None = None) -> int:
    """Talks to ``source`` by ``transformers chat``, over a server of its own that ends with it; returns the exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ready = prepare([source], engine="transformers", port=port, console=console)
    (model,), (program, *_), url = ready["models"], ready["command"], f"http://127.0.0.1:{port}"
    server = subprocess.Popen(ready["command"], stdout=subprocess.DEVNULL)
    try:
        while not _is_up(port):
            if server.poll() is not None:
                raise DualLoraError(f"transformers serve has ended with exit code {server.returncode}: see above")
            time.sleep(0.2)
        # Offline the client would refuse even this machine's own address; it loads nothing but a configuration.
        online = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
        return subprocess.call([program, "chat", model, url, *arguments], env={**os.environ, **online})
    finally:
        server.terminate()
        server.wait()


def _is_up(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
