"""An adapter folded into its base model: a folder any transformers program loads, checked after it is written."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import psutil
import torch
from peft import PeftModel
from rich.console import Console
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from duallora.errors import (
    ConfigError,
    DiskError,
    DualLoraError,
    IntegrityError,
    NonFiniteError,
    is_disk_failure,
)
from duallora.store import adapters, record
from duallora.store.positions import positions
from duallora.tasks.task import Kind
from duallora.terminal import quiet_libraries, say, shown, size
from duallora.train import evaluate
from duallora.tuner.quantized import dequantize, storage

# Texts of several lengths and kinds; what they say does not matter, only that both models read the same tokens.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    'def parse(text: str, *, strict: bool = True) -> dict:\n    """',
    "Question: which planet is closest to the sun?\nAnswer:",
    "name : The Vaults | Type : pub | price : more than £30 | near : Café Adriatic ||",
    "1, 1, 2, 3, 5, 8, 13,",
)
Into = Literal["auto", "original", "dequantized"]
# Above this share of the logits' own size, the two are different models and not one model rounded twice.
TOLERANCE = 0.05


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    into: Into = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Writes ``adapter`` and its base as one model into ``output`` and returns ``{"output", "max_logit_difference", ...}``.

    The folder is built beside its place, reloaded from the disk by plain transformers, compared with the unmerged
    adapter on probe prompts, and only then renamed. In the adapter's own dtype the largest difference is 0.0 exactly
    where the adapter's forward is the merged one; ``dtype`` rounds the merged weights and the difference with them.

    Nothing is merged into quantized weights, whose grid would round dW away. Of an adapter trained on a quantized base
    ``into`` chooses the weights: "original" loads the base unquantized, "dequantized" takes the values it was trained on;
    "auto" is the original where the base was quantized as it was loaded. How far the logits are from those of the adapter
    on its quantized base is reported and returned as ``quantized_logit_difference``.

    Raises:
        ConfigError: ``output`` is taken, ``adapter`` is no adapter, or there are no such weights to merge into.
        IntegrityError: the adapter is damaged or belongs to another base, or the reloaded model differs from it.
        NonFiniteError: a merged weight is NaN or infinite.
    """
    console = console or Console()
    output = Path(output)
    kind = adapters.adapter_kind(adapter)
    with quiet_libraries(), beside(output) as folder:
        model, tokenizer, kept, as_trained = _on_plain_weights(adapter, kind, into)
        _align(model)
        name = model.peft_config["default"].base_model_name_or_path
        say(console, "adapter", f"{shown(Path(adapter))} on {name}" + (f" ({kept} weights)" if kept else ""))
        if not hasattr(model.base_model, "merge_and_unload"):
            raise ConfigError(f"{adapter} holds virtual tokens, inputs and no weights: there is nothing to merge")
        before = probe(model, tokenizer)
        merged = _folded_in(model, adapter, dtype)
        if kind == "generate":  # engines read what ends an answer there: in a chat, what closes a turn
            ends = evaluate.end_tokens(merged, tokenizer, chat=bool(tokenizer.chat_template))
            merged.generation_config.eos_token_id = ends or None
        merged.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        # Otherwise the checks of the next step would see the weights in memory, not those on the disk.
        device, saved_dtype = merged.device, merged.dtype
        del model, merged
        distance, relative = _compare(folder, kind, saved_dtype, device, tokenizer, before)
        source = adapters.find(adapter)
        sidecar = adapters.read_sidecar(source) if source else {}
        facts: dict[str, Any] = {
            "kind": kind,
            "dtype": str(saved_dtype).removeprefix("torch."),
            "max_logit_difference": distance,
        }
        if kept:
            far, share = difference(before, as_trained)
            facts |= {"weights": kept, "quantized_logit_difference": far}
        merged_from = {key: sidecar[key] for key in ("method", "task", "kind", "steps", "base") if key in sidecar}
        labels = sidecar.get("labels", [])
        record.write_json(
            folder / adapters.SIDECAR,
            {"merged_from": merged_from, "labels": labels, **facts, **record.environment()},
        )
        record.follow_umask(folder)
        total = sum(path.stat().st_size for path in folder.iterdir())
    if kept:
        say(
            console,
            "base",
            f"the adapter was trained on quantized weights, this model has the {kept} ones: logits differ by up to "
            f"[bold]{far:.3g}[/] ({share:.1%} of their size)",
        )
    equal = "[green]identical[/]" if distance == 0 else f"{relative:.1e} of the logits' size"
    say(
        console,
        "check",
        f"reloaded from disk: largest logit difference to the adapter [bold]{distance:g}[/] ({equal})",
    )
    say(console, "merged", f"[bold]{shown(output)}[/] ({size(total)}, {facts['dtype']}), loads with plain transformers")
    return {"output": str(output), **facts}


def _folded_in(model: Any, adapter: str | Path, dtype: str) -> Any:
    try:
        merged = cast(PeftModel, model).merge_and_unload(safe_merge=True)
    except ConfigError as error:
        raise ConfigError(f"{adapter} cannot be merged: {error}") from error
    except ValueError as error:
        raise NonFiniteError(f"{adapter} cannot be merged: {error}") from error
    return merged if dtype == "auto" else merged.to(getattr(torch, dtype))


def _on_plain_weights(adapter: str | Path, kind: Kind, into: Into) -> tuple[Any, Any, str, list[torch.Tensor]]:
    """(model, tokenizer, which weights, the logits on the quantized base); the last two empty where nothing is quantized."""
    model, tokenizer = adapters.load_adapter(adapter, kind)
    if not any(storage(module) for module in model.modules()):
        if into != "auto":
            raise ConfigError(
                f"--into {into} chooses among weights, but the base of {adapter} is not quantized: leave it out"
            )
        return model, tokenizer, "", []
    as_trained = probe(model, tokenizer)
    source = adapters.find(adapter)
    quantized_on_loading = source and adapters.read_sidecar(source).get("base", {}).get("quantization")
    if into == "original" and not quantized_on_loading:
        raise ConfigError(
            f"the base model of {adapter} is stored quantized, so its original weights are not known: use --into dequantized"
        )
    if into == "dequantized" or not quantized_on_loading:
        return dequantize(model), tokenizer, "dequantized", as_trained
    del model  # two models would not fit where one just does
    model, tokenizer = adapters.load_adapter(adapter, kind, quantized=False)
    return model, tokenizer, "original", as_trained


def probe(model: torch.nn.Module, tokenizer) -> list[torch.Tensor]:
    """Logits of `PROBES`, each text on its own and as much of it as fits: [length, vocabulary] or [classes], on the CPU."""
    device, room = next(model.parameters()).device, positions(model).length
    with evaluate.inference(model), torch.no_grad():
        rows = [tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(device) for text in PROBES]
        return [model(**{name: row[name][:, :room] for name in row}).logits[0].cpu() for row in rows]


def _compare(
    folder: Path, kind: Kind, dtype: torch.dtype, device: torch.device, tokenizer, before: list[torch.Tensor]
) -> tuple[float, float]:
    """Largest absolute logit difference of the model on the disk, and its share of the logits' largest size."""
    factory: Any = AutoModelForCausalLM if kind == "generate" else AutoModelForSequenceClassification
    try:
        model, found = factory.from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise IntegrityError(f"the merged model cannot be read back: {error}; nothing was kept") from error
    absent = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
    if absent:
        raise IntegrityError(
            f"the merged model on the disk lacks {len(absent)} weights ({absent[0]}), which would be drawn anew; nothing "
            "was kept"
        )
    model = model.to(device)
    _align(model)
    distance, relative = difference(probe(model, tokenizer), before)
    if not math.isfinite(distance) or relative > TOLERANCE:
        raise IntegrityError(
            f"the merged model's logits differ from the adapter's by up to {distance:g} ({relative:.0%} of their size); "
            f"at most {TOLERANCE:.0%} was expected, so nothing was kept. Merge in the dtype it was trained in"
        )
    return distance, relative


