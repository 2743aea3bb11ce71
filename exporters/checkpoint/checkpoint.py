"""A checkpoint of either layout: its networks' tensors and configs, tokenizers and constants."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import CLIPTextConfig, T5Config

from exporters.checkpoint.agreement import check_class, unknown_keys
from exporters.checkpoint.config import TransformerConfig, VaeConfig
from exporters.checkpoint.controlnet_config import ControlNetConfig
from exporters.checkpoint.image_encoder_config import ImageEncoderConfig
from exporters.checkpoint.ip_adapter_config import IpAdapterConfig
from exporters.checkpoint.redux_config import ReduxConfig
from exporters.checkpoint.tasks import find_task, usual_defaults
from exporters.checkpoint.tensors import WHOLE_TYPES, Weights
from exporters.checkpoint.text_configs import text_config, unknown_text_keys
from fluxdeploy.bundle.files import read_whole
from fluxdeploy.bundle.manifest import SPACINGS, Defaults, LatentSpec, RopeSpec, ScheduleSpec
from fluxdeploy.bundle.typed_json import load_strict
from fluxdeploy.errors import CheckpointError

__all__ = [
    "MOST_CONTROLNETS",
    "REDUX",
    "Checkpoint",
    "LoraRecord",
    "Part",
    "controlnet_name",
    "read_json",
]

MOST_CONTROLNETS = 4
"""Of a bundle: each is a network of its own, run in every step."""

REDUX = "redux"
"""What the part and the component of a Redux are called."""

_OTHER_SCHEDULES = ("invert_sigmas", "stochastic_sampling")
"""Of the scheduler's keys, those that make a schedule where they are set which no host computes."""

_SPACINGS = {f"use_{spacing}_sigmas": spacing for spacing in SPACINGS}

_SCHEDULER_KEYS = (
    *_OTHER_SCHEDULES,
    *_SPACINGS,
    *(field.name for field in fields(ScheduleSpec) if field.name != "spacing"),
    "num_train_timesteps",
)

_MAX_JSON = 4 << 20
"""For any config, index or schedule: FLUX.1's largest, the transformer's index, has 120 KiB."""


@dataclass(frozen=True)
class Part:
    """A network of a checkpoint: tensors under the names of the graphs, and its config.json.

    `given` is None where there is no config.json, which BFL's layout has not.
    """

    weights: Weights
    given: Mapping[str, Any] | None

    @property
    def config(self) -> Mapping[str, Any]:
        """The config.json, or nothing."""
        return {} if self.given is None else self.given


@dataclass(frozen=True)
class LoraRecord:
    """A LoRA that was merged: its file's name and SHA-256, and its strength."""

    name: str
    sha256: str
    scale: float


