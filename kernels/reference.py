"""Plain torch twins of every op in this folder: slow, obvious, and the oracle of the tests.

Keys and values of one layer live in pages:

    pages  [2, num_blocks, kv_heads, block_size, head_dim]        0 = keys, 1 = values

    block_tables[i] = [7, 2, 5]       sequence i, block_size 4, context_len 10

    position      0  1  2  3 |  4  5  6  7 |  8  9
    block         7  7  7  7 |  2  2  2  2 |  5  5
    slot         28 29 30 31 |  8  9 10 11 | 20 21         slot = block * block_size + offset
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.pages import Codes, Pages, QuantizedPages, decode, encode, page_shape


def store_kv(key: Tensor, value: Tensor, pages: Pages, slot_mapping: Tensor) -> None:
    """Writes new keys and values into their slots, in place.

    key, value    [tokens, kv_heads, head_dim], possibly strided views of a fused projection
    pages         [2, num_blocks, kv_heads, block_size, head_dim], or `kernels.pages`
    slot_mapping  [tokens] int32 or int64; -1 skips the token (padding)
    """
    keep = slot_mapping >= 0
    slots = slot_mapping[keep].long()
    block_size = page_shape(pages)[1]
    block, offset = slots // block_size, slots % block_size
    for half, numbers in enumerate((key[keep], value[keep])):
        if isinstance(pages, QuantizedPages):
            for part, row in zip(pages.parts, encode(numbers, pages.format), strict=True):
                if row is not None:
                    part[half][block, :, offset] = row
        else:
            pages[half][block, :, offset] = numbers.to(pages.dtype)


def paged_decode(
    query: Tensor,
    pages: Pages,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    out: Tensor | None = None,
    max_context_len: int | None = None,
) -> Tensor:
    """Attention of one new token per sequence over its paged context.

    query            [seqs, heads, head_dim]; heads is a multiple of kv_heads
    pages            [2, num_blocks, kv_heads, block_size, head_dim], or `kernels.pages`
    block_tables     [seqs, max_blocks] int32
    context_lens     [seqs] int32, tokens including the current one, whose K/V is already
                     stored; 0 marks a padded row, whose output is zeros
    window           0 for full attention, else position p sees keys in (p - window, p]
    softcap          when positive, scores become softcap * tanh(score / softcap)
    max_context_len  a hint for backends that size their grid on the host; unused here

    Returns [seqs, heads, head_dim] in query's dtype (`out`, when given).
    """
    out = torch.empty_like(query) if out is None else out
    for i, context_len in enumerate(context_lens.tolist()):
        if context_len == 0:
            out[i] = 0
            continue
        keys, values = _gather(pages, block_tables[i], context_len)
        out[i : i + 1] = _attend(query[i : i + 1], keys, values, scale, window, softcap)
    return out


def paged_prefill(
    query: Tensor,
    pages: Pages,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    *,
    max_query_len: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of ragged chunks of new tokens over their paged contexts.

    query          [tokens, heads, head_dim], the chunks one after the other
    query_start    [seqs + 1] int32; chunk i is query[query_start[i] : query_start[i + 1]] and
                   its last token is at position context_lens[i] - 1
    max_query_len  the longest chunk; a hint for backends that size their grid on the host

    The other arguments are those of `paged_decode`. Chunks may be of any length, 1 (a decode
    step) and 0 (a padded row) included. Rows of `out` beyond query_start[-1] are left alone.

    Returns [tokens, heads, head_dim] in query's dtype (`out`, when given).
    """
    out = torch.empty_like(query) if out is None else out
    bounds = query_start.tolist()
    for i, context_len in enumerate(context_lens.tolist()):
        chunk = slice(bounds[i], bounds[i + 1])
        if chunk.start == chunk.stop:
            continue
        keys, values = _gather(pages, block_tables[i], context_len)
        out[chunk] = _attend(query[chunk], keys, values, scale, window, softcap)
    return out


