"""The planner's figures against steps that really ran, counts that were published, and arithmetic done by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, MixtralConfig

from duallora import cli, console
from duallora.bench import memory
from duallora.core.equation import Update
from duallora.errors import ConfigError
from duallora.ops import autograd
from duallora.ops.backends import pick
from duallora.plan import planner, trace
from duallora.plan.architectures import KNOWN, config_of
from duallora.plan.planner import Gpus, largest, need, packed_bytes
from duallora.plan.trace import METHODS, Counts, Setting, StandIn, Traced, adapt, at_depth, build

ROOT = Path(__file__).parents[1]
PAPER = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def tiny(model_type: str = "qwen2", **more):
    """Grouped heads, biases, in != out; large enough that no matrix falls under the check for dead starts."""
    shapes = {
        "qwen2": {"hidden_size": 144, "intermediate_size": 200, "num_attention_heads": 4, "num_key_value_heads": 2},
        "gpt2": {"n_embd": 144, "n_head": 3, "n_positions": 128},
    }[model_type]
    depth = {"num_hidden_layers" if model_type == "qwen2" else "n_layer": 3}
    return AutoConfig.for_model(model_type, **{"vocab_size": 700, **shapes, **depth, **more})


def real(config, setting):
    torch.manual_seed(0)
    return adapt(build(config, setting), setting, "CAUSAL_LM").train()


class Saved:
    """What a saved-tensor hook hands to the graph: it lives as long as the graph keeps it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()  # an output kept by its own node would keep the node


def saved_bytes(model, **batch) -> int:
    """What autograd keeps of one real forward, by its own account: distinct storages but the model's and the batch's."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *batch.values())}
    alive = weakref.WeakSet()

    def pack(tensor):
        alive.add(saved := Saved(tensor))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = model(**batch, use_cache=False).loss
    assert loss.requires_grad
    storages = {s.tensor.untyped_storage().data_ptr(): s.tensor.untyped_storage().nbytes() for s in alive}
    return sum(size for address, size in storages.items() if address not in own)


@pytest.mark.parametrize(
    ("model_type", "dtype", "padded", "method"),
    [
        *(("qwen2", torch.float32, False, method) for method in METHODS),
        ("qwen2", torch.bfloat16, True, "dora"),
        ("qwen2", torch.bfloat16, True, "duallora"),
        ("gpt2", torch.float32, True, "duallora"),
    ],
)
def test_what_is_kept_is_what_autograd_saves(model_type, dtype, padded, method):
    """Real weights, real kernels, counted by torch's own hooks: no fake tensor and no ledger in the expected value."""
    setting = Setting(method, rank=6, dtype=dtype, padded=padded, fused_attention=False)
    ids = torch.randint(700, (3, 63))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, -9:] = 0
    expected = saved_bytes(real(tiny(model_type), setting), input_ids=ids, labels=ids, attention_mask=mask)
    found = Traced(tiny(model_type), setting).use(3, 63).kept
    assert found == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(("method", "checkpointing"), [("dora", True), ("duallora", False)])
def test_two_shallow_traces_give_the_deep_one_to_the_byte(method, checkpointing):
    """The second shape is one where the peak lies in the layers, not in the head."""
    config, setting = tiny(num_hidden_layers=5, vocab_size=150), Setting(method, checkpointing=checkpointing)
    traced, deep = Traced(config, setting), StandIn(config, 5, setting)
    assert list(traced.stand_ins) == [2, 4]
    assert traced.counts == deep.counts
    for shape, accumulating in (((2, 96), False), ((1, 5), True)):
        steps = deep.step(*shape, accumulating=accumulating)
        kept = steps.pop("kept")
        assert traced.use(*shape, accumulating=accumulating) == (kept, max(steps.values()))


def test_layers_of_unequal_size_are_traced_at_full_depth():
    config = AutoConfig.for_model(
        "qwen2_moe", vocab_size=300, hidden_size=80, intermediate_size=160, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=2, num_experts=2, moe_intermediate_size=96, shared_expert_intermediate_size=96,
        mlp_only_layers=[5],
    )  # fmt: skip
    assert trace.depths_of(config) == (6,)
    assert trace.depths_of(tiny(num_hidden_layers=6)) == (2, 4)


