"""In every loop that LoRA is trained with, Dual LoRA trains and its gate counts the applied steps (tests/loops.py)."""

from __future__ import annotations

import os

import loops
import pytest
import torch
from torch import nn

SLOW = "DUALLORA_SLOW" in os.environ
OF_NN = ("precision", "averages", "copies and checkpoints")  # what a plain layer does by code of its own
CASES = [
    pytest.param(name, method, id=f"{name}-{method}")
    for name, loop in loops.LOOPS.items()
    for method in loop.methods
    if SLOW or (not loop.slow and (method == "peft" or (method == "nn" and loop.family in OF_NN)))
]


@pytest.fixture(autouse=True)
def as_it_was():
    """Loops leave no default of torch's changed."""
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "method"), CASES)
def test_it_trains_and_the_gate_counts_the_applied_steps(name, method):
    """The loop itself knows how many steps it applied. LoRA, the judge of what ought to train, is in ``make loops``."""
    assert loops.wrong(name, method, loops.attempt(name, method)) == ""


class Watched(nn.Parameter):
    """A parameter that knows who looked at its gradient."""

    reads = 0

    @property
    def grad(self):
        Watched.reads += 1
        return torch.Tensor.grad.__get__(self)

    @grad.setter
    def grad(self, value):
        torch.Tensor.grad.__set__(self, value)


@pytest.mark.parametrize("method", ["peft", "nn"])
def test_a_strangers_step_looks_at_no_gradient_of_ours(method):
    """What made threads crash: the other thread may be giving that gradient's memory back."""
    task = loops.Task(method)
    for module in task.model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.requires_grad:
                module._parameters[name] = Watched(p.detach())
    task.train(task.optimizer(), 2)
    task.loss().backward()
    line = nn.Linear(1, 1)
    stranger = torch.optim.SGD(line.parameters(), lr=0.1)
    line(torch.ones(1, 1)).sum().backward()
    Watched.reads = 0
    stranger.step()
    assert Watched.reads == 0
    assert len(task.trained()) > 0
    assert all(type(p) is Watched for p in task.trained())
