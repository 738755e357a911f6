"""Runs PEFT's method_comparison/MetaMathQA/run.py with Dual LoRA known to PEFT, from its own folder:

    cp -r experiments/duallora PEFT/method_comparison/MetaMathQA/experiments/
    cd PEFT/method_comparison/MetaMathQA
    python DUALLORA/examples/peft_method_comparison/run_in_peft.py -v experiments/duallora/llama-3.2-3B-rank16-lr1e-3

Its arguments are run.py's.
"""

import runpy
import sys
from pathlib import Path

if not Path("run.py").is_file():
    sys.exit("run.py is not here: go to method_comparison/MetaMathQA of a checkout of PEFT first")

import duallora  # noqa: F401  (registers the method)

sys.path.insert(0, str(Path.cwd()))
sys.argv = ["run.py", *sys.argv[1:]]
runpy.run_path("run.py", run_name="__main__")
