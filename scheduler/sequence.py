"""One answer in the making, as the scheduler sees it."""

from __future__ import annotations

import math
from enum import Enum

from paged_cache.table import SequenceBlocks
from scheduler.account import Account
from scheduler.request import Request

NO_SLOT = -1


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """The tokens of one of a request's n answers, and how far they are computed.

    There are no phases: `todo` is the number of tokens whose keys and values are missing. A new
    prompt, a chunk of one, the single token of a decode step and everything after a preemption
    are the same case.

        tokens        [ prompt ........ | generated .... ]  + in_flight not yet read back
        num_computed  [ keys and values present )

    Attributes:
        tokens: ids of the prompt, then of the answer as far as it was read back.
        num_computed: tokens whose KV is stored, counting the steps that were planned.
        in_flight: tokens that planned steps will sample; the device has them before the host.
        num_cached: prompt tokens whose KV was found when it first ran; None before that.
        num_scored: positions of the prompt that planned steps tell the next token's
            log-probability of.
        num_preemptions: how often it gave way; num_swaps of them its blocks moved to host memory.
        slot: row of the device state while it runs.
        order: place in the order of arrival over all sequences.
        rank: the running one of the least rank never gives way.
        most_blocks: KV blocks that it can ever hold.
        most_tokens: its length where it ends at the latest. An answer of 0 tokens draws one, which
            is thrown away, so that it ends like all others.
        to_score: positions of the prompt whose next token's log-probability is asked for: all but
            the last, told by the first of n answers.
        leader: the sequence of the same request whose prompt this one waits for and shares.
        account: its times and what it held.
    """

    __slots__ = (
        "account",
        "blocks",
        "in_flight",
        "index",
        "leader",
        "most_blocks",
        "most_tokens",
        "num_cached",
        "num_computed",
        "num_preemptions",
        "num_prompt",
        "num_scored",
        "num_swaps",
        "order",
        "rank",
        "request",
        "slot",
        "status",
        "to_score",
        "tokens",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        order: int,
        blocks: SequenceBlocks,
        most_blocks: int,
        leader: Sequence | None = None,
    ) -> None:
        self.request = request
        self.index = index
        self.order = order
        self.rank = (request.priority, order)
        self.blocks = blocks
        self.most_blocks = most_blocks
        self.leader = leader
        self.tokens = list(request.prompt_ids)
        self.num_prompt = len(self.tokens)
        sampling = request.sampling
        limit = math.inf if sampling.max_tokens is None else max(sampling.max_tokens, 1)
        self.most_tokens = self.num_prompt + limit
        scored = sampling.prompt_logprobs is not None and index == 0
        self.to_score = self.num_prompt - 1 if scored else 0
        self.num_computed = 0
        self.in_flight = 0
        self.num_cached: int | None = None
        self.num_scored = 0
        self.num_preemptions = self.num_swaps = 0
        self.account = Account(request.arrival)
        self.slot = NO_SLOT
        self.status = Status.WAITING

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.id!r}[{self.index}] {self.status.value}, slot {self.slot}, "
            f"{self.num_computed} of {len(self.tokens)}+{self.in_flight} computed)"
        )

    @property
    def length(self) -> int:
        """Tokens there are, the ones in flight included."""
        return len(self.tokens) + self.in_flight

    @property
    def todo(self) -> int:
        """Tokens whose KV is still to be computed."""
        return self.length - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens of the answer, the ones in flight included."""
        return self.length - self.num_prompt

    @property
    def exhausted(self) -> bool:
        """Whether the planned steps already generate every token that it may have."""
        return self.length >= self.most_tokens
