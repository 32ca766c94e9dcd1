"""How many bytes KV blocks take and how many fit: pure arithmetic, no tensors.

KV bytes per token = 2 (K and V) x layers x KV heads x bytes of one row of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

PLAIN = ("float32", "float16", "bfloat16")
QUANTIZED = ("fp8_e4m3", "int8", "int4")
CACHE_DTYPES = PLAIN + QUANTIZED
INT4_GROUP = 32
"""Numbers of an int4 row that share a scale and a zero point."""


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How K and V are stored. `dtype` is torch's name of a plain one, or one of QUANTIZED.

    A quantized row is its codes, then a scale of 2 bytes; an int4 row has, per 32 numbers, such a
    scale and a zero point of 1 byte (`kernels.pages` says what they mean):

        head size 64    bfloat16 128    int8, fp8_e4m3 64 + 2    int4 32 + 2 x 3 bytes
    """

    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in CACHE_DTYPES:
            known = ", ".join(CACHE_DTYPES)
            raise ValueError(f"KV cache dtype {self.dtype!r} is unknown (there are: {known})")

    @property
    def quantized(self) -> bool:
        return self.dtype in QUANTIZED

    def holds(self, head_dim: int) -> bool:
        """Whether heads of this size can be stored: int4 needs whole groups."""
        return self.dtype != "int4" or head_dim % INT4_GROUP == 0

    def bytes_per_head(self, head_dim: int) -> int:
        """Bytes of one K (or V) row of one token and head, scales included.

        Raises ValueError for a head size that this format does not hold.
        """
        if not self.holds(head_dim):
            raise ValueError(f"int4 pages need a head size that {INT4_GROUP} divides: {head_dim}")
        if self.dtype == "int4":
            return head_dim // 2 + head_dim // INT4_GROUP * 3
        if self.quantized:
            return head_dim + 2
        return head_dim * (4 if self.dtype == "float32" else 2)


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share one block table. `window` 0 means that every position stays visible."""

    layers: tuple[int, ...]
    window: int = 0


def group_layers(windows: tuple[int, ...]) -> tuple[KVGroup, ...]:
    """Cuts layers into groups of equal window and about equal size.

    One pool serves all groups, and a block holds one page per layer of a group; the size of a
    block is therefore that of the largest group. Equal sizes waste nothing:

        layers     s s s s s F s s s s s F       s: window 512, F: full
        groups     (0 1) (2 3) (4 6) (7 8) (9 10)  and  (5 11)        2 pages per block

    Args:
        windows: per layer, 0 for full attention.
    """
    kinds = {window: [i for i, w in enumerate(windows) if w == window] for window in set(windows)}
    counts = [len(layers) for layers in kinds.values()]
    smallest, largest = min(counts), max(counts)
    # Nearly equal kinds stay whole; very unequal ones are cut into at most 8 groups each.
    size = largest if largest <= 1.25 * smallest else max(smallest, -(-largest // 8))
    return tuple(
        KVGroup(tuple(layers[at : at + size]), window)
        for window, layers in sorted(kinds.items())
        for at in range(0, len(layers), size)
    )


def most_blocks(windows: tuple[int, ...], block_size: int, num_tokens: int, chunk: int) -> int:
    """The most blocks that one sequence ever holds over all groups.

    A full group holds every token; a sliding one its window, the tokens of one step, and a block
    that both have a part of.

    Args:
        windows: per group, 0 for full attention.
        num_tokens: length of the sequence.
        chunk: most tokens of it that one step computes.
    """

    def blocks(tokens: int) -> int:
        return -(-tokens // block_size)

    return sum(
        min(blocks(num_tokens), blocks(window + chunk) + 1) if window else blocks(num_tokens)
        for window in windows
    )


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of the whole cache, computed once at start.

    A block holds one page per layer of its group; groups of fewer layers leave the rest unused.
    The pages of one place in a group are [2, num_blocks, kv_heads, block_size, head_dim]: one
    (block, head) tile is contiguous. A quantized tile is [tile_bytes]: its codes, then its scales.

               head 0                 head 1
        K  block 0 | tok 0 d d d .. | tok 0 d d d .. |   block 1 | ...
                   | tok 1 d d d .. | tok 1 d d d .. |
        V  block 0 | ...
    """

    block_size: int
    num_blocks: int
    kv_heads: int
    head_dim: int
    groups: tuple[KVGroup, ...]
    format: KVFormat

    @property
    def pages_per_block(self) -> int:
        """Layers of the largest group."""
        return max(len(group.layers) for group in self.groups)

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """For every layer: its group, and its place among the pages of a block."""
        place = {
            layer: (g, i)
            for g, group in enumerate(self.groups)
            for i, layer in enumerate(group.layers)
        }
        return tuple(place[layer] for layer in range(len(place)))

    @property
    def windows(self) -> tuple[int, ...]:
        """Per group, 0 for full attention."""
        return tuple(group.window for group in self.groups)

    @property
    def bytes_per_tile(self) -> int:
        """K or V of one block and one head in one layer."""
        return self.block_size * self.format.bytes_per_head(self.head_dim)

    @property
    def bytes_per_page(self) -> int:
        """K and V of one block in one layer."""
        return 2 * self.kv_heads * self.bytes_per_tile

    @property
    def bytes_per_block(self) -> int:
        return self.pages_per_block * self.bytes_per_page

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token takes while every layer sees it."""
        layers = sum(len(group.layers) for group in self.groups)
        return layers * self.bytes_per_page // self.block_size

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block

    def blocks_in(self, num_bytes: int) -> int:
        """How many blocks of this layout fit into `num_bytes`."""
        return max(num_bytes, 0) // self.bytes_per_block

    def tokens_in(self, num_blocks: int) -> int:
        """How many tokens `num_blocks` hold that every layer sees."""
        return num_blocks // len(self.groups) * self.block_size

    def sequences_in(self, num_blocks: int, length: int, chunk: int) -> int:
        """How many sequences of `length` tokens `num_blocks` hold while prompts are read in
        pieces of `chunk`: one at a time, which takes room of its own behind a window."""
        reading = most_blocks(self.windows, self.block_size, length, chunk)
        if num_blocks < reading:
            return 0
        return 1 + (num_blocks - reading) // most_blocks(self.windows, self.block_size, length, 1)
