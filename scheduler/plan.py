"""What one step computes: plain values, no tensors, no sampled tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from paged_cache.manager import BlockCopy
from scheduler.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Admitted:
    """A sequence that takes a slot in this step: `tokens` are all it has so far."""

    slot: int
    tokens: list[int]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class SlotBlocks:
    """Entries of the block table of `slot` in KV group `group`, from table index `first` on."""

    slot: int
    group: int
    first: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class ScheduledSeq:
    """`count` tokens of the sequence in `slot`, from position `start` on.

    Attributes:
        wants_token: the last of them is the sequence's last token, so a new one is sampled.
        uniform: the random number in [0, 1) of that token; 0 where the choice is greedy.
    """

    slot: int
    start: int
    count: int
    wants_token: bool
    uniform: float = 0.0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass. Applied in this order: admitted, new_blocks, copies (all at once), then
    scheduled is computed. In `scheduled`, sequences with one token come before those with more.

    Last tokens live on the device by slot, so a plan can be launched before the results of the
    one before it were read back.
    """

    id: int
    admitted: list[Admitted] = field(default_factory=list)
    new_blocks: list[SlotBlocks] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    scheduled: list[ScheduledSeq] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(item.count for item in self.scheduled)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out of a plan: one token id for each scheduled sequence with `wants_token`, in
    the plan's order."""

    plan_id: int
    tokens: list[int]
