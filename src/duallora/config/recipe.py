"""The configuration of a training run: its schema, its defaults and the one function that reads it.

A recipe has five sections (model, adapter, data, train, eval) and the top-level values seed, output and plugins. Values come
from, later over earlier: the defaults below, a YAML file, ``--set key=value``, the command line's own flags.
Nothing heavy is imported here: a mistake in a recipe is answered before torch is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import shlex
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, create_model, model_validator

from duallora.config import Dtype
from duallora.core.settings import MAX_INT, Settings, contradictions, hints
from duallora.errors import ConfigError
from duallora.terminal import command

MAX_FILE_BYTES = 1 << 16  # a recipe is a page long; a larger file is a mistake, and the YAML reader is slow
RANK = Settings.r  # of every method that has one, where the recipe names none

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
RUNS_OWN = ("method", "init_from", "init", "init_batches")


class _Adapter(Section):
    """What the adapter sections of all methods check."""

    @model_validator(mode="after")
    def _settings_agree(self: Any) -> Any:
        for problem in contradictions(self.model_dump(), "adapter."):
            raise ValueError(problem)
        return self


class _DualLora(_Adapter):
    """The Dual LoRA adapter: dW = gate * alpha / sqrt(r1 r2) * ReLU(B A) . Sign(D C)."""

    @model_validator(mode="after")
    def _init_from_agrees(self: Any) -> Any:
        if self.init_from is not None:
            for name, value in (("init", "gaussian"), ("warmup_steps", "auto")):
                if (given := getattr(self, name)) != value:
                    raise ValueError(
                        f"adapter.{name} = {_show(given)} has no part in a run that begins with the factors and the open gate "
                        f"of adapter.init_from = {_show(self.init_from)}: leave one of them out"
                    )
        if self.init != "gaussian":
            if self.warmup == "residual":
                raise ValueError(
                    f'adapter.warmup = "residual" rebuilds dW(0) from a seed, which knows no adapter.init = "{self.init}": '
                    'use adapter.warmup = "ramp"'
                )
            if self.direction == "fixed":
                raise ValueError(f'adapter.direction = "fixed" has no C and D to start by adapter.init = "{self.init}"')
        return self


class _Other(_Adapter):
    """The adapter of another method (docs/methods.md); null is the method's own."""


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


_METHOD: Any = (
    Text,
    setting("duallora", "Method: duallora, or one it is compared with (docs/methods.md), such as lora."),
)
_INIT_FROM: Any = (
    Text | None,
    setting(
        None, "Run or adapter folder to begin from, its gate open, under a new head (GLUE: MNLI's); null begins anew."
    ),
)
_MEANINGS = {field.name: field.metadata["help"] for field in dataclasses.fields(Settings)}


