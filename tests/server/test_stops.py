"""Stop strings against an oracle that looks at whole texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.stops import StopMatcher

texts = st.text("ab\n", max_size=40)
stops = st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4)


def oracle(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that ends first, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(texts, stops, st.data())
def test_any_cut_gives_what_the_whole_text_gives(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    matcher = StopMatcher(stops)
    expected, matched = oracle(text, stops)
    sent, rest = "", text
    while rest and matcher.matched is None:
        count = data.draw(st.integers(1, len(rest)))
        sent += matcher.push(rest[:count])
        rest = rest[count:]
        seen = text[: len(text) - len(rest)]
        if matcher.matched is None:
            # Nothing is held back without need, and nothing of a possible stop string is sent.
            held = seen[len(sent) :]
            possible = [n for s in stops for n in range(1, len(s)) if seen.endswith(s[:n])]
            assert len(held) == max(possible, default=0)
    sent += matcher.flush()
    assert (sent, matcher.matched) == (expected, matched)


@given(texts, stops)
def test_included_stop_string_ends_the_text(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops, include=True)
    sent = "".join(matcher.push(char) for char in text) + matcher.flush()
    before, matched = oracle(text, stops)
    assert sent == before + (matched or "")


@pytest.mark.parametrize("stops", [["\n\nUser:"], ["🙂🙂"], ["aab"]])
def test_a_match_that_starts_inside_a_failed_one(stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    text = stops[0][:-1] + stops[0] + "never sent"
    sent = "".join(matcher.push(char) for char in text)
    assert (sent, matcher.matched) == oracle(text, stops)
    assert matcher.push("more") == matcher.flush() == ""
