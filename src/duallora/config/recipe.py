"""The schema of a training run's configuration: every setting, its default, range and meaning.

A recipe has five sections (model, adapter, data, train, eval) and the top-level values seed, output and plugins.
`duallora.config.load` reads one. Nothing heavy is imported: a mistake in a recipe is answered before torch is loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import types
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, create_model, model_validator

from duallora.config import Dtype
from duallora.config.yaml import show, yaml_value
from duallora.core.settings import MAX_INT, RANKS, Settings, contradictions, hints
from duallora.core.settings import share_of as share_of
from duallora.errors import ConfigError

Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]  # no control characters: names and paths
Count = Annotated[int, Field(ge=1, le=MAX_INT)]
Positive = Annotated[float, Field(gt=0)]
Quantization = Literal["bnb-4bit", "bnb-8bit", "torchao-int8"]


def setting(default: Any, description: str) -> Any:
    """A field with its one-line description; mutable defaults are copied for each recipe."""
    if isinstance(default, (list, dict)):
        return Field(default_factory=lambda: type(default)(default), description=description)
    return Field(default=default, description=description)


class Section(BaseModel):
    """Frozen, strictly typed (an int passes for a float and nothing else converts), no unknown keys, no NaN or inf."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model."""

    name: Text = setting("builtin:smollm2-135m", "Hub id, local folder, builtin:smollm2-135m or builtin:minilm-l6.")
    dtype: Dtype = setting("auto", "Type of the base weights; auto keeps the checkpoint's own (float32 on CPU).")
    revision: Text | None = setting(None, "Branch, tag or commit of a hub model; null is its main branch.")
    quantization: Quantization | None = setting(
        None, "How linear weights are stored: bnb-4bit (QLoRA's nf4), bnb-8bit, torchao-int8; null as the checkpoint."
    )


# Settings of the run and no fields of DualLoraConfig.
RUNS_OWN = ("method", "init_from", "init_batches")


def _checked(hint: Any) -> Any:
    """A type of core/settings.py as pydantic's: its ranges, plain text for names, no empty list."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return Union[tuple(_checked(option) for option in arguments)]  # noqa: UP007
    if origin is Annotated:
        return Annotated[arguments[0], Field(**{k: v for k, v in arguments[1]._asdict().items() if v is not None})]
    if origin is tuple:
        return Annotated[list[_checked(arguments[0])], Field(min_length=len(arguments), max_length=len(arguments))]  # type: ignore[misc]
    if origin is list:
        return Annotated[list[_checked(arguments[0])], Field(min_length=1)]  # type: ignore[misc]
    if origin is dict:
        return dict[Text, _checked(arguments[1])]  # type: ignore[misc]
    return Text if hint is str else hint


_MEANINGS = {field.name: field.metadata["help"] for field in dataclasses.fields(Settings)}


def _of_dual_lora() -> dict[str, Any]:
    """The settings of DualLoraConfig; two have defaults of a run's own."""
    opens = "Optimizer steps until the gate is 1; auto is the learning rate's warm-up (paper: a warm-up)."
    found = {}
    for field in dataclasses.fields(Settings):
        default = {} if field.default is dataclasses.MISSING else field.default
        found[field.name] = (_checked(hints()[field.name]), setting(default, field.metadata["help"]))
    found["target_modules"] = (_checked(list[str] | str), setting("all-linear", _MEANINGS["target_modules"]))
    found["warmup_steps"] = (_checked(hints()["warmup_steps"]), setting("auto", opens))
    return found


def _of_others() -> dict[str, Any]:
    """The settings that mean the same for every method that has them."""
    means = {
        "r": "Rank; null is the method's own, from its authors (docs/methods.md).",
        "alpha": "Scale of the update, by the method's own formula; null is its default.",
        "duallora_dropout": "Dropout on the input of the method's own path; null is its default.",
        "target_modules": "Modules to adapt, as for Dual LoRA; null is where the method's paper puts it, else all-linear.",
    }
    names = (*means, "exclude_modules", "modules_to_save", "layers_to_transform")
    return {name: (_checked(hints()[name]) | None, setting(None, means.get(name, _MEANINGS[name]))) for name in names}


