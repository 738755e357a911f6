"""A Dual LoRA adapter as a folder with a plain LoRA: PEFT and the serving engines load it without this package.

The factors are those of :mod:`duallora.tuner.conversion`: nearest in the outputs on calibration rows, or in the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from duallora.config import Dtype
from duallora.errors import ConfigError, IntegrityError, check_rank
from duallora.export import calibration, gguf, merge
from duallora.store import adapters, checkpoint, record
from duallora.terminal import progress_bar, quiet_libraries, say, shown, size
from duallora.train import score
from duallora.tuner.conversion import (
    SHRINKAGE,
    Converted,
    carried,
    convert_layers,
    dual_layers,
    kept,
    lora_config,
    most_useful_rank,
    rank_for,
    smallest_ranks,
    together,
    too_few,
)

Scores = Callable[[Any, Any], Mapping[str, float]]

SHOWN_LAYERS = 12  # longer tables show the worst; the sidecar holds all
KL = 1e-3  # nats per token that rank="auto" allows
MOST = 512  # that rank="auto" tries: the largest rank of vLLM
FIRST = 8  # that it tries first
STEPS = 60  # of the share that each layer loses, per_layer: 10^(-n/10) at step n, nothing at the last


def convert(
    adapter: str | Path,
    output: str | Path,
    *,
    rank: int | Literal["auto"] | None = None,
    energy: float | None = None,
    dtype: Dtype = "auto",
    strict: bool = True,
    scores: Scores | None = None,
    calibrate: bool | str = False,
    calibration_rows: int = calibration.ROWS,
    data_dir: Path | None = None,
    kl: float = KL,
    per_layer: bool = False,
    format: Literal["peft", "gguf"] = "peft",
    console: Console | None = None,
) -> dict[str, Any]:
    """Writes ``adapter`` as a plain LoRA into ``output`` and returns ``{"output", "rank", "energy", "layers", ...}``.

    ``calibrate`` keeps the outputs near on ``calibration_rows`` rows: those of the data it names, or where True the
    run's own training rows (an adapter outside of a run has none: said, and its weights are kept near). It also gives
    loss and KL of base, adapter and conversion on held-out rows, as ``held_out``. False keeps the weights near.

    ``rank`` is that of every layer, zero-padded where a layer has less and at most what the widest can have; "auto" is the
    smallest whose ``held_out`` KL from the adapter is at most ``kl`` nats per token; ``energy`` in (0, 1] picks the smallest
    with which every layer keeps that share of |dW|_F^2 (calibrated: of |dW x|^2). lora_alpha = rank, so that every
    reader's scale is 1. ``per_layer`` leaves each layer the smallest rank of its own with which it keeps ``energy``, or for
    "auto" the largest share of |dW x|_F^2 that may be lost, the same in every layer. ``format="gguf"`` adds ``adapter.gguf``, the same for llama.cpp. ``scores(model, tokenizer)`` measures adapter, conversion and base model. The folder is built
    beside its place, loaded from the disk by PEFT, compared tensor by tensor, and only then renamed.

    Raises:
        ConfigError: ``output`` is taken, not exactly one of ``rank`` and ``energy`` is given or one is out of range,
            nothing was trained, a layer is of a kind that no LoRA can hold, no rank is within ``kl``, or the calibration
            rows do not fit the adapter.
        DataError: the calibration rows cannot be read.
        IntegrityError: the adapter is damaged or of another base, or what PEFT reads back differs.
        NonFiniteError: a dW, a factor in ``dtype`` or what a layer reads is NaN or infinite.
    """
    console = console or Console()
    output = Path(output)
    _check(rank, energy, kl, per_layer and format)
    source, kind = _dual(adapter)
    factors = None if dtype == "auto" else getattr(torch, dtype)
    load = partial(adapters.load_adapter, adapter, kind, strict=strict)
    with quiet_libraries(), merge.beside(output) as folder:
        model, tokenizer = load()
        config: Any = model.peft_config["default"]
        say(console, "adapter", f"{shown(Path(adapter))} on {escape(str(config.base_model_name_or_path))}")
        if per_layer and config.target_parameters:
            raise ConfigError("--per-layer: fused experts lie in one tensor, so they have one rank; leave it out")
        data = _rows(adapter, model, tokenizer, console, calibrate, calibration_rows, data_dir)
        ranks: dict[str, int] = {}
        if rank == "auto":
            ranks = _smallest_within(kl, model, tokenizer, data, folder, per_layer, factors, console)
            model, tokenizer = load()  # the first one is a base model now
        batches = data.batches(model, tokenizer) if data else None
        layers = dual_layers(model)
        if isinstance(rank, int):
            ranks = dict.fromkeys(layers, _useful(layers, rank, console))
        elif energy is not None:
            ranks = smallest_ranks(model, layers, energy, batches)
            ranks = ranks if per_layer else dict.fromkeys(ranks, max(ranks.values()))
        rank = max(ranks.values())
        done = _converted("convert", console, model, layers, ranks, batches, factors)
        if said := too_few(done):
            say(console, "rows", f"[yellow]{escape(said)}[/]")
        total = _total(done, adapter)
        tensors = together(done) | carried(model)
        lora = lora_config(model, list(layers), ranks)
        _write(folder, lora, tensors)
        if (source / "tokenizer_config.json").is_file():
            tokenizer.save_pretrained(str(folder))
        if format == "gguf":
            gguf.write(folder)
        measured, difference = _measured(model, tokenizer, folder, tensors, data, scores)
        conversion = {
            "rank": rank,
            "per_layer": per_layer,
            "energy_asked": energy,
            **total,
            "dtype": str(next(iter(done[0].tensors.values())).dtype).removeprefix("torch."),
            "max_logit_difference": difference,
            "calibration": {**data.facts, "shrinkage": SHRINKAGE} if data else None,
            **measured,
            "layers": [layer.facts() for layer in done],
        }
        trained = _seal(folder, source, kind, conversion)
        written = sum(path.stat().st_size for path in folder.iterdir())
    _show(console, conversion)
    say(
        console,
        "written",
        f"[bold]{shown(output)}[/] ({size(written)}), a plain LoRA of rank {_ranks(ranks)}, alpha the rank",
    )
    return {"output": str(output), "kind": kind, "trained": trained, **conversion}


def _check(rank: int | str | None, energy: float | None, kl: float, per_layer: str | bool) -> None:
    if per_layer and isinstance(rank, int):
        raise ConfigError(
            f"rank={rank} is that of every layer, and per_layer gives each its own: use --rank auto or --energy"
        )
    if per_layer == "gguf":
        raise ConfigError("--format gguf has one alpha for all layers, and so one rank: leave out --per-layer")
    if (rank is None) == (energy is None):
        raise ConfigError(f"rank={rank}, energy={energy}: give one of them, --rank 64, --rank auto or --energy 0.99")
    if rank is not None and rank != "auto":
        check_rank("rank", rank)
    elif energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy={energy}: expected a share of |dW|^2 in (0, 1]")
    if not 0 < kl < float("inf"):
        raise ConfigError(f"kl={kl}: expected nats per token, above 0")


def _dual(adapter: str | Path) -> tuple[Path, Any]:
    """(folder, kind) of a Dual LoRA adapter; ConfigError for anything else."""
    source = adapters.find_adapter(adapter, "there is nothing to convert")
    method = adapters.read_config(source).peft_type
    if str(getattr(method, "value", method)) != "DUALLORA":
        raise ConfigError(f"{adapter} is a {method} adapter; only Dual LoRA adapters are converted")
    return source, adapters.adapter_kind(source)


def _rows(
    adapter: str | Path,
    model: Any,
    tokenizer: Any,
    console: Console,
    calibrate: bool | str,
    rows: int,
    data_dir: Path | None,
) -> calibration.Data | None:
    """The rows to look at; None for none, which is said where the run's own were wanted."""
    if calibrate is False:
        return None
    if calibrate is True and not score.recipe_file(adapter):
        say(
            console,
            "rows",
            f"{shown(Path(adapter))} is in no run's folder, so its training rows are not known: by weights alone. "
            "Name some with --calibrate DATA",
        )
        return None
    named = None if calibrate is True else calibrate
    return calibration.load(adapter, model, tokenizer, console, data=named, rows=rows, data_dir=data_dir)


