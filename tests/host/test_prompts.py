"""Encoded prompts are kept for later calls, within bounds, and never change a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.base import Array
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord, Manifest
from fluxdeploy.errors import NumericError
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.host.stats import PipelineStats
from tests.host.conftest import COMPONENTS, POOLED, TEXT, CharacterTokenizers, MemoryEngine

S = 16
BYTES_OF_ONE = 4 * (POOLED + S * TEXT)

Engines = dict[str, MemoryEngine]


def picture(pipe: FluxPipeline, prompt: Any = "a fox", **options: Any) -> np.ndarray:
    options = {"seed": 3, "max_sequence_length": S, **options}
    return np.asarray(pipe(prompt, output_type="np", **options).images)


def runs(engines: Engines) -> tuple[int, int, int]:
    """How often `clip`, `t5` and `conditioner` ran."""
    return tuple(len(engines[name].runs) for name in ("clip", "t5", "conditioner"))  # type: ignore[return-value]


@pytest.fixture
def with_room(engines: Engines, manifest: Manifest) -> Callable[[int], FluxPipeline]:
    """A pipeline that keeps that many bytes."""

    def make(capacity: int) -> FluxPipeline:
        bundle = SimpleNamespace(manifest=manifest)
        tokenizers = CharacterTokenizers()
        return FluxPipeline(bundle, tokenizers, engines.__getitem__, kept_text_bytes=capacity)  # type: ignore[arg-type]

    return make


def test_a_known_prompt_is_not_encoded_again(pipe: FluxPipeline, engines: Engines) -> None:
    first = picture(pipe)
    assert runs(engines) == (1, 1, 1)
    np.testing.assert_array_equal(picture(pipe), first)
    picture(pipe, seed=4, guidance_scale=1.0, num_inference_steps=2, num_images_per_prompt=2)
    assert runs(engines) == (1, 1, 3)


def test_what_a_pipeline_has_done_is_counted(pipe: FluxPipeline) -> None:
    picture(pipe)
    picture(pipe, num_inference_steps=2, num_images_per_prompt=2)
    seen: list[PipelineStats] = []
    picture(pipe, "a hen", callback_on_step_end=lambda *_: seen.append(pipe.stats))
    assert seen[0] == PipelineStats(
        pictures=3, steps=6, prompt_hits=2, prompt_misses=4, waiting=0, running=1
    )
    assert pipe.stats == PipelineStats(4, 8, 2, 4, 0, 0)


def test_prompts_are_told_apart_by_their_tokens(pipe: FluxPipeline, engines: Engines) -> None:
    first = picture(pipe)
    assert np.abs(picture(pipe, "a hen") - first).max() > 1 / 255
    assert runs(engines) == (2, 2, 2)
    # CLIP's tokens are as before.
    assert np.abs(picture(pipe, max_sequence_length=S + 1) - first).max() > 1 / 255
    assert runs(engines) == (2, 3, 3)


def test_the_encoders_texts_are_told_apart(pipe: FluxPipeline, engines: Engines) -> None:
    """These two tokenizers give equal ids at CLIP's length."""
    picture(pipe, max_sequence_length=77)
    assert runs(engines) == (1, 1, 1)


def test_prompts_that_were_encoded_together_are_known_together(
    pipe: FluxPipeline, engines: Engines
) -> None:
    """A batch's range may scale quantized activations: a prompt's numbers depend on the others."""
    together = picture(pipe, ["a fox", "a hen", "a fox"])
    picture(pipe, "a fox")
    assert runs(engines)[:2] == (2, 2)
    np.testing.assert_array_equal(picture(pipe, ["a fox", "a hen", "a fox"]), together)
    assert runs(engines)[:2] == (2, 2)


def test_negative_prompts_are_kept_too(pipe: FluxPipeline, engines: Engines) -> None:
    picture(pipe, "a fox", negative_prompt="fog", true_cfg_scale=2.0)
    assert runs(engines)[:2] == (2, 2)
    picture(pipe, "a hen", negative_prompt="fog", true_cfg_scale=2.0)
    assert runs(engines)[:2] == (3, 3)


def test_the_latest_used_are_kept_within_the_bound(
    with_room: Callable[[int], FluxPipeline], engines: Engines
) -> None:
    pipe = with_room(2 * BYTES_OF_ONE)
    for prompt in ("a", "b", "a", "c"):
        picture(pipe, prompt)
    assert runs(engines)[:2] == (3, 3)
    picture(pipe, "a")  # used after b, which had to go
    assert runs(engines)[:2] == (3, 3)
    picture(pipe, "b")
    assert runs(engines)[:2] == (4, 4)
    assert sum(kept.nbytes for kept in pipe._encoder._kept.values()) <= 2 * BYTES_OF_ONE


def test_nothing_is_kept_without_room(
    with_room: Callable[[int], FluxPipeline], engines: Engines
) -> None:
    pipe = with_room(0)
    np.testing.assert_array_equal(picture(pipe), picture(pipe))
    assert runs(engines) == (2, 2, 2)


def test_closing_forgets(pipe: FluxPipeline, engines: Engines) -> None:
    picture(pipe)
    pipe.close()
    for engine in engines.values():
        engine.closed = False
    picture(pipe)
    assert runs(engines) == (2, 2, 2)


def test_what_is_not_finite_is_not_kept(pipe: FluxPipeline, engines: Engines) -> None:
    good = engines["t5"].compute

    def bad(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"text_embeddings": np.full((1, S, TEXT), np.nan, np.float32)}

    engines["t5"].compute = bad
    with pytest.raises(NumericError, match="t5"):
        picture(pipe)
    engines["t5"].compute = good
    assert np.isfinite(picture(pipe)).all()


def test_with_low_vram_known_prompts_open_no_encoder(manifest: Manifest) -> None:
    opened: list[str] = []

    def open_component(name: str) -> MemoryEngine:
        opened.append(name)
        return MemoryEngine(name, COMPONENTS[name])

    record = ComponentRecord(
        "", "fp32", "fp32", (), (), (), (EngineRecord("memory", "1", "cpu", "", {}),), None
    )
    bundle = SimpleNamespace(
        manifest=dataclasses.replace(manifest, components=dict.fromkeys(COMPONENTS, record))
    )
    pipe = FluxPipeline(bundle, CharacterTokenizers(), open_component, low_vram=True)  # type: ignore[arg-type]
    first = picture(pipe)
    assert opened == ["clip", "t5", "conditioner", "transformer", "vae_decoder"]
    opened.clear()
    np.testing.assert_array_equal(picture(pipe), first)
    assert opened == ["conditioner", "transformer", "vae_decoder"]
