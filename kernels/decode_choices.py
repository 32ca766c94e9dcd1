"""How the decode kernel is launched: tile, warps, stages and programs, by shape.

`decode_choices.json` has the choices per compute capability, head shape, batch and context; shapes
that it lacks get `derive`. `python -m benchmarks.tune_decode` writes it on a machine with a GPU;
its "source" says which, or that the choices were derived and not tuned.

Nothing is timed while serving. What is chosen depends on the shapes of the tensors alone and never
on the lengths of the contexts, which only the device knows: a captured launch stays right, and
balanced, whatever the contexts become.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
BATCHES = (1, 8, 32, 128, 256)  # that are tuned for
CONTEXTS = (128, 1024, 4096, 8192, 32768)
MIN_TILES = 4  # of a split: with fewer, the reduce pass costs more than it gains
MAX_SEQS = 512  # of which any is split: the device adds up so many lengths at once
MAX_IDLE = 16  # programs launched per program wanted: ending at once costs little, not nothing


@dataclass(frozen=True)
class Choice:
    """Launch options of the decode kernel.

    Attributes:
        tile: tokens per iteration
        warps: per program
        stages: of the software pipeline: stages - 1 tiles are loaded ahead
        programs: wanted per processor; contexts are split until there are so many
    """

    tile: int
    warps: int
    stages: int
    programs: int


@dataclass(frozen=True)
class HeadShape:
    """What of a model and a device the choice depends on.

    Attributes:
        row_bytes: of one token and head in the cache, keys or values, rounded down
        capability: of the CUDA device, 90 for 9.0; 0 for none
    """

    heads: int
    kv_heads: int
    head_dim: int
    row_bytes: int
    capability: int

    @property
    def name(self) -> str:
        return f"sm_{self.capability} {self.heads}/{self.kv_heads}x{self.head_dim} {self.row_bytes}"


@dataclass(frozen=True)
class SplitPlan:
    """What the device needs to split the contexts of a batch.

    Attributes:
        bound: splits of one sequence at most, the third dimension of the grid
        wanted: splits of one K/V head over the whole batch
        least: tiles per split at least
    """

    bound: int
    wanted: int
    least: int = MIN_TILES


@cache
def tuned(shape: HeadShape) -> tuple[tuple[int, int, Choice], ...]:
    """(batch, context, choice) of a shape, in order."""
    rows = json.loads(TABLE.read_text())["choices"].get(shape.name, ())
    return tuple((batch, context, Choice(*choice)) for batch, context, *choice in sorted(rows))


def choose(shape: HeadShape, seqs: int, longest: int) -> Choice:
    """The choice for a batch whose block tables are wide enough for `longest` tokens: that of the
    smallest batch and then context in the table which are at least as large."""
    for batch, context, choice in tuned(shape):
        if seqs <= batch and longest <= context:
            return choice
    return derive(shape.head_dim, shape.row_bytes)


def every_choice(shape: HeadShape) -> list[Choice]:
    """What `choose` may say of a shape: all that have to be compiled before serving."""
    derived = derive(shape.head_dim, shape.row_bytes)
    return list(dict.fromkeys([derived, *(choice for *_, choice in tuned(shape))]))


def derive(head_dim: int, row_bytes: int) -> Choice:
    """The rule for shapes that nobody tuned.

    A tile of keys and values of up to 32 KiB, loaded two ahead, keeps 64 KiB in flight per program.
    Two programs per processor cover the latency of device memory several times; small tiles get
    another stage.
    """
    tile = 64 if head_dim <= 128 and row_bytes <= 256 else 32
    tile_bytes = 2 * tile * row_bytes
    return Choice(tile, warps=4, stages=4 if tile_bytes < 24 << 10 else 3, programs=2)


def plan_splits(
    choice: Choice, seqs: int, kv_heads: int, longest: int, processors: int
) -> SplitPlan:
    """Bounds for a batch whose block tables are wide enough for `longest` tokens."""
    programs = choice.programs * processors
    wanted = max(programs // kv_heads, 1)
    useful = -(-longest // (choice.tile * MIN_TILES))
    affordable = MAX_IDLE * programs // max(seqs * kv_heads, 1)
    if seqs > MAX_SEQS:
        useful = 1
    return SplitPlan(max(1, min(wanted, useful, affordable)), wanted)
