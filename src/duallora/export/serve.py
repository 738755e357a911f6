"""An adapter behind a serving engine: made ready (:mod:`duallora.export.served`), then handed to vLLM or transformers.

One adapter is merged into its base; several become plain LoRAs over theirs, which vLLM alone can serve.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from duallora.errors import ConfigError, DualLoraError
from duallora.export import check, served
from duallora.store import models, untrusted
from duallora.terminal import command, say

Engine = Literal["vllm", "transformers"]


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
        name, equals, source = item.partition("=")
        if Path(item).exists() or not equals:
            name, source = "", item
        name = name or Path(source).absolute().name
        if name in named:
            raise ConfigError(f"{named[name]} and {source} are both called {name!r}: write other={source}")
        named[name] = source
    engine, program = installed(engine, len(named))
    folders = {name: served.sound(source, console) for name, source in named.items()}
    if len(named) > 1:
        ids, words = list(named), _loras(folders, rank, console)
    else:
        ((name, folder),) = folders.items()
        model = str(served.made(folder, None, console) if folder else models.resolve(named[name]))
        ids, words = ([name], [model, "--served-model-name", name]) if engine == "vllm" else ([model], [model])
    line = [program, "serve", *words, "--host", host, "--port", str(port), *arguments]
    say(console, "serving", escape(f"{', '.join(ids)} at http://{host}:{port}/v1"))
    say(console, "engine", escape(command(*line[1:], program=program)))
    return {"engine": engine, "models": ids, "command": line}


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


def _loras(folders: dict[str, Path | None], rank: int, console: Console) -> list[str]:
    """vLLM's words for several adapters, each as a LoRA, over the one base that they must have."""
    bases = [served.base(folder) for folder in folders.values() if folder]
    if len(bases) < len(folders) or any(base["content"] != bases[0]["content"] for base in bases):
        raise ConfigError(f"{', '.join(folders)} are not adapters of one base model: serve them one by one")
    loras = {name: served.lora(folder, rank, console) for name, folder in folders.items() if folder}
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
