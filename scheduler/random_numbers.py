"""The random numbers of sampling, as a pure function of the request."""

from __future__ import annotations

import hashlib
import struct

_PACK = struct.Struct("<qqq").pack


def uniform(seed: int, index: int, token: int) -> float:
    """The number in [0, 1) that chooses token number `token` of answer `index`.

    Drawn from a hash of its arguments alone, so a sampled answer depends neither on who shares
    the batch, nor on preemption, nor on how prompts were cut into chunks.

    Args:
        seed: the request's seed, a signed 64-bit integer.
    """
    digest = hashlib.blake2b(_PACK(seed, index, token), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
