"""The engine that is installed gets the merged model, or the LoRAs, of the very adapters that were named."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from export.conftest import assert_same_logits, assert_same_weights, base_of, settings_of, shake
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from duallora import DualLoraConfig, cli
from duallora.errors import ConfigError
from duallora.export import convert, serve, served
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
    """A program of that name on PATH, which writes down its number and arguments; ``vllm()`` reads them."""
    program, told = tmp_path / "bin" / "vllm", tmp_path / "told.json"
    program.parent.mkdir()
    code = f"import json, os, sys\njson.dump([os.getpid(), *sys.argv[1:]], open({str(told)!r}, 'w'))\n"
    program.write_text(f"#!{sys.executable}\n{code}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return lambda: json.loads(told.read_text())


@pytest.fixture(scope="module")
def other(native, tmp_path_factory):
    """Another adapter on the base of ``native``."""
    folder = tmp_path_factory.mktemp("second") / "other"
    config = DualLoraConfig(r=4, target_modules=["q_proj", "v_proj"], warmup="none", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_of(native)), config)
    shake(model, seed=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def another_base(native, tmp_path_factory):
    """The base of ``native`` but for a number in its configuration."""
    folder = Path(shutil.copytree(base_of(native), tmp_path_factory.mktemp("another") / "base"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-5}))
    return folder


def asked(url: str, path: str, **body) -> dict:
    request = urllib.request.Request(f"{url}/v1/{path}", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]


@needs_engine
def test_transformers_serves_and_chats_as_the_adapter_generates(native, tmp_path, monkeypatch, capfd):
    """Over HTTP, greedily, against PEFT's own model of the adapter, which no merge and no cache has touched."""
    call, answers = subprocess.call, []

    def client(command, **options):
        url = command[3]
        answers.append(asked(url, "completions", prompt="Who?", max_tokens=12, temperature=0)["text"])
        message = [{"role": "user", "content": "Who?"}]
        answers.append(asked(url, "chat/completions", messages=message, max_tokens=9, seed=0)["message"]["role"])
        return call(command, **options)

    monkeypatch.setattr(serve.subprocess, "call", client)
    (tmp_path / "typed").write_text("Who?\nn\n!exit\n")
    monkeypatch.setattr(sys, "stdin", None)
    with (tmp_path / "typed").open() as typed:
        before = os.dup(0)
        os.dup2(typed.fileno(), 0)
        try:
            code = serve.chat(str(native), ["max_new_tokens=3", "do_sample=False"], console=Console(quiet=True))
        finally:
            os.dup2(before, 0)
            os.close(before)
    out, err = capfd.readouterr()
    assert code == 0
    assert "tokens in" in out
    assert "Finished server process" in err  # the server ends with the chat
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(native)), str(native)).eval()
    tokenizer = AutoTokenizer.from_pretrained(native)
    row = tokenizer("Who?", return_tensors="pt")
    with torch.no_grad():
        found = model.generate(**row, max_new_tokens=12, do_sample=False)[0, row["input_ids"].shape[1] :]
    assert len(set(found.tolist())) > 3
    assert answers == [tokenizer.decode(found, skip_special_tokens=True), "assistant"]


