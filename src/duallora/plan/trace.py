"""One training step of the real model code without its weights: every tensor that would exist, and for how long.

The model is transformers' own, the adapter PEFT's or this package's, forward and backward are autograd's; only the
tensors are fake (torch's FakeTensorMode: shape and type, no content). A ledger sees each tensor come and go, so the peak
follows from the program itself, for any architecture, and there is no formula to go stale.

A deep model is traced at two small depths. At a given moment of the step (before the layers, in the first, in the last,
after them; forward and backward) memory is linear in the number of layers, and inside a layer between the first and
the last it lies between theirs. Two depths therefore give the peak of any depth.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from duallora import DualLoraConfig
from duallora.errors import ConfigError, first_line
from duallora.plan.architectures import is_encoder
from duallora.terminal import quiet_libraries

METHODS = ("lora", "dora", "duallora")
DEPTHS = (2, 4)  # even: some models alternate two kinds of layers
Targets = list[str] | str
_DEPTH_NAMES = ("num_hidden_layers", "n_layer")
_UNMASKED = "duallora_unmasked"
_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


class Setting(NamedTuple):
    """What is trained: ``rank`` is Dual LoRA's r (both groups), LoRA and DoRA have 2r.

    apart: the base layer computes its own product and dW another, as quantized, sharded and offloaded weights need it.
    dequantized: each linear layer makes its weight [out, in] anew from a packed one, forward and backward.
    padded: rows differ in length, so that attention takes a mask [batch, 1, length, length]; else they are all full.
    fused_attention: dropout inside attention does not keep the fused kernels away (true on CUDA, false on CPUs).
    """

    method: str
    rank: int = 16
    targets: Targets = "all-linear"
    parameters: list[str] | None = None  # fused experts beside them; Dual LoRA's and LoRA's alone
    dtype: torch.dtype = torch.bfloat16
    attention: str | None = None
    checkpointing: bool = False
    padded: bool = False
    apart: bool = False
    dequantized: bool = False
    fused_attention: bool = True


class Counts(NamedTuple):
    """Parameters by number, and bytes of what does not depend on the batch; a model's own, tied weights once."""

    base: int
    base_bytes: int
    linear: int  # of the base's: in linear layers but the output head, which is what quantization packs
    linear_bytes: int
    linear_rows: int
    adapter: int
    trained: int  # the adapter's and, for classifiers, the head's
    trained_bytes: int
    layer_bytes: int  # of one decoder layer with its adapters
    rest_bytes: int  # outside the layers: embeddings, final norm, head


class Use(NamedTuple):
    """Bytes above what is resident: ``kept`` from forward to backward, and the highest use, anywhere in the step."""

    kept: int
    peak: int


