"""Base layers that store W0 quantized: reading it, putting W0 + dW on the same grid, taking it off the grid for good.

    library        layer                     read by                    written by
    bitsandbytes   Linear4bit (nf4, fp4)     dequantize_4bit            a new Params4bit
                   Linear8bitLt              int8_vectorwise_dequant    a new Int8Params
    torchao        nn.Linear                 weight.dequantize()        quantize_ with the model's own configuration
    HQQ            HQQLinear                 dequantize()               quantize() with the layer's own configuration
    any other                                -                          -

Each library reads and writes with its own functions; nothing is imported that the model has not. Every layer computes its
output itself, so no dequantized W0 outlives the call that reads it. PEFT's own backends (0.21) do the same but write over
what they replace, which could then not be put back bit for bit, and lose the bias of HQQ layers.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import Tensor, nn

from duallora.errors import ConfigError

Requantize = Callable[[], Any]  # gives the torchao configuration the model was quantized with

# Layers of these packages multiply by weights only they can read.
_FORWARD_ONLY = {
    "gptqmodel": "GPTQModel",
    "auto_gptq": "AutoGPTQ",
    "awq": "AutoAWQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "neural_compressor": "Intel Neural Compressor",
    "transformer_engine": "Transformer Engine",
    "optimum": "Optimum",
    "compressed_tensors": "compressed-tensors",
    "vptq": "VPTQ",
}


class Storage(NamedTuple):
    """How one kind of layer stores W0.

    hold: the objects that stand for the weight, by attribute; nothing writes to them once others are in their place.
    read: W0 [out, in]. write: quantizes W [out, in] anew, into new objects. Both None: only the layer's forward knows.
    """

    name: str
    hold: Callable[[Any], dict[str, Any]] | None = None
    read: Callable[[Any], Tensor] | None = None
    write: Callable[[Any, Tensor, Requantize | None], None] | None = None


def storage(layer: nn.Module) -> Storage | None:
    """How ``layer`` stores its weight; None where that is an ordinary tensor."""
    for library, cls, found in (
        ("bitsandbytes.nn", "Linear4bit", _BNB_4BIT),
        ("bitsandbytes.nn", "Linear8bitLt", _BNB_8BIT),
        ("hqq.core.quantize", "HQQLinear", _HQQ),
    ):
        module = sys.modules.get(library)  # not imported: then the layer is not of it
        if module is not None and isinstance(layer, getattr(module, cls, ())):
            return found
    if isinstance(layer, nn.Linear) and type(layer.weight).__module__.partition(".")[0] == "torchao":
        return _TORCHAO
    package, _, rest = type(layer).__module__.partition(".")
    if package in _FORWARD_ONLY:
        return Storage(_FORWARD_ONLY[package])
    if package == "transformers" and rest.startswith("integrations."):
        return Storage(f"transformers' {type(layer).__name__}")
    return None


def is_quantized_linear(layer: nn.Module) -> bool:
    """A layer y = x W0^T + b whose W0 is quantized, whatever its class."""
    return storage(layer) is not None and sizes(layer) is not None


def include_all_linear(config: Any, model: Any) -> None:
    """Let ``target_modules="all-linear"``, for PEFT any nn.Linear and Conv1D, name the quantized layers of other classes too."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    others = {
        name
        for name, module in model.named_modules()
        if is_quantized_linear(module) and not isinstance(module, nn.Linear) and module is not head
    }
    if others and str(config.target_modules).lower() == "all-linear":
        adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        others = {name for name in others if not name.startswith(adapted)}
        every: Any = _maybe_include_all_linear_layers(config, model)
        config.target_modules = {*every.target_modules, *others}


def sizes(layer: Any) -> tuple[int, int] | None:
    """(out, in) of a linear layer of any library; None where it does not say."""
    for names in (("out_features", "in_features"), ("outfeatures", "infeatures")):
        out, into = (getattr(layer, name, None) for name in names)
        if type(out) is int and type(into) is int:
            return out, into
    return None