@pytest.mark.skipif(not memory.can_measure(torch.device("cpu")), reason="the peak cannot be reset here")
def test_a_real_step_peaks_where_predicted():
    """The whole way, in a process of its own: resident memory as the system counts it."""
    cell = {"model": "qwen2, 5 layers of 512", "method": "duallora", "batch": 2, "length": 256, "dtype": "float32"}
    cell |= {"checkpointing": False, "padded": False}
    command = [sys.executable, str(ROOT / "benchmarks/plan_check.py"), "--measure", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **memory.ALLOCATOR})
    measured = json.loads(done.stdout.splitlines()[-1])["measured_bytes"]
    setting = Setting("duallora", rank=8, dtype=torch.float32, fused_attention=False)
    config = AutoConfig.for_model(
        "qwen2", hidden_size=512, intermediate_size=1408, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=16000, tie_word_embeddings=True,
    )  # fmt: skip
    use = Traced(config, setting).use(2, 256, accumulating=False)
    assert use.peak == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_workspace_is_what_the_operators_allocate_inside(dtype):
    """Their bodies run on real tensors under the ledger, which sees W' and G come and go."""
    out, into, tokens, r = 1000, 630, 40, 4
    x, W, dY = (torch.randn(size, dtype=dtype) for size in ((tokens, into), (out, into), (tokens, out)))
    A, B, C, D = (torch.randn(size) for size in ((r, into), (out, r), (r, into), (out, r)))
    if pick("auto", Update(A, B, C, D, 1.0), dtype).__name__.endswith("recompute"):
        pytest.skip("no C++ compiler: torch operators, which hold more")
    fields = autograd.flat(Update(A, B, C, D, torch.tensor(0.5)), autograd.How())
    operators = torch.ops.duallora
    for operator, body, arguments in (
        (operators.dual_linear, autograd._product_body, (x, W, None, None, *fields)),
        (operators.dual_linear_backward, autograd._backward_body, (dY, x, W, None, torch.empty(0), *fields, True, False, True)),
    ):  # fmt: skip
        with (ledger := trace._Ledger({})):
            held = body(*arguments)
        inside = max(ledger.peaks.values()) - ledger.live  # but for the outputs
        # Forward: y is a product with W', so both are alive. Backward: dx, the last, while W' and G are.
        assert inside == pytest.approx(trace.workspace(operator.default, arguments), rel=0.03)
        del held


# Parameters of the published checkpoints (model cards, safetensors indices) ...
PUBLISHED = {
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648, "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384, "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200, "roberta-base": 124_647_170, "roberta-large": 355_361_794,
    "deberta-v3-base": 184_423_682, "deberta-v3-large": 435_063_810,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_models_have_the_published_number_of_parameters(name):
    """Classifiers with their head of two classes, as transformers counts them."""
    config = config_of(name)
    with torch.device("meta"):
        one, two = (build(at_depth(config, depth), Setting("lora")).num_parameters() for depth in (1, 2))
    assert one + (trace.depth_of(config) - 1) * (two - one) == PUBLISHED[name]


def test_every_known_model_is_found_by_its_repository():
    for name, (repository, _) in KNOWN.items():
        assert config_of(repository).to_dict() == config_of(name).to_dict()
        assert trace.depth_of(config_of(name)) > 2


# ... and of adapters at q, k, v, up and down: the paper's and HiRA's tables.
@pytest.mark.parametrize(
    ("name", "method", "rank", "parameters", "percent"),
    [
        ("llama-7b", "lora", 16, 56_098_816, 0.8256),
        ("llama-13b", "duallora", 16, 87_818_240, 0.6702),
        ("llama-3-8b", "dora", 8, 29_097_984, 0.3610),
        ("llama-3-70b", "duallora", 8, 138_936_320, 0.1965),
    ],
)
def test_adapters_have_the_published_number_of_parameters(name, method, rank, parameters, percent):
    counts = Traced(config_of(name), Setting(method, rank, PAPER), trace.DEPTHS).counts
    assert counts.adapter == counts.trained == parameters
    assert round(100 * counts.adapter / (counts.base + counts.adapter), 4) == percent


def test_the_head_of_a_classifier_is_trained_and_no_part_of_the_adapter():
    """Query and value of RoBERTa-base, r = 4 + 4 beside LoRA's 8: Table 2's 0.3 M."""
    counts = Traced(config_of("roberta-base"), Setting("duallora", 4, ["query", "value"])).counts
    assert counts.adapter == 294_912
    assert counts.trained == 294_912 + 768 * 768 + 768 + 2 * 768 + 2


# base, base bytes, of these linear (number, bytes, rows), adapter, trained (number, bytes), a layer's bytes, the rest's
HAND = Counts(1000, 2000, 800, 1600, 10, 90, 100, 400, 300, 200)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [  # weights, adapter, gradients, moments, gathered
        ("single", (2000, 400, 400, 800, 0)),
        ("ddp", (2000, 400, 400, 800, 400)),
        ("zero2", (2000, 400, 100, 200, 400)),
        ("fsdp", (500, 100, 100, 200, 200 + 600)),
        ("zero3", (500, 100, 100, 200, 200 + 600)),
        ("offload", (0, 0, 0, 0, 200 + 600)),
    ],
)
def test_each_strategy_shards_what_it_says(strategy, expected):
    found = need(strategy, 4, HAND, kept=5000, peak=7000)
    assert found[:5] == expected
    assert (found.activations, found.working) == (5000, 2000)
    assert found.reserve == 1e9 + 0.05 * 7000
    assert found.total == sum(expected) + 7000 + found.reserve
    assert found.host == (4 * (500 + 100 + 100 + 200) if strategy == "offload" else 0)


