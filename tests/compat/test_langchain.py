"""langchain-tests' standard suite for chat models, against a running server."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("langchain_tests")
if "QUIRE_URL" not in os.environ:
    pytest.skip("needs a server: make compat-test", allow_module_level=True)

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestQuire(ChatModelIntegrationTests):  # type: ignore[misc]
    """What it leaves out, it leaves out for want of a modality (images, audio, PDF) or because the
    embedded model is too small to choose a tool by itself."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI  # type: ignore[no-any-return]

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": os.environ["QUIRE_MODEL"],
            "base_url": f"{os.environ['QUIRE_URL']}/v1",
            "api_key": os.environ["QUIRE_KEY"],
            "temperature": 0.8,
            "seed": 7,
            "stream_usage": True,
            "max_retries": 0,
        }

    @property
    def supports_json_mode(self) -> bool:
        return False  # the suite expects the keys that its prompt names

    @property
    def model_override_value(self) -> str:
        return os.environ["QUIRE_MODEL"]

    @pytest.mark.skip(reason="the embedded model does not choose tools by itself")
    def test_agent_loop(self, model: BaseChatModel) -> None:
        """Needs a model that calls a tool unasked."""
