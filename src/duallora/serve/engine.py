"""Models in memory, and one generation at a time.

Adapters of one base and one method share one copy of it. A single worker thread answers the requests in the order they
came, and sets the model to the one asked for before each: no request can see another's adapter.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import StoppingCriteria, StoppingCriteriaList

from duallora.config import Dtype
from duallora.errors import ConfigError
from duallora.ops.fold import folded
from duallora.store import adapters, untrusted
from duallora.store.adapters import adapter_kind
from duallora.store.models import load_tokenizer
from duallora.store.positions import UNLIMITED, positions
from duallora.tasks import Example, encode_prompt
from duallora.terminal import command, quiet_libraries
from duallora.train import evaluate

LOOK_AFTER = 0.5  # seconds between looks whether the client is still there
COLDEST = 1e-4  # temperatures below are greedy: logits divided by them would overflow
CUT_CHARACTER = "\ufffd"  # what a decoder writes for the first bytes of a character whose others are still to come


@dataclass(frozen=True)
class Served:
    """One model name that requests can ask for."""

    id: str
    model: Any
    tokenizer: Any
    adapter: str | None
    """PEFT's name of it; None for a model without adapters, or with all of them off."""
    method: str
    """"DUALLORA", "LORA", ... or "model"."""
    parent: str | None
    """The id of the base model of an adapter."""
    context: int
    """Tokens that prompt and answer may have together."""


@dataclass(frozen=True)
class Sampling:
    """How to generate: greedy where ``temperature`` is 0; ``stop`` holds texts that end the answer and are left out."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


class Finished(NamedTuple):
    """The last item of an answer: why it ended ("stop" or "length") and the tokens generated, the end mark included."""

    reason: str
    tokens: int


class Closing(Exception):
    """The server is stopping, so this answer was not finished."""


def load(sources: Mapping[str, str], *, dtype: Dtype = "auto", strict: bool = True) -> list[Served]:
    """What a server with these models (id -> run, adapter or model folder, hub id, ``builtin:``) offers, bases included.

    Adapters of the same method on the same base share it, and it is offered under its own name (its folder's, where it
    is a folder). One that changes its base for good, as trained biases do, has a base of its own that is not offered.

    Raises:
        ConfigError: two models of one id, or one that does not generate text.
        IntegrityError: a file is damaged, or an adapter belongs to another base.
    """
    served: list[Served] = []
    shared: dict[tuple[Any, ...], Any] = {}
    bases: dict[str, Served] = {}
    parents: dict[str, str] = {}  # id of a base -> where it comes from
    for name, source in sources.items():
        folder = adapters.find(source)
        if folder is None or not (folder / "adapter_config.json").is_file():
            kind = adapters.read_sidecar(folder).get("kind", "generate") if folder else "generate"
            _refuse_kind(source, kind)
            model, tokenizer = adapters.load_adapter(source, "generate", dtype=dtype)
            served.append(Served(name, model, tokenizer, None, "model", None, positions(model, tokenizer).length))
            continue
        config, recorded = untrusted.read(folder), adapters.read_sidecar(folder).get("base", {})
        _refuse_kind(source, adapter_kind(source))
        base = str(config.get("base_model_name_or_path") or recorded.get("name"))
        fingerprint = recorded.get("fingerprint") if strict else None
        weights = (base, config.get("revision"), recorded.get("dtype"), str(recorded.get("quantization")), fingerprint)
        shapes = adapters.check_adapter(folder)
        leaves_base = _leaves_base(config, shapes)
        key = (*weights, config.get("peft_type"), None if leaves_base else name)
        if key in shared:
            model, plain = shared[key]
            adapter = f"adapter_{len(model.peft_config)}"  # an id may hold dots, a module's name may not
            with quiet_libraries():
                adapters.attach(model, folder, shapes, adapter).eval()
            if dtype != "auto":  # PEFT gives new factors float32
                model.to(getattr(torch, dtype))
            tokenizer = adapters.own_tokenizer(folder) or plain
        else:
            model, tokenizer = adapters.load_adapter(source, "generate", dtype=dtype, strict=strict)
            plain = load_tokenizer(base, revision=config.get("revision"))  # not the first adapter's own
            shared[key], adapter = (model, plain), "default"
        context = positions(model, tokenizer).length
        parent = Path(base).name if Path(base).is_dir() else base
        if parents.setdefault(parent, base) != base:  # another folder of that name
            parent = base
        served.append(Served(name, model, tokenizer, adapter, str(config.get("peft_type")), parent, context))
        if leaves_base:
            context = positions(model.get_base_model(), plain).length
            bases.setdefault(parent, Served(parent, model, plain, None, "model", None, context))
    for base_served in bases.values():
        if all(base_served.id != entry.id for entry in served):
            served.append(base_served)
    return served


def _refuse_kind(source: str, kind: str) -> None:
    if kind != "generate":
        raise ConfigError(f"{source} was trained to {kind}: it has no text to serve. Use {command('eval', source)}")


def _leaves_base(config: Mapping[str, Any], tensors: Iterable[str]) -> bool:
    """Whether the base is itself again once the adapter is off.

    Not with trained biases, a base less the adapter's start (PiSSA and its like), new layers, or a base's own tensors.
    """
    start = config.get("init_lora_weights", True)
    subtracts = isinstance(start, str) and start != "gaussian"
    holds_base = any(adapters.BASE_LAYER in name for name in tensors)
    return config.get("bias", "none") == "none" and not (subtracts or holds_base or config.get("layer_replication"))


def prompt_ids(entry: Served, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a prompt, or of a chat up to where the assistant answers, exactly as in training.

    Raises DataError where the chat template refuses the chat, ConfigError where the tokenizer has none.
    """
    if isinstance(prompt, str):
        ids = encode_prompt(Example(prompt=prompt), entry.tokenizer, max_length=UNLIMITED)
        start = entry.tokenizer.bos_token_id
        return ids or [entry.tokenizer.eos_token_id if start is None else start]  # generation begins after something
    if not entry.tokenizer.chat_template:
        raise ConfigError(f"{entry.id} has no chat template, so it cannot chat; send the prompt to /v1/completions")
    asked = (*prompt, {"role": "assistant", "content": ""})
    return encode_prompt(Example(messages=asked, where="messages"), entry.tokenizer, max_length=UNLIMITED)


