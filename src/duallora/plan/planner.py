"""What fits where: memory per GPU of LoRA, DoRA and Dual LoRA at equal trainable parameters, by distribution strategy.

    per GPU = resident(strategy) + gathered(strategy) + kept + working + reserve

kept (from forward to backward) and working (the rest of the step's peak) come from `trace`; resident are weights, adapter,
gradients and AdamW's two moments, whole or a share of them. Everything for a GPU is predicted; no time is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from duallora.errors import ConfigError
from duallora.plan.architectures import config_of, is_encoder
from duallora.plan.trace import METHODS, Counts, Setting, Targets, Traced, depths_of
from duallora.terminal import amount, say

STRATEGIES = ("single", "ddp", "zero2", "fsdp", "zero3", "offload")
SHARDED = ("fsdp", "zero3", "offload")
GB = 1e9
# Assumed, not measured here: CUDA's context, kernels and the workspaces of cuBLAS and NCCL; what the allocator loses
# to holes, as a share of what comes and goes.
CONTEXT = 1.0 * GB
FRAGMENTATION = 0.05
LARGEST_BATCH, LONGEST = 4096, 1 << 20
Quantization = Literal["none", "8bit", "4bit"]


class Gpus(NamedTuple):
    number: int
    gigabytes: float

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """``8x80``: eight of 80 GB; ``2x8x80``: two nodes of them; ``24``: one of 24 GB."""
        found = re.fullmatch(r"(?:(\d+)x)?(?:(\d+)x)?(\d+(?:\.\d+)?)(?:gb)?", text.strip().lower())
        nodes, each, size = found.groups() if found else (None, None, "0")
        number = int(nodes or 1) * int(each or 1)
        if number < 1 or not 0 < float(size) <= 10_000:
            raise ConfigError(
                f"--gpus {text!r}: expected NUMBERxGIGABYTES such as 8x80 (eight GPUs of 80 GB), 2x8x80 for two nodes of "
                "eight, or 24 for one"
            )
        return cls(number, float(size))


class Need(NamedTuple):
    """Bytes on one GPU, part by part; ``host``: in the memory of all hosts together."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    gathered: int  # unsharded layers and communication buckets
    activations: int
    working: int
    reserve: int
    host: int

    @property
    def total(self) -> int:
        return sum(self[:-1])


def packed_bytes(counts: Counts, quantization: Quantization) -> int:
    """Bytes of the base weights with their linear layers packed as bitsandbytes packs them (the head is not).

    4bit: half a byte and a float32 scale per 64 (no double quantization); 8bit: one byte and a float32 scale per row.
    """
    if quantization == "none":
        return counts.base_bytes
    scales = 4 * counts.linear // 64 if quantization == "4bit" else 4 * counts.linear_rows
    packed = counts.linear // 2 if quantization == "4bit" else counts.linear
    return counts.base_bytes - counts.linear_bytes + packed + scales


