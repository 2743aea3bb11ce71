"""The manifest: all that a host must know of a bundle, as frozen dataclasses.

Its JSON has the fields below under the same names. `docs/bundle.md` describes them for hosts in
other languages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from fluxdeploy.bundle.boundary import NEEDED
from fluxdeploy.bundle.pixels import PixelSpec
from fluxdeploy.bundle.recipe import RecipeRecord
from fluxdeploy.bundle.side_paths import RANK
from fluxdeploy.bundle.typed_json import OPTIONAL
from fluxdeploy.errors import UsageError

__all__ = [
    "MANIFEST_NAME",
    "MAX_MANIFEST",
    "MAX_ORDER",
    "SCHEMA_VERSION",
    "SPACINGS",
    "SYMBOLS",
    "TASKS",
    "ComponentRecord",
    "ControlNetRecord",
    "Defaults",
    "Dimension",
    "DimensionRange",
    "EditionRecord",
    "EngineRecord",
    "FileRecord",
    "GoldenRecord",
    "IpAdapterRecord",
    "LatentSpec",
    "Manifest",
    "PreviewSpec",
    "QualityRecord",
    "RopeSpec",
    "ScheduleSpec",
    "SkipRecord",
    "TensorSpec",
    "TokenizerRecord",
    "component_stem",
    "missing_component",
]

SCHEMA_VERSION = 4
MANIFEST_NAME = "fluxdeploy.json"

MAX_MANIFEST = 4 << 20
"""Bytes of the file. A full-size model's has some 30 KiB."""

SYMBOLS = ("B", "S", "L", "T", "V", "N", "H", "W", "h", "w", RANK)
"""The symbols that a `Dimension` may be."""

SPACINGS = ("karras", "exponential", "beta")
"""What `ScheduleSpec.spacing` may be."""

_USUAL_TASKS = ("text to image", "image to image", "inpainting")
TASKS = (*_USUAL_TASKS, "fill", "control", "kontext", "controlnet")
"""What `Manifest.tasks` may name."""

MAX_ORDER = 2
"""Of the extrapolation of a velocity: a parabola."""

Dimension = int | str
"""A fixed size, or the symbol of a dynamic one: B batch, S text tokens, L image tokens, T = S + L
joint tokens, V tokens of the pictures that an IP-Adapter is given, N timesteps, H and W image rows
and columns, h and w latent rows and columns, R the rank of LoRAs."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor at an engine's boundary. `dtype` is `float32` or `int32`."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]


@dataclass(frozen=True)
class FileRecord:
    """A file of the bundle: `path` is relative to the bundle, with forward slashes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class DimensionRange:
    """The sizes an engine accepts for one symbol; `opt` is the one it is tuned for."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class EngineRecord:
    """One engine of a component: `path` is what the runtime opens, one of the recorded files."""

    runtime: str
    runtime_version: str
    target: str
    path: str
    dimensions: Mapping[str, DimensionRange]


@dataclass(frozen=True)
class GoldenRecord:
    """Known inputs and outputs of a component, and how far an engine's outputs may be off.

    The file holds tensors named `input.<name>` and `output.<name>`; the outputs come from PyTorch
    in float32. `max_error` bounds max|engine - output| / max|output|, `min_cosine` bounds the
    cosine similarity of the flattened tensors.
    """

    path: str
    max_error: float
    min_cosine: float


@dataclass(frozen=True)
class ComponentRecord:
    """One component: its tensors, its precision, and every file it needs.

    `compute` is the type of all that `precision` does not quantize, and `precision` itself where
    nothing is quantized.

    `key` is the content key of what it was built from: a build with an equal key reuses its files.
    `recipe` is null where nothing is quantized.
    """

    key: str
    precision: str
    compute: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: tuple[FileRecord, ...]
    engines: tuple[EngineRecord, ...]
    golden: GoldenRecord | None
    recipe: RecipeRecord | None = None


@dataclass(frozen=True)
class LatentSpec:
    """x_model = (z_vae - shift_factor) * scaling_factor; see docs/bundle.md."""

    channels: int
    patch_size: int
    spatial_factor: int
    scaling_factor: float
    shift_factor: float

    @property
    def token_side(self) -> int:
        """Pixels of an image token's side: a picture's sides are multiples of it."""
        return self.spatial_factor * self.patch_size

    @property
    def token_channels(self) -> int:
        """Of a token of latents, and of its velocity."""
        return self.channels * self.patch_size**2

    @property
    def mask_channels(self) -> int:
        """Of a token of a mask, which keeps each pixel."""
        return self.token_side**2

    def channels_read(self, task: str) -> int:
        """Of a token of `hidden_states`, where the transformer is one for a task.

        FLUX.1's own read 64, for `fill` 384 and for `control` 128.
        """
        if task == "fill":
            return 2 * self.token_channels + self.mask_channels
        return self.token_channels * (2 if task == "control" else 1)


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: channels of a head given to each axis of an id (their sum is head_dim)."""

    axes_dims: tuple[int, ...]
    theta: float


