"""How large a transformer's activations get, for static scales, measured without a GPU.

The inputs of the linears and V are measured along the way from noise to picture, for a few prompts
and sizes. Queries and keys are not measured: their norm bounds them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.calibrate.trajectory import Calibration, Sample, finite, start_samples, take_step
from exporters.checkpoint import Checkpoint, Weights
from exporters.checkpoint.tensors import find_tensor
from exporters.components.chain import Chain, Stage
from exporters.components.registry import COMPONENTS
from exporters.components.run import linear_modules, shared_inputs, watch_linears
from exporters.models.mmdit import DoubleBlock, SingleBlock
from fluxdeploy.bundle.files import disk_errors
from fluxdeploy.bundle.tensorfile import TensorFileWriter, read_header, read_tensor
from fluxdeploy.bundle.typed_json import load_strict, to_plain
from fluxdeploy.errors import CheckpointError, ExportError
from fluxdeploy.progress import Progress

__all__ = ["ActivationRanges", "attentions", "channel_maxima", "linears", "measure_ranges"]

_METHOD = 2
"""Raised whenever another code would measure other numbers, so that no old state is taken over."""

_VALUE_LINEARS = (".to_v", ".add_v_proj")
_QUERY_NORMS = ("attn.norm_q.weight", "attn.norm_added_q.weight")
_KEY_NORMS = ("attn.norm_k.weight", "attn.norm_added_k.weight")


@dataclass(frozen=True)
class ActivationRanges:
    """The largest magnitudes of a transformer's activations, without any headroom.

    checkpoint: SHA-256 of the weights that they belong to.
    inputs: of the input of each of the blocks' linears, by the linear's name, such as
        "transformer_blocks.0.attn.to_q". Linears that share an input have equal values.
    values: of an attention's V, over both streams, by its name, "transformer_blocks.0.attn".
    queries, keys: upper bounds of an attention's Q, after its scaling by head_dim^-0.5, and K.
    channels: of each channel of an input, by the first of the linears that read it; see
        `channel_maxima`.

    A value is 0 where an activation was always 0.
    """

    checkpoint: str
    calibration: Calibration
    inputs: Mapping[str, float]
    values: Mapping[str, float]
    queries: Mapping[str, float]
    keys: Mapping[str, float]
    channels: Mapping[str, str] = field(default_factory=dict)


_STEPS, _ZERO = 4, 128
"""A channel's code is so many steps an octave above 2^(-_ZERO / _STEPS), rounded up."""


def channel_maxima(ranges: ActivationRanges, first: str) -> NDArray[np.float32]:
    """The largest magnitudes of an input's channels, float32 [in], up to a fifth too large.

    `ActivationRanges.channels` has a byte of each in base64. Raises `ExportError` for an input that
    was not measured.
    """
    if first not in ranges.channels:
        raise ExportError(
            f"The activation ranges lack the channels of {first}: measure them again."
        )
    codes = np.frombuffer(base64.b64decode(ranges.channels[first]), np.uint8)
    return np.exp2((codes.astype(np.float32) - _ZERO) / _STEPS)


def _encode_channels(maxima: NDArray[np.float32]) -> str:
    octaves = np.log2(np.maximum(maxima, np.finfo(np.float32).tiny))
    codes = np.ceil(_STEPS * octaves + _ZERO).clip(0, 255).astype(np.uint8)
    return base64.b64encode(codes.tobytes()).decode()


def measure_ranges(
    checkpoint: Checkpoint,
    digest: str,
    calibration: Calibration,
    state: Path | None,
    progress: Progress,
) -> ActivationRanges:
    """Run the float32 transformer over a calibration and record how large its activations get.

    `digest` is the SHA-256 of the checkpoint's weights. `state` is a file for what is known after
    each step: a run that was cut off goes on from there, and the file is removed at the end. Beside
    the weights of one block, memory holds the residual stream of every prompt at every size.

    Raises `UsageError` for a calibration that no picture can be made with, `CheckpointError` for
    missing tensors, `NumericError` for an activation that is not finite, `BundleError` where the
    disk refuses.
    """
    chain, weights = COMPONENTS["transformer"].source(checkpoint, "fp32")
    # RMSNorm leaves a head's vector with an L2 norm of at most sqrt(head_dim) * max|gamma|, which
    # RoPE keeps. No channel is larger than the whole vector; the scale of Q cancels the root.
    root = math.sqrt(checkpoint.transformer.head_dim)
    blocks = {f"{block.scope}attn": block for block in _blocks(chain)}
    queries = {name: _gamma(block, weights, _QUERY_NORMS) for name, block in blocks.items()}
    keys = {name: root * _gamma(block, weights, _KEY_NORMS) for name, block in blocks.items()}
    samples = start_samples(checkpoint, calibration, progress)
    recorder = _Recorder(frozenset(linears(chain)), shared_inputs(chain))
    enter = watch_linears(chain, recorder.see)
    key = _state_key(digest, calibration)
    first = 0 if state is None else _load_state(state, key, samples, recorder)
    task = progress.task("Measuring activations", total=calibration.steps * len(chain.stages))
    task.advance(first * len(chain.stages))
    for step in range(first, calibration.steps):
        take_step(chain, weights, samples, step, enter, task.advance)
        if state is not None and step + 1 < calibration.steps:
            _save_state(state, key, step + 1, samples, recorder)
    if state is not None:
        with disk_errors("remove", state):
            state.unlink(missing_ok=True)
    channels = {first: _encode_channels(seen) for first, seen in recorder.channels.items()}
    return ActivationRanges(
        digest, calibration, recorder.inputs, recorder.values, queries, keys, channels
    )


