"""What a manifest says of the checkpoint that its bundle was made from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fluxdeploy.build.describe import checkpoint_origin


@pytest.mark.parametrize(
    ("name", "revision", "expected"),
    [
        ("acme/flux", "c" * 40, {"name": "acme/flux", "revision": "c" * 40}),
        ("acme/flux@v1.1", "d" * 40, {"name": "acme/flux", "revision": "d" * 40}),
        ("acme/flux@refs/pr/3", "e" * 40, {"name": "acme/flux", "revision": "e" * 40}),
        ("/models/mine", None, {"name": "mine"}),
        ("mine/flux1-dev.safetensors", None, {"name": "mine"}),
        ("demo:dev", None, {"name": "demo:dev"}),
    ],
)
def test_the_commit_of_a_hub_repository_is_recorded(
    name: str, revision: str | None, expected: dict[str, str]
) -> None:
    root = Path("/models/mine")
    checkpoint: Any = SimpleNamespace(root=root, layout="bfl", rounded={}, revision=revision)
    hashes: Any = SimpleNamespace(digest="0" * 64)
    found = checkpoint_origin(name, checkpoint, hashes)
    assert found == expected | {"layout": "bfl", "sha256": "0" * 64}
    assert checkpoint_origin(name, checkpoint, None) == expected | {"layout": "bfl"}
