import pytest
import torch

from paged_cache.layout import KVFormat, KVGroup, KVLayout
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


def test_layer_groups_name_the_group_of_each_layer():
    groups = (KVGroup((0, 2)), KVGroup((1, 3), window=64))
    mixed = KVLayout(16, 1, 1, 64, groups, KVFormat("float32"))
    assert mixed.layer_groups == (0, 1, 0, 1)
    assert mixed.num_layers == 4


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="float8"):
        KVFormat("float8")
