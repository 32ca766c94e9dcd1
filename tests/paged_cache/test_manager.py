import pytest

from paged_cache.block_copy import BlockCopy
from paged_cache.manager import KVCacheManager, NewBlocks
from paged_cache.pool import BlockPool
from paged_cache.table import SequenceBlocks


def make(num_blocks: int, windows: tuple[int, ...] = (0,), **options) -> KVCacheManager:
    return KVCacheManager(BlockPool(num_blocks), 4, windows, **options)


def computed(cache: KVCacheManager, tokens: list[int], salt: str = "") -> SequenceBlocks:
    """A sequence whose tokens are all computed and published."""
    seq = cache.open(salt)
    assert cache.start(seq, tokens, len(tokens)) is not None
    cache.publish(seq, tokens, len(tokens))
    return seq


def blocks_of(seq: SequenceBlocks) -> list[list[int]]:
    return [table.blocks for table in seq.tables]


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_for(tokens: int, blocks: int):
    assert make(1).blocks_for(tokens) == blocks


def test_grow_appends_only_what_is_missing():
    cache = make(4)
    seq = cache.open()
    assert cache.grow(seq, 0, 5).new == [NewBlocks(0, 0, [0, 1])]
    assert cache.grow(seq, 5, 8).new == []
    assert cache.grow(seq, 8, 9).new == [NewBlocks(0, 2, [2])]
    assert blocks_of(seq) == [[0, 1, 2]]


def test_grow_that_fails_changes_nothing():
    cache = make(3)
    seq = cache.open()
    cache.grow(seq, 0, 4)
    assert cache.grow(seq, 4, 17) is None
    assert (blocks_of(seq), cache.pool.num_free) == ([[0]], 2)


def test_release_frees_the_tail_first():
    cache = make(3)
    seq = cache.open()
    cache.grow(seq, 0, 12)
    cache.publish(seq, list(range(12)), 12)
    cache.release(seq)
    assert (blocks_of(seq), cache.pool.take(3)) == ([[]], [2, 1, 0])


