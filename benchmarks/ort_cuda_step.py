"""A step of FLUX.1-dev's transformer at full width through ONNX Runtime on a GPU, beside PyTorch.

    python benchmarks/ort_cuda_step.py FOLDER --json result.json

The graphs in FOLDER are those of `ort_cuda_graphs.py`, which needs no GPU and may have run on
another machine. Weights are random and made here; all contenders have the same ones and the same
inputs, and each is alone on the GPU in a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from gpu_kernels import has_gpu
from gpu_step import run_contenders
from ort_cuda_files import GRAPHS

WORKER = Path(__file__).with_name("ort_cuda_worker.py")

CONTENDERS = {"eager": 40, **dict.fromkeys(GRAPHS, 40)}
"""In this order, and the seconds that each may take at most."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--double-blocks", default=5, show_default=True, help="As the graphs have them.")
@click.option("--single-blocks", default=10, show_default=True, help="As the graphs have them.")
@click.option("--size", "sizes", type=int, multiple=True, default=(1024, 512), show_default=True)
@click.option("--seconds", default=110, show_default=True, help="Stop after this time.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
def main(
    folder: Path,
    double_blocks: int,
    single_blocks: int,
    sizes: tuple[int, ...],
    seconds: int,
    json_file: Path | None,
) -> None:
    """Time a step of each contender at each size, and print a table."""
    if not has_gpu():
        raise click.ClickException("PyTorch finds no NVIDIA GPU here.")
    rest = [str(n) for n in (double_blocks, single_blocks, *sizes)]
    commands = {
        name: [sys.executable, str(WORKER), name, str(folder), *rest] for name in CONTENDERS
    }
    run_contenders(commands, CONTENDERS, seconds, json_file)


if __name__ == "__main__":
    main()
