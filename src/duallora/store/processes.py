"""The processes of a run: which one this is, of how many, and how they agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from duallora.errors import DualLoraError

T = TypeVar("T")

MAX_PROCESSES = 1024


class Processes:
    """The ``rank`` of this process among the ``world_size`` of a run. Alone (1) everything here does nothing.

    The methods are collective: every process calls them, in the same order.
    """

    def __init__(self, rank: int = 0, world_size: int = 1):
        self.rank, self.world_size = rank, world_size

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until all processes have come here."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier()

    def all_gather_object(self, value: T) -> list[T]:
        """``value`` of every process, by rank; anything that pickles."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def all_gather(self, values: Sequence[float]) -> list[list[float]]:
        """`all_gather_object` for a few numbers, cheap enough for every step."""
        if self.world_size == 1:
            return [list(values)]
        import torch
        import torch.distributed as dist

        nccl = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        mine = torch.tensor(values, dtype=torch.float64, device=device)
        gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(gathered, mine)
        return torch.stack(gathered).tolist()

    def from_main(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in process 0, which alone runs it; what it raises there, every process raises."""
        if self.world_size == 1:
            return work()
        import torch.distributed as dist

        told: list[Any] = [None, None]
        if self.main:
            try:
                told[0] = work()
            except DualLoraError as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1]
        return told[0]


ALONE = Processes()
