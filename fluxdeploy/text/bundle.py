"""The two tokenizers of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fluxdeploy.errors import BundleError
from fluxdeploy.text.clip import load_clip_tokenizer
from fluxdeploy.text.t5 import load_t5_tokenizer
from fluxdeploy.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fluxdeploy.bundle import Bundle

__all__ = ["Tokenizers", "load_tokenizers"]


@dataclass(frozen=True)
class Tokenizers:
    """FLUX.1's pair: CLIP for the pooled embedding, T5 for the tokens."""

    clip_tokenizer: Tokenizer
    t5_tokenizer: Tokenizer

    def clip(self, prompts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Input of the `clip` component: int32 [B, 77]."""
        return self.clip_tokenizer.encode(prompts)

    def t5(
        self, prompts: Sequence[str], max_sequence_length: int | None = None
    ) -> npt.NDArray[np.int32]:
        """Input of the `t5` component: int32 [B, S] with S = `max_sequence_length`.

        Raises UsageError for more tokens than the bundle's T5 was made for.
        """
        return self.t5_tokenizer.encode(prompts, max_sequence_length)


def load_tokenizers(bundle: Bundle) -> Tokenizers:
    """The tokenizers that the manifest records, padding to the recorded lengths.

    Raises BundleError where the manifest has no such tokenizer, CheckpointError where a folder
    is broken.
    """
    records = bundle.manifest.tokenizers
    missing = [name for name in ("clip", "t5") if name not in records]
    if missing:
        raise BundleError(
            f"The bundle {bundle.root} records no tokenizer {' and '.join(missing)}; "
            "build it again."
        )
    clip, t5 = records["clip"], records["t5"]
    return Tokenizers(
        clip_tokenizer=load_clip_tokenizer(bundle.root / clip.folder, clip.max_length),
        t5_tokenizer=load_t5_tokenizer(bundle.root / t5.folder, t5.max_length),
    )
