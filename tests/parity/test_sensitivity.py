"""Whether the parity tests have teeth: a mistake in any formula must move the picture far.

Networks at their default initialisation hardly look at text, time and position, and a parity test
on them passes whatever the host does. Here each input and each formula of the host is broken on
purpose; some pixel must then move by a third of its range.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import open_engine
from engines.base import Array, Binding, Engine
from fluxdeploy.bundle import open_bundle
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.sampling import schedule
from fluxdeploy.sampling.latents import pack, unpack
from fluxdeploy.sampling.rope import joint_ids
from fluxdeploy.text import load_tokenizers

pytest.importorskip("diffusers")

THIRD = 85 / 255

FIFTH = 51 / 255
"""What T5's words alone move is less than what a wrong formula does."""

TEXT_TOKENS = 32

# Longer than CLIP's 77 tokens, so that what follows is T5's alone.
LONG = "A red fox on a sandy beach, " * 12
CALL = {
    "prompt": "A red fox on a sandy beach at sunset",
    "height": 64,
    "width": 96,
    "num_inference_steps": 4,
    "seed": 0,
    "max_sequence_length": TEXT_TOKENS,
    "output_type": "np",
}

Inputs = Mapping[str, Array]
Change = Callable[[dict[str, Any]], dict[str, Any]]


class ChangedEngine(Engine):
    """An engine that gets other inputs than the host gave."""

    def __init__(self, engine: Engine, change: Change) -> None:
        self.engine = engine
        self.change = change
        self.component = engine.component
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self.dimensions = engine.dimensions

    def run(self, inputs: Inputs) -> dict[str, Array]:
        return self.engine.run(self.change(dict(inputs)))

    def bind(self, resident: Inputs) -> Binding:
        return self.engine.bind(self.change(dict(resident)))

    def close(self) -> None:
        self.engine.close()


def picture(pipe: FluxPipeline, **arguments: Any) -> np.ndarray:
    return np.asarray(pipe(**{**CALL, **arguments}).images)


def moved(before: np.ndarray, after: np.ndarray) -> float:
    """The largest move of a pixel, in 0..1."""
    return float(np.abs(after - before).max())


def image_first(table: Array) -> np.ndarray:
    return np.roll(table, -TEXT_TOKENS, axis=0)


def halves(table: Array) -> np.ndarray:
    """Angles laid out for pairs of channels (i, i + half) in place of (2i, 2i + 1)."""
    return np.ascontiguousarray(np.tile(table[:, ::2], 2))


def reverse_rows(text: Array) -> np.ndarray:
    return np.ascontiguousarray(text[:, ::-1])


ENGINE_INPUTS: dict[str, tuple[str, str, Callable[[Array], Array]]] = {
    "image tokens before text": ("transformer", "rope_*", image_first),
    "RoPE on halves": ("transformer", "rope_*", halves),
    "RoPE backwards": ("transformer", "rope_sin", np.negative),
    "no RoPE": ("transformer", "rope_*", lambda table: table[:1].repeat(len(table), axis=0)),
    "timestep halved": ("conditioner", "timestep", lambda t: t / 2),
    "timesteps backwards": ("conditioner", "timestep", lambda t: t[::-1].copy()),
    "pooled text ignored": ("conditioner", "pooled_embeddings", np.zeros_like),
    "T5's text ignored": ("conditioner", "text_embeddings", np.zeros_like),
    "T5's tokens backwards": ("t5", "input_ids", reverse_rows),
    "padding of T5 not its own": ("t5", "input_ids", lambda ids: np.where(ids == 0, 1, ids)),
    "guidance times 1000 too much": ("conditioner", "guidance", lambda g: g * 1000),
}


@pytest.fixture(params=["dev", "schnell", "constant", "wide"])
def name(request: pytest.FixtureRequest) -> str:
    """A random checkpoint's name."""
    return str(request.param)


@pytest.fixture
def pipe(name: str, open_pipeline: Callable[..., FluxPipeline]) -> FluxPipeline:
    return open_pipeline(name)


def test_most_pixels_are_not_clipped(pipe: FluxPipeline) -> None:
    image = picture(pipe)
    assert np.mean((image > 0) & (image < 1)) > 0.9
    assert image.std() > 0.1


