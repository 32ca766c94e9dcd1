"""Peers in turn: A B C, A B C, ... Who is not measured stands still."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.load import Round
from benchmarks.peers.checkpoint import Checkpoint
from benchmarks.peers.peer import Peer, Running
from benchmarks.peers.record import Record
from benchmarks.peers.task import Task
from benchmarks.report import figures
from benchmarks.sse import BenchError

PROMPT_SLACK: Final = 0.05  # text may miss its length by so much


@dataclass
class Contestant:
    """A peer that serves one model, stopped unless it is its turn."""

    peer: Peer
    running: Running
    given_up: set[str]  # tasks that it failed
    warm: set[str]  # tasks that it was warmed up for


class Comparison:
    """All tasks of all peers, `rounds` times, into `record`.

    Args:
        folder: takes the checkpoints and the logs.
        limit_s: a round that takes longer is given up, and its peer with it.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        tasks: Sequence[Task],
        record: Record,
        folder: Path,
        *,
        rounds: int,
        limit_s: float,
    ) -> None:
        self._peers, self._tasks, self._record = peers, tasks, record
        self._folder, self._rounds, self._limit_s = folder, rounds, limit_s

    def run(self) -> None:
        for shape in dict.fromkeys(task.shape for task in self._tasks):
            self._serve([task for task in self._tasks if task.shape == shape])

    def left(self) -> Iterator[tuple[int, Task, Peer]]:
        """What is not in the record yet, in the order in which it is measured."""
        for number in range(self._rounds):
            for task in self._tasks:
                for peer in self._peers:
                    if not self._record.has(task.name, peer.name, number):
                        yield number, task, peer

    def seconds(self) -> float:
        """About how long it takes, by what was measured before or else by guess."""
        record, left = self._record, list(self.left())
        measuring = (
            max(record.values(task.name, peer.name, "seconds"), default=task.guess_s)
            for _, task, peer in left
        )
        starts = (
            max(record.peers.get(name, {}).get("starts_s", {}).get(shape, []), default=30.0)
            for shape, name in {(task.shape, peer.name) for _, task, peer in left}
        )
        return sum(measuring) + sum(starts)

    def _serve(self, tasks: Sequence[Task]) -> None:
        """The tasks of one model: its peers start once, and stay."""
        wanted = [(number, task, peer) for number, task, peer in self.left() if task in tasks]
        if not wanted:
            return
        checkpoint = Checkpoint(
            tasks[0].shape,
            self._folder / "checkpoints",
            sequences=max(task.clients for task in tasks),
            context=max(task.context for task in tasks),
        )
        with ExitStack() as stack:
            names = {peer.name for _, _, peer in wanted}
            started = [
                (peer.name, self._start(peer, checkpoint, stack))
                for peer in self._peers
                if peer.name in names
            ]
            contestants = {name: one for name, one in started if one is not None}
            for number, task, peer in wanted:
                contestant = contestants.get(peer.name)
                if contestant is None or task.name in contestant.given_up:
                    continue
                if not self._turn(contestant, task, number):
                    del contestants[peer.name]

    def _start(self, peer: Peer, checkpoint: Checkpoint, stack: ExitStack) -> Contestant | None:
        tell(f"{checkpoint.shape}: starting {peer.name}")
        log = self._folder / "logs" / f"{peer.name}-{checkpoint.shape}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            peer.prepare(checkpoint)
            began = time.perf_counter()
            running = peer.start(checkpoint, log)
        except (BenchError, TimeoutError, subprocess.CalledProcessError) as error:
            self._fail(peer, checkpoint.shape, error)
            return None
        seconds = time.perf_counter() - began
        stack.callback(running.process.end)
        running.process.pause()
        noted = self._record.peers.setdefault(peer.name, {"settings": {}, "starts_s": {}})
        noted |= {"about": peer.about, "version": peer.version()}
        noted["settings"][checkpoint.shape] = peer.settings(checkpoint)
        noted["starts_s"].setdefault(checkpoint.shape, []).append(round(seconds, 2))
        self._record.write()
        return Contestant(peer, running, set(), set())

    def _turn(self, contestant: Contestant, task: Task, number: int) -> bool:
        """One round of one peer; whether the peer is still there."""
        peer, running = contestant.peer, contestant.running
        try:
            with running.process.running():
                if task.name not in contestant.warm:
                    running.measure(task.brief(), self._limit_s)
                    contestant.warm.add(task.name)
                measured = running.measure(task, self._limit_s)
            noted = noted_round(task, measured)
        except (BenchError, TimeoutError) as error:
            self._fail(peer, task.name, error)
            contestant.given_up.add(task.name)
            if isinstance(error, TimeoutError) or running.process.ended:
                running.process.end()
                return False
            return True
        self._record.rounds.append({"task": task.name, "peer": peer.name, "round": number, **noted})
        self._record.write()
        tell(f"{task.name:10} {peer.name:15} {noted['output_tokens_per_s']:8,.1f} tokens/s")
        return True

    def _fail(self, peer: Peer, what: str, error: Exception) -> None:
        why = str(error) or f"not done in {self._limit_s:.0f} s"
        tell(f"{what}: {peer.name} failed: {why}")
        self._record.failures.append({"peer": peer.name, "what": what, "why": why})
        self._record.write()


def noted_round(task: Task, measured: Round) -> dict[str, Any]:
    """The figures of a round that a record keeps.

    Raises:
        BenchError: the server counts tokens of its own, or none.
    """
    whole = figures([measured])
    if whole.counted_by != "usage" or whole.prompt_tokens is None:
        raise BenchError("it tells no usage: nobody knows how many tokens it made")
    each = whole.prompt_tokens / whole.requests
    if not task.chats and abs(each - task.input) > PROMPT_SLACK * task.input:
        raise BenchError(f"prompts of {task.input} tokens were {each:.0f} tokens to it")
    return {
        "output_tokens_per_s": whole.output_tokens_per_s,
        "ttft_ms": whole.ttft_ms.p50,
        "tpot_ms": whole.tpot_ms.p50,
        "itl_p99_ms": whole.itl_ms.p99 if whole.itl_ms else None,
        "requests": whole.requests,
        "prompt_tokens": whole.prompt_tokens,
        "output_tokens": whole.output_tokens,
        "seconds": whole.seconds,
    }


def plain(task: Task) -> dict[str, Any]:
    """A task as a record keeps it, without the guess."""
    return {name: value for name, value in asdict(task).items() if name != "guess_s"}


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
