"""Memory of one sequence against its length, drawn with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from configs.settings import SettingsError, format_bytes
from engine import planner

if TYPE_CHECKING:
    from engine.planner import Plan

POINTS: Final = 300
DASHES: Final = ("-", "--", ":", "-.")
Curves = dict[str, list[tuple[int, int]]]


def draw(plan: Plan, file: Path) -> None:
    """Writes the picture; the ending of `file` says in which format.

    Raises SettingsError if it cannot be written.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, f"KV heads, in {plan.cache_dtype}", by_attention(plan))
    _panel(right, "dtypes of the cache", by_dtype(plan))
    if plan.memory is not None:
        for axes in (left, right):
            axes.axhline(plan.memory.left_for_kv, color="grey", label="left by the weights")
    left.set_ylabel("KV cache of one sequence")
    left.legend()
    right.legend()
    figure.suptitle(plan.model.name)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--plot {file} cannot be written: {error}") from None


def by_attention(plan: Plan) -> Curves:
    """The model with many, some and one KV head."""
    own = plan.model.config
    return {
        f"{name} (this model)" if config == own else name: planner.curve(
            config, plan.cache_dtype, plan.block_size, _lengths(plan)
        )
        for name, config in planner.attention_variants(own).items()
    }


def by_dtype(plan: Plan) -> Curves:
    """The model as it is, in every dtype of the cache; those of one size share a curve."""
    names: dict[int, list[str]] = {}
    for name, cache in plan.caches.items():
        names.setdefault(cache.bytes_per_block, []).append(name)
    return {
        ", ".join(same): planner.curve(plan.model.config, same[0], plan.block_size, _lengths(plan))
        for same in names.values()
    }


def _lengths(plan: Plan) -> list[int]:
    """From one block to the whole context, at even distances on a logarithmic axis."""
    longest = max(plan.context, plan.prompt + plan.output)
    ratio = max(longest / plan.block_size, 1.0)
    return sorted({round(longest * ratio ** (i / POINTS - 1)) for i in range(POINTS + 1)})


def _panel(axes: Axes, title: str, curves: Curves) -> None:
    axes.set_title(title)
    for i, (name, points) in enumerate(curves.items()):
        lengths, sizes = zip(*points, strict=True)
        axes.plot(lengths, sizes, DASHES[i % len(DASHES)], label=name)
    axes.set_xlabel("tokens")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: format_bytes(count)))
    axes.grid(alpha=0.3)
