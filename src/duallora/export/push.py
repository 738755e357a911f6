"""An adapter on the hub: exactly the files that belong there, shown first, and sent only when asked to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from duallora.errors import ConfigError, IntegrityError
from duallora.export import card
from duallora.export.check import check
from duallora.store import adapters, checkpoint, record, untrusted
from duallora.terminal import command, say, size

# Nothing else of a folder is ever sent: no checkpoint, optimizer state, log or stray file.
ADAPTER_FILES = ("adapter_config.json", adapters.WEIGHTS, adapters.SIDECAR)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)


def push(
    adapter: str | Path,
    repo: str,
    *,
    upload: bool = False,
    private: bool = False,
    base_model: str | None = None,
    files_only: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Checks ``adapter``, shows the files that ``repo`` would get, and with ``upload`` sends them.

    The adapter lies at the root, its conversions in ``lora-rNN/``. What is sent is a copy in which the base model goes by
    its hub id and no path of this machine is left. Returns ``{"repo", "uploaded", "files": {name: bytes}, "check", ...}``
    with the exit code of the check where that failed.

    Raises:
        ConfigError: ``repo`` is no hub id, there is no card, the base model has no hub id, or the hub refuses.
        IntegrityError: the card is not readable, or a path of this machine is in it.
    """
    console = console or Console()
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--to {repo}: {error}") from None
    if repo.count("/") != 1:
        raise ConfigError(f"--to {repo}: expected org/name")
    folder = card.adapter_folder(adapter)
    readme = folder / "README.md"
    if not readme.is_file():
        raise ConfigError(f"{folder} has no card: write one with: {command('card', str(adapter), '--repo', repo)}")
    verdict = check(adapter, files_only=files_only, console=console)
    if not verdict["ok"]:
        return {"repo": repo, "uploaded": False, "files": {}, "check": verdict, "exit_code": verdict["exit_code"]}
    with staged(folder, base_model) as stage:
        files = {str(p.relative_to(stage)): p.stat().st_size for p in sorted(stage.rglob("*")) if p.is_file()}
        _show(console, repo, files)
        if upload:
            url = _upload(stage, repo, private)
            say(console, "uploaded", escape(url))
        else:
            say(console, "dry run", "nothing was sent; --upload sends exactly these files")
    return {"repo": repo, "uploaded": upload, "files": files, "check": verdict}


@contextmanager
def staged(folder: Path, base_model: str | None = None) -> Iterator[Path]:
    """A temporary folder with what the hub gets: the adapter, its card, its conversions."""
    settings = untrusted.read(folder)
    local = settings.get("base_model_name_or_path")
    base = card.hub_id(base_model or local)
    if base is None:
        raise ConfigError(
            f"the base model is {local!r}, which is no name on the hub: give it with --base-model org/name"
        )
    card.validate(folder / "README.md", base)
    with tempfile.TemporaryDirectory(prefix="duallora-push-") as temporary:
        stage = Path(temporary)
        _copy(folder, stage, base)
        shutil.copyfile(folder / "README.md", stage / "README.md")
        for name, (conversion, _) in card.conversions(folder).items():
            (stage / name).mkdir()
            _copy(conversion, stage / name, base)
        _refuse_local_paths(stage)
        yield stage


def _copy(source: Path, target: Path, base: str) -> None:
    """The adapter's files, the base model by its hub id, and the sidecar's hashes made anew."""
    for name in (*ADAPTER_FILES, *TOKENIZER_FILES):
        path = source / name
        if path.is_symlink():
            raise IntegrityError(f"{path} is a link: only plain files are sent")
        if path.is_file():
            shutil.copyfile(path, target / name)
    config = untrusted.read(target)
    record.write_json(target / "adapter_config.json", {**config, "base_model_name_or_path": base, "auto_mapping": None})
    tokenizer = target / "tokenizer_config.json"
    if tokenizer.is_file():
        kept = {key: value for key, value in record.read_json(tokenizer).items() if not _is_local(value)}
        record.write_json(tokenizer, kept)
    sidecar = adapters.read_sidecar(target)
    if sidecar:
        sidecar["base"] = {**sidecar.get("base", {}), "name": base}
        names = sorted({path.name for path in target.iterdir()} - {adapters.SIDECAR, "README.md"})
        sidecar["files"] = {name: checkpoint.file_record(target / name) for name in names}
        record.write_json(target / adapters.SIDECAR, sidecar)


def _refuse_local_paths(stage: Path) -> None:
    """IntegrityError where a JSON file or the card still names a path of this machine."""
    places = [Path.cwd()]
    with suppress(RuntimeError):  # this process may have no home
        places.append(Path.home())
    homes = [str(path) for path in places if len(path.parts) > 1]
    for path in sorted(stage.rglob("*")):
        if path.name in ("adapter_config.json", adapters.SIDECAR, "tokenizer_config.json"):
            local = [text for text in _strings(record.read_json(path)) if _is_local(text)]
        elif path.name == "README.md":
            local = [home for home in homes if home in path.read_text(encoding="utf-8")]
        else:
            continue
        if local:
            raise IntegrityError(
                f"{path.relative_to(stage)} names {local[0][:80]!r}, a path of this machine: remove it first"
            )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _is_local(value: Any) -> bool:
    """Whether a value is an absolute or home path; texts with blanks (templates) are none."""
    return (
        isinstance(value, str)
        and not any(letter.isspace() for letter in value)
        and (
            value.startswith(("~/", "~\\"))
            or (Path(value).is_absolute() and len(Path(value).parts) > 2)
            or value[1:3] == ":\\"
        )
    )


def _upload(stage: Path, repo: str, private: bool) -> str:
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=stage, commit_message="Dual LoRA adapter (duallora push)")
    except (LocalTokenNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{repo}: the hub did not take it: {reason}. Log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    return str(getattr(commit, "commit_url", commit))


def _show(console: Console, repo: str, files: dict[str, int]) -> None:
    table = Table(box=SIMPLE)
    table.add_column(f"file for {repo}", overflow="fold")
    table.add_column("size", justify="right")
    for name, count in files.items():
        table.add_row(escape(name), size(count))
    table.add_row(f"[bold]{len(files)} files[/]", f"[bold]{size(sum(files.values()))}[/]")
    console.print(table)
