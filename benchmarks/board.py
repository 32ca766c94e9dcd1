"""Draws the Grafana board as a picture, from the same queries:

python -m benchmarks.board --prometheus http://127.0.0.1:9090 --minutes 5 --out board.png
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

BOARD = Path(__file__).parents[1] / "configs" / "grafana" / "dashboards" / "quire.json"
COLUMNS = 4
STEPS = 120  # points per line
COLORS = 48  # of the picture, so that it stays small


@dataclass(frozen=True)
class Query:
    """One line, or one line per label value, of a panel."""

    expression: str
    legend: str

    def filled(self, window: str, model: str = ".*") -> str:
        """PromQL, with Grafana's variables replaced."""
        return self.expression.replace("$__rate_interval", window).replace("$model_name", model)

    def name(self, labels: dict[str, str]) -> str:
        """The legend of one line."""
        text = self.legend
        for label, value in labels.items():
            text = text.replace("{{" + label + "}}", value)
        return text


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    queries: tuple[Query, ...]


def panels(board: Path = BOARD) -> list[Panel]:
    """All that draw something, in the board's order."""
    return [
        Panel(
            panel["title"],
            panel["fieldConfig"]["defaults"]["unit"],
            tuple(Query(t["expr"], t["legendFormat"]) for t in panel["targets"]),
        )
        for panel in json.loads(board.read_text())["panels"]
        if panel["type"] != "row"
    ]


def draw(prometheus: str, shown: Sequence[Panel], seconds: float, window: str, out: Path) -> None:
    """Writes a picture of the last `seconds`."""
    from matplotlib.figure import Figure
    from PIL import Image

    rows = math.ceil(len(shown) / COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 2.5 * rows), layout="constrained")
    end = time.time()
    for place, panel in enumerate(shown, 1):
        axes = figure.add_subplot(rows, COLUMNS, place)
        for query in panel.queries:
            for series in _lines(prometheus, query.filled(window), end - seconds, end):
                times, values = zip(*series["values"], strict=True)
                axes.plot(
                    [t - end for t in times],
                    [float(value) for value in values],
                    label=query.name(series["metric"]),
                    linewidth=1,
                )
        axes.set_title(panel.title + _unit(panel.unit), fontsize=9)
        axes.set_ylim(bottom=0, top=1.02 if panel.unit == "percentunit" else None)
        axes.set_xlim(-seconds, 0)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=6, loc="upper left", framealpha=0.6)
    figure.supxlabel("seconds", fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=70)
    Image.open(drawn).convert("RGB").quantize(COLORS).save(out, optimize=True)


def _unit(unit: str) -> str:
    return {"s": " (s)", "percentunit": " (share)"}.get(unit, "")


def _lines(prometheus: str, expression: str, start: float, end: float) -> list[Any]:
    parameters: dict[str, str | float] = {
        "query": expression,
        "start": start,
        "end": end,
        "step": max((end - start) / STEPS, 1),
    }
    answer = httpx.get(f"{prometheus}/api/v1/query_range", params=parameters, timeout=30)
    answer.raise_for_status()
    return answer.json()["data"]["result"]  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--window", default="15s", help="what rates are taken over")
    parser.add_argument("--out", type=Path, default=Path("board.png"))
    args = parser.parse_args()
    draw(args.prometheus, panels(), args.minutes * 60, args.window, args.out)


if __name__ == "__main__":
    main()
