from __future__ import annotations

from configs.settings_doc import PATH, render


def test_the_page_is_current() -> None:
    assert PATH.read_text(encoding="utf-8") == render(), "run `make settings-doc`"
