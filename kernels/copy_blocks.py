"""Triton: copies whole blocks, all layers of all copies in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048  # values that one program moves


@triton.jit
def copy_kernel(
    read,
    write,
    source,
    target,
    read_plane,
    read_block,
    write_plane,
    write_block,
    block_values,
    CHUNK: tl.constexpr,
):
    """Grid (copies, planes, chunks of a block). A plane is the K or the V pages of one layer; a
    piece of a block lies at plane * (read|write)_plane + block * (read|write)_block."""
    copy = tl.program_id(0)
    plane = tl.program_id(1).to(tl.int64)
    inside = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    mask = inside < block_values
    src = plane * read_plane + tl.load(source + copy) * read_block
    dst = plane * write_plane + tl.load(target + copy) * write_block
    tl.store(write + dst + inside, tl.load(read + src + inside, mask=mask), mask=mask)


def copy_blocks(blocks: Tensor, source: Tensor, target: Tensor) -> None:
    """Copies block source[i] to target[i] in every layer, in place.

    blocks          [layers, 2, num_blocks, kv_heads, ...], contiguous, quantized or not
    source, target  int64 [copies]; no block is in both
    """
    _launch(blocks, source, target, blocks, blocks, _in_pool(blocks), _in_pool(blocks))


def gather_blocks(blocks: Tensor, source: Tensor, pieces: Tensor) -> None:
    """Copies block source[i] to pieces[i], where all layers of a block lie together.

    blocks  [layers, 2, num_blocks, kv_heads, ...], contiguous, quantized or not
    source  int64 [copies]
    pieces  [at least copies, layers, 2, kv_heads, ...], contiguous
    """
    rows = torch.arange(len(source), device=source.device)
    _launch(blocks, source, rows, blocks, pieces, _in_pool(blocks), _in_pieces(pieces))


def scatter_blocks(pieces: Tensor, blocks: Tensor, target: Tensor) -> None:
    """Copies pieces[i] to block target[i]: the way back of `gather_blocks`."""
    rows = torch.arange(len(target), device=target.device)
    _launch(blocks, rows, target, pieces, blocks, _in_pieces(pieces), _in_pool(blocks))


def _in_pool(blocks: Tensor) -> tuple[int, int]:
    """Values from a plane to the next one, and from a block to the next one."""
    return blocks.stride(1), blocks.stride(2)


def _in_pieces(pieces: Tensor) -> tuple[int, int]:
    return pieces.stride(2), pieces.stride(0)


def _launch(
    blocks: Tensor,
    source: Tensor,
    target: Tensor,
    read: Tensor,
    write: Tensor,
    read_strides: tuple[int, int],
    write_strides: tuple[int, int],
) -> None:
    planes, values = 2 * blocks.shape[0], blocks[0, 0, 0].numel()
    grid = (len(source), planes, triton.cdiv(values, CHUNK))
    strides = (*read_strides, *write_strides)
    copy_kernel[grid](read, write, source, target, *strides, values, CHUNK=CHUNK)
