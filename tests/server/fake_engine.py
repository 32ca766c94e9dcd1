"""An engine that says what a test tells it to: the fake at the seam."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from engine.client import EngineDead, RequestFailed
from engine.protocol import (
    CacheView,
    EngineInfo,
    EngineStats,
    Explained,
    Inspection,
    Receipt,
    RequestView,
    Scores,
    StepOutput,
    TokenDelta,
    TraceView,
)
from paged_cache.explain import Explanation
from scheduler.outlook import Outlook
from scheduler.request import InvalidRequest, Request
from scheduler.stopping import FinishReason

INFO = EngineInfo(
    model_path="",
    architecture="FakeForCausalLM",
    device="cpu",
    dtype="float32",
    vocab_size=1000,
    max_model_len=256,
    eos_token_ids=[0],
    block_size=16,
    num_blocks=64,
    max_num_seqs=64,
    max_num_batched_tokens=256,
    kv_bytes_per_token=64,
    weight_bytes=1000,
)


def fake_scores(tokens: Sequence[int], most: int) -> Scores:
    """A token's log-probability is minus a tenth of its id; the likeliest are those from id 1."""
    top = range(1, most + 1)
    return Scores(
        [token / -10 for token in tokens],
        list(tokens),
        [list(top)] * len(tokens),
        [[token / -10 for token in top]] * len(tokens),
    )


def fake_prompt_scores(request: Request) -> list[Scores]:
    """Those of a prompt, in two parts as from two steps."""
    asked, following = request.sampling.prompt_logprobs, request.prompt_ids[1:]
    if asked is None:
        return []
    return [fake_scores(part, asked) for part in (following[:2], following[2:]) if part]


@dataclass(frozen=True)
class FakeStream:
    """Implements `engine.client.TokenStream`."""

    deltas: AsyncGenerator[TokenDelta, None]

    async def each(self, take: Callable[[TokenDelta], bool]) -> None:
        async for delta in self.deltas:
            if take(delta):
                return

    async def aclose(self) -> None:
        await self.deltas.aclose()


@dataclass
class FakeEngine:
    """Implements `engine.client.EngineClient`.

    Attributes:
        say: the tokens of answer `index` of a request, without the end-of-sequence token.
        per_step: tokens of each answer per step.
        step_seconds: a step takes this long; 0 still lets other tasks run.
        admit_seconds: admission takes this long.
        refuse: raised instead of an admission.
        fail_after: steps after which a request fails.
        cached_tokens: prompt tokens that every request finds cached.
        receipt: what every answer took.
        view, problem: what `inspect` answers.
        steps: what `trace` answers.
        live: what `requests` answers.
        explanation, outlook: what `explain` answers.
        submitted, explained, aborted, aborted_answers, finished: what happened, in order.
    """

    say: Callable[[Request, int], Sequence[int]]
    info: EngineInfo = INFO
    per_step: int = 1
    step_seconds: float = 0.0
    admit_seconds: float = 0.0
    refuse: InvalidRequest | RequestFailed | None = None
    fail_after: int | None = None
    cached_tokens: int = 0
    receipt: Receipt = field(default_factory=lambda: Receipt(0.25, 0.5, 2.0, 7, 1, 3, 4.5))
    listener: Callable[[StepOutput], None] = lambda output: None
    alive: bool = True
    quiet_seconds: float = 0.0
    snapshot: EngineStats = field(default_factory=EngineStats)
    view: CacheView = field(default_factory=lambda: CacheView(16, [0], b"", b"", []))
    problem: str | None = None
    steps: TraceView = field(default_factory=TraceView)
    live: list[RequestView] = field(default_factory=list)
    explanation: Explanation = field(default_factory=lambda: Explanation(0, [0], []))
    submitted: list[Request] = field(default_factory=list)
    outlook: Outlook = field(default_factory=lambda: Outlook("admit", 1))
    explained: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    aborted_answers: list[tuple[str, int]] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    async def submit(self, request: Request) -> FakeStream:
        if not self.alive:
            raise EngineDead("it died")
        self.submitted.append(request)
        try:
            await asyncio.sleep(self.admit_seconds)
        except asyncio.CancelledError:
            self.aborted.append(request.id)
            raise
        if self.refuse is not None:
            raise self.refuse
        return FakeStream(self._deltas(request))

    async def _deltas(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        left = {index: list(self.say(request, index)) for index in range(request.n)}
        made = dict.fromkeys(left, 0)
        steps = 0
        try:
            for scores in fake_prompt_scores(request):
                yield TokenDelta(request.id, 0, [], prompt_scores=scores)
            while left:
                await asyncio.sleep(self.step_seconds)
                if request.id in self.aborted:
                    for index in list(left):
                        yield self._ended(TokenDelta(request.id, index, [], "abort"))
                    return
                if not self.alive:
                    raise EngineDead("it died")
                if steps == self.fail_after:
                    raise RequestFailed("a kernel failed")
                steps += 1
                for index in list(left):
                    if (request.id, index) in self.aborted_answers:
                        del left[index]
                        yield self._ended(TokenDelta(request.id, index, [], "abort"))
                    else:
                        yield self._step(request, index, left, made)
        finally:
            if not left:
                self.finished.append(request.id)
            elif request.id not in self.aborted:
                self.aborted.append(request.id)

    def _step(
        self, request: Request, index: int, left: dict[int, list[int]], made: dict[int, int]
    ) -> TokenDelta:
        limit = request.sampling.max_tokens
        assert limit is not None
        room = min(self.per_step, limit - made[index])
        tokens, rest = left[index][:room], left[index][room:]
        reason: FinishReason | None = None
        stop_reason = None
        for place, token in enumerate(tokens):
            if token in request.sampling.stop_token_ids:
                tokens, reason, stop_reason = tokens[: place + 1], "stop", token
                break
        made[index] += len(tokens)
        left[index] = rest
        if reason is None and made[index] == limit:
            reason = "length"
        elif reason is None and not rest and len(tokens) < room:
            tokens, reason = [*tokens, self.info.eos_token_ids[0]], "stop"
        if reason is not None:
            del left[index]
        asked = request.sampling.logprobs
        scores = None if asked is None else fake_scores(tokens, asked)
        delta = TokenDelta(
            request.id, index, tokens, reason, stop_reason, self.cached_tokens, scores=scores
        )
        return self._ended(delta) if reason else delta

    def _ended(self, delta: TokenDelta) -> TokenDelta:
        delta = msgspec.structs.replace(delta, receipt=self.receipt)
        self.listener(StepOutput(self.snapshot, deltas=[delta]))
        return delta

    def listen(self, listener: Callable[[StepOutput], None]) -> None:
        self.listener = listener

    def abort(self, request_id: str, index: int | None = None) -> None:
        if index is None:
            self.aborted.append(request_id)
        else:
            self.aborted_answers.append((request_id, index))

    def stats(self) -> EngineStats:
        return self.snapshot

    async def inspect(self, *, verify: bool = False) -> Inspection:
        if not self.alive:
            raise EngineDead("it died")
        return Inspection(0, self.view, self.problem if verify else None)

    async def trace(self) -> TraceView:
        if not self.alive:
            raise EngineDead("it died")
        return self.steps

    async def requests(self) -> list[RequestView]:
        if not self.alive:
            raise EngineDead("it died")
        return self.live

    async def explain(self, request: Request) -> Explained:
        self.explained.append(request)
        return Explained(0, self.explanation, self.outlook)

    async def close(self) -> None:
        self.alive = False
