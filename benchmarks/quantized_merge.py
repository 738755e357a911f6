"""What merging costs on a quantized base: the loss with the adapter apart, on the grid, dequantized and on the original.

SmolLM2-135M is quantized, a Dual LoRA is trained on it for a few steps, and its held-out answer loss is taken in each form.

    python benchmarks/quantized_merge.py -o results/quantized_merge.json [QUANTIZATION ...]
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from rich.table import Table

import duallora
from duallora.store import models, record
from duallora.tasks import Collator, encode_split, load_data
from duallora.terminal import quiet_libraries
from duallora.train import evaluate
from duallora.tuner import quantized

MODEL, DATA = "builtin:smollm2-135m", "builtin:docstrings"
SETTINGS: dict[str, Any] = {
    "r": 8, "steps": 16, "batch_size": 4, "max_length": 96, "learning_rate": 4e-3, "warmup_steps": 4, "held_out": 32,
    "seed": 0,
}  # fmt: skip


def adapted(model: torch.nn.Module) -> Any:
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_seed": SETTINGS["seed"]}
    config = duallora.DualLoraConfig(r=SETTINGS["r"], warmup_steps=SETTINGS["warmup_steps"], **options)
    return get_peft_model(model, config)


def train(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    """A few steps of AdamW with a linear warm-up as long as the gate's."""
    collate, size = Collator(tokenizer), SETTINGS["batch_size"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=SETTINGS["learning_rate"])
    model.train()
    for step in range(SETTINGS["steps"]):
        optimizer.param_groups[0]["lr"] = SETTINGS["learning_rate"] * min(1, (step + 1) / SETTINGS["warmup_steps"])
        optimizer.zero_grad()
        model(**collate(rows[step * size : (step + 1) * size])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def measure(name: str, task: Any) -> tuple[dict[str, Any], str]:
    """(the figures of one quantization, fingerprint of its weights)."""
    torch.manual_seed(SETTINGS["seed"])
    original, tokenizer = models.load_model(MODEL, "generate", dtype="float32")
    limit = SETTINGS["steps"] * SETTINGS["batch_size"]
    rows, _ = encode_split(
        evaluate.select(task, "train", limit), tokenizer, "generate", max_length=SETTINGS["max_length"]
    )
    held = evaluate.select(task, "validation", SETTINGS["held_out"])
    held_out, _ = encode_split(held, tokenizer, "generate", max_length=SETTINGS["max_length"])

    def loss(model: Any) -> float:
        return evaluate.loss_on(model, tokenizer, held_out, "generate", batch_size=8)

    figures: dict[str, Any] = {"loss_of_the_original": loss(original)}
    base, _ = models.load_model(MODEL, "generate", dtype="float32", quantization=name)
    fingerprint = models.weights_fingerprint(base)
    linear = {n: m for n, m in base.named_modules() if quantized.storage(m)}
    stored = quantized.stored_tensors(torch.nn.ModuleDict({n.replace(".", "_"): m for n, m in linear.items()}))
    figures["linear_bytes"] = sum(t.numel() * t.element_size() for t in stored.values())
    figures["linear_bytes_float32"] = sum(4 * m.in_features * m.out_features for m in linear.values())
    figures["loss_of_the_quantized"] = loss(base)
    model = adapted(base)
    started = time.perf_counter()
    train(model, tokenizer, rows)
    figures["seconds_per_step"] = round((time.perf_counter() - started) / SETTINGS["steps"], 2)
    figures["loss_unmerged"] = loss(model)
    figures["loss_merged_on_the_grid"], lost = _on_the_grid(model, loss)
    figures["lost_share_of_dW"] = {
        "median": sorted(lost.values())[len(lost) // 2], "worst": max(lost.values()), "worst_layer": max(lost, key=lost.__getitem__),
    }  # fmt: skip
    on_original = adapted(original)
    set_peft_model_state_dict(on_original, get_peft_model_state_dict(model))
    figures["loss_merged_into_the_original"] = loss(on_original.merge_and_unload())
    figures["loss_merged_into_the_dequantized"] = loss(quantized.dequantize(model).merge_and_unload())
    return figures, fingerprint


def _on_the_grid(model: Any, loss: Any) -> tuple[float, dict[str, float]]:
    layers = [m for m in model.modules() if isinstance(m, duallora.tuner.Linear)]
    with quantized.merge_losses(model.base_model.model) as lost:
        for layer in layers:
            layer.merge()
    merged = loss(model)
    model.unmerge_adapter()
    return merged, lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("quantization", nargs="*", default=list(models.QUANTIZATIONS))
    parser.add_argument("-o", "--output", type=Path, default=Path("results/quantized_merge.json"))
    options = parser.parse_args()
    task, started, metrics, bases = load_data(DATA), time.time(), {}, {}
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in options.quantization:
            metrics[name], bases[name] = measure(name, task)
            data = {split: task.fingerprint(split) for split in ("train", "validation")}
            recipe = {"model": MODEL, "data": DATA, **SETTINGS}
            found = record.result(
                "quantized_merge", recipe, metrics, seeds=[SETTINGS["seed"]], started=started, data=data
            )
            record.write_json(options.output, {**found, "bases": bases})  # after each: a run may be cut short
    table = Table("", *metrics)
    for key in next(iter(metrics.values())):
        table.add_row(key, *(str(figures[key]) for figures in metrics.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
