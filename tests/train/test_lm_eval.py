"""lm-eval's process loads a Dual LoRA adapter, though nothing in it imports duallora."""

import os
import subprocess
import sys

import pytest

from duallora import lm_eval
from duallora.store import models

PROGRAM = """
import sys
def cli_evaluate():
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    pretrained, peft = (part.partition("=")[2] for part in sys.argv[-1].split(","))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pretrained), peft)
    print(sys.argv[0], sys.argv[1:-1], model.peft_config["default"].peft_type.value)
"""


def test_the_adapter_is_known_to_peft_and_the_arguments_are_lm_evals_own(trained, tiny_causal_folder, tmp_path):
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").touch()
    (tmp_path / "lm_eval" / "__main__.py").write_text(PROGRAM)
    given = f"pretrained={tiny_causal_folder},peft={trained() / 'adapter'}"
    command = [sys.executable, "-m", "duallora.lm_eval", "run", "--model", "hf", "--model_args", given]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["lm_eval ['run', '--model', 'hf', '--model_args'] DUALLORA"], done.stderr


def test_built_in_models_are_named_by_their_folder(monkeypatch):
    monkeypatch.setattr(models, "resolve", lambda name: f"/cache/{name[8:]}")
    given = ["--model_args", "pretrained=builtin:smollm2-135m,peft=runs/a=builtin:x/adapter", "builtin:y"]
    expected = ["--model_args", "pretrained=/cache/smollm2-135m,peft=runs/a=builtin:x/adapter", "builtin:y"]
    assert lm_eval.arguments(given) == expected


@pytest.mark.parametrize("given", [["--model_args", "pretrained=builtin:smolm"], []])
def test_what_is_missing_is_a_plain_error(given, tmp_path, monkeypatch, capsys):
    (tmp_path / "lm_eval").mkdir()
    program = "def cli_evaluate(): pass" if given else "raise ImportError('no lm_eval here')"
    (tmp_path / "lm_eval" / "__main__.py").write_text(program)
    (tmp_path / "lm_eval" / "__init__.py").touch()
    for name in ("lm_eval", "lm_eval.__main__"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["lm_eval.py", *given])
    with pytest.raises(SystemExit) as end:
        lm_eval.main()
    for name in ("lm_eval", "lm_eval.__main__"):
        sys.modules.pop(name, None)
    assert end.value.code == 2
    wanted = "nearest: builtin:smollm2-135m" if given else "pip install 'lm-eval[hf]'"
    assert wanted in capsys.readouterr().err
