"""An adapter's configuration as a stranger may have written it: bounded before PEFT acts on it.

PEFT allocates what ``r`` says, matches every pattern with ``re`` against every module's name, and its Auto classes import
what ``auto_mapping`` names. Each of the three can be made to exhaust memory or time, or to run code.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from duallora.errors import ConfigError, IntegrityError

MAX_BYTES = 1 << 20
MAX_PATTERNS = 5000
MAX_PATTERN = 2000  # characters
SECONDS = 2.0  # for all patterns on all modules

_MATCH = (
    "import json, re, sys\n"
    "patterns, names = json.load(sys.stdin)\n"
    "for pattern in patterns:\n"
    "    for form in (pattern, r'(.*\\.)?(' + pattern + ')$'):\n"  # PEFT's form for rank_pattern and alpha_pattern
    "        for name in names: re.fullmatch(form, name)\n"
)


def read(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` as a dictionary; nothing in it is acted on.

    Raises:
        ConfigError: it is larger than any configuration, nested too deeply, or names code to import.
        IntegrityError: it is missing or no JSON object.
    """
    path = folder / "adapter_config.json"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes; a configuration has at most {MAX_BYTES:,}")
        config = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply for a configuration; do not use this adapter") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise IntegrityError(f"{path} cannot be used ({type(error).__name__}: {error})") from error
    if not isinstance(config, dict):
        raise IntegrityError(f"{path} holds a {type(config).__name__}, expected an object with the adapter's settings")
    mapping = config.get("auto_mapping") or {}
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if library and not str(library).startswith("transformers."):
        raise ConfigError(
            f"{path}: auto_mapping names the module {library!r}, which loaders would import and run; set auto_mapping to "
            "null unless that module is yours"
        )
    return config


def check(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Refuses ranks that no stored tensor has, scales that are no positive number, and too many or too long patterns.

    Raises ConfigError naming the setting, its value and what was expected.
    """
    largest = max((size for shape in shapes.values() for size in shape), default=1)
    ranks = {name: config.get(name) for name in ("r", "r1", "r2")}
    for key, value in _entries(config.get("rank_pattern")):
        for part in value if isinstance(value, list) else [value]:
            ranks[f"rank_pattern[{key[:40]!r}]"] = part
    for name, rank in ranks.items():
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= largest):
            raise ConfigError(
                f"{where}: {name}={str(rank)[:40]}, but the largest side of any stored tensor is {largest}: expected a rank "
                "between 1 and that"
            )
    alphas = {name: config.get(name) for name in ("alpha", "lora_alpha")}
    alphas |= {f"alpha_pattern[{key[:40]!r}]": value for key, value in _entries(config.get("alpha_pattern"))}
    for name, alpha in alphas.items():
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and math.isfinite(alpha)
        if alpha is not None and not (number and alpha > 0):
            raise ConfigError(f"{where}: {name}={str(alpha)[:40]}: expected a finite number > 0")
    patterns = _patterns(config)
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
    patterns = [pattern for pattern in _patterns(config) if not re.fullmatch(r"[\w.-]*", pattern)]
    if not patterns:
        return
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(
                f"{where}: the module pattern {pattern[:80]!r} is no regular expression: {error}"
            ) from None
    work = json.dumps([patterns, list(names)])
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=work,
            text=True,
            capture_output=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{where}: the module patterns (first: {patterns[0][:80]!r}) take more than {SECONDS:g} s to match the "
            "model's modules; name the modules instead"
        ) from None


def _entries(value: Any) -> list[tuple[str, Any]]:
    return [(str(key), item) for key, item in value.items()] if isinstance(value, dict) else []


def _patterns(config: Mapping[str, Any]) -> list[str]:
    """Every string that PEFT reads as a regular expression, and every module name in a list."""
    found: list[str] = []
    for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = config.get(name)
        found += (
            [str(item) for item in value]
            if isinstance(value, (list, tuple, set))
            else [value]
            if isinstance(value, str)
            else []
        )
    for name in ("rank_pattern", "alpha_pattern"):
        found += [key for key, _ in _entries(config.get(name))]
    return found
