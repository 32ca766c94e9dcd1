"""Blocks whose content is needed elsewhere before a step computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from paged_cache.pool import Key

CopyKind = Literal["cow", "to_host", "to_device"]


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """The content of `src` is needed in `dst`.

    Attributes:
        kind: `cow` copies between blocks of the pool (copy on write), `to_host` from a block of the
            pool into a slot of the host tier, `to_device` from a slot into a block.
    """

    src: int
    dst: int
    kind: CopyKind = "cow"


@dataclass(frozen=True, slots=True)
class DiskCopy:
    """Content goes from a slot of the host tier to the disk (`to_disk`), or from what was read from
    the disk into a slot (`from_disk`)."""

    slot: int
    key: Key
    kind: Literal["to_disk", "from_disk"]
