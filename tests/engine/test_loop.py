from concurrent.futures import Future

import msgspec
import pytest

from engine.grammar import GrammarError
from engine.loop import MAX_FAILED_STEPS, EngineLoop
from engine.protocol import Abort, EngineInfo, Shutdown, StepOutput, Submit
from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.plan import StepPlan, StepResult
from scheduler.request import Grammar, Request
from scheduler.scheduler import Scheduler
from tests.scheduler.fake_device import FakeDevice, expected, make_request

INFO = EngineInfo(
    model_path="",
    architecture="fake",
    device="cpu",
    dtype="none",
    vocab_size=97,
    max_model_len=256,
    eos_token_ids=[],
    block_size=4,
    num_blocks=16,
    max_num_seqs=4,
    max_num_batched_tokens=32,
    kv_bytes_per_token=0,
    weight_bytes=0,
)


class Device(FakeDevice):
    """Raises in the steps whose numbers are in `broken`."""

    def __init__(self) -> None:
        super().__init__(INFO.max_num_seqs, INFO.block_size)
        self.broken: set[int] = set()

    def run(self, plan: StepPlan) -> StepResult:
        if self.steps in self.broken:
            self.steps += 1
            raise ValueError("a kernel failed")
        return super().run(plan)


class Compiling:
    """A grammar cache whose compiling ends when a test says so."""

    def __init__(self) -> None:
        self.compiled: Future = Future()

    def get(self, grammar: Grammar) -> Future:
        return self.compiled


def make(grammars: Compiling | None = None) -> EngineLoop:
    cache = KVCacheManager(BlockPool(INFO.num_blocks), INFO.block_size)
    scheduler = Scheduler(cache, max_num_seqs=4, max_num_batched_tokens=32)
    return EngineLoop(scheduler, Device(), INFO, grammars=grammars or Compiling())


class Script:
    """An inbox whose messages arrive one batch per call, then end."""

    def __init__(self, *batches):
        self.batches = list(batches)

    def drain(self, wait: bool):
        if self.batches:
            return self.batches.pop(0)
        if wait:
            raise EOFError
        return []


def run(loop: EngineLoop, *batches) -> list[StepOutput]:
    outputs: list[StepOutput] = []
    loop.run(Script(*batches), outputs.append)
    return outputs


def tokens_of(outputs: list[StepOutput], request_id: str) -> list[int]:
    return [t for o in outputs for d in o.deltas if d.request_id == request_id for t in d.tokens]


def test_serves_until_nobody_writes_any_more():
    requests = [make_request(name, [1, 2, 3]) for name in "ab"]
    outputs = run(make(), [Submit(requests[:1])], [Submit(requests[1:])])
    assert [i for o in outputs for i in o.admitted] == ["a", "b"]
    for item in requests:
        assert tokens_of(outputs, item.id) == expected(item, 0, frozenset())
    last = outputs[-1].stats
    assert (last.running, last.waiting, last.blocks_used, last.blocks_total) == (0, 0, 0, 16)
    assert (last.prompt_tokens, last.generation_tokens) == (6, 16)


def test_one_message_per_step_carries_every_sequence():
    requests = [make_request(name, [1, 2, 3], max_tokens=3) for name in "abc"]
    outputs = run(make(), [Submit(requests)])
    assert [len(o.deltas) for o in outputs] == [3, 3, 3]
    assert {d.finish_reason for d in outputs[-1].deltas} == {"length"}


def test_abort_is_answered_even_when_nothing_else_runs():
    outputs = run(make(), [Submit([make_request("a", [1])])], [Abort(["a", "unknown"])])
    assert outputs[-1].deltas[0].finish_reason == "abort"
    assert outputs[-1].stats.blocks_used == 0


