"""LoRA's starts from the weights and from data, by PEFT's code, saved so that the adapter fits the untouched base model.

* PiSSA (arXiv 2404.02948): the r leading singular triples of W0. OLoRA (arXiv 2406.01775): the leading columns of its QR.
* CorDA (arXiv 2406.05223): components of W0 C, C = E[x x^T] over the rows, with ``corda_method`` "ipm" (the leading, rows of the
  task) or "kpm" (the least, so that what question-answering rows ask for is kept: a run names them in ``calibration_data``).
* LoRA-GA (arXiv 2407.05000): singular vectors of G = dL/dW0 over the rows. PEFT multiplies B by G's singular values, which
  the paper does not; ``lora_ga_config={scale: paper}`` is the paper's, A and B both singular vectors times
  out^(1/4) / sqrt(``stable_gamma``).
* EVA (arXiv 2410.07170): A = leading right singular vectors of the layer's inputs, B = 0, ranks shared out among the layers by
  what they explain (``eva_config={rho: 1}``: the same rank for all).

All but EVA start with B0 A0 != 0 and take it off the frozen weight:

    W_res = W0 - s B0 A0        y = W_res x + s B A x        s = alpha / r

A and B alone belong to W_res, which no file holds. What is saved is the same function on W0,

    s (B A - B0 A0) = s [B, -B0] [A; A0],

a LoRA of rank 2 r, from which a resumed run reads A0 and B0 again. In bfloat16 W_res is rounded, so on W0 the output
differs by that rounding; in float32 by the order of sums.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import load_peft_weights, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from duallora.errors import ConfigError
from duallora.methods import Adapted, MethodSpec
from duallora.tuner.quantized import storage

MOVING = ("pissa", "olora", "corda", "lora_ga")  # they take their start off the frozen weights
FROM_DATA = ("corda", "eva", "lora_ga")
ROWS = 256  # CorDA's paper
PASSES = 100  # over the rows, in which EVA's directions must have settled

SETTINGS = ("calibration", "calibration_data", "corda_method", "corda_config", "eva_config", "lora_ga_config")
_FACTORS = ("lora_A.weight", "lora_B.weight")

Batches = Iterable[Mapping[str, Any]]


def name_of(init: Any) -> str:
    """The start that ``init_lora_weights`` names, without PiSSA's count of iterations; "" where it is a plain one."""
    name = init.lower() if isinstance(init, str) else ""
    return "pissa" if name.startswith("pissa") else name if name in (*MOVING, *FROM_DATA) else ""


def calibration(spec: MethodSpec) -> int:
    """How many rows of data the start looks at; 0 where it needs none.

    Raises:
        ConfigError: ``options["calibration"]`` is no count, or given to a start that looks at no data.
    """
    start = name_of(spec.options.get("init_lora_weights"))
    rows = spec.options.get("calibration")
    if start in FROM_DATA:
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise ConfigError(f"calibration={rows!r}: expected a count of rows >= 1.")
        return rows or ROWS
    if rows is not None:
        raise ConfigError(f"calibration={rows!r} is for starts from data: init_lora_weights {', '.join(FROM_DATA)}.")
    return 0


def check(spec: MethodSpec, recipe: Any, steps: int | None) -> None:
    """ConfigError unless CorDA's mode and the rows it looks at belong together, as its authors pair them."""
    options = spec.options
    mode = {"corda_method": options.get("corda_method", "ipm"), **(options.get("corda_config") or {})}["corda_method"]
    keeps = name_of(options.get("init_lora_weights")) == "corda" and mode == "kpm"
    source = options.get("calibration_data")
    if keeps and source is None:
        raise ConfigError(
            "corda_method='kpm' keeps the knowledge that question-answering rows ask for, and this run's own rows ask for its "
            "task: expected calibration_data, a file of such rows (adapter.options={corda_method: kpm, calibration_data: "
            "nq.jsonl}), or corda_method: ipm"
        )
    if source is not None and not keeps:
        raise ConfigError(
            f"calibration_data={source!r} is for corda_method: kpm; every other start looks at the run's rows"
        )