def linears(chain: Chain) -> tuple[str, ...]:
    """The names of all linears of a transformer's blocks, in order.

    `ActivationRanges.inputs` has these.
    """
    return tuple(
        stage.scope + name for stage in _blocks(chain) for name in linear_modules(stage.piece)
    )


def attentions(chain: Chain) -> tuple[str, ...]:
    """The names of a transformer's attentions, in order.

    `ActivationRanges.values`, `queries` and `keys` have these.
    """
    return tuple(f"{stage.scope}attn" for stage in _blocks(chain))


def _blocks(chain: Chain) -> list[Stage]:
    return [s for s in chain.stages if isinstance(s.piece.module, (DoubleBlock, SingleBlock))]


def _gamma(block: Stage, weights: Weights, norms: Sequence[str]) -> float:
    """max|gamma| over the norms of both streams, or of the one that a single-stream block has."""
    own = dict(block.piece.module.named_parameters())
    shapes = {block.scope + norm: tuple(own[norm].shape) for norm in norms if norm in own}
    gammas = [find_tensor(weights, name, shape).read() for name, shape in shapes.items()]
    return float(np.abs(gammas).max())


@dataclass
class _Recorder:
    """The largest magnitudes seen at the linears of a transformer's blocks."""

    linears: frozenset[str]
    first: Mapping[str, str]
    inputs: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    channels: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def groups(self) -> set[str]:
        """The linears that are the first to read their input."""
        return {self.first[name] for name in self.linears}

    def see(self, name: str, linear: nn.Linear, x: Tensor, output: Tensor) -> None:
        if name not in self.linears:
            return
        self._keep(self.inputs, name, x, f"The input of {name} holds")
        if self.first[name] == name:
            seen = x.abs().flatten(0, -2).amax(0).numpy()
            known = self.channels.setdefault(name, seen)
            np.maximum(known, seen, out=known)
        if name.endswith(_VALUE_LINEARS):
            attention = name.rpartition(".")[0]
            self._keep(self.values, attention, output, f"The output of {name} holds")

    def _keep(self, largest: dict[str, float], name: str, seen: Tensor, what: str) -> None:
        # Both extremes carry NaN along, and neither needs a copy as abs() does.
        low, high = torch.aminmax(seen)
        magnitude = finite(max(abs(low.item()), abs(high.item())), what)
        largest[name] = max(largest.get(name, 0.0), magnitude)


def _state_key(digest: str, calibration: Calibration) -> str:
    """Names everything that the measured numbers depend on."""
    plain = {"method": _METHOD, "checkpoint": digest, "calibration": to_plain(calibration)}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _save_state(
    path: Path, key: str, steps: int, samples: Sequence[Sample], recorder: _Recorder
) -> None:
    """Write what is known after `steps` steps: the samples' latents and the largest magnitudes."""
    largest = {"inputs": recorder.inputs, "values": recorder.values}
    metadata = {"key": key, "steps": str(steps), "largest": json.dumps(largest)}
    tensors = {str(i): np.ascontiguousarray(s.latents) for i, s in enumerate(samples)}
    tensors |= recorder.channels
    declared = [(name, "F32", array.shape) for name, array in tensors.items()]
    with TensorFileWriter(path, declared, metadata) as writer:
        for array in tensors.values():
            writer.write(array)


def _load_state(path: Path, key: str, samples: Sequence[Sample], recorder: _Recorder) -> int:
    """Take over a state; returns the number of steps done, 0 where it is of another measurement.

    A state only saves time: one that is broken is not taken over either.
    """
    if not path.exists():
        return 0
    try:
        file = read_header(path)
        if file.metadata.get("key") != key:
            return 0
        latents = [read_tensor(file, str(i)) for i in range(len(samples))]
        largest = load_strict(file.metadata["largest"])
        inputs, values = dict(largest["inputs"]), dict(largest["values"])
        channels = {n: read_tensor(file, n).copy() for n in recorder.groups if n in file.tensors}
        steps = int(file.metadata["steps"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return 0
    for sample, state in zip(samples, latents, strict=True):
        sample.latents = state
    recorder.inputs.update(inputs)
    recorder.values.update(values)
    recorder.channels.update(channels)
    return steps
