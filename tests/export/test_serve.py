"""The engine that is installed gets the merged model, or the LoRAs, of the very adapters that were named."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from export.conftest import shake
from peft import PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from duallora import DualLoraConfig, cli
from duallora.errors import ConfigError
from duallora.export import serve
from duallora.store import adapters

LACKING = [name for name in ("fastapi", "uvicorn", "openai", "transformers.cli") if find_spec(name) is None]
needs_engine = pytest.mark.skipif(bool(LACKING), reason=f"no {LACKING}: pip install 'duallora[serve]'")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")  # one for all: it also holds compiled kernels


@pytest.fixture(autouse=True)
def cache(caches, monkeypatch):
    """Where what is served is kept, empty; and nothing takes the place of pytest's process."""
    monkeypatch.setenv("DUALLORA_CACHE", str(caches))
    monkeypatch.setattr(os, "execvp", lambda *a: pytest.fail(f"started {a}"))
    shutil.rmtree(caches / "served", ignore_errors=True)
    return caches / "served"


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A program of that name on PATH, which writes down its arguments; ``vllm()`` reads them."""
    program, told = tmp_path / "bin" / "vllm", tmp_path / "arguments.json"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open({str(told)!r}, 'w'))\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return lambda: json.loads(told.read_text())


@pytest.fixture
def other(native, tmp_path):
    """Another adapter on the base of ``native``."""
    folder = tmp_path / "other"
    base = json.loads((native / "adapter_config.json").read_text())["base_model_name_or_path"]
    config = DualLoraConfig(r=4, target_modules=["q_proj", "v_proj"], warmup="none", task_type="CAUSAL_LM")
    shake(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config), seed=1).save_pretrained(folder)
    return folder


def asked(port: int, path: str, **body) -> dict:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/{path}", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]


@needs_engine
def test_transformers_serve_answers_as_the_adapter_generates(native):
    """Over HTTP, greedily, against PEFT's own model of the adapter, which no merge and no cache has touched."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = f"-m duallora.cli serve {native} --engine transformers --port {port} -- --device cpu".split()
    server = subprocess.Popen([sys.executable, *line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 150
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", port)):
                assert server.poll() is None, server.stdout.read()
                assert time.monotonic() < deadline
                time.sleep(0.2)
        text = asked(port, "completions", prompt="Who?", max_tokens=12, temperature=0)["text"]
        message = asked(port, "chat/completions", messages=[{"role": "user", "content": "Who?"}], max_tokens=9, seed=0)
    finally:
        server.terminate()
        said = server.communicate(timeout=60)[0]
    assert f"http://127.0.0.1:{port}/v1" in said
    assert server.returncode == -signal.SIGTERM  # the engine's own end: nothing of this package waits around it
    base = json.loads((native / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(native)).eval()
    tokenizer = AutoTokenizer.from_pretrained(native)
    row = tokenizer("Who?", return_tensors="pt")
    with torch.no_grad():
        found = model.generate(**row, max_new_tokens=12, do_sample=False)[0, row["input_ids"].shape[1] :]
    assert len(set(found.tolist())) > 3
    assert text == tokenizer.decode(found, skip_special_tokens=True)
    assert message["message"]["role"] == "assistant"


@needs_engine
def test_chat_talks_to_a_server_that_ends_with_it(native, tmp_path, monkeypatch, capfd):
    (tmp_path / "typed").write_text("Who?\nn\n!exit\n")
    monkeypatch.setattr(sys, "stdin", None)
    with (tmp_path / "typed").open() as typed:
        before = os.dup(0)
        os.dup2(typed.fileno(), 0)
        try:
            code = serve.chat(str(native), ["max_new_tokens=3", "do_sample=False"], console=Console(file=io.StringIO()))
        finally:
            os.dup2(before, 0)
            os.close(before)
    out, err = capfd.readouterr()
    assert code == 0
    assert "tokens in" in out
    assert "Finished server process" in err


def test_one_adapter_goes_to_vllm_merged_and_several_as_loras_by_their_names(native, other, vllm, cache):
    """By a real process, which the engine takes the place of."""
    line = [sys.executable, "-m", "duallora.cli", "serve", f"mine={native}"]
    subprocess.run([*line, "--", "--seed", "5"], check=True, timeout=120, capture_output=True)
    command, model, *options = vllm()
    assert command == "serve"
    assert options == ["--served-model-name", "mine", "--host", "127.0.0.1", "--port", "8000", "--seed", "5"]
    assert Path(model).parent.parent == cache
    merged, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    adapted, _ = adapters.load_adapter(native, "generate")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-6)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert set(merged.generation_config.eos_token_id) == ends  # what closes a turn of its chat ends an answer

    ready = serve.prepare([f"mine={native}", str(other)], rank=20, host="::1", port=9)
    assert ready["models"] == ["mine", "other"]
    _, command, base, *options = ready["command"]
    assert base == json.loads((native / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert options[:4] == ["--enable-lora", "--max-lora-rank", "32", "--lora-modules"]
    loras = dict(item.split("=") for item in options[4:6])
    assert options[6:] == ["--host", "::1", "--port", "9"]
    assert list(loras) == ["mine", "other"]
    for folder, layers in ((loras["mine"], 14), (loras["other"], 4)):
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"]) == ("LORA", 20)
        assert len(load_file(Path(folder) / "adapter_model.safetensors")) == 2 * layers


def test_the_cache_holds_what_was_made_of_this_content_or_makes_it_anew(native, other, tmp_path, vllm, cache):
    folder = tmp_path / "adapter"
    shutil.copytree(native, folder)

    def ready(source=folder):
        console = Console(file=io.StringIO(), width=300)
        return Path(serve.prepare([str(source)], console=console)["command"][2]), console.file.getvalue()

    model, said = ready()
    assert "merged" in said
    weights = model / "model.safetensors"
    right, written = weights.read_bytes(), weights.stat().st_mtime_ns
    (folder / "README.md").write_text("a card changes nothing")
    assert ready()[0] == model
    assert weights.stat().st_mtime_ns == written
    another, _ = ready(other)
    assert another.parent.parent == model.parent.parent == cache
    assert another != model

    def damaged():
        weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))

    def cut():
        (model.parent / serve.MADE).write_text("{")

    def exchanged():
        shutil.rmtree(model.parent)
        shutil.copytree(another.parent, model.parent)

    for harm in (damaged, cut, exchanged):
        harm()
        again, said = ready()
        assert "is damaged, or of other content" in said
        assert again == model
        assert weights.read_bytes() == right, harm
    shutil.copy(other / "adapter_model.safetensors", folder)  # other content under the same path
    shutil.copy(other / "adapter_config.json", folder)
    assert ready()[0] not in (model, another)
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []


def test_a_plain_lora_is_served_as_it_is_and_a_model_from_where_it_lies(native, other, tmp_path, vllm):
    from duallora.export import convert

    convert.convert(native, tmp_path / "lora", rank=2)
    command = serve.prepare([str(tmp_path / "lora"), str(other)])["command"]
    assert f"lora={tmp_path / 'lora'}" in command
    base = json.loads((native / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert serve.prepare([base])["command"][2] == base


def test_what_cannot_be_served_is_said_before_anything_is_made(
    native, other, make_adapter, run_folder, tmp_path, vllm, cache, capsys
):
    classifier = make_adapter("classify")
    moved = tmp_path / "moved"
    shutil.copytree(run_folder / "adapter", moved)
    weights = moved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    foreign = tmp_path / "foreign"
    shutil.copytree(other, foreign)
    config = json.loads((foreign / "adapter_config.json").read_text())
    base = tmp_path / "base"
    shutil.copytree(config["base_model_name_or_path"], base)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-5}))
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    for code, words, line in [
        (2, "no text to serve. Use duallora eval", [classifier]),
        (4, "damaged", [moved]),
        (2, "not adapters of one base model", [native, foreign]),
        (2, "not adapters of one base model", [native, base]),
        (2, "are both called 'adapter'", [native, native]),
        (2, "has no nowhere", [tmp_path / "nowhere"]),
        (2, "vLLM, which alone serves several", ["--engine", "transformers", native, other]),
    ]:
        assert cli.run(["serve", *map(str, line)]) == code, words
        assert words in capsys.readouterr().err
    assert not cache.exists() or list(cache.iterdir()) == []


def test_without_an_engine_the_install_command_is_said(native, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *a, **k: None)
    for engine, words in ((None, r"pip install 'duallora\[serve\]'"), ("vllm", "pip install vllm")):
        with pytest.raises(ConfigError, match=words):
            serve.prepare([str(native)], engine=engine)


def test_json_prints_the_command_and_starts_nothing(native, vllm, capsys):
    assert cli.run(["serve", str(native), "--json", "--", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["engine"] == "vllm"
    assert told["models"] == ["adapter"]
    assert told["command"][-1] == "--json"
    with pytest.raises(FileNotFoundError):
        vllm()
