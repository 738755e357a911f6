"""`duallora train` with a method that trains the model's own weights: the result, its checkpoints and its checks."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from damage import bit_flip
from of_runs import with_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from duallora.errors import ConfigError, IntegrityError
from duallora.export import merge
from duallora.store import adapters, checkpoint
from duallora.train import evaluate, prepare, run


def settings(name: str, *more: str) -> list[str]:
    own = ("adapter.r=null",) if name == "full" else ("adapter.r=3", "adapter.options={gap: 2}")
    own = ("adapter.r=3", "adapter.options={kappa: 2}") if name == "flora-optimizer" else own
    bare = ("adapter.r1=null", "adapter.warmup_steps=auto", "adapter.alpha=null", "adapter.duallora_dropout=null")
    return [f"adapter.method={name}", *bare, *own, "train.max_steps=4", "train.learning_rate=1e-3", *more]


@pytest.fixture(scope="module")
def tied_folder(tiny_causal_folder, tmp_path_factory):
    """The tiny LLaMA with one matrix for input and output."""
    folder = tmp_path_factory.mktemp("models") / "tied"
    shutil.copytree(tiny_causal_folder, folder)
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    return folder


@pytest.fixture
def make_tied(make_recipe, tied_folder):
    """``make_recipe`` for the tied model."""

    def make(*settings: str, **options):
        return with_model(make_recipe(*settings, **options), tied_folder)

    return make


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("full", "float32"), ("galore", "bfloat16"), ("flora-optimizer", "bfloat16")],
)
def test_a_whole_model_is_trained_resumed_to_the_bit_and_read_back(
    name, dtype, make_tied, console, tmp_path, tied_folder, resumes, held_out_loss
):
    """A stop at step 2 falls between two redraws of GaLore's P and Flora's seed; the tied matrix must stay one."""
    more = settings(name, f"model.dtype={dtype}")
    whole, folder, _ = resumes(*more, make=make_tied)
    first = load_file(folder / "model" / "model.safetensors")
    before = load_file(tied_folder / "model.safetensors")
    assert first.keys() == before.keys()
    if dtype == "float32":
        assert not any(torch.equal(first[key], before[key]) for key in first)  # each weight has moved
    else:
        assert first["model.embed_tokens.weight"].dtype == torch.bfloat16
        assert "the weights train in bfloat16" in console.file.getvalue()
    assert whole["adapter"] == str(folder / "model")
    total = sum(tensor.numel() for tensor in before.values())
    assert json.loads((folder / "metrics.json").read_text())["parameters"] == {"trainable": total, "total": total}

    assert str(adapters.load_adapter(folder, "generate")[0].dtype) == f"torch.{dtype}"
    assert held_out_loss(folder, make_tied(*more)) == pytest.approx(whole["metrics"]["loss"], abs=1e-6)
    with pytest.raises(ConfigError, match="is a model, not an adapter"):
        merge.merge(folder, tmp_path / "merged", console=console)


def test_the_first_step_of_full_fine_tuning_is_adamws_on_every_weight(make_tied, console, tmp_path, tied_folder):
    """Adam's first step is lr g / (|g| + eps'), whatever the gradient's size: by hand, all rows in one batch."""
    lr, decay = 1e-3, 0.1
    steps = ["train.max_steps=1", "train.save_steps=1", "train.batch_size=32", "train.gradient_accumulation_steps=1"]
    steps += [f"train.weight_decay={decay}", "train.lr_warmup_steps=0", "train.max_grad_norm=0"]
    recipe = make_tied(*settings("full", *steps))
    run.train(recipe, console=console)
    model = AutoModelForCausalLM.from_pretrained(tied_folder)
    _, tokenizer = adapters.load_adapter(tied_folder, "generate")
    task = prepare.load(recipe, console)
    rows, _ = run.encode_split(evaluate.select(task, "train"), tokenizer, "generate", max_length=64)
    batch = run.Collator(tokenizer)(rows)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100]).backward()
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for key, weight in model.named_parameters():
        G, W = weight.grad, weight.detach()
        shrunk = W if "norm" in key else W * (1 - lr * decay)
        expected = shrunk - lr * G / (G.abs() + 1e-8)
        clear = G.abs() > 1e-5  # below, rounding of G decides
        assert clear.float().mean() > 0.3, key
        torch.testing.assert_close(after[key][clear], expected[clear], atol=2e-6, rtol=1e-5)


