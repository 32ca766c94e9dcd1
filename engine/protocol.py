"""The messages between the HTTP process and the engine process: one batch per step each way.

All are msgspec structs, encoded as MessagePack and tagged by type. This module imports neither
torch nor the HTTP stack.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from paged_cache.explain import Explanation
from scheduler.outlook import Outlook
from scheduler.plan import Scores as Scores  # the server knows it from here
from scheduler.request import Request
from scheduler.stopping import FinishReason

STALLED = 70
"""Exit code where the engine stood still: of its process, and of the server around it."""


class Receipt(msgspec.Struct, frozen=True, array_like=True):
    """What one answer took, as the engine saw it. It is said once, when the answer ends.

    Attributes:
        queue: seconds from the arrival of the request to the first step with this sequence.
        prefill: seconds from there to its first token.
        decode: seconds from there to its end.
        recomputed_tokens: computed again because a preemption had thrown them away.
        blocks_peak: most KV blocks held at once; shared ones count in full.
        block_seconds: KV blocks held, times how long.
        preempted_at: when, in seconds after the arrival.
    """

    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    recomputed_tokens: int = 0
    preemptions: int = 0
    blocks_peak: int = 0
    block_seconds: float = 0.0
    preempted_at: list[float] = []


COMMON_LENGTH = 4096
"""Tokens of the sequences by which `EngineInfo.concurrency` counts."""


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one sequence of one request.

    Attributes:
        request_id: the request's id.
        index: which of its n answers.
        tokens: ids generated since the last delta, in order; may be empty on an abort. An
            end-of-sequence or stop
            token that ended the answer is included: it counts as a completion token but is not
                shown as text.
        finish_reason: None while the sequence goes on.
        stop_reason: the stop token id that ended it, when one of the request's own
            `stop_token_ids` did.
        cached_tokens: prompt tokens whose KV was found in the prefix cache.
        scores: log-probabilities of `tokens`, where the request asks for them.
        prompt_scores: those of the next tokens of the prompt, its second one first. They come
            before the first token, in deltas without tokens.
        receipt: comes with the finish_reason.
    """

    request_id: str
    index: int
    tokens: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    cached_tokens: int = 0
    scores: Scores | None = None
    prompt_scores: Scores | None = None
    receipt: Receipt | None = None


class EngineInfo(msgspec.Struct, frozen=True):
    """What the front door must know about the running engine; computed at start, never changed.

    Attributes:
        model_path: local folder of the checkpoint (tokenizer files are read from it).
        max_model_len: longest prompt + answer, in tokens.
        eos_token_ids: ids at which answers stop.
        num_blocks: KV blocks in the pool.
        kv_groups: block tables per sequence; each token has a place in a block of each.
        concurrency: sequences of COMMON_LENGTH tokens, or of the longest context where that is
            less, that can run at once.
        num_host_blocks: KV blocks in the tier in host memory.
        kv_bytes_per_token: bytes of K and V of one token over all layers.
        weight_bytes: bytes of the loaded weights.
        quantization: "int8" where their matrices are, else "none".
        kv_cache_dtype: numbers in KV blocks.
        prefix_caching: whether blocks are found again.
    """

    model_path: str
    architecture: str
    device: str
    dtype: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_bytes_per_token: int
    weight_bytes: int
    num_host_blocks: int = 0
    kv_cache_dtype: str = "auto"
    prefix_caching: bool = True
    quantization: str = "none"
    kv_groups: int = 1
    concurrency: int = 0


