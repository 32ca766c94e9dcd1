"""All that the scheduler may ask of the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from paged_cache.pool import BlockPool
from paged_cache.table import BlockTable


@dataclass(frozen=True, slots=True)
class NewBlocks:
    """Blocks appended to a table: `blocks` from table index `first` on."""

    first: int
    blocks: list[int]


class KVCacheManager:
    """Gives sequences the blocks that their next tokens need, and takes them back.

    `reserve` is all or nothing: it succeeds fully or changes nothing.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.pool = pool
        self.block_size = block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def fits_empty(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` could be held if it were alone."""
        return self.blocks_for(num_tokens) <= self.pool.num_blocks

    def reserve(self, table: BlockTable, num_tokens: int) -> NewBlocks | None:
        """Grows `table` until it holds `num_tokens` tokens.

        Returns:
            what was appended (perhaps nothing), or None, with nothing changed, if too few blocks
            are free.
        """
        first = len(table)
        missing = self.blocks_for(num_tokens) - first
        if missing <= 0:
            return NewBlocks(first, [])
        blocks = self.pool.take(missing)
        if blocks is None:
            return None
        table.append(blocks)
        return NewBlocks(first, blocks)

    def release(self, table: BlockTable) -> None:
        """Takes every block of `table` back, tail first."""
        self.pool.drop(table.clear())
