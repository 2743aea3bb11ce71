"""The sizes of an IP-Adapter, read from the tensors' own shapes."""

from __future__ import annotations

from dataclasses import dataclass

from exporters.checkpoint.config import count_blocks, shape_of
from exporters.checkpoint.tensors import Weights
from fluxdeploy.errors import CheckpointError

__all__ = ["IpAdapterConfig"]


@dataclass(frozen=True)
class IpAdapterConfig:
    """Sizes of an IP-Adapter.

    embedding_width: of a picture's embedding. tokens, token_width: what it is projected to. blocks,
        width: the double-stream blocks that attend to them, and their width.
    """

    embedding_width: int
    tokens: int
    token_width: int
    blocks: int
    width: int

    @classmethod
    def of(cls, weights: Weights) -> IpAdapterConfig:
        """The sizes of `weights`. Raises `CheckpointError` where they contradict each other."""
        rows, embedding_width = shape_of(weights, "image_proj.proj.weight", 2)
        (token_width,) = shape_of(weights, "image_proj.norm.weight", 1)
        width, _ = shape_of(weights, "ip_adapter.0.to_k_ip.weight", 2)
        if rows % token_width:
            raise CheckpointError(
                f"The IP-Adapter projects a picture to {rows} numbers, and its norm is one of "
                f"{token_width}: no whole number of tokens. It is damaged, or of another kind."
            )
        blocks = count_blocks(weights, r"ip_adapter\.(\d{1,9})\.")
        return cls(embedding_width, rows // token_width, token_width, blocks, width)
