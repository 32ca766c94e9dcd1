"""Chained hashes: what a full block of tokens holds, all that came before it included.

    root = H(salt)      h0 = H(root, tokens of block 0)      h1 = H(h0, tokens of block 1)   ...

Equal hashes mean equal tokens from the first one on, hence equal keys and values. A chain and one
dict find the longest shared prefix at block granularity, without a tree.

H is BLAKE2b keyed with a random key of the process: with a predictable hash, a client could look
for a prompt that collides with somebody else's and be served their blocks.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence

DIGEST_BYTES = 16
KEY_BYTES = 32


class PrefixHasher:
    """Args:
    key: secret of the process, `KEY_BYTES` bytes.
    block_size: tokens per block.
    """

    def __init__(self, key: bytes, block_size: int) -> None:
        self._key = key
        self._block_size = block_size

    def root(self, *salts: str) -> bytes:
        """What a chain starts from. Sequences with different salts never share a block."""
        parts = [salt.encode() for salt in salts]
        return self._hash(b"".join(len(part).to_bytes(8, "little") + part for part in parts))

    def extend(self, root: bytes, chain: list[bytes], tokens: Sequence[int], blocks: int) -> None:
        """Lengthens `chain` to `blocks` hashes; tokens[: blocks * block_size] must be there."""
        size = self._block_size
        last = chain[-1] if chain else root
        for block in range(len(chain), blocks):
            last = self._hash(
                last + array("q", tokens[block * size : (block + 1) * size]).tobytes()
            )
            chain.append(last)

    def chain(self, root: bytes, tokens: Sequence[int], blocks: int) -> Iterator[bytes]:
        """The hashes of the first `blocks` blocks, each computed when it is asked for."""
        chain: list[bytes] = []
        for count in range(1, blocks + 1):
            self.extend(root, chain, tokens, count)
            yield chain[-1]

    def _hash(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=self._key).digest()
