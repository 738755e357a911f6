"""vLLM's plug-in: a Dual LoRA adapter that a request names becomes a plain LoRA, in the cache of `duallora serve`.

vLLM calls `register` in each of its processes (entry point ``vllm.general_plugins``); ``VLLM_LORA_RESOLVER_CACHE_DIR``,
its own setting, is the folder whose adapters may be named. vLLM's own resolver takes the plain LoRAs there.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

FOLDER = "VLLM_LORA_RESOLVER_CACHE_DIR"
RANK = "DUALLORA_VLLM_RANK"  # at most the server's --max-lora-rank, which a resolver is not told


def register() -> None:
    """Adds the resolver to this vLLM process; nothing where `FOLDER` is not set.

    Raises ValueError where `RANK` is no whole number from 1.
    """
    if not os.environ.get(FOLDER):
        return
    folder = Path(os.environ[FOLDER])
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    told = os.environ.get(RANK) or "16"  # vLLM's own --max-lora-rank where none is given
    if not told.isdecimal() or int(told) < 1:
        raise ValueError(f"{RANK}={told!r}: expected a whole number from 1, at most the server's --max-lora-rank")

    class DualLoraResolver(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            path = await asyncio.to_thread(resolve, folder, lora_name, base_model_name, int(told))
            return LoRARequest(lora_name, 1, str(path)) if path else None  # vLLM gives it an id of its own

    LoRAResolverRegistry.register_resolver("Dual LoRA", DualLoraResolver())


def resolve(folder: Path, name: str, served: str, rank: int) -> Path | None:
    """The plain LoRA of the Dual LoRA run or adapter ``folder / name``, of ``rank`` at most; None where that is none.

    ``served`` is the server's model: a folder or hub id.

    Raises ValueError, which vLLM answers with (400), where the adapter is damaged, of another base, or one that `check`
    refuses.
    """
    place = (folder / name).resolve()
    if folder.resolve() not in place.parents or not place.is_dir():
        return None
    from rich.console import Console

    from duallora.errors import DualLoraError
    from duallora.export import served as cache

    try:
        return cache.named_lora(place, served, rank, Console(stderr=True))
    except DualLoraError as error:
        raise ValueError(f"{name}: {error}") from error
