"""A checkpoint of either layout: its networks' tensors and configs, tokenizers and constants."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CLIPTextConfig, T5Config

from exporters.checkpoint.config import TransformerConfig, VaeConfig
from exporters.checkpoint.tensors import StoredTensor, Weights
from fluxdeploy.bundle.manifest import Defaults, ScheduleSpec
from fluxdeploy.errors import CheckpointError

__all__ = ["Checkpoint", "Part", "read_json"]


@dataclass(frozen=True)
class Part:
    """A network of a checkpoint: tensors under the names of the graphs, and its config.json."""

    weights: Weights
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A FLUX.1 checkpoint whose headers have been read, and no weight.

    `parts` holds those of `transformer`, `vae`, `clip` and `t5` that were found, `absent` what to
    tell of the others; `tokenizers` the folders of `clip` and `t5`; `settings` what the
    checkpoint's author recorded for hosts under `_fluxdeploy` in model_index.json.
    """

    root: Path
    layout: str
    parts: Mapping[str, Part]
    absent: Mapping[str, str]
    tokenizers: Mapping[str, Path]
    scheduler: Mapping[str, Any] | None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> Part:
        """A network's part. Raises `CheckpointError`, naming what was looked for."""
        if name not in self.parts:
            raise CheckpointError(f"{self.root} has no {name}: {self.absent[name]}.")
        return self.parts[name]

    def tokenizer(self, name: str) -> Path:
        """A tokenizer's folder. Raises `CheckpointError` where there is none."""
        if name not in self.tokenizers:
            folder = {"clip": "tokenizer", "t5": "tokenizer_2"}[name]
            raise CheckpointError(f"{self.root} has no tokenizer for {name}: a folder {folder}/.")
        return self.tokenizers[name]

    @functools.cached_property
    def transformer(self) -> TransformerConfig:
        """Sizes of the MM-DiT."""
        part = self.part("transformer")
        return TransformerConfig.of(part.weights, part.config)

    @functools.cached_property
    def vae(self) -> VaeConfig:
        """Sizes of the VAE."""
        part = self.part("vae")
        return VaeConfig.of(part.weights, part.config)

    @functools.cached_property
    def clip(self) -> CLIPTextConfig:
        """Config of the CLIP text encoder."""
        return CLIPTextConfig(**_text_config(self.part("clip").config, "clip"))

    @functools.cached_property
    def t5(self) -> T5Config:
        """Config of the T5 encoder."""
        return T5Config(**_text_config(self.part("t5").config, "t5"))

    @functools.cached_property
    def schedule(self) -> ScheduleSpec:
        """Constants of the schedule: the scheduler's config, or the family's own without one.

        Raises `CheckpointError` for a scheduler that the host does not compute.
        """
        if self.scheduler is None:
            return ScheduleSpec(
                shift=1.0 if not self.transformer.guidance_embedding else 3.0,
                use_dynamic_shifting=self.transformer.guidance_embedding,
                time_shift_type="exponential",
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=4096,
                shift_terminal=None,
            )
        config = self.scheduler
        kind = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if kind != "FlowMatchEulerDiscreteScheduler":
            raise CheckpointError(
                f"the scheduler is {kind}; FlowMatchEulerDiscreteScheduler is the one supported."
            )
        unusual = (
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "invert_sigmas",
            "stochastic_sampling",
        )
        for key in unusual:
            if config.get(key):
                raise CheckpointError(f"the scheduler sets {key}, which is not supported.")
        if config.get("num_train_timesteps", 1000) != 1000:
            raise CheckpointError("the scheduler's num_train_timesteps must be 1000.")
        kind = config.get("time_shift_type", "exponential")
        if kind not in ("exponential", "linear"):
            raise CheckpointError(
                f"the scheduler's time_shift_type is {kind!r}; exponential or linear is allowed."
            )
        # The defaults are those of the scheduler's constructor, which omits nothing on saving
        # but was extended over the years.
        terminal = config.get("shift_terminal")
        return ScheduleSpec(
            shift=_float(config, "shift", 1.0),
            use_dynamic_shifting=bool(config.get("use_dynamic_shifting", False)),
            time_shift_type=kind,
            base_shift=_float(config, "base_shift", 0.5),
            max_shift=_float(config, "max_shift", 1.15),
            base_image_seq_len=int(_float(config, "base_image_seq_len", 256)),
            max_image_seq_len=int(_float(config, "max_image_seq_len", 4096)),
            shift_terminal=None if terminal is None else float(terminal),
        )

    @functools.cached_property
    def defaults(self) -> Defaults:
        """What a host uses where the caller says nothing: dev's and schnell's usual values."""
        dev = self.transformer.guidance_embedding
        usual = Defaults(
            height=1024,
            width=1024,
            num_inference_steps=28 if dev else 4,
            guidance_scale=3.5 if dev else 0.0,
            max_sequence_length=512 if dev else 256,
        )
        values = {name: self.settings.get(name, value) for name, value in vars(usual).items()}
        for name, value in values.items():
            allowed = (int, float) if name == "guidance_scale" else (int,)
            if isinstance(value, bool) or not isinstance(value, allowed) or value < 0:
                raise CheckpointError(f"_fluxdeploy.{name} in model_index.json is {value!r}.")
        return Defaults(**values)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every weight file that a part reads."""
        found: dict[Path, None] = {}
        for part in self.parts.values():
            for tensor in part.weights.values():
                found[tensor.file] = None
        return tuple(found)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `CheckpointError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return value


def with_aliases(weights: dict[str, StoredTensor], name: str) -> dict[str, StoredTensor]:
    """A text encoder's tensors under one name each, whatever version of transformers saved them."""
    if name == "clip":
        return {
            key if key.startswith("text_model.") else f"text_model.{key}": tensor
            for key, tensor in weights.items()
        }
    if "shared.weight" not in weights and "encoder.embed_tokens.weight" in weights:
        weights["shared.weight"] = weights["encoder.embed_tokens.weight"]
    return weights


def _text_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not config:
        raise CheckpointError(f"the {name} text encoder has no config.json beside its weights.")
    expected = {"clip": ("clip_text_model", "clip"), "t5": ("t5",)}[name]
    kind = config.get("model_type", expected[0])
    if kind not in expected:
        raise CheckpointError(
            f"the {name} text encoder's config.json says model_type {kind!r}; "
            f"{' or '.join(map(repr, expected))} is needed."
        )
    nested = config.get("text_config") if kind == "clip" else None
    return {k: v for k, v in (nested or config).items() if k not in ("dtype", "torch_dtype")}


def _float(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"the scheduler's {key} is {value!r}; a number is needed.")
    return float(value)
