"""Drives openvino-genai's ContinuousBatchingPipeline, which has no server, in this process.

    .peers/openvino-genai/bin/python -m benchmarks.peers.openvino_driver FOLDER SETTINGS

SETTINGS is a JSON object of fields of `SchedulerConfig`. The program prints a line when the model
has answered its first token. Then it reads one round per line from its standard input, and prints
what it measured, both as JSON:

    {"clients": 16, "scripts": [[[[1, 2, 3], 64], ...], ...]}
    {"seconds": 1.5, "cpu_seconds": 2.9, "answers": [{"sent": ..., "times": [...], ...}]}

A script is a list of turns, a turn the ids that are new and the length of its answer. A turn's
prompt is all that was said before it. Each client asks its scripts one after another. Times are
seconds on `time.perf_counter`, which all processes of a Linux machine share.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino
import openvino_genai


@dataclass
class Client:
    """One that always has one request under way, until its turns are all asked."""

    turns: list[tuple[list[int], int, int]]  # new ids, length of the answer, number in its script
    handle: Any = None
    context: list[int] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    answer: dict[str, Any] = field(default_factory=dict)


class Round:
    """One closed loop."""

    def __init__(self, pipeline: openvino_genai.ContinuousBatchingPipeline) -> None:
        self._pipeline = pipeline
        self._requests = 0
        self.answers: list[dict[str, Any]] = []

    def run(self, scripts: list[list[tuple[list[int], int]]], clients: int) -> None:
        asking = [
            Client(
                [
                    (ids, tokens, turn)
                    for script in scripts[number::clients]
                    for turn, (ids, tokens) in enumerate(script)
                ]
            )
            for number in range(clients)
        ]
        for client in asking:
            self._ask(client)
        while asking:
            self._pipeline.step()
            now = time.perf_counter()
            for client in asking:
                self._read(client, now)
            asking = [client for client in asking if client.handle is not None]

    def _ask(self, client: Client) -> None:
        ids, tokens, turn = client.turns.pop(0)
        client.context = [*client.context, *client.answered, *ids] if turn else ids
        client.answered = []
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.ignore_eos = True
        sent = time.perf_counter()
        client.answer = {"sent": sent, "turn": turn, "times": []}
        client.answer["prompt_tokens"] = len(client.context)
        tensor = openvino.Tensor(np.array([client.context], dtype=np.int64))
        client.handle = self._pipeline.add_request(self._requests, tensor, config)
        self._requests += 1

    def _read(self, client: Client, now: float) -> None:
        while client.handle.can_read():
            for output in client.handle.read().values():
                client.answered += output.generated_ids
                client.answer["times"].append(now)
        if client.handle.get_status() == openvino_genai.GenerationStatus.RUNNING:
            return
        client.answer["completion_tokens"] = len(client.answered)
        self.answers.append(client.answer)
        client.handle = None
        if client.turns:
            self._ask(client)


def load(folder: str, settings: dict[str, Any]) -> openvino_genai.ContinuousBatchingPipeline:
    """The weights stay the bfloat16 that they are; so do products, keys and values."""
    scheduler = openvino_genai.SchedulerConfig()
    for name, value in settings.items():
        setattr(scheduler, name, value)
    properties = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "KV_CACHE_PRECISION": "bf16",
        "PERFORMANCE_HINT": "LATENCY",  # one stream of steps over all cores
    }
    return openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)


def main() -> None:
    pipeline = load(sys.argv[1], json.loads(sys.argv[2]))
    Round(pipeline).run([[([1, 2, 3, 4], 1)]], 1)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        this = Round(pipeline)
        began, cpu = time.perf_counter(), time.process_time()
        this.run(asked["scripts"], asked["clients"])
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        measured = {"seconds": seconds, "cpu_seconds": cpu, "answers": this.answers}
        print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