def need(strategy: str, gpus: int, counts: Counts, kept: int, peak: int, quantization: Quantization = "none") -> Need:
    """What one of ``gpus`` holds at the peak of a step, all gradients in place (as under accumulation).

    single   everything                          ddp      the same and a bucket copy of the gradients
    zero2    gradients and moments / gpus        fsdp, zero3   weights and adapter / gpus as well; unsharded at once: what
    offload  as zero3, shares in host memory                   is outside the layers, and two layers (one is prefetched)
    """
    weights = packed_bytes(counts, quantization)
    adapter = gradients = counts.trained_bytes
    moments = 8 * counts.trained  # two, in float32
    share = 1 if strategy in ("single", "ddp") else gpus
    gathered = host = 0
    if strategy == "ddp" or strategy == "zero2":
        gathered = counts.trained_bytes
    if strategy in SHARDED:
        gathered = counts.rest_bytes + 2 * counts.layer_bytes * weights // counts.base_bytes
        weights, adapter = -(-weights // gpus), -(-adapter // gpus)
    gradients, moments = -(-gradients // share), -(-moments // share)
    if strategy == "offload":
        host = gpus * (weights + adapter + gradients + moments)
        weights = adapter = gradients = moments = 0
    reserve = int(CONTEXT + FRAGMENTATION * peak)
    return Need(weights, adapter, gradients, moments, gathered, kept, peak - kept, reserve, host)


class Planner:
    """Predictions for one model under fixed options; traces are made when first asked for, and kept."""

    def __init__(self, config: Any, gpus: Gpus, quantization: Quantization = "none", **options: Any) -> None:
        """``options``: fields of `trace.Setting` but ``method``."""
        self.config, self.gpus, self.quantization = config, gpus, quantization
        self.options = {**options, "dequantized": quantization != "none"}
        self.depths = depths_of(config)
        self._traced: dict[tuple[str, bool], Traced] = {}

    def traced(self, method: str, strategy: str) -> Traced:
        apart = method == "duallora" and (strategy in SHARDED or self.quantization != "none")
        if (method, apart) not in self._traced:
            setting = Setting(method, apart=apart, **self.options)
            self._traced[method, apart] = Traced(self.config, setting, self.depths)
        return self._traced[method, apart]

    def need(self, method: str, strategy: str, batch: int, length: int) -> Need:
        traced = self.traced(method, strategy)
        return need(strategy, self.gpus.number, traced.counts, *traced.use(batch, length), self.quantization)

    def fits(self, method: str, strategy: str, batch: int, length: int) -> bool:
        return self._over(method, strategy, batch, length) <= 0

    def strategies(self) -> list[str]:
        """Those that make sense for the number of GPUs; bitsandbytes' weights are not sharded by ZeRO-3, experts that are
        adapted by nothing."""
        if self.options["parameters"]:
            return ["single"] if self.gpus.number == 1 else ["ddp", "zero2"]
        if self.gpus.number == 1:
            return ["single", "offload"] if self.quantization == "none" else ["single"]
        found = list(STRATEGIES[1:])
        return found if self.quantization == "none" else [name for name in found if name not in ("zero3", "offload")]

    def largest_batch(self, method: str, strategy: str, length: int) -> int:
        """Rows per GPU, 0 where not even one fits."""
        return largest(lambda batch: self._over(method, strategy, batch, length), LARGEST_BATCH)

    def longest(self, method: str, strategy: str, batch: int) -> int:
        """Tokens per row, a multiple of 64 (0: none fits), within what the model has positions for."""
        limit = getattr(self.config, "max_position_embeddings", LONGEST) // 64
        return 64 * largest(lambda n: self._over(method, strategy, batch, 64 * n), min(limit, LONGEST // 64))

    def _over(self, method: str, strategy: str, batch: int, length: int) -> float:
        """Bytes by which it does not fit; rising in batch and length."""
        return self.need(method, strategy, batch, length).total - self.gpus.gigabytes * GB


def largest(over: Callable[[int], float], limit: int) -> int:
    """The largest n in 1..limit with over(n) <= 0, or 0, for an increasing convex ``over``; few calls where it is linear."""
    low, high = 1, limit
    at_low = over(low)
    if at_low > 0:
        return 0
    at_high = over(high)
    if at_high <= 0:
        return limit
    while high - low > 1:
        # Where the chord crosses zero. A convex function lies below its chord, so that point fits.
        slope = (at_high - at_low) / (high - low)
        guess = min(max(low + int(-at_low / slope), low + 1), high - 1)
        value = over(guess)
        if value > 0:
            high, at_high = guess, value
            continue
        if value + (value - at_low) / (guess - low) > 0:  # ... and above it beyond: the next one does not
            return guess
        low, at_low = guess, value
    return low


def plan(
    model: str,
    gpus: str,
    *,
    methods: Sequence[str] = METHODS,
    rank: int = 16,
    targets: Targets = "all-linear",
    parameters: list[str] | None = None,
    batch: int = 1,
    length: int = 2048,
    dtype: str = "bfloat16",
    quantization: Quantization = "none",
    strategy: str | None = None,
    attention: str | None = None,
    checkpointing: bool = False,
    padded: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Predicts and shows; returns all of it. ``batch`` is per GPU; ``rank`` is Dual LoRA's r, LoRA and DoRA have 2r.

    Raises:
        ConfigError: no such model or strategy, unreadable ``gpus``, a length the model has no positions for.
    """
    console = console or Console()
    machine = Gpus.parse(gpus)
    config = config_of(model)
    _check(config, machine, strategy, batch, length, quantization)
    planner = Planner(
        config, machine, quantization, rank=rank, targets=targets, parameters=parameters, dtype=getattr(torch, dtype), attention=attention,
        checkpointing=checkpointing, padded=padded,
    )  # fmt: skip
    if parameters and (strategy in SHARDED or quantization != "none" or "dora" in methods):
        raise ConfigError(
            f"--target-parameters {parameters}: experts are adapted where they are neither sharded nor quantized, by LoRA and "
            "Dual LoRA: give --method duallora --method lora, and of the strategies single, ddp or zero2"
        )
    wanted = [strategy] if strategy else planner.strategies()
    found: dict[str, Any] = {"methods": {}, "strategies": {}}
    for method in methods:
        counts = planner.traced(method, wanted[0]).counts
        found["methods"][method] = {
            "rank": rank if method == "duallora" else 2 * rank,
            "adapter_parameters": counts.adapter,
            "trained_parameters": counts.trained,
            "share_percent": 100 * counts.adapter / (counts.base + counts.adapter),
        }
    for name in wanted:
        found["strategies"][name] = {method: _outcome(planner, method, name, batch, length) for method in methods}
    best = next((name for name in wanted if all(o["fits"] for o in found["strategies"][name].values())), None)
    if best:
        for method in methods:
            found["methods"][method]["longest"] = planner.longest(method, best, batch)
    counts = planner.traced(methods[0], wanted[0]).counts
    result = {
        "model": model,
        "kind": "encoder" if is_encoder(config) else "decoder",
        "base_parameters": counts.base,
        "gpus": machine._asdict(),
        "setting": {
            "batch": batch, "length": length, "dtype": dtype, "quantization": quantization, "attention": attention,
            "checkpointing": checkpointing, "padded": padded, "target_modules": targets,
            "target_parameters": parameters,
        },
        "assumed": {"context_bytes": CONTEXT, "fragmentation": FRAGMENTATION},
        "predicted": True,
        "suggested": best,
        **found,
    }  # fmt: skip
    _show(console, result, best or wanted[-1])
    return result


def _outcome(planner: Planner, method: str, strategy: str, batch: int, length: int) -> dict[str, Any]:
    found = planner.need(method, strategy, batch, length)
    return {
        **found._asdict(),
        "total": found.total,
        "fits": planner.fits(method, strategy, batch, length),
        "largest_batch": planner.largest_batch(method, strategy, length),
    }


def _check(config: Any, gpus: Gpus, strategy: str | None, batch: int, length: int, quantization: Quantization) -> None:
    positions = getattr(config, "max_position_embeddings", LONGEST)
    if length > positions:
        raise ConfigError(f"--length {length}: this model has {positions} positions")
    if strategy is not None and strategy not in STRATEGIES:
        raise ConfigError(f"--strategy {strategy!r}: expected one of {', '.join(STRATEGIES)}")
    if strategy not in (None, "single", "offload") and gpus.number == 1:
        raise ConfigError(
            f"--strategy {strategy} spreads over several GPUs, and --gpus names one: expected such as 8x80"
        )
    if strategy == "single" and gpus.number > 1:
        raise ConfigError(f"--strategy single uses one GPU, and --gpus names {gpus.number}: use ddp")
    if quantization != "none" and strategy in ("zero3", "offload"):
        raise ConfigError(f"--strategy {strategy} does not shard weights of {quantization}: use ddp, zero2 or fsdp")


_PARTS = {
    "weights": "base weights", "adapter": "adapter", "gradients": "gradients", "optimizer": "AdamW's moments",
    "gathered": "gathered, buckets", "activations": "kept for backward", "working": "working peak",
    "reserve": "reserve (assumed)", "total": "total",
}  # fmt: skip
_NAMES = {"lora": "LoRA", "dora": "DoRA", "duallora": "Dual LoRA"}


def _show(console: Console, result: dict[str, Any], detailed: str) -> None:
    methods, setting, gpus = result["methods"], result["setting"], result["gpus"]
    more = [name for name in ("checkpointing", "padded") if setting[name]]
    more += [setting["quantization"]] if setting["quantization"] != "none" else []
    say(console, "model", f"{escape(result['model'])}, {amount(result['base_parameters'])} parameters")
    batch = f"{setting['batch']} x {setting['length']} tokens per GPU"
    say(console, "step", ", ".join([batch, setting["dtype"], *more]))
    say(console, "machine", f"{gpus['number']} x {gpus['gigabytes']:g} GB; all figures are predicted")
    for name, facts in methods.items():
        share = f"{amount(facts['adapter_parameters'])} = {facts['share_percent']:.4f} %"
        say(console, "adapter", f"{_NAMES[name]}, r = {facts['rank']}: {share}")
    table = Table(Column("GB per GPU", no_wrap=True), box=SIMPLE)
    for name in methods:
        table.add_column(_NAMES[name], justify="right")
        table.add_column("largest batch", justify="right")
    for strategy, outcomes in result["strategies"].items():
        cells = []
        for outcome in outcomes.values():
            text = f"{outcome['total'] / GB:.1f}"
            cells += [text if outcome["fits"] else f"[red]{text} no[/]", str(outcome["largest_batch"] or "-")]
        table.add_row(strategy, *cells, style="bold" if strategy == result["suggested"] else "")
    console.print(table)
    table = Table(Column(f"{detailed}, GB", no_wrap=True), box=SIMPLE)
    for name in methods:
        table.add_column(_NAMES[name], justify="right")
    outcomes = result["strategies"][detailed]
    for part, words in _PARTS.items():
        values = [f"{outcomes[name][part] / GB:.2f}" for name in methods]
        table.add_row(words, *values, style="bold" if part == "total" else "")
    if any(outcomes[name]["host"] for name in methods):
        table.add_row("in host memory, all nodes", *(f"{outcomes[name]['host'] / GB:.1f}" for name in methods))
    if result["suggested"]:
        longest = (f"{methods[name]['longest']:,}" for name in methods)
        table.add_row(f"longest row at batch {setting['batch']}", *longest)
    console.print(table)
    if not result["suggested"]:
        wishes = "a smaller --length, --checkpointing, --quantization 4bit, or more GPUs"
        console.print(f"[red]nothing here fits every method[/]; what helps: {wishes}")
