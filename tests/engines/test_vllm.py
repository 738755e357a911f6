"""The real vLLM takes what `serve` hands it, loads what `check` accepts, and finds an adapter that a request names."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
from engines.cases import CASES, lora
from engines.conftest import MARK, TOKENS, adapted, greedy, prompt_ids, serving

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed in this environment: make engines"),
    pytest.mark.timeout(3600),
]
# Compiling would take longer than all else.
PLAIN = ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "12", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Whose adapters a request may name."""
    return tmp_path_factory.mktemp("named")


@pytest.fixture(scope="module")
def server(runs, folder, environment, tmp_path_factory):
    """Both adapters over the base, in float32."""
    plugin = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_LORA_RESOLVER_CACHE_DIR": str(folder)}
    words = [*(f"{name}={run}" for name, run in runs.items()), "--engine", "vllm", "--rank", "16"]
    log = tmp_path_factory.mktemp("vllm") / "log"
    with serving(words, PLAIN, log, {**environment, **plugin}) as started:
        yield started


def completion(server, model: str, ids: list[int]) -> tuple[list[int], list[float]]:
    """vLLM's greedy tokens and their log-probabilities."""
    options = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
    status, answer = server.ask("completions", model=model, prompt=ids, **options)
    assert status == 200, answer
    (choice,) = answer["choices"]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def compare(told: dict[str, list], models: dict, ids: list[list[int]], record_property) -> None:
    """Each answer of ``told[name]``, by prompt, has in float32 the tokens and log-probabilities of ``models[name]``."""
    wanted = {name: [greedy(model, row) for row in ids] for name, model in models.items()}
    pairs = [pair for name in models for pair in zip(told[name], wanted[name], strict=True)]
    equal = sum(a[0] == b[0] for a, b in pairs)
    far = max(abs(x - y) for a, b in pairs for x, y in zip(a[1], b[1], strict=True))
    record_property("answers", len(pairs))
    record_property("equal_answers", equal)
    record_property("max_logprob_difference", far)
    assert equal == len(pairs), pairs
    assert far < 1e-3


def test_two_adapters_in_one_batch_and_the_base_answer_as_transformers(server, base, loras, record_property):
    """All eight requests at once: each token, in float32, is that of PEFT's model of the conversion.

    The base is asked apart: beside an adapter's request, vLLM 0.32 on a CPU answers for it by the adapter in its last
    slot (its ops/torch_ops index the stacked factors by -1, which is how it marks rows without a LoRA).
    """
    ids, served = prompt_ids(base), str(base)
    asked = [(name, row) for name in loras for row in ids]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: completion(server, *one), asked))
    told = {name: answers[at * len(ids) :][: len(ids)] for at, name in enumerate(loras)}
    told[served] = [completion(server, served, row) for row in ids]
    models = {name: adapted(base, lora) for name, lora in loras.items()} | {served: adapted(base)}
    compare(told, models, ids, record_property)
    for one, other in (("all", "qv"), ("all", served), ("qv", served)):
        assert [tokens for tokens, _ in told[one]] != [tokens for tokens, _ in told[other]], (one, other)


def test_what_check_accepts_loads_and_what_it_refuses_does_not(server, tmp_path, record_property):
    """Against the running server, which has the last word."""
    from duallora.export import check
    from duallora.store import adapters, untrusted

    verdicts, loaded, said = {}, {}, {}
    for name, (tensors, config) in CASES.items():
        place = lora(tmp_path / name.replace(" ", "-"), tensors, **config)
        verdicts[name] = check.vllm(untrusted.read(place), adapters.check_files(place, {})).accepted
        status, said[name] = server.ask("load_lora_adapter", lora_name=name, lora_path=str(place))
        loaded[name] = status == 200
    record_property("accepted", [name for name, is_fine in verdicts.items() if is_fine])
    record_property("refused", [name for name, is_fine in verdicts.items() if not is_fine])
    assert verdicts == loaded, {name: said[name] for name in CASES if verdicts[name] != loaded[name]}


def test_an_adapter_that_a_request_names_is_converted_and_loaded(server, runs, loras, folder, base, record_property):
    """It was put there after the server's start, and no request has named it."""
    shutil.copytree(runs["qv"], folder / "later")
    ids = prompt_ids(base)
    told = {"later": [completion(server, "later", row) for row in ids]}
    compare(told, {"later": adapted(base, loras["qv"])}, ids, record_property)
    _, listed = server.ask("models")
    roots = {model["id"]: model["root"] for model in listed["data"]}
    assert roots["later"] == roots["qv"]  # of the same content: one conversion, of `serve`'s cache, for both


def test_a_conversion_that_was_left_with_it_is_taken(server, runs, folder):
    from duallora.export import convert

    adapter = shutil.copytree(runs["all"] / "adapter", folder / "left")
    convert.convert(adapter, adapter / "lora-r4", rank=4)
    ids = [504, 284, 260]
    assert len(completion(server, "left", ids)[0]) == TOKENS
    _, listed = server.ask("models")
    assert {model["id"]: model["root"] for model in listed["data"]}["left"] == str(adapter / "lora-r4")


def test_what_check_refuses_is_refused_with_its_words_and_nothing_else_is_found(server, runs, folder):
    damaged = shutil.copytree(runs["qv"] / "adapter", folder / "damaged")
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    status, told = server.ask("completions", model="damaged", prompt="a", max_tokens=1)
    assert status == 400
    assert "take a fresh copy of the adapter" in told["error"]["message"]
    outside = shutil.copytree(runs["qv"] / "adapter", folder.parent / "outside")
    for name in ("nowhere", "../outside", str(outside)):
        assert server.ask("completions", model=name, prompt="a", max_tokens=1)[0] == 404, name


def test_a_merged_run_with_a_token_that_was_new_answers_as_its_adapter(marked, environment, tmp_path, record_property):
    """Against PEFT's model of the adapter, which no merge has touched; the merged weights are float32's own bits."""
    from duallora.store import adapters

    ids = prompt_ids(marked / "adapter", MARK)
    new = adapters.own_tokenizer(marked / "adapter").convert_tokens_to_ids(MARK)
    assert all(row.count(new) == 1 for row in ids)
    words = [f"mine={marked}", "--engine", "vllm"]
    with serving(words, PLAIN, tmp_path / "log", environment) as server:
        told = {"mine": [completion(server, "mine", row) for row in ids]}
    model, _ = adapters.load_adapter(marked, "generate")
    compare(told, {"mine": model}, ids, record_property)
    with model.disable_adapter():
        assert greedy(model, ids[0])[0] != told["mine"][0][0]
