"""The memory that `fluxdeploy plan` foretells against what runtimes take.

A checkpoint of middling size, with random weights, is exported. ONNX Runtime runs its components in
processes of their own, whose peak memory is measured; TensorRT-RTX builds engines of them and says
what memory they will ask for, which needs no GPU.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from exporters.components.registry import COMPONENTS
from fluxdeploy.kernels import AttentionKernels, CallSizes
from fluxdeploy.machine import describe_machine

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint
    from exporters.synthetic.sparse_checkpoint import Sizes

PACKAGES = ("onnxruntime", "tensorrt_rtx", "torch", "numpy")
FACTOR = 1.5
"""What a foretold figure may be off by, either way."""

TARGET = "sm89"


@dataclass(frozen=True)
class Case:
    """A component and what it is run on, and by: a value of `AttentionKernels`."""

    kernels: str
    component: str
    precision: str
    sizes: CallSizes

    def dimensions(self) -> dict[str, int]:
        """The sizes of the symbols of its tensors; the picture is square."""
        sizes, side = self.sizes, round(self.sizes.image**0.5)
        batch = 1 if self.component.startswith("vae") else sizes.batch
        return {
            "B": batch,
            "S": sizes.text,
            "L": sizes.image,
            "T": sizes.text + sizes.image,
            "N": sizes.steps,
            "h": 2 * side,
            "w": 2 * side,
            "H": 16 * side,
            "W": 16 * side,
        }


def _cases() -> Iterator[Case]:
    def case(kernels: AttentionKernels, component: str, precision: str, *sizes: int) -> Case:
        return Case(kernels.value, component, precision, CallSizes(*sizes))

    # Batch, text tokens, image tokens, steps.
    for sizes in ((2, 128, 529, 28), (1, 128, 1024, 28), (1, 128, 2025, 28)):
        yield case(AttentionKernels.PLAIN, "transformer", "fp32", *sizes)
        yield case(AttentionKernels.ONNX_RUNTIME, "transformer", "fp32", *sizes)
    for sizes in ((1, 128, 64, 28), (1, 128, 256, 28)):
        yield case(AttentionKernels.PLAIN, "vae_decoder", "fp32", *sizes)
    yield case(AttentionKernels.PLAIN, "vae_encoder", "fp32", 1, 128, 256, 28)
    yield case(AttentionKernels.PLAIN, "t5", "fp32", 1, 512, 256, 28)
    yield case(AttentionKernels.PLAIN, "conditioner", "fp32", 1, 128, 256, 28)
    for sizes in ((1, 128, 1024, 28), (2, 512, 4096, 28)):
        yield case(AttentionKernels.TENSORRT, "transformer", "bf16", *sizes)
    for sizes in ((1, 128, 1024, 28), (1, 128, 4096, 28), (1, 128, 16384, 28)):
        yield case(AttentionKernels.TENSORRT, "vae_decoder", "bf16", *sizes)
    yield case(AttentionKernels.TENSORRT, "t5", "bf16", 1, 512, 256, 28)
    yield case(AttentionKernels.TENSORRT, "conditioner", "bf16", 1, 512, 256, 28)


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write this file.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default="plan-memory",
    help="Where to work; what an earlier run exported there is used again.",
)
@click.option("--case", "number", type=int, hidden=True)
def main(json_file: Path | None, folder: Path, number: int | None) -> None:
    """Measure the memory of components and hold `fluxdeploy plan` against it.

    Takes about 350 MB of disk. Exits with 1 where a figure is off by more than half.
    """
    cases = list(_cases())
    if number is not None:
        case = cases[number]
        measure = (
            _build_engine
            if AttentionKernels(case.kernels) is AttentionKernels.TENSORRT
            else _run_session
        )
        click.echo(json.dumps(measure(_graph(folder, case), case)))
        return
    from exporters.checkpoint import open_checkpoint
    from exporters.synthetic.sparse_checkpoint import write_random_checkpoint

    if not (folder / "checkpoint").exists():
        # Random weights: equal ones would be stored once in an engine.
        write_random_checkpoint(folder / "checkpoint", middling())
    checkpoint = open_checkpoint(folder / "checkpoint")
    for case in cases:
        _export(checkpoint, folder, case)
    rows = []
    for index, case in enumerate(cases):
        command = [sys.executable, __file__, "--folder", str(folder), "--case", str(index)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"{case} failed: {done.stderr[-2000:]}")
        measured = json.loads(done.stdout.splitlines()[-1])
        element = 2 if case.precision == "bf16" else 4
        count = COMPONENTS[case.component].activations
        planned = count(checkpoint, case.sizes, AttentionKernels(case.kernels), element)
        rows.append(asdict(case) | measured | {"planned": planned})
        ratio = planned / measured["activations"]
        click.echo(f"{case.kernels}: {case.component} {case.sizes}: {ratio:.2f}", err=True)
    _show(rows)
    if json_file is not None:
        report = {"machine": describe_machine(PACKAGES), "factor": FACTOR, "rows": rows}
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    off = [row for row in rows if not 1 / FACTOR <= row["planned"] / row["activations"] <= FACTOR]
    if off:
        raise click.ClickException(f"{len(off)} figures are off by more than {FACTOR}.")


def middling() -> Sizes:
    """Sizes at which activations count: 25 M parameters in the blocks, half of FLUX.1's VAE."""
    from transformers import CLIPTextConfig, T5Config

    from exporters.checkpoint.config import TransformerConfig, VaeConfig
    from exporters.synthetic.sparse_checkpoint import Sizes

    return Sizes(
        TransformerConfig(64, 64, 512, 64, 2048, 2, 4, 256, 128, True, (8, 28, 28), 10000.0),
        VaeConfig(16, (64, 128, 256, 256), 2, 32, 0.3611, 0.1159),
        CLIPTextConfig(
            vocab_size=1000,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            eos_token_id=2,
        ),
        T5Config(
            vocab_size=4000,
            d_model=256,
            d_kv=64,
            d_ff=640,
            num_layers=4,
            num_heads=8,
            feed_forward_proj="gated-gelu",
        ),
    )


