"""The VAE in tiles in the C++ library: when, and that its numbers are Python's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from PIL import Image

from engines.base import Array
from fluxdeploy.bundle.manifest import Manifest
from fluxdeploy.errors import TiledWarning
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.host.tiles import run_in_tiles
from fluxdeploy.machine import read_memory
from tests.conftest import BundleFactory
from tests.engines.cpp.conftest import Inside, picture
from tests.engines.cpp.graphs import changed_bundle, make_graph, weights, with_graph
from tests.engines.cpp.library import Library

FACTOR = 4


def vae(component: str, inputs: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """What the program inside.cpp has for a VAE: it takes away the mean of all that it is given."""
    (array,) = inputs.values()
    values = array[:, :3]
    values = values - values.mean(axis=(2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
    if component == "vae_decoder":
        return {"images": values.repeat(FACTOR, axis=2).repeat(FACTOR, axis=3)}
    small = values[:, :, ::FACTOR, ::FACTOR]
    return {"logvar": -small, "mean": small}


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
@pytest.mark.parametrize(("height", "width"), [(48, 150), (97, 49), (101, 120), (49, 48)])
def test_a_picture_of_tiles_is_pythons(
    inside: Inside, component: str, height: int, width: int
) -> None:
    unit, channels = (1, 5) if component == "vae_decoder" else (FACTOR, 3)
    random = np.random.default_rng(height)
    array = random.standard_normal((1, channels, height * unit, width * unit)).astype(np.float32)
    array += np.linspace(0, 3, width * unit, dtype=np.float32)
    wanted = run_in_tiles(vae, component, array, 48, FACTOR)
    answer = inside("tiles", component, 48, FACTOR, *array.shape[1:], given=array.tobytes())
    found = np.frombuffer(answer, np.float32)
    expected = np.concatenate([wanted[name].reshape(-1) for name in sorted(wanted)])
    assert np.abs(found - expected).max() < 1e-5
    alone = np.concatenate([x.reshape(-1) for _, x in sorted(vae(component, {"x": array}).items())])
    assert np.abs(found - alone).max() > 1e-3, "tiles are seen in what looks at all"


def test_the_free_memory_is_pythons(inside: Inside) -> None:
    wanted = read_memory().available
    assert wanted is not None
    assert abs(int(inside("memory")) / wanted - 1) < 0.5


def _large(root: Path, manifest: Manifest) -> Manifest:
    """A VAE that is soon run, and takes more memory than any machine has."""
    channels, side = manifest.latents.channels, manifest.latents.spatial_factor
    records = manifest.components
    sizes = np.array([1, 1, side, side], np.float32)
    decoder = make_graph(
        [
            helper.make_node("Conv", ["latents", "weights"], ["colours"]),
            helper.make_node("InstanceNormalization", ["colours", "scale", "shift"], ["normed"]),
            helper.make_node("Resize", ["normed", "", "sizes"], ["images"], mode="nearest"),
        ],
        {"latents": ("B", channels, "h", "w")},
        {"images": ("B", 3, "H", "W")},
        {
            "weights": weights(1, 3, channels, 1, 1),
            "scale": np.full(3, 0.3, np.float32),
            "shift": np.zeros(3, np.float32),
            "sizes": sizes,
        },
    )
    latents = ("B", channels, "h", "w")
    encoder = make_graph(
        [
            helper.make_node("Conv", ["images", "weights"], ["mean"], strides=[side, side]),
            helper.make_node("Neg", ["mean"], ["logvar"]),
        ],
        {"images": ("B", 3, "H", "W")},
        {"mean": latents, "logvar": latents},
        {"weights": 9 * weights(2, channels, 3, side, side)},
    )
    own = {
        "vae_decoder": with_graph(root, records["vae_decoder"], "decoder", decoder),
        "vae_encoder": with_graph(root, records["vae_encoder"], "encoder", encoder),
    }
    cost = {"vae_bytes_per_pixel": {"vae_decoder": 1 << 40, "vae_encoder": 1 << 39}}
    return replace(manifest, components={**records, **own}, provenance=cost)


def test_a_picture_that_memory_does_not_hold_is_made_as_by_python(
    library: Library, bundle: BundleFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoded and decoded in tiles, in the same words."""
    # Not even a tile fits.
    monkeypatch.setattr("fluxdeploy.host.pipeline.check_memory", lambda *_: None)
    root = changed_bundle(bundle("dev"), tmp_path / "bundle", _large)
    image = picture(1, 60, 100)
    call: dict[str, Any] = {"prompt": "a fox", "height": 768, "width": 784, "seed": 1}
    call |= {"num_inference_steps": 2, "strength": 0.5, "max_sequence_length": 16}
    python = FluxPipeline.from_bundle(root, "onnxruntime")
    with python, pytest.warns(TiledWarning) as warned:
        wanted = np.asarray(python(**call, image=Image.fromarray(image)).images[0])
    cpp = library.pipeline(root)
    found, notices, _ = cpp(**call, image=[image])
    cpp.close()
    assert notices == [str(each.message) for each in warned]
    assert len(notices) == 2
    assert np.abs(found[0].astype(int) - wanted).max() <= 1
    assert found.std() > 20