def test_packed_weights_take_what_bitsandbytes_stores():
    functional = pytest.importorskip("bitsandbytes.functional")
    W = torch.randn(96, 128, dtype=torch.bfloat16)
    four, state = functional.quantize_4bit(W, quant_type="nf4", blocksize=64)
    assert state.absmax.dtype == torch.float32
    counts = HAND._replace(base_bytes=2 * W.numel() + 50, linear=W.numel(), linear_bytes=2 * W.numel(), linear_rows=96)
    assert packed_bytes(counts, "none") == 2 * W.numel() + 50
    assert packed_bytes(counts, "4bit") == 50 + four.nbytes + state.absmax.nbytes
    eight, scales, _ = functional.int8_vectorwise_quant(W.to(torch.float16))
    assert packed_bytes(counts, "8bit") == 50 + eight.nbytes + scales.nbytes


def test_layers_hold_whole_weights_only_while_they_compute():
    """At one token the peak is what a layer's operators hold: nothing for LoRA, W' and G for Dual LoRA, one unpacked more."""
    widest = 4 * 144 * 200
    peaks = {}
    for quantization in ("none", "4bit"):
        plan = planner.Planner(tiny(vocab_size=150), Gpus(4, 80), quantization, rank=2, dtype=torch.float32)
        for method in ("lora", "duallora"):
            peaks[method, quantization] = plan.traced(method, "fsdp").use(1, 1).peak / widest
        assert plan.traced("duallora", "fsdp").setting.apart
    assert peaks["lora", "none"] < 1 < peaks["lora", "4bit"] < 2
    assert 2 < peaks["duallora", "none"] < 3


CURVES = {  # of the bytes too many, and how often each may be asked: a step is a trace, and memory is nearly always linear
    "linear": (lambda n: 3 * n - 100, 3),
    "square": (lambda n: n * n + n - 900, 40),
    "kinked": (lambda n: max(n, 9 * n - 700) - 90, 40),
    "none fits": (lambda n: n, 1),
}


@pytest.mark.parametrize(("curve", "calls"), CURVES.values(), ids=CURVES)
def test_the_largest_that_fits_is_found_in_few_steps(curve, calls):
    for limit in (1, 2, 29, 30, 31, 80, 4096):
        asked = []
        found = largest(lambda n, asked=asked: asked.append(n) or curve(n), limit)
        assert found == max((n for n in range(1, limit + 1) if curve(n) <= 0), default=0)
        assert len(asked) <= calls


def test_gpus_as_people_write_them():
    assert [Gpus.parse(text) for text in ("8x80", "2x8x80GB", "24")] == [(8, 80), (16, 80), (1, 24)]
    for wrong in ("", "x80", "8x", "eight", "8x-1", "0x80", "8x0", "8*80"):
        with pytest.raises(ConfigError, match="expected NUMBERxGIGABYTES such as 8x80"):
            Gpus.parse(wrong)


