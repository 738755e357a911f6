"""Flips, ranks and dynamics of adapters on disk, against numpy on the same factors and transformers on the same weights."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from export.conftest import short_run
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import duallora
from duallora import cli, methods
from duallora.analysis import adapter_plots, analyze, dynamics, flips, rank, states
from duallora.core.equation import Update
from duallora.errors import ConfigError, IntegrityError, NonFiniteError
from duallora.plots import figures

ABCD = [[[1.0, -2.0, 0.0]], [[1.0], [3.0]], [[1.0, 0.0, -1.0]], [[-1.0], [2.0]]]
# B A = [1 -2 0; 3 -6 0], D C = [-1 0 1; 2 0 -2]: two of six open, two of six positive


def update(*factors) -> Update:
    return Update(*(torch.tensor(f, dtype=torch.float64) for f in factors), 1.0)


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 27, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=67, num_hidden_layers=2, **sizes)
    return LlamaForCausalLM(config).to(dtype).eval()


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def save(model, folder: Path) -> Path:
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def adapted(base, step: int = 100, **options):
    torch.manual_seed(0)
    options = {"r1": 3, "r2": 2, "target_modules": ["q_proj", "down_proj"], **options}
    model = peft.get_peft_model(base, duallora.DualLoraConfig(**options))
    if step:
        duallora.advance_gate(model, step)
    return model


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run of three states as `duallora train` leaves it; A and C of every layer are moved at random after each."""
    folder, model = tmp_path_factory.mktemp("states") / "run", adapted(llama(), step=0)
    with pytest.warns(UserWarning, match="gate"):
        save(model, folder / "checkpoints" / "init")
    duallora.advance_gate(model, 100)
    for step, place in ((5, "checkpoints/checkpoint-5"), (9, "adapter")):
        torch.manual_seed(step)
        for name, parameter in model.named_parameters():
            if "duallora_C" in name or "duallora_A" in name:
                parameter.data += 0.01 * torch.randn_like(parameter)
        save(model, folder / place)
        (folder / place / "duallora.json").write_text(json.dumps({"steps": step, "kind": "generate"}))
    shutil.copytree(folder / "checkpoints" / "checkpoint-5", folder / "checkpoints" / "checkpoint-7")  # cut short
    (folder / "checkpoints" / "checkpoint-5" / "MANIFEST.json").write_text("{}")
    return folder


def test_masks_and_flips_of_a_layer_worked_by_hand():
    opened, positive = flips.masks(update(*ABCD))
    assert opened.tolist() == [[True, False, False], [True, False, False]]
    assert positive.tolist() == [[False, False, True], [True, False, False]]
    _, turned = flips.masks(update(*ABCD[:2], [[-1.0, 0.0, -1.0]], ABCD[3]))  # D C = [1 0 1; -2 0 -2]: its first column
    assert flips.flips(positive, turned, opened) == {"flipped": 2 / 6, "flipped_open": 2 / 2}
    assert flips.flips(turned, turned, opened) == {"flipped": 0.0, "flipped_open": 0.0}
    closed, _ = flips.masks(update([[0.0, 0.0, 0.0]], *ABCD[1:]))
    assert math.isnan(flips.flips(positive, turned, closed)["flipped_open"])


def test_the_course_of_a_run_is_that_of_the_factors_on_disk(run_folder):
    """numpy on the files; zeros of D C count as negative, as Sign(0) = -1 says."""
    course = states.states(run_folder)
    assert [state.step for state in course] == [0, 5, 9]
    rows = flips.course(course)
    assert len(rows) == 3 * 4
    tensors = [load_file(state.folder / "adapter_model.safetensors") for state in course]
    name = "base_model.model.model.layers.1.mlp.down_proj"
    P, Q = (
        [(t[f"{name}.duallora_{x}"].double() @ t[f"{name}.duallora_{y}"].double()).numpy() for t in tensors]
        for x, y in ("BA", "DC")
    )
    mine = [row for row in rows if row["layer"] == "model.layers.1.mlp.down_proj"]
    for t, row in enumerate(mine):
        assert (row["module"], row["entries"]) == ("down_proj", 24 * 27)
        assert row["open"] == np.mean(P[t] > 0)
        assert row["positive"] == np.mean(Q[t] > 0)
    turned = (Q[0] > 0) != (Q[2] > 0)
    assert 0.02 < mine[2]["flipped"] == turned.mean()
    assert mine[2]["flipped_open"] == pytest.approx(turned[P[2] > 0].mean())
    assert mine[2]["flipped_since_last"] == ((Q[1] > 0) != (Q[2] > 0)).mean()
    assert "flipped" not in mine[0]
    total, last = flips.overall(rows)[2], [row for row in rows if row["step"] == 9]
    for name in ("flipped", "flipped_open"):
        weights = [r["entries"] * (r["open"] if name == "flipped_open" else 1) for r in last]
        assert total[name] == pytest.approx(np.average([r[name] for r in last], weights=weights))


