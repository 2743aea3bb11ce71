"""A step of FLUX.1's width on a CPU: what each runtime makes of it, one contender at a time.

Each turn is a process of its own that opens the transformer alone, runs it once to warm up and then
a few times. Where a machine has other things to do, the median of a turn says more of them than of
the contender: the share of the cores that a turn had is kept with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from latency import BUNDLES, build_bundles, random_flux

from engines import EngineOptions, open_engine
from fluxdeploy.bench.child import child_environment
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.recipe import Promise
from fluxdeploy.machine import describe_machine, usable_cpus
from fluxdeploy.progress import Progress

PEERS = {"eager": "float32", "eager-bf16": "bfloat16"}
BLOCKS = (1, 2)
SIZE, TEXT, STEPS = 512, 512, 3
PACKAGES = ("numpy", "torch", "diffusers", "onnxruntime", "openvino")


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--only", help="Contenders, with commas.  [default: all]")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Write this file; rounds are added to those that it has.",
)
@click.option("--worker", hidden=True)
def main(folder: Path, rounds: int, only: str | None, json_file: Path, worker: str | None) -> None:
    """Build the bundles below FOLDER where they are not there, and time them in turns."""
    place = folder / "width-{}-{}".format(*BLOCKS)
    if worker is not None:
        print(json.dumps(take_turn(worker, place, folder / "checkpoint-{}-{}".format(*BLOCKS))))
        return
    if not all((place / name).exists() for name in map(folder_of, BUNDLES)):
        with Progress() as progress:
            checkpoint = random_flux(folder, *BLOCKS, progress)
            build_bundles(place, str(checkpoint), BUNDLES, progress, Promise())
    found: dict[str, Any] = {
        "machine": describe_machine(PACKAGES),
        "blocks": BLOCKS,
        "size": SIZE,
        "tokens": TEXT,
        "threads": usable_cpus(),
        "turns": {},
    }
    if json_file.exists():
        found["turns"] = json.loads(json_file.read_text(encoding="utf-8"))["turns"]
    for _ in range(rounds):
        for name in only.split(",") if only else (*map(folder_of, BUNDLES), *PEERS):
            turn = start_turn(name, folder, json_file)
            found["turns"].setdefault(name, []).append(turn)
            print(name, turn, flush=True)
            json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def folder_of(bundle: str) -> str:
    """Where `build_bundles` puts a bundle."""
    precision, runtime = BUNDLES[bundle]
    return f"{runtime}-{precision}"


def start_turn(name: str, folder: Path, json_file: Path) -> dict[str, Any]:
    """A turn in a process of its own."""
    options = ["--folder", str(folder), "--json", str(json_file), "--worker", name]
    done = subprocess.run(
        [sys.executable, __file__, *options],
        env=child_environment(),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    turn: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return turn


def take_turn(name: str, place: Path, checkpoint: Path) -> dict[str, Any]:
    """Seconds of each step, and how many cores the process had over them."""
    run = open_peer(name, checkpoint) if name in PEERS else open_bundled(place / name)
    run()
    seconds = []
    began, busy = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    cores = (time.process_time() - busy) / (time.perf_counter() - began)
    return {"seconds": seconds, "cores": cores}


def open_bundled(bundle: Path) -> Callable[[], object]:
    """A bundle's transformer over random inputs."""
    opened = open_bundle(bundle)
    engine = open_engine(opened, "transformer", options=EngineOptions(threads=usable_cpus()))
    image = (SIZE // 16) ** 2
    sizes = {"B": 1, "L": image, "S": TEXT, "T": image + TEXT}
    random = np.random.default_rng(0)
    inputs = {
        spec.name: random.standard_normal(
            [sizes[d] if isinstance(d, str) else d for d in spec.shape], np.float32
        )
        for spec in engine.inputs
    }
    return lambda: engine.run(inputs)


def open_peer(name: str, checkpoint: Path) -> Callable[[], object]:
    """diffusers' transformer over random inputs."""
    import torch
    from diffusers import FluxTransformer2DModel

    torch.set_num_threads(usable_cpus())
    torch.set_grad_enabled(False)
    dtype = getattr(torch, PEERS[name])
    network = FluxTransformer2DModel.from_pretrained(
        checkpoint, subfolder="transformer", torch_dtype=dtype
    )
    config = network.config
    image = (SIZE // 16) ** 2
    inputs = {
        "hidden_states": torch.randn(1, image, config.in_channels, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, TEXT, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(image, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return lambda: network(**inputs)


if __name__ == "__main__":
    main()
