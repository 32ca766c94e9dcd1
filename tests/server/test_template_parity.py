"""Templates render as in `transformers`, character for character."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.template import ChatTemplate
from tests.server.text_models import CHATML

EMBEDDED = Path(__file__).parents[2] / "models" / "embedded" / "chat_template.jinja"

HEADERS = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "[system]" + system + eos_token }}
{%- for message in messages %}
    {{- '[' + message.role ~ ']\\n' + message['content'] | trim ~ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[assistant]\\n' }}
{%- endif %}
"""

# Looks backwards for the last question and strips the thoughts of the answers before it.
THOUGHTS = """\
{%- set ns = namespace(last=0, found=false) %}
{%- for message in messages[::-1] if not ns.found %}
    {%- if message.role == 'user' %}
        {%- set ns.last = messages | length - loop.index %}
        {%- set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- macro shown(text, keep) %}
    {%- if '</think>' in text and not keep %}
        {{- text.split('</think>')[-1].lstrip('\\n') }}
    {%- else %}
        {{- text }}
    {%- endif %}
{%- endmacro %}
{%- for message in messages %}
  <{{ loop.index0 }}/{{ loop.length }} {{ {'role': message.role, 'x': "<é'"} | tojson }}>
  {{ shown(message.content, loop.index0 > ns.last or loop.last) }}
{% endfor %}
{% if add_generation_prompt %}<answer>{% endif %}
"""

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " é <b>&amp; {{ x }} "}],
    [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nok"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "The answer"},
    ],
]


@pytest.mark.parametrize("source", [CHATML, HEADERS, THOUGHTS, "embedded"])
def test_as_transformers_renders(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    if source == "embedded":
        source = EMBEDDED.read_text(encoding="utf-8")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = ChatTemplate(source, special)
    for chat in CHATS:
        for opened in (True, False):
            theirs, _ = render_jinja_template(
                [chat], chat_template=source, add_generation_prompt=opened, **special
            )
            assert ours.render(chat, add_generation_prompt=opened) == theirs[0]
    theirs, _ = render_jinja_template(
        [CHATS[1]], chat_template=source, continue_final_message=True, **special
    )
    assert ours.render_open(CHATS[1]) == theirs[0]
