"""`quire plan`: the memory of a model as a table, as JSON, or drawn."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from configs.settings import CONFIG, FIELDS, Settings, SettingsError, format_bytes, parse_bytes

if TYPE_CHECKING:
    from engine.planner import CachePlan, Plan

SETTINGS: Final = (
    "block_size",
    "dtype",
    "gpu_memory_utilization",
    "host_kv_bytes",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "quantization",
    "revision",
)
"""What `serve` is also told, by the same flags, variables and files."""

_NOTE: Final = (
    "The work space of a step takes from what is left for KV; how much is known once one has run."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `quire plan`."""
    parser.add_argument("MODEL", help="a known name, a folder, or a Hugging Face id")
    parser.add_argument(
        "--memory", type=_bytes, metavar="BYTES", help="of the GPU, such as 80GiB: what fits in it"
    )
    parser.add_argument(
        "--kv-cache-dtype", default="auto", metavar="NAME", help="default: that of the weights"
    )
    parser.add_argument(
        "--prompt", type=_count, default=2000, metavar="TOKENS", help="default 2000"
    )
    parser.add_argument("--output", type=_count, default=500, metavar="TOKENS", help="default 500")
    parser.add_argument("--json", action="store_true", help="every number, in bytes and tokens")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it, such as out.png")
    parser.add_argument("--config", metavar="FILE", help="YAML file, or a preset of configs/")
    for name in SETTINGS:
        setting = FIELDS[name]
        default = f" (default {setting.default_text})" if setting.default_text else ""
        text = (setting.description + default).replace("`", "").replace("%", "%%")
        parser.add_argument(setting.flag, dest=name, metavar="VALUE", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan.

    Raises SettingsError for whatever the operator can put right.
    """
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise SettingsError("--plot needs matplotlib: pip install matplotlib")
    settings = Settings.read({name: getattr(arguments, name) for name in (*SETTINGS, CONFIG)})
    from engine import planner

    plan = planner.plan(
        planner.find(arguments.MODEL, settings.model.revision),
        settings,
        prompt=arguments.prompt,
        output=arguments.output,
        memory=arguments.memory,
        cache_dtype=arguments.kv_cache_dtype,
    )
    print(as_json(plan) if arguments.json else table(plan))
    if arguments.plot is not None:
        from server import plan_plot

        plan_plot.draw(plan, arguments.plot)
        print(f"drawn into {arguments.plot}", file=sys.stderr)
    return 0


def _bytes(text: str) -> int:
    try:
        count = parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, got {text}") from None
    if not isinstance(count, int) or count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 byte, got {text}")
    return count


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a count of at least 1, got {text}")
    return int(text)


def as_json(plan: Plan) -> str:
    """The plan in raw numbers; of the model's config, what the cache depends on."""
    config = plan.model.config
    shape = ("architecture", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    model = {
        "name": plan.model.name,
        **{name: getattr(config, name) for name in shape},
        "layer_windows": config.layer_windows if any(config.layer_windows) else None,
        "parameters": plan.model.parameters,
        "counted_from": plan.model.counted_from,
    }
    return json.dumps(dataclasses.asdict(plan) | {"model": model}, indent=2)


# ---------------------------------------------------------------------- the table


def table(plan: Plan) -> str:
    """The plan as aligned text."""
    parts = [_head(plan), _weights(plan), _caches(plan)]
    if any(group.window for group in plan.caches[plan.cache_dtype].groups):
        parts.append(_groups(plan))
    if plan.memory is not None:
        parts += [_limit(plan), _NOTE]
    parts += [f"warning: {warning}" for warning in plan.warnings]
    return "\n\n".join(parts)


def _head(plan: Plan) -> str:
    config = plan.model.config
    kv_heads = f"{config.num_kv_heads} KV head{'s' * (config.num_kv_heads > 1)}"
    return (
        f"{plan.model.name}: {config.num_layers} layers, {config.num_heads} heads, {kv_heads} of "
        f"{config.head_dim}, {plan.context:,} tokens of context ({config.architecture})"
    )


def _weights(plan: Plan) -> str:
    model, memory = plan.model, plan.memory
    source = "headers of the files" if model.counted_from == "headers" else "arithmetic"
    count = f"{model.parameters:,} parameters as {plan.weight_dtype} (by {source})"
    rows = [("weights", format_bytes(plan.weight_bytes), count)]
    if memory is not None:
        share = f"{memory.utilization:g} of {format_bytes(memory.total)}"
        rows = [
            ("memory", format_bytes(memory.usable), f"{share} (--gpu-memory-utilization)"),
            *rows,
            ("left for KV", format_bytes(memory.left_for_kv), ""),
        ]
    return _aligned(rows, "<><")


def _caches(plan: Plan) -> str:
    """One column per cache dtype; a star marks the one that was asked for."""
    caches = plan.caches.values()
    stars = [f"{name}{' *' if name == plan.cache_dtype else '  '}" for name in plan.caches]
    length = plan.prompt + plan.output

    def row(label: str, cells: list[str]) -> tuple[str, ...]:
        return (label, *(f"{cell}  " for cell in cells))

    rows = [
        ("KV cache", *stars),
        row("per token", [format_bytes(c.bytes_per_token) for c in caches]),
        row(f"per block of {plan.block_size}", [format_bytes(c.bytes_per_block) for c in caches]),
        row(f"per sequence of {length:,}", [format_bytes(c.bytes_per_sequence) for c in caches]),
    ]
    fits = [cache.fit for cache in caches if cache.fit is not None]
    if fits:
        rows += [
            row("blocks that fit", [f"{fit.blocks:,}" for fit in fits]),
            row("tokens", [f"{fit.tokens:,}" for fit in fits]),
            row("sequences that fit", [f"{fit.sequences_in_memory:,}" for fit in fits]),
            row("sequences at once", [f"{fit.sequences:,}" for fit in fits]),
            row("limited by", [fit.limited_by for fit in fits]),
        ]
    hosts = [cache.host for cache in caches if cache.host is not None]
    if plan.host_kv_bytes is not None:
        host_bytes = format_bytes(plan.host_kv_bytes)
        rows += [
            row(f"blocks in {host_bytes} of host", [f"{host.blocks:,}" for host in hosts]),
            row("tokens there", [f"{host.tokens:,}" for host in hosts]),
        ]
    return _aligned(rows, "<" + ">" * len(stars))


def _groups(plan: Plan) -> str:
    cache = plan.caches[plan.cache_dtype]
    rows = [("attention", "layers", "block tables", "per token", "blocks per sequence")]
    rows += [
        (
            f"window {group.window:,}" if group.window else "full",
            f"{group.layers}",
            f"{group.groups}",
            format_bytes(group.bytes_per_token),
            f"{group.blocks_per_sequence:,}",
        )
        for group in cache.groups
    ]
    return _aligned(rows, "<>>>>")


def _limit(plan: Plan) -> str:
    cache: CachePlan = plan.caches[plan.cache_dtype]
    fit = cache.fit
    assert fit is not None
    each = f"{plan.prompt:,} + {plan.output:,} tokens ({cache.blocks_per_sequence:,} blocks) each"
    start = f"{fit.sequences:,} sequences at once of {each}, in {plan.cache_dtype}, limited by"
    if fit.limited_by == "memory":
        return f"{start} memory."
    text = f"{start}\n--max-num-seqs {plan.max_num_seqs}; memory holds {fit.sequences_in_memory:,}."
    if fit.pool_blocks < fit.blocks:
        pool = format_bytes(fit.pool_blocks * cache.bytes_per_block)
        text += f" The pool is {fit.pool_blocks:,} blocks ({pool}): all slots at full length."
    return text


def _aligned(rows: Sequence[tuple[str, ...]], sides: str) -> str:
    """Columns as wide as their widest cell; `sides` holds < or > per column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    )
