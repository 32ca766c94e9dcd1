"""Why the blocks of a prompt would be found, or would not.

    found         now
    evicted       computed before, and given up for other content since
    other_salt    the same content is known under another cache salt
    diverged      a known sequence begins alike and differs at token `diverges_at`
    cold          nothing that is remembered begins like this
    last_block    never found: the last token is always computed, with what shares its block
    off           there is no prefix cache

What is remembered beside the pool is bounded and costs an append per request and per eviction;
the questions are answered from it only when somebody asks.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Reason = Literal["evicted", "other_salt", "diverged", "cold", "last_block", "off"]

REMEMBERED_ROOTS = 1024
REMEMBERED_TOKENS = 2**18


@dataclass(frozen=True, slots=True)
class Missing:
    """`count` tokens from position `start` on that would have to be computed, and why.

    Attributes:
        diverges_at: the first token that differs, where that is the reason.
    """

    start: int
    count: int
    reason: Reason
    diverges_at: int | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Attributes:
    found: tokens that would be found now.
    held: per KV group, how many of the prompt's full blocks it holds, of any place.
    missing: the others, in order.
    """

    found: int
    held: list[int]
    missing: list[Missing]


class PrefixMemory:
    """Which roots there were, and what the newest sequences began with."""

    def __init__(self) -> None:
        self._owners: OrderedDict[bytes, str] = OrderedDict()
        self._started: deque[tuple[bytes, Sequence[int], int]] = deque()
        self._num_tokens = 0

    def opened(self, root: bytes, owner: str) -> None:
        """A sequence of `owner` has the root `root`."""
        self._owners[root] = owner
        self._owners.move_to_end(root)
        if len(self._owners) > REMEMBERED_ROOTS:
            self._owners.popitem(last=False)

    def started(self, root: bytes, tokens: Sequence[int]) -> None:
        """A sequence began to run. `tokens` is kept, not copied; it may grow."""
        self._started.append((root, tokens, len(tokens)))
        self._num_tokens += len(tokens)
        while self._num_tokens > REMEMBERED_TOKENS:
            self._num_tokens -= self._started.popleft()[2]

    def others(self, root: bytes, owner: str) -> Iterator[bytes]:
        """The other roots of the same owner."""
        return (r for r, whose in self._owners.items() if whose == owner and r != root)

    def divergence(self, root: bytes, tokens: Sequence[int]) -> int | None:
        """The last position at which a sequence that began like `tokens` went on differently; None
        where nobody did."""
        whole, best = list(tokens), 0
        for known_root, known, _ in self._started:
            if known_root == root and known[:best] == whole[:best]:
                shared = _shared(whole, known)
                if shared < min(len(whole), len(known)):
                    best = max(best, shared)
        return best or None


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common prefix, by halving: slices compare faster than a loop."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def reach(chains: Iterable[Iterable[bytes]], known: Callable[[bytes], bool]) -> int:
    """The most leading hashes of any chain that are known."""
    return max((sum(1 for _ in itertools.takewhile(known, chain)) for chain in chains), default=0)


def missing(
    num_tokens: int,
    block_size: int,
    found: int,
    chain: Sequence[bytes],
    known: Callable[[bytes], bool],
    elsewhere: int,
    diverges_at: int | None,
) -> list[Missing]:
    """Reasons for all tokens from block `found` on, neighbours of one reason in one piece.

    Args:
        chain: hashes of all blocks that could be found.
        known: whether a block with this hash is held or was given up lately.
        elsewhere: leading blocks that are known under another root.
        diverges_at: see `PrefixMemory.divergence`.
    """
    fork = len(chain) if diverges_at is None else diverges_at // block_size

    def reason(place: int) -> Reason:
        if known(chain[place]):
            return "evicted"
        if place < elsewhere:
            return "other_salt"
        if diverges_at is None or fork < found:
            return "cold"
        return "evicted" if place < fork else "diverged"

    pieces: list[Missing] = []
    places = range(found, len(chain))
    for why, run in itertools.groupby(places, reason):
        run_places = list(run)
        at = diverges_at if why == "diverged" else None
        start = run_places[0] * block_size
        pieces.append(Missing(start, len(run_places) * block_size, why, at))
    end = len(chain) * block_size
    return [*pieces, Missing(end, num_tokens - end, "last_block")]
