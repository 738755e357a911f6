"""Several processes, one run: how they are started, and how they agree.

Every process holds the whole model and takes its share of each batch; gradients are averaged (DDP). ``torchrun``,
``accelerate launch`` and :func:`launch` start them alike, with RANK, WORLD_SIZE and a meeting place in the
environment. Process 0 alone writes and speaks. One that fails leaves at once, and whoever started them ends the rest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from duallora.errors import ConfigError, DualLoraError, LostProcessError
from duallora.train.progress import command

T = TypeVar("T")

OUTCOME = "DUALLORA_OUTCOME"  # the file in which process 0 leaves its exit code, for launchers that return their own
STARTER = "DUALLORA_STARTER"  # process id of whoever waits for this process; if it dies, this one stops
GRACE = 15.0  # seconds in which the others may end by themselves once one has failed, and again after SIGTERM
FIRST_WORD = 3.0  # seconds which process 0 has to report a failure that all share, before another one speaks
TIMEOUT = timedelta(minutes=60)  # the longest that processes wait for each other, as while one evaluates
# What accelerate's launcher puts into the environment for the strategies that shard the model.
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
MAX_PROCESSES = 1024


def is_main() -> bool:
    """Whether this process writes and speaks; asked of the environment, so torch need not be loaded."""
    return int(os.environ.get("RANK", "0")) == 0


class Processes:
    """The processes of a run: ``index`` of this one and ``count``. Alone (count 1) everything here does nothing.

    The methods are collective: every process calls them, in the same order.
    """

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count

    @property
    def main(self) -> bool:
        return self.index == 0

    def barrier(self) -> None:
        """Waits until all processes have come here."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier()

    def gather(self, value: T) -> list[T]:
        """``value`` of every process, in their order; anything that pickles."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def numbers(self, values: Sequence[float]) -> list[list[float]]:
        """`gather` for a few numbers, cheap enough for every step."""
        if self.count == 1:
            return [list(values)]
        import torch
        import torch.distributed as dist

        mine = torch.tensor(values, dtype=torch.float64, device=_device())
        gathered = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(gathered, mine)
        return torch.stack(gathered).tolist()

    def mean(self, tensor: Any) -> Any:
        """The mean of a tensor over the processes."""
        if self.count == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.count

    def from_main(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in process 0, which alone runs it; what it raises there, every process raises."""
        if self.count == 1:
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


