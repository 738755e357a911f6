"""LoRA's starts from the weights and from data through `duallora train`: saved for the untouched base, resumed to the bit."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from duallora import methods
from duallora.errors import ConfigError
from duallora.export import merge
from duallora.methods import MethodSpec
from duallora.store import models
from duallora.train import evaluate, prepare, run
from duallora.train.adapter import put

STARTS = {
    "pissa": ("lora", "{init_lora_weights: pissa}"),
    "olora": ("lora", "{init_lora_weights: olora}"),
    "corda": ("corda", "{calibration: 6}"),
    "corda-lora+": ("lora+", "{init_lora_weights: corda, calibration: 6}"),
    "eva": ("lora", "{init_lora_weights: eva, calibration: 8, eva_config: {rho: 1.5}}"),
    "lora-ga": ("lora", "{init_lora_weights: lora_ga, calibration: 5}"),
    "lora-ga-paper": ("dora", "{init_lora_weights: lora_ga, calibration: 5, lora_ga_config: {scale: paper}}"),
}


def settings(start: str, *more: str) -> list[str]:
    method, options = STARTS[start]
    if "corda" in start and importlib.util.find_spec("attr") is None:
        pytest.skip("PEFT's CorDA needs attrs")
    if any("lora_ga" in text for text in (options, *more)) and not hasattr(peft.tuners.lora.config, "LoraGAConfig"):
        pytest.skip(f"PEFT {peft.__version__} has no LoRA-GA")
    plain = ["adapter.r1=null", "adapter.warmup_steps=auto", "adapter.duallora_dropout=0.05", "adapter.r=3"]
    return [f"adapter.method={method}", *plain, f"adapter.options={options}", "train.max_steps=4", *more]


@pytest.mark.parametrize("start", ["pissa", "corda-lora+", "eva", "lora-ga-paper"])
def test_a_start_is_saved_for_the_untouched_base_and_resumed_to_the_bit(
    start, make_recipe, console, tmp_path, resumes, held_out_loss
):
    """The factors alone belong to weights that are written nowhere; a second look at the data could differ."""
    whole, folder, stopped = resumes(*settings(start))
    seen = {"corda-lora+": 6, "eva": 8, "lora-ga-paper": 5}
    assert whole["metrics"].get("start_rows") == seen.get(start)
    for source in (folder, stopped / "checkpoints" / "checkpoint-4"):  # which is an adapter of the untouched base too
        found = held_out_loss(source, make_recipe(*settings(start)))
        assert found == pytest.approx(whole["metrics"]["loss"], abs=2e-6)
    assert merge.merge(folder, tmp_path / "merged", console=console)["max_logit_difference"] < 1e-5


@pytest.mark.parametrize("start", ["pissa", "corda", "eva"])
def test_a_run_begins_where_one_with_such_a_start_ended(start, make_recipe, console, tmp_path, held_out_loss):
    """The base that it moves is moved by the other run's start, without a look at this run's data."""
    first = run.train(make_recipe(*settings(start), output=tmp_path / "first"), console=console)
    begun = settings(start, f"adapter.init_from={tmp_path / 'first'}")
    recipe = make_recipe(*begun, "seed=3", output=tmp_path / "again")
    again = run.train(recipe, console=console)
    assert again["metrics"].get("start_rows") is None
    assert held_out_loss(tmp_path / "again", recipe) == pytest.approx(again["metrics"]["loss"], abs=2e-6)
    before = held_out_loss(tmp_path / "first", recipe)
    assert again["metrics"]["loss_before"] == pytest.approx(before, abs=2e-6)
    assert before != pytest.approx(first["metrics"]["loss_before"], abs=1e-4)
    other = make_recipe(*begun, "adapter.r=2", output=tmp_path / "other")
    with pytest.raises(ConfigError, match=r"expected the adapter of a run with the same|r=2|Set adapter.r as there"):
        run.train(other, console=console)


@pytest.mark.parametrize("start", list(STARTS))
def test_before_the_first_step_the_function_is_the_base_models(start, make_recipe, console, tiny_causal_folder):
    """W_res + s B0 A0 = W0, though B0 A0 is not 0."""
    recipe = make_recipe(*settings(start, "data.limit=20"))
    task = prepare.load(recipe, console)
    model, tokenizer = run.load_model(str(tiny_causal_folder), "generate")
    rows, _ = run.encode_split(evaluate.select(task, "train", 20), tokenizer, "generate", max_length=64)
    batch = run.Collator(tokenizer)(rows[:3])
    with torch.no_grad():
        expected = model(**batch).logits
        plain = {name: weight.clone() for name, weight in model.named_parameters()}

    def batches(count):
        return list(run.calibration.batches(rows[:count], tokenizer, 4, model))

    method = put(model, recipe, "generate", 1, batches=batches)
    adapted = method.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(**batch).logits, expected, atol=2e-6, rtol=0)
    moved = B_at_zero = 0
    for name, layer in adapted.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert A.dtype == B.dtype == torch.float32
            assert A.requires_grad
            assert B.requires_grad
            W, W0 = layer.get_base_layer().weight, plain[f"{name}.weight"]
            torch.testing.assert_close(W + layer.scaling["default"] * B @ A, W0, atol=1e-6, rtol=0)
            moved += not torch.equal(W, W0)
            B_at_zero += not B.any()
    assert (moved == 0, B_at_zero > 0) == ((True, True) if start == "eva" else (False, False))


def test_lora_ga_of_the_paper_is_the_gradients_singular_vectors(make_recipe, console, tiny_causal_folder):
    """A: the leading r right ones, B: the next r left ones, both times out^(1/4) / sqrt(16); the gradient taken by hand."""
    recipe = make_recipe(*settings("lora-ga-paper", "adapter.method=lora"))
    task = prepare.load(recipe, console)
    model, tokenizer = run.load_model(str(tiny_causal_folder), "generate")
    rows, _ = run.encode_split(evaluate.select(task, "train", 5), tokenizer, "generate", max_length=64)
    plain = AutoModelForCausalLM.from_pretrained(tiny_causal_folder)
    batches = list(run.calibration.batches(rows, tokenizer, 3, plain))
    for batch in batches:
        plain(**batch).loss.backward()
    adapted = put(model, recipe, "generate", 1, batches=lambda count: batches).model
    layer = adapted.get_base_model().model.layers[1].mlp.down_proj
    G = plain.model.layers[1].mlp.down_proj.weight.grad.double()
    U, _, Vh = torch.linalg.svd(G)
    scale = G.shape[0] ** 0.25 / 4
    A, B = layer.lora_A["default"].weight.double() / scale, layer.lora_B["default"].weight.double() / scale
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close((A @ Vh[:3].T).abs(), eye, atol=1e-3, rtol=0)
    torch.testing.assert_close((U[:, 3:6].T @ B).abs(), eye, atol=1e-3, rtol=0)


@pytest.mark.parametrize("start", ["olora", "corda"])
def test_a_classifier_with_such_a_start_resumes_to_the_bit_and_begins_from_another(
    start, make_recipe, tmp_path, resumes, held_out_loss
):
    """GLUE's way: from MNLI to a task with another head; the head and what modules_to_save names are trained in full."""
    more = [*settings(start), "adapter.modules_to_save=[pooler]"]
    first, folder, _ = resumes(*more, kind="classify", name="mnli")
    parts = {part for key in load_file(f"{first['adapter']}/adapter_model.safetensors") for part in key.split(".")}
    assert {"classifier", "pooler"} <= parts
    assert json.loads(Path(first["adapter"], "adapter_config.json").read_text())["r"] == 6
    targets = tmp_path / "targets.jsonl"
    targets.write_text("".join(json.dumps({"text": f"fine {n}", "label": n / 7}) + "\n" for n in range(12)))
    again, folder, _ = resumes(*more, f"adapter.init_from={folder}", kind="classify", name="stsb", data=targets)
    found = held_out_loss(folder, make_recipe(*more, kind="classify", data=targets), "regress")
    assert found == pytest.approx(again["metrics"]["loss"], abs=1e-6)


