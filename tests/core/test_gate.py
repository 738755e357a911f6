"""The gate counts applied optimizer steps, no more and no fewer, without a line of user code."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import nn

import duallora
from duallora.core import gate as gate_module
from duallora.core.gate import gated, new_counter, ramp
from duallora.core.settings import share_of
from duallora.nn import DualLoraLinear, adapt, merge


def model(warmup_steps: int = 10) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    return adapt(net, r1=3, r2=2, warmup_steps=warmup_steps)


def steps(net: nn.Module) -> list[int]:
    return [int(m.duallora_step) for m in net.modules() if isinstance(m, DualLoraLinear)]


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)


def backward(net: nn.Module) -> None:
    net(torch.ones(4, 6)).square().sum().backward()


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_layer_without_gradient_does_not_count():
    net = model()
    optimizer = sgd(net)
    net[0](torch.ones(1, 6)).sum().backward()
    with pytest.warns(UserWarning, match="1 adapted layers got no gradient in their optimizer's first step: 2"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        optimizer.step()
    assert steps(net) == [2, 0]
    with pytest.warns(UserWarning, match="Merging .* 1 adapted layers never got a gradient.*: 2"):
        merge(net)


def test_a_step_before_the_first_gradient_names_nobody(silent):
    net = model()
    optimizer = sgd(net)
    optimizer.step()
    backward(net)
    optimizer.step()
    assert steps(net) == [1, 1]


def test_a_counter_cast_behind_the_layers_back_counts_on():
    """FSDP's mixed precision writes to buffers directly."""
    net = model(1000)
    duallora.advance_gate(net, 256)
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.bfloat16()
    optimizer = sgd(net)
    for _ in range(3):
        backward(net)
        optimizer.step()
    assert steps(net) == [259, 259]


def test_counters_saved_as_integers_load():
    """As version 0.1 saved them; afterwards they count and average as floats."""
    net = model()
    old = {n: t.to(torch.int64) + 4 if n.endswith("duallora_step") else t for n, t in net.state_dict().items()}
    for assign in (False, True):
        net.load_state_dict(old, assign=assign)
        assert steps(net) == [4, 4]
        assert all(b.dtype == torch.float32 for n, b in net.named_buffers() if n.endswith("duallora_step"))


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


def test_a_gate_that_stays_shut_says_so_once():
    """Of an optimizer that steps on copies of the parameters, as sharding ones do: torch cannot see ours in it."""
    net = model()
    copies = [nn.Parameter(p.detach().clone()) for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(copies, lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3 * gate_module.IDLE_BEFORE_WARNING):
            net.zero_grad()
            backward(net)
            for p in copies:
                p.grad = torch.ones_like(p)
            optimizer.step()
    (message,) = [str(w.message) for w in caught if "advance_gate" in str(w.message)]
    assert "their gate does not open" in message
    assert steps(net) == [0, 0]


def test_a_finished_model_with_old_gradients_is_left_alone(silent):
    """Its gate is half open and its gradients linger, but no new backward runs: no warning."""
    net, other = model(), nn.Linear(2, 2)
    backward(net)
    sgd(net).step()
    others = sgd(other)
    for _ in range(3 * gate_module.IDLE_BEFORE_WARNING):
        others.zero_grad()
        other(torch.ones(1, 2)).sum().backward()
        others.step()
    assert steps(net) == [1, 1]


def test_accumulating_beside_another_optimizer_is_no_alarm(silent):
    """A critic that steps every micro-batch while ours accumulates: the gradients grow, but they are not unused."""
    net, critic = model(), nn.Linear(2, 2)
    ours, others = sgd(net), sgd(critic)
    for _ in range(2 * gate_module.IDLE_BEFORE_WARNING):
        backward(net)
        critic(torch.ones(1, 2)).sum().backward()
        others.step()
    ours.step()
    assert steps(net) == [1, 1]


class Around(torch.optim.Optimizer):
    """A wrapper over the same parameters, as ZeroRedundancyOptimizer, SAM and Lookahead are."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups[0]["params"], {})
        self.inner = inner

    def step(self, closure=None):
        if closure is not None:
            raise RuntimeError("no closure here")
        self.inner.step()


def test_an_optimizer_around_an_optimizer_is_one_step():
    net = model()
    optimizer = Around(sgd(net))
    for n in range(3):
        backward(net)
        if n == 1:  # a step that fails in between must not skew the next
            with pytest.raises(RuntimeError, match="no closure"):
                optimizer.step(lambda: None)
        optimizer.step()
    assert steps(net) == [3, 3]


def test_a_strangers_gates_are_not_ours():
    """Mixtures of experts have a submodule called ``gates``."""
    net = model()
    net.gates = nn.Linear(2, 2)
    net[1].gates = nn.Linear(2, 2)
    assert duallora.gate(net) == 0.0


def test_the_ramp_is_linear_and_the_scaling_of_an_eager_forward_a_number_with_its_bits():
    """Asked for in every forward: it costs no tensor operation, and must not cost a bit."""
    assert [float(ramp(torch.tensor(t), 4)) for t in (0, 1, 3, 4, 9)] == [0.0, 0.25, 0.75, 1.0, 1.0]
    assert float(ramp(torch.tensor(0), 0)) == 1.0
    for steps, scaling in ((7, 2.0), (100, 1 / 3), (997, 1e-3 / 7)):
        for t in [*range(steps + 3), 0.1, 2.7182817]:  # an average of copies has fractions
            found = gated(scaling, new_counter(t), steps)
            assert isinstance(found, float)
            assert found == float(scaling * ramp(new_counter(t), steps))


@pytest.mark.parametrize(
    ("steps", "ramp"), [(1, 1), (2, 1), (6, 2), (30, 10), (31, 10), (100, 10), (101, 11), (110, 11), (1000, 100)]
)
def test_an_automatic_ramp_is_a_tenth_of_the_run_at_least_ten_and_at_most_a_third(steps, ramp):
    """Written out; a tenth is rounded up."""
    assert share_of(steps) == ramp
