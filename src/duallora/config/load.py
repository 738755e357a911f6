"""Reads recipes: a YAML file, ``--set key=value`` and the command line's flags, later over earlier, over the defaults."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from duallora.config.recipe import EXCLUDES, KEYS, SECTIONS, OtherSection, Recipe, allowed, is_of_another, leaves
from duallora.config.yaml import Placed, plain_value, show, walk_yaml
from duallora.errors import ConfigError

# What PEFT, transformers and other trainers call the same thing.
_OTHERS_NAMES = {
    "adapter.r": "rank lora_r lora_rank",
    "adapter.alpha": "lora_alpha",
    "adapter.duallora_dropout": "dropout lora_dropout",
    "adapter.warmup_steps": "gate_steps",
    "train.learning_rate": "lr",
    "train.epochs": "num_epochs num_train_epochs",
    "train.max_steps": "steps",
    "train.batch_size": "per_device_train_batch_size",
    "eval.batch_size": "per_device_eval_batch_size",
    "train.gradient_accumulation_steps": "grad_accum",
    "train.lr_warmup_ratio": "warmup_ratio",
    "train.lr_scheduler": "lr_scheduler_type scheduler",
    "train.optimizer": "optim",
    "model.name": "model_name_or_path base_model",
    "model.dtype": "torch_dtype",
    "model.quantization": "load_in_4bit load_in_8bit quantization_config",
    "data.path": "dataset dataset_name dataset_path data_path train_file",
    "data.eval_path": "validation_file",
    "data.max_length": "max_seq_length cutoff_len max_seq_len",
    "output": "output_dir",
    "seed": "random_seed",
}
SYNONYMS = {synonym: key for key, names in _OTHERS_NAMES.items() for synonym in names.split()}
# Keys of recipes that an earlier version wrote.
FORMER = {
    "adapter.start": "it is now adapter.init_from",
    "adapter.gradient_tokens_by": "it is gone, as every layer takes the share adapter.gradient_tokens: leave it out",
}


def load_recipe(
    path: Path | str | None = None,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    data: str | None = None,
    task: str | None = None,
    data_dir: str | Path | None = None,
    eval_data: str | None = None,
    columns: str | None = None,
    output: str | Path | None = None,
    seed: int | None = None,
) -> Recipe:
    """Read a recipe: YAML file (1.2: ``1e-4`` is a number), then ``overrides``, then the flags, later over earlier.

    ``overrides`` are ``train.learning_rate=2e-4`` or, where only one section has the name, ``learning_rate=2e-4``; the
    value is read as YAML. Flags that are None are not set; ``columns`` is ``prompt=question,completion=answer``. A flag or override that names a data source replaces the
    file's data source.

    Raises:
        ConfigError: with every problem found, each naming its file and line (or flag), key, value and what is allowed.
    """
    file, problems = ({}, []) if path is None else _read_file(Path(path))
    line = _read_overrides(overrides, file, problems)
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
            line[key] = (str(value) if isinstance(value, Path) else value, flag)
    if columns is not None:
        pairs = [pair.partition("=") for pair in columns.split(",")]
        if not all(name.strip() and own.strip() for name, _, own in pairs):
            problems.append(f"--columns {columns}: expected NAME=COLUMN,..., such as prompt=question,completion=answer")
        line["data.columns"] = ({name.strip(): own.strip() for name, _, own in pairs}, "--columns")
    return assemble([file, line], problems)


def read_settings(path: Path | str) -> dict[str, Placed]:
    """The settings of a recipe file by dotted key, each with its place; what is missing may be set elsewhere."""
    values, problems = _read_file(Path(path))
    if problems:
        raise ConfigError(*problems)
    return values


def assemble(layers: Iterable[Mapping[str, Placed]], problems: Sequence[str] = ()) -> Recipe:
    """The recipe of settings by dotted key, later layers over earlier, as `overlay` lays them.

    Raises:
        ConfigError: ``problems``, and every setting that the schema refuses, each with its place.
    """
    settings = overlay(layers)
    # A key at its default is no setting of another method: what `config show` wrote serves any ``--method``.
    method, _ = settings.get("adapter.method", ("duallora", ""))
    takes = SECTIONS["adapter"][is_of_another(method)].model_fields
    for leaf, owner in leaves("adapter").items():
        key, default = f"adapter.{leaf}", owner.model_fields[leaf].get_default(call_default_factory=True)
        if leaf not in takes and key in settings and settings[key][0] == default:
            del settings[key]
    problems = list(problems)
    tree: dict[str, Any] = {"data": {}}
    for key, (value, _) in settings.items():
        section, _, leaf = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems += _explain(error, settings, incomplete=any("data." in problem for problem in problems))
    if problems:
        raise ConfigError(*problems)
    return recipe


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
                settings[field] = (_with_entry(settings.get(field), entry, value), where)
            else:
                settings[key] = (value, where)
    return settings


def resolve(key: str) -> tuple[str | None, str]:
    """The dotted key meant, and the entry of its mapping if one is named; or (None, what is wrong)."""
    if key in KEYS:
        return key, ""
    found = _candidates(key)
    if len(found) == 1:
        return found[0], ""
    if found:
        return None, f"{key} is ambiguous: write {' or '.join(found)}"
    if "." in key:
        for mapping in (known for known in KEYS if allowed(known).startswith("mapping")):
            for prefix in (mapping, mapping.partition(".")[2]):
                if key.startswith(prefix + ".") and key != prefix + ".":
                    return mapping, key[len(prefix) + 1 :]
    return None, _a_section(key) if key in SECTIONS else _unknown(key)


def nearest(key: str) -> list[str]:
    """The known dotted keys a misspelt, misplaced or foreign key most likely means, best first; may be empty."""
    section, _, leaf = key.rpartition(".")
    leaf = leaf.replace("-", "_").lower()
    if found := _candidates(leaf):
        return found
    if leaf in SYNONYMS:
        return [SYNONYMS[leaf]]
    if not section and (close := _close(leaf, Recipe.model_fields)):
        return close
    if section in SECTIONS and (close := _close(leaf, leaves(section))):
        return [f"{section}.{close[0]}"]
    for close_leaf in _close(leaf, sorted({name.rpartition(".")[2] for name in KEYS} | set(SYNONYMS))):
        return _candidates(close_leaf) or [SYNONYMS[close_leaf]]
    return _close(key, KEYS)


def _close(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)


def _candidates(leaf: str) -> list[str]:
    """The dotted keys that end in this name."""
    return [key for key in KEYS if key.rpartition(".")[2] == leaf]


def _unknown(key: str) -> str:
    for former, now in FORMER.items():
        if key in (former, former.partition(".")[2]):
            return f"unknown key {key}; {now}"
    if names := nearest(key):
        return f"unknown key {key}; did you mean {' or '.join(names)}?"
    section = key.partition(".")[0]
    known: Iterable[str] = leaves(section) if section in SECTIONS else Recipe.model_fields
    return f"unknown key {key}; known here: {', '.join(known)}"


def _a_section(name: str) -> str:
    return f"{name} is a section: set its keys, such as {name}.{next(iter(leaves(name)))}"


def _with_entry(held: Placed | None, entry: str, value: Any) -> dict[str, Any]:
    """A mapping, where one is held, with one entry more."""
    return {**held[0], entry: value} if held and isinstance(held[0], dict) else {entry: value}


def _read_file(path: Path) -> tuple[dict[str, Placed], list[str]]:
    """The settings of a file by dotted key, and what is wrong with it."""
    content, problems = walk_yaml(path, 1, f"with the keys {', '.join(Recipe.model_fields)}")
    values: dict[str, Placed] = {}
    for name, (value, where) in content.items():
        if name in SECTIONS and isinstance(value, dict):
            for leaf, placed in value.items():
                key = f"{name}.{leaf}"
                if key in KEYS:
                    values[key] = placed
                else:
                    problems.append(f"{placed[1]}: {_unknown(key)}")
        elif name in SECTIONS:
            if value is not None:  # a heading with nothing under it is an empty section
                problems.append(f"{where}: {_a_section(name)}")
        elif name in Recipe.model_fields:
            values[name] = (value, where)
        else:
            problems.append(f"{where}: {_unknown(name)}")
    return values, problems


def _read_overrides(overrides: Iterable[str], file: Mapping[str, Placed], problems: list[str]) -> dict[str, Placed]:
    values: dict[str, Placed] = {}
    for override in overrides:
        where = f"--set {override if len(override) <= 80 else override[:77] + '...'}"
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            problems.append(f"{where}: expected KEY=VALUE, such as train.learning_rate=2e-4")
            continue
        field, entry = resolve(key.strip())
        if field is None:
            problems.append(f"{where}: {entry}")
            continue
        try:
            value = plain_value(text, where)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if entry:  # one entry of a mapping: adapter.rank_pattern.q_proj=8
            value = _with_entry(values.get(field) or file.get(field), entry, value)
        values[field] = (value, where)
    return values


def _explain(error: ValidationError, settings: Mapping[str, Placed], *, incomplete: bool) -> Iterator[str]:
    """pydantic's findings, one line per key, in the words of this module."""
    seen = set()
    strangers: list[str] = []  # keys that the method does not take
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
            blamed = (name for name in KEYS if name in settings and re.search(rf"\b{name}\b", text))
            places = dict.fromkeys(settings[name][1] for name in blamed)
            yield f"{', '.join(places)}: {text}" if places else text
        elif item["type"] == "extra_forbidden":
            strangers.append(key)
        else:
            value, where = settings[key]
            expected = allowed(key, owner)
            yield f"{where}: {key}: {show(value)} is not accepted; expected {expected}{_hint(value, expected)}"
    if strangers:
        method, _ = settings.get("adapter.method", ("duallora", ""))
        places = dict.fromkeys(settings[key][1] for key in strangers[:5])
        named = ", ".join(f"{key} = {show(settings[key][0])}" for key in strangers[:5])
        more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
        whose = "for other methods; Dual LoRA's settings are keys of adapter itself"
        if method != "duallora":
            known = ", ".join(OtherSection.model_fields)
            whose = f"Dual LoRA's, but adapter.method is {show(method)}, which takes {known}"
        yield f"{', '.join(places)}: {named}{more}: {whose}"


def _hint(value: Any, expected: str) -> str:
    number = "integer" in expected or "number" in expected
    if isinstance(value, str) and number and re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", value):
        return " (remove the quotes)"
    if isinstance(value, str) and expected == "true or false":
        return " (YAML 1.2 has no yes, no, on or off)"
    if isinstance(value, (int, float)) and "text" in expected:
        return " (write it in quotes)"
    return ""
