"""The E2E NLG challenge (arXiv 1706.09254) with the paper's protocol: a meaning representation -> a sentence.

The paper follows LoRA's GPT-2 recipe, where the token between meaning and sentence is GPT-2's <|endoftext|>, its
beginning and end of text at once. LLaMA-type models give those two different tokens, and a beginning inside a text
means something else to them; so the separator here is a line break, which every tokenizer has. The sentence ends with
the end-of-text token, as LoRA's does. The n-gram block of 4 covers generated tokens alone, as in LoRA's own decoder: a
block that saw the prompt would forbid 61 % of the test references.

Validation and test hold one example for each meaning with all its references (547 and 630 meanings); training holds
one for each sentence. Metrics: BLEU (sacrebleu, 13a, lower case: equal to the official one), NIST, ROUGE-L and CIDEr;
with Java and the official scorer's programs (`official`) METEOR too, and ROUGE-L and CIDEr on its tokens.

Local files: ``e2e_nlg/{train,valid,test}.txt`` as microsoft/LoRA ships them, lines ``name : X | area : Y||sentence``,
which are tokenized ("city center ."). Without a data folder: tuetschek/e2e_nlg on the hub, whose sentences are not;
values of the two differ.

The task ``e2e_gpt2`` is the same in LoRA's own tokens, for GPT-2: <|endoftext|> between meaning and sentence, and a space before the
sentence.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from duallora.tasks import metrics, nlg, official
from duallora.tasks.example import Example
from duallora.tasks.hub import load_hub
from duallora.tasks.local import find_file
from duallora.tasks.rows import Faults
from duallora.tasks.task import LazySplits, Task

FORMS = {"e2e": ("\n", ""), "e2e_gpt2": ("<|endoftext|>", " ")}  # between meaning and sentence; before the sentence
# ``nist`` is the scorer's with ``-p``, as LoRA's scripts call it, and ``nist_perl`` what it prints without.
METRICS = metrics.Metrics("bleu", "nist", "nist_perl", "rouge_l", "cider", task="e2e")
metrics.register(metrics.bleu(lowercase=True), task="e2e")

_HUB = ("tuetschek/e2e_nlg", None, "refs/convert/parquet")
_FILES = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
# The hub's attribute names as LoRA's files write them.
_ATTRIBUTES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


def load(name: str, folder: Path | None) -> Task:
    """E2E from ``folder`` or, where it is None, from the hub."""
    between = "line break" if name == "e2e" else FORMS[name][0]
    return Task(
        name=name,
        kind="generate",
        splits=LazySplits({split: functools.partial(_read, folder, split, FORMS[name]) for split in _FILES}),
        format=f"E2E (meaning representation, {between}, sentence)",
        metrics=METRICS,
        main_metric="bleu",
        # LoRA's README, step 2 (its text length 64, beam 10, length penalty 0.8).
        generation={
            "max_new_tokens": 64,
            "num_beams": 10,
            "length_penalty": 0.8,
            "no_repeat_ngram_size": 4,
            "do_sample": False,
        },
        programs=official_metrics,
        extract=lambda text, example: first_line(text),
        source=f"{folder} (e2e_nlg)" if folder else f"hub {_HUB[0]}",
    )


def official_metrics(predictions: Sequence[str], examples: Sequence[Example]) -> tuple[dict[str, float], str]:
    """METEOR in percent, ROUGE-L and CIDEr on the official tokens; nothing, and why, where the programs are not here."""
    if reason := official.missing():
        return {}, (
            f"METEOR is left out: {reason}. ROUGE-L and CIDEr are on duallora's own tokens, close to the official ones "
            "(docs/evaluation.md)"
        )
    references = [example.references for example in examples]
    texts = list(dict.fromkeys([*predictions, *(text for own in references for text in own)]))
    found = dict(zip(texts, official.tokens(texts), strict=True))
    tokenize = found.__getitem__
    values = {
        "meteor": official.meteor([*map(tokenize, predictions)], [[*map(tokenize, own)] for own in references]),
        "rouge_l": nlg.rouge_l(predictions, references, tokenize=tokenize),
        "cider": nlg.cider(predictions, references, tokenize=tokenize),
    }
    return values, "METEOR, and the tokens of ROUGE-L and CIDEr, by the official Java programs"


def first_line(text: str) -> str:
    """The generated sentence: up to the first line break."""
    return text.strip().split("\n", 1)[0].strip()


def _read(folder: Path | None, split: str, form: tuple[str, str]) -> tuple[Example, ...]:
    separator, space = form
    grouped: dict[str, list[tuple[str, str, str]]] = {}
    for where, meaning, text in _hub_pairs(split) if folder is None else _file_pairs(folder, split):
        grouped.setdefault(where if split == "train" else meaning, []).append((where, meaning, text))
    examples = []
    for own in grouped.values():
        where, meaning, text = own[0]
        references = tuple(other for _, _, other in own)
        examples.append(Example(prompt=meaning + separator, answer=space + text, references=references, where=where))
    return tuple(examples)


def _file_pairs(folder: Path, split: str) -> list[tuple[str, str, str]]:
    path = find_file(folder, ("e2e_nlg", "."), (_FILES[split],), f"the {split} file of e2e")
    faults = Faults(str(path), "error")
    pairs = []
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            meaning, separator, text = line.strip().partition("||")
            if meaning.strip() and text.strip():
                pairs.append((f"{path}:{number}", meaning.strip(), text.strip()))
            elif line.strip():
                what = "the sentence or the meaning is empty" if separator else "no || between meaning and sentence"
                faults.add(f"{path}:{number}", what, line)
    faults.close(len(pairs))
    return pairs


def _hub_pairs(split: str) -> list[tuple[str, str, str]]:
    table = load_hub(*_HUB)[split]
    return [
        (f"{_HUB[0]}:{split}:{number}", meaning_of(row["meaning_representation"]), row["human_reference"].strip())
        for number, row in enumerate(table, 1)
    ]


def meaning_of(representation: str) -> str:
    """``name[X], eatType[Y]`` as ``name : X | Type : Y``, the form of LoRA's files."""
    pairs = re.findall(r"([^,\[\]]+)\[([^\]]*)\]", representation)
    return " | ".join(f"{_ATTRIBUTES.get(key.strip(), key.strip())} : {value.strip()}" for key, value in pairs)
