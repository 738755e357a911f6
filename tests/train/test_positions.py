"""How long a row may be, told before anything is trained: the length that `positions` names is where the model itself ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from duallora.config.load import load_recipe
from duallora.errors import ConfigError
from duallora.export import merge
from duallora.store import adapters, positions
from duallora.tasks import load_data
from duallora.train import evaluate, prepare, run

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 300,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257,
}  # fmt: skip
LOW_PADDING = ("xglm", "mpnet", "roberta", "xlm-roberta", "esm", "ibert")  # some count from behind the padding's id


def config(kind: str, length: int, **more):
    names = {"max_position_embeddings": length}
    if kind in ("gpt2", "ctrl", "openai-gpt", "gptj"):
        names = {"n_positions": length}
    if kind in ("bloom", "xlnet"):  # theirs have no such number, XLNet's refuses one
        names = {}
    if kind == "gpt_neo":
        more["attention_types"] = [[["global"], 1]]
    if kind == "opt":
        more |= {"word_embed_proj_dim": 16, "ffn_dim": 16}
    if kind == "bart":
        more |= {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    if kind == "gptj":
        more["rotary_dim"] = 4
    if kind == "mpt":
        names, more = {"max_seq_len": length}, {**more, "d_model": 16, "n_heads": 2, "n_layers": 1}
    if kind == "mistral":
        more["num_key_value_heads"] = 1
    if kind == "xlnet":
        more |= {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
    if kind in LOW_PADDING:
        more["pad_token_id"] = 1
    return AutoConfig.for_model(kind, **{**SIZES, **names, **more})


CAUSAL = {  # model type -> what it has room for beyond the config's number, or None: no end
    "gpt2": 0, "opt": 0, "gpt_neo": 0, "bart": 0, "gptj": 0, "ctrl": 0, "openai-gpt": 0, "mpt": 0, "biogpt": 0,
    "llama": None, "gpt_neox": None, "xglm": None, "mistral": None,
}  # fmt: skip
CLASSIFIERS = {
    "bert": 0, "distilbert": 0, "electra": 0, "mpnet": -2, "roberta": -2, "xlm-roberta": -2, "esm": -2, "nystromformer": 0,
    "ibert": -2, "deberta": 0, "deberta-v2": 0, "modernbert": None, "bloom": None, "xlnet": None,
}  # fmt: skip


def build(kind: str, length: int = 24):
    torch.manual_seed(0)
    if kind in CAUSAL:
        return AutoModelForCausalLM.from_config(config(kind, length)).eval()
    own = {}
    if kind == "esm":
        own = {"mask_token_id": 2, "position_embedding_type": "absolute"}
    if kind == "modernbert":
        own = {"cls_token_id": 1, "sep_token_id": 2}
    return AutoModelForSequenceClassification.from_config(config(kind, length, **own)).eval()


def runs(model, length: int) -> bool:
    ids = torch.randint(4, 200, (1, length))
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", [*CAUSAL, *CLASSIFIERS])
def test_the_length_is_where_the_model_itself_ends(kind):
    model, more = build(kind), {**CAUSAL, **CLASSIFIERS}[kind]
    found = positions.positions(model)
    assert found.fixed is (more is not None)
    if more is None:
        assert found.length in (24, positions.UNLIMITED)
        assert runs(model, 40)
    else:
        assert found.length == 24 + more
        assert runs(model, found.length)
        assert not runs(model, found.length + 1)


def test_models_without_positions_are_as_long_as_their_tokenizer_says(make_tokenizer):
    tokenizer = make_tokenizer()
    assert positions.positions(build("bloom"), tokenizer) == (positions.UNLIMITED, False)
    tokenizer.model_max_length = 77
    assert positions.positions(build("bloom"), tokenizer) == (77, False)
    assert positions.positions(build("llama"), tokenizer) == (24, False)  # the config's word comes first


def test_the_table_of_a_picture_is_not_the_texts():
    model = build("llama")
    model.vision_tower = torch.nn.Module()
    model.vision_tower.position_embedding = torch.nn.Embedding(25, 16)
    assert positions.positions(model) == (24, False)


@pytest.mark.parametrize("adapter", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_take_their_places(adapter):
    model = get_peft_model(build("gpt2"), adapter(task_type="CAUSAL_LM", num_virtual_tokens=5))
    assert positions.positions(model) == (19, True)
    assert runs(model, 19)
    assert not runs(model, 20)


@pytest.mark.parametrize(
    ("row", "prompt", "new", "words"),
    [
        (24, 20, 4, None),
        (25, 0, 0, "longest row has 25 tokens.*24 positions: set data.max_length .* at most 24"),
        (25, 20, 4, "longest row has 25 tokens"),
        (24, 20, 5, "prompt has 20 tokens and eval.max_new_tokens .* is 5.*at most 4, or data.max_length .* 19"),
        (0, 24, 5, "both together may be at most 24"),
    ],
)
def test_both_numbers_and_the_remedy_are_named(row, prompt, new, words):
    if words is None:
        assert positions.check_room(build("gpt2"), None, row=row, prompt=prompt, new=new) == ""
        return
    with pytest.raises(ConfigError, match=words):
        positions.check_room(build("gpt2"), None, row=row, prompt=prompt, new=new)
    said = positions.check_room(build("llama"), None, row=row, prompt=prompt, new=new)
    assert "was made for 24" in said
    assert "not trained on" in said


@pytest.fixture
def folder(tmp_path, make_tokenizer):
    """``folder(kind, length)``: a saved random model with as many positions, its tokenizer one of bytes."""

    def make(kind: str, length: int) -> Path:
        place = tmp_path / f"{kind}-{length}"
        tokenizer = make_tokenizer(chat_template=None)
        if not place.exists():
            build(kind, length).save_pretrained(place)
            tokenizer.save_pretrained(place)
        return place

    return make


@pytest.fixture
def texts(tmp_path):
    """26 rows with prompts of 20 to 45 bytes; an answer has one byte and the end of text."""
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"prompt": "x" * (20 + n), "completion": "y"}) for n in range(26)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def labeled(tmp_path):
    path = tmp_path / "labeled.jsonl"
    path.write_text("\n".join(json.dumps({"text": "x" * (20 + n), "label": "ab"[n % 2]}) for n in range(26)))
    return path


@pytest.fixture
def recipe_for(make_recipe, folder):
    """``recipe_for(kind, length, *settings)``: a run of one step on a model with so many positions."""

    def make(kind: str, length: int, *settings: str, data: Path):
        recipe = make_recipe(
            "train.max_steps=1", *settings, kind="classify" if kind in CLASSIFIERS else "generate", data=data
        )
        named = recipe.model.model_copy(update={"name": str(folder(kind, length))})
        return recipe.model_copy(update={"model": named})

    return make


@pytest.mark.parametrize(
    ("kind", "rows", "longest", "room"), [("gpt2", "texts", 47, 40), ("roberta", "labeled", 45, 38)]
)
def test_rows_beyond_the_table_are_refused_before_training_and_cut_where_asked(
    kind, rows, longest, room, recipe_for, console, tmp_path, request
):
    """RoBERTa's 40 positions hold 38 tokens."""
    data = request.getfixturevalue(rows)
    told = rf"longest row has {longest} tokens, but .* has {room} positions: set data\.max_length"
    with pytest.raises(ConfigError, match=told):
        run.train(recipe_for(kind, 40, data=data), console=console)
    assert not (tmp_path / "run").exists()
    run.train(recipe_for(kind, 40, f"data.max_length={room}", data=data), console=console)
    assert f"rows cut to {room} tokens" in console.file.getvalue()