def _converted(
    label: str, console: Console, model: Any, layers: Mapping[str, Any], ranks: Any, batches: Any, dtype: Any
) -> list[Converted]:
    """`convert_layers` of that, under a bar."""
    done = []
    with progress_bar(console, label, len(layers)) as update:
        for layer in convert_layers(model, layers, ranks, batches, dtype):
            done.append(layer)
            update(len(done))
    return done


def _useful(layers: Mapping[str, Any], rank: int, console: Console) -> int:
    """``rank``, or where that is more than any layer can have, what the widest can, which is said."""
    most = most_useful_rank(layers)
    if rank > most:
        say(console, "rank", f"{most}, not {rank}: no layer has more, and the rest would be zeros")
    return min(rank, most)


def _smallest_within(
    kl: float,
    model: Any,
    tokenizer: Any,
    data: calibration.Data | None,
    folder: Path,
    per_layer: bool,
    dtype: torch.dtype | None,
    console: Console,
) -> dict[str, int]:
    """The smallest ranks by layer whose KL from the adapter on held-out rows is at most ``kl``; ``model`` loses its adapter.

    They are equal, or ``per_layer`` such that each layer loses the same share. Factors of one rank hold those of all
    smaller ones, so the layers are converted once, at the largest.
    """
    if data is None or data.kind == "regress":
        why = (
            "the adapter predicts numbers, which have none"
            if data
            else "no rows to take it on: name some with --calibrate DATA"
        )
        raise ConfigError(f"rank=auto bounds the KL on held-out rows ({why}); or give --rank N or --energy SHARE")
    layers = dual_layers(model)
    most = min(MOST, most_useful_rank(layers))
    reference = data.outputs(model, tokenizer)
    done = _converted("rank", console, model, layers, most, data.batches(model, tokenizer), dtype)
    rest, base = carried(model), model.unload()
    last = STEPS if per_layer else most

    def ranks(level: int) -> dict[str, int]:
        if not per_layer:
            return {layer.name: level for layer in done}
        share = 1 - 10 ** (-level / 10) if level < last else 1.0
        return {layer.name: min(most, max(1, rank_for(layer.e, share))) for layer in done}

    def distance(level: int) -> float:
        tried = ranks(level)
        tensors = together(_cut(layer, tried[layer.name]) for layer in done) | rest
        _write(folder, lora_config(model, list(layers), tried), tensors)
        plain = _load(base, folder, tensors)
        found = data.measure(data.outputs(plain, tokenizer), reference)["kl"]
        plain.unload()
        say(console, "rank", f"{_ranks(tried)}: KL {found:.2e} on {len(data.held_out)} held-out rows")
        return found

    low, high = 0, min(FIRST, last)  # low is too low
    while (at := distance(high)) > kl:
        if high == last:
            raise ConfigError(
                f"rank {most}, the largest tried, is {at:.2e} nats per token from the adapter: expected at most kl={kl}. Raise --kl, or use duallora merge"
            )
        low, high = high, min(2 * high, last)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if distance(middle) <= kl else (middle, high)
    return ranks(high)


