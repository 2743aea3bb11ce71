"""The CLIP tokenizer: byte-level BPE with `</w>` at the end of a word, lower case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from fluxdeploy.errors import CheckpointError
from fluxdeploy.text.folder import (
    TokenizerFolder,
    add_special_tokens,
    open_folder,
    special_token_id,
    text_of,
)
from fluxdeploy.text.tokenizer import Tokenizer

__all__ = ["clip_backend", "load_clip_tokenizer"]

_DEFAULTS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}

_POSITIONS = 77
"""The positions of every published CLIP ViT-L/14."""

# Words as OpenAI's CLIP splits them: contractions, runs of letters, single digits, the rest.
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def load_clip_tokenizer(folder: Path, max_length: int | None = None) -> Tokenizer:
    """The CLIP tokenizer of `folder`: `tokenizer.json`, else `vocab.json` and `merges.txt`.

    Without `max_length` it pads as diffusers' FluxPipeline does, to the `model_max_length` of
    the folder's config, or to 77 where that sets none. As in transformers 5.23 only the
    vocabulary, merges, added tokens and sides of a `tokenizer.json` count; normalizer and
    pre-tokenizer are CLIP's own, and `do_lower_case` is not looked at: it is always lower case.
    Raises CheckpointError for a folder that is missing, broken or of another kind.
    """
    settings = open_folder(folder, ("vocab.json", "merges.txt"), "CLIPTokenizer", _DEFAULTS)
    try:
        vocabulary, merges = _read_vocabulary(settings)
        settings.require_special_tokens(vocabulary, _DEFAULTS)
        backend = clip_backend(vocabulary, merges, text_of(settings.named["unk_token"]))
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for most that it refuses
        raise settings.broken(str(error)) from error
    extra = settings.additional if settings.extra is None else settings.extra
    add_special_tokens(backend, settings, extra or ())
    return Tokenizer(
        name="CLIP",
        backend=backend,
        prefix=(special_token_id(backend, settings, "bos_token"),),
        suffix=(special_token_id(backend, settings, "eos_token"),),
        pad_id=special_token_id(backend, settings, "pad_token"),
        max_length=max_length or settings.model_max_length or _POSITIONS,
        padding_side=settings.padding_side,
        truncation_side=settings.truncation_side,
    )


def clip_backend(
    vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], unknown: str
) -> Backend:
    """CLIP's pipeline over a vocabulary, without any special token."""
    backend = Backend(
        BPE(
            vocab=vocabulary,
            merges=list(merges),
            unk_token=unknown,
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


def _read_vocabulary(settings: TokenizerFolder) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = settings.document_model("BPE")
    if model is None:
        vocabulary, merges = BPE.read_file(
            str(settings.path / "vocab.json"), str(settings.path / "merges.txt")
        )
        return vocabulary, merges
    # Files of before 2024 write a merge as one string with a space in it.
    pairs = (
        merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ())
    )
    return model["vocab"], [(left, right) for left, right in pairs]