def test_galore_runs_with_its_own_optimizer_at_the_runs_rate(make_recipe, console, tmp_path):
    """Trainer's AdamW would train it too; its states would be as large as the weights."""
    own = settings("galore", "train.lr_scheduler=constant", "train.lr_warmup_steps=0")
    run.train(make_recipe(*own), console=console)
    state = torch.load(tmp_path / "run" / "checkpoints" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    projected, rest = state["param_groups"]
    assert (projected["rank"], rest["rank"]) == (3, 0)
    assert {projected["lr"], rest["lr"]} == {1e-3}
    shapes = {tuple(state["state"][index]["exp_avg"].shape) for index in projected["params"]}
    assert shapes == {(32, 3), (3, 32), (64, 3), (3, 64)} & shapes
    assert len(projected["params"]) == 2 * 7  # LLaMA's linear layers, without the head


@pytest.mark.parametrize("kind", ["classify", "regress"])
def test_a_classifier_is_read_back_with_its_head_and_its_classes(kind, make_recipe, console, tmp_path, held_out_loss):
    data = None
    if kind == "regress":
        data = tmp_path / "scores.jsonl"
        rows = [{"text": "abcdefgh"[: n % 7 + 1], "label": n % 7 + 0.5} for n in range(20)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(*settings("full"), kind="classify", data=data)
    result = run.train(recipe, console=console)
    task = prepare.load(recipe, console)
    assert task.kind == kind
    assert held_out_loss(result["folder"], recipe, kind) == pytest.approx(result["metrics"]["loss"], abs=1e-6)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")  # as any program loads it
    assert plain.config.num_labels == (2 if kind == "classify" else 1)
    if kind == "classify":
        assert plain.config.id2label == dict(enumerate(task.labels))
    with pytest.raises(ConfigError, match=f"was trained to {kind}, this task needs a model to generate"):
        adapters.load_adapter(result["folder"], "generate")


def test_damage_to_a_model_or_its_checkpoints_is_found(make_recipe, console, tmp_path, interrupted):
    """Also a sealed checkpoint whose tensors are not the model's: Trainer would pass over them with a warning."""
    recipe = make_recipe(*settings("full"))
    run.train(recipe, console=console)
    folder = tmp_path / "run"
    bit_flip(folder / "model" / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"damaged .* take a fresh copy of the model"):
        adapters.load_adapter(folder, "generate")

    stopped = interrupted(folder, tmp_path / "stopped", at=4)
    newest = stopped / "checkpoints" / "checkpoint-4"
    (newest / "model.safetensors").unlink()
    assert checkpoint.verify(newest) == "model.safetensors is missing"
    older = stopped / "checkpoints" / "checkpoint-2"
    assert checkpoint.newest_verified(stopped / "checkpoints")[0] == older
    # Sealed without weights at all, as if the save had written none.
    checkpoint.commit(newest, step=4, fingerprints={})
    assert "was not saved" in (checkpoint.verify(newest) or "")
    tensors = load_file(older / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, older / "model.safetensors")
    checkpoint.commit(older, step=2, fingerprints={})
    with pytest.raises(IntegrityError, match="does not fit the model"):
        run.train(recipe.model_copy(update={"output": str(stopped)}), resume="auto", console=console)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("full", "adapter.exclude_modules=[q_proj]", "exclude_modules.*has no such setting; it takes no setting"),
        ("galore", "adapter.modules_to_save=[lm_head]", "options .*modules_to_save.*galore takes gap"),
        ("galore", "train.optimizer=adafactor", "GaLore is an optimizer itself"),
        ("full", "adapter.target_modules=[q_proj]", "Full fine-tuning has no such setting"),
        ("full", "model.quantization=bnb-4bit", "this model's are quantized"),
    ],
)
def test_what_a_whole_model_cannot_take_is_said(name, change, message, make_recipe, console):
    if "quantization" in change:
        pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match=message):
        run.train(make_recipe(*settings(name, change)), console=console)
