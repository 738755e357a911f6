"""Adapters and models as they lie on a disk or in a hub's cache: found, checked, loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer

from duallora.errors import ConfigError, IntegrityError, first_line, is_out_of_memory
from duallora.store import untrusted
from duallora.store.checkpoint import compare_files, file_record
from duallora.store.models import load_config, load_model, weights_fingerprint
from duallora.store.record import flush, follow_umask, write_json
from duallora.store.run_folder import RunFolder
from duallora.tasks.task import Kind
from duallora.terminal import command, quiet_libraries

WEIGHTS = "adapter_model.safetensors"
BASE_LAYER = ".base_layer."  # in the name of a tensor that is the base model's own
SIDECAR = "duallora.json"  # what the adapter was trained on and with, beside its weights


class Trained(NamedTuple):
    """What a model was trained to do, and its classes by id: none for other kinds, or where they have no names."""

    kind: Kind
    labels: tuple[str, ...] = ()


def load_adapter(
    source: str | Path,
    kind: Kind,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    strict: bool = True,
    base: str | None = None,
    quantized: bool = True,
) -> tuple[Any, Any]:
    """(model, tokenizer) from a run folder, an adapter folder, a model's folder, a hub id or ``builtin:``.

    ``dtype="auto"`` is the type the adapter, or the model itself, was trained in. ``strict=False`` accepts another base model than the one
    recorded; missing, unexpected or damaged weights are never accepted. ``base`` stands in for the base model's name
    where the adapter's own leads nowhere here. ``quantized=False`` loads an adapter trained on a base that was quantized
    as it was loaded (``model.quantization``) on the unquantized base, whose weights are then not those recorded.

    Raises:
        ConfigError: nothing of the kind is there, or it was trained for another kind of task.
        IntegrityError: a file is missing, damaged, not safetensors, or belongs to another base model.
    """
    with quiet_libraries():
        folder = find(source)
        if folder is None:
            model, tokenizer = load_model(str(source), kind, dtype=dtype)
        elif not is_adapter(folder):
            sidecar = read_sidecar(folder)
            trained = sidecar.get("kind", kind)
            if trained != kind and "generate" in (kind, trained):
                raise ConfigError(f"{folder} was trained to {trained}, this task needs a model to {kind}")
            compare_with_recorded(folder, sidecar)
            labels = len(sidecar.get("labels", ())) or None
            if dtype == "auto":
                dtype = sidecar.get("base", {}).get("dtype", dtype)
            model, tokenizer = load_model(str(folder), kind, dtype=dtype, num_labels=labels)
        else:
            model, tokenizer = _load_adapter(folder, kind, dtype, strict, base, quantized)
    return model.to(default_device()).eval(), tokenizer


def find(source: str | Path) -> Path | None:
    """The folder that holds the adapter or merged model; None where ``source`` is a built-in or full hub model."""
    if str(source).startswith("builtin:"):
        return None
    path = Path(source)
    if path.is_dir():
        for folder in (path, *RunFolder(path).results()):
            if any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
                return folder
        run = RunFolder(path)
        if facts := run.facts():
            raise ConfigError(
                f"{path} is a run folder without a finished adapter or model (status: {facts['status']}); "
                f"finish it with: {command('train', '-c', run.recipe_file, '--resume', 'auto')}"
            )
        raise ConfigError(f"{path} holds neither adapter_config.json nor config.json: expected a run, adapter or model")
    if path.exists() or path.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1:
        raise ConfigError(
            f"{source}: no such folder; expected a run, an adapter, a merged model or a hub id (org/name)"
        )
    return _from_hub(str(source))


def find_adapter(source: str | Path, otherwise: str) -> Path:
    """The folder that holds the adapter; ConfigError, which ends in ``otherwise``, for a model."""
    folder = find(source)
    if folder is None or not is_adapter(folder):
        raise ConfigError(f"{source} is a model, not an adapter: {otherwise}")
    return folder


def read_sidecar(folder: Path) -> dict[str, Any]:
    """``duallora.json`` of an adapter or merged model; empty where a tool other than this one wrote the folder."""
    path = folder / SIDECAR
    if not path.is_file():
        return {}
    remedy = "restore it, or delete it to load without its checks"
    try:
        told = untrusted.json_object(path)
    except ConfigError as error:
        raise IntegrityError(f"{error}; {remedy}") from None
    kinds = {"files": dict, "base": dict, "labels": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(told.get(name, kind()), kind)]
    if wrong or not all(isinstance(record, dict) for record in told.get("files", {}).values()):
        name = wrong[0] if wrong else "files"
        raise IntegrityError(f"{path} is damaged: {name}={str(told[name])[:40]}; {remedy}")
    return told


def base_name(folder: Path) -> str:
    """The base model that an adapter names, or that was noted beside it; ConfigError where neither is."""
    noted = read_sidecar(folder).get("base", {}).get("name")
    if name := untrusted.read(folder).get("base_model_name_or_path") or noted:
        return str(name)
    raise ConfigError(f"{folder / 'adapter_config.json'} names no base model: set base_model_name_or_path")


def seal(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the sidecar of a result: ``facts``, and `file_record` of every file by name, which it returns."""
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card is an empty form
    follow_umask(folder)
    files = {path.name: file_record(path) for path in sorted(folder.iterdir())}
    write_json(folder / SIDECAR, {**facts, "files": files})
    for name in files:
        flush(folder / name)
    return files


