"""A step of the transformer on the CPU: exported, in several precisions, against PyTorch eager.

FLUX.1's width and heads at a reduced depth, with random weights. All contenders have the same
weights, inputs and threads; outputs are compared before anything is timed, and they take turns, so
that a ratio is one of neighbours in time.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from rich.console import Console
from rich.table import Table
from transformers import CLIPTextConfig, T5Config

from engines import EngineOptions
from engines.onnxruntime import OnnxRuntime
from exporters.bind import WeightFolder
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.checkpoint.config import VaeConfig
from exporters.export import component_source, export_component
from exporters.reference import run_reference
from exporters.sparse_checkpoint import FLUX_DEV, Sizes, write_sparse_checkpoint
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord, RopeSpec
from fluxdeploy.gate import Deviation
from fluxdeploy.machine import describe_machine
from fluxdeploy.progress import Progress
from fluxdeploy.rope import joint_ids, rope_tables
from fluxdeploy.tensorfile import from_float32, read_header

Array = np.ndarray[Any, np.dtype[Any]]

PACKAGES = ("torch", "diffusers", "onnxruntime", "onnx", "numpy")
EAGER = ("PyTorch eager fp32", "PyTorch eager bf16")
PRECISIONS = ("fp32", "int8-dynamic")
TEXT_TOKENS = 512
MIN_COSINE = 0.98


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of a contender, and how far it is from PyTorch in float32."""

    name: str
    seconds: tuple[float, ...]
    max_error: float
    cosine: float


@click.command()
@click.option("--double-blocks", default=1, show_default=True)
@click.option("--single-blocks", default=2, show_default=True)
@click.option("--size", default=512, show_default=True, help="Pixels of a side of the picture.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write this file.")
def main(
    double_blocks: int,
    single_blocks: int,
    size: int,
    rounds: int,
    threads: int,
    json_file: Path | None,
) -> None:
    """Time a step of a transformer of full width and reduced depth."""
    machine = describe_machine(PACKAGES)
    torch.set_num_threads(threads)
    config = replace(FLUX_DEV.transformer, double_blocks=double_blocks, single_blocks=single_blocks)
    with tempfile.TemporaryDirectory(prefix="transformer-step-") as place, Progress() as progress:
        task = progress.task("Writing random weights", total=1)
        folder = Path(place) / "checkpoint"
        write_random_checkpoint(folder, replace(_small(), transformer=config))
        checkpoint = open_checkpoint(str(folder))
        task.advance()
        timings = measure(checkpoint, folder, Path(place), size, rounds, threads, progress)
    show(timings)
    if json_file is not None:
        report = {
            "machine": machine,
            "double_blocks": double_blocks,
            "single_blocks": single_blocks,
            "image_tokens": (size // 16) ** 2,
            "text_tokens": TEXT_TOKENS,
            "threads": threads,
            "timings": [vars(timing) for timing in timings],
            "ratios": {
                f"{timing.name} over {eager.name}": ratio(eager, timing)
                for timing in timings
                for eager in timings
                if eager.name in EAGER and timing.name not in EAGER
            },
        }
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _small() -> Sizes:
    """FLUX.1 with the smallest of everything that is not timed."""
    return Sizes(
        FLUX_DEV.transformer,
        VaeConfig(16, (8, 8), 1, 4, 0.3611, 0.1159),
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=12,
            eos_token_id=2,
        ),
        T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        ),
    )


