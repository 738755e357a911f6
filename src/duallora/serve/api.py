"""OpenAI's protocol over an `Engine`: /v1/models, /v1/chat/completions, /v1/completions; a page at /, /health.

What a request asks for is done or refused by name: a parameter that would change the answer is never ignored.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from duallora.console import exit_code_for
from duallora.errors import ConfigError, DataError
from duallora.serve.engine import Closing, Engine, Finished, Sampling, Served, prompt_ids
from duallora.train.evaluate import end_tokens

logger = logging.getLogger(__name__)

BODY_LIMIT = 1 << 20  # bytes of a request
WAITING_LIMIT = 32  # requests that wait or are answered
CHAT_TOKENS = 512  # where a chat names no limit: a small model that does not stop would fill its context
COMPLETION_TOKENS = 16  # OpenAI's own default

# Parameters that say nothing about the answer.
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Parameters that are known but not done here, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_whole)]


class StreamOptions(BaseModel):
    """What a stream tells besides the answer."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = False


class Asked(BaseModel):
    """What both kinds of request may hold; the ranges are OpenAI's."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class Part(BaseModel):
    """A piece of a message; only text can be read here."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A turn of a chat. What clients send back of earlier answers (refusal, annotations) is left aside."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    tool_calls: None = None
    function_call: None = None
    audio: None = None

    def plain(self) -> dict[str, str]:
        """{"role", "content"} as chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatAsked(Asked):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class CompletionAsked(Asked):
    """POST /v1/completions: one prompt, as text or as token ids."""

    prompt: (
        Text | Annotated[list[Text], Field(min_length=1, max_length=1)] | Annotated[list[int], Field(min_length=1)]
    ) = ""


class Refused(Exception):
    """An error in OpenAI's form."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        """The error as an answer of its own."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.status == 503:
            headers = {"Retry-After": "2"}
        return JSONResponse(self.body, self.status, headers)


