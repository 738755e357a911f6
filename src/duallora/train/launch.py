"""Several processes, one run: how they are started, and how they agree.

Every process holds the whole model and takes its share of each batch; gradients are averaged (DDP). ``torchrun`` and
``accelerate launch``, which :func:`launch` calls, start them alike. Process 0 alone writes and speaks. One that fails
leaves at once, and the launcher ends the rest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from duallora.errors import ConfigError, Interrupted, LostProcessError
from duallora.store.processes import ALONE, MAX_PROCESSES, Processes
from duallora.terminal import command

S = TypeVar("S", bound="Stopping")

PARENT = "DUALLORA_PARENT"  # process id of the grid that started this run; if it dies, the run stops
TIMEOUT = timedelta(minutes=60)  # the longest that processes wait for each other, as while one evaluates
STOP_WITHIN = 600  # seconds for a launched run to finish its step and save; torch's default of 30 loses long steps
# What accelerate's launcher puts into the environment for the strategies that shard the model.
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}


@contextlib.contextmanager
def process_group() -> Iterator[Processes]:
    """The processes that the environment tells of, joined in torch.distributed's default group.

    Raises:
        ConfigError: the launcher asks for a strategy that shards the model, or for mixed precision.
        LostProcessError: another process of the run is gone.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield ALONE
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set: start with "
            f"`{command('train', '--launch', str(world_size))}`, torchrun or accelerate launch"
        )
    refuse_sharding(os.environ)
    import torch
    import torch.distributed as dist
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # without it accelerate takes processes on CPUs for strangers
    met = dist.is_initialized()
    if not met:
        AcceleratorState._reset_state(reset_partial_state=True)  # it may have been asked before there were others
    try:
        state = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU") == "true", timeout=TIMEOUT)
        assert state.num_processes == world_size
        yield Processes(state.process_index, state.num_processes)
    except RuntimeError as error:
        if (gone := lost(error)) is None:
            raise
        raise gone from error
    else:
        if not met and dist.is_initialized():
            dist.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)


def lost(error: BaseException) -> LostProcessError | None:
    """What to say where a collective operation failed because a peer is gone (gloo's and NCCL's words for it), else None."""
    words = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "timeout", "Timed out")
    if not isinstance(error, RuntimeError) or not any(word in str(error) for word in words):
        return None
    return LostProcessError(
        "another process of this run has ended, so it cannot go on; what it said stands above, or it was killed "
        "(out of memory, perhaps). Continue with --resume auto"
    )


def refuse_sharding(environment: Mapping[str, str]) -> None:
    """ConfigError where accelerate was configured for more than data parallelism."""
    for variable, name in SHARDING.items():
        if environment.get(variable, "false").lower() in ("true", "1"):
            raise ConfigError(
                f"the launcher asks for {name}, but a run keeps the whole model in every process (DDP). Use an accelerate "
                "configuration without it, or put DualLoraConfig into a Trainer script: examples/distributed/trainer.py"
            )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise ConfigError(
            f"the launcher asks for mixed_precision={precision}, which the recipe decides: set mixed_precision to no "
            "there, and model.dtype in the recipe"
        )


def shares(batch_size: int, accumulation: int, processes: int) -> tuple[int, int]:
    """(batch size, accumulation) of each of ``processes`` so that a step takes ``batch_size * accumulation`` rows in all.

    Raises:
        ConfigError: the rows of a step cannot be shared out evenly.
    """
    rows = batch_size * accumulation
    if rows % processes:
        raise ConfigError(
            f"train.batch_size={batch_size} times train.gradient_accumulation_steps={accumulation} makes {rows} rows a step, "
            f"which {processes} processes cannot share evenly: make it a multiple of {processes}"
        )
    own = rows // processes
    batch = next(size for size in range(min(batch_size, own), 0, -1) if own % size == 0)
    return batch, own // batch


def ignore_quantized(model: Any) -> None:
    """Tells DDP which frozen weights each process has read for itself: it cannot send torchao's tensors around."""
    from torch.nn.parallel import DistributedDataParallel

    names = [name for name, parameter in model.named_parameters() if hasattr(parameter, "__tensor_flatten__")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


# -- starting and ending ----------------------------------------------------------------------------------------------


def launch(how: str, arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by `accelerate launch` of ``duallora ARGUMENTS``.

    Args:
        how: a number of processes on this machine, or the path of an accelerate configuration (any machines).
        arguments: of the command line, without the option that named ``how``.

    Raises:
        ConfigError: ``how`` is neither, or this is one of several processes already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"--launch {how} inside of {os.environ['WORLD_SIZE']} processes that a launcher has started: drop one"
        )
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOP_WITHIN), **os.environ}
    if how.isdecimal() and 1 <= int(how) <= MAX_PROCESSES:
        options = ["--num_processes", how, "--num_machines", "1", "--main_process_port", "0"]
        options += ["--mixed_precision", "no", "--dynamo_backend", "no", *["--multi_gpu"] * (int(how) > 1)]
        # torchrun gives each process one thread where nothing else is said.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(how))))
    elif Path(how).is_file():
        options = ["--config_file", how]
    else:
        raise ConfigError(
            f"--launch {how}: expected 1 to {MAX_PROCESSES} processes, or an accelerate config file (accelerate config "
            "--config_file FILE writes one)"
        )
    starter = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "duallora.cli"]
    os.execve(sys.executable, [*starter, *arguments], environment)


def end_with_parent() -> None:
    """Stops this process as SIGTERM does once the grid that started it is gone: it would hold its folder and device.

    It then finishes its step and saves a checkpoint.
    """
    parent = int(os.environ.pop(PARENT, "0"))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent:
        threading.Thread(target=watch, daemon=True).start()


class Stopping:
    """Takes SIGINT and SIGTERM: ``number`` is the first that came while ``noted``; any other raises `Interrupted`."""

    def __init__(self, noted: bool = False) -> None:
        self.noted = noted
        self.number: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self: S) -> S:
        if threading.current_thread() is threading.main_thread():  # the only thread that may set handlers
            self.before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: object) -> None:
        if not self.noted or self.number is not None:
            raise Interrupted(number, f"stopped by {signal.Signals(number).name}")
        self.number = number
