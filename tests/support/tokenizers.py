"""Strings that tokenizers disagree on, small tokenizers in both forms, and theirs of a bundle."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from exporters.synthetic.small_tokenizers import write_tokenizers
from exporters.tokenizers import canonical_tokenizer
from fluxdeploy.bundle.manifest import TokenizerRecord
from fluxdeploy.text import Tokenizer

CLIP, T5 = "tokenizer", "tokenizer_2"
"""The folders of a checkpoint."""

KINDS = {CLIP: "clip", T5: "t5"}

_FIXED = (
    "",
    " ",
    "\t\n\r\x0b\x0c",
    "a",
    "  leading, double  spaces and trailing  ",
    "tabs\tand\nnew\r\nlines",
    "A photo of a cat",
    "A PHOTO OF A CAT",
    "it's we're I'VE don't they'll he'd i'm IT'S o'clock 'sparse",
    "1234567890 3.14 ½ ² Ⅷ ٣ 一二三",
    "crème brûlée naïve Ångström ﬁ ﬀ ß ẞ ĳ",
    "e\u0301 a\u0308\u0323 n\u0303 \u0301 q\u0307\u0323\u0323 Z\u0351\u036b\u0343",
    "İstanbul ıI iİ I\u0307 ǅ ΟΔΥΣΣΕΥΣ ς",
    "日本語 の 写真 中文,字符 한국어 ㄱㅏ \u1112\u1161\u11ab",
    "ｆｕｌｌ　ｗｉｄｔｈ ｶﾞ ㍿ ™ ① Ω Ω 𝒜𝔅 ﷺ",
    "👩\u200d👩\u200d👧\u200d👦 👍🏽 🏳️\u200d🌈 🇩🇪 ☺️ 😀😀",
    "שלום עולם مرحبا بالعالم \u202eabc\u202c नमस्ते ไทย",
    "nul\x00in\x00side \x01\x02\x1b[0m \x7f\x80\x85\x9f",
    "\ufeffbom \u200bzero\u200c\u200d\u2060width \xad \u00a0 \u2003 \u3000 \u2028 \u2029 \u180e",
    "\ue000 \uf8ff \ufffd \ufffe \uffff \U0010ffff \U000e0041 \U0001f9ff",
    "<|endoftext|>",
    "<|startoftext|><|endoftext|> a <|ENDOFTEXT|> <|StartOfText|> <|endoftext|",
    "a</s>b </s> <pad><pad> <unk> < pad > </S> <s>",
    "x<extra_id_0> y <extra_id_99> <extra_id_100> <EXTRA_ID_1>z<extra_id_1>",
    "▁under▁score ▁ _ __ a_b ▁▁",
    "</w> cat</w> Ġa Ċ",
    "a" * 3000,
    "!?" * 700,
    "word " * 900,
    "猫" * 800,
    "cat " * 40 + "<|endoftext|></s> " * 40,
    " ".join(["A red fox in a snowy forest, oil painting."] * 60),
)

_SPECIAL = (
    "<|endoftext|>", "<|startoftext|>", "</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_42>",
    "<extra_id_99>", "<|EndOfText|>", "<new>", "<Old>", "[MASK]",
)  # fmt: skip
_WORDS = (
    "a", "photo", "of", "the", "Cat", "DOG", "fluffy", "castle", "painting", "don't", "we'll",
    "4k", "f/1.8", "O'Neil's", "(detailed:1.2)", "--ar", "16:9", "@user", "#tag", "e.g.", "🐱",
)  # fmt: skip
_SPACES = " \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2000\u2009\u200a\u2028\u202f\u205f\u3000"
_INVISIBLE = "\x00\x01\x1b\x7f\xad\u200b\u200c\u200d\u200e\u202e\u2060\ufe0e\ufe0f\ufeff\ufffd"
_CASES = "iIıİſsSßẞσςΣǅǆÅåK\u0307\u0131"
_RANGES = (
    (0x20, 0x7E), (0x00, 0x20), (0x7F, 0x24F), (0x250, 0x36F), (0x300, 0x36F), (0x370, 0x52F),
    (0x590, 0x6FF), (0x900, 0xDFF), (0xE00, 0xEFF), (0x1100, 0x11FF), (0x1E00, 0x206F),
    (0x2070, 0x2BFF), (0x3000, 0x33FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xF8FF),
    (0xF900, 0xFFFF), (0x10000, 0x107FF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF),
    (0x20000, 0x2FA1F), (0xE0000, 0xE01EF), (0xE000, 0x10FFFF),
)  # fmt: skip


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Form ("json", "model") to the folder that holds `tokenizer` and `tokenizer_2`."""
    roots = {}
    for form in ("json", "model"):
        roots[form] = tmp_path_factory.mktemp(form)
        write_tokenizers(roots[form], form=form)
    return roots


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """3000 strings: the fixed cases first, then seeded mixtures from across Unicode."""
    return mixed_strings(3000)


def mixed_strings(count: int) -> list[str]:
    """As the fixture `prompts`, so many of them."""
    generator = random.Random(0)
    strings = list(_FIXED)
    while len(strings) < count:
        pieces = 400 if generator.random() < 0.01 else generator.randint(1, 30)
        strings.append("".join(_piece(generator) for _ in range(pieces)))
    return strings


def load(folder: Path, length: int | None = None) -> Tokenizer:
    """The host's tokenizer of a checkpoint's folder, which has the name it has there."""
    kind = KINDS[folder.name]
    made = canonical_tokenizer(folder, kind, length)
    record = TokenizerRecord(
        path=f"tokenizers/{kind}.json",
        max_length=made.max_length,
        pad_id=made.pad_id,
        prefix=made.prefix,
        suffix=made.suffix,
        padding_side=made.padding_side,
        truncation_side=made.truncation_side,
        files=(),
    )
    return Tokenizer(kind, Backend.from_str(made.text), record)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Rewrite a JSON file, or write it."""
    value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def _piece(generator: random.Random) -> str:
    kind = generator.random()
    if kind < 0.35:
        return generator.choice(_WORDS) + generator.choice(("", " ", " ", ", "))
    if kind < 0.43:
        return generator.choice(_SPECIAL)
    if kind < 0.55:
        return generator.choice(_SPACES) * generator.randint(1, 3)
    if kind < 0.62:
        return generator.choice(_INVISIBLE)
    if kind < 0.67:
        return generator.choice(_CASES)
    low, high = generator.choice(_RANGES)
    return "".join(chr(generator.randint(low, high)) for _ in range(generator.randint(1, 4)))