class EngineStats(msgspec.Struct, frozen=True):
    """A snapshot taken after a step. Counters count since start.

    Attributes:
        waiting_deferred: of the waiting ones, those that would not start if there were room.
        blocks_used: held by running sequences.
        blocks_cached: free, but with content that can be found again.
        prefix_queries, prefix_hits: prompt tokens looked up and found.
        prefix_recovered: tokens found again after a preemption, counted apart.
        preemptions_swap, preemptions_recompute: by what became of the blocks.
        host_blocks_total, host_blocks_used: of the tier in host memory.
        host_hits: tokens whose blocks came back from host memory.
        fragmentation: share of the places in held blocks that hold no token (yet), 0 to 1;
            measured now and then.
        jit_compiles: kernels compiled since the engine was ready.
        disk_blocks, disk_bytes: in the tier on disk; disk_hits: tokens whose blocks came from
            there; disk_errors: blocks that could not be written, or read and used.
    """

    running: int = 0
    waiting: int = 0
    waiting_deferred: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_evicted: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prefix_recovered: int = 0
    preemptions: int = 0
    preemptions_swap: int = 0
    preemptions_recompute: int = 0
    host_blocks_total: int = 0
    host_blocks_used: int = 0
    host_hits: int = 0
    fragmentation: float = 0.0
    jit_compiles: int = 0
    disk_blocks: int = 0
    disk_bytes: int = 0
    disk_hits: int = 0
    disk_errors: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


class Refusal(msgspec.Struct, frozen=True):
    """Why a request was not admitted; becomes `InvalidRequest` at the client."""

    request_id: str
    message: str
    param: str | None
    code: str


class Failure(msgspec.Struct, frozen=True):
    """A request that the engine had to end.

    Attributes:
        code: `request_failed` after an exception of the engine's own, or `deadline_exceeded`.
        receipts: one for each of its answers that had not ended yet.
    """

    request_id: str
    message: str
    code: str
    receipts: list[Receipt] = []


# front door -> engine


class Submit(msgspec.Struct, frozen=True, tag=True):
    requests: list[Request]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Attributes:
    answers: single answers to end: request id and index.
    """

    request_ids: list[str]
    answers: list[tuple[str, int]] = []


class Inspect(msgspec.Struct, frozen=True, tag=True):
    """Asks for a look at the KV cache; answered by an `Inspection` with the same `id`.

    Attributes:
        verify: also check every invariant now, which takes time with the size of the pool.
    """

    id: int
    verify: bool = False


class ReadTrace(msgspec.Struct, frozen=True, tag=True):
    """Asks for the step trace; answered by a `Trace` with the same `id`."""

    id: int


class Explain(msgspec.Struct, frozen=True, tag=True):
    """Asks what would be found of a prompt and what would become of its request; answered by an
    `Explained` with the same `id`."""

    id: int
    request: Request


class ListRequests(msgspec.Struct, frozen=True, tag=True):
    """Asks for the live requests; answered by a `RequestList` with the same `id`."""

    id: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Finish nothing, free everything, exit 0."""


# engine -> front door


class SequenceView(msgspec.Struct, frozen=True):
    """One live sequence. `tables` are block ids per KV group; -1 is behind the window. At `swaps`
    of its `preemptions` its blocks moved to host memory."""

    request_id: str
    index: int
    status: str
    tokens: int
    computed: int
    preemptions: int
    tables: list[list[int]]
    swaps: int = 0


class CacheView(msgspec.Struct, frozen=True):
    """The KV cache at one moment.

    Attributes:
        states: one byte per block: 0 free, 1 cached, 2 used, 3 used by several sequences.
        tags: four bytes per block: the beginning of the hash it is found by, zeros without one.
        windows: per KV group, 0 for full attention.
        sequences: running ones, then waiting ones.
        host_blocks, host_blocks_used: of the tier in host memory; disk_blocks: of that on disk.
    """

    block_size: int
    windows: list[int]
    states: bytes
    tags: bytes
    sequences: list[SequenceView]
    host_blocks: int = 0
    host_blocks_used: int = 0
    disk_blocks: int = 0


class Inspection(msgspec.Struct, frozen=True, tag=True):
    """Attributes:
    problem: what `verify` found, or None.
    """

    id: int
    view: CacheView
    problem: str | None = None


DecisionKind = Literal["admitted", "preempted", "waits", "finished"]