def _gather(pages: Pages, block_table: Tensor, context_len: int) -> tuple[Tensor, Tensor]:
    """One sequence's keys and values, contiguous: each [kv_heads, context_len, head_dim]."""
    kv_heads, block_size, head_dim = page_shape(pages)
    blocks = block_table[: -(-context_len // block_size)].long()
    if isinstance(pages, QuantizedPages):
        parts = (part if part is None else part[:, blocks] for part in pages.parts)
        rows = decode(Codes(*parts), pages.format)
    else:
        rows = pages[:, blocks]
    rows = rows.transpose(1, 2)  # [2, kv_heads, blocks, block_size, head_dim]
    rows = rows.reshape(2, kv_heads, -1, head_dim)[:, :, :context_len]
    return rows[0], rows[1]


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    """Dense attention of the last len(query) positions of one sequence, in at least float32."""
    tokens, heads, head_dim = query.shape
    kv_heads, context_len, _ = keys.shape
    # Blocks behind the first query's window may be another sequence's by now, or hold NaN.
    first = max(context_len - tokens - window + 1, 0) if window else 0
    keys, values = keys[:, first:], values[:, first:]
    work = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(work).view(tokens, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("qhgd,hkd->hgqk", grouped, keys.to(work)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(context_len - tokens, context_len, device=query.device)[:, None]
    seen = torch.arange(first, context_len, device=query.device)[None, :]
    visible = seen <= positions
    if window > 0:
        visible &= seen > positions - window
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    mixed = torch.einsum("hgqk,hkd->qhgd", weights, values.to(work))
    return mixed.reshape(tokens, heads, head_dim).to(query.dtype)


def copy_blocks(blocks: Tensor, source: Tensor, target: Tensor) -> None:
    """Copies block source[i] to target[i] in every layer, in place.

    blocks          [layers, 2, num_blocks, kv_heads, ...], quantized or not
    source, target  int64 [copies]; no block is in both
    """
    blocks[:, :, target] = blocks[:, :, source]


def gather_blocks(blocks: Tensor, source: Tensor, pieces: Tensor) -> None:
    """Copies block source[i] to pieces[i], where all layers of a block lie together.

    blocks  [layers, 2, num_blocks, kv_heads, ...], quantized or not
    source  int64 [copies]
    pieces  [at least copies, layers, 2, kv_heads, ...]
    """
    pieces[: len(source)] = blocks[:, :, source].movedim(2, 0)


def scatter_blocks(pieces: Tensor, blocks: Tensor, target: Tensor) -> None:
    """Copies pieces[i] to block target[i]: the way back of `gather_blocks`."""
    blocks[:, :, target] = pieces[: len(target)].movedim(0, 2)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to the residual stream, in place, and returns the stream's RMSNorm.

    x, residual  [rows, size], contiguous
    weight       float32 [size]
    """
    residual += x
    normed = F.rms_norm(residual.float(), weight.shape, weight, eps)
    return normed.to(x.dtype)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up`: [rows, 2 * inner], the gates first -> [rows, inner].

    activation  one of GATES
    """
    gate, up = gate_up.float().chunk(2, -1)
    if activation == "silu":
        return (F.silu(gate) * up).to(gate_up.dtype)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


GATES = ("silu", "gelu_tanh")


def turn_and_store(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    eps: float,
    pages: Pages,
    slot_mapping: Tensor,
) -> Tensor:
    """RMSNorm and rotation of queries and keys; keys and values go into their slots.

    qkv       [tokens, heads + 2 * kv_heads, head_dim], contiguous: queries, keys, values
    rotation  cos and sin, each float32 [tokens, 1, head_dim], the sign of the pair in sin; or none
    weight    of the norm, float32 [heads + kv_heads, head_dim]; or none

    The other arguments are those of `store_kv`. Returns the queries: [tokens, heads, head_dim].
    """
    kv_heads = page_shape(pages)[0]
    turned = qkv[:, :-kv_heads].float()
    if weight is not None:
        turned = F.rms_norm(turned, turned.shape[-1:], None, eps) * weight
    if rotation is not None:
        cos, sin = rotation
        turned = turned * cos + turned.roll(turned.shape[-1] // 2, -1) * sin
    turned = turned.to(qkv.dtype)
    store_kv(turned[:, -kv_heads:], qkv[:, -kv_heads:], pages, slot_mapping)
    return turned[:, :-kv_heads].contiguous()
