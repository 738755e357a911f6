"""From folders to a listening server, and back when it is stopped."""

from __future__ import annotations

import ipaddress
import json
import shlex
import socket
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from duallora.errors import ConfigError
from duallora.terminal import quiet_libraries, say

if TYPE_CHECKING:
    from duallora.config import Dtype

GRACE = 5  # seconds that open connections get once the server is to stop


def serve(
    sources: Mapping[str, str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    dtype: Dtype = "auto",
    strict: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Serves the models (see `names`) until Ctrl-C or SIGTERM, and returns what it did.

    Port 0 takes a free one.

    Raises:
        ConfigError: fastapi or uvicorn is absent, the address cannot be had, or a source is no model that writes text.
        IntegrityError: a file is damaged, or an adapter belongs to another base.
    """
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"the server needs {' and '.join(missing)}: pip install 'duallora[serve]'")
    import uvicorn

    from duallora.serve import engine as engines
    from duallora.serve.api import create_app

    console = console or Console()
    listener = _bind(host, port)  # before the model is loaded: a port that is taken costs no time
    with listener, quiet_libraries():
        served = engines.load(sources, dtype=dtype, strict=strict)
        engine = engines.Engine(served)

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: Any) -> None:
                engine.closing.set()  # answers end at their next token, so that their connections can close
                super().handle_exit(sig, frame)

        app = create_app(
            engine,
            api_key=api_key,
            only_host=host if is_loopback(host) else None,
            log=lambda line: say(console, "answered", escape(line)),
        )
        server = Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=GRACE,
            )
        )
        listener.listen()
        port = listener.getsockname()[1]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        for entry in served:
            what = f"{entry.method} on {entry.parent}" if entry.parent else "model"
            say(console, "serving", f"[bold]{escape(entry.id)}[/] ({escape(what)}, {entry.context:,} tokens)")
        if not is_loopback(host):
            who = "anyone who has the API key" if api_key else "anyone, without a key (--api-key sets one),"
            say(console, "warning", f"[yellow]{who} who can reach {escape(host)} can use these models, unencrypted[/]")
        say(console, "page", f"[bold]{url}/[/]  (Ctrl-C stops)")
        say(console, "try", escape(_curl(url, served, api_key)))
        try:
            server.run(sockets=[listener])
        except (KeyboardInterrupt, SystemExit):  # uvicorn has shut down and hands the signal on
            if not server.started:
                raise
        say(console, "stopped", f"{engine.answered} requests answered, {engine.generated} tokens generated")
    return {
        "url": url,
        "models": [entry.id for entry in served],
        "requests": engine.answered,
        "generated_tokens": engine.generated,
    }


def names(sources: Sequence[str], named: Sequence[str] = ()) -> dict[str, str]:
    """Ids of the models: the folder's name (a run's, where it is its ``adapter``), a hub id or ``builtin:`` as it is.

    ``named`` holds NAME=SOURCE. Raises ConfigError where two have one name, or nothing is named.
    """
    chosen: dict[str, str] = {}
    pairs = [(_name(source), source) for source in sources]
    for item in named:
        name, _, source = item.partition("=")
        if not name.strip() or not source:
            raise ConfigError(f"--name {item}: expected NAME=ADAPTER, such as --name mine=runs/mine")
        pairs.append((name, source))
    if not pairs:
        raise ConfigError("nothing to serve: name an adapter or a model, such as runs/mine or builtin:smollm2-135m")
    for name, source in pairs:
        if name in chosen:
            raise ConfigError(
                f"{chosen[name]} and {source} are both called {name!r}; tell them apart: --name {shlex.quote(f'other={source}')}"
            )
        chosen[name] = source
    return chosen


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(source: str) -> str:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source
    folder = folder.resolve()
    is_part = folder.name == "adapter" and (folder.parent / "run.json").is_file()
    return folder.parent.name if is_part else folder.name


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: no such address ({error.strerror}); expected such as 127.0.0.1") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port (0 takes a free one)"
        ) from error
    return listener


def _curl(url: str, served: Sequence[Any], api_key: str | None) -> str:
    """A command to paste: a chat where the first model can chat."""
    entry = served[0]
    body: dict[str, Any] = {"model": entry.id}
    if entry.tokenizer.chat_template:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "Hello!"}]
    else:
        path, body["prompt"] = "completions", "Hello"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if api_key else ""
    return f"curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
