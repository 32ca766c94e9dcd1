from benchmarks.kv_waste import (
    CHATS,
    RESERVATIONS,
    TRANSLATION,
    Arena,
    Job,
    Load,
    Moment,
    jobs,
    paged,
)


def share(moments: list[Moment]) -> float:
    return sum(m.useful for m in moments) / sum(m.held for m in moments)


def test_pages_hold_useful_tokens_and_reservations_do_not() -> None:
    todo = jobs(CHATS, 120)
    assert share(paged(CHATS, todo).moments) >= 0.963
    whole, oracle = (share(Arena(RESERVATIONS[name]).run(todo)) for name in ("longest", "oracle"))
    assert whole < 0.3 < oracle < 0.7


def test_a_shared_prompt_is_stored_once() -> None:
    prefix = Load("", TRANSLATION.prompt, TRANSLATION.answer, prefix=341)
    todo = jobs(prefix, 200)
    together, apart = paged(prefix, todo), paged(prefix, todo, prefix_cache=False)
    assert max(together.shared) > 0.7 and max(apart.shared) == 0
    assert together.tokens_per_step > 2 * apart.tokens_per_step


def test_gaps_are_filled_first_come_first_served() -> None:
    lengths = {Job(1, 2): 9000, Job(2, 1): 9000, Job(3, 1): 100}
    moments = Arena(lambda job: lengths[job]).run(list(lengths))
    assert [m.running for m in moments] == [1, 1, 2]