def damage(folder: Path) -> str | None:
    """What of the result of a run is not as it was saved, or None."""
    files = read_sidecar(folder).get("files")
    return _differs(folder, files) if files else f"{SIDECAR} is gone, or lists no files"


def trained_for(source: str | Path) -> Trained | None:
    """What a run, a checkpoint of it, an adapter or a classifier was trained for; None where its files do not say.

    Raises as `find` and `load_config` do.
    """
    folder = find(source)
    told = read_sidecar(folder) if folder else {}
    if folder is not None and "kind" not in told:  # a checkpoint: what its run has recorded
        run = RunFolder.around(folder)
        told = (run.facts() or {}).get("data", {}) if run else {}
    if told.get("kind") in get_args(Kind):
        return Trained(told["kind"], tuple(told.get("labels", ())))
    if folder is not None and is_adapter(folder):
        return None
    config = load_config(str(folder or source))
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return None
    names = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    if len(names) == 1:
        return Trained("regress")
    return Trained("classify", () if are_stand_ins(names) else names)


def are_stand_ins(names: Sequence[str]) -> bool:
    """Whether these are the names that transformers gives to classes that have none."""
    return all(name == f"LABEL_{index}" for index, name in enumerate(names))


def default_device() -> torch.device:
    """The accelerator torch sees, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def head_modules(model: Any) -> list[str]:
    """Top-level modules with weights outside the pretrained trunk: a classifier, a score, DeBERTa's pooler."""
    trunk = getattr(model, "base_model_prefix", "")
    return [
        name for name, child in model.named_children() if name != trunk and next(child.parameters(), None) is not None
    ]


def _load_adapter(
    folder: Path, kind: Kind, dtype: str, strict: bool, other: str | None, quantized: bool
) -> tuple[Any, Any]:
    sidecar = read_sidecar(folder)
    shapes = check_adapter(folder)
    config = read_config(folder)
    wanted = {"generate": "CAUSAL_LM"}.get(kind, "SEQ_CLS")
    if config.task_type not in (None, wanted):
        raise ConfigError(f"{folder} was trained for {config.task_type}, this task needs {wanted} ({kind})")
    base = sidecar.get("base", {})
    name = other or base_name(folder)
    num_labels = None
    if kind != "generate":
        num_labels = len(sidecar.get("labels", ())) or _labels_of_head(shapes, kind)
    model, tokenizer = load_model(
        name,
        kind,
        dtype=base.get("dtype", dtype),
        num_labels=num_labels,
        revision=None if other else config.revision,
        quantization=base.get("quantization") if quantized else None,
    )
    if sidecar.get("labels"):
        set_labels(model, sidecar["labels"])
    expected = base.get("fingerprint")
    if strict and expected and (quantized or not base.get("quantization")):
        found = weights_fingerprint(model)
        if found != expected:
            raise IntegrityError(
                f"{folder} was trained on a base model with the weights {expected[:16]}..., but {name} has "
                f"{found[:16]}...; load it on the model it was trained on, or pass --lenient (strict=False in Python) to try it on this one"
            )
    adapted = attach(model, folder, shapes)
    if dtype != "auto":
        adapted = adapted.to(getattr(torch, dtype))
    return adapted, own_tokenizer(folder) or tokenizer


def attach(model: Any, folder: Path, shapes: Mapping[str, tuple[int, ...]], name: str = "default") -> PeftModel:
    """Puts an adapter whose ``shapes`` `check_adapter` gave onto a model, or under another name beside those it has.

    Raises:
        ConfigError: the module patterns are no regular expressions, or match for ever.
        IntegrityError: a tensor is missing, unexpected, or of a shape that does not fit the model.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = [module for module, _ in inner.named_modules()]
    untrusted.check_patterns(untrusted.read(folder), modules, folder / "adapter_config.json")
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, config=read_config(folder))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).splitlines())[:300]
        raise IntegrityError(f"{folder / WEIGHTS} does not fit {inner.config._name_or_path}: {reason}") from error
    _check_tensors(folder, shapes, model, name)
    return model


def set_labels(model: Any, labels: Sequence[str]) -> None:
    """Names the classes in the model's own config, so that a pipeline prints them."""
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}


def check_adapter(folder: Path) -> dict[str, tuple[int, ...]]:
    """`check_files`, and that the configuration asks for nothing the tensors do not hold."""
    shapes = check_files(folder, read_sidecar(folder))
    untrusted.check(untrusted.read(folder), shapes, folder / "adapter_config.json")
    return shapes


