"""How the decode kernel is launched: tile, warps, stages and programs, by shape.

Nothing is timed while serving. What is chosen depends on the shapes of the tensors alone and never
on the lengths of the contexts, which only the device knows: a captured launch stays right, and
balanced, whatever the contexts become.
"""

from dataclasses import dataclass

MIN_TILES = 4  # of a split: with fewer, the reduce pass costs more than it gains
MAX_SEQS = 512  # of which any is split: the device adds up so many lengths at once
MAX_IDLE = 16  # programs launched per program wanted: idle ones cost about a nanosecond each


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


def derive(head_dim: int, row_bytes: int) -> Choice:
    """The rule for shapes that nobody tuned.

    Args:
        row_bytes: of one token and head in the cache, keys or values

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
