"""Counters, gauges and histograms, and Prometheus's text format of them.

Gateways scrape many times a second, and a histogram takes an observation per token: both have to be
cheap. So everything of a line but its number is made once, one call observes many equal values, and
a histogram without new ones is not rendered again.
Values are written on the event loop's thread alone and may be rendered on any other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Generic, Literal, Protocol, TypeVar

S_contra = TypeVar("S_contra", contravariant=True)
S = TypeVar("S")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Counter:
    """A sum that only grows."""

    __slots__ = ("_start", "value")

    def __init__(self, name: str, labels: Mapping[str, str]) -> None:
        self.value = 0.0
        self._start = _start(name, labels)

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount

    def lines(self, snapshot: object) -> str:
        return f"{self._start}{self.value}\n"


class Histogram:
    """How many observations are at most each of `edges`, and their sum.

    Args:
        edges: ascending upper bounds; infinity follows the last one.
    """

    __slots__ = ("_counts", "_edges", "_ending", "_rendered", "_starts", "total")

    def __init__(self, name: str, labels: Mapping[str, str], edges: Sequence[float]) -> None:
        self._edges = [float(edge) for edge in edges]
        self._counts = [0] * (len(edges) + 1)
        self.total = 0.0
        bounds = [*map(repr, self._edges), "+Inf"]
        self._starts = [_start(f"{name}_bucket", {**labels, "le": bound}) for bound in bounds]
        self._ending = (_start(f"{name}_count", labels), _start(f"{name}_sum", labels))
        self._rendered: tuple[list[int], float, str] = ([], 0.0, "")  # what the text was made of

    @property
    def count(self) -> int:
        """Observations so far."""
        return sum(self._counts)

    def observe(self, value: float, times: int = 1) -> None:
        """`value` was seen `times` times."""
        self._counts[bisect_left(self._edges, value)] += times
        self.total += value * times

    def lines(self, snapshot: object) -> str:
        counts, total = self._counts[:], self.total
        seen, seen_total, text = self._rendered
        if counts != seen or total != seen_total:
            text = self._text(list(accumulate(counts)), total)
            self._rendered = counts, total, text
        return text

    def _text(self, counts: list[int], total: float) -> str:
        buckets = [f"{start}{n}.0\n" for start, n in zip(self._starts, counts, strict=True)]
        count_start, sum_start = self._ending
        return f"{''.join(buckets)}{count_start}{counts[-1]}.0\n{sum_start}{total}\n"


class Reading(Generic[S]):
    """A value that is read off a snapshot when it is asked for."""

    __slots__ = ("_read", "_start")

    def __init__(self, name: str, labels: Mapping[str, str], read: Callable[[S], float]) -> None:
        self._start, self._read = _start(name, labels), read

    def lines(self, snapshot: S) -> str:
        return f"{self._start}{float(self._read(snapshot))}\n"


class Series(Protocol[S_contra]):
    """The lines of one set of label values."""

    def lines(self, snapshot: S_contra) -> str: ...


class Registry(Generic[S]):
    """All metrics of a process, in the order in which they were named first.

    Args:
        labels: on every metric, unless it is made `bare`.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        self._families: dict[str, _Family[S]] = {}

    def counter(self, name: str, text: str, *, bare: bool = False, **labels: str) -> Counter:
        """A counter; its name ends in `_total`."""
        counter = Counter(name, self._all(labels, bare))
        self._add("counter", name, text, counter)
        return counter

    def histogram(
        self, name: str, text: str, edges: Sequence[float], *, bare: bool = False, **labels: str
    ) -> Histogram:
        histogram = Histogram(name, self._all(labels, bare), edges)
        self._add("histogram", name, text, histogram)
        return histogram

    def read(
        self,
        kind: Literal["counter", "gauge"],
        name: str,
        text: str,
        read: Callable[[S], float],
        **labels: str,
    ) -> None:
        """A counter or gauge whose value somebody else keeps."""
        self._add(kind, name, text, Reading(name, self._all(labels, False), read))

    def constant(self, name: str, text: str, value: float, **labels: str) -> None:
        """A gauge that never changes."""
        self.read("gauge", name, text, lambda _: value, **labels)

    def render(self, snapshot: S) -> bytes:
        """The exposition text."""
        text = [
            family.header + "".join([series.lines(snapshot) for series in list(family.series)])
            for family in list(self._families.values())
        ]
        return "".join(text).encode()

    def _all(self, labels: Mapping[str, str], bare: bool) -> Mapping[str, str]:
        return labels if bare else {**self._labels, **labels}

    def _add(self, kind: str, name: str, text: str, series: Series[S]) -> None:
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = _Family(f"# HELP {name} {text}\n# TYPE {name} {kind}\n")
        family.series.append(series)


class _Family(Generic[S]):
    """Series of one name."""

    def __init__(self, header: str) -> None:
        self.header = header
        self.series: list[Series[S]] = []


def _start(name: str, labels: Mapping[str, str]) -> str:
    """A line up to its value."""
    if not labels:
        return f"{name} "
    inside = ",".join(f'{label}="{_escaped(labels[label])}"' for label in sorted(labels))
    return f"{name}{{{inside}}} "


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
