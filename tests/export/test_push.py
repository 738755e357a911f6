"""What goes to the hub is shown first, holds nothing of this machine, and is whole where it arrives. The hub is a stand-in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from duallora import cli
from duallora.errors import ConfigError, IntegrityError
from duallora.export import card, convert, push
from duallora.store import adapters

BASE = "org/tiny-llama"


@pytest.fixture(scope="module")
def made(run_folder, tmp_path_factory) -> Path:
    """A run with its card, a conversion, and everything else that lies about in such a folder."""
    run = Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("runs") / "sums"))
    convert.convert(run, run / "lora-r2", rank=2)
    card.card(run, base_model=BASE, repo="me/sums", license="mit")
    (run / "adapter" / "checkpoint-2").mkdir()
    for stray in ("optimizer.pt", "adapter/events.out.tfevents", "adapter/.env", "adapter/checkpoint-2/state.json"):
        (run / stray).write_text("secret")
    return run


@pytest.fixture
def ready(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs" / "sums"))


class Hub:
    """Stands in for HfApi: remembers what it was asked, and keeps what it was sent."""

    def __init__(self, keep: Path) -> None:
        self.keep, self.calls = keep, []

    def __call__(self) -> Hub:
        return self

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.calls.append(("upload", repo_id, options))
        shutil.copytree(folder_path, self.keep)
        return "https://example.org/commit/1"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    stand_in = Hub(tmp_path / "arrived")
    monkeypatch.setattr(push, "HfApi", stand_in)
    return stand_in


FILES = ("adapter_config.json", "adapter_model.safetensors", "duallora.json")
FILES += ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
EXPECTED = {"README.md", *FILES, *(f"lora-r2/{name}" for name in FILES)}


def test_what_arrives_is_what_was_shown_whole_and_without_a_trace_of_this_machine(ready, hub, console, tmp_path):
    shown = push.push(ready, "me/sums", base_model=BASE, console=console)["files"]
    text = console.file.getvalue()
    assert [name for name in EXPECTED if name not in text] == []
    assert "nothing was sent" in text
    assert hub.calls == []
    result = push.push(ready, "me/sums", base_model=BASE, upload=True, private=True, console=console)
    assert [call[:2] for call in hub.calls] == [("create", "me/sums"), ("upload", "me/sums")]
    assert hub.calls[0][2] == {"private": True, "exist_ok": True}
    arrived = {str(path.relative_to(hub.keep)): path.stat().st_size for path in hub.keep.rglob("*") if path.is_file()}
    assert arrived == result["files"] == shown
    for folder in (hub.keep, hub.keep / "lora-r2"):
        assert adapters.check_files(folder, adapters.read_sidecar(folder))  # hashes made anew for the changed files
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
        assert adapters.read_sidecar(folder)["base"]["name"] == BASE
    local = json.loads((ready / "run.json").read_text())["recipe"]["model"]["name"]
    traces = (local, str(tmp_path), str(Path.home()) + "/", "secret")
    for path in hub.keep.rglob("*"):
        if path.suffix in (".json", ".md", ".jinja"):
            assert [trace for trace in traces if trace in path.read_text()] == [], path
    assert (hub.keep / adapters.WEIGHTS).read_bytes() == (ready / "adapter" / adapters.WEIGHTS).read_bytes()


def test_an_adapter_that_fails_its_check_stays_here(ready, hub, console):
    path = ready / "adapter" / adapters.WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    result = push.push(ready, "me/sums", base_model=BASE, upload=True, console=console)
    assert (result["exit_code"], result["uploaded"], hub.calls) == (4, False, [])


def test_no_card_no_hub_id_no_push(ready, hub, console, tmp_path, monkeypatch):
    def refused(error: type, words: str, repo: str = "me/sums", base: str | None = BASE, **options) -> None:
        with pytest.raises(error, match=words):
            push.push(ready, repo, base_model=base, files_only=True, console=console, **options)

    readme, link = ready / "adapter" / "README.md", ready / "adapter" / "added_tokens.json"
    refused(ConfigError, "expected org/name", repo="sums")
    refused(ConfigError, "--to", repo="me/su ms")
    refused(ConfigError, "--base-model", base=None)
    refused(IntegrityError, "base_model is", base="org/another")
    (tmp_path / "elsewhere").write_text("{}")
    link.symlink_to(tmp_path / "elsewhere")
    refused(IntegrityError, "is a link")
    link.unlink()
    text = readme.read_text()
    readme.write_text(text + f"\nsee {Path.home()}/notes\n")
    refused(IntegrityError, "a path of this machine")
    readme.unlink()
    refused(ConfigError, "duallora card")
    assert hub.calls == []
    readme.write_text(text)
    monkeypatch.setattr(hub, "create_repo", Mock(side_effect=OfflineModeIsEnabled("offline mode is enabled")))
    refused(ConfigError, r"the hub did not take it: .*offline.*hf auth login", upload=True)


def test_the_verb_is_a_dry_run_unless_told(ready, hub, capsys):
    line = ["push", str(ready), "--to", "me/sums", "--base-model", BASE, "--files-only"]
    assert cli.run([*line, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["files"]) == EXPECTED
    assert hub.calls == []
    assert cli.run([*line, "--upload"]) == 0
    assert len(hub.calls) == 2
