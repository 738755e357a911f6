"""The gate counts applied optimizer steps, no more and no fewer, without a line of user code."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import oracle
import pytest
import torch
from torch import nn

import duallora
from duallora.core import gate as gate_module
from duallora.core.gate import closed_gate_message, gated, new_counter, ramp
from duallora.nn import DualLoraLinear, adapt, merge


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


@pytest.mark.parametrize("order", ["ABCD", "DCBA", "CADB"])
def test_one_optimizer_for_each_factor_is_one_step(order):
    """As where optimizers run inside the backward: whichever factor comes first, a step counts once."""
    net = model()
    factors = {n.rpartition("_")[2]: [] for n, p in net.named_parameters() if p.requires_grad}
    for n, p in net.named_parameters():
        if p.requires_grad:
            factors[n.rpartition("_")[2]].append(p)
    optimizers = [torch.optim.SGD([p], lr=1e-3) for name in order for p in factors[name]]
    for expected in (1, 2, 3):
        net.zero_grad()
        backward(net)
        for optimizer in optimizers:
            optimizer.step()
        assert steps(net) == [expected, expected]


def test_another_optimizer_from_the_middle_on_goes_on_counting():
    net = model()
    for _ in range(2):
        optimizer = torch.optim.SGD(trained(net), lr=1e-3)
        for _ in range(3):
            backward(net)
            optimizer.step()
    assert steps(net) == [6, 6]


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
    with pytest.warns(UserWarning, match="1 adapted layers got no gradient in their optimizer's first step: 2"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        optimizer.step()
    assert steps(net) == [2, 0]
    with pytest.warns(UserWarning, match="Merging .* 1 adapted layers never got a gradient.*: 2"):
        merge(net)


def test_a_step_before_the_first_gradient_names_nobody():
    net = model()
    optimizer = torch.optim.SGD(trained(net), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        backward(net)
        optimizer.step()
    assert steps(net) == [1, 1]


def test_copies_and_pickles_count_for_themselves():
    net = model()
    for clone in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301
        optimizer = torch.optim.SGD(trained(clone), lr=1e-3)
        backward(clone)
        optimizer.step()
        assert steps(clone) == [1, 1]
    assert steps(net) == [0, 0]


def lerp_floats(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """The loop of many trainers: over the state dict, floats only."""
    mine, other = ema.state_dict(), net.state_dict()
    for name, value in mine.items():
        if value.is_floating_point():
            value.lerp_(other[name], 1 - decay)


def copy_all(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """The same without looking at types: what is an integer is truncated."""
    mine, other = ema.state_dict(), net.state_dict()
    for name, value in mine.items():
        value.copy_(decay * value + (1 - decay) * other[name])


def load_averages(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """Into a new dict, loaded at the end: what is an integer comes back as a float."""
    other = net.state_dict()
    ema.load_state_dict({name: decay * value + (1 - decay) * other[name] for name, value in ema.state_dict().items()})


class Averaged:
    """torch's own."""

    def __init__(self, decay: float) -> None:
        self.decay, self.model = decay, None

    def __call__(self, ema: nn.Module, net: nn.Module, decay: float) -> None:
        if self.model is None:
            average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
            self.model = torch.optim.swa_utils.AveragedModel(ema, multi_avg_fn=average, use_buffers=True)
            self.model.n_averaged.fill_(1)  # begin with the average, not with a copy of net
            self.model.module = ema
        self.model.update_parameters(net)


@pytest.mark.parametrize("loop", [lerp_floats, copy_all, load_averages, "AveragedModel"])
def test_a_copy_whose_tensors_are_averaged_computes_what_the_averages_say(loop):
    """Its factors are averages of the factors, its gate opens with the average number of steps behind them."""
    decay, warmup_steps, n = 0.8, 5, 20
    loop = Averaged(decay) if loop == "AveragedModel" else loop
    net = model(warmup_steps)
    ema = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(trained(net), lr=1e-2)
    factors, mean_step, gates = [p.detach().clone() for p in trained(net)], 0.0, []
    for t in range(1, n + 1):
        optimizer.zero_grad()
        backward(net)
        optimizer.step()
        loop(ema, net, decay)
        factors = [decay * a + (1 - decay) * p.detach() for a, p in zip(factors, trained(net), strict=True)]
        mean_step = decay * mean_step + (1 - decay) * t
        gates.append(min(1.0, mean_step / warmup_steps))
        assert duallora.gate(ema) == pytest.approx(gates[-1], abs=1e-6)
    assert gates[2] < 1.0 == gates[-1]
    for layer, four in ((ema[0], factors[:4]), (ema[2], factors[4:])):
        dW = torch.tensor(oracle.delta(*(f.double().tolist() for f in four), layer.scaling), dtype=torch.float64)
        torch.testing.assert_close(layer.get_delta_weight().double(), dW, rtol=1e-4, atol=1e-6)


def test_a_copy_of_which_only_parameters_are_averaged_says_that_its_gate_is_shut():
    net = model()
    teacher = copy.deepcopy(net).eval()
    optimizer = torch.optim.SGD(trained(net), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher(torch.ones(1, 6))
        backward(net)
        optimizer.step()
        net(torch.ones(1, 6))
    for ours, theirs in zip(teacher.parameters(), net.parameters(), strict=True):
        ours.data.mul_(0.9).add_(theirs.data, alpha=0.1)
    with pytest.warns(UserWarning, match=r"its gate is where it was, at 0.00: the counter is a buffer"):
        teacher(torch.ones(1, 6))
    for ours, theirs in zip(teacher.buffers(), net.buffers(), strict=True):
        ours.copy_(theirs)
    assert duallora.gate(teacher) == duallora.gate(net) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_of_the_model_leaves_the_counter_alone(dtype):
    """bfloat16 cannot count past 256: 257 would be 256 for ever."""
    net = model(1000)
    duallora.advance_gate(net, 257)
    net.to(dtype)
    duallora.advance_gate(net, 2)
    assert [m.duallora_step.dtype for m in net.modules() if isinstance(m, DualLoraLinear)] == [torch.float32] * 2
    assert steps(net) == [259, 259]


def test_a_counter_cast_behind_the_layers_back_counts_on():
    """FSDP's mixed precision writes to buffers directly."""
    net = model(1000)
    duallora.advance_gate(net, 256)
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.bfloat16()
    optimizer = torch.optim.SGD(trained(net), lr=1e-3)
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
        for _ in range(3 * gate_module.IDLE_BEFORE_WARNING):
            net.zero_grad()
            backward(net)
            optimizer.step()
    messages = [str(w.message) for w in caught if "advance_gate" in str(w.message)]
    assert len(messages) == 1
    assert "their gate does not open" in messages[0]
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
        for _ in range(3 * gate_module.IDLE_BEFORE_WARNING):
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
        for _ in range(2 * gate_module.IDLE_BEFORE_WARNING):
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


def test_the_scaling_of_an_eager_forward_is_a_number_with_the_bits_of_the_ramp():
    """Asked for in every forward: it costs no tensor operation, and must not cost a bit."""
    for steps, scaling in ((7, 2.0), (100, 1 / 3), (997, 1e-3 / 7)):
        for t in [*range(steps + 3), 0.1, 2.7182817]:  # an average of copies has fractions
            found = gated(scaling, new_counter(t), steps)
            assert isinstance(found, float)
            assert found == float(scaling * ramp(new_counter(t), steps))