def test_one_adapter_goes_to_vllm_merged_and_several_as_loras_by_their_names(native, other, vllm, cache):
    """By a real process, whose place the engine takes: nothing of this package waits around it."""
    line = [sys.executable, "-m", "duallora.cli", "serve", f"mine={native}", "--", "--seed", "5"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        assert process.wait(120) == 0
    number, command, model, *options = vllm()
    assert number == process.pid
    assert command == "serve"
    assert options == ["--served-model-name", "mine", "--host", "127.0.0.1", "--port", "8000", "--seed", "5"]
    assert Path(model).parent.parent == cache
    merged, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    assert_same_logits((merged, tokenizer), adapters.load_adapter(native, "generate"), tolerance=1e-6)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert set(merged.generation_config.eos_token_id) == ends  # what closes a turn of its chat ends an answer

    ready = serve.prepare([f"mine={native}", str(other)], rank=20, host="::1", port=9)
    assert ready["models"] == ["mine", "other"]
    _, command, base, *options = ready["command"]
    assert base == base_of(native)
    assert options[:6] == ["--enable-lora", "--max-lora-rank", "32", "--max-loras", "2", "--lora-modules"]
    loras = dict(item.split("=") for item in options[6:8])
    assert options[8:] == ["--host", "::1", "--port", "9"]
    assert list(loras) == ["mine", "other"]
    for folder, layers in ((loras["mine"], 14), (loras["other"], 4)):
        config = settings_of(Path(folder))
        assert (config["peft_type"], config["r"]) == ("LORA", 20)
        assert len(load_file(Path(folder) / adapters.WEIGHTS)) == 2 * layers


def test_the_cache_holds_what_was_made_of_this_content_or_makes_it_anew(native, other, tmp_path, vllm, cache):
    folder = Path(shutil.copytree(native, tmp_path / "adapter"))

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
        (model.parent / served.MADE).write_text("{")

    def exchanged():
        shutil.rmtree(model.parent)
        shutil.copytree(another.parent, model.parent)

    for harm in (damaged, cut, exchanged):
        harm()
        again, said = ready()
        assert "is damaged, or of other content" in said
        assert again == model
        assert weights.read_bytes() == right, harm
    shutil.copytree(other, folder, dirs_exist_ok=True)  # other content under the same path
    assert ready()[0] not in (model, another)
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []


def test_of_a_run_the_lora_is_calibrated_on_its_own_rows_and_else_the_weights_alone_count(run_folder, tmp_path, cache):
    console = Console(file=io.StringIO(), width=300)
    made = served.made(run_folder / "adapter", 3, console)
    assert "of |dW x|² on its training rows kept at rank 3" in console.file.getvalue()
    assert served.made(run_folder / "adapter", 3, console) == made
    alone = served.made(Path(shutil.copytree(run_folder / "adapter", tmp_path / "adapter")), 3, console)
    assert "of |dW|² kept at rank 3" in console.file.getvalue()
    for place, calibrate in ((made, True), (alone, False)):
        convert.convert(run_folder, tmp_path / str(calibrate), rank=3, calibrate=calibrate)
        assert_same_weights(place, tmp_path / str(calibrate))
    assert made != alone
    run = Path(shutil.copytree(run_folder, tmp_path / "moved"))
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("sums.jsonl", "gone.jsonl"))
    assert served.made(run / "adapter", 3, console) == alone
    assert "by the weights alone: the run's own rows cannot be read" in console.file.getvalue()


def test_a_plain_lora_is_served_as_it_is_and_a_model_from_where_it_lies(native, other, tmp_path, vllm):
    convert.convert(native, tmp_path / "lora", rank=2)
    command = serve.prepare([str(tmp_path / "lora"), str(other)])["command"]
    assert f"lora={tmp_path / 'lora'}" in command
    assert serve.prepare([base_of(native)])["command"][2] == base_of(native)


