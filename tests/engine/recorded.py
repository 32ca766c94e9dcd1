"""A stand-in for CUDA graphs on CPUs: what was launched is launched again, without its Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from kernels.dispatch import Backend

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Tensor]]
"""A function, its arguments, and the tensors into which it put new results."""

# They tell the host what a tensor holds, or bring values of the host along: CUDA refuses the first
# while it records, and would repeat the second unchanged.
ON_THE_HOST = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "lift_fresh", "unique")


class Recording(TorchDispatchMode):
    """Records every operation on tensors, and the kernels of a backend that `kernels` wrapped.

    At a replay the same operations run on the very same tensors in the same order. So a number that
    Python computed while this recorded stays as it was, like in a CUDA graph: `captured` counts the
    recordings, `replayed` how often one ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.captured = self.replayed = 0
        self._calls: list[Call] | None = None

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        self._calls = calls = []
        with self:
            run()
        self._calls = None

        def replay() -> None:
            self.replayed += 1
            for function, args, kwargs, results in calls:
                found = function(*args, **kwargs)
                for old, new in zip(results, _tensors(found) if results else [], strict=True):
                    old.copy_(new)

        return replay

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        assert name not in ON_THE_HOST, f"{name} in a graph: it reads or brings a host's value"
        return self._record(function, args, kwargs or {})

    def kernels(self, backend: Backend) -> Backend:
        """The backend with its operations recorded, each as one."""

        def wrap(kernel: Callable[..., Any]) -> Callable[..., Any]:
            def launch(*args: Any, **kwargs: Any) -> Any:
                if self._calls is None:
                    return kernel(*args, **kwargs)
                with _disable_current_modes():
                    return self._record(kernel, args, kwargs)

            return launch

        return replace(
            backend, store_kv=wrap(backend.store_kv), paged_decode=wrap(backend.paged_decode)
        )

    def _record(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        found = function(*args, **kwargs)
        results = _tensors(found)
        assert self._calls is not None
        if not results:  # it wrote into what it was given
            self._calls.append((function, args, kwargs, []))
        elif any(_memory(tensor) in given for tensor in results):
            if _writes(function, kwargs):
                self._calls.append((function, args, kwargs, []))
            # else a view: it shows what is written later without being made again
        else:
            self._calls.append((function, args, kwargs, results))
        return found


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _writes(function: Any, kwargs: dict[str, Any]) -> bool:
    schema = getattr(function, "_schema", None)
    return schema.is_mutable if schema is not None else "out" in kwargs