def _graph(folder: Path, case: Case) -> Path:
    return folder / f"{case.kernels}, {case.precision}" / f"{case.component}.onnx"


def _export(checkpoint: Checkpoint, folder: Path, case: Case) -> None:
    from exporters.export import export_component, specify
    from exporters.weights.bind import WeightFolder

    path = _graph(folder, case)
    if not path.exists():
        weights = WeightFolder(path.parent / "weights")
        fused = AttentionKernels(case.kernels) is AttentionKernels.ONNX_RUNTIME
        spec = specify(checkpoint, COMPONENTS[case.component], case.precision)
        export_component(spec, weights, fused=fused)


def _run_session(path: Path, case: Case) -> dict[str, int]:
    """Peak resident memory of a run, besides what the open session holds."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    before = _resident()
    session = onnxruntime.InferenceSession(str(path), options)
    # What opening left free to the allocator would be taken first, and hide what a run takes.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    opened = _resident()
    sizes, inputs = case.dimensions(), {}
    for tensor in session.get_inputs():
        shape = [sizes[d] if isinstance(d, str) else d for d in tensor.shape]
        kind = np.int32 if "int32" in tensor.type else np.float32
        inputs[tensor.name] = np.ones(shape, kind)
    ready = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    session.run(None, inputs)
    return {"activations": _resident("VmHWM:") - ready, "weights": opened - before}


def _resident(field: str = "VmRSS:") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def _build_engine(path: Path, case: Case) -> dict[str, int]:
    """What TensorRT-RTX says that the engine takes at the largest shapes of its profile."""
    import onnx
    import tensorrt_rtx as trt

    said: dict[str, int] = {}

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if message.startswith(("Total Activation Memory:", "Total Weights Memory:")):
                what, _, number = message.partition(": ")
                said[what] = int(number.split()[0])

    logger = Logger()
    builder = trt.Builder(logger)
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise click.ClickException(f"{path} cannot be read by TensorRT-RTX.")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, TARGET.upper()), 0)
    most = case.dimensions()
    least = {symbol: min(16, size) for symbol, size in most.items()} | {"B": 1, "N": 1, "T": 32}
    profile = builder.create_optimization_profile()
    for tensor in onnx.load(path, load_external_data=False).graph.input:
        shape = [d.dim_param or d.dim_value for d in tensor.type.tensor_type.shape.dim]
        small, large = _shape(shape, least), _shape(shape, most)
        profile.set_shape(tensor.name, small, large, large)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise click.ClickException(f"{path} cannot be built by TensorRT-RTX.")
    return {
        "activations": said["Total Activation Memory"],
        "weights": said["Total Weights Memory"],
        "engine": plan.nbytes,
    }


def _shape(shape: list[int | str], sizes: Mapping[str, int]) -> list[int]:
    return [sizes[d] if isinstance(d, str) else d for d in shape]


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table("kernels", "component", "precision", "batch, text, image tokens")
    for heading in ("measured", "planned", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        load, measured, planned = row["sizes"], row["activations"], row["planned"]
        table.add_row(
            row["kernels"],
            row["component"],
            row["precision"],
            f"{load['batch']}, {load['text']}, {load['image']}",
            f"{measured / 1e6:.1f} MB",
            f"{planned / 1e6:.1f} MB",
            f"{planned / measured:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
