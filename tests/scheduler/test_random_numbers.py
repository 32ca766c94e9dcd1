from statistics import fmean

from scheduler.random_numbers import uniform


def test_depends_on_every_argument_and_nothing_else():
    assert uniform(1, 0, 0) == uniform(1, 0, 0)
    numbers = {uniform(seed, i, t) for seed in (-(2**63), 0, 5) for i in (0, 1) for t in range(9)}
    assert len(numbers) == 3 * 2 * 9


def test_is_uniform_on_the_half_open_interval():
    numbers = [uniform(3, 0, t) for t in range(20_000)]
    assert all(0 <= number < 1 for number in numbers)
    assert abs(fmean(numbers) - 0.5) < 0.01
    assert abs(fmean(number < 0.1 for number in numbers) - 0.1) < 0.01
