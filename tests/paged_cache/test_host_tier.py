import pytest

from paged_cache.block_copy import BlockCopy
from paged_cache.host_tier import HostTier
from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool, Key
from paged_cache.table import SequenceBlocks


def key(name: str) -> Key:
    return 0, name.encode()


def stored(tier: HostTier, names: str) -> None:
    for name in names:
        assert tier.store(key(name)) is not None


def names(tier: HostTier) -> str:
    return "".join(sorted(k[1].decode() for k in tier._blocks))


def test_the_least_recently_used_gives_way():
    tier, gone = HostTier(3), []
    tier.on_evict = gone.append
    stored(tier, "abc")
    tier.touch(tier.find(key("a")))
    stored(tier, "d")
    assert (names(tier), [b.key for b in gone]) == ("acd", [key("b")])
    tier.check([])


def test_pinned_blocks_stay_and_a_full_tier_takes_nothing():
    tier = HostTier(2)
    stored(tier, "ab")
    a, b = tier.find(key("a")), tier.find(key("b"))
    tier.pin(a)
    tier.pin(a)
    stored(tier, "c")
    assert names(tier) == "ac"
    tier.pin(tier.find(key("c")))
    assert tier.store(key("d")) is None and tier.num_available == 0
    tier.unpin(a)
    assert tier.store(key("d")) is None, "one pin is left"
    tier.unpin(a)
    stored(tier, "d")
    assert names(tier) == "cd"
    tier.unpin(b)  # forgotten long ago
    tier.check([tier.find(key("c"))])


def test_without_keeping_a_slot_is_free_once_nobody_pins_it():
    tier = HostTier(1, keep=False)
    held = tier.store(key("a"))
    tier.pin(held)
    tier.unpin(held)
    assert tier.num_used == 0 and tier.find(key("a")) is None
    tier.check([])


def test_forgetting_frees_every_slot_and_outlives_old_pins():
    tier = HostTier(2)
    old = tier.store(key("a"))
    tier.pin(old)
    tier.forget_all()
    new = tier.store(key("a"))
    tier.unpin(old)
    assert tier.find(key("a")) is new and tier.num_used == 1
    tier.check([old])


def test_a_tier_without_slots_holds_nothing():
    tier = HostTier(0)
    assert tier.store(key("a")) is None and tier.find(key("a")) is None


# ---------------------------------------------------------------------- with the manager

TOKENS = list(range(13))


def make(
    blocks: int, slots: int, windows: tuple[int, ...] = (0,), prefix_cache: bool = True
) -> KVCacheManager:
    host = HostTier(slots, keep=prefix_cache)
    return KVCacheManager(BlockPool(blocks), 4, windows, prefix_cache=prefix_cache, host=host)


def computed(cache: KVCacheManager, tokens: list[int]) -> SequenceBlocks:
    seq = cache.open()
    assert cache.start(seq, tokens, len(tokens)) is not None
    cache.publish(seq, tokens, len(tokens))
    return seq


def copies_of(cache: KVCacheManager) -> list[BlockCopy]:
    copies, with_disk = cache.take_copies()
    assert with_disk == []
    return copies


def displaced(cache: KVCacheManager, tokens: list[int]) -> None:
    """Computes `tokens`, then fills the whole pool with something else."""
    cache.release(computed(cache, tokens))
    other = cache.open()
    assert cache.start(other, [99] * cache.pool.num_blocks * 4, 999) is not None
    cache.release(other)


def test_evicted_blocks_move_out_and_come_back_on_a_hit():
    cache = make(4, 8)
    displaced(cache, TOKENS)
    out = copies_of(cache)
    assert sorted((c.src, c.kind) for c in out) == [(i, "to_host") for i in range(3)]
    seq = cache.open()
    found, entries = cache.start(seq, TOKENS, 32)
    assert found == 12 and cache.tiers.host_hits == 12
    back = copies_of(cache)
    slot_of = {copy.src: copy.dst for copy in out}  # block b held tokens 4b..
    assert back == [
        BlockCopy(slot_of[place], block, "to_device")
        for place, block in enumerate(entries[0].blocks[:3])
    ]
    again = cache.open()
    cache.release(seq)
    assert cache.start(again, TOKENS, 32)[0] == 12 and copies_of(cache) == []


