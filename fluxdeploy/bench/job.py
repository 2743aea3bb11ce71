"""What a contender is to do: the same words for the command and for the contender's own process."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PEERS", "Job", "Peer"]


@dataclass(frozen=True)
class Peer:
    """Something else that runs the same model, from the original checkpoint.

    precision: what it computes in. packages: what must be installed, by import name and by what
    `pip` calls it. cpu_only: it does not run on GPUs.
    """

    title: str
    precision: str
    packages: tuple[tuple[str, str], ...]
    cpu_only: bool = False


_DIFFUSERS = (("torch", "torch"), ("transformers", "transformers"), ("diffusers", "diffusers"))
_OPENVINO = (*_DIFFUSERS, ("openvino", "openvino"))
_OPTIMUM = (*_DIFFUSERS, ("optimum.onnxruntime", "optimum-onnx[onnxruntime]"))

PEERS = {
    "eager": Peer("PyTorch eager", "fp32", _DIFFUSERS),
    "eager-bf16": Peer("PyTorch eager", "bf16", _DIFFUSERS),
    "compile": Peer("torch.compile", "fp32", _DIFFUSERS),
    "compile-bf16": Peer("torch.compile", "bf16", _DIFFUSERS),
    "openvino": Peer("OpenVINO's conversion", "fp32", _OPENVINO, cpu_only=True),
    "openvino-bf16": Peer("OpenVINO's conversion", "bf16", _OPENVINO, cpu_only=True),
    "optimum": Peer("optimum-onnx", "fp32", _OPTIMUM),
}
"""What `--against` takes."""


@dataclass(frozen=True)
class Job:
    """A picture to make again and again: everything that all contenders must agree on.

    contender: a name of `PEERS`, or "bundle". bundle, checkpoint, folder: paths; `checkpoint` is
    empty where none is needed, `folder` is where the process may write. latents: a file with the
    noise to begin with, float32 [B, L, C], packed; a bundle draws the same from `seed`. gpu: the
    index of the GPU where `device` is cuda. bundle_hash: the content hash of the bundle that the
    command has opened; empty for peers.
    """

    contender: str
    bundle: str
    checkpoint: str
    folder: str
    latents: str
    runtime: str
    device: str
    threads: int
    prompt: str
    seed: int
    height: int
    width: int
    steps: int
    guidance: float
    batch: int
    text_tokens: int
    gpu: int = 0
    bundle_hash: str = ""
