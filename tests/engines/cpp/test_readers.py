"""The C++ library reads and refuses the same files as the Python host."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from PIL import Image

from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest_json import from_json, to_json
from fluxdeploy.bundle.tensorfile import read_header, read_tensor
from fluxdeploy.errors import BundleError, CheckpointError, UsageError
from fluxdeploy.host.input_images import open_image
from fluxdeploy.host.png_text import read_text
from tests.engines.cpp.readers import Readers
from tests.engines.cpp.seeds import full_manifest, pictures, write_seeds
from tests.fuzz.mutations import damaged_json
from tests.support.small_bundle import small_files, small_manifest, write_small_bundle


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeds(tmp_path_factory.mktemp("seeds"))


def damaged_manifests(seeds: Path, count: int) -> list[bytes]:
    """Damaged in their values, the same ones each time."""
    found: list[bytes] = []
    whole = [path.read_bytes() for path in sorted((seeds / "manifest").iterdir())]

    @with_seed(1)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged_json(whole))
    def collect(data: bytes) -> None:
        found.append(data)

    collect()
    return found


def refusal(data: bytes, source: str) -> str | None:
    """The message of the Python host, or None where it reads a manifest."""
    try:
        from_json(data.decode("utf-8"), source)
    except (BundleError, UnicodeDecodeError) as error:
        return str(error)
    return None


def test_what_python_refuses_of_damaged_manifests_is_refused(
    readers: Readers, seeds: Path, tmp_path: Path
) -> None:
    paths = []
    for index, data in enumerate(damaged_manifests(seeds, 120)):
        paths.append(tmp_path / f"{index}.json")
        paths[-1].write_bytes(data)
    answers = readers.read("manifest", paths)
    refused = {path: refusal(path.read_bytes(), str(path)) for path in paths}
    assert sum(words is not None for words in refused.values()) > 60
    for path, answer in zip(paths, answers, strict=True):
        words = refused[path]
        # Integers past 63 bits, which no field has, Python reads where it has no bound for them.
        stricter = "must be an integer, not 9223372036854775808.0" in answer
        assert answer.startswith("error") == (words is not None or stricter), (answer, words)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("schema_version", 3),
        ("schema_version", 5),
        ("family", None),
        ("family", "a\u202eb"),
        ("unknown", 1),
        ("components.t5.files.0.path", "../outside"),
        ("components.t5.files.0.path", "/etc/passwd"),
        ("components.t5.files.0.path", "a\\b"),
        ("components.t5.files.0.path", "C:/x"),
        ("components.t5.files.0.path", "a//b"),
        ("components.t5.files.0.size", -1),
        ("components.t5.files.0.size", 1.5),
        ("components.t5.files.0.sha256", "A" * 64),
        ("components.t5.engines", []),
        ("components.t5.engines.0.path", "onnx/other.onnx"),
        ("components.t5.engines.0.dimensions", {}),
        ("components.t5.engines.0.dimensions.B.min", 0),
        ("components.t5.golden.min_cosine", 2),
        ("components.t5.recipe.recipe.spared", {"a": "all"}),
        ("components.t5.recipe.recipe.smoothed", {"a": 1}),
        ("components.t5.outputs.0.name", "other"),
        ("components.t5.outputs.0.dtype", "float16"),
        ("components.t5.outputs.0.shape", ["B", "S", 4095]),
        ("latents.channels", 0),
        ("latents.channels", 5000),
        ("latents.scaling_factor", 0),
        ("rope.axes_dims", [1, 2]),
        ("rope.theta", 0.5),
        ("schedule.shift", 1e9),
        ("schedule.time_shift_type", "square"),
        ("schedule.max_image_seq_len", 256),
        ("schedule.shift_terminal", 1),
        ("schedule.spacing", "linear"),
        ("schedule.spacing", 7),
        ("skips", None),
        ("skips.0.steps", [0]),
        ("skips.0.steps", [7, 7]),
        ("skips.0.steps", [28]),
        ("skips.0.num_inference_steps", 10_001),
        ("skips.0.order", 3),
        ("skips.0.width", 65_537),
        ("skips.0.min_psnr", -1),
        ("skips.0.psnr", 29),
        ("skips.0.pictures", 0),
        ("skips.0.other", 0),
        ("skips.1.sampler", "euler"),
        ("preview", 7),
        ("preview.matrix", []),
        ("preview.matrix", [[0, 0, 0]] * 15 + [[0, 1]]),
        ("preview.matrix", [[0, 0, 2e6]] * 16),
        ("preview.matrix", [[0, 0, "x"]] * 16),
        ("preview.matrix", [0] * 16),
        ("preview.bias", [0, 0, 0, 0]),
        ("preview.bias", [0, -2e6, 0]),
        ("preview.other", 0),
        ("controlnets", []),
        ("controlnets", None),
        ("controlnets.0.component", "transformer"),
        ("controlnets.0.component", "controlnet_1"),
        ("controlnets.0.component", "controlnet_20"),
        ("controlnets.0.modes", 0),
        ("controlnets.0.modes", 1001),
        ("controlnets.0.kind", 1),
        ("controlnets.1", {"component": "controlnet", "modes": 6}),
        ("controlnets.1", {"component": "controlnet_2", "modes": 6}),
        ("tasks", ["text to image"]),
        ("tasks", ["control", "controlnet"]),
        ("components.controlnet.outputs.0.shape.0", 1),
        ("components.controlnet.outputs.0.shape.3", 8),
        ("components.controlnet.inputs.3.shape.1", 14),
        ("components.controlnet.inputs.1.name", "hint"),
        ("components.controlnet.inputs.0.shape", ["B", "S", 64]),
        ("components.controlnet_conditioner.inputs.4.dtype", "float32"),
        ("components.controlnet_conditioner.outputs.2.shape.1", 2),
        ("components.controlnet_encoder.outputs.0.name", "tokens"),
        ("tokenizers.clip.max_length", 1),
        ("tokenizers.clip.padding_side", "top"),
        ("tokenizers.t5.suffix", [2**31]),
        ("defaults.height", 1000),
        ("defaults.strength", 0),
        ("defaults.max_sequence_length", 513),
        ("quality.min_psnr", 151),
        ("quality.min_ssim", 1.01),
        ("editions", None),
        ("editions", [0]),
        ("editions.0.other", 0),
        ("editions.0.components", {}),
        ("editions.0.components.t5.engines", []),
        ("editions.0.components.t5.files.0.path", "../outside"),
        ("editions.0.components.t5.files.0.sha256", "0" * 64),
        ("editions.0.components.t5.key", "a\u202eb"),
        ("editions.0.components.transformer.engines.0.runtime", "onnxruntime"),
        ("editions.0.components.controlnet.outputs.0.shape.0", 1),
        ("editions.0.defaults.height", 1000),
        ("editions.0.quality.min_psnr", 151),
        ("editions.0.provenance", None),
        ("editions.0.skips.0.order", 3),
    ],
)
def test_manifests_are_refused_in_the_words_of_python(
    readers: Readers, tmp_path: Path, where: str, value: Any
) -> None:
    plain = json.loads(to_json(full_manifest(small_manifest(small_files()))))
    *parents, last = where.split(".")
    place: Any = plain
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    if isinstance(place, list) and int(last) == len(place):
        place.append(value)
    else:
        place[int(last) if isinstance(place, list) else last] = value
    path = tmp_path / "x.json"
    path.write_text(json.dumps(plain), encoding="utf-8")
    expected = refusal(path.read_bytes(), str(path))
    assert expected is not None
    assert readers.read("manifest", [path]) == [f"error {expected}"]


@pytest.mark.parametrize("name", ["redux", "ip_adapter"])
def test_what_reads_pictures_is_passed_over(
    name: str, readers: Readers, seeds: Path, tmp_path: Path
) -> None:
    whole = json.loads((seeds / "manifest/full.json").read_text(encoding="utf-8"))
    paths = []
    for index, record in enumerate(({"resize": [31, 31]}, None, "pixels")):
        paths.append(tmp_path / f"{index}.json")
        paths[-1].write_text(json.dumps({**whole, name: record}), encoding="utf-8")
    answers = readers.read("manifest", paths)
    assert [answer.startswith("error") for answer in answers] == [False, False, True]


def test_json_is_as_strict_as_pythons(readers: Readers, seeds: Path, tmp_path: Path) -> None:
    whole = (seeds / "manifest/full.json").read_text(encoding="utf-8")
    changes = [
        ('"theta": 10000.0', '"theta": NaN'),
        ('"theta": 10000.0', '"theta": 1e999'),
        ('"theta": 10000.0', '"theta": 123456789012345678901'),
        ('"theta": 10000.0', '"theta": 10000.0, "theta": 10000.0'),
        ('"family": "flux"', '"family": "\\ud800"'),
        ('"provenance": {', '"provenance": {"a": ' + "[" * 40 + "]" * 40 + ", "),
        ('"provenance": {', '"provenance": {"a": ' + "[" * 5000 + "]" * 5000 + ", "),
    ]
    texts = [whole.replace(*change).encode() for change in changes]
    texts += [b"\xef\xbb\xbf" + whole.encode(), whole.encode()[:-3], b"", b"\xff", b"[]", b"1"]
    texts += [whole.encode() + b"x", b"[" + b"0," * 100_001 + b"0]"]
    paths = []
    for index, text in enumerate(texts):
        assert text != whole.encode()
        assert refusal(text, "x")
        paths.append(tmp_path / f"{index}.json")
        paths[-1].write_bytes(text)
    answers = readers.read("manifest", paths)
    assert all(answer.startswith(f"error {tmp_path}") for answer in answers), answers


def check_bundle(readers: Readers, root: Path) -> str:
    """The answer, after it was held against Python's."""
    (answer,) = readers.read("bundle", [root])
    try:
        expected = f"ok {open_bundle(root).content_hash}"
    except BundleError as error:
        expected = f"error {error}"
    assert answer == expected
    return answer


