"""How good a model is on a task: the loss on its answers, and the task's own metrics on what it generates or predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from rich.console import Console
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList, NoRepeatNGramLogitsProcessor

from duallora.errors import ConfigError, DataError, NonFiniteError
from duallora.methods.rule import reads_labels
from duallora.ops.fold import folded
from duallora.store.positions import check_room, positions
from duallora.store.processes import ALONE, Processes
from duallora.tasks import IGNORE, Collator, Example, Task, encode, encode_prompt, encode_split, metrics
from duallora.tasks.chats import calls_tools, last_trained
from duallora.tasks.encode import with_written_answer
from duallora.tasks.task import Kind
from duallora.terminal import progress_bar, quiet_libraries

Scoring = Literal["generation", "likelihood"]
T = TypeVar("T")

# What a model's own generation config might say otherwise.
NEUTRAL_GENERATION: dict[str, Any] = {
    "max_new_tokens": 64,
    "do_sample": False,
    "num_beams": 1,
    "length_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}

WHOLE = 1 << 30  # tokens: nothing is cut


class Answer(NamedTuple):
    """What the model makes of a row's right answer: its log-likelihood in nats, and over how many tokens."""

    log_likelihood: float
    tokens: int


@dataclass(frozen=True)
class EvalResult:
    """``metrics`` holds the task's metrics and ``loss`` (``perplexity`` too where the task generates); predictions
    (texts, class ids or floats), examples and, where the task generates, ``answers`` are in the order of the split.
    ``truncated`` rows were cut to the length asked for; ``note`` says what a metric's name does not."""

    metrics: dict[str, float]
    predictions: list[Any]
    examples: list[Example]
    note: str = ""
    answers: list[Answer] = field(default_factory=list)
    truncated: int = 0


def evaluate(
    model: Any,
    tokenizer,
    task: Task,
    *,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 16,
    generation: Mapping[str, Any] | None = None,
    max_length: int = 512,
    scoring: Scoring = "generation",
    console: Console | None = None,
    processes: Processes = ALONE,
) -> EvalResult:
    """Scores ``model`` on the first ``limit`` examples of a split; several ``processes`` share the batches out.

    ``generation`` overrides the task's own arguments for transformers' ``generate``. ``scoring="likelihood"`` generates
    nothing: each row's prediction is the likeliest of its `Task.options`, and metrics that end in ``_norm`` are those of
    the option with the greatest log-likelihood per byte (lm-eval's acc_bytes). The loss is the mean over trained tokens
    (nats per token) for tasks that generate, over rows otherwise.

    Raises:
        ConfigError: the task has no such split, or no options to compare, or the model has too few positions.
        DataError: the split is empty, or a row has no answer or label to score against.
        NonFiniteError: the loss is NaN or infinite, so every other metric would mean nothing.
    """
    check_scoring(task, scoring)
    examples = select(task, split, limit)
    rows, counts = encode_split(examples, tokenizer, task.kind, max_length=max_length)
    examples = [with_written_answer(example, tokenizer) for example in examples]
    chosen: dict[str, Any] = {"max_length": max_length, "generation": generation, "scoring": scoring}
    notes = [check_lengths(model, tokenizer, task, examples, **chosen)]
    if counts.truncated:
        notes.append(f"{counts.truncated:,} of {counts.rows:,} rows cut to {max_length:,} tokens")
    shared: dict[str, Any] = {"batch_size": batch_size, "console": console, "processes": processes}
    predictions: list[Any] = [""] * len(examples)
    values: dict[str, float] = {}
    answers: list[Answer] = []
    with inference(model), _folded_on_cpu(model):
        if scoring == "likelihood":
            predictions, values, answers = choose(
                model, tokenizer, task, examples, rows, max_length=max_length, **shared
            )
            losses = _losses(answers, split)
        elif task.kind == "generate":
            found = _answers(log_likelihoods(model, tokenizer, rows, **shared), rows)
            losses = _losses(found, split)  # before the long part
            answers = _by_example(found, counts.examples)
            if not task.loss_only:
                settings = {**task.generation, **(generation or {})}
                texts = generate(model, tokenizer, examples, max_length=max_length, **shared, **settings)
                predictions = [_answer(task, text, example) for text, example in zip(texts, examples, strict=True)]
        else:
            logits = classify(model, tokenizer, rows, **shared)
            losses = {"loss": _finite(_row_loss(logits, rows, task.kind), split)}
            predictions = logits.argmax(-1).tolist() if task.kind == "classify" else logits.squeeze(-1).tolist()
    if scoring == "generation" and not (task.kind == "generate" and task.loss_only):
        values = task.metrics(predictions, examples)
        if (programs := task.programs) is not None:
            more, note = processes.from_main(lambda: programs(predictions, examples))
            values = {**values, **more}
            notes.append(note)
    note = "; ".join(filter(None, notes))
    return EvalResult({**values, **losses}, predictions, examples, note, answers, counts.truncated)