class Engine:
    """Answers requests for the models of ``served``, one at a time, in the order they came."""

    def __init__(self, served: Sequence[Served]) -> None:
        self.served = {entry.id: entry for entry in served}
        self.waiting = 0
        self.answered = 0
        self.generated = 0
        self.closing = threading.Event()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")
        self._present: Served | None = None
        self._folded = ExitStack()

    async def answer(
        self,
        entry: Served,
        ids: Sequence[int],
        ends: Sequence[int],
        sampling: Sampling,
        gone: Callable[[], Awaitable[bool]],
    ) -> AsyncIterator[str | Finished]:
        """The pieces of the answer to ``ids`` as they come, then one `Finished`; ends at once where ``gone()`` is true.

        Leaving the iteration stops the generation after its present token. Raises what the generation raised, and
        `Closing` where the server stops.
        """
        text = _Answer(entry.tokenizer, ends, sampling, self.closing)
        self.waiting += 1
        job = self._worker.submit(self._generate, entry, ids, ends, sampling, text)
        looked = asyncio.get_running_loop().time()
        try:
            while True:
                try:
                    item = await asyncio.wait_for(text.items.get(), LOOK_AFTER)
                except asyncio.TimeoutError:
                    item = ""
                if isinstance(item, BaseException):
                    raise item
                if item:
                    yield item
                if isinstance(item, Finished):
                    self.answered += 1
                    return
                now = asyncio.get_running_loop().time()
                if now - looked >= LOOK_AFTER:
                    looked = now
                    if await gone():
                        return
        finally:
            text.unwanted = True
            job.cancel()
            self.waiting -= 1

    def close(self) -> None:
        """Ends the generation under way at its next token and those that wait before they begin; unfolds the adapter."""
        self.closing.set()
        self._worker.shutdown(wait=True)
        self._present = None
        self._folded.close()

    def _generate(
        self, entry: Served, ids: Sequence[int], ends: Sequence[int], sampling: Sampling, text: _Answer
    ) -> None:
        try:
            if self.closing.is_set():
                raise Closing
            self._become(entry)
            torch.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
            settings = {**evaluate.NEUTRAL_GENERATION, "max_new_tokens": sampling.max_tokens}
            if sampling.temperature >= COLDEST:
                # top_k: transformers' own default would leave 50 tokens to choose from.
                settings |= {
                    "do_sample": True,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "top_k": 0,
                }
            row = torch.tensor([ids], device=entry.model.device)  # [1, prompt]
            pad = entry.tokenizer.pad_token_id
            with torch.no_grad():
                entry.model.generate(
                    input_ids=row,
                    attention_mask=torch.ones_like(row),
                    use_cache=True,
                    pad_token_id=ends[0] if pad is None else pad,
                    eos_token_id=list(ends),
                    stopping_criteria=StoppingCriteriaList([text]),
                    **settings,
                )
            text.end()
            self.generated += len(text.tokens)
            text.send(Closing() if self.closing.is_set() else text.finished())
        except BaseException as error:
            text.send(error)

    def _become(self, entry: Served) -> None:
        """Makes the model that of ``entry`` alone.

        A Dual LoRA adapter that folds bit for bit stays folded in until another is asked for: W' is not built anew in
        each step.
        """
        if entry is self._present:
            return
        self._present = None
        self._folded.close()
        with ExitStack() as stack:
            if isinstance(entry.model, PeftModel):
                if entry.adapter is None:
                    stack.enter_context(entry.model.disable_adapter())
                else:
                    entry.model.set_adapter(entry.adapter)
                    stack.enter_context(folded(entry.model))
            self._folded = stack.pop_all()
        self._present = entry


