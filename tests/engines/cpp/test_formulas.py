"""Noise, noise levels, positions and resizing of the C++ library are those of the Python host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest import SPACINGS
from fluxdeploy.bundle.manifest_json import to_json
from fluxdeploy.sampling.noise import TorchGenerator
from fluxdeploy.sampling.rope import joint_ids, rope_tables
from fluxdeploy.sampling.schedule import sigmas
from tests.engines.cpp.conftest import Inside, picture
from tests.engines.cpp.library import Library


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**64 - 1])
def test_noise_is_pythons(library: Library, seed: int) -> None:
    found, wanted = library.noise(seed, 10_000), TorchGenerator(seed).normal((10_000,))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_a_million_numbers_are_pythons(library: Library) -> None:
    found, wanted = library.noise(3, 1_000_000), TorchGenerator(3).normal((1_000_000,))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_tensors_of_every_size_come_from_one_generator(inside: Inside) -> None:
    """Sizes around the blocks of 16, and the number that waits for the next small tensor."""
    sizes = [1, 16, 3, 17, 31, 0, 32, 15, 2, 100]
    generator = TorchGenerator(5)
    wanted = np.concatenate([generator.normal((size,)) for size in sizes])
    found = np.frombuffer(inside("noise", 5, *sizes), np.float32)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dynamic_shifting": False, "shift": 2.7},
        {"use_dynamic_shifting": False, "shift": 1.0},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"use_dynamic_shifting": True, "time_shift_type": "exponential", "shift_terminal": 0.1},
    ],
    ids=str,
)
def test_noise_levels_are_bit_equal(
    inside: Inside, demo_bundle: Path, changes: dict[str, object]
) -> None:
    manifest = open_bundle(demo_bundle).manifest
    manifest = replace(manifest, schedule=replace(manifest.schedule, **changes))
    text = to_json(manifest).encode()
    for steps, tokens in ((2, 1), (28, 64), (50, 4096), (999, 333)):
        found = np.frombuffer(inside("sigmas", steps, tokens, given=text), np.float32)
        np.testing.assert_array_equal(found, sigmas(manifest.schedule, steps, tokens))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spaced_noise_levels_are_pythons(inside: Inside, demo_bundle: Path, spacing: str) -> None:
    manifest = open_bundle(demo_bundle).manifest
    manifest = replace(manifest, schedule=replace(manifest.schedule, spacing=spacing))
    text = to_json(manifest).encode()
    for steps in (1, 2, 28, 333):
        found = np.frombuffer(inside("sigmas", steps, 64, given=text), np.float32)
        # Exponentials and powers are those of the C library, which may differ in their last digit.
        np.testing.assert_allclose(found, sigmas(manifest.schedule, steps, 64), rtol=1.2e-7, atol=0)


def test_position_tables_are_pythons(inside: Inside, demo_bundle: Path) -> None:
    bundle = open_bundle(demo_bundle)
    text = (demo_bundle / "fluxdeploy.json").read_bytes()
    ids = joint_ids(5, 40, 30, len(bundle.manifest.rope.axes_dims))
    wanted = np.stack(rope_tables(ids, bundle.manifest.rope))
    found = np.frombuffer(inside("rope", 5, 40, 30, given=text), np.float32)
    np.testing.assert_allclose(found, wanted.ravel(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((64, 48), (64, 48)),
        ((50, 37), (128, 96)),
        ((301, 211), (64, 48)),
        ((16, 300), (48, 16)),
        ((1, 1), (16, 32)),
        ((33, 64), (32, 64)),
        # Lower, and hardly narrower: the rows first. The second is where the order turns.
        ((90, 64), (32, 96)),
        ((90, 60), (50, 40)),
        ((90, 60), (49, 40)),
        ((64, 90), (63, 32)),
    ],
)
def test_resizing_is_pillows(inside: Inside, old: tuple[int, int], new: tuple[int, int]) -> None:
    given = picture(1, *old)
    wanted = Image.fromarray(given).resize(new[::-1], Image.Resampling.LANCZOS)
    found = np.frombuffer(inside("resize", *old, *new, given=given.tobytes()), np.uint8)
    np.testing.assert_array_equal(found.reshape(*new, 3), np.asarray(wanted))
