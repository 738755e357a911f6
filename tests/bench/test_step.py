"""The training step on a model of two layers: what is compared, on which batch, over which weights."""

from __future__ import annotations

import json

import pytest
import torch

from duallora import cli
from duallora.bench import memory, methods, step
from duallora.bench.scene import Scene, Stage, bare, share
from duallora.errors import ConfigError, NonFiniteError


@pytest.fixture
def scene(tiny_causal_folder):
    sizes = {"model": str(tiny_causal_folder), "rank": 2, "rows": 3, "length": 24, "device": "cpu"}
    return lambda **options: Scene(**{**sizes, **options})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("options", [{"dtype": "bfloat16", "checkpointing": True}, {"masked": True, "length": 64}])
def test_a_cell_holds_every_method_and_its_ratios(options, scene):
    found = step.measure(scene(**options), rounds=3, seconds=60)["methods"]
    assert {methods.FLOOR, methods.LORA, methods.DORA, methods.HIRA, methods.EXACT, methods.PLAIN} <= set(found)
    equal = found[methods.LORA]["parameters"]
    assert equal == found[methods.EXACT]["parameters"] == found[methods.HIRA]["parameters"] > 0
    lora, floor = found[methods.LORA]["median_s"], found[methods.FLOOR]["median_s"]
    for method in found.values():
        assert method["ratio_to_lora"]["median"] == pytest.approx(method["median_s"] / lora)
        assert method["ratio_to_gemms"]["median"] == pytest.approx(method["median_s"] / floor)


def test_copies_share_the_base_weights_and_train_their_own(scene):
    """Ten copies of a model must fit; a step of one must not move what the others multiply by."""
    stage = Stage(scene())
    before = {name: weight.clone() for name, weight in stage.base.named_parameters()}
    own = {weight.data_ptr() for weight in stage.base.parameters()}
    for method in stage._methods().values():
        model = methods.adapt(share(stage.base), method)
        assert own <= {weight.data_ptr() for weight in model.parameters()}
        assert not own & {weight.data_ptr() for weight in methods.trained(model)}
    for name in stage.names():
        stage.trial(name).step()
    assert all(torch.equal(weight, before[name]) for name, weight in stage.base.named_parameters())


def test_a_step_reaches_every_factor_and_they_are_drawn_alike_each_time(scene):
    stage = Stage(scene())
    model, again = (methods.adapt(share(stage.base), stage._methods()[methods.EXACT]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(methods.trained(model), methods.trained(again), strict=True))
    model(**stage.batch, use_cache=False).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in methods.trained(model))


def test_the_floor_computes_the_base_model_and_one_weight_gradient_per_layer(scene, monkeypatch):
    """A floor that skipped a product would draw the line too low."""
    stage = Stage(scene())
    expected = stage.base(**stage.batch, use_cache=False).loss
    model = bare(share(stage.base))
    products: list[tuple[int, ...]] = []
    matmul = torch.Tensor.__matmul__

    def counted(a, b):
        products.append((*a.shape, *b.shape))
        return matmul(a, b)

    loss = model(**stage.batch, use_cache=False).loss
    assert torch.equal(loss, expected)
    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    loss.backward()
    tokens = stage.batch["labels"].numel()
    gradients = [shape for shape in products if shape[1] == shape[2] == tokens]
    layers = [module for module in stage.base.modules() if type(module) is torch.nn.Linear]
    assert len(gradients) == len(layers) - 1 == 14  # 7 in each of two blocks, the head left out
    assert sorted(shape[0::3] for shape in gradients) == sorted(tuple(m.weight.shape) for m in layers[:-1])


def test_a_full_batch_has_no_zero_rows_and_a_masked_one_says_how_many(scene):
    full, masked = Stage(scene()).facts(), Stage(scene(masked=True, length=200)).facts()
    assert full == {"tokens": [3, 24], "trained_share": 1.0, "padding_share": 0.0}
    assert 0 < masked["trained_share"] < 0.9
    assert masked["padding_share"] > 0
    assert masked["trained_share"] + masked["padding_share"] < 1


def test_a_loss_that_is_not_finite_ends_the_measurement_and_a_method_that_is_not_there_is_named(scene):
    stage = Stage(scene())
    with pytest.raises(ConfigError, match="'nonesuch': expected one of three GEMMs, peft lora"):
        stage.trial("nonesuch")
    trial = stage.trial(methods.LORA)
    with torch.no_grad():
        next(iter(stage.base.parameters())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="peft lora"):
        trial.step()


def test_the_scenes_asked_for():
    def kinds(**asked):
        return [(scene.dtype, scene.checkpointing, scene.masked) for scene in step.scenes(**asked)]

    fp32, bf16 = "float32", "bfloat16"
    assert kinds() == [(fp32, False, False), (bf16, False, False), (fp32, True, False), (fp32, False, True)]
    assert kinds(dtypes=[bf16], masked=True) == [(bf16, False, True)]
    assert kinds(checkpointing=True) == [(fp32, True, False), (bf16, True, False)]
    assert len(set(kinds(full=True))) == 8


def test_the_command_line_measures_time_then_memory_and_goes_on(tiny_causal_folder, tmp_path, monkeypatch, capsys):
    asked: list[str] = []

    def measured(scene, method):
        asked.append(method)
        return {"peak_bytes": {methods.EXACT: 3000, methods.LORA: 2000}.get(method, 1000)}

    monkeypatch.setattr(memory, "measured", measured)
    monkeypatch.setattr(memory, "can_measure", lambda device: True)
    monkeypatch.chdir(tmp_path)
    sizes = "--rank 2 --rows 2 --length 16 --dtype float32 --rounds 3 --device cpu"
    line = f"bench step --model {tiny_causal_folder} {sizes}"
    assert cli.run([*line.split(), "--no-memory"]) == 0
    content = json.loads((tmp_path / "results/bench/step.json").read_text())
    assert asked == []
    assert cli.run(line.split()) == 0  # the times are there, the memory is not
    found = json.loads((tmp_path / "results/bench/step.json").read_text())["cells"][0]["methods"]
    assert set(asked) == set(found)
    for name, method in content["cells"][0]["methods"].items():
        assert found[name]["median_s"] == method["median_s"]
    assert found[methods.EXACT]["peak_ratio_to_lora"] == 1.5
    assert cli.run([*line.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["measured"] == 0
