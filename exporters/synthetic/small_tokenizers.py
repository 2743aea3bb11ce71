"""Small real tokenizers of FLUX.1's two kinds, trained on whatever sentences they shall know.

Nothing is downloaded, and the same sentences give the same bytes. The tokenizers load in
transformers and in diffusers' FluxPipeline as the published ones do.
"""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, Unigram

__all__ = ["TokenizerSizes", "picture_sentences", "write_tokenizers"]

Form = Literal["json", "model"]

_CLIP_LIMIT = 1000
_SPIECE_LIMIT = 700
_SENTINELS = 100
_SENTENCES = 1500

_START, _END = "<|startoftext|>", "<|endoftext|>"
_UNKNOWN_ID = 2

# Words as OpenAI's CLIP splits them: contractions, runs of letters, single digits, the rest.
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)

_STYLES = (
    "A photograph of",
    "An oil painting of",
    "A watercolor of",
    "A pencil drawing of",
    "A detailed illustration of",
    "A black and white photo of",
    "A cinematic shot of",
    "A small sketch of",
    "A 3D render of",
    "A picture of",
)
_QUALITIES = (
    "red", "blue", "green", "golden", "silver", "tiny", "huge", "ancient", "modern", "wooden",
    "glass", "fluffy", "shiny", "colorful", "dark", "bright", "sleeping", "dancing", "smiling",
)  # fmt: skip
_THINGS = (
    "cat", "dog", "fox", "owl", "horse", "robot", "teapot", "castle", "bicycle", "lighthouse",
    "mountain", "flower", "astronaut", "dragon", "train", "guitar", "painter", "child", "apple",
    "butterfly", "circle", "square", "triangle",
)  # fmt: skip
_PLACES = (
    "in a snowy forest", "on a sandy beach", "beside a quiet lake", "under the stars",
    "in the middle of a busy city", "on a kitchen table", "above the clouds", "inside a library",
    "in front of a window", "on the surface of the moon", "in a field of sunflowers",
    "at the end of the street", "behind an old house",
)  # fmt: skip
_LIGHTS = (
    "at sunset", "at night", "in soft morning light", "with dramatic lighting", "in the rain",
    "with a blurred background", "in high contrast", "with 2 long shadows", "in warm colors",
    "highly detailed", "35 mm film",
)  # fmt: skip
_ALPHABET = (
    "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    ". , ; : ! ? ' \" ( ) [ ] - + / % & # * = @ _",
)


@dataclass(frozen=True)
class TokenizerSizes:
    """What a text encoder's config needs to know of the tokenizers that were written."""

    clip_vocab_size: int
    clip_bos_token_id: int
    clip_eos_token_id: int
    t5_vocab_size: int


def write_tokenizers(
    root: Path, sentences: Iterable[str] | None = None, form: Form = "json"
) -> TokenizerSizes:
    """Train on `sentences`; write `root/tokenizer` (CLIP) and `root/tokenizer_2` (T5).

    Without sentences, those of `picture_sentences` are used. Single letters, digits and signs are
    always learnt too, so that other texts come out in more tokens and not as unknown ones.

    `form` "json" writes each as a `tokenizer.json`; "model" writes `vocab.json` and `merges.txt`
    for CLIP and `spiece.model` for T5, as older checkpoints have them. The settings beside them
    are in the matching style: `added_tokens_decoder` in the config, or a special tokens map.
    """
    clip_folder, t5_folder = root / "tokenizer", root / "tokenizer_2"
    for folder in (clip_folder, t5_folder):
        folder.mkdir(parents=True, exist_ok=True)
    text = (*(picture_sentences() if sentences is None else sentences), *_ALPHABET)
    clip_size = _write_clip(clip_folder, text, form)
    t5_size = _write_t5(t5_folder, text, form)
    return TokenizerSizes(
        clip_vocab_size=clip_size,
        clip_bos_token_id=clip_size - 2,
        clip_eos_token_id=clip_size - 1,
        t5_vocab_size=t5_size,
    )


def picture_sentences() -> Iterator[str]:
    """Descriptions of pictures. Each word list is walked at its own pace, which mixes them."""
    for i in range(_SENTENCES):
        first = f"{_QUALITIES[i * 7 % len(_QUALITIES)]} {_THINGS[i * 5 % len(_THINGS)]}"
        second = f"{_QUALITIES[i * 11 % len(_QUALITIES)]} {_THINGS[i * 3 % len(_THINGS)]}"
        scene = f"a {first} and a {second}" if i % 3 == 0 else f"a {first}"
        place, light = _PLACES[i * 4 % len(_PLACES)], _LIGHTS[i * 6 % len(_LIGHTS)]
        yield f"{_STYLES[i % len(_STYLES)]} {scene} {place}, {light}."