def test_blocks_of_rows_make_the_whole():
    whole = update(*ABCD)
    blocks = list(states.row_blocks(whole, elements=1))
    assert len(blocks) == 2
    assert torch.equal(torch.cat([block.delta() for block in blocks]), whole.delta())


@pytest.mark.parametrize("shape", [(9, 13), (20, 6)])
def test_rank_is_numpys_and_effective_rank_knows_its_ends(shape):
    """k equal singular values make an effective rank of k; a falling spectrum less than its rank."""
    draw = np.random.default_rng(0)
    U, V = (np.linalg.qr(draw.standard_normal((n, 4)))[0] for n in shape)
    flat, falling = U @ V.T, (U * [1.0, 0.5, 1e-3, 1e-4]) @ V.T
    for X in (flat, falling):
        assert rank.of_matrix(torch.from_numpy(X))["rank"] == np.linalg.matrix_rank(X) == 4
    assert rank.of_matrix(torch.from_numpy(flat))["effective_rank"] == pytest.approx(4)
    tailed = (U * [1.0, 0.5, 1e-3, 1e-8]) @ V.T
    single = np.linalg.matrix_rank(tailed, tol=max(shape) * np.finfo(np.float32).eps)
    assert rank.of_matrix(torch.from_numpy(tailed))["rank_float32"] == single == 3
    p = np.array([1.0, 0.5, 1e-3, 1e-4]) / 1.5011
    expected = np.exp(-(p * np.log(p)).sum())
    assert rank.of_matrix(torch.from_numpy(falling))["effective_rank"] == pytest.approx(expected)
    assert rank.of_matrix(torch.zeros(shape)) == {"rank": 0, "rank_float32": 0, "effective_rank": 0.0}


