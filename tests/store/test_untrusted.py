"""A stranger's model folder is only data: bounded in size, depth and time, and never code."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import resource
import shutil
import threading
import time

import peft
import pytest
import torch
from safetensors.torch import save_file

import duallora
from duallora.console import explain
from duallora.core.patterns import can_take_for_ever
from duallora.errors import ConfigError, DualLoraError, IntegrityError
from duallora.store import adapters, models, untrusted
from duallora.tasks import encode, template
from duallora.tasks.chats import from_messages


@pytest.fixture
def folder(tiny_causal_folder, tmp_path):
    """A model of one's own to spoil."""
    return shutil.copytree(tiny_causal_folder, tmp_path / "model")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


DEEP = ("[" * 200_000, '{"a":' * 50_000, '{"a":' + "[" * 80 + "]" * 80 + "}")
NAMES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.mark.parametrize(
    ("name", "text"),
    [*((NAMES[0], text) for text in (*DEEP, "3", "", "\x00")), *((name, "[]") for name in NAMES), (NAMES[1], DEEP[0])],
    ids=range(11),
)
def test_what_is_no_object_is_refused_by_name(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises((ConfigError, IntegrityError), match=re.escape(name)):
        models.load_model(str(folder), "generate")


def test_files_are_bounded_by_what_they_hold(folder):
    for name in ("config.json", "chat_template.jinja"):
        kept = (folder / name).read_text()
        (folder / name).write_text(kept + " " * untrusted.MAX_BYTES)
        with pytest.raises(ConfigError, match=rf"{name} has 16,\d+,\d+ bytes"):
            models.load_model(str(folder), "generate")
        (folder / name).write_text(kept)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " " * 2 * untrusted.MAX_BYTES)
    models.load_model(str(folder), "generate")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_model_is_never_run_nor_asked_about(folder, name, monkeypatch, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    kinds = {"config.json": "AutoConfig", "tokenizer_config.json": "AutoTokenizer"}
    mapped = ["evil.Evil", "evil.Evil"] if name.startswith("tokenizer") else "evil.Evil"
    change(folder / name, auto_map={kinds[name]: mapped}, model_type="evil", tokenizer_class="Evil")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(DualLoraError) as caught:
        models.load_model(str(folder), "generate")
    assert "trust_remote_code" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def splits_by(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def test_a_tokenizer_that_can_take_for_ever_is_refused(folder, lay_in_cache):
    """Its own folder or the hub's."""
    lay_in_cache("org/sound", folder)
    models.load_model("org/sound", "generate")
    change(folder / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [splits_by("(a+)+$")]})
    lay_in_cache("org/evil", folder)
    for name in (str(folder), "org/evil"):
        with pytest.raises(ConfigError, match="repeats what itself repeats"):
            models.load_model(name, "generate")


IN_USE = [
    # Of tokenizers: contractions, classes of letters, nested classes, look-aheads, thousands.
    r"'s|'t|'ll| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
    r"[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'d)?|\p{N}{1,3}", r" ?[^(\s|[.,!?])]+", r"(?=(\d{3})+(?!\d))", r"\(\+\)+", " {2,}",
    # Of adapters for their modules: one alternative each, parts of a name, all but some, unsloth's.
    alternatives := "|".join(rf".*\.{name}_proj" for name in ("q", "k", "v", "o", "up", "down", "gate")), f"({alternatives})",
    r"(?:model\.)?(?:\w+\.)*layers\.\d+\.self_attn\.(q|v)_proj", r"^(?:(?!visual|mtp).)*\.(q_proj|v_proj)$",
    r"^(?!.*(vision|audio)).*\.(q_proj|k_proj)$", r".*\.layers\.\d+\.(self_attn|mlp)\.(q|k|up)_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp|ffn|dense).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp)",
]  # fmt: skip
ENDLESS = [
    "(a+)+$", "(a|a)*$", "(?:(?:a*)b?)*", "((a{2,})x?)+", r"x(\p{L}+)*y", "([ab]*c*)+", r"(\w+\.?)*x", r"(\w+\.|\w)*x", "(?=(a+)+$)",
    "(?x)(a+ # )\n)+", "(a+(?#()b)+", "(.*a|b)(.*a|b)(.*a|b)(.*a|b)(.*a|b)(.*a|b)(.*a|b)", "()" * 500_000,
]  # fmt: skip


def test_patterns_in_use_are_taken_and_those_that_hide_their_repeats_are_not():
    assert [pattern for pattern in IN_USE if can_take_for_ever(pattern)] == []
    assert [pattern[:40] for pattern in ENDLESS if not can_take_for_ever(pattern)] == []


def test_ids_beyond_the_vocabulary_are_refused(folder):
    found = json.loads((folder / "tokenizer.json").read_text())
    found["model"]["vocab"]["Q"] = 10**6
    (folder / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(IntegrityError, match="token ids up to 1,000,000, but the model has 260 embeddings"):
        models.load_model(str(folder), "generate")


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ 'a' * 99999999999 }}",
    ],
)
def test_a_template_without_end_is_stopped(tiny_tokenizer, text, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.3)
    monkeypatch.setattr(tiny_tokenizer, "chat_template", text)
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(IntegrityError, match="do not use this template"):
        encode(from_messages({"messages": chat}, "row 1"), tiny_tokenizer, max_length=64)


