"""The verbs of ``duallora bench``."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from duallora import console
from duallora.cli.app import app, refuse_unwritable, verb

BENCH = Path("results/bench")


class BenchDtype(str, Enum):  # typer takes no list of literals
    float32 = "float32"
    bfloat16 = "bfloat16"


Dtypes = Annotated[
    list[BenchDtype] | None, Option("--dtype", help="Type of the base weights; may be repeated. Both if not given.")
]
Rounds = Annotated[int, Option("--rounds", min=3, metavar="N", help="Rounds per cell at most; 3 at least.")]
Seconds = Annotated[
    float, Option("--seconds", min=0, metavar="S", help="Time per cell after which no further round is begun.")
]
Device = Annotated[
    str | None, Option("--device", metavar="cpu|cuda", help="Where to measure; cuda where there is one.")
]
ResultFile = Annotated[
    Path | None,
    Option("--output", "-o", metavar="FILE", help="Result, written cell by cell; cells it holds are skipped."),
]

Model = Annotated[
    str, Option("--model", metavar="MODEL", help="Causal language model: hub id, folder or builtin: name.")
]
Rank = Annotated[int, Option("--rank", min=1, metavar="N", help="Dual LoRA's r (LoRA has 2 r).")]
Widths = Annotated[
    list[int] | None, Option("--width", min=8, metavar="N", help="in = out of the layer; may be repeated.")
]
Ranks = Annotated[
    list[int] | None, Option("--rank", min=1, metavar="N", help="Dual LoRA's r (LoRA has 2 r); may be repeated.")
]

bench_app = typer.Typer(
    no_args_is_help=True,
    help="Time and memory beside the arithmetic floor and PEFT's methods, as ratios within one run. Needs a quiet machine.",
)
app.add_typer(bench_app, name="bench")


def _target(output: Path | None, name: str) -> Path:
    output = output or BENCH / f"{name}.json"
    refuse_unwritable(output)
    return output


@verb(bench_app, "layer")
def bench_layer(
    width: Widths = None,
    tokens: Annotated[
        list[int] | None, Option("--tokens", min=1, metavar="N", help="Rows of x; may be repeated.")
    ] = None,
    rank: Ranks = None,
    dtype: Dtypes = None,
    full: Annotated[
        bool, Option("--full", help="The whole grid: width to 4096, 512 to 8192 tokens, r 8 to 32; hours.")
    ] = False,
    rounds: Rounds = 15,
    seconds: Seconds = 25.0,
    device: Device = None,
    output: ResultFile = None,
) -> dict[str, Any]:
    """One layer, forward and backward, beside its three matrix products alone and PEFT's methods; about ten minutes.

    [dim]Example:[/]  duallora bench layer --width 1024 --width 2048 --tokens 2048 --dtype float32
    """
    output = _target(output, "layer")
    from duallora.bench import layer

    sizes = layer.FULL if full else layer.DEFAULT
    return layer.bench(
        output,
        widths=width or sizes["widths"],
        tokens=tokens or sizes["tokens"],
        ranks=rank or sizes["ranks"],
        dtypes=[name.value for name in dtype or BenchDtype],
        rounds=rounds,
        seconds=seconds,
        device=device,
        console=console.results,
    )


@verb(bench_app, "step")
def bench_step(
    model: Model = "builtin:smollm2-135m",
    dtype: Dtypes = None,
    checkpointing: Annotated[bool, Option("--checkpointing", help="With activation checkpointing.")] = False,
    masked: Annotated[
        bool, Option("--masked", help="Docstrings, loss on answers, padded; else random tokens, loss on all.")
    ] = False,
    full: Annotated[bool, Option("--full", help="Both dtypes, with and without each of these; two hours.")] = False,
    rank: Rank = 8,
    rows: Annotated[int, Option("--rows", min=1, metavar="N", help="Examples in the batch.")] = 8,
    length: Annotated[int, Option("--length", min=8, metavar="N", help="Tokens per example.")] = 128,
    memory: Annotated[
        bool, Option("--memory/--no-memory", help="Peak memory too, each method in a process of its own.")
    ] = True,
    rounds: Rounds = 15,
    seconds: Seconds = 240.0,
    device: Device = None,
    output: ResultFile = None,
) -> dict[str, Any]:
    """A training step of SmolLM2, all linear layers adapted, against PEFT's methods: time and peak memory.

    Without --dtype, --checkpointing and --masked: fp32 and bf16 without either, fp32 with each; about 45 minutes.

    [dim]Example:[/]  duallora bench step --dtype float32 --masked
    """
    output = _target(output, "step")
    from duallora.bench import step

    scenes = step.scenes(
        [name.value for name in dtype or ()],
        checkpointing=checkpointing,
        masked=masked,
        full=full,
        model=model,
        rank=rank,
        rows=rows,
        length=length,
    )
    return step.bench(
        output, scenes, rounds=rounds, seconds=seconds, with_memory=memory, device=device, console=console.results
    )


@verb(bench_app, "kernel")
def bench_kernel(
    width: Widths = None,
    rank: Ranks = None,
    dtype: Dtypes = None,
    rounds: Rounds = 15,
    seconds: Seconds = 10.0,
    device: Device = None,
    output: ResultFile = None,
) -> dict[str, Any]:
    """Check each backend of this device against float64, then time its two passes; exit code 4 where one is wrong.

    A few minutes. On a GPU machine this is what proves and times the Triton kernels.

    [dim]Example:[/]  duallora bench kernel --device cuda -o results/bench/kernel-h100.json
    """
    output = _target(output, "kernel")
    from duallora.bench import kernel

    return kernel.bench(
        output,
        widths=width or kernel.WIDTHS,
        ranks=rank or kernel.RANKS,
        dtypes=[name.value for name in dtype or BenchDtype],
        rounds=rounds,
        seconds=seconds,
        device=device,
        console=console.results,
    )


@verb(bench_app, "host")
def bench_host(
    rounds: Rounds = 15, seconds: Seconds = 25.0, device: Device = None, output: ResultFile = None
) -> dict[str, Any]:
    """What a layer asks of the host, with next to nothing to compute, beside LoRA, DoRA and the bare layer; a minute.

    [dim]Example:[/]  duallora bench host --rounds 30
    """
    output = _target(output, "host")
    from duallora.bench import host

    return host.bench(output, rounds=rounds, seconds=seconds, device=device, console=console.results)
