"""What lies beside weights as a stranger may have written it: only data, bounded before anyone acts on it.

:func:`admit` is the gate for the files of a model or an adapter that transformers and tokenizers parse. PEFT in addition
allocates what ``r`` says, matches every pattern with ``re`` against every module's name, and its Auto classes import what
``auto_mapping`` names: :func:`read`, :func:`check` and :func:`check_patterns` bound those. Code of a stranger is never run:
every ``from_pretrained`` of this package has ``trust_remote_code=False``.
"""

from __future__ import annotations

import functools
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from duallora.core.patterns import can_take_for_ever
from duallora.errors import ConfigError, IntegrityError

MAX_BYTES = 1 << 24  # of a configuration (quantized experts are named one by one), a sidecar, a chat template
MAX_VOCABULARY = 1 << 27  # bytes of a file that lists a vocabulary or the tensors of many shards
MAX_DEPTH = 64
# What transformers reads beside weights; of an adapter's own files see `read` and adapters.read_sidecar.
CONFIGURATIONS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template.json",
)  # fmt: skip
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
MAX_LABELS = 1 << 20  # each is given a name before anyone asks for it
MAX_PATTERNS = 5000
MAX_PATTERN = 2000  # characters
SECONDS = 2.0  # of the processor, for all patterns on all modules

