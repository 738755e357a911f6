"""How good a model is on a task: the loss on its answers, and the task's own metrics on what it generates or predicts.

Also the one place that loads an adapter for use, and refuses one that is damaged or belongs to another base model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, NoRepeatNGramLogitsProcessor

from duallora.errors import ConfigError, DataError, IntegrityError, NonFiniteError
from duallora.methods.rule import reads_labels
from duallora.ops.fold import folded
from duallora.tasks import IGNORE, Collator, Example, Task, encode, encode_prompt, encode_split, metrics
from duallora.tasks.chats import calls_tools
from duallora.tasks.encode import with_written_answer
from duallora.tasks.task import Kind
from duallora.train import untrusted
from duallora.train.checkpoint import compare_files
from duallora.train.launch import ALONE, Processes
from duallora.train.models import load_config, load_model, weights_fingerprint
from duallora.train.positions import check_room, positions
from duallora.train.progress import command, progress_bar, quiet_libraries
from duallora.train.record import read_json

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
WEIGHTS = "adapter_model.safetensors"
BASE_LAYER = ".base_layer."  # in the name of a tensor that is the base model's own
SIDECAR = "duallora.json"  # what the adapter was trained on and with, beside its weights


class Trained(NamedTuple):
    """What a model was trained to do, and its classes by id: none for other kinds, or where they have no names."""

    kind: Kind
    labels: tuple[str, ...] = ()


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
    predictions: list[Any]
    with inference(model), _folded_on_cpu(model):
        if scoring == "likelihood":
            predictions, values, answers = choose(
                model, tokenizer, task, examples, rows, max_length=max_length, **shared
            )
            values |= _losses(answers, split)
            return EvalResult(values, predictions, examples, _joined(notes), answers, counts.truncated)
        answers = []
        if task.kind == "generate":
            answers = _answers(log_likelihoods(model, tokenizer, rows, **shared), rows)
            losses = _losses(answers, split)  # before the long part
            answers = _by_example(answers, counts.examples)
            settings = {**task.generation, **(generation or {})}
            texts = generate(model, tokenizer, examples, max_length=max_length, **shared, **settings)
            predictions = [_answer(task, text, example) for text, example in zip(texts, examples, strict=True)]
        else:
            logits = classify(model, tokenizer, rows, **shared)
            losses = {"loss": _finite(_row_loss(logits, rows, task.kind), split)}
            predictions = logits.argmax(-1).tolist() if task.kind == "classify" else logits.squeeze(-1).tolist()
    more: dict[str, float] = {}
    if task.programs is not None:
        programs = task.programs
        more, note = processes.from_main(lambda: programs(predictions, examples))
        notes.append(note)
    values = {**task.metrics(predictions, examples), **more, **losses}
    return EvalResult(values, predictions, examples, _joined(notes), answers, counts.truncated)


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
    if task.kind == "generate" and scoring == "generation":
        new = {**NEUTRAL_GENERATION, **task.generation, **(generation or {})}["max_new_tokens"]
    if max_length + new <= positions(model, tokenizer).length:
        return ""
    if scoring == "likelihood" and task.options is not None:
        examples = [replace(example, answer=option) for example in examples for option in task.options(example)]
    rows, _ = encode_split(examples, tokenizer, task.kind, max_length=max_length)
    prompts = [encode_prompt(example, tokenizer, max_length=max_length) for example in examples if new]
    return check_room(
        model, tokenizer, row=longest(rows), prompt=max((len(prompt) for prompt in prompts), default=0), new=new
    )


def longest(rows: Sequence[Mapping[str, Any]]) -> int:
    """Tokens of the longest row."""
    return max(len(row["input_ids"]) for row in rows)


def _joined(notes: Sequence[str]) -> str:
    return "; ".join(filter(None, notes))


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


def loss_on(
    model: Any,
    tokenizer,
    rows: Sequence[Mapping[str, Any]],
    kind: Kind,
    *,
    batch_size: int = 16,
    console: Console | None = None,
    processes: Processes = ALONE,
) -> float:
    """The loss alone, over rows of `encode_split`: per trained token (generate) or per row.

    The same to the bit in one process and in several, which share the batches out.
    """
    shared: dict[str, Any] = {"batch_size": batch_size, "console": console, "processes": processes}
    with inference(model), _folded_on_cpu(model):
        if kind == "generate":
            return answer_loss(model, tokenizer, rows, **shared)
        return _row_loss(classify(model, tokenizer, rows, **shared), rows, kind)


def select(task: Task, split: str, limit: int | None = None) -> list[Example]:
    """The first ``limit`` examples of a split; ConfigError where there is no such split, DataError where it is empty."""
    if split not in task.splits:
        raise ConfigError(f"{task.name} has no split {split!r}; it has {', '.join(task.splits) or 'none'}")
    examples = list(task.splits[split][:limit])
    if not examples:
        raise DataError(f"the {split} split of {task.source or task.name} is empty: there is nothing to evaluate")
    return examples


def answer_loss(
    model: Any,
    tokenizer,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 16,
    console: Console | None = None,
    processes: Processes = ALONE,
) -> float:
    """Mean cross entropy per trained token, in nats, every token of every row weighing the same."""
    shared: dict[str, Any] = {"batch_size": batch_size, "console": console, "processes": processes}
    return metrics.get("loss").value(_answers(log_likelihoods(model, tokenizer, rows, **shared), rows), ())


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


def log_likelihoods(
    model: Any,
    tokenizer,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 16,
    console: Console | None = None,
    processes: Processes = ALONE,
) -> list[float]:
    """The log-likelihood of each row's trained tokens given what stands before them, in nats, in the order of ``rows``.

    Rows that differ in their last token alone, or end where another goes on, share one pass through the model: the
    options of a question cost hardly more than one answer.
    """
    check_room(model, tokenizer, row=longest(rows))
    collate = Collator(tokenizer)
    guests = _sharing(rows)
    hosts = list(guests)
    batches = [
        [hosts[index] for index in batch]
        for batch in _by_length([len(rows[host]["input_ids"]) for host in hosts], batch_size)
    ]
    found: dict[int, float] = {}
    seen = reads_labels(model)
    with torch.no_grad(), _bar(console, "loss", len(rows), processes) as advance:
        for _, chosen in _own(batches, processes):
            batch = _on_device(collate([rows[host] for host in chosen]), model)
            length = batch["labels"].shape[1]
            if not seen:
                batch.pop("labels")
            # Virtual tokens stand before the text's own.
            logits = model(**batch).logits[:, -length:-1]
            # (place in the batch, position, token, row) of each trained token.
            wanted = [
                (place, position, label, row)
                for place, host in enumerate(chosen)
                for row in guests[host]
                for position, label in enumerate(rows[row]["labels"][1:])
                if label != IGNORE
            ]
            places, positions, labels, owners = zip(*wanted, strict=True)
            # Only the trained positions are widened to float32: [trained, vocabulary], not [batch, length, vocabulary].
            scores = logits[list(places), list(positions)].float()
            losses = F.cross_entropy(scores, torch.tensor(labels, device=scores.device), reduction="none").tolist()
            for owner, loss in zip(owners, losses, strict=True):
                found[owner] = found.get(owner, 0.0) - loss
            advance(sum(len(guests[host]) for host in chosen))
    found = _united(found, processes)
    return [found[row] for row in range(len(rows))]


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
    calls = [example for example in chats if calls_tools(example)]  # which some templates end with a mark of its own
    ends = end_tokens(model, tokenizer, chat=bool(chats), examples=[*chats[:1], *calls[:1]])
    if settings.get("stop_strings"):
        settings["tokenizer"] = tokenizer
    texts: dict[int, str] = {}
    batches = _by_length([len(prompt["input_ids"]) for prompt in prompts], batch_size)
    # A decoding step multiplies few rows, so building W' anew in each would cost more than the step itself.
    with torch.no_grad(), folded(model), _bar(console, "generate", len(prompts), processes) as advance:
        for _, chosen in _own(batches, processes):
            batch = _on_device(collate([prompts[index] for index in chosen]), model)
            output = model.generate(
                **batch,
                use_cache=True,
                pad_token_id=collate.fill["input_ids"],
                eos_token_id=ends,
                no_repeat_ngram_size=0,
                logits_processor=LogitsProcessorList([_OwnNGrams(own_ngrams, batch["input_ids"].shape[1])]),
                **settings,
            )
            answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, answer in zip(chosen, answers, strict=True):
                texts[index] = answer
            advance(len(chosen))
    texts = _united(texts, processes)
    return [texts[index] for index in range(len(prompts))]


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


def classify(
    model: Any,
    tokenizer,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 16,
    console: Console | None = None,
    processes: Processes = ALONE,
) -> torch.Tensor:
    """Logits [rows, labels] in float32 on the CPU, in the order of ``rows``."""
    check_room(model, tokenizer, row=longest(rows))
    collate = Collator(tokenizer)
    batches = _by_length([len(row["input_ids"]) for row in rows], batch_size)
    logits: dict[int, torch.Tensor] = {}
    with torch.no_grad(), _bar(console, "classify", len(rows), processes) as advance:
        for _, chosen in _own(batches, processes):
            batch = _on_device(collate([rows[index] for index in chosen]), model)
            batch.pop("labels", None)
            for index, row in zip(chosen, model(**batch).logits.float().cpu(), strict=True):
                logits[index] = row
            advance(len(chosen))
    logits = _united(logits, processes)
    return torch.stack([logits[index] for index in range(len(rows))])


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


def load_adapter(
    source: str | Path,
    kind: Kind,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    strict: bool = True,
    base: str | None = None,
    quantized: bool = True,
) -> tuple[Any, Any]:
    """(model, tokenizer) from a run folder, an adapter folder, a model's folder, a hub id or ``builtin:``.

    ``dtype="auto"`` is the type the adapter, or the model itself, was trained in. ``strict=False`` accepts another base model than the one
    recorded; missing, unexpected or damaged weights are never accepted. ``base`` stands in for the base model's name
    where the adapter's own leads nowhere here. ``quantized=False`` loads an adapter trained on a base that was quantised
    as it was loaded (``model.quantization``) on the unquantised base, whose weights are then not those recorded.

    Raises:
        ConfigError: nothing of the kind is there, or it was trained for another kind of task.
        IntegrityError: a file is missing, damaged, not safetensors, or belongs to another base model.
    """
    with quiet_libraries():
        folder = find(source)
        if folder is None:
            model, tokenizer = load_model(str(source), kind, dtype=dtype)
        elif not _is_adapter(folder):
            sidecar = read_sidecar(folder)
            if ("generate" in (kind, sidecar.get("kind", kind))) and sidecar.get("kind", kind) != kind:
                raise ConfigError(f"{folder} was trained to {sidecar['kind']}, this task needs a model to {kind}")
            _compare_with_recorded(folder, sidecar)
            labels = len(sidecar.get("labels", ())) or None
            if dtype == "auto":
                dtype = sidecar.get("base", {}).get("dtype", dtype)
            model, tokenizer = load_model(str(folder), kind, dtype=dtype, num_labels=labels)
        else:
            model, tokenizer = _load_adapter(folder, kind, dtype, strict, base, quantized)
    return model.to(default_device()).eval(), tokenizer


def find(source: str | Path) -> Path | None:
    """The folder that holds the adapter or merged model; None where ``source`` is a built-in or full hub model."""
    if str(source).startswith("builtin:"):
        return None
    path = Path(source)
    if path.is_dir():
        for folder in (path, path / "adapter", path / "model"):
            if any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
                return folder
        if (path / "run.json").is_file():
            status = read_json(path / "run.json").get("status")
            raise ConfigError(
                f"{path} is a run folder without a finished adapter or model (status: {status}); "
                f"finish it with: {command('train', '-c', path / 'recipe.yaml', '--resume', 'auto')}"
            )
        raise ConfigError(f"{path} holds neither adapter_config.json nor config.json: expected a run, adapter or model")
    if path.exists() or path.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1:
        raise ConfigError(
            f"{source}: no such folder; expected a run, an adapter, a merged model or a hub id (org/name)"
        )
    return _from_hub(str(source))


def read_sidecar(folder: Path) -> dict[str, Any]:
    """``duallora.json`` of an adapter or merged model; empty where a tool other than this one wrote the folder."""
    path = folder / SIDECAR
    if not path.is_file():
        return {}
    try:
        return dict(read_json(path))
    except (ValueError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"{path} is damaged ({error}); restore it, or delete it to load without its checks"
        ) from None


def trained_for(source: str | Path) -> Trained | None:
    """What a run, a checkpoint of it, an adapter or a classifier was trained for; None where its files do not say.

    Raises as `find` and `load_config` do.
    """
    folder = find(source)
    told = read_sidecar(folder) if folder else {}
    if folder is not None and "kind" not in told:  # a checkpoint: what its run has recorded
        run = next((place / "run.json" for place in folder.parents[:2] if (place / "run.json").is_file()), None)
        told = read_json(run).get("data", {}) if run else {}
    if told.get("kind") in get_args(Kind):
        return Trained(told["kind"], tuple(told.get("labels", ())))
    if folder is not None and _is_adapter(folder):
        return None
    config = load_config(str(folder or source))
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return None
    names = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    if len(names) == 1:
        return Trained("regress")
    return Trained("classify", () if are_stand_ins(names) else names)


def are_stand_ins(names: Sequence[str]) -> bool:
    """Whether these are the names that transformers gives to classes that have none."""
    return all(name == f"LABEL_{index}" for index, name in enumerate(names))


def default_device() -> torch.device:
    """The accelerator torch sees, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def head_modules(model: Any) -> list[str]:
    """Top-level modules with weights outside the pretrained trunk: a classifier, a score, DeBERTa's pooler."""
    trunk = getattr(model, "base_model_prefix", "")
    return [
        name for name, child in model.named_children() if name != trunk and next(child.parameters(), None) is not None
    ]