@dataclass(frozen=True)
class Checkpoint:
    """A FLUX.1 checkpoint whose headers have been read, and no weight.

    `parts` holds those of `transformer`, `vae`, `clip` and `t5` that were found, `absent` what to
    tell of the others; `tokenizers` the folders of `clip` and `t5`; `settings` what the
    checkpoint's author recorded for hosts under `_fluxdeploy` in model_index.json; `unused` a
    sentence for each entry there that is not followed; `revision` the commit of a hub repository;
    `pipeline` the class that model_index.json names, None where there is no such file. `loras` are
    those that are merged into it, and `base` is what it was without those of them that leave what
    it is for as it was. `controlnet_folders` are the names of the folders that its ControlNets come
    from, `ip_adapter_name` is that of the file that its IP-Adapter comes from, and `redux_folder`
    that of its Redux. `asked_task` is what it is for, where a user has said so of one that does not
    tell.
    """

    root: Path
    layout: str
    parts: Mapping[str, Part]
    absent: Mapping[str, str]
    tokenizers: Mapping[str, Path]
    scheduler: Mapping[str, Any] | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    revision: str | None = None
    pipeline: str | None = None
    loras: tuple[LoraRecord, ...] = ()
    base: Checkpoint | None = None
    controlnet_folders: tuple[str, ...] = ()
    asked_task: str | None = None
    ip_adapter_name: str | None = None
    redux_folder: str | None = None

    @property
    def unmerged(self) -> Checkpoint:
        """The checkpoint as it was published, or as a control LoRA made one of another task."""
        return self if self.base is None else self.base

    def part(self, name: str) -> Part:
        """A network's part. Raises `CheckpointError`, naming what was looked for."""
        if name not in self.parts:
            raise CheckpointError(f"{self.root} has no {name}: {self.absent[name]}.")
        return self.parts[name]

    def tokenizer(self, name: str) -> Path:
        """A tokenizer's folder. Raises `CheckpointError` where there is none."""
        if name not in self.tokenizers:
            folder = {"clip": "tokenizer", "t5": "tokenizer_2"}[name]
            # No file of weights holds one.
            hint = " Put it there, or name a folder that has it as --base."
            raise CheckpointError(
                f"{self.root} has no tokenizer for {name}: a folder {folder}/."
                + (hint if self.layout == "bfl" else "")
            )
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
        return VaeConfig.of(part.weights, part.given)

    @functools.cached_property
    def controlnets(self) -> tuple[ControlNetConfig, ...]:
        """Sizes of the ControlNets, in their order."""
        parts = map(self.part, self.controlnet_parts)
        return tuple(ControlNetConfig.of(part.weights, part.config) for part in parts)

    @property
    def controlnet_parts(self) -> tuple[str, ...]:
        """Names of the ControlNets' parts."""
        return tuple(map(controlnet_name, range(len(self.controlnet_folders))))

    @functools.cached_property
    def ip_adapter(self) -> IpAdapterConfig | None:
        """Sizes of the IP-Adapter; None where it has none."""
        if self.ip_adapter_name is None:
            return None
        return IpAdapterConfig.of(self.part("ip_adapter").weights)

    @functools.cached_property
    def ip_adapter_encoder(self) -> ImageEncoderConfig | None:
        """Sizes of the CLIP vision encoder that goes with the IP-Adapter."""
        if self.ip_adapter_name is None:
            return None
        part = self.part("ip_adapter_encoder")
        return ImageEncoderConfig.of("clip", part.weights, part.config)

    @functools.cached_property
    def redux(self) -> ReduxConfig | None:
        """Sizes of the Redux; None without one."""
        if self.redux_folder is None:
            return None
        part = self.part(REDUX)
        return ReduxConfig.of(part.weights, part.config)

    @property
    def parts_beside(self) -> tuple[str, ...]:
        """Names of the parts that joined it, and are none of its own."""
        adapter = ("ip_adapter", "ip_adapter_encoder")
        return (
            *self.controlnet_parts,
            *(adapter if self.ip_adapter_name is not None else ()),
            *((REDUX,) if self.redux_folder is not None else ()),
        )

    @property
    def picture_tokens(self) -> int:
        """How many text tokens the transformer reads of pictures, behind those of a prompt."""
        return 0 if self.redux is None else self.redux.tokens

    @functools.cached_property
    def task(self) -> str:
        """What it was trained for: one of `exporters.checkpoint.tasks.TASKS`.

        Raises `CheckpointError` for a transformer that is for none.
        """
        sizes = self.transformer
        return find_task(
            self.pipeline, sizes.in_channels, sizes.out_channels, self.latents, self.asked_task
        )

    @property
    def references(self) -> int:
        """How many pictures the transformer usually reads behind the one that is drawn."""
        return 1 if self.task == "kontext" else 0

    @property
    def latents(self) -> LatentSpec:
        """Layout and scaling of the latents: the VAE's, in the MM-DiT's patches."""
        return LatentSpec(
            channels=self.vae.latent_channels,
            patch_size=self.transformer.patch_size,
            spatial_factor=self.vae.spatial_factor,
            scaling_factor=self.vae.scaling_factor,
            shift_factor=self.vae.shift_factor,
        )

    @property
    def rope(self) -> RopeSpec:
        """Constants of the position embedding."""
        return RopeSpec(self.transformer.axes_dims, self.transformer.theta)

    @property
    def token_pixels(self) -> int:
        """The pixels of a token along each side: sizes of pictures are multiples of it."""
        return self.transformer.patch_size * self.vae.spatial_factor

    @property
    def max_text_tokens(self) -> int:
        """The most tokens that a prompt may have for T5: what the author recorded, else 512."""
        recorded: int = self.settings.get("max_sequence_length", 512)
        return recorded

    @functools.cached_property
    def clip(self) -> CLIPTextConfig:
        """Config of the CLIP text encoder."""
        part = self.part("clip")
        config: CLIPTextConfig = text_config("clip", part.weights, part.config)
        return config

    @functools.cached_property
    def t5(self) -> T5Config:
        """Config of the T5 encoder."""
        part = self.part("t5")
        config: T5Config = text_config("t5", part.weights, part.config)
        return config

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
        check_class("scheduler", config, "FlowMatchEulerDiscreteScheduler")
        for key in _OTHER_SCHEDULES:
            if _flag(config, key):
                raise CheckpointError(f"The scheduler sets {key}, which is not supported.")
        spacings = [key for key in _SPACINGS if _flag(config, key)]
        if len(spacings) > 1:
            raise CheckpointError(
                f"The scheduler sets {' and '.join(spacings)}, of which one can be had."
            )
        if config.get("num_train_timesteps", 1000) != 1000:
            raise CheckpointError("The scheduler's num_train_timesteps must be 1000.")
        kind = config.get("time_shift_type", "exponential")
        if kind not in ("exponential", "linear"):
            raise CheckpointError(
                f"The scheduler's time_shift_type is {kind!r:.80}; exponential or linear is "
                "allowed."
            )
        # The defaults are those of the scheduler's constructor, which omits nothing on saving
        # but was extended over the years.
        terminal = config.get("shift_terminal")
        spec = ScheduleSpec(
            shift=_float(config, "shift", 1.0),
            use_dynamic_shifting=_flag(config, "use_dynamic_shifting"),
            time_shift_type=kind,
            base_shift=_float(config, "base_shift", 0.5),
            max_shift=_float(config, "max_shift", 1.15),
            base_image_seq_len=_integer(config, "base_image_seq_len", 256),
            max_image_seq_len=_integer(config, "max_image_seq_len", 4096),
            shift_terminal=None if terminal is None else _float(config, "shift_terminal", 0.0),
            spacing=_SPACINGS[spacings[0]] if spacings else None,
        )
        if spec.shift <= 0:
            raise CheckpointError(f"The scheduler's shift is {spec.shift}; it must be positive.")
        if spec.use_dynamic_shifting and not 0 < spec.base_image_seq_len < spec.max_image_seq_len:
            raise CheckpointError(
                f"The scheduler's base_image_seq_len is {spec.base_image_seq_len}; it must lie "
                f"between 0 and max_image_seq_len, {spec.max_image_seq_len}."
            )
        return spec

    @functools.cached_property
    def defaults(self) -> Defaults:
        """What a host uses where the caller says nothing: what the author recorded, else usual."""
        usual = usual_defaults(self.task, self.transformer.guidance_embedding)
        values = {name: self.settings.get(name, value) for name, value in vars(usual).items()}
        for name, value in values.items():
            real = name in ("guidance_scale", "strength")
            allowed = (int, float) if real else (int,)
            least = 0 if real else 1
            if isinstance(value, bool) or not isinstance(value, allowed) or value < least:
                raise CheckpointError(
                    f"_fluxdeploy.{name} in model_index.json is {value!r}; a number of at least "
                    f"{least} is needed."
                )
        multiple = self.token_pixels
        for name in ("height", "width"):
            if values[name] % multiple:
                raise CheckpointError(
                    f"_fluxdeploy.{name} in model_index.json is {values[name]}; it must be a "
                    f"multiple of {multiple}."
                )
        if not 0 < values["strength"] <= 1:
            raise CheckpointError(
                f"_fluxdeploy.strength in model_index.json is {values['strength']}; it must be "
                "above 0 and at most 1."
            )
        return Defaults(**values)

    @functools.cached_property
    def rounded(self) -> Mapping[str, tuple[str, ...]]:
        """The parts whose weights were rounded to fewer bits, and the types, the commonest first.

        They are widened as they are read: F8_E4M3, Q4_K or NF4 stays the grid that they are on.
        """
        found = {}
        for name, part in self.parts.items():
            counts: dict[str, int] = {}
            for stored in part.weights.values():
                if stored.stored_type in WHOLE_TYPES or len(stored.shape) < 2:
                    continue
                size = math.prod(stored.shape)
                counts[stored.stored_type] = counts.get(stored.stored_type, 0) + size
            if counts:
                found[name] = tuple(sorted(counts, key=counts.__getitem__, reverse=True))
        return found

    @property
    def notices(self) -> tuple[str, ...]:
        """A sentence for each thing that the checkpoint says and nobody here follows."""
        told = self.unused
        for name, types in self.rounded.items():
            if not types[0].startswith("F8_"):
                told += (
                    f"The {name}'s weights are stored as {', '.join(types)} and widened, which "
                    "does not bring back the digits that they lost: pictures are those of a model "
                    "in so few bits, and a precision of few bits takes from them once more",
                )
        if "transformer" in self.parts:
            told += self.transformer.notices(self.parts["transformer"].config)
        if "vae" in self.parts:
            told += self.vae.notices(self.parts["vae"].config)
        for name in self.controlnet_parts:
            told += ControlNetConfig.notices(self.parts[name].config)
        if self.redux_folder is not None:
            told += ReduxConfig.notices(self.parts[REDUX].config)
        for name in ("clip", "t5"):
            if name in self.parts:
                told += unknown_text_keys(name, self.parts[name].config)
        told += unknown_keys("The scheduler's config", self.scheduler or {}, _SCHEDULER_KEYS)
        return told + unknown_keys(
            "_fluxdeploy in model_index.json", self.settings, [f.name for f in fields(Defaults)]
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """Every weight file that a part reads."""
        found: dict[Path, None] = {}
        for part in self.parts.values():
            for tensor in part.weights.values():
                found[tensor.file] = None
        return tuple(found)


def controlnet_name(number: int) -> str:
    """What the part and the component of a ControlNet are called, by its number from 0."""
    return "controlnet" if number == 0 else f"controlnet_{number + 1}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 4 MiB. Raises `CheckpointError` for anything else."""
    try:
        value = load_strict(read_whole(path, _MAX_JSON).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if not isinstance(value, (bool, type(None))):
        raise CheckpointError(f"The scheduler's {key} is {value!r:.80}; true or false is needed.")
    return bool(value)


def _integer(config: Mapping[str, Any], key: str, default: int) -> int:
    value = _float(config, key, default)
    if not value.is_integer():
        raise CheckpointError(f"The scheduler's {key} is {value!r}; a whole number is needed.")
    return int(value)


def _float(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"The scheduler's {key} is {value!r}; a number is needed.")
    return float(value)