def test_other_threads_take_nothing_of_a_template_s_time(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.1)
    done, block = threading.Event(), bytes(1 << 24)

    def work():
        while not done.is_set():
            hashlib.sha256(block)

    other = threading.Thread(target=work)
    other.start()
    try:
        with template._bounded():
            time.sleep(1)
    finally:
        done.set()
        other.join()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), 8), (torch.OutOfMemoryError("CUDA out of memory."), 8), (OSError(errno.ENOSPC, "No space left"), 7),
        (PermissionError(errno.EACCES, "Permission denied"), 2), (RuntimeError("size mismatch"), 4),
        (RuntimeError("[enforce fail at inline_container.cc:145] . PytorchStreamReader failed reading zip archive"), 4), (KeyboardInterrupt(), 130),
    ],
)  # fmt: skip
def test_a_machine_that_is_full_is_not_blamed_on_the_model(folder, error, code, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", fail)
    with pytest.raises(BaseException) as caught:
        models.load_config(str(folder))
    assert explain(caught.value)[0] == code


def test_a_tokenizer_of_a_kind_that_is_not_known_is_refused_by_name(folder):
    change(folder / "tokenizer.json", model={"type": "Nonsense"})
    with pytest.raises(IntegrityError, match=r"the tokenizer in .* cannot be read"):
        adapters.own_tokenizer(folder)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_hostile_pattern_in_an_adapter_hangs_no_loader(field, tiny_causal_folder, tmp_path):
    """PEFT's own `PeftModel.from_pretrained` matches the pattern with every module's name."""
    model = models.load_model(str(tiny_causal_folder), "generate")[0]
    peft.get_peft_model(model, duallora.DualLoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    change(tmp_path / "adapter_config.json", **{field: r"(.*.*)*(a+)+$"})
    base = models.load_model(str(tiny_causal_folder), "generate")[0]
    with pytest.raises(ConfigError, match="repeats what itself repeats"):
        peft.PeftModel.from_pretrained(base, str(tmp_path))


def test_a_length_that_is_no_number_is_refused(folder):
    for length in ("512", {}, True):
        change(folder / "tokenizer_config.json", model_max_length=length)
        with pytest.raises(ConfigError, match="model_max_length="):
            models.load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("intermediate_size", 2**22, "generate"),
        ("vocab_size", 2**25, "classify"),
        ("num_hidden_layers", 2**31, "generate"),
        ("num_labels", 2**31, "classify"),
    ],
)
def test_a_model_that_its_weights_do_not_hold_is_refused_before_memory_is_taken(folder, name, value, kind):
    if name == "num_hidden_layers":
        change(folder / "config.json", layer_types=None)
    change(folder / "config.json", **{name: value})
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ConfigError, IntegrityError), match=f"{name}=2,?147|but its weights hold"):
        models.load_model(str(folder), kind)
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


def test_what_weights_hold_is_read_from_their_headers(tmp_path):
    plain = {"a": torch.zeros(3, 5), "b": torch.zeros((), dtype=torch.bfloat16)}
    save_file(plain, tmp_path / "model-00001-of-2.safetensors")
    save_file({"packed": torch.zeros(7, dtype=torch.uint8)}, tmp_path / "model-00002-of-2.safetensors")
    assert untrusted.held(tmp_path) == (3, 15 + 1 + 4 * 7)
