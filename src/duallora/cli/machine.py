"""Verbs about machines: doctor looks at this one, plan at those a training would need."""

from enum import Enum
from typing import Annotated, Any, Literal

from rich.markup import escape
from typer import Option

from duallora import console
from duallora.cli.app import verb


class PlanMethod(str, Enum):
    lora = "lora"
    dora = "dora"
    duallora = "duallora"


@verb()
def doctor() -> dict[str, Any]:
    """Check this machine: versions, method, devices, memory, disk, built-in models, data; with the fix for each gap.

    [dim]Example:[/]  duallora doctor
    """
    from rich.table import Column, Table

    from duallora.train import doctor as examination

    checks = examination.checks()
    table = Table.grid("", "", Column(overflow="fold"), padding=(0, 2))
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
    for check in checks:
        table.add_row(marks[check.status], check.name, escape(check.found))
        if check.fix:
            table.add_row("", "", f"[bold]{escape(check.fix)}[/]")
    console.results.print(table)
    usable = examination.usable(checks)
    lacking = {check.name for check in checks if check.status == "missing"}
    only = (
        "the method (import duallora) is ready, the command line is " if lacking == {examination.COMMAND_LINE} else ""
    )
    console.results.print("ready" if usable else f"[red]{only}not usable yet: see the lines marked missing[/]")
    return {"usable": usable, "checks": [check._asdict() for check in checks], "exit_code": 0 if usable else 2}


@verb()
def plan(
    model: Annotated[
        str, Option("--model", metavar="MODEL", help="llama-3-70b and its like, a hub id, folder or builtin: name.")
    ],
    gpus: Annotated[
        str, Option("--gpus", metavar="NxGB", help="8x80: eight GPUs of 80 GB; 2x8x80: two nodes of them.")
    ] = "1x80",
    method: Annotated[
        list[PlanMethod] | None, Option("--method", help="May be repeated; all three if not given.")
    ] = None,
    rank: Annotated[
        int, Option("--r", min=1, metavar="N", help="Dual LoRA's r; LoRA and DoRA get 2 r, as many parameters.")
    ] = 16,
    targets: Annotated[
        str, Option("--target-modules", metavar="A,B", help="Names by comma, or all-linear.")
    ] = "all-linear",
    parameters: Annotated[
        str | None, Option("--target-parameters", metavar="A,B", help="Fused experts by the ends of their names.")
    ] = None,
    batch: Annotated[int, Option("--batch", min=1, metavar="N", help="Rows per GPU and forward pass.")] = 1,
    length: Annotated[int, Option("--length", min=1, metavar="N", help="Tokens per row.")] = 2048,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], Option("--dtype", help="Type of the base weights.")
    ] = "bfloat16",
    quantization: Annotated[
        Literal["none", "8bit", "4bit"], Option("--quantization", help="Linear layers packed by bitsandbytes.")
    ] = "none",
    strategy: Annotated[
        str | None,
        Option("--strategy", metavar="NAME", help="single, ddp, zero2, fsdp, zero3 or offload; all if not given."),
    ] = None,
    attention: Annotated[
        Literal["sdpa", "eager"] | None, Option("--attention", help="As transformers would choose if not given.")
    ] = None,
    checkpointing: Annotated[bool, Option("--checkpointing", help="Recompute layers in the backward.")] = False,
    padded: Annotated[bool, Option("--padded", help="Rows of unequal length: attention takes a mask.")] = False,
) -> dict[str, Any]:
    """Predict memory per GPU for LoRA, DoRA and Dual LoRA, and which distribution strategy fits; no download, no GPU.

    [dim]Example:[/]  duallora plan --model llama-3-70b --gpus 8x80
    """
    from duallora.plan import planner

    return planner.plan(
        model,
        gpus,
        methods=[name.value for name in dict.fromkeys(method or PlanMethod)],
        rank=rank,
        targets=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
        parameters=[name.strip() for name in parameters.split(",")] if parameters else None,
        batch=batch,
        length=length,
        dtype=dtype,
        quantization=quantization,
        strategy=strategy,
        attention=attention,
        checkpointing=checkpointing,
        padded=padded,
        console=console.results,
    )
