"""Launches of the decode kernel, chosen from shapes."""

import pytest

from kernels.decode_choices import MAX_IDLE, MAX_SEQS, MIN_TILES, Choice, derive, plan_splits

CHOICE = Choice(tile=64, warps=4, stages=3, programs=2)


def bound(seqs: int, longest: int, kv_heads: int = 8) -> int:
    return plan_splits(CHOICE, seqs, kv_heads, longest, processors=132).bound


def test_full_batches_are_not_split() -> None:
    assert bound(1024, 32_768) == 1


def test_one_long_sequence_fills_the_processors() -> None:
    assert 2 * 132 - 8 < bound(1, 32_768) * 8 <= 2 * 132


def test_one_long_sequence_fills_them_in_a_large_batch_too() -> None:
    assert bound(8, 32_768) == bound(1, 32_768)


def test_more_sequences_than_the_device_adds_up_are_not_split() -> None:
    assert bound(MAX_SEQS, 32_768, kv_heads=1) > bound(MAX_SEQS + 1, 32_768, kv_heads=1) == 1


def test_short_tables_are_not_split() -> None:
    for longest in (1, 64, 64 * MIN_TILES):
        assert bound(1, longest, kv_heads=1) == 1


@pytest.mark.parametrize("seqs", [0, 1, 3, 40, 256, 1000])
@pytest.mark.parametrize("longest", [0, 17, 4096, 1 << 20])
@pytest.mark.parametrize("kv_heads", [1, 8, 1000])
def test_bounds_are_always_usable(seqs: int, longest: int, kv_heads: int) -> None:
    plan = plan_splits(CHOICE, seqs, kv_heads, longest, processors=132)
    assert plan.bound >= 1 and plan.wanted >= 1
    assert plan.bound == 1 or plan.bound * seqs * kv_heads <= MAX_IDLE * 2 * 132


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_tiles_in_flight_fit_two_programs_into_a_processor(head_dim: int, size: int) -> None:
    choice = derive(head_dim, head_dim * size)
    assert choice.tile in (32, 64) and choice.stages in (3, 4)
    if head_dim * size <= 512:
        assert 2 * (choice.stages - 1) * 2 * choice.tile * head_dim * size <= 160 << 10