class _Answer(StoppingCriteria):
    """Turns tokens into text as they come, holds text back that may be the beginning of a stop text, and says when to stop.

    A criterion and not a streamer: some versions of transformers hand a token to the streamer only after the criteria
    were asked, which is one token too late for a stop text. Their text streamers also wait for the end of a word and
    drop a space that follows a line break with SentencePiece tokenizers: the pieces would not add up to the answer.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int], sampling: Sampling, closing: threading.Event) -> None:
        self.items: asyncio.Queue[str | Finished | BaseException] = asyncio.Queue()
        self.tokens: list[int] = []
        self.stopped = self.unwanted = False
        self._loop = asyncio.get_running_loop()
        self._tokenizer, self._ends, self._sampling, self._closing = tokenizer, frozenset(ends), sampling, closing
        self._context = self._read = 0  # tokens before _read are text already; those from _context decide its spaces
        self._held = ""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Takes the newest token of ``input_ids`` [1, length]; true [1] where it is to be the last."""
        if not self.ended() and len(self.tokens) < self._sampling.max_tokens:  # a check may come a step late on a GPU
            self.put(int(input_ids[0, -1]))
        enough = self.stopped or self.unwanted or self._closing.is_set()
        return torch.full((1,), enough, dtype=torch.bool, device=input_ids.device)

    def put(self, token: int) -> None:
        """The next token of the answer."""
        self.tokens.append(token)
        before, whole = self._texts()
        if len(whole) > len(before) and not whole.endswith(CUT_CHARACTER):
            self._context, self._read = self._read, len(self.tokens)
            self._take(whole[len(before) :])

    def end(self) -> None:
        """No further token comes."""
        before, whole = self._texts()
        self._take(whole[len(before) :])
        if not self.stopped:
            self.send(self._held)

    def ended(self) -> bool:
        """Whether the model ended the answer, or a stop text did."""
        return self.stopped or bool(self.tokens and self.tokens[-1] in self._ends)

    def finished(self) -> Finished:
        """Why the answer ended, once it has."""
        return Finished("stop" if self.ended() else "length", len(self.tokens))

    def send(self, item: str | Finished | BaseException) -> None:
        """Hands an item to the event loop, from the thread that generates."""
        self._loop.call_soon_threadsafe(self.items.put_nowait, item)

    def _texts(self) -> tuple[str, str]:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = self._tokenizer.decode(self.tokens[self._context : self._read], **options)
        return before, self._tokenizer.decode(self.tokens[self._context :], **options)

    def _take(self, text: str) -> None:
        if self.stopped:
            return
        self._held += text
        found = [at for stop in self._sampling.stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self.send(self._held[: min(found)])
            return
        longest = max((len(stop) - 1 for stop in self._sampling.stop), default=0)
        kept = next(
            size
            for size in range(min(longest, len(self._held)), -1, -1)
            if size == 0 or any(stop.startswith(self._held[-size:]) for stop in self._sampling.stop)
        )
        self.send(self._held[: len(self._held) - kept])
        self._held = self._held[len(self._held) - kept :]
