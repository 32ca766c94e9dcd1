"""Which tokens may come next in every row that has a grammar, worked out while the device computes.

    admit     matcher of the slot: a copy of the compiled one, the answer so far still to be read
    begin     on a thread: matchers read the tokens of the step before, bitmasks are filled
    forbid    on the device: the logits of all other tokens become minus infinity
    take      the sampled tokens are kept, to be read at the next `begin`

A matcher lives as long as its sequence holds the slot. After a preemption a new one reads the
answer again, which takes microseconds per token.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray
from torch import Tensor

from engine.grammar import GrammarCache, GrammarError
from scheduler.plan import StepPlan

BITS = 32


@dataclass(frozen=True, slots=True)
class Masks:
    """Attributes:
    rows: sampled rows that have a grammar.
    bits: int32 [rows, words]; bit t % 32 of word t // 32 is set where token t may come next.
    broken: slots whose grammar cannot go on, and why.
    """

    rows: list[int]
    bits: NDArray[np.int32]
    broken: dict[int, str]


@dataclass(frozen=True, slots=True)
class _Constraint:
    """What a slot is held to; `unread` are tokens that the matcher has not seen yet."""

    matcher: LLMatcher
    unread: list[int]


class GrammarMasks:
    """The matchers of all slots."""

    def __init__(self, cache: GrammarCache, vocab_size: int) -> None:
        self._cache = cache
        self._words = -(-vocab_size // BITS)
        self._constraints: dict[int, _Constraint] = {}
        self._thread = ThreadPoolExecutor(1, "grammar-masks")

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()

    def admit(self, plan: StepPlan) -> None:
        """Takes in who is new in its slot."""
        for new in plan.admitted:
            self._constraints.pop(new.slot, None)
            if new.sampling.grammar is not None:
                # Compiled before the request was queued; where it was forgotten since, once more.
                compiled = self._cache.get(new.sampling.grammar).result()
                unread = new.tokens[new.num_prompt :]
                self._constraints[new.slot] = _Constraint(compiled.deep_copy(), unread)

    def begin(self, plan: StepPlan) -> Future[Masks] | None:
        """Starts on the masks of a step; None where no row of it has a grammar."""
        if not self._constraints:
            return None
        wanted = (item.slot for item in plan.scheduled if item.wants_token)
        slots = {row: slot for row, slot in enumerate(wanted) if slot in self._constraints}
        return self._thread.submit(self._fill, slots) if slots else None

    def take(self, plan: StepPlan, tokens: list[int]) -> None:
        """The tokens that `plan` sampled."""
        if not self._constraints:
            return
        wanted = (item.slot for item in plan.scheduled if item.wants_token)
        for slot, token in zip(wanted, tokens, strict=True):
            if slot in self._constraints:
                self._constraints[slot].unread.append(token)

    def _fill(self, slots: dict[int, int]) -> Masks:
        chosen = {slot: self._constraints[slot] for slot in slots.values()}
        for constraint in chosen.values():
            constraint.matcher.consume_tokens(constraint.unread)
            constraint.unread.clear()
        bits = np.zeros((len(slots), self._words), np.int32)
        matchers = [(constraint.matcher, row) for row, constraint in enumerate(chosen.values())]
        self._executor.unsafe_compute_mask_ptr(
            matchers, bits.ctypes.data, self._words * bits.itemsize, len(slots)
        )
        broken = {
            slot: str(GrammarError(constraint.matcher.get_error()))
            for slot, constraint in chosen.items()
            if constraint.matcher.is_error()
        }
        return Masks(list(slots), bits, broken)


def forbid(logits: Tensor, rows: Tensor, bits: Tensor) -> Tensor:
    """Logits in which `rows` keep only the tokens of their masks.

    Args:
        logits: [all rows, vocab]; left as they are
        rows: int64 [rows]
        bits: int32 [rows, words]

    Returns:
        [all rows, vocab]
    """
    place = torch.arange(BITS, dtype=torch.int32, device=logits.device)
    allowed = (bits[:, :, None] >> place & 1).flatten(1)[:, : logits.shape[1]]
    kept = logits[rows].masked_fill(allowed == 0, -torch.inf)
    return logits.index_copy(0, rows, kept)
