"""What the codec of quantized pages loses, computed in float64, and how its bytes are laid out."""

import pytest
import torch

from kernels import reference
from kernels.pages import FORMATS, QuantizedPages, decode, encode, tile_bytes
from paged_cache.layout import QUANTIZED, KVFormat
from tests.kernels import problems

DIMS = (64, 96, 128)


def awkward(head_dim: int) -> torch.Tensor:
    """Rows of very different sizes, with outliers, constants, offsets and zeros."""
    rng = torch.Generator().manual_seed(head_dim)
    rows = torch.randn(64, head_dim, generator=rng, dtype=torch.float64)
    rows[:8] *= 10.0 ** torch.arange(-8, 8, 2)[:, None]
    rows[8:16, ::17] *= 50
    rows[16:24] = 3.0
    rows[24:32] += 100
    rows[32:40] = -rows[24:32]
    rows[40] = 0
    return rows.float()


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("name", FORMATS)
def test_error_is_at_most_half_a_step(name: str, head_dim: int):
    rows = awkward(head_dim)
    codes = encode(rows, name)
    got, want = decode(codes, name).double(), rows.double()
    scales = codes.scales.double()
    if name == "int4":
        low, high = (f(want.unflatten(-1, (-1, 32)), -1) for f in (torch.amin, torch.amax))
        limit = 0.56 * torch.maximum((high - low) / 15, low.abs() / 127).repeat_interleave(32, -1)
    elif name == "int8":
        limit = 0.51 * scales + 0.002 * want.abs()
    else:  # three bits of mantissa; below the smallest exponent a fixed step
        limit = torch.maximum(want.abs() * 0.0646, scales * 2.0**-9)
    assert ((got - want).abs() <= limit + 1e-30).all()
    assert not got[40].any()


def test_formats_and_bytes_are_those_of_the_layout():
    assert set(FORMATS) == set(QUANTIZED)
    for name in FORMATS:
        for head_dim in DIMS:
            per_token = KVFormat(name).bytes_per_head(head_dim)
            assert tile_bytes(name, 16, head_dim) == 16 * per_token


def test_tiles_of_the_wrong_size_are_refused():
    tiles = torch.zeros(2, 3, 2, 16 * 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="int8 tiles of 16 x 64 take 1056 bytes"):
        QuantizedPages(tiles, "int8", 16, 64)
    with pytest.raises(ValueError, match="32 divides"):
        QuantizedPages(tiles, "int4", 16, 80)


@pytest.mark.parametrize("name", FORMATS)
def test_store_touches_its_slots_only(name: str):
    key, value = problems.fused_store(2, 64, 3, torch.float32)
    pages = problems.empty_pages(name, 4, 2, 8, 64)
    before = pages.tiles.clone()
    reference.store_kv(key, value, pages, torch.tensor([17, -1, 31]))
    for part, old in zip(pages.parts, QuantizedPages(before, name, 8, 64).parts, strict=True):
        if part is None:
            continue
        part, old = part.view(torch.uint8), old.view(torch.uint8)
        changed = (part != old).any(-1).any(2).any(0).nonzero().tolist()
        assert set(map(tuple, changed)) <= {(2, 1), (3, 7)}
    for token, block, offset in ((0, 2, 1), (2, 3, 7)):
        for half, numbers in enumerate((key, value)):
            want = encode(numbers[token], name)
            assert torch.equal(pages.parts.codes[half][block, :, offset], want.codes)
            assert torch.equal(pages.parts.scales[half][block, :, offset], want.scales)
