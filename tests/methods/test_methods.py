"""What every method promises: it learns, is read back to the same output, and merges to it or says why not."""

from __future__ import annotations

import dataclasses
import importlib.util

import peft
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from duallora import methods
from duallora.config.load import load_recipe
from duallora.config.recipe import recipe_yaml
from duallora.errors import ConfigError
from duallora.methods import Method, MethodSpec, apply
from duallora.methods.rule import Rule, RuleConfig, attach
from duallora.train.adapter import check_method
from duallora.train.adapter import put as train_put

SMALL = {
    "randlora": {"r": 8}, "vera": {"r": 8}, "adapter-p": {"r": 5}, "adapter-l": {"r": 5}, "galore": {"options": {"gap": 2}},
    "garare": {"options": {"gap": 2}}, "flora-optimizer": {"r": 3, "options": {"kappa": 2}}, "loreft": {"r": 3},
    "delta-lora": {"r": 3, "alpha": 7.0, "options": {"K": 0}}, "corda": {"r": 4, "alpha": 7.0},
    "prefix": {"options": {"num_virtual_tokens": 3}}, "p-tuning-v2": {"options": {"num_virtual_tokens": 3}},
    "prompt": {"options": {"num_virtual_tokens": 3}}, "duallora": {"r": 4, "options": {"warmup_steps": 3, "r2": 5}},
}  # fmt: skip
STARTS_ELSEWHERE = {"adapter-p", "loreft", "prefix", "p-tuning-v2", "prompt"}
WHOLE_MODEL = {"full", "galore", "garare", "flora-optimizer"}


def put(model, name: str, batch, **changes):
    if name == "hira" and not hasattr(peft, "HiraConfig"):
        pytest.skip("PEFT has HiRA from 0.20 on")
    if name == "corda" and importlib.util.find_spec("attr") is None:
        pytest.skip("PEFT's CorDA needs attrs")
    return apply(model, dataclasses.replace(MethodSpec(name, **SMALL.get(name, {})), **changes), batches=[batch])


@pytest.mark.parametrize("name", methods.HOME)
def test_a_method_trains_and_is_read_back_and_merged_to_the_same_output(name, llama, batch, train, tmp_path):
    """Fails if a buffer, seed, counter or mutated base weight is missing from what is saved, or a scale from the merge."""
    model = llama()
    inputs = {k: v for k, v in batch.items() if k != "labels" or name == "loreft"}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        base_loss = model(**batch).loss.item()
    adapted = put(model, name, batch)
    losses = train(adapted, batch)
    if name not in STARTS_ELSEWHERE:
        assert losses[0] == pytest.approx(base_loss, abs=2e-6)
    assert losses[2] < losses[0] or name == "duallora"  # its gate is open a third and two thirds by then
    assert losses[2] != losses[0]
    if name not in WHOLE_MODEL | {"corda"}:
        trained = adapted.model.named_parameters()
        now = {n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in trained}
        assert all(torch.equal(now.get(n, now.get(f"base_model.{n}", p)), p) for n, p in before.items()), "base changed"

    with torch.no_grad():
        expected = adapted.model(**inputs).logits
        adapted.save(tmp_path / "saved")
        again = methods.load(llama(), tmp_path / "saved").eval()
        for p in again.parameters():  # off the file's mapped memory, which other kernels read
            p.data = p.data.clone()
        found = again(**inputs).logits
        # CorDA is saved as another LoRA that does the same, a prefix as what its MLP gives: rounded differently.
        assert (found - expected).abs().max() <= (1e-6 if name in ("corda", "prefix") else 0)
        if adapted.method.no_merge:
            with pytest.raises(ConfigError, match="cannot be merged"):
                adapted.merged()
        else:
            merged = adapted.merged()
            assert not isinstance(merged, PeftModel)
            torch.testing.assert_close(merged(**inputs).logits, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    "name", ["lora", "mora", "delta-lora", "flora-core", "adapter-p", "adapter-l", "loreft", "prefix"]
)
def test_bfloat16_weights_take_a_step(name, llama, batch, train):
    losses = train(put(llama(torch.bfloat16), name, batch), batch, steps=1)
    assert all(torch.tensor(losses).isfinite())


@pytest.mark.parametrize("name", ["mora", "delta-lora", "adapter-l", "loreft"])
def test_two_rules_live_on_one_model(name, llama, batch, tmp_path):
    """Each adapter alone is itself, both together add up layer by layer, none is the base model, and one can go."""
    model = llama()
    options = {**SMALL.get(name, {}).get("options", {}), "init_weights": False}
    with torch.no_grad():
        base = model(**batch).logits
        adapted = put(model, name, batch, options=options).model
        first = adapted(**batch).logits
        adapted.add_adapter("other", dataclasses.replace(adapted.peft_config["default"]))
        assert torch.equal(adapted(**batch).logits, first)
        adapted.set_adapter("other")
        second = adapted(**batch).logits
        adapted.save_pretrained(tmp_path, save_embedding_layers=False)
        with adapted.disable_adapter():
            assert torch.equal(adapted(**batch).logits, base)
        adapted.base_model.set_adapter(["default", "other"])
        both = adapted(**batch).logits
        assert not any(torch.allclose(a, b) for a, b in ((first, second), (first, both), (second, both)))
        if not methods.get(name).no_merge:
            adapted.merge_adapter()
            torch.testing.assert_close(adapted(**batch).logits, both, rtol=0, atol=1e-5)
            adapted.unmerge_adapter()
        assert torch.equal(adapted(**batch).logits, both)
        adapted.delete_adapter("default")
        adapted.set_adapter("other")
        assert torch.equal(adapted(**batch).logits, second)
        again = PeftModel.from_pretrained(llama(), tmp_path / "other").eval()
        assert torch.equal(again(**batch).logits, second)


