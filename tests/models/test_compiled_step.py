"""The compiled step of CPUs against the same decoder in float32, and against itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.cpu_linear import MOST_ROWS
from kernels.pages import FORMATS, Pages, QuantizedPages, tile_bytes
from models import registry
from models.context import ForwardContext, GroupTables
from models.decoder import Decoder

CPU = torch.device("cpu")
BLOCK, BLOCKS = 16, 320
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
KINDS: dict[str, dict[str, object]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 24,
        "head_dim": 48,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64},
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "no_rope_layers": [1, 0, 1],
    },
}
CASES = [*((kind, False) for kind in KINDS), ("qwen2", True), ("qwen3", True)]
LENGTHS = ([1], [17], [3, 40, 1200], [5] * 7, [1 + i for i in range(MOST_ROWS)])


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def decoders(kind: str, quantized: bool = False, **sizes: int) -> tuple[Decoder, Decoder]:
    """The same weights in bfloat16 and in float32, or the same int8 ones, ready."""
    config = registry.parse_config({**SIZES, **KINDS[kind], **sizes})
    generator = torch.Generator().manual_seed(len(kind))
    short, exact = (registry.build(config, t, CPU) for t in (torch.bfloat16, torch.float32))
    wide = exact.checkpoint_tensors()
    for name, tensor in short.checkpoint_tensors().items():
        noise = torch.randn(tensor.shape, generator=generator)
        matrix = tensor.dim() > 1
        tensor.copy_(noise * config.hidden_size**-0.5 if matrix else 0.2 * noise + ("norm" in name))
        wide[name].copy_(tensor)
    for decoder in (short, exact):
        if quantized:
            decoder.quantize()
        decoder.prepare()
        assert isinstance(decoder, Decoder)
    return short, exact  # type: ignore[return-value]


def batch(
    lengths: list[int], pages: tuple[Pages, ...], layers: int, chunks: list[int] | None = None
) -> ForwardContext:
    """The last token of sequences of these lengths, in shuffled blocks, or the last `chunks`."""
    width = -(-max(lengths) // BLOCK)
    counts = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(sum(lengths)))
    tables = torch.zeros(len(lengths), width, dtype=torch.int32)
    for row, blocks in enumerate(order[: sum(counts)].split(counts)):
        tables[row, : len(blocks)] = blocks
    lens = torch.tensor(lengths, dtype=torch.int32)
    chunks = chunks or [1] * len(lengths)
    decodes = chunks.count(1)
    spans = [range(n - chunk, n) for n, chunk in zip(lengths, chunks, strict=True)]
    positions = torch.tensor([position for span in spans for position in span])
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(chunks))
    places = tables[rows, positions // BLOCK].long()
    return ForwardContext(
        positions=positions,
        context_lens=lens,
        query_start=torch.tensor([0, *chunks[decodes:]]).cumsum(0).int(),
        num_decodes=decodes,
        max_query_len=max(chunks),
        max_context_len=max(lengths),
        groups=(GroupTables(tables, places * BLOCK + positions % BLOCK),),
        layer_groups=(0,) * layers,
        pages=pages,
        backend=dispatch.backend(CPU),
    )


def plain_pages(decoder: Decoder, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(9)
    shape = (2, BLOCKS, decoder.kv_heads, BLOCK, decoder.head_dim)
    return tuple(
        torch.randn(shape, generator=generator).bfloat16().to(dtype)
        for _ in range(decoder.num_layers)
    )


def separately(decoder: Decoder, ids: Tensor, ctx: ForwardContext) -> Tensor:
    """The forward pass of one operation after the other."""
    decoder.compiled = False
    try:
        return decoder.forward(ids, ctx)
    finally:
        decoder.compiled = True


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


def needs_step(decoder: Decoder) -> None:
    if not decoder.compiled:
        pytest.skip("needs AVX512-BF16 and oneDNN's known layout")


@pytest.mark.parametrize(("kind", "quantized"), CASES)
def test_it_is_as_exact_as_separate_operations(kind: str, quantized: bool, threads: int) -> None:
    short, exact = decoders(kind, quantized)
    needs_step(short)
    for lengths in LENGTHS:
        ids = torch.arange(len(lengths)) % 96
        pages, others, wide = (
            plain_pages(short, t) for t in (torch.bfloat16, torch.bfloat16, torch.float32)
        )
        found = short.forward(ids, batch(lengths, pages, 3))
        assert short._step is not None, "the step was not taken"
        apart = separately(short, ids, batch(lengths, others, 3))
        truth = exact.forward(ids, batch(lengths, wide, 3))
        assert error(found, truth) < max(1.2 * error(apart, truth), 1e-2)
        for ours, theirs in zip(pages, wide, strict=True):
            assert error(ours, theirs) < 1e-2, "stored keys and values"


@pytest.mark.parametrize(("kind", "quantized"), CASES)
def test_prompts_beside_decodes(kind: str, quantized: bool, threads: int) -> None:
    short, exact = decoders(kind, quantized)
    needs_step(short)
    for lengths, chunks in (([9], [9]), ([7, 3, 90, 700, 33], [1, 1, 90, 300, 33])):
        ids = torch.arange(sum(chunks)) % 96
        pages, others, wide = (
            plain_pages(short, t) for t in (torch.bfloat16, torch.bfloat16, torch.float32)
        )
        found = short.forward(ids, batch(lengths, pages, 3, chunks))
        assert short._step is not None, "the step was not taken"
        apart = separately(short, ids, batch(lengths, others, 3, chunks))
        truth = exact.forward(ids, batch(lengths, wide, 3, chunks))
        assert error(found, truth) < max(1.2 * error(apart, truth), 1e-2)
        for ours, theirs in zip(pages, wide, strict=True):
            assert error(ours, theirs) < 1e-2, "stored keys and values"


@pytest.mark.parametrize("quantized", [False, True])
def test_a_row_depends_neither_on_the_way_nor_on_the_chunk_beside_it(quantized: bool) -> None:
    short, _ = decoders("llama", quantized)
    needs_step(short)
    lengths, chunks = [40, 200], [1, 100]
    ids = torch.arange(sum(chunks)) % 96
    pages = plain_pages(short, torch.bfloat16)
    whole = batch(lengths, pages, 3, chunks)
    together = short.forward(ids, whole)  # by rows
    group = whole.groups[0]
    alone = replace(
        whole,
        positions=whole.positions[:1],
        context_lens=whole.context_lens[:1],
        groups=(GroupTables(group.block_tables[:1], group.slot_mapping[:1]),),
    )
    assert short.forward(ids[:1], alone).equal(together[:1])  # by panels


@pytest.mark.parametrize("quantized", [False, True])
def test_rows_that_are_wanted_get_the_same_alone(quantized: bool, threads: int) -> None:
    short, _ = decoders("qwen2", quantized)
    needs_step(short)
    for lengths, chunks in (([7, 90, 300], [1, 90, 150]), ([30, 5], [17, 5]), ([9] * 70, None)):
        rows = sum(chunks or [1] * 70)
        ids, pages = torch.arange(rows) % 96, plain_pages(short, torch.bfloat16)
        ctx = batch(lengths, pages, 3, chunks)
        every = short.forward(ids, ctx)
        stored = [page.clone() for page in pages]
        for wanted in ([rows - 1], [0, 3, rows - 2], [], list(range(5, rows)), [4, 2, 2]):
            for page, drawn in zip(pages, plain_pages(short, torch.bfloat16), strict=True):
                page.copy_(drawn)
            found = short.forward(ids, replace(ctx, wanted=torch.tensor(wanted, dtype=torch.int64)))
            assert found.equal(every[wanted])
            assert all(map(torch.equal, pages, stored)), "keys and values are those of all rows"


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_pages(name: str) -> None:
    short, _ = decoders("qwen3")
    needs_step(short)
    made = []
    for _ in range(2):
        tiles = torch.zeros(3, 2, BLOCKS, short.kv_heads, tile_bytes(name, BLOCK, short.head_dim))
        made.append(
            tuple(
                QuantizedPages(layer, name, BLOCK, short.head_dim)
                for layer in tiles.to(torch.uint8)
            )
        )
    for length in range(1, 40):  # each token reads what those before it stored
        ids = torch.tensor([length, 2 * length]) % 96
        found = short.forward(ids, batch_at([length, length], made[0]))
        apart = separately(short, ids, batch_at([length, length], made[1]))
        assert error(found, apart.float()) < 0.1  # int4 makes much of a rounding


def batch_at(lengths: list[int], pages: tuple[Pages, ...]) -> ForwardContext:
    """As `batch`, with blocks that stay where they are while sequences grow."""
    lens = torch.tensor(lengths, dtype=torch.int32)
    tables = torch.arange(len(lengths) * 4, dtype=torch.int32).view(len(lengths), 4)
    positions = (lens - 1).long()
    places = tables.gather(1, positions[:, None] // BLOCK).squeeze(1).long()
    return replace(
        batch([1] * len(lengths), pages, 3),
        positions=positions,
        context_lens=lens,
        groups=(GroupTables(tables, places * BLOCK + positions % BLOCK),),
        max_context_len=max(lengths),
    )


def test_a_row_does_not_depend_on_the_rows_beside_it(threads: int) -> None:
    short, _ = decoders("llama")
    needs_step(short)
    lengths = [1 + 5 * i for i in range(20)]
    ids = torch.arange(20)
    pages = plain_pages(short, torch.bfloat16)
    whole = batch(lengths, pages, 3)
    together = short.forward(ids, whole)
    for row in (0, 7, 19):
        rows = slice(row, row + 1)
        group = whole.groups[0]
        alone = replace(
            whole,
            positions=whole.positions[rows],
            context_lens=whole.context_lens[rows],
            num_decodes=1,
            max_context_len=lengths[row],
            groups=(GroupTables(group.block_tables[rows], group.slot_mapping[rows]),),
        )
        assert short.forward(ids[rows], alone).equal(together[rows])


def test_other_pages_and_other_decoders_are_left_alone() -> None:
    short, exact = decoders("llama")
    needs_step(short)
    exact.forward(torch.tensor([1]), batch([5], plain_pages(exact, torch.float32), 3))
    assert exact._step is None, "float32 weights"
    short.forward(torch.tensor([1]), batch([5], plain_pages(short, torch.float32), 3))
    assert short._step is None, "pages that the step does not write"


@pytest.mark.parametrize("quantized", [False, True])
def test_matrices_of_parts_of_panels_are_left_alone(quantized: bool) -> None:
    short, exact = decoders("llama", quantized, hidden_size=160)
    assert not short.compiled
    ids = torch.arange(3)
    found, truth = (
        decoder.forward(ids, batch([5, 9, 40], plain_pages(decoder, dtype), 3))
        for decoder, dtype in ((short, torch.bfloat16), (exact, torch.float32))
    )
    assert error(found, truth) < 2e-2
