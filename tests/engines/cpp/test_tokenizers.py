"""Token ids of the C++ library are those of the `tokenizers` package, for whatever text."""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from fluxdeploy.bundle.manifest import TokenizerRecord
from fluxdeploy.text import Tokenizer
from tests.engines.cpp.readers import Readers
from tests.engines.cpp.seeds import DEMO
from tests.support.tokenizers import mixed_strings

FILES = {
    "clip": DEMO / "tokenizer/tokenizer.json",
    "t5": DEMO / "tokenizer_2/tokenizer.json",
}
LONGEST = 1 << 16


def record(**changes: Any) -> TokenizerRecord:
    plain = {
        "path": "x.json",
        "max_length": LONGEST,
        "pad_id": 7,
        "prefix": (),
        "suffix": (),
        "padding_side": "right",
        "truncation_side": "right",
        "files": (),
    }
    return TokenizerRecord(**{**plain, **changes})


def check(readers: Readers, path: Path, prompts: Sequence[str]) -> None:
    """Raise AssertionError for the first prompt whose ids differ."""
    backend = Backend.from_str(path.read_text(encoding="utf-8"))
    expected = [backend.encode(p, add_special_tokens=False).ids for p in prompts]
    lines = readers.tokenize(path, "t5", record(), "all", [p.encode() for p in prompts])
    for prompt, ids, line in zip(prompts, expected, lines, strict=True):
        assert line == " ".join(map(str, ids)), ascii(prompt[:300])


@pytest.mark.parametrize("name", FILES)
def test_ids_of_5000_strings(readers: Readers, name: str) -> None:
    check(readers, FILES[name], mixed_strings(5000))


@pytest.mark.parametrize("name", FILES)
def test_ids_of_characters(readers: Readers, name: str, pytestconfig: pytest.Config) -> None:
    """Those that normalizing, classes and graphemes have to do with; all where much is asked for.

    Each between letters and with a mark, in 64s.
    """
    many = pytestconfig.getoption("fuzz_examples")
    last, skipped = (0x110000, range(0xD800, 0xE000)) if many else (0x3100, range(0))
    codes = [code for code in range(last) if code not in skipped]
    if not many:
        codes += [*range(0xA600, 0xAC40), *range(0xF900, 0x10000), *range(0x1D100, 0x1D200)]
    texts = [f"{chr(c)} a{chr(c)}\u0301{chr(c)}b" for c in codes]
    check(readers, FILES[name], [" ".join(texts[i : i + 64]) for i in range(0, len(texts), 64)])


@pytest.mark.parametrize(
    ("length", "changes"),
    [
        (20, {"prefix": (1, 2), "suffix": (3,)}),
        (20, {"prefix": (1,), "padding_side": "left", "suffix": (3,)}),
        (6, {"prefix": (1, 2), "suffix": (3,), "truncation_side": "left"}),
        (6, {"prefix": (1, 2), "suffix": (3,), "padding_side": "left"}),
        (3, {"prefix": (1, 2), "suffix": (3,)}),
        (0, {}),
    ],
)
def test_padding_and_cutting_are_the_manifests(
    readers: Readers, length: int, changes: dict[str, Any]
) -> None:
    prompts = ["", "a cat", "a red circle above a blue square and a dog"]
    backend = Backend.from_str(FILES["clip"].read_text(encoding="utf-8"))
    host = Tokenizer("clip", backend, record(**changes))
    expected = [" ".join(map(str, row)) for row in host.encode(prompts, length).tolist()]
    data = [prompt.encode() for prompt in prompts]
    assert readers.tokenize(FILES["clip"], "clip", record(**changes), length, data) == expected


def test_bad_calls_are_refused_in_the_words_of_python(readers: Readers) -> None:
    given = record(max_length=77, prefix=(1,), suffix=(2,))
    for length in (1, 78, -1):
        (line,) = readers.tokenize(FILES["clip"], "clip", given, length, [b"a"])
        assert line == f"error The clip tokenizer cannot pad to {length} tokens; choose 2 to 77."


