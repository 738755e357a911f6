"""The recipe reader: every way to get a setting wrong is one line of text a person can act on, before torch is loaded."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from duallora.config import recipe as recipes
from duallora.config.load import load_recipe, nearest
from duallora.config.recipe import KEYS, Recipe, fingerprint, recipe_schema, recipe_yaml
from duallora.config.yaml import yaml_value
from duallora.errors import ConfigError

TASK = ["data.task=e2e"]


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# file content -> fragments that the message must hold (the file's name and line are asserted where a line is given)
BAD_FILES: list[tuple[str, str | bytes, list[str]]] = [
    (
        "unknown key",
        "train:\n  lerning_rate: 1",
        ["recipe.yaml:2: unknown key train.lerning_rate; did you mean train.learning_rate?"],
    ),
    ("unknown section", "adaptor:\n  r: 8", ["recipe.yaml:1", "unknown key adaptor", "did you mean adapter?"]),
    ("leaf at the top level", "r: 8", ["recipe.yaml:1", "did you mean adapter.r?"]),
    ("ambiguous leaf at the top", "batch_size: 8", ["did you mean train.batch_size or eval.batch_size?"]),
    ("a name of PEFT", "adapter:\n  lora_alpha: 8", ["recipe.yaml:2", "did you mean adapter.alpha?"]),
    ("a former key", "adapter:\n  start: runs/x", ["yaml:2: unknown key adapter.start; it is now adapter.init_from"]),
    (
        "a key that is gone",
        "adapter: {gradient_tokens_by: x}",
        ["yaml:1: unknown key adapter.gradient_tokens_by; it is gone"],
    ),
    (
        "no regular expression",
        "adapter: {target_modules: (((}",
        ['yaml:1: adapter.target_modules holds "((("', "no regular"],
    ),
    ("no expression in it", "adapter: {rank_pattern: {'a[': 3}}", ['adapter.rank_pattern holds "a["']),
    ("of another method", "adapter: {method: lora, exclude_modules: '*'}", ['adapter.exclude_modules holds "*"']),
    ("hopeless key", "zzzz: 1", ["recipe.yaml:1", "unknown key zzzz", "model, adapter, data"]),
    ("rank 0", "adapter:\n\n  r: 0", ["recipe.yaml:3", "adapter.r: 0", "integer from 1 to 65536"]),
    ("fractional rank", "adapter: {r: 8.0}", ["adapter.r: 8.0", "integer"]),
    ("rank 10^9", "adapter: {r: 1000000000}", ["adapter.r: 1000000000", "to 65536"]),
    ("rank true", "adapter: {r: true}", ["adapter.r: true", "integer"]),
    ("rank in quotes", 'adapter: {r: "8"}', ['adapter.r: "8"', "remove the quotes"]),
    ("alpha 0", "adapter: {alpha: 0}", ["adapter.alpha: 0", "finite number > 0 or null"]),
    ("alpha NaN", "adapter: {alpha: .nan}", ["adapter.alpha: nan", "finite"]),
    ("list for a number", "train: {batch_size: [8]}", ["train.batch_size: [8]", "integer >= 1"]),
    ("yes for true", "train: {gradient_checkpointing: yes}", ['"yes"', "true or false", "YAML 1.2"]),
    ("unknown option", "adapter: {ste_clip: hard}", ['"hard"', '"chain", "update", "none" or "window"']),
    ("NUL in a path", 'output: "a\\0b"', ["output:", "text"]),
    ("rank 0 in a pattern", "adapter: {rank_pattern: {q: 0}}", ['adapter.rank_pattern: {"q": 0}', "mapping"]),
    ("no target", "adapter: {target_modules: []}", ["adapter.target_modules: []", "non-empty"]),
    ("section is a value", "model: gpt2", ["recipe.yaml:1", "model is a section", "model.name"]),
    (
        "both data sources",
        "data:\n  path: a\n  task: b",
        ["recipe.yaml:2", "recipe.yaml:3", "data.path", "data.task", "keep one"],
    ),
    ("no data source", "seed: 1", ["data.path", "data.task", "--data", "--task"]),
    ("eval data for a task", "data: {task: b, eval_path: c}", ["data.task", "data.eval_path", "keep one"]),
    ("two warm-ups", "train: {lr_warmup_steps: 9, lr_warmup_ratio: 0.1}", ["train.lr_warmup_steps = 9", "keep one"]),
    (
        "merged with dropout",
        "adapter:\n  forward: merged\n  duallora_dropout: 0.1",
        ["recipe.yaml:2", "recipe.yaml:3", "added"],
    ),
    ("layers of a pattern", "adapter: {layers_to_transform: 1}", ["adapter.layers_to_transform", "list of names"]),
    ("residual with fixed signs", "adapter: {warmup: residual, direction: fixed}", ["adapter.warmup", "ramp"]),
    ("three ranks", "adapter: {rank_pattern: {q: [1, 2, 3]}}", ["[1, 2, 3]", "2-item list"]),
    ("key twice", "train:\n  epochs: 1\n  seed: 1\n  epochs: 2", ["recipe.yaml:4", "epochs is set twice", "line 2"]),
    ("key twice in a pattern", "adapter:\n  rank_pattern: {q: 1, q: 2}", ["recipe.yaml:2", "q is set twice"]),
    ("merge key", "<<: {seed: 1}", ["recipe.yaml:1", "merge keys"]),
    ("key that is a list", "? [a]\n: 1", ["recipe.yaml:1", "not text"]),
    ("python tag", "seed: !!python/object/apply:os.system [ls]", ["recipe.yaml:1", "seed", "tag", "not accepted"]),
    ("open bracket", "seed: [1", ["recipe.yaml:1", "not valid YAML"]),
    ("alias", "seed: &x 1\noutput: *x", ["recipe.yaml:2", "aliases (*) are not accepted"]),
    ("not UTF-8", b"seed: 1\nmodel: {name: \xff}", ["recipe.yaml:2", "UTF-8", "0xff"]),
    ("an integer of 5000 digits", "seed: " + "9" * 5000, ["recipe.yaml:1", "seed", "cannot be read"]),
    ("too deep", "adapter: {rank_pattern: " + "[" * 1000 + "}", ["nested too deeply"]),
    ("a data file", "seed: 1 #" + "x" * (1 << 16), ["recipe.yaml", "larger than"]),
]


@pytest.mark.parametrize(("text", "fragments"), [case[1:] for case in BAD_FILES], ids=[case[0] for case in BAD_FILES])
def test_a_bad_file_is_one_clear_config_error(tmp_path, text, fragments):
    """Each message names place, key, value and what is allowed; nothing else than ConfigError comes out; under 1 s."""
    path = write(tmp_path, text)
    begin = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert time.process_time() - begin < 1
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert "pydantic" not in message
    assert "Traceback" not in message
    assert len(message) < 2000


BAD_OVERRIDES = [
    ("lerning_rate=1", ["--set lerning_rate=1", "did you mean train.learning_rate?"]),
    ("batch_size=8", ["ambiguous", "train.batch_size or eval.batch_size"]),
    ("learning_rate", ["expected KEY=VALUE"]),
    ("train=3", ["train is a section", "train.epochs"]),
    ("train.learning_rate=fast", ['train.learning_rate: "fast"', "finite number > 0"]),
    ("r=!!python/name:os.system", ["tag"]),
    ("adapter.warmup_steps=1e30", ["adapter.warmup_steps: 1e+30", 'integer >= 0 or "auto"']),
    ("alpha=" + "9" * 5000, ["--set alpha=999", "cannot be read as int of at most 4300 digits"]),
    ("alpha=" + "9" * 400, ["adapter.alpha", "finite number > 0"]),
    ("chat_template_kwargs=3", ["data.chat_template_kwargs: 3", "expected mapping of names to any value or null"]),
    ("r=", ["adapter.r: null", "integer"]),
    ("lr=2e-4", ["did you mean train.learning_rate?"]),
    ("start=x", ["--set start=x: unknown key start; it is now adapter.init_from"]),
    ("rank_pattern.=4", ["unknown key rank_pattern."]),
    ("data.path=mine.csv", ["--set data.path=mine.csv", "--set data.task=e2e", "keep one"]),
]


@pytest.mark.parametrize(("override", "fragments"), BAD_OVERRIDES)
def test_a_bad_override_names_itself(override, fragments):
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, [*TASK, override])
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda folder: folder / "none.yaml", "no such file"),
        (lambda folder: folder, "cannot be read"),
        (lambda folder: Path("a\0b"), "cannot be read"),
        (lambda folder: folder / ("x" * 5000), "cannot be read"),
    ],
)
def test_an_unreadable_path_is_a_config_error(tmp_path, make, fragment):
    with pytest.raises(ConfigError, match=fragment):
        load_recipe(make(tmp_path), TASK)


def test_all_problems_are_listed_at_once(tmp_path):
    """A user who made three mistakes sees three lines, not one after the other."""
    path = write(tmp_path, "train:\n  epochs: 0\n  lr: 1\nadapter:\n  r: x\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, [*TASK, "nonsense"])
    message = str(caught.value)
    assert message.startswith("4 problems")
    for fragment in ("yaml:2: train.epochs: 0", "yaml:3: unknown key train.lr", "yaml:5: adapter.r", "--set nonsense"):
        assert fragment in message


def test_a_misspelt_data_key_is_not_also_reported_as_missing_data(tmp_path):
    path = write(tmp_path, "data:\n  pth: mine.csv\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert "did you mean data.path?" in str(caught.value)
    assert "neither" not in str(caught.value)


def test_many_problems_are_cut_off(tmp_path):
    path = write(tmp_path, "".join(f"unknown_{i}: 1\n" for i in range(500)))
    with pytest.raises(ConfigError, match="and 481 more"):  # 500 keys and the missing data source, 20 shown
        load_recipe(path)


def test_flags_name_themselves_in_errors():
    with pytest.raises(ConfigError, match=r"--data, --task: data\.path"):
        load_recipe(data="a.csv", task="e2e")
    with pytest.raises(ConfigError, match="--seed: seed: -1"):
        load_recipe(task="e2e", seed=-1)


def test_later_sources_win(tmp_path):
    """defaults < file < --set < flags, key by key."""
    path = write(tmp_path, "seed: 1\nmodel: {name: file, dtype: bfloat16}\ntrain: {epochs: 2}\ndata: {task: e2e}\n")
    recipe = load_recipe(path, ["model.name=set", "train.batch_size=3"], model="flag", seed=7)
    assert (recipe.model.name, recipe.model.dtype, recipe.seed) == ("flag", "bfloat16", 7)
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.learning_rate) == (2.0, 3, 1e-3)


@pytest.mark.parametrize(
    ("file", "overrides", "flags", "expected"),
    [
        ("data: {task: e2e, data_dir: d, max_length: 99}", [], {"data": "m.csv"}, {"path": "m.csv", "task": None, "data_dir": None, "max_length": 99}),
        ("data: {path: m.csv, eval_path: n.csv, format: alpaca}", ["task=boolq"], {}, {"path": None, "eval_path": None, "format": None, "task": "boolq"}),
        ("train: {lr_warmup_ratio: 0.2}", ["lr_warmup_steps=10"], {"task": "e2e"}, {"lr_warmup_steps": 10, "lr_warmup_ratio": None}),
        ("", ["lr_warmup_steps=10"], {"task": "e2e"}, {"lr_warmup_steps": 10, "lr_warmup_ratio": None}),
        ("", [], {"task": "e2e"}, {"lr_warmup_steps": None, "lr_warmup_ratio": "auto"}),
        ("adapter: {rank_pattern: {q: 8, v: 8}}", ["rank_pattern.q=4"], {"task": "e2e"}, {"rank_pattern": {"q": 4, "v": 8}}),
        ("", ["rank_pattern.layers.0.q=4", "adapter.rank_pattern.^x$=2", "alpha_pattern.v=1"], {"task": "e2e"},
         {"rank_pattern": {"layers.0.q": 4, "^x$": 2}, "alpha_pattern": {"v": 1.0}}),
    ],
)  # fmt: skip
def test_what_a_later_source_excludes_goes_and_its_entries_join_those_of_the_file(
    tmp_path, file, overrides, flags, expected
):
    """A recipe for one data set is used on another without editing it."""
    recipe = load_recipe(write(tmp_path, file), overrides, **flags)
    found = {**recipe.data.model_dump(), **recipe.train.model_dump(), **recipe.adapter.model_dump()}
    assert {key: found[key] for key in expected} == expected


def test_yaml_1_2_scalars():
    """1e-4 without a dot is a number (YAML 1.1 readers give a string); an int passes for a float and stays one value."""
    recipe = load_recipe(
        None, [*TASK, "learning_rate=1e-4", "alpha=32", "target_modules=[q_proj, v_proj]", "revision=2026-01-01"]
    )
    assert recipe.train.learning_rate == 1e-4
    assert recipe.adapter.alpha == 32.0
    assert isinstance(recipe.adapter.alpha, float)
    assert recipe.adapter.target_modules == ["q_proj", "v_proj"]
    assert recipe.model.revision == "2026-01-01"


def test_a_byte_order_mark_crlf_and_empty_sections_are_fine(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbfmodel:\r\ndata:\r\n  task: e2e\r\n")
    assert load_recipe(path) == load_recipe(None, TASK)
    assert load_recipe(write(tmp_path, ""), TASK) == load_recipe(None, TASK)


def test_recipes_are_frozen_strict_and_share_no_defaults():
    first, second = Recipe(data={"task": "e2e"}), Recipe(data={"task": "e2e"})
    with pytest.raises(ValidationError):
        first.seed = 1
    for wrong in ({"seed": "1"}, {"color": 1}):
        with pytest.raises(ValidationError):
            Recipe(data={"task": "e2e"}, **wrong)
    first.adapter.rank_pattern["q"] = 1
    first.train.report_to.append("x")
    assert (second.adapter.rank_pattern, second.train.report_to) == ({}, ["tensorboard"])
    assert json.loads(json.dumps(recipe_schema()))["additionalProperties"] is False


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(
    lambda text: not any(ord(letter) < 32 or ord(letter) == 127 for letter in text)
)
PATTERN = TEXT.map(re.escape)
NUMBER = st.floats(min_value=1e-300, max_value=1e300, exclude_min=True)
COUNT = st.integers(1, 2**31 - 1)
RECIPES = st.builds(
    lambda **sections: Recipe(**sections),
    model=st.fixed_dictionaries({}, optional={"name": TEXT, "revision": st.none() | TEXT, "dtype": st.just("float16")}),
    adapter=st.fixed_dictionaries(
        {},
        optional={
            "r": st.integers(1, 65536),
            "alpha": st.none() | NUMBER,
            "target_modules": PATTERN | st.lists(TEXT, min_size=1, max_size=3),
            "rank_pattern": st.dictionaries(PATTERN, st.integers(1, 9) | st.just([2, 3]), max_size=3),
            "alpha_pattern": st.dictionaries(PATTERN, NUMBER, max_size=3),
            "warmup_steps": st.just("auto") | st.integers(0, 99),
            "duallora_dropout": st.floats(0, 1, exclude_max=True),
        },
    )
    | st.fixed_dictionaries(
        {
            "target_modules": st.lists(TEXT, min_size=1, max_size=3),
            "layers_to_transform": st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1, max_size=3),
        }
    ),
    data=st.one_of(
        st.fixed_dictionaries(
            {"path": TEXT}, optional={"eval_path": TEXT, "format": st.just("alpaca"), "limit": COUNT}
        ),
        st.fixed_dictionaries({"task": TEXT}, optional={"data_dir": TEXT}),
    ),
    train=st.fixed_dictionaries(
        {},
        optional={
            "learning_rate": NUMBER,
            "lr_warmup_steps": st.none() | st.integers(0, 99),
            "gradient_checkpointing": st.booleans(),
            "report_to": st.lists(TEXT, max_size=3),
            "max_steps": st.none() | COUNT,
        },
    ),
    seed=st.integers(0, 2**32 - 1),
    output=st.none() | TEXT,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(RECIPES)
def test_a_written_recipe_reads_back_equal(tmp_path_factory, recipe):
    """Any text (quotes, colons, emoji, line separators, words YAML takes for numbers) and any float survives."""
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(recipe_yaml(recipe), encoding="utf-8", newline="")
    again = load_recipe(path)
    assert again == recipe
    assert fingerprint(again) == fingerprint(recipe)
    assert recipe_yaml(again) == recipe_yaml(recipe)


def test_awkward_text_survives_the_round_trip(tmp_path):
    names = [
        "8",
        "1e-4",
        "0x1f",
        "null",
        "True",
        "yes",
        "~",
        "a: b",
        "a #b",
        "- a",
        "'",
        '"',
        "\\",
        "a:",
        "é\u2028",
        "<<",
        "=",
        "?",
    ]
    names += ["\U0001f600", "\ufeffx", "!x", "*x", "{a}", " a ", "2026-01-01", ".nan", "C:\\models\\x"]
    recipe = Recipe(
        model={"name": "8"}, data={"path": "a", "chat_template_kwargs": {name: name for name in names}}, plugins=names
    )
    assert load_recipe(write(tmp_path, recipe_yaml(recipe))) == recipe


SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10), st.lists(st.integers(), max_size=2)
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(min_size=1, max_size=12), SCALARS, max_size=4))
def test_any_override_gives_a_recipe_or_a_config_error(entries):
    """Nothing but ConfigError leaves the reader, and what it accepts is finite and in range."""
    overrides = [f"{key}={yaml_value(value)}" for key, value in entries.items()]
    with suppress(ConfigError):
        recipe = load_recipe(None, overrides)
        assert recipe.adapter.r >= 1
        assert math.isfinite(recipe.train.learning_rate)
        assert (recipe.data.path is None) != (recipe.data.task is None)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.text(":-[]{}&*!|>'\"%@`,#? \n\tae1.", max_size=60).map(str.encode))
def test_any_file_gives_a_recipe_or_a_config_error(tmp_path, content):
    path = write(tmp_path, content)
    with suppress(ConfigError):
        load_recipe(path, TASK)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([key for key in KEYS if "." in key]), st.data())
def test_one_slip_in_a_long_key_still_finds_it(key, data):
    """Dropping any one letter of a name of six or more suggests the key itself."""
    section, _, leaf = key.rpartition(".")
    if len(leaf) < 6:
        return
    cut = data.draw(st.integers(0, len(leaf) - 1))
    typo = f"{section}.{leaf[:cut]}{leaf[cut + 1 :]}"
    if typo not in KEYS:
        assert key in nearest(typo)


def test_the_fingerprint_ignores_key_order_and_the_run_folder_only(tmp_path):
    texts = [
        "seed: 3\ndata: {task: e2e}\nadapter: {alpha: 4, r: 2, rank_pattern: {a: 1, b: 2}}",
        "adapter: {rank_pattern: {b: 2, a: 1}, r: 2, alpha: 4.0}\noutput: x\ndata: {task: e2e}\nseed: 3",
    ]
    one, two = (load_recipe(write(tmp_path, text)) for text in texts)
    assert fingerprint(one) == fingerprint(two)
    other = [load_recipe(None, [*TASK, change]) for change in ("seed=1", "r=8", "task=boolq", "eval.metrics=false")]
    assert len({fingerprint(recipe) for recipe in [one, load_recipe(None, TASK), *other]}) == 6


def test_a_key_at_its_default_is_no_setting_of_another_method(tmp_path):
    """What `config show` writes serves any method; a value of one's own does not."""
    path = write(tmp_path, recipe_yaml(load_recipe(None, TASK)))
    assert load_recipe(path, ["method=lora"]).adapter.method == "lora"
    assert load_recipe(write(tmp_path, recipe_yaml(load_recipe(path, ["method=lora"]))), ["method=duallora"])
    with pytest.raises(
        ConfigError, match=r"--set init_std=0.05: adapter.init_std = 0.05: Dual LoRA's, but adapter.method"
    ):
        load_recipe(path, ["method=lora", "init_std=0.05"])


