"""docs/extending.md as printed: a method and a task of one's own, each one file, through the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from duallora import cli, methods, tasks
from duallora.errors import ConfigError
from duallora.train import plugins

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """The page's two files in an empty folder, which is the working one."""
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        name = re.match(r'"""(\w+\.py):', code).group(1)
        (tmp_path / name).write_text(code)
    assert {path.name for path in tmp_path.glob("*.py")} == {"rows.py", "parity.py"}
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_from_the_command_line(files, tiny_encoder_folder, monkeypatch, capsys):
    """Train with both in a process of its own, by the page's first command; the run's code is not run unasked after."""
    first = re.search(r"^duallora (train .*)$", PAGE.read_text(), re.MULTILINE).group(1)
    words = [word.strip("'") for word in re.findall(r"'[^']+'|\S+", first)]
    words[words.index("builtin:minilm-l6")] = str(tiny_encoder_folder)
    settings = ["--set", "train.max_steps=3", "--set", "train.report_to=[]", "--set", "eval.test=true"]
    done = subprocess.run([sys.executable, "-m", "duallora.cli", *words, *settings], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = json.loads((files / "runs/mine/run.json").read_text())
    assert run["recipe"]["plugins"] == [str(files / "rows.py"), str(files / "parity.py")]
    assert sorted(run["fingerprints"]["plugins"]) == sorted(run["recipe"]["plugins"])
    metrics = json.loads((files / "runs/mine/metrics.json").read_text())["metrics"]
    assert 0 <= metrics["accuracy"] <= 100
    assert metrics["error_rate"] == pytest.approx(100 - metrics["accuracy"])
    assert len((files / "runs/mine/predictions.jsonl").read_text().splitlines()) == 16
    factors = load_file(files / "runs/mine/adapter/adapter_model.safetensors")
    trained = [tensor for name, tensor in factors.items() if name.endswith(".c")]
    assert len(trained) == 13  # six linear layers in each of two, and the pooler's
    assert all(tensor.abs().max() > 0 for tensor in trained)

    assert cli.run(["eval", "runs/mine"]) == 2
    assert f"DUALLORA_PLUGINS={files / 'rows.py'},{files / 'parity.py'}" in capsys.readouterr().err
    monkeypatch.setenv("DUALLORA_PLUGINS", "rows.py, parity.py")
    assert cli.run(["eval", "runs/mine", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scored["metrics"]["accuracy"] == pytest.approx(metrics["test"]["accuracy"])


def test_a_changed_plug_in_does_not_continue_a_run(files, tiny_encoder_folder):
    """What was trained so far came from other code."""
    from duallora.config.load import load_recipe
    from duallora.train import run

    overrides = ["plugins=[parity.py]", "train.max_steps=4", "train.save_steps=2", "train.report_to=[]"]
    recipe = load_recipe(None, overrides, model=str(tiny_encoder_folder), task="parity", output="runs/again")
    run.train(recipe)
    file = Path("runs/again/run.json")
    facts = {**json.loads(file.read_text()), "status": "interrupted"}
    facts["fingerprints"]["plugins"] = dict.fromkeys(facts["fingerprints"]["plugins"], "0" * 64)
    file.write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match=r"plug-ins.*parity.py.*0000"):
        run.train(recipe, resume="auto")


def test_what_is_wrong_with_a_plug_in_is_said(files):
    (files / "broken.py").write_text("import json\njson.nothing_of_the_kind\n")
    for name, words in (
        ("broken.py", r"broken\.py: AttributeError: .*nothing_of_the_kind"),
        ("absent.py", r"absent\.py: FileNotFoundError"),
        ("no_such_module", r"plug-in no_such_module: no such module is installed"),
    ):
        with pytest.raises(ConfigError, match=words):
            plugins.load([name])
    assert plugins.load([]) == {}


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ConfigError, match="one of duallora's own"):
        tasks.add("sst2", lambda folder: None)
    with pytest.raises(ConfigError, match="one of duallora's own"):
        methods.add(methods.get("mora"))