def test_bundles_are_opened_and_refused_as_in_python(readers: Readers, tmp_path: Path) -> None:
    files = small_files()
    whole = write_small_bundle(tmp_path / "whole", files, small_manifest(files))
    assert check_bundle(readers, whole).startswith("ok")
    (tmp_path / "link").symlink_to("whole")
    assert check_bundle(readers, tmp_path / "link").startswith("ok")
    assert check_bundle(readers, tmp_path / "none").startswith("error There is no bundle at")
    for name, change in {
        "shorter": lambda path: path.write_bytes(b"x"),
        "changed": lambda path: path.write_bytes(path.read_bytes()[::-1]),
        "missing": lambda path: path.unlink(),
        "folder": lambda path: (path.unlink(), path.mkdir()),
        "outside": lambda path: (path.unlink(), path.symlink_to(whole / "onnx/t5.onnx")),
        "dangling": lambda path: (path.unlink(), path.symlink_to(tmp_path / "nothing")),
        "circle": lambda path: (path.unlink(), path.symlink_to(path.name)),
    }.items():
        root = tmp_path / name
        shutil.copytree(whole, root)
        change(root / "onnx/t5.onnx")
        (answer,) = readers.read("bundle", [root])
        assert answer.startswith("error"), name
        if name != "circle":  # Python's own words for it differ with its version
            check_bundle(readers, root)


