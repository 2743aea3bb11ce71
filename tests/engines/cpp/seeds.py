"""Whole files of each kind that the C++ library reads, small ones, to be damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fluxdeploy.bundle.boundary import _BOUNDARY, _JOINED, _controlnet
from fluxdeploy.bundle.manifest import (
    ComponentRecord,
    ControlNetRecord,
    DimensionRange,
    EditionRecord,
    EngineRecord,
    IpAdapterRecord,
    Manifest,
    PreviewSpec,
    SkipRecord,
    TensorSpec,
    TokenizerRecord,
)
from fluxdeploy.bundle.manifest_json import to_json
from fluxdeploy.bundle.pixels import PixelSpec
from fluxdeploy.bundle.recipe import Promise, Quality, Recipe, RecipeRecord
from fluxdeploy.bundle.tensorfile import TensorFileWriter
from tests.support.small_bundle import small_files, small_manifest, write_small_bundle

__all__ = ["DEMO", "full_manifest", "pictures", "write_seeds"]

DEMO = Path(__file__).parents[3] / "fluxdeploy/demo/checkpoints/dev"

_ALL = {**_BOUNDARY, **_JOINED, **_controlnet("controlnet")}
_PIXELS = PixelSpec((224,), (224, 224), "bicubic", 1 / 255, (0.5, 0.4, 0.5), (0.25, 0.25, 0.25))

_SIZES = {
    "CLIP's tokens": 77, "CLIP's width": 768, "T5's width": 4096, "the transformer's width": 3072,
    "the modulation's rows": 30, "a token's channels": 64, "a head's channels": 128,
    "what a task reads": 64,
    "the latents' channels": 16, "double residuals": 2, "single residuals": 1,
    "the rows of controlnet": 15, "double_residuals of controlnet": 2,
    "single_residuals of controlnet": 4,
    "the blocks that see": 2, "the tokens of a picture that is seen": 4,
    "the picture's embedding": 768, "the rows of what is seen": 224,
    "the columns of what is seen": 224, "the rows of its pixels": 224,
    "the columns of its pixels": 224, "a picture's tokens": 729,
}  # fmt: skip
_RANGES = {
    "B": (1, 1, 64), "S": (1, 512, 512), "L": (1, 4096, 65536), "T": (2, 4608, 66048),
    "N": (1, 28, 1000), "H": (16, 1024, 4096), "W": (16, 1024, 4096), "h": (2, 128, 512),
    "w": (2, 128, 512), "V": (1, 16, 256),
}  # fmt: skip


def write_seeds(folder: Path) -> Path:
    """Folders `manifest`, `tokenizer`, `safetensors` and `png`, and the manifests' `bundle`."""
    for name in ("manifest", "tokenizer", "safetensors", "png"):
        (folder / name).mkdir(parents=True)
    files = small_files()
    manifest = small_manifest(files)
    write_small_bundle(folder / "bundle", files, manifest)
    for name, made in (("small", manifest), ("full", full_manifest(manifest))):
        (folder / f"manifest/{name}.json").write_text(to_json(made), encoding="utf-8")
    _write_tokenizers(folder / "tokenizer")
    _write_tensors(folder / "safetensors/x.safetensors")
    for name, (image, options) in pictures().items():
        image.save(folder / f"png/{name}.png", **options)
    return folder


def full_manifest(manifest: Manifest) -> Manifest:
    """`manifest` with all fields and components that a host knows, and a second tokenizer."""
    (t5,) = manifest.components.values()
    record = manifest.tokenizers["clip"]
    components = {name: _component(name, t5) for name in _ALL}
    return replace(
        manifest,
        components=components,
        tokenizers={"clip": record, "t5": _t5_record(record)},
        schedule=replace(manifest.schedule, spacing="karras"),
        skips=(
            SkipRecord("euler", 28, (5, 7, 27), 1, 1024, 1024, 30.0, 33.5, 8),
            SkipRecord("ab2", 28, (), 0, 512, 768, 30.0, 30.0, 1),
        ),
        preview=PreviewSpec(((0.25, 0.0, -0.5),) * 16, (0.5, 0.5, 0.5)),
        tasks=("text to image", "controlnet"),
        controlnets=(ControlNetRecord("controlnet", 6),),
        redux=_PIXELS,
        ip_adapter=IpAdapterRecord(_PIXELS),
        provenance={
            **manifest.provenance,
            "vae_bytes_per_pixel": {"vae_decoder": 2000, "vae_encoder": 1500},
        },
        editions=(
            EditionRecord(
                {
                    name: replace(each, engines=(replace(each.engines[0], runtime="openvino"),))
                    for name, each in components.items()
                },
                manifest.defaults,
                manifest.quality,
                {"free": "\u2028"},
                (SkipRecord("euler", 28, (9,), 2, 1024, 1024, 30.0, 33.5, 8),),
            ),
        ),
    )


