"""PEFT's own test-suite, run with DualLoraConfig (``make peft-suite``).

Fetches the sources of the installed PEFT from the package index, takes the tests out of them, and runs those whose
rows are ours (see plugin.py) against the installed package. Fails on a failure that exceptions.py does not list, and
on a listed one that passes or no longer exists.

    python tests/peft_suite/run.py                     all files
    python tests/peft_suite/run.py test_config.py      some, and any option of pytest after them
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duallora" / "peft-suite"
FILES = (
    "test_config.py",
    "test_custom_models.py",
    "test_mapping.py",
    "test_other.py",
    "test_tuners_utils.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
)
MARKERS = ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes")  # as PEFT declares them


def fetch(peft: str) -> Path:
    """The folder that holds ``tests`` of PEFT ``peft``; downloaded once.

    Raises:
        SystemExit: the package index has no such source archive, or cannot be reached.
    """
    folder = CACHE / peft
    if (folder / "pytest.ini").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        done = subprocess.run([*command, "--dest", download, f"peft=={peft}"], capture_output=True, text=True)
        archives = list(Path(download).glob("peft-*.tar.gz"))
        if done.returncode or not archives:
            sys.exit(
                f"The sources of peft=={peft} could not be downloaded; the suite needs the package index once, after "
                f"which they lie in {folder}.\n{done.stderr.strip()}"
            )
        with tarfile.open(archives[0]) as archive:
            for member in archive.getmembers():
                parts = Path(member.name).parts[1:]  # without peft-VERSION/
                if member.isfile() and len(parts) == 2 and parts[0] == "tests" and parts[1].endswith(".py"):
                    target = folder / "tests" / parts[1]
                    target.parent.mkdir(exist_ok=True)
                    source = archive.extractfile(member)
                    assert source is not None
                    target.write_bytes(source.read())
    (folder / "tests" / "__init__.py").touch()
    # Written last: its presence says that the folder is complete.
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n" + "".join(f"    {name}\n" for name in MARKERS))
    return folder


def main(arguments: list[str]) -> int:
    """Run the suite; pytest's exit code."""
    folder = fetch(version("peft"))
    sys.path.insert(0, str(HERE))
    import stand_ins

    stand_ins.build(CACHE / "hub")
    files = [name for name in arguments if name.endswith(".py")] or list(FILES)
    options = [name for name in arguments if not name.endswith(".py")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_CACHE": str(CACHE / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-q", "-n", "2"]
    command += ["--timeout", "120", "--tb", "short", "--disable-warnings", *options]
    return subprocess.run([*command, *(f"tests/{name}" for name in files)], cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
