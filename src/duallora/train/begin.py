"""A run that begins where another one ended, under a head of its own (GLUE: MRPC, RTE and STS-B begin at MNLI's end)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

from duallora import methods
from duallora.errors import ConfigError, IntegrityError
from duallora.methods import starts
from duallora.store import adapters, checkpoint
from duallora.store.models import weights_fingerprint
from duallora.tasks.task import Kind

# Fields of an adapter's configuration that change how it is trained or named, and not what its tensors compute; where it
# sits and with which ranks the tensors' names and shapes say.
FREE = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_version", "revision", "task_type",
    "bias", "exclude_modules", "layers_pattern", "layers_to_transform", "r", "r1", "r2", "rank_pattern", "target_modules",
    "target_parameters",
    "dropout", "duallora_dropout", "lora_dropout", "module_dropout", "vera_dropout", "randlora_dropout", "hira_dropout",
    "backend", "direction_init_std", "forward", "gradient_tokens", "init", "init_seed", "init_std",
    "init_weights", "init_lora_weights", "ste_clip", "warmup_steps",
})  # fmt: skip


def from_run(method: methods.Adapted, source: str, kind: Kind, base: str) -> str:
    """Loads what the run in the folder ``source`` trained into ``method``'s model, all but a head; its fingerprint.

    ``base`` is the fingerprint of the base model's weights.

    Raises:
        ConfigError: another method, another setting that its tensors depend on, other ranks or other modules.
        IntegrityError: a damaged file, or one trained on other base weights.
    """
    folder = adapters.find(source)
    if folder is None:
        raise ConfigError(
            f"adapter.init_from={source}: expected the folder of a run or an adapter, and no such folder is here (nor is it an "
            "adapter of the hub)"
        )
    trained_on = adapters.read_sidecar(folder).get("base", {}).get("fingerprint")
    if trained_on and trained_on != base:
        raise IntegrityError(
            f"adapter.init_from={source} was trained on a base model with the weights {trained_on[:16]}..., but this run's "
            f"has {base[:16]}...; begin with an adapter of the same base model"
        )
    if method.method.whole:
        return _from_model(method, source, kind)
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"adapter.init_from={source} is a whole model, and {method.method.title} trains an adapter")
    if method.method.no_resume:
        raise ConfigError(
            f"adapter.init_from={source}: {method.method.title} cannot go on from its file: {method.method.no_resume}"
        )
    stored = adapters.check_adapter(folder)
    model: PeftModel = method.model
    moved = "first" in method.state  # its base is not the one that the adapter's file is for
    own: Mapping[str, torch.Tensor]
    config: PeftConfig
    if moved:
        config, own = starts.for_the_base(method)
    else:
        config, own = model.peft_config["default"], get_peft_model_state_dict(model, save_embedding_layers=False)
    _compare(adapters.read_config(folder), config, source)
    heads = [] if kind == "generate" else adapters.head_modules(model.get_base_model())
    wanted = _without(_shapes(own), heads)
    _same_tensors(_without(stored, heads), wanted, source)
    tensors = load_peft_weights(str(folder), device="cpu")
    found = {**own, **{name: tensors[name] for name in wanted}}
    set_peft_model_state_dict(model, starts.split(found)[0] if moved else found)
    return checkpoint.file_record(folder / adapters.WEIGHTS)["sha256"]


def _from_model(method: methods.Adapted, source: str, kind: Kind) -> str:
    model = method.model
    started, _ = adapters.load_adapter(source, kind)
    if isinstance(started, PeftModel):
        raise ConfigError(f"adapter.init_from={source} is an adapter, and {method.method.title} trains the whole model")
    heads = [] if kind == "generate" else adapters.head_modules(model)
    found = _without(started.state_dict(), heads)
    wanted = _without(model.state_dict(), heads)
    _same_tensors(_shapes(found), _shapes(wanted), source)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])
    return weights_fingerprint(started)


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _without(state: Mapping[str, Any], heads: Iterable[str]) -> dict[str, Any]:
    """``state`` without the tensors of the top-level modules ``heads``, with or without PEFT's prefix."""
    prefixes = tuple(f"{prefix}{head}." for head in heads for prefix in ("", "base_model.model."))
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


def _compare(theirs: PeftConfig, ours: PeftConfig, source: str) -> None:
    before, after = _fields(theirs), _fields(ours)
    for name in ("peft_type", *sorted({*before, *after} - {"peft_type"})):
        old, new = before.get(name), after.get(name)
        if old != new:
            raise ConfigError(
                f"adapter.init_from={source} has {name} = {old!r}, but this run has {new!r}: its tensors would compute something "
                "else. Begin with an adapter of the same method and settings, or set them as there"
            )


def _fields(config: PeftConfig) -> dict[str, Any]:
    fields = {name: value for name, value in config.to_dict().items() if name not in FREE}
    if "warmup" in fields:  # at its end a ramp is as good as none
        fields["warmup"] = "residual" if fields["warmup"] == "residual" else "ramp"
    fields["peft_type"] = getattr(config.peft_type, "value", config.peft_type)
    return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}


def _same_tensors(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], source: str) -> None:
    for what, names in (("lacks", wanted.keys() - found.keys()), ("also holds", found.keys() - wanted.keys())):
        if names:
            raise ConfigError(
                f"adapter.init_from={source} {what} {len(names)} tensors of this run's {len(wanted)} (first: {min(names)}): the "
                "two adapt other modules, or train others beside them. Set adapter.target_modules as there"
            )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ConfigError(
                f"adapter.init_from={source}: {name} is {list(found[name])}, expected {list(shape)}. Set adapter.r as there"
            )
