"""How many bytes KV blocks take and how many fit: pure arithmetic, no tensors.

KV bytes per token = 2 (K and V) x layers x KV heads x head size x bytes per value.
"""

from __future__ import annotations

from dataclasses import dataclass

VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How one K or V value is stored. `dtype` is torch's name of it."""

    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in VALUE_BYTES:
            known = ", ".join(VALUE_BYTES)
            raise ValueError(f"KV cache dtype {self.dtype!r} is unknown (there are: {known})")

    def bytes_per_head(self, head_dim: int) -> int:
        """Bytes of one K (or V) row of one token and head."""
        return head_dim * VALUE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share one block table. `window` 0 means that every position stays visible."""

    layers: tuple[int, ...]
    window: int = 0


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of the whole cache, computed once at start.

    The pages of one layer are [2, num_blocks, kv_heads, block_size, head_dim]: one
    (block, head) tile is contiguous.

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
    def num_layers(self) -> int:
        return sum(len(group.layers) for group in self.groups)

    @property
    def layer_groups(self) -> tuple[int, ...]:
        """For every layer, the index of its group."""
        owner = {layer: i for i, group in enumerate(self.groups) for layer in group.layers}
        return tuple(owner[layer] for layer in range(self.num_layers))

    @property
    def bytes_per_token(self) -> int:
        per_head = self.format.bytes_per_head(self.head_dim)
        return 2 * self.num_layers * self.kv_heads * per_head

    @property
    def bytes_per_block(self) -> int:
        return self.block_size * self.bytes_per_token

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block

    @property
    def num_tokens(self) -> int:
        """Tokens that fit when every block is full."""
        return self.num_blocks * self.block_size

    def blocks_in(self, num_bytes: int) -> int:
        """How many blocks of this layout fit into `num_bytes`."""
        return max(num_bytes, 0) // self.bytes_per_block