def _load_adapter(
    folder: Path, kind: Kind, dtype: str, strict: bool, other: str | None, quantized: bool
) -> tuple[Any, Any]:
    sidecar = read_sidecar(folder)
    shapes = check_adapter(folder)
    config = read_config(folder)
    wanted = {"generate": "CAUSAL_LM"}.get(kind, "SEQ_CLS")
    if config.task_type not in (None, wanted):
        raise ConfigError(f"{folder} was trained for {config.task_type}, this task needs {wanted} ({kind})")
    base = sidecar.get("base", {})
    name = other or config.base_model_name_or_path or base.get("name")
    if not name:
        raise ConfigError(f"{folder / 'adapter_config.json'} names no base model: set base_model_name_or_path")
    num_labels = None
    if kind != "generate":
        num_labels = len(sidecar.get("labels", ())) or _labels_of_head(shapes, kind)
    model, tokenizer = load_model(
        name,
        kind,
        dtype=base.get("dtype", dtype),
        num_labels=num_labels,
        revision=None if other else config.revision,
        quantization=base.get("quantization") if quantized else None,
    )
    if sidecar.get("labels"):
        set_labels(model, sidecar["labels"])
    expected = base.get("fingerprint")
    if strict and expected and (quantized or not base.get("quantization")):
        found = weights_fingerprint(model)
        if found != expected:
            raise IntegrityError(
                f"{folder} was trained on a base model with the weights {expected[:16]}..., but {name} has "
                f"{found[:16]}...; load it on the model it was trained on, or pass --lenient (strict=False in Python) to try it on this one"
            )
    adapted = attach(model, folder, shapes)
    if dtype != "auto":
        adapted = adapted.to(getattr(torch, dtype))
    return adapted, own_tokenizer(folder) or tokenizer


