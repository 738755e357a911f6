"""What the model reads and what the loss is on."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duallora.errors import ConfigError, DataError
from duallora.tasks import IGNORE, Collator, Encoded, Example, encode_prompt, encode_split, encode_texts
from duallora.tasks import encode as encode_all

ENCODE = sys.modules["duallora.tasks.encode"]  # the name is the function's, too


def encode(example, tokenizer, **options) -> Encoded:
    """The one sequence of a row that takes no more."""
    (encoded,) = encode_all(example, tokenizer, **options)
    return encoded


def trained_text(encoded, tokenizer) -> str:
    return tokenizer.decode([label for label in encoded.labels if label != IGNORE])


def test_train_on_all_leaves_out_only_what_nothing_predicts(tiny_tokenizer, tiny_bos_tokenizer):
    example = Example(prompt="ab", answer="c")
    plain = encode(example, tiny_tokenizer, max_length=9, train_on="all")
    assert trained_text(plain, tiny_tokenizer) == "bc</s>"
    with_bos = encode(example, tiny_bos_tokenizer, max_length=9, train_on="all")
    assert trained_text(with_bos, tiny_bos_tokenizer) == "abc</s>"


@pytest.mark.parametrize(
    ("max_length", "text"), [(11, "<s>promptans</s>"), (10, "<s>romptans</s>"), (5, "<s>ans</s>"), (4, "<s>ans")]
)
def test_prompt_is_cut_from_the_left_before_the_answer(tiny_bos_tokenizer, max_length, text):
    """A cut answer does not teach the model to stop."""
    encoded = encode(Example(prompt="prompt", answer="ans"), tiny_bos_tokenizer, max_length=max_length)
    assert tiny_bos_tokenizer.decode(encoded.input_ids) == text
    assert encoded.truncated == (max_length < 11)


@settings(max_examples=25, deadline=None)
@given(prompt=st.text(max_size=12), answer=st.text(max_size=12), max_length=st.integers(2, 40), bos=st.booleans())
def test_encoding_never_exceeds_max_length_and_keeps_the_answer_first(
    tiny_tokenizer, tiny_bos_tokenizer, prompt, answer, max_length, bos
):
    tokenizer = tiny_bos_tokenizer if bos else tiny_tokenizer
    encoded = encode(Example(prompt=prompt, answer=answer), tokenizer, max_length=max_length)
    assert len(encoded.input_ids) == len(encoded.labels) <= max_length
    assert all(label in (IGNORE, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    kept = min(len(answer_ids), max_length - bos)
    assert encoded.input_ids[len(encoded.input_ids) - kept :] == answer_ids[:kept]
    assert encoded.input_ids.count(tokenizer.bos_token_id) == bos
    untrainable = not bos and kept == len(encoded.input_ids)  # the very first token has nothing before it
    assert sum(label != IGNORE for label in encoded.labels) == kept - untrainable


CHAT = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
)


def test_a_chat_has_only_the_tokens_its_template_writes(tiny_bos_tokenizer):
    """The template, not the tokenizer, says whether a chat begins with <s>: two of them would be off by one."""
    encoded = encode(Example(messages=CHAT), tiny_bos_tokenizer, max_length=999)
    prompt = encode_prompt(Example(messages=CHAT), tiny_bos_tokenizer, max_length=999)
    whole = tiny_bos_tokenizer.apply_chat_template([dict(turn) for turn in CHAT], tokenize=False)
    assert tiny_bos_tokenizer.decode(encoded.input_ids) == whole
    assert trained_text(encoded, tiny_bos_tokenizer) == "Hello!<|im_end|>2<|im_end|>"
    assert encoded.input_ids[: len(prompt)] == prompt


def test_chat_without_template_or_refused_by_it_names_the_row(make_tokenizer):
    with pytest.raises(DataError, match=r"c\.jsonl:3.*need a chat template"):
        encode(Example(messages=CHAT, where="c.jsonl:3"), make_tokenizer(chat_template=None), max_length=99)
    strict = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"c\.jsonl:4.*roles: system user.*roles must alternate"):
        encode(Example(messages=CHAT, where="c.jsonl:4"), strict, max_length=99)


def build_spaced(scheme: str):
    """A tokenizer of single letters that sets a space before each text, as Llama 2's, TinyLlama's and Mistral's do."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": byte + 3 for byte in range(256)}}
    for piece in ("\u2581", *map(chr, range(33, 127)), "\u2581H", "He", "\u2581He", "\u2581f"):
        vocabulary[piece] = len(vocabulary)
    merges = [("\u2581", "H"), ("\u2581", "f"), ("\u2581H", "e"), ("H", "e")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("scheme", ["legacy", "always", "first"])
@pytest.mark.parametrize(("template", "space"), [(ZEPHYR, ""), (MISTRAL, "\u2581")], ids=["zephyr", "mistral"])
def test_a_tokenizer_that_sets_a_space_before_each_text_sets_none_before_an_answer(scheme, template, space):
    """Turns tokenized on their own would begin with a space that neither the whole chat nor the prompt's answer has."""
    tokenizer = build_spaced(scheme)
    tokenizer.chat_template = template
    turns = [*CHAT[1:3], {"role": "user", "content": "\u00e9"}, {"role": "assistant", "content": "four"}]
    encoded = encode(Example(messages=tuple(turns)), tokenizer, max_length=999)
    assert encoded.input_ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens([label for label in encoded.labels if label != IGNORE])
    assert pieces == [*[f"{space}He", "l", "l", "o", "!", "</s>"], *[f"{space}f", "o", "u", "r", "</s>"]]
    prompt = encode_prompt(Example(messages=tuple(turns), references=("four",)), tokenizer, max_length=999)
    assert encoded.input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize("scheme", ["legacy", "always", "first"])
@pytest.mark.parametrize(
    ("prompt", "answer", "first"),
    [("2+2=", " four", "\u2581f"), ("2+2=", "He", "He"), ("Q:\n", "four", "f"), ("Q: ", "four", "f"), ("", "four", "\u2581f")],
)  # fmt: skip
def test_an_answer_goes_on_where_its_prompt_ends(scheme, prompt, answer, first):
    """Also where a token would lie across the border: the prompt's tokens are those that generation is given."""
    tokenizer = build_spaced(scheme)
    example = Example(prompt=prompt, answer=answer)
    encoded = encode(example, tokenizer, max_length=99)
    asked = encode_prompt(example, tokenizer, max_length=99)
    assert encoded.input_ids[: len(asked)] == asked
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids[len(asked)]) == first
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == prompt + answer
    rows, _ = encode_split([example, Example(prompt="a", answer="b")], tokenizer, "generate", max_length=99)
    assert rows[0]["input_ids"] == encoded.input_ids