_FORMS = {  # the regular expressions that PEFT makes of patterns
    "target_modules": "{}",  # these two if they are no lists
    "exclude_modules": "{}",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
_MATCH = (
    "import json, re, signal, sys\n"
    "seconds, patterns, names = json.load(sys.stdin)\n"
    "signal.setitimer(signal.ITIMER_VIRTUAL, seconds)\n"
    "for pattern in patterns:\n"
    "    for name in names: re.match(pattern, name), re.fullmatch(pattern, name)\n"
)


def admit(folder: Path) -> None:
    """Refuses a folder whose JSON or template files are too large or too deep, are no objects, or hold endless patterns.

    A pattern of tokenizer.json that repeats what itself repeats, as ``(a+)+``, takes time that doubles with each letter, in
    a library that nothing can stop.

    Raises:
        IntegrityError: a file is no JSON, or not of the kind its name says.
        ConfigError: a file is beyond what such files hold.
    """
    read = [path for path in folder.glob("*.json") if path.name in (*CONFIGURATIONS, *VOCABULARIES)]
    templates = [*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")]
    paths = sorted([*read, *folder.glob("*.index.json"), *templates])
    _admit(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@functools.lru_cache(maxsize=64)  # a model is read in three turns: configuration, tokenizer, weights
def _admit(files: tuple[tuple[Path, int, int], ...]) -> None:
    for path, _, _ in files:
        if path.suffix != ".json":
            _bounded(path)
            continue
        found = json_object(path)
        labels, length = found.get("num_labels"), found.get("model_max_length")
        if path.name == "config.json" and isinstance(labels, (int, float)) and labels > MAX_LABELS:
            raise ConfigError(f"{path}: num_labels={str(labels)[:40]}: expected at most {MAX_LABELS:,}")
        if path.name == "tokenizer_config.json" and (
            isinstance(length, bool) or not isinstance(length, int | float | None)
        ):
            raise ConfigError(f"{path}: model_max_length={str(length)[:40]}: expected a number of tokens or null")
        for pattern in _regular_expressions(found) if path.name == "tokenizer.json" else ():
            if can_take_for_ever(pattern):
                raise ConfigError(
                    f"{path} splits text by {pattern[:80]!r}, which repeats what itself repeats and can take for ever; "
                    "do not use this tokenizer"
                )


def _bounded(path: Path) -> None:
    most = MAX_VOCABULARY if path.name in VOCABULARIES or path.name.endswith(".index.json") else MAX_BYTES
    if path.stat().st_size > most:
        raise ConfigError(f"{path} has {path.stat().st_size:,} bytes; such a file has at most {most:,}")


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of bounded size and depth.

    Raises:
        IntegrityError: the file cannot be read, is no JSON, or holds something else than an object.
        ConfigError: it is beyond what such files hold.
    """
    try:
        _bounded(path)
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply for a configuration; do not use it") from None
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be used ({type(error).__name__}: {error})") from error
    if not isinstance(found, dict):
        raise IntegrityError(f"{path} holds a {type(found).__name__}, expected an object with settings")
    level: list[Any] = [found]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
        level = [value for value in level if isinstance(value, (dict, list))]
        if not level:
            return found
    raise ConfigError(f"{path} is nested too deeply for a configuration; do not use it")


def held(folder: Path) -> tuple[int, int]:
    """(tensors, values) that the weights in a model's folder hold, from the headers of its safetensors files alone.

    Packed integers count as two bits a value. Other formats have no such header: a value is then half a byte, and there
    are as many tensors as a configuration may say.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        files = [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".gguf")]
        return 1 << 16, sum(2 * path.stat().st_size for path in files)
    tensors = values = 0
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no iterator)
                tensor = file.get_slice(name)
                packed = {"U8": 4, "I8": 4, "I32": 16, "I64": 32}.get(tensor.get_dtype(), 1)
                tensors, values = tensors + 1, values + packed * math.prod(tensor.get_shape())
    return tensors, values


def _regular_expressions(tokenizer: Mapping[str, Any]) -> list[str]:
    """The patterns of a tokenizer.json: {"Regex": pattern} anywhere but in its vocabulary."""
    found: list[str] = []
    level: list[Any] = [value for name, value in tokenizer.items() if name not in ("model", "added_tokens")]
    while level:
        value = level.pop()
        if isinstance(value, dict):
            found += [value["Regex"]] if isinstance(value.get("Regex"), str) else []
            level += value.values()
        elif isinstance(value, list):
            level += value
    return found


def read(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` as a dictionary; nothing in it is acted on.

    Raises:
        ConfigError: it is larger than any configuration, nested too deeply, or names code to import.
        IntegrityError: it is missing or no JSON object.
    """
    path = folder / "adapter_config.json"
    config = json_object(path)
    for name, (kind, expected) in _KINDS.items():
        if config.get(name) is not None and not kind(config[name]):
            raise ConfigError(f"{path}: {name}={str(config[name])[:40]}: expected {expected}")
    mapping = config.get("auto_mapping") or {}
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if library and not str(library).startswith("transformers."):
        raise ConfigError(
            f"{path}: auto_mapping names the module {library!r}, which loaders would import and run; set auto_mapping to "
            "null unless that module is yours"
        )
    return config


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_steps(value: Any) -> bool:
    return value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("base_model_name_or_path", "task_type", "peft_type", "revision"),
        (lambda value: isinstance(value, str), "text or null"),
    ),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"),
        (lambda value: isinstance(value, str) or _is_names(value), "a pattern or a list of names"),
    ),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (_is_names, "a list of names or null")),
    **dict.fromkeys(
        ("rank_pattern", "alpha_pattern"), (lambda value: isinstance(value, dict), "an object of patterns")
    ),
    "warmup_steps": (_is_steps, 'a whole number of steps, or "auto"'),
}


def check(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Refuses ranks that no stored tensor has, scales that are no positive number, and too many or too long patterns.

    ``config`` is what :func:`read` gave, here and below.

    Raises ConfigError naming the setting, its value and what was expected.
    """
    largest = max((size for shape in shapes.values() for size in shape), default=1)
    ranks = {name: config.get(name) for name in ("r", "r1", "r2")}
    for key, value in (config.get("rank_pattern") or {}).items():
        for part in value if isinstance(value, list) else [value]:
            ranks[f"rank_pattern[{key[:40]!r}]"] = part
    for name, rank in ranks.items():
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= largest):
            raise ConfigError(
                f"{where}: {name}={str(rank)[:40]}, but the largest side of any stored tensor is {largest}: expected a rank "
                "between 1 and that"
            )
    alphas = {name: config.get(name) for name in ("alpha", "lora_alpha")}
    alphas |= {f"alpha_pattern[{key[:40]!r}]": value for key, value in (config.get("alpha_pattern") or {}).items()}
    for name, alpha in alphas.items():
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and math.isfinite(alpha)
        if alpha is not None and not (number and alpha > 0):
            raise ConfigError(f"{where}: {name}={str(alpha)[:40]}: expected a finite number > 0")
    patterns = [pattern for pattern, _ in _patterns(config)]
    if len(patterns) > MAX_PATTERNS:
        raise ConfigError(f"{where} holds {len(patterns):,} module patterns, expected at most {MAX_PATTERNS:,}")
    longest = max(patterns, key=len, default="")
    if len(longest) > MAX_PATTERN:
        raise ConfigError(
            f"{where}: a module pattern of {len(longest):,} characters ({longest[:40]!r}...), expected at most {MAX_PATTERN:,}"
        )


def check_patterns(config: Mapping[str, Any], names: Iterable[str], where: Path) -> None:
    """Matches the patterns against the modules' names in a process that can be stopped; ConfigError if it must be.

    Python's own ``re`` has no time limit, and ``(a+)+$`` takes one that doubles with each letter.
    """
    patterns = [
        (pattern, form) for pattern, form in _patterns(config) if form and not re.fullmatch(r"[\w.-]*", pattern)
    ]
    if not patterns:
        return
    for pattern, form in patterns:
        try:
            re.compile(form)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(
                f"{where}: the module pattern {pattern[:80]!r} is no regular expression: {error}"
            ) from None
    work = json.dumps([SECONDS, [form for _, form in patterns], [*names]])
    command = [sys.executable, "-I", "-S", "-c", _MATCH]
    done = subprocess.run(command, input=work, text=True, capture_output=True, check=False)
    if done.returncode == -signal.SIGVTALRM:
        raise ConfigError(
            f"{where}: the module patterns (first: {patterns[0][0][:80]!r}) take more than {SECONDS:g} s to match the "
            "model's modules; name the modules instead"
        )
    done.check_returncode()


def _patterns(config: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """Every pattern and every module name in a list, with what PEFT matches for it; None where it compares names."""
    found: list[tuple[str, str | None]] = []
    for name in (*_FORMS, "target_parameters"):
        value = config.get(name) or []
        names = isinstance(value, list) and name in ("target_modules", "exclude_modules")
        form = None if names else _FORMS.get(name)
        found += [(each, form and form.format(each)) for each in ([value] if isinstance(value, str) else value)]
    return found
