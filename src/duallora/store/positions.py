"""How many tokens a model takes at once; more are refused, or said, before they are an IndexError or a worse answer.

Some models look positions up in a table, learned (GPT-2, OPT, BERT, RoBERTa) or computed once (GPT-J, CTRL): past its end
there is nothing. Others compute them for any length (rotations, ALiBi, distances): past the length that their config names
they go on, untrained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn

from duallora.errors import ConfigError

UNLIMITED = 1 << 30  # tokens; configs and tokenizers that know no limit say nothing or a larger number
LENGTHS = ("max_position_embeddings", "max_seq_len", "seq_length", "max_target_positions")  # in configs
UNTABLED = ("mpt", "reformer")  # their forward ends at the config's length, without a table of positions
OTHER_SENSES = ("vision", "visual", "image", "audio")  # in the names of towers whose positions are not the text's
SPARE = 8  # entries that a table may have beyond what the config says, for padding and what stands before the text


class Positions(NamedTuple):
    """``length`` tokens fit; where it is ``fixed`` one more is an error, else it is more than the model was made for."""

    length: int
    fixed: bool


def positions(model: Any, tokenizer: Any = None) -> Positions:
    """What ``model`` takes: by its tables of positions, else its config, else ``tokenizer``; virtual tokens are taken off."""
    is_adapted = isinstance(model, PeftModel)
    inner: Any = model.get_base_model() if is_adapted else model
    config = inner.config.get_text_config()
    said = [getattr(config, name, None) for name in LENGTHS]
    said.append(getattr(tokenizer, "model_max_length", None))
    told = next((value for value in said if isinstance(value, int) and 0 < value < UNLIMITED), UNLIMITED)
    tables = list(_tables(inner, told))
    adapters = model.peft_config.values() if is_adapted else ()
    virtual = max((getattr(adapter, "num_virtual_tokens", None) or 0 for adapter in adapters), default=0)
    return Positions(min([told, *tables]) - virtual, bool(tables))


def check_room(model: Any, tokenizer: Any, *, row: int, prompt: int = 0, new: int = 0) -> str:
    """What to say where the longest ``row``, or ``prompt`` with ``new`` tokens generated, is more than a model was made for.

    All in tokens. Raises ConfigError where it is more than the model has positions for.
    """
    length, fixed = positions(model, tokenizer)
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    longest = max(row, prompt + new)
    if longest <= length:
        return ""
    if row > length:
        made = f"the longest row has {row:,} tokens"
        remedy = f"set data.max_length (--max-length) to at most {length:,}: longer rows are then cut, and counted"
    else:
        made = f"the longest prompt has {prompt:,} tokens and eval.max_new_tokens (--max-new-tokens) is {new:,}"
        remedy = f"both together may be at most {length:,}"
        if prompt < length and new < length:
            shorter = f"data.max_length (--max-length) to at most {length - new:,}"
            remedy = f"set eval.max_new_tokens to at most {length - prompt:,}, or {shorter}"
    if not fixed:
        return (
            f"{made}, but {name} was made for {length:,}: beyond them it goes on, with positions it was not trained on. "
            "Shorter rows: data.max_length (--max-length)"
        )
    raise ConfigError(f"{made}, but {name} has {length:,} positions: {remedy}")


def _tables(model: Any, told: int) -> Iterator[int]:
    """The tokens that each table of positions has room for. A table is known by its name and by its length."""
    if model.config.model_type in UNTABLED:
        yield told
    for name, module in model.named_modules():
        if any(word in name for word in OTHER_SENSES):
            continue
        for own, child in module.named_children():
            weight = getattr(child, "weight", None)
            if isinstance(weight, torch.Tensor) and not isinstance(child, nn.Linear) and _is_table(own, weight, told):
                padding = getattr(child, "padding_idx", None)
                before = getattr(child, "offset", 0 if padding is None else padding + 1)  # OPT says, RoBERTa pads
                yield len(weight) - before
        for own, value in (*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)):
            if _is_table(own, value, told):
                yield len(value)


def _is_table(name: str, value: torch.Tensor, told: int) -> bool:
    known = name == "wpe" or ("pos" in name and "bias" not in name and "rel" not in name)
    return known and value.dim() == 2 and told <= len(value) <= told + SPARE
