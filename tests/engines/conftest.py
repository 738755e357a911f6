"""Two adapters on SmolLM2, trained for a few steps by the command line, and what transformers itself makes of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MODEL = "builtin:smollm2-135m"
PROMPTS = ("7 plus 8 is", "The capital of France is", "def add(a, b):\n", "Once upon a time there was a")
MARK = "<|sum|>"
TOKENS = 16  # that each answer has, whatever ends it
LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
RUNS = {  # as `--set` takes them: all of a layer, where engines stack q, k, v and gate, up, or q and v alone
    "all": ("r=8", f"target_modules=[{LINEAR}]", "layers_to_transform=[1,14,27]"),
    "qv": ("r1=3", "r2=5", "alpha=10", "target_modules=[q_proj,v_proj]", "layers_to_transform=[3,4,20,28]"),
}


@pytest.fixture(scope="session", autouse=True)
def asked_for():
    if not os.environ.get("DUALLORA_SLOW"):
        pytest.skip("the engines have an environment of their own: make engines")


@pytest.fixture(scope="session")
def environment(asked_for, pretrained_packages, tmp_path_factory) -> dict[str, str]:
    """That of every process: a cache of its own, but for the base model, and no network."""
    from duallora.store import models

    base = Path(models.resolve(MODEL))
    cache = tmp_path_factory.mktemp("cache")
    (cache / base.name).symlink_to(base)
    os.environ["DUALLORA_CACHE"] = str(cache)
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return {**os.environ, **quiet}


@pytest.fixture(scope="session")
def base(environment) -> Path:
    from duallora.store import models

    return Path(models.resolve(MODEL))


@pytest.fixture(scope="session")
def runs(environment, tmp_path_factory) -> dict[str, Path]:
    """Run folders by name."""
    place = tmp_path_factory.mktemp("runs")
    pairs = [(a, b) for a in range(2, 12) for b in range(3, 9)]
    rows = [{"prompt": f"{a} plus {b} is", "completion": f" {a + b}, as you know."} for a, b in pairs]
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, own in RUNS.items():
        _train(MODEL, place / "sums.jsonl", place / name, own, environment)
    return {name: place / name for name in RUNS}


def _train(model: str, data: Path, output: Path, own: tuple[str, ...], environment: dict[str, str]) -> None:
    common = ["max_steps=6", "train.batch_size=4", "learning_rate=1e-2", "max_length=48", "adapter.warmup_steps=2"]
    settings = [word for item in (*common, "data.eval_fraction=0.04", *own) for word in ("--set", item)]
    line = ["train", "--model", model, "--data", str(data), "-o", str(output), *settings]
    subprocess.run([sys.executable, "-m", "duallora.cli", *line], check=True, env=environment)


@pytest.fixture(scope="session")
def marked(runs, environment, base, tmp_path_factory) -> Path:
    """A run that trained the embedding of a special token which its base was given before, beside the adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = tmp_path_factory.mktemp("marked")
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": [MARK]})
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(str(place / "base"))
    rows = [json.loads(line) for line in (runs["all"].parent / "sums.jsonl").read_text().splitlines()]
    data = place / "marked.jsonl"
    data.write_text("".join(json.dumps({**row, "prompt": MARK + row["prompt"]}) + "\n" for row in rows))
    own = (*RUNS["all"], f"trainable_token_indices=[{len(tokenizer) - 1}]")
    _train(str(place / "base"), data, place / "mine", own, environment)
    return place / "mine"


@pytest.fixture(scope="session")
def loras(runs, tmp_path_factory) -> dict[str, Path]:
    """Their conversions at rank 16 as `serve` makes them, apart from any cache."""
    from duallora.export import convert

    place = tmp_path_factory.mktemp("loras")
    return {
        name: Path(convert.convert(run, place / name, rank=16, calibrate=True)["output"]) for name, run in runs.items()
    }


def prompt_ids(base: Path, before: str = "") -> list[list[int]]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)([before + prompt for prompt in PROMPTS])["input_ids"]


def until_end(tokens: list[int]) -> list[int]:
    """Those before <|endoftext|> or <|im_end|>, where an engine stops that was not told to go on."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in (0, 2)), None)]


def greedy(model, ids: list[int]) -> tuple[list[int], list[float]]:
    """transformers' own greedy tokens and the log-probability of each."""
    import torch

    model.generation_config.eos_token_id = None
    row = torch.tensor([ids], device=model.device)
    told = {"max_new_tokens": TOKENS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(row, attention_mask=torch.ones_like(row), pad_token_id=0, **told)
    tokens = found.sequences[0, len(ids) :].tolist()
    logprobs = torch.cat(found.logits).float().log_softmax(-1)[range(len(tokens)), tokens]
    return tokens, logprobs.tolist()


def adapted(base: Path, adapter: Path | None = None, dtype: str = "float32"):
    """The base in transformers, with an adapter through PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    return PeftModel.from_pretrained(model, str(adapter)).eval() if adapter else model


class Server:
    """An engine that `duallora serve` has started."""

    def __init__(self, port: int, log: Path) -> None:
        self.port, self.log = port, log

    def ask(self, path: str, **body) -> tuple[int, dict]:
        """(HTTP status, answer); a GET where there is no body."""
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/{path}", data)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, {"text": text}


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def serving(words: list[str], arguments: list[str], log: Path, environment: dict[str, str]) -> Iterator[Server]:
    """`duallora serve` with ``words``, the engine's own ``arguments`` after ``--``; ended, and its end awaited, afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "duallora.cli", "serve", *words, "--port", str(port), "--", *arguments]
    with log.open("w") as file:
        engine = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 1500
        while not _answers(port):
            assert engine.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(1)
        yield Server(port, log)
    finally:
        engine.send_signal(signal.SIGINT if "vllm" in words else signal.SIGTERM)
        engine.wait(120)
