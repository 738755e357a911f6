"""The layer benchmark on layers too small to time: who competes, with how many parameters, and what is done again."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from duallora import cli
from duallora.bench import layer, methods

CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Cells of widths 16 and 24 into one file, not measured; returns (what bench said, the file's content)."""
    figure = {"median_s": 1.0, "rounds": 3, "ratio_to_lora": {"median": 2.0}, "ratio_to_gemms": {"median": 1.5}}
    monkeypatch.setattr(layer, "measure", lambda **options: {"methods": {methods.EXACT: figure}})

    def run(**options):
        path = tmp_path / "layer.json"
        sizes = {"widths": [16, 24], "tokens": [5], "ranks": [2], "dtypes": ["float32"], "device": "cpu"}
        return layer.bench(path, **{**sizes, **options}), json.loads(path.read_text())

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cell_holds_every_competitor_at_equal_parameters(dtype):
    """Dual LoRA's 2r (out + in) is LoRA's at rank 2r: a benchmark at LoRA's rank r would flatter LoRA."""
    width, rank = 24, 2
    found = layer.measure(width, 7, rank, dtype, rounds=3, seconds=60, device=CPU)["methods"]
    expected = {methods.FLOOR, methods.sampled(0.25), methods.sampled(0.125), "duallora recompute", "duallora added"}
    assert expected <= set(found)
    assert (methods.LORA_OWN in found) == (dtype == "bfloat16")
    parameters = {name: method["parameters"] for name, method in found.items()}
    equal = 2 * rank * (width + width)
    for name in (methods.LORA, methods.HIRA, methods.EXACT, methods.PLAIN, methods.LOHA):
        assert parameters[name] == equal, name
    for name in (methods.DORA, methods.FAST_DORA, methods.DUAL_DORA):
        assert parameters[name] == equal + width, name
    assert parameters[methods.FLOOR] == 0
    assert abs(parameters["peft randlora"] / equal - 1) < 0.2
    lora, floor = found[methods.LORA]["median_s"], found[methods.FLOOR]["median_s"]
    for name, method in found.items():
        assert method["rounds"] == 3, name
        assert method["ratio_to_lora"]["median"] == pytest.approx(method["median_s"] / lora)
        assert method["ratio_to_gemms"]["median"] == pytest.approx(method["median_s"] / floor)


@pytest.mark.parametrize(("out", "into", "rank"), [(24, 24, 3), (24, 100, 7), (63, 40, 40), (16, 16, 1)])
def test_the_count_of_randlora_is_the_one_peft_trains(out, into, rank):
    config = methods.peft.RandLoraConfig(r=rank, target_modules=["0"])
    model = methods.adapt(nn.Sequential(nn.Linear(into, out)), methods.Method(config))
    assert methods.count(model) == methods.randlora_parameters(out, into, rank)


def test_no_product_is_trivial():
    """LoRA's B starts at zero and Dual LoRA's gate shut: timed so, a multiplication by zero might come cheap."""
    for name, method in methods.methods(2, ["0"], torch.float32).items():
        model = methods.adapt(nn.Sequential(nn.Linear(24, 16)), method)
        assert all(parameter.abs().min() > 0 for parameter in methods.trained(model)), name
        gates = [gate for module in model.modules() if hasattr(module, "gates") for gate in module.gates()]
        assert all(int(gate.step) >= gate.warmup_steps for gate in gates), name


def test_the_bytes_saved_for_the_backward_leave_out_x_and_parameters():
    x, dY = torch.randn(7, 24, requires_grad=True), torch.randn(7, 16)
    plain = nn.Linear(24, 16)
    assert layer.saved_bytes(plain, x, dY) == 0
    assert layer.saved_bytes(nn.Sequential(plain, nn.Sigmoid()), x, dY) == 7 * 16 * 4


def test_an_interrupted_run_keeps_the_cells_it_finished_and_goes_on(tiny, tmp_path, monkeypatch):
    measure = layer.measure

    def stop_at_24(**options):
        if options["width"] == 24:
            raise KeyboardInterrupt
        return measure(**options)

    monkeypatch.setattr(layer, "measure", stop_at_24)
    with pytest.raises(KeyboardInterrupt):
        tiny()
    monkeypatch.setattr(layer, "measure", measure)
    first = json.loads((tmp_path / "layer.json").read_text())
    said, second = tiny()
    assert (said["measured"], said["skipped"]) == (1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["layer.json"]
    assert second["cells"][0] == first["cells"][0]
    assert [cell["cell"]["width"] for cell in second["cells"]] == [16, 24]
    assert "commit" in second  # None outside a checkout
    for fact in ("source", "threads", "device", "versions"):  # of other code or another machine
        assert second[fact] is not None
        (tmp_path / "layer.json").write_text(json.dumps({**second, fact: "another"}))
        said, content = tiny(widths=[16])
        assert (said["measured"], said["dropped"]) == (1, 2)
        assert [cell["cell"]["width"] for cell in content["cells"]] == [16]


@pytest.mark.parametrize(
    ("line", "code", "fragment"),
    [
        ("bench layer --device tpu", 2, "tpu"),
        ("bench layer --dtype int8", 2, "int8"),
        ("bench layer --rounds 1", 2, "rounds"),
        ("bench layer -o .", 2, "folder"),
        ("bench layer -o broken.json", 4, "broken.json is not JSON"),
    ],
)
def test_a_wrong_request_has_its_exit_code(line, code, fragment, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    assert cli.run(line.split()) == code
    assert fragment in capsys.readouterr().err
