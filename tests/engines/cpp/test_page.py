"""The shell lines of docs/cpp.md do what the page says."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from fluxdeploy.host.pictures import read_metadata
from tests.docs.pages import code_blocks
from tests.engines.cpp.conftest import ROOT, run

LINES = [
    line
    for block in code_blocks(ROOT / "docs" / "cpp.md", "sh")
    for line in block.splitlines()
    # Of the whole tree; Conan is none of the tests' packages.
    if not line.startswith(("make", "conan"))
]


def test_the_lines_of_the_page_build_install_and_draw(
    built: Path, demo_bundle: Path, tmp_path: Path
) -> None:
    """With this build in the place of the page's, which is as it was configured."""
    (tmp_path / "bundle").symlink_to(demo_bundle)
    cache = (built / "CMakeCache.txt").read_text()
    (headers,) = re.findall(r"^FLUXDEPLOY_ONNXRUNTIME_INCLUDE:\w+=(.*)$", cache, re.MULTILINE)
    places = {
        "/usr/include/onnxruntime": headers,
        "/usr/local": str(tmp_path / "prefix"),
        "build/cpp": str(built),
        "engines/cpp": str(ROOT / "engines" / "cpp"),
    }
    for line in LINES:
        pattern = "|".join(map(re.escape, places))
        run("sh", "-ec", re.sub(pattern, lambda found: places[found[0]], line), cwd=tmp_path)
    assert read_metadata(tmp_path / "image.png").prompt == "a red circle above a blue square"
    with Image.open(tmp_path / "image.png") as image:
        image.load()
    for name in ("bin/fluxdeploy-cpp", "include/fluxdeploy/fluxdeploy.h"):
        assert (tmp_path / "prefix" / name).is_file()
