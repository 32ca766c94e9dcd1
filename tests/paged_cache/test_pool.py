import pytest

from paged_cache.pool import BlockPool


def test_takes_the_block_that_holds_nothing_before_any_that_does():
    pool = BlockPool(4)
    assert pool.take(3) == [0, 1, 2]
    pool.publish(0, (0, b"a"))
    pool.publish(2, (0, b"c"))
    pool.drop([0])
    pool.drop([1])
    pool.drop([2])
    assert pool.num_cached == 2
    assert pool.take(4) == [1, 3, 0, 2]
    assert (pool.num_evicted, pool.num_cached) == (2, 0)
    assert not pool.holds((0, b"a"))
    pool.check()


def test_evicts_what_has_been_free_longest():
    pool = BlockPool(3)
    for block, name in zip(pool.take(3), (b"a", b"b", b"c"), strict=True):
        pool.publish(block, (0, name))
    pool.drop([1])
    pool.drop([0])
    pool.drop([2])
    pool.share([1])  # a hit makes it the newest once it is free again
    pool.drop([1])
    assert pool.take(2) == [0, 2]
    assert pool.holds((0, b"b"))


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


def test_a_cached_block_comes_back_with_its_content():
    pool = BlockPool(2)
    [block] = pool.take(1)
    pool.publish(block, (1, b"x"))
    pool.drop([block])
    assert pool.block_of((1, b"x")) == block
    pool.share([block])
    assert (pool.num_free, pool.num_cached) == (1, 0)
    assert pool.key(block) == (1, b"x")
    pool.check()


def test_content_is_found_in_the_first_block_that_has_it():
    pool = BlockPool(2)
    first, second = pool.take(2)
    pool.publish(first, (0, b"x"))
    pool.publish(second, (0, b"x"))
    assert pool.block_of((0, b"x")) == first
    assert pool.key(second) is None
    pool.check()


def test_forget_all_leaves_counts_alone():
    pool = BlockPool(2)
    used, free = pool.take(2)
    pool.publish(used, (0, b"x"))
    pool.publish(free, (0, b"y"))
    pool.drop([free])
    pool.forget_all()
    assert not pool.holds((0, b"x"))
    assert (pool.num_used, pool.num_free, pool.num_cached) == (1, 1, 0)
    pool.check()


def test_misuse_is_an_error():
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="free already"):
        pool.drop([0])
    with pytest.raises(ValueError, match="nothing to share"):
        pool.share([1])
    with pytest.raises(ValueError, match="free or published"):
        pool.publish(0, (0, b"x"))
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)
    pool.check()


def test_check_finds_a_block_that_is_lost():
    pool = BlockPool(2)
    pool.take(1)
    pool._refs[0] = 0
    with pytest.raises(AssertionError, match="disagree"):
        pool.check()