def test_ranks_are_those_of_the_factors_and_not_of_rounded_weights(tmp_path):
    """r = 1: ReLU(B A) splits into two blocks, the signs stay of rank one; dW of all linear layers is full at r = 2."""
    one = save(adapted(llama(torch.bfloat16), r1=1, r2=1), tmp_path / "one")
    rows = rank.table(states.states(one)[0])
    assert len(rows) == 3 * 4
    assert {row["rank"] for row in rows if row["matrix"] == "direction"} == {1}
    assert {row["rank"] for row in rows if row["matrix"] == "magnitude"} == {2}
    lora = peft.get_peft_model(llama(), peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    rows = rank.table(states.states(save(lora, tmp_path / "lora"))[0])
    assert [(row["matrix"], row["rank"]) for row in rows] == [("dW", 3)] * 2


@pytest.mark.parametrize(
    "options", [{}, {"warmup": "residual"}, {"direction": "fixed"}, {"magnitude": "sigmoid", "direction": "dorefa"}]
)
def test_dw_from_the_file_is_dw_of_the_layer(tmp_path, options):
    """Whatever the method's settings: up to the scale, and what the seed stands for is drawn again."""
    model = adapted(llama(), init_seed=3, **options)
    for name, parameter in model.named_parameters():
        if "duallora_A" in name:
            parameter.data += 0.01
    adapter = states.Adapter(states.states(save(model, tmp_path / "a"))[0])
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    expected = layer.get_delta_weight("default").double() / layer.scaling["default"]
    found = adapter.update("base_model.model.model.layers.0.mlp.down_proj")
    assert torch.allclose(found.delta(), expected, atol=1e-6 * float(expected.abs().max()))
    parts = states.magnitude(found) * states.direction(found)
    assert options.get("warmup") == "residual" or torch.allclose(
        parts, expected, atol=1e-6 * float(expected.abs().max())
    )


def test_change_is_doras_definition_on_either_axis():
    draw = np.random.default_rng(1)
    W0, W = (draw.standard_normal((4, 5)) for _ in range(2))
    for axis, along in (("out", 1), ("in", 0)):
        m0, m = (np.linalg.norm(X, axis=along) for X in (W0, W))
        cos = (W0 * W).sum(axis=along) / m0 / m
        found = dynamics.change(torch.from_numpy(W0), torch.from_numpy(W), axis)
        assert found == pytest.approx({"magnitude": np.abs(m - m0).mean(), "direction": (1 - cos).mean()})
    near = W0 * (1 + 1e-9 * draw.standard_normal(W0.shape))
    tiny = dynamics.change(torch.from_numpy(W0), torch.from_numpy(near))["direction"]
    assert 1e-20 < tiny < 1e-17  # 1 - cos would be 0 or 1e-16
    stretched = dynamics.change(torch.from_numpy(W0), torch.from_numpy(3 * W0))
    assert stretched["direction"] == pytest.approx(0, abs=1e-30)


CONFIGS = {
    "duallora": lambda: duallora.DualLoraConfig(r=2, target_modules=["q_proj"], init_weights=False),
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, use_dora=True),
    "dual dora": lambda: duallora.DualLoraConfig(r=2, target_modules=["q_proj"], init_weights=False, use_dora=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_compared_are_the_base_and_the_merged_model(name):
    base = llama()
    before = base.model.layers[1].self_attn.q_proj.weight.detach().double().clone()
    model = peft.get_peft_model(base, CONFIGS[name]())
    found = dict(dynamics.linear_layers(model))
    assert len(found) == 2
    W0, W = dynamics.weights(found["base_model.model.model.layers.1.self_attn.q_proj"])
    merged = model.merge_and_unload().model.layers[1].self_attn.q_proj.weight.double()
    assert torch.equal(W0, before)
    assert torch.allclose(W, merged, atol=1e-6)
    assert not torch.allclose(W, before, atol=1e-4)


def test_a_conv1d_is_read_by_its_output_units_and_no_change_of_weights_is_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=67, n_embd=12, n_layer=1, n_head=2, n_positions=8))
    model = peft.get_peft_model(gpt2, duallora.DualLoraConfig(r=2, target_modules=["c_attn"], init_weights=False))
    ((_, layer),) = dynamics.linear_layers(model)
    W0, W = dynamics.weights(layer)
    assert W0.shape == W.shape == (36, 12)
    assert torch.equal(W0.T.float(), layer.base_layer.weight)
    adapter = methods.apply(llama(), methods.MethodSpec("adapter-p", r=2, target_modules=["up_proj"])).model
    with pytest.raises(ConfigError, match="cannot be merged, so there is no W0"):
        dynamics.weights(next(dynamics.linear_layers(adapter))[1])


def test_correlations_are_pooled_by_module_and_told_by_step():
    draw = np.random.default_rng(2)
    rows = []
    for step in (1, 2):
        for kind, sign in (("q", 1), ("v", -1)):
            for layer in range(4):
                x = draw.random()
                where = {"step": step, "module": kind, "layer": layer}
                rows.append({**where, "direction": x, "magnitude": sign * x + 10 * step})
    found = {(row["module"], row["step"]): row for row in dynamics.correlations(rows)}
    assert found["q", 1]["pearson"] == pytest.approx(1)
    assert found["v", 2]["spearman"] == pytest.approx(-1)
    pooled = [row for row in rows if row["module"] == "q"]
    expected = np.corrcoef([r["direction"] for r in pooled], [r["magnitude"] for r in pooled])[0, 1]
    assert found["q", None]["pearson"] == pytest.approx(expected)
    assert found["q", None]["points"] == 8
    assert dynamics.correlations(rows[:2]) == []
    for row in found.values():
        assert row["interval"][0] - 1e-9 <= row["pearson"] <= row["interval"][1] + 1e-9
    assert found["q", 1]["interval"] == pytest.approx([1, 1])


def test_the_interval_of_a_correlation_is_over_layers_and_not_over_points():
    """A layer's steps move together: ten steps of five layers say no more than one step of them."""
    draw = np.random.default_rng(0)
    layers = [{"module": "q", "layer": n, "direction": draw.random(), "magnitude": draw.random()} for n in range(5)]
    once, often = (
        dynamics.correlations([{**row, "step": step} for step in range(steps) for row in layers])[0]
        for steps in (1, 10)
    )
    assert often["points"] == 10 * once["points"]
    assert often["interval"] == pytest.approx(once["interval"])
    assert once["interval"][0] < 0 < once["interval"][1]


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory, tiny_causal_folder):
    """A real run of four steps that keeps its start."""
    rows = [{"prompt": f"{n} and", "completion": f" {n + 1}"} for n in range(12)]
    settings = ["train.save_steps=2", "train.save_total_limit=null", "r=2", "eval.metrics=false"]
    folder = tmp_path_factory.mktemp("analyzed") / "four-steps"
    return short_run(tiny_causal_folder, rows, folder, *settings, "target_modules=[q_proj,v_proj]")