def _t5_record(record: TokenizerRecord) -> TokenizerRecord:
    return replace(record, max_length=512, pad_id=0, prefix=(), suffix=(1,))


def _component(name: str, like: ComponentRecord) -> ComponentRecord:
    sides = [
        tuple(
            TensorSpec(
                tensor,
                "int32" if tensor in ("input_ids", "control_mode") else "float32",
                tuple(_SIZES.get(str(size), size) for size in shape),
            )
            for tensor, shape in tensors.items()
        )
        for tensors in _ALL[name]
    ]
    symbols = {size for specs in sides for spec in specs for size in spec.shape}
    ranges = {
        symbol: DimensionRange(*_RANGES[symbol]) for symbol in symbols if isinstance(symbol, str)
    }
    engine = EngineRecord("onnxruntime", "1.31.1", "cpu", "onnx/t5.onnx", ranges)
    recipe = RecipeRecord(
        "fp8",
        Promise(0.99, 30.0, None),
        Recipe({"a.b": "weights", "c": "nothing"}, {"a.b": 0.5}),
        None,
        Quality(0.999, 35.0, 0.97, 30.0, 20.0),
        0.01,
        1000,
    )
    return replace(like, inputs=sides[0], outputs=sides[1], engines=(engine,), recipe=recipe)


def _write_tokenizers(folder: Path) -> None:
    for kind, name in (("clip", "tokenizer"), ("t5", "tokenizer_2")):
        document = json.loads((DEMO / name / "tokenizer.json").read_text(encoding="utf-8"))
        (folder / f"{kind}.json").write_text(json.dumps(document), encoding="utf-8")
    # The pieces of a vocabulary are as good as equal to each other, and so are the map's letters.
    document["model"]["vocab"] = document["model"]["vocab"][:60]
    document["added_tokens"] = document["added_tokens"][:4]
    document["normalizer"] = _every_normalizer()
    (folder / "short.json").write_text(json.dumps(document), encoding="utf-8")


def _every_normalizer() -> dict[str, Any]:
    regex = {"type": "Replace", "pattern": {"Regex": r" {2,}|[^\s\p{L}a-z]?"[:-1]}, "content": " "}
    return {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFC"},
            {"type": "Strip", "strip_left": False, "strip_right": True},
            regex,
            {"type": "Replace", "pattern": {"String": "x"}, "content": "xy"},
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Lowercase"},
            # A map of "a" to "b".
            {"type": "Precompiled", "precompiled_charsmap": _map_of_a()},
        ],
    }


def _map_of_a() -> str:
    import base64
    import struct

    units = [0] * 256
    units[0] = 1 << 10
    units[1 ^ ord("a")] = (1 ^ ord("a") ^ 2) << 10 | 1 << 8 | ord("a")
    units[2] = 1 << 31
    trie = struct.pack("<256I", *units)
    return base64.b64encode(struct.pack("<I", len(trie)) + trie + b"b\0").decode()


def _write_tensors(path: Path) -> None:
    declared = [("a.weight", "F32", (2, 3)), ("b", "BF16", (4,)), ("c", "F8_E4M3", (8,)),
                ("d", "BOOL", (3,)), ("e", "I64", ()), ("f", "F4", (4,)), ("g", "F16", (0, 7)),
                ("h", "I32", (2, 1))]  # fmt: skip
    with TensorFileWriter(path, declared, {"format": "pt"}) as writer:
        for size in (24, 8, 8, 3, 8, 2, 0, 8):
            writer.write(bytes(range(size)))


def pictures() -> dict[str, tuple[Image.Image, dict[str, Any]]]:
    """Pictures of each kind of PNG, with what to save them with."""
    pixels = np.random.default_rng(0).integers(0, 256, (13, 11, 4), dtype=np.uint8)
    rgba = Image.fromarray(pixels)
    rgb = rgba.convert("RGB")
    text = PngInfo()
    text.add_text("prompt", "a fox", zip=True)
    text.add_text("seed", "Ω")
    grey = Image.fromarray(pixels[..., 0].astype(np.uint16) * 255 + 7)
    palette = rgb.quantize(11)
    return {
        "rgb": (rgb, {"pnginfo": text}),
        "rgba": (rgba, {}),
        "grey": (rgb.convert("L"), {}),
        "grey_alpha": (rgba.convert("LA"), {}),
        "grey16": (grey, {}),
        "one_bit": (rgb.convert("1"), {}),
        "palette": (palette, {}),
        "palette_transparent": (palette, {"transparency": 3}),
        "grey_transparent": (rgb.convert("L"), {"transparency": 7}),
        "turned_profile": (rgb, {"icc_profile": b"not one", "dpi": (72, 72)}),
    }