def check_lengths(
    model: Any,
    tokenizer,
    task: Task,
    examples: Sequence[Example],
    *,
    max_length: int,
    generation: Mapping[str, Any] | None = None,
    scoring: Scoring | None = "generation",
) -> str:
    """What to say where rows, or prompts and the answers to them, are longer than the model was made for; '' where none is.

    ``scoring=None`` is for rows that only the loss is taken on. Raises ConfigError where the model has no such positions.
    """
    new = 0
    if task.kind == "generate" and scoring == "generation" and not task.loss_only:
        new = {**NEUTRAL_GENERATION, **task.generation, **(generation or {})}["max_new_tokens"]
    if max_length + new <= positions(model, tokenizer).length:
        return ""
    if scoring == "likelihood" and task.options is not None:
        examples = [replace(example, answer=option) for example in examples for option in task.options(example)]
    rows, _ = encode_split(examples, tokenizer, task.kind, max_length=max_length)
    prompts = [encode_prompt(example, tokenizer, max_length=max_length) for example in examples if new]
    prompt = max(map(len, prompts), default=0)
    return check_room(model, tokenizer, row=longest(rows), prompt=prompt, new=new)


def longest(rows: Sequence[Mapping[str, Any]]) -> int:
    """Tokens of the longest row."""
    return max(len(row["input_ids"]) for row in rows)


def check_scoring(task: Task, scoring: Scoring) -> None:
    """ConfigError where the task cannot be scored so."""
    if scoring == "likelihood" and task.options is None:
        raise ConfigError(
            f"scoring=likelihood: {task.name} has no answer options to compare; use scoring=generation, or a task that "
            "names its options, such as boolq or commonsense"
        )


def _losses(answers: Sequence[Answer], split: str) -> dict[str, float]:
    values = {name: metrics.get(name).value(answers, ()) for name in ("loss", "perplexity")}
    _finite(values["loss"], split)
    return values


def _finite(loss: float, split: str) -> float:
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the loss on the {split} rows is {loss}; expected a finite number. The weights hold NaN or overflow in this "
            "dtype: check the checkpoint, or evaluate in float32"
        )
    return loss


def loss_on(model: Any, tokenizer, rows: Sequence[Mapping[str, Any]], kind: Kind, **how: Any) -> float:
    """The loss alone, over rows of `encode_split`: per trained token (generate) or per row.

    The same to the bit in one process and in several. ``how``: batch_size, console and processes, as `evaluate` has them.
    """
    with inference(model), _folded_on_cpu(model):
        if kind == "generate":
            return metrics.get("loss").value(_answers(log_likelihoods(model, tokenizer, rows, **how), rows), ())
        return _row_loss(classify(model, tokenizer, rows, **how), rows, kind)


def select(task: Task, split: str, limit: int | None = None) -> list[Example]:
    """The first ``limit`` examples of a split; ConfigError where there is no such split, DataError where it is empty."""
    if split not in task.splits:
        raise ConfigError(f"{task.name} has no split {split!r}; it has {', '.join(task.splits) or 'none'}")
    examples = list(task.splits[split][:limit])
    if not examples:
        raise DataError(f"the {split} split of {task.source or task.name} is empty: there is nothing to evaluate")
    return examples


def answers(model: Any, tokenizer, task: Task, examples: Sequence[Example], **how: Any) -> list[str]:
    """What the model answers to ``examples`` of a task that generates; ``how`` as for `generate`, over the task's own."""
    with inference(model), _folded_on_cpu(model):
        texts = generate(model, tokenizer, examples, **{**task.generation, **how})
        return [_answer(task, text, example) for text, example in zip(texts, examples, strict=True)]


