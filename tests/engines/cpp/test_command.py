"""`fluxdeploy-cpp` behaves as `fluxdeploy generate`: options, files, errors."""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fluxdeploy.cli.generate import command as generate
from fluxdeploy.errors import UsageError
from fluxdeploy.host.pictures import read_metadata
from fluxdeploy.host.pipeline import FluxPipeline
from tests.engines.cpp.conftest import picture
from tests.engines.cpp.library import CODES, Failure, Library, Pipeline

T5_WIDTH, CLIP_WIDTH = 128, 96
NAN = np.full((1, CLIP_WIDTH), np.nan, np.float32)
SMALL = ["--width", "64", "--height", "48", "--steps", "2", "--seed", "3"]


def call(built: Path, *words: object) -> subprocess.CompletedProcess[str]:
    program = [str(built / "fluxdeploy-cpp"), *map(str, words)]
    return subprocess.run(program, capture_output=True, text=True, check=False)


def test_the_options_are_those_of_generate(built: Path) -> None:
    said = call(built, "--help").stdout
    own = {option for parameter in generate.params for option in parameter.opts}
    missing = {"--sheet", "--bundle", "prompts", "--prompts", "--batch", "--lora"}
    missing |= {"--auto-resize", "--grid", "--preview", "--ray", "--workers"}
    missing |= {"--redux-image", "--redux-scale", "--redux-pooled-scale"}
    missing |= {"--ip-adapter-image", "--negative-ip-adapter-image", "--ip-adapter-scale"}
    assert {option for option in own if option not in said} == missing


