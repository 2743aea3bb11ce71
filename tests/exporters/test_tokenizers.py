"""The canonical form of a tokenizer gives the ids of transformers, for every form of folder."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from exporters.tokenizers import canonical_tokenizer, open_tokenizer
from fluxdeploy.errors import CheckpointError
from tests.support.tokenizers import CLIP, KINDS, T5, edit, load

FEW = 400


def compare(folder: Path, prompts: list[str], length: int) -> None:
    """Assert equal ids; `folder` has the name it has in a checkpoint."""
    kind = KINDS[folder.name]
    cls = transformers.CLIPTokenizer if kind == "clip" else transformers.T5TokenizerFast
    reference = cls.from_pretrained(folder)
    expected = reference(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np"
    ).input_ids
    # What a host makes of the canonical form, and what the exporters use themselves.
    for tokenizer in (load(folder, length), open_tokenizer(folder, kind, length)):
        actual = tokenizer.encode(prompts)
        assert actual.dtype == np.int32
        assert actual.shape == (len(prompts), length)
        wrong = np.flatnonzero((actual != expected).any(axis=1))
        assert wrong.size == 0, f"{wrong.size} differ, first {prompts[wrong[0]]!r}"


@pytest.mark.parametrize("form", ["json", "model"])
@pytest.mark.parametrize(("name", "length"), [(CLIP, 77), (T5, 32), (T5, 256), (T5, 512)])
def test_ids_equal_for_thousands_of_strings(
    demo: Mapping[str, Path], prompts: list[str], form: str, name: str, length: int
) -> None:
    compare(demo[form] / name, prompts if length in (77, 256) else prompts[:FEW], length)


@pytest.mark.parametrize("name", [CLIP, T5])
def test_count_is_the_length_before_cutting(
    demo: Mapping[str, Path], prompts: list[str], name: str
) -> None:
    folder = demo["model"] / name
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load(folder)
    for prompt in prompts[:60]:
        assert tokenizer.count(prompt) == len(reference(prompt).input_ids)


@pytest.mark.parametrize("form", ["json", "model"])
@pytest.mark.parametrize("name", [CLIP, T5])
def test_the_vocabulary_alone_is_enough(
    demo: Mapping[str, Path], prompts: list[str], tmp_path: Path, form: str, name: str
) -> None:
    folder = shutil.copytree(demo[form] / name, tmp_path / name)
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    compare(folder, prompts[:FEW], 77)


@pytest.mark.parametrize("form", ["json", "model"])
@pytest.mark.parametrize("name", [CLIP, T5])
def test_a_folder_that_transformers_saved(
    demo: Mapping[str, Path], prompts: list[str], tmp_path: Path, form: str, name: str
) -> None:
    folder = tmp_path / name
    transformers.AutoTokenizer.from_pretrained(demo[form] / name).save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    compare(folder, prompts[:FEW], 77)


@pytest.mark.parametrize("name", [CLIP, T5])
def test_tokenizer_json_wins_over_the_other_files(
    demo: Mapping[str, Path], prompts: list[str], tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(demo["json"] / name, tmp_path / name)
    for file in ("vocab.json", "merges.txt", "spiece.model"):
        (folder / file).write_text("not looked at")
    compare(folder, prompts[:FEW], 77)


Edit = Callable[[dict[str, Any]], object]


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False} | flags


CONFIGS: dict[str, dict[str, Any]] = {
    "no limit": {"model_max_length": 10**30},
    "left padding": {"padding_side": "left"},
    "left cutting": {"truncation_side": "left"},
    "split special tokens": {"split_special_tokens": True},
    "case kept": {"do_lower_case": False},
    "bos and eos off": {"add_bos_token": False, "add_eos_token": False},
    "token with flags": {"eos_token": token("</s>", rstrip=True) | {"__type": "AddedToken"}},
    "mask token": {"mask_token": "[MASK]"},
    "new tokens of two kinds": {"mask_token": "[MASK]", "extra_special_tokens": ["<new>"]},
    "a special token declared as a plain one": {
        "mask_token": "<new>",
        "added_tokens_decoder": {"4000": token("<new>"), "4001": token("castle")},
        "split_special_tokens": True,
    },
    "own token": {"image_token": "<new>", "other_token": "<Old>"},
    "own tokens in a table": {"extra_special_tokens": {"image_token": "<new>"}},
    "extra tokens": {"extra_special_tokens": ["<new>", "<extra_id_0>"]},
    "no extra tokens": {"extra_special_tokens": None},
    "additional tokens": {"additional_special_tokens": ["<Old>", "castle"]},
    "fewer sentinels": {"extra_ids": 50, "additional_special_tokens": None},
    "other padding": {"pad_token": "<unk>", "unk_token": "a", "bos_token": "cat</w>"},
}


@pytest.mark.parametrize("form", ["json", "model"])
@pytest.mark.parametrize("name", [CLIP, T5])
@pytest.mark.parametrize("change", CONFIGS)
def test_settings_of_the_config_are_honoured(
    demo: Mapping[str, Path], prompts: list[str], tmp_path: Path, form: str, name: str, change: str
) -> None:
    settings = dict(CONFIGS[change])
    if name == CLIP:
        replaced = {"<unk>": "a", "</s>": "<|endoftext|>"}
        for key in ("pad_token", "eos_token"):
            value = settings.get(key)
            if isinstance(value, dict):
                settings[key] = value | {"content": "<|endoftext|>"}
            elif value is not None:
                settings[key] = replaced[value]
    else:
        settings |= {"unk_token": "<unk>"} if "unk_token" in settings else {}
    folder = shutil.copytree(demo[form] / name, tmp_path / name)
    edit(folder / "tokenizer_config.json", lambda config: config.update(settings))
    compare(folder, prompts[:FEW], 32)


SPECIAL_MAPS: dict[str, dict[str, Any]] = {
    "additional tokens": {"additional_special_tokens": ["<new>", "<Old>"]},
    "tokens with flags": {
        "mask_token": token("[MASK]", lstrip=True, rstrip=True, normalized=True),
        "cls_token": token("fluffy", single_word=True),
    },
    "extra tokens": {"extra_special_tokens": [token("<new>", rstrip=True), "<Old>"]},
    "extra tokens in a table": {"extra_special_tokens": {"image_token": "<new>"}},
}


@pytest.mark.parametrize("form", ["json", "model"])
@pytest.mark.parametrize("name", [CLIP, T5])
@pytest.mark.parametrize("change", SPECIAL_MAPS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("added", [{}, {"<new>": 4000, "Castle": 4001, "[MASK]": 4002}])
def test_the_old_files_of_special_and_added_tokens(
    demo: Mapping[str, Path],
    prompts: list[str],
    tmp_path: Path,
    form: str,
    name: str,
    change: str,
    added: dict[str, int],
    split: bool,
) -> None:
    folder = shutil.copytree(demo[form] / name, tmp_path / name)
    edit(folder / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder", None))
    edit(folder / "tokenizer_config.json", lambda c: c.update(split_special_tokens=split))
    edit(folder / "special_tokens_map.json", lambda tokens: tokens.update(SPECIAL_MAPS[change]))
    if added:
        edit(folder / "added_tokens.json", lambda tokens: tokens.update(added))
    compare(folder, prompts[: FEW // 2], 32)


def _left_sides(document: dict[str, Any]) -> None:
    document["truncation"] = {
        "direction": "Left",
        "max_length": 9,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    document["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 3,
        "pad_type_id": 0,
        "pad_token": "a",
    }


def _joined_merges(document: dict[str, Any]) -> None:
    if "merges" in document["model"]:
        document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]


def _nested_normalizer(document: dict[str, Any]) -> None:
    steps = [{"type": "Strip", "strip_left": True, "strip_right": True}, document["normalizer"]]
    document["normalizer"] = {"type": "Sequence", "normalizers": steps}


def _missing_bytes(document: dict[str, Any]) -> None:
    model = document["model"]
    if model["type"] == "BPE":
        merged = {part for pair in model["merges"] for part in pair} | {"a"}
        for symbol in [*pre_tokenizers.ByteLevel.alphabet()][::3]:
            if symbol not in merged:
                del model["vocab"][symbol]


DOCUMENTS: dict[str, Edit] = {
    "left sides": _left_sides,
    "merges of one string": _joined_merges,
    "more normalizers": _nested_normalizer,
    "no normalizer": lambda document: document.update(normalizer=None),
    "other pre-tokenizer": lambda document: document.update(pre_tokenizer=None),
    "other wrapping": lambda document: document.update(post_processor=None),
    "bytes without a token": _missing_bytes,
    "no kind of model": lambda document: document["model"].pop("type"),
    "an added token": lambda document: document["added_tokens"].append(
        token("<new>", rstrip=True, special=False, single_word=False) | {"id": 4000}
    ),
}


@pytest.mark.parametrize("name", [CLIP, T5])
@pytest.mark.parametrize("change", DOCUMENTS)
@pytest.mark.parametrize("config", [True, False])
def test_only_the_honoured_parts_of_a_tokenizer_json_count(
    demo: Mapping[str, Path],
    prompts: list[str],
    tmp_path: Path,
    name: str,
    change: str,
    config: bool,
) -> None:
    folder = shutil.copytree(demo["json"] / name, tmp_path / name)
    edit(folder / "tokenizer.json", DOCUMENTS[change])
    if not config:
        (folder / "tokenizer_config.json").unlink()
    compare(folder, prompts[: FEW // 2], 32)


@pytest.mark.parametrize("split", [False, True])
def test_symbols_that_the_sentencepiece_model_defines(
    demo: Mapping[str, Path], prompts: list[str], tmp_path: Path, split: bool
) -> None:
    folder = shutil.copytree(demo["model"] / T5, tmp_path / T5)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prompts[6:200]),
        model_writer=model,
        vocab_size=4000,
        hard_vocab_limit=False,
        user_defined_symbols=["<new>", "castle"],
        control_symbols=["<Old>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        pad_id=3,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        edit(folder / file, lambda settings: settings.pop("additional_special_tokens"))
    edit(folder / "tokenizer_config.json", lambda c: c.update(split_special_tokens=split))
    compare(folder, prompts[:FEW], 77)


def test_clip_pads_to_the_length_that_fluxpipeline_takes_from_the_config(
    demo: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(demo["json"] / CLIP, tmp_path / CLIP)
    for configured, expected in ((77, 77), (64, 64), (248, 248), (10**30, 77), (None, 77)):
        (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": configured}))
        assert canonical_tokenizer(folder, "clip").max_length == expected
        assert open_tokenizer(folder, "clip").encode(["a cat"]).shape == (1, expected)
        assert load(folder, 32).encode(["a cat"]).shape == (1, 32)


def test_t5_pads_to_the_length_that_its_caller_names(demo: Mapping[str, Path]) -> None:
    folder = demo["json"] / T5
    assert canonical_tokenizer(folder, "t5").max_length == 512
    assert canonical_tokenizer(folder, "t5", 20).max_length == 20
    assert open_tokenizer(folder, "t5", 20).encode(["a cat"]).shape == (1, 20)
    assert open_tokenizer(folder, "t5").encode(["a cat"], 20).shape == (1, 20)


@pytest.mark.parametrize("name", [CLIP, T5])
def test_every_form_and_process_gives_the_same_bytes(
    demo: Mapping[str, Path], tmp_path: Path, name: str
) -> None:
    saved = tmp_path / name
    transformers.AutoTokenizer.from_pretrained(demo["model"] / name).save_pretrained(saved)
    texts = {
        canonical_tokenizer(folder, KINDS[name]).text
        for folder in (demo["json"] / name, demo["model"] / name, saved)
    }
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from exporters.tokenizers import canonical_tokenizer\n"
        f"made = canonical_tokenizer(Path({str(demo['json'] / name)!r}), {KINDS[name]!r})\n"
        "sys.stdout.buffer.write(made.text.encode())\n"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            stdout=subprocess.PIPE,
            check=True,
        )
        texts.add(done.stdout.decode())
    assert len(texts) == 1


@pytest.mark.parametrize("name", [CLIP, T5])
def test_the_file_alone_neither_cuts_nor_pads(
    demo: Mapping[str, Path], tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(demo["json"] / name, tmp_path / name)
    edit(folder / "tokenizer.json", _left_sides)
    made = canonical_tokenizer(folder, KINDS[name])
    assert (made.padding_side, made.truncation_side) == ("left", "left")
    alone = Backend.from_str(made.text)
    assert alone.truncation is alone.padding is None
    ids = alone.encode("a cat " * 20).ids
    own = alone.encode("a cat " * 20, add_special_tokens=False).ids
    assert ids == [*made.prefix, *own, *made.suffix]
    assert len(own) >= 40


def test_scores_are_read_as_the_same_numbers_by_every_reader(
    demo: Mapping[str, Path], tmp_path: Path
) -> None:
    """The tokenizers package is one unit off in the last place for a score in eight."""
    folder = shutil.copytree(demo["json"] / T5, tmp_path / T5)
    generator = np.random.default_rng(0)
    scores = [float(np.float32(score)) for score in generator.uniform(-20, -1, 5000)]
    edit(
        folder / "tokenizer.json",
        lambda d: d["model"]["vocab"].extend([f"q{i}q", s] for i, s in enumerate(scores)),
    )
    text = canonical_tokenizer(folder, "t5").text
    by_python, by_package = (
        dict(json.loads(document)["model"]["vocab"])
        for document in (text, Backend.from_str(text).to_str())
    )
    assert by_python == by_package
    exact = [abs(by_python[f"q{i}q"] - score) for i, score in enumerate(scores)]
    assert sum(error == 0 for error in exact) > 0.99 * len(scores)
    assert max(exact) < 1e-10


def test_segmentations_that_tie_are_broken_as_in_transformers(
    demo: Mapping[str, Path], tmp_path: Path
) -> None:
    """With scores one unit off, a hundred of these are cut in another way."""
    folder = shutil.copytree(demo["json"] / T5, tmp_path / T5)
    generator = np.random.default_rng(1)
    marks = [chr(code) for code in range(0x2580, 0x25F0)]
    pieces = [
        [mark * count, float(np.float32(-5 - 1.2 * count + generator.uniform(-0.5, 0.5)))]
        for mark in marks
        for count in range(1, 6)
    ]
    edit(folder / "tokenizer.json", lambda d: d["model"]["vocab"].extend(pieces))
    prompts = [mark * count for mark in marks for count in range(6, 60)]
    compare(folder, prompts, 77)


@pytest.mark.parametrize("name", [CLIP, T5])
def test_ids_that_one_file_cannot_give_are_refused(
    demo: Mapping[str, Path], tmp_path: Path, name: str
) -> None:
    """A special token that is read as plain text hides the plain token within it."""
    folder = shutil.copytree(demo["json"] / name, tmp_path / name)
    settings = {"split_special_tokens": True, "mask_token": "<castle>"}
    edit(folder / "tokenizer_config.json", lambda config: config.update(settings))
    added = {"4000": token("<castle>", special=True), "4001": token("castle")}
    edit(folder / "tokenizer_config.json", lambda c: c["added_tokens_decoder"].update(added))
    with pytest.raises(CheckpointError, match="cannot give its ids for the text '<castle>'"):
        load(folder)


def test_nothing_is_downloaded(demo: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for form in demo:
        for name in KINDS:
            load(demo[form] / name)
