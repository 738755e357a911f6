"""gradient_tokens in the adapter: reproducible, drawn in training alone."""

from __future__ import annotations

import json

import peft
import pytest
import torch

import duallora


def adapted(model, **options):
    torch.manual_seed(0)
    options = {"r1": 2, "r2": 3, "target_modules": "all-linear", "init_weights": False, "init_std": 0.2} | options
    return peft.get_peft_model(model, duallora.DualLoraConfig(**options)).train()


def train(model, ids, steps: int, seed: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def test_a_seeded_run_repeats_to_the_bit_and_differs_from_the_exact_one(llama, ids):
    once, again = (train(adapted(llama(), gradient_tokens=0.2), ids, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    exact = train(adapted(llama()), ids, 3)
    assert not all(torch.equal(a, b) for a, b in zip(once, exact, strict=True))


def test_gradient_checkpointing_draws_the_same_tokens(llama, ids):
    plain = train(adapted(llama(), gradient_tokens=0.2), ids, 2)
    model = adapted(llama(), gradient_tokens=0.2)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    for a, b in zip(train(model, ids, 2), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_evaluation_draws_nothing(llama, ids):
    model = adapted(llama(), gradient_tokens=0.2).eval()
    state = torch.random.get_rng_state()
    model(input_ids=ids, labels=ids).loss.backward()  # tokens are drawn in the backward
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("by", "warned"), [("uniform", False), ("spectrum", True)])
def test_an_adapter_saved_with_a_share_by_layer_still_loads(llama, tmp_path, recwarn, by, warned):
    """ "uniform", the default of earlier versions, said nothing; a word on the other, which did, is right."""
    model = adapted(llama(), gradient_tokens=0.5)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "gradient_tokens_by": by}))
    recwarn.clear()
    for load in (peft.PeftConfig.from_pretrained, duallora.DualLoraConfig.from_pretrained):
        assert load(str(tmp_path)).gradient_tokens == 0.5
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert loaded.peft_config["default"].gradient_tokens == 0.5
    assert any("gradient_tokens_by" in str(w.message) for w in recwarn) == warned
