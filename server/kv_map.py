"""`quire kv`: the block pool of a running server as a small map in the terminal."""

from __future__ import annotations

import sys
from typing import Any

import httpx

WIDTH = 64
MOST_ROWS = 32
LEGEND = "legend: . free   c cached (free, can be found again)   u used   s shared"


def run(url: str, api_key: str | None) -> int:
    """Fetches and prints; the exit code."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(f"{url.rstrip('/')}/debug/kv", headers=headers, timeout=10)
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        print(f"quire: {url} does not answer: {error}", file=sys.stderr)
        return 1
    print(draw(answer.json()))
    return 0


def draw(kv: dict[str, Any]) -> str:
    """The map of what `/debug/kv` answered. Large pools are drawn with several blocks per letter,
    the busiest of them shown."""
    blocks = kv["blocks"]
    per_letter = max(-(-len(blocks) // (WIDTH * MOST_ROWS)), 1)
    letters = "".join(
        max(blocks[at : at + per_letter], key=".cus".index)
        for at in range(0, len(blocks), per_letter)
    )
    counts = ", ".join(f"{count:,} {name}" for name, count in kv["counts"].items())
    lines = [f"{kv['num_blocks']:,} blocks of {kv['block_size']} tokens: {counts}"]
    if per_letter > 1:
        lines.append(f"one letter is {per_letter} blocks")
    lines += [
        f"{at * per_letter:>8}  {letters[at : at + WIDTH]}" for at in range(0, len(letters), WIDTH)
    ]
    lines.append(LEGEND)
    for seq in kv["sequences"]:
        held = sum(block >= 0 for table in seq["tables"] for block in table)
        lines.append(
            f"{seq['request_id']}[{seq['index']}]  {seq['status']}, {seq['computed']} of "
            f"{seq['tokens']} tokens computed, {held} blocks"
        )
    return "\n".join(lines)
