"""Merging on a model of two layers: what is timed does what it says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from duallora.bench import methods

spec = importlib.util.spec_from_file_location(
    "model_merge", Path(__file__).parents[2] / "benchmarks" / "model_merge.py"
)
merge = importlib.util.module_from_spec(spec)
spec.loader.exec_module(merge)

CPU = torch.device("cpu")


@pytest.fixture
def key(tiny_causal_folder):
    return {"model": str(tiny_causal_folder), "rank": 2, "dtype": "float32"}


def test_the_verbs_are_timed_from_the_state_they_start_from(key):
    """In an order drawn anew each round: a merge of a merged model would be a warning, and quick."""
    model = methods.adapt(merge._base(key, CPU), merge._adapters(key)[methods.EXACT]).eval()
    layers = merge._layers(model)
    before = [layer.get_base_layer().weight.clone() for layer in layers]
    verbs = merge._verbs(model)
    for name in ("merge", "merge", "unmerge", "merge_and_unload", "unmerge", "unmerge", "merge", "merge_and_unload"):
        verbs[name].before()
        assert all(layer.merged == (name == "unmerge") for layer in layers)
        verbs[name].run()
        assert all(layer.merged == (name == "merge") for layer in layers)
    weights = [layer.get_base_layer().weight for layer in layers]
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    assert len(layers) == 14


def test_a_cell_of_merging_is_told_in_copies_of_the_same_weights(key, tmp_path):
    output = tmp_path / "merge.json"
    dtype = key.pop("dtype")
    assert [merge.bench(output, "cpu", 3, 60.0, **key)["measured"] for _ in range(2)] == [2, 0]
    key |= {"dtype": dtype, "what": "merge"}
    (found,) = [cell for cell in json.loads(output.read_text())["cells"] if cell["cell"] == key]
    base = merge._base(key, CPU)
    linear = [m.weight for m in base.modules() if type(m) is torch.nn.Linear and m is not base.get_output_embeddings()]
    assert found["layers"] == len(linear) == 14
    assert found["weight_bytes"] == sum(weight.numel() * 4 for weight in linear)
    for verb in merge.VERBS:
        for name in (methods.EXACT, methods.LORA):
            one = found["methods"][f"{name}: {verb}"]
            copied = found["methods"][merge.COPY]["median_s"]
            assert one["ratio_to_copy"]["median"] == pytest.approx(one["median_s"] / copied)