def test_a_manifest_that_is_a_link_out_of_the_bundle_is_refused(
    readers: Readers, tmp_path: Path
) -> None:
    files = small_files()
    root = write_small_bundle(tmp_path / "bundle", files, small_manifest(files))
    (root / "fluxdeploy.json").rename(tmp_path / "other.json")
    (root / "fluxdeploy.json").symlink_to(tmp_path / "other.json")
    assert "is a link that leaves the bundle" in check_bundle(readers, root)


def test_tensors_are_read_as_in_python(readers: Readers, seeds: Path) -> None:
    path = seeds / "safetensors/x.safetensors"
    file = read_header(path)
    assert readers.read("safetensors", [path]) == [f"ok {' '.join(sorted(file.tensors))} "]
    for name in ("a.weight", "b", "g"):
        raw = read_tensor(file, name)
        dtype = file.tensors[name].dtype
        values = (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else raw
        assert readers.run("tensor", path, name) == values.astype(np.float32).tobytes()
    with pytest.raises(RuntimeError, match="has the dtype F8_E4M3; it must be F32, F16 or BF16"):
        readers.run("tensor", path, "c")


def test_every_half_is_read_exactly(readers: Readers, tmp_path: Path) -> None:
    codes = np.arange(1 << 16, dtype=np.uint16)
    head = b'{"x":{"dtype":"F16","shape":[65536],"data_offsets":[0,131072]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + codes.tobytes())
    values = np.frombuffer(readers.run("tensor", path, "x"), np.float32)
    expected = codes.view(np.float16).astype(np.float32)
    assert np.array_equal(values, expected, equal_nan=True)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        '{"x":1}',
        '{"x":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
        '{"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        '{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        '{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
        '{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        '{"x":{"dtype":"F32","shape":[1,1.0],"data_offsets":[0,4]}}',
        '{"x":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}',
        '{"x":{"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[0,0]}}',
        '{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{}}',
        '{"__metadata__":{"a":1},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"x":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}',
        "{",
    ],
)
def test_broken_headers_are_refused(readers: Readers, tmp_path: Path, header: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(CheckpointError):
        read_header(path)
    (answer,) = readers.read("safetensors", [path])
    assert answer.startswith(f"error {path} is not a whole safetensors file: ")


@pytest.mark.parametrize("name", pictures())
def test_pictures_are_read_as_in_python(readers: Readers, seeds: Path, name: str) -> None:
    path = seeds / f"png/{name}.png"
    head, _, data = readers.run("pixels", path).partition(b"\n")
    width, height, alpha = map(int, head.split())
    image, _digest = open_image(path)
    assert (width, height) == image.size
    assert data[: 3 * width * height] == image.tobytes()
    with Image.open(path) as original:
        if name in ("rgba", "grey_alpha"):
            assert data[3 * width * height :] == original.getchannel("A").tobytes()
        assert (alpha > 0) == (name in ("rgba", "grey_alpha") or "transparent" in name)


def test_interlaced_pictures_and_those_of_16_bits(readers: Readers, tmp_path: Path) -> None:
    """Pillow writes neither: from the chunks themselves."""
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        )

    pixels = np.random.default_rng(1).integers(0, 1 << 16, (9, 10, 3), dtype=np.uint16)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
              (0, 1, 1, 2)]  # fmt: skip
    rows = []
    for column, row, wide, high in passes:
        part = pixels[row::high, column::wide].astype(">u2")
        rows += [b"\0" + line.tobytes() for line in part]
    head = (10).to_bytes(4, "big") + (9).to_bytes(4, "big") + bytes([16, 2, 0, 0, 1])
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    data += chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(data)
    _, _, read = readers.run("pixels", tmp_path / "x.png").partition(b"\n")
    assert read == (pixels >> 8).astype(np.uint8).tobytes()


