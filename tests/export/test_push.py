"""What goes to the hub is shown first, holds nothing of this machine, and is whole where it arrives. The hub is a stand-in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

from duallora import cli
from duallora.errors import ConfigError, IntegrityError
from duallora.export import card, convert, push
from duallora.store import adapters

BASE = "org/tiny-llama"


@pytest.fixture
def ready(run_folder, tmp_path) -> Path:
    """A run with its card, a conversion, and everything else that lies about in such a folder."""
    run = Path(shutil.copytree(run_folder, tmp_path / "runs" / "sums"))
    convert.convert(run, run / "lora-r2", rank=2)
    card.card(run, base_model=BASE, repo="me/sums", license="mit")
    for stray in ("optimizer.pt", "adapter/events.out.tfevents", "adapter/.env", "adapter/log.jsonl"):
        (run / stray).write_text("secret")
    (run / "adapter" / "checkpoint-2").mkdir()
    (run / "adapter" / "checkpoint-2" / "trainer_state.json").write_text("{}")
    return run


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


EXPECTED = {
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "duallora.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *(f"lora-r2/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "duallora.json")),
    *(f"lora-r2/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")),
}


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
    for path in hub.keep.rglob("*"):
        if path.suffix in (".json", ".md", ".jinja"):
            content = path.read_text()
            for trace in (local, str(tmp_path), str(Path.home()) + "/", "secret"):
                assert trace not in content, (path, trace)
    weights = "adapter_model.safetensors"
    assert (hub.keep / weights).read_bytes() == (ready / "adapter" / weights).read_bytes()


def test_an_adapter_that_fails_its_check_stays_here(ready, hub, console):
    path = ready / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).fill_(float("nan"))
    save_file(tensors, path)
    result = push.push(ready, "me/sums", base_model=BASE, upload=True, console=console)
    assert result["exit_code"] == 4  # the recorded hash tells before the NaN does
    assert not result["uploaded"]
    assert hub.calls == []


def test_no_card_no_hub_id_no_push(ready, hub, console):
    with pytest.raises(ConfigError, match="expected org/name"):
        push.push(ready, "sums", base_model=BASE, console=console)
    with pytest.raises(ConfigError, match="--to"):
        push.push(ready, "me/su ms", base_model=BASE, console=console)
    with pytest.raises(ConfigError, match="--base-model"):
        push.push(ready, "me/sums", files_only=True, console=console)
    with pytest.raises(IntegrityError, match="base_model is"):
        push.push(ready, "me/sums", base_model="org/another", files_only=True, console=console)
    readme = ready / "adapter" / "README.md"
    text = readme.read_text()
    readme.write_text(text + f"\nsee {Path.home()}/notes\n")
    with pytest.raises(IntegrityError, match="a path of this machine"):
        push.push(ready, "me/sums", base_model=BASE, files_only=True, console=console)
    readme.unlink()
    with pytest.raises(ConfigError, match="duallora card"):
        push.push(ready, "me/sums", base_model=BASE, files_only=True, console=console)
    assert hub.calls == []


def test_links_are_not_followed(ready, hub, console, tmp_path):
    (tmp_path / "elsewhere").write_text("{}")
    target = ready / "adapter" / "added_tokens.json"
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="is a link"):
        push.push(ready, "me/sums", base_model=BASE, files_only=True, console=console)


def test_a_hub_that_refuses_is_said_plainly(ready, hub, console, monkeypatch):
    def refuse(*args, **options):
        raise OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(ConfigError, match=r"the hub did not take it: .*offline.*hf auth login"):
        push.push(ready, "me/sums", base_model=BASE, upload=True, files_only=True, console=console)


def test_the_verb_is_a_dry_run_unless_told(ready, hub, capsys):
    assert cli.run(["push", str(ready), "--to", "me/sums", "--base-model", BASE, "--files-only", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["files"]) == EXPECTED
    assert hub.calls == []
    assert cli.run(["push", str(ready), "--to", "me/sums", "--base-model", BASE, "--files-only", "--upload"]) == 0
    assert len(hub.calls) == 2
