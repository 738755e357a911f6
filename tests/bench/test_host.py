"""The host's benchmark on a few calls: who competes in each pass, and that the times are of one call."""

from __future__ import annotations

import json
import time

import pytest
import torch

from duallora.bench import host, methods

CPU = torch.device("cpu")


@pytest.mark.parametrize("what", host.PASSES)
def test_each_pass_times_one_call_of_each_layer(what):
    begin = time.perf_counter()
    found = host.measure(what, rounds=3, seconds=60, device=CPU, times=5)["methods"]
    spent = time.perf_counter() - begin
    assert set(found) == {host.BARE, methods.LORA, methods.DORA, methods.EXACT}
    assert 0 < sum(method["median_s"] for method in found.values()) * 3 * 5 < 2 * spent
    lora = found[methods.LORA]["median_s"]
    assert found[methods.EXACT]["ratio_to_lora"]["median"] == pytest.approx(found[methods.EXACT]["median_s"] / lora)


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


def test_the_verb_writes_every_pass(tmp_path):
    host.bench(tmp_path / "host.json", rounds=3, seconds=0, device="cpu")
    content = json.loads((tmp_path / "host.json").read_text())
    assert [cell["cell"]["pass"] for cell in content["cells"]] == list(host.PASSES)
