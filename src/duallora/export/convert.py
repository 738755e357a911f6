"""A Dual LoRA adapter as a plain LoRA of one rank: PEFT and the serving engines load it without this package.

Per layer the nearest matrix of rank k (Eckart and Young), from the smaller Gram matrix of dW [out, in] in float64:

    dW^T dW = V diag(e) V^T,  e falling      A = V_k^T [k, in]      B = dW V_k [out, k]      |dW - B A|_F^2 = e_{k+1} + ...

V_k has orthonormal columns, so B A is dW projected, whatever the rounding of e, and nothing is divided by a small
singular value; with out < in the two factors change places. dW is that of the gate as saved; with DoRA it is W' - W0.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from duallora.config import Dtype
from duallora.errors import ConfigError, IntegrityError, NonFiniteError, check_rank
from duallora.export import merge
from duallora.store import adapters, checkpoint, record
from duallora.terminal import progress_bar, quiet_libraries, say, shown, size
from duallora.tuner.conv import TORCH as CONVOLUTIONS
from duallora.tuner.experts import Experts
from duallora.tuner.layer import DualLoraLayer

Scores = Callable[[Any, Any], Mapping[str, float]]

ROWS = 8192  # of dW that are widened to float64 at a time
FLOOR = 1e-12  # share of |dW|^2 below which an eigenvalue is rounding
SHOWN_LAYERS = 12  # longer tables show the worst; the sidecar holds all


class Converted(NamedTuple):
    """One layer: its LoRA tensors by name, and how near B A is to dW."""

    name: str
    tensors: dict[str, Tensor]
    shape: tuple[int, int]
    """(out, in) of dW; a convolution's kernel counts to its inputs."""
    rank_99: int
    """The rank that would keep 99 % of |dW|_F^2."""
    square: float
    """|dW|_F^2."""
    lost: float
    """|dW - B A|_F^2 with the factors as they are stored."""

    def facts(self) -> dict[str, Any]:
        energy, error = _kept(self.square, self.lost)
        shape = list(self.shape)
        return {"name": self.name, "shape": shape, "rank_99": self.rank_99, "energy": energy, "relative_error": error}


