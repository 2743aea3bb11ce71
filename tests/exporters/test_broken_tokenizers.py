"""A tokenizer folder that cannot be used stops with one message that names it."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fluxdeploy.errors import CheckpointError
from tests.support.tokenizers import edit, load

Edit = Callable[[Any], object]


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.fixture
def copy(demo: Mapping[str, Path], tmp_path: Path) -> Callable[[str, str], Path]:
    """Copies a folder of the demo, by form and name, for a test to break."""
    return lambda form, name: shutil.copytree(demo[form] / name, tmp_path / name)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_a_missing_folder(tmp_path: Path, name: str) -> None:
    refuse(tmp_path / name, "no tokenizer folder")
    (tmp_path / name).write_text("a file")
    refuse(tmp_path / name, "no tokenizer folder")


@pytest.mark.parametrize(
    ("name", "needed"),
    [("tokenizer", r"vocab\.json \+ merges\.txt"), ("tokenizer_2", r"spiece\.model")],
)
def test_a_folder_without_a_vocabulary(tmp_path: Path, name: str, needed: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    refuse(folder, "has nothing")
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps({"a": 1}))
    (folder / "vocab.json").write_text("{}")
    refuse(folder, rf"needs tokenizer\.json or {needed}, and has tokenizer\.pkl, vocab\.json\. Pi")


@pytest.mark.parametrize(
    ("form", "name", "file"),
    [
        ("json", "tokenizer", "tokenizer.json"),
        ("json", "tokenizer", "tokenizer_config.json"),
        ("json", "tokenizer_2", "tokenizer.json"),
        ("model", "tokenizer", "vocab.json"),
        ("model", "tokenizer", "merges.txt"),
        ("model", "tokenizer", "special_tokens_map.json"),
        ("model", "tokenizer_2", "spiece.model"),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "empty", "pickle", "list"])
def test_a_broken_file(
    copy: Callable[[str, str], Path], form: str, name: str, file: str, damage: str
) -> None:
    folder = copy(form, name)
    data = (folder / file).read_bytes()
    contents = {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "pickle": pickle.dumps({"a": 1}, protocol=4),
        "list": b"[1, 2]",
    }
    (folder / file).write_bytes(contents[damage])
    if (file, damage) == ("merges.txt", "empty"):
        load(folder)  # a vocabulary without merges is a valid one
        return
    refuse(folder, "Copy")


def test_a_spiece_model_that_is_cut_anywhere(copy: Callable[[str, str], Path]) -> None:
    folder = copy("model", "tokenizer_2")
    data = (folder / "spiece.model").read_bytes()
    # The self-test samples at the end may be missing: nothing reads them.
    for size in [*range(0, 6000, 97), len(data) // 2, len(data) - 2000]:
        (folder / "spiece.model").write_bytes(data[:size])
        refuse(folder, "cut off|SentencePiece|lacks|wire type")


def test_an_empty_map_of_characters(copy: Callable[[str, str], Path]) -> None:
    folder = copy("json", "tokenizer_2")

    def change(document: Any) -> None:
        document["normalizer"]["precompiled_charsmap"] = base64.b64encode(bytes(64)).decode()

    edit(folder / "tokenizer.json", change)
    refuse(folder, "cannot be used")  # and no panic of the native code


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer", lambda d: d.pop("model"), "no model with a vocabulary"),
        ("tokenizer", lambda d: d["model"].update(type="WordPiece"), "WordPiece model, and a BPE"),
        ("tokenizer", lambda d: d["model"].update(merges=[["a", "nowhere"]]), "out of vocab"),
        ("tokenizer", lambda d: d["model"].update(merges=["a b c"]), "cannot be used"),
        ("tokenizer_2", lambda d: d["model"].update(type="BPE"), "BPE model, and a Unigram"),
        ("tokenizer_2", lambda d: d["model"].update(vocab=[["a", "b"]]), "cannot be used"),
        ("tokenizer_2", lambda d: d.update(added_tokens=3), "cannot be used"),
    ],
)
def test_a_tokenizer_json_of_another_kind(
    copy: Callable[[str, str], Path], name: str, change: Edit, message: str
) -> None:
    folder = copy("json", name)
    (folder / "tokenizer_config.json").unlink()
    edit(folder / "tokenizer.json", change)
    refuse(folder, message)


def test_a_vocabulary_without_the_special_tokens(copy: Callable[[str, str], Path]) -> None:
    folder = copy("model", "tokenizer")
    edit(folder / "vocab.json", lambda vocabulary: vocabulary.pop("<|endoftext|>"))
    refuse(folder, r"lacks '<\|endoftext\|>', its eos_token")
    # Declared as an added token it has an id that the text encoder knows.
    edit(folder / "vocab.json", lambda vocabulary: vocabulary.pop("<|startoftext|>"))
    added = {"<|startoftext|>": 861, "<|endoftext|>": 862}
    edit(folder / "added_tokens.json", lambda tokens: tokens.update(added))
    load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "LlamaTokenizer; FLUX.1 needs a T5Tokenizer"),
        ({"tokenizer_class": "CLIPTokenizer"}, "swapped"),
        ({"eos_token": None}, "cannot be used"),
        ({"pad_token": None}, "pad_token to null"),
        ({"eos_token": "<nowhere>"}, "lacks '<nowhere>', its eos_token"),
        ({"pad_token": 7}, "cannot be used"),
        ({"padding_side": "middle"}, "middle"),
        ({"model_max_length": "long"}, "its model_max_length is 'long'"),
        ({"extra_ids": "many"}, "cannot be used"),
        ({"added_tokens_decoder": {"0": "<pad>"}}, "added_tokens_decoder"),
    ],
)
def test_settings_that_mean_nothing(
    copy: Callable[[str, str], Path], settings: dict[str, Any], message: str
) -> None:
    folder = copy("json", "tokenizer_2")
    edit(folder / "tokenizer_config.json", lambda config: config.update(settings))
    refuse(folder, message)


def test_sentinels_that_contradict_their_number(copy: Callable[[str, str], Path]) -> None:
    folder = copy("json", "tokenizer_2")
    edit(folder / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))
    sentinels = {"additional_special_tokens": ["<extra_id_0>", "<extra_id_1>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(sentinels))
    refuse(folder, r"extra_ids \(100\)")


SECRET = '{"bos_token": "hunter2", "hunter2": 3, "model": {"vocab": {"hunter2": 0}}}'


@pytest.mark.parametrize(
    ("form", "name", "file"),
    [
        ("json", "tokenizer", "tokenizer.json"),
        ("json", "tokenizer", "tokenizer_config.json"),
        ("json", "tokenizer_2", "added_tokens.json"),
        ("json", "tokenizer_2", "special_tokens_map.json"),
        ("model", "tokenizer", "vocab.json"),
        ("model", "tokenizer", "merges.txt"),
        ("model", "tokenizer_2", "spiece.model"),
    ],
)
@pytest.mark.parametrize("place", ["secret", "blobs/0123", "tokenizer_3/secret"])
def test_files_that_lie_elsewhere_are_not_read(
    copy: Callable[[str, str], Path], tmp_path: Path, form: str, name: str, file: str, place: str
) -> None:
    folder = copy(form, name)
    secret = tmp_path / place
    secret.parent.mkdir(exist_ok=True)
    secret.write_text(SECRET)
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(os.path.relpath(secret, folder))
    with pytest.raises(CheckpointError, match="is a link that leaves its folder") as caught:
        load(folder)
    assert str(folder / file) in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("kind", ["hub", "within", "folder"])
def test_links_of_a_hub_s_cache_are_read(
    copy: Callable[[str, str], Path], tmp_path: Path, kind: str
) -> None:
    folder = copy("json", "tokenizer")
    expected = load(folder).backend.to_str()
    if kind == "hub":
        snapshot = tmp_path / "models--a--b/snapshots/1234/tokenizer"
        (tmp_path / "models--a--b/blobs").mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for index, file in enumerate(sorted(folder.iterdir())):
            file.rename(tmp_path / f"models--a--b/blobs/{index:040x}")
            (snapshot / file.name).symlink_to(f"../../../blobs/{index:040x}")
        folder = snapshot
    elif kind == "within":
        (folder / "tokenizer.json").rename(folder / "real.json")
        (folder / "tokenizer.json").symlink_to("real.json")
    else:
        folder = folder.rename(tmp_path / "real")
        (tmp_path / "tokenizer").symlink_to(folder)
        folder = tmp_path / "tokenizer"
    assert load(folder).backend.to_str() == expected