def _of_dual_lora() -> dict[str, Any]:
    """The settings of DualLoraConfig; two have defaults of a run's own."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        plain = field.default if field.default is not dataclasses.MISSING else {}
        found[field.name] = _checked(hints()[field.name]), setting(plain, _MEANINGS[field.name])
    found["target_modules"] = _checked(list[str] | str), setting("all-linear", _MEANINGS["target_modules"])
    found["warmup_steps"] = (
        _checked(hints()["warmup_steps"]) | Literal["auto"],
        setting("auto", "Optimizer steps until the gate is 1; auto is the learning rate's warm-up (paper: a warm-up)."),
    )
    return found


def _of_others() -> dict[str, Any]:
    """The settings that mean the same for every method that has them."""
    means = {
        "r": f"Rank; null is {RANK} where the method has one.",
        "alpha": "Scale of the update, by the method's own formula; null is its default.",
        "duallora_dropout": "Dropout on the input of the method's own path; null is its default.",
        "target_modules": "Modules to adapt, as for Dual LoRA; null is where the method's paper puts it, else all-linear.",
    }
    alike = ("exclude_modules", "modules_to_save", "layers_to_transform")
    return {
        name: (_checked(hints()[name]) | None, setting(None, means.get(name, _MEANINGS[name])))
        for name in (*means, *alike)
    }


# What only a run has: rows to start from.
_INIT: Any = (
    Literal["gaussian", "gradient", "gradient-signs", "gradient-magnitudes"],
    setting(
        "gaussian", "Start of the factors: random (paper), or from the gradient of training rows, whole or half of it."
    ),
)
_INIT_BATCHES: Any = Count, setting(4, "Training steps whose rows a start from the gradient looks at.")
_OPTIONS: Any = dict[Text, Any], setting({}, "Settings of the method beyond these, such as {lr_ratio: 16} of lora+.")

DualLoraSection: Any = create_model(
    "DualLoraSection",
    __base__=_DualLora,
    __doc__=_DualLora.__doc__,
    method=_METHOD,
    **_of_dual_lora(),
    init_from=_INIT_FROM,
    init=_INIT,
    init_batches=_INIT_BATCHES,
)
OtherSection: Any = create_model(
    "OtherSection",
    __base__=_Other,
    __doc__=_Other.__doc__,
    method=_METHOD,
    options=_OPTIONS,
    **_of_others(),
    init_from=_INIT_FROM,
)


def _kind_of_adapter(adapter: Any) -> str:
    method = adapter.get("method", "duallora") if isinstance(adapter, Mapping) else getattr(adapter, "method", None)
    return "other" if isinstance(method, str) and method != "duallora" else "duallora"


AdapterSection: Any = Annotated[
    Union[Annotated[DualLoraSection, Tag("duallora")], Annotated[OtherSection, Tag("other")]],  # noqa: UP007
    Discriminator(_kind_of_adapter),
]


class DataSection(Section):
    """What to train on: your own file or hub data set (path), or one of the paper's tasks (task)."""

    path: Text | None = setting(
        None, "Your data: a .jsonl, .json, .csv, .tsv or .parquet file, a hub id, or builtin:docstrings."
    )
    task: Text | None = setting(None, "A task with its own prompts, splits and metrics, such as e2e, boolq or sst2.")
    data_dir: Text | None = setting(None, "Folder that holds the tasks' data; null is $DUALLORA_DATA, else the hub.")
    eval_path: Text | None = setting(None, "Held-out data beside path; null splits eval_fraction off path.")
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = setting(
        0.05, "Share of path's rows held out where it brings no validation rows and eval_path is null."
    )
    format: Literal["prompt-completion", "messages", "alpaca", "classification"] | None = setting(
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
        None, "Validate on this many training rows, drawn the same for every seed; null is the data's own validation."
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
    max_grad_norm: Annotated[float, Field(ge=0)] = setting(1.0, "Gradients are scaled down to this norm; 0 is off.")
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward: less memory, slower.")
    eval_steps: Count | None = setting(None, "Optimizer steps between evaluations of the loss; null is at the end.")
    save_steps: Count = setting(100, "Optimizer steps between checkpoints.")
    save_total_limit: Count | None = setting(2, "Checkpoints kept, the oldest go first; null keeps all.")
    logging_steps: Count = setting(10, "Optimizer steps between lines of the log.")
    report_to: list[Text] = setting(
        ["tensorboard"], "Trackers, as transformers names them (tensorboard, trackio, wandb, mlflow); [] is none."
    )
    optimizer: Text = setting("adamw_torch", "Optimizer, as transformers' optim argument names it.")

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

    def generation(self, max_new_tokens: int | None = None, num_beams: int | None = None) -> dict[str, int]:
        """What overrides a task's own settings for generating: the arguments, else this section's."""
        chosen = {
            "max_new_tokens": max_new_tokens or self.max_new_tokens,
            "num_beams": num_beams or self.num_beams,
        }
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
                raise ValueError(f"{key} = {_show(mine)} and {other} = {_show(theirs)} exclude each other: keep one")


SECTIONS: dict[str, tuple[type[Section], ...]] = {  # the classes that may hold a section, which share many keys
    "model": (ModelSection,),
    "adapter": (DualLoraSection, OtherSection),
    "data": (DataSection,),
    "train": (TrainSection,),
    "eval": (EvalSection,),
}


def _leaves(section: str) -> dict[str, type[Section]]:
    """The keys of a section, each with the (first) class that has it."""
    return {leaf: owner for owner in reversed(SECTIONS[section]) for leaf in owner.model_fields}


KEYS: tuple[str, ...] = tuple(
    f"{name}.{leaf}" if leaf else name
    for name in Recipe.model_fields
    for leaf in (_leaves(name) if name in SECTIONS else [""])
)

# What PEFT, transformers and other trainers call the same thing.
SYNONYMS = {
    "rank": "adapter.r",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "dropout": "adapter.duallora_dropout",
    "lora_dropout": "adapter.duallora_dropout",
    "gate_steps": "adapter.warmup_steps",
    "lr": "train.learning_rate",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "steps": "train.max_steps",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "grad_accum": "train.gradient_accumulation_steps",
    "warmup_ratio": "train.lr_warmup_ratio",
    "lr_scheduler_type": "train.lr_scheduler",
    "scheduler": "train.lr_scheduler",
    "optim": "train.optimizer",
    "model_name_or_path": "model.name",
    "base_model": "model.name",
    "torch_dtype": "model.dtype",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "quantization_config": "model.quantization",
    "dataset": "data.path",
    "dataset_name": "data.path",
    "dataset_path": "data.path",
    "data_path": "data.path",
    "train_file": "data.path",
    "validation_file": "data.eval_path",
    "max_seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_seq_len": "data.max_length",
    "output_dir": "output",
    "random_seed": "seed",
    "start": "adapter.init_from",
}


def _candidates(leaf: str) -> list[str]:
    """The dotted keys that end in this name."""
    return [key for key in KEYS if key.rpartition(".")[2] == leaf]


def nearest(key: str) -> list[str]:
    """The known dotted keys a misspelt, misplaced or foreign key most likely means, best first; may be empty."""
    section, _, leaf = key.rpartition(".")
    leaf = leaf.replace("-", "_").lower()
    if found := _candidates(leaf):
        return found
    if leaf in SYNONYMS:
        return [SYNONYMS[leaf]]
    if not section and (close := difflib.get_close_matches(leaf, Recipe.model_fields, n=1, cutoff=0.7)):
        return close
    if section in SECTIONS:
        close = difflib.get_close_matches(leaf, _leaves(section), n=1, cutoff=0.7)
        if close:
            return [f"{section}.{close[0]}"]
    leaves = {name.rpartition(".")[2] for name in KEYS} | set(SYNONYMS)
    for close_leaf in difflib.get_close_matches(leaf, sorted(leaves), n=1, cutoff=0.7):
        return _candidates(close_leaf) or [SYNONYMS[close_leaf]]
    return difflib.get_close_matches(key, KEYS, n=1, cutoff=0.7)


def _did_you_mean(key: str) -> str:
    names = nearest(key)
    if names:
        return f"did you mean {' or '.join(names)}?"
    section = key.partition(".")[0]
    known: Iterable[str] = _leaves(section) if section in SECTIONS else Recipe.model_fields
    return f"known here: {', '.join(known)}"


def _show(value: Any) -> str:
    text = (
        json.dumps(value, ensure_ascii=False) if isinstance(value, (str, bool, list, dict, type(None))) else repr(value)
    )
    return text if len(text) <= 80 else text[:77] + "..."


@cache
def allowed(key: str, owner: type[Section] | None = None) -> str:
    """The values one setting takes, in words: ``finite number > 0 or null``; ``owner`` is the section's class."""
    section, _, leaf = key.rpartition(".")
    return _words(_properties(owner or (_leaves(section)[leaf] if section else Recipe))[leaf])


@cache
def _properties(owner: type[Section]) -> Mapping[str, Any]:
    """The schema of each setting of a section; built once, since a recipe is written with a line for every setting."""
    return owner.model_json_schema()["properties"]


def _words(schema: Mapping[str, Any]) -> str:
    options = [words for option in schema.get("anyOf", [schema]) for words in _options(option)]
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _options(schema: Mapping[str, Any]) -> list[str]:
    if "const" in schema or "enum" in schema:
        return [_show(value) for value in schema.get("enum", [schema.get("const")])]
    kind = schema.get("type")
    if kind == "boolean":
        return ["true", "false"]
    if kind == "array":
        size = {(None, None): "", (1, None): "non-empty "}.get((schema.get("minItems"), schema.get("maxItems")))
        size = f"{schema['minItems']}-item " if size is None else size
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
    return [{"string": "text", "number": "finite number"}.get(str(kind), str(kind)) + bounds]


Placed = tuple[Any, str]  # a value and where it stands: a file and its line, a flag


class _Layer:
    """Settings from one place by dotted key, and what is wrong with the place itself."""

    def __init__(self) -> None:
        self.values: dict[str, Placed] = {}
        self.problems: list[str] = []


def load_recipe(
    path: Path | str | None = None,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    data: str | None = None,
    task: str | None = None,
    data_dir: str | Path | None = None,
    eval_data: str | None = None,
    output: str | Path | None = None,
    seed: int | None = None,
) -> Recipe:
    """Read a recipe: YAML file (1.2: ``1e-4`` is a number), then ``overrides``, then the flags, later over earlier.

    ``overrides`` are ``train.learning_rate=2e-4`` or, where only one section has the name, ``learning_rate=2e-4``; the
    value is read as YAML. Flags that are None are not set. A flag or override that names a data source replaces the
    file's data source.

    Raises:
        ConfigError: with every problem found, each naming its file and line (or flag), key, value and what is allowed.
    """
    file = _read_file(Path(path)) if path is not None else _Layer()
    line = _read_overrides(overrides, file)
    flags = {
        "model.name": ("--model", model),
        "data.path": ("--data", data),
        "data.task": ("--task", task),
        "data.data_dir": ("--data-dir", data_dir),
        "data.eval_path": ("--eval-data", eval_data),
        "output": ("--output", output),
        "seed": ("--seed", seed),
    }
    for key, (flag, value) in flags.items():
        if value is not None:
            line.values[key] = (str(value) if isinstance(value, Path) else value, flag)

    return assemble([file.values, line.values], [*file.problems, *line.problems])


def assemble(layers: Iterable[Mapping[str, Placed]], problems: Sequence[str] = ()) -> Recipe:
    """The recipe of settings by dotted key, later layers over earlier, as `overlay` lays them.

    Raises:
        ConfigError: ``problems``, and every setting that the schema refuses, each with its place.
    """
    settings = overlay(layers)
    _drop_what_asks_for_nothing(settings)
    problems = list(problems)
    tree: dict[str, Any] = {"data": {}}
    for key, (value, _) in settings.items():
        section, _, leaf = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        sources = {key: source for key, (_, source) in settings.items()}
        incomplete = any("data." in problem for problem in problems)
        problems += _explain(error, settings, sources, incomplete=incomplete)
    if problems:
        raise ConfigError(*problems)
    return recipe


def _drop_what_asks_for_nothing(settings: dict[str, Placed]) -> None:
    """A key at its default is no setting of another method: what `config show` wrote serves any ``--method``."""
    method, _ = settings.get("adapter.method", ("duallora", ""))
    takes = SECTIONS["adapter"][_kind_of_adapter({"method": method}) == "other"].model_fields
    for leaf, owner in _leaves("adapter").items():
        key = f"adapter.{leaf}"
        default = owner.model_fields[leaf].get_default(call_default_factory=True)
        if leaf not in takes and key in settings and settings[key][0] == default:
            del settings[key]


def overlay(layers: Iterable[Mapping[str, Placed]]) -> dict[str, Placed]:
    """Settings by dotted key, later layers over earlier; what a later one excludes goes, and an entry joins its mapping."""
    settings: dict[str, Placed] = {}
    for layer in layers:
        for key, (value, _) in layer.items():
            if value is not None:
                for other in EXCLUDES.get(key, ()):
                    settings.pop(other, None)
        for key, (value, where) in layer.items():
            field, entry = resolve(key)
            if field and entry:  # adapter.options.lr_ratio
                held = (settings.get(field) or ({}, where))[0]
                settings[field] = ({**held, entry: value} if isinstance(held, dict) else {entry: value}, where)
            else:
                settings[key] = (value, where)
    return settings


def _explain(
    error: ValidationError, settings: Mapping[str, tuple[Any, str]], sources: Mapping[str, str], *, incomplete: bool
) -> Iterator[str]:
    """pydantic's findings, one line per key, in the words of this module."""
    seen = set()
    strangers: dict[str, str] = {}  # keys that the method does not take -> their places
    for item in error.errors(include_url=False):
        loc = [str(part) for part in item["loc"]]
        owner = None
        if loc[:1] == ["adapter"] and len(loc) > 1:
            owner = SECTIONS["adapter"][loc.pop(1) == "other"]
        key = ".".join(loc[:2]) if loc and loc[0] in SECTIONS else "".join(loc[:1])
        if key in seen:
            continue  # the members of a union each report
        seen.add(key)
        if item["type"] == "value_error":
            text = str(item["ctx"]["error"])
            if incomplete and text.startswith("neither"):
                continue  # the source may be behind a key that is already reported
            places = dict.fromkeys(
                sources[name] for name in KEYS if name in sources and re.search(rf"\b{name}\b", text)
            )
            yield f"{', '.join(places)}: {text}" if places else text
            continue
        value, source = settings[key]
        if item["type"] == "extra_forbidden":
            strangers[key] = source
            continue
        expected = allowed(key, owner)
        yield f"{source}: {key}: {_show(value)} is not accepted; expected {expected}{_hint(value, expected)}"
    if strangers:
        yield _not_of_the_method(strangers, settings)


def _not_of_the_method(strangers: Mapping[str, str], settings: Mapping[str, tuple[Any, str]]) -> str:
    method = settings["adapter.method"][0] if "adapter.method" in settings else "duallora"
    named = ", ".join(f"{key} = {_show(settings[key][0])}" for key in list(strangers)[:5])
    named += f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
    places = ", ".join(dict.fromkeys(list(strangers.values())[:5]))
    if method == "duallora":
        return f"{places}: {named}: for other methods; Dual LoRA's settings are keys of adapter itself"
    return (
        f"{places}: {named}: Dual LoRA's, but adapter.method is {_show(method)}, which takes "
        f"{', '.join(OtherSection.model_fields)}"
    )


def _hint(value: Any, expected: str) -> str:
    kinds = {word for word in ("integer", "number") if word in expected}
    if isinstance(value, str) and kinds and re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", value):
        return " (remove the quotes)"
    if isinstance(value, str) and expected == "true or false":
        return " (YAML 1.2 has no yes, no, on or off)"
    if isinstance(value, (int, float)) and "text" in expected:
        return " (write it in quotes)"
    return ""


def _read_overrides(overrides: Iterable[str], file: _Layer) -> _Layer:
    layer = _Layer()
    for override in overrides:
        where = f"--set {override if len(override) <= 80 else override[:77] + '...'}"
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            layer.problems.append(f"{where}: expected KEY=VALUE, such as train.learning_rate=2e-4")
            continue
        field, entry = resolve(key)
        if field is None:
            layer.problems.append(f"{where}: {entry}")
            continue
        try:
            value = _plain(_compose(text), where)
        except ConfigError as error:
            layer.problems.append(str(error) if str(error).startswith(where) else f"{where}: {error}")
            continue
        if entry:  # one entry of a mapping: adapter.rank_pattern.q_proj=8
            held = (layer.values.get(field) or file.values.get(field) or ({}, where))[0]
            value = {**held, entry: value} if isinstance(held, dict) else {entry: value}
        layer.values[field] = (value, where)
    return layer


def resolve(key: str) -> tuple[str | None, str]:
    """The dotted key meant, and the entry of its mapping if one is named; or (None, what is wrong)."""
    if key in KEYS:
        return key, ""
    found = _candidates(key)
    if len(found) == 1:
        return found[0], ""
    if found:
        return None, f"{key} is ambiguous: write {' or '.join(found)}"
    for pattern in ("adapter.options", "adapter.rank_pattern", "adapter.alpha_pattern", "data.chat_template_kwargs"):
        for prefix in (pattern, pattern.partition(".")[2]):
            if key.startswith(prefix + ".") and key != prefix + ".":
                return pattern, key[len(prefix) + 1 :]
    if key in SECTIONS:
        return None, f"{key} is a section: set one of its keys, such as {key}.{next(iter(_leaves(key)))}"
    return None, f"unknown key {key}; {_did_you_mean(key)}"


def _read_root(path: Path) -> Any:
    """The YAML node tree of a file; None for an empty one."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        show = f"{command('config', 'show')} > {shlex.quote(str(path))}"
        raise ConfigError(f"{path}: no such file; `{show}` writes one to start from") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{path}: larger than {MAX_FILE_BYTES} bytes; a recipe is a page of YAML. Is this a data file?"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8 text (byte {error.start} is {content[error.start]:#04x})"
        ) from None
    root = _compose(text, str(path))
    return None if root is None or _kind(root) == "null" else root


def read_yaml(path: Path | str, depth: int) -> dict[str, Placed]:
    """A YAML mapping as name -> (value, "file:line"); mappings below it likewise, ``depth`` of them deep, then plain.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, a key set twice.
    """
    problems: list[str] = []

    def placed(mapping: Any, left: int) -> dict[str, Placed]:
        found: dict[str, Placed] = {}
        for name, key_node, node in _entries(mapping, str(path), problems):
            where = f"{path}:{_line(key_node)}"
            if left and node.id == "mapping":
                found[name] = (placed(node, left - 1), where)
            else:
                found[name] = (_plain(node, f"{where}: {name}"), where)
        return found

    root = _read_root(Path(path))
    if root is not None and root.id != "mapping":
        raise ConfigError(f"{path}:{_line(root)}: expected a mapping of names to values")
    values = {} if root is None else placed(root, depth)
    if problems:
        raise ConfigError(*problems)
    return values


def read_settings(path: Path | str) -> dict[str, Placed]:
    """The settings of a recipe file by dotted key, each with its place; what is missing may be set elsewhere."""
    layer = _read_file(Path(path))
    if layer.problems:
        raise ConfigError(*layer.problems)
    return layer.values


def _read_file(path: Path) -> _Layer:
    layer = _Layer()
    root = _read_root(path)
    if root is None:
        return layer
    if root.id != "mapping":
        raise ConfigError(f"{path}:{_line(root)}: expected a mapping with the keys {', '.join(Recipe.model_fields)}")
    for name, key_node, node in _entries(root, str(path), layer.problems):
        where = f"{path}:{_line(key_node)}"
        if name not in Recipe.model_fields:
            layer.problems.append(f"{where}: unknown key {name}; {_did_you_mean(name)}")
        elif name not in SECTIONS:
            _take(layer, name, node, where)
        elif node.id == "mapping":
            for leaf, leaf_node, value in _entries(node, str(path), layer.problems):
                where = f"{path}:{_line(leaf_node)}"
                key = f"{name}.{leaf}"
                if key in KEYS:
                    _take(layer, key, value, where)
                else:
                    layer.problems.append(f"{where}: unknown key {key}; {_did_you_mean(key)}")
        elif _kind(node) != "null":  # a heading with nothing under it is an empty section
            layer.problems.append(
                f"{where}: {name} is a section: expected a mapping with keys such as {name}.{next(iter(_leaves(name)))}"
            )
    return layer


def _take(layer: _Layer, key: str, node: Any, where: str) -> None:
    try:
        layer.values[key] = (_plain(node, f"{where}: {key}"), where)
    except ConfigError as error:
        layer.problems.append(str(error))


def _entries(mapping: Any, path: str, problems: list[str]) -> Iterator[tuple[str, Any, Any]]:
    """(name, key node, value node) of a YAML mapping; duplicate and non-text keys become problems."""
    first: dict[str, int] = {}
    for key_node, value in mapping.value:
        where = f"{path}:{_line(key_node)}"
        if key_node.id != "scalar" or _kind(key_node) == "merge":
            what = "merge keys (<<)" if key_node.id == "scalar" else "keys that are not text"
            problems.append(f"{where}: {what} are not accepted in a recipe")
            continue
        name = key_node.value
        if name in first:
            problems.append(f"{where}: {name[:80]} is set twice (first in line {first[name]}); keep one")
            continue
        first[name] = _line(key_node)
        yield name, key_node, value


def _line(node: Any) -> int:
    return node.start_mark.line + 1


def _kind(node: Any) -> str:
    return str(node.tag).rpartition(":")[2]


def _yaml() -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.composer import Composer, ComposerError
    from ruamel.yaml.events import AliasEvent

    class WithoutAliases(Composer):
        """An alias can hold itself, and a page of them unfold into gigabytes."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.parser.check_event(AliasEvent):
                raise ComposerError(None, None, "aliases (*) are not accepted", self.parser.peek_event().start_mark)
            return super().compose_node(parent, index)

    reader = YAML(typ="safe", pure=True)
    reader.Composer = WithoutAliases
    return reader


def _compose(text: str, where: str = "") -> Any:
    """The YAML node tree (None for an empty text); nothing is constructed, so tags cannot run code."""
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        return _yaml().compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}: " if where and mark else ""
        column = f" (column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{place}not valid YAML: {error.problem or error.context}{column}") from None
    except YAMLError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{where + ': ' if where else ''}not valid YAML: {reason}") from None
    except RecursionError:
        raise ConfigError(f"{where + ': ' if where else ''}not a recipe: nested too deeply") from None