@dataclass(frozen=True)
class ScheduleSpec:
    """The constants of diffusers' FlowMatchEulerDiscreteScheduler that FLUX.1 uses."""

    shift: float
    use_dynamic_shifting: bool
    time_shift_type: str
    base_shift: float
    max_shift: float
    base_image_seq_len: int
    max_image_seq_len: int
    shift_terminal: float | None
    spacing: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class TokenizerRecord:
    """A tokenizer: what `path`, a `tokenizer.json`, gives for a prompt, and what is done with it.

    `prefix` and `suffix` are the ids around every prompt; cutting keeps them. `max_length` is the
    most that it pads to. A side, where it cuts and where it pads, is `left` or `right`.
    """

    path: str
    max_length: int
    pad_id: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    padding_side: str
    truncation_side: str
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class Defaults:
    """What a host uses where the caller says nothing.

    `strength` is for image to image: the share of the steps that are run on a noised picture.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    strength: float


@dataclass(frozen=True)
class QualityRecord:
    """How near the bundle must come to PyTorch in float32; `verify` holds it against this.

    `min_psnr`, in dB, and `min_ssim` bound the medians over pictures of equal prompts and seeds.
    `min_sqnr` bounds the signal-to-quantization-noise ratio, in dB, of each quantized linear and
    attention of the transformer; null where there is none.
    """

    min_psnr: float
    min_ssim: float
    min_sqnr: float | None


@dataclass(frozen=True)
class SkipRecord:
    """Steps in which the velocity is extrapolated, and what pictures then keep.

    For calls with this sampler and so many steps. `steps` rise, and the first, 0, is not among
    them; `order` is 0 to 2. `psnr`, in dB, is the least over `pictures` pictures of `height` x
    `width` pixels, whose prompts the search has not seen, against those without skips; it is at
    least `min_psnr`, which was asked for.
    """

    sampler: str
    num_inference_steps: int
    steps: tuple[int, ...]
    order: int
    height: int
    width: int
    min_psnr: float
    psnr: float
    pictures: int


@dataclass(frozen=True)
class PreviewSpec:
    """Cheap pictures of latents, one pixel for each: r, g, b = x @ matrix + bias, cut to 0..1.

    x has the transformer's scale, its channels are the rows of `matrix`.
    """

    matrix: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]


@dataclass(frozen=True)
class ControlNetRecord:
    """A ControlNet, and the name of the component that runs it in each step.

    What runs once a picture is `<component>_conditioner`; where there is `<component>_encoder`,
    that takes the control picture, and else the `vae_encoder`. `modes` counts the kinds of control
    that it tells apart by a number; 0 where it knows one alone.
    """

    component: str
    modes: int


@dataclass(frozen=True)
class IpAdapterRecord:
    """An IP-Adapter: how its pictures become what `ip_adapter_encoder` reads.

    `ip_adapter` then makes what the transformer attends to.
    """

    pixels: PixelSpec


@dataclass(frozen=True)
class EditionRecord:
    """What a host reads in place of the manifest's own fields, to run it with another runtime.

    `components` are those of one runtime: graphs in its form, engines for its targets, and the
    precision that it was built in. Weights that are the same are the same files.
    """

    components: Mapping[str, ComponentRecord]
    defaults: Defaults
    quality: QualityRecord
    provenance: Mapping[str, object]
    skips: tuple[SkipRecord, ...] = field(default=(), metadata=OPTIONAL)


@dataclass(frozen=True)
class Manifest:
    """A whole bundle. `provenance` is free-form JSON: checkpoint hash, tool versions, requests.

    tasks: what its transformer was trained for, some of `TASKS`. controlnets: those that can run
    beside it. ip_adapter: what makes pictures into something that it attends to. redux: what the
    component `redux` reads of a picture, where there is one. editions: what other runtimes take in
    place of its own fields of these names, which are the first edition; a host reads one of them.
    """

    schema_version: int
    family: str
    variant: str
    guidance_embedding: bool
    components: Mapping[str, ComponentRecord]
    latents: LatentSpec
    rope: RopeSpec
    schedule: ScheduleSpec
    tokenizers: Mapping[str, TokenizerRecord]
    defaults: Defaults
    quality: QualityRecord
    provenance: Mapping[str, object]
    skips: tuple[SkipRecord, ...] = field(default=(), metadata=OPTIONAL)
    tasks: tuple[str, ...] = field(default=_USUAL_TASKS, metadata=OPTIONAL)
    preview: PreviewSpec | None = field(default=None, metadata=OPTIONAL)
    controlnets: tuple[ControlNetRecord, ...] = field(default=(), metadata=OPTIONAL)
    redux: PixelSpec | None = field(default=None, metadata=OPTIONAL)
    ip_adapter: IpAdapterRecord | None = field(default=None, metadata=OPTIONAL)
    editions: tuple[EditionRecord, ...] = field(default=(), metadata=OPTIONAL)

    @property
    def runtime(self) -> str:
        """What the components are for; another runtime may have some of them beside it.

        It is the transformer's, and where there is none the first component's.
        """
        components = self.components
        first = components.get("transformer") or next(iter(components.values()))
        return first.engines[0].runtime

    def each(self) -> tuple[Manifest, ...]:
        """The editions, each as the manifest of a bundle that has no other."""
        alone = replace(self, editions=())
        own = [field.name for field in fields(EditionRecord)]
        return (
            alone,
            *(replace(alone, **{n: getattr(edition, n) for n in own}) for edition in self.editions),
        )

    def with_each(self, editions: Sequence[Manifest]) -> Manifest:
        """This one with what the given ones have of their own, as its editions, in this order."""
        own = [field.name for field in fields(EditionRecord)]
        first, *others = ({name: getattr(each, name) for name in own} for each in editions)
        return replace(self, **first, editions=tuple(EditionRecord(**given) for given in others))

    def stems(self) -> dict[str, ComponentRecord]:
        """The components of all editions, by what their files are called."""
        return {
            component_stem(name, flat.runtime if index else ""): record
            for index, flat in enumerate(self.each())
            for name, record in flat.components.items()
        }

    @property
    def lora_rank(self) -> int:
        """What the ranks of a call's LoRAs may add up to; 0 where it takes none."""
        ranks = [
            engine.dimensions[RANK].max
            for component in self.components.values()
            for engine in component.engines
            if RANK in engine.dimensions
        ]
        return min(ranks, default=0)

    def require_text_to_image(self, command: str) -> None:
        """Raise `UsageError` for a bundle that does not draw from text alone, as `command` does."""
        if "text to image" not in self.tasks:
            raise UsageError(
                f"`{command}` draws from text alone, and this bundle's model is one for "
                f"{' and '.join(self.tasks)}. Give a bundle of another checkpoint."
            )

    def files(self) -> Iterator[tuple[str, FileRecord]]:
        """Every file record with its place in the JSON; a shared file comes more than once."""
        groups: dict[str, Mapping[str, ComponentRecord] | Mapping[str, TokenizerRecord]] = {
            "components": self.components,
            "tokenizers": self.tokenizers,
        }
        for number, edition in enumerate(self.editions):
            groups[f"editions[{number}].components"] = edition.components
        for group, owners in groups.items():
            for name, owner in owners.items():
                for index, record in enumerate(owner.files):
                    yield f"{group}.{name}.files[{index}]", record


def component_stem(component: str, edition: str) -> str:
    """What a component's own files are called; `edition` is a runtime, empty for the first one."""
    return f"{component}.{edition}" if edition else component


def missing_component(manifest: Manifest) -> str | None:
    """The first component that a picture takes and the bundle has not, or None."""
    return next((name for name in NEEDED if name not in manifest.components), None)
