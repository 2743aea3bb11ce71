"""The kernels that a step spends its time in, once each, for NVIDIA's profiler to look at.

    CUBINS=FOLDER ncu --clock-control none --section SpeedOfLight --section WarpStateStats \\
        --section MemoryWorkloadAnalysis python benchmarks/gpu_profile.py

`native_kernels.py` compiles FOLDER, on a machine that need not have a GPU. At 1024x1024, with 512
tokens of text.
"""

from __future__ import annotations

import gpu_kernels_worker as worker
import torch

from engines.native.tiles import choose_tiles


def main() -> None:
    """Run the products out of the blocks, those with QKV, and attention, in both precisions."""
    torch.manual_seed(1)
    tokens = worker.ROWS[0]
    for kind in ("fp8", "bf16"):
        for shape in worker.PRODUCTS:
            inner, columns, epilogue = shape
            turned = kind == "fp8" and epilogue == "split"
            builds, _ = worker._linears(kind, tokens, shape, turned, specialized=True)
            split = 3 * worker.WIDTH if epilogue == "split" else 0
            tile = choose_tiles(kind, columns, inner, epilogue, split)[-1]
            if str(tile) in builds:
                print(f"{kind}, {tokens}x{inner}x{columns}, {epilogue}, {tile}")
                builds[str(tile)]().run()
    joint = worker._random(tokens, 3, worker.WIDTH // worker.HEAD_DIM, worker.HEAD_DIM)
    for name, build in worker._attentions(joint).items():
        if name.startswith("native"):
            print(f"attention, {name}")
            build().run()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