LAYERS = r"model\.layers\.\d+"


def test_a_rule_beside_another_kind_of_rule_is_what_it_is_alone(llama, batch, tmp_path):
    """Only LoReFT asks where the prompt is, and the layer was made for one that does not."""
    with torch.no_grad():
        alone = put(llama(), "loreft", batch, options={"first": 1, "last": 1})
        expected = alone.model(**batch).logits
        alone.save(tmp_path / "loreft")
        model = put(llama(), "adapter-l", batch).model
        model.load_adapter(tmp_path / "loreft", "edit")
        model.set_adapter("edit")
        assert torch.equal(model.eval()(**batch).logits, expected)
        with pytest.raises(ConfigError, match=r"'model\.layers\.0' is a LlamaDecoderLayer; MoRA goes onto"):
            model.add_adapter("third", RuleConfig(rule="mora", target_modules=LAYERS))


class Elsewhere(torch.nn.Parameter):
    device = torch.device("cuda", 1)


@pytest.mark.parametrize(("name", "target"), [("adapter-l", LAYERS), ("mora", ["q_proj"])])
def test_a_rule_goes_to_the_device_of_what_it_is_put_on(name, target, llama, monkeypatch):
    """A decoder layer has no ``weight`` to ask: the second adapter that is loaded on a GPU would stay on the CPU."""
    model, moved = llama(), []
    for layer in model.model.layers:
        for module in layer.modules():
            module._parameters.update({key: Elsewhere(p) for key, p in module._parameters.items() if p is not None})
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, device=None, **_: moved.append((type(self), device)) or self
    )
    adapted = peft.get_peft_model(model, RuleConfig(rule=name, r=2, target_modules=target))
    for again in (False, True):
        if again:
            moved.clear()
            adapted.add_adapter("second", RuleConfig(rule=name, r=2, target_modules=target))
        devices = [device for kind, device in moved if issubclass(kind, Rule)]
        assert len(devices) >= len(model.model.layers)
        assert set(devices) == {Elsewhere.device}


def test_a_checkpointed_rule_has_the_same_gradients(llama, batch):
    """LoReFT's tokens must still be known when the layer runs a second time, in the backward."""
    gradients = []
    for checkpointed in (False, True):
        model = llama()
        torch.manual_seed(5)
        adapted = apply(model, MethodSpec("loreft", r=3)).model
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            adapted.enable_input_require_grads()
        adapted.train()(**batch).loss.backward()
        gradients.append([p.grad for p in methods.trained(adapted)])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=1e-7)


def test_random_bases_come_back_from_their_seed_alone(llama, batch, train, tmp_path):
    for name in ("vera", "randlora"):
        adapted = put(llama(), name, batch, options={"save_projection": False, "projection_prng_key": 5})
        train(adapted, batch)
        adapted.save(tmp_path / name)
        with torch.no_grad():
            found = methods.load(llama(), tmp_path / name).eval()(**batch).logits
            assert torch.equal(found, adapted.model(**batch).logits)


def test_learning_rates_of_the_groups(llama, batch):
    """LoRA+: B at 16 times the rate of A; Dual LoRA: C and D at the ratio asked for."""
    adapted = put(llama(), "lora+", batch)
    rates = {id(p): g["lr"] for g in adapted.groups(1e-3) for p in g["params"]}
    found = {n: rates[id(p)] for n, p in adapted.model.named_parameters() if p.requires_grad}
    assert all(rate == pytest.approx(16e-3 if "lora_B" in n else 1e-3) for n, rate in found.items())
    assert {"lora_A", "lora_B"} <= {part for n in found for part in n.split(".")}
    adapted = put(llama(), "duallora", batch, options={"direction_lr_ratio": 3.0})
    for group in adapted.groups(1e-3, weight_decay=0.1):
        names = {n.split(".")[-2] for n, p in adapted.model.named_parameters() for q in group["params"] if p is q}
        assert group["lr"] == pytest.approx(3e-3 if "duallora_C" in names else 1e-3)
        assert names in ({"duallora_A", "duallora_B"}, {"duallora_C", "duallora_D"})
        assert group["weight_decay"] == 0.1