def check_files(folder: Path, sidecar: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors by name, after the recorded sizes and hashes have been compared.

    Raises IntegrityError naming the file that is missing, damaged, strange or no safetensors file.
    """
    weights = folder / WEIGHTS
    if not weights.is_file():
        pickled = folder / "adapter_model.bin"
        if pickled.is_file():
            raise IntegrityError(
                f"{pickled} is a pickle, which can run code when it is read; only {WEIGHTS} is accepted. "
                "Ask for the adapter in safetensors form, or convert it on a machine you can afford to lose"
            )
        raise IntegrityError(f"{weights} is missing: the adapter has no weights")
    compare_with_recorded(folder, sidecar)
    try:
        with safe_open(weights, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
            shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
            whole = {name: found.get_dtype() for name, found in slices.items() if found.get_dtype()[0] in "IUC"}
    except (SafetensorError, OSError, ValueError) as error:
        raise IntegrityError(f"{weights} is not a whole safetensors file ({error}); take a fresh copy of it") from None
    for name, dtype in whole.items():
        if len(shapes[name]) > 1:  # counters are whole numbers, factors never
            raise IntegrityError(f"{weights}: {name} is stored as {dtype}, expected floating-point numbers")
    return shapes


def _differs(folder: Path, files: Mapping[str, Any]) -> str | None:
    # Conversions lie in folders of their own inside the adapter's; nothing that loads the adapter looks there.
    return compare_files(folder, files, ignore=[path.parent for path in folder.glob("*/adapter_config.json")])


def compare_with_recorded(folder: Path, sidecar: Mapping[str, Any]) -> None:
    """Raises IntegrityError where a file is not the one that the sidecar has the hash of."""
    reason = _differs(folder, sidecar.get("files", {})) if sidecar.get("files") else None
    if reason:
        raise IntegrityError(
            f"{folder}: {reason}; take a fresh copy of the {'adapter' if is_adapter(folder) else 'model'}"
        )


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def read_config(folder: Path) -> PeftConfig:
    """``adapter_config.json``; IntegrityError where it is unreadable or of a kind PEFT does not know."""
    path = folder / "adapter_config.json"
    untrusted.read(folder)  # bounded first: PEFT parses whatever is there
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{path} cannot be used ({type(error).__name__}: {error})") from error


def _check_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]], model: PeftModel, adapter: str) -> None:
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    embeddings = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=True)
    missing, unexpected = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    # PEFT also stores the base's embeddings where they are adapted, and reads them back into the base.
    unexpected = [name for name in unexpected if BASE_LAYER not in name or name not in embeddings]
    if missing or unexpected:
        found = {"missing": missing, "unexpected": unexpected}
        parts = [f"{len(names)} {what} (first: {names[0]})" for what, names in found.items() if names]
        raise IntegrityError(
            f"{folder / WEIGHTS} does not hold the tensors of its configuration: {', '.join(parts)}; "
            "it belongs to another base model or configuration, or was cut"
        )
    wrong = [name for name, shape in wanted.items() if shapes[name] != shape]
    if wrong:
        raise IntegrityError(
            f"{folder / WEIGHTS}: {wrong[0]} is {list(shapes[wrong[0]])}, expected {list(wanted[wrong[0]])}"
        )


def _labels_of_head(shapes: Mapping[str, tuple[int, ...]], kind: Kind) -> int | None:
    """Classes of a head saved by a tool that wrote no sidecar: the rows of its last weight matrix."""
    heads = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2 and name.rpartition(".")[0].split(".")[-1] in ("classifier", "score", "out_proj")
    ]
    return heads[-1][0] if heads else (1 if kind == "regress" else None)


def own_tokenizer(folder: Path) -> Any:
    """The tokenizer saved with the adapter, if any: it may hold tokens or a template the base's lacks."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    untrusted.admit(folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing narrower
        if is_out_of_memory(error):
            raise
        raise IntegrityError(f"the tokenizer in {folder} cannot be read: {error}") from error


def _from_hub(repository: str) -> Path | None:
    """The local copy of a hub adapter: configuration, safetensors, tokenizer, and whatever else its sidecar lists.

    None where the hub holds a full model.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(patterns: list[str]) -> None:
        # Offline the cache may lack some: loading says what must not be missing.
        with suppress(LocalEntryNotFoundError):
            snapshot_download(repository, revision=folder.name, allow_patterns=patterns)

    try:
        folder = Path(hf_hub_download(repository, "adapter_config.json")).parent
        fetch(["*.json", WEIGHTS, "*.txt", "*.model"])
        fetch(_listed_files(folder))
        return folder
    except EntryNotFoundError:  # also offline, where the cache holds no such adapter: it may hold a full model
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(f"{repository}: no such folder, and the hub cannot give it: {first_line(error)}") from None


def _listed_files(folder: Path) -> list[str]:
    """What the sidecar lists, as patterns that match these very names."""
    return [escape(name) for name in map(str, read_sidecar(folder).get("files", ())) if Path(name).name == name]


def adapter_kind(adapter: str | Path) -> Kind:
    """What the adapter was trained for, from its own files; ConfigError where it is no adapter."""
    folder = find_adapter(adapter, "there is nothing to merge")
    known = trained_for(adapter)
    if known is not None:
        return known.kind
    task_type = read_config(folder).task_type
    return "classify" if task_type == "SEQ_CLS" else "generate"