class _Adapter(Section):
    """What the adapters of all methods have."""

    method: Text = setting("duallora", "Method: duallora, or one it is compared with (docs/methods.md), such as lora.")
    init_from: Text | None = setting(
        None, "Run or adapter folder to begin from, its gate open, under a new head (GLUE: MNLI's); null begins anew."
    )

    @model_validator(mode="after")
    def _settings_agree(self: Any) -> Any:
        for problem in contradictions(self.model_dump(), "adapter."):
            raise ValueError(problem)
        return self


_SettingsOfDualLora: Any = create_model("_SettingsOfDualLora", __base__=_Adapter, **_of_dual_lora())
_SettingsOfOthers: Any = create_model("_SettingsOfOthers", __base__=_Adapter, **_of_others())


class DualLoraSection(_SettingsOfDualLora):
    """The Dual LoRA adapter: dW = gate * alpha / sqrt(r1 r2) * ReLU(B A) . Sign(D C)."""

    init: Literal["gaussian", "lora", "gradient", "gradient-signs", "gradient-magnitudes"] = setting(
        "gaussian",
        "Start of the factors: random (paper), LoRA's under signs that are all up (needs magnitude identity, direction ste, "
        "warmup none), or from the gradient of training rows, whole or half of it.",
    )
    init_batches: Count = setting(4, "Training steps whose rows a start from the gradient looks at.")

    @model_validator(mode="after")
    def _init_agrees(self: Any) -> Any:
        for name, value in (("init", "gaussian"), ("warmup_steps", "auto")):
            if self.init_from is not None and (given := getattr(self, name)) != value:
                raise ValueError(
                    f"adapter.{name} = {show(given)} has no part in a run that begins with the factors and the open gate "
                    f"of adapter.init_from = {show(self.init_from)}: leave one of them out"
                )
        from_gradient = self.init.startswith("gradient")
        if from_gradient and self.warmup == "residual":
            raise ValueError(
                f'adapter.warmup = "residual" rebuilds dW(0) from a seed, which knows no adapter.init = "{self.init}": '
                'use adapter.warmup = "ramp"'
            )
        if from_gradient and self.direction == "fixed":
            raise ValueError(f'adapter.direction = "fixed" has no C and D to start by adapter.init = "{self.init}"')
        return self


