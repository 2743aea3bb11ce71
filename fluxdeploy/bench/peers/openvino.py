"""OpenVINO's own conversion of diffusers' transformer, in the place of the original."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluxdeploy.bench.job import PEERS, Job
from fluxdeploy.bench.peers.conversion import convert_in_process

__all__ = ["openvino_loader"]

_INPUTS = (
    "hidden_states",
    "timestep",
    "guidance",
    "pooled_projections",
    "encoder_hidden_states",
    "txt_ids",
    "img_ids",
)


def openvino_loader(job: Job) -> Callable[[], Any]:
    """What opens diffusers' pipeline with a transformer that OpenVINO runs, with all imports done.

    The first process of a job converts it, in a process of its own: that memory is not the
    pipeline's. Raises `EngineError` where the conversion fails.
    """
    import openvino
    import torch
    from diffusers import FluxPipeline, FluxTransformer2DModel

    file = Path(job.folder) / "openvino" / "transformer.xml"
    if not file.exists():
        failure = f"OpenVINO cannot convert {job.checkpoint}"
        convert_in_process("fluxdeploy.bench.peers.openvino", job.checkpoint, file, failure)
    settings = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[PEERS[job.contender].precision],
        "INFERENCE_NUM_THREADS": job.threads,
        "PERFORMANCE_HINT": "LATENCY",
    }

    def load() -> Any:
        config = FluxTransformer2DModel.load_config(job.checkpoint, subfolder="transformer")
        with torch.device("meta"):  # its weights are OpenVINO's
            network = FluxTransformer2DModel.from_config(config)
        compiled = openvino.Core().compile_model(file, "CPU", settings)

        def forward(**named: Any) -> tuple[torch.Tensor]:
            given = [named[name].numpy() for name in _INPUTS if named.get(name) is not None]
            return (torch.from_numpy(compiled(given)[0]),)

        network.forward = forward
        return FluxPipeline.from_pretrained(
            job.checkpoint, transformer=network, torch_dtype=torch.float32
        )

    return load


def _main(checkpoint: str, file: str) -> None:
    # Its converter sends telemetry where this package of its own can be imported.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino
    import torch
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel.from_pretrained(
        checkpoint, subfolder="transformer", torch_dtype=torch.float32
    )
    config = network.config

    class Step(torch.nn.Module):
        """The transformer with inputs in an order, and one tensor as its output."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            named = dict(zip(names, tensors, strict=True))
            velocity: torch.Tensor = self.network(**named, return_dict=False)[0]
            return velocity

    # Sizes are those of a trace; all of them stay open. A batch of 1 would not.
    b, s, h, w = 2, 8, 4, 6
    example = {
        "hidden_states": torch.randn(b, h * w, config.in_channels),
        "timestep": torch.full((b,), 0.5),
        "guidance": torch.full((b,), 3.5),
        "pooled_projections": torch.randn(b, config.pooled_projection_dim),
        "encoder_hidden_states": torch.randn(b, s, config.joint_attention_dim),
        "txt_ids": torch.zeros(s, 3),
        "img_ids": torch.randn(h * w, 3),
    }
    names = [name for name in _INPUTS if name != "guidance" or config.guidance_embeds]
    with torch.no_grad():
        model = openvino.convert_model(Step(), example_input=tuple(example[n] for n in names))
    Path(file).parent.mkdir(exist_ok=True)
    openvino.save_model(model, file, compress_to_fp16=False)


if __name__ == "__main__":
    _main(*sys.argv[1:])