class _Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is on, until they are freed."""

    def __init__(self, resident: Mapping[int, int]) -> None:
        super().__init__()
        self.sizes = dict(resident)
        self.live = sum(self.sizes.values())
        self.moment = "forward, before"
        self.peaks: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        now = self.live + workspace(func, args)
        self.peaks[self.moment] = max(self.peaks.get(self.moment, 0), now)
        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += self.sizes[key]
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def workspace(func: Any, args: Any) -> int:
    """Bytes that Dual LoRA's operators hold inside: W' [out, in] in the forward; W' and G in the backward.

    In the dtype of x, as the C++ and Triton kernels do it (they see the operator from outside, and so does the ledger).
    """
    name = func._schema.name
    if name not in ("duallora::dual_linear", "duallora::dual_linear_backward"):
        return 0
    backward = name.endswith("backward")
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    return (1 + backward) * given["B"].shape[0] * given["A"].shape[1] * given["x"].element_size()


class StandIn:
    """The model of ``depth`` layers with its adapter, on fake tensors."""

    def __init__(self, config: Any, depth: int, setting: Setting) -> None:
        self.setting = setting
        self.encoder = is_encoder(config)
        config = at_depth(config, depth)
        if self.encoder:
            config.problem_type = "single_label_classification"  # DeBERTa else looks at the labels, which are fake
        attention = setting.attention or getattr(config, "_attn_implementation", None)
        if setting.fused_attention and attention != "eager":
            for name in _ATTENTION_DROPOUT:
                if hasattr(config, name):
                    setattr(config, name, 0.0)
        with _quiet(), torch.device("meta"):
            base = build(config, setting)
        if not setting.padded and base.config._attn_implementation == "sdpa":
            # A mask of ones is left out by looking at it, which fake tensors do not allow: it is not even made.
            AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
            base.config._attn_implementation = _UNMASKED
        head = base.get_output_embeddings() if not self.encoder else None
        inside = {id(m) for m in base.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
        with _quiet():
            model = adapt(base, setting, "SEQ_CLS" if self.encoder else "CAUSAL_LM")
        self.model = model.train()
        self.layers = _layers(model, depth)
        self.counts = _count(model, self.layers, inside)
        self.mode = FakeTensorMode()
        with self.mode:
            _become_fake(model)
        for module in model.modules():
            if hasattr(module, "duallora_A") and not (setting.apart or setting.dequantized):
                # It would see that a fake weight is not plain; the real one is.
                module._form = lambda adapters: "merged"  # type: ignore[method-assign, assignment]
                module._is_resident = lambda: True  # type: ignore[method-assign, assignment]
            if setting.dequantized and id(module) in inside:
                module.forward = _dequantized(module)  # type: ignore[method-assign]

    def step(self, batch: int, length: int, *, accumulating: bool) -> dict[str, int]:
        """Bytes above the weights, adapter and gradients at each moment's peak, and ``kept`` for the backward.

        accumulating: the gradients of an earlier batch are there; else they come to life in this step and count.
        """
        trained = [p for p in self.model.parameters() if p.requires_grad]
        with self.mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter, requires_grad=False) if accumulating else None
            ids = torch.zeros(batch, length, dtype=torch.long)
            labels = torch.zeros(batch, dtype=torch.long) if self.encoder else ids
            held = {_key(t): 0 for t in (*self.model.parameters(), *self.model.buffers(), ids, labels)}
            gradients = {_key(p.grad): p.grad.untyped_storage().nbytes() for p in trained if p.grad is not None}
            ledger = _Ledger(held | gradients)
            for parameter in trained:
                if parameter.grad is not None:  # replaced by the sum with the new one
                    weakref.finalize(parameter.grad.untyped_storage(), ledger._remove, _key(parameter.grad))
            before = ledger.live
            options: dict[str, Any] = {} if self.encoder else {"use_cache": False}
            if self.setting.padded:
                options["attention_mask"] = torch.ones_like(ids)
                held[_key(options["attention_mask"])] = 0
            with ledger, self._moments(ledger):
                loss = self.model(input_ids=ids, labels=labels, **options).loss
                ledger.moment = "backward, after"  # seen from the layers: the head comes first
                kept = ledger.live
                loss.backward()
            del loss
            for parameter in trained:
                parameter.grad = None
        found = {name: peak - before for name, peak in ledger.peaks.items()}
        # AdamW's foreach form (the default on CUDA) holds one more tensor of the size of each parameter.
        found["optimizer"] = self.counts.trained_bytes * (1 if accumulating else 2)
        return {**found, "kept": kept - before}

    @contextmanager
    def _moments(self, ledger: _Ledger) -> Iterator[None]:
        """Tells the ledger where in the step it is, by hooks on the first and the last layer."""

        def entering(name: str) -> Any:
            def hook(module: nn.Module, args: Any) -> None:
                if ledger.moment.startswith("forward"):  # not in the recomputation of a checkpointed layer
                    ledger.moment = f"forward, {name}"

            return hook

        def leaving(name: str, after: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if not ledger.moment.startswith("forward"):
                    return
                ledger.moment = f"forward, {after}"
                first = output if isinstance(output, Tensor) else output[0]
                first.register_hook(lambda gradient: setattr(ledger, "moment", f"backward, {name}"))

            return hook

        last = len(self.layers) - 1
        with ExitStack() as hooks:
            for i, layer in enumerate(self.layers):
                name = "first" if i == 0 else "last" if i == last else "between"
                hooks.enter_context(layer.register_forward_pre_hook(entering(name)))
                hooks.enter_context(layer.register_forward_hook(leaving(name, "after" if i == last else "between")))
            yield


class Traced:
    """A model and its adapter at full depth: what is resident (`counts`), and what a step uses (`use`)."""

    def __init__(self, config: Any, setting: Setting, depths: Sequence[int] | None = None) -> None:
        """depths: to trace; `depths_of` if not given, which takes a second for a large model."""
        self.depth = depth_of(config)
        self.setting = setting
        self.stand_ins = {d: StandIn(config, d, setting) for d in depths or depths_of(config)}
        self.counts = Counts(*self._at_full_depth([stand_in.counts for stand_in in self.stand_ins.values()]))
        self._known: dict[tuple[int, int, bool], Use] = {}

    def use(self, batch: int, length: int, *, accumulating: bool = True) -> Use:
        """Of one step on [batch, length] tokens, all of them real and with loss."""
        key = batch, length, accumulating
        if key not in self._known:
            steps = [s.step(batch, length, accumulating=accumulating) for s in self.stand_ins.values()]
            names = steps[0].keys() & steps[-1].keys() - {"forward, between", "backward, between"}
            found = dict(zip(names, self._at_full_depth([[s[name] for name in names] for s in steps]), strict=True))
            kept = found.pop("kept")
            self._known[key] = Use(kept, max(found.values()))
        return self._known[key]

    def _at_full_depth(self, rows: list[Any]) -> list[int]:
        """From one row of figures per traced depth, each figure linear in the depth."""
        if len(rows) == 1:
            return list(rows[0])
        (few, many), (low, high) = DEPTHS, rows
        return [a + (b - a) * (self.depth - few) // (many - few) for a, b in zip(low, high, strict=True)]


def adapt(base: Any, setting: Setting, task: str) -> Any:
    """The adapter put on ``base``, real or on meta: PEFT's LoRA or DoRA of rank 2r, or Dual LoRA, its gate open."""
    common: dict[str, Any] = {"target_modules": setting.targets, "task_type": task}
    if setting.parameters:
        common["target_parameters"] = setting.parameters
    options = {}
    if setting.method == "duallora":
        config: Any = DualLoraConfig(r=setting.rank, init_weights=False, init_seed=0, **common)
    elif setting.method in METHODS:
        config = peft.LoraConfig(r=2 * setting.rank, use_dora=setting.method == "dora", **common)
        options = {"low_cpu_mem_usage": next(base.parameters()).is_meta}
    else:
        raise ConfigError(f"method {setting.method!r}: expected one of {', '.join(METHODS)}")
    try:
        adapted = peft.get_peft_model(base, config, **options)
    except ValueError as error:  # no such module, or one of a kind that takes no adapter
        raise ConfigError(f"--target-modules {setting.targets}: {' '.join(str(error).split())[:300]}") from error
    if setting.checkpointing:
        # The state of the random generator, which is real, cannot be kept among fake tensors; nothing is drawn from it here.
        kept = {"use_reentrant": False, "preserve_rng_state": False}
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kept)
    return adapted


