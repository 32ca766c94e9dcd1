"""What the routes share: reading a body, checking it against what is served, building the engine's
requests from it."""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from configs.logs import PROMPTS
from engine.client import EngineClient
from engine.protocol import EngineInfo
from scheduler.request import InvalidRequest, Request, SamplingParams, build
from server import __version__
from server.errors import ApiError, invalid, unsupported
from server.fields import check_extra, one_max_tokens, printable
from server.generate import Generation, TextOptions
from server.lifecycle import Lifecycle
from server.logprobs import Wording
from server.metrics import Metrics
from server.queue_bound import QueueBound
from server.queue_positions import QueuePositions
from server.reading import AnswerReader, ChatParsers, ParserNames
from server.schemas import Body, ChatBody, CompletionBody, GenerationBody, Limits, parse
from server.spans import Spans
from server.sse import Envelope, UsageOptions
from server.structured import grammar_of
from server.tokenizer import TextModel

MAX_DEADLINE_MS = 86_400_000  # a day

prompts = logging.getLogger(PROMPTS)

AnyBody = TypeVar("AnyBody", bound=Body)
B = TypeVar("B", bound=GenerationBody)


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request.

    Attributes:
        ids: its token ids.
        text: as it is echoed; "" where nobody asked.
    """

    ids: tuple[int, ...]
    text: str = ""


class Service:
    """One model behind HTTP.

    Attributes:
        names: under which it is served; the first goes to `/metrics`.
        parsers: how chat answers are read.
        created: when this server started, in seconds since 1970.
    """

    def __init__(
        self,
        engine: EngineClient,
        text: TextModel,
        metrics: Metrics,
        names: tuple[str, ...],
        limits: Limits,
        lifecycle: Lifecycle,
        queue: QueueBound,
        spans: Spans | None,
        parsers: ParserNames,
    ) -> None:
        self.engine, self.text, self.metrics = engine, text, metrics
        self.names, self.limits, self.lifecycle = names, limits, lifecycle
        self.queue, self.positions = queue, QueuePositions(engine)
        self._spans = spans
        self.parsers = ChatParsers(parsers, text.template.source if text.template else "")
        self.created = int(time.time())
        self._fingerprint = _fingerprint(engine.info, names[0])

    async def read_any(self, http: HttpRequest, kind: type[AnyBody]) -> AnyBody:
        """The body of a request for answers, of the right types.

        Raises:
            ApiError: 400 or 413.
        """
        content = await http.body()
        if prompts.isEnabledFor(logging.INFO):
            prompts.info(content.decode(errors="replace"))
        return parse(kind, content, self.limits)

    async def read(self, http: HttpRequest, kind: type[B]) -> B:
        """The body of a generation request, its model known and its combinations possible.

        Raises:
            ApiError: 400, 404 or 413.
        """
        body = await self.read_any(http, kind)
        if body.model is not None:
            self.check_model(body.model)
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise unsupported("best_of", f"best_of must equal n, got {body.best_of}; use n")
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options", "stream_options needs stream to be true")
        if body.prompt_logprobs is not None and body.stream:
            raise invalid("prompt_logprobs", "prompt_logprobs needs stream to be false")
        return body

    def check_model(self, name: str) -> None:
        """Raises:
        ApiError: 404 `model_not_found`.
        """
        if name not in self.names:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; there is {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )

    def response_headers(
        self, http: HttpRequest, body: GenerationBody, more: list[str]
    ) -> dict[str, str]:
        """Names the fields that have no effect; see `ignored`."""
        ignored = self.ignored(http, body, more)
        return {"x-ignored-params": printable(ignored)} if ignored else {}

    def ignored(self, http: HttpRequest, body: GenerationBody, more: list[str]) -> list[str]:
        """Paths of the fields that have no effect; `more` are those that the route found.

        Raises:
            ApiError: 400 for a field that is not served, and with `x-strict: 1` for an ignored one.
        """
        ignored = check_extra(body.model_extra) + more
        if body.stream_options is not None:
            ignored += check_extra(body.stream_options.model_extra, prefix="stream_options.")
        if ignored and http.headers.get("x-strict", "") in ("1", "true"):
            names = printable(ignored)
            raise unsupported(ignored[0], f"x-strict refuses what would be ignored: {names}")
        return ignored

    def sampling(self, body: GenerationBody) -> SamplingParams:
        """The sampling fields, without a `max_tokens` where the client gave none.

        Raises:
            InvalidRequest, ApiError: a value is out of range.
        """
        penalty = body.repetition_penalty
        echoes = bool(body.echo) and isinstance(body, CompletionBody)
        prompt_logprobs = body.prompt_logprobs
        if echoes and prompt_logprobs is None:
            prompt_logprobs = body.answer_logprobs
        return SamplingParams(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=body.top_k or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
            min_p=body.min_p or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=1.0 if penalty is None else penalty,
            logit_bias=body.biases(),
            seed=body.seed,
            max_tokens=one_max_tokens(
                body.max_tokens, body.max_completion_tokens, least=0 if echoes else 1
            ),
            min_tokens=body.min_tokens or 0,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            logprobs=body.answer_logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=(
                self.parsers.grammar(body) if isinstance(body, ChatBody) else grammar_of(body)
            ),
        )

    def request(
        self,
        http: HttpRequest,
        request_id: str,
        prompt: Prompt,
        sampling: SamplingParams,
        body: GenerationBody,
        param: str,
    ) -> Request:
        """An engine request. `param` is the client's name of the prompt.

        Raises:
            InvalidRequest: it can never be served.
        """
        info = self.engine.info
        if not prompt.ids:
            raise InvalidRequest(f"{param} must have at least one token, got none", param)
        return build(
            request_id,
            prompt.ids,
            sampling,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            seed=secrets.randbits(63),
            n=1 if body.n is None else body.n,
            tenant=http.scope["state"].get("tenant", ""),
            priority=body.priority or 0,
            deadline=_deadline(http, "x-deadline-ms"),
            ttft_deadline=_deadline(http, "x-ttft-deadline-ms"),
            cache_salt=body.cache_salt or "",
            x_request_id=http.scope["state"]["request_id"],
            param=param,
            limits=self.limits.request,
        )

    def generation(
        self,
        http: HttpRequest,
        body: GenerationBody,
        requests: list[Request],
        *,
        continues: bool,
        reader: Callable[[], AnswerReader] | None = None,
    ) -> Generation:
        """The running of `requests`; `continues`, `reader`: see `TextOptions`.

        Raises:
            ApiError: 400 for too many answers, or stop strings that are none.
        """
        answers = sum(request.n for request in requests)
        most = self.limits.max_answers
        if answers > most:
            raise invalid("n", f"n times the prompts may be at most {most} answers, got {answers}")
        options = TextOptions(
            stops=body.stops(self.limits.max_stops),
            include_stop=bool(body.include_stop_str_in_output),
            skip_special=body.skip_special_tokens is not False,
            continues=continues,
            min_tokens=body.min_tokens or 0,
            logprobs=body.answer_logprobs is not None,
            token_ids=bool(body.return_token_ids),
            reader=reader,
            keep=self.parsers.marks if reader else (),
        )
        arrival: float = http.scope["state"]["arrival"]
        span = None
        if self._spans is not None:
            span = self._spans.start(
                body,
                requests,
                operation="text_completion" if continues else "chat",
                model=body.model or self.names[0],
                headers=http.headers,
                arrival=arrival,
            )
        http.scope["state"]["generation"] = generation = Generation(
            self.engine, self.text, self.metrics, requests, options, arrival, self.queue, span
        )
        return generation

    def wording(self, body: GenerationBody) -> Wording:
        """How tokens are named in the answer."""
        return Wording(self.text, as_ids=bool(body.return_tokens_as_token_ids))

    def truncated(self, ids: Sequence[int], body: GenerationBody) -> tuple[int, ...]:
        """A prompt's last `truncate_prompt_tokens` tokens; -1 is what the context leaves.

        Raises:
            ApiError: 400 for any other number.
        """
        keep = body.truncate_prompt_tokens
        if keep is None:
            return tuple(ids)
        if keep == -1:
            wanted = body.max_completion_tokens or body.max_tokens or 1
            keep = max(self.engine.info.max_model_len - wanted, 1)
        if keep < 1:
            param = "truncate_prompt_tokens"
            raise invalid(param, f"{param} must be -1 or at least 1, got {keep}")
        return tuple(ids[-keep:])

    def envelope(self, prefix: str, body: GenerationBody) -> Envelope:
        """Names of a new response; its id begins with `prefix`."""
        return Envelope(
            id=f"{prefix}-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=body.model or self.names[0],
            system_fingerprint=self._fingerprint,
        )


def _deadline(http: HttpRequest, header: str) -> float | None:
    """The monotonic time that a header of milliseconds after the arrival means; None without one.

    Raises:
        ApiError: 400 where it is no number above 0.
    """
    given = http.headers.get(header)
    if given is None:
        return None
    number = given.isascii() and given.isdecimal() and len(given) < 10
    if not number or not 0 < int(given) <= MAX_DEADLINE_MS:
        raise invalid(header, f"{header} must be 1 to {MAX_DEADLINE_MS} milliseconds, got {given}")
    arrival: float = http.scope["state"]["arrival"]
    return arrival + int(given) / 1000


def usage_options(body: GenerationBody) -> UsageOptions:
    """`stream_options`, or the defaults."""
    options = body.stream_options
    if options is None:
        return UsageOptions()
    return UsageOptions(bool(options.include_usage), bool(options.continuous_usage_stats))


def _fingerprint(info: EngineInfo, name: str) -> str:
    """Changes with what may change the answers of a seed."""
    what = f"{__version__} {name} {info.architecture} {info.dtype} {info.device}"
    return f"fp_{hashlib.sha256(what.encode()).hexdigest()[:12]}"