def _cut(layer: Converted, rank: int) -> Converted:
    """Its factors of a smaller rank."""
    tensors = {
        name: (t[:rank] if re.search(r"lora_(embedding_)?A", name) else t[:, :rank]).contiguous()
        for name, t in layer.tensors.items()
    }
    return layer._replace(tensors=tensors)


def _measured(
    model: Any,
    tokenizer: Any,
    folder: Path,
    tensors: Mapping[str, Tensor],
    data: calibration.Data | None,
    scores: Scores | None,
) -> tuple[dict[str, Any], float]:
    """({"held_out", "scores"} of adapter, base and conversion, the largest logit difference on the probes).

    The base is measured where it has no part that was trained: no new head, no biases.
    """
    scored: dict[str, Any] = {}
    held_out: dict[str, Any] = {}
    reference = None

    def look(name: str, model: Any) -> None:
        nonlocal reference
        if scores:
            scored[name] = dict(scores(model, tokenizer))
        if data:
            outputs = data.outputs(model, tokenizer)
            held_out[name] = data.measure(outputs, reference)
            reference = reference or outputs

    before = merge.probe(model, tokenizer)
    config = model.peft_config["default"]
    is_plain = config.task_type == "CAUSAL_LM" and config.bias == "none" and not config.modules_to_save
    look("adapter", model)
    base = model.unload()
    if is_plain:
        look("base", base)
    plain = _load(base, folder, tensors)
    difference, _ = merge.difference(merge.probe(plain, tokenizer), before)
    look("conversion", plain)
    return {"held_out": held_out, "scores": scored}, difference


