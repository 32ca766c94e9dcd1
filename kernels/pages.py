"""Pages whose numbers are quantized, and the plain torch codec that defines what they mean.

Plain pages are a tensor [2, num_blocks, kv_heads, block_size, head_dim]. Quantized ones are bytes,
[2, num_blocks, kv_heads, tile_bytes]: still one contiguous tile per block and head, whose scales
follow its codes, so that a block is copied, shared and freed as one piece of memory.

    tile, block_size B = 4, head_dim D, G = groups of a head

    | codes            | scales           | zero points      |
    | t0 | t1 | t2 | t3| t0 | t1 | t2 | t3| t0 | t1 | t2 | t3|

    format     codes per token       scales per token   zero points    number
    int8       D bytes               1 bfloat16         none           code * scale
    fp8_e4m3   D bytes               1 bfloat16         none           code * scale
    int4       D / 2 bytes           G = D / 32         G int8         (code - zero) * scale

    int4, one group of 32 codes c in 16 bytes:  byte i = c[i] | c[i + 16] << 4

Scales are per token and head for 8 bits and per token and 32 dimensions for 4: a token's numbers
never change once they are written, so nothing is ever encoded twice. The choice of asymmetric
groups for few bits is KIVI's (Liu et al., 2024), which however groups keys along tokens; along
dimensions, no token waits for the 31 others of its group. Scales are bfloat16 and not float16
because the latter ends at 6e-5 (a largest value of 0.008 in 8 bits). Numbers are divided by the
scale as it is stored, hence its rounding costs no accuracy.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32  # dimensions of an int4 head that share a scale and a zero point
LARGEST = {"int8": 127.0, "fp8_e4m3": 448.0, "int4": 15.0}  # code
FORMATS = tuple(LARGEST)


class Codes(NamedTuple):
    """Encoded rows: codes uint8 [..., bytes], scales bfloat16 [..., groups], zeros int8 or None."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedPages:
    """The quantized keys and values of one layer.

    Attributes:
        tiles: uint8 [2, num_blocks, kv_heads, tile_bytes]; 0 = keys, 1 = values
        format: one of FORMATS

    Raises ValueError if a tile of these bytes is not one of this format.
    """

    tiles: Tensor
    format: str
    block_size: int
    head_dim: int

    def __post_init__(self) -> None:
        wanted = tile_bytes(self.format, self.block_size, self.head_dim)
        if self.tiles.dtype != torch.uint8 or self.tiles.shape[-1] != wanted:
            raise ValueError(
                f"{self.format} tiles of {self.block_size} x {self.head_dim} take {wanted} bytes, "
                f"got {self.tiles.shape[-1]} of {self.tiles.dtype}"
            )

    @property
    def parts(self) -> Codes:
        """Views of the tiles: each [2, num_blocks, kv_heads, block_size, its bytes or groups]."""
        per_code, groups = row_bytes(self.format, self.head_dim)
        sizes = [self.block_size * n for n in (per_code, 2 * groups)]
        codes, scales, zeros = self.tiles.tensor_split([sizes[0], sum(sizes)], dim=-1)
        rows = (self.block_size, -1)
        return Codes(
            codes.unflatten(-1, rows),
            scales.view(torch.bfloat16).unflatten(-1, rows),
            zeros.view(torch.int8).unflatten(-1, rows) if self.format == "int4" else None,
        )


Pages = Tensor | QuantizedPages


def page_shape(pages: Pages) -> tuple[int, int, int]:
    """(kv_heads, block_size, head_dim)."""
    if isinstance(pages, QuantizedPages):
        return pages.tiles.shape[2], pages.block_size, pages.head_dim
    return tuple(pages.shape[2:])


def memory(pages: Pages) -> tuple[Tensor, str]:
    """The tensor behind the pages, [2, num_blocks, kv_heads, ...], and its format or "plain"."""
    if isinstance(pages, QuantizedPages):
        return pages.tiles, pages.format
    return pages, "plain"


def row_bytes(format: str, head_dim: int) -> tuple[int, int]:
    """(bytes of codes, groups) of one token of one head."""
    if format != "int4":
        return head_dim, 1
    if head_dim % GROUP:
        raise ValueError(f"int4 pages need a head size that {GROUP} divides, got {head_dim}")
    return head_dim // 2, head_dim // GROUP


def tile_bytes(format: str, block_size: int, head_dim: int) -> int:
    """Bytes of one block of one head, keys or values."""
    codes, groups = row_bytes(format, head_dim)
    return block_size * (codes + groups * (3 if format == "int4" else 2))


def encode(numbers: Tensor, format: str) -> Codes:
    """Quantizes rows [..., head_dim] of any float dtype, in float32."""
    numbers = numbers.float()
    if format == "int4":
        return _encode_groups(numbers)
    scales = (numbers.abs().amax(-1, keepdim=True) / LARGEST[format]).bfloat16()
    ratio = numbers / _divisor(scales)
    ratio = ratio.clamp(-LARGEST[format], LARGEST[format])
    if format == "int8":
        return Codes(ratio.round().to(torch.int8).view(torch.uint8), scales, None)
    return Codes(ratio.to(torch.float8_e4m3fn).view(torch.uint8), scales, None)


def _encode_groups(numbers: Tensor) -> Codes:
    """A whole zero point shifts the grid by at most half a step, which is also the error within.

    It has 8 bits: where a group is far from zero and narrow, the scale grows until it fits.
    """
    groups = numbers.unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = torch.maximum((high - low) / LARGEST["int4"], low.abs() / 127).bfloat16()
    divisor = _divisor(scales)
    zeros = (-low / divisor).round().clamp(-127, 127)
    codes = ((groups / divisor[..., None]).round() + zeros[..., None]).clamp(0, LARGEST["int4"])
    codes = codes.to(torch.uint8)
    packed = codes[..., : GROUP // 2] | codes[..., GROUP // 2 :] << 4
    return Codes(packed.flatten(-2), scales, zeros.to(torch.int8))


def _divisor(scales: Tensor) -> Tensor:
    """The stored scales as float32, 1 for rows of zeros."""
    return torch.where(scales > 0, scales.float(), 1.0)


def decode(rows: Codes, format: str) -> Tensor:
    """What encoded rows stand for: float32 [..., head_dim]."""
    scales = rows.scales.float()
    if format != "int4":
        kind = torch.int8 if format == "int8" else torch.float8_e4m3fn
        return rows.codes.view(kind).float() * scales
    packed = rows.codes.unflatten(-1, (-1, GROUP // 2))
    codes = torch.cat([packed & 15, packed >> 4], dim=-1).float()
    return ((codes - rows.zeros.float()[..., None]) * scales[..., None]).flatten(-2)
