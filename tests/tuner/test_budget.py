"""gradient_tokens in the adapter: reproducible, saved, and one budget spent where it lowers the error most."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import duallora
from duallora.errors import ConfigError
from duallora.ops.tokens import FRACTIONS
from duallora.tuner.budget import spend
from duallora.tuner.layer import Linear


def layers(model) -> list[Linear]:
    return [m for m in model.modules() if isinstance(m, Linear)]


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


@pytest.mark.parametrize("by", ["uniform", "spectrum"])
def test_a_seeded_run_repeats_to_the_bit_and_differs_from_the_exact_one(llama, ids, by):
    options = {"gradient_tokens": 0.2, "gradient_tokens_by": by}
    once, again = (train(adapted(llama(), **options), ids, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    exact = train(adapted(llama()), ids, 3)
    assert not all(torch.equal(a, b) for a, b in zip(once, exact, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_draws_the_same_tokens(llama, ids, use_reentrant):
    plain = train(adapted(llama(), gradient_tokens=0.2), ids, 2)
    model = adapted(llama(), gradient_tokens=0.2)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for a, b in zip(train(model, ids, 2), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_evaluation_draws_nothing(llama, ids):
    model = adapted(llama(), gradient_tokens=0.2).eval()
    state = torch.random.get_rng_state()
    model(ids)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_spend_is_close_to_the_best_there_is():
    """Within 3 % of a lower bound for every choice within the budget: min of error + price (cost - budget), at any price."""
    generator = torch.Generator().manual_seed(0)
    costs = torch.randint(50, 900, (40,), generator=generator)
    errors = torch.rand(40, 1, generator=generator) ** 3 * torch.tensor([[1 / f - 1 for f in FRACTIONS]])
    shares = torch.tensor(FRACTIONS)
    for fraction in (0.1, 0.25, 0.6):
        budget = fraction * float(costs.sum())
        got = spend(errors, costs, fraction)
        index = [FRACTIONS.index(share) for share in got]
        assert float((costs * shares[index]).sum()) <= budget * (1 + 1e-9)
        error = float(errors[range(40), index].sum())
        bound = max(
            float((errors + price * costs[:, None] * shares).amin(1).sum()) - price * budget
            for price in torch.logspace(-6, 2, 400).tolist()
        )
        assert error <= bound * 1.03
        uniform = FRACTIONS.index(max(f for f in FRACTIONS if f <= fraction))
        assert error < float(errors[:, uniform].sum())


def test_layers_of_equal_need_share_equally_and_a_needy_one_gets_more():
    curve = torch.tensor([1 / f - 1 for f in FRACTIONS])
    costs = torch.full((4,), 100)
    assert spend(curve.expand(4, -1), costs, 0.25) == [0.25] * 4
    shares = spend(torch.stack([curve * 9, curve, curve, curve * 0]), costs, 0.25)
    assert shares[0] > shares[1] >= shares[3]
    assert spend(torch.zeros(2, len(FRACTIONS)), costs[:2], 0.5) == [FRACTIONS[0]] * 2


def test_the_budget_is_kept_spent_unevenly_and_saved(llama, ids, tmp_path):
    model = adapted(llama(), gradient_tokens=0.25, gradient_tokens_by="spectrum")
    train(model, ids, 3)
    shares = [float(layer.token_shares["default"]) for layer in layers(model)]
    costs = [layer.in_features * layer.out_features for layer in layers(model)]
    mean = sum(s * c for s, c in zip(shares, costs, strict=True)) / sum(costs)
    assert 0.15 <= mean <= 0.25 + 1e-9
    assert len(set(shares)) > 1
    assert all(layer.token_probes["default"].grad is None for layer in layers(model))  # one step's errors, not a sum
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert [float(layer.token_shares["default"]) for layer in layers(loaded)] == pytest.approx(shares)
    copied = copy.deepcopy(model)
    for a, b in zip(train(copied, ids, 2), train(model, ids, 2), strict=True):
        assert torch.equal(a, b)


def test_bad_shares_are_refused():
    for value in (0, -0.5, 1.5, "half", float("nan")):
        with pytest.raises(ConfigError, match=r"gradient_tokens=.*expected a share of the tokens in \(0, 1\]"):
            duallora.DualLoraConfig(gradient_tokens=value)
    with pytest.raises(ConfigError, match="plain autograd, which cannot sample"):
        duallora.DualLoraConfig(gradient_tokens=0.5, backend="reference")
    with pytest.raises(ConfigError, match="gradient_tokens_by='layer' is unknown"):
        duallora.DualLoraConfig(gradient_tokens_by="layer")
