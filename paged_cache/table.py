"""The block table of one sequence: position -> block."""

from __future__ import annotations


class BlockTable:
    """The blocks of one sequence in one KV group, in order of position. Append-only while it lives.

    Token at position p lies in `blocks[p // block_size]`, row `p % block_size`:

        position  0 1 2 3 | 4 5 6 7 | 8 9 . .        block_size = 4
        blocks        7   |    2    |   11
    """

    __slots__ = ("blocks",)

    def __init__(self) -> None:
        self.blocks: list[int] = []

    def __len__(self) -> int:
        return len(self.blocks)

    def append(self, blocks: list[int]) -> None:
        """Adds blocks for the positions that follow."""
        self.blocks.extend(blocks)

    def clear(self) -> list[int]:
        """Empties the table and returns its blocks, the last one first: the tail of a sequence is
        the least likely to be found again by another, so it should be evicted first."""
        blocks, self.blocks = self.blocks[::-1], []
        return blocks