def difference(logits: list[torch.Tensor], reference: list[torch.Tensor]) -> tuple[float, float]:
    """The largest absolute difference, and its share of the reference's largest size."""
    largest = max(float((a.double() - b.double()).abs().max()) for a, b in zip(logits, reference, strict=True))
    scale = max(float(b.double().abs().max()) for b in reference)
    return largest, largest / max(scale, 1e-30)


def _align(model: torch.nn.Module) -> None:
    """Moves the weights to memory of torch's own alignment.

    Weights mapped from a file lie at any address, and matrix-vector kernels round differently there: two models with
    the same weights would differ in the last bit.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A folder next to ``output`` that becomes ``output`` if all goes well and vanishes if not.

    One that a killed process left behind on its way to the same ``output`` is removed first.

    Raises:
        ConfigError: ``output`` is there already and no empty folder.
        DiskError: the disk is full, or cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not empty; choose another folder with -o, or remove it first")
    building = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        for left in _left_behind(output):
            shutil.rmtree(left)
        building.mkdir(parents=True)
        yield building
        for path in building.rglob("*"):
            if path.is_file():
                record.flush(path)
        if output.exists():
            output.rmdir()
        building.rename(output)
        record.fsync_folder(output.parent)
    except DualLoraError:
        raise
    except Exception as error:
        if not is_disk_failure(error):
            raise
        place, reason = (error.filename, error.strerror) if isinstance(error, OSError) else (None, error)
        raise DiskError(
            f"{place or output} cannot be written: {reason}; free some space or choose another disk"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _left_behind(output: Path) -> list[Path]:
    """What was being built for ``output`` by processes of this machine that live no more, or by this one."""
    ours = re.compile(rf"\.{re.escape(output.name)}\.(\d+)\.tmp")
    found = [(path, ours.fullmatch(path.name)) for path in output.parent.iterdir()] if output.parent.is_dir() else []
    return [p for p, name in found if name and (int(name[1]) == os.getpid() or not psutil.pid_exists(int(name[1])))]