def test_the_verb_writes_tables_a_summary_and_plots(trained_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.run(["analyze", str(trained_run), "-o", str(out), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)["sources"]["four-steps"]
    assert summary["steps"] == [0, 2, 4]
    assert json.loads((out / "analysis.json").read_text())["sources"]["four-steps"] == summary
    parts = {f"{part}.{kind}" for part in analyze.PARTS for kind in ("csv", "svg")}
    assert {path.name for path in out.iterdir()} == {"analysis.json", *parts}
    rows = table(out / "dynamics.csv")
    assert [int(row["step"]) for row in rows] == [2] * 4 + [4] * 4  # at the start dW = 0, and with it every point
    assert all(float(row["direction"]) > 0 for row in rows)
    assert {row["source"] for row in rows} == {"four-steps"}
    assert {row["step"] for row in summary["rank"]} == {0, 4}
    assert 0 < summary["flips"][-1]["flipped"] < 1
    assert b"\r" not in (out / "flips.csv").read_bytes()


def test_a_model_trained_as_a_whole_has_dynamics_of_every_linear_layer(tiny_causal_folder, tmp_path):
    """As full fine-tuning in DoRA's analysis: W_t is the saved weight, W0 the base model's."""
    base = LlamaForCausalLM.from_pretrained(tiny_causal_folder)
    W0 = base.model.layers[1].mlp.up_proj.weight.detach().double().numpy().copy()
    torch.manual_seed(3)
    for parameter in base.parameters():
        parameter.data += 1e-3 * torch.randn_like(parameter)
    folder = tmp_path / "full" / "model"
    base.save_pretrained(folder)
    sidecar = {"kind": "generate", "steps": 7, "base": {"name": str(tiny_causal_folder)}}
    (folder / "duallora.json").write_text(json.dumps(sidecar))
    found = analyze.analyze([tmp_path / "full"], tmp_path / "out", only=["dynamics"], draw=False)["sources"]["full"]
    every = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert {row["module"] for row in found["dynamics"]} <= every
    rows = {row["layer"]: row for row in table(tmp_path / "out" / "dynamics.csv")}
    assert len(rows) == 14
    W = base.model.layers[1].mlp.up_proj.weight.detach().double().numpy()
    m0, m = (np.linalg.norm(X, axis=1) for X in (W0, W))
    row = rows["model.layers.1.mlp.up_proj"]
    assert row["step"] == "7"
    assert float(row["magnitude"]) == pytest.approx(np.abs(m - m0).mean())
    assert float(row["direction"]) == pytest.approx((1 - (W0 * W).sum(1) / m0 / m).mean(), rel=1e-6)
    with pytest.raises(ConfigError, match="flips: none of the 1 sources"):
        analyze.analyze([folder], tmp_path / "out", only=["flips"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rank_of_a_model_trained_as_a_whole_is_that_of_its_change_and_not_of_its_rounding(dtype):
    """As stored, every change has full rank; one of rank 3 and none at all are told nevertheless."""
    draw = torch.Generator().manual_seed(0)
    W0 = torch.randn(40, 63, generator=draw).to(dtype)
    moved = torch.randn(40, 3, generator=draw) @ torch.randn(3, 63, generator=draw)
    W = (W0.double() + 20 * moved.double()).to(dtype)
    assert rank.of_matrix(W.double() - W0.double())["rank"] == 40
    found = rank.of_change(W0, W)
    assert found["rank"] == found["rank_float32"] == 3
    assert 1 < found["effective_rank"] <= 3
    assert rank.of_change(W0, W0)["rank"] == 0


def test_where_the_base_of_a_whole_model_is_gone_nothing_is_left_to_tell(tmp_path):
    save(llama(), tmp_path / "model")
    (tmp_path / "model" / "duallora.json").write_text(json.dumps({"kind": "generate", "base": {"name": "gone"}}))
    with pytest.raises(ConfigError, match="none of the 1 sources"):
        analyze.analyze([tmp_path], tmp_path / "out", draw=False)


def test_a_runs_name_is_no_markup(run_folder, tmp_path, capsys):
    """Rich would take [red] for a color, and show no name."""
    shutil.copytree(run_folder, tmp_path / "[red]")
    words = ["analyze", str(tmp_path / "[red]"), "-o", str(tmp_path / "out"), "--only", "flips", "--no-plots"]
    assert cli.run(words) == 0
    assert "[red], step" in capsys.readouterr().out


def test_cells_of_a_grid_are_called_by_what_tells_them_apart():
    names = ["cola-lora-lr0.001-seed0", "cola-dual-lora-lr0.003-seed0"]
    assert [*analyze.labels(names)] == ["lr0.001", "dual-lr0.003"]
    assert [*analyze.labels(names[:1])] == names[:1]
    assert [*analyze.labels(["a-b", "b-a", "b"])] == ["a-b", "b-a", "b"]


def test_layers_come_in_the_order_of_their_numbers(tmp_path):
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=11, num_attention_heads=2)
    lora = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(r=1, target_modules=["q_proj"]))
    (start,) = states.states(save(lora, tmp_path / "lora"))
    assert [row["layer"] for row in rank.table(start)] == [f"model.layers.{n}.self_attn.q_proj" for n in range(11)]


def test_of_a_lora_there_is_what_it_has_without_being_asked_for(tiny_causal_folder, tmp_path, capsys):
    """No flips; and where its base is gone, the rank alone, with the reason."""
    base = LlamaForCausalLM.from_pretrained(tiny_causal_folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    folder = save(peft.get_peft_model(base, config), tmp_path / "lora")
    assert cli.run(["analyze", str(folder), "-o", str(tmp_path / "out"), "--no-plots"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"analysis.json", "rank.csv", "dynamics.csv"}
    settings = json.loads((folder / "adapter_config.json").read_text())
    gone = {**settings, "base_model_name_or_path": str(tmp_path / "gone")}
    (folder / "adapter_config.json").write_text(json.dumps(gone))
    capsys.readouterr()
    assert cli.run(["analyze", str(folder), "-o", str(tmp_path / "less"), "--no-plots"]) == 0
    assert "no dynamics of lora: " in " ".join(capsys.readouterr().out.split())
    assert {path.name for path in (tmp_path / "less").iterdir()} == {"analysis.json", "rank.csv"}
    with pytest.raises(ConfigError, match="no model folder"):
        analyze.analyze([folder], tmp_path / "none", only=["rank", "dynamics"])
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(tiny_causal_folder), prompt)
    with pytest.raises(ConfigError, match="flips, rank, dynamics: none of the 1 sources"):
        analyze.analyze([save(model, tmp_path / "prompt")], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_ranks_legend_names_what_any_panel_shows(tmp_path):
    """The first source may be a LoRA, which has dW alone."""
    row = {"layer": "x", "module": "x", "step": 0, "out": 9, "in": 7}
    row |= {"rank": 3, "rank_float32": 2, "effective_rank": 2.5}
    rows = [{**row, "source": "lora", "matrix": "dW"}]
    rows += [{**row, "source": "dual", "matrix": name} for name in ("magnitude", "direction", "dW")]
    (drawn,) = adapter_plots.draw({"rank": rows}, tmp_path)
    text = drawn.read_text()
    for name in adapter_plots.MATRICES.values():
        assert text.count(f">{name}<") + text.count(f"<!-- {name} -->") == 1


def test_the_dynamics_of_two_runs_stand_on_the_same_axes_and_say_in_words_what_they_show(tmp_path):
    rows = [
        {"source": source, "module": "q_proj", "layer": str(layer), "step": step, "direction": reach * step * layer, "magnitude": step + layer}
        for source, reach in (("near", 1e-4), ("far", 1e-2)) for step in (2, 4) for layer in (1, 2, 3)
    ]  # fmt: skip
    with figures() as Figure:
        near, far, *_ = adapter_plots._dynamics(Figure(layout="constrained"), rows).axes
    assert near.get_xlim() == far.get_xlim()
    assert near.get_xlim()[1] > 0.12
    assert near.get_xscale() == far.get_yscale() == "log"  # or the near one is a dot at 0
    with figures() as Figure:
        alone, *_ = adapter_plots._dynamics(Figure(layout="constrained"), rows[: len(rows) // 2]).axes
    assert alone.get_xscale() == "linear"
    (drawn,) = adapter_plots.draw({"dynamics": rows}, tmp_path)
    shown = (adapter_plots.TURNED, adapter_plots.STRETCHED, "layer, from the input on", "near, q_proj", "far, q_proj")
    assert {words: drawn.read_text().count(f">{words}<") for words in shown} == dict.fromkeys(shown, 1)


def test_sources_are_compared_by_the_modules_that_all_have():
    def rows(source, *kinds):
        return [{"source": source, "module": kind} for kind in kinds]

    kinds = adapter_plots._kinds
    assert kinds({"full": rows("full", "q", "up", "v"), "lora": rows("lora", "v", "q")}) == ["q", "v"]
    assert kinds({"bert": rows("bert", "query"), "llama": rows("llama", "q")}) == ["query", "q"]


def test_a_start_that_cancels_has_rank_0(tmp_path):
    """[B, -B0] [A; A0] of PiSSA before the first step is rounding, of full rank by its own largest singular value."""
    spec = methods.MethodSpec("lora", r=3, target_modules="all-linear", options={"init_lora_weights": "pissa"})
    started = methods.apply(llama(), spec)
    started.save(tmp_path / "start")
    rows = rank.table(states.states(tmp_path / "start")[0])
    assert len(rows) == 14
    assert {(row["rank"], row["effective_rank"]) for row in rows} == {(0, 0.0)}
    torch.manual_seed(1)
    for parameter in methods.trained(started.model):
        parameter.data += 1e-5 * torch.randn_like(parameter)
    started.save(tmp_path / "moved")
    assert {row["rank"] for row in rank.table(states.states(tmp_path / "moved")[0])} == {6}


def test_what_cannot_be_analysed_is_said_and_flips_and_ranks_need_no_base_model(run_folder, tmp_path):
    run, out, lora = Path(shutil.copytree(run_folder, tmp_path / "run")), tmp_path / "out", tmp_path / "lora"
    save(peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])), lora)
    for sources, settings, message in [
        ([run], {"only": ["rnak"]}, "--only rnak: expected flips, rank, dynamics"),
        ([run], {"axis": "column"}, "--axis column: expected out or in"),
        ([tmp_path], {}, "holds no adapter: expected a run folder"),
        ([run, run / "adapter"], {}, "would both be run: give folders of different names"),
        ([lora], {"only": ["flips"]}, "flips: none of the 1 sources"),
    ]:
        with pytest.raises(ConfigError, match=message):
            analyze.analyze(sources, out, **settings)
    analyze.analyze([run], out, only=["flips", "rank"], draw=False)
    assert sorted(path.name for path in out.iterdir()) == ["analysis.json", "flips.csv", "rank.csv"]
    weights = run / "adapter" / states.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(IntegrityError, match="cannot be read"):
        analyze.analyze([run], out, only=["flips"])


@pytest.mark.parametrize("kind", ["duallora", "lora", "whole"])
@pytest.mark.parametrize("part", analyze.PARTS)
def test_a_state_whose_training_diverged_is_named(kind, part, tiny_causal_folder, tmp_path):
    """The singular values of NaN are an error of LAPACK's, its signs are all down, and its angles NaN."""
    if part == "flips" and kind != "duallora":
        pytest.skip("has no signs")
    base = LlamaForCausalLM.from_pretrained(tiny_causal_folder)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = {"duallora": adapted, "lora": lambda base: peft.get_peft_model(base, lora), "whole": lambda base: base}[
        kind
    ](base)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "q_proj" in name and p.requires_grad)[1, 2] = float("nan")
    folder = tmp_path / "model"
    model.save_pretrained(str(folder))
    sidecar = {"kind": "generate", "base": {"name": str(tiny_causal_folder)}} if kind == "whole" else {}
    (folder / "duallora.json").write_text(json.dumps({**sidecar, "steps": 7}))
    with pytest.raises(NonFiniteError, match=r"q_proj.* holds NaN or infinite values"):
        analyze.analyze([folder], tmp_path / "out", only=[part], draw=False)


def test_plots_are_drawn_under_a_notebooks_backend_that_is_not_installed_here(tmp_path):
    """A notebook of another environment hands MPLBACKEND down to what it starts, and importing matplotlib refuses it."""
    code = "from duallora.plots import figures\nwith figures() as Figure: Figure().savefig('x.svg')"
    environment = {**os.environ, "MPLBACKEND": "module://not_installed.inline"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)
