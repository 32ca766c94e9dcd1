"""Blocks whose content a step needs elsewhere before it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
