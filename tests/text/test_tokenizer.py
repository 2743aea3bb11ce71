"""Padding, cutting, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxdeploy.errors import UsageError
from fluxdeploy.text import Tokenizer
from tests.support.tokenizers import load


@pytest.fixture(scope="module")
def clip(demo: Mapping[str, Path]) -> Tokenizer:
    return load(demo["json"] / "tokenizer")


@pytest.fixture(scope="module")
def t5(demo: Mapping[str, Path]) -> Tokenizer:
    return load(demo["json"] / "tokenizer_2")


def test_a_cut_prompt_keeps_the_end_token(clip: Tokenizer, t5: Tokenizer) -> None:
    for tokenizer in (clip, t5):
        record = tokenizer.record
        ids = tokenizer.encode(["cat " * 900])
        assert ids.shape == (1, record.max_length)
        assert tuple(ids[0, : len(record.prefix)]) == record.prefix
        assert tuple(ids[0, -1:]) == record.suffix
        assert tokenizer.count("cat " * 900) > record.max_length


def test_no_prompts_make_an_empty_batch(t5: Tokenizer) -> None:
    ids = t5.encode([], 32)
    assert ids.shape == (0, 32)
    assert ids.dtype == np.int32


def test_shortest_length_holds_the_special_tokens_only(clip: Tokenizer, t5: Tokenizer) -> None:
    assert tuple(clip.encode(["a cat"], 2)[0]) == clip.record.prefix + clip.record.suffix
    assert tuple(t5.encode(["a cat"], 1)[0]) == t5.record.suffix


def test_threads_that_ask_for_different_lengths_do_not_disturb_each_other(
    t5: Tokenizer, prompts: list[str]
) -> None:
    lengths = [8, 32, 256, 512] * 10
    alone = {length: t5.encode(prompts[:40], length) for length in set(lengths)}
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda length: t5.encode(prompts[:40], length), lengths))
    for length, ids in zip(lengths, together, strict=True):
        assert np.array_equal(ids, alone[length])


@pytest.mark.parametrize(
    ("prompts", "length", "message"),
    [
        (["a"], 513, "t5 tokenizer cannot pad to 513 tokens; choose 1 to 512"),
        (["a"], 0, "choose 1 to 512"),
        (["a"], -1, "choose 1 to 512"),
        (["a"], 10**30, "choose 1 to 512"),
        (["a"], "32", "`max_length` must be an integer, not '32'"),
        (["a"], 32.0, "`max_length` must be an integer"),
        (["a"], True, "`max_length` must be an integer"),
        ("a cat", 32, "list of strings"),
        (b"a cat", 32, "list of strings"),
        (None, 32, "list of strings, not None"),
        (5, 32, "list of strings, not 5"),
        ({"a": 1}, 32, "list of strings"),
        ((prompt for prompt in ["a"]), 32, "list of strings"),
        (np.array(["a"]), 32, "list of strings"),
        ([None], 32, "must be a string, not NoneType"),
        (["a", b"cat"], 32, "must be a string, not bytes"),
        (["half a pair \ud83d"], 32, "surrogate"),
    ],
)
def test_bad_calls_are_refused_with_what_to_do(
    t5: Tokenizer, prompts: Any, length: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        t5.encode(prompts, length)
