"""Measures a server over HTTP: `quire bench`, `make bench`, `python -m benchmarks.serve`.

Without `--url` it makes a random model and serves it from a process of its own, as an operator
would. docs/benchmarks.md tells what each figure means. Other programs call `load.measure` and
`report.summarize`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from benchmarks.dialect import Dialect, first_model, measured_words
from benchmarks.load import ClosedLoop, Loop, OpenLoop, Round, measure
from benchmarks.local_server import SHAPE, make_checkpoint, server
from benchmarks.report import Limits, Result, notes, summarize, table, to_json, turn_table
from benchmarks.shapes import SHAPES
from benchmarks.sse import BenchError, Client
from benchmarks.workload import Chats, Independent, Lengths, Workload

Measured = list[tuple[Loop, list[Round]]]


class _Parser(argparse.ArgumentParser):
    """Mistakes are one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="quire bench",
        description="Measure a server over HTTP: output tokens/s, TTFT, TPOT, ITL, goodput.",
        epilog="Flags behind -- go to the server that is started, as in: quire bench -- --dtype "
        "float32",
        allow_abbrev=False,
    )
    target = parser.add_argument_group("the server")
    target.add_argument("--url", help="drive this OpenAI-style server; without, one is started")
    target.add_argument(
        "--shape", choices=SHAPES, help=f"random model of the one started (default {SHAPE})"
    )
    target.add_argument("--model", help="default: the first that the server names")
    target.add_argument("--api", choices=("completions", "chat"), default="completions")
    target.add_argument(
        "--prompt-kind",
        choices=("ids", "text"),
        help="prompts as token ids or as text (default: ids; text with --api chat)",
    )
    target.add_argument("--vocab-size", type=_positive, default=1000, help="ids are below this")
    target.add_argument(
        "--key-env",
        metavar="NAME",
        default="QUIRE_API_KEY",
        help="variable that holds the API key (default QUIRE_API_KEY)",
    )
    target.add_argument(
        "--extra-body",
        metavar="JSON",
        type=_object,
        default={},
        help="more fields for every request; null takes one away",
    )
    target.add_argument(
        "--no-ignore-eos",
        action="store_true",
        help="do not send ignore_eos, and take answers of any length",
    )
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--workload", choices=("random", "chat"), default="random")
    asked.add_argument(
        "--input",
        type=_lengths,
        default=Lengths(64, 64),
        metavar="TOKENS",
        help="of a prompt, or of a turn's question; 64 or drawn from 32:256 (default 64)",
    )
    asked.add_argument(
        "--output",
        type=_lengths,
        default=Lengths(64, 64),
        metavar="TOKENS",
        help="of an answer; 64 or drawn from 32:256 (default 64)",
    )
    asked.add_argument("--turns", type=_positive, default=4, help="of a chat (default 4)")
    asked.add_argument(
        "--system",
        type=_positive,
        default=600,
        metavar="TOKENS",
        help="of the system prompt that chats share (default 600)",
    )
    load = parser.add_argument_group("how much at once")
    load.add_argument(
        "--clients",
        type=_positive,
        nargs="+",
        help="closed loop: so many at once (default 1 16 64; 16 chats)",
    )
    load.add_argument(
        "--rate",
        type=_above_zero,
        nargs="+",
        help="open loop: requests (or chats) that arrive per second, at random",
    )
    load.add_argument("--max-concurrency", type=_positive, help="at most so many of them at a time")
    load.add_argument(
        "--requests",
        type=_positive,
        help="requests (or chats) per client and round (default 2; 4 for one client; 1 chat); with "
        "--rate: arrivals per round (default 100)",
    )
    load.add_argument("--rounds", type=_positive, default=3, help="counted rounds (default 3)")
    load.add_argument(
        "--seed", type=int, default=0, help="of lengths and arrival times (default 0)"
    )
    told = parser.add_argument_group("what is told")
    told.add_argument("--slo-ttft", type=_above_zero, metavar="MS", help="goodput: most TTFT")
    told.add_argument("--slo-tpot", type=_above_zero, metavar="MS", help="goodput: most TPOT")
    told.add_argument("--json", action="store_true", help="JSON in place of the tables")
    told.add_argument("--plot", type=Path, metavar="FILE", help="draw TTFT and ITL (matplotlib)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _above_zero(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")