class Spy:
    """A tokenizer that remembers how many characters it was given at once."""

    def __init__(self, tokenizer):
        self.tokenizer, self.most = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *texts, **options):
        self.most = max(self.most, *(sum(map(len, text)) if isinstance(text, list) else len(text) for text in texts))
        return self.tokenizer(*texts, **options)


LONG = " ".join(f"w{number}\u00e9" for number in range(20_000))


@pytest.mark.parametrize(
    ("kind", "prompt", "answer", "train_on"),
    [
        ("bytes", LONG, "a b", "answer"),
        ("bytes", LONG, LONG, "all"),
        ("legacy", "q", LONG, "answer"),
        ("first", LONG, LONG, "answer"),
        ("first", LONG, "a b", "all"),
    ],
    ids=range(5),
)
def test_a_text_far_beyond_the_limit_is_cut_before_it_is_tokenized(
    monkeypatch, make_tokenizer, kind, prompt, answer, train_on
):
    """A row of a megabyte would take seconds and a gigabyte; what comes out is what the whole text gives."""
    spy = Spy(make_tokenizer(bos=True) if kind == "bytes" else build_spaced(kind))
    example = Example(prompt=prompt, answer=answer)
    found, asked = encode(example, spy, max_length=50, train_on=train_on), encode_prompt(example, spy, max_length=50)
    assert spy.most < 9000
    monkeypatch.setattr(ENCODE, "_PER_TOKEN", 10**9)
    assert found == encode(example, spy, max_length=50, train_on=train_on)
    assert asked == encode_prompt(example, spy, max_length=50)
    assert spy.most > 100_000


@pytest.mark.parametrize("text", [" ".join(["x" * 80] * 1000), "y" * 40_000, "y " + " " * 40_000 + "z", " x"], ids=len)
def test_a_long_text_of_few_tokens_or_one_word_is_tokenized_whole(monkeypatch, make_tokenizer, text):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["x" * 80, " " * 999]})
    rows = [Example(prompt=text, answer="b"), Example(prompt="a", answer=text)]

    def all_of_it():
        texts = encode_split([Example(texts=(text,), label=0)], tokenizer, "classify", max_length=30)
        return [encode(row, tokenizer, max_length=30) for row in rows], texts

    found = all_of_it()
    monkeypatch.setattr(ENCODE, "_PER_TOKEN", 10**9)
    assert all_of_it() == found


