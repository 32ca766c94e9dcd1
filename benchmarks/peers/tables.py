"""What a record comes to, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Final

from benchmarks.peers.record import Record

OURS: Final = "quire"
Cell = Callable[[str, str], str]


def tables(record: Record) -> str:
    """Throughput with ratios, latencies, what was measured on what, and what failed."""
    parts = [
        "Output tokens/s: median (least to most of the rounds), and how many times Quire's it is",
        grid(record, lambda task, peer: rate(record, task, peer), starts=True),
        "Median time to the first token / per token after it, ms (median of the rounds' medians)",
        grid(record, lambda task, peer: latency(record, task, peer), starts=False),
        "\n".join(notes(record)),
    ]
    return "\n\n".join(parts)


def rate(record: Record, task: str, peer: str) -> str:
    values = record.values(task, peer, "output_tokens_per_s")
    if not values:
        return ""
    middle = statistics.median(values)
    text = f"{number(middle)} ({number(min(values))} to {number(max(values))})"
    ours = record.values(task, OURS, "output_tokens_per_s")
    return text if peer == OURS or not ours else f"{text}, {middle / statistics.median(ours):.2f} x"


def latency(record: Record, task: str, peer: str) -> str:
    both = [record.values(task, peer, figure) for figure in ("ttft_ms", "tpot_ms")]
    return " / ".join(number(statistics.median(values)) for values in both) if both[0] else ""


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def grid(record: Record, cell: Cell, *, starts: bool) -> str:
    """One row per peer, one column per task."""
    names = ["", *(["start, s"] if starts else [])]
    names += [task["about"] for task in record.tasks.values()]
    rows = [
        [peer, *([start(record, peer)] if starts else [])]
        + [cell(task, peer) for task in record.tasks]
        for peer in record.peers
    ]
    return markdown([names, ["---", *["--:"] * (len(names) - 1)], *rows])


def start(record: Record, peer: str) -> str:
    """Seconds to the first token, by model, each the median of its starts."""
    by_model = record.peers[peer]["starts_s"].values()
    return " / ".join(number(statistics.median(seconds)) for seconds in by_model)


def notes(record: Record) -> list[str]:
    machine = ", ".join(f"{name} {value}" for name, value in record.machine.items())
    lines = [f"Machine: {machine}."]
    for peer, noted in record.peers.items():
        lines.append(f"- {peer} {noted['version']}: {noted['about']}")
        lines += [f"  - {model}: `{text}`" for model, text in noted["settings"].items()]
    lines += [f"- failed: {one['peer']}, {one['what']}: {one['why']}" for one in record.failures]
    return lines


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
