"""The adapter under DDP, FSDP and DeepSpeed: two processes train what one does, and save what one opens.

The scene is `benchmarks/distributed.py`, which writes the table of docs/distributed.md.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

import duallora

REPOSITORY = Path(__file__).parents[2]
SOURCE = REPOSITORY / "benchmarks" / "distributed.py"
slow = pytest.mark.skipif("DUALLORA_SLOW" not in os.environ, reason="slow: `make distributed` runs it")

# Trained in one pair of processes: starting it is what takes the time.
QUICK = ["ddp", "ddp, accumulation 2", "fsdp1", "fsdp2", "fsdp2, bf16"]
ZERO = ["zero1", "zero2", "zero3", "zero2, offload", "zero3, offload"]


@pytest.fixture(scope="module")
def scene():
    spec = importlib.util.spec_from_file_location("distributed_scene", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def one(scene):
    """The adapter of one process."""
    return scene.expected()


@pytest.fixture(scope="module")
def trained(scene, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    scene.pair(QUICK, folder)
    return folder


@pytest.mark.parametrize("strategy", QUICK[:4])
def test_two_processes_train_the_adapter_of_one(scene, one, trained, strategy):
    """Sharded or not, accumulated or not: the same rows a step give the same weights, under the same keys."""
    assert scene.difference(one, scene.adapter(trained / strategy)) < 1e-6
    assert scene.difference(get_peft_model_state_dict(scene.adapted()), one) > 0.01  # that much training moved


def test_in_bf16_the_shards_train_the_same_adapter_as_closely_as_bf16_allows(scene, one, trained):
    found = scene.adapter(trained / "fsdp2, bf16")
    assert {t.dtype for t in found.values() if t.is_floating_point()} == {torch.float32}  # the factors stay float32
    start = get_peft_model_state_dict(scene.adapted())
    assert scene.difference(one, found) < 0.25 * scene.difference(one, start)


@pytest.mark.parametrize("strategy", QUICK)
def test_the_gate_is_open_in_every_process_and_its_counter_is_saved(scene, trained, strategy):
    assert [(trained / f"{strategy}.{rank}.gate").read_text() for rank in (0, 1)] == ["1.0", "1.0"]
    steps = [int(t) for name, t in scene.adapter(trained / strategy).items() if name.endswith("duallora_step")]
    assert steps == [scene.STEPS] * 14


def test_inside_a_forward_the_layer_holds_its_whole_weight_and_takes_the_fast_form(trained):
    assert {strategy: (trained / f"{strategy}.1.form").read_text() for strategy in QUICK} == dict.fromkeys(
        QUICK, "merged"
    )


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_what_shards_have_saved_one_process_opens_and_merges(scene, one, trained, strategy):
    model = PeftModel.from_pretrained(scene.base(), str(trained / strategy)).eval()
    assert duallora.gate(model) == 1.0
    expected = scene.adapted().eval()
    set_peft_model_state_dict(expected, one)
    ids = scene.rows(99)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(logits, expected(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.merge_and_unload()(input_ids=ids).logits, logits)


def test_the_docs_show_the_differences_that_were_recorded():
    text = (REPOSITORY / "docs" / "distributed.md").read_text()
    figures = json.loads((REPOSITORY / "results" / "distributed.json").read_text())["metrics"]
    for strategy, figure in figures.items():
        if strategy != "training_moved":
            shown = f"{figure['difference']:.1e}".replace("e-0", "e-") if figure["difference"] < 1e-3 else "0.04"
            assert f"| {shown} | verified" in text, strategy
    assert f"by {figures['training_moved']:.2f}." in text


@slow
@pytest.mark.parametrize(
    "options", [{"warmup": "residual"}, {"direction": "fixed"}, {"use_dora": True}, {"forward": "added"}]
)
def test_every_form_of_the_adapter_is_sharded_alike(scene, tmp_path, options):
    one = scene.expected(**options)
    for strategy in ("fsdp2", "fsdp1"):
        folder = tmp_path / strategy
        scene.pair([strategy], folder, **options)
        assert scene.difference(one, scene.adapter(folder / strategy)) < 1e-6


@slow
@pytest.mark.parametrize("strategy", ZERO)
def test_deepspeed_trains_the_adapter_of_one_process(scene, one, tmp_path, strategy):
    pytest.importorskip("deepspeed")
    scene.pair([strategy], tmp_path)
    assert scene.difference(one, scene.adapter(tmp_path / strategy)) < 1e-6
    assert [(tmp_path / f"{strategy}.{rank}.gate").read_text() for rank in (0, 1)] == ["1.0", "1.0"]
    # A ZeRO-3 shard is gathered by the base layer's own forward.
    assert (tmp_path / f"{strategy}.1.form").read_text() == ("apart" if "zero3" in strategy else "merged")
