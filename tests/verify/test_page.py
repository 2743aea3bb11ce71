"""The page of a verification: it holds all that it shows, and text from outside stays text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.golden import Deviation
from fluxdeploy.bundle.manifest import Manifest, QualityRecord
from fluxdeploy.bundle.recipe import NOTHING, Promise, Quality, Recipe, RecipeRecord
from fluxdeploy.errors import UsageError
from fluxdeploy.verify.page import check_page, write_page
from fluxdeploy.verify.pictures import PictureReport, PicturesReport
from fluxdeploy.verify.verify import ComponentReport, VerifyReport
from tests.support.small_bundle import small_files, small_manifest

PROMPT = 'a <script>alert("x")</script> & a cat'


@pytest.fixture
def small() -> Manifest:
    manifest = small_manifest(small_files())
    recipe = RecipeRecord(
        "fp8",
        Promise(psnr=22.0, ssim=0.8),
        Recipe({"transformer_blocks.0.attn.to_q": NOTHING}, {}),
        Quality(0.9, 19.5, 0.7),
        Quality(0.95, 24.1, 0.9),
        0.07,
        5000,
    )
    transformer = replace(manifest.components["t5"], precision="fp8", recipe=recipe)
    return replace(manifest, components={**manifest.components, "transformer": transformer})


def report(passed: bool) -> VerifyReport:
    random = np.random.RandomState(0)
    drawn, expected = (random.rand(16, 24, 3).astype(np.float32) for _ in range(2))
    pictures = PicturesReport(
        16,
        24,
        4,
        QualityRecord(22.0, 0.8, 12.0),
        (PictureReport(PROMPT, 3, 24.5, 0.91, 12.0, None, None),),
        {"transformer": 1.25},
        (drawn,),
        (expected,),
    )
    row = ComponentReport("transformer", "fp8", True, Deviation(0.1, 0.98, 30.0), passed, 5 << 20)
    return VerifyReport("ab" * 32, (row,), pictures, None)


@pytest.mark.parametrize("passed", [True, False])
def test_a_page_holds_all_that_it_shows(tmp_path: Path, small: Manifest, passed: bool) -> None:
    bundle: Any = SimpleNamespace(root=tmp_path / "my <b>bundle", manifest=small)
    path = tmp_path / "page.html"
    write_page(report(passed), bundle, path)
    page = path.read_text("utf-8")
    assert "a &lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; a cat" in page
    assert "<script" not in page
    assert "my &lt;b&gt;bundle" in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 3  # PyTorch's, the bundle's and the difference
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|url\(", page)
    for words in (
        "24.5 dB",
        "SSIM 0.910",
        "5.0 MiB",
        "1.25",
        "left in bf16: transformer_blocks.0.attn.to_q",
        "(7% of the weights, 0.0 MiB more)",
    ):
        assert words in page, words
    assert ("FAILED" in page) is not passed


def test_a_page_that_cannot_be_is_told_before_the_work(tmp_path: Path) -> None:
    check_page(tmp_path / "page.html")
    for path in (tmp_path, tmp_path / "absent/page.html"):
        with pytest.raises(UsageError, match="cannot be written"):
            check_page(path)