class OtherSection(_SettingsOfOthers):
    """The adapter of another method (docs/methods.md); null is the method's own."""

    options: dict[Text, Any] = setting({}, "Settings of the method beyond these, such as {lr_ratio: 16} of lora+.")

    @model_validator(mode="before")
    @classmethod
    def _authors_rank(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("r") is None and values.get("method") in RANKS:
            values = {**values, "r": RANKS[values["method"]]}
        return values


def is_of_another(method: Any) -> bool:
    """Whether an adapter's method is another one than Dual LoRA."""
    return isinstance(method, str) and method != "duallora"


def _kind_of_adapter(adapter: Any) -> str:
    method = adapter.get("method", "duallora") if isinstance(adapter, Mapping) else getattr(adapter, "method", None)
    return "other" if is_of_another(method) else "duallora"


AdapterSection: Any = Annotated[
    Annotated[DualLoraSection, Tag("duallora")] | Annotated[OtherSection, Tag("other")],
    Discriminator(_kind_of_adapter),
]


class DataSection(Section):
    """What to train on: your own file or hub data set (path), or one of the paper's tasks (task)."""

    path: Text | None = setting(
        None, "Your data: a .jsonl, .json, .csv, .tsv, .parquet or .txt file, a hub id, or builtin:docstrings."
    )
    task: Text | None = setting(None, "A task with its own prompts, splits and metrics, such as e2e, boolq or sst2.")
    data_dir: Text | None = setting(None, "Folder that holds the tasks' data; null is $DUALLORA_DATA, else the hub.")
    eval_path: Text | None = setting(None, "Held-out data beside path; null splits eval_fraction off path.")
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = setting(
        0.05, "Share of path's rows held out where it brings no validation rows and eval_path is null."
    )
    columns: dict[Text, Text] | None = setting(
        None, "What a format's columns are called in path, such as {prompt: question, completion: answer}."
    )
    format: Literal["prompt-completion", "messages", "alpaca", "classification", "text"] | None = setting(
        None, "Form of path's rows; null detects it from the column names."
    )
    labels: Literal["classes", "numbers"] | None = setting(
        None, "What path's labels are: classes, or numbers to regress; null takes those with a fraction for numbers."
    )
    bad_rows: Literal["error", "skip"] = setting(
        "error", "What a malformed row does: stop, or be counted and left out."
    )
    ignore_keys: list[Text] | None = setting(
        None, "Columns of path, and keys of a chat's messages, to leave out where they would be refused."
    )
    chat_template_kwargs: dict[Text, Any] | None = setting(
        None, "What the chat template is given with each of path's chats, such as {enable_thinking: false}."
    )
    max_length: Annotated[int, Field(ge=8, le=1 << 20)] = setting(
        512, "Tokens per example, prompt and answer together; longer ones lose prompt tokens first."
    )
    train_on: Literal["answer", "all"] = setting("answer", "Tokens the loss is on: the answer only, or every token.")
    limit: Count | None = setting(None, "Train on at most this many rows; null is all of them.")
    eval_limit: Count | None = setting(None, "Evaluate on at most this many rows; null is all of them.")
    holdout: Count | None = setting(
        None,
        "Validate on this many training rows, drawn the same for every seed, and test on the data's own validation rows where "
        "they have no test rows; null validates on those.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        _refuse_exclusive("data", self)
        if self.path is None and self.task is None:
            raise ValueError(
                "neither data.path nor data.task is set: name a file or hub data set (--data mine.jsonl) or a task "
                "(--task e2e)"
            )
        return self


class TrainSection(Section):
    """The training loop; it runs on transformers' Trainer."""

    epochs: Positive | Literal["auto"] = setting(
        "auto",
        "Passes over the training rows; auto is one, or as many as make 100 steps (ten at most). max_steps, where set, decides.",
    )
    max_steps: Count | None = setting(None, "Optimizer steps; null counts them from epochs.")
    batch_size: Count = setting(8, "Examples in one forward pass at most (measured: fits 2 CPU cores).")
    gradient_accumulation_steps: Count = setting(
        1, "Forward passes per optimizer step; several processes share its rows out."
    )
    learning_rate: Positive = setting(
        1e-3,
        "Peak learning rate (ours: by the worst seed of small tasks, docs/results.md; the paper tunes it per task and prints none).",
    )
    direction_lr_ratio: Positive = setting(
        1.0, "Dual LoRA's learning rate of C and D, over that of everything else (paper: one rate)."
    )
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = setting("linear", "Course of the learning rate after its warm-up (as DoRA's and HiRA's scripts).")
    lr_warmup_steps: Annotated[int, Field(ge=0, le=MAX_INT)] | None = setting(
        None, "Warm-up of the learning rate in optimizer steps; null uses lr_warmup_ratio (DoRA's scripts: 100)."
    )
    lr_warmup_ratio: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] | None = setting(
        "auto",
        "Warm-up of the learning rate as a share of all steps; auto is a tenth and 10 steps at least, a third of a shorter run.",
    )
    weight_decay: Annotated[float, Field(ge=0)] = setting(
        0.0, "AdamW's decoupled weight decay on the factors (HiRA: 0)."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0, "Share of a trained token's or class's target spread evenly over all (LoRA's E2E scripts: 0.1)."
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = setting(1.0, "Gradients are scaled down to this norm; 0 is off.")
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward: less memory, slower.")
    auto_batch: bool = setting(
        False, "Out of memory: half as many rows at once and on, with the same rows in each optimizer step."
    )
    on_spike: Literal["warn", "rollback", "stop"] = setting(
        "warn",
        "A step's loss of ten times the usual: say so; go back to the last checkpoint and leave it out; or stop.",
    )
    eval_steps: Count | None = setting(None, "Optimizer steps between evaluations of the loss; null is at the end.")
    save_steps: Count = setting(100, "Optimizer steps between checkpoints.")
    save_total_limit: Count | None = setting(2, "Checkpoints kept, the oldest go first; null keeps all.")
    logging_steps: Count = setting(10, "Optimizer steps between lines of the log.")
    report_to: list[Text] = setting(
        ["tensorboard"], "Trackers, as transformers names them (tensorboard, trackio, wandb, mlflow); [] is none."
    )
    optimizer: Text = setting(
        "adamw_torch",
        "Optimizer, as transformers' optim argument names it, or galore, garare, flora over the method's factors.",
    )

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_the_defaults(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("lr_warmup_steps") is not None:
            values = {"lr_warmup_ratio": None, **values}
        if isinstance(values, Mapping) and values.get("max_steps") is not None:
            values = {"epochs": 1.0, **values}  # without effect, and what recorded runs have there
        return values

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainSection:
        _refuse_exclusive("train", self)
        return self


class EvalSection(Section):
    """Evaluation after training, and the `eval` verb."""

    batch_size: Count = setting(16, "Examples per device in one forward pass or generation.")
    max_new_tokens: Count | None = setting(None, "Longest generated answer in tokens; null is the task's own.")
    num_beams: Count | None = setting(None, "Beams of the generation (1 is greedy); null is the task's own.")
    metrics: bool = setting(True, "After training, generate or classify and score; false evaluates the loss only.")
    scoring: Literal["generation", "likelihood"] = setting(
        "generation", "How answers are found: generated, or the likeliest of the options a task names (commonsense)."
    )
    before: bool = setting(True, "Take the validation loss before training too; false saves a pass over those rows.")
    test: bool = setting(False, "After training, score the test rows too and keep each prediction.")
    forgetting: Text | None = setting(
        None,
        "Text that is not trained on (a file, hub id or builtin: name; auto is Python's language reference, or its docstrings): how "
        "much its loss grew is what was forgotten.",
    )

    def generation(self, max_new_tokens: int | None = None, num_beams: int | None = None) -> dict[str, int]:
        """What overrides a task's own settings for generating: the arguments, else this section's."""
        chosen = {"max_new_tokens": max_new_tokens or self.max_new_tokens, "num_beams": num_beams or self.num_beams}
        return {name: value for name, value in chosen.items() if value is not None}


class Recipe(Section):
    """Everything that decides a training run."""

    model: ModelSection = Field(default_factory=ModelSection)
    adapter: AdapterSection = Field(default_factory=DualLoraSection)
    data: DataSection
    train: TrainSection = Field(default_factory=TrainSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = setting(
        0, "Seed of the data order, of dropout and (unless init_seed is set) of the factors."
    )
    output: Text | None = setting(None, "Run folder; null is runs/<date-time>-<model>-<data>.")
    plugins: list[Text] = setting([], "Python files or modules with methods and tasks of yours (docs/extending.md).")

    @model_validator(mode="after")
    def _ratio_needs_two_groups(self) -> Recipe:
        if self.train.direction_lr_ratio != 1 and self.adapter.method != "duallora":
            raise ValueError(
                f"train.direction_lr_ratio = {self.train.direction_lr_ratio} is a setting of Dual LoRA, but adapter.method "
                f'is "{self.adapter.method}": leave it out'
            )
        return self


# Setting the first at a later layer (file < command line) drops the others set at an earlier one; together in one
# layer they are a contradiction.
EXCLUDES: dict[str, tuple[str, ...]] = {
    "data.path": ("data.task", "data.data_dir"),
    "data.task": (
        "data.path",
        "data.eval_path",
        "data.columns",
        "data.format",
        "data.labels",
        "data.ignore_keys",
        "data.chat_template_kwargs",
    ),
    "train.lr_warmup_steps": ("train.lr_warmup_ratio",),
    "train.lr_warmup_ratio": ("train.lr_warmup_steps",),
}


def _refuse_exclusive(section: str, values: Section) -> None:
    for key, others in EXCLUDES.items():
        if not key.startswith(section + "."):
            continue
        for other in others:
            mine, theirs = (getattr(values, name.partition(".")[2]) for name in (key, other))
            if mine is not None and theirs is not None:
                raise ValueError(f"{key} = {show(mine)} and {other} = {show(theirs)} exclude each other: keep one")


SECTIONS: dict[str, tuple[type[Section], ...]] = {  # the classes that may hold a section, which share many keys
    "model": (ModelSection,),
    "adapter": (DualLoraSection, OtherSection),
    "data": (DataSection,),
    "train": (TrainSection,),
    "eval": (EvalSection,),
}


def leaves(section: str) -> dict[str, type[Section]]:
    """The keys of a section, each with the (first) class that has it."""
    return {leaf: owner for owner in reversed(SECTIONS[section]) for leaf in owner.model_fields}


KEYS: tuple[str, ...] = tuple(
    f"{name}.{leaf}" if leaf else name
    for name in Recipe.model_fields
    for leaf in (leaves(name) if name in SECTIONS else [""])
)


@cache
def allowed(key: str, owner: type[Section] | None = None) -> str:
    """The values one setting takes, in words: ``finite number > 0 or null``; ``owner`` is the section's class."""
    section, _, leaf = key.rpartition(".")
    return _words(_properties(owner or (leaves(section)[leaf] if section else Recipe))[leaf])


@cache
def _properties(owner: type[Section]) -> Mapping[str, Any]:
    """The schema of each setting of a section; built once, since a recipe is written with a line for every setting."""
    return owner.model_json_schema()["properties"]


def _words(schema: Mapping[str, Any]) -> str:
    options = [words for option in schema.get("anyOf", [schema]) for words in _options(option)]
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _options(schema: Mapping[str, Any]) -> list[str]:
    if "const" in schema or "enum" in schema:
        return [show(value) for value in schema.get("enum", [schema.get("const")])]
    kind = schema.get("type")
    if kind == "boolean":
        return ["true", "false"]
    if kind == "array":
        low, high = schema.get("minItems"), schema.get("maxItems")
        size = f"{low}-item " if high is not None else "non-empty " if low else ""
        return [f"{size}list of {_words(schema['items'])}"]
    if kind == "object":
        values = schema.get("additionalProperties") or next(iter(schema["patternProperties"].values()))
        return [f"mapping of names to {_words(values)}"]
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high not in (None, MAX_INT):
        bounds = f" from {low:g} to {high:g}" if isinstance(low, float) else f" from {low} to {high}"
    else:
        signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
        bounds = " and".join(
            f" {sign} {schema[name]:g}" for name, sign in signs.items() if schema.get(name, MAX_INT) != MAX_INT
        )
    return [{"string": "text", "number": "finite number", "None": "any value"}.get(str(kind), str(kind)) + bounds]


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file (draft 2020-12), for editors that complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def recipe_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML, each value under its description and range; ``load_recipe`` reads the same recipe back."""
    lines = []
    for name, value in recipe:
        if isinstance(value, Section):
            lines += ["", f"# {(type(value).__doc__ or '').strip()}", f"{name}:"]
            for leaf, held in value:
                lines += _field_lines(type(value), f"{name}.{leaf}", held, "  ")
        else:
            lines += ["", *_field_lines(Recipe, name, value, "")]
    return "\n".join(lines).lstrip("\n") + "\n"


def _field_lines(owner: type[Section], key: str, value: Any, indent: str) -> list[str]:
    leaf = key.rpartition(".")[2]
    description = owner.model_fields[leaf].description
    return [f"{indent}# {description} [{allowed(key, owner)}]", f"{indent}{leaf}: {yaml_value(value)}"]


def fingerprint(recipe: Recipe) -> str:
    """sha256 (hex) of every value but the run folder: equal for the same recipe, whatever order it was written in."""
    values = recipe.model_dump(mode="json", exclude={"output"})
    # Came later: runs that had no such setting keep theirs.
    for key in ("adapter.target_parameters", "adapter.trainable_token_indices", "data.columns", "eval.forgetting"):
        section, _, leaf = key.partition(".")
        if values[section].get(leaf) is None:
            values[section].pop(leaf, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def recorded(values: Any, where: str) -> dict[str, Any]:
    """The recipe that a run recorded, as it is; ``where`` names its file.

    Raises:
        ConfigError: an earlier version wrote it, which had other settings.
    """
    try:
        return Recipe.model_validate(values).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"] if part not in ("duallora", "other"))
        raise ConfigError(
            f"{where}: the run is of another version of duallora, whose recipe has other settings ({key}: {first['msg']}); "
            "start it anew in another folder, or go on with the version that made it"
        ) from None


def default_output(recipe: Recipe, now: datetime | None = None) -> str:
    """``runs/<date-time>-<model>-<data>``: the run folder of a recipe whose ``output`` is None."""
    source = recipe.data.task or recipe.data.path or ""
    parts = [f"{now or datetime.now():%Y%m%d-%H%M%S}", _slug(recipe.model.name), _slug(source)]
    return "runs/" + "-".join(filter(None, parts))


def _slug(name: str) -> str:
    last = re.split(r"[/\\:]", name.rstrip("/\\"))[-1]
    for suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        last = last.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.")[:60]
