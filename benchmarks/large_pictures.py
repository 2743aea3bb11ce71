"""The VAE's decoder on large pictures: whole, in tiles, and as diffusers has it.

The decoder has FLUX.1's size and random weights. Each way runs in a process of its own, whose peak
memory and time are taken.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from fluxdeploy.host.tiles import SIDE, run_in_tiles
from fluxdeploy.machine import describe_machine, peak_memory, resident_memory

WAYS = ("whole", "tiles", "diffusers", "diffusers in tiles")
PACKAGES = ("onnxruntime", "torch", "diffusers", "numpy")
FACTOR = 8


@click.command()
@click.option("--size", default=2048, show_default=True, help="Pixels of a side of the picture.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write this file.")
@click.option("--limit", default=14, show_default=True, help="GB of memory that a way may take.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default="large-pictures",
    help="Where to work; what an earlier run exported there is used again.",
)
@click.option("--only", type=click.Choice(WAYS), multiple=True, help="Ways to measure, of all.")
@click.option("--way", type=click.Choice(WAYS), hidden=True)
def main(
    size: int,
    json_file: Path | None,
    limit: int,
    folder: Path,
    only: tuple[str, ...],
    way: str | None,
) -> None:
    """Decode one picture in each way. Takes about 350 MB of disk."""
    if way is not None:
        click.echo(json.dumps(_measure(folder, way, size)))
        return
    _prepare(folder)
    rows = []
    for each in only or WAYS:
        script = f'ulimit -v {limit * 1000 * 1000}; exec "$0" "$@"'
        command = [sys.executable, __file__, "--folder", str(folder), "--size", str(size)]
        done = subprocess.run(
            ["bash", "-c", script, *command, "--way", each],
            capture_output=True,
            text=True,
            check=False,
        )
        row: dict[str, Any] = {"way": each, "size": size}
        if done.returncode:
            row["failed"] = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        else:
            row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        click.echo(json.dumps(row), err=True)
    if json_file is not None:
        _write(json_file, size, limit, rows)


def _write(file: Path, size: int, limit: int, rows: list[dict[str, Any]]) -> None:
    """Write the rows of a size beside those of other sizes that are in the file."""
    earlier = json.loads(file.read_text("utf-8"))["rows"] if file.exists() else []
    report = {
        "machine": describe_machine(PACKAGES),
        "limit_gb": limit,
        "rows": [row for row in earlier if row["size"] != size] + rows,
    }
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _prepare(folder: Path) -> None:
    """A checkpoint with a full-size VAE and small networks else, and the decoder's graph."""
    from exporters.checkpoint import open_checkpoint
    from exporters.components.registry import COMPONENTS
    from exporters.export import export_component, specify
    from exporters.synthetic.sparse_checkpoint import (
        FLUX_DEV,
        flux_of_depth,
        write_random_checkpoint,
    )
    from exporters.weights.bind import WeightFolder

    if (folder / "vae_decoder.onnx").exists():
        return
    small = flux_of_depth(1, 1)
    narrow = replace(
        small.transformer, width=256, mlp_width=256, text_width=small.t5.d_model, head_dim=128
    )
    sizes = replace(small, transformer=narrow, vae=FLUX_DEV.vae)
    write_random_checkpoint(folder / "checkpoint", sizes)
    checkpoint = open_checkpoint(folder / "checkpoint")
    spec = specify(checkpoint, COMPONENTS["vae_decoder"], "fp32")
    export_component(spec, WeightFolder(folder / "weights"), fused=True)


def _measure(folder: Path, way: str, size: int) -> dict[str, float]:
    """Seconds of a decode, and bytes at the peak: of all, and besides what was there before it."""
    side = size // FACTOR
    latents = np.random.default_rng(0).standard_normal((1, 16, side, side), dtype=np.float32)
    decode = _of_diffusers(folder, way) if way.startswith("diffusers") else _ours(folder, way)
    # What is made once only.
    decode(latents[:, :, :8, :8])
    before = resident_memory() or 0
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.monotonic()
    picture = decode(latents)
    seconds = time.monotonic() - start
    peak = peak_memory() or 0
    if picture.shape != (1, 3, size, size):
        raise click.ClickException(f"{way} gave {picture.shape}.")
    return {"seconds": round(seconds, 2), "peak_bytes": peak, "run_bytes": peak - before}


def _ours(folder: Path, way: str) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # As engines/onnxruntime.py opens it.
    options.enable_cpu_mem_arena = False
    session = onnxruntime.InferenceSession(str(folder / "vae_decoder.onnx"), options)

    def run(_: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"images": session.run(None, inputs)[0]}

    def decode(latents: np.ndarray) -> np.ndarray:
        if way == "whole":
            return run("vae_decoder", {"latents": np.ascontiguousarray(latents)})["images"]
        return run_in_tiles(run, "vae_decoder", latents, SIDE, FACTOR)["images"]

    return decode


def _of_diffusers(folder: Path, way: str) -> Callable[[np.ndarray], np.ndarray]:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "checkpoint" / "vae")
    if way == "diffusers in tiles":
        vae.enable_tiling()

    def decode(latents: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            picture: np.ndarray = vae.decode(torch.from_numpy(latents.copy())).sample.numpy()
        return picture

    return decode


if __name__ == "__main__":
    main()
