"""The host's benchmark on a few calls: who competes in each pass."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from duallora.bench import host, methods


def test_the_passes_are_what_they_are_called():
    x = torch.randn(host.TOKENS, host.WIDTH, requires_grad=True)
    seen = []

    def layer(x):
        y = 2 * x
        seen.append(y.requires_grad)
        return y

    for what, recorded, gradient in zip(host.PASSES, (False, True, True), (False, False, True), strict=True):
        x.grad = None
        host._subject(what, layer, x, torch.ones_like(x), 1).run()
        assert (seen.pop(), x.grad is not None) == (recorded, gradient), what


def test_the_verb_times_one_call_of_each_layer_in_every_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "measure", partial(host.measure, times=5))
    host.bench(tmp_path / "host.json", rounds=3, seconds=0, device="cpu")
    cells = json.loads((tmp_path / "host.json").read_text())["cells"]
    assert [cell["cell"]["pass"] for cell in cells] == list(host.PASSES)
    for found in (cell["methods"] for cell in cells):
        assert set(found) == {host.BARE, methods.LORA, methods.DORA, methods.EXACT}
        lora, exact = found[methods.LORA], found[methods.EXACT]
        assert exact["ratio_to_lora"]["median"] == pytest.approx(exact["median_s"] / lora["median_s"])