def convert(
    adapter: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: Dtype = "auto",
    strict: bool = True,
    scores: Scores | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Writes ``adapter`` as a plain LoRA into ``output`` and returns ``{"output", "rank", "energy", "layers", ...}``.

    ``rank`` is that of every layer, zero-padded where a layer has less and at most what the widest can have; ``energy`` in (0, 1] picks the smallest one
    with which every layer keeps that share of |dW|_F^2. lora_alpha = rank, so that every reader's scale is 1.
    ``scores(model, tokenizer)`` measures adapter, conversion and base model. The folder is built beside its place,
    loaded from the disk by PEFT, compared tensor by tensor, and only then renamed.

    Raises:
        ConfigError: ``output`` is taken, not exactly one of ``rank`` and ``energy`` is given or it is out of range,
            nothing was trained, or a layer is of a kind that no LoRA can hold.
        IntegrityError: the adapter is damaged or of another base, or what PEFT reads back differs.
        NonFiniteError: a dW, or a factor in ``dtype``, is NaN or infinite.
    """
    console = console or Console()
    output = Path(output)
    if (rank is None) == (energy is None):
        raise ConfigError(f"rank={rank}, energy={energy}: give one of them, --rank 64 or --energy 0.99")
    if rank is not None:
        check_rank("rank", rank)
    elif energy is None or not 0 < energy <= 1:
        raise ConfigError(f"energy={energy}: expected a share of |dW|^2 in (0, 1]")
    source = adapters.find(adapter)
    if source is None or not (source / "adapter_config.json").is_file():
        raise ConfigError(f"{adapter} is a model, not an adapter: there is nothing to convert")
    config = adapters.read_config(source)
    kind = adapters.adapter_kind(source)
    if str(getattr(config.peft_type, "value", config.peft_type)) != "DUALLORA":
        raise ConfigError(f"{adapter} is a {config.peft_type} adapter; only Dual LoRA adapters are converted")
    with quiet_libraries(), merge.beside(output) as folder:
        model, tokenizer = adapters.load_adapter(adapter, kind, strict=strict)
        say(console, "adapter", f"{shown(Path(adapter))} on {escape(str(config.base_model_name_or_path))}")
        layers = dual_layers(model)
        rank = useful_rank(layers, rank, console) if rank else smallest_rank(layers, float(energy or 0), console)
        done = [convert_layer(name, layer, rank, dtype) for name, layer in _progress(layers, console, "convert")]
        total = _total(done)
        if total["square"] == 0:
            raise ConfigError(
                f"{adapter} changes no weight (dW = 0 in all {len(done)} layers): there is nothing to convert. Was it "
                "saved before its gate opened? duallora check tells"
            )
        tensors = together({name: t for layer in done for name, t in layer.tensors.items()}) | _carried(model)
        lora = lora_config(model, list(layers), rank)
        _write(folder, lora, tensors)
        if (source / "tokenizer_config.json").is_file():
            tokenizer.save_pretrained(str(folder))
        before = merge.probe(model, tokenizer)
        measured = {"adapter": dict(scores(model, tokenizer))} if scores else {}
        base = model.unload()
        if scores and kind == "generate" and lora.bias == "none":  # else the base is left with a new head or biases
            measured["base"] = dict(scores(base, tokenizer))
        plain = _load(base, folder, tensors)
        difference, _ = merge.difference(merge.probe(plain, tokenizer), before)
        if scores:
            measured["conversion"] = dict(scores(plain, tokenizer))
        conversion = {
            "rank": rank,
            "energy_asked": energy,
            "energy": total["energy"],
            "lowest_energy": total["lowest"],
            "relative_error": total["relative_error"],
            "dtype": str(next(iter(done[0].tensors.values())).dtype).removeprefix("torch."),
            "max_logit_difference": difference,
            "scores": measured,
            "layers": [layer.facts() for layer in done],
        }
        trained = _seal(folder, source, kind, conversion)
        written = sum(path.stat().st_size for path in folder.iterdir())
    _show(console, conversion)
    say(console, "written", f"[bold]{shown(output)}[/] ({size(written)}), a plain LoRA of rank {rank}, alpha {rank}")
    return {"output": str(output), "kind": kind, "trained": trained, **conversion}


def dual_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by their name in the base model; fused experts one by one, as ``name[number]``.

    Raises ConfigError for experts where PEFT's LoRA has them in another layout (before 0.19).
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found: dict[str, Any] = {}
    for name, module in base.named_modules():
        if isinstance(module, Experts):
            if Version(peft.__version__) < Version("0.19"):
                raise ConfigError(
                    f"{name}: LoRA on experts in PEFT {peft.__version__} has another layout: upgrade to peft >= 0.19"
                )
            found |= {f"{name}[{expert.number}]": expert for expert in module.singly()}
        elif isinstance(module, DualLoraLayer):
            found[name] = module
    return found


def together(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the factors of experts as PEFT's LoRA stacks them: A [experts * r, in], B [out, r * experts], r the slower."""
    plain = {name: tensor for name, tensor in tensors.items() if "[" not in name}
    fused: dict[str, list[Tensor]] = defaultdict(list)
    for name in tensors.keys() - plain.keys():
        fused[re.sub(r"\[\d+\]", "", name)].append(tensors[name])
    for name, factors in fused.items():
        ordered = [tensors[_numbered(name, e)] for e in range(len(factors))]
        plain[name] = torch.cat(ordered) if "lora_A" in name else torch.stack(ordered, -1).flatten(1)
    return plain


def _numbered(name: str, e: int) -> str:
    layer, _, leaf = name.rpartition(".lora_")
    return f"{layer}[{e}].lora_{leaf}"


def delta_matrix(name: str, layer: Any, adapter: str = "default") -> Tensor:
    """dW as the matrix [out, in] that LoRA's B A stands for: an embedding's is [dim, tokens], a kernel is flattened.

    Raises NonFiniteError if it holds NaN or infinities.
    """
    dW = layer.get_delta_weight(adapter)
    if not bool(torch.isfinite(dW).all()):
        raise NonFiniteError(f"dW of {name} holds NaN or infinite values: the adapter is broken; nothing was written")
    base = layer.get_base_layer()
    if isinstance(base, CONVOLUTIONS):
        return dW.flatten(1)
    if isinstance(base, nn.Embedding) or layer.fan_in_fan_out:
        return dW.T
    return dW


def eigenvalues(M: Tensor) -> Tensor:
    """The squared singular values of M [m, n], falling, float64 on the CPU."""
    return torch.linalg.eigvalsh(_gram(M)).flip(0).clamp(min=0).cpu()


def rank_for(e: Tensor, energy: float) -> int:
    """The smallest k with which the k largest of the falling ``e`` hold that share of their sum; 0 if all are 0."""
    total = float(e.sum())
    if total == 0:
        return 0
    tail = e.flip(0).cumsum(0).flip(0)  # summed from the small end; tail[k] is lost with rank k
    return int((tail > max(1 - energy, FLOOR) * total).sum())


def low_rank(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A [rank, n], B [m, rank], e): B A is the nearest to M [m, n], zero-padded beyond min(m, n); float64."""
    e, V = torch.linalg.eigh(_gram(M))
    e, V = e.flip(0).clamp(min=0), V.flip(1)[:, :rank]
    tall = M if M.shape[0] >= M.shape[1] else M.T
    P = torch.cat([rows.double() @ V for rows in tall.to(V.device).split(ROWS)])
    B, A = (P, V.T) if tall is M else (V, P.T)
    padding = rank - A.shape[0]
    if padding > 0:
        A, B = nn.functional.pad(A, (0, 0, 0, padding)), nn.functional.pad(B, (0, padding))
    return A, B, e.cpu()


def _gram(M: Tensor) -> Tensor:
    """M^T M, or M M^T where that is smaller, in float64."""
    tall = M if M.shape[0] >= M.shape[1] else M.T
    if tall.device.type == "mps":  # has no float64
        tall = tall.cpu()
    G = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for rows in tall.split(ROWS):
        wide = rows.double()
        G.addmm_(wide.T, wide)
    return G


def smallest_rank(layers: Mapping[str, Any], energy: float, console: Console) -> int:
    """The one rank with which every layer keeps ``energy`` of its |dW|_F^2; at least 1."""
    ranks = [
        rank_for(eigenvalues(delta_matrix(name, layer)), energy) for name, layer in _progress(layers, console, "rank")
    ]
    return max(1, *ranks)


def useful_rank(layers: Mapping[str, Any], rank: int, console: Console) -> int:
    """``rank``, or where that is more than any layer can have, min(out, in) of the widest, which is said."""
    factors = [(layer.duallora_A["default"], layer.duallora_B["default"]) for layer in layers.values()]
    most = max(min(A.shape[1], B.shape[0]) for A, B in factors)
    if rank > most:
        say(console, "rank", f"{most}, not {rank}: no layer has more, and the rest would be zeros")
    return min(rank, most)


@torch.no_grad()
def convert_layer(name: str, layer: Any, rank: int, dtype: Dtype = "auto") -> Converted:
    """The layer's LoRA factors; ``dtype="auto"`` is that of its own, float32 at least.

    Raises:
        ConfigError: a convolution that PEFT's LoRA does not follow (groups, dilation, padding mode).
        NonFiniteError: dW or a factor is NaN or infinite.
    """
    base = layer.get_base_layer()
    _refuse_odd_convolution(name, base)
    M = delta_matrix(name, layer)
    A, B, e = low_rank(M, rank)
    stored = M.dtype if dtype == "auto" else getattr(torch, dtype)
    A, B = A.to(stored), B.to(stored)
    if not bool(torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise NonFiniteError(f"{name}: its factors overflow in {stored}; use --dtype bfloat16 or float32")
    square = lost = 0.0
    right = A.double()
    for rows, left in zip(M.to(A.device).split(ROWS), B.split(ROWS), strict=True):
        wide = rows.double()
        square += float(wide.square().sum())
        lost += float((wide - left.double() @ right).square().sum())
    A, B = A.cpu().contiguous(), B.cpu().contiguous()
    prefix = f"base_model.model.{name}"
    if isinstance(base, nn.Embedding):
        tensors = {f"{prefix}.lora_embedding_A": A, f"{prefix}.lora_embedding_B": B}
    else:
        if isinstance(base, CONVOLUTIONS):
            A = A.reshape(rank, *base.weight.shape[1:])
            B = B.reshape(*B.shape, *[1] * (base.weight.dim() - 2))
        tensors = {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}
    return Converted(name, tensors, (M.shape[0], M.shape[1]), rank_for(e, 0.99), square, lost)


def _refuse_odd_convolution(name: str, base: nn.Module) -> None:
    if not isinstance(base, CONVOLUTIONS):
        return
    odd = {
        "groups": base.groups != 1,
        "dilation": set(base.dilation) != {1},
        "padding_mode": base.padding_mode != "zeros",
    }
    for what in (key for key, is_odd in odd.items() if is_odd):
        raise ConfigError(
            f"{name} is a {type(base).__name__} with {what}={getattr(base, what)}, which PEFT's LoRA does not follow: no "
            "plain LoRA equals this adapter. Use duallora merge instead"
        )


def lora_config(model: PeftModel, names: list[str], rank: int) -> LoraConfig:
    """The configuration of the conversion: ``names`` by their last part where that selects no other module."""
    config: Any = model.peft_config["default"]
    names = [name for name in names if "[" not in name]  # experts are target_parameters
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    base = model.get_base_model()
    selected = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in suffixes]
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        target_modules=suffixes if len(selected) == len(names) else sorted(names),
        target_parameters=config.target_parameters,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in dual_layers(model).values()),
        bias={"duallora_only": "lora_only"}.get(config.bias, config.bias),
        modules_to_save=list(dict.fromkeys(config.modules_to_save)) if config.modules_to_save else None,
    )


def _carried(model: PeftModel) -> dict[str, Tensor]:
    """What was trained in full, heads and biases, by its name in the file."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: t.detach().cpu().contiguous().clone() for name, t in state.items() if "duallora_" not in name}


def _total(done: list[Converted]) -> dict[str, float]:
    square, lost = sum(layer.square for layer in done), sum(layer.lost for layer in done)
    energy, error = _kept(square, lost)
    lowest = min(layer.facts()["energy"] for layer in done)
    return {"square": square, "energy": energy, "relative_error": error, "lowest": lowest}


def _kept(square: float, lost: float) -> tuple[float, float]:
    """(share of |dW|_F^2 kept, |dW - B A|_F / |dW|_F); a dW of zero is kept whole."""
    return (1 - lost / square, (lost / square) ** 0.5) if square else (1.0, 0.0)


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
    kept: dict[str, Any] = {
        key: sidecar[key] for key in ("task", "labels", "steps", "base", "data", "recipe") if key in sidecar
    }
    facts: dict[str, Any] = {
        "method": "LORA",
        "kind": kind,
        **kept,
        "converted_from": {
            "method": "DUALLORA",
            "gate": sidecar.get("gate"),
            adapters.WEIGHTS: checkpoint.file_record(source / adapters.WEIGHTS)["sha256"],
        },
        "conversion": conversion,
        **record.environment(),
    }
    adapters.seal(folder, facts)
    return kept


def _progress(layers: Mapping[str, Any], console: Console, label: str) -> Iterator[tuple[str, Any]]:
    with progress_bar(console, label, len(layers)) as update:
        for count, item in enumerate(layers.items(), 1):
            yield item
            update(count)


def _show(console: Console, conversion: Mapping[str, Any]) -> None:
    """The layers that keep least, what is kept in all, and the scores."""
    facts = sorted(conversion["layers"], key=lambda layer: layer["energy"])
    if len(facts) > SHOWN_LAYERS:
        say(console, "layers", f"the worst {SHOWN_LAYERS} of {len(facts)}; all are in {adapters.SIDECAR}")
    table = Table(box=SIMPLE)
    table.add_column("layer", overflow="fold")
    for column in ("out x in", "99 % at", f"kept at {conversion['rank']}", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in facts[:SHOWN_LAYERS]:
        sides, kept = " x ".join(map(str, layer["shape"])), f"{layer['energy']:.4%}"
        table.add_row(escape(layer["name"]), sides, str(layer["rank_99"]), kept, f"{layer['relative_error']:.2e}")
    console.print(table)
    say(
        console,
        "kept",
        f"[bold]{conversion['energy']:.4%}[/] of |dW|² in all, {conversion['lowest_energy']:.4%} in the worst layer; "
        f"relative error {conversion['relative_error']:.2e}; largest logit difference "
        f"{conversion['max_logit_difference']:.3g}",
    )
    if measured := conversion["scores"]:
        table = Table("metric", box=SIMPLE)
        for source in measured:
            table.add_column(source, justify="right")
        for name in measured["adapter"]:
            table.add_row(name, *(f"{values[name]:,.4g}" for values in measured.values()))
        console.print(table)
