"""How near a picture in tiles is to the whole one, over the demo's VAE.

`python benchmarks/tile_quality.py BUNDLE --json benchmarks/results/tile_quality.json`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines import open_engine
from engines.base import Array
from fluxdeploy.bundle import open_bundle
from fluxdeploy.host.tiles import SIDE, run_in_tiles
from fluxdeploy.similarity import psnr

SHEET = Path(__file__).parents[1] / "docs" / "demo.png"
"""Parts of it differ as much as any picture's."""

SIZES = ((1024, 1024), (784, 1280), (1280, 784), (1536, 1536))
"""Pixels (width, height)."""

Floats = NDArray[np.float32]


def read_sheet(width: int, height: int) -> Floats:
    """The sheet, [1, 3, H, W] in [-1, 1]."""
    sheet = Image.open(SHEET).convert("RGB").resize((width, height))
    pixels = np.asarray(sheet, np.float32) / 127.5 - 1
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def compare(one: Floats, other: Floats) -> float:
    """dB between two outputs of the decoder."""
    first, second = (np.clip(x[0].transpose(1, 2, 0) / 2 + 0.5, 0, 1) for x in (one, other))
    return round(psnr(first, second), 1)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write this file.")
def main(bundle: Path, json_file: Path | None) -> None:
    """Decode in tiles what was encoded whole, and what was encoded in tiles."""
    opened = open_bundle(bundle)
    factor = opened.manifest.latents.spatial_factor
    rows = []
    with ExitStack() as stack:
        engines = {
            half: stack.enter_context(closing(open_engine(opened, half)))
            for half in ("vae_encoder", "vae_decoder")
        }

        def run(component: str, inputs: Mapping[str, Array]) -> dict[str, Floats]:
            outputs = engines[component].run(inputs)
            return {name: np.array(values) for name, values in outputs.items()}

        def in_tiles(component: str, array: Floats) -> dict[str, Floats]:
            return run_in_tiles(run, component, array, SIDE, factor)

        for width, height in SIZES:
            pixels = read_sheet(width, height)
            latents = run("vae_encoder", {"images": pixels})["mean"]
            whole = run("vae_decoder", {"latents": latents})["images"]
            decoded = in_tiles("vae_decoder", latents)["images"]
            parts = in_tiles("vae_encoder", pixels)["mean"]
            both = run("vae_decoder", {"latents": parts})["images"]
            rows.append(
                {
                    "pixels": f"{width}x{height}",
                    "decoded_db": compare(whole, decoded),
                    "encoded_db": compare(whole, both),
                }
            )
            click.echo(json.dumps(rows[-1]))
    if json_file is not None:
        report = {"side": SIDE * factor, "rows": rows}
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