def depth_of(config: Any) -> int:
    """Layers of the model; ConfigError where the config does not say, or says two numbers (an encoder and a decoder)."""
    found = next((getattr(config, name) for name in _DEPTH_NAMES if hasattr(config, name)), None)
    if not isinstance(found, int) or found < 1 or getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"model type {config.model_type!r}: expected a decoder that generates, or an encoder that classifies, with "
            "num_hidden_layers in its config"
        )
    return found


def at_depth(config: Any, depth: int) -> Any:
    """A copy of the config with that many layers."""
    config = copy.deepcopy(config)
    for name in _DEPTH_NAMES:
        if hasattr(config, name):
            setattr(config, name, depth)
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:depth]
    return config


def depths_of(config: Any) -> tuple[int, ...]:
    """Two small depths where the layers are of one size, which counting at full depth shows; else the model's own."""

    def parameters(depth: int) -> int:
        with _quiet(), torch.device("meta"):
            return sum(p.numel() for p in build(at_depth(config, depth), Setting("lora")).parameters())

    (few, many), full = DEPTHS, depth_of(config)
    if full <= many:
        return (full,)
    low, high = parameters(few), parameters(many)
    alike = (high - low) * (full - few) == (parameters(full) - low) * (many - few)
    return DEPTHS if alike else (full,)


def build(config: Any, setting: Setting) -> Any:
    """The model of that config, frozen, on the default device."""
    factory: Any = AutoModelForSequenceClassification if is_encoder(config) else AutoModelForCausalLM
    options = {"attn_implementation": setting.attention} if setting.attention else {}
    try:
        return factory.from_config(config, dtype=setting.dtype, **options).requires_grad_(False)
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"no model can be built from this config ({config.model_type}): {first_line(error)}"
        ) from error


def _layers(model: nn.Module, depth: int) -> list[nn.Module]:
    """The model's list of layers: the outermost ModuleList of that length."""
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no list of {depth} layers to count by")
    return list(found[0])


def _count(model: nn.Module, layers: list[nn.Module], inside: set[int]) -> Counts:
    def size(tensors: Any) -> tuple[int, int]:
        unique = {id(t): t for t in tensors}.values()
        return sum(t.numel() for t in unique), sum(t.numel() * t.element_size() for t in unique)

    own = [(name, p) for name, p in model.named_parameters() if "lora_" in name]
    trained = [p for p in model.parameters() if p.requires_grad]
    linear: list[Any] = [m.weight for m in model.modules() if id(m) in inside]
    tuned = {id(p) for p in trained}
    buffers = list(model.buffers())
    base, base_bytes = size([p for p in model.parameters() if id(p) not in tuned])
    number, linear_bytes = size(linear)
    layer_bytes = max(size([*layer.parameters(), *layer.buffers()])[1] for layer in layers)
    total = size([*model.parameters(), *buffers])[1]
    return Counts(
        base, base_bytes + size(buffers)[1], number, linear_bytes, sum(w.shape[0] for w in linear),
        size(p for _, p in own)[0], *size(trained),
        layer_bytes, total - sum(size([*layer.parameters(), *layer.buffers()])[1] for layer in layers),
    )  # fmt: skip


def _become_fake(model: nn.Module) -> None:
    """Puts a fake tensor in the place of each parameter and buffer; call it under the mode. Ties stay tied."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = empty
        return made[id(tensor)]

    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in holders:
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = fake(tensor)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Dequantize(torch.autograd.Function):
    """y = x W^T with W [out, in] made for the product and dropped, forward and backward, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        return F.linear(x, torch.empty_like(packed))

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> Any:  # type: ignore[override]
        (packed,) = ctx.saved_tensors
        return dY @ torch.empty_like(packed), None


def _dequantized(layer: Any) -> Callable[[Tensor], Tensor]:
    """The forward of a linear layer whose weight is packed; its bias is not."""

    def forward(x: Tensor) -> Tensor:
        y = _Dequantize.apply(x, layer.weight.T if isinstance(layer, Conv1D) else layer.weight)
        return y if layer.bias is None else y + layer.bias

    return forward


@contextmanager
def _quiet() -> Iterator[None]:
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
