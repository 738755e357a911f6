"""A step that is recorded once and replayed, as a CUDA graph is, trains as eager mode does: nothing of it lives on the host."""

from __future__ import annotations

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import duallora


class Recorder(TorchDispatchMode):
    """The operators of what runs under it, to be run again on the very same memory: a graph for a CPU."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for op, args, kwargs, before in self.calls:
            after = op(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                if isinstance(old, torch.Tensor) and new.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def prepared(llama, **options):
    """A model whose counters act as on a GPU, where nobody looks at their numbers: by a scaling that is a tensor."""
    torch.manual_seed(0)
    options = {"r1": 2, "r2": 3, "target_modules": "all-linear", "backend": "recompute", "init_std": 0.2} | options
    model = peft.get_peft_model(llama(), duallora.DualLoraConfig(**options)).train()
    for module in model.modules():
        if hasattr(module, "duallora_step"):
            module.scaling["default"] = torch.tensor(module.scaling["default"])
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, trained, torch.optim.SGD(trained, lr=0.5, momentum=0.9)


def step(model, optimizer, ids):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    "options", [{"gradient_tokens": 0.3, "warmup_steps": 7}, {"use_dora": True, "warmup_steps": 3}]
)
def test_a_recorded_step_replayed_is_the_eager_step_with_its_gate_moving_and_its_tokens_drawn_anew(llama, ids, options):
    eager, recorded = prepared(llama, **options), prepared(llama, **options)
    for model, _, optimizer in (eager, recorded):
        torch.manual_seed(1)
        step(model, optimizer, ids)  # makes the momentum
    recorder = Recorder()
    torch.manual_seed(2)
    with recorder:
        step(recorded[0], recorded[2], ids)
    for seed in (3, 4, 5):
        torch.manual_seed(seed)
        recorder.replay()
    for seed in (2, 3, 4, 5):
        torch.manual_seed(seed)
        step(eager[0], eager[2], ids)
    assert duallora.gate(recorded[0]) == duallora.gate(eager[0]) == pytest.approx(min(1, 5 / options["warmup_steps"]))
    for a, b in zip(recorded[1], eager[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
