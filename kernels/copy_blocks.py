"""Triton: copies whole blocks, all layers of all copies in one launch."""

import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048  # values that one program moves


@triton.jit
def copy_kernel(blocks, source, target, plane, block_values, CHUNK: tl.constexpr):
    """Grid (copies, planes, chunks of a block). A plane is the K or the V pages of one layer."""
    copy = tl.program_id(0)
    base = tl.program_id(1).to(tl.int64) * plane
    inside = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    mask = inside < block_values
    src = base + tl.load(source + copy) * block_values
    dst = base + tl.load(target + copy) * block_values
    tl.store(blocks + dst + inside, tl.load(blocks + src + inside, mask=mask), mask=mask)


def copy_blocks(blocks: Tensor, source: Tensor, target: Tensor) -> None:
    """Copies block source[i] to target[i] in every layer, in place.

    blocks          [layers, 2, num_blocks, kv_heads, ...], contiguous, quantized or not
    source, target  int64 [copies]; no block is in both
    """
    layers, two, num_blocks = blocks.shape[:3]
    block_values = blocks[0, 0, 0].numel()
    grid = (len(source), layers * two, triton.cdiv(block_values, CHUNK))
    copy_kernel[grid](blocks, source, target, num_blocks * block_values, block_values, CHUNK=CHUNK)