@pytest.mark.parametrize("mistake", ENGINE_INPUTS)
def test_wrong_engine_inputs_move_the_picture(
    name: str, mistake: str, pipe: FluxPipeline, bundle: Callable[..., Path]
) -> None:
    component, pattern, change = ENGINE_INPUTS[mistake]
    opened = open_bundle(bundle(name))
    if pattern == "guidance" and not opened.manifest.guidance_embedding:
        pytest.skip("no guidance embedding")

    def open_changed(wanted: str) -> Engine:
        engine = open_engine(opened, wanted)
        if wanted != component:
            return engine
        return ChangedEngine(
            engine,
            lambda inputs: {
                key: change(value) if key.startswith(pattern.rstrip("*")) else value
                for key, value in inputs.items()
            },
        )

    with FluxPipeline(opened, load_tokenizers(opened), open_changed) as broken:
        assert moved(picture(pipe), picture(broken)) > THIRD


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({}, {"seed": 1}, id="seed"),
        pytest.param(
            {"prompt": LONG + "at sunset", "max_sequence_length": 512},
            {"prompt": LONG + "in a library", "max_sequence_length": 512},
            id="what T5 alone reads",
        ),
        pytest.param(
            {"prompt": LONG + "at sunset", "max_sequence_length": 8},
            {"prompt": "A red fox on a sandy beach, under the stars", "max_sequence_length": 8},
            id="what CLIP alone reads",
        ),
        pytest.param({}, {"max_sequence_length": 48}, id="padding"),
        pytest.param({}, {"guidance_scale": 1.0}, id="guidance"),
        pytest.param({}, {"negative_prompt": "dark", "true_cfg_scale": 2.0}, id="true CFG"),
        pytest.param(
            {"negative_prompt": "dark", "true_cfg_scale": 2.0},
            {"negative_prompt": "", "true_cfg_scale": 2.0},
            id="negative prompt",
        ),
        pytest.param(
            {"negative_prompt": "dark", "true_cfg_scale": 2.0},
            {"negative_prompt": "dark", "true_cfg_scale": 3.0},
            id="true CFG scale",
        ),
    ],
)
def test_arguments_move_the_picture(
    before: dict[str, Any], after: dict[str, Any], pipe: FluxPipeline
) -> None:
    if "guidance_scale" in after and not pipe.bundle.manifest.guidance_embedding:
        pytest.skip("no guidance embedding")
    assert moved(picture(pipe, **before), picture(pipe, **after)) > FIFTH


def wrong_pack(latents: np.ndarray, spec: Any) -> np.ndarray:
    """Tokens with the patch's columns before its rows."""
    tokens = pack(latents, spec)
    patches = tokens.reshape(*tokens.shape[:2], spec.channels, 2, 2).swapaxes(3, 4)
    return np.ascontiguousarray(patches).reshape(tokens.shape)


def wrong_unpack(tokens: np.ndarray, height: int, width: int, spec: Any) -> np.ndarray:
    """Latents of tokens whose patch is read columns first."""
    patches = tokens.reshape(*tokens.shape[:2], spec.channels, 2, 2).swapaxes(3, 4)
    return unpack(np.ascontiguousarray(patches).reshape(tokens.shape), height, width, spec)


def swapped_ids(text_tokens: int, rows: int, columns: int, axes: int) -> np.ndarray:
    return joint_ids(text_tokens, rows, columns, axes)[:, [0, 2, 1]]


def ids_from_one(text_tokens: int, rows: int, columns: int, axes: int) -> np.ndarray:
    ids = joint_ids(text_tokens, rows, columns, axes)
    ids[text_tokens:, 1:] += 1
    return ids


def channel_last(latents: np.ndarray, spec: Any) -> np.ndarray:
    """Tokens with the patch before the channels."""
    tokens = pack(latents, spec)
    patches = tokens.reshape(*tokens.shape[:2], spec.channels, 4).swapaxes(2, 3)
    return np.ascontiguousarray(patches).reshape(tokens.shape)


def shifted_otherwise(spec: Any, steps: int, tokens: int) -> np.ndarray:
    """A schedule with the other kind of shift than the checkpoint's."""
    dynamic = not spec.use_dynamic_shifting
    return SIGMAS(
        dataclasses.replace(spec, use_dynamic_shifting=dynamic, shift=4.0, base_shift=1.2),
        steps,
        tokens,
    )


SIGMAS = schedule.sigmas


@pytest.mark.parametrize(
    ("formula", "mistake"),
    [
        ("host.tasks.text_to_image.pack", wrong_pack),
        ("host.tasks.text_to_image.pack", channel_last),
        ("host.decoding.unpack", wrong_unpack),
        ("host.making.joint_ids", swapped_ids),
        ("host.making.joint_ids", ids_from_one),
        ("sampling.schedule.sigmas", shifted_otherwise),
    ],
)
def test_wrong_formulas_move_the_picture(
    formula: str, mistake: Callable[..., Any], pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = picture(pipe)
    monkeypatch.setattr(f"fluxdeploy.{formula}", mistake)
    assert moved(expected, picture(pipe)) > THIRD