def write_random_checkpoint(folder: Path, sizes: Sizes) -> None:
    """A checkpoint whose transformer has weights as a trained one's in size, from a seed."""
    write_sparse_checkpoint(folder, sizes)
    file = read_header(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    random = np.random.default_rng(0)
    with file.path.open("r+b") as output:
        for name, entry in file.tensors.items():
            values = random.standard_normal(entry.shape, dtype=np.float32)
            if len(entry.shape) == 2:
                values /= np.sqrt(entry.shape[1])
                # A trained model's gates are small; random ones amplify every rounding.
                values *= 0.1 if ".norm" in name else 1.0
            else:
                values = 0.02 * values + (1.0 if ".norm_" in name else 0.0)
            output.seek(entry.offset)
            output.write(from_float32(values, "BF16").tobytes())


def measure(
    checkpoint: Checkpoint,
    folder: Path,
    place: Path,
    size: int,
    rounds: int,
    threads: int,
    progress: Progress,
) -> list[Timing]:
    """Compare the contenders' outputs, then time them in turns."""
    random = np.random.default_rng(1)
    side = size // 16

    def noise(*shape: int) -> Array:
        return random.standard_normal(shape, dtype=np.float32)

    hidden, text = noise(1, side * side, 64), noise(1, TEXT_TOKENS, 4096)
    pooled, t = noise(1, 768), np.float32([0.7])
    guidance = np.float32([3.5])
    given = {"text_embeddings": text, "pooled_embeddings": pooled}
    condition = run_reference(
        *component_source(checkpoint, "conditioner", "fp32"),
        {**given, "timestep": t, "guidance": guidance},
    )
    rope = RopeSpec(checkpoint.transformer.axes_dims, checkpoint.transformer.theta)
    cos, sin = rope_tables(joint_ids(TEXT_TOKENS, side, side), rope)
    resident = {"context": condition["context"], "rope_cos": cos, "rope_sin": sin}
    moving = {"hidden_states": hidden, "modulation": condition["modulation"][0]}
    ids = np.zeros((side * side, 3), np.float32)
    ids[:, 1:] = np.indices((side, side)).reshape(2, -1).T
    eager = {
        "hidden_states": hidden,
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "timestep": t,
        "guidance": guidance,
        "img_ids": ids,
        "txt_ids": np.zeros((TEXT_TOKENS, 3), np.float32),
    }
    task = progress.task("Opening contenders", total=len(EAGER) + len(PRECISIONS))
    steps: dict[str, Callable[[], Array]] = {}
    for name, dtype in zip(EAGER, (torch.float32, torch.bfloat16), strict=True):
        steps[name] = _eager_step(folder, dtype, eager)
        task.advance()
    for precision in PRECISIONS:
        steps[f"fluxdeploy {precision}"] = _engine_step(
            checkpoint, precision, place / precision, threads, resident, moving
        )
        task.advance()
    reference = steps[EAGER[0]]()
    deviations = {name: Deviation.of(step(), reference) for name, step in steps.items()}
    for name, deviation in deviations.items():
        if deviation.cosine < MIN_COSINE:
            raise click.ClickException(
                f"{name} computes something else: its cosine with float32 is {deviation.cosine:.4f}"
            )
    task = progress.task("Timing", total=rounds * len(steps))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
            task.advance()
    return [
        Timing(name, tuple(seconds[name]), deviations[name].max_error, deviations[name].cosine)
        for name in steps
    ]


def _eager_step(
    folder: Path, dtype: torch.dtype, inputs: Mapping[str, Array]
) -> Callable[[], Array]:
    model = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
    floating = {
        name: torch.from_numpy(array)
        if name.endswith("ids") or name in ("timestep", "guidance")
        else torch.from_numpy(array).to(dtype)
        for name, array in inputs.items()
    }

    @torch.inference_mode()
    def step() -> Array:
        velocity: torch.Tensor = model(**floating, return_dict=False)[0]
        return velocity.float().numpy()

    return step


def _engine_step(
    checkpoint: Checkpoint,
    precision: str,
    folder: Path,
    threads: int,
    resident: Mapping[str, Array],
    moving: Mapping[str, Array],
) -> Callable[[], Array]:
    exported = export_component(
        checkpoint, "transformer", precision, WeightFolder(folder / "weights"), compute="fp32"
    )
    runtime = OnnxRuntime()
    engine = EngineRecord(runtime.name, runtime.version(), "cpu", exported.path, {})
    chain = exported.chain
    record = ComponentRecord(
        "", precision, "fp32", chain.inputs, chain.outputs, (), (engine,), None
    )
    opened = runtime.open("transformer", record, engine, folder, EngineOptions(threads))
    binding = opened.bind(resident)
    gc.collect()
    return lambda: np.array(binding.run(moving)["velocity"])


def ratio(slow: Timing, fast: Timing) -> dict[str, float]:
    """How many times faster `fast` is, round by round: the median, the least and the most."""
    ratios = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def show(timings: Sequence[Timing]) -> None:
    """Print the table."""
    eager = [timing for timing in timings if timing.name in EAGER]
    table = Table("contender", title="A step of the transformer")
    for heading in ("seconds, median", "error", "cosine", *(f"vs {e.name}" for e in eager)):
        table.add_column(heading, justify="right")
    for timing in timings:
        ratios = [ratio(other, timing) for other in eager]
        table.add_row(
            timing.name,
            f"{statistics.median(timing.seconds):.3f}",
            f"{timing.max_error:.4f}",
            f"{timing.cosine:.5f}",
            *(f"{r['median']:.2f} ({r['min']:.2f}-{r['max']:.2f})" for r in ratios),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