def without_data(spec: MethodSpec) -> MethodSpec:
    """``spec`` with LoRA's usual start: tensors of the same shapes (EVA: before it shares the ranks out), and no look at data."""
    plain = {name: value for name, value in spec.options.items() if name not in SETTINGS}
    return replace(spec, options={**plain, "init_lora_weights": True})


def config_of(fields: Mapping[str, Any]) -> Any:
    """LoraConfig, with ``corda_config``, ``eva_config`` and ``lora_ga_config`` as dictionaries and ``corda_method`` by itself.

    Raises:
        ConfigError: this PEFT has no such start, or it leaves a base behind that no adapter can be saved for.
    """
    fields = {name: value for name, value in fields.items() if name not in ("calibration", "calibration_data")}
    init = fields.get("init_lora_weights")
    start = name_of(init)
    if isinstance(init, str) and init.lower().startswith("loftq"):
        raise ConfigError(
            f"init_lora_weights={init!r} replaces the base's weights, and its adapter fits no other: use pissa, or a quantized base"
        )
    if start in FROM_DATA:
        own = dict(fields.pop(f"{start}_config", None) or {})
        if start == "corda":
            own.setdefault("corda_method", fields.pop("corda_method", "ipm"))
        kind = {"corda": "CordaConfig", "eva": "EvaConfig", "lora_ga": "LoraGAConfig"}[start]
        if not hasattr(peft.tuners.lora.config, kind):
            raise ConfigError(f"PEFT {peft.__version__} has no {kind}: pip install -U peft")
        fields[f"{start}_config"] = getattr(peft.tuners.lora.config, kind)(**own)
    return LoraConfig(**fields)


def attach(model: nn.Module, config: Any, batches: Batches | None) -> PeftModel:
    """LoRA on ``model``, started as the LoraConfig's ``init_lora_weights`` says; ``batches`` are what the model takes, with labels."""
    start = name_of(config.init_lora_weights)
    batches = list(batches or ()) if start in FROM_DATA else []
    if start not in MOVING:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage=False")
            adapted = get_peft_model(model, config)  # type: ignore[arg-type]
        if start == "eva":
            _start_eva(adapted, batches)
        return adapted
    _maybe_include_all_linear_layers(config, model)  # PEFT does so only after it has looked at the data
    _check_layers(model, config, 2 if start == "lora_ga" else 1)
    paper = start == "lora_ga" and config.lora_ga_config.scale == "paper"
    if start == "corda":
        _look_corda(model, config, batches)
    elif start == "lora_ga":
        config.lora_ga_config.scale = "unit" if paper else config.lora_ga_config.scale
        _look_lora_ga(model, config, batches)
    W0 = {name: module.weight.detach().cpu().clone() for name, module in _targets(model, config)}
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    for name, layer in _layers(adapted):
        if hasattr(layer.get_base_layer(), "eigens"):
            del layer.get_base_layer().eigens  # as large as the adapter
        if paper:
            _scale_as_in_the_paper(layer, config.lora_ga_config.stable_gamma)
        _take_off(layer, W0.pop(name))
    if paper:
        config.lora_ga_config.scale = "paper"
    _keep_start(adapted)
    return adapted


def resume(model: nn.Module, config: Any, folder: Path) -> PeftModel:
    """What :func:`attach` gave in the run that left ``folder`` (a checkpoint of :func:`save`), without a look at the data."""
    init = config.init_lora_weights
    start = name_of(init)
    if start == "eva":  # which layers, and of which ranks
        saved = LoraConfig.from_pretrained(str(folder))
        for name in ("target_modules", "rank_pattern", "alpha_pattern"):
            setattr(config, name, getattr(saved, name))
    if start:
        config.init_lora_weights = True
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    config.init_lora_weights = init
    if start in MOVING:
        first = split(load_peft_weights(str(folder), device="cpu"))[1]
        own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        for name, value in own.items():
            if name.endswith(_FACTORS) and (name not in first or first[name].shape != value.shape):
                raise ConfigError(
                    f"{folder} holds no start for {name} {list(value.shape)}: expected the adapter of a run with the same "
                    f"init_lora_weights={init!r}, modules and ranks"
                )
        set_peft_model_state_dict(adapted, {**own, **first})  # own: a head or other modules trained in full
        for _, layer in _layers(adapted):
            _take_off(layer, layer.get_base_layer().weight)
        _keep_start(adapted)
    return adapted


