"""From prompts to what the transformer reads of them, and the encoded texts that are kept."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engines.base import Array
from fluxdeploy.bundle.boundary import REDUX
from fluxdeploy.bundle.manifest import TokenizerRecord
from fluxdeploy.host.components import Run
from fluxdeploy.host.redux import Redux
from fluxdeploy.host.texts import Embeddings, Prompts, Text
from fluxdeploy.text import Tokenizers

__all__ = ["Condition", "EncodedPrompts", "PromptEncoder", "condition"]


@dataclass(frozen=True)
class EncodedPrompts:
    """U distinct prompts of B pictures.

    pooled: float32 [U, P], CLIP's. text: float32 [U, S, E], T5's, and pictures' behind it.
    pictures: [B], the prompt of each picture among the U.
    """

    pooled: NDArray[np.float32]
    text: NDArray[np.float32]
    pictures: NDArray[np.intp]


@dataclass(frozen=True)
class Condition:
    """What prompts and schedule make of the transformer: E noise levels, U prompts, B pictures.

    context: float32 [U, S, D]. modulation: float32 [E, U, M, D]. pictures: [B], the prompt of each.
    mode: float32 [U, 1, D], the kind of control as a text token, where a ControlNet has kinds.
    """

    context: NDArray[np.float32]
    modulation: NDArray[np.float32]
    pictures: NDArray[np.intp]
    mode: NDArray[np.float32] | None = None


class PromptEncoder:
    """Encodes prompts with `clip` and `t5`, and pictures with `redux`.

    Up to `capacity` bytes of what they gave are kept.

    What is kept belongs to the token ids of the prompts that were encoded together, not to each
    prompt alone: activations that are quantized by the whole batch's range make a prompt's numbers
    depend on the others, and equal calls must give equal pictures whatever came before.

    hits, misses: how often an encoder's answer was kept already, and how often it ran.
    """

    def __init__(
        self, tokenizers: Tokenizers, records: Mapping[str, TokenizerRecord], capacity: int
    ) -> None:
        """records: what the manifest says of the tokenizers."""
        self._tokenizers = tokenizers
        self._longest = {name: record.max_length for name, record in records.items()}
        self._capacity = capacity
        self._kept: OrderedDict[tuple[str, int, bytes], NDArray[np.float32]] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def encode(self, text: Text, images_each: int, length: int, run: Run) -> EncodedPrompts:
        """Encode prompts padded or cut to `length` T5 tokens; equal ones are encoded once.

        Embeddings are taken as they are.
        """
        if isinstance(text, Embeddings):
            return EncodedPrompts(text.pooled, text.text, np.repeat(text.rows, images_each))
        distinct = text.distinct
        clip_ids = self._tokenizers.clip([pair[0] for pair in distinct])
        t5_ids = self._tokenizers.t5([pair[1] for pair in distinct], length)
        return EncodedPrompts(
            self._encoded("clip", "pooled_embeddings", "input_ids", clip_ids, run),
            self._encoded("t5", "text_embeddings", "input_ids", t5_ids, run),
            np.repeat([distinct.index(pair) for pair in text.pairs], images_each),
        )

    def with_pictures(self, encoded: EncodedPrompts, redux: Redux, run: Run) -> EncodedPrompts:
        """Prompts with pictures behind their words."""
        embeddings = [
            self._encoded(REDUX, "image_embeddings", "pixel_values", pixels[None], run)
            for pixels in redux.pixels
        ]
        return replace(
            encoded,
            pooled=redux.pooled(encoded.pooled),
            text=redux.joined(encoded.text, np.concatenate(embeddings)),
        )

    def cuts(self, text: Text | None, length: int, what: str) -> list[str]:
        """A sentence for each prompt that is not read to its end by T5, or by CLIP.

        length: the T5 tokens that they are cut to. what: what the prompts are called.
        """
        if not isinstance(text, Prompts):
            return []
        sentences = []
        for number, (for_clip, for_t5) in enumerate(text.pairs):
            which = f" {number + 1} of {len(text)}" if len(text) > 1 else ""
            clip, t5 = self._tokenizers.lengths(for_clip)
            if for_t5 != for_clip:
                _, t5 = self._tokenizers.lengths(for_t5)
            of_clip = _cut("CLIP", clip, self._longest["clip"])
            of_t5 = _cut("T5", t5, length)
            advice = " Raise `max_sequence_length`, or shorten it." * (
                t5 > length < self._longest["t5"]
            )
            if for_clip == for_t5:
                cut = ", and ".join(filter(None, (of_t5, of_clip)))
                sentences += [f"{what}{which} is cut: {cut}.{advice}"] if cut else []
            else:
                sentences += [f"{what}{which} is cut: {of_clip}."] if of_clip else []
                sentences += [f"{what}_2{which} is cut: {of_t5}.{advice}"] if of_t5 else []
        return sentences

    def forget(self) -> None:
        """Free what is kept."""
        self._kept.clear()

    def _encoded(
        self, component: str, output: str, name: str, given: Array, run: Run
    ) -> NDArray[np.float32]:
        # Pixels are as large as what becomes of them.
        key = (component, len(given), hashlib.sha256(given.tobytes()).digest())
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        self.misses += 1
        values = run(component, {name: given})[output]
        self._kept[key] = values
        while sum(kept.nbytes for kept in self._kept.values()) > self._capacity:
            self._kept.popitem(last=False)
        return values


def _cut(encoder: str, tokens: int, kept: int) -> str:
    """What an encoder leaves out of a prompt; empty where that is nothing."""
    return f"{encoder} reads {kept} of its {tokens} tokens" if tokens > kept else ""


def condition(
    encoded: EncodedPrompts,
    levels: NDArray[np.float32],
    guidance_scale: float | None,
    run: Run,
    component: str = "conditioner",
    mode: int | None = None,
) -> Condition:
    """Run a conditioner for every noise level, float32 [E]; guidance where the model has it.

    mode: the kind of control, of a ControlNet's conditioner that knows several.
    """
    inputs: dict[str, Array] = {
        "text_embeddings": encoded.text,
        "pooled_embeddings": encoded.pooled,
        "timestep": levels,
    }
    if guidance_scale is not None:
        inputs["guidance"] = np.full(len(encoded.pooled), guidance_scale, np.float32)
    if mode is not None:
        inputs["control_mode"] = np.full((len(encoded.pooled), 1), mode, np.int32)
    outputs = run(component, inputs)
    return Condition(
        outputs["context"], outputs["modulation"], encoded.pictures, outputs.get("mode")
    )
