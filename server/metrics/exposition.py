"""Counters, gauges and histograms, and Prometheus's text format of them.

Gateways scrape many times a second, and a histogram takes an observation per token: both have to be
cheap. So everything of a line but its number is made once, one call observes many equal values, and
what has no news is not even looked at: after a pause every object comes from memory anew.
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
    """A sum that only grows.

    Args:
        changed: is told of each change.
    """

    __slots__ = ("_changed", "_start", "value")

    def __init__(
        self, name: str, labels: Mapping[str, str], changed: Callable[[Counter], None]
    ) -> None:
        self.value = 0.0
        self._start, self._changed = _start(name, labels), changed

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount
        self._changed(self)

    def lines(self, snapshot: object) -> str:
        return f"{self._start}{self.value}\n"


class Histogram:
    """How many observations are at most each of `edges`, and their sum.

    Args:
        edges: ascending upper bounds; infinity follows the last one.
        changed: is told of each change.
    """

    __slots__ = ("_changed", "_counts", "_edges", "_ending", "_starts", "total")

    def __init__(
        self,
        name: str,
        labels: Mapping[str, str],
        edges: Sequence[float],
        changed: Callable[[Histogram], None],
    ) -> None:
        self._edges = [float(edge) for edge in edges]
        self._counts = [0] * (len(edges) + 1)
        self.total = 0.0
        bounds = [*map(repr, self._edges), "+Inf"]
        self._starts = [_start(f"{name}_bucket", {**labels, "le": bound}) for bound in bounds]
        self._ending = (_start(f"{name}_count", labels), _start(f"{name}_sum", labels))
        self._changed = changed

    @property
    def count(self) -> int:
        """Observations so far."""
        return sum(self._counts)

    def observe(self, value: float, times: int = 1) -> None:
        """`value` was seen `times` times."""
        self._counts[bisect_left(self._edges, value)] += times
        self.total += value * times
        self._changed(self)

    def lines(self, snapshot: object) -> str:
        counts = list(accumulate(self._counts))
        buckets = [f"{start}{n}.0\n" for start, n in zip(self._starts, counts, strict=True)]
        count_start, sum_start = self._ending
        return f"{''.join(buckets)}{count_start}{counts[-1]}.0\n{sum_start}{self.total}\n"


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
        self._family_of: dict[Series[S], _Family[S]] = {}
        self._readings: list[Reading[S]] = []
        self._news: set[Series[S]] = set()  # what differs from the text made last
        self._snapshot: S | None = None

    def counter(self, name: str, text: str, *, bare: bool = False, **labels: str) -> Counter:
        """A counter; its name ends in `_total`."""
        counter = Counter(name, self._all(labels, bare), self._news.add)
        self._add("counter", name, text, counter)
        return counter

    def histogram(
        self, name: str, text: str, edges: Sequence[float], *, bare: bool = False, **labels: str
    ) -> Histogram:
        histogram = Histogram(name, self._all(labels, bare), edges, self._news.add)
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
        reading = Reading(name, self._all(labels, False), read)
        self._readings.append(reading)
        self._add(kind, name, text, reading)

    def constant(self, name: str, text: str, value: float, **labels: str) -> None:
        """A gauge that never changes."""
        self.read("gauge", name, text, lambda _: value, **labels)

    def render(self, snapshot: S) -> bytes:
        """The exposition text. What is read off a snapshot that equals the last one is not read
        again."""
        if snapshot != self._snapshot:
            self._snapshot = snapshot
            self._news.update(self._readings)
        families = set()
        while self._news:
            series = self._news.pop()  # before it is read: another thread may be counting
            family = self._family_of[series]
            family.lines[series] = series.lines(snapshot)
            families.add(family)
        for family in families:
            family.join()
        return b"".join([family.text for family in list(self._families.values())])

    def _all(self, labels: Mapping[str, str], bare: bool) -> Mapping[str, str]:
        return labels if bare else {**self._labels, **labels}

    def _add(self, kind: str, name: str, text: str, series: Series[S]) -> None:
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = _Family(f"# HELP {name} {text}\n# TYPE {name} {kind}\n")
        family.lines[series] = ""
        self._family_of[series] = family
        self._news.add(series)


class _Family(Generic[S]):
    """Series of one name."""

    def __init__(self, header: str) -> None:
        self._header = header
        self.lines: dict[Series[S], str] = {}
        self.text = b""

    def join(self) -> None:
        self.text = f"{self._header}{''.join(list(self.lines.values()))}".encode()


def _start(name: str, labels: Mapping[str, str]) -> str:
    """A line up to its value."""
    if not labels:
        return f"{name} "
    inside = ",".join(f'{label}="{_escaped(labels[label])}"' for label in sorted(labels))
    return f"{name}{{{inside}}} "


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
