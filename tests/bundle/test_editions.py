"""A bundle for several runtimes: its editions, apart and together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest import FileRecord, Manifest, SkipRecord
from fluxdeploy.bundle.manifest_json import from_json, to_json
from fluxdeploy.errors import BundleError
from tests.support.editions import for_runtime, with_editions
from tests.support.small_bundle import small_files, write_small_bundle

SKIPS = (SkipRecord("euler", 28, (5,), 1, 1024, 1024, 30.0, 33.5, 8),)


def test_a_bundle_with_one_edition_is_written_as_before(manifest: Manifest) -> None:
    assert manifest.each() == (manifest,)
    assert "editions" not in json.loads(to_json(manifest))
    assert manifest.with_each(manifest.each()) == manifest


def test_editions_are_read_as_they_were_written(manifest: Manifest) -> None:
    whole = with_editions(manifest, "onnxruntime", "openvino", "native")
    read = from_json(to_json(whole), "x")
    assert read == whole
    assert [each.runtime for each in read.each()] == ["onnxruntime", "openvino", "native"]
    assert all(not each.editions for each in read.each())


def test_an_edition_has_its_own_fields_and_shares_the_others(manifest: Manifest) -> None:
    first = for_runtime(manifest, "onnxruntime")
    other = replace(
        for_runtime(manifest, "openvino"),
        defaults=replace(manifest.defaults, width=512),
        quality=replace(manifest.quality, min_psnr=33.0),
        provenance={"requested_precision": "int8"},
        skips=SKIPS,
    )
    whole = first.with_each([first, other])
    assert whole.each() == (first, other)
    turned = first.with_each([other, first])
    assert turned.each() == (other, first)
    assert (turned.defaults.width, turned.skips) == (512, SKIPS)


def test_files_of_all_editions_belong_to_the_bundle(manifest: Manifest) -> None:
    whole = with_editions(manifest, "onnxruntime", "openvino")
    extra = FileRecord("onnx/t5.openvino.onnx", 3, "0" * 64)
    components = {
        name: replace(record, files=(*record.files, extra))
        for name, record in whole.editions[0].components.items()
    }
    whole = replace(whole, editions=(replace(whole.editions[0], components=components),))
    places = [place for place, record in whole.files() if record == extra]
    assert places == [f"editions[0].components.{name}.files[3]" for name in components]
    assert set(whole.stems()) == {"t5", "transformer", "t5.openvino", "transformer.openvino"}


def test_opening_checks_the_files_of_every_edition(tmp_path: Path, manifest: Manifest) -> None:
    files = {**small_files(), "onnx/more.onnx": b"more"}
    whole = with_editions(manifest, "onnxruntime", "openvino")
    record = replace(
        whole.editions[0].components["t5"],
        files=(
            *whole.components["t5"].files,
            FileRecord(
                "onnx/more.onnx",
                4,
                "187897ce0afcf20b50ba2b37dca84a951b7046f29ed5ab94f010619f69d6e189",
            ),
        ),
    )
    edition = replace(whole.editions[0], components={**whole.editions[0].components, "t5": record})
    root = write_small_bundle(tmp_path / "b", files, replace(whole, editions=(edition,)))
    bundle = open_bundle(root)
    assert [each.manifest.runtime for each in bundle.editions] == ["onnxruntime", "openvino"]
    assert {each.content_hash for each in bundle.editions} == {bundle.content_hash}
    assert bundle.editions[1].read(record.files[-1]) == b"more"
    (root / "onnx/more.onnx").write_bytes(b"MORE")
    with pytest.raises(BundleError, match=r"more\.onnx was changed"):
        open_bundle(root)


def _set(*path: str | int) -> Callable[[Any, Any], None]:
    def change(plain: Any, value: Any) -> None:
        for name in path[:-1]:
            plain = plain[name]
        plain[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("editions",), None, "editions must be a list, not null"),
        (("editions", 0, "runtime"), "x", "editions[0].runtime is not a known field"),
        (("editions", 0, "components"), {}, "editions[0].components has no transformer"),
        (
            ("editions", 0, "components", "transformer", "engines", 0, "runtime"),
            "onnxruntime",
            "editions[0].components.transformer.engines[0].runtime is 'onnxruntime', as that of an "
            "earlier edition",
        ),
        (
            ("editions", 0, "components", "t5", "engines"),
            [],
            "editions[0].components.t5.engines is empty",
        ),
        (
            ("editions", 0, "components", "t5", "files", 0, "path"),
            "../x",
            "editions[0].components.t5.files[0].path is '../x', which leaves the bundle",
        ),
        (
            ("editions", 0, "components", "t5", "files", 0, "sha256"),
            "0" * 64,
            "gives 'onnx/t5.onnx' another size or hash than an earlier record",
        ),
        (
            ("editions", 0, "components", "t5", "key"),
            "a\u202eb",
            "editions[0].components.t5.key is 'a\\u202eb', which holds a control character",
        ),
        (("editions", 0, "defaults", "width"), 1000, "editions[0].defaults.width is 1000"),
        (("editions", 0, "quality", "min_ssim"), 2, "editions[0].quality.min_ssim is 2"),
        (("components",), {}, "components has no transformer with an engine"),
    ],
)
def test_editions_that_cannot_be_run_are_refused(
    manifest: Manifest, path: tuple[str | int, ...], value: object, words: str
) -> None:
    plain = json.loads(to_json(with_editions(manifest, "onnxruntime", "openvino")))
    _set(*path)(plain, value)
    with pytest.raises(BundleError) as refused:
        from_json(json.dumps(plain), "x")
    assert words in str(refused.value)


def test_more_editions_than_runtimes_there_are_is_refused(manifest: Manifest) -> None:
    plain = json.loads(to_json(with_editions(manifest, "onnxruntime", "openvino")))
    plain["editions"] *= 65
    with pytest.raises(BundleError, match="editions has 65 entries; 64 are the most"):
        from_json(json.dumps(plain), "x")


def test_the_provenance_of_an_edition_is_free_text(manifest: Manifest) -> None:
    whole = with_editions(manifest, "onnxruntime", "openvino")
    edition = replace(whole.editions[0], provenance={"said": "a\u202eb"})
    whole = replace(whole, editions=(edition,))
    assert from_json(to_json(whole), "x") == whole