def test_a_classifier_s_text_is_cut_likewise(monkeypatch, make_tokenizer):
    spy, rows = Spy(make_tokenizer(bos=True)), [Example(texts=(LONG,), label=1)]
    found = encode_split(rows, spy, "classify", max_length=50)
    assert spy.most < 9000
    assert found[1].truncated == 1
    monkeypatch.setattr(ENCODE, "_PER_TOKEN", 10**9)
    assert encode_split(rows, spy, "classify", max_length=50) == found


def test_split_counts_and_equals_row_by_row(tiny_bos_tokenizer):
    pairs = [("a long prompt", "yes"), ("", ""), ("é", "ü")]
    examples = [Example(messages=CHAT[1:3]), *(Example(prompt=prompt, answer=answer) for prompt, answer in pairs)]
    rows, counts = encode_split(examples, tiny_bos_tokenizer, "generate", max_length=12)
    single = [encode(example, tiny_bos_tokenizer, max_length=12) for example in examples]
    assert [row["input_ids"] for row in rows] == [encoded.input_ids for encoded in single]
    assert [row["labels"] for row in rows] == [encoded.labels for encoded in single]
    assert counts.rows == 4
    assert counts.tokens == sum(len(encoded.input_ids) for encoded in single)
    assert counts.trained_tokens == sum(label != IGNORE for encoded in single for label in encoded.labels)
    assert counts.truncated == 2


def test_rows_without_a_trained_token_are_named(tiny_tokenizer):
    examples = [
        Example(prompt="q", answer="a", where="t.jsonl:1"),
        Example(messages=CHAT[:2], where="t.jsonl:2"),
        Example(messages=CHAT[1:2], where="t.jsonl:9"),
    ]
    with pytest.raises(DataError, match=r"2 of 3 rows .*: t\.jsonl:2, t\.jsonl:9"):
        encode_split(examples, tiny_tokenizer, "generate", max_length=99)


def test_too_short_a_limit_and_a_tokenizer_without_end_are_config_errors(tiny_bos_tokenizer, make_tokenizer):
    with pytest.raises(ConfigError, match="max_length is 1"):
        encode(Example(answer="x"), tiny_bos_tokenizer, max_length=1)
    endless = make_tokenizer()
    endless.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-text token"):
        encode(Example(answer="x"), endless, max_length=9)


def test_classification_rows_hold_a_label_and_count_truncation(tiny_bos_tokenizer):
    pair = Example(texts=("abc", "defg"), label=2, where="x.csv:2")
    row = encode_texts(pair, tiny_bos_tokenizer, max_length=99)
    assert row["labels"] == 2
    assert len(row["input_ids"]) == len(row["attention_mask"])
    rows, counts = encode_split([pair, Example(texts=("ab",), label=0)], tiny_bos_tokenizer, "classify", max_length=5)
    assert [len(row["input_ids"]) for row in rows] == [5, 3]
    assert (counts.rows, counts.tokens, counts.trained_tokens, counts.truncated) == (2, 8, 0, 1)
    with pytest.raises(DataError, match=r"1 of 1 rows have no label: x\.csv:3"):
        encode_split([Example(texts=("a",), where="x.csv:3")], tiny_bos_tokenizer, "classify", max_length=5)


def test_collator_pads_right_with_ignored_labels_and_the_real_end_of_text_stays_trained(tiny_tokenizer):
    end = tiny_tokenizer.pad_token_id
    assert end == tiny_tokenizer.eos_token_id
    batch = Collator(tiny_tokenizer)([{"input_ids": [5, 6, end], "labels": [IGNORE, 6, end]}, {"input_ids": [8], "labels": [8]}])  # fmt: skip
    assert batch["input_ids"].tolist() == [[5, 6, end], [8, end, end]]
    assert batch["labels"].tolist() == [[IGNORE, 6, end], [8, IGNORE, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_collator_left_side_and_scalar_labels(tiny_tokenizer):
    rows = [{"input_ids": [1, 2], "labels": 1}, {"input_ids": [3], "labels": 0}]
    batch = Collator(tiny_tokenizer, side="left")(rows)
    assert batch["input_ids"].tolist() == [[1, 2], [tiny_tokenizer.pad_token_id, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert batch["labels"].dtype == torch.int64
    targets = Collator(tiny_tokenizer)([{"input_ids": [1], "labels": 2.5}, {"input_ids": [1], "labels": 3}])["labels"]
    assert targets.dtype == torch.float32
    assert targets.tolist() == [2.5, 3.0]
