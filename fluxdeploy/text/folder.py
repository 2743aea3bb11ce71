"""What a tokenizer folder says beside its vocabulary, read as transformers 5.23 reads it.

Special tokens, added tokens and sides can stand in `tokenizer_config.json`,
`special_tokens_map.json`, `added_tokens.json` and `tokenizer.json` at once. Which of them wins
decides token ids, so the order of precedence here is that of `PreTrainedTokenizerBase` and
`TokenizersBackend`, oddities included.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fluxdeploy.errors import CheckpointError
from fluxdeploy.text.tokenizer import Side

__all__ = [
    "TOKENIZER_FILES",
    "Token",
    "TokenizerFolder",
    "add_special_tokens",
    "open_folder",
    "special_token_id",
    "text_of",
]

Token = str | AddedToken

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
DOCUMENT_FILE = "tokenizer.json"

TOKENIZER_FILES = (
    DOCUMENT_FILE,
    "vocab.json",
    "merges.txt",
    "spiece.model",
    CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    ADDED_TOKENS_FILE,
)
"""Every file of a tokenizer folder that can change a token id."""

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

_UNLIMITED = 1e20

# Checkpoints that were saved from a generic class; FluxPipeline loads them with the right one.
_GENERIC_CLASSES = ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True)
class TokenizerFolder:
    """The settings of a folder.

    `document` is the parsed `tokenizer.json`, or None. `named` has the special tokens that have a
    name (`bos_token`...), defaults filled in, in the order in which they get ids. `extra` and
    `additional` are the lists `extra_special_tokens` and `additional_special_tokens`; None where
    no file has them. `declared` are the added tokens, by id.
    """

    path: Path
    document: Mapping[str, Any] | None
    named: Mapping[str, Token]
    extra: tuple[Token, ...] | None
    additional: tuple[Token, ...] | None
    declared: tuple[AddedToken, ...]
    padding_side: Side
    truncation_side: Side
    split_special_tokens: bool
    model_max_length: int | None
    extra_ids: int

    def broken(self, reason: str) -> CheckpointError:
        """An error that names the folder; the caller raises it."""
        return CheckpointError(
            f"The tokenizer in {self.path} cannot be used: {reason}. "
            "Copy the folder from the checkpoint again."
        )

    def document_model(self, kind: str) -> Mapping[str, Any] | None:
        """The model in `tokenizer.json`, of the given kind; None without such a file.

        Files of before 2021 do not say the kind.
        """
        if self.document is None:
            return None
        model = self.document.get("model")
        if not isinstance(model, dict) or "vocab" not in model:
            raise self.broken(f"its {DOCUMENT_FILE} has no model with a vocabulary")
        if model.get("type", kind) != kind:
            raise self.broken(
                f"its {DOCUMENT_FILE} holds a {model['type']} model, and a {kind} one is needed"
            )
        return model

    def require_special_tokens(self, vocabulary: Collection[str], names: Collection[str]) -> None:
        """Raise CheckpointError for a named token that would get an id of its own.

        transformers appends it to the vocabulary, and the text encoder has no embedding for it.
        """
        known = {*map(text_of, self.declared)}
        for name in names:
            token = self.named.get(name)
            if token is None:
                raise self.broken(f"it sets {name} to null")
            if text_of(token) not in vocabulary and text_of(token) not in known:
                raise self.broken(f"its vocabulary lacks {text_of(token)!r}, its {name}")


def text_of(token: Token) -> str:
    """The characters of a token."""
    return token if isinstance(token, str) else token.content


def open_folder(
    path: Path, vocabulary_files: tuple[str, ...], class_name: str, defaults: Mapping[str, str]
) -> TokenizerFolder:
    """Read all but the vocabulary of the folder `path`.

    `vocabulary_files` must all be there where `tokenizer.json` is not. `class_name` is the class
    in transformers, `defaults` its named special tokens. Raises CheckpointError.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"There is no tokenizer folder {path}; a FLUX.1 checkpoint has tokenizer/ and "
            "tokenizer_2/."
        )
    has_document = (path / DOCUMENT_FILE).is_file()
    if not has_document and not all((path / name).is_file() for name in vocabulary_files):
        present = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{path} holds no vocabulary of a {class_name}: it needs {DOCUMENT_FILE} or "
            f"{' + '.join(vocabulary_files)}, and has {present}. Pickled tokenizers are not read."
        )
    config = _read_object(path / CONFIG_FILE) or {}
    named_class = config.get("tokenizer_class")
    if named_class not in (None, class_name, f"{class_name}Fast", *_GENERIC_CLASSES):
        raise CheckpointError(
            f"{path / CONFIG_FILE} names the tokenizer class {named_class}; FLUX.1 needs a "
            f"{class_name} here. Are the two tokenizer folders swapped?"
        )
    document = _read_object(path / DOCUMENT_FILE)
    try:
        return _interpret(path, config, document, defaults)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The special tokens in {path} cannot be read ({error}). "
            "Copy the folder from the checkpoint again."
        ) from error