def test_what_is_brought_back_is_not_pushed_out_by_its_own_coming():
    """Every block that the hit takes evicts one, and the tier is just as large as the hit."""
    cache = make(4, 3)
    displaced(cache, TOKENS)
    cache.release(computed(cache, [50, *TOKENS]))
    copies_of(cache)
    assert cache.start(cache.open(), TOKENS, 32)[0] == 12
    assert [copy.kind for copy in copies_of(cache)] == ["to_device"] * 3


def test_a_hit_needs_a_free_block_for_everything_that_comes_back():
    cache = make(4, 8)
    displaced(cache, TOKENS)
    busy = cache.open()
    assert cache.start(busy, [7, 7, 7], 32) is not None
    seq = cache.open()
    assert cache.start(seq, TOKENS, 32) is None
    assert seq.tables[0].blocks == [] and cache.pool.num_free == 3
    cache.release(busy)
    assert cache.start(seq, TOKENS, 32)[0] == 12


def test_a_block_that_has_not_come_yet_is_not_copied_out():
    cache = make(4, 8)
    displaced(cache, TOKENS)
    copies_of(cache)
    seq = cache.open()
    cache.start(seq, TOKENS, 32)
    cache.release(seq)
    other = cache.open()
    cache.start(other, [98] * 16, 32)
    assert copies_of(cache) == []
    cache.tiers.host.check([])


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_swapped_sequence_finds_its_own_blocks(prefix_cache: bool):
    cache = make(4, 3, prefix_cache=prefix_cache)
    seq = computed(cache, TOKENS)
    assert cache.swap_out(seq, TOKENS, 13)
    assert cache.pool.num_free == 4 and cache.tiers.host.num_available == 0
    displacing = cache.open()
    cache.start(displacing, [5] * 16, 32)
    cache.release(displacing)
    assert cache.start(seq, TOKENS, 32)[0] == 12
    kinds = [copy.kind for copy in copies_of(cache)]
    assert kinds == ["to_host"] * 3 + ["to_device"] * 3


def test_without_a_prefix_cache_only_its_own_sequence_finds_swapped_blocks():
    cache = make(8, 8, prefix_cache=False)
    first, second = cache.open(), cache.open()
    cache.start(first, TOKENS, 32)
    assert cache.swap_out(first, TOKENS, 13)
    assert cache.start(second, TOKENS, 32)[0] == 0
    cache.release(second)
    assert cache.start(first, TOKENS, 32)[0] == 12
    copies_of(cache)
    assert cache.tiers.host.num_used == 0, "nobody will look for them again"


def test_a_swap_that_does_not_fit_changes_nothing():
    cache = make(8, 2)
    seq = computed(cache, TOKENS)
    assert not cache.swap_out(seq, TOKENS, 13)
    assert len(seq.tables[0].held) == 4 and copies_of(cache) == []
    cache.tiers.host.check([])


def test_a_swap_needs_what_the_window_sees_at_a_full_block():
    """At position 13 a window of 6 has given up block 1, which position 12 would see."""
    cache = make(8, 8, windows=(6,))
    for start, swapped in [(12, True), (13, False)]:
        seq = cache.open()
        cache.grow(seq, 0, 12)
        cache.grow(seq, start, start + 1)
        assert cache.swap_out(seq, [*TOKENS, 13, 14], start + 1) is swapped
        cache.release(seq)


def test_whoever_ends_gives_its_kept_blocks_up():
    cache = make(4, 3)
    seq = computed(cache, TOKENS)
    cache.swap_out(seq, TOKENS, 13)
    cache.tiers.host.check(seq.kept)
    cache.release(seq)
    cache.tiers.host.check([])
    assert cache.tiers.host.num_available == 3


def test_forgetting_forgets_the_tier():
    cache = make(4, 8)
    displaced(cache, TOKENS)
    seq = computed(cache, [*TOKENS[:5], 77])
    cache.swap_out(seq, [*TOKENS[:5], 77], 6)
    cache.forget_all()
    assert copies_of(cache) == []
    assert cache.start(cache.open(), TOKENS, 32)[0] == 0
    assert cache.start(seq, TOKENS, 32) is None
