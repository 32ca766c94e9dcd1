import pytest

from paged_cache.manager import KVCacheManager, NewBlocks
from paged_cache.pool import BlockPool
from paged_cache.table import BlockTable


def make(num_blocks: int, block_size: int = 4) -> KVCacheManager:
    return KVCacheManager(BlockPool(num_blocks), block_size)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_for(tokens: int, blocks: int):
    assert make(1).blocks_for(tokens) == blocks


def test_reserve_appends_only_what_is_missing():
    cache, table = make(4), BlockTable()
    assert cache.reserve(table, 5) == NewBlocks(0, [0, 1])
    assert cache.reserve(table, 8) == NewBlocks(2, [])
    assert cache.reserve(table, 9) == NewBlocks(2, [2])
    assert table.blocks == [0, 1, 2]
    assert cache.reserve(table, 3) == NewBlocks(3, [])


def test_reserve_that_fails_changes_nothing():
    cache, table = make(3), BlockTable()
    cache.reserve(table, 4)
    assert cache.reserve(table, 17) is None
    assert (table.blocks, cache.pool.num_free) == ([0], 2)


def test_release_frees_the_tail_first():
    cache, table = make(3), BlockTable()
    cache.reserve(table, 12)
    cache.release(table)
    assert (len(table), cache.pool.take(3)) == (0, [2, 1, 0])


def test_fits_empty_ignores_who_is_there():
    cache = make(2)
    cache.reserve(BlockTable(), 8)
    assert cache.fits_empty(8)
    assert not cache.fits_empty(9)


def test_block_size_must_be_positive():
    with pytest.raises(ValueError, match="block_size"):
        make(1, 0)
