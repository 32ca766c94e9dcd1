"""The block pool: which KV blocks are free, and how many tables use each of the others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Reference counts over block ids 0..num_blocks-1. Knows nothing of sequences or tensors.

    Invariant: a block is in the free list exactly when its count is 0, and
    `num_free + num_used == num_blocks`. The free list is kept in the order in which blocks became
    free, oldest first, and blocks are taken from that end: it is the LRU list of a cache that
    finds blocks again while they are free.

        refs       2   0   1   0   0   1
        block      0   1   2   3   4   5
        free list  4 -> 1 -> 3         (4 has been free the longest and is taken next)
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_blocks(self) -> int:
        return len(self._refs)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._refs) - len(self._free)

    def refs(self, block: int) -> int:
        """How many block tables hold `block`."""
        return self._refs[block]

    def take(self, count: int) -> list[int] | None:
        """`count` free blocks, each now used once; None, and nothing changed, if fewer are free."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Counts one more use of each of `blocks`, all of which are in use."""
        for block in blocks:
            if not self._refs[block]:
                raise ValueError(f"block {block} is free: it cannot be shared")
            self._refs[block] += 1

    def drop(self, blocks: Iterable[int]) -> None:
        """Counts one use less of each of `blocks`; at zero one joins the end of the free list."""
        for block in blocks:
            if not self._refs[block]:
                raise ValueError(f"block {block} is free already: it cannot be dropped")
            self._refs[block] -= 1
            if not self._refs[block]:
                self._free[block] = None

    def check(self) -> None:
        """Raises AssertionError where the invariant does not hold; O(num_blocks)."""
        assert all(refs >= 0 for refs in self._refs), "negative reference count"
        free = {block for block, refs in enumerate(self._refs) if refs == 0}
        assert free == self._free.keys(), "the free list and the reference counts disagree"