@pytest.mark.parametrize("seeds", ["3", "5, 6"])
def test_pictures_and_their_metadata_are_generates(
    built: Path, demo_bundle: Path, tmp_path: Path, seeds: str
) -> None:
    for name, seed in (("image", 1), ("mask", 2)):
        Image.fromarray(picture(seed, 60, 70)).save(tmp_path / f"{name}.png")
    options = [
        *(*SMALL, "--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png"),
        *("--strength", "0.9", "--num-images", "2", "--guidance", "2.5"),
        *("--negative-prompt", "grün", "--true-cfg-scale", "2", "--sampler", "ab2", "--skip", "1"),
        *("--prompt-2", "a cat", "--negative-prompt-2", "", "--seed", seeds),
    ]
    words = [*map(str, options), "a red ring", "狐狸"]
    folder = tmp_path / "python"
    folder.mkdir()
    python = [*words, "--bundle", str(demo_bundle), "--out", str(folder / "x.png"), "--json"]
    wanted = json.loads(CliRunner().invoke(generate, python, catch_exceptions=False).stdout)
    done = call(built, demo_bundle, *words, "-o", tmp_path / "x.png", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    for name in ("prompts", "seed", "seeds", "width", "height", "steps", "warnings", "sheet"):
        assert found[name] == wanted[name]
    assert len(found["paths"]) == 4 * len(seeds.split(","))
    for own, other in zip(found["paths"], wanted["paths"], strict=True):
        assert Path(own).name == Path(other).name
        assert read_metadata(Path(own)) == read_metadata(Path(other))
        pixels = [np.asarray(Image.open(path)).astype(int) for path in (own, other)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1


@pytest.mark.parametrize(
    "options", [["--mask", "mask.png", "--mask-crop", "4"], ["--outpaint", "0,4,10,0"]]
)
def test_parts_and_margins_are_generates(
    built: Path, demo_bundle: Path, tmp_path: Path, options: list[str]
) -> None:
    mask = np.zeros((60, 70, 3), np.uint8)
    mask[20:33, 8:30] = 255
    Image.fromarray(picture(1, 60, 70)).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = [str(tmp_path / word) if word == "mask.png" else word for word in options]
    words = ["a red ring", "--steps", "2", "--seed", "3", "--image", str(tmp_path / "image.png")]
    words += [*options, "--strength", "1"]
    wanted, found = tmp_path / "python.png", tmp_path / "cpp.png"
    python = [*words, "--bundle", str(demo_bundle), "--out", str(wanted)]
    CliRunner().invoke(generate, python, catch_exceptions=False)
    done = call(built, demo_bundle, *words, "-o", found)
    assert done.returncode == 0, done.stderr
    assert read_metadata(found) == read_metadata(wanted)
    pixels = [np.asarray(Image.open(path)).astype(int) for path in (found, wanted)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


@pytest.mark.parametrize("seeds", ["x", "-5", "1,,2", "1,18446744073709551616", "1.5"])
def test_seeds_that_are_none_are_refused_as_by_generate(
    built: Path, demo_bundle: Path, seeds: str
) -> None:
    done = call(built, demo_bundle, "a", "--seed", seeds)
    python = ["a", "--bundle", str(demo_bundle), "--seed", seeds]
    wanted = CliRunner().invoke(generate, python)
    said = str(wanted.exception) if isinstance(wanted.exception, UsageError) else wanted.output
    assert done.returncode == 2
    assert done.stderr.removeprefix("Error: ").rstrip() in said


def words(side: str = "", tokens: int = 4, less: int = 0) -> dict[str, Any]:
    """Embeddings of one prompt, of the demo's widths; `less` numbers less of each token."""
    return {
        f"{side}prompt_embeds": np.zeros((1, tokens, T5_WIDTH - less), np.float32),
        f"{side}pooled_prompt_embeds": np.zeros((1, CLIP_WIDTH), np.float32),
    }


BAD_CALLS: dict[str, dict[str, Any]] = {
    "a size": {"height": 50},
    "a size that no engine takes": {"height": 16 * 400},
    "no steps": {"num_inference_steps": 0},
    "too many steps": {"num_inference_steps": 5000},
    "guidance": {"guidance_scale": float("nan")},
    "a scale": {"true_cfg_scale": 1e9},
    "a length": {"max_sequence_length": 5000},
    "a number": {"num_images_per_prompt": 0},
    "too many pictures": {"num_images_per_prompt": 2000},
    "negative prompts": {"prompt": ["a"] * 3, "negative_prompt": ["b"] * 2},
    "a long prompt": {"prompt": "é" * 100_001},
    "strength": {"image": 1, "strength": 1.5},
    "no strength": {"image": 1, "strength": 0.0},
    "images": {"image": 2},
    "a mask alone": {"mask_image": 1},
    "masks": {"image": 1, "mask_image": 2},
    "a sampler": {"sampler": "rk5"},
    "a step that is not skipped": {"num_inference_steps": 4, "skip": [0]},
    "a step that is not there": {"num_inference_steps": 4, "skip": [1, 4]},
    "no record": {"num_inference_steps": 4, "skip": "auto"},
    "skips of a sampler that cannot": {"sampler": "heun", "skip": [1]},
    "second prompts": {"prompt": ["a"] * 3, "prompt_2": ["b"] * 2},
    "a long second prompt": {"prompt_2": "é" * 100_001},
    "seeds": {"seed": [1, 2, 3], "num_images_per_prompt": 2},
    "noise levels that rise": {"sigmas": [0.5, 0.7]},
    "a noise level of 0": {"sigmas": [1.0, 0.5, 0.0]},
    "a noise level that is none": {"sigmas": [float("nan")]},
    "noise levels and steps": {"sigmas": [1.0, 0.5], "num_inference_steps": 3},
    "recorded skips of noise levels": {"sigmas": [1.0, 0.5], "skip": "auto"},
    "nothing": {"prompt": None},
    "a second prompt alone": {"prompt": None, "prompt_2": "a"},
    "embeddings and a prompt": words(),
    "embeddings and a second prompt": {"prompt": None, "prompt_2": "a", **words()},
    "embeddings of T5 alone": {"prompt": None, "prompt_embeds": words()["prompt_embeds"]},
    "embeddings of another width": {"prompt": None, **words(less=1)},
    "embeddings without tokens": {"prompt": None, **words(tokens=0)},
    "flat embeddings": {"prompt": None, **words(), "prompt_embeds": np.zeros(5, np.float32)},
    "no numbers": {"prompt": None, **words(), "pooled_prompt_embeds": NAN},
    "negative embeddings of CLIP alone": {
        "negative_pooled_prompt_embeds": words()["pooled_prompt_embeds"]
    },
    "other numbers of tokens": {"true_cfg_scale": 2.0, **words("negative_")},
    "other numbers of embeddings": {
        "prompt": None,
        "true_cfg_scale": 2.0,
        **(words() | words("negative_", 5)),
    },
}


@pytest.fixture(scope="module")
def hosts(library: Library, demo_bundle: Path) -> Iterator[tuple[FluxPipeline, Pipeline]]:
    """Python's and the library's, of one bundle."""
    cpp = library.pipeline(demo_bundle)
    with FluxPipeline.from_bundle(demo_bundle, "onnxruntime") as python:
        yield python, cpp
    cpp.close()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("bad", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_errors_have_pythons_words(
    hosts: tuple[FluxPipeline, Pipeline], bad: dict[str, Any]
) -> None:
    python, cpp = hosts
    given = {"prompt": "a", **bad}
    embeds = {name: given.pop(name) for name in list(given) if "embeds" in name}
    pictures = {
        name: [picture(seed, 32, 32) for seed in range(given.pop(name))]
        for name in ("image", "mask_image")
        if name in given
    }
    images = {name: [Image.fromarray(p) for p in all_] for name, all_ in pictures.items()}
    with pytest.raises(UsageError) as wanted:
        python(**given, **images, **embeds)
    with pytest.raises(Failure) as found:
        cpp(**{k: v for k, v in given.items() if v is not None}, **pictures, embeds=embeds)
    assert (found.value.code, str(found.value)) == ("usage", str(wanted.value))


@pytest.mark.parametrize("shape", [(2**40, 2**40, 8), (1, 2**40, 2**40), (2**62, 2, 2)])
def test_an_array_that_no_memory_holds_is_refused(library: Library, shape: tuple[int, ...]) -> None:
    request = ctypes.c_void_p(library.c.fluxdeploy_request_new())
    numbers, sizes = (ctypes.c_float * 8)(), (ctypes.c_int64 * 3)(*shape)
    set_embeds = library.c.fluxdeploy_request_set_prompt_embeds
    assert CODES[set_embeds(request, numbers, sizes, ctypes.c_size_t(3))] == "usage"
    library.c.fluxdeploy_request_free(request)


def test_a_missing_library_is_a_missing_dependency(library: Library, demo_bundle: Path) -> None:
    cpp = library.pipeline(demo_bundle, library="/nowhere/libonnxruntime.so")
    with pytest.raises(Failure, match="ONNX Runtime cannot be loaded") as failure:
        cpp("a")
    assert failure.value.code == "missing dependency"
    cpp.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runtime": "magic"}, "There is no runtime 'magic'; the runtimes are auto"),
        ({"threads": 0}, "`threads` is 0; it must be from 1 to"),
        ({"device": -1}, "`device` is -1; it must be from 0"),
    ],
)
def test_options_are_checked(
    library: Library, demo_bundle: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(Failure, match=words) as failure:
        library.pipeline(demo_bundle, **options)
    assert failure.value.code == "usage"


def test_a_graph_that_reads_other_files_is_not_opened(
    library: Library, demo_bundle: Path, tmp_path: Path
) -> None:
    """As tests/engines/test_graph_files.py: a location that the manifest does not list."""
    bundle = tmp_path / "bundle"
    shutil.copytree(demo_bundle, bundle)
    graph, manifest = bundle / "onnx" / "clip.onnx", bundle / "fluxdeploy.json"
    before = graph.read_bytes()
    other = b"weights/../../secret"
    start = before.index(b"weights/")
    length = before[start - 1]
    name = (other + b"x" * length)[:length]
    after = before[:start] + name + before[start + length :]
    text = manifest.read_text()
    old, new = (hashlib.sha256(data).hexdigest() for data in (before, after))
    graph.unlink()
    graph.write_bytes(after)
    manifest.write_text(text.replace(old, new))
    cpp = library.pipeline(bundle)
    with pytest.raises(Failure, match=r"takes weights from .* leaves the bundle") as failure:
        cpp("a")
    assert failure.value.code == "bundle"
    cpp.close()
