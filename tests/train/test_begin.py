"""A run with adapter.init_from begins with the function the other run ended with, under a head of its own."""

import json
import shutil

import pytest
import torch
from damage import bit_flip
from of_runs import NO_RANK, equal, settings, weights, with_model

import duallora
from duallora.config.load import load_recipe
from duallora.errors import ConfigError, IntegrityError
from duallora.store import adapters
from duallora.store.models import load_model
from duallora.train import run

MORE = {
    "lora+": ["adapter.options={lr_ratio: 4}"],
    "prompt": ["adapter.options={num_virtual_tokens: 3}"],
    "full": [*NO_RANK, "train.learning_rate=1e-3"],
}


def of(name, *more):
    own = settings(name) if name != "duallora" else ["adapter.warmup_steps=auto"]
    return [*own, *MORE.get(name, ()), "train.max_steps=2", *more]


@pytest.mark.parametrize("name", ["lora+", "loreft", "prompt", "full"])
def test_every_method_begins_where_it_ended(name, make_recipe, console, tmp_path):
    """The loss on the same held-out rows before the first step is the other run's after its last; another seed."""
    first = run.train(make_recipe(*of(name), output=tmp_path / "first"), console=console)
    own = of(name, f"adapter.init_from={tmp_path / 'first'}", "seed=3")
    again = run.train(make_recipe(*own, output=tmp_path / "again"), console=console)
    assert again["metrics"]["loss_before"] == pytest.approx(first["metrics"]["loss"], abs=1e-6)
    assert first["metrics"]["loss"] != pytest.approx(first["metrics"]["loss_before"], abs=1e-6)
    assert again["metrics"]["loss"] != pytest.approx(again["metrics"]["loss_before"], abs=1e-6)
    for folder in ("run.json", "metrics.json"):
        facts = json.loads((tmp_path / "again" / folder).read_text())
        assert len(facts.get("init_from") or facts["fingerprints"]["init_from"]) == 64


@pytest.mark.parametrize(
    "more", [("adapter.warmup=residual",), ("adapter.direction=fixed", "adapter.r1=null"), ("adapter.use_dora=true",)]
)
def test_dual_lora_begins_with_its_gate_open_and_what_is_rebuilt_from_a_seed(more, make_recipe, console, tmp_path):
    own = ("adapter.warmup_steps=3", "train.max_steps=4", *more)
    first = run.train(make_recipe(*own, output=tmp_path / "first"), console=console)
    recipe = make_recipe(
        "adapter.warmup_steps=auto", "train.max_steps=4", "train.lr_warmup_steps=20", "adapter.init_seed=77", "train.logging_steps=1", *more,
        f"adapter.init_from={tmp_path / 'first' / 'adapter'}", output=tmp_path / "again",
    )  # fmt: skip
    again = run.train(recipe, console=console)
    assert again["metrics"]["loss_before"] == pytest.approx(first["metrics"]["loss"], abs=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "again" / "log.jsonl").read_text().splitlines()]
    assert {line["gate"] for line in lines} == {1.0}
    model, _ = adapters.load_adapter(tmp_path / "again", "generate")
    assert duallora.gate(model) == 1.0


@pytest.fixture
def first_step(console, monkeypatch):
    """``first_step(recipe)``: the run as it stands before it."""

    def stopped(recipe):
        held = []

        def stop(self, *rest):
            held.append(self)
            raise KeyboardInterrupt

        monkeypatch.setattr(run._Run, "_fit", stop)
        with pytest.raises(KeyboardInterrupt):
            run.train(recipe, console=console)
        return held[0]

    return stopped


@pytest.mark.parametrize("method", ["duallora", "full"])
def test_the_trunk_is_the_other_runs_and_the_head_is_new_whatever_its_size(
    method, trained, make_recipe, console, tmp_path, first_step
):
    rows = [{"text": "fine a" if n % 2 else "poor b", "label": n / 7} for n in range(12)]
    data = tmp_path / "targets.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, own = trained("classify"), ["adapter.warmup_steps=auto"]
    if method == "full":
        source, own = tmp_path / "whole", of("full")
        run.train(make_recipe(*own, kind="classify", output=source), console=console)
    begun = first_step(make_recipe(*own, f"adapter.init_from={source}", kind="classify", data=data))
    before, tokenizer = adapters.load_adapter(source, "classify")
    untrained, _ = load_model(begun.recipe.model.name, "classify", num_labels=2)
    texts = tokenizer(["fine a b", "poor"], padding=True, return_tensors="pt")
    bodies = [model if method == "full" else model.get_base_model() for model in (begun.method.model, before)]
    with torch.no_grad():
        found, expected, plain = (body.eval().base_model(**texts)[0] for body in (*bodies, untrained))
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(plain, expected, atol=1e-4)
    assert {len(weight) for name, weight in bodies[0].named_parameters() if "classifier" in name} == {1}


def test_a_head_of_the_same_size_is_drawn_anew(trained, make_recipe, tmp_path, first_step):
    heads = []
    for more in ([], [f"adapter.init_from={trained('classify')}"]):
        own = make_recipe("adapter.warmup_steps=auto", *more, kind="classify", output=tmp_path / f"r{len(more)}")
        heads.append(first_step(own).method.model.get_base_model().classifier.modules_to_save["default"].weight)
    stored = weights(trained("classify"))["base_model.model.classifier.weight"]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], stored)


