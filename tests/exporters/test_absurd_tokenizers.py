"""Tokenizer folders with absurd counts, files that are none, and texts without end: refused early.

None of these reaches transformers, which would take gigabytes or hours for them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from exporters.tokenizer_files import KINDS, checked_folder
from exporters.tokenizers import open_tokenizer
from fluxdeploy.errors import CheckpointError
from tests.support.tokenizers import CLIP, T5, edit, load

Copy = Callable[[str, str], Path]
DOCUMENT, CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"


@pytest.fixture
def copy(demo: Mapping[str, Path], tmp_path: Path) -> Copy:
    """Copies a folder of the demo, by form and name, for a test to break."""
    return lambda form, name: shutil.copytree(demo[form] / name, tmp_path / name)


def refuse(folder: Path, words: str) -> None:
    kind = KINDS["clip" if folder.name == CLIP else "t5"]
    with pytest.raises(CheckpointError, match=words) as caught, checked_folder(folder, kind):
        pytest.fail("transformers would get it")
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1000


def _tokens(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "content": f"<{i}>", "special": True} for i in range(count)]


def _normalizer(**fields: str) -> Callable[[Any], object]:
    return lambda document: document.update(normalizer=fields)


def _replace(pattern: dict[str, str], content: str, times: int = 1) -> Callable[[Any], object]:
    step = {"type": "Replace", "pattern": pattern, "content": content}
    steps = {"type": "Sequence", "normalizers": [step] * times}
    return lambda document: document.update(normalizer=steps)


@pytest.mark.parametrize(
    ("form", "name", "file", "change", "words"),
    [
        ("json", T5, CONFIG, lambda d: d.update(extra_ids=10**9), "1000000000 extra_ids"),
        ("json", T5, CONFIG, lambda d: d.update(extra_ids=1e300), "extra_ids, and at most 1000"),
        ("model", T5, CONFIG, lambda d: d.update(extra_ids=5000), "5000 extra_ids"),
        ("model", T5, SPECIAL, lambda d: d.update(extra_ids=10**9), "1000000000 extra_ids"),
        ("json", T5, CONFIG, lambda d: d.update(added_tokens_decoder=dict.fromkeys(range(5000))),
         "added_tokens_decoder in .* has 5000 entries"),
        ("model", CLIP, CONFIG, lambda d: d.update(additional_special_tokens=["<x>"] * 2000),
         "additional_special_tokens in .* has 2000 entries"),
        ("model", CLIP, SPECIAL, lambda d: d.update(extra_special_tokens=["<x>"] * 2000),
         "extra_special_tokens in .* has 2000 entries"),
        ("model", CLIP, "added_tokens.json", lambda d: d.update({f"<{i}>": i for i in range(3000)}),
         "its added_tokens.json has 3000 entries"),
        ("json", T5, DOCUMENT, lambda d: d.update(added_tokens=_tokens(1001)), "1001 added tokens"),
        ("json", CLIP, DOCUMENT, lambda d: d["model"]["vocab"].update(a=10**9), "id 1000000000"),
        ("model", CLIP, "vocab.json", lambda d: d.update(a=1 << 16), "gives 'a' the id 65536"),
        ("json", CLIP, DOCUMENT, lambda d: d["model"].update(vocab=dict.fromkeys(range(70_000), 0)),
         "70000 pieces, and at most 65536"),
        ("json", T5, DOCUMENT, lambda d: d["model"].update(vocab=[["a", 0]] * 70_000),
         "70000 pieces"),
        ("json", CLIP, DOCUMENT, lambda d: d["model"].update(merges=[0] * 300_001), "merges, and"),
        ("json", CLIP, DOCUMENT, lambda d: d.update(x=[0] * 600_000), "more than 600000 values"),
        ("json", CLIP, DOCUMENT, lambda d: d["model"].update(dropout=0.1), "merges at random"),
        ("json", CLIP, DOCUMENT, _replace({"String": "a"}, "aa", 40), "64 times longer"),
        ("json", T5, DOCUMENT, _replace({"String": " "}, "x" * 10**5), "64 times longer"),
        ("json", T5, DOCUMENT, _normalizer(type="Prepend", prepend="▁" * 99),
         "64 times longer"),
    ],
)  # fmt: skip
def test_absurd_counts(
    copy: Copy, form: str, name: str, file: str, change: Callable[[Any], object], words: str
) -> None:
    folder = copy(form, name)
    edit(folder / file, change)
    refuse(folder, words)


@pytest.mark.parametrize(
    "expression",
    ["(a+)+$", "(a|aa)*b", "(?:a*)*", "(x+x+)+y", r"(\w+\s?)*$", r"(a)\1*", "a*a*a*a*b",
     "(?<n>a)|\\g<n>", "(.*){1,99}", "([^x]+){2,}", "(?>a+)+", "a+b+"],
)  # fmt: skip
def test_expressions_that_can_take_time_without_end(copy: Copy, expression: str) -> None:
    folder = copy("json", CLIP)
    edit(folder / DOCUMENT, _replace({"Regex": expression}, "x"))
    refuse(folder, "refers to other parts of itself|can take time without end")


@pytest.mark.parametrize(
    "expression",
    [r"\s+", " {2,}", r"<\|endoftext\|>|'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
     r"'s|'t| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", r"\(+\)|\*+", "[*+({]+", "a{2}b"],
)  # fmt: skip
def test_expressions_of_real_tokenizers(copy: Copy, expression: str) -> None:
    folder = copy("json", CLIP)
    edit(folder / DOCUMENT, _replace({"Regex": expression}, "x"))
    with checked_folder(folder, KINDS["clip"]) as files:
        assert (files / DOCUMENT).is_file()


@pytest.mark.parametrize(
    ("form", "name", "file"),
    [
        ("json", CLIP, DOCUMENT),
        ("json", T5, CONFIG),
        ("model", T5, "spiece.model"),
        ("model", CLIP, "merges.txt"),
        ("model", CLIP, SPECIAL),
        ("model", T5, "added_tokens.json"),
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "device", "sparse", "folder", "gone"])
def test_what_is_no_file_or_too_large(
    copy: Copy, form: str, name: str, file: str, kind: str
) -> None:
    path = copy(form, name) / file
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 1 << 40)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    words = {
        "pipe": "cannot be read: it is a named pipe",
        "device": "is a link that leaves its folder, to /dev/zero",
        "sparse": "cannot be read: it has 1099511627776 bytes, and at most",
        "folder": "cannot be read: it is a folder",
        "gone": "cannot be read: No such file",
    }
    refuse(path.parent, f"{file} {words[kind]}")


@pytest.mark.parametrize("length", [10**12, 1 << 17, -5])
def test_lengths_that_nothing_is_padded_to(copy: Copy, length: int) -> None:
    folder = copy("json", CLIP)
    edit(folder / CONFIG, lambda config: config.update(model_max_length=length))
    with pytest.raises(CheckpointError, match=f"would pad to {length} tokens"):
        open_tokenizer(folder, "clip")
    with pytest.raises(CheckpointError, match="would pad to 1000000000000 tokens"):
        open_tokenizer(folder, "clip", 10**12)


def test_settings_that_name_other_files_are_not_followed(copy: Copy, tmp_path: Path) -> None:
    folder = copy("model", CLIP)
    expected = load(folder).encode(["a fox"])
    other = tmp_path / "tokenizer.4.0.0.json"
    other.write_text("not a tokenizer")
    named = {
        key: str(other) for key in ("tokenizer_file", "vocab_file", "merges_file", "gguf_file")
    }
    edit(folder / SPECIAL, lambda settings: settings.update(named))
    edit(folder / CONFIG, lambda settings: settings.update(
        named, fast_tokenizer_files=[f"../{other.name}"], vocab={"a": 0}, init_inputs=[str(other)]
    ))  # fmt: skip
    assert (load(folder).encode(["a fox"]) == expected).all()


def test_the_copy_goes_with_the_block(copy: Copy) -> None:
    folder = copy("json", CLIP)
    (folder / "README.md").write_text("not read")
    with checked_folder(folder, KINDS["clip"]) as files:
        assert {path.name for path in files.iterdir()} == {DOCUMENT, CONFIG}
        kept = json.loads((files / DOCUMENT).read_text())
        assert kept == json.loads((folder / DOCUMENT).read_text())
    assert not files.exists()
