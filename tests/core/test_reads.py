from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from duallora.core.reads import ReadsThrough, only_read


class Helped(nn.Module):
    """``read`` by way of two helpers, ``called`` too, ``listed``, ``asked`` for its dtype, ``both`` in two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.listed, self.asked, self.both, self.reset = (nn.Linear(3, 3) for _ in range(6))

    def _init_weights(self) -> None:
        nn.init.zeros_(self.read.weight)

    def unreached(self) -> Tensor:
        return self.reset.weight

    def _weight(self) -> Tensor:
        return self.read.weight.t()

    def _project(self, x: Tensor) -> Tensor:
        return x @ self._weight() + self.read.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self._project(x).to(self.asked.weight.dtype)
        for layer in [self.listed]:
            x = layer(x) @ self.listed.weight
        return self.called(F.linear(x, self.both.weight) if self.training else self.both(x))


class Inherits(Helped):
    def extra(self) -> None:
        pass


class Calls(Helped):
    """Calls what its parent class reads."""

    def forward(self, x: Tensor) -> Tensor:
        return self.read(super().forward(x))


@pytest.mark.parametrize(
    ("module", "children"),
    [
        (Helped(), {"read"}),
        (Inherits(), {"read"}),
        (Calls(), set()),
        (nn.MultiheadAttention(4, 2), {"out_proj"}),
        (nn.Sequential(nn.Linear(2, 2)), set()),
        (nn.Linear(2, 2), set()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_child_whose_weight_is_taken_and_that_is_never_called_is_found_in_the_source(module, children):
    assert only_read(module) == children


def test_a_class_without_a_source_reads_nothing():
    namespace: dict = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x @ self.layer.weight", namespace)
    assert only_read(namespace["Made"]()) == set()


class Wrapper(ReadsThrough, nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base


def test_sizes_are_read_through_any_number_of_wrappers_and_nothing_private_or_unknown():
    layer = Wrapper(Wrapper(nn.Conv1d(2, 4, 3, stride=2)))
    layer.base_layer.base_layer._hf_hook = "offloading"
    assert layer.stride == (2,)
    assert layer.kernel_size == (3,)
    assert not hasattr(layer, "_hf_hook")
    assert not hasattr(layer, "num_embeddings")
    assert not hasattr(Wrapper.__new__(Wrapper), "stride")  # while it is unpickled
