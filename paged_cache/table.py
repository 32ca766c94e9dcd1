"""The block tables of one sequence: position -> block, once per KV group."""

from __future__ import annotations

from paged_cache.host_tier import HostBlock

GONE = -1  # stands for a block behind the window: it went back to the pool


class BlockTable:
    """The blocks of one sequence in one KV group, in order of position.

    Token at position p lies in `blocks[p // block_size]`, row `p % block_size`. With a window, the
    blocks behind it are gone; `start` counts them:

        position  0 1 2 3 | 4 5 6 7 | 8 9 a b | c d . .        block_size = 4, window = 5
        blocks      GONE  |  GONE   |   11    |    2           start = 2
    """

    __slots__ = ("blocks", "start")

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.start = 0

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def held(self) -> list[int]:
        """The blocks that are there."""
        return self.blocks[self.start :]

    def fill(self, first: int, blocks: list[int]) -> None:
        """Gives an empty table its first blocks, from table index `first` on."""
        self.blocks = [GONE] * first + blocks
        self.start = first

    def append(self, blocks: list[int]) -> None:
        """Adds blocks for the positions that follow."""
        self.blocks.extend(blocks)

    def trim(self, start: int) -> list[int]:
        """Gives up the blocks before table index `start` and returns those that were there."""
        start = min(start, len(self.blocks))
        if start <= self.start:
            return []
        given_up = self.blocks[self.start : start]
        self.blocks[self.start : start] = [GONE] * len(given_up)
        self.start = start
        return given_up

    def clear(self) -> list[int]:
        """Empties the table and returns its blocks, the last one first: the tail of a sequence is
        the least likely to be found again by another, so it should be evicted first."""
        held = self.held[::-1]
        self.blocks, self.start = [], 0
        return held


class SequenceBlocks:
    """All that the cache keeps of one sequence.

    Attributes:
        tables: one per KV group.
        chain: chained hashes of the sequence's full blocks, as far as they were needed.
        root: what the chain starts from: two sequences share blocks only if their roots are equal.
        published: full blocks that can be found by others.
        kept: blocks that host memory keeps for the sequence until it runs.
        asked: whether the disk was asked for the beginning of the sequence; awaited: blocks that it
            has not answered for yet.
    """

    __slots__ = ("asked", "awaited", "chain", "kept", "published", "root", "tables")

    def __init__(self, num_groups: int, root: bytes) -> None:
        self.tables = tuple(BlockTable() for _ in range(num_groups))
        self.chain: list[bytes] = []
        self.root = root
        self.published = 0
        self.kept: list[HostBlock] = []
        self.asked = False
        self.awaited = 0

    @property
    def num_held(self) -> int:
        """Blocks that are there, in all groups."""
        return sum(len(table.blocks) - table.start for table in self.tables)
