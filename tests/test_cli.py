"""The command line as a person and as a script meet it: help, errors, exit codes, the JSON line, and every verb on tiny models."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from duallora import cli, console, errors


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("DUALLORA_DEBUG", raising=False)
    monkeypatch.delenv("DUALLORA_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    console.use_json(False)


def json_line(capsys) -> dict:
    """The only line on stdout, as JSON."""
    out = capsys.readouterr().out
    assert out.count("\n") == 1, out
    return json.loads(out)


VERBS = ["demo", "train", "eval", "merge", "doctor", "data preview", "data check", "config schema", "config show"]


@pytest.mark.parametrize("verb", ["", "data", "config", *VERBS])
def test_help_names_the_options_and_shows_an_example(verb, capsys):
    assert cli.run([*verb.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"duallora {verb}".strip() in out
    if verb in VERBS:
        assert "Example" in out
        assert "--json" in out
        assert "--debug" in out


def test_help_and_option_errors_load_nothing_heavy():
    """`--help` answers in 0.5 s because of this; a module-top import of torch anywhere on the way would break it."""
    heavy = ["torch", "transformers", "peft", "datasets", "numpy", "ruamel.yaml"]
    for lines, names in [
        (["--help"], [*heavy, "pydantic"]),
        # From 0.29 typer itself checks options by pydantic once a verb is named.
        (["train --help", "data preview --help", "--version", "train --nope", "eval x --limit 0", "trian"], heavy),
    ]:
        code = (
            f"import sys\nfrom duallora import cli\nfor line in {lines}: cli.run(line.split())\n"
            f"print([name for name in {names} if name in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr.splitlines()[-1] == "[]"


def test_help_is_quick():
    """Half a second on an idle machine; three runs, because this one may be busy."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "duallora.cli", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1.0


def test_version(capsys):
    import duallora

    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"duallora {duallora.__version__}\n"


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("trian", ["trian", "Did you mean 'train'", "duallora --help"]),
        ("config shw", ["shw", "show", "duallora config --help"]),
        ("train --date x", ["--date", "--data", "duallora train --help"]),
        ("eval", ["ADAPTER|MODEL"]),
        ("merge x", ["--output"]),
        ("eval x --limit 0", ["--limit 0:", "greater than or equal to 1"]),
        ("eval x --dtype int8", ["--dtype int8:", "'int8'", "float32"]),
        ("train --seed two --task e2e", ["--seed two:", "integer"]),
        ("train", ["--data", "--task"]),
        ("train --data a.csv --task e2e", ["data.path", "data.task", "exclude each other"]),
        ("train --task e2e --set lerning_rate=1", ["did you mean train.learning_rate?"]),
        ("train --task e2e --set r=0", ["adapter.r: 0", "from 1"]),
        ("train --task e2e --set alpha=.nan", ["adapter.alpha: nan"]),
        ("train -c none.yaml", ["none.yaml", "no such file", "config show"]),
        ("config show --task e2e --set x=1", ["unknown key x"]),
    ],
)
def test_a_wrong_command_is_exit_code_2_and_says_what_is_right(line, fragments, capsys):
    assert cli.run(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    for fragment in fragments:
        assert fragment in captured.err


@pytest.mark.parametrize(
    "line", ["trian --json", "train --json", "train --date 1 --json", "config show --task e2e --json --set x=1"]
)
def test_failures_end_in_one_line_of_json(line, capsys):
    assert cli.run(line.split()) == 2
    payload = json_line(capsys)
    assert payload["status"] == "error"
    assert payload["exit_code"] == 2
    assert payload["error"]


def test_an_error_message_is_not_read_as_markup(capsys):
    """A path with brackets must come out as it is: rich would take [bold] for a style and drop it."""
    assert cli.run(["train", "-c", "[bold]x[/bold].yaml"]) == 2
    assert "[bold]x[/bold].yaml: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["--debug", "DUALLORA_DEBUG"])
def test_debug_shows_the_traceback(how, capsys, monkeypatch):
    arguments = ["train"]
    if how == "--debug":
        arguments.append(how)
    else:
        monkeypatch.setenv(how, "1")
    assert cli.run(arguments) == 2
    assert "Traceback" in capsys.readouterr().err


FAILURES = [
    (errors.ConfigError("x"), 2),
    (errors.DataError("x"), 3),
    (errors.IntegrityError("x"), 4),
    (errors.NonFiniteError("x"), 5),
    (errors.LockedError("x"), 6),
    (errors.DiskError("x"), 7),
    (errors.OutOfMemoryError("x"), 8),
    (MemoryError(), 8),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), 8),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 8),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 8),
    (OSError(errno.ENOSPC, "No space left on device", "/x"), 7),
    (OSError(errno.EROFS, "Read-only file system", "/x"), 7),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), 7),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"), 2),
    (KeyboardInterrupt(), 130),
    (SystemExit(143), 143),
    (RuntimeError("shape mismatch"), 1),
    (KeyError("x"), 1),
    (OSError("no errno"), 1),
]