def test_a_method_whose_file_is_not_what_it_trains_says_so(make_recipe, console, tmp_path):
    run.train(make_recipe(*of("prefix"), output=tmp_path / "first"), console=console)
    with pytest.raises(ConfigError, match="Prefix tuning cannot go on from its file: PEFT saves what the MLP gives"):
        run.train(make_recipe(*of("prefix", f"adapter.init_from={tmp_path / 'first'}")), console=console)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["adapter.r1=2"], r"duallora_A is \[3, 32\], expected \[2, 32\].*adapter.r as there"),
        (["adapter.alpha=11"], "has alpha = 10.*, but this run has 11"),
        (["adapter.magnitude=abs"], "has magnitude = 'relu', but this run has 'abs'"),
        (["adapter.warmup=residual"], "has warmup = 'ramp', but this run has 'residual'"),
        (["adapter.target_modules=[q_proj]"], r"also holds \d+ tensors of this run's \d+.*target_modules as there"),
        (["adapter.method=lora", "adapter.r1=null"], "has peft_type = 'DUALLORA', but this run has 'LORA'"),
        (
            ["adapter.method=full", "adapter.r1=null", *NO_RANK],
            "is an adapter, and Full fine-tuning trains the whole model",
        ),
    ],
)
def test_what_does_not_fit_is_named(more, message, trained, make_recipe, console):
    recipe = make_recipe("adapter.warmup_steps=auto", f"adapter.init_from={trained()}", *more)
    with pytest.raises(ConfigError, match=r"(?s)adapter\.init_from=.*" + message):
        run.train(recipe, console=console)


@pytest.mark.parametrize("method", ["duallora", "lora+"])
def test_a_folder_that_is_not_there_is_called_so(method, make_recipe, console):
    """runs/mnli could be the name of a model on the hub."""
    with pytest.raises(ConfigError, match=r"adapter\.init_from=runs/mnli: .* no such folder is here"):
        run.train(make_recipe(*of(method, "adapter.init_from=runs/mnli")), console=console)


def test_an_adapter_of_another_base_or_a_damaged_one_is_refused(
    trained, make_recipe, console, tmp_path, tiny_causal_folder
):
    other = tmp_path / "other"
    shutil.copytree(tiny_causal_folder, other)
    bit_flip(other / "model.safetensors")
    recipe = with_model(make_recipe("adapter.warmup_steps=auto", f"adapter.init_from={trained()}"), other)
    with pytest.raises(IntegrityError, match=r"adapter\.init_from=.* was trained on a base model with the weights"):
        run.train(recipe, console=console)
    damaged = tmp_path / "damaged"
    shutil.copytree(trained(), damaged)
    bit_flip(damaged / "adapter" / "adapter_model.safetensors")
    with pytest.raises(IntegrityError, match="damaged"):
        run.train(make_recipe("adapter.warmup_steps=auto", f"adapter.init_from={damaged}"), console=console)


def test_a_resumed_run_does_not_begin_again_and_ends_to_the_bit(trained, make_recipe, console, tmp_path, interrupted):
    first = tmp_path / "first"
    shutil.copytree(trained(), first)
    own = ["adapter.warmup_steps=auto", f"adapter.init_from={first}", "train.max_steps=6"]
    run.train(make_recipe(*own), console=console)
    stopped = interrupted(tmp_path / "run", tmp_path / "stopped", at=4)
    fingerprint = json.loads((tmp_path / "run" / "run.json").read_text())["fingerprints"]["init_from"]
    shutil.rmtree(first)
    run.train(make_recipe(*own, output=stopped), resume="auto", console=console)
    assert equal(weights(tmp_path / "run"), weights(stopped))
    assert json.loads((stopped / "run.json").read_text())["fingerprints"]["init_from"] == fingerprint


def test_a_start_that_changed_before_the_first_checkpoint_is_refused(
    trained, make_recipe, console, tmp_path, interrupted
):
    first, other = tmp_path / "first", tmp_path / "other"
    shutil.copytree(trained(), first)
    own = ["adapter.warmup_steps=auto", f"adapter.init_from={first}", "train.max_steps=2"]
    run.train(make_recipe(*own), console=console)
    run.train(make_recipe("train.max_steps=2", output=other), console=console)
    stopped = interrupted(tmp_path / "run", tmp_path / "stopped", at=0)
    shutil.rmtree(first)
    shutil.copytree(other, first)
    with pytest.raises(ConfigError, match=r"(?s)started with other settings.*weights of adapter\.init_from"):
        run.train(make_recipe(*own, output=stopped), resume="auto", console=console)


@pytest.mark.parametrize(("key", "value"), [("init", "gradient"), ("warmup_steps", "6")])
def test_settings_of_a_start_of_their_own_contradict_it(key, value):
    with pytest.raises(
        ConfigError, match=rf"adapter\.{key} = .* has no part in a run that begins with .*adapter\.init_from"
    ):
        load_recipe(None, [f"adapter.{key}={value}", "adapter.init_from=runs/mnli"], data="x.jsonl")