@contextlib.contextmanager
def together() -> Iterator[Processes]:
    """The processes that the environment tells of, met; a failure of one that is not the first is said in its name.

    Raises:
        ConfigError: the launcher asks for a strategy that shards the model, or for mixed precision.
        LostProcessError: another process of the run is gone.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if STARTER in os.environ and os.name == "posix":
        threading.Thread(target=_stop_with, args=(int(os.environ[STARTER]),), daemon=True).start()
    if count == 1:
        yield Processes()
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {count}, but {', '.join(missing)} is not set: start with `{command('train', '--launch', str(count))}`, "
            "torchrun or accelerate launch"
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
        assert state.num_processes == count
        yield Processes(state.process_index, state.num_processes)
    except DualLoraError:
        _let_main_speak()
        raise
    except KeyboardInterrupt:
        raise
    except Exception as error:
        if _is_lost(error):
            raise LostProcessError(
                "another process of this run has ended, so it cannot go on; what it said stands above, or it was killed "
                "(out of memory, perhaps). Continue with --resume auto"
            ) from error
        _let_main_speak()
        raise
    else:
        if not met and dist.is_initialized():
            dist.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)


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


def leave_in_place(model: Any) -> None:
    """Tells DDP which frozen weights each process has read for itself: it cannot send torchao's tensors around."""
    from torch.nn.parallel import DistributedDataParallel

    names = [name for name, parameter in model.named_parameters() if hasattr(parameter, "__tensor_flatten__")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


# -- starting ---------------------------------------------------------------------------------------------------------


def launch(how: str, arguments: Sequence[str]) -> int:
    """Runs ``duallora ARGUMENTS`` in several processes, waits for them, and returns the exit code of process 0.

    Args:
        how: a number of processes on this machine, or the path of an accelerate configuration (any machines).
        arguments: of the command line, without the option that named ``how``.

    Raises:
        ConfigError: ``how`` is neither.
        LostProcessError: a process was killed, and process 0 could not say so itself.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"--launch {how} inside of {os.environ['WORLD_SIZE']} processes that a launcher has started: drop one"
        )
    with tempfile.TemporaryDirectory(prefix="duallora-") as folder:
        left = Path(folder) / "exit-code"
        environment = {**os.environ, OUTCOME: str(left), STARTER: str(os.getpid())}
        if how.isdecimal():
            count = int(how)
            if not 1 <= count <= MAX_PROCESSES:
                raise ConfigError(
                    f"--launch {how}: expected 1 to {MAX_PROCESSES} processes, or an accelerate config file"
                )
            codes = _wait(_start_here(count, arguments, environment))
        else:
            if not Path(how).is_file():
                raise ConfigError(
                    f"--launch {how}: expected a number of processes or an accelerate config file (accelerate config "
                    "--config_file FILE writes one)"
                )
            starter = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", how, "-m", "duallora.cli"]
            codes = _wait([_start([*starter, *arguments], environment)])
        if left.is_file():
            return int(left.read_text())
        bad = {index: code for index, code in enumerate(codes) if code}
        if not bad:
            return 0
        index, code = next(iter(bad.items()))
        how_it_ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise LostProcessError(f"process {index} of {len(codes)} {how_it_ended}; continue the run with --resume auto")


def leave_outcome(code: int) -> None:
    """Tells :func:`launch` the exit code of this process, if it is the first of a launched run."""
    if is_main() and OUTCOME in os.environ:
        with contextlib.suppress(OSError):  # on another machine than the launcher
            Path(os.environ[OUTCOME]).write_text(str(code))


def outcome() -> int | None:
    """The exit code that process 0 of a launched run has left; None if there is none yet."""
    try:
        return int(Path(os.environ[OUTCOME]).read_text())
    except (KeyError, OSError, ValueError):
        return None


def _start_here(count: int, arguments: Sequence[str], environment: Mapping[str, str]) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    # Each process would take all cores for itself.
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment = {"OMP_NUM_THREADS": threads, **environment, **meeting, "LOCAL_WORLD_SIZE": str(count)}
    return [
        _start(
            [sys.executable, "-m", "duallora.cli", *arguments],
            {**environment, "RANK": str(index), "LOCAL_RANK": str(index)},
            stdout=None if index == 0 else subprocess.DEVNULL,
        )
        for index in range(count)
    ]


def _start(command: list[str], environment: Mapping[str, str], **options: Any) -> subprocess.Popen:
    # In a session of its own: Ctrl-C reaches the launcher alone, which passes it on once.
    return subprocess.Popen(
        command, env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=os.name == "posix", **options
    )


def _wait(processes: list[subprocess.Popen]) -> list[int]:
    """Exit codes. Signals are passed on; once a process has failed, the others have `GRACE` to end."""

    def pass_on(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        deadline, remedies = None, [signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)]
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                deadline = deadline or time.monotonic() + GRACE
                if time.monotonic() > deadline and remedies:
                    pass_on(remedies.pop(0), None)
                    deadline = time.monotonic() + GRACE
            time.sleep(0.05)
        return [process.returncode for process in processes]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


# -- ending -----------------------------------------------------------------------------------------------------------


def _let_main_speak() -> None:
    """Waits, in all but process 0, until that one has told of a failure that all share.

    A launcher has then ended the others, or they find its exit code to be theirs; else they say it themselves.
    """
    if not is_main():
        time.sleep(FIRST_WORD)


def _is_lost(error: Exception) -> bool:
    """Whether a collective operation failed because a peer is gone (gloo's and NCCL's words for it)."""
    words = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "timeout", "Timed out")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _stop_with(starter: int) -> None:
    """Stops this process as SIGTERM does when ``starter`` is gone: nobody would wait for it."""
    child = os.getppid() == starter
    while True:
        try:
            os.kill(starter, 0)  # a zombie that nobody has waited for still answers
            if child and os.getppid() != starter:
                raise ProcessLookupError
        except ProcessLookupError:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        except OSError:  # another user's, or another machine's: not ours to watch
            return
        time.sleep(1.0)


def _device() -> Any:
    import torch
    import torch.distributed as dist

    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
