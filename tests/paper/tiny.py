"""What stands in for the paper's models and data: random models of the same architectures, and rows in the tasks' own forms."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from duallora.paper.cost import SAME_SHAPES
from duallora.plan.architectures import config_of, is_encoder
from duallora.tasks import commonsense, glue

# No rank of the tables has to shrink for these sizes: CorDA's 128 is the largest that a width bounds.
SIZES = {
    "hidden_size": 128, "n_embd": 128, "pooler_hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "n_layer": 2, "num_attention_heads": 8, "n_head": 8,
}  # fmt: skip
ROWS = 72  # of each GLUE task: 8 held out, two batches of 32 trained on

# -- models --------------------------------------------------------------------------------------------------------------

# model type -> (beginning, end, padding of the published tokenizer; None: it has none), and the form of a text and of a pair
TOKENS: dict[str, tuple[tuple[str, str, str | None], str, str]] = {
    "llama": (("<s>", "</s>", None), "<s> $A", "<s> $A <s>:1 $B:1"),
    "gpt2": (("<|endoftext|>", "<|endoftext|>", None), "$A", "$A $B:1"),
    "roberta": (("<s>", "</s>", "<pad>"), "<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "deberta-v2": (("[CLS]", "[SEP]", "[PAD]"), "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"),
}


def tokenizer_of(model_type: str) -> PreTrainedTokenizerFast:
    """A token for each byte, and the marks that the published tokenizer sets around texts; padding comes second, as RoBERTa's."""
    (first, last, padding), single, pair = TOKENS[model_type]
    marks = list(dict.fromkeys(mark for mark in (first, padding, last) if mark))
    words = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_of = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    bytes_of.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_of.decoder = decoders.ByteLevel()
    bytes_of.add_special_tokens(marks)
    bytes_of.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(mark, bytes_of.token_to_id(mark)) for mark in marks]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bytes_of, bos_token=first, eos_token=last, pad_token=padding)


def save_model(name: str, folder: Path) -> None:
    """The stand-in of a published model, saved: its config with smaller sizes, heads grouped as it has them."""
    values = config_of(SAME_SHAPES.get(name, name)).to_dict()
    kind = values.pop("model_type")
    values.pop("head_dim", None)  # follows from the others
    heads = values.get("num_attention_heads")
    sizes = {key: size for key, size in SIZES.items() if key in values}
    if heads:
        sizes["num_key_value_heads"] = SIZES["n_head"] * values.get("num_key_value_heads", heads) // heads
    tokenizer = tokenizer_of(kind)
    ids = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    values |= sizes | ids | {"vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(kind, **values)
    set_seed(0)
    (AutoModel if is_encoder(config) else AutoModelForCausalLM).from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -- rows ----------------------------------------------------------------------------------------------------------------


def write_rows(folder: Path) -> None:
    """Every task's files in its own form."""

    def write(file: str, lines: Iterable[str]) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")

    for one in glue.PROTOCOLS.values():
        columns = one.header or ("index", *one.columns, one.label)

        def line(number: int, one: glue.Protocol = one, columns: tuple[str, ...] = columns) -> str:
            label = one.labels[number % len(one.labels)] if one.labels else f"{number % 11 / 2:.3f}"
            said = {column: f"Row {number} says {place}." for place, column in enumerate(one.columns)}
            return "\t".join({**said, one.label: label}.get(column, str(number)) for column in columns)

        for file, count in {"train.tsv": ROWS, **dict.fromkeys(one.dev, 8)}.items():
            header = [] if one.header else ["\t".join(columns)]
            write(f"glue/{one.folder}/{file}", [*header, *map(line, range(count))])
    for task in commonsense.PROTOCOLS.values():
        named = "/".join(task.answers)
        for file, count in ((task.train_files[0], 6), (task.test_files[0], 1)):
            golds = itertools.islice(itertools.cycle(task.answers), count)
            rows = [
                {"instruction": f"Pick {number}.\n\nAnswer format: {named}", "input": "", "output": f"the correct answer is {gold}", "answer": gold}
                for number, gold in enumerate(golds)
            ]  # fmt: skip
            write(f"commonsense/{task.folder}/{file}", [json.dumps(rows)])
    for file, count in (("train", 24), ("valid", 2), ("test", 2)):
        write(f"e2e_nlg/{file}.txt", [f"name : {n} | food : {n % 3}||{n} serves {n % 3} ." for n in range(count)])