@pytest.mark.parametrize(
    "prompt",
    [b"\xff", b"a\xc3", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x28\xa1"],
)
def test_a_prompt_that_is_not_utf8_is_refused(readers: Readers, prompt: bytes) -> None:
    (line,) = readers.tokenize(FILES["clip"], "clip", record(), 5, [prompt])
    assert line.startswith("error A prompt is not UTF-8 text; convert it")


def charsmap_of_all_bytes() -> bytes:
    """Every byte but 0 is a key, with the value "Y": the ids tell where graphemes end."""
    units = [0] * 1024
    units[0] = 256 << 10
    for byte in range(1, 256):
        node, leaf = 256 ^ byte, 512 + byte
        units[node] = (node ^ leaf) << 10 | 1 << 8 | byte
        units[leaf] = 1 << 31
    trie = struct.pack("<1024I", *units)
    return struct.pack("<I", len(trie)) + trie + b"Y\0"


def document(**changes: Any) -> dict[str, Any]:
    """A tokenizer with the one piece "Y"."""
    plain = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "vocab": [["<unk>", 0.0], ["Y", -1.0]],
            "byte_fallback": False,
        },
    }
    return {**plain, **changes}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(**changes)`: the file of such a document."""

    def make(**changes: Any) -> Path:
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(document(**changes)), encoding="utf-8")
        return path

    return make


def test_graphemes_end_where_they_do_in_the_package(
    readers: Readers, write: Callable[..., Path]
) -> None:
    """Of each class one or more, mixed: T5's map replaces short graphemes whole."""
    letters = (
        "ab\u00e9\r\n\x01\u200b\u0301\u0308\u0300\u0345\u200d\u200c\u0600\u06dd\u0903\u0e33"
        "\u1100\u1161\u11a8\uac00\uac01\ua960\ud7b0\u00a9\u2122\u2139\U0001f469\U0001f3fd"
        "\U0001f1e9\U0001f1ea\ufe0f\u0915\u094d\u0937\u093c\u0d4e\u0d15\U000110bd\U000e0001"
    )
    generator = random.Random(1)
    texts = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(6000)]
    encoded = base64.b64encode(charsmap_of_all_bytes()).decode()
    precompiled = {"type": "Precompiled", "precompiled_charsmap": encoded}
    check(readers, write(normalizer=precompiled), texts)


def test_normal_forms_are_those_of_the_package(
    readers: Readers, write: Callable[..., Path]
) -> None:
    letters = (
        "aeiouAnq\u0301\u0300\u0308\u0323\u0327\u0307\u0345\u0334\u031b\u0328\u0344\u0958\u0f71"
        "\u1100\u1112\u1161\u1175\u11a8\u11c2\uac00\ud55c\u212b\u2126\u1e9b\u00e9\u01d5\u1fa7"
        "\u2adc\ufb1d\U0001d15e\U00011938\U00016ff0"
    )
    generator = random.Random(2)
    texts = ["".join(generator.choices(letters, k=generator.randint(1, 20))) for _ in range(3000)]
    vocab = [["<unk>", 0.0], *([f"<0x{byte:02X}>", -1.0] for byte in range(256))]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True}
    for form in ("NFC", "NFD"):
        # Unknown characters in a row are one token: so each is one by itself.
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated",
                 "invert": False}  # fmt: skip
        path = write(normalizer={"type": form}, pre_tokenizer=split, model=model)
        check(readers, path, texts)


@pytest.mark.parametrize("behavior", ["Removed", "Isolated", "MergedWithPrevious",
                                      "MergedWithNext", "Contiguous"])  # fmt: skip
@pytest.mark.parametrize("invert", [True, False])
@pytest.mark.parametrize("pattern", [{"Regex": r"a|b{2,3}| ?\p{N}+(?!\S)"}, {"String": "ab"}])
def test_texts_are_split_as_in_the_package(
    readers: Readers,
    write: Callable[..., Path],
    behavior: str,
    invert: bool,
    pattern: dict[str, str],
) -> None:
    """By how pieces would be split: what is unknown in one piece is one token."""
    generator = random.Random(3)
    texts = ["".join(generator.choices("aabbbc1 2Y", k=12)) for _ in range(300)]
    split = {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}
    check(readers, write(pre_tokenizer=split), texts)


def token(content: str, **changes: Any) -> dict[str, Any]:
    plain = {
        "id": 9,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {**plain, **changes}


def test_added_tokens_are_found_as_in_the_package(
    readers: Readers, write: Callable[..., Path]
) -> None:
    added = [
        token("<a>"),
        token("<a><a>"),
        token("Bb", normalized=True),
        token("Y", id=1),
        token("<l>", lstrip=True),
        token("<r>", rstrip=True),
        token(" ", special=False),
    ]
    generator = random.Random(4)
    parts = ["<a>", "<a", "bb", "BB", "<l>", "<r>", " ", "  ", "\u3000", "Y", "x"]
    texts = ["".join(generator.choices(parts, k=8)) for _ in range(1000)]
    check(readers, write(added_tokens=added, normalizer={"type": "Lowercase"}), texts)


REFUSED = {
    "truncation": ({"truncation": {"max_length": 5}}, "it has a truncation"),
    "padding": ({"padding": {"strategy": "BatchLongest"}}, "it has a padding"),
    "normalizer": ({"normalizer": {"type": "NFKC"}}, "its normalizer NFKC is not known here"),
    "pre_tokenizer": (
        {"pre_tokenizer": {"type": "Digits", "individual_digits": True}},
        "its pre_tokenizer Digits is not known here",
    ),
    "model": ({"model": {"type": "WordPiece"}}, "its model WordPiece is not known here"),
    "word": ({"added_tokens": [token("x", single_word=True)]}, "'x' is a single_word"),
    "expression": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": r"(a+)+"}, "content": ""}},
        "repeats a group",
    ),
    "class": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": r"\p{Lu}"}, "content": ""}},
        "a class of a kind that is not known here",
    ),
    "dropout": (
        {"model": {"type": "BPE", "dropout": 0.5, "vocab": {}, "merges": []}},
        "its model drops merges at random",
    ),
    "first": (
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first"}},
        "the prepend_scheme first of its Metaspace",
    ),
    "template": (
        {"post_processor": {"type": "TemplateProcessing", "single": []}},
        "its post_processor does not have the text once",
    ),
    "id": (
        {"model": {"type": "BPE", "vocab": {"a": (1 << 24) + 1}, "merges": []}},
        "gives 'a' no id from 0 to 16777216",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_known_is_refused_by_name(
    readers: Readers, write: Callable[..., Path], what: str
) -> None:
    changes, words = REFUSED[what]
    path = write(**changes)
    with pytest.raises(RuntimeError) as refused:
        readers.tokenize(path, "t5", record(), 5, [b"a"])
    assert str(refused.value).startswith(f"The tokenizer {path} cannot be read: ")
    assert words in str(refused.value)
    assert str(refused.value).endswith(". Build the bundle again.\n")
