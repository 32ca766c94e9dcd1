"""Measures a server over HTTP: `quire bench`, `make bench`, `python -m benchmarks.serve`.

Without `--url` it makes a random Llama of 56 million parameters and serves it from a process of
its own, as an operator would. Prompts are random token ids, drawn anew for every request, so that
nothing is shared between them; answers are greedy and of one fixed length.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from tqdm import tqdm

from benchmarks.sse import Answer, BenchError, Client, Connection

SHAPE: Final = "llama-56m"
FOLDER: Final = Path(__file__).parents[1] / ".cache" / "bench"
START_SECONDS: Final = 600.0  # the first start compiles kernels
WARM_UP_TOKENS: Final = 8


@dataclass(frozen=True)
class Load:
    """What each client asks for.

    Attributes:
        prompt_tokens: length of each prompt.
        output_tokens: length of each answer, exactly.
        vocab_size: prompts draw ids below it.
        requests: answers per client and round, one after another.
    """

    model: str
    prompt_tokens: int
    output_tokens: int
    vocab_size: int
    requests: int


@dataclass(frozen=True)
class Result:
    """One concurrency. Rates are tokens/s; times are milliseconds over all rounds."""

    clients: int
    requests: int
    output_tokens_per_s: float  # the median round
    output_tokens_per_s_min: float
    output_tokens_per_s_max: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    tpot_ms_p50: float
    tpot_ms_p99: float
    client_cpu: float  # cores that this process used


@dataclass(frozen=True)
class Round:
    answers: list[Answer]
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        return sum(answer.completion_tokens for answer in self.answers) / self.seconds


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def summarize(clients: int, rounds: Sequence[Round]) -> Result:
    """Rates by round, times over all answers."""
    answers = [answer for one in rounds for answer in one.answers]
    ttft = [answer.ttft * 1000 for answer in answers]
    tpot = [answer.tpot * 1000 for answer in answers]
    rates = [one.rate for one in rounds]
    return Result(
        clients=clients,
        requests=len(answers),
        output_tokens_per_s=statistics.median(rates),
        output_tokens_per_s_min=min(rates),
        output_tokens_per_s_max=max(rates),
        ttft_ms_p50=percentile(ttft, 0.50),
        ttft_ms_p99=percentile(ttft, 0.99),
        tpot_ms_p50=percentile(tpot, 0.50),
        tpot_ms_p99=percentile(tpot, 0.99),
        client_cpu=sum(one.cpu_seconds for one in rounds) / sum(one.seconds for one in rounds),
    )


def _body(load: Load, output_tokens: int, draw: random.Random) -> dict[str, Any]:
    return {
        "model": load.model,
        "prompt": [draw.randrange(load.vocab_size) for _ in range(load.prompt_tokens)],
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def run_round(client: Client, load: Load, clients: int, draw: random.Random) -> Round:
    """All clients start at once, and each sends its next request when the last is answered.

    Raises:
        BenchError: the server refused, or an answer has another length than asked for.
    """
    bodies = [
        [_body(load, load.output_tokens, draw) for _ in range(load.requests)]
        for _ in range(clients)
    ]
    connections = [await client.connect() for _ in range(clients)]

    async def work(connection: Connection, mine: list[dict[str, Any]]) -> list[Answer]:
        return [await client.complete(connection, body) for body in mine]

    began, cpu = time.perf_counter(), time.process_time()
    try:
        finished = await asyncio.gather(*map(work, connections, bodies))
    finally:
        for connection in connections:
            connection.close()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    answers = [answer for mine in finished for answer in mine]
    for answer in answers:
        if answer.completion_tokens != load.output_tokens:
            raise BenchError(
                f"asked for {load.output_tokens} tokens, got {answer.completion_tokens}"
            )
    return Round(answers, seconds, cpu)


async def _first_model(client: Client) -> str:
    status, body = await client.get("/v1/models")
    if status != 200:
        raise BenchError(f"/v1/models answered {status}")
    return str(json.loads(body)["data"][0]["id"])


async def measure(
    client: Client, arguments: argparse.Namespace, seed: int | None = None
) -> list[Result]:
    """Every concurrency in turn: one short round that is not counted, then the rounds."""
    draw = random.Random(seed)
    model = arguments.model or await _first_model(client)
    results = []
    total = len(arguments.clients) * (arguments.rounds + 1)
    with tqdm(total=total, unit="round", disable=not sys.stderr.isatty()) as bar:
        for clients in arguments.clients:
            requests = arguments.requests or max(2, 4 // clients)
            load = Load(model, arguments.input, arguments.output, arguments.vocab_size, requests)
            warm_up = Load(model, arguments.input, WARM_UP_TOKENS, arguments.vocab_size, 1)
            bar.set_description(f"{clients} clients")
            await run_round(client, warm_up, clients, draw)
            bar.update()
            rounds = []
            for _ in range(arguments.rounds):
                rounds.append(await run_round(client, load, clients, draw))
                bar.update()
            results.append(summarize(clients, rounds))
    return results


def table(results: Sequence[Result]) -> str:
    """For people, and for a README as it stands."""
    rows = [
        "| clients | output tokens/s (min to max) | TTFT p50 / p99 ms | TPOT p50 / p99 ms "
        "| client CPU |",
        "|--:|--:|--:|--:|--:|",
    ]
    rows.extend(
        f"| {one.clients} "
        f"| {one.output_tokens_per_s:,.1f} "
        f"({one.output_tokens_per_s_min:,.1f} to {one.output_tokens_per_s_max:,.1f}) "
        f"| {one.ttft_ms_p50:,.1f} / {one.ttft_ms_p99:,.1f} "
        f"| {one.tpot_ms_p50:,.2f} / {one.tpot_ms_p99:,.2f} "
        f"| {one.client_cpu:.0%} |"
        for one in results
    )
    return "\n".join(rows)


def make_checkpoint() -> Path:
    """The folder of the random model, made once."""
    folder = FOLDER / SHAPE
    if not (folder / "config.json").is_file():
        print(f"making {folder.name}", file=sys.stderr)
        command = [sys.executable, "-m", "benchmarks.make_checkpoint", "--shape", SHAPE]
        subprocess.run([*command, str(folder)], check=True, cwd=Path(__file__).parents[1])
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(model: Path, flags: Sequence[str]) -> Iterator[str]:
    """`quire serve` in a process of its own, ready; its URL."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), FOLDER / "server.log"
    command = [sys.executable, "-m", "server", "serve", str(model), "--port", str(port), *flags]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=Path(__file__).parents[1]
        )
    try:
        asyncio.run(_until_healthy(Client("127.0.0.1", port), process, log))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


