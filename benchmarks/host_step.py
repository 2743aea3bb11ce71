"""What the host does in a step besides the network: arithmetic, checks, binding and copies.

At FLUX.1's sizes, with the transformer's inputs and outputs around a network that does nothing, in
each runtime of this machine's CPU. A whole step less the bare call of that network is the host's
own work; docs/performance.md has the arithmetic.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from engines import Engine, EngineOptions
from engines.registry import runtimes
from exporters.components.pieces import COMPUTE_TYPES
from exporters.components.registry import COMPONENTS
from exporters.synthetic.sparse_checkpoint import FLUX_DEV
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord, RopeSpec, TensorSpec
from fluxdeploy.host.cancel import CancelToken
from fluxdeploy.host.finite import check_finite
from fluxdeploy.host.loop import denoise
from fluxdeploy.host.prompts import Condition
from fluxdeploy.host.velocity import HiddenStates, ModulatedTransformer
from fluxdeploy.machine import describe_machine
from fluxdeploy.sampling import euler
from fluxdeploy.sampling.rope import joint_ids, rope_tables

Array = np.ndarray[Any, np.dtype[Any]]

TEXT_TOKENS = 512
PACKAGES = ("numpy", "onnxruntime", "openvino", "torch")


@click.command()
@click.option("--size", default=1024, show_default=True, help="Pixels of a side of the picture.")
@click.option("--steps", default=28, show_default=True)
@click.option("--rounds", default=20, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write this file.")
def main(size: int, steps: int, rounds: int, json_file: Path | None) -> None:
    """Time a step around a network that does nothing, and each part of it alone."""
    given = make_inputs(size, steps)
    microseconds = {"arithmetic": arithmetic(given, rounds)}
    with tempfile.TemporaryDirectory(prefix="host-step-") as place:
        path = Path(place) / "onnx" / "transformer.onnx"
        path.parent.mkdir()
        specs = write_empty_network(path)
        for name in ("onnxruntime", "openvino"):
            microseconds[name] = around_engine(name, Path(place), specs, given, rounds)
    result = {
        "machine": describe_machine(PACKAGES),
        "size": size,
        "steps": steps,
        "rounds": rounds,
        "microseconds": microseconds,
    }
    show(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_inputs(size: int, steps: int) -> dict[str, Array]:
    """The transformer's inputs for one picture of FLUX.1-dev, the modulation of all steps."""
    config, side = FLUX_DEV.transformer, size // 16
    random = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape, np.float32)

    ids = joint_ids(TEXT_TOKENS, side, side, len(config.axes_dims))
    cos, sin = rope_tables(ids, RopeSpec(config.axes_dims, config.theta))
    return {
        "hidden_states": normal(1, side * side, config.in_channels),
        "context": normal(1, TEXT_TOKENS, config.width),
        "modulation": normal(steps, 1, config.modulation_rows, config.width),
        "rope_cos": cos,
        "rope_sin": sin,
    }


def write_empty_network(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """A graph with the transformer's tensors whose velocity is what it was given."""
    chain = COMPONENTS["transformer"].chain(FLUX_DEV, COMPUTE_TYPES["fp32"])

    def info(spec: TensorSpec) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape)

    graph = helper.make_graph(
        [helper.make_node("Neg", ["hidden_states"], ["velocity"])],
        "empty",
        [info(spec) for spec in chain.inputs],
        [info(spec) for spec in chain.outputs],
    )
    opsets = [helper.make_opsetid("", 22)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return chain.inputs, chain.outputs


def arithmetic(given: dict[str, Array], rounds: int) -> dict[str, float]:
    """Median microseconds of what the loop does with NumPy, the whole and its parts."""
    latents, steps = given["hidden_states"].copy(), len(given["modulation"])
    velocity, change = np.zeros_like(latents), np.empty_like(latents)
    sigmas = np.linspace(1, 0, steps + 1, dtype=np.float32)

    def loop() -> None:
        denoise(euler, latents, sigmas, lambda step, x: velocity)

    return {
        "a step": medians(loop, rounds, steps),
        "velocity x difference": medians(
            lambda: np.multiply(velocity, np.float32(-0.04), out=change), rounds, 1
        ),
        "latents + change": medians(lambda: np.add(latents, change, out=latents), rounds, 1),
        "are they finite": medians(lambda: check_finite(latents, "transformer"), rounds, 1),
    }


def around_engine(
    name: str,
    root: Path,
    specs: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]],
    given: dict[str, Array],
    rounds: int,
) -> dict[str, float]:
    """Median microseconds of a step with a runtime around the empty network, and of its parts."""
    (runtime,) = runtimes(name)
    engine = EngineRecord(name, runtime.version(), "cpu", "onnx/transformer.onnx", {})
    record = ComponentRecord("", "fp32", "fp32", *specs, (), (engine,), None)
    steps = len(given["modulation"])
    sigmas = np.linspace(1, 0, steps + 1, dtype=np.float32)
    latents = given["hidden_states"].copy()
    with runtime.open("transformer", record, engine, root, EngineOptions()) as opened:
        resident = {n: given[n] for n in ("context", "rope_cos", "rope_sin")}
        binding = opened.bind(resident)
        condition = Condition(given["context"], given["modulation"], np.array([0]))
        positions = {name: given[name] for name in ("rope_cos", "rope_sin")}
        hidden = HiddenStates(latents.shape)
        velocity = ModulatedTransformer(opened, condition, positions, hidden, CancelToken())
        changing = {"hidden_states": latents, "modulation": given["modulation"][0]}
        return {
            "a step": medians(lambda: denoise(euler, latents, sigmas, velocity), rounds, steps),
            "binding and call": medians(lambda: binding.run(changing), rounds, 1),
            "the call alone": medians(bare_call(opened, binding), rounds, 1),
        }


def bare_call(engine: Engine, binding: Any) -> Callable[[], object]:
    """The runtime's own call, all tensors in place."""
    if hasattr(engine, "session"):
        return lambda: engine.session.run_with_iobinding(binding._binding)
    return lambda: binding._request.infer(share_outputs=True)


def medians(run: Callable[[], object], rounds: int, steps: int) -> float:
    """Microseconds of a step: the median of `rounds` runs of `steps` each, after one more."""
    taken = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return 1e6 * statistics.median(taken[1:]) / steps


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("", "", "microseconds", title=f"A step at {result['size']}x{result['size']}")
    for name, parts in result["microseconds"].items():
        for part, value in parts.items():
            table.add_row(name, part, f"{value:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
