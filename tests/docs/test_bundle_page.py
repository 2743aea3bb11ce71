"""docs/bundle.md describes the manifest that is written, and its host is a whole one."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from PIL import Image

from fluxdeploy import FluxPipeline
from fluxdeploy.bundle import manifest, open_bundle
from fluxdeploy.bundle.manifest_json import from_json
from fluxdeploy.host.options import CallOptions
from fluxdeploy.host.pictures import PictureMetadata
from fluxdeploy.sampling.noise import TorchGenerator
from fluxdeploy.sampling.rope import rope_tables
from fluxdeploy.sampling.schedule import sigmas
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
    from_json(text, "the example")
    example = json.loads(text)
    whole = json.loads((demo_bundle / manifest.MANIFEST_NAME).read_text())
    for part in ("components", "tokenizers"):
        assert example[part]
        whole[part] = {name: whole[part][name] for name in example[part]}
    # Its last digits are a machine's own.
    for part in ("matrix", "bias"):
        np.testing.assert_allclose(
            example["preview"][part], whole["preview"].pop(part), atol=1e-3, rtol=0.01
        )
        del example["preview"][part]
    assert without_hashes(example) == without_hashes(whole)


def test_the_layout_names_every_folder_of_a_bundle(demo_bundle: Path) -> None:
    (text,) = code_blocks(PAGE, "text")
    for path in demo_bundle.rglob("*"):
        if path.is_dir():
            assert f"{path.relative_to(demo_bundle).as_posix()}/" in text
    for name in open_bundle(demo_bundle).manifest.components:
        assert f"`{name}`" in section(PAGE, "## Layout")


@pytest.fixture(scope="module")
def host() -> dict[str, Any]:
    """What the page's Python defines: a host that imports nothing of this repository."""
    (code,) = code_blocks(PAGE, "python")
    names: dict[str, Any] = {}
    exec(compile(code, "bundle.md", "exec"), names)
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) == {
        "PIL",
        "json",
        "math",
        "numpy",
        "onnxruntime",
        "pathlib",
    }
    return names


@dataclasses.dataclass(frozen=True)
class Call:
    """One call, of the page's host and of the pipeline's, with a picture of this size."""

    prompts: tuple[str, ...]
    height: int
    width: int
    steps: int
    negative: tuple[str, ...] | None = None
    true_cfg_scale: float = 1.0
    count: int = 1
    images: int = 0
    masks: int = 0
    strength: float = 0.6
    text: int = 20


def drawing(seed: int, height: int, width: int) -> Image.Image:
    """A smooth picture with colours, of a size that no call has."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width + 9, height + 30), Image.Resampling.BICUBIC)


def mask(seed: int, height: int, width: int) -> Image.Image:
    """A mask with soft edges, of a size that no call has; every second one is transparent."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6), dtype=np.uint8)
    grey = Image.fromarray(small).resize((width + 40, height + 3), Image.Resampling.BICUBIC)
    return Image.merge("LA", (grey, grey)) if seed % 2 else grey


ONE = "a red circle above a blue square"
TWO = (ONE, "a yellow star on a black background")
CALLS = {
    "one picture": Call((ONE,), 64, 96, 3),
    "one step, few tokens": Call((ONE,), 48, 32, 1, text=7),
    "several pictures": Call(TWO, 32, 64, 2, count=2),
    "the same prompt twice": Call((ONE, ONE), 32, 32, 2),
    "true guidance": Call((ONE,), 64, 48, 3, ("a blue square",), 2.5),
    "true guidance of several": Call(TWO, 48, 64, 3, ("a blue ring", "a heart"), 1.5, 2),
    "true guidance that is off": Call((ONE,), 32, 32, 2, ("a blue square",), 1.0),
    "image to image": Call((ONE,), 64, 96, 5, images=1),
    "image to image, all steps": Call((ONE,), 48, 48, 3, images=1, strength=1.0),
    "image to image, guided": Call(TWO, 48, 64, 7, TWO[::-1], 2.0, 2, images=1, strength=0.35),
    "images in turn": Call(TWO, 32, 64, 3, count=2, images=2, strength=0.5),
    "inpainting": Call((ONE,), 64, 96, 5, images=1, masks=1, strength=0.8),
    "inpainting, guided": Call(TWO, 48, 64, 3, TWO[::-1], 2.0, images=1, masks=2, strength=1.0),
}


@pytest.fixture(scope="module")
def pipe(demo_bundle: Path) -> Iterator[FluxPipeline]:
    with FluxPipeline.from_bundle(demo_bundle) as pipe:
        yield pipe


