"""Our tests beside other releases than those pinned: older PEFT and transformers, newer Triton (``make compat``).

Each set of packages goes into a folder of its own, without dependencies, ahead of the environment on the path; torch
and everything else stay as installed.

    python tests/compat/run.py                    every set
    python tests/compat/run.py peft-0.18.1        some, and any option of pytest after them
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duallora" / "compat"
OLDEST = [
    "transformers==4.56.2", "huggingface_hub==0.36.2", "tokenizers==0.22.2", "datasets==4.4.1", "httpx==0.28.1", "httpcore==1.0.9",
]  # fmt: skip
SETS = {
    "peft-0.18.1": ["peft==0.18.1"],  # the lower bound; LLaMA-Factory pins it
    "peft-0.19.1": ["peft==0.19.1"],  # axolotl pins it
    # The lower bound of transformers, with releases of its time of what is bound to it.
    "transformers-4.56": [*OLDEST, "accelerate==1.10.1", "trl==0.24.0", "peft==0.18.1"],
    "triton-3.9.0": ["triton==3.9.0"],  # torch as PyPI has it asks for an older one, which is the one pinned
}
# What depends on PEFT and transformers: the contract, chat templates, a run of each trainer. The mathematics does not.
TESTS = [
    "tests/tuner/test_register.py",
    "tests/tuner/test_config.py",
    "tests/tuner/test_model.py",
    "tests/tasks/test_template.py",
    "tests/test_trainers.py",
    "tests/test_ties.py",
]
KERNELS = ["tests/ops/test_triton.py"]


def install(name: str) -> Path:
    """The folder of one set, filled once.

    Raises:
        SystemExit: pip failed.
    """
    folder = CACHE / name
    done = folder / "installed.txt"
    wanted = "\n".join(SETS[name])
    if not done.exists() or done.read_text() != wanted:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        if subprocess.run([*command, *SETS[name]]).returncode:
            sys.exit(f"{name}: pip could not install {', '.join(SETS[name])}; the package index is needed once.")
        done.write_text(wanted)
    return folder


def main(arguments: list[str]) -> int:
    """Run the tests with each set; 1 if any fails."""
    names = [name for name in arguments if name in SETS] or list(SETS)
    options = [argument for argument in arguments if argument not in SETS]
    failed = []
    for name in names:
        path = os.pathsep.join([str(install(name)), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["OMP_NUM_THREADS"] = "1"
        print(f"== {name}: {', '.join(SETS[name])}", flush=True)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", "--disable-warnings", *options]
        tests = KERNELS if name.startswith("triton") else TESTS
        if subprocess.run([*command, *tests], cwd=ROOT, env=environment).returncode:
            failed.append(name)
    if failed:
        print(f"failed with: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
