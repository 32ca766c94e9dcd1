"""What one step computes: plain values, no tensors, no sampled tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from paged_cache.block_copy import BlockCopy, DiskCopy
from scheduler.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Admitted:
    """A sequence that takes a slot in this step: `tokens` are all it has so far, the first
    `num_prompt` of them its prompt."""

    slot: int
    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class SlotBlocks:
    """Entries of the block table of `slot` in KV group `group`, from table index `first` on."""

    slot: int
    group: int
    first: int
    blocks: list[int]


class ScheduledSeq(msgspec.Struct, frozen=True, gc=False):
    """`count` tokens of the sequence in `slot`, from position `start` on.

    Attributes:
        wants_token: the last of them is the sequence's last token, so a new one is sampled.
        uniform: the random number in [0, 1) of that token; 0 where the choice is greedy.
        score_from, num_scored: positions score_from .. score_from + num_scored - 1 of the prompt
            tell the log-probability of the prompt token after them.
    """

    slot: int
    start: int
    count: int
    wants_token: bool
    uniform: float = 0.0
    score_from: int = 0
    num_scored: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass. Applied in this order: admitted, new_blocks, disk_copies, copies, then
    scheduled is computed. In `scheduled`, sequences with one token come before those with more.

    Copies of a kind happen at once, and the kinds one after the other, so that nothing is
    overwritten before it was read: `to_disk`, `from_disk`, `to_host`, `to_device`, `cow`.

    Last tokens live on the device by slot, so a plan can be launched before the results of the
    one before it were read back.
    """

    id: int
    admitted: list[Admitted] = field(default_factory=list)
    new_blocks: list[SlotBlocks] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    disk_copies: list[DiskCopy] = field(default_factory=list)
    scheduled: list[ScheduledSeq] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether the device has nothing to do."""
        return not (self.scheduled or self.copies or self.disk_copies)

    @property
    def num_tokens(self) -> int:
        return sum(item.count for item in self.scheduled)


class Scores(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of consecutive tokens, as the model has them: the raw log-softmax.

    Attributes:
        logprobs: of each token.
        ranks: of each token; 1 is the likeliest.
        top_ids, top_logprobs: of the likeliest tokens at each place, descending; as many as were
            asked for.
    """

    logprobs: list[float]
    ranks: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]

    @staticmethod
    def join(parts: Iterable[Scores]) -> Scores:
        """Those of consecutive stretches as one."""
        whole = Scores([], [], [], [])
        for part in parts:
            whole.logprobs.extend(part.logprobs)
            whole.ranks.extend(part.ranks)
            whole.top_ids.extend(part.top_ids)
            whole.top_logprobs.extend(part.top_logprobs)
        return whole

    def cut(self, first: int, count: int, most: int) -> Scores:
        """`count` tokens from `first` on, with at most `most` of the likeliest."""
        places = slice(first, first + count)
        return Scores(
            self.logprobs[places],
            self.ranks[places],
            [ids[:most] for ids in self.top_ids[places]],
            [values[:most] for values in self.top_logprobs[places]],
        )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out of a plan.

    Attributes:
        tokens: one id for each scheduled sequence with `wants_token`, in the plan's order.
        scores: of those tokens, None where nobody asked; empty where nobody at all did.
        prompt_scores: one for each scheduled sequence with `num_scored`, in the plan's order.
        broken: places in `tokens` whose grammar cannot go on, and why; they mean nothing.
    """

    plan_id: int
    tokens: list[int]
    scores: list[Scores | None] = field(default_factory=list)
    prompt_scores: list[Scores] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)

    def result(self) -> StepResult:
        """Itself: a step whose results are there is one that need not be waited for."""
        return self
