"""openvino-genai, which has no server: a program in its environment asks it in its own process."""

from __future__ import annotations

import json
import random
import select
from pathlib import Path
from typing import Any, Final

from benchmarks.answers import Answer
from benchmarks.load import Round
from benchmarks.peers.checkpoint import Checkpoint
from benchmarks.peers.home import ROOT
from benchmarks.peers.peer import START_SECONDS, version_of
from benchmarks.peers.process import ProcessGroup
from benchmarks.peers.task import Task
from benchmarks.sse import BenchError

VOCABULARY: Final = 1000  # prompts draw ids below it, as the HTTP client's do


class OpenVino:
    """`python` is that of its environment; `kv_gib` the size of its cache."""

    name = "openvino-genai"
    about = "ContinuousBatchingPipeline in process, without HTTP or text"

    def __init__(self, python: Path, kv_gib: int) -> None:
        self.python, self.kv_gib = python, kv_gib

    def absent(self) -> str | None:
        if self.python.exists():
            return None
        return f"not installed: python -m benchmarks.peers.install {self.name}"

    def version(self) -> str:
        return version_of(self.python, "openvino-genai")

    def prepare(self, checkpoint: Checkpoint) -> None:
        self._model(checkpoint)

    def settings(self, checkpoint: Checkpoint) -> str:
        return f"bf16 inference and KV cache, SchedulerConfig {self._scheduler()}"

    def start(self, checkpoint: Checkpoint, log: Path) -> RunningDriver:
        program = [str(self.python), "-m", "benchmarks.peers.openvino_driver"]
        command = [*program, str(self._model(checkpoint)), self._scheduler()]
        process = ProcessGroup(command, log, environment={"PYTHONPATH": str(ROOT)}, piped=True)
        running = RunningDriver(process)
        try:
            running.line(START_SECONDS)
        except BaseException:
            process.end()
            raise
        return running

    def _scheduler(self) -> str:
        # Split-fuse is its chunked prefill: decode goes on while prompts are read. It caches
        # prefixes only where asked to, and everybody else does.
        return json.dumps(
            {
                "cache_size": self.kv_gib,
                "max_num_seqs": 64,
                "max_num_batched_tokens": 2048,
                "dynamic_split_fuse": True,
                "enable_prefix_caching": True,
            }
        )

    def _model(self, checkpoint: Checkpoint) -> Path:
        """The export keeps the weights in bfloat16 where no other format is asked for."""
        command: list[str | Path] = [
            *(self.python.with_name("optimum-cli"), "export", "openvino"),
            *("--model", checkpoint.hugging_face, "--task", "text-generation-with-past", "{}"),
        ]
        return checkpoint.converted("-openvino", command)


class RunningDriver:
    """The program at the other end of two pipes: a round goes in as one line, and comes out so."""

    def __init__(self, process: ProcessGroup) -> None:
        self.process = process

    def measure(self, task: Task, limit_s: float) -> Round:
        stdin = self.process.stdin
        assert stdin is not None
        try:
            print(json.dumps(asked(task)), file=stdin, flush=True)
        except BrokenPipeError:
            raise BenchError(f"it ended: {self.process.last_words()}") from None
        return understood(task, json.loads(self.line(limit_s)))

    def line(self, limit_s: float) -> str:
        """Its next line.

        Raises:
            TimeoutError: it says nothing.
            BenchError: it has ended.
        """
        stdout = self.process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], limit_s)[0]:
            raise TimeoutError
        line = stdout.readline()
        if not line:
            raise BenchError(f"it ended: {self.process.last_words()}")
        return line


def asked(task: Task) -> dict[str, Any]:
    """A round as `openvino_driver` reads it, of new random ids."""
    draw = random.Random()

    def ids(count: int) -> list[int]:
        return draw.choices(range(VOCABULARY), k=count)

    system = ids(task.system)
    scripts = []
    for _ in range(task.loop.scripts):
        turns = [[ids(task.input), task.output] for _ in range(task.turns)]
        turns[0][0] = [*system, *ids(task.input)]
        scripts.append(turns)
    return {"clients": task.clients, "scripts": scripts}


def understood(task: Task, told: dict[str, Any]) -> Round:
    """Raises BenchError: an answer has another length than asked for."""
    said = []
    for answer in told["answers"]:
        if answer["completion_tokens"] != task.output:
            raise BenchError(f"asked for {task.output} tokens, got {answer['completion_tokens']}")
        times = tuple(answer.pop("times"))
        said.append(Answer(due=answer["sent"], times=times, **answer))
    return Round(tuple(said), told["seconds"], told["cpu_seconds"])