async def _until_healthy(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchError(f"the server ended:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(BenchError):
            if (await client.get("/health"))[0] == 200:
                return
        await asyncio.sleep(0.2)
    raise BenchError(f"the server was not ready in {START_SECONDS:.0f} s; its log is {log}")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="quire bench",
        description="Measure a server over HTTP: output tokens/s, TTFT, TPOT.",
        epilog="Flags behind -- go to the server that is started, as in: quire bench -- --dtype "
        "float32",
        allow_abbrev=False,
    )
    parser.add_argument("--url", help="drive this OpenAI-style server; without, one is started")
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--input", type=int, default=64, help="tokens per prompt (default 64)")
    parser.add_argument("--output", type=int, default=64, help="tokens per answer (default 64)")
    parser.add_argument("--requests", type=int, help="per client and round (default 2; 4 for one)")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default 3)")
    parser.add_argument(
        "--vocab-size", type=int, default=1000, help="prompts draw ids below this (default 1000)"
    )
    parser.add_argument("--json", action="store_true", help="JSON in place of the table")
    own, server_flags = list(argv), []
    if "--" in own:
        cut = own.index("--")
        own, server_flags = own[:cut], own[cut + 1 :]
    parsed = parser.parse_args(own)
    if parsed.url and server_flags:
        parser.error("flags behind -- are for a server that is started here, not for --url")
    parsed.server_flags = server_flags
    return parsed


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(sys.argv[1:] if argv is None else argv)
    try:
        with contextlib.ExitStack() as stack:
            url = arguments.url or stack.enter_context(
                server(make_checkpoint(), arguments.server_flags)
            )
            parts = urlsplit(url)
            if parts.scheme != "http" or not parts.hostname:
                raise BenchError(f"--url must be like http://127.0.0.1:8000, got {url}")
            key = os.environ.get("QUIRE_API_KEY")
            client = Client(parts.hostname, parts.port or 80, key)
            results = asyncio.run(measure(client, arguments))
    except (BenchError, subprocess.CalledProcessError) as error:
        print(f"quire bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if arguments.json:
        print(json.dumps([asdict(one) for one in results], indent=2))
    else:
        print(f"{arguments.input} tokens in, {arguments.output} out, {os.cpu_count()} cores\n")
        print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