def _plain(node: Any, where: str) -> Any:
    """A node as str, int, float, bool, None, list or dict; any other tag is refused."""
    if node is None:
        return None
    if node.id == "sequence" and _kind(node) == "seq":
        return [_plain(item, where) for item in node.value]
    if node.id == "mapping" and _kind(node) == "map":
        problems: list[str] = []
        place = where.partition(":")[0]
        result = {name: _plain(value, where) for name, _, value in _entries(node, place, problems)}
        if problems:
            raise ConfigError(problems[0])
        return result
    kind = _kind(node)
    if node.id == "scalar" and kind in ("str", "timestamp"):
        return node.value
    if node.id == "scalar" and kind in ("int", "float", "bool", "null"):
        try:
            return _yaml().constructor.construct_object(node)
        except ValueError:
            raise ConfigError(f"{where}: {_show(node.value)} cannot be read as {kind}") from None
    raise ConfigError(f"{where}: the tag {node.tag} is not accepted; a recipe holds plain text, numbers and lists")


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file (draft 2020-12), for editors that complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def recipe_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML, each value under its description and range; ``load_recipe`` reads the same recipe back."""
    lines = []
    for name, value in recipe:
        if isinstance(value, Section):
            lines += ["", *_comment((type(value).__doc__ or "").strip()), f"{name}:"]
            for leaf, held in value:
                lines += _field_lines(type(value), f"{name}.{leaf}", held, "  ")
        else:
            lines += ["", *_field_lines(Recipe, name, value, "")]
    return "\n".join(lines).lstrip("\n") + "\n"


def _comment(text: str, indent: str = "") -> list[str]:
    return [f"{indent}# {line.strip()}" for line in text.splitlines()]


def _field_lines(owner: type[Section], key: str, value: Any, indent: str) -> list[str]:
    leaf = key.rpartition(".")[2]
    description = owner.model_fields[leaf].description
    return [f"{indent}# {description} [{allowed(key, owner)}]", f"{indent}{leaf}: {yaml_value(value)}"]


def yaml_value(value: Any) -> str:
    """A value in YAML's flow style. Text is plain where that reads back as the same text, else in double quotes."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(yaml_value(item) for item in value)}]"
    if isinstance(value, dict):
        # "? key : value" would be needed for keys beyond 1024 characters; module patterns are short
        return f"{{{', '.join(f'{_quoted(name)}: {yaml_value(item)}' for name, item in value.items())}}}"
    if not isinstance(value, str):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*(:[A-Za-z0-9_./-]+)*", value) and value.lower() not in _NOT_TEXT:
        return value
    return _quoted(value)


_NOT_TEXT = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}  # some in YAML 1.1 only: quoted for others


def _quoted(text: str) -> str:
    plain = json.dumps(text, ensure_ascii=False)
    return re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd]", _escape, plain)


def _escape(match: re.Match[str]) -> str:
    return f"\\U{ord(match.group()):08x}"


def fingerprint(recipe: Recipe) -> str:
    """sha256 (hex) of every value but the run folder: equal for the same recipe, whatever order it was written in."""
    values = recipe.model_dump(mode="json", exclude={"output"})
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
    return "runs/" + "-".join(part for part in parts if part)


def _slug(name: str) -> str:
    last = re.split(r"[/\\:]", name.rstrip("/\\"))[-1]
    for suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        last = last.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.")[:60]
