"""What a request took, told to its client: the `quire` object and the `Server-Timing` header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.protocol import Receipt


@dataclass(frozen=True, slots=True)
class AnswerReceipt:
    """One answer: what the engine says, and what was seen at the HTTP edge.

    Attributes:
        ttft: seconds from the arrival of the HTTP request to the first token; None without one.
        tpot: mean seconds per token after the first; None with fewer than two.
    """

    engine: Receipt
    ttft: float | None
    tpot: float | None


class RequestReceipt:
    """All answers of an HTTP request. Of times, the longest counts: answers run side by side, and
    the request took as long as the slowest of them. What they used up adds up."""

    def __init__(self, answers: Sequence[AnswerReceipt], cached_tokens: int) -> None:
        self._answers = answers
        self._engine = [answer.engine for answer in answers]
        self._cached_tokens = cached_tokens

    def fields(self) -> dict[str, float | int | None]:
        """As the wire has it; times in milliseconds."""
        engine = self._engine
        return {
            **{f"{name}_ms": value for name, value in self._milliseconds().items()},
            "cached_tokens": self._cached_tokens,
            "recomputed_tokens": sum(receipt.recomputed_tokens for receipt in engine),
            "preemptions": sum(receipt.preemptions for receipt in engine),
            "blocks_peak": sum(receipt.blocks_peak for receipt in engine),
            "block_seconds": round(sum(receipt.block_seconds for receipt in engine), 6),
        }

    def server_timing(self) -> str:
        """The value of a `Server-Timing` header."""
        times = self._milliseconds()
        return ", ".join(f"{name};dur={value}" for name, value in times.items() if value)

    def _milliseconds(self) -> dict[str, float | None]:
        engine, answers = self._engine, self._answers
        return {
            "queue": _longest([receipt.queue for receipt in engine]),
            "prefill": _longest([receipt.prefill for receipt in engine]),
            "decode": _longest([receipt.decode for receipt in engine]),
            "ttft": _longest([answer.ttft for answer in answers]),
            "tpot": _longest([answer.tpot for answer in answers]),
        }


def _longest(seconds: Sequence[float | None]) -> float | None:
    """In milliseconds; None where there is none."""
    known = [value for value in seconds if value is not None]
    return round(max(known) * 1000, 3) if known else None
