"""What rounds come to: rates, percentiles and goodput, as values, as a table and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from benchmarks.answers import Answer
from benchmarks.load import ClosedLoop, Loop, OpenLoop, Round
from benchmarks.sse import BenchError

MS: Final = 1000.0


@dataclass(frozen=True)
class Limits:
    """What a good answer keeps to, in milliseconds; None where anything goes."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def keeps(self, answer: Answer) -> bool:
        return (self.ttft_ms is None or answer.ttft * MS <= self.ttft_ms) and (
            self.tpot_ms is None or answer.tpot * MS <= self.tpot_ms
        )


@dataclass(frozen=True)
class Spread:
    """Milliseconds."""

    p50: float
    p90: float
    p99: float
    mean: float
    max: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Spread:
        values = sorted(value * MS for value in seconds)
        p50, p90, p99 = (percentile(values, share) for share in (0.50, 0.90, 0.99))
        return cls(p50, p90, p99, statistics.fmean(values), values[-1])

    def __str__(self) -> str:
        digits = 1 if self.p50 >= 100 else 2
        return " / ".join(f"{value:,.{digits}f}" for value in (self.p50, self.p90, self.p99))


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one round, or of all.

    Attributes:
        requests: answered ones.
        refused: those that the server had no room for (429 or 503).
        prompt_tokens: None where the server does not tell.
        counted_by: who counted the output tokens: the server ("usage") or, where it does not
            tell, the client, one per event ("events").
        tokens_per_event: above 1 where a server sends several tokens at once.
        ttft_ms: to the first token.
        tpot_ms: per token after the first.
        itl_ms: between events; None where every answer came in one.
        wait_ms: that the client held requests back, as `OpenLoop.max_concurrency` makes it.
        good_requests_per_s, good_share: what kept to the limits; the share is of all requests,
            refused ones included. None without limits.
        client_cpu: cores that this process used.
    """

    requests: int
    refused: int
    seconds: float
    prompt_tokens: int | None
    output_tokens: int
    counted_by: str
    tokens_per_event: float
    output_tokens_per_s: float
    requests_per_s: float
    ttft_ms: Spread
    tpot_ms: Spread
    itl_ms: Spread | None
    wait_ms: Spread
    good_requests_per_s: float | None
    good_share: float | None
    client_cpu: float


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The same turn of all chats."""

    turn: int  # from 1
    requests: int
    prompt_tokens: float | None  # the mean
    ttft_ms: Spread


@dataclass(frozen=True, kw_only=True)
class Result:
    """One load.

    Attributes:
        clients, rate: what was given of the two.
        total: over all rounds.
        output_tokens_per_s, requests_per_s: of the median round, and of the least and best.
        turns: of chats; empty for single requests.
        rounds: each by itself.
    """

    clients: int | None
    rate: float | None
    output_tokens_per_s: float
    output_tokens_per_s_min: float
    output_tokens_per_s_max: float
    requests_per_s: float
    total: Figures
    turns: tuple[Turn, ...]
    rounds: tuple[Figures, ...]

    @property
    def load(self) -> str:
        return f"{self.rate:g}/s" if self.clients is None else str(self.clients)