def _total(done: list[Converted], adapter: str | Path) -> dict[str, float]:
    square, lost = sum(layer.square for layer in done), sum(layer.lost for layer in done)
    if square == 0:
        raise ConfigError(
            f"{adapter} changes no weight (dW = 0 in all {len(done)} layers): there is nothing to convert. Was it "
            "saved before its gate opened? duallora check tells"
        )
    energy, error = kept(square, lost)
    lowest = min(kept(layer.square, layer.lost)[0] for layer in done)
    return {"energy": energy, "lowest_energy": lowest, "relative_error": error}


def _write(folder: Path, lora: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    lora.save_pretrained(str(folder))
    save_file(dict(tensors), folder / adapters.WEIGHTS, metadata={"format": "pt"})


def _load(base: nn.Module, folder: Path, tensors: Mapping[str, Tensor]) -> PeftModel:
    """The written folder as PEFT loads it; IntegrityError where a tensor or a scale is not what was meant."""
    try:
        plain = PeftModel.from_pretrained(base, str(folder)).eval()  # type: ignore[arg-type]
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise IntegrityError(f"PEFT cannot load the conversion: {error}; nothing was kept") from error
    state = {name.replace(".default", ""): tensor for name, tensor in plain.state_dict().items()}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        found = state.get(name, state.get(f"{module}.modules_to_save.{leaf}"))
        if found is None or not torch.equal(found.cpu().to(tensor.dtype), tensor):
            raise IntegrityError(
                f"PEFT reads {name} of the conversion differently than it was written; nothing was kept"
            )
    for name, module in plain.named_modules():
        scale = getattr(module, "scaling", {}).get("default", 1.0) if hasattr(module, "lora_A") else 1.0
        if scale != 1.0:
            raise IntegrityError(f"PEFT scales {name} by {scale}, expected 1.0; nothing was kept")
    return plain


def _seal(folder: Path, source: Path, kind: str, conversion: dict[str, Any]) -> dict[str, Any]:
    """Writes the sidecar: where this came from, how near it is, the hash of every file; returns what the adapter's says."""
    sidecar = adapters.read_sidecar(source)
    kept = ("task", "labels", "steps", "base", "data", "recipe")
    trained: dict[str, Any] = {key: sidecar[key] for key in kept if key in sidecar}
    weights = checkpoint.file_record(source / adapters.WEIGHTS)["sha256"]
    origin = {"method": "DUALLORA", "gate": sidecar.get("gate"), adapters.WEIGHTS: weights}
    facts = {"method": "LORA", "kind": kind, **trained, "converted_from": origin, "conversion": conversion}
    adapters.seal(folder, {**facts, **record.environment()})
    return trained


def _ranks(ranks: Mapping[str, int]) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    return str(high) if low == high else f"{low} to {high} ({sum(ranks.values()) / len(ranks):.1f} on average)"


def _show(console: Console, conversion: Mapping[str, Any]) -> None:
    """The layers that keep least, what is kept in all, and the scores."""
    facts = sorted(conversion["layers"], key=lambda layer: layer["energy"])
    if len(facts) > SHOWN_LAYERS:
        say(console, "layers", f"the worst {SHOWN_LAYERS} of {len(facts)}; all are in {adapters.SIDECAR}")
    table = Table(box=SIMPLE)
    table.add_column("layer", overflow="fold")
    at = "its rank" if conversion["per_layer"] else conversion["rank"]
    for column in ("out x in", "99 % at", f"kept at {at}", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in facts[:SHOWN_LAYERS]:
        sides, kept = " x ".join(map(str, layer["shape"])), f"{layer['energy']:.4%}"
        kept += f" ({layer['rank']})" if conversion["per_layer"] else ""
        table.add_row(escape(layer["name"]), sides, str(layer["rank_99"]), kept, f"{layer['relative_error']:.2e}")
    console.print(table)
    norm = "|dW x|² on the rows" if conversion["calibration"] else "|dW|²"
    say(
        console,
        "kept",
        f"[bold]{conversion['energy']:.4%}[/] of {norm} in all, {conversion['lowest_energy']:.4%} in the worst layer; "
        f"relative error {conversion['relative_error']:.2e}; largest logit difference "
        f"{conversion['max_logit_difference']:.3g}",
    )
    for what, measured in (("held-out rows", conversion["held_out"]), ("metric", conversion["scores"])):
        if measured:
            table = Table(what, box=SIMPLE)
            for source in measured:
                table.add_column(source, justify="right")
            for name in measured["conversion"]:
                table.add_row(name, *(f"{v[name]:,.4g}" if name in v else "" for v in measured.values()))
            console.print(table)
