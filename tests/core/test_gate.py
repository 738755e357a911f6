"""The gate counts applied optimizer steps, no more and no fewer, without a line of user code."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn

import duallora
from duallora.core import gate as gate_module
from duallora.core.gate import closed_gate_message, ramp
from duallora.nn import DualLoraLinear, adapt


def model(warmup_steps: int = 10) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    return adapt(net, r1=3, r2=2, warmup_steps=warmup_steps)


def steps(net: nn.Module) -> list[int]:
    return [int(m.duallora_step) for m in net.modules() if isinstance(m, DualLoraLinear)]


def trained(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def backward(net: nn.Module) -> None:
    net(torch.ones(4, 6)).square().sum().backward()


def test_ramp_is_linear_then_one():
    assert [float(ramp(torch.tensor(t), 4)) for t in (0, 1, 3, 4, 9)] == [0.0, 0.25, 0.75, 1.0, 1.0]
    assert float(ramp(torch.tensor(0), 0)) == 1.0


def test_counts_steps_not_backwards():
    """Accumulation of 4: eight backwards are two steps."""
    net = model()
    optimizer = torch.optim.AdamW(trained(net), lr=1e-3)
    for i in range(8):
        backward(net)
        if i % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert steps(net) == [2, 2]
    assert duallora.gate(net) == pytest.approx(0.2)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_skipped_by_grad_scaler_does_not_count(fused):
    """Eager optimizers are not called on overflow; fused ones are, and skip the update inside."""
    net = model()
    optimizer = torch.optim.AdamW(trained(net), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for overflow in (False, True, False):
        optimizer.zero_grad()
        loss = net(torch.ones(4, 6)).square().sum() * (float("inf") if overflow else 1.0)
        scaler.scale(loss).backward()
        before = [p.detach().clone() for p in trained(net)]
        scaler.step(optimizer)
        scaler.update()
        assert overflow == all(torch.equal(p, q) for p, q in zip(trained(net), before, strict=True))
    assert steps(net) == [2, 2]


def test_two_optimizers_for_the_two_groups_count_once():
    net = model()
    groups = [[p for n, p in net.named_parameters() if n.endswith(("_A", "_B"))],
              [p for n, p in net.named_parameters() if n.endswith(("_C", "_D"))]]  # fmt: skip
    optimizers = [torch.optim.SGD(g, lr=1e-3) for g in groups]
    backward(net)
    for optimizer in optimizers:
        optimizer.step()
    assert steps(net) == [1, 1]


def test_a_strangers_optimizer_does_not_count():
    net, other = model(), nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=1e-3).step()
    assert steps(net) == [0, 0]


def test_a_layer_without_gradient_does_not_count():
    net = model()
    optimizer = torch.optim.SGD(trained(net), lr=1e-3)
    net[0](torch.ones(1, 6)).sum().backward()
    optimizer.step()
    assert steps(net) == [1, 0]


def test_copies_and_pickles_count_for_themselves():
    net = model()
    for clone in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301
        optimizer = torch.optim.SGD(trained(clone), lr=1e-3)
        backward(clone)
        optimizer.step()
        assert steps(clone) == [1, 1]
    assert steps(net) == [0, 0]


def test_dead_layers_are_forgotten():
    net = model()
    count = len(gate_module.tracked_layers())
    del net
    gc.collect()
    assert len(gate_module.tracked_layers()) <= count - 2


def test_advance_gate_by_hand():
    net = model()
    duallora.advance_gate(net)
    duallora.advance_gate(net, steps=4)
    assert steps(net) == [5, 5]
    assert duallora.gate(net) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="steps is -1"):
        duallora.advance_gate(net, steps=-1)
    with pytest.raises(ValueError, match="Linear has no Dual LoRA layer"):
        duallora.gate(nn.Linear(2, 2))


class Hidden:
    """An optimizer that steps on copies of the parameters, as sharding optimizers do: torch cannot see ours in it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.master = [nn.Parameter(p.detach().clone()) for p in parameters]
        self.inner = torch.optim.SGD(self.master, lr=1e-3)

    def step(self) -> None:
        for p in self.master:
            p.grad = torch.ones_like(p)
        self.inner.step()


def test_a_gate_that_stays_shut_says_so_once():
    net = model()
    optimizer = Hidden(trained(net))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3 * gate_module.MISSES_BEFORE_WARNING):
            net.zero_grad()
            backward(net)
            optimizer.step()
    messages = [str(w.message) for w in caught if "advance_gate" in str(w.message)]
    assert len(messages) == 1
    assert "2 layers" in messages[0]
    assert steps(net) == [0, 0]


def test_a_finished_model_with_old_gradients_is_left_alone():
    """Its gate is half open and its gradients linger, but no new backward runs: no warning."""
    net, other = model(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(trained(net), lr=1e-3)
    backward(net)
    optimizer.step()
    others = torch.optim.SGD(other.parameters(), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3 * gate_module.MISSES_BEFORE_WARNING):
            others.zero_grad()
            other(torch.ones(1, 2)).sum().backward()
            others.step()
    assert steps(net) == [1, 1]


def test_accumulating_beside_another_optimizer_is_no_alarm():
    """A critic that steps every micro-batch while ours accumulates: the gradients grow, but they are not unused."""
    net, critic = model(), nn.Linear(2, 2)
    ours, others = (torch.optim.SGD(p, lr=1e-3) for p in (trained(net), list(critic.parameters())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 * gate_module.MISSES_BEFORE_WARNING):
            backward(net)
            critic(torch.ones(1, 2)).sum().backward()
            others.step()
        ours.step()
    assert steps(net) == [1, 1]


class Around(torch.optim.Optimizer):
    """A wrapper over the same parameters, as ZeroRedundancyOptimizer, SAM and Lookahead are."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.inner = torch.optim.SGD(parameters, lr=1e-3)

    def step(self, closure=None):
        if closure is not None:
            raise RuntimeError("no closure here")
        self.inner.step()


def test_an_optimizer_around_an_optimizer_is_one_step():
    net = model()
    optimizer = Around(trained(net))
    for n in range(3):
        backward(net)
        if n == 1:  # a step that fails in between must not skew the next
            with pytest.raises(RuntimeError, match="no closure"):
                optimizer.step(lambda: None)
        optimizer.step()
    assert steps(net) == [3, 3]


def test_the_direction_group_alone_counts_too():
    net = model()
    optimizer = torch.optim.SGD([p for n, p in net.named_parameters() if n.endswith(("_C", "_D"))], lr=1e-3)
    for _ in range(3):
        backward(net)
        optimizer.step()
    assert steps(net) == [3, 3]


def test_a_strangers_gates_are_not_ours():
    """Mixtures of experts have a submodule called ``gates``."""
    net = model()
    net.gates = nn.Linear(2, 2)
    net[1].gates = nn.Linear(2, 2)
    assert duallora.gate(net) == 0.0


def test_closed_gate_message():
    assert closed_gate_message(10, 10) is None
    assert "0.40 (step 4 of 10)" in str(closed_gate_message(4, 10))
    assert "no effect" in str(closed_gate_message(0, 10))
    assert closed_gate_message(0, 0) is None
