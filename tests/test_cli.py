"""The command line as a person and as a script meet it: help, errors, exit codes, the JSON line, and every verb on tiny models."""

from __future__ import annotations

import errno
import importlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer

from duallora import cli, console, errors
from duallora.config.load import load_recipe
from duallora.store import adapters


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("DUALLORA_DEBUG", raising=False)
    monkeypatch.delenv("DUALLORA_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    console.use_json(False)


@pytest.fixture
def json_of(capsys):
    """``json_of(*words)``: what the command prints with --json, the only line on stdout; it ends with ``code``."""

    def run(*words: str | Path, code: int = 0) -> dict:
        capsys.readouterr()
        assert cli.run([*map(str, words), "--json"]) == code, words
        out = capsys.readouterr().out
        assert out.count("\n") == 1, out
        return json.loads(out)

    return run


def commands(group: Any, before: str = "") -> list[str]:
    """Every verb, as it is typed."""
    found = []
    for name, command in group.commands.items():
        found += commands(command, f"{before}{name} ") if hasattr(command, "commands") else [before + name]
    return found


VERBS = commands(typer.main.get_command(cli.app))


@pytest.mark.parametrize("verb", ["", "data", "config", "bench", *VERBS])
def test_help_names_the_options_and_shows_an_example(verb, capsys):
    assert cli.run([*verb.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"duallora {verb}".strip() in out
    if verb in VERBS:
        assert "Example" in out
        assert "--json" in out
        assert "--debug" in out


def test_help_and_the_errors_of_options_and_recipes_load_nothing_heavy():
    """`--help` answers in 0.5 s because of this; a module-top import of torch anywhere on the way would break it."""
    heavy = ["torch", "transformers", "peft", "datasets", "numpy", "ruamel.yaml"]
    for lines, names in [
        (["--help"], [*heavy, "pydantic"]),
        # From 0.29 typer itself checks options by pydantic once a verb is named.
        (["train --help", "data preview --help", "--version", "train --nope", "eval x --limit 0", "trian"], heavy),
        (["train --task e2e --set r=0"], heavy[:-1]),
    ]:
        code = (
            f"import sys\nfrom duallora import cli\nfor line in {lines}: cli.run(line.split())\n"
            f"print([name for name in {names} if name in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr.splitlines()[-1] == "[]"


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
        ("eval x --limit 0", ["--limit 0:", "1"]),
        ("eval x --dtype int8", ["--dtype int8:", "'int8'", "float32"]),
        ("train --seed two --task e2e", ["--seed two:", "integer"]),
        ("train --data x.csv --learning-rate 1e-3", ["--set learning_rate=VALUE"]),
        ("train", ["--data", "--task"]),
        ("train --task e2e --set lerning_rate=1", ["did you mean train.learning_rate?"]),
        ("train -c [bold]x[/bold].yaml", ["[bold]x[/bold].yaml: no such file", "config show"]),  # to rich a style
        ("config show --task e2e --set x=1", ["unknown key x"]),
    ],
)
def test_a_wrong_command_is_exit_code_2_and_says_what_is_right(line, fragments, capsys, json_of):
    assert cli.run(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    for fragment in fragments:
        assert fragment in captured.err
    payload = json_of(*line.split(), code=2)
    assert (payload["status"], payload["exit_code"]) == ("error", 2)
    assert payload["error"]


@pytest.mark.parametrize("how", ["neither", "--debug", "DUALLORA_DEBUG"])
def test_a_traceback_is_shown_to_who_asks_and_a_fault_of_the_program_says_how(how, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_invoke", lambda arguments: 1 / 0)
    if how == "DUALLORA_DEBUG":
        monkeypatch.setenv(how, "1")
    assert cli.run(["doctor", *(["--debug"] if how == "--debug" else [])]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert ("Traceback" in err) == (how != "neither")
    assert how != "neither" or "--debug" in err


FAILURES = [
    (errors.ConfigError("x"), 2),
    (errors.DataError("x"), 3),
    (errors.IntegrityError("x"), 4),
    (errors.NonFiniteError("x"), 5),
    (errors.LockedError("x"), 6),
    (errors.GridError("x"), 10),
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
def test_every_kind_of_failure_has_its_exit_code(error, code, monkeypatch, json_of):
    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "_invoke", fail)
    payload = json_of("doctor", code=code)
    assert payload["exit_code"] == code
    assert payload["status"] == ("interrupted" if code in (130, 143) else "error")


@pytest.mark.parametrize("within_an_import", [False, True])
def test_sigterm_unwinds_and_leaves_with_143(monkeypatch, json_of, within_an_import):
    """Locks and half-written files are let go in finally blocks, which the default action of SIGTERM would skip.

    A library that is being imported may make a missing module of it.
    """
    unwound = []

    def wait(arguments):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except SystemExit as error:
            if within_an_import:
                raise ModuleNotFoundError("Could not import module 'Trainer'", name="trainer") from error
            raise
        finally:
            unwound.append(True)

    monkeypatch.setattr(cli, "_invoke", wait)
    before = signal.getsignal(signal.SIGTERM)
    assert json_of("doctor", code=143)["status"] == "interrupted"
    assert unwound
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_of_a_run_keeps_its_own_code(monkeypatch, capsys):
    """typer's own main would turn every KeyboardInterrupt into 130; a run stopped by SIGTERM carries 143."""
    from duallora.train.run import Interrupted

    def stop(arguments):
        raise Interrupted(signal.SIGTERM, "stopped after step 3 of 9")

    monkeypatch.setattr(cli, "_invoke", stop)
    assert cli.run(["train"]) == 143
    assert "stopped after step 3 of 9" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["config schema", "--help"])
def test_a_reader_that_goes_away_is_no_failure(line):
    """`duallora config show | head -1` must not end in a BrokenPipeError, nor in the SystemExit that rich makes of it."""
    command = f"{sys.executable} -m duallora.cli {line} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
    assert done.stderr == ""


def test_what_cannot_be_said_changes_no_exit_code():
    """A closed stdout is how daemons start programs; a full one fails twice, by the result and by the line that tells so."""
    for line, code in (("config show --json >&-", 0), ("config show >&-", 0), ("train --data none.csv --json >&-", 3)):
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} -m duallora.cli {line}"], capture_output=True, text=True
        )
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    line = f"{sys.executable} -m duallora.cli config show --json > /dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 7
    assert done.stderr.splitlines()[-2:] == [
        "error: [Errno 28] No space left on device",
        "Free space or permissions are needed there; choose another folder with -o.",
    ]


def test_no_file_takes_the_number_of_a_closed_stream():
    """Libraries in C write to streams by their number: into a checkpoint, that way."""
    code = (
        "from duallora import console; console.open_closed(); print(open('x', 'w').fileno(), file=open('found', 'w'))"
    )
    subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" <&- >&- 2>&-'], check=True)
    assert int(Path("found").read_text()) > 2


UNENCODABLE = "Übung 你好 “x” 🙂 …"

PROGRAM = """
import json, sys
from duallora import cli
for line in json.loads(sys.argv[1]):
    try:
        cli.main(line)
    except SystemExit as end:
        print("\\n=====", end.code)
"""


def test_what_the_output_cannot_encode_is_replaced_and_never_fatal(tiny_causal_folder):
    rows = [{"prompt": UNENCODABLE, "completion": " a\tb\n½"}, {"prompt": "x", "completion": "y"}]
    Path("你 x.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data, encoding = f"{UNENCODABLE}.csv", "cp1252"
    lines = [
        ["data", "preview", "你 x.jsonl", "--model", str(tiny_causal_folder), "--rows", "1"],
        ["data", "preview", "你 y.jsonl"],
        ["convert", "--help"],  # |dW|² stands there
        ["config", "show", "--data", data],
    ]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(lines)], capture_output=True, env=environment)
    parts = done.stdout.decode(encoding).split("\n=====")
    assert [int(part.split()[0]) for part in parts[1:]] == [0, 3, 0, 0], done.stderr.decode(encoding)
    for words in ("Übung", "\\u4f60\\u597d", "\\U0001f642", "\\n line break  \\t tab", "+--"):
        assert words in parts[0]  # signs of this program's own have likes
    assert b"no file \\u4f60 y.jsonl" in done.stderr
    Path("recipe.yaml").write_text(parts[3].split("\n", 1)[1], encoding=encoding)  # as a shell's > writes it
    assert load_recipe("recipe.yaml").data.path == data


def test_files_that_python_reads_as_ascii_are_said_with_the_remedy(monkeypatch, capsys):
    """Under LC_ALL=C and PYTHONUTF8=0 torch itself cannot be imported."""
    monkeypatch.setattr(cli, "_invoke", lambda arguments: b"\xe2".decode("ascii"))
    assert cli.run(["doctor"]) == 2
    assert "unset PYTHONUTF8, or export LC_ALL=C.UTF-8" in capsys.readouterr().err


def test_json_has_no_nan(capsys):
    console.print_json({"loss": float("nan"), "top": [float("inf"), 1.5], "path": Path("x"), "flag": True, 3: None})
    expected = {"loss": None, "top": [None, 1.5], "path": "x", "flag": True, "3": None}
    assert json.loads(capsys.readouterr().out) == expected


def test_config_show_prints_a_recipe_that_can_be_trained(capsys, json_of):
    assert cli.run(["config", "show", "--data", "mine [1].jsonl", "--set", "r=8", "--set", "adapter.alpha=3"]) == 0
    Path("recipe.yaml").write_text(capsys.readouterr().out)
    recipe = load_recipe("recipe.yaml")
    assert (recipe.data.path, recipe.adapter.r, recipe.adapter.alpha) == ("mine [1].jsonl", 8, 3.0)
    payload = json_of("config", "show", "-c", "recipe.yaml")
    assert payload["recipe"] == recipe.model_dump(mode="json")
    assert cli.run(["config", "show"]) == 0
    captured = capsys.readouterr()
    assert "path: builtin:docstrings" in captured.out
    assert "builtin:docstrings" in captured.err


def test_config_schema_is_json(capsys, json_of):
    assert cli.run(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["title"] == "Recipe"
    assert json_of("config", "schema")["schema"] == schema


def test_doctor_lists_versions_and_is_content_here(capsys, json_of):
    payload = json_of("doctor")
    checks = {check["name"]: check for check in payload["checks"]}
    assert payload["usable"] is True
    assert {"python", "duallora", "torch", "transformers", "peft", "method", "cpu", "memory", "run folder"} <= set(
        checks
    )
    assert cli.run(["doctor"]) == 0
    assert "ready" in capsys.readouterr().out


def test_doctor_names_what_is_missing_and_the_fix(monkeypatch, json_of):
    from importlib import metadata

    real = metadata.version
    versions = {"peft": "0.17.0", "jinja2": "3.1.5"}

    def version(name):
        if name == "sacrebleu":
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    missing = {check["name"]: check for check in json_of("doctor", code=2)["checks"] if check["status"] == "missing"}
    assert set(missing) == {"peft", "command line", "jinja2"}
    assert "CVE-2025-27516" in missing["jinja2"]["found"]
    assert missing["peft"]["fix"] == 'pip install -U "peft>=0.18"'
    assert missing["command line"]["found"] == "not installed: sacrebleu"
    assert missing["command line"]["fix"] == "pip install 'duallora[train]'"


def test_a_base_install_says_what_it_lacks(capsys, monkeypatch):
    """No fault of the program: each verb imports what it needs when it needs it, so any of them may meet it."""
    for name in ("scipy", "scipy.stats"):
        monkeypatch.setattr(cli, "_invoke", lambda _, name=name: importlib.import_module(f"{name}_not_there"))
        assert cli.run(["report", "runs/x"]) == 2
        said = capsys.readouterr().err
        assert "needs the package scipy" in said
        assert "pip install 'duallora[train]'" in said
    monkeypatch.setattr(cli, "_invoke", lambda _: importlib.import_module("duallora.not_there"))
    assert cli.run(["report", "runs/x"]) == 1


ROWS = "".join(f'"Count {i}:","{i + 1}, {i + 2}"\n' for i in range(20))
QUICK = [
    "r=2", "train.batch_size=4", "max_length=64", "max_new_tokens=4", "report_to=[]", "logging_steps=1", "epochs=1",
    "learning_rate=2e-3",
]  # fmt: skip


def settings(*more: str) -> list[str]:
    return [word for setting in (*QUICK, *more) for word in ("--set", setting)]


@pytest.fixture(scope="module")
def own_data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "mine.csv"
    path.write_text("prompt,completion\n" + ROWS)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_causal_folder, own_data) -> tuple[Path, dict]:
    """A finished run of one epoch, and the JSON line that told of it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    command = ["train", "--model", str(tiny_causal_folder), "--data", str(own_data), "-o", str(folder), "--json"]
    with redirect_stdout(io.StringIO()) as out:
        assert cli.run([*command, *settings()]) == 0
    console.use_json(False)
    return folder, json.loads(out.getvalue())


def test_train_ends_with_a_run_folder_and_its_metrics(trained):
    folder, payload = trained
    assert payload["status"] == "done"
    assert payload["exit_code"] == 0
    assert payload["steps"] == 5  # 19 of the 20 rows, 4 at a time
    assert payload["metrics"]["loss"] < payload["metrics"]["loss_before"]
    assert (Path(payload["adapter"]) / "adapter_model.safetensors").is_file()
    assert load_recipe(folder / "recipe.yaml").adapter.r == 2


def test_a_dry_run_foretells_the_run_and_writes_nothing(trained, tiny_causal_folder, own_data, tmp_path, json_of):
    plan = json_of("train", "--model", tiny_causal_folder, "--data", own_data, "--dry-run", *settings())
    assert (plan["steps"], plan["trainable_parameters"]) == (trained[1]["steps"], trained[1]["trainable_parameters"])
    assert plan["rows"] == 19
    assert list(tmp_path.iterdir()) == []


def test_eval_of_a_run_repeats_its_own_metrics(trained, json_of):
    """The run's recipe gives data, split, lengths and generation, so the loss is the one training ended with."""
    folder, payload = trained
    result = json_of("eval", folder)
    assert result["metrics"]["loss"] == pytest.approx(payload["metrics"]["loss"], rel=1e-6)
    assert result["n"] == len(result["predictions"]) == 1
    assert result["split"] == "validation"


def test_eval_on_a_file_scores_every_row_and_writes_a_result(trained, own_data, capsys, monkeypatch):
    Path("new.csv").write_text(own_data.read_text())
    command = ["eval", str(trained[0]), "--data", "new.csv", "--max-new-tokens", "3", "-o", "out/result.json"]
    command += ["--max-length", "14"]
    assert cli.run(command) == 0
    out = capsys.readouterr().out
    for words in ("on new, all rows", "loss", "exact_match", "given", "predicted", "expected", "1, 2"):
        assert words in out
    assert "was trained on" not in out
    rows = [line.split(",", 1) for line in own_data.read_text().splitlines()[1:]]
    longer = sum(len(prompt.strip('"')) + len(answer.strip('"')) + 1 > 14 for prompt, answer in rows)
    assert f"{longer} of 20 rows cut to 14 tokens" in out
    result = json.loads(Path("out/result.json").read_text())
    assert 0 < result["truncated"] == longer < 20
    assert result["n"] == len(result["predictions"]) == 20
    assert result["split"] == "all rows"
    assert result["recipe"]["max_new_tokens"] == 3
    assert result["versions"]["torch"]

    def fail(*_):
        raise UnicodeEncodeError("ascii", "½", 0, 1, "ordinal not in range(128)")

    monkeypatch.setattr("duallora.train.score._show", fail)  # it is on the disk before anything is shown
    assert cli.run([*command[:-3], "late.json"]) == 1
    assert json.loads(Path("late.json").read_text())["n"] == 20


def test_printed_commands_can_be_pasted_whatever_the_folder_is_called(trained, capsys, json_of):
    """Blanks, quotes, dollar signs, and brackets that rich would read as a style."""
    import shlex

    folder = Path("my runs/it's $HOME [bold] & co")
    shutil.copytree(trained[0], folder)
    assert cli.run(["train", "-c", str(folder / "recipe.yaml"), "-o", str(folder), "--resume", "auto"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    score, answer, merge = map(shlex.split, line.removeprefix("next: ").split(", or "))
    assert score == ["duallora", "eval", str(folder)]
    assert answer == ["duallora", "predict", str(folder), "FILE", "-o", "answers.csv"]
    assert merge == ["duallora", "merge", str(folder), "-o", "MERGED"]
    assert cli.run(score[1:]) == 0
    shutil.rmtree(folder / "adapter")
    again = json_of("eval", folder, code=2)["error"].partition("finish it with: ")[2]
    assert shlex.split(again) == ["duallora", "train", "-c", str(folder / "recipe.yaml"), "--resume", "auto"]


def test_eval_on_the_training_file_scores_the_held_out_rows_alone(trained, own_data, capsys, json_of):
    """19 of its 20 rows were trained on; a score over them says nothing of new rows. However the file is written."""
    Path("link.csv").symlink_to(own_data)
    for data, folder in [
        (str(own_data), trained[0] / "adapter"),
        (os.path.relpath(own_data), trained[0]),
        ("link.csv", trained[0]),
    ]:
        own = json_of("eval", folder)
        assert cli.run(["eval", str(folder), "--data", data, "--json"]) == 0
        captured = capsys.readouterr()
        assert f"{data} is what {folder} was trained on: scored on the run's own validation rows" in captured.err
        assert json.loads(captured.out) == own
        assert own["n"] == 1


def test_rows_that_are_not_those_of_the_training_are_told(trained, tmp_path, capsys):
    """As where rows were added to the file since: the draw is another, and holds rows that were trained on."""
    folder = shutil.copytree(trained[0], tmp_path / "run")
    told = f"the train rows are not those of {folder}'s training"
    assert cli.run(["eval", str(folder)]) == 0
    assert told not in capsys.readouterr().out
    facts = json.loads((folder / "run.json").read_text())
    facts["fingerprints"]["data"]["train"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(facts))
    assert cli.run(["eval", str(folder)]) == 0
    assert told in capsys.readouterr().out


def test_other_data_are_read_and_scored_as_the_recipe_of_the_run_says(trained, tmp_path, json_of):
    """The recipe's bad_rows, form, lengths and beams, which the flags overrule, and not its eval_limit."""
    from duallora.config.recipe import recipe_yaml

    shutil.copytree(trained[0], "run")
    recipe = load_recipe(
        "run/recipe.yaml",
        ["bad_rows=skip", "format=alpaca", "max_length=40", "eval.batch_size=3", "num_beams=2", "eval_limit=1"],
    )
    Path("run/recipe.yaml").write_text(recipe_yaml(recipe))
    # The columns fit two forms, and one row is bad.
    rows = [{"prompt": "p", "completion": "c", "instruction": f"Count {i}", "output": "1"} for i in range(3)]
    Path("new.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "p"}])))
    command = ["eval", "run", "--data", "new.jsonl", "-o", "out.json"]
    payload = json_of(*command)
    assert payload["n"] == 3
    assert payload["data"] == "new.jsonl"
    assert sum("1 bad row of 4" in note for note in payload["notes"]) == 1
    result = json.loads(Path("out.json").read_text())
    kept = {"max_length": 40, "batch_size": 3, "num_beams": 2, "max_new_tokens": 4}
    assert {key: result["recipe"][key] for key in kept} == kept
    assert cli.run([*command, "--max-length", "30", "--num-beams", "1", "--batch-size", "2", "--json"]) == 0
    result = json.loads(Path("out.json").read_text())
    kept = {"max_length": 30, "batch_size": 2, "num_beams": 1, "max_new_tokens": 4}
    assert {key: result["recipe"][key] for key in kept} == kept


def test_data_of_another_kind_than_the_run_was_trained_for_are_refused(trained, monkeypatch, json_of):
    monkeypatch.setattr(adapters, "load_adapter", None)  # refused before the model is loaded
    Path("two.csv").write_text("text,label\na,one\nb,two\n")
    error = json_of("eval", trained[0], "--data", "two.csv", code=2)["error"]
    assert f"two.csv holds classes (rows with a label), but {trained[0]} was trained for text to generate" in error


def test_eval_refuses_an_output_it_cannot_write_before_the_model_is_loaded(trained, monkeypatch, json_of):
    monkeypatch.setattr(adapters, "load_adapter", None)
    Path("out").mkdir()
    Path("file").write_text("x")
    assert "-o takes a file such as results.json" in json_of("eval", trained[0], "-o", "out", code=2)["error"]
    error = json_of("eval", trained[0], "-o", "file/deep/out.json", code=7)["error"]
    assert "file/deep/out.json cannot be written" in error
    if os.geteuid():  # to root no folder is closed
        Path("out").chmod(0o500)
        assert "Permission denied" in json_of("eval", trained[0], "-o", "out/new/out.json", code=7)["error"]
    assert list(Path("out").iterdir()) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("eval runs/mien --task e2e", "runs has no mien; the nearest name there is runs/mine"),
        ("merge runs/mien/adapter -o merged", "runs has no mien; the nearest name there is runs/mine/adapter"),
        ("eval runs/x --task e2e", "runs has no x; the nearest name there is runs/"),
    ],
)
def test_a_misspelt_run_is_not_looked_up_on_the_hub(line, words, monkeypatch, json_of):
    monkeypatch.setattr(adapters, "find", None)
    for name in ("other", "mine"):
        Path("runs", name).mkdir(parents=True)
    assert words in json_of(*line.split(), code=2)["error"]


def test_a_run_is_resumed_by_its_folder_alone(trained, tmp_path, json_of):
    """Also from a checkpoint, and where the folder was moved since: the recipe in it is the run's."""
    shutil.copytree(trained[0], "moved")
    checkpoint = next(Path("moved/checkpoints").glob("checkpoint-*"))
    for path in ("moved", str(checkpoint)):
        payload = json_of("train", "--resume", path)
        assert payload["status"] == "done"
        assert payload["metrics"] == trained[1]["metrics"]
    assert "adapter.r" in json_of("train", "--resume", "moved", "--set", "r=3", code=2)["error"]


def test_the_recipe_in_a_runs_folder_resumes_that_run_wherever_it_lies(trained, monkeypatch, json_of):
    """By the place that the recipe names, that of before the move, it would be trained anew, and there."""
    shutil.copytree(trained[0], "moved")
    for here, recipe in ((".", "moved/recipe.yaml"), ("moved", "recipe.yaml")):
        with monkeypatch.context() as inside:
            inside.chdir(here)
            payload = json_of("train", "-c", recipe, "--resume", "auto")
            assert Path(payload["folder"]).resolve() == Path(recipe).resolve().parent
        assert payload["metrics"] == trained[1]["metrics"]
    words = ("train", "-c", "moved/recipe.yaml", "--resume", "auto", "--set", "output=new", "--set", "data.path=no.csv")
    json_of(*words, code=3)  # it is begun there, as it is said


def test_eval_takes_a_plain_model_and_a_limit(tiny_causal_folder, own_data, json_of):
    command = ["eval", str(tiny_causal_folder), "--data", str(own_data), "--limit", "2", "--max-new-tokens", "2"]
    assert json_of(*command)["n"] == 2


def test_data_preview_shows_tokens(tiny_causal_folder, own_data, capsys, json_of):
    model = ["--model", str(tiny_causal_folder)]
    command = ["data", "preview", str(own_data), *model, "--rows", "2", "--max-length", "64"]
    assert cli.run(command) == 0
    out = capsys.readouterr().out
    for words in ("Count 0:", "1, 2", "</s>", "prompt-completion", "mine.csv:2"):
        assert words in out
    assert "Count 3:" not in out
    assert json_of(*command)["format"] == "prompt-completion"
    assert cli.run([*command, "--split", "tset"]) == 2
    assert "train, validation" in capsys.readouterr().err


def test_rows_are_previewed_and_checked_as_the_recipe_of_a_run_reads_them(tiny_encoder_folder, capsys, json_of):
    """The same settings tell a run and a look at its data what labels are."""
    Path("t.csv").write_text("text;label\n" + "".join(f"t{label};{label}.0\n" for label in (0, 10, 2)))
    for verb in ("preview", "check"):
        command = ["data", verb, "t.csv", "--model", tiny_encoder_folder]
        told = json_of(*command)
        assert told["kind"] == "classify"
        assert told["notes"] == [
            "classification, 3 classes 0, 2, 10 (whole-number labels; --set data.labels=numbers to regress)",
            "t.csv is separated by semicolons",
        ]
        assert json_of(*command, "--set", "data.labels=numbers")["kind"] == "regress"
        assert "data.labels" in json_of(*command, "--set", "data.labels=number", code=2)["error"]
    command = ["train", "--data", "t.csv", "--model", str(tiny_encoder_folder), "--dry-run"]
    assert cli.run(command) == 0
    assert "3 classes 0, 2, 10 (whole-number labels" in " ".join(capsys.readouterr().out.split())


def test_data_check_counts_rows_and_tokens(tiny_causal_folder, own_data, json_of):
    command = ["data", "check", str(own_data), "--model", str(tiny_causal_folder), "--max-length", "12"]
    payload = json_of(*command)
    rows = [f"Count {i}:{i + 1}, {i + 2}" for i in range(20)]  # a byte is a token, and the end-of-text token follows
    parts = payload["splits"].values()
    assert sum(part["rows"] for part in parts) == 20
    assert sum(part["truncated"] for part in parts) == sum(len(row) + 1 > 12 for row in rows)
    assert max(part["longest"] for part in parts) == 12


@pytest.mark.parametrize(
    ("verb", "name", "content", "fragment"),
    [
        ("train --data", "gone.jsonl", None, "gone.jsonl"),
        ("train --data", "bad.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a"', "bad.jsonl:2"),
        ("data check", "bad.csv", "prompt,completion\na,b\nc\n", "bad.csv:3"),
        ("data check", "empty.csv", "", "empty.csv"),
        ("data preview", "user.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', "user.jsonl:1"),
        ("data preview", "odd.csv", "question,answer\na,b\n", "question, answer"),
    ],
)
def test_bad_data_is_exit_code_3_and_names_the_line(verb, name, content, fragment, tiny_causal_folder, json_of):
    if content is not None:
        Path(name).write_text(content)
    assert fragment in json_of(*verb.split(), name, "--model", tiny_causal_folder, code=3)["error"]
    assert {path.name for path in Path().iterdir()} <= {name, "runs"}


def test_other_names_that_lead_nowhere_are_exit_code_2(trained, own_data, json_of):
    data = str(own_data)
    for line, fragment in [
        (["eval", "nowhere", "--data", data], "nowhere"),
        (["merge", "nowhere", "-o", "m"], "nowhere"),
        (["eval", str(trained[0]), "--task", "bolq"], "boolq"),
        (["eval", str(trained[0]), "--data", data, "--split", "tset"], "validation"),
        (["eval", str(trained[0]), "--data", data, "--task", "e2e"], "exclude each other"),
        (["eval", "builtin:smollm2"], "--task"),
        (["data", "preview", data, "--model", "./nowhere"], "nowhere"),
        (["train", "--data", data, "--resume", "auto"], "-o"),
        (["train", "--data", data, "--resume", "nowhere"], "nowhere"),
    ]:
        assert fragment in json_of(*line, code=2)["error"]


def test_every_verb_takes_an_adapter_from_the_hubs_cache_by_its_id(trained, own_data, lay_in_cache, json_of):
    lay_in_cache("org/mine", trained[0] / "adapter")
    data = ["--data", str(own_data), "--limit", "3", "--max-new-tokens", "2"]
    local = json_of("eval", trained[0] / "adapter", *data, "--split", "train")
    assert json_of("eval", "org/mine", *data)["n"] == local["n"] == 3
    assert json_of("check", "org/mine")["ok"]
    assert json_of("merge", "org/mine", "-o", "merged")["max_logit_difference"] == 0.0
    assert json_of("convert", "org/mine", "-o", "lora", "--rank", "4")["rank"] == 4


def test_a_classifier_trains_and_is_scored_by_class_name(tiny_encoder_folder, json_of):
    rows = [f"Count {i},{('zero', 'one', 'two')[i % 3]}\n" for i in range(24)]
    Path("three.csv").write_text("text,label\n" + "".join(rows))
    json_of("train", "--model", tiny_encoder_folder, "--data", "three.csv", "-o", "run", *settings("max_steps=2"))
    Path("copy.csv").write_text(Path("three.csv").read_text())
    whole = json_of("eval", "run", "--data", "copy.csv")
    assert whole["labels"] == ["one", "two", "zero"]
    # The rows of two classes alone: a reader of this file by itself would number them 0 and 1.
    Path("two.csv").write_text("text,label\n" + "".join(row for row in rows if "one" not in row))
    part = json_of("eval", "run", "--data", "two.csv")
    assert part["labels"] == ["one", "two", "zero"]
    kept = [(guess, row) for guess, row in zip(whole["predictions"], rows, strict=True) if "one" not in row]
    assert part["predictions"] == [guess for guess, _ in kept]
    right = sum(part["labels"][guess] in row for guess, row in kept)
    assert part["metrics"]["accuracy"] == pytest.approx(100 * right / len(kept))
    # One class alone, which by itself would be no classification at all, for whatever the run has left behind.
    Path("one.csv").write_text("text,label\n" + "".join(row for row in rows if "two" in row))
    kept = [prediction for prediction, row in zip(whole["predictions"], rows, strict=True) if "two" in row]
    json_of("merge", "run", "-o", "merged")
    for source in ("run", "run/adapter", "run/checkpoints/checkpoint-2", "merged"):
        part = json_of("eval", source, "--data", "one.csv")
        assert (part["labels"], part["predictions"]) == (["one", "two", "zero"], kept), source
        assert part["metrics"]["accuracy"] == pytest.approx(100 * kept.count(1) / 8)
    Path("other.csv").write_text("text,label\na,one\nb,nine\nc,ten\n")
    told = "holds the classes nine, ten, which the model was not trained on; it knows one, two, zero"
    assert told in json_of("eval", "run", "--data", "other.csv", code=2)["error"]
    assert "no classification head" in json_of("eval", tiny_encoder_folder, "--data", "three.csv", code=2)["error"]


def test_a_regression_is_scored_on_whole_numbers_and_a_classifier_on_numbers_as_names(tiny_encoder_folder, json_of):
    """1, 2 and 3 are classes where nobody says otherwise: here the run does."""
    texts = [f"Count {i}" for i in range(12)]
    Path("half.csv").write_text("text,label\n" + "".join(f"{text},{i / 2}\n" for i, text in enumerate(texts)))
    Path("whole.csv").write_text("text,label\n" + "".join(f"{text},{i}\n" for i, text in enumerate(texts[:4])))
    Path("named.csv").write_text("text,label\na,low\n")
    train = ["train", "--model", str(tiny_encoder_folder), *settings("max_steps=1"), "--data"]
    json_of(*train, "half.csv", "-o", "amounts")
    scored = json_of("eval", "amounts", "--data", "whole.csv")
    assert scored["labels"] == []
    errors = [guess - i for i, guess in enumerate(scored["predictions"])]
    assert scored["metrics"]["rmse"] == pytest.approx((sum(error**2 for error in errors) / 4) ** 0.5)
    assert (
        "expected a finite number, got text ('low')"
        in json_of("eval", "amounts", "--data", "named.csv", code=3)["error"]
    )
    # And the other way round: what would be read as targets are classes by name, and these it has not.
    Path("three.csv").write_text("text,label\n" + "".join(f"{text},{i % 3}\n" for i, text in enumerate(texts)))
    json_of(*train, "three.csv", "-o", "classes")
    Path("floats.jsonl").write_text('{"text": "a", "label": 2.0}\n{"text": "b", "label": "0"}\n')
    assert json_of("eval", "classes", "--data", "floats.jsonl")["labels"] == ["0", "1", "2"]
    assert "holds the classes 0.5, 1.5, 2.5, " in json_of("eval", "classes", "--data", "half.csv", code=2)["error"]


def test_a_run_at_chance_is_done_and_says_so_in_its_json(tiny_encoder_folder, capsys, json_of):
    """Exit code 0, a warning for people, a field for programs; of `eval` on other rows too."""
    Path("three.csv").write_text("text,label\n" + "".join(f"Count {i},{'abc'[i % 3]}\n" for i in range(60)))
    command = ["train", "--model", str(tiny_encoder_folder), "--data", "three.csv", "-o", "run", "--json"]
    assert cli.run([*command, *settings("max_steps=2", "learning_rate=1e-12")]) == 0
    output = capsys.readouterr()
    payload = json.loads(output.out)
    assert payload["status"] == "done"
    assert payload["at_chance"]["message"].startswith("at chance: ")
    assert payload["at_chance"]["message"] in " ".join(output.err.split())
    Path("fresh.csv").write_text(Path("three.csv").read_text())
    payload = json_of("eval", "run", "--data", "fresh.csv", "-o", "out.json")
    assert payload["at_chance"]["rows"] == "all rows"
    assert payload["at_chance"]["chance_loss"] == pytest.approx(math.log(3))
    assert json.loads(Path("out.json").read_text())["at_chance"] == payload["at_chance"]


@pytest.mark.data
def test_a_task_of_the_paper_is_previewed_from_its_folder(shared_data, tiny_causal_folder, json_of):
    command = ["data", "preview", "boolq", "--data-dir", str(shared_data), "--model", str(tiny_causal_folder)]
    assert json_of(*command, "--rows", "1", "--max-length", "4096")["kind"] == "generate"


def test_demo_hands_its_options_on(monkeypatch, capsys, json_of):
    """The demonstration itself is tested beside its code; here: what the verb passes, prints and returns."""
    from duallora.paper import demo

    calls = []

    def show(*, quick, output, console):
        calls.append((quick, output))
        console.print("before and after")
        return {"output": str(output), "loss": 1.5}

    monkeypatch.setattr(demo, "demo", show)
    assert cli.run(["demo"]) == 0
    assert "before and after" in capsys.readouterr().out
    assert json_of("demo", "--quick", "-o", "here") == {"status": "done", "exit_code": 0, "output": "here", "loss": 1.5}
    assert calls == [(False, Path("runs/demo")), (True, Path("here"))]
