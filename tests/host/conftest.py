"""A FLUX.1-shaped bundle in memory: real constants, and tiny engines with simple arithmetic."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engines.base import Array, Binding, Engine
from fluxdeploy.bundle.manifest import (
    SCHEMA_VERSION,
    Defaults,
    LatentSpec,
    Manifest,
    QualityRecord,
    RopeSpec,
    ScheduleSpec,
    TensorSpec,
    TokenizerRecord,
)
from fluxdeploy.host.pipeline import FluxPipeline
from tests.support.specs import latent_spec, rope_spec, schedule_spec

__all__ = ["latent_spec", "rope_spec", "schedule_spec"]

POOLED, TEXT, WIDTH, ROWS = 6, 10, 8, 3

Compute = Callable[[Mapping[str, Array]], dict[str, Array]]


@pytest.fixture
def manifest(latent_spec: LatentSpec, rope_spec: RopeSpec, schedule_spec: ScheduleSpec) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family="flux.1",
        variant="dev",
        guidance_embedding=True,
        components={},
        latents=latent_spec,
        rope=rope_spec,
        schedule=schedule_spec,
        tokenizers={
            "clip": TokenizerRecord("clip.json", 77, 1, (0,), (1,), "right", "right", ()),
            "t5": TokenizerRecord("t5.json", 512, 0, (), (1,), "right", "right", ()),
        },
        defaults=Defaults(
            height=32,
            width=48,
            num_inference_steps=3,
            guidance_scale=3.5,
            max_sequence_length=512,
            strength=0.6,
        ),
        quality=QualityRecord(min_psnr=20.0, min_ssim=0.75, min_sqnr=None),
        provenance={},
    )


class CharacterTokenizers:
    """One token a character; enough to tell prompts apart."""

    def clip(self, prompts: Sequence[str]) -> np.ndarray:
        return self.t5(prompts, 77)

    def t5(self, prompts: Sequence[str], max_sequence_length: int) -> np.ndarray:
        ids = np.zeros((len(prompts), max_sequence_length), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            codes = [ord(character) % 900 + 1 for character in prompt][: max_sequence_length - 1]
            row[: len(codes) + 1] = [*codes, 999]
        return ids

    def lengths(self, prompt: str) -> tuple[int, int]:
        return len(prompt) + 1, len(prompt) + 1


AXES: dict[str, tuple[tuple[str, ...], ...]] = {
    # What has the batch in front, and what has it second.
    "clip": (("input_ids", "pooled_embeddings"), ()),
    "t5": (("input_ids", "text_embeddings"), ()),
    "conditioner": (
        ("text_embeddings", "pooled_embeddings", "guidance", "context"),
        ("modulation",),
    ),
    "transformer": (("hidden_states", "context", "modulation", "velocity"), ()),
}


class MemoryEngine(Engine):
    """An engine that is a function of its inputs, and keeps count of its runs."""

    def __init__(self, component: str, compute: Compute) -> None:
        front, second = AXES.get(component, ((), ()))
        specs = [
            *(TensorSpec(name, "float32", ("B",)) for name in front),
            *(TensorSpec(name, "float32", ("N", "B")) for name in second),
        ]
        super().__init__(component, tuple(specs), (), {})
        self.compute = compute
        self.runs: list[dict[str, tuple[int, ...]]] = []
        self.closed = False

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert not self.closed
        for name, values in inputs.items():
            assert values.dtype == (np.int32 if name == "input_ids" else np.float32), name
            assert values.flags.c_contiguous, name
        self.runs.append({name: values.shape for name, values in inputs.items()})
        return self.compute(inputs)

    def bind(self, resident: Mapping[str, Array]) -> Binding:
        return MemoryBinding(self, resident)

    def close(self) -> None:
        self.closed = True


class MemoryBinding(Binding):
    def __init__(self, engine: MemoryEngine, resident: Mapping[str, Array]) -> None:
        self.engine = engine
        self.resident = dict(resident)

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return self.engine.run({**self.resident, **inputs})


def mix(values: Array, width: int) -> np.ndarray:
    """A fixed projection of the last axis to `width`."""
    seed = zlib.crc32(f"{values.shape[-1]}x{width}".encode())
    matrix = np.random.default_rng(seed).standard_normal((values.shape[-1], width))
    return (values @ matrix / np.sqrt(values.shape[-1])).astype(np.float32)


def embed(ids: Array, width: int) -> np.ndarray:
    return np.cos(ids[..., None] * np.arange(1, width + 1)).astype(np.float32)


def clip(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"pooled_embeddings": embed(inputs["input_ids"], POOLED).mean(axis=1)}


def t5(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"text_embeddings": embed(inputs["input_ids"], TEXT)}


def conditioner(inputs: Mapping[str, Array]) -> dict[str, Array]:
    prompt = mix(inputs["pooled_embeddings"], WIDTH)
    if "guidance" in inputs:
        prompt = prompt + inputs["guidance"][:, None] / 4
    step = inputs["timestep"][:, None, None, None]
    modulation = np.sin((step + prompt[:, None]) * np.arange(1, ROWS + 1)[:, None])
    return {
        "context": mix(inputs["text_embeddings"], WIDTH),
        "modulation": modulation.astype(np.float32),
    }


def transformer(inputs: Mapping[str, Array]) -> dict[str, Array]:
    hidden, context = inputs["hidden_states"], inputs["context"]
    text = context.shape[1]
    positions = mix(inputs["rope_cos"][text:] - 2 * inputs["rope_sin"][text:], 64)
    shift = mix(context.mean(axis=1) + inputs["modulation"].mean(axis=1), 64)
    return {"velocity": np.tanh(hidden + positions + shift[:, None]).astype(np.float32)}


def vae_decoder(inputs: Mapping[str, Array]) -> dict[str, Array]:
    pixels = np.tanh(inputs["latents"][:, :3] / 3)
    return {"images": np.ascontiguousarray(pixels.repeat(8, axis=2).repeat(8, axis=3))}


COMPONENTS: dict[str, Compute] = {
    "clip": clip,
    "t5": t5,
    "conditioner": conditioner,
    "transformer": transformer,
    "vae_decoder": vae_decoder,
}


@pytest.fixture
def engines() -> dict[str, MemoryEngine]:
    """The engines that a pipeline of `make_pipeline` opens: change them to change it."""
    return {name: MemoryEngine(name, compute) for name, compute in COMPONENTS.items()}


@pytest.fixture
def make_pipeline(engines: dict[str, MemoryEngine]) -> Callable[[Manifest], FluxPipeline]:
    def make(manifest: Manifest) -> FluxPipeline:
        bundle = SimpleNamespace(manifest=manifest, root=Path("bundle"), content_hash="0" * 64)
        return FluxPipeline(
            bundle,  # type: ignore[arg-type]
            CharacterTokenizers(),  # type: ignore[arg-type]
            engines.__getitem__,
        )

    return make


@pytest.fixture
def pipe(make_pipeline: Callable[[Manifest], FluxPipeline], manifest: Manifest) -> FluxPipeline:
    return make_pipeline(manifest)
