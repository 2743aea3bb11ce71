"""What a component is: all that an export, a build and a plan must know of it, declared once."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from transformers import CLIPTextConfig, T5Config

from exporters.checkpoint import Checkpoint, Weights
from exporters.checkpoint.config import TransformerConfig, VaeConfig
from exporters.checkpoint.controlnet_config import ControlNetConfig
from exporters.checkpoint.image_encoder_config import ImageEncoderConfig
from exporters.checkpoint.ip_adapter_config import IpAdapterConfig
from exporters.checkpoint.redux_config import ReduxConfig
from exporters.components.chain import Chain
from exporters.components.pieces import COMPUTE_TYPES, ComputeType
from fluxdeploy.errors import ExportError, UsageError
from fluxdeploy.kernels import AttentionKernels, CallSizes
from fluxdeploy.precision import PRECISIONS, Quantization

__all__ = ["FLOATS", "WEIGHTS_ONLY", "Component", "Networks", "Turn"]

FLOATS = tuple(name for name, row in PRECISIONS.items() if row.quantization is None)
"""The precisions in which nothing is quantized, which every component can have."""

WEIGHTS_ONLY = tuple(
    name
    for name, row in PRECISIONS.items()
    if row.quantization is None or row.quantization == Quantization(row.quantization.format)
)
"""Those in which nothing but weights is quantized, and those in which nothing is."""

Turn = Literal["encode", "denoise", "decode"]
"""When a picture from text needs a component: what `--low-vram` has open at a time."""


class Networks(Protocol):
    """The sizes of the networks: a checkpoint's, or those of one that is to be written."""

    @property
    def transformer(self) -> TransformerConfig: ...

    @property
    def vae(self) -> VaeConfig: ...

    @property
    def clip(self) -> CLIPTextConfig: ...

    @property
    def t5(self) -> T5Config: ...

    @property
    def controlnets(self) -> Sequence[ControlNetConfig]: ...

    @property
    def ip_adapter_encoder(self) -> ImageEncoderConfig | None: ...

    @property
    def ip_adapter(self) -> IpAdapterConfig | None: ...

    @property
    def redux(self) -> ReduxConfig | None: ...


@dataclass(frozen=True)
class Component:
    """One network of a bundle.

    part: the part of a checkpoint that it takes its tensors from.
    chain: makes its chain, in a type.
    activations: bytes that a run takes besides the weights; see `exporters.components.activations`.
    turn: when a picture from text needs it, None where it does not.
    precisions: what it can be built in.
    quantized: a pattern of the linears that a quantized precision quantizes, by their names in the
        diffusers layout. These are large, and their inputs are many rows of tokens. Left alone are
        the projections of image and text, the MLPs of timestep, guidance and pooled text, and the
        final AdaLN with its projection: they are small, and pictures are sensitive to them.
    overflows_fp16: whether its values leave float16's range; bfloat16 has float32's.
    one_head: whether its attention has a single head as wide as the network, as the VAE's: of all
        runtimes, ONNX Runtime alone computes that in one kernel, on CPUs.
    vocabulary: of a text encoder, the number of token ids.
    present: whether a checkpoint has it; a bundle may lack a component.
    """

    name: str
    part: str
    chain: Callable[[Networks, ComputeType], Chain]
    activations: Callable[[Networks, CallSizes, AttentionKernels, int], int]
    turn: Turn | None = None
    precisions: Collection[str] = FLOATS
    quantized: str | None = None
    overflows_fp16: bool = False
    one_head: bool = False
    vocabulary: Callable[[Networks], int] | None = None
    present: Callable[[Networks], bool] = lambda networks: True

    def source(self, checkpoint: Checkpoint, compute: str) -> tuple[Chain, Weights]:
        """Its chain in a compute type, and the tensors that it takes its weights from.

        Raises `ExportError` for a type that nothing computes in, and `CheckpointError` for a part
        that is missing or broken.
        """
        if compute not in COMPUTE_TYPES:
            allowed = ", ".join(COMPUTE_TYPES)
            raise ExportError(f"Precision {compute!r} is not exported; {allowed} are.")
        chain = self.chain(checkpoint, COMPUTE_TYPES[compute])
        return chain, checkpoint.part(self.part).weights

    def precision_beside(self, precision: str) -> str:
        """The precision that it gets where the transformer's is `precision`."""
        if self.name == "transformer":
            return precision
        row = PRECISIONS[precision]
        chosen = row.others.get(self.name, row.rest)
        return "bf16" if chosen == "fp16" and self.overflows_fp16 else chosen

    def compute_type(self, precision: str, usual: str) -> str:
        """What it computes in, where a runtime computes in `usual` for that precision.

        float32 around quantized weights where that would be float16 and overflow.
        """
        quantized = PRECISIONS[precision].quantization is not None
        return "fp32" if self.overflows_fp16 and quantized and usual == "fp16" else usual

    def check_precision(self, precision: str) -> None:
        """Raise `UsageError` for a precision that it is not built in."""
        if precision not in self.precisions:
            raise UsageError(
                f"Precision {precision!r} is not one of {self.name}'s; those are "
                f"{', '.join(self.precisions)}."
            )

    def is_quantized(self, linear: str) -> bool:
        """Whether a linear, such as `transformer_blocks.0.attn.to_q`, is one of the large ones."""
        return self.quantized is not None and re.fullmatch(self.quantized, linear) is not None