def save(adapted: Adapted, folder: Path) -> None:
    """PEFT's form of the adapter, for the untouched base model."""
    if "first" not in adapted.state:
        adapted.model.save_pretrained(str(folder), save_embedding_layers=False)
        return
    config, tensors = for_the_base(adapted)
    config.save_pretrained(str(folder))
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_file(contiguous, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})


def for_the_base(adapted: Adapted) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and tensors of the LoRA of rank 2 r that does on W0 what the factors do on W_res."""
    model = adapted.model
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: value.detach().cpu() for name, value in state.items()}
    for name, first in adapted.state["first"].items():
        down = ".lora_A." in name
        tensors[name] = torch.cat([tensors[name], first if down else -first], dim=0 if down else 1)
    config = copy.deepcopy(model.peft_config["default"])
    # s = alpha / r, or alpha / sqrt(r), stays what it is at rank 2 r.
    more = math.sqrt(2) if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, more * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: more * alpha for name, alpha in config.alpha_pattern.items()}
    config.init_lora_weights, config.inference_mode = True, True
    config.corda_config = None
    if hasattr(config, "lora_ga_config"):
        config.lora_ga_config = None
    return config, tensors


def restore(adapted: Adapted, folder: Path) -> None:
    """The trained tensors of :func:`save`'s folder into the model that :func:`attach` or :func:`resume` gave."""
    tensors = load_peft_weights(str(folder), device="cpu")
    if "first" in adapted.state:
        tensors = split(tensors)[0]
    set_peft_model_state_dict(adapted.model, tensors)


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the trained tensors, A0 and B0) of what :func:`save` has put together."""
    trained, first = dict(tensors), {}
    for name, value in tensors.items():
        if name.endswith(_FACTORS):
            down = name.endswith("lora_A.weight")
            own, start = value.chunk(2, dim=0 if down else 1)
            trained[name], first[name] = own.contiguous(), start.contiguous() if down else -start
    return trained, first


def _keep_start(adapted: PeftModel) -> None:
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    first = {name: value.detach().cpu().clone() for name, value in tensors.items() if name.endswith(_FACTORS)}
    object.__setattr__(adapted, "_method_state", {"first": first})


def _take_off(layer: Any, W0: Tensor) -> None:
    """The layer's frozen weight becomes W0 - s B A, rounded once: on the CPU, so that a resumed run finds the same bits."""
    A, B = (factor["default"].weight.data.float().cpu() for factor in (layer.lora_A, layer.lora_B))
    delta = layer.scaling["default"] * (B @ A)  # [out, in]
    weight = layer.get_base_layer().weight
    weight.data = (W0.float().cpu() - (delta.T if layer.fan_in_fan_out else delta)).to(weight.device, W0.dtype)


