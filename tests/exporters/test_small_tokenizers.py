"""Small tokenizers are real ones: the same on every run, and at home in other libraries."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import tokenizers

from exporters.synthetic.small_tokenizers import write_tokenizers
from tests.support.tokenizers import load


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("form", ["json", "model"])
def test_another_process_writes_the_same_bytes(
    demo: Mapping[str, Path], tmp_path: Path, form: str
) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from exporters.synthetic.small_tokenizers import write_tokenizers\n"
        f"write_tokenizers(Path({str(tmp_path)!r}), form={form!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert files(tmp_path) == files(demo[form])


def test_both_forms_give_the_same_ids(demo: Mapping[str, Path]) -> None:
    prompts = ["A red fox in a snowy forest, oil painting.", "e\u0301 日本 </s> <|endoftext|>"]
    for name in ("tokenizer", "tokenizer_2"):
        json_ids, model_ids = (load(demo[form] / name).encode(prompts) for form in demo)
        assert (json_ids == model_ids).all()


def test_reported_ids_and_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    written = write_tokenizers(tmp_path)
    clip = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    t5 = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer_2" / "tokenizer.json"))
    assert clip.get_vocab_size() == written.clip_vocab_size
    assert clip.token_to_id("<|startoftext|>") == written.clip_bos_token_id
    # CLIP pools at the highest id, so the end token must be the last one.
    assert (
        clip.token_to_id("<|endoftext|>") == written.clip_eos_token_id == clip.get_vocab_size() - 1
    )
    assert t5.get_vocab_size() == written.t5_vocab_size
    assert [t5.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert t5.token_to_id("<extra_id_0>") == t5.get_vocab_size() - 1


def test_the_pipeline_in_tokenizer_json_is_complete(demo: Mapping[str, Path]) -> None:
    """A host that runs `tokenizer.json` as it stands, as one in C++ does, gets the same ids."""
    prompts = ["A Red  fox's café, 3 日本", "two\nlines"]
    for name in ("tokenizer", "tokenizer_2"):
        folder = demo["json"] / name
        raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        for prompt, row in zip(prompts, load(folder).encode(prompts), strict=True):
            ids = raw.encode(prompt).ids
            assert list(row[: len(ids)]) == ids


def test_known_words_are_few_tokens(demo: Mapping[str, Path]) -> None:
    assert load(demo["json"] / "tokenizer").count("a photograph of a red fox") == 8


def test_the_words_of_the_sentences_are_one_token_each(tmp_path: Path) -> None:
    """Prompts of a small grammar then fit a short text length."""
    sentences = [
        f"a {size} {colour} {shape}"
        for size in ("large", "small")
        for colour in ("red", "orange")
        for shape in ("circle", "square")
    ]
    write_tokenizers(tmp_path, sentences)
    clip = load(tmp_path / "tokenizer")
    t5 = load(tmp_path / "tokenizer_2")
    for sentence in sentences:
        assert clip.count(sentence) == len(sentence.split()) + 2
        assert t5.count(sentence) == len(sentence.split()) + 1


def test_other_texts_are_known_by_their_letters(tmp_path: Path) -> None:
    write_tokenizers(tmp_path, ["a red circle"])
    ids = load(tmp_path / "tokenizer_2").encode(["Zebras quiz me: 42 (not 17)!"], 64)
    unknown = 2
    assert unknown not in ids