def test_answers_beyond_the_table_are_refused_before_training(texts, recipe_for, console, tmp_path):
    """Rows fit, and so does each prompt: only what is to be generated at the end does not."""
    recipe = recipe_for("gpt2", 48, "eval.max_new_tokens=20", "eval.metrics=true", data=texts)
    with pytest.raises(ConfigError, match=r"eval\.max_new_tokens .* is 20, but .* has 48 positions"):
        run.train(recipe, console=console)
    assert not (tmp_path / "run").exists()
    model, tokenizer = adapters.load_adapter(recipe.model.name, "generate")
    quiet = recipe_for("gpt2", 48, "eval.max_new_tokens=20", data=texts)  # where nothing is generated
    task = load_data(str(texts))
    assert prepare.check_lengths(quiet, model, tokenizer, task, [{"input_ids": [1] * 47}]) == []


def test_virtual_tokens_are_counted_before_training(folder, texts, console, tmp_path):
    settings = ("adapter.method=prompt", "train.max_steps=1", "eval.metrics=false")
    recipe = load_recipe(None, settings, model=str(folder("gpt2", 60)), data=str(texts), output=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"longest row has 47 tokens, but .* has 40 positions"):
        run.train(recipe, console=console)
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_model_that_goes_on_is_trained_and_the_length_is_said(texts, recipe_for, console):
    run.train(recipe_for("llama", 40, data=texts), console=console)
    assert "longest row has 47 tokens" in console.file.getvalue()
    assert "was made for 40" in console.file.getvalue()


def test_scoring_refuses_before_it_begins_counts_what_it_cuts_and_probes_fit(folder, texts):
    task = load_data(str(texts))
    model, tokenizer = adapters.load_adapter(folder("gpt2", 40), "generate")
    with pytest.raises(ConfigError, match="has 40 positions"):
        evaluate.evaluate(model, tokenizer, task, split="train", generation={"max_new_tokens": 1})
    with pytest.raises(ConfigError, match=r"eval\.max_new_tokens .* is 128"):
        evaluate.evaluate(model, tokenizer, task, split="train", max_length=40)
    result = evaluate.evaluate(model, tokenizer, task, split="train", max_length=32, generation={"max_new_tokens": 8})
    cut = sum(len(example.prompt) + 2 > 32 for example in task.splits["train"])
    assert result.truncated == cut > 0
    assert result.note == f"{cut} of {len(result.examples)} rows cut to 32 tokens"
    small, tokenizer = adapters.load_adapter(folder("gpt2", 16), "generate")
    assert {logits.shape[0] for logits in merge.probe(small, tokenizer)} == {16}


@pytest.mark.parametrize("what", ["log_likelihoods", "classify", "generate"])
def test_each_way_into_the_model_refuses(what, folder, texts):
    kind = "classify" if what == "classify" else "generate"
    model, tokenizer = adapters.load_adapter(folder("bert" if what == "classify" else "gpt2", 16), kind)
    rows: list = [{"input_ids": [5] * 17, "labels": [5] * 17 if kind == "generate" else 0}]
    if what == "generate":
        rows = list(load_data(str(texts)).splits["train"][:1])
    with pytest.raises(ConfigError, match="has 16 positions"):
        getattr(evaluate, what)(model, tokenizer, rows)