# -- the four that can be read and written -----------------------------------------------------------------------------


def _hold_4bit(layer: Any) -> dict[str, Any]:
    _unpack(layer)
    return {"weight": layer.weight, "quant_state": layer.quant_state}


def _read_4bit(layer: Any) -> Tensor:
    _unpack(layer)
    if layer.weight.quant_state is None:  # bitsandbytes quantizes as the layer is moved to its device
        return layer.weight.data
    return sys.modules["bitsandbytes"].functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _write_4bit(layer: Any, W: Tensor, _: Requantize | None) -> None:
    old = layer.weight
    dtype = W.dtype if old.quant_state is None else old.quant_state.dtype  # of what dequantizing gives
    layer.weight = type(old)(
        W.to("cpu", dtype), requires_grad=False, blocksize=old.blocksize, compress_statistics=old.compress_statistics,
        quant_type=old.quant_type, quant_storage=old.quant_storage, module=layer,
    ).to(old.device)  # fmt: skip


def keep_exact(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for evaluation on CPUs with AVX512-BF16.

    The packed form has rounded scales, cannot be dequantized, takes no sizes but multiples of 32 and gives x no gradient
    in the training that follows (seen with bitsandbytes 0.50).
    """
    for layer in model.modules():
        if storage(layer) is _BNB_4BIT:
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            _unpack(layer)


def _unpack(layer: Any) -> None:
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        unpack = sys.modules["bitsandbytes"].functional._convert_weight_packed_for_cpu_inverse
        layer.weight.data, layer.weight.quant_state = unpack(layer.weight.data, layer.weight.quant_state)


def _hold_8bit(layer: Any) -> dict[str, Any]:
    weight = layer.weight
    if weight.data.dtype != torch.int8:
        return {"weight": weight}
    scales = layer.state.SCB if weight.SCB is None else weight.SCB  # the first forward moves them into the state
    held = type(weight)(weight.data, requires_grad=False, has_fp16_weights=False, CB=weight.data, SCB=scales)
    return {"weight": held}


def _read_8bit(layer: Any) -> Tensor:
    weight = _hold_8bit(layer)["weight"]
    if weight.data.dtype != torch.int8:
        return weight.data
    return sys.modules["bitsandbytes"].functional.int8_vectorwise_dequant(weight.data, weight.SCB)


def _write_8bit(layer: Any, W: Tensor, _: Requantize | None) -> None:
    old = layer.weight
    layer.weight = type(old)(W.to("cpu"), requires_grad=False, has_fp16_weights=False).to(old.device)


def _unknown_configuration() -> ConfigError:
    return ConfigError(
        "this torchao layer was quantized outside transformers, so the configuration to quantize it with is unknown: "
        "load the model with transformers' TorchAoConfig, or merge after duallora.dequantize(model)"
    )


def _write_torchao(layer: Any, W: Tensor, requantize: Requantize | None) -> None:
    if requantize is None:
        raise _unknown_configuration()
    layer.weight = nn.Parameter(W.to(layer.weight.dtype), requires_grad=False)
    sys.modules["torchao"].quantize_(layer, requantize())


def _write_hqq(layer: Any, W: Tensor, _: Requantize | None) -> None:
    del layer.W_q  # quantize() assigns a plain tensor before it makes a parameter of it
    layer.quantize(W, **layer.quant_config)


_BNB_4BIT = Storage("bitsandbytes 4-bit", _hold_4bit, _read_4bit, _write_4bit)
_BNB_8BIT = Storage("bitsandbytes 8-bit", _hold_8bit, _read_8bit, _write_8bit)
_TORCHAO = Storage(
    "torchao", lambda layer: {"weight": layer.weight}, lambda layer: layer.weight.dequantize(), _write_torchao
)
_HQQ = Storage(
    "HQQ", lambda layer: {"W_q": layer.W_q, "meta": dict(layer.meta)}, lambda layer: layer.dequantize(), _write_hqq
)


# -- reading, writing, putting back ------------------------------------------------------------------------------------


def _unreadable(name: str) -> ConfigError:
    return ConfigError(
        f"a {name} weight cannot be dequantized, so nothing can be merged into it and use_dora cannot measure it: "
        "put the adapter on the original model to merge (duallora merge does), and train without use_dora"
    )


def require_writable(layer: nn.Module, requantize: Requantize | None) -> None:
    """ConfigError where the layer's weight is quantized and :func:`write` cannot be."""
    found = storage(layer)
    if found is not None and found.write is None:
        raise _unreadable(found.name)
    if found is _TORCHAO and requantize is None:
        raise _unknown_configuration()


@torch.no_grad()
def read(layer: nn.Module) -> Tensor:
    """W0 [out, in] dequantized, a new tensor in float32.

    Raises:
        ConfigError: only the layer's forward can read it.
    """
    found = storage(layer)
    if found is None or found.read is None:
        raise _unreadable(type(layer).__name__ if found is None else found.name)
    try:
        return found.read(layer).detach().to(torch.float32, copy=True)
    except NotImplementedError as error:  # some torchao tensors
        raise ConfigError(f"{type(layer.weight).__name__} cannot be dequantized: {error}") from error


def hold(layer: nn.Module) -> dict[str, Any]:
    """What :func:`put_back` needs to make the layer's weight what it is now, bit for bit; shares its memory."""
    found = storage(layer)
    assert found is not None
    assert found.hold is not None  # read() raises first
    return found.hold(layer)


def put_back(layer: Any, held: dict[str, Any]) -> None:
    """Undo every :func:`write` since ``held`` was taken, also one that failed half way."""
    first = next(iter(held))
    device = getattr(layer, first, held[first]).device
    for name, value in held.items():
        moved = isinstance(value, nn.Parameter) and value.device != device
        setattr(layer, name, value.to(device) if moved else value)
    if storage(layer) is _BNB_8BIT:  # which computes by its state, as does a backward under way
        layer.state.CB, layer.state.SCB = layer.weight.CB, layer.weight.SCB


def read_held(layer: nn.Module, held: dict[str, Any]) -> Tensor:
    """:func:`read` of the weight that was there when ``held`` was taken."""
    now = hold(layer)
    put_back(layer, held)
    try:
        return read(layer)
    finally:
        put_back(layer, now)


@torch.no_grad()
def write(layer: nn.Module, W: Tensor, dW_norm: float, requantize: Requantize | None = None) -> float:
    """Make W [out, in] the layer's weight, on its grid, and return |weight - W| / |dW|: the share of dW that is lost.

    1 means that rounding moved the weight as far as the update did. Infinite where dW is 0 and rounding is not. Whatever
    the library raises, as for want of memory, the layer then has the weight it had.
    """
    found = storage(layer)
    assert found is not None
    assert found.write is not None
    held = hold(layer)
    try:
        found.write(layer, W, requantize)
        error = float(torch.linalg.vector_norm(read(layer) - W))
    except BaseException:
        put_back(layer, held)
        raise
    return error / dW_norm if dW_norm > 0 else (float("inf") if error else 0.0)


def requantizer(model: nn.Module) -> Requantize | None:
    """The torchao configuration of a model that transformers quantized, as a function; None for all others."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return getattr(config, "get_apply_tensor_subclass", None)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that the weights of ``model`` consist of, by name: parameters, and codes and scales of quantized ones."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    for name, layer in model.named_modules():
        if storage(layer) is None:
            continue
        for key, tensor in layer.state_dict().items():
            key = f"{name}.{key}"
            if hasattr(tensor, "__tensor_flatten__"):  # torchao's stand for several
                found.pop(key, None)
                found |= {f"{key}.{part}": getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]}
            else:
                found[key] = tensor
    return found


# -- what a merge loses ------------------------------------------------------------------------------------------------

_losses: ContextVar[list[tuple[nn.Module, float]] | None] = ContextVar("duallora_merge_losses", default=None)


@contextmanager
def merge_losses(model: nn.Module) -> Iterator[dict[str, float]]:
    """Collects, by layer name, what merging into quantized weights inside loses, instead of a warning per layer."""
    names = {id(module): name for name, module in model.named_modules()}
    found: list[tuple[nn.Module, float]] = []
    losses: dict[str, float] = {}
    token = _losses.set(found)
    try:
        yield losses
    finally:
        _losses.reset(token)
        losses.update({names.get(id(layer), ""): loss for layer, loss in found})


def report(layer: nn.Module, loss: float, stacklevel: int = 3) -> None:
    """Hand one layer's loss to the :func:`merge_losses` around it; a warning where there is none."""
    found = _losses.get()
    if found is None:
        warn_of({"": loss}, stacklevel=stacklevel + 1)
    else:
        found.append((layer, loss))


def warn_of(losses: dict[str, float], stacklevel: int = 3) -> None:
    """One warning for a merge call: how much of dW the grid of the weights took, and where most."""
    if not losses:
        return
    worst = max(losses, key=lambda name: losses[name])
    middle = sorted(losses.values())[len(losses) // 2]
    where = f"{middle:.0%} of dW at the median of {len(losses)} layers, {losses[worst]:.0%} in {worst}"
    warnings.warn(
        f"Merged into quantized weights, W0 + dW is rounded to their grid: the error is "
        f"{where if worst else f'{middle:.0%} of dW'}. unmerge restores W0 bit for bit. Without that loss: "
        "duallora.dequantize(model) before merging, or `duallora merge` on the saved adapter.",
        stacklevel=stacklevel,
    )


# -- off the grid ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def dequantize(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Replace, in place, each quantized linear layer of ``model`` by an ``nn.Linear`` with the weight it stands for.

    Merging then adds dW to what it was trained on, without rounding it to a grid. ``dtype`` is that of the new weights;
    None: of the model's first floating-point parameter outside the adapters. Returns ``model``.

    Raises:
        ConfigError: an adapter is merged, or a layer cannot be dequantized; nothing was replaced.
    """
    every = model.named_modules(remove_duplicate=False)
    layers = [(name, module, found) for name, module in every if (found := storage(module)) is not None]
    for name, _, found in layers:
        if found.read is None:
            raise ConfigError(f"{name} is a {found.name} layer, which cannot be dequantized; load the original model")
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and module.merged and storage(module.get_base_layer()) is not None:
            raise ConfigError("an adapter is merged into the quantized weights: call unmerge_adapter() first")
    if dtype is None:
        plain = (p.dtype for n, p in model.named_parameters() if p.is_floating_point() and "duallora_" not in n)
        dtype = next(plain, torch.float32)
    new: dict[int, nn.Linear] = {}
    for _, module, _ in layers:
        if id(module) not in new:  # layers may be shared
            new[id(module)] = _plain_linear(module, dtype)
    for name, module, _ in layers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new[id(module)])
    for module in model.modules():
        if "hf_quantizer" in vars(module):
            module.hf_quantizer.remove_quantization_config(module)
        if "_weight_conversions" in vars(module):  # how transformers would write back the file of codes it read
            made = [
                c
                for c in module._weight_conversions
                if any(hasattr(o, "hf_quantizer") for o in getattr(c, "operations", ()))
            ]
            module._weight_conversions = [c for c in module._weight_conversions if c not in made] or None
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            if flag in vars(module):
                setattr(module, flag, False)
    return model


def _plain_linear(layer: Any, dtype: torch.dtype) -> nn.Linear:
    W = read(layer).to(dtype)
    new = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    new.weight = nn.Parameter(W, requires_grad=False)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=layer.bias.requires_grad)
    if hasattr(layer, "_hf_hook"):  # accelerate's: moves the input of a layer of a model spread over devices
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, layer._hf_hook)
    return new.train(layer.training)
