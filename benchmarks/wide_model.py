"""Four layers of LLaMA-7B's widths with random weights, on which a step is measured: ``python benchmarks/wide_model.py FOLDER``"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from duallora.plan.architectures import config_of
from duallora.store.models import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--layers", type=int, default=4)
    asked = parser.parse_args()
    if (asked.folder / "config.json").exists():
        return
    config = config_of(asked.model)
    config.num_hidden_layers = asked.layers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    load_tokenizer("builtin:smollm2-135m").save_pretrained(asked.folder)  # which a batch of random tokens does not ask
    model.save_pretrained(asked.folder)


if __name__ == "__main__":
    main()