def test_pictures_that_are_too_large_or_broken_are_refused(
    readers: Readers, seeds: Path, tmp_path: Path
) -> None:
    whole = (seeds / "png/rgb.png").read_bytes()
    stream = io.BytesIO()
    Image.new("1", (8193, 8192)).save(stream, "PNG")
    for name, data in {"large": stream.getvalue(), "cut": whole[:200], "text": b"no"}.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(data)
        with pytest.raises(UsageError):
            open_image(path)
        (answer,) = readers.read("png", [path])
        wanted = "has more than 8192 x 8192" if name == "large" else "is not a picture that can"
        assert wanted in answer


def test_written_pictures_have_their_text(readers: Readers, tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = tmp_path / "x.png"
    text = {"prompt": "a fôx", "negative_prompt": "Ω 👩", "seed": "7", "height": ""}
    words = [word for pair in text.items() for word in pair]
    readers.run("write", path, 7, 5, *words, data=pixels.tobytes())
    assert read_text(path) == text
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), pixels)
    assert not [name for name in tmp_path.iterdir() if name != path]
    for name, words_of in (("x.jpg", "End the name in .png"), ("none/x.png", "Cannot write")):
        with pytest.raises(RuntimeError, match=words_of):
            readers.run("write", tmp_path / name, 7, 5, data=pixels.tobytes())


def test_the_same_records_hash_alike(readers: Readers, tmp_path: Path) -> None:
    """SHA-256 of sizes around its blocks of 64 bytes."""
    for size in (0, 1, 55, 56, 63, 64, 65, 119, 128, 1000):
        files = {**small_files(), "golden/t5.safetensors": (bytes(range(256)) * 4)[:size]}
        root = write_small_bundle(tmp_path / str(size), files, small_manifest(files))
        assert check_bundle(readers, root).startswith("ok")