def create_app(
    engine: Engine,
    *,
    api_key: str | None = None,
    only_host: str | None = None,
    log: Callable[[str], None] | None = None,
) -> FastAPI:
    """The application over ``engine``.

    ``only_host`` is the loopback address it is bound to: requests that name another host, or that a page of another
    origin sends, are refused, so that no web site the user visits can reach the models. None accepts every name.
    ``log`` gets a line per answer, without its text. The engine is closed with the application.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(title="duallora", openapi_url=None, lifespan=lifespan)  # FastAPI's own pages load scripts from a CDN
    created = int(time.time())
    page = (files("duallora.serve") / "page.html").read_text(encoding="utf-8")
    page_headers = {"Content-Security-Policy": _policy(page), "X-Content-Type-Options": "nosniff"}

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=page_headers)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": engine.waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(entry, created) for entry in engine.served.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _model(_served(engine, name), created)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatAsked, request: Request) -> Response:
        entry = _served(engine, asked.model)
        _refuse_unknown(asked)
        if asked.max_tokens and asked.max_completion_tokens and asked.max_tokens != asked.max_completion_tokens:
            raise Refused(
                400,
                f"max_tokens={asked.max_tokens} and max_completion_tokens={asked.max_completion_tokens} disagree: send one",
                param="max_tokens",
            )
        messages = [message.plain() for message in asked.messages]
        limit = asked.max_completion_tokens or asked.max_tokens
        return await _answer(engine, entry, asked, messages, limit, CHAT_TOKENS, request, log)

    @app.post("/v1/completions")
    async def completion(asked: CompletionAsked, request: Request) -> Response:
        entry = _served(engine, asked.model)
        _refuse_unknown(asked)
        prompt = asked.prompt
        if isinstance(prompt, list) and isinstance(prompt[0], str):
            prompt = prompt[0]
        return await _answer(engine, entry, asked, prompt, asked.max_tokens, COMPLETION_TOKENS, request, log)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        what = {404: f"there is no {request.url.path} here", 405: f"{request.url.path} does not take {request.method}"}
        return Refused(error.status_code, what.get(error.status_code, str(error.detail))).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _invalid(error.errors()).response()

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return _failed(error).response()

    app.add_middleware(_Guard, api_key=api_key, only_host=only_host)
    return app


async def _answer(
    engine: Engine,
    entry: Served,
    asked: Asked,
    prompt: Any,
    limit: int | None,
    default_limit: int,
    request: Request,
    log: Callable[[str], None] | None,
) -> Response:
    """The response to a chat (``prompt`` is its messages) or a completion (a text or token ids)."""
    is_chat = isinstance(asked, ChatAsked)
    ids = _ids(entry, prompt)
    room = entry.context - len(ids)
    if room < (limit or 1):
        raise Refused(
            400,
            f"the model's context is {entry.context} tokens, but the request needs {len(ids) + (limit or 1)}: "
            f"{len(ids)} of the prompt and {limit or 1} of the answer. Shorten the prompt or lower max_tokens",
            param="messages" if is_chat else "prompt",
            code="context_length_exceeded",
        )
    if engine.waiting >= WAITING_LIMIT:
        raise Refused(503, f"{engine.waiting} requests are waiting already; try again later", code="busy")
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    sampling = Sampling(
        limit or min(default_limit, room),
        1.0 if asked.temperature is None else asked.temperature,
        1.0 if asked.top_p is None else asked.top_p,
        stop,
        asked.seed,
    )
    ends = end_tokens(entry.model, entry.tokenizer, chat=is_chat)
    pieces = _timed(engine.answer(entry, ids, ends, sampling, request.is_disconnected), entry, log)
    name = "chat.completion" if is_chat else "text_completion"
    head = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": f"{name}.chunk" if is_chat and asked.stream else name,
        "created": int(time.time()),
        "model": entry.id,
    }
    if asked.stream:
        include_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return StreamingResponse(
            _events(pieces, head, is_chat, len(ids), include_usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
    text, finished = "", None
    try:
        async for piece in pieces:
            if isinstance(piece, Finished):
                finished = piece
            else:
                text += piece
    except Exception as error:
        raise _failed(error) from error
    if finished is None:
        return Response(status_code=499)  # the client has gone: nobody reads this
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finished.reason}
    choice |= {"message": {"role": "assistant", "content": text, "refusal": None}} if is_chat else {"text": text}
    return JSONResponse({**head, "choices": [choice], "usage": _usage(len(ids), finished)})


async def _events(
    pieces: AsyncIterator[str | Finished], head: dict[str, Any], is_chat: bool, prompt_tokens: int, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events of a streamed answer, [DONE] last; an error that comes too late for a status is an event."""

    def chunk(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        more = {"usage": usage} if include_usage else {}
        return f"data: {json.dumps({**head, 'choices': choices, **more})}\n\n"

    def choice(text: str | None, reason: str | None, **more: str) -> dict[str, Any]:
        content = {} if text is None else {"content": text}
        says = {"delta": {**more, **content}} if is_chat else {"text": text or ""}
        return {"index": 0, **says, "logprobs": None, "finish_reason": reason}

    try:
        if is_chat:
            yield chunk([choice("", None, role="assistant")])
        async for piece in pieces:
            if not isinstance(piece, Finished):
                yield chunk([choice(piece, None)])
                continue
            yield chunk([choice(None, piece.reason)])
            if include_usage:
                yield chunk([], _usage(prompt_tokens, piece))
            yield "data: [DONE]\n\n"
    except Exception as error:
        yield f"data: {json.dumps(_failed(error).body)}\n\n"


async def _timed(
    pieces: AsyncIterator[str | Finished], entry: Served, log: Callable[[str], None] | None
) -> AsyncIterator[str | Finished]:
    """The same pieces; a line to ``log`` once they have ended."""
    began, tokens, how = time.monotonic(), 0, "given up by the client"
    try:
        async with aclosing(pieces) as open_pieces:  # type: ignore[type-var]
            async for piece in open_pieces:
                if isinstance(piece, Finished):
                    tokens, how = piece.tokens, piece.reason
                yield piece
    except Exception:
        how = "failed"
        raise
    finally:
        if log is not None:
            log(f"{entry.id}: {tokens} tokens in {time.monotonic() - began:.1f} s ({how})")


def _ids(entry: Served, prompt: Any) -> list[int]:
    if isinstance(prompt, list) and isinstance(prompt[0], int):
        vocabulary = entry.model.get_input_embeddings().num_embeddings
        outside = next((token for token in prompt if not 0 <= token < vocabulary), None)
        if outside is not None:
            raise Refused(400, f"prompt: token {outside} is none of the {vocabulary} of the model", param="prompt")
        return prompt
    try:
        return prompt_ids(entry, prompt)
    except (ConfigError, DataError) as error:
        param, code = ("prompt", None) if isinstance(prompt, str) else ("messages", "invalid_chat")
        raise Refused(400, str(error), param=param, code=code) from error


def _served(engine: Engine, name: str) -> Served:
    if name not in engine.served:
        raise Refused(
            404,
            f"no model {name!r} here; served are {', '.join(engine.served)}",
            param="model",
            code="model_not_found",
        )
    return engine.served[name]


def _refuse_unknown(asked: Asked) -> None:
    """Refused for what would change the answer and is not done here, and for what no one knows."""
    for name, value in (asked.model_extra or {}).items():
        if value is None or name in WITHOUT_EFFECT:
            continue
        if name not in NEUTRAL:
            known = [*type(asked).model_fields, *NEUTRAL]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise Refused(400, f"unknown parameter {name!r}{hint}", param=name, code="unknown_parameter")
        # By type too: False == 0, but logprobs=0 asks for something.
        if not any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]):
            allowed = " or ".join(json.dumps(neutral) for neutral in NEUTRAL[name]) or "null"
            raise Refused(
                400,
                f"{name}={json.dumps(value)[:80]} is not supported here; leave it out, or send {allowed}",
                param=name,
                code="unsupported_parameter",
            )


