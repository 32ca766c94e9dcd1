"""What is found of a prompt, and why not more."""

import pytest

from paged_cache import explain
from paged_cache.explain import Missing
from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool

OLD = list(range(22))  # five full blocks of 4 tokens, and a part of one


def cache_that_knows(*prompts: list[int], salt: str = "", tenant: str = "", **options):
    cache = KVCacheManager(BlockPool(options.pop("blocks", 32)), 4, **options)
    for prompt in prompts:
        compute(cache, prompt, salt, tenant)
    return cache


def compute(cache: KVCacheManager, prompt: list[int], salt: str = "", tenant: str = "") -> None:
    """As a request that came and went."""
    seq = cache.open(salt, tenant)
    assert cache.start(seq, prompt, len(prompt)) is not None
    cache.publish(seq, prompt, len(prompt))
    cache.release(seq)


def test_the_same_prompt_is_found_up_to_its_last_block():
    answer = cache_that_knows(OLD).explain(OLD)
    assert answer.found == 20
    assert answer.held == [5]
    assert answer.missing == [Missing(20, 2, "last_block")]


def test_what_nobody_sent_is_cold():
    answer = cache_that_knows(OLD).explain([50, *OLD])
    assert answer.missing == [Missing(0, 20, "cold"), Missing(20, 3, "last_block")]


@pytest.mark.parametrize(("place", "found", "start"), [(1, 0, 0), (4, 4, 4), (9, 8, 8), (11, 8, 8)])
def test_a_prompt_that_differs_at_a_token(place: int, found: int, start: int):
    new = [*OLD[:place], 77, *OLD[place + 1 :]]
    answer = cache_that_knows([60, 61], OLD, OLD[:2]).explain(new)
    assert answer.found == found
    assert answer.missing[0] == Missing(start, 20 - start, "diverged", place)


def test_more_of_the_same_is_cold():
    answer = cache_that_knows(OLD).explain([*OLD, *range(80, 90)])
    assert answer.found == 20
    assert answer.missing == [Missing(20, 8, "cold"), Missing(28, 4, "last_block")]


def test_what_was_given_up_is_evicted():
    cache = cache_that_knows(OLD, blocks=6)
    compute(cache, [90] * 13)  # takes the four oldest: the empty one and OLD's tail
    answer = cache.explain(OLD)
    assert answer.found == 8
    assert answer.missing == [Missing(8, 12, "evicted"), Missing(20, 2, "last_block")]
    compute(cache, [91] * 24)
    compute(cache, [92] * 24)
    assert cache.explain(OLD).missing[0].reason == "cold", "evicted too long ago"


def test_content_under_another_salt():
    cache = cache_that_knows(OLD, salt="a")
    answer = cache.explain([*OLD[:13], *range(80, 90)], salt="b")
    assert answer.found == 0
    assert answer.missing == [
        Missing(0, 12, "other_salt"),
        Missing(12, 8, "cold"),
        Missing(20, 3, "last_block"),
    ]


@pytest.mark.parametrize(("isolated", "reason"), [(False, "other_salt"), (True, "cold")])
def test_an_isolated_tenant_learns_nothing_of_the_others(isolated: bool, reason: str):
    cache = cache_that_knows(OLD, salt="a", tenant="me", isolate_tenants=isolated)
    assert cache.explain(OLD, tenant="you").missing[0].reason == reason
    assert cache.explain(OLD, tenant="me").missing[0].reason == "other_salt"


def test_without_a_prefix_cache_nothing_is_found():
    assert cache_that_knows(OLD, prefix_cache=False).explain(OLD).missing == [Missing(0, 22, "off")]


def test_groups_with_a_window_hold_less():
    cache = cache_that_knows(OLD, windows=(0, 5), blocks=12)
    assert cache.explain(OLD).held == [5, 5]
    compute(cache, [90] * 8)  # evicts a tail
    answer = cache.explain(OLD)
    assert answer.held == [3, 5]
    assert (answer.found, answer.missing[0]) == (12, Missing(12, 8, "evicted"))


def test_explaining_changes_nothing():
    cache = cache_that_knows(OLD)
    before = list(cache.pool._free), cache.pool.num_cached
    cache.explain(OLD)
    cache.explain([5] * 20, salt="x")
    assert (list(cache.pool._free), cache.pool.num_cached) == before


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(explain, "REMEMBERED_ROOTS", 3)
    monkeypatch.setattr(explain, "REMEMBERED_TOKENS", 50)
    cache = cache_that_knows()
    for salt in range(9):
        compute(cache, [salt] * 20, str(salt))
    assert len(cache.memory._owners) == 3
    assert sum(len(tokens) for _, tokens, _ in cache.memory._started) == 40
