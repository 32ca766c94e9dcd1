"""The text that the embedded model is trained on."""

import itertools
import json
import random
import re

import pytest

from models.embedded import path
from models.embedded.corpus import conversations, facts, numbers, tools, words
from models.embedded.tokenizer import render


def first(seed: int, count: int = 300) -> list:
    return list(itertools.islice(conversations(seed, 6), count))


def test_a_seed_fixes_the_text():
    assert first(7) == first(7)
    assert first(7) != first(8)


def test_questions_and_answers_alternate():
    for chat in first(1):
        if isinstance(chat, str):
            continue
        roles = [message["role"] for message in chat if message["role"] != "system"]
        assert roles[0] == "user" and roles[-1] == "assistant"
        assert all(
            after == "assistant" for role, after in itertools.pairwise(roles) if role != "assistant"
        )


@pytest.mark.parametrize("subject", facts.SUBJECTS)
def test_every_answer_of_a_fact_is_one_that_the_evaluation_accepts(subject: str):
    for fact in facts.load(subject):
        assert fact.questions and fact.held_out and fact.answers, fact.name
        for answer in fact.answers:
            assert re.search(fact.accept, answer, re.IGNORECASE), (fact.name, answer)


@pytest.mark.parametrize("subject", facts.SUBJECTS)
def test_held_out_questions_are_not_asked_in_training(subject: str):
    rng = random.Random(3)
    for fact in facts.load(subject):
        asked = {facts.expand(text, rng) for text in fact.questions for _ in range(60)}
        assert not asked & {facts.expand(text, rng) for text in fact.held_out}, fact.name


def test_slots_and_alternatives_are_filled():
    rng = random.Random(4)
    for fact in facts.load("unknown"):
        for text in fact.questions:
            assert not re.search(r"[{}|]|PLACE|PERSON|THING", facts.expand(text, rng))


def test_a_bad_line_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "odd.txt").write_text("== a\nX what\n")
    monkeypatch.setattr(facts, "TEXTS", tmp_path)
    with pytest.raises(ValueError, match=r"odd\.txt"):
        facts.load("odd")


def test_the_sums_are_right():
    rng = random.Random(5)
    for _ in range(500):
        for _, answer in numbers.sums(rng) + numbers.chains(rng) + numbers.stories(rng):
            for a, sign, b, result in re.findall(r"(-?\d+) ([-+x]) (\d+) = (-?\d+)", answer):
                a, b = int(a), int(b)
                assert int(result) == {"+": a + b, "-": a - b, "x": a * b}[sign]


def test_what_is_repeated_is_in_the_question():
    rng = random.Random(6)
    for _ in range(300):
        question, answer = words.repeating(rng)[0]
        assert answer in question


def test_tool_calls_are_json_that_names_a_listed_tool():
    rng = random.Random(7)
    for _ in range(100):
        listed, messages = tools.tool_use(rng)
        call = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", messages[1]["content"])
        assert json.loads(call[1])["name"] + "(" in listed


def test_only_answers_carry_the_full_loss():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    answers = [text for text, is_answer in render(chat) if is_answer]
    assert answers == ["Hello!<|end|>"]


def test_the_package_is_light():
    import subprocess
    import sys

    code = "import sys, models.embedded; assert not {'torch', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=path().parents[1])
