"""Which steps are skipped is found without the transformer, and written without harm."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest import SkipRecord
from fluxdeploy.errors import BundleError
from fluxdeploy.verify.skips import skip_paths, write_skips

RECORD = SkipRecord("euler", 4, (1, 3), 1, 128, 128, 34.0, 35.5, 4)


def test_steps_go_first_where_the_velocity_is_extrapolated_best() -> None:
    sigmas = np.linspace(1, 0, 9, dtype=np.float32)
    # A line until the last third, and a jump there.
    velocities = np.stack([sigmas[:-1], sigmas[:-1]], axis=1)
    velocities[6] += 5
    path = skip_paths([velocities], sigmas, 1)
    assert [len(skipped) for skipped in path] == list(range(8))
    assert all(6 not in skipped for skipped in path[:4])
    assert all(0 not in skipped for skipped in path)
    assert all(set(a) < set(b) for a, b in itertools.pairwise(path))


def test_a_record_takes_the_place_of_one_for_the_same_calls(
    demo_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(demo_bundle, folder)
    opened = open_bundle(folder)
    write_skips(opened, RECORD)
    again = open_bundle(folder)
    assert dataclasses.replace(again.manifest, skips=()) == opened.manifest
    assert again.manifest.skips == (RECORD,)
    other = dataclasses.replace(RECORD, steps=(2,))
    write_skips(again, other)
    assert open_bundle(folder).manifest.skips == (other,)
    # The one that was opened first is not there any more.
    with pytest.raises(BundleError, match="open it again"):
        write_skips(opened, RECORD)