def test_every_answer_ends_with_a_receipt():
    loop = make()
    loop.runner.broken = {9}
    batches = [Submit([make_request("whole", [1] * 6, max_tokens=2)])], [], [], []
    gone = [Submit([make_request("gone", [2], n=2)])], [Abort(["gone"])]
    broken = [[Submit([make_request("broken", [3], max_tokens=30)])]]
    outputs = run(loop, *batches, *gone, *broken)
    deltas = [d for o in outputs for d in o.deltas]
    assert all((d.receipt is None) == (d.finish_reason is None) for d in deltas)
    receipts = {(d.request_id, d.index): d.receipt for d in deltas if d.receipt is not None}
    assert receipts.keys() == {("whole", 0), ("gone", 0), ("gone", 1)}
    assert receipts["whole", 0].blocks_peak == 2
    [failure] = [f for o in outputs for f in o.failed]
    assert [r.preemptions for r in failure.receipts] == [0]


def test_refusals_name_the_reason():
    [output] = run(make(), [Submit([make_request("big", [1] * 60, max_tokens=10)])])
    assert (output.refused[0].code, output.refused[0].param) == ("kv_capacity_exceeded", "prompt")


def test_shutdown_ends_the_loop_with_work_left():
    loop = make()
    run(loop, [Submit([make_request("a", [1], max_tokens=50)])], [Shutdown()])
    assert loop.scheduler.has_work


def test_a_step_that_raises_ends_its_requests_only():
    loop = make()
    loop.runner.broken = {1}
    other = make_request("late", [4, 5])
    outputs = run(loop, [Submit([make_request("a", [1, 2])])], [], [Submit([other])])
    assert [f.request_id for o in outputs for f in o.failed] == ["a"]
    assert "kernel failed" not in outputs[1].failed[0].message
    assert tokens_of(outputs, "late") == expected(other, 0, frozenset())
    loop.scheduler.check()


def test_a_device_that_always_fails_ends_the_engine():
    loop = make()
    loop.runner.broken = set(range(100))
    batches = [[Submit([make_request(str(i), [1])])] for i in range(MAX_FAILED_STEPS)]
    with pytest.raises(ValueError, match="kernel failed"):
        run(loop, *batches)


def test_a_request_past_its_deadline_is_reported_and_nothing_of_it_computed():
    loop = make()
    late = msgspec.structs.replace(make_request("late", [1, 2], n=2), deadline=0.0)
    outputs = run(loop, [Submit([late, make_request("b", [3], max_tokens=1)])])
    [failure] = [failure for output in outputs for failure in output.failed]
    assert (failure.request_id, failure.code) == ("late", "deadline_exceeded")
    assert len(failure.receipts) == 2
    assert {delta.request_id for output in outputs for delta in output.deltas} == {"b"}
    assert loop.runner.computed == 1


def with_grammar(name: str, n: int = 1) -> Request:
    plain = make_request(name, [1, 2, 3], max_tokens=4)
    held = msgspec.structs.replace(plain.sampling, grammar=Grammar("regex", "a", "a.field"))
    return msgspec.structs.replace(plain, sampling=held, n=n)


def finished(loop: EngineLoop) -> list[str]:
    return [d.request_id for d in loop.collect().deltas if d.finish_reason == "length"]


def test_others_go_on_while_a_grammar_is_compiled():
    grammars = Compiling()
    loop = make(grammars)
    loop.take(Submit([with_grammar("held"), make_request("free", [1, 2, 3], max_tokens=4)]))
    for _ in range(6):
        loop.step()
    assert finished(loop) == ["free"]
    assert loop.has_work
    grammars.compiled.set_result(object())
    while loop.has_work:
        loop.step()
    assert finished(loop) == ["held"]


def test_a_request_can_be_aborted_while_its_grammar_is_compiled():
    loop = make()
    loop.take(Submit([with_grammar("held", n=2)]))
    stats = loop.collect().stats
    assert (stats.waiting, stats.waiting_deferred) == (1, 1)
    loop.take(Abort(["held"]))
    assert [(d.index, d.finish_reason) for d in loop.collect().deltas] == [
        (0, "abort"),
        (1, "abort"),
    ]
    assert not loop.has_work


def test_a_grammar_that_does_not_compile_is_refused():
    grammars = Compiling()
    loop = make(grammars)
    loop.take(Submit([with_grammar("held")]))
    grammars.compiled.set_exception(GrammarError("no\n good"))
    loop.step()
    (refused,) = loop.collect().refused
    assert (refused.request_id, refused.param) == ("held", "a.field")
    assert refused.message == "a.field cannot be used: no good"
    assert not loop.has_work