def _lengths(text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like 64 or 32:256, got {text}") from None


def _object(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What was asked for, and as `server_flags` what stands behind --."""
    parser, own, flags = _parser(), list(argv), list[str]()
    if "--" in own:
        cut = own.index("--")
        own, flags = own[:cut], own[cut + 1 :]
    asked = parser.parse_args(own)
    if asked.url and (flags or asked.shape):
        parser.error("--shape and flags behind -- are for a server started here, not for --url")
    if asked.rate and asked.clients:
        parser.error("--rate is an open loop and --clients a closed one: give one of them")
    if asked.max_concurrency and not asked.rate:
        parser.error("--max-concurrency goes with --rate; without it --clients says how many")
    if asked.api == "chat" and asked.prompt_kind == "ids":
        parser.error("--api chat takes --prompt-kind text only")
    if asked.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if asked.plot and not asked.plot.parent.is_dir():
        parser.error(f"--plot: there is no folder {asked.plot.parent}")
    try:
        Client(asked.url or "http://localhost")
    except ValueError as error:
        parser.error(f"--url {error}")
    asked.prompt_kind = asked.prompt_kind or ("text" if asked.api == "chat" else "ids")
    asked.server_flags = flags
    return asked


def loops(asked: argparse.Namespace) -> list[Loop]:
    """The loads to measure, one after the other."""
    if asked.rate:
        arrivals = asked.requests or 100
        return [OpenLoop(rate, arrivals, asked.max_concurrency) for rate in asked.rate]
    chat = asked.workload == "chat"
    clients: list[int] = asked.clients or ([16] if chat else [1, 16, 64])
    return [
        ClosedLoop(count, asked.requests or (1 if chat else max(2, 4 // count)))
        for count in clients
    ]


async def workload(client: Client, asked: argparse.Namespace) -> Workload:
    """What is asked, in words that this server takes."""
    dialect = Dialect(
        model=asked.model or await first_model(client),
        api=asked.api,
        prompt_kind=asked.prompt_kind,
        vocab_size=asked.vocab_size,
        ignore_eos=not asked.no_ignore_eos,
        extra=asked.extra_body,
    )
    if dialect.prompt_kind == "text":
        dialect = replace(dialect, words=await measured_words(client, dialect))
    if asked.workload == "chat":
        return Chats(dialect, asked.input, asked.output, asked.turns, asked.system)
    return Independent(dialect, asked.input, asked.output)


async def run(client: Client, asked: argparse.Namespace) -> tuple[Workload, Measured]:
    """Every load in turn, with a progress bar where somebody looks."""
    todo, work = loops(asked), await workload(client, asked)
    total = sum(loop.scripts for loop in todo) * work.turns * asked.rounds
    measured: Measured = []
    with tqdm(total=total, unit="answer", disable=not sys.stderr.isatty()) as bar:
        for loop in todo:
            bar.set_description(loop.name)
            rounds = await measure(
                client, work, loop, rounds=asked.rounds, seed=asked.seed, on_answer=bar.update
            )
            measured.append((loop, rounds))
    return work, measured


def show(asked: argparse.Namespace, work: Workload, results: Sequence[Result]) -> str:
    """Tables, and what stands around them."""
    what = f"{asked.input} tokens in, {asked.output} out"
    if asked.workload == "chat":
        what = f"chats of {asked.turns} turns of {what}, after a system prompt of {asked.system}"
    dialect = work.dialect
    fields = ", ".join(dialect.request(dialect.asked(""), 1).body)
    head = f"{what}, {os.cpu_count()} cores\n{dialect.path} with {fields}"
    parts = [head, table(results), turn_table(results), "\n".join(notes(results))]
    return "\n\n".join(filter(None, parts))


def settings(asked: argparse.Namespace, work: Workload) -> dict[str, Any]:
    """What a result in JSON says about how it was measured."""
    told = {
        "url": asked.url,
        "model": work.dialect.model,
        "fields": list(work.dialect.request(work.dialect.asked(""), 1).body),
        "input": str(asked.input),
        "output": str(asked.output),
    }
    names = ("shape", "api", "prompt_kind", "workload", "turns", "system", "requests", "seed")
    return told | {name: getattr(asked, name) for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    asked = _arguments(sys.argv[1:] if argv is None else argv)
    key = os.environ.get(asked.key_env, "").partition(",")[0].strip() or None
    limits = Limits(asked.slo_ttft, asked.slo_tpot) if asked.slo_ttft or asked.slo_tpot else None
    try:
        with contextlib.ExitStack() as stack:
            url = asked.url or stack.enter_context(
                server(make_checkpoint(asked.shape or SHAPE), asked.server_flags)
            )
            work, measured = asyncio.run(run(Client(url, key), asked))
        results = [summarize(loop, rounds, limits) for loop, rounds in measured]
    except (BenchError, subprocess.CalledProcessError) as error:
        print(f"quire bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if asked.json:
        about = settings(asked, work)
        print(json.dumps([to_json(one) | {"settings": about} for one in results], indent=2))
    else:
        print(show(asked, work, results))
    if asked.plot:
        from benchmarks import plot

        plot.draw(measured, asked.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