def test_kpm_looks_at_question_answering_rows_and_not_at_the_runs(make_recipe, console, tmp_path, sums, moods):
    """Other rows give another start; a classifier may keep what questions ask for; rows without answers are refused."""
    settings("corda")
    factors = {}
    for name in ("few", "many"):
        count = 4 if name == "few" else 30
        asked = [{"prompt": f"Who wrote {n}?", "completion": f"Author {n * 7}"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        own = f"{{corda_method: kpm, calibration: 9, calibration_data: {tmp_path / name}.jsonl}}"
        made = settings("corda", f"adapter.options={own}", "adapter.modules_to_save=[pooler]")
        recipe = make_recipe(*made, kind="classify", output=tmp_path / f"r-{name}")
        result = run.train(recipe, console=console)
        assert result["metrics"]["start_rows"] == (4 if name == "few" else 9)
        factors[name] = load_file(f"{result['adapter']}/adapter_model.safetensors")
    assert any(not torch.equal(factors["few"][key], factors["many"][key]) for key in factors["few"])
    own = f"{{corda_method: kpm, calibration_data: {moods}}}"
    with pytest.raises(ConfigError, match=r"bert\.pooler\.dense reads one of them"):
        run.train(make_recipe(*made[:-1], kind="classify", output=tmp_path / "pooled"), console=console)
    with pytest.raises(ConfigError, match="expected question-answering rows"):
        run.train(make_recipe(*settings("corda", f"adapter.options={own}"), output=tmp_path / "no"), console=console)


def test_patterns_and_rank_stabilised_scales_survive_too(make_recipe, console, held_out_loss):
    """alpha / sqrt(r) at rank 2 r needs another alpha than alpha / r does."""
    own = "{init_lora_weights: pissa, use_rslora: true, rank_pattern: {q_proj: 2}, alpha_pattern: {v_proj: 5}}"
    recipe = make_recipe(*settings("pissa"), f"adapter.options={own}")
    result = run.train(recipe, console=console)
    assert held_out_loss(result["folder"], recipe) == pytest.approx(result["metrics"]["loss"], abs=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{init_lora_weights: loftq}", "fits no other"),
        ("{init_lora_weights: pisa}", "Unknown initialization"),
        ("{calibration: 8}", "is for starts from data"),
        ("{init_lora_weights: eva, calibration: 0}", "expected a count of rows"),
        ("{init_lora_weights: eva, calibration: 1, eva_config: {rho: 9}}", "EVA needs 27 tokens in a batch"),
        ("{init_lora_weights: eva, calibration: 2, eva_config: {rho: 90}}", "EVA looks for 270 directions"),
        ("{init_lora_weights: olora, rank_pattern: {k_proj: 17}}", r"takes 17 .*k_proj \[16, 32\] has 16"),
        ("{init_lora_weights: lora_ga, rank_pattern: {v_proj: 9}}", r"takes 18 .*v_proj \[16, 32\] has 16"),
        ("{init_lora_weights: eva, eva_config: {gamma: 1}}", "gamma"),
        ("{init_lora_weights: pissa, corda_method: ipm}", "corda_method"),
        ("{init_lora_weights: corda, corda_method: kpm}", "own rows ask for its task: expected calibration_data"),
        ("{init_lora_weights: corda, corda_config: {corda_method: kpm}}", "expected calibration_data"),
        ("{init_lora_weights: corda, calibration_data: qa.jsonl}", "'qa.jsonl' is for corda_method: kpm"),
    ],
)
def test_a_start_that_cannot_be_is_said(options, message, make_recipe, console):
    with pytest.raises(ConfigError, match=message):
        run.train(make_recipe(*settings("pissa", f"adapter.options={options}")), console=console)


@pytest.mark.parametrize(("start", "quantization"), [("pissa", "bnb-4bit"), ("olora", "torchao-int8")])
def test_a_start_that_moves_the_base_is_refused_where_its_weights_are_codes(start, quantization, make_recipe, console):
    pytest.importorskip(models.QUANTIZATIONS[quantization])
    with pytest.raises(ConfigError, match=f"'{start}' takes its start off the weights, .* are quantized"):
        run.train(make_recipe(*settings(start, f"model.quantization={quantization}")), console=console)


@pytest.mark.parametrize("start", ["pissa", "corda", "lora-ga"])
def test_gpt2s_transposed_weights_are_moved_the_right_way_round(start, tmp_path):
    """Conv1D holds [in, out]: the function before the first step, and that of the saved adapter after a change."""

    def base():
        torch.manual_seed(0)
        shape = {"n_embd": 12, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 67}
        return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()

    settings(start)  # skips what this PEFT lacks
    if start == "corda" and not hasattr(peft.tuners.lora.config, "LoraGAConfig"):
        pytest.skip(f"CorDA of PEFT {peft.__version__} knows nn.Linear alone")
    ids = torch.arange(27).reshape(3, 9)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    spec = MethodSpec(
        "lora", r=3, target_modules=["c_attn", "c_fc"], options={"init_lora_weights": start.replace("-", "_")}
    )
    adapted = methods.apply(base(), spec, batches=[batch])
    with torch.no_grad():
        torch.testing.assert_close(adapted.model.eval()(ids).logits, base()(ids).logits, atol=1e-6, rtol=0)
        for parameter in methods.trained(adapted.model):
            parameter += 0.05
        expected = adapted.model(ids).logits
        adapted.save(tmp_path)
        torch.testing.assert_close(methods.load(base(), tmp_path)(ids).logits, expected, atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match=r"olora does not start .*c_attn, a Conv1D"):
        methods.apply(base(), replace(spec, options={"init_lora_weights": "OLoRA"}))
