"""The block pool: which KV blocks are free, how often the others are used, and what they hold."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

Key = tuple[int, bytes]
"""What a full block holds: its KV group, and the chained hash of all tokens up to its end."""

FREE, CACHED, USED, SHARED = range(4)
TAG_BYTES = 4


class BlockPool:
    """Reference counts over block ids 0..num_blocks-1, and an index from content to block.

    Invariants: a block is in the free list exactly when its count is 0; `num_free + num_used ==
    num_blocks`; a block has at most one key, and a key at most one block.

    The free list is the LRU list of the prefix cache. A block that becomes free keeps its key and
    content and joins the end; one that holds nothing to be found again joins the front. Blocks are
    taken from the front, which is where a cached one is evicted; a hit takes it out of the middle.

        refs       2   0   1   0   0   1
        block      0   1   2   3   4   5
        key        a   b   c   -   d   -
        free list  3 -> 4 -> 1              (3 holds nothing; 4 is evicted before 1)

    Attributes:
        num_evicted: blocks whose content was given up for another, since start.
        evicted: the keys of the last num_blocks of them, oldest first.
        num_cached: free blocks whose content can still be found.
        on_evict: told of a block and its key before the block is given to another.
        states: one byte per block: FREE, CACHED, USED (once) or SHARED. Kept up to date, so that a
            look at the pool is a copy of it.
        tags: TAG_BYTES bytes per block: the beginning of its hash, zeros without one.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._key_of: dict[int, Key] = {}
        self._block_of: dict[Key, int] = {}
        self.num_evicted = self.num_cached = 0
        self.evicted: deque[Key] = deque(maxlen=num_blocks)
        self.on_evict: Callable[[int, Key], None] = _ignore
        self.states = bytearray(num_blocks)
        self.tags = bytearray(num_blocks * TAG_BYTES)

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
        """`count` free blocks, each now used once; None, and nothing changed, if fewer are free.
        What they held is forgotten."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
            self.states[block] = USED
            key = self._key_of.get(block)
            if key is not None:
                self.on_evict(block, key)
                self.evicted.append(key)
                self._forget(block)
                self.num_cached -= 1
                self.num_evicted += 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Counts one more use of each of `blocks`, which are in use or cached."""
        for block in blocks:
            if not self._refs[block]:
                if block not in self._key_of:
                    raise ValueError(f"block {block} is free and holds nothing to share")
                del self._free[block]
                self.num_cached -= 1
            self._refs[block] += 1
            self.states[block] = USED if self._refs[block] == 1 else SHARED

    def drop(self, blocks: Iterable[int]) -> None:
        """Counts one use less of each of `blocks`; at zero a block is free."""
        for block in blocks:
            if not self._refs[block]:
                raise ValueError(f"block {block} is free already: it cannot be dropped")
            self._refs[block] -= 1
            if self._refs[block]:
                self.states[block] = USED if self._refs[block] == 1 else SHARED
                continue
            self._free[block] = None
            if block in self._key_of:
                self.num_cached += 1
                self.states[block] = CACHED
            else:
                self._free.move_to_end(block, last=False)
                self.states[block] = FREE

    def publish(self, block: int, key: Key) -> None:
        """From now on `block_of(key)` finds `block`, which is in use. Where another block holds the
        same content already, that one stays the one to be found."""
        if not self._refs[block] or block in self._key_of:
            raise ValueError(f"block {block} is free or published already")
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key
            self._tag(block, key[1][:TAG_BYTES])

    def holds(self, key: Key) -> bool:
        """Whether a block with this content can be found."""
        return key in self._block_of

    def block_of(self, key: Key) -> int:
        """The block with this content, used or free. KeyError if there is none."""
        return self._block_of[key]

    def key(self, block: int) -> Key | None:
        """What `block` is found by."""
        return self._key_of.get(block)

    def published(self) -> list[tuple[Key, int]]:
        """All content that can be found, and where: used blocks, then free ones, the last used
        first."""
        used = [(key, block) for key, block in self._block_of.items() if self._refs[block]]
        free = [(self._key_of[b], b) for b in reversed(self._free) if b in self._key_of]
        return used + free

    def forget_all(self) -> None:
        """Nothing is found any more: for when the content of blocks is in doubt."""
        self._key_of.clear()
        self._block_of.clear()
        self.num_cached = 0
        self.tags = bytearray(len(self.tags))
        self.states = self.states.replace(bytes([CACHED]), bytes([FREE]))

    def _forget(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]
        self._tag(block, bytes(TAG_BYTES))

    def _tag(self, block: int, tag: bytes) -> None:
        self.tags[block * TAG_BYTES : (block + 1) * TAG_BYTES] = tag

    def check(self) -> None:
        """Raises AssertionError where an invariant does not hold; O(num_blocks)."""
        assert all(refs >= 0 for refs in self._refs), "negative reference count"
        free = {block for block, refs in enumerate(self._refs) if refs == 0}
        assert free == self._free.keys(), "the free list and the reference counts disagree"
        assert {b: k for k, b in self._block_of.items()} == self._key_of, "index not one to one"
        assert self.num_cached == len(free & self._key_of.keys()), "cached blocks miscounted"
        for block, refs in enumerate(self._refs):
            known = block in self._key_of
            state = min(refs + 1, SHARED) if refs else (CACHED if known else FREE)
            assert self.states[block] == state, f"block {block}: state {self.states[block]}"


def _ignore(_: int, __: Key) -> None:
    """Nothing lies below."""
