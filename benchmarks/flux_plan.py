"""Plans of FLUX.1-dev's transformer for the native runtime, and their kernels: no GPU, no weights.

    python benchmarks/flux_plan.py FOLDER --double-blocks 19 --single-blocks 38

For `gpu_step.py`, which fills them with random weights. The activations' ranges are guesses that
are right for such weights, and wide enough.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import click
import onnx_ir as ir
from plan_files import PRECISIONS

from engines.native.compile import compile_kernels
from engines.native.match import match
from engines.native.works import works_metadata
from exporters.calibrate.ranges import ActivationRanges
from exporters.calibrate.trajectory import Calibration
from exporters.checkpoint import open_checkpoint
from exporters.components.registry import COMPONENTS
from exporters.export import specify
from exporters.graph.quantize import quantize
from exporters.graph.trace import trace_chain
from exporters.synthetic.sparse_checkpoint import flux_of_depth, write_sparse_checkpoint
from fluxdeploy.progress import Progress

__all__ = ["write_plan"]

_LARGEST = {"to_out": 1.0, "to_add_out": 1.0, "net.2": 6.0, "proj_out": 6.0}
"""The largest inputs of linears by parts of their names; of others see `_INPUT`."""
_INPUT, _VALUE, _HEAD = 8.0, 4.0, 12.0


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--double-blocks", default=19, show_default=True)
@click.option("--single-blocks", default=38, show_default=True)
@click.option("--precision", "precisions", type=click.Choice(PRECISIONS), multiple=True)
def main(folder: Path, double_blocks: int, single_blocks: int, precisions: tuple[str, ...]) -> None:
    """Write PRECISION.json and the kernels' cubins below FOLDER."""
    for precision in precisions or PRECISIONS:
        write_plan(folder, double_blocks, single_blocks, precision)


def write_plan(folder: Path, double_blocks: int, single_blocks: int, precision: str) -> None:
    """Write a plan with its kernels, for `load_plan`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary)
        write_sparse_checkpoint(checkpoint, flux_of_depth(double_blocks, single_blocks))
        spec = specify(open_checkpoint(checkpoint), COMPONENTS["transformer"], precision, "bf16")
        model = trace_chain(spec.chain)
        if spec.layers is not None:
            layers = replace(spec.layers, ranges=_ranges(double_blocks, single_blocks))
            boundary = len(spec.chain.inputs)
            quantize(model, boundary, spec.name, spec.component.is_quantized, layers)
        _declare_weights(model, len(spec.chain.inputs))
    plan = match(model)
    kernels = compile_kernels(plan, Progress(quiet=True))
    for name, (_, cubin) in kernels.items():
        (folder / f"{name}.cubin").write_bytes(cubin)
    written = {
        "plan": plan.to_json(),
        "packed": [asdict(each) for each in plan.packed],
        "metadata": works_metadata(plan, {name: kernel for name, (kernel, _) in kernels.items()}),
        "cubins": sorted(kernels),
    }
    (folder / f"{precision}.json").write_text(json.dumps(written), encoding="utf-8")


def _declare_weights(model: ir.Model, boundary: int) -> None:
    """Make initializers of a graph's parameters, whose numbers nobody reads."""
    inputs = model.graph.inputs
    for value in list(inputs[boundary:]):
        inputs.remove(value)
        assert value.dtype is not None
        value.const_value = ir.ExternalTensor(
            "nowhere", 0, 0, value.dtype, shape=value.shape, name=str(value.name)
        )
        model.graph.register_initializer(value)


def _ranges(double_blocks: int, single_blocks: int) -> ActivationRanges:
    linears = [
        f"transformer_blocks.{i}.{name}"
        for i in range(double_blocks)
        for name in (
            *(f"attn.{n}" for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj")),
            *("attn.add_v_proj", "attn.to_out.0", "attn.to_add_out"),
            *(f"{ff}.net.{n}" for ff in ("ff", "ff_context") for n in ("0.proj", "2")),
        )
    ]
    linears += [
        f"single_transformer_blocks.{i}.{name}"
        for i in range(single_blocks)
        for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
    ]
    attentions = [
        f"{kind}.{i}.attn"
        for kind, count in (
            ("transformer_blocks", double_blocks),
            ("single_transformer_blocks", single_blocks),
        )
        for i in range(count)
    ]
    inputs = {
        name: next((v for part, v in _LARGEST.items() if part in name), _INPUT) for name in linears
    }
    return ActivationRanges(
        checkpoint="",
        calibration=Calibration((), 0, (), 0, 0.0),
        inputs=inputs,
        values=dict.fromkeys(attentions, _VALUE),
        queries=dict.fromkeys(attentions, _HEAD * 128**-0.5),
        keys=dict.fromkeys(attentions, _HEAD),
    )


if __name__ == "__main__":
    main()