@pytest.mark.parametrize(("error", "code"), FAILURES, ids=[f"{type(e).__name__}-{c}" for e, c in FAILURES])
def test_every_kind_of_failure_has_its_exit_code(error, code, capsys, monkeypatch):
    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "_invoke", fail)
    assert cli.run(["doctor", "--json"]) == code
    payload = json_line(capsys)
    assert payload["exit_code"] == code
    assert payload["status"] == ("interrupted" if code in (130, 143) else "error")


def test_a_fault_of_the_program_says_so(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_invoke", lambda arguments: 1 / 0)
    assert cli.run(["doctor"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "--debug" in err
    assert "Traceback" not in err


def test_sigterm_unwinds_and_leaves_with_143(capsys, monkeypatch):
    """Locks and half-written files are let go in finally blocks; the default action of SIGTERM would skip them."""
    unwound = []

    def wait(arguments):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            unwound.append(True)

    monkeypatch.setattr(cli, "_invoke", wait)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.run(["doctor", "--json"]) == 143
    assert unwound
    assert json_line(capsys)["status"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_of_a_run_keeps_its_own_code(monkeypatch, capsys):
    """typer's own main would turn every KeyboardInterrupt into 130; a run stopped by SIGTERM carries 143."""
    from duallora.train.run import Interrupted

    def stop(arguments):
        raise Interrupted(signal.SIGTERM, "stopped after step 3 of 9")

    monkeypatch.setattr(cli, "_invoke", stop)
    assert cli.run(["train"]) == 143
    assert "stopped after step 3 of 9" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_failure():
    """`duallora config show | head -1` must not end in a BrokenPipeError."""
    command = f"{sys.executable} -m duallora.cli config schema | head -c 1; echo; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["{", "0"]
    assert done.stderr == ""


def test_json_has_no_nan(capsys):
    console.print_json({"loss": float("nan"), "top": [float("inf"), 1.5], "path": Path("x"), "flag": True, 3: None})
    assert json.loads(capsys.readouterr().out) == {
        "loss": None,
        "top": [None, 1.5],
        "path": "x",
        "flag": True,
        "3": None,
    }


def test_config_show_prints_a_recipe_that_can_be_trained(capsys):
    from duallora.train.recipe import load_recipe

    assert cli.run(["config", "show", "--data", "mine [1].jsonl", "--set", "r=8", "--set", "adapter.alpha=3"]) == 0
    Path("recipe.yaml").write_text(capsys.readouterr().out)
    recipe = load_recipe("recipe.yaml")
    assert (recipe.data.path, recipe.adapter.r, recipe.adapter.alpha) == ("mine [1].jsonl", 8, 3.0)
    assert cli.run(["config", "show", "-c", "recipe.yaml", "--json"]) == 0
    payload = json_line(capsys)
    assert payload["recipe"] == recipe.model_dump(mode="json")
    assert payload["status"] == "done"


def test_config_show_without_data_is_an_example(capsys):
    assert cli.run(["config", "show"]) == 0
    captured = capsys.readouterr()
    assert "path: builtin:docstrings" in captured.out
    assert "builtin:docstrings" in captured.err
    assert cli.run(["config", "show", "--set", "task=boolq"]) == 0
    assert "task: boolq" in capsys.readouterr().out


def test_config_schema_is_json(capsys):
    assert cli.run(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["title"] == "Recipe"
    assert cli.run(["config", "schema", "--json"]) == 0
    assert json_line(capsys)["schema"] == schema


def test_doctor_lists_versions_and_is_content_here(capsys):
    assert cli.run(["doctor", "--json"]) == 0
    payload = json_line(capsys)
    checks = {check["name"]: check for check in payload["checks"]}
    assert payload["usable"] is True
    assert {"python", "duallora", "torch", "transformers", "peft", "method", "cpu", "memory", "run folder"} <= set(
        checks
    )
    assert cli.run(["doctor"]) == 0
    assert "ready" in capsys.readouterr().out


def test_doctor_names_what_is_missing_and_the_fix(capsys, monkeypatch):
    from importlib import metadata

    real = metadata.version
    versions = {"peft": "0.17.0"}

    def version(name):
        if name == "sacrebleu":
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert cli.run(["doctor", "--json"]) == 2
    missing = {check["name"]: check for check in json_line(capsys)["checks"] if check["status"] == "missing"}
    assert set(missing) == {"peft", "sacrebleu"}
    assert missing["peft"]["fix"] == 'pip install -U "peft>=0.18"'
    assert missing["sacrebleu"]["fix"] == 'pip install "sacrebleu>=2.4"'
