"""What a streamed answer said, and when: the events of a `Reply`, whatever server sent them.

Servers differ in line ends, in the blank after `data:`, in empty first and last events, in where
they tell usage and in whether they do.
"""

from __future__ import annotations

import itertools
import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.sse import BenchError, Reply

EVENT: Final = re.compile(rb"(?:[^\r\n]+(?:\r?\n|\Z))+")  # lines up to an empty one
BROUGHT: Final = ("content", "reasoning_content", "reasoning", "tool_calls")  # in a chat's delta


@dataclass(frozen=True)
class Answer:
    """One answer. Times are seconds on `time.perf_counter`.

    Attributes:
        due: when it should have been sent; later than that only where the client held it back.
        sent: when it was.
        times: of the events that brought tokens, in order; at least one.
        prompt_tokens: as the server counted, None where it does not tell.
        completion_tokens: as the server counted, else one for each of `times`.
        counted: whether the server did.
        text: all of it, without reasoning.
        token_ids: all of them, where the server tells them.
        turn: of its chat, from 0.
    """

    due: float
    sent: float
    times: tuple[float, ...]
    prompt_tokens: int | None
    completion_tokens: int
    counted: bool = True
    text: str = ""
    token_ids: tuple[int, ...] = ()
    turn: int = 0

    @property
    def wait(self) -> float:
        """Seconds that the client held the request back."""
        return self.sent - self.due

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; 0 for an answer of one token."""
        return (self.times[-1] - self.times[0]) / max(1, self.completion_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between events that brought tokens: the inter-token latencies (ITL).

        Tokens that come in one event have no gap among them; events that come in one read have
        gaps of 0.
        """
        return [later - earlier for earlier, later in itertools.pairwise(self.times)]


def read(reply: Reply, *, due: float | None = None, turn: int = 0) -> Answer:
    """The answer in a reply of status 200.

    Raises:
        BenchError: an error in the stream, something that is no stream, or no tokens in it.
    """
    times: list[float] = []
    endings: list[float] = []  # events that only end the answer
    texts: list[str] = []
    ids: list[int] = []
    usage: dict[str, Any] = {}
    for time, event in _events(reply):
        if event.get("error"):
            raise BenchError(f"an error in the stream: {json.dumps(event)[:300]}")
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            texts.append(_text(choice))
            ids += choice.get("token_ids") or ()
            (times if _brings_tokens(choice) else endings).append(time)
    if not times and not endings:
        raise BenchError(f"no streamed answer, but: {reply.body[:300].decode(errors='replace')}")
    count = usage.get("completion_tokens", usage.get("output_tokens"))
    times = times or endings[-1:]  # an answer may be one token that has no text
    return Answer(
        due=reply.sent if due is None else due,
        sent=reply.sent,
        times=tuple(times),
        prompt_tokens=usage.get("prompt_tokens", usage.get("input_tokens")),
        completion_tokens=len(times) if count is None else count,
        counted=count is not None,
        text="".join(texts),
        token_ids=tuple(ids),
        turn=turn,
    )


def _events(reply: Reply) -> Iterator[tuple[float, dict[str, Any]]]:
    """When each event was there as a whole, and what it says; without comments and [DONE]."""
    ends = list(itertools.accumulate(map(len, reply.pieces)))
    for found in EVENT.finditer(reply.body):
        lines = (line for line in found[0].splitlines() if line.startswith(b"data:"))
        data = b"\n".join(line[5:].strip() for line in lines)
        if not data.startswith(b"{"):
            continue
        try:
            event = json.loads(data)
        except ValueError:
            raise BenchError(f"an event that is no JSON: {data[:300]!r}") from None
        yield reply.times[bisect_left(ends, found.end())], event


def _text(choice: dict[str, Any]) -> str:
    return choice.get("text") or (choice.get("delta") or {}).get("content") or ""


def _brings_tokens(choice: dict[str, Any]) -> bool:
    """Not so: an event that only names the role, or only ends the answer.

    An event without text in between is a token whose text cannot be shown yet.
    """
    delta = choice.get("delta") or {}
    if choice.get("text") or choice.get("token_ids") or any(map(delta.get, BROUGHT)):
        return True
    return not choice.get("finish_reason") and "role" not in delta
