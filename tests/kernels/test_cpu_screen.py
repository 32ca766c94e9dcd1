"""The search for the largest score by 8-bit scores and their bounds, against that of all scores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.cpu_linear import MOST_ROWS, PackedLinear
from kernels.cpu_screen import FINE_ROWS, PAUSE, ScreenedLinear
from models.layers import STREAMED_BYTES, Linear, can_pack

ONES = torch.ones(64, 32).bfloat16()


def packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def linears(weight: Tensor) -> tuple[PackedLinear, ScreenedLinear]:
    exact = PackedLinear(packed(weight), *weight.shape, None)
    return exact, ScreenedLinear(weight, exact)


SERVES = (
    can_pack(ONES) and PackedLinear.reads(ONES, packed(ONES)) and ScreenedLinear.serves(ONES, None)
)
pytestmark = pytest.mark.skipif(not SERVES, reason="needs AVX512-BF16 and AVX512-VNNI")


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("outputs", "inputs"), [(4160, 32), (4159, 96), (4160, 1024)])
@pytest.mark.parametrize(
    "rows", [*range(1, FINE_ROWS + 7), MOST_ROWS - 1, MOST_ROWS, MOST_ROWS + 1]
)
def test_the_same_output_as_that_of_all_scores(rows: int, outputs: int, inputs: int) -> None:
    torch.manual_seed(rows + inputs)
    weight = torch.randn(outputs, inputs).bfloat16()
    weight[3000:] *= torch.logspace(-3, 1, outputs - 3000)[:, None].bfloat16()
    exact, search = linears(weight)
    for scale in (1e-3, 1, 30):
        x = (torch.randn(rows, inputs + 1)[:, 1:] * scale).bfloat16()
        x[0, 5] *= 50  # one number much larger than the others
        assert search.best(x).equal(exact.best(x))
        assert search.best(x.t().contiguous().t()).equal(exact.best(x))


def test_few_panels_are_computed_from_the_weight() -> None:
    torch.manual_seed(0)
    _, search = linears(torch.randn(12800, 512).bfloat16())
    for rows, most in ((1, 20), (FINE_ROWS, 100), (FINE_ROWS + 1, 300), (MOST_ROWS, 2000)):
        search.best(torch.randn(rows, 512).bfloat16())
        assert rows <= search.exactly <= most  # of 200 per row


@pytest.mark.parametrize(("rows", "width"), [(3, 0.025), (17, 0.05)])
@pytest.mark.parametrize("whole", [False, True])
def test_the_bounds_hold_and_are_close(rows: int, width: float, whole: bool) -> None:
    torch.manual_seed(5)
    weight, x = torch.randn(8192, 512).bfloat16(), torch.randn(rows, 512).bfloat16()
    if whole:  # 8 bits hold the weight, so that only rows are rounded
        weight = torch.randint(-127, 128, weight.shape).bfloat16()
        weight[:, 0] = 127
    _, search = linears(weight)
    search.best(x)
    high, low = search.bounds[:, : 128 * rows].view(2, 128, rows)
    largest = (weight.double() @ x.double().T).view(128, 64, rows).amax(1)
    assert (high >= largest).all() and (low <= largest).all()
    lengths = x.double().norm(dim=1) * weight.double().norm(dim=1).mean()
    assert ((high - low) / lengths).max() < width, "codes of 8 bits are off by 0.8 % of the length"
    assert ((high + low) / 2 - largest).div(lengths).abs().mean() < 0.001


def test_what_fills_the_last_panel_up_is_no_output() -> None:
    row = torch.rand(1, 64).bfloat16() + 1
    exact, search = linears(-row.repeat(4097, 1))
    assert search.best(row).tolist() == exact.best(row).tolist() == [0]
    exact, search = linears(torch.cat([-row.repeat(4096, 1), -row / 2]))
    assert search.best(row).tolist() == exact.best(row).tolist() == [4096]


def test_neighbours_that_8_bits_cannot_tell_apart() -> None:
    torch.manual_seed(1)
    rows = torch.randn(1, 256).bfloat16().repeat(4096, 1)
    rows[::7, 3] += 0.02
    rows[4000, 200] *= 1.01
    exact, search = linears(rows)
    x = torch.cat([rows[:1], -rows[:1], rows[:1] * 0])
    assert search.best(x).equal(exact.best(x))
    assert search.best(x)[2] == 0, "the first of equal scores"


def test_a_row_that_is_no_number_is_left_to_the_product_itself() -> None:
    torch.manual_seed(2)
    exact, search = linears(torch.randn(4096, 64).bfloat16())
    x = torch.randn(2, 64).bfloat16()
    for odd in (torch.nan, torch.inf, 3e38):
        x[1, 7] = odd
        assert search.best(x).equal(exact.best(x))


def test_it_pauses_where_the_bounds_exclude_little() -> None:
    torch.manual_seed(4)
    row = torch.randn(1, 64).bfloat16()
    exact, search = linears(torch.cat([row.repeat(2048, 1), torch.randn(6144, 64).bfloat16()]))
    assert search.best(row).equal(exact.best(row))
    assert search.exactly >= 32, "all equal rows"
    for _ in range(PAUSE):
        search.exactly = 0
        assert search.best(-row).equal(exact.best(-row))
        assert search.exactly == 0
    search.best(-row)
    assert 0 < search.exactly < 12


def test_the_head_takes_it_where_its_weight_comes_from_memory() -> None:
    torch.manual_seed(3)
    for outputs, taken in ((STREAMED_BYTES // 1024, True), (STREAMED_BYTES // 2048, False)):
        head = Linear(512, (outputs,), dtype=torch.bfloat16, device=torch.device("cpu"))
        head.weight = torch.randn(outputs, 512).bfloat16()
        head.pack(searched=True)
        assert (head.search is not None) is taken
        x = torch.randn(3, 512).bfloat16()
        assert head.best(x).equal(head.scores(x).argmax(-1))


def test_weights_that_are_no_numbers_are_not_served() -> None:
    weight = ONES.clone()
    weight[9, 9] = torch.nan
    assert not ScreenedLinear.serves(weight, None)
    assert not ScreenedLinear.serves(ONES, torch.zeros(64).bfloat16())
