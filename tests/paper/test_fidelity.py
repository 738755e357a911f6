"""docs/fidelity.md: its commands parse, its tests exist, its figures are the measured ones, and both wrong readings show."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from peft import get_peft_model
from torch import nn

import duallora
from duallora.cli.app import app
from duallora.config.load import load_recipe
from duallora.paper import reproduce
from duallora.train import prepare

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`duallora ([a-z][^`]* [^`]*)`", PAGE)))


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line):
    name, *words = shlex.split(line)
    group = typer.main.get_command(app)
    with typer.Context(group) as context:
        command, rest = group, [name, *words]
        while hasattr(command, "get_command"):
            command = command.get_command(context, rest.pop(0))
            assert command is not None
        given = command.make_context(name, rest).params
    if name == "reproduce":
        assert reproduce.parts(given["name"], given["scale"], given["only"] or (), None, given["settings"] or ())
    if name == "train":
        settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        prepare.check_settings(load_recipe(None, settings, task=words[words.index("--task") + 1]))


def test_every_test_it_names_exists():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 40
    assert [name for name in sorted(named) if f"def {name}(" not in text] == []


def test_the_overhead_is_the_measured_one():
    cells = json.loads((ROOT / "results" / "bench" / "step.json").read_text())["cells"]
    plain = {
        c["cell"]["dtype"]: c["methods"] for c in cells if not c["cell"]["checkpointing"] and not c["cell"]["masked"]
    }
    single, half = plain["float32"], plain["bfloat16"]
    shown_there = PAGE.split("<!-- overhead -->")[1].split("<!-- /overhead -->")[0].splitlines()
    lines = [line for line in shown_there if line[:3] in ("| D", "| t")]
    for line, method in zip(lines, ("duallora", "plain autograd"), strict=True):
        measured = [own[method]["ratio_to_lora"]["median"] for own in (single, half)]
        measured.append(single[method]["peak_ratio_to_lora"])
        shown = [float(cell) for cell in line.split("|")[2:5]]
        assert shown == pytest.approx(measured, abs=0.00501)


def layer(**factors):
    """A float64 layer [7, 10] without bias, its gate open, r 3; and its factors A, B, C, D."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 7, bias=False, dtype=torch.float64))
    config = duallora.DualLoraConfig(r=3, alpha=6.0, target_modules=["0"], warmup="none")
    adapted = get_peft_model(model, config).double()
    one = adapted.base_model.model[0]
    found = [getattr(one, f"duallora_{name}")["default"] for name in "ABCD"]
    with torch.no_grad():
        for name, factor in zip("ABCD", found, strict=True):
            factor.copy_(factors.get(name, torch.randn_like(factor)))
    return adapted, one, found


def test_the_layer_is_linear_and_its_wrong_reading_is_not():
    """f(x + z) = f(x) + f(z), and merging changes nothing; with ReLU and Sign on activations neither holds."""
    adapted, one, (A, B, C, D) = layer()
    W0, x, z = one.get_base_layer().weight.detach().clone(), *torch.randn(2, 5, 10, dtype=torch.float64)

    def wrong(v):
        return v @ W0.T + 2 * torch.relu(v @ A.T @ B.T) * torch.where(v @ C.T @ D.T > 0, 1.0, -1.0)

    with torch.no_grad():
        expected = adapted(x)
        torch.testing.assert_close(adapted(x + z), adapted(x) + adapted(z), rtol=0, atol=1e-12)
        assert (wrong(x + z) - wrong(x) - wrong(z)).abs().max() > 0.1
        torch.testing.assert_close(adapted.merge_and_unload()(x), expected, rtol=0, atol=1e-12)
        assert (expected - wrong(x)).abs().max() > 0.1


def test_a_direction_of_zeros_is_minus_one():
    """D = 0: dW = -s ReLU(B A), where torch.sign would give 0 and no gradient to A and B."""
    adapted, one, (A, B, _, _) = layer(D=torch.zeros(7, 3, dtype=torch.float64))
    delta = one.get_delta_weight("default").detach()
    expected = -6 / math.sqrt(9) * (B @ A).detach().clamp(min=0)
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-12)
    adapted(torch.ones(1, 10, dtype=torch.float64)).sum().backward()
    assert A.grad.abs().max() > 0
    assert B.grad.abs().max() > 0
