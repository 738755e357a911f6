"""The recipe's method on a model: Dual LoRA's config or another method's spec, and what the saved weights of it are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_model as load_model_weights

import duallora
from duallora import methods
from duallora.config.recipe import RUNS_OWN, Recipe
from duallora.errors import ConfigError, IntegrityError, first_line
from duallora.methods import starts
from duallora.store import adapters
from duallora.tasks.task import Kind

WHOLE_MODEL = "model.safetensors"  # of a checkpoint, where the method trains the model's own weights


def adapt(model: torch.nn.Module, recipe: Recipe, kind: Kind, lr_warmup: int) -> Any:
    """``model`` with the recipe's adapter on it, its factors in float32; a new head is trained in full.

    A method that trains the weights themselves gives the model back, all of it trained.
    """
    return put(model, recipe, kind, lr_warmup).model


def put(
    model: torch.nn.Module,
    recipe: Recipe,
    kind: Kind,
    lr_warmup: int,
    *,
    batches: Callable[[int], Iterable[Mapping[str, Any]]] | None = None,
    checkpoint: Path | None = None,
) -> methods.Adapted:
    """`adapt`, with what the method says of its optimizer.

    ``batches(n)`` are n rows of data for a start that looks at some; without them, and without the ``checkpoint`` of a run
    that is resumed, such an adapter is given the usual start: its shapes are what they will be.
    """
    name = recipe.adapter.method
    method = methods.get(name)
    fields = recipe.adapter.model_dump(exclude=set(RUNS_OWN))
    if fields.get("warmup_steps") == "auto":
        fields["warmup_steps"] = max(1, lr_warmup) if recipe.adapter.init_from is None else 0
    if fields.get("init", "").startswith("gradient"):
        fields["init"] = "gaussian"  # what a start from the gradient is put over
    present = [place for place, _ in model.named_modules()]
    for module in fields["modules_to_save"] or ():
        if not any(place.endswith(module) for place in present):  # PEFT leaves out what is not there, and says nothing
            last = sorted({place.rpartition(".")[2] for place in present} - {""})
            raise ConfigError(
                f"adapter.modules_to_save holds {module!r}, but no module of {recipe.model.name} ends so; expected the end of a "
                f"name, such as {', '.join(name for name in last if not name.isdigit())}"
            )
    _check_tokens(fields.get("trainable_token_indices"), model)
    if kind != "generate" and not method.whole:
        heads = adapters.head_modules(model)
        # PEFT adds "classifier" and "score" by itself; DeBERTa's pooler, new as well, it forgets.
        own = {*(fields["modules_to_save"] or ()), *heads} - {"classifier", "score"}
        fields["modules_to_save"] = sorted(own) or None
        if fields["exclude_modules"] is None and fields["target_modules"] in (None, "all-linear"):
            fields["exclude_modules"] = rf"({'|'.join(heads)})(\..*)?"
    task_type = "CAUSAL_LM" if kind == "generate" else "SEQ_CLS"
    if name == "duallora":
        config = duallora.DualLoraConfig(**fields, task_type=task_type, revision=recipe.model.revision)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(f"adapter.target_modules={recipe.adapter.target_modules!r}: {error}") from error
        options = {"direction_lr_ratio": recipe.train.direction_lr_ratio}
        found = methods.Adapted(adapted, method, methods.MethodSpec(name, options=options))
    else:
        spec = other(recipe, method, fields, task_type)
        count = methods.rows_wanted(method, spec)
        if count and checkpoint is None and batches is None:
            spec = starts.without_data(spec)
        data = batches(count) if count and checkpoint is None and batches else None
        found = methods.apply(model, spec, batches=data, checkpoint=checkpoint)
    if method.whole:
        return found
    config = found.model.peft_config["default"]
    # The name the user gave, not the local folder it resolved to: the adapter may be loaded on another machine.
    config.base_model_name_or_path, config.revision = recipe.model.name, recipe.model.revision
    return found


def _check_tokens(tokens: list[int] | dict[str, list[int]] | None, model: Any) -> None:
    """ConfigError for a token that no row of the embeddings is for."""
    known = model.get_input_embeddings().weight.shape[0]
    named = [token for held in tokens.values() for token in held] if isinstance(tokens, dict) else tokens or []
    if above := [token for token in named if token >= known]:
        raise ConfigError(
            f"adapter.trainable_token_indices holds {above[0]}, and the model has {known} tokens: add yours to its tokenizer, "
            "model.resize_token_embeddings(len(tokenizer)), save both, and train that folder"
        )


def other(recipe: Recipe, method: methods.Method, fields: dict[str, Any], task_type: str) -> methods.MethodSpec:
    """The recipe's settings as those of another method than Dual LoRA.

    ``fields`` are the adapter section's, to which a new head may have been added.

    Raises:
        ConfigError: one that the method does not take.
    """
    values = {name: fields[name] for name in ("r", "alpha", "target_modules")} | {"dropout": fields["duallora_dropout"]}
    has_modules = "target_modules" in method.defaults
    if values["target_modules"] is None and has_modules and not method.rule:
        values["target_modules"] = "all-linear"
    options = dict(recipe.adapter.options)
    for name in ("exclude_modules", "modules_to_save", "layers_to_transform"):
        given = getattr(recipe.adapter, name)
        if given is not None and not has_modules:
            raise ConfigError(
                f"adapter.{name}={given!r}: {method.title} has no such setting; it takes "
                f"{', '.join(method.defaults) or 'no setting'}"
            )
        if has_modules and fields[name] is not None:
            options[name] = fields[name]
    spec = methods.MethodSpec(method.name, task_type=task_type, options=options, **values)
    return methods.with_defaults(method, spec)


def check_method(recipe: Recipe, steps: int | None) -> None:
    """ConfigError where the recipe, or so many steps of it (None: not known yet), does not suit its method."""
    method = methods.get(recipe.adapter.method)
    if method.name == "duallora":
        return
    spec = other(recipe, method, recipe.adapter.model_dump(), "CAUSAL_LM")
    if recipe.train.label_smoothing and method.rule and getattr(method.rule, "reads_prompt", False):
        raise ConfigError(
            f"train.label_smoothing={recipe.train.label_smoothing} takes the labels from the model, and {method.title} finds the "
            "prompt's tokens by them: expected 0"
        )
    if method.check is not None:
        method.check(spec, recipe, steps)


def parameter_counts(model: Any) -> tuple[int, int]:
    """(trained, all) weights of a model, with or without an adapter."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    return sum(weight.numel() for weight in methods.trained(model)), model.num_parameters()


def load_weights(method: methods.Adapted, folder: Path) -> None:
    """The trained weights of a checkpoint into the model; IntegrityError where they are another model's."""
    model = method.model
    if method.method.restore is not None:
        method.method.restore(method, folder)
        return
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        return
    try:
        load_model_weights(model, folder / WHOLE_MODEL)
    except RuntimeError as error:  # names or shapes
        raise IntegrityError(f"{folder / WHOLE_MODEL} does not fit the model: {first_line(error)}") from error


def gate(model: Any) -> float:
    """Dual LoRA's gate; 1 for methods that have none."""
    return duallora.gate(model) if has_gate(model) else 1.0


def has_gate(model: Any) -> bool:
    """Whether the method is one with a gate to speak of."""
    return any(hasattr(module, "duallora_step") for module in model.modules())