def in_words(example: Example) -> str:
    """What a row asks."""
    return example.prompt or " | ".join(example.texts) or str(example.messages[0]["content"])


def _answers(found: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
    tokens = [sum(label != IGNORE for label in row["labels"]) for row in rows]
    return [Answer(*one) for one in zip(found, tokens, strict=True)]


def _by_example(answers: Sequence[Answer], examples: Sequence[int]) -> list[Answer]:
    """The answers of rows, summed over those that are of one example: some chats take several."""
    whole: dict[int, Answer] = {}
    for example, own in zip(examples, answers, strict=True):
        before = whole.get(example, Answer(0.0, 0))
        whole[example] = Answer(before.log_likelihood + own.log_likelihood, before.tokens + own.tokens)
    return list(whole.values())


@torch.no_grad()
def log_likelihoods(model: Any, tokenizer, rows: Sequence[Mapping[str, Any]], **how: Any) -> list[float]:
    """The log-likelihood of each row's trained tokens given what stands before them, in nats, in the order of ``rows``.

    Rows that differ in their last token alone, or end where another goes on, share one pass through the model: the
    options of a question cost hardly more than one answer.
    """
    check_room(model, tokenizer, row=longest(rows))
    guests = _sharing(rows)
    hosts = list(guests)
    seen = reads_labels(model)

    def one(batch: dict[str, torch.Tensor], chosen: list[int]) -> Iterator[tuple[int, float]]:
        length = batch["labels"].shape[1]
        if not seen:
            batch.pop("labels")
        logits = model(**batch).logits[:, -length:-1]  # virtual tokens stand before the text's own
        # (place in the batch, position, token, row) of each trained token.
        wanted = [
            (place, position, label, row)
            for place, host in enumerate(chosen)
            for row in guests[hosts[host]]
            for position, label in enumerate(rows[row]["labels"][1:])
            if label != IGNORE
        ]
        places, positions, labels, owners = zip(*wanted, strict=True)
        # Only the trained positions are widened to float32: [trained, vocabulary], not [batch, length, vocabulary].
        scores = logits[list(places), list(positions)].float()
        losses = F.cross_entropy(scores, torch.tensor(labels, device=scores.device), reduction="none").tolist()
        found = dict.fromkeys(owners, 0.0)
        for owner, loss in zip(owners, losses, strict=True):
            found[owner] -= loss
        return iter(found.items())

    sizes = [len(guests[host]) for host in hosts]
    return _over_batches(one, [rows[host] for host in hosts], model, Collator(tokenizer), "loss", sizes=sizes, **how)


@torch.no_grad()
def trained_logits(model: Any, tokenizer, rows: Sequence[Mapping[str, Any]], **how: Any) -> list[torch.Tensor]:
    """The logits [tokens, vocabulary] that predict each row's trained tokens, float32 on the CPU, in the order of ``rows``."""
    seen = reads_labels(model)

    def one(batch: dict[str, torch.Tensor], chosen: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        labels = batch["labels"] if seen else batch.pop("labels")
        logits = model(**batch).logits[:, -labels.shape[1] : -1]
        trained = labels[:, 1:] != IGNORE
        return ((row, own[mask].float().cpu()) for row, own, mask in zip(chosen, logits, trained, strict=True))

    with inference(model), _folded_on_cpu(model):
        return _over_batches(one, rows, model, Collator(tokenizer), "outputs", **how)


def _sharing(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[int]]:
    """Each row that goes through the model -> itself and the rows whose tokens but for the last are the head of its own."""

    def key(row: int) -> tuple[int, list[int]]:
        start = next((at for at, label in enumerate(rows[row]["labels"]) if label != IGNORE), -1)
        return start, list(rows[row]["input_ids"][:-1])  # the last token predicts nothing

    keys = [key(row) for row in range(len(rows))]
    guests: dict[int, list[int]] = {}
    host = -1
    for row in sorted(range(len(rows)), key=lambda row: (keys[row], -row), reverse=True):
        start, head = keys[row]
        # In this order a row comes right after those that begin with it.
        if host < 0 or keys[host][0] != start or keys[host][1][: len(head)] != head:
            host = row
        guests.setdefault(host, []).append(row)
    return guests


def choose(
    model: Any,
    tokenizer,
    task: Task,
    examples: Sequence[Example],
    rows: Sequence[Mapping[str, Any]],
    *,
    max_length: int = 512,
    **shared: Any,
) -> tuple[list[str], dict[str, float], list[Answer]]:
    """The likeliest option of each example, the task's metrics, and the right answers (``rows``).

    An option's log-likelihood is the sum over its tokens, without the end of text; of equals the first is taken.
    Metrics that end in ``_norm`` take the likeliest per byte.
    """
    assert task.options is not None
    options = [list(task.options(example)) for example in examples]
    asked = [replace(example, answer=option) for example, own in zip(examples, options, strict=True) for option in own]
    encoded, _ = encode_split(asked, tokenizer, task.kind, max_length=max_length)
    open_ended = [_without_end(row, tokenizer) for row in encoded]
    found = log_likelihoods(model, tokenizer, [*rows, *open_ended], **shared)
    right, scores = found[: len(rows)], iter(found[len(rows) :])
    likeliest: list[str] = []
    per_byte: list[str] = []
    for example, own in zip(examples, options, strict=True):
        score = {option: next(scores) for option in own}
        likeliest.append(_answer(task, max(score, key=lambda option: score[option]), example))
        per_byte.append(_answer(task, max(score, key=lambda option: score[option] / len(option.encode())), example))
    normed = {f"{name}_norm": value for name, value in task.metrics(per_byte, examples).items()}
    values = {**task.metrics(likeliest, examples), **normed}
    # Every option is an answer, so a parse failure cannot be.
    kept = {name: value for name, value in values.items() if not name.startswith("parse_failure")}
    return likeliest, kept, _answers(right, rows)


def _answer(task: Task, text: str, example: Example) -> str:
    return task.extract(text, example) if task.extract else text.strip()


def _without_end(row: Mapping[str, Any], tokenizer) -> Mapping[str, Any]:
    if row["input_ids"][-1] != tokenizer.eos_token_id:
        return row
    return {name: values[:-1] for name, values in row.items()}


@torch.no_grad()
def generate(
    model: Any,
    tokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    max_length: int = 512,
    console: Console | None = None,
    processes: Processes = ALONE,
    **settings: Any,
) -> list[str]:
    """The text the model adds to each prompt, in the order of ``examples``; greedy unless ``settings`` say otherwise.

    ``no_repeat_ngram_size`` looks at generated tokens alone, as LoRA's decoder does: transformers' own also forbids what
    stands in the prompt, and with it most right answers of E2E. The model's own generation settings are not used, so
    that a score is the task's protocol and not the checkpoint's.
    """
    prompts = [{"input_ids": encode_prompt(example, tokenizer, max_length=max_length)} for example in examples]
    collate = Collator(tokenizer, side="left")
    settings = {**NEUTRAL_GENERATION, **settings}
    own_ngrams = settings.pop("no_repeat_ngram_size")
    check_room(model, tokenizer, row=0, prompt=longest(prompts), new=settings["max_new_tokens"])
    chats = [example for example in examples if example.messages]
    answered = [example for example in chats if last_trained(example.messages) is not None]
    calls = [example for example in answered if calls_tools(example)]  # which some templates end with a mark of its own
    ends = end_tokens(model, tokenizer, chat=bool(chats), examples=[*answered[:1], *calls[:1]])
    if settings.get("stop_strings"):
        settings["tokenizer"] = tokenizer

    def one(batch: dict[str, torch.Tensor], chosen: list[int]) -> Iterator[tuple[int, str]]:
        start = batch["input_ids"].shape[1]
        output = model.generate(
            **batch,
            use_cache=True,
            pad_token_id=collate.fill["input_ids"],
            eos_token_id=ends,
            no_repeat_ngram_size=0,
            logits_processor=LogitsProcessorList([_OwnNGrams(own_ngrams, start)]),
            **settings,
        )
        return zip(chosen, tokenizer.batch_decode(output[:, start:], skip_special_tokens=True), strict=True)

    # A decoding step multiplies few rows, so building W' anew in each would cost more than the step itself.
    with folded(model):
        how: dict[str, Any] = {"batch_size": batch_size, "console": console, "processes": processes}
        return _over_batches(one, prompts, model, collate, "generate", **how)


def end_tokens(model: Any, tokenizer, *, chat: bool, examples: Sequence[Example] = ()) -> list[int]:
    """The tokens that end an answer: the model's and the tokenizer's, in a chat also what closes a turn.

    ``examples``: chats whose last turns show what closes one; without any, a made-up one does.
    """
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    for example in (examples or [Example(messages=turns)]) if chat else ():
        try:
            labels = encode(example, tokenizer, max_length=WHOLE)[-1].labels
        except DataError:  # a template that cannot be trained with may still be talked to
            continue
        trained = [label for label in labels if label != IGNORE]  # a line break may follow the mark, untrained
        added = {token for token, mark in tokenizer.added_tokens_decoder.items() if mark.special}
        ends |= set(trained[-1:]) & {*added, *tokenizer.all_special_ids}
    return sorted(ends)


@torch.no_grad()
def classify(model: Any, tokenizer, rows: Sequence[Mapping[str, Any]], **how: Any) -> torch.Tensor:
    """Logits [rows, labels] in float32 on the CPU, in the order of ``rows``."""
    check_room(model, tokenizer, row=longest(rows))

    def one(batch: dict[str, torch.Tensor], chosen: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        batch.pop("labels", None)
        return zip(chosen, model(**batch).logits.float().cpu(), strict=True)

    return torch.stack(_over_batches(one, rows, model, Collator(tokenizer), "classify", **how))


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """Evaluation mode inside, the former mode after; libraries keep their advice to themselves."""
    training = model.training
    model.eval()
    try:
        with quiet_libraries():
            yield
    finally:
        model.train(training)


def _folded_on_cpu(model: Any) -> AbstractContextManager:
    """On other devices a batch of whole rows costs less than merging, which moves W0 to the host and back."""
    return folded(model) if next(model.parameters()).device.type == "cpu" else nullcontext()


def _row_loss(logits: torch.Tensor, rows: Sequence[Mapping[str, Any]], kind: Kind) -> float:
    labels = torch.tensor([row["labels"] for row in rows])
    if kind == "classify":
        return F.cross_entropy(logits.double(), labels).item()
    return F.mse_loss(logits.double().squeeze(-1), labels.double()).item()


class _OwnNGrams(LogitsProcessor):
    """Forbids an n-gram to come twice among the tokens from ``start`` on; n = 0 forbids nothing."""

    def __init__(self, n: int, start: int) -> None:
        self.inner = NoRepeatNGramLogitsProcessor(n) if n else None
        self.start = start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores if self.inner is None else self.inner(input_ids[:, self.start :], scores)


def _over_batches(
    one: Callable[[dict[str, torch.Tensor], list[int]], Iterable[tuple[int, T]]],
    rows: Sequence[Mapping[str, Any]],
    model: Any,
    collate: Collator,
    label: str,
    *,
    sizes: Sequence[int] | None = None,
    batch_size: int = 16,
    console: Console | None = None,
    processes: Processes = ALONE,
) -> list[T]:
    """What ``one(batch, numbers of its rows)`` gives as (number, value), of all batches and processes, by number.

    Batches are of like length, longest first: little padding, and too little memory shows at once. ``sizes`` is what each
    row counts for in the bar.
    """
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]["input_ids"]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    device = next(model.parameters()).device
    sizes = sizes or [1] * len(rows)
    found: dict[int, T] = {}
    done = 0
    with progress_bar(console, label, sum(sizes)) if console else nullcontext() as update:
        for chosen in batches[processes.rank :: processes.world_size]:
            batch = collate([rows[row] for row in chosen])
            found.update(one({name: tensor.to(device) for name, tensor in batch.items()}, chosen))
            # The others are about as far as this process.
            done = min(sum(sizes), done + sum(sizes[row] for row in chosen) * processes.world_size)
            if update is not None:
                update(done)
    found = {number: value for part in processes.all_gather_object(found) for number, value in part.items()}
    return [found[number] for number in range(len(found))]
