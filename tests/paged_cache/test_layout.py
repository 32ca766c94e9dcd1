import pytest
import torch

from paged_cache.layout import QUANTIZED, KVFormat, KVGroup, KVLayout, group_layers
from paged_cache.storage import KVStorage


def layout(layers: int, kv_heads: int, head_dim: int, dtype: str, blocks=3, block_size=16):
    groups = (KVGroup(tuple(range(layers))),)
    return KVLayout(block_size, blocks, kv_heads, head_dim, groups, KVFormat(dtype))


def test_gpt2_takes_36_kib_per_token_in_bf16():
    """2 x 12 layers x 12 heads x 64 x 2 bytes; 1,000 tokens of K alone are 18,432,000 bytes."""
    gpt2 = layout(12, 12, 64, "bfloat16")
    assert gpt2.bytes_per_token == 36_864
    assert gpt2.bytes_per_token * 1000 == 2 * 18_432_000
    assert gpt2.bytes_per_block == 16 * 36_864


def test_how_many_blocks_fit():
    shape = layout(2, 2, 8, "float32", block_size=4)
    assert shape.bytes_per_block == 4 * 2 * 2 * 2 * 8 * 4
    assert shape.blocks_in(shape.bytes_per_block * 5) == 5
    assert shape.blocks_in(shape.bytes_per_block * 5 - 1) == 4
    assert shape.blocks_in(-1) == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_storage_takes_exactly_the_planned_bytes(dtype: str):
    shape = layout(3, 2, 80, dtype, blocks=5, block_size=32)
    storage = KVStorage(shape, torch.device("cpu"))
    assert storage.num_bytes == shape.num_bytes
    assert len(storage.pages) == 3
    assert storage.pages[0].shape == (2, 5, 2, 32, 80)
    assert storage.pages[0].dtype == getattr(torch, dtype)


@pytest.mark.parametrize("head_dim", [64, 128, 96])
@pytest.mark.parametrize("dtype", QUANTIZED)
def test_quantized_storage_takes_exactly_the_planned_bytes(dtype: str, head_dim: int):
    shape = layout(3, 2, head_dim, dtype, blocks=5, block_size=8)
    storage = KVStorage(shape, torch.device("cpu"))
    assert storage.num_bytes == shape.num_bytes == 5 * shape.bytes_per_block
    assert storage.pages[0].shape == (2, 5, 2, 8 * shape.format.bytes_per_head(head_dim))
    assert storage.pages[0].dtype == torch.uint8


@pytest.mark.parametrize(("dtype", "gain"), [("int8", 1.9), ("fp8_e4m3", 1.9), ("int4", 3.3)])
def test_the_same_bytes_hold_more_tokens(dtype: str, gain: float):
    for head_dim in (64, 128):
        plain, small = (layout(4, 2, head_dim, name) for name in ("bfloat16", dtype))
        memory = 1 << 30
        assert small.blocks_in(memory) >= gain * plain.blocks_in(memory)


def test_int4_needs_whole_groups():
    assert not KVFormat("int4").holds(80)
    with pytest.raises(ValueError, match="32 divides: 80"):
        KVFormat("int4").bytes_per_head(80)


def test_every_layer_has_a_group_and_a_place_in_its_blocks():
    groups = (KVGroup((0, 2)), KVGroup((1, 3), window=64))
    mixed = KVLayout(16, 1, 1, 64, groups, KVFormat("float32"))
    assert mixed.places == ((0, 0), (1, 0), (0, 1), (1, 1))
    assert mixed.windows == (0, 64)
    assert (mixed.pages_per_block, mixed.bytes_per_block) == (2, 2 * 2 * 16 * 64 * 4)
    assert mixed.bytes_per_token == 4 * 2 * 64 * 4


def test_layers_of_different_groups_share_pages():
    groups = (KVGroup((0, 2)), KVGroup((1,), window=64))
    layout = KVLayout(4, 5, 1, 8, groups, KVFormat("float32"))
    storage = KVStorage(layout, torch.device("cpu"))
    assert storage.num_bytes == layout.num_bytes
    zero, one, two = storage.pages
    assert zero.data_ptr() == one.data_ptr() != two.data_ptr()


@pytest.mark.parametrize(
    ("windows", "sizes"),
    [
        ((0,) * 32, [(32, 0)]),
        ((4096,) * 32, [(32, 4096)]),
        ((0, 512) * 13, [(13, 0), (13, 512)]),
        ((0, 512, 512, 512), [(1, 0), (1, 512), (1, 512), (1, 512)]),
        ((0,) * 8 + (9,) * 10, [(8, 0), (10, 9)]),
    ],
)
def test_layers_are_cut_into_groups_of_equal_size(windows, sizes):
    groups = group_layers(windows)
    assert [(len(group.layers), group.window) for group in groups] == sizes
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))


def test_one_full_layer_in_six_wastes_nothing_but_the_last_group():
    """Gemma 3's pattern: 26 layers, every sixth sees everything."""
    groups = group_layers(tuple(0 if i % 6 == 5 else 512 for i in range(26)))
    assert [len(group.layers) for group in groups] == [4, 4, 4, 4, 4, 4, 2]
    assert [group.window for group in groups] == [0, *[512] * 6]


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="float8"):
        KVFormat("float8")
