"""Which tokens may come next in every row that has a grammar, worked out while the device computes.

    admit     matcher of the slot: a copy of the compiled one, the answer so far still to be read
    begin     on a thread: matchers read the tokens of the step before, bitmasks are filled
    forbid    on the device: the logits of all other tokens become minus infinity
    take      the sampled tokens, perhaps still on the device, are read after the next `begin`

So the forward pass of a step can be launched before the tokens of the step before it are known,
but its sampling cannot. A matcher lives as long as its sequence holds the slot. After a preemption
a new one reads the answer again, which takes microseconds per token.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray
from torch import Tensor

from engine.grammar import GrammarCache, GrammarError
from engine.readback import Readback
from scheduler.plan import StepPlan

BITS = 32


@dataclass(frozen=True, slots=True)
class Masks:
    """Attributes:
    rows: sampled rows that have a grammar.
    bits: int32 [rows, words]; bit t % 32 of word t // 32 is set where token t may come next.
    broken: sampled rows whose grammar cannot go on, and why.
    """

    rows: list[int]
    bits: NDArray[np.int32]
    broken: dict[int, str]


@dataclass(frozen=True, slots=True)
class _Constraint:
    """What a slot is held to.

    Attributes:
        resumed: tokens of an answer that was preempted, which the matcher has not seen yet.
        sampled: steps, and rows in them, whose token it has not seen yet.
    """

    matcher: LLMatcher
    resumed: list[int]
    sampled: list[tuple[Readback, int]] = field(default_factory=list)

    def read(self) -> None:
        """Shows the matcher all that it has not seen, when that has arrived on the host."""
        tokens = [int(step.wait()[0][row]) for step, row in self.sampled]
        self.matcher.consume_tokens(self.resumed + tokens)
        self.resumed.clear()
        self.sampled.clear()


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
                resumed = new.tokens[new.num_prompt :]
                self._constraints[new.slot] = _Constraint(compiled.deep_copy(), resumed)

    def begin(self, plan: StepPlan) -> Future[Masks] | None:
        """Starts on the masks of a step; None where no row of it has a grammar."""
        if not self._constraints:
            return None
        wanted = (item.slot for item in plan.scheduled if item.wants_token)
        slots = {row: slot for row, slot in enumerate(wanted) if slot in self._constraints}
        return self._thread.submit(self._fill, slots) if slots else None

    def take(self, plan: StepPlan, sampled: Readback) -> None:
        """The tokens that `plan` samples, as the first of the tensors that were sent."""
        if not self._constraints:
            return
        wanted = (item.slot for item in plan.scheduled if item.wants_token)
        for row, slot in enumerate(wanted):
            if slot in self._constraints:
                self._constraints[slot].sampled.append((sampled, row))

    def _fill(self, slots: dict[int, int]) -> Masks:
        chosen = {slot: self._constraints[slot] for slot in slots.values()}
        for constraint in chosen.values():
            constraint.read()
        bits = np.zeros((len(slots), self._words), np.int32)
        matchers = [(constraint.matcher, row) for row, constraint in enumerate(chosen.values())]
        self._executor.unsafe_compute_mask_ptr(
            matchers, bits.ctypes.data, self._words * bits.itemsize, len(slots)
        )
        broken = {
            row: str(GrammarError(constraint.matcher.get_error()))
            for row, constraint in zip(slots, chosen.values(), strict=True)
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
