"""What `make release-check` does: wheel and sdist built twice, looked into, installed alone and tested there, offline.

python tests/install/release.py [--dist DIR]

Each of the two is installed by itself (--no-index, --no-deps) into an empty environment, which reads the packages that it
depends on from the environment this runs in. There the sdist's own tests of the method and the command line run, on the
installed package. Prints a line a check; exit code 1 at the first that fails.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LARGEST = {".whl": 1_000_000, ".gz": 3_000_000}  # bytes
# Of the sdist: the method, a config's defaults and files, and the command line's face.
TESTS = [
    "tests/core",
    "tests/test_nn.py",
    "tests/tuner/test_config.py",
    "tests/tuner/test_register.py",
    "tests/tuner/test_lora_start.py",
]
OFFLINE = {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def check(ok: bool, words: str) -> None:
    print("ok    " if ok else "FAILED", words, flush=True)
    if not ok:
        sys.exit(1)


def build(folder: Path) -> dict[str, Path]:
    """Wheel and sdist of the committed files, by suffix."""
    tree = folder / "tree"
    tree.mkdir(parents=True)
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)  # not copy2: times differ
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    return {path.suffix: path for path in folder.iterdir() if path.is_file()}


def look_into(built: dict[str, Path], version: str) -> None:
    for suffix, path in built.items():
        size = path.stat().st_size
        check(size < LARGEST[suffix], f"{path.name}: {size:,} bytes, less than {LARGEST[suffix]:,}")
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = wheel.namelist()
        info = f"duallora-{version}.dist-info"
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
        scripts = wheel.read(f"{info}/entry_points.txt").decode()
    source = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "duallora").rglob("*") if path.is_file()}
    source = {name for name in source if "__pycache__" not in name}
    ours = {name for name in names if not name.startswith(info)}
    needs = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    needed = {re.match(r"[\w-]+", line)[0] for line in needs}  # type: ignore[index]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").strip()
    check(ours == source, f"the wheel is src/duallora, all {len(source)} files of it")
    check(f"{info}/licenses/LICENSE" in names, "its license")
    for what, wanted in {
        "Name": "duallora",
        "Version": version,
        "License-Expression": "Apache-2.0",
        "Requires-Python": ">=3.10",
        "Description-Content-Type": "text/markdown",
    }.items():
        check(metadata[what] == wanted, f"{what}: {wanted}")
    check(needed == {"torch", "peft", "transformers", "safetensors"}, f"what it needs: {', '.join(sorted(needed))}")
    check("train" in metadata.get_all("Provides-Extra"), "its extras")
    check("duallora = duallora.__main__:main" in scripts, "the program `duallora`")
    check(metadata.get_payload().strip() == readme, "README as its description")
    with tarfile.open(built[".gz"]) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    want = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    want |= {"src/duallora/__init__.py", "tests/oracle.py", "docs/index.md"}
    more = [name for name in inside if "__pycache__" in name or name.startswith("results/")]
    check(want <= inside and not more, "the sdist: sources, tests and docs")


def install(package: Path, folder: Path) -> tuple[Path, dict[str, str]]:
    """An environment with the package alone, and the variables to use it with."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files are not read
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment = kept | OFFLINE
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--force-reinstall"]
    done = subprocess.run([*command, str(package)], env=environment, capture_output=True, text=True)
    check(done.returncode == 0, f"{package.name} installs offline {done.stderr.strip()[-300:]}")
    return python, environment


def try_out(python: Path, environment: dict[str, str], tests: Path, version: str) -> None:
    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tests, env=environment, capture_output=True, text=True)
        said = (done.stdout + done.stderr)[-600:] if done.returncode else ""
        check(done.returncode == 0, f"{' '.join(words[1:4])} {said}")
        return done.stdout.strip()

    code = "import duallora; print(duallora.__file__); duallora.DualLoraConfig()"
    where = run(str(python), "-c", code).splitlines()[0]
    check(Path(where).is_relative_to(python.parents[1]), "what is imported is what was installed")
    check(run(str(python.parent / "duallora"), "--version") == f"duallora {version}", "the program's version")
    told = run(str(python), "-m", "pytest", "-p", "no:cacheprovider", *TESTS).splitlines()
    check("passed" in told[-1] or told[-1].endswith("[100%]"), f"its tests: {told[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dist", type=Path, help="folder to put the two files into once all is well")
    dist = parser.parse_args().dist
    version = runpy.run_path(str(ROOT / "src" / "duallora" / "__init__.py"))["__version__"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built, again = build(folder / "a"), build(folder / "b")
        sums, others = (
            {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in one.values()}
            for one in (built, again)
        )
        told = ", ".join(f"{name} {digest[:12]}" for name, digest in sums.items())
        check(sums == others and len(sums) == 2, f"two builds are the same bytes: {told}")
        look_into(built, version)
        with tarfile.open(built[".gz"]) as sdist:
            sdist.extractall(folder / "sdist", filter="data")
        tests = next((folder / "sdist").iterdir())
        shutil.rmtree(tests / "src")  # only the installed package is there to be tested
        for suffix, package in built.items():
            try_out(*install(package, folder / f"env{suffix}"), tests, version)
        for package in built.values() if dist else ():
            dist.mkdir(parents=True, exist_ok=True)
            shutil.copy(package, dist)


if __name__ == "__main__":
    main()
