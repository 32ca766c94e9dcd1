"""The tier on disk as the engine opens, fills and closes it."""

from __future__ import annotations

import time
from pathlib import Path

from configs.settings import CacheSettings, format_bytes
from models.fingerprint import fingerprint
from paged_cache.disk_tier import DiskTier, DiskTierError
from paged_cache.host_pages import HostPages
from paged_cache.host_tier import HostBlock
from paged_cache.layout import KVLayout
from paged_cache.manager import KVCacheManager

FLUSH_SECONDS = 5.0
"""How long the end of the engine may take to write what is worth keeping."""


def open_disk(
    settings: CacheSettings, checkpoint: Path, computed_by: str, layout: KVLayout
) -> DiskTier | None:
    """The disk tier of these settings, if they want one.

    `computed_by` names what else the contents depend on: backend, dtype, quantization.

    Raises:
        DiskTierError: it cannot be had; one line for the operator.
    """
    if settings.disk_kv_path is None:
        return None
    most = settings.disk_room
    if most < layout.bytes_per_block:
        raise DiskTierError(
            "disk_kv_bytes must hold at least one KV block of "
            f"{format_bytes(layout.bytes_per_block)}, got {format_bytes(most)}"
        )
    groups = "; ".join(f"{list(group.layers)} window {group.window}" for group in layout.groups)
    identity = {
        "model": fingerprint(checkpoint),
        "computed_by": computed_by,
        "layout": f"{layout.block_size} tokens x {layout.kv_heads} heads x {layout.head_dim} "
        f"as {layout.format.dtype}, layers {groups}",
    }
    return DiskTier(Path(settings.disk_kv_path).expanduser(), most, identity)


class DiskFlush:
    """Called at the engine's end: keeps what is cached in memory, newest first, as far as the time
    allows."""

    def __init__(self, cache: KVCacheManager, pages: HostPages, disk: DiskTier) -> None:
        self._cache = cache
        self._pages = pages
        self._disk = disk

    def __call__(self) -> None:
        deadline = time.monotonic() + FLUSH_SECONDS
        for key, place in self._cache.cached():
            if self._disk.holds(key):
                continue
            if isinstance(place, HostBlock):
                data = self._pages.read(place.slot)
            else:
                data = self._pages.read_block(place)
            if not self._disk.save(key, data, wait_until=deadline):
                break
        self._disk.close(max(deadline - time.monotonic(), 0.1))
