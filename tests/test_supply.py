"""What the source may not do to a stranger's file, and that the wheel is the same bytes from the same sources."""

from __future__ import annotations

import ast
import hashlib
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "duallora"
CODE_IN_DATA = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}  # reading it can run it


def unsafe(tree: ast.AST) -> list[str]:
    """What of ``tree`` reads pickles, runs text as code or a shell, or lets a model bring its own code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in CODE_IN_DATA]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in CODE_IN_DATA:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "torch.load" and keywords.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if name in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "__import__"):
                found.append(name)
            harmless = {"shell": "False", "trust_remote_code": "False", "weights_only": "True"}
            found += [f"{key}={keywords[key]}" for key, value in harmless.items() if keywords.get(key, value) != value]
    return found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from joblib import load", "torch.load(f)", "torch.load(f, weights_only=False)", "eval(text)",
        "subprocess.run(text, shell=True)", "AutoModel.from_pretrained(f, trust_remote_code=True)", "yaml.load(f)",
        "AutoModel.from_pretrained(f, trust_remote_code=trust)", "os.system(text)",
    ],
)  # fmt: skip
def test_what_would_run_a_strangers_code_is_seen(text):
    assert unsafe(ast.parse(text))


def test_no_source_file_runs_what_it_reads():
    found = {str(path.relative_to(SOURCE)): unsafe(ast.parse(path.read_text())) for path in SOURCE.rglob("*.py")}
    assert len(found) > 100
    assert {path: what for path, what in found.items() if what} == {}


def _named(lines) -> set[str]:
    """name==version of requirement lines, names normalized"""
    found = (re.match(r"([\w.-]+)==([^\s;]+)", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", match[1]).lower() + "==" + match[2] for match in found if match}


def test_the_lock_names_every_pin_with_its_hashes():
    """requirements.lock (``make lock``) is what constraints.txt pins, each file by its SHA-256."""
    pins = _named((ROOT / "constraints.txt").read_text().splitlines())
    blocks = re.split(r"\n(?=[^\s#])", (ROOT / "requirements.lock").read_text())[1:]
    locked = _named(block for block in blocks if "emscripten'" not in block.replace("!= 'emscripten'", ""))
    assert len(locked) > 100
    assert {one for one in locked - pins if not re.match(r"(nvidia|cuda)-", one)} == set(), "run make lock"
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)


def test_two_builds_of_a_wheel_are_the_same_bytes(tmp_path):
    pytest.importorskip("hatchling")
    sums = []
    for name in ("first", "second"):
        tree, ignored = tmp_path / name, shutil.ignore_patterns("__pycache__")
        shutil.copytree(
            ROOT / "src", tree / "src", copy_function=shutil.copy, ignore=ignored
        )  # not copy2: times differ
        for file in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
            shutil.copy(ROOT / file, tree)
        command = [sys.executable, "-m", "hatchling", "build", "--directory", str(tmp_path / f"{name}-dist")]
        subprocess.run(command, cwd=tree, check=True, capture_output=True)
        built = sorted((tmp_path / f"{name}-dist").iterdir())
        assert {path.suffix for path in built} == {".whl", ".gz"}
        sums.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in built})
    assert sums[0] == sums[1]


def test_no_test_reaches_the_network():
    """conftest.py closes the sockets, except for loopback."""
    with pytest.raises(OSError, match=r"192\.0\.2\.1.*tests may reach loopback alone"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.5)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
        pass