def _invalid(errors: Any) -> Refused:
    """The fault of a request body, by where it stands: of a value of several forms, of the form it comes nearest to."""
    fault = max(errors, key=lambda error: len(error["loc"]))
    parts = [str(part) for part in fault["loc"] if part not in ("body", "str")]
    where = ".".join(part for part in parts if part.isidentifier() or part.isdecimal())  # not "list[str]" and its like
    if fault["type"] == "json_invalid":
        return Refused(400, f"the body is not JSON (character {where}): {fault['ctx']['error']}")
    if not where:
        return Refused(400, "the body must be a JSON object, sent with Content-Type: application/json")
    return Refused(400, f"{where}: {fault['msg']}", param=where)


def _failed(error: Exception) -> Refused:
    if isinstance(error, Refused):
        return error
    if isinstance(error, Closing):
        return Refused(503, "the server is stopping", code="stopping")
    if exit_code_for(error) == 8:
        return Refused(500, "out of memory; shorten the prompt or lower max_tokens", code="out_of_memory")
    logger.error("generation failed", exc_info=error)
    first = (str(error).strip().splitlines() or [""])[0]
    return Refused(500, f"generation failed: {type(error).__name__}: {first}", code="generation_failed")


def _model(entry: Served, created: int) -> dict[str, Any]:
    return {
        "id": entry.id,
        "object": "model",
        "created": created,
        "owned_by": "duallora",
        "parent": entry.parent,
        "method": entry.method,
        "chat": bool(entry.tokenizer.chat_template),
        "context": entry.context,
    }


def _usage(prompt_tokens: int, finished: Finished) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": finished.tokens,
        "total_tokens": prompt_tokens + finished.tokens,
    }


def _policy(page: str) -> str:
    """A Content-Security-Policy under which only the page's own script and style run, and it talks to this server alone."""

    def hashed(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found
        )

    return (
        f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Guard:
    """Before the application: who may ask, from where, and how much they may send."""

    def __init__(self, app: Any, *, api_key: str | None, only_host: str | None) -> None:
        self.app, self.api_key = app, api_key
        self.hosts = None if only_host is None else {"localhost", "127.0.0.1", "::1", only_host}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = self._refusal(scope["path"], Headers(scope=scope))
        if error is not None:
            await error.response()(scope, receive, send)
            return
        received = 0

        async def limited() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > BODY_LIMIT:  # sent in chunks, without a length
                raise HTTPException(413, _too_long(received))
            return message

        await self.app(scope, limited, send)

    def _refusal(self, path: str, headers: Mapping[str, str]) -> Refused | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts is not None:
            if _hostname(host) not in self.hosts:
                return Refused(403, f"this server answers on {', '.join(sorted(self.hosts))} only, not {host!r}")
            if origin is not None and urlsplit(origin).netloc != host:
                return Refused(403, f"pages of {origin} may not use this server")
        if self.api_key is not None and path.startswith("/v1/"):
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode("latin-1"), self.api_key.encode()):
                return Refused(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > BODY_LIMIT:
            return Refused(413, _too_long(int(length)))
        return None


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _too_long(length: int) -> str:
    return f"the request has {length} bytes or more; at most {BODY_LIMIT} are read"
