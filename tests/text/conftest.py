"""Small tokenizers, and strings that tokenizers disagree on."""

import pytest

pytest.importorskip("transformers")

from tests.support.tokenizers import demo, prompts

__all__ = ["demo", "prompts"]
