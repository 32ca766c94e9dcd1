"""Draws how TTFT and ITL are distributed: `quire bench --plot FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.load import Loop, Round


def draw(measured: Sequence[tuple[Loop, Sequence[Round]]], file: Path) -> None:
    """Two cumulative distributions, one line for each load: a percentile is read off the left."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4), sharey=True, layout="constrained"
    )
    for loop, rounds in measured:
        answers = [answer for one in rounds for answer in one.answers]
        left.ecdf([1000 * answer.ttft for answer in answers], label=loop.name)
        gaps = [1000 * gap for answer in answers for gap in answer.gaps]
        if gaps:
            right.ecdf(gaps, label=loop.name)
    left.set_ylabel("share of all")
    left.legend()
    for axes, name in ((left, "TTFT"), (right, "ITL")):
        axes.set_xscale("symlog", linthresh=1.0)  # linear up to 1 ms, because gaps may be 0
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(title=name, xlabel="ms", xlim=(0, None))
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
