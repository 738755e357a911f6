"""Inputs damaged at random, by a seed each: whatever they are, a verb ends in one line with an exit code, and soon."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import SETTINGS, WEIGHTS, Case, Stage, ended

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1.5, -0.0, 1e-300, 1e308, 1e999, float("nan"), "", " ", "a", "0", "nan",
    "null", "(((", "(a+)+$", "../..", "/etc/passwd", "\x00", "\ud800", "é", "😀", "x" * 5000, [], [None], [[]], ["a"] * 100,
    {}, {"a": None}, {"": ""}, {"a": {"b": {"c": {}}}},
)  # fmt: skip
MAY_END = (0, 2, 3, 4, 5, 7, 8)
CHEAP = 0.9  # of the cases look at files alone


def spoil_bytes(content: bytes, draw: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(found) if draw.random() < 0.5 else min(len(found), 2000))
        how = draw.randrange(4)
        if how == 0:
            found[at] = draw.randrange(256)
        elif how == 1:
            del found[at : at + draw.choice((1, 4, 100))]
        elif how == 2:
            found[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 4, 100))))
        else:
            found[at:at] = found[: draw.choice((1, 16, 200))]
        found = found or bytearray(b" ")
    return bytes(found[: draw.randrange(len(found)) + 1] if draw.random() < 0.15 else found)


def spoil_json(found: Any, draw: random.Random) -> Any:
    """With one value anywhere replaced, dropped, or put under another name."""
    if isinstance(found, (dict, list)) and found and draw.random() < 0.85:
        key = draw.choice(list(found)) if isinstance(found, dict) else draw.randrange(len(found))
        copied = found.copy()
        if isinstance(copied, dict) and draw.random() < 0.1:
            copied.pop(key)
        elif isinstance(copied, dict) and draw.random() < 0.1:
            copied[draw.choice(("x", "", "auto_map", "r", key.upper()))] = copied[key]
        else:
            copied[key] = spoil_json(copied[key], draw)
        return copied
    return draw.choice(NASTY)


def spoil_text_of_json(content: bytes, draw: random.Random) -> bytes:
    """A JSON file, of which a value or some bytes are spoiled."""
    if draw.random() < 0.3:
        return spoil_bytes(content, draw)
    try:
        return json.dumps(spoil_json(json.loads(content), draw)).encode("utf-8", "surrogatepass")
    except ValueError:
        return spoil_bytes(content, draw)


def _files(folder: Path, *names: str) -> list[str]:
    return [name for name in names if (folder / name).is_file()]


def in_an_adapter(stage: Stage, draw: random.Random) -> tuple[list[Any], Path]:
    folder = stage.place(stage.straight / "adapter")
    names = _files(folder, WEIGHTS, "adapter_config.json", "duallora.json", "tokenizer_config.json", "tokenizer.json")
    name = draw.choice(names)
    spoil = spoil_bytes if name == WEIGHTS else spoil_text_of_json
    (folder / name).write_bytes(spoil((folder / name).read_bytes(), draw))
    cheap = ["--files-only"] if draw.random() < CHEAP else []
    return ["check", folder, *cheap], folder


def in_a_base(stage: Stage, draw: random.Random) -> tuple[list[Any], Path]:
    folder = stage.place(stage.model)
    names = _files(
        folder,
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    )
    name = draw.choice([*names, "model.safetensors"])
    spoil = spoil_text_of_json if name.endswith("json") else spoil_bytes
    (folder / name).write_bytes(spoil((folder / name).read_bytes(), draw))
    return ["train", "--model", folder, "--data", stage.rows, "-o", folder / "run", "--dry-run"], folder


def in_rows(stage: Stage, draw: random.Random) -> tuple[list[Any], Path]:
    path = stage.place().with_suffix(draw.choice((".jsonl", ".json", ".csv")))
    content = stage.rows.read_bytes()
    rows = [json.loads(line) for line in content.splitlines()]
    if path.suffix == ".json":
        content = json.dumps(rows).encode()
    elif path.suffix == ".csv":
        content = b"prompt,completion\n"
        content += b"".join(f'"{row["prompt"]}",{row["completion"]}\n'.encode() for row in rows)
    if draw.random() < 0.5 and path.suffix == ".jsonl":
        lines = content.splitlines()
        at = draw.randrange(len(lines))
        lines[at] = spoil_text_of_json(lines[at], draw)
        content = b"\n".join(lines)
    else:
        content = spoil_bytes(content, draw)
    path.write_bytes(content)
    return ["data", "check", "--data", path, "--model", stage.model], path


def in_a_recipe(stage: Stage, draw: random.Random) -> tuple[list[Any], Path]:
    path = stage.place().with_suffix(".yaml")
    if not (written := stage.folder / "recipe.yaml").exists():
        done = stage.call("config", "show", "--data", stage.rows, "--model", stage.model)
        written.write_text(done.said[done.said.index("model:") :] if "model:" in done.said else done.said)
    path.write_bytes(spoil_bytes(written.read_bytes(), draw))
    return ["config", "show", "-c", path], path


def in_settings(stage: Stage, draw: random.Random) -> tuple[list[Any], Path]:
    adapter = "r alpha target_modules magnitude rank_pattern modules_to_save method"
    run = "learning_rate epochs report_to optimizer on_spike nosuch"
    known = [setting.partition("=")[0] for setting in SETTINGS]
    known += [*(f"adapter.{name}" for name in adapter.split()), *(f"train.{name}" for name in run.split())]
    value = draw.choice(NASTY)
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.replace("\x00", "\\0").encode("utf-8", "replace").decode()
    return ["config", "show", "--data", stage.rows, "--set", f"{draw.choice(known)}={text}"], stage.place()


def in_arguments(stage: Stage, draw: random.Random) -> tuple[list[Any], Path]:
    options = "--data --model --set -c --json --files-only --base --resume auto -o --rank --seed --"
    words = [*options.split(), str(stage.rows), str(stage.model), str(stage.straight)]
    words += ["r=4", "-1", "nan", "", "~nobody/x", "a" * 300, "--no-such"]
    verbs = ("check", "data check", "data preview", "config show", "merge", "eval", "train --dry-run")
    verb = draw.choice(verbs).split()
    output = stage.place()
    return [*verb, *draw.choices(words, k=draw.randrange(6))], output


KINDS: dict[str, Callable[[Stage, random.Random], tuple[list[Any], Path]]] = {
    "adapter": in_an_adapter,
    "base": in_a_base,
    "rows": in_rows,
    "recipe": in_a_recipe,
    "settings": in_settings,
    "arguments": in_arguments,
}


def fuzz(stage: Stage, long: bool) -> Iterator[Case]:
    """Bytes and values of adapters, bases, rows, recipes, settings and command lines, by a seed each."""
    for kind, make in KINDS.items():
        for seed in range(1700 if long else 20):
            arguments, made = make(stage, random.Random(f"{kind} {seed}"))
            done = stage.call(*arguments, seconds=30)
            case = ended(done, MAY_END, f"{kind}, seed {seed}", within=10)
            grew = done.peak - stage.idle
            if case.survived and grew > 600 << 20:
                case = Case(case.name, False, f"{grew >> 20} MiB more than an idle process")
            yield case if case.survived else case._replace(note=f"{' '.join(map(str, arguments))[:120]}: {case.note}")
            stage.drop(made)