def _targets(model: nn.Module, config: LoraConfig) -> Iterator[tuple[str, Any]]:
    """(name, module) of the layers that PEFT is going to adapt."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and LoraModel._check_target_module_exists(config, name):
            yield name, module


def _check_layers(model: nn.Module, config: Any, pairs: int) -> None:
    """ConfigError where PEFT cannot start a layer, or would give it other shapes: with fewer than ``pairs`` times r
    singular triples.
    """
    for name, module in _targets(model, config):
        if storage(module):
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r} takes its start off the weights, and those of {name} are "
                "quantized: load the base without, or use eva"
            )
        if name_of(config.init_lora_weights) == "olora" and isinstance(module, Conv1D):  # PEFT's is of the transpose
            raise ConfigError(f"olora does not start {name}, a Conv1D (GPT-2's [in, out]): use pissa")
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
        if pairs * rank > min(module.weight.shape):
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r} with r={rank} takes {pairs * rank} singular directions, and "
                f"{name} [{', '.join(map(str, module.weight.shape))}] has {min(module.weight.shape)}: lower r, or give this "
                "layer another in rank_pattern"
            )


def _layers(adapted: PeftModel) -> Iterator[tuple[str, Any]]:
    """(name in the base model, layer) of the adapted layers."""
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            yield name, module


# -- a look at the data -----------------------------------------------------------------------------------------------


def _look_corda(model: nn.Module, config: LoraConfig, batches: Batches) -> None:
    try:
        from peft.tuners.lora.corda import preprocess_corda
    except ImportError as error:  # PEFT does not install what this file of its own needs
        raise ConfigError(f"PEFT's CorDA cannot be imported ({error}): pip install attrs") from error

    @torch.no_grad()
    def run() -> None:
        for batch in batches:
            for row in _rows(batch):  # PEFT's hook reads one text per forward
                model(**row)

    def every_token(name: str, module: nn.Module, args: Any) -> None:
        if args[0].ndim < 3:
            raise ConfigError(
                f"CorDA takes the covariance over a text's tokens, and {name} reads one of them (a pooler or head): expected layers "
                "that read every token; name it in exclude_modules or modules_to_save"
            )

    training = model.training
    hooks = [m.register_forward_pre_hook(functools.partial(every_token, name)) for name, m in _targets(model, config)]
    preprocess_corda(model.eval(), config, run_model=run)
    for hook in hooks:
        hook.remove()
    model.train(training)


def _rows(batch: Any) -> Iterator[dict[str, Tensor]]:
    """Each row of a batch as a batch of its own, without its padding; labels are left out."""
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim >= 1 and k != "labels"}
    mask = tensors.get("attention_mask")
    for i in range(len(next(iter(tensors.values())))):
        real = None if mask is None else mask[i].bool()
        yield {
            k: (v[i] if real is None or v[i].shape[:1] != real.shape else v[i][real])[None] for k, v in tensors.items()
        }


def _look_lora_ga(model: Any, config: LoraConfig, batches: Batches) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    def run() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    with warnings.catch_warnings():
        # Of the hook by which PEFT counts backwards, on the first layer.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(model, config, run)


def _scale_as_in_the_paper(layer: Any, gamma: float) -> None:
    """A and B as singular vectors times out^(1/4) / sqrt(gamma) (LoRA-GA, section 3.3); PEFT's "unit" gives A and U diag(S)."""
    A, B = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    B /= B.norm(dim=0, keepdim=True).clamp(min=torch.finfo(B.dtype).tiny)
    scale = B.shape[0] ** 0.25 / math.sqrt(gamma)
    A *= scale
    B *= scale


def _start_eva(adapted: PeftModel, batches: list[Mapping[str, Any]]) -> None:
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    config: Any = adapted.peft_config["default"]
    wanted = round(max(config.r, *config.rank_pattern.values(), 0) * config.eva_config.rho)
    narrowest = min(layer.in_features for _, layer in _layers(adapted))
    if wanted > narrowest:
        raise ConfigError(
            f"EVA looks for {wanted} directions (r times rho), and a layer has {narrowest} inputs: lower r or eva_config.rho"
        )
    read = [_for_eva(batch, config) for batch in batches]
    enough = [batch for batch, tokens in read if tokens >= wanted]
    if not enough:  # PEFT would look at the same batches for ever
        most = max((tokens for _, tokens in read), default=0)
        raise ConfigError(
            f"EVA needs {wanted} tokens in a batch (r times rho), and the largest of {len(read)} has {most}: raise the batch "
            "size, or lower r or eva_config.rho"
        )
    forward = _counted(PASSES * len(enough))
    initialize_lora_eva_weights(
        adapted, enough, forward_fn=forward, gather_distributed_inputs=False, show_progress_bar=False
    )
    for _, layer in _layers(adapted):  # layers whose rank changed have the base's dtype
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            factor.float()


def _for_eva(batch: Mapping[str, Any], config: Any) -> tuple[dict[str, Any], int]:
    """The batch without labels that are no tokens, and on how many tokens the directions are taken."""
    batch = dict(batch)
    if "labels" in batch and batch["labels"].shape != batch["input_ids"].shape:
        del batch["labels"]
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if config.eva_config.use_label_mask and "labels" in batch:
        mask = mask & (batch["labels"] != config.eva_config.label_mask_value)
    return batch, int(mask.sum())


def _counted(most: int) -> Callable[[Any, Mapping[str, Any]], Any]:
    left = iter(range(most))

    def forward(model: Any, inputs: Mapping[str, Any]) -> Any:
        if next(left, None) is None:
            raise ConfigError(
                f"EVA's directions have not settled in {PASSES} passes: use more rows or a lower eva_config.tau"
            )
        return model(**inputs)

    return forward
