"""The memory behind the host tier, and the copies between it and the pool."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kernels.dispatch import Backend
from paged_cache.block_copy import BlockCopy
from paged_cache.rate import MovingRate
from paged_cache.storage import KVStorage

STAGED_BYTES = 64 << 20
"""Device memory of each of the two areas through which blocks pass on a GPU."""

_PROBED = 8  # blocks that are copied to measure the rate before the first request


class HostPages:
    """Blocks in host memory. In the pool a block is one page in each layer; here all of it lies
    together, so that it moves as one piece:

        slot 0 | layer 0: K V | layer 1: K V | ...        slot 1 | layer 0: K V | ...

    Attributes:
        pages: [num_slots, pages_per_block, 2, kv_heads, block_size, head_dim], quantized ones
            [num_slots, pages_per_block, 2, kv_heads, bytes_per_tile]
        copying: bytes per second between the two, as measured.
    """

    def __init__(self, storage: KVStorage, num_slots: int) -> None:
        self.blocks = storage.blocks
        layers, two, _, *tile = self.blocks.shape
        self.pages: Tensor = torch.empty(num_slots, layers, two, *tile, dtype=self.blocks.dtype)
        self.copying = MovingRate()

    @property
    def bytes_per_block(self) -> int:
        return self.pages[0].nbytes

    def to_host(self, copies: list[BlockCopy]) -> None:
        """Copies blocks of the pool (`src`) into slots (`dst`)."""
        began = time.perf_counter()
        for copy in copies:
            self.pages[copy.dst].copy_(self.blocks[:, :, copy.src])
        self._measured(copies, time.perf_counter() - began)

    def to_device(self, copies: list[BlockCopy]) -> None:
        """Copies slots (`src`) into blocks of the pool (`dst`)."""
        began = time.perf_counter()
        for copy in copies:
            self.blocks[:, :, copy.dst].copy_(self.pages[copy.src])
        self._measured(copies, time.perf_counter() - began)

    def _measured(self, copies: list[BlockCopy], seconds: float) -> None:
        self.copying.observe(len(copies) * self.bytes_per_block, seconds)

    def read(self, slot: int) -> bytes:
        """The content of a slot, when all copies into it have ended."""
        return _bytes(self.pages[slot]).numpy().tobytes()

    def write(self, slot: int, data: memoryview) -> None:
        """Fills a slot, when all copies out of it have ended."""
        _bytes(self.pages[slot]).numpy()[:] = np.frombuffer(data, dtype=np.uint8)

    def read_block(self, block: int) -> bytes:
        """The content of a block of the pool, laid out as in a slot."""
        return _bytes(self.blocks[:, :, block].contiguous().cpu()).numpy().tobytes()

    def probe(self) -> None:
        """Measures the rate, by copying block 0 back and forth; slots must not be in use yet."""
        slots = range(min(len(self.pages), _PROBED))
        for _ in range(3):
            self.to_host([BlockCopy(0, slot, "to_host") for slot in slots])
            self.to_device([BlockCopy(slot, 0, "to_device") for slot in slots[:1]])


class PinnedPages(HostPages):
    """The same for a pool on a GPU, in pinned memory.

    Blocks pass through a staging area on the device: one launch gathers them there, and copy
    engines move them on beside the step's own kernels.

        to_host     step's stream: gather -> staging          side stream: staging -> slots
        to_device   side stream: slots -> staging             step's stream: staging -> scatter

    A step therefore waits for what it is about to read, but not for what it gave up. All slots are
    read and written on the side stream, in the order of the plans.
    """

    def __init__(self, storage: KVStorage, num_slots: int, backend: Backend) -> None:
        super().__init__(storage, num_slots)
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        # Registered, because the pinned allocator would round the size up to a power of two.
        torch.cuda.check_error(cudart.cudaHostRegister(self.pages.data_ptr(), self.pages.nbytes, 0))
        shape = (max(STAGED_BYTES // self.bytes_per_block, 1), *self.pages.shape[1:])
        self._leaving = torch.empty(shape, dtype=self.pages.dtype, device=self.blocks.device)
        self._arriving = torch.empty_like(self._leaving)
        self._backend = backend
        self._side = torch.cuda.Stream(self.blocks.device)  # type: ignore[no-untyped-call]
        self._left = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._scattered = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._timed: deque[tuple[torch.cuda.Event, torch.cuda.Event, list[BlockCopy]]] = deque()

    def to_host(self, copies: list[BlockCopy]) -> None:
        main = torch.cuda.current_stream(self.blocks.device)
        for some in self._pieces(copies):
            main.wait_event(self._left)  # the staging area is empty again
            ids = self._ids([copy.src for copy in some])
            self._backend.gather_blocks(self.blocks, ids, self._leaving)
            self._side.wait_stream(main)
            with torch.cuda.stream(self._side):
                began = self._event()
                for row, copy in enumerate(some):
                    self.pages[copy.dst].copy_(self._leaving[row], non_blocking=True)
                self._timed.append((began, self._event(), some))
            self._left.record(self._side)

    def to_device(self, copies: list[BlockCopy]) -> None:
        main = torch.cuda.current_stream(self.blocks.device)
        for some in self._pieces(copies):
            self._side.wait_event(self._scattered)
            with torch.cuda.stream(self._side):
                began = self._event()
                for row, copy in enumerate(some):
                    self._arriving[row].copy_(self.pages[copy.src], non_blocking=True)
                self._timed.append((began, self._event(), some))
            main.wait_stream(self._side)
            ids = self._ids([copy.dst for copy in some])
            self._backend.scatter_blocks(self._arriving, self.blocks, ids)
            self._scattered.record(main)

    def read(self, slot: int) -> bytes:
        self._side.synchronize()
        return super().read(slot)

    def write(self, slot: int, data: memoryview) -> None:
        self._side.synchronize()
        super().write(slot, data)

    def probe(self) -> None:
        super().probe()
        self._side.synchronize()
        self._harvest()

    def _pieces(self, copies: list[BlockCopy]) -> Iterator[list[BlockCopy]]:
        self._harvest()
        rows = len(self._leaving)
        for at in range(0, len(copies), rows):
            yield copies[at : at + rows]

    def _ids(self, blocks: list[int]) -> Tensor:
        host = torch.tensor(blocks, dtype=torch.int64).pin_memory()
        return host.to(self.blocks.device, non_blocking=True)

    def _event(self) -> torch.cuda.Event:
        """A point in time on the side stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._side)
        return event

    def _harvest(self) -> None:
        """Takes the times of copies that have ended in, without waiting for others."""
        while self._timed:
            began, ended, copies = self._timed[0]
            if not ended.query():  # type: ignore[no-untyped-call]
                return
            self._timed.popleft()
            self._measured(copies, began.elapsed_time(ended) / 1000)


def _bytes(block: Tensor) -> Tensor:
    return block.view(-1).view(torch.uint8)


def host_pages(storage: KVStorage, num_slots: int, backend: Backend) -> HostPages:
    """What fits the device that the pool lies on."""
    if storage.blocks.is_cuda:
        return PinnedPages(storage, num_slots, backend)
    return HostPages(storage, num_slots)