def test_what_a_method_cannot_do_is_refused(llama, monkeypatch):
    monkeypatch.delattr(peft, "HiraConfig", raising=False)
    for spec, message in (
        (MethodSpec("lroa"), "no such method; nearest: lora"),
        (MethodSpec("hira"), r"HiRA needs PEFT 0\.20 or newer"),
        (MethodSpec("mora", alpha=3.0), r"alpha=3\.0: MoRA has no such setting"),
        (MethodSpec("mora", options={"typ": 6}), r"options \['typ'\]: mora takes exclude_modules, .*kind"),
        (MethodSpec("mora", options={"kind": "rope"}), "expected one of rotation, decoupling, truncation"),
        (MethodSpec("mora", target_modules=["mlp"]), "goes onto torch.nn.Linear"),
        (MethodSpec("galore", options={"typ": 6}), r"options \['typ'\]: galore takes gap"),
        (MethodSpec("galore", target_modules=["nothing"]), "names no linear layer"),
        (MethodSpec("duallora", options={"typ": 6}), "expected fields of DualLoraConfig"),
        (MethodSpec("lora", options={"typ": 6}), "typ"),
        (MethodSpec("corda"), "CorDA starts from data: pass batches="),
        (MethodSpec("loreft", r=100), "at most the layer's width, 36"),
        (MethodSpec("prompt", options={"num_virtual_tokens": 0}), "num_virtual_tokens=0: expected"),
        (MethodSpec("prefix", options={"num_virtual_tokens": 2048}), "has 2048 positions, .*: expected fewer"),
    ):
        with pytest.raises(ConfigError, match=message):
            apply(llama(), spec)
    size = {
        "vocab_size": 67,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    deberta = DebertaV2ForSequenceClassification(DebertaV2Config(**size))
    with pytest.raises(ConfigError, match="DebertaV2ForSequenceClassification takes no past_key_values"):
        apply(deberta, MethodSpec("p-tuning-v2", task_type="SEQ_CLS"))


def test_a_recipe_without_a_rank_has_the_authors():
    """Shown in the resolved recipe, and the same as in Python; a rank that is named stays."""
    authors = {"adapter-p": 256, "vera": 256, "adapter-l": 224, "galore": 4, "loreft": 8, "mora": 8, "hira": 32}
    for name in methods.names():
        recipe = load_recipe(None, [f"adapter.method={name}"], task="rte")
        rank = methods.get(name).defaults.get("r")
        assert recipe.adapter.r == rank == authors.get(name, rank), name
    assert f"r: {authors['vera']}" in recipe_yaml(load_recipe(None, ["adapter.method=vera"], task="rte"))
    assert load_recipe(None, ["adapter.method=vera", "r=64"], task="rte").adapter.r == 64


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("delta-lora", "train.max_steps=501", "K=500: .* this run has 501: expected more steps"),
        ("flora-optimizer", "train.max_grad_norm=0", "accumulation_rank=4 .*accumulation_steps=1"),
        (
            "flora-optimizer",
            "train.gradient_accumulation_steps=2",
            r"max_grad_norm=1\.0 .*expected train\.max_grad_norm=0",
        ),
    ],
)
def test_a_run_that_does_not_suit_its_method_is_refused(method, settings, message):
    options = ["adapter.options={accumulation_rank: 4}"] if method == "flora-optimizer" else []
    recipe = load_recipe(None, [f"adapter.method={method}", settings, *options], task="rte")
    with pytest.raises(ConfigError, match=message):
        check_method(recipe, recipe.train.max_steps)


class Shift(Rule):
    """A toy: y' = y + c, with c [out] trained."""

    def __init__(self, config, in_features, out_features):
        super().__init__(config, in_features, out_features)
        self.shift = self.start(torch.zeros(out_features), config)

    def forward(self, h: Tensor, prompt: Tensor | None = None) -> Tensor:
        return self.shift.expand(*h.shape[:-1], -1)


def test_a_new_method_is_one_file(llama, batch, train, tmp_path):
    """docs/extending.md: a Rule and a Method; training, saving and loading come with them, and the verbs by its name."""
    toy = Method(
        name="shift", title="Shift", paper="none", equation="W0 x + c", attach=attach, rule=Shift,
        defaults={"dropout": 0.0, "target_modules": ["v_proj"]}, no_merge="it is a bias.",
    )  # fmt: skip
    try:
        methods.add(toy)
        adapted = apply(llama(), MethodSpec("shift"))
        losses = train(adapted, batch)
        assert losses[2] < losses[0]
        recipe = load_recipe(None, ["adapter.method=shift"], task="e2e")
        check_method(recipe, 10)
        for model in (adapted.model, train_put(llama(), recipe, "generate", 1).model):
            assert [p.numel() for p in methods.trained(model)] == [12, 12]
        with pytest.raises(ConfigError, match=r"r=3: Shift has no such setting"):
            check_method(load_recipe(None, ["adapter.method=shift", "r=3"], task="e2e"), 10)
        adapted.save(tmp_path)
        with torch.no_grad():
            found = methods.load(llama(), tmp_path).eval()(**batch).logits
            assert torch.equal(found, adapted.model(**batch).logits)
        with pytest.raises(ConfigError, match="Shift cannot be merged: it is a bias"):
            adapted.merged()
    finally:
        methods._added.clear()
    with pytest.raises(ConfigError, match="choose another name"):
        methods.add(dataclasses.replace(toy, name="lora"))