def test_what_cannot_be_served_is_said_before_anything_is_made(
    native, other, another_base, make_adapter, run_folder, tmp_path, vllm, cache, capsys
):
    moved = Path(shutil.copytree(run_folder / "adapter", tmp_path / "moved"))
    weights = moved / adapters.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (tmp_path / "runs").mkdir()
    nameless = Path(shutil.copytree(other, tmp_path / "nameless"))
    settings = {**settings_of(nameless), "base_model_name_or_path": None}
    (nameless / "adapter_config.json").write_text(json.dumps(settings))
    (nameless / adapters.SIDECAR).unlink(missing_ok=True)  # which knows it too
    foreign = Path(shutil.copytree(other, tmp_path / "foreign"))
    settings = {**settings_of(foreign), "base_model_name_or_path": str(another_base)}
    (foreign / "adapter_config.json").write_text(json.dumps(settings))
    for code, words, line in [
        (2, "no text to serve. Use duallora predict", [make_adapter("classify")]),
        (4, "damaged", [moved]),
        (2, "not adapters of one base model", [native, foreign]),
        (2, "not adapters of one base model", [native, another_base]),
        (2, "are both called 'adapter'", [native, native]),
        (2, "has no nowhere", [tmp_path / "nowhere"]),
        (2, "runs/lr=0.1: no such folder", [f"a={tmp_path / 'runs' / 'lr=0.1'}"]),
        (2, "names no base model: set base_model_name_or_path", [nameless, native]),
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
    assert (told["engine"], told["models"], told["command"][-1]) == ("vllm", ["adapter"], "--json")
    with pytest.raises(FileNotFoundError):
        vllm()


@pytest.fixture
def named(tmp_path, monkeypatch, cache):
    """What vLLM's resolver of Dual LoRA adapters answers, by stand-ins of the vLLM classes it meets: ``named(name, model)``."""
    known: dict = {}
    request, resolver = ModuleType("vllm.lora.request"), ModuleType("vllm.lora.resolver")
    request.LoRARequest = lambda name, number, path: (name, path)
    resolver.LoRAResolver = object
    resolver.LoRAResolverRegistry = SimpleNamespace(register_resolver=known.__setitem__)
    for module in (ModuleType("vllm"), ModuleType("vllm.lora"), request, resolver):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    folder = tmp_path / "named"
    folder.mkdir()
    monkeypatch.setenv("VLLM_LORA_RESOLVER_CACHE_DIR", str(folder))
    monkeypatch.setenv("DUALLORA_VLLM_RANK", "3")
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (value,) = re.findall(r'\[project.entry-points."vllm.general_plugins"\]\nduallora = "(.*)"\n', project)
    EntryPoint("duallora", value, "vllm.general_plugins").load()()
    (found,) = known.values()
    return lambda name, model: asyncio.run(found.resolve_lora(model, name))


def test_vllm_gets_the_lora_of_a_dual_lora_adapter_that_a_request_names(native, named, tmp_path, cache):
    base, mine = base_of(native), tmp_path / "named" / "team" / "mine"
    shutil.copytree(native, mine)
    name, path = named("team/mine", base)
    assert name == "team/mine"
    assert Path(path).parent.parent == cache
    convert.convert(native, tmp_path / "expected", rank=3)
    assert_same_weights(Path(path), tmp_path / "expected")
    shutil.copytree(base, tmp_path / "copy")
    assert named("team/mine", str(tmp_path / "copy"))[1] == path  # the base's content counts, not its place
    for rank in (2, 5):  # left by convert; the larger does not fit the server
        convert.convert(native, mine / f"lora-r{rank}", rank=rank)
    assert named("team/mine", base)[1] == str(mine / "lora-r2")


def test_vllm_gets_nothing_for_other_names_and_the_reason_for_an_adapter_that_is_refused(
    native, make_adapter, another_base, named, tmp_path, cache
):
    base, folder = base_of(native), tmp_path / "named"
    shutil.copytree(native, tmp_path / "outside")
    shutil.copytree(base, folder / "model")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(folder / "lora")
    for name in ("nowhere", "", ".", "../outside", str(tmp_path / "outside"), "model", "lora"):
        assert named(name, base) is None, name
    shutil.copytree(make_adapter("classify"), folder / "classifier")
    shutil.copytree(make_adapter(bias="all"), folder / "biases")
    shutil.copytree(native, folder / "cut")
    (folder / "cut" / adapters.WEIGHTS).write_bytes((native / adapters.WEIGHTS).read_bytes()[:-1])
    shutil.copytree(native, folder / "mine")
    for name, model, words in [
        ("classifier", base, "no text to serve"),
        ("biases", base, "trained biases are refused"),
        ("cut", base, "not a whole safetensors file"),
        ("mine", str(another_base), "not the one that is served"),
    ]:
        with pytest.raises(ValueError, match=words):
            named(name, model)
    left = [path for path in cache.glob("*") if path.is_dir()] if cache.exists() else []
    assert all((path / served.MADE).is_file() for path in left)


def test_the_resolver_is_there_only_where_a_folder_is_set_and_its_rank_is_a_number(named, monkeypatch):
    from duallora.export import vllm as plugin

    for rank in ("0", "-1", "many", "1.5"):
        monkeypatch.setenv("DUALLORA_VLLM_RANK", rank)
        with pytest.raises(ValueError, match="a whole number from 1"):
            plugin.register()
    monkeypatch.delenv("VLLM_LORA_RESOLVER_CACHE_DIR")
    monkeypatch.setitem(sys.modules, "vllm.lora.resolver", None)
    plugin.register()