@pytest.fixture
def plain(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    yield
    console.use_json(False)


def test_the_verb_plans_seventy_billion_parameters_without_weights(plain, capsys):
    arguments = ["--gpus", "8x80", "--checkpointing", "--method", "duallora", "--strategy", "fsdp", "--r", "2"]
    assert cli.run(["plan", "--model", "llama-3-70b", "--target-modules", "q_proj,v_proj", *arguments, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["base_parameters"], out["predicted"], out["suggested"]) == (PUBLISHED["llama-3-70b"], True, "fsdp")
    found = out["strategies"]["fsdp"]["duallora"]
    assert found["fits"]
    assert found["weights"] == pytest.approx(2 * PUBLISHED["llama-3-70b"] / 8, rel=1e-6)
    parts = ("weights", "adapter", "gradients", "optimizer", "gathered", "activations", "working", "reserve")
    assert found["total"] == sum(found[part] for part in parts)
    assert 1 < found["largest_batch"] < planner.LARGEST_BATCH


def test_the_verb_shows_the_three_methods_side_by_side(plain, capsys, tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    arguments = ["plan", "--model", str(tmp_path / "model"), "--gpus", "2x24", "--length", "64"]
    assert cli.run([*arguments, "--target-modules", "q_proj,v_proj", "--r", "4"]) == 0
    out = capsys.readouterr().out
    words = ("LoRA, r = 8", "DoRA, r = 8", "Dual LoRA, r = 4", "ddp", "zero3", "offload", "predicted", "(assumed)")
    assert [word for word in words if word not in out] == []
    assert "nothing here fits" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "lama-3-70b"], "unknown model 'lama-3-70b'; nearest: llama-3-70b"),
        (["--model", "llama-3-8b", "--gpus", "8*80"], "--gpus '8*80': expected NUMBERxGIGABYTES"),
        (["--model", "llama-3-8b", "--gpus", "8x80", "--strategy", "single"], "--gpus names 8: use ddp"),
        (["--model", "llama-3-8b", "--strategy", "zero4"], "expected one of single, ddp"),
        (["--model", "smollm2-135m", "--length", "64", "--target-modules", "q_pro"], "--target-modules ['q_pro']: "),
        (["--model", "gpt2", "--length", "2048"], "--length 2048: this model has 1024 positions"),
        (["--model", "llama-3-8b", "--gpus", "8x80", "--strategy", "zero3", "--quantization", "4bit"], "use ddp"),
    ],
)
def test_what_cannot_be_planned_is_said(plain, capsys, arguments, words):
    assert cli.run(["plan", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_model_of_another_kind_is_refused():
    config = AutoConfig.for_model("t5", d_model=64, d_kv=16, d_ff=100, num_layers=2, num_heads=4)
    with pytest.raises(ConfigError, match="expected a decoder that generates, or an encoder"):
        Traced(config, Setting("lora"))


def test_a_classifier_that_looks_at_its_labels_is_traced():
    """DeBERTa picks its loss by the labels' values, which fake tensors have not got."""
    config = config_of("deberta-v3-base")
    config.update(
        {"hidden_size": 96, "pooler_hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 700}
    )  # fmt: skip
    use = Traced(config, Setting("lora", rank=2, targets=["query_proj", "value_proj"]), depths=(2, 4)).use(2, 16)
    assert 0 < use.kept < use.peak


def test_fused_experts_are_counted_and_refused_where_they_cannot_be_adapted(tmp_path):
    """Of each of five experts (r1 + r2)(out + in) of both parameters, beside q_proj."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    config = MixtralConfig(**shape, num_attention_heads=4, num_key_value_heads=2, num_local_experts=5)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    counts = Traced(config, Setting("duallora", 3, ["q_proj"], names)).counts
    assert counts.adapter == 2 * 6 * (64 + 5 * (48 + 32 + 32 + 24))
    config.save_pretrained(tmp_path)
    for given in ({"strategy": "zero3"}, {"quantization": "4bit"}, {"methods": ["dora"]}):
        with pytest.raises(ConfigError, match="neither sharded nor quantized"):
            planner.plan(str(tmp_path), "2x80", **{"methods": ["duallora"], "parameters": names, **given})