def attach(model: Any, folder: Path, shapes: Mapping[str, tuple[int, ...]], name: str = "default") -> PeftModel:
    """Puts an adapter whose ``shapes`` `check_adapter` gave onto a model, or under another name beside those it has.

    Raises:
        ConfigError: the module patterns are no regular expressions, or match for ever.
        IntegrityError: a tensor is missing, unexpected, or of a shape that does not fit the model.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = [module for module, _ in inner.named_modules()]
    untrusted.check_patterns(untrusted.read(folder), modules, folder / "adapter_config.json")
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, config=read_config(folder))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).splitlines())[:300]
        raise IntegrityError(f"{folder / WEIGHTS} does not fit {inner.config._name_or_path}: {reason}") from error
    _check_tensors(folder, shapes, model, name)
    return model


def set_labels(model: Any, labels: Sequence[str]) -> None:
    """Names the classes in the model's own config, so that a pipeline prints them."""
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}


def check_adapter(folder: Path) -> dict[str, tuple[int, ...]]:
    """`check_files`, and that the configuration asks for nothing the tensors do not hold."""
    shapes = check_files(folder, read_sidecar(folder))
    untrusted.check(untrusted.read(folder), shapes, folder / "adapter_config.json")
    return shapes


def check_files(folder: Path, sidecar: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors by name, after the recorded sizes and hashes have been compared.

    Raises IntegrityError naming the file that is missing, damaged, strange or no safetensors file.
    """
    weights = folder / WEIGHTS
    if not weights.is_file():
        pickled = folder / "adapter_model.bin"
        if pickled.is_file():
            raise IntegrityError(
                f"{pickled} is a pickle, which can run code when it is read; only {WEIGHTS} is accepted. "
                "Ask for the adapter in safetensors form, or convert it on a machine you can afford to lose"
            )
        raise IntegrityError(f"{weights} is missing: the adapter has no weights")
    _compare_with_recorded(folder, sidecar)
    try:
        with safe_open(weights, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except (SafetensorError, OSError, ValueError) as error:
        raise IntegrityError(f"{weights} is not a whole safetensors file ({error}); take a fresh copy of it") from None


def _compare_with_recorded(folder: Path, sidecar: Mapping[str, Any]) -> None:
    # Conversions lie in folders of their own inside the adapter's; nothing that loads the adapter looks there.
    inside = tuple(path.parent for path in folder.glob("*/adapter_config.json"))
    reason = compare_files(folder, sidecar.get("files", {}), ignore=inside) if sidecar.get("files") else None
    if reason:
        raise IntegrityError(
            f"{folder}: {reason}; take a fresh copy of the {'adapter' if _is_adapter(folder) else 'model'}"
        )


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def read_config(folder: Path) -> PeftConfig:
    """``adapter_config.json``; IntegrityError where it is unreadable or of a kind PEFT does not know."""
    path = folder / "adapter_config.json"
    untrusted.read(folder)  # bounded first: PEFT parses whatever is there
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{path} cannot be used ({type(error).__name__}: {error})") from error


def _check_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]], model: PeftModel, adapter: str) -> None:
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    embeddings = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=True)
    missing, unexpected = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    # PEFT also stores the base's embeddings where they are adapted, and reads them back into the base.
    unexpected = [name for name in unexpected if BASE_LAYER not in name or name not in embeddings]
    if missing or unexpected:
        parts = [
            f"{len(names)} {what} (first: {names[0]})"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise IntegrityError(
            f"{folder / WEIGHTS} does not hold the tensors of its configuration: {', '.join(parts)}; "
            "it belongs to another base model or configuration, or was cut"
        )
    wrong = [name for name, shape in wanted.items() if shapes[name] != shape]
    if wrong:
        raise IntegrityError(
            f"{folder / WEIGHTS}: {wrong[0]} is {list(shapes[wrong[0]])}, expected {list(wanted[wrong[0]])}"
        )


def _labels_of_head(shapes: Mapping[str, tuple[int, ...]], kind: Kind) -> int | None:
    """Classes of a head saved by a tool that wrote no sidecar: the rows of its last weight matrix."""
    heads = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2 and name.rpartition(".")[0].split(".")[-1] in ("classifier", "score", "out_proj")
    ]
    return heads[-1][0] if heads else (1 if kind == "regress" else None)


def own_tokenizer(folder: Path) -> Any:
    """The tokenizer saved with the adapter, if any: it may hold tokens or a template the base's lacks."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(f"the tokenizer in {folder} cannot be read: {error}") from error


def _from_hub(repository: str) -> Path | None:
    """The local copy of a hub adapter: configuration, safetensors, tokenizer, and whatever else its sidecar lists.

    None where the hub holds a full model.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(patterns: list[str]) -> None:
        # Offline the cache may lack some: loading says what must not be missing.
        with suppress(LocalEntryNotFoundError):
            snapshot_download(repository, revision=folder.name, allow_patterns=patterns)

    try:
        folder = Path(hf_hub_download(repository, "adapter_config.json")).parent
        fetch(["*.json", WEIGHTS, "*.txt", "*.model"])
        fetch(_listed_files(folder))
        return folder
    except EntryNotFoundError:  # also offline, where the cache holds no such adapter: it may hold a full model
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{repository}: no such folder, and the hub cannot give it: {reason}") from None


def _listed_files(folder: Path) -> list[str]:
    """What the sidecar lists, as patterns that match these very names."""
    return [escape(name) for name in map(str, read_sidecar(folder).get("files", ())) if Path(name).name == name]


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


def _by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of like length, longest first: little padding, and too little memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _own(batches: Sequence[list[int]], processes: Processes) -> list[tuple[int, list[int]]]:
    """(number, batch) of this process's share of the batches."""
    return list(enumerate(batches))[processes.rank :: processes.world_size]


def _united(own: dict[int, T], processes: Processes) -> dict[int, T]:
    """What all processes have found, by number."""
    return {number: value for part in processes.all_gather_object(own) for number, value in part.items()}


def _on_device(batch: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


@contextmanager
def _bar(console: Console | None, label: str, total: int, processes: Processes) -> Iterator[Any]:
    if console is None:
        yield lambda count: None
        return
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done = min(total, done + count * processes.world_size)  # the others are about as far as this process
        update(done)

    with progress_bar(console, label, total) as update:
        yield advance