def _write_clip(folder: Path, sentences: Iterable[str], form: Form) -> int:
    vocabulary, merges = _train_bpe(sentences)
    start, end = _token(_START, normalized=True), _token(_END)
    config: dict[str, Any] = {
        "add_prefix_space": False,
        "bos_token": _START,
        "do_lower_case": True,
        "eos_token": _END,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": _END,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": _END,
    }
    if form == "model":
        special = {"bos_token": start, "eos_token": end, "pad_token": _END, "unk_token": end}
        _write_json(folder / "special_tokens_map.json", special)
        _write_json(folder / "vocab.json", vocabulary)
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        config["added_tokens_decoder"] = {
            str(vocabulary[token["content"]]): {**token, "special": True} for token in (start, end)
        }
        backend = _clip_backend(vocabulary, merges)
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.RobertaProcessing(
            (_END, vocabulary[_END]),
            (_START, vocabulary[_START]),
            trim_offsets=False,
            add_prefix_space=False,
        )
        backend.add_tokens([AddedToken(**token, special=True) for token in (start, end)])
        _write_backend(folder, backend)
    _write_json(folder / "tokenizer_config.json", config)
    return len(vocabulary)


def _clip_backend(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]) -> Backend:
    """CLIP's pipeline over a vocabulary, without any special token."""
    backend = Backend(
        BPE(
            vocab=vocabulary,
            merges=list(merges),
            unk_token=_END,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend


def _train_bpe(sentences: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary: bytes, bytes that end a word, merges, and the two special tokens last.

    Done here and not by the tokenizers package, whose trainer breaks ties by the order of a hash
    map in some versions.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = dict.fromkeys([*alphabet, *(f"{symbol}</w>" for symbol in alphabet)])
    pipeline = _clip_backend({_END: 0}, [])
    counts: Counter[str] = Counter()
    for sentence in sentences:
        text = pipeline.normalizer.normalize_str(sentence)
        counts.update(word for word, _ in pipeline.pre_tokenizer.pre_tokenize_str(text))
    words = {word: (*word[:-1], f"{word[-1]}</w>") for word in counts}

    merges: list[tuple[str, str]] = []
    while len(symbols) + 2 < _CLIP_LIMIT:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        symbols["".join(best)] = None
        words = {word: _merged(parts, best) for word, parts in words.items()}
    return {symbol: index for index, symbol in enumerate([*symbols, _START, _END])}, merges


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def _write_t5(folder: Path, sentences: Iterable[str], form: Form) -> int:
    from sentencepiece import sentencepiece_model_pb2

    proto = _train_unigram(sentences)
    model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    sentinels = [f"<extra_id_{i}>" for i in range(_SENTINELS)]
    named = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config: dict[str, Any] = {
        **named,
        "additional_special_tokens": sentinels,
        "extra_ids": _SENTINELS,
        "model_max_length": 512,
        "tokenizer_class": "T5Tokenizer",
    }
    vocabulary = [(piece.piece, piece.score) for piece in model.pieces]
    vocabulary += [(text, 0.0) for text in reversed(sentinels)]
    if form == "model":
        (folder / "spiece.model").write_bytes(proto)
        special = {**named, "additional_special_tokens": sentinels}
        _write_json(folder / "special_tokens_map.json", special)
    else:
        special_ids = [0, 1, 2, *range(len(model.pieces), len(vocabulary))]
        tokens = [
            AddedToken(vocabulary[index][0], normalized=False, special=True)
            for index in special_ids
        ]
        config["added_tokens_decoder"] = {
            str(index): {**_token(token.content), "special": True}
            for index, token in zip(special_ids, tokens, strict=True)
        }
        backend = _t5_backend(vocabulary, model.normalizer_spec.precompiled_charsmap)
        backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
        backend.post_processor = processors.TemplateProcessing(
            single=["$A", "</s>"],
            pair=["$A", "</s>", "$B", "</s>"],
            special_tokens=[("</s>", 1)],
        )
        backend.add_tokens(tokens)
        _write_backend(folder, backend)
    _write_json(folder / "tokenizer_config.json", config)
    return len(vocabulary)


def _t5_backend(vocabulary: Sequence[tuple[str, float]], charsmap: bytes) -> Backend:
    """T5's pipeline over (piece, log probability) pairs, without any special token."""
    backend = Backend(Unigram(list(vocabulary), unk_id=_UNKNOWN_ID, byte_fallback=False))
    backend.normalizer = normalizers.Precompiled(charsmap)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    return backend


def _train_unigram(sentences: Iterable[str]) -> bytes:
    """A SentencePiece model with T5's special ids: pad 0, end 1, unknown 2, no start."""
    import sentencepiece

    # Only strings that several distinct words share can become pieces. Each word once more, written
    # twice, makes whole words candidates too: they are most of what a small vocabulary needs.
    words = sorted({word for sentence in sentences for word in sentence.split()})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain(sentences, (2 * word for word in words)),
        model_writer=model,
        model_type="unigram",
        vocab_size=_SPIECE_LIMIT,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        byte_fallback=False,
        pad_id=0,
        eos_id=1,
        unk_id=_UNKNOWN_ID,
        bos_id=-1,
        num_threads=1,  # the order of float sums decides the last bits of the scores
        minloglevel=2,
    )
    return model.getvalue()


def _token(content: str, normalized: bool = False) -> dict[str, Any]:
    """A token with its flags, as a special tokens map writes it."""
    return {
        "content": content,
        "lstrip": False,
        "normalized": normalized,
        "rstrip": False,
        "single_word": False,
    }


def _write_backend(folder: Path, backend: Backend) -> None:
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True) + "\n", encoding="utf-8")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