class Decision(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What the scheduler decided about one sequence, at `at` seconds of the trace's clock.

    | kind      | detail                     | number                  | slot        |
    |-----------|----------------------------|-------------------------|-------------|
    | admitted  |                            | tokens found in a cache | that it got |
    | preempted | request it gave way to     | and the answer's index  |             |
    | waits     | why the first of the queue |                         |             |
    | finished  | reason                     | tokens generated        |             |
    """

    at: float
    kind: DecisionKind
    request_id: str
    index: int
    detail: str = ""
    number: int = 0
    slot: int = -1


class StepRecord(msgspec.Struct, array_like=True, gc=False):
    """One step of the scheduler. Times are seconds of the trace's clock.

    Attributes:
        step: number of the plan; -1 until it is made.
        planned, ended: when it was planned and when its tokens were read back; 0 before that.
        running, waiting: sequences, once it was planned.
        blocks_used: KV blocks held by sequences then.
        failed: computing it raised.
        shares: int32 of this machine's byte order, three rows of equal length: slots, first
            positions, and tokens computed, negative where no token was sampled.
        decisions: from the beginning of this step to that of the next one.
    """

    began: float
    decisions: list[Decision]
    step: int = -1
    planned: float = 0.0
    ended: float = 0.0
    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    failed: bool = False
    shares: bytes = b""


class RequestLife(msgspec.Struct, array_like=True):
    """A request of which the trace still knows something.

    Attributes:
        arrival, queued: when the front door took it, when the scheduler did.
        unfinished: answers whose end is not forgotten yet.
    """

    arrival: float
    queued: float
    prompt_tokens: int
    answers: int
    unfinished: int
    tenant: str


class SlotUser(msgspec.Struct, frozen=True, array_like=True):
    """The sequence that holds a slot."""

    request_id: str
    index: int


class TraceView(msgspec.Struct, frozen=True):
    """The last steps.

    Attributes:
        keep: steps kept at most; 0 where tracing is off.
        since_epoch: added to a time of the trace, gives seconds since 1970.
        slots: who held each slot before the first of `steps`.
        requests: by id.
        steps: oldest first.
    """

    keep: int = 0
    since_epoch: float = 0.0
    slots: list[SlotUser | None] = []
    requests: dict[str, RequestLife] = {}
    steps: list[StepRecord] = []


class Trace(msgspec.Struct, frozen=True, tag=True):
    id: int
    view: TraceView


class RequestView(msgspec.Struct):
    """One live request.

    Attributes:
        tenant: see `Request`.
        state: `running`, `waiting`, or `deferred` while its grammar is compiled.
        position: of the first of its answers in the queue, from 1; None where one runs already.
        generated_tokens, blocks: of all its answers; shared blocks count for each.
    """

    id: str
    tenant: str
    state: str
    position: int | None
    priority: int
    prompt_tokens: int
    generated_tokens: int = 0
    blocks: int = 0
    age_seconds: float = 0.0


class RequestList(msgspec.Struct, frozen=True, tag=True):
    id: int
    requests: list[RequestView]


class Explained(msgspec.Struct, frozen=True, tag=True):
    id: int
    explanation: Explanation
    outlook: Outlook


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Start-up progress of one phase, done of total in its own units: `engine` (its process),
    `download`, `weights`, `kernels`, `memory`, `warm-up`, `graphs`."""

    phase: str
    done: float
    total: float
    note: str = ""


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """One line for the operator: what, where, what to do. `expected` tells a mistake of theirs
    from a bug of ours."""

    message: str
    expected: bool


class StepReport(msgspec.Struct, frozen=True, array_like=True):
    """One step that computed something.

    Attributes:
        tokens: computed, of prompts and of answers.
        seconds: from the beginning of planning to the end of the commit.
        scheduler_seconds: the part of it that planning and committing took.
        ended: seconds since 1970.
    """

    tokens: int
    seconds: float
    scheduler_seconds: float
    ended: float


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    """All that one step has to say."""

    stats: EngineStats
    admitted: list[str] = []
    refused: list[Refusal] = []
    failed: list[Failure] = []
    deltas: list[TokenDelta] = []
    step: StepReport | None = None


Question = Inspect | ReadTrace | Explain | ListRequests
Reply = Inspection | Trace | Explained | RequestList
"""Has the `id` of its question."""

ToEngine = Submit | Abort | Question | Shutdown
FromEngine = Progress | Ready | StartFailed | StepOutput | Reply