def percentile(values: Iterable[float], share: float) -> float:
    """Nearest rank: the smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def summarize(loop: Loop, rounds: Sequence[Round], limits: Limits | None = None) -> Result:
    """What the rounds of one load come to.

    Raises:
        BenchError: a round without any answer.
    """
    each = tuple(figures([one], limits) for one in rounds)
    rates = [one.output_tokens_per_s for one in each]
    return Result(
        clients=loop.clients if isinstance(loop, ClosedLoop) else None,
        rate=loop.rate if isinstance(loop, OpenLoop) else None,
        output_tokens_per_s=statistics.median(rates),
        output_tokens_per_s_min=min(rates),
        output_tokens_per_s_max=max(rates),
        requests_per_s=statistics.median(one.requests_per_s for one in each),
        total=figures(rounds, limits),
        turns=by_turn([answer for one in rounds for answer in one.answers]),
        rounds=each,
    )


def figures(rounds: Sequence[Round], limits: Limits | None = None) -> Figures:
    """Over all answers and all seconds of the rounds."""
    said = [answer for one in rounds for answer in one.answers]
    if not said:
        raise BenchError("the server refused every request")
    seconds, refused = sum(one.seconds for one in rounds), sum(one.refused for one in rounds)
    tokens, events = sum(a.completion_tokens for a in said), sum(len(a.times) for a in said)
    gaps = [gap for answer in said for gap in answer.gaps]
    good = sum(map(limits.keeps, said)) if limits else None
    return Figures(
        requests=len(said),
        refused=refused,
        seconds=seconds,
        prompt_tokens=_sum(answer.prompt_tokens for answer in said),
        output_tokens=tokens,
        counted_by="usage" if all(answer.counted for answer in said) else "events",
        tokens_per_event=tokens / events,
        output_tokens_per_s=tokens / seconds,
        requests_per_s=len(said) / seconds,
        ttft_ms=Spread.of(answer.ttft for answer in said),
        tpot_ms=Spread.of(answer.tpot for answer in said),
        itl_ms=Spread.of(gaps) if gaps else None,
        wait_ms=Spread.of(answer.wait for answer in said),
        good_requests_per_s=None if good is None else good / seconds,
        good_share=None if good is None else good / (len(said) + refused),
        client_cpu=sum(one.cpu_seconds for one in rounds) / seconds,
    )


def by_turn(said: Sequence[Answer]) -> tuple[Turn, ...]:
    """Empty where nothing has a second turn."""
    last = max(answer.turn for answer in said)
    turns = [[a for a in said if a.turn == number] for number in range(last + 1)] if last else []
    return tuple(
        Turn(
            turn=number,
            requests=len(group),
            prompt_tokens=None
            if (tokens := _sum(a.prompt_tokens for a in group)) is None
            else tokens / len(group),
            ttft_ms=Spread.of(a.ttft for a in group),
        )
        for number, group in enumerate(turns, 1)
    )


def _sum(counts: Iterable[int | None]) -> int | None:
    """None where one of them is."""
    known = list(counts)
    return None if None in known else sum(filter(None, known))


def to_json(result: Result) -> dict[str, Any]:
    """One flat object: `ttft_ms_p50`, ...; `rounds` and `turns` are lists of such objects."""
    whole = asdict(result)
    rounds, turns = map(_flat, whole.pop("rounds")), map(_flat, whole.pop("turns"))
    total = _flat(whole.pop("total"))
    return total | whole | {"turns": list(turns), "rounds": list(rounds)}


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= {f"{name}_{part}": number for part, number in value.items()}
        else:
            flat[name] = value
    return flat


def table(results: Sequence[Result]) -> str:
    """For people, and for a README as it stands."""
    good = any(one.total.good_share is not None for one in results)
    load = "arrivals" if results[0].clients is None else "clients"
    names = [load, "output tokens/s (min to max)", "requests/s"]
    names += [f"{name} p50 / p90 / p99 ms" for name in ("TTFT", "TPOT", "ITL")]
    names += [*(["good requests/s (share)"] if good else []), "client CPU"]
    return _markdown(names, [_row(one, good) for one in results])


def _row(one: Result, good: bool) -> list[str]:
    total = one.total
    low, high = one.output_tokens_per_s_min, one.output_tokens_per_s_max
    cells = [
        one.load,
        f"{one.output_tokens_per_s:,.1f} ({low:,.1f} to {high:,.1f})",
        f"{one.requests_per_s:,.2f}",
        str(total.ttft_ms),
        str(total.tpot_ms),
        "" if total.itl_ms is None else str(total.itl_ms),
    ]
    if good:
        cells.append(f"{total.good_requests_per_s:,.2f} ({total.good_share:.0%})")
    return [*cells, f"{total.client_cpu:.0%}"]


def turn_table(results: Sequence[Result]) -> str:
    """TTFT by turn, one row for each turn of each load; empty where there are no chats."""
    rows = [
        [
            one.load,
            str(turn.turn),
            "" if turn.prompt_tokens is None else f"{turn.prompt_tokens:,.0f}",
            str(turn.ttft_ms),
        ]
        for one in results
        for turn in one.turns
    ]
    names = ["chats", "turn", "prompt tokens", "TTFT p50 / p90 / p99 ms"]
    return _markdown(names, rows) if rows else ""


def notes(results: Sequence[Result]) -> list[str]:
    """What a reader of the tables must know besides."""
    found = []
    if any(one.total.counted_by == "events" for one in results):
        found.append("The server tells no usage: output tokens are events, one token for each.")
    if (most := max(one.total.tokens_per_event for one in results)) > 1.01:
        found.append(f"Up to {most:.1f} tokens came per event: ITL is the gap between events.")
    found += [
        f"{one.load}: the server refused {one.total.refused} requests, which are in no time."
        for one in results
        if one.total.refused
    ]
    return found


def _markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["--:"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
