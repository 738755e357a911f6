"""Pytest plugin that runs PEFT's own test-suite with DualLoraConfig in the place of HiraConfig and LoraConfig.

Nothing in PEFT's files is edited. A test parametrized over configurations keeps its HiRA and LoRA rows, translated; a
test that builds a LoraConfig in its body runs if ``GENERIC`` names it, with ``LoraConfig`` bound to a translating
constructor; every other test is deselected. ``EXCEPTIONS`` become strict expected failures.
"""

from __future__ import annotations

import contextlib
import fnmatch
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from exceptions import EXCEPTIONS, GENERIC
from peft import HiraConfig, LoraConfig, PeftConfig

from duallora import DualLoraConfig

# PEFT's Stable Diffusion helpers import it at module level; no test that needs it is selected.
diffusers: Any = sys.modules.setdefault("diffusers", types.ModuleType("diffusers"))
diffusers.StableDiffusionPipeline, diffusers.__version__ = type("StableDiffusionPipeline", (), {}), "0"

RENAMED = {
    "lora_alpha": "alpha",
    "lora_dropout": "duallora_dropout",
    "hira_dropout": "duallora_dropout",
    "init_lora_weights": "init_weights",
}
WARMUP_STEPS = 2  # the tests train three steps; the default ramp of 100 would leave dW at 0.03 of itself
# target_parameters: PEFT's rows name matrices, which are refused; ours are experts' (tests/tuner/test_experts.py).
KNOWN = set(DualLoraConfig.__dataclass_fields__) - {"target_parameters"}
METHODS = {"lora": "duallora", "hira": "duallora"}  # as test_custom_models names the tuner of a row


class NotOurs(Exception):
    """A row of another method, or one with an option that only LoRA or HiRA has."""


def translated_options(options: dict[str, Any]) -> dict[str, Any]:
    """LoRA's or HiRA's keyword arguments as DualLoraConfig's; NotOurs where there is no equivalent."""
    options = {RENAMED.get(name, name): value for name, value in options.items()}
    if options.get("bias") in ("lora_only", "hira_only"):
        options["bias"] = "duallora_only"
    if not set(options) <= KNOWN or not isinstance(options.get("init_weights", True), bool):
        raise NotOurs
    return {"warmup_steps": WARMUP_STEPS, **options}


class DualAsLora:
    """LoraConfig's constructor: takes LoRA's arguments, makes a DualLoraConfig."""

    def __new__(cls, **options: Any) -> DualLoraConfig:  # type: ignore[misc]
        try:
            return DualLoraConfig(**translated_options(options))
        except NotOurs:
            pytest.skip(f"an option that only LoRA has: {sorted(options)}")


def has_config(value: Any) -> bool:
    return isinstance(value, PeftConfig) or (isinstance(value, type) and issubclass(value, PeftConfig))


def translated(value: Any) -> Any:
    """One value of a row, translated."""
    if value in (HiraConfig, LoraConfig):
        return DualLoraConfig
    if type(value) in (HiraConfig, LoraConfig):
        fresh = type(value)()
        given = {k: v for k, v in vars(value).items() if v != getattr(fresh, k)}
        return DualLoraConfig(**translated_options(given))
    if value is DualLoraConfig or isinstance(
        value, DualLoraConfig
    ):  # a mark of the class, translated for its first test
        return value
    if has_config(value):
        raise NotOurs
    if isinstance(value, dict):
        return translated_options(value)
    return METHODS.get(value, value) if isinstance(value, str) else value


def translated_rows(rows: list[Any]) -> list[Any] | None:
    """The rows of a parametrization that are ours; None where its values are no configurations."""
    cells = [list(row.values) if hasattr(row, "values") and hasattr(row, "marks") else row for row in rows]
    cells = [list(row) if isinstance(row, (tuple, list)) else [row] for row in cells]
    if not any(has_config(value) for row in cells for value in row):
        return None
    ours: list[Any] = []
    seen: list[Any] = []
    for row, values in zip(rows, cells, strict=True):
        try:
            if not any(has_config(value) for value in values):
                raise NotOurs
            new = [translated(value) for value in values]
        except NotOurs:
            continue
        told_apart = new[1:] if isinstance(new[0], str) else new  # without the name of the row
        if told_apart not in seen:  # HiRA's and LoRA's rows with the same options are one row
            seen.append(told_apart)
            ours.append(pytest.param(*new, marks=getattr(row, "marks", ())))
    return ours


def adapt_modules() -> None:
    """What the tests allow for HiRA is allowed for us; and they stay offline, where they would go online once a model."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tests."):
            if getattr(module, "HiraConfig", None) is HiraConfig:
                module.HiraConfig = DualLoraConfig  # type: ignore[attr-defined]
            if hasattr(module, "hub_online_once"):
                module.hub_online_once = contextlib.nullcontext  # type: ignore[attr-defined]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    adapt_modules()
    for node in metafunc.definition.listchain():
        for index, mark in enumerate(node.own_markers):
            if mark.name != "parametrize":
                continue
            names, values, *rest = mark.args if len(mark.args) > 1 else (*mark.args, mark.kwargs["argvalues"])
            rows = translated_rows(list(values))
            if rows is None:
                continue
            options = {k: v for k, v in mark.kwargs.items() if k not in ("ids", "argvalues")}
            node.own_markers[index] = pytest.mark.parametrize(names, rows, *rest, **options).mark


def listed(item: pytest.Item, patterns: Iterable[str]) -> list[str]:
    """Those of ``patterns`` that the test's id matches; brackets stand for themselves."""
    name = item.nodeid.removeprefix("tests/")
    return [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, dropped = [], []
    for item in items:
        values = getattr(item, "callspec", None)
        ours = values is not None and any(
            value is DualLoraConfig or isinstance(value, DualLoraConfig) for value in values.params.values()
        )
        (kept if ours or listed(item, GENERIC) else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
    for item in kept:
        for pattern in listed(item, EXCEPTIONS):
            item.add_marker(pytest.mark.xfail(reason=EXCEPTIONS[pattern], strict=True))
    collected = {item.nodeid.removeprefix("tests/").split("::")[0] for item in items}
    used = {pattern for item in kept for pattern in listed(item, [*EXCEPTIONS, *GENERIC])}
    stale = [p for p in (*EXCEPTIONS, *GENERIC) if p not in used and p.split("::")[0] in collected]
    if stale and not config.option.keyword:
        raise pytest.UsageError(f"exceptions.py lists what PEFT's suite does not have: {stale}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Most of PEFT's tests draw unseeded; an expected failure must not depend on luck."""
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """``LoraConfig`` of the test's module makes a DualLoraConfig while a test of ``GENERIC`` runs."""
    module = item.module  # type: ignore[attr-defined]
    if not listed(item, GENERIC):
        return (yield)
    plain = module.LoraConfig
    module.LoraConfig = DualAsLora
    try:
        return (yield)
    finally:
        module.LoraConfig = plain
