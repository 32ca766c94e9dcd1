"""Chat templates: what they render, what they refuse, and that every one of them ends."""

from __future__ import annotations

import time
from typing import Any

import pytest

from server import template as module
from server.template import ChatTemplate, TemplateError
from tests.server.text_models import BOS, CHATML

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  hi {{ 7 * 7 }} "},
]


def render(source: str, **options: Any) -> str:
    return ChatTemplate(source, {"bos_token": BOS}).render(CHAT, **options)


def test_chat_with_and_without_the_opening_of_an_answer() -> None:
    shown = f"{BOS}<|start|>system\nBe brief.<|end|><|start|>user\n  hi {{{{ 7 * 7 }}}} <|end|>"
    assert render(CHATML) == shown + "<|start|>assistant\n"
    assert render(CHATML, add_generation_prompt=False) == shown


def test_open_last_message() -> None:
    trimmed = CHATML.replace("message['content']", "message['content'] | trim")
    chat = [*CHAT, {"role": "assistant", "content": "The answer"}]
    for source in (CHATML, trimmed):
        text = ChatTemplate(source, {}).render_open(chat)
        assert text.endswith("<|start|>assistant\nThe answer")
    with pytest.raises(TemplateError, match="does not show the last message"):
        ChatTemplate("nothing", {}).render_open(chat)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'a': 'é<', 'b': [1]} | tojson }}", '{"a": "é<", "b": [1]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1"),
        ("{% for x in [1, 2, 3] %}{{ loop.index }}{{ loop.length }}{{ loop.last }} {% endfor %}",
         "13False 23False 33True "),
        ("{% for x in none_such %}{% else %}empty{% endfor %}", "empty"),
        ("{% for k, v in {'a': 1}.items() %}{{ k ~ '=' ~ v ~ none }}{% endfor %}", "a=1None"),
        ("{% generation %}kept{% endgeneration %}", "kept"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "system, user"),
        ("{{ messages | join('-', attribute='role') }}", "system-user"),
        ("{{ 'a\nb' | indent(2) }}|{{ 'a\nb' | indent(2, true) }}", "a\n  b|  a\n  b"),
        ("{{ 'a-b' | replace('-', '+') }}{{ 'aaa' | replace('a', 'b', 2) }}", "a+bbba"),
        ("{{ '%s is %d' | format('x', 3) }} {{ '%s' % 'y' }} {{ '{}'.format(1) }}", "x is 3 y 1"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
         "{% endfor %}{{ ns.n * 2 ** 3 % 9 }}", "7"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') }}{{ bos_token }}", f"<a>{BOS}"),
        ("{% for x in [[1], [2]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}",
         "12"),
    ],
)  # fmt: skip
def test_what_templates_use(source: str, text: str) -> None:
    assert render(source) == text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "refused the messages: Roles must alt"),
        ("{{ none_such.field }}", "'none_such' is undefined"),
        ("{{ none + 'a' }}", "failed: unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{{ messages | wordwrap }}", "No filter named 'wordwrap'"),
    ],
)
def test_refusals_say_why(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        render(source)


def test_broken_source() -> None:
    with pytest.raises(TemplateError, match="does not compile"):
        ChatTemplate("{% for %}", {})


LOOP = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = EXPR %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
        "{% for a in range(99999) if a < 0 %}{% endfor %}" * 40,
        LOOP.replace("EXPR", "ns.x ~ ns.x"),
        LOOP.replace("EXPR", "ns.x + ns.x"),
        LOOP.replace("EXPR", "ns.x * 9"),
        LOOP.replace("EXPR", "9 * ns.x"),
        LOOP.replace("EXPR", "ns.x.replace('a', ns.x)"),
        LOOP.replace("EXPR", "ns.x | replace('', ns.x)"),
        LOOP.replace("EXPR", "ns.x | join(ns.x)"),
        LOOP.replace("EXPR", "ns.x.join(ns.x)"),
        LOOP.replace("'ab'", "7").replace("EXPR", "ns.x * ns.x"),
        LOOP.replace("'ab'", "7").replace("EXPR", "ns.x ** 9"),
        "{{ 'a' * 10 ** 12 }}",
        "{{ [1] * 10 ** 10 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 'a'.center(10 ** 10) }}",
        "{{ '7'.zfill(10 ** 10) }}",
        "{{ '%099999999d' % 1 }}",
        "{{ '%*d' % (99999999, 1) }}",
        "{{ '%99999999d' | format(1) }}",
        "{{ '{:99999999}'.format(1) }}",
        "{{ 'a' | indent(10 ** 10, true) }}",
        "{{ [1] | tojson(indent=10 ** 9) }}",
        "{% for a in range(99999) %}{{ 'x' * 10 ** 6 }}{% endfor %}",
    ],
)  # fmt: skip
def test_every_template_ends(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENDER_SECONDS", 0.2)
    template = ChatTemplate(source, {})
    started = time.monotonic()
    with pytest.raises(TemplateError, match=r"stopped|recursion"):
        template.render(CHAT)
    assert time.monotonic() - started < 5  # the machine may be busy; the bound is 0.2 s


def test_a_stopped_template_renders_again() -> None:
    template = ChatTemplate("{{ 'x' * messages[0].content | int }}", {})
    with pytest.raises(TemplateError):
        template.render([{"role": "user", "content": "99999999999"}])
    assert template.render([{"role": "user", "content": "2"}]) == "xx"
