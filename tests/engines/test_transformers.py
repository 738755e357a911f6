"""transformers' own server answers as the adapter generates, a token that is new to its base included."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from engines.conftest import MARK, PROMPTS, TOKENS, greedy, prompt_ids, serving, until_end

from duallora.store import adapters

LACKING = [name for name in ("fastapi", "uvicorn", "openai", "transformers.cli") if find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(LACKING), reason=f"no {', '.join(LACKING)}: make engines"),
    pytest.mark.timeout(1800),
]


def test_a_merged_run_answers_as_its_adapter(marked, environment, tmp_path, record_property):
    """Against PEFT's model of the adapter, which no merge has touched."""
    model, tokenizer = adapters.load_adapter(marked, "generate")
    prompts = [MARK + prompt for prompt in PROMPTS]
    wanted = [until_end(greedy(model, ids)[0]) for ids in prompt_ids(marked / "adapter", MARK)]
    words = [str(marked), "--engine", "transformers"]
    with serving(words, ["--device", "cpu", "--dtype", "float32"], tmp_path / "log", environment) as server:
        asked = [server.ask("completions", prompt=prompt, max_tokens=TOKENS, temperature=0) for prompt in prompts]
    told = [answer["choices"][0]["text"] for _, answer in asked]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in wanted]
    record_property("answers", len(told))
    record_property("equal_answers", sum(a == b for a, b in zip(told, texts, strict=True)))
    assert told == texts, asked
    assert all(texts)
