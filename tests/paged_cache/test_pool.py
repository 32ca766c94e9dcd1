import pytest

from paged_cache.pool import BlockPool


def test_takes_the_block_that_has_been_free_longest():
    pool = BlockPool(4)
    assert pool.take(3) == [0, 1, 2]
    pool.drop([1])
    pool.drop([0])
    assert pool.take(3) == [3, 1, 0]
    assert (pool.num_free, pool.num_used) == (0, 4)


def test_take_is_all_or_nothing():
    pool = BlockPool(3)
    pool.take(1)
    assert pool.take(3) is None
    assert (pool.num_free, pool.num_used) == (2, 1)
    assert pool.take(0) == []


def test_a_shared_block_is_free_after_its_last_drop():
    pool = BlockPool(2)
    [block] = pool.take(1)
    pool.share([block])
    pool.drop([block])
    assert (pool.refs(block), pool.num_free) == (1, 1)
    pool.drop([block])
    assert (pool.refs(block), pool.num_free) == (0, 2)
    pool.check()


def test_misuse_is_an_error():
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="free already"):
        pool.drop([0])
    with pytest.raises(ValueError, match="cannot be shared"):
        pool.share([1])
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)
    pool.check()


def test_check_finds_a_block_that_is_lost():
    pool = BlockPool(2)
    pool.take(1)
    pool._refs[0] = 0
    with pytest.raises(AssertionError, match="disagree"):
        pool.check()
