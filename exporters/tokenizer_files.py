"""The files of a checkpoint's tokenizer folder that are read, and what they may hold.

transformers opens whatever a folder has, and what its settings name. So it gets a folder of its
own, with the files that were read here: regular ones, within bounds that no FLUX.1 comes near and
that keep reading, converting and trying a tokenizer within a second or two.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fluxdeploy.bundle.files import disk_errors, read_whole
from fluxdeploy.errors import CheckpointError

__all__ = ["KINDS", "Kind", "broken", "checked_folder"]

_DOCUMENT, _CONFIG, _PIECES = "tokenizer.json", "tokenizer_config.json", "spiece.model"
_SPECIAL = "special_tokens_map.json"
_SETTINGS = (_CONFIG, _SPECIAL, "added_tokens.json")

# Checkpoints that were saved from a generic class; FluxPipeline loads them with the right one.
_GENERIC_CLASSES = ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")

_MAX_BYTES = {_PIECES: 4 << 20}
_MAX_JSON = 16 << 20
"""Bytes. FLUX.1's largest is a tokenizer.json of 3.5 MiB; its spiece.model has 0.8 MiB."""

_MAX_VALUES = 600_000
_MAX_PIECES = 1 << 16
"""Of a vocabulary, and above every id. FLUX.1's have 49,408 and 32,100."""

_MAX_MERGES = 300_000
_MAX_ADDED = 1000
"""Added or special tokens. FLUX.1's T5 has 103; transformers compares each with each."""

_MAX_GROWTH = 64
"""Times that replacing may lengthen a text."""

_UNREAD = re.compile(
    r".*_files?|auto_map|backend|chat_template|init_inputs|merges|tokenizer_object|vocab|_.*"
)
"""Settings that name other files, or stand for arguments that are objects of Python."""


@dataclass(frozen=True)
class Kind:
    """`files` must all be there where `tokenizer.json` is not; `special` tokens must have ids that
    the text encoder knows; `length` is what every published FLUX.1 pads to at most."""

    class_name: str
    model: str
    files: tuple[str, ...]
    special: tuple[str, ...]
    length: int


KINDS = {
    "clip": Kind(
        "CLIPTokenizer",
        "BPE",
        ("vocab.json", "merges.txt"),
        ("bos_token", "eos_token", "unk_token", "pad_token"),
        77,
    ),
    "t5": Kind(
        "T5Tokenizer",
        "Unigram",
        (_PIECES,),
        ("eos_token", "unk_token", "pad_token"),
        512,
    ),
}


def broken(folder: Path, reason: object) -> CheckpointError:
    """The error for a folder that cannot be used."""
    words = " ".join(str(reason).split()).rstrip(".")
    return CheckpointError(
        f"The tokenizer in {folder} cannot be used: {words}. "
        "Copy the folder from the checkpoint again."
    )


@contextmanager
def checked_folder(folder: Path, kind: Kind) -> Iterator[Path]:
    """A folder with the files of `folder` that decide a token id; it goes with the block.

    Raises `CheckpointError` for what transformers takes for something else, or refuses in words of
    its own code, and for files that are none, or hold more than a tokenizer of FLUX.1 ever has.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no tokenizer folder {folder}; a FLUX.1 checkpoint has tokenizer/ and "
            "tokenizer_2/."
        )
    _check_vocabulary_is_there(folder, kind)
    # Where there is a tokenizer.json, transformers does not look at the others.
    vocabulary = (_DOCUMENT,) if os.path.lexists(folder / _DOCUMENT) else kind.files
    present = [n for n in (*_SETTINGS, *vocabulary) if os.path.lexists(folder / n)]
    _check_links(folder, present)
    files = {name: _read(folder / name) for name in present}
    objects = {
        name: _object(folder / name, data) for name, data in files.items() if name.endswith(".json")
    }
    _check_settings(folder, objects, kind)
    if _DOCUMENT in objects:
        _check_document(folder, objects[_DOCUMENT], kind)
    elif _PIECES in files:
        _check_sentencepiece(folder, files[_PIECES])
    else:
        _check_pieces(folder, "vocab.json", objects["vocab.json"])
        lines = files["merges.txt"].count(b"\n")
        _check_size(folder, "merges.txt", "lines", lines, _MAX_MERGES)
    for name in files.keys() & {_CONFIG, _SPECIAL}:
        kept = {k: v for k, v in objects[name].items() if not _UNREAD.fullmatch(k)}
        files[name] = json.dumps(kept).encode()
    with TemporaryDirectory(prefix="fluxdeploy-") as scratch:
        for name, data in files.items():
            with disk_errors("write", Path(scratch, name)):
                Path(scratch, name).write_bytes(data)
        try:
            yield Path(scratch)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(scratch, str(folder))) from error


def _check_vocabulary_is_there(folder: Path, kind: Kind) -> None:
    present = {entry.name for entry in folder.iterdir()}
    if _DOCUMENT not in present and not present.issuperset(kind.files):
        listed = ", ".join(sorted(present)[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} holds no vocabulary of a {kind.class_name}: it needs {_DOCUMENT} or "
            f"{' + '.join(kind.files)}, and has {listed}. Pickled tokenizers are not read."
        )


def _check_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse files that lie elsewhere: what is in them would go into the bundle, or into an error.

    A hub's cache has its files in a folder `blobs` beside `snapshots`, and links to them.
    """
    real = Path(os.path.realpath(folder))
    cache = next((parent.parent for parent in real.parents if parent.name == "snapshots"), None)
    inside = [real] if cache is None else [real, cache / "blobs"]
    for entry in (folder / name for name in names):
        target = Path(os.path.realpath(entry))
        if not any(target.is_relative_to(place) for place in inside):
            raise CheckpointError(
                f"{entry} is a link that leaves its folder, to {target}, and such files are not "
                "read. Copy the file itself there, for example the whole checkpoint with `cp -rL`."
            )