@pytest.mark.parametrize("name", CALLS)
def test_a_picture_from_the_manifest_alone_is_the_pipeline_s(
    demo_bundle: Path, pipe: FluxPipeline, host: dict[str, Any], name: str
) -> None:
    call = CALLS[name]
    tokenizers = load_tokenizers(open_bundle(demo_bundle))

    def ids(prompts: tuple[str, ...]) -> tuple[Any, Any]:
        return tokenizers.clip(prompts), tokenizers.t5(prompts, call.text)

    images = [drawing(index, call.height, call.width) for index in range(call.images)]
    masks = [mask(index, call.height, call.width) for index in range(call.masks)]
    made = host["pictures"](
        demo_bundle,
        *ids(call.prompts),
        call.height,
        call.width,
        call.steps,
        guidance=4.0,
        seed=2**40 + 11,
        count=call.count,
        negative=None if call.negative is None else ids(call.negative),
        true_cfg_scale=call.true_cfg_scale,
        images=images,
        masks=masks,
        strength=call.strength,
    )
    task = {"image": images, "strength": call.strength} if images else {}
    if masks:
        task["mask_image"] = masks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is off
        expected = pipe(
            list(call.prompts),
            negative_prompt=None if call.negative is None else list(call.negative),
            true_cfg_scale=call.true_cfg_scale,
            height=call.height,
            width=call.width,
            num_inference_steps=call.steps,
            guidance_scale=4.0,
            num_images_per_prompt=call.count,
            max_sequence_length=call.text,
            seed=2**40 + 11,
            **task,
        ).images
    assert made.shape == (len(call.prompts) * call.count, call.height, call.width, 3)
    difference = np.abs(made.astype(int) - np.stack([np.asarray(i) for i in expected]).astype(int))
    assert difference.max() <= 1
    # An engine may round otherwise for another batch; what is drawn may not change.
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("terminal", [None, 0.0, 0.02])
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_page_s_noise_levels_are_the_host_s(
    host: dict[str, Any], kind: str, terminal: float | None, dynamic: bool
) -> None:
    spec = manifest.ScheduleSpec(3.0, dynamic, kind, 0.5, 1.15, 256, 4096, terminal)
    for steps in (2, 5, 28):
        levels = host["levels"](dataclasses.asdict(spec), steps, 1056)
        np.testing.assert_array_equal(levels, sigmas(spec, steps, 1056), strict=True)


@pytest.mark.parametrize("axes", [(8, 12, 12), (16, 56, 56)])
def test_the_page_s_position_tables_are_the_host_s(
    host: dict[str, Any], demo_bundle: Path, axes: tuple[int, ...]
) -> None:
    spec = manifest.RopeSpec(axes, 10000.0)
    own = host["rope"](dataclasses.asdict(spec), 5, 3, 7)
    ids = np.zeros((5 + 3 * 7, 3))
    ids[5:, 1:] = [(row, column) for row in range(3) for column in range(7)]
    for said, table in zip(own, rope_tables(ids, spec), strict=True):
        np.testing.assert_array_equal(said, table, strict=True)


def test_the_page_s_random_numbers_are_the_host_s(host: dict[str, Any]) -> None:
    said, own = host["Generator"](2**33 + 5), TorchGenerator(2**33 + 5)
    for size in (16, 3, 64, 5, 17, 1, 40, 15, 2, 31):
        np.testing.assert_array_equal(said.normal((size,)), own.normal((size,)), strict=True)


def test_the_defaults_are_those_of_the_pipeline() -> None:
    (table,) = tables(section(PAGE, "### Arguments and their defaults"))
    parameters = inspect.signature(FluxPipeline.__call__).parameters
    how = {
        "self",
        "positional",
        "others",
        *(field.name for field in dataclasses.fields(CallOptions)),
    }
    assert {row[0] for row in table} == set(parameters) - how
    for name, said, _ in table:
        default = parameters[name].default
        if said == "required":
            assert default is inspect.Parameter.empty, name
        elif said == f"defaults.{name}":
            assert default is None, name
            assert name in {field.name for field in dataclasses.fields(manifest.Defaults)}
        else:
            assert said == ("none" if default is None else repr(default)), name


def test_the_limits_are_those_of_engines_that_are_not_built_for_sizes(demo_bundle: Path) -> None:
    (table,) = tables(section(PAGE, "### Limits"))
    said = {symbol: (int(least), int(most)) for symbol, least, most in table}
    found: dict[str, tuple[int, int]] = {}
    for component in open_bundle(demo_bundle).manifest.components.values():
        for engine in component.engines:
            for symbol, sizes in engine.dimensions.items():
                assert found.setdefault(symbol, (sizes.min, sizes.max)) == (sizes.min, sizes.max)
    assert said == found
