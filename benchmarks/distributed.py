"""Two processes against one: how far the adapters are apart after 20 steps, per strategy; results/distributed.json.

A small Llama on CPUs (gloo), the same four rows a step in every case. Each strategy runs in a pair of forked processes,
its adapter is gathered and saved by process 0, and compared tensor by tensor with the one a single process trained.

    python benchmarks/distributed.py -o results/distributed.json [STRATEGY ...]
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import duallora
from duallora import DualLoraConfig
from duallora.store import record
from duallora.tuner.layer import DualLoraLayer

STEPS, ROWS, LENGTH, VOCABULARY, RATE, WARMUP = 20, 4, 12, 100, 2e-3, 6
LIMIT = 200  # seconds for a pair
FORMS: list[str] = []  # how the first layer computed its output, forward by forward


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=63, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapted(**options: Any) -> PeftModel:
    """The model and adapter that every process starts with."""
    settings: dict[str, Any] = {"r1": 3, "r2": 5, "alpha": 10, "target_modules": "all-linear", "warmup_steps": WARMUP}
    settings |= {"init_std": 0.02, "direction_init_std": 0.02}  # smaller signs flip on a sum's last bit
    model = get_peft_model(base(), DualLoraConfig(**{**settings, "init_seed": 0, **options}))
    first = next(module for module in model.modules() if isinstance(module, DualLoraLayer))
    first.register_forward_pre_hook(lambda layer, _: FORMS.append(layer._form(["default"])))
    return model


def rows(step: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)


def train(model: torch.nn.Module, share: slice, accumulation: int = 1) -> None:
    optim = optimizer(model)
    for step in range(STEPS):
        for part in rows(step)[share].chunk(accumulation):
            (model(input_ids=part, labels=part).loss / accumulation).backward()
        optim.step()
        optim.zero_grad()


Outcome = tuple[PeftModel, dict[str, torch.Tensor] | None]


def alone(rank: int, share: slice, **options: Any) -> Outcome:
    model = adapted(**options)
    train(model, share)
    return model, None


def ddp(rank: int, share: slice, accumulation: int = 1, **options: Any) -> Outcome:
    model = adapted(**options)
    train(torch.nn.parallel.DistributedDataParallel(model), share, accumulation)
    return model, None


def fsdp2(rank: int, share: slice, dtype: torch.dtype | None = None, offload: bool = False, **options: Any) -> Outcome:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    model = adapted(**options)
    settings: dict[str, Any] = {"mesh": init_device_mesh("cpu", (2,))}
    if dtype is not None:
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    train(model, share)
    return model, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def fsdp1(rank: int, share: slice, **options: Any) -> Outcome:
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    model = adapted(**options)
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    train(sharded, share)
    whole = FullStateDictConfig(rank0_only=False)
    with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.FULL_STATE_DICT, whole):
        return model, sharded.state_dict()


def zero(rank: int, share: slice, stage: int, offload: bool = False, **options: Any) -> Outcome:
    import deepspeed

    model = adapted(**options)
    sharding: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    if stage == 3:
        sharding["stage3_param_persistence_threshold"] = 0  # or parameters this small would not be sharded
    if offload:
        sharding["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            sharding["offload_param"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, optimizer=torch.optim.AdamW(trained, lr=RATE), config=config,
        dist_init_required=False,
    )  # fmt: skip
    for step in range(STEPS):
        part = rows(step)[share]
        engine.backward(engine(input_ids=part, labels=part).loss)
        engine.step()
        duallora.advance_gate(model)  # DeepSpeed's optimizer steps copies of the factors
    if stage < 3:
        return model, None
    with deepspeed.zero.GatheredParameters(trained):
        return model, {name: t.detach().clone() for name, t in model.state_dict().items() if "duallora_" in name}


STRATEGIES: dict[str, Callable[..., Outcome]] = {
    "ddp": ddp,
    "ddp, accumulation 2": functools.partial(ddp, accumulation=2),
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "fsdp2, bf16": functools.partial(fsdp2, dtype=torch.bfloat16),
    "zero1": functools.partial(zero, stage=1),
    "zero2": functools.partial(zero, stage=2),
    "zero3": functools.partial(zero, stage=3),
    "zero2, offload": functools.partial(zero, stage=2, offload=True),
    "zero3, offload": functools.partial(zero, stage=3, offload=True),
}


def _one_of_a_pair(rank: int, port: int, names: list[str], folder: Path, options: dict[str, Any]) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(meeting, RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        torch.distributed.init_process_group("gloo")
        half = ROWS // 2
        for name in names:
            model, whole = STRATEGIES[name](rank, slice(rank * half, (rank + 1) * half), **options)
            if rank == 0:
                model.save_pretrained(str(folder / name), state_dict=whole)
            (folder / f"{name}.{rank}.gate").write_text(repr(duallora.gate(model)))
            (folder / f"{name}.{rank}.form").write_text(FORMS[-1])
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def pair(names: list[str], folder: Path, **options: Any) -> None:
    """Trains by each strategy in the same two processes; saves FOLDER/STRATEGY/adapter_model.safetensors.

    Raises:
        RuntimeError: a process failed or did not end in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_one_of_a_pair, args=(rank, port, names, folder, options)) for rank in (0, 1)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + LIMIT
    while (
        any(p.is_alive() for p in processes) and time.monotonic() < deadline and not any(p.exitcode for p in processes)
    ):
        time.sleep(0.05)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"{', '.join(names)}: the processes ended with {codes}")


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def difference(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    """|a - b| / |a| over all trained tensors together; raises ValueError where the keys differ."""
    if expected.keys() != found.keys():
        raise ValueError(f"other keys: {sorted(expected.keys() ^ found.keys())[:4]}")
    trained = [name for name, tensor in expected.items() if tensor.is_floating_point()]
    a, b = (torch.cat([tensors[name].double().flatten() for name in trained]) for tensors in (expected, found))
    return float((a - b).norm() / a.norm())


def expected(**options: Any) -> dict[str, torch.Tensor]:
    """The adapter of one process."""
    return get_peft_model_state_dict(alone(0, slice(None), **options)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strategies", nargs="*", default=list(STRATEGIES), metavar="STRATEGY")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/distributed.json"))
    arguments = parser.parse_args()
    started = time.time()
    figures: dict[str, Any] = {}
    one = expected()
    start = get_peft_model_state_dict(adapted())
    moved = difference(start, one)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.strategies:
            began = time.monotonic()
            pair([name], Path(folder))
            gates = [float((Path(folder) / f"{name}.{rank}.gate").read_text()) for rank in (0, 1)]
            found = difference(one, adapter(Path(folder) / name))
            form = (Path(folder) / f"{name}.0.form").read_text()
            seconds = round(time.monotonic() - began, 1)
            figures[name] = {"difference": found, "gates": gates, "form": form, "seconds": seconds}
            print(f"{name:<22} {found:.2e}  gates {gates}", flush=True)
    scene = {
        "steps": STEPS,
        "rows": ROWS,
        "learning_rate": RATE,
        "warmup_steps": WARMUP,
        "processes": 2,
        "dtype": "float32",
    }
    more = {"training_moved": moved}
    record.write_json(
        arguments.output, record.result("distributed", scene, {**figures, **more}, seeds=[0], started=started)
    )


if __name__ == "__main__":
    main()
