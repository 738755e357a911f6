"""Verbs that bring an adapter to others: serve, chat, convert, check, card, push."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from duallora import console
from duallora.cli.app import Data, DataDir, Dtype, Json, Lenient, TaskName, refuse_misspelt, refuse_unwritable, verb


@verb()
def serve(
    context: typer.Context,
    sources: Annotated[
        list[str], Argument(metavar="ADAPTER...", help="Runs, adapters or a model; NAME=ADAPTER names one.")
    ],
    engine: Annotated[
        Literal["vllm", "transformers"] | None,
        Option("--engine", help="vLLM where it is installed, else transformers, if not given."),
    ] = None,
    host: Annotated[str, Option("--host", metavar="ADDRESS", help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, Option("--port", min=1, max=65535, metavar="N")] = 8000,
    rank: Annotated[int, Option("--rank", min=1, metavar="N", help="Of the LoRAs that several adapters become.")] = 64,
    json: Json = False,
) -> dict[str, Any]:
    """Merge an adapter, or convert several, into a cache, and start vLLM or `transformers serve` on it.

    What follows -- goes to the engine. With --json its command line is printed, and nothing is started.

    [dim]Examples:[/]
      duallora serve runs/mine
      duallora serve runs/mine other=runs/other -- --gpu-memory-utilization 0.8
    """
    from duallora.export import serve as serving

    sources, arguments = _for_the_engine(context, sources)
    for source in sources:
        if "=" not in source:
            refuse_misspelt(source)
    ready = serving.prepare(
        sources, engine=engine, host=host, port=port, rank=rank, arguments=arguments, console=console.results
    )
    if not json:
        sys.stdout.flush()
        os.execvp(ready["command"][0], ready["command"])
    return ready


@verb()
def chat(
    context: typer.Context,
    source: Annotated[str, Argument(metavar="ADAPTER", help="Run or adapter folder, model, or hub id.")],
    flags: Annotated[list[str] | None, Argument(metavar="[-- ...]", help="For transformers chat.")] = None,
) -> dict[str, Any]:
    """Talk to an adapter in the terminal, by `transformers chat`; what follows -- goes to it.

    [dim]Examples:[/]
      duallora chat runs/mine
      duallora chat runs/mine -- max_new_tokens=64 do_sample=False
    """
    refuse_misspelt(source)
    from duallora.export import serve as serving

    return {"source": source, "exit_code": serving.chat(source, flags or (), console=console.results)}


@verb()
def convert(
    adapter: Annotated[str, Argument(metavar="ADAPTER", help="Run or adapter folder, or hub id.")],
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="Folder for the LoRA.")],
    rank: Annotated[
        str | None,
        Option("--rank", metavar="N|auto", help="Of every layer; auto: the smallest within --kl on held-out rows."),
    ] = None,
    energy: Annotated[
        float | None,
        Option(
            "--energy",
            min=0,
            max=1,
            metavar="SHARE",
            help="Smallest rank that keeps this share in every layer, of |dW x|², or uncalibrated of |dW|².",
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        Option("--calibrate", metavar="DATA", help="Rows to keep the outputs near on; the run's own if not given."),
    ] = None,
    no_calibrate: Annotated[bool, Option("--no-calibrate", help="Look at no rows: keep the weights near.")] = False,
    calibration_rows: Annotated[
        int, Option("--calibration-rows", min=1, metavar="N", help="How many rows are looked at.")
    ] = 64,
    per_layer: Annotated[
        bool, Option("--per-layer", help="Each layer a rank of its own, for PEFT and vLLM; with --energy or auto.")
    ] = False,
    kl: Annotated[float, Option("--kl", metavar="NATS", help="What --rank auto allows, per token.")] = 1e-3,
    dtype: Annotated[Dtype, Option("--dtype", help="Type of the factors; auto as trained.")] = "auto",
    format: Annotated[
        Literal["peft", "gguf"], Option("--format", help="gguf adds adapter.gguf, for llama.cpp.")
    ] = "peft",
    evaluate: Annotated[
        bool, Option("--eval", help="Score adapter, LoRA and base on the run's own held-out rows.")
    ] = False,
    task: TaskName = None,
    data: Data = None,
    data_dir: DataDir = None,
    split: Annotated[str | None, Option("--split", metavar="NAME", help="Of --task, --data or --eval.")] = None,
    limit: Annotated[int | None, Option("--limit", min=1, metavar="N", help="Only the first N rows.")] = None,
    num_beams: Annotated[
        int | None, Option("--num-beams", min=1, metavar="N", help="Beams; the task's own if not given.")
    ] = None,
    result: Annotated[
        Path | None, Option("--result", metavar="FILE", help="Write the conversion's measures as JSON.")
    ] = None,
    lenient: Lenient = False,
) -> dict[str, Any]:
    """Turn an adapter into a plain LoRA, for PEFT, vLLM, SGLang and llama.cpp; says what each layer keeps.

    [dim]Examples:[/]
      duallora convert runs/mine -o runs/mine/lora-r16 --rank 16
      duallora convert runs/mine -o lora --rank auto --kl 0.002 --calibrate more.jsonl
      duallora convert runs/mine -o lora --energy 0.99 --no-calibrate --eval
    """
    import time

    from duallora.errors import ConfigError

    refuse_misspelt(adapter)
    if (rank is None) == (energy is None):
        raise ConfigError("give either --rank N or auto, or --energy SHARE to have the rank chosen")
    if rank is not None and rank != "auto" and not rank.isdecimal():
        raise ConfigError(f"--rank {rank}: expected a whole number >= 1, or auto")
    if calibrate is not None and no_calibrate:
        raise ConfigError(f"--calibrate {calibrate} and --no-calibrate exclude each other: keep one")
    wanted: int | Literal["auto"] | None = "auto" if rank == "auto" else int(rank) if rank else None
    if result is not None:
        refuse_unwritable(result)
    from duallora.export import convert as conversion
    from duallora.store import record

    started = time.time()
    scores = None
    scored: dict[str, Any] = {}
    if evaluate or task is not None or data is not None:
        scores, scored = _scores(adapter, num_beams, task=task, data=data, data_dir=data_dir, split=split, limit=limit)
    payload = conversion.convert(
        adapter,
        output,
        rank=wanted,
        energy=energy,
        dtype=dtype,
        strict=not lenient,
        scores=scores,
        calibrate=calibrate or not no_calibrate,
        calibration_rows=calibration_rows,
        data_dir=data_dir,
        kl=kl,
        per_layer=per_layer,
        format=format,
        console=console.results,
    )
    if result is not None:
        fingerprints = scored.pop("data", {})
        settings = {"adapter": Path(adapter).name, "rank": wanted, "energy": energy, "dtype": dtype, **scored}
        measured = {key: value for key, value in payload.items() if key != "output"}
        base = payload["trained"].get("base", {}).get("fingerprint")
        record.write_json(
            result,
            record.result("convert", settings, measured, seeds=(), started=started, data=fingerprints, base=base),
        )
    return payload


@verb()
def check(
    adapter: Annotated[str, Argument(metavar="ADAPTER", help="Run, adapter or LoRA folder, or hub id.")],
    base: Annotated[
        str | None, Option("--base", metavar="MODEL", help="Base model, where the adapter's own name fails.")
    ] = None,
    target: Annotated[
        Literal["vllm", "sglang", "llamacpp"] | None,
        Option("--target", help="Fail unless this engine takes the adapter."),
    ] = None,
    files_only: Annotated[bool, Option("--files-only", help="Look at the files alone; load no model.")] = False,
) -> dict[str, Any]:
    """Is an adapter whole, finite, for this base; what does it change, and which serving engine takes it?

    [dim]Examples:[/]
      duallora check runs/mine
      duallora check runs/mine/lora-r64 --target vllm
    """
    refuse_misspelt(adapter)
    from duallora.export.check import check as run_check

    return run_check(adapter, base=base, target=target, files_only=files_only, console=console.results)


BaseModel = Annotated[
    str | None,
    Option("--base-model", metavar="org/name", help="Hub id of the base model, where the adapter names a folder."),
]


@verb()
def card(
    adapter: Annotated[str, Argument(metavar="ADAPTER", help="Run or adapter folder.")],
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="FILE", help="The card; the adapter's README.md if not given.")
    ] = None,
    base_model: BaseModel = None,
    repo: Annotated[
        str | None, Option("--repo", metavar="org/name", help="Where the adapter will lie, for the code shown.")
    ] = None,
    license: Annotated[str | None, Option("--license", metavar="ID", help="apache-2.0, mit, ...")] = None,
    language: Annotated[str | None, Option("--language", metavar="CODE", help="en, de, ...")] = None,
    datasets: Annotated[
        list[str] | None, Option("--dataset", metavar="org/name", help="Trained on; may be repeated.")
    ] = None,
    results: Annotated[
        list[Path] | None, Option("--results", metavar="FILE", help="From `duallora eval -o`; may be repeated.")
    ] = None,
    data_dir: DataDir = None,
    force: Annotated[bool, Option("--force", help="Overwrite a card that was edited by hand.")] = False,
) -> dict[str, Any]:
    """Write the hub's README.md of an adapter: how to load it, its data, settings, seeds and metrics with intervals.

    [dim]Example:[/]  duallora card runs/mine --repo me/mine --license apache-2.0
    """
    refuse_misspelt(adapter)
    from duallora.export.card import card as write_card

    return write_card(
        adapter,
        output,
        base_model=base_model,
        repo=repo,
        license=license,
        language=language,
        datasets=datasets or (),
        results=results or (),
        data_dir=data_dir,
        force=force,
        console=console.results,
    )


@verb()
def push(
    adapter: Annotated[str, Argument(metavar="ADAPTER", help="Run or adapter folder.")],
    repo: Annotated[str, Option("--to", metavar="org/name", help="Repository on the hub; made if it is not there.")],
    upload: Annotated[
        bool, Option("--upload/--dry-run", help="Send the files; without it they are only shown.")
    ] = False,
    private: Annotated[bool, Option("--private", help="Make a new repository private.")] = False,
    base_model: BaseModel = None,
    files_only: Annotated[
        bool, Option("--files-only", help="Check the files alone beforehand; load no model.")
    ] = False,
) -> dict[str, Any]:
    """Show exactly what would go to the hub: adapter, card, lora-rNN/ conversions; --upload sends it.

    [dim]Example:[/]  duallora push runs/mine --to me/mine --upload
    """
    refuse_misspelt(adapter)
    from duallora.export.push import push as run_push

    return run_push(
        adapter,
        repo,
        upload=upload,
        private=private,
        base_model=base_model,
        files_only=files_only,
        console=console.results,
    )


def _for_the_engine(context: typer.Context, words: list[str]) -> tuple[list[str], list[str]]:
    """(the verb's words, those that stood behind ``--``), which typer hands over as one list."""
    line = context.find_root().obj
    behind = len(line) - line.index("--") - 1 if "--" in line else 0
    return words[: len(words) - behind], words[len(words) - behind :]


def _scores(source: str, num_beams: int | None, **what: Any) -> tuple[Any, dict[str, Any]]:
    """(a function of model and tokenizer that gives the task's metrics, what it scores on)."""
    from duallora.train.score import choose

    chosen = choose(source, console.results, **what)
    generation = chosen.settings.generation(num_beams=num_beams)

    def scores(model: Any, tokenizer: Any) -> dict[str, float]:
        return chosen.score(model, tokenizer, generation=generation, console=console.results)[1].metrics

    facts = {"task": chosen.task.name, "split": chosen.split, "rows": len(chosen.examples), "generation": generation}
    return scores, {**facts, "data": {chosen.split: chosen.task.fingerprint(chosen.split)}}
