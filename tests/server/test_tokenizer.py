"""The text side of a checkpoint, read from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.template import TemplateError
from server.tokenizer import TextModel, TextModelError
from tests.server.text_models import BOS, CHATML, byte_level_tokenizer, chat_model

CHAT = [{"role": "developer", "content": "x"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(path: Path, content: Any) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def test_template_of_the_settings(folder: Path) -> None:
    bos = {"content": BOS, "special": True}
    write(folder / "tokenizer_config.json", {"chat_template": CHATML, "bos_token": bos})
    text = TextModel.load(folder).render([{"role": "user", "content": "hi"}])
    assert text == f"{BOS}<|start|>user\nhi<|end|><|start|>assistant\n"


def test_template_by_name(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write(folder / "tokenizer_config.json", {"chat_template": named})
    assert TextModel.load(folder).render(CHAT) == "plain"


@pytest.mark.parametrize(
    ("name", "content"),
    [("chat_template.jinja", "own file"), ("chat_template.json", {"chat_template": "own file"})],
)
def test_a_file_of_its_own_goes_first(folder: Path, name: str, content: Any) -> None:
    write(folder / "tokenizer_config.json", {"chat_template": "settings"})
    write(folder / name, content)
    assert TextModel.load(folder).render(CHAT) == "own file"


def test_developer_is_system_where_the_template_does_not_know_it(folder: Path) -> None:
    write(folder / "chat_template.jinja", "{{ messages[0].role }}")
    assert TextModel.load(folder).render(CHAT) == "system"
    write(folder / "chat_template.jinja", "{{ messages[0].role }}{# developer #}")
    assert TextModel.load(folder).render(CHAT) == "developer"


@pytest.mark.parametrize(
    ("source", "message"), [(None, "no chat template"), ("{% if %}", "does not compile")]
)
def test_completions_work_without_a_template(
    folder: Path, source: str | None, message: str
) -> None:
    if source:
        write(folder / "chat_template.jinja", source)
    model = TextModel.load(folder)
    assert model.decode(model.encode(["hi"], add_special_tokens=True)[0]) == "hi"
    with pytest.raises(TemplateError, match=message):
        model.render(CHAT)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other", "", "has no tokenizer.json"),
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", [], "tokenizer_config.json must hold a JSON object"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    if name != "other":
        byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
        write(tmp_path / name, content)
    with pytest.raises(TextModelError, match=message):
        TextModel.load(tmp_path)


def test_one_bos() -> None:
    """The template writes it, or the tokenizer adds it; never both."""
    bos = byte_level_tokenizer().token_to_id(BOS)
    model = chat_model()
    rendered = model.render([{"role": "user", "content": "hi"}])
    assert model.encode([rendered], add_special_tokens=False)[0].count(bos) == 1
    assert model.encode(["hi"], add_special_tokens=True)[0].count(bos) == 1


def test_truncation_and_padding_of_the_file_are_off(folder: Path) -> None:
    tokenizer = byte_level_tokenizer().from_str(byte_level_tokenizer().to_str())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    model = TextModel.load(folder)
    text = "hello world, how are you"
    assert model.encode([text], add_special_tokens=False) == chat_model().encode(
        [text], add_special_tokens=False
    )