def add_special_tokens(backend: Backend, folder: TokenizerFolder, extra: tuple[Token, ...]) -> None:
    """Give `backend` the declared, named and extra tokens in transformers' order.

    The order matters: a token outside the vocabulary gets the next free id, and of two tokens
    with the same text the flags of the first one count.
    """
    tokens: list[Token] = list(folder.declared)
    taken = {*map(text_of, tokens)}
    for token in (*folder.named.values(), *extra):
        if text_of(token) not in taken and token not in tokens:
            tokens.append(token)
    named = {*map(text_of, folder.named.values())}
    for index, token in enumerate(tokens):
        if isinstance(token, str):
            tokens[index] = AddedToken(token, special=True)
        elif token.content in named:
            token.special = True
    backend.add_tokens(tokens)
    backend.encode_special_tokens = folder.split_special_tokens


def special_token_id(backend: Backend, folder: TokenizerFolder, name: str) -> int:
    """The id of a named token, after `add_special_tokens` gave it one."""
    token_id = backend.token_to_id(text_of(folder.named[name]))
    if token_id is None:
        raise folder.broken(f"its {name} has no id")
    return token_id


def _interpret(
    path: Path,
    config: dict[str, Any],
    document: Mapping[str, Any] | None,
    defaults: Mapping[str, str],
) -> TokenizerFolder:
    declared: dict[int, AddedToken] = {}
    if "additional_special_tokens" in config and not config.get("extra_special_tokens"):
        config["extra_special_tokens"] = config.pop("additional_special_tokens")
    if "added_tokens_decoder" in config:
        # Then every other list of added tokens is ignored, that of tokenizer.json too.
        for index, value in config["added_tokens_decoder"].items():
            declared[int(index)] = _added_token(value)
    else:
        _merge_special_tokens_map(config, _read_object(path / SPECIAL_TOKENS_FILE) or {})
        special_texts = _special_texts(config)
        for text, index in (_read_object(path / ADDED_TOKENS_FILE) or {}).items():
            special = text in special_texts
            declared[index] = AddedToken(text, normalized=not special, special=special)
        for entry in (document or {}).get("added_tokens", ()):
            declared[entry["id"]] = _added_token(entry)

    extra = config.get("extra_special_tokens")
    own_tokens = {
        name: value
        for name, value in config.items()
        if name.endswith("_token")
        and name not in _NAMED
        and isinstance(_token(value), (str, AddedToken))
    }
    if isinstance(extra, dict):
        own_tokens.update(config.pop("extra_special_tokens"))
    named = {name: config.get(name, defaults.get(name)) for name in _NAMED} | own_tokens

    truncation = (document or {}).get("truncation") or {}
    padding = (document or {}).get("padding") or {}
    return TokenizerFolder(
        path=path,
        document=document,
        named={name: _required_token(value) for name, value in named.items() if value is not None},
        extra=_tokens(config, "extra_special_tokens"),
        additional=_tokens(config, "additional_special_tokens"),
        declared=tuple(declared[index] for index in sorted(declared)),
        padding_side=_side(config.get("padding_side", padding.get("direction"))),
        truncation_side=_side(config.get("truncation_side", truncation.get("direction"))),
        split_special_tokens=bool(config.get("split_special_tokens", False)),
        model_max_length=_length(config.get("model_max_length", config.get("max_len"))),
        extra_ids=int(config.get("extra_ids", 100)),
    )


def _read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None without the file. Raises CheckpointError."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({error}). Copy it from the checkpoint again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, not a {type(value).__name__}. "
            "Copy it from the checkpoint again."
        )
    return value


def _merge_special_tokens_map(config: dict[str, Any], tokens: Mapping[str, Any]) -> None:
    """Let `special_tokens_map.json` override the config; the list of extra tokens grows."""
    for name, value in tokens.items():
        if name == "extra_special_tokens" and isinstance(value, list):
            merged = list(config.get(name) or ())
            for token in (_token(entry, special=True) for entry in value):
                if token not in merged:
                    merged.append(token)
            config[name] = merged
        elif name == "extra_special_tokens":
            config[name] = value
        else:
            config[name] = _token(value, special=True)


def _special_texts(config: Mapping[str, Any]) -> set[str]:
    """The special tokens that make an entry of `added_tokens.json` special."""
    values = [config.get(name) for name in _NAMED]
    values += config.get("extra_special_tokens") or ()
    return {text_of(value) for value in values if isinstance(value, (str, AddedToken))}


def _added_token(fields: Mapping[str, Any], special: bool | None = None) -> AddedToken:
    known = ("single_word", "lstrip", "rstrip", "normalized", "special")
    flags = {name: fields[name] for name in known if name in fields}
    if special is not None:
        flags["special"] = special
    return AddedToken(fields["content"], **flags)


def _token(value: Any, special: bool | None = None) -> Any:
    """A token written as an object becomes an AddedToken; all else stays as it is."""
    if isinstance(value, dict) and "content" in value:
        return _added_token(value, special)
    return value


def _required_token(value: Any) -> Token:
    token = _token(value)
    if not isinstance(token, (str, AddedToken)):
        raise TypeError(f"{token!r} is not a token")
    return token


def _tokens(config: Mapping[str, Any], name: str) -> tuple[Token, ...] | None:
    if name not in config:
        return None
    return tuple(map(_required_token, config[name] or ()))


def _length(value: float | None) -> int | None:
    """A `model_max_length`; None for "no limit", which transformers saves as 1e30."""
    if value is None or value > _UNLIMITED:
        return None
    return int(value)


def _side(value: str | None) -> Side:
    sides: dict[str, Side] = {"left": "left", "right": "right"}
    side = "right" if value is None else value.lower()
    if side not in sides:
        raise ValueError(f"a side is left or right, not {value!r}")
    return sides[side]
