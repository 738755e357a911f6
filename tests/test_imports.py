"""The arrows of the design: who may import whom. An arrow that points back turns red here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

SOURCE = Path(__file__).parents[1] / "src" / "duallora"

MAY_IMPORT = {
    "errors": set(),
    "folders": set(),
    "terminal": set(),
    "console": {"errors"},
    "core": {"core", "errors"},
    "ops": {"ops", "core", "folders"},
    "ties": {"errors"},
    "nn": {"ties", "ops", "core", "errors"},
    "tuner": {"tuner", "ties", "ops", "core", "errors"},
    "methods": {"methods", "tuner", "core", "errors"},
    "config": {"config", "core", "errors", "terminal"},
    "tasks": {"tasks", "errors"},
    "store": {"store", "config", "tasks", "tuner", "core", "errors", "folders", "terminal"},
    "train": {
        "train",
        "store",
        "config",
        "tasks",
        "methods",
        "ops",
        "errors",
        "folders",
        "terminal",
        "console",
        "__root__",
    },
    "export": {"export", "train", "store", "config", "tasks", "tuner", "core", "errors", "folders", "terminal"},
    "plots": {"store", "errors"},
    "grid": {"grid", "train", "store", "config", "tasks", "plots", "errors", "terminal"},
    "plan": {"plan", "store", "errors", "terminal", "__root__"},
    "paper": {
        "paper",
        "analysis",
        "grid",
        "export",
        "train",
        "store",
        "config",
        "tasks",
        "methods",
        "plan",
        "errors",
        "terminal",
    },
    "analysis": {"analysis", "store", "tuner", "core", "plots", "errors", "terminal"},
    "bench": {"bench", "store", "tasks", "ops", "core", "errors", "terminal", "__root__"},
    "lm_eval": {"store", "errors"},
    "__main__": {"cli", "errors", "__root__"},
}
# A verb calls whatever has something to show, never the layers themselves.
MAY_IMPORT["cli"] = {*MAY_IMPORT, "cli", "__root__"} - {"core", "ops", "nn"}


def part(module: str) -> str:
    """ "duallora.core.gate" -> "core"; "duallora" itself -> "__root__"."""
    return module.split(".")[1] if "." in module else "__root__"


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            is_root = node.module == "duallora"
            found |= {f"duallora.{alias.name}" for alias in node.names} if is_root else {node.module}
    known = MAY_IMPORT.keys()
    return {part(m) if part(m) in known else "__root__" for m in found if m == "duallora" or m.startswith("duallora.")}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows_point_one_way(path):
    owner = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if owner == "__init__":  # the lazy table of public names
        return
    assert imports(path) <= MAY_IMPORT[owner], f"{path} imports {imports(path) - MAY_IMPORT[owner]}"


def test_no_modules_import_each_other_in_a_circle():
    """Inside functions neither: whoever reads one of them has to read them all."""
    files = {str(p.relative_to(SOURCE.parent).with_suffix("")).replace("/", "."): p for p in SOURCE.rglob("*.py")}
    wants: dict[str, set[str]] = {}
    for name, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        wants[name] = {other for other in found if other in files and other != name}
    left = dict(wants)
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left


def test_every_package_imported_is_required():
    """In pyproject.toml, at least by an extra: what comes along with a dependency today may stay away tomorrow."""
    names = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    names -= {"duallora", *sys.stdlib_module_names}
    names -= {"lm_eval", "vllm"}  # not for adapters: an error says what to install, and vLLM itself loads its plug-in
    assert "torch" in names
    owners = packages_distributions()
    text = (SOURCE.parents[1] / "pyproject.toml").read_text()
    required = {canonicalize_name(name) for name in re.findall(r'"([\w.-]+)(?:\[[\w,]+\])?>=', text)}
    missing = {n for n in names if not {canonicalize_name(o) for o in owners.get(n, [n])} & required}
    assert not missing, f"imported and not in pyproject.toml: {sorted(missing)}"


BASE = {"torch", "triton", "peft", "transformers", "safetensors", "accelerate"}  # triton and accelerate come with these


@pytest.mark.parametrize("owner", ["core", "ops", "tuner", "methods", "nn", "ties", "errors"])
def test_the_method_needs_the_base_install_alone(owner):
    """What is imported anywhere in it, also inside functions; the rest is duallora[train]."""
    paths = [SOURCE / f"{owner}.py"] if (SOURCE / f"{owner}.py").exists() else (SOURCE / owner).rglob("*.py")
    names = set()
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    assert names - {"duallora", *sys.stdlib_module_names} <= BASE


def test_the_command_line_says_what_to_install_where_it_is_not():
    code = "import sys; sys.modules['typer'] = None; from duallora.__main__ import main; main()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 2
    assert "needs the package typer" in found.stderr
    assert "pip install 'duallora[train]'" in found.stderr


def loaded_after(code: str, *modules: str) -> list[str]:
    script = f"import sys\n{code}\nprint(*[m for m in {modules!r} if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()


def test_import_is_cheap_and_peft_stays_optional():
    """`import duallora` loads nothing; the method alone needs torch, never PEFT or transformers."""
    assert loaded_after("import duallora", "torch", "peft", "transformers") == []
    code = "from duallora import DualLoraLinear, dual_delta, dual_linear, gate, advance_gate"
    assert loaded_after(code, "torch", "peft", "transformers") == ["torch"]


def test_a_run_starts_without_its_scorers():
    """Every training process would pay for their import, also where its task never asks them."""
    assert loaded_after("import duallora.tasks", "scipy.stats", "sacrebleu") == []


def test_public_names_exist():
    import duallora

    for name in duallora.__all__:
        assert getattr(duallora, name) is not None
        assert name in dir(duallora)
    with pytest.raises(AttributeError, match="no attribute 'dual_dleta'"):
        _ = duallora.dual_dleta


LONG = {"ops/triton.py: _gradients"}  # a kernel: one pass over its tiles, with nothing to call


def test_no_function_has_more_than_sixty_lines_of_body():
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                if body and node.end_lineno - body[0].lineno + 1 > 60:
                    found.add(f"{path.relative_to(SOURCE)}: {node.name}")
    assert found == LONG
