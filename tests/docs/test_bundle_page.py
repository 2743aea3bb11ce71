"""docs/bundle.md describes the manifest that is written, and its host is a whole one."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from fluxdeploy import FluxPipeline
from fluxdeploy.bundle import manifest, open_bundle
from fluxdeploy.host.pictures import PictureMetadata
from fluxdeploy.text import load_tokenizers
from tests.docs.pages import ROOT, code_blocks, section, tables

PAGE = ROOT / "docs" / "bundle.md"

RECORDS = [
    kind
    for kind in vars(manifest).values()
    if dataclasses.is_dataclass(kind) and kind.__module__ == manifest.__name__
]


def words(hint: Any) -> str:
    """A type hint as the page spells it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(words(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {words(arguments[0])}"
    if origin is Mapping:
        return f"object of {words(arguments[1])}"
    names = {int: "integer", float: "number", str: "string", bool: "boolean", object: "anything"}
    names[types.NoneType] = "null"
    return names.get(hint) or hint.__name__


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_the_fields_are_those_of_the_dataclass(record: type) -> None:
    (table,) = tables(section(PAGE, f"### `{record.__name__}`"))
    hints = get_type_hints(record)
    expected = [[f.name, words(hints[f.name])] for f in dataclasses.fields(record)]
    assert [row[:2] for row in table] == expected


def test_the_symbols_are_those_of_the_manifest() -> None:
    (table,) = tables(section(PAGE, "## Symbols"))
    assert sorted(row[0] for row in table) == sorted(manifest.SYMBOLS)


def test_the_metadata_is_that_of_pictures() -> None:
    (table,) = tables(section(PAGE, "## PNG metadata"))
    assert [row[0] for row in table] == [f.name for f in dataclasses.fields(PictureMetadata)]


def without_hashes(value: Any) -> Any:
    """A manifest's JSON without what another version of a tool changes."""
    if isinstance(value, dict):
        changing = {"key", "size", "sha256", "runtime_version", "tools"}
        return {k: without_hashes(v) for k, v in value.items() if k not in changing}
    if isinstance(value, list):
        return [without_hashes(entry) for entry in value]
    return value


def test_the_example_is_the_default_bundle(demo_bundle: Path) -> None:
    (text,) = code_blocks(PAGE, "json")
    manifest.from_json(text, "the example")
    example = json.loads(text)
    whole = json.loads((demo_bundle / manifest.MANIFEST_NAME).read_text())
    for part in ("components", "tokenizers"):
        assert example[part]
        whole[part] = {name: whole[part][name] for name in example[part]}
    assert without_hashes(example) == without_hashes(whole)


def test_the_layout_names_every_folder_of_a_bundle(demo_bundle: Path) -> None:
    (text,) = code_blocks(PAGE, "text")
    for path in demo_bundle.rglob("*"):
        if path.is_dir():
            assert f"{path.relative_to(demo_bundle).as_posix()}/" in text
    for name in open_bundle(demo_bundle).manifest.components:
        assert f"`{name}`" in section(PAGE, "## Layout")


@pytest.mark.parametrize(("height", "width", "steps"), [(64, 96, 3), (48, 32, 1)])
def test_a_picture_from_the_manifest_alone_is_the_pipeline_s(
    demo_bundle: Path, height: int, width: int, steps: int
) -> None:
    (code,) = code_blocks(PAGE, "python")
    host: dict[str, Any] = {}
    exec(compile(code, "bundle.md", "exec"), host)
    tokenizers = load_tokenizers(open_bundle(demo_bundle))
    prompt, length = "a red circle above a blue square", 20
    picture = host["picture"](
        demo_bundle,
        tokenizers.clip([prompt]),
        tokenizers.t5([prompt], length),
        height,
        width,
        steps,
        guidance=4.0,
        seed=11,
    )
    with FluxPipeline.from_bundle(demo_bundle) as pipe:
        (expected,) = pipe(
            prompt,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=4.0,
            max_sequence_length=length,
            seed=11,
        ).images
    assert picture.shape == (height, width, 3)
    difference = np.abs(picture.astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("terminal", [None, 0.02])
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_page_s_noise_levels_are_the_host_s(
    kind: str, terminal: float | None, dynamic: bool
) -> None:
    from fluxdeploy.sampling.schedule import sigmas

    (code,) = code_blocks(PAGE, "python")
    host: dict[str, Any] = {}
    exec(compile(code, "bundle.md", "exec"), host)
    spec = manifest.ScheduleSpec(3.0, dynamic, kind, 0.5, 1.15, 256, 4096, terminal)
    levels = host["levels"](dataclasses.asdict(spec), 5, 1024)
    np.testing.assert_allclose(levels, sigmas(spec, 5, 1024), atol=1e-6)
