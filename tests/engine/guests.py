"""Requests that come and go while others run, and what each of them gets alone."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.loop import EngineLoop
from engine.protocol import Abort, Submit
from paged_cache.manager import Grown, KVCacheManager
from paged_cache.table import SequenceBlocks
from scheduler.request import Request, SamplingParams
from tests.engine.drive import engine
from tests.models import checkpoints

CONTEXT = 160
FIRST_ID = 3  # below are the special tokens


@dataclass(frozen=True)
class Guest:
    """A request that is submitted before step `comes` and, if it has not ended, aborted before
    step `leaves`."""

    request: Request
    comes: int = 0
    leaves: int | None = None


@dataclass(frozen=True)
class Menu:
    """A few dozen requests to choose from, in three families of prompts that begin alike. The same
    ones come again and again, so that each is computed alone only once."""

    n: tuple[int, ...] = (1,)
    salts: tuple[str, ...] = ("",)
    stops: bool = False

    def request(self, number: int, name: str) -> Request:
        draw = random.Random(number)
        family, length = draw.randrange(3), draw.choice([17, 32, 48])
        shared = [random.Random(1000 + family).randrange(FIRST_ID, 320) for _ in range(length)]
        own = [draw.randrange(FIRST_ID, 320) for _ in range(draw.randint(1, 40))]
        temperature = draw.choice([0.0, 0.0, 0.8, 1.3])
        stops = tuple(draw.sample(range(320), 16)) if self.stops and draw.random() < 0.7 else ()
        sampling = SamplingParams(
            temperature=temperature,
            top_p=draw.choice([1.0, 0.8]),
            seed=number,
            max_tokens=draw.randint(2, 20),
            stop_token_ids=stops,
            ignore_eos=not self.stops,
        )
        return Request(
            id=name,
            prompt_ids=tuple(shared + own),
            sampling=sampling,
            n=draw.choice(self.n),
            cache_salt=draw.choice(self.salts),
        )


class Alone:
    """Answers of requests that had an engine to themselves, without prefix cache or preemption."""

    def __init__(self, path: Path, kv_cache_dtype: str) -> None:
        self.path = path
        self.kv_cache_dtype = kv_cache_dtype
        self._known: dict[tuple[Any, ...], list[list[int]]] = {}
        self._loop = engine(
            path,
            kv_cache_dtype=kv_cache_dtype,
            enable_prefix_caching=False,
            max_model_len=CONTEXT,
            num_gpu_blocks_override=120,
        )

    def answers(self, request: Request) -> list[list[int]]:
        """Tokens of each of the n answers."""
        key = (request.prompt_ids, repr(request.sampling), request.n)
        if key not in self._known:
            told = serve(self._loop, [Guest(request)])
            self._known[key] = [told[request.id, index][0] for index in range(request.n)]
        return self._known[key]


Told = dict[tuple[str, int], tuple[list[int], str]]
"""(request, index) -> (tokens, finish reason)."""


def serve(loop: EngineLoop, guests: Iterable[Guest], preempt_every: int = 0) -> Told:
    """Steps until everybody is answered or gone. With `preempt_every`, somebody is preempted
    before every so many steps, whether blocks are missing or not."""
    tokens: dict[tuple[str, int], list[int]] = {}
    reasons: dict[tuple[str, int], str] = {}
    guests, scheduler, step = list(guests), loop.scheduler, 0
    for guest in guests:
        tokens |= {(guest.request.id, index): [] for index in range(guest.request.n)}
    while loop.has_work or len(reasons) < len(tokens):
        loop.take(Submit([guest.request for guest in guests if guest.comes == step]))
        loop.take(Abort([guest.request.id for guest in guests if guest.leaves == step]))
        if preempt_every and step % preempt_every == 1 and len(scheduler.running) > 1:
            if loop.overlap:
                starve(scheduler.cache)
            else:
                scheduler._preempt(scheduler._victim())
        if loop.has_work:
            loop.step()
        output, step = loop.collect(), step + 1
        assert not output.refused and not output.failed, output
        for delta in output.deltas:
            key = (delta.request_id, delta.index)
            tokens[key].extend(delta.tokens)
            if delta.finish_reason:
                reasons[key] = delta.finish_reason
        scheduler.check()
        assert step < 5000, "the crowd does not come to an end"
    assert scheduler.cache.pool.num_used == 0
    return {key: (tokens[key], reasons[key]) for key in tokens}


def starve(cache: KVCacheManager) -> None:
    """Nobody can be preempted between two overlapped steps, with a token in flight; but somebody
    is within the next one, where for once no block is found."""
    grow = cache.grow

    def no_block(seq: SequenceBlocks, start: int, end: int) -> Grown | None:
        cache.grow = grow  # type: ignore[method-assign]
        return None

    cache.grow = no_block  # type: ignore[method-assign]


def assert_as_alone(told: Told, guests: Iterable[Guest], alone: Alone) -> None:
    """Everybody got what they would have got alone, or the beginning of it if they left."""
    for guest in guests:
        wanted = alone.answers(guest.request)
        for index, want in enumerate(wanted):
            got, reason = told[guest.request.id, index]
            if reason == "abort":
                want = want[: len(got)]
            assert got == want, (guest, index, reason)


def checkpoint(windows: bool, folder: Path) -> Path:
    """A tiny model: with `windows`, one full layer and two that see 32 tokens."""
    return checkpoints.make("qwen2-sliding" if windows else "llama", folder)