def test_a_prefix_is_found_block_by_block_and_the_last_token_is_left():
    cache = make(16)
    tokens = list(range(12))
    first = computed(cache, tokens)
    for others, found in [
        (tokens, 8),  # all 12 are there, but the last must be computed
        ([*tokens, 99], 12),
        ([*tokens[:9], 77, 77], 8),
        ([*tokens[:3], 77, 77], 0),
        ([5], 0),
    ]:
        seq = cache.open()
        position, new = cache.start(seq, others, 32)
        assert position == found
        assert blocks_of(seq)[0][: found // 4] == blocks_of(first)[0][: found // 4]
        assert new == [NewBlocks(0, 0, blocks_of(seq)[0])]
        cache.release(seq)
        cache.pool.check()


def test_blocks_of_a_finished_sequence_are_found_until_they_are_evicted():
    cache = make(4)
    cache.release(computed(cache, list(range(8))))
    assert cache.pool.num_cached == 2
    again = cache.open()
    assert cache.start(again, list(range(9)), 32)[0] == 8
    cache.release(again)
    cache.release(computed(cache, [50] * 16))
    assert cache.start(cache.open(), list(range(9)), 32)[0] == 0


def test_salts_keep_sequences_apart():
    cache = make(16)
    computed(cache, list(range(8)), salt="a")
    assert cache.start(cache.open("b"), list(range(9)), 32)[0] == 0
    assert cache.start(cache.open("a"), list(range(9)), 32)[0] == 8


@pytest.mark.parametrize(("isolated", "found"), [(False, 8), (True, 0)])
def test_tenants_are_kept_apart_where_that_is_asked_for(isolated: bool, found: int):
    cache = make(16, isolate_tenants=isolated)
    mine = cache.open("", "me")
    assert cache.start(mine, list(range(8)), 32) is not None
    cache.publish(mine, list(range(8)), 8)
    assert cache.start(cache.open("", "you"), list(range(9)), 32)[0] == found
    assert cache.start(cache.open("", "me"), list(range(9)), 32)[0] == 8


def test_salt_and_tenant_are_told_apart():
    cache = make(1, isolate_tenants=True)
    pairs = [("c", "ab"), ("bc", "a"), ("abc", ""), ("", "abc")]
    assert len({cache.open(salt, tenant).root for salt, tenant in pairs}) == 4


def test_hashes_differ_between_processes():
    chains = []
    for _ in range(2):
        cache = make(8)
        chains.append(computed(cache, list(range(4))).chain)
    assert chains[0] != chains[1]


def test_without_the_prefix_cache_nothing_is_found():
    cache = make(8, prefix_cache=False)
    cache.release(computed(cache, list(range(8))))
    assert cache.pool.num_cached == 0
    assert cache.start(cache.open(), list(range(9)), 32)[0] == 0


def test_start_that_fails_changes_nothing():
    cache = make(4)
    cache.release(computed(cache, list(range(8))))
    seq = cache.open()
    assert cache.start(seq, list(range(20)), 32) is None
    assert (blocks_of(seq), cache.pool.num_free, cache.pool.num_cached) == ([[]], 4, 2)
    cache.pool.check()


def test_a_fork_shares_full_blocks_and_copies_the_tail_before_it_writes():
    cache = make(8)
    parent = computed(cache, list(range(7)))
    child = cache.open()
    assert cache.fork(parent, child, 6)
    assert blocks_of(child) == blocks_of(parent) == [[0, 1]]
    grown = cache.grow(child, 6, 7)
    assert grown.copies == [BlockCopy(1, 2)]
    assert grown.new == [NewBlocks(0, 1, [2])]
    assert (blocks_of(child), blocks_of(parent)) == ([[0, 2]], [[0, 1]])
    assert [cache.pool.refs(block) for block in range(3)] == [2, 1, 1]


def test_a_fork_at_a_block_boundary_copies_nothing():
    cache = make(8)
    parent, child = computed(cache, list(range(9))), cache.open()
    assert cache.fork(parent, child, 8)
    grown = cache.grow(child, 8, 9)
    assert grown.copies == []
    assert blocks_of(child) == [[0, 1, 3]]


def test_the_last_holder_of_a_block_writes_in_place():
    cache = make(8)
    parent, child = computed(cache, list(range(7))), cache.open()
    cache.fork(parent, child, 6)
    cache.release(parent)
    assert cache.grow(child, 6, 7).copies == []


def test_blocks_behind_the_window_go_back():
    cache = make(8, (0, 6))
    seq = cache.open()
    cache.grow(seq, 0, 16)
    assert cache.pool.num_free == 0
    # Position 16 sees 11..16, so blocks 0 and 1 (positions 0 to 7) of the sliding group are free.
    assert cache.grow(seq, 16, 17).new == [NewBlocks(0, 4, [4]), NewBlocks(1, 4, [5])]
    assert [table.start for table in seq.tables] == [0, 2]


def test_a_sliding_group_needs_only_its_window_for_a_hit():
    cache = make(32, (6,))
    tokens = list(range(20))
    seq = computed(cache, tokens)
    cache.grow(seq, 19, 20)  # gives blocks 0 to 2 back: position 19 sees 14..19
    cache.release(seq)
    cache.pool.take(32 - 3)  # evicts all but the newest three, which hold positions 8 to 19
    again = cache.open()
    position, new = cache.start(again, [*tokens, 1], 32)
    assert position == 20
    assert new[0].first == 3


def test_groups_agree_on_the_longest_prefix_that_all_have():
    cache = make(64, (0, 6))
    tokens = list(range(24))
    seq = computed(cache, tokens)
    sliding = seq.tables[1].blocks[4]
    cache.release(seq)
    cache.pool._forget(sliding)
    cache.pool.num_cached -= 1
    # Without block 4, a hit of 24 or 20 tokens cannot see its window; one of 16 sees 11..16.
    assert cache.start(cache.open(), [*tokens, 1], 32)[0] == 16


def test_most_blocks_is_the_window_and_a_step_for_sliding_groups():
    cache = make(1, (0, 8))
    assert cache.most_blocks(100, 4) == 25 + 4
    assert cache.most_blocks(8, 4) == 2 + 2


def test_block_size_must_be_positive():
    with pytest.raises(ValueError, match="block_size"):
        KVCacheManager(BlockPool(1), 0)