def test_the_fingerprint_does_not_move_between_releases():
    """A changed default or field changes it, which makes old checkpoints refuse to resume: do that knowingly."""
    assert fingerprint(Recipe(data={"task": "e2e"})) == FINGERPRINT_OF_THE_DEFAULTS


FINGERPRINT_OF_THE_DEFAULTS = "97023ac55e6c3a3c8b42c54de77bca4fc6fdfb2748ac47a6f8f4554a3576734b"


def test_the_choices_are_those_that_are_implemented():
    from duallora.core import equation
    from duallora.core.settings import hints
    from duallora.ops import BACKENDS

    written = {
        "magnitude": equation.MAGNITUDES, "direction": equation.DIRECTIONS, "ste_clip": equation.STE_CLIPS, "backend": BACKENDS,
    }  # fmt: skip
    assert {name: {*get_args(hints()[name])} for name in written} == {name: {*known} for name, known in written.items()}


def test_a_setting_is_written_once():
    """A new one, in core/settings.py alone, is a field of DualLoraConfig and a key of the recipe, described and checked."""
    program = """
import dataclasses
from duallora.core import settings

before = settings.Settings
@dataclasses.dataclass
class Settings(before):
    toy: settings.Annotated[int, settings.Range(ge=2)] = settings.setting(5, "A toy.")
settings.Settings = Settings

from duallora import DualLoraConfig
from duallora.errors import ConfigError
from duallora.config.load import load_recipe
from duallora.config.recipe import recipe_yaml

assert DualLoraConfig().toy == 5
recipe = load_recipe(None, ["toy=7"], task="e2e")
assert recipe.adapter.toy == 7
assert "# A toy. [integer >= 2]" in recipe_yaml(recipe)
for bad in (lambda: DualLoraConfig(toy=1), lambda: load_recipe(None, ["toy=1"], task="e2e")):
    try:
        bad()
    except ConfigError as error:
        assert "toy" in str(error) and "2" in str(error), error
    else:
        raise AssertionError
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_every_setting_is_described_and_its_default_is_allowed():
    for key in KEYS:
        section, _, leaf = key.rpartition(".")
        owner = recipes.leaves(section)[leaf] if section else Recipe
        description = owner.model_fields[leaf].description
        assert description, key
        assert description.endswith("."), key
        assert "\n" not in description
        assert recipes.allowed(key)
    load_recipe(None, TASK)


def test_the_default_run_folder_names_model_and_data():
    from datetime import datetime

    now = datetime(2026, 3, 4, 5, 6, 7)
    for source, model, expected in [
        ({"task": "e2e"}, "builtin:smollm2-135m", "smollm2-135m-e2e"),
        ({"path": "/a b/my data.jsonl"}, "org/Model-1B", "Model-1B-my-data"),
        ({"path": "../"}, "..", ""),
    ]:
        recipe = Recipe(model={"name": model}, data=source)
        assert recipes.default_output(recipe, now) == "runs/" + "-".join(filter(None, ["20260304-050607", expected]))
