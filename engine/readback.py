"""Brings results of a step to the host, without waiting for the steps after it."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """Tensors that were sent to the host.

    Args:
        host: where they will lie.
        arrived: the end of the copy; None if they lie there already.
    """

    def __init__(self, host: list[Tensor], arrived: torch.cuda.Event | None) -> None:
        self._host, self._arrived = host, arrived

    def wait(self) -> list[Tensor]:
        """The tensors on the host, once the step that they come from has ended."""
        if self._arrived is not None:
            self._arrived.synchronize()  # type: ignore[no-untyped-call]
        return self._host


class Reader:
    """Sends tensors of one device to the host. On a GPU the copies have a stream of their own, so
    that they wait for the step that wrote the tensors, and the next step does not wait for them."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, tensors: list[Tensor]) -> Readback:
        """Starts the copies. Nothing may write into the tensors afterwards."""
        stream = self._stream
        if stream is None:
            return Readback(tensors, None)
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            host = [_pinned(tensor).copy_(tensor, non_blocking=True) for tensor in tensors]
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(stream)
        for tensor in tensors:
            tensor.record_stream(stream)  # its memory is not given to others before the copy ended
        return Readback(host, arrived)


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