def _read(path: Path) -> bytes:
    try:
        return read_whole(path, _MAX_BYTES.get(path.name, _MAX_JSON))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Copy it from the checkpoint again."
        ) from error


def _object(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in a file. Raises `CheckpointError`."""
    if data.count(b",") >= _MAX_VALUES:
        raise broken(path.parent, f"its {path.name} has more than {_MAX_VALUES} values")
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({error}). Copy it from the checkpoint again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, not a {type(value).__name__}. "
            "Copy it from the checkpoint again."
        )
    return value


def _check_size(folder: Path, where: str, what: str, count: int, most: int) -> None:
    if count > most:
        raise broken(folder, f"its {where} has {count} {what}, and at most {most} are allowed")


def _check_pieces(folder: Path, where: str, pieces: Any) -> None:
    if isinstance(pieces, (dict, list)):
        _check_size(folder, where, "pieces", len(pieces), _MAX_PIECES)
    if isinstance(pieces, dict):
        # Saving a vocabulary goes through all ids up to the last.
        for piece, number in pieces.items():
            if isinstance(number, int) and number >= _MAX_PIECES:
                raise broken(
                    folder,
                    f"its {where} gives {piece!r:.80} the id {number}, and at most "
                    f"{_MAX_PIECES - 1} is allowed",
                )


def _check_settings(folder: Path, objects: Mapping[str, dict[str, Any]], kind: Kind) -> None:
    named_class = objects.get(_CONFIG, {}).get("tokenizer_class")
    if named_class not in (None, kind.class_name, f"{kind.class_name}Fast", *_GENERIC_CLASSES):
        raise CheckpointError(
            f"{folder / _CONFIG} names the tokenizer class {named_class}; FLUX.1 needs a "
            f"{kind.class_name} here. Are the two tokenizer folders swapped?"
        )
    for name in _SETTINGS:
        settings = objects.get(name, {})
        _check_size(folder, name, "entries", len(settings), _MAX_ADDED)
        for key, value in settings.items():
            if isinstance(value, (dict, list)):
                _check_size(folder, f"{key:.80} in {name}", "entries", len(value), _MAX_ADDED)
        sentinels = settings.get("extra_ids")
        if isinstance(sentinels, (int, float)):
            _check_size(folder, name, "extra_ids", int(min(sentinels, 1e18)), _MAX_ADDED)


def _check_document(folder: Path, document: dict[str, Any], kind: Kind) -> None:
    model = document.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise broken(folder, f"its {_DOCUMENT} has no model with a vocabulary")
    # Files of before 2021 do not say the kind.
    if model.get("type", kind.model) != kind.model:
        raise broken(
            folder,
            f"its {_DOCUMENT} holds a {model['type']} model, and a {kind.model} one is needed",
        )
    if model.get("dropout"):
        raise broken(folder, f"its {_DOCUMENT} drops merges at random")
    _check_pieces(folder, _DOCUMENT, model["vocab"])
    for what, value, most in (
        ("merges", model.get("merges"), _MAX_MERGES),
        ("added tokens", document.get("added_tokens"), _MAX_ADDED),
    ):
        if isinstance(value, (dict, list)):
            _check_size(folder, _DOCUMENT, what, len(value), most)
    growth = 1
    for name in ("normalizer", "pre_tokenizer"):
        for step in _objects(document.get(name)):
            growth *= max(1, *(len(_text(step, key)) for key in ("content", "prepend")))
            expression = _text(step, "Regex")
            if problem := _regex_problem(expression):
                raise broken(
                    folder, f"the expression {expression!r:.80} of its {_DOCUMENT} {problem}"
                )
    if growth > _MAX_GROWTH:
        raise broken(
            folder,
            f"the {_DOCUMENT}'s normalizer makes a text more than {_MAX_GROWTH} times longer",
        )


def _text(step: dict[str, Any], key: str) -> str:
    value = step.get(key)
    return value if isinstance(value, str) else ""


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


_ESCAPED_OR_CLASS = re.compile(
    r"\\[pP]\{\^?\w+\}|\\.|\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]", re.S
)
_REFERENCE = re.compile(r"\\(?:[1-9]|[gkK])|\(\?[~&(RP<']")
_REPEAT = re.compile(r"[*+]|\{\d*,\d*\}")


def _regex_problem(expression: str) -> str | None:
    """Why matching may take time that is exponential in a text's length, or None where it cannot.

    The expressions of real tokenizers are alternatives with one repetition each at most, of a
    character or a class of them.
    """
    if _REFERENCE.search(expression.replace("\\\\", "")):
        return "refers to other parts of itself"
    plain = _ESCAPED_OR_CLASS.sub("x", expression)
    if re.search(r"\)\s*(?:[*+]|\{)", plain):
        return "repeats a group, which can take time without end"
    if any(len(_REPEAT.findall(part)) > 1 for part in plain.split("|")):
        return "repeats twice in one alternative, which can take time without end"
    return None


def _check_sentencepiece(folder: Path, data: bytes) -> None:
    """Refuse a file that is cut off: transformers takes the pieces that are left of it."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(data)
        # The trainer's settings follow the pieces: a file cut between two pieces has none.
        whole = len(model.pieces) > 0 and model.HasField("trainer_spec")
    except Exception as error:  # protobuf's own classes, which differ between its versions
        raise broken(folder, f"its {_PIECES} is no SentencePiece model") from error
    if not whole:
        raise broken(folder, f"its {_PIECES} is cut off, or no SentencePiece model")
    _check_size(folder, _PIECES, "pieces", len(model.pieces), _MAX_PIECES)
