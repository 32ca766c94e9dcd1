"""Decode steps replayed from recordings give what the steps themselves give."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import models.decoder
import models.layers
from configs.settings import Settings
from engine.build import build
from engine.graphs import batch_sizes
from engine.loop import EngineLoop
from engine.runner import Runner
from engine.state import KINDS, SlotState
from scheduler.plan import Admitted, ScheduledSeq, SlotBlocks, StepPlan
from scheduler.request import SamplingParams
from tests.engine.drive import answers, request
from tests.engine.guests import CONTEXT, Alone, Guest, Menu, assert_as_alone, checkpoint, serve
from tests.engine.poison import poison
from tests.engine.recorded import Recording

SIZES = [1, 2, 4, 6, 8]


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers as on a GPU: without the compiled ones of CPUs, which no recording sees."""
    for module in (models.layers, models.decoder):
        monkeypatch.setattr(module, "fused_layers", lambda weight: None)
        monkeypatch.setattr(module, "can_pack", lambda weight: False)


def recorded(path: Path, sizes: list[int] = SIZES, **settings: Any) -> tuple[EngineLoop, Recording]:
    wanted = {"max_model_len": CONTEXT, "max_num_seqs": 8, **settings}
    loop = build(
        Settings.of(model=str(path), dtype="float32", cpu_threads=1, device="cpu", **wanted)
    )
    runner, recording = loop.runner, Recording()
    assert isinstance(runner, Runner)
    runner.inputs.backend = recording.kernels(runner.inputs.backend)
    runner.capture_decodes(recording, sizes)
    return poison(loop), recording


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_random_histories(windows: bool, overlap: str, tmp_path: Path) -> None:
    """Every size, greedy, drawn and filtered, preempted and forked, with NaN in dead blocks."""
    alone = Alone(checkpoint(windows, tmp_path), "auto")
    menu = Menu(n=(1, 1, 3), stops=True)
    seen: Counter[str] = Counter()
    for seed in range(3):
        draw = random.Random(f"{windows} {overlap} {seed}")
        loop, recording = recorded(
            alone.path,
            async_scheduling=overlap,
            num_gpu_blocks_override=draw.randint(26, 60) if windows else draw.randint(12, 30),
            max_num_batched_tokens=draw.choice([16, 200]),
        )
        guests = [
            Guest(menu.request(draw.randrange(40), f"g{i}"), comes=draw.randrange(15))
            for i in range(8)
        ]
        told = serve(loop, guests, preempt_every=draw.choice([0, 5]))
        assert_as_alone(told, guests, alone)
        assert recording.captured == len(SIZES) * (1 + len(KINDS)), "something was captured late"
        seen.update(replayed=recording.replayed, preemptions=loop.scheduler.num_preemptions)
    assert seen["replayed"] > 40 and seen["preemptions"] > 2, seen


def test_what_no_graph_samples_is_sampled_behind_one(tmp_path: Path) -> None:
    path = checkpoint(False, tmp_path)
    items = [
        request("plain", range(40, 60)),
        request("penalized", range(50, 70), repetition_penalty=1.3),
        request("biased", range(45, 70), logit_bias={60: 5.0}),
        request("told", range(60, 70), logprobs=2),
        request("top", range(60, 90), temperature=1.0, top_k=5),
    ]
    plain = build(Settings.of(model=str(path), dtype="float32", cpu_threads=1, device="cpu"))
    loop, recording = recorded(path)
    assert answers(loop, items) == answers(plain, items)
    assert recording.replayed > 10


def test_padding_writes_nothing_and_reads_nothing(tmp_path: Path) -> None:
    """Three sequences in a step of four rows: the pages change where the three lie, and nobody
    else's tokens do."""
    loop, _ = recorded(checkpoint(False, tmp_path), sizes=[4], num_gpu_blocks_override=12)
    runner = loop.runner
    assert isinstance(runner, Runner)
    pages, tokens = runner.storage.blocks, runner.state.tokens
    greedy = SamplingParams(temperature=0)
    slots = [2, 5, 0]
    runner.run(
        StepPlan(
            0,
            admitted=[Admitted(slot, [7] * 9, 9, greedy) for slot in slots],
            new_blocks=[SlotBlocks(slot, 0, 0, [3 + slot]) for slot in slots],
            scheduled=[ScheduledSeq(slot, 0, 9, True) for slot in slots],
        )
    )
    pages[:, :, [0, 1, 2, 4, 6, 7, 9, 10, 11]] = float("nan")
    before, known = pages.clone(), tokens.clone()
    plan = StepPlan(1, scheduled=[ScheduledSeq(slot, 9, 1, True) for slot in slots])
    result = runner.run(plan)
    same = (pages == before) | (pages.isnan() & before.isnan())
    changed = (~same).any(5).any(3).any(1).any(0)  # [blocks, block_size]
    assert changed.nonzero().tolist() == [[3, 9], [5, 9], [8, 9]]
    known[slots, 10] = torch.tensor(result.tokens, dtype=torch.int32)
    assert known[: runner.state.nobody].equal(tokens[: runner.state.nobody])


def test_only_steps_of_decodes_are_replayed(tmp_path: Path) -> None:
    loop, _ = recorded(checkpoint(False, tmp_path), sizes=[1, 2])
    assert isinstance(loop.runner, Runner) and loop.runner.graphs is not None
    serves = loop.runner.graphs.serves
    decode, chunk = ScheduledSeq(0, 9, 1, True), ScheduledSeq(1, 0, 5, True)
    assert serves(StepPlan(0, scheduled=[decode]))
    assert not serves(StepPlan(0, scheduled=[decode, chunk]))
    assert not serves(StepPlan(0, scheduled=[ScheduledSeq(0, 3, 1, False)])), "of a longer prompt"
    assert not serves(StepPlan(0, scheduled=[decode] * 3)), "more than the largest size"


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (3, [1, 2, 3]), (20, [1, 2, 4, 8, 16, 20])])
def test_sizes_end_with_the_most_sequences(most: int, sizes: list[int]) -> None:
    assert batch_sizes(most) == sizes


def test_large_steps_are_padded_by_less_than_sixteen() -> None:
    sizes = batch_sizes(1000)
    assert max(b - a for a, b in itertools.pairwise(sizes)) == 16
    assert len(batch_sizes(512)) == 51


def test_the_dearest_row_says_how_a_step_is_sampled() -> None:
    asked: dict[str, Any] = {
        "greedy": {},
        "drawn": {"temperature": 1.0},
        "filtered": {"temperature": 1.0, "top_k": 3},
    }
    rules: list[dict[str, Any]] = [
        {"logit_bias": {1: 1.0}},
        {"min_tokens": 1, "stop_token_ids": (2,)},
        {"presence_penalty": 1.0},
        {"logprobs": 0},
    ]
    wanted = [SamplingParams(**{"temperature": 0.0, **more}) for more in (*asked.values(), *rules)]
    state = SlotState(len(wanted), 8, 4, torch.device("cpu"))
    state.apply(StepPlan(0, [Admitted(i, [1], 1, params) for i, params in enumerate(wanted)]))
    for place, kind in enumerate(asked):
        assert state.kind(list(range(place + 1))) == kind
    for ruled in range(len(asked), len(wanted)):
        assert state.kind([0, ruled, 1]) is None
