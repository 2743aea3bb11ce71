"""The content key tells every change that makes other files, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from engines import runtimes
from exporters.checkpoint import Checkpoint
from exporters.quality.layers import Layers
from fluxdeploy.build import keys
from fluxdeploy.build.checkpoint import CheckpointHashes, find_checkpoint
from fluxdeploy.build.keys import content_key
from fluxdeploy.build.resolve import BuildRequest, BuildSpec, ComponentSpec, resolve
from fluxdeploy.bundle.recipe import NOTHING, Recipe
from fluxdeploy.kernels import AttentionKernels
from fluxdeploy.precision import Quantization

FP8 = Quantization("fp8")
SPARED = Layers(FP8, Recipe({"a": NOTHING}))

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Given:
    """What a key is made of."""

    component: ComponentSpec
    spec: BuildSpec
    hashes: CheckpointHashes
    layers: Layers | None = None

    def key(self) -> str:
        return content_key(self.component, self.spec, self.hashes, self.layers)

    def with_component(self, **changes: Any) -> Given:
        return dataclasses.replace(self, component=dataclasses.replace(self.component, **changes))

    def with_export(self, **changes: Any) -> Given:
        return self.with_component(export=dataclasses.replace(self.component.export, **changes))

    def with_engine(self, **changes: Any) -> Given:
        (engine,) = self.component.engines
        return self.with_component(engines=(dataclasses.replace(engine, **changes),))

    def with_request(self, **changes: Any) -> Given:
        request = dataclasses.replace(self.spec.request, **changes)
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, request=request))

    def with_checkpoint(self, **known: Any) -> Given:
        """A checkpoint some of whose properties are others."""
        changed = dataclasses.replace(self.spec.checkpoint)
        for name in ("transformer", "vae", "schedule"):
            changed.__dict__[name] = known.get(name, getattr(self.spec.checkpoint, name))
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, checkpoint=changed))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return find_checkpoint(None)


@pytest.fixture(scope="module")
def given(checkpoint: Checkpoint) -> Given:
    (runtime,) = runtimes("onnxruntime")
    spec = resolve(BuildRequest(), checkpoint, runtime, ("cpu",))
    files = {file.resolve(): str(file) for file in checkpoint.files}
    return Given(spec.component("transformer"), spec, CheckpointHashes(files, "digest"))


def other_weights(given: Given) -> Given:
    files = {file: f"{known}!" for file, known in given.hashes.files.items()}
    return dataclasses.replace(given, hashes=CheckpointHashes(files, "digest"))


def other_name(given: Given) -> Given:
    """The same bytes in a file of another name, which the bundle's file would have."""
    moved = {file: file.with_name(f"other-{file.name}") for file in given.hashes.files}
    placements = tuple(
        dataclasses.replace(
            p, stored=dataclasses.replace(p.stored, file=moved[p.stored.file.resolve()])
        )
        for p in given.component.export.placements
    )
    files = {**given.hashes.files, **{moved[f]: known for f, known in given.hashes.files.items()}}
    changed = given.with_export(placements=placements)
    return dataclasses.replace(changed, hashes=CheckpointHashes(files, "digest"))


def other_config(given: Given) -> Given:
    checkpoint = given.spec.checkpoint
    clip = checkpoint.parts["clip"]
    parts = {
        **checkpoint.parts,
        "clip": dataclasses.replace(clip, given={**clip.config, "layer_norm_eps": 1e-3}),
    }
    changed = dataclasses.replace(checkpoint, parts=parts)
    return dataclasses.replace(given, spec=dataclasses.replace(given.spec, checkpoint=changed))


def other_network(given: Given) -> Given:
    network = given.spec.checkpoint.transformer
    return given.with_checkpoint(transformer=dataclasses.replace(network, mlp_width=96))


def other_latents(given: Given) -> Given:
    vae = given.spec.checkpoint.vae
    return given.with_checkpoint(vae=dataclasses.replace(vae, shift_factor=0.5))


def other_schedule(given: Given) -> Given:
    schedule = given.spec.checkpoint.schedule
    return given.with_checkpoint(schedule=dataclasses.replace(schedule, shift=2.0))


CHANGES: dict[str, Callable[[Given], Given]] = {
    "component": lambda given: given.with_export(
        component=dataclasses.replace(given.component.export.component, name="another")
    ),
    "weights": other_weights,
    "name of a weight file": other_name,
    "config of a part": other_config,
    "network": other_network,
    "latents": other_latents,
    "schedule": other_schedule,
    "precision": lambda given: given.with_export(precision="fp16"),
    "compute": lambda given: given.with_export(compute="fp16"),
    "kernels": lambda given: given.with_component(kernels=AttentionKernels.PLAIN),
    "a quantization": lambda given: dataclasses.replace(given, layers=Layers(FP8)),
    "a recipe": lambda given: dataclasses.replace(
        given, layers=Layers(FP8, Recipe({"a": NOTHING}))
    ),
    "runtime": lambda given: given.with_engine(runtime="openvino"),
    "runtime's version": lambda given: given.with_engine(runtime_version="0.1"),
    "target": lambda given: given.with_engine(target="cuda"),
    "dimensions": lambda given: given.with_engine(dimensions={}),
    "profiles": lambda given: given.with_component(profiles=given.component.profiles * 2),
    "limit of memory": lambda given: given.with_request(memory_limit=1 << 20),
    "weight streaming": lambda given: given.with_request(weight_streaming=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_makes_other_files_makes_another_key(given: Given, change: str) -> None:
    assert CHANGES[change](given).key() != given.key()


@pytest.mark.parametrize("known", ["tool_versions", "sources_digest"])
def test_other_tools_and_other_sources_make_another_key(
    given: Given, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    before = given.key()
    monkeypatch.setattr(keys, known, lambda: "another")
    assert given.key() != before


def test_what_does_not_make_other_files_leaves_the_key(given: Given) -> None:
    assert given.with_request(checkpoint="another name").key() == given.key()
    assert given.with_checkpoint().key() == given.key()


def test_the_sources_are_those_that_make_a_bundle() -> None:
    sources = {path.relative_to(ROOT).as_posix() for path in keys._sources()}
    for path in (
        "exporters/export.py",
        "exporters/graph/fuse.py",
        "exporters/check/golden.py",
        "engines/tensorrt/build.py",
        "fluxdeploy/sampling/schedule.py",
        "fluxdeploy/build/components.py",
        "fluxdeploy/precision.py",
    ):
        assert path in sources
    assert not any(path.startswith(("exporters/training/", "fluxdeploy/host/")) for path in sources)
