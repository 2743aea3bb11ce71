"""The manifest: all that a host must know of a bundle, as frozen dataclasses and as JSON.

The JSON has the fields below under the same names. `docs/bundle.md` describes them for hosts in
other languages.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from fluxdeploy.bundle.boundary import NEEDED, REDUX, RESIDUALS, SEEN, Tensors, check_boundary
from fluxdeploy.bundle.pixels import PixelSpec, check_pixels
from fluxdeploy.bundle.recipe import RecipeRecord, check_recipe
from fluxdeploy.bundle.side_paths import RANK
from fluxdeploy.bundle.typed_json import (
    OPTIONAL,
    FieldError,
    join,
    load_strict,
    parse,
    to_plain,
)
from fluxdeploy.errors import BundleError, UsageError

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
    "from_json",
    "missing_component",
    "path_problem",
    "to_json",
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

_CONTROLNET = re.compile(r"controlnet(?:_[2-9]\d?)?")
_MAX_MODES = 1000

_MAX_DEPTH = 32
_MAX_NAME, _MAX_PATH = 255, 1024
"""Bytes of a file's name, and characters of a path below a bundle, whose own comes before it."""

_MAX_DECIBELS = 150
"""A float32 has about this many between its largest and its smallest digit: no gate needs more."""

_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]",
)
"""Control characters, ends of lines, and marks of the direction of writing."""
_FREE = re.compile(r"(?:editions\[\d+\]\.)?provenance")
"""Where text is free-form."""

_MAX_SIZE = 2**31 - 1
"""Of what an engine may take: runtimes count in 32 bits."""

_LARGE = 1e6
"""No constant of a model is larger, nor, where it is divided by, smaller than one in so many: what
float32 makes of others is infinity or zero."""

_MAX_EXPONENT = 80
"""A float32 holds e to this power, and its inverse."""
_MAX_ELEMENTS = 2**31 - 1
_MAX_TOKENS = 1 << 16
_MAX_ENTRIES = 64
_MAX_FILES = 4096

_MOST: Mapping[str, float] = {
    "latents.channels": 4096,
    "latents.patch_size": 64,
    "latents.spatial_factor": 1024,
    "defaults.height": 1 << 16,
    "defaults.width": 1 << 16,
    "defaults.num_inference_steps": 10_000,
    "defaults.max_sequence_length": _MAX_TOKENS,
}
"""The largest magnitude of a field. What a host allocates and computes follows from these."""

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


def to_json(manifest: Manifest) -> str:
    """The manifest as JSON text; equal manifests give equal text.

    Raises `BundleError` where a number is not finite or a string is not Unicode text.
    """
    try:
        text = json.dumps(to_plain(manifest), indent=2, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except ValueError as error:
        raise BundleError(f"The manifest cannot be written as JSON: {error}.") from error
    return text + "\n"


def from_json(text: str, source: str) -> Manifest:
    """The manifest that `text` holds; `source` names it in errors.

    Raises `BundleError`, with the place in the JSON, for anything that a manifest of this version
    cannot hold, and for records that contradict each other.
    """
    try:
        plain = load_strict(text)
    except ValueError as error:
        raise BundleError(
            f"{source} is not valid JSON: {error}. Build the bundle again with `fluxdeploy build`."
        ) from error
    _check_version(plain, source)
    try:
        _check_text(plain)
        manifest = parse(Manifest, plain)
        _check(manifest)
    except FieldError as error:
        raise BundleError(
            f"{source}: {error}. Build the bundle again with `fluxdeploy build`."
        ) from error
    return manifest


def missing_component(manifest: Manifest) -> str | None:
    """The first component that a picture takes and the bundle has not, or None."""
    return next((name for name in NEEDED if name not in manifest.components), None)


def path_problem(path: str) -> str | None:
    """Why `path` cannot name a file of a bundle, or None where it can.

    Paths are relative to the bundle, with forward slashes, and never leave it on any system.
    """
    if not path:
        return "is empty"
    if _HIDDEN.search(path):
        return "holds a control character"
    if "\\" in path:
        return "holds a backslash; paths have forward slashes"
    if path.startswith("/") or re.match("[A-Za-z]:", path):
        return "is absolute; paths are relative to the bundle"
    parts = path.split("/")
    if ".." in parts:
        return "leaves the bundle"
    if "" in parts or "." in parts:
        return "has an empty part"
    if (
        any(len(part.encode("utf-8", "surrogatepass")) > _MAX_NAME for part in parts)
        or len(path) > _MAX_PATH
    ):
        return "is longer than file systems allow"
    return None


def _check_version(plain: object, source: str) -> None:
    version = plain.get("schema_version") if isinstance(plain, dict) else None
    if type(version) is not int or version == SCHEMA_VERSION:
        return
    remedy = (
        "upgrade fluxdeploy, or build the bundle again with this version"
        if version > SCHEMA_VERSION
        else "build the bundle again with `fluxdeploy build`"
    )
    raise BundleError(
        f"{source} has schema version {version}, and this program reads version "
        f"{SCHEMA_VERSION}: {remedy}."
    )


def _check_text(plain: object, where: str = "", depth: int = 0) -> None:
    """Refuse text that would move a terminal's cursor or turn what stands around it, and nesting
    that no manifest has.

    The text in a `provenance` is free-form: who shows it has to escape it.
    """
    _require(depth <= _MAX_DEPTH, where, f"is nested more than {_MAX_DEPTH} deep")
    free = _FREE.fullmatch(where) is not None
    if isinstance(plain, str):
        hidden = None if free else _HIDDEN.search(plain)
        _require(hidden is None, where, f"is {plain!a}, which holds a control character")
    elif isinstance(plain, list):
        for index, entry in enumerate(plain):
            _check_text(entry, where if free else f"{where}[{index}]", depth + 1)
    elif isinstance(plain, dict):
        for key, entry in plain.items():
            _check_text(key, where, depth + 1)
            _check_text(entry, where if free else join(where, key), depth + 1)


def _require(condition: bool, where: str, problem: str) -> None:
    if not condition:
        raise FieldError(where, problem)


def _check(manifest: Manifest) -> None:
    _check_counts(manifest)
    _check_files(manifest)
    _check_editions(manifest)
    first, *others = manifest.each()
    _check_edition(first)
    for index, edition in enumerate(others):
        try:
            _check_counts(edition)
            _check_edition(edition)
        except FieldError as error:
            where = join(f"editions[{index}]", error.where) if error.where else f"editions[{index}]"
            raise FieldError(where, error.problem) from error


def _check_editions(manifest: Manifest) -> None:
    """Each is for a runtime of its own, by which a host asks for it."""
    if not manifest.editions:
        return
    known: set[str] = set()
    for where, components in (
        ("components", manifest.components),
        *((f"editions[{i}].components", e.components) for i, e in enumerate(manifest.editions)),
    ):
        transformer = components.get("transformer")
        _require(
            transformer is not None and bool(transformer.engines),
            where,
            "has no transformer with an engine, by whose runtime an edition is known",
        )
        assert transformer is not None
        runtime = transformer.engines[0].runtime
        _require(
            runtime not in known,
            f"{where}.transformer.engines[0].runtime",
            f"is {runtime!r}, as that of an earlier edition",
        )
        known.add(runtime)


def _check_edition(manifest: Manifest) -> None:
    for name, component in manifest.components.items():
        _check_component(component, f"components.{name}")
    for name, tokenizer in manifest.tokenizers.items():
        _check_tokenizer(tokenizer, f"tokenizers.{name}")
    _check_quality(manifest.quality)
    _check_constants(manifest)
    _check_magnitudes(manifest)
    _check_schedule(manifest)
    _check_tasks(manifest)
    _check_controlnets(manifest)
    _check_ip_adapter(manifest)
    _check_redux(manifest)
    for index, record in enumerate(manifest.skips):
        _check_skips(record, manifest.skips[:index], f"skips[{index}]")
    if manifest.preview is not None:
        _check_preview(manifest.preview, manifest.latents.channels)
    _check_boundary(manifest)
    _check_defaults(manifest)


def _check_counts(manifest: Manifest) -> None:
    """Refuse lists that would take long to check, before they are."""
    counts = {
        "components": len(manifest.components),
        "tokenizers": len(manifest.tokenizers),
        "rope.axes_dims": len(manifest.rope.axes_dims),
        "skips": len(manifest.skips),
        "tasks": len(manifest.tasks),
        "controlnets": len(manifest.controlnets),
        "editions": len(manifest.editions),
    }
    for name, component in manifest.components.items():
        specs = {"inputs": component.inputs, "outputs": component.outputs}
        counts |= {f"components.{name}.{side}": len(given) for side, given in specs.items()}
        counts[f"components.{name}.engines"] = len(component.engines)
        for side, given in specs.items():
            for index, spec in enumerate(given[:_MAX_ENTRIES]):
                counts[f"components.{name}.{side}[{index}].shape"] = len(spec.shape)
    for name, tokenizer in manifest.tokenizers.items():
        for side, ids in (("prefix", tokenizer.prefix), ("suffix", tokenizer.suffix)):
            counts[f"tokenizers.{name}.{side}"] = len(ids)
    for where, count in counts.items():
        _require(count <= _MAX_ENTRIES, where, f"has {count} entries; {_MAX_ENTRIES} are the most")
    files = sum(1 for _ in manifest.files())
    _require(files <= _MAX_FILES, "", f"It names {files} files; {_MAX_FILES} are the most")


def _check_tasks(manifest: Manifest) -> None:
    """All tasks of a bundle are done by one transformer, which reads so many channels."""
    tasks = manifest.tasks
    _require(bool(tasks), "tasks", "is empty; a bundle does something")
    for index, task in enumerate(tasks):
        where = f"tasks[{index}]"
        _require(task in TASKS, where, f"is {task!r}; it must be one of {_listed(TASKS)}")
        _require(task not in tasks[:index], where, f"is {task!r}, as an earlier one")
    axes = len(manifest.rope.axes_dims)
    _require(
        axes > 2 or "kontext" not in tasks,
        "tasks",
        f"has kontext, whose pictures take an axis of their own, and rope.axes_dims has {axes}",
    )
    read = {manifest.latents.channels_read(task) for task in tasks}
    _require(len(read) == 1, "tasks", f"needs transformers of {_listed(read)} channels at once")


def _check_controlnets(manifest: Manifest) -> None:
    """Each has its components, and the transformer takes what all of them give."""
    records, components = manifest.controlnets, manifest.components
    _require(
        bool(records) == ("controlnet" in manifest.tasks),
        "controlnets",
        "must name one or more where tasks has controlnet, and none elsewhere",
    )
    for index, record in enumerate(records):
        where = f"controlnets[{index}]"
        name = record.component
        _require(
            _CONTROLNET.fullmatch(name) is not None,
            f"{where}.component",
            f"is {name!r}; it must be controlnet, or controlnet_2 and so on",
        )
        _require(
            all(other.component != name for other in records[:index]),
            where,
            "has the component of an earlier one",
        )
        for needed in (name, f"{name}_conditioner"):
            _require(
                needed in components,
                f"{where}.component",
                f"needs the component {needed}, which there is not",
            )
        _require(0 <= record.modes <= _MAX_MODES, f"{where}.modes", f"is {record.modes}")
        given = {spec.name for spec in components[f"{name}_conditioner"].inputs}
        _require(
            (record.modes > 0) == ("control_mode" in given),
            f"{where}.modes",
            f"is {record.modes}, and {name}_conditioner takes "
            f"{', '.join(sorted(given)) or 'nothing'}",
        )
    transformer = components.get("transformer")
    for spec in () if transformer is None else transformer.inputs:
        if spec.name not in RESIDUALS:
            continue
        where = f"components.transformer.inputs.{spec.name}"
        _require(bool(records), where, "is what ControlNets give, and controlnets names none")
        for record in records:
            for output in components[record.component].outputs:
                _require(
                    output.name != spec.name or _rows(output) >= _rows(spec),
                    where,
                    f"has {_rows(spec)} residuals, and {record.component} gives {_rows(output)}",
                )


def _check_ip_adapter(manifest: Manifest) -> None:
    """It has its components, which take what its pixels are made into."""
    record, components = manifest.ip_adapter, manifest.components
    transformer = components.get("transformer")
    takes = {spec.name for spec in (() if transformer is None else transformer.inputs)}
    for name in SEEN:
        _require(
            (name in takes) == (record is not None),
            "ip_adapter",
            f"must be there where the transformer takes {name}, and only there",
        )
    if record is None:
        return
    check_pixels(record.pixels, "ip_adapter.pixels")
    for name in ("ip_adapter", "ip_adapter_encoder"):
        _require(name in components, "ip_adapter", f"needs the component {name}")


def _check_redux(manifest: Manifest) -> None:
    """Its pixels are those that its component reads."""
    record = manifest.components.get(REDUX)
    _require(
        (manifest.redux is None) == (record is None),
        "redux",
        f"must be there where components has {REDUX}, and null elsewhere",
    )
    if manifest.redux is not None:
        check_pixels(manifest.redux, "redux")


def _rows(spec: TensorSpec) -> int:
    """The residuals in one tensor of them."""
    first = spec.shape[0] if spec.shape else 0
    return first if isinstance(first, int) else 0


def _check_magnitudes(manifest: Manifest) -> None:
    for where, most in _MOST.items():
        part, name = where.split(".")
        value = getattr(getattr(manifest, part), name)
        _require(abs(value) <= most, where, f"is {value}; it is at most {most:g}")
    for index, size in enumerate(manifest.rope.axes_dims):
        _require(size <= 4096, f"rope.axes_dims[{index}]", f"is {size}; it is at most 4096")


def _check_path(path: str, where: str) -> None:
    problem = path_problem(path)
    _require(problem is None, where, f"is {path!r}, which {problem}")


def _check_files(manifest: Manifest) -> None:
    known: dict[str, FileRecord] = {}
    for where, record in manifest.files():
        _check_path(record.path, f"{where}.path")
        _require(record.path != MANIFEST_NAME, f"{where}.path", "is the manifest itself")
        _require(record.size >= 0, f"{where}.size", f"is {record.size}; sizes are not negative")
        _require(
            re.fullmatch("[0-9a-f]{64}", record.sha256) is not None,
            f"{where}.sha256",
            "must be 64 lower-case hexadecimal digits",
        )
        _require(
            known.setdefault(record.path, record) == record,
            where,
            f"gives {record.path!r} another size or hash than an earlier record",
        )


def _check_component(component: ComponentRecord, where: str) -> None:
    if component.recipe is not None:
        check_recipe(component.recipe, join(where, "recipe"))
    paths = {record.path for record in component.files}
    symbols: set[str] = set()
    for side, specs in (("inputs", component.inputs), ("outputs", component.outputs)):
        names = [spec.name for spec in specs]
        _require(len(set(names)) == len(names), f"{where}.{side}", "names a tensor twice")
        for index, spec in enumerate(specs):
            symbols |= _check_tensor(spec, f"{where}.{side}[{index}]")
    _require(bool(component.engines), f"{where}.engines", "is empty; nothing can run it")
    for index, engine in enumerate(component.engines):
        at = f"{where}.engines[{index}]"
        _require(
            engine.path in paths,
            f"{at}.path",
            f"is {engine.path!r}, which is not among the component's files",
        )
        _require(
            set(engine.dimensions) == symbols,
            f"{at}.dimensions",
            f"must have exactly the symbols of the component's tensors: {_listed(symbols)}, "
            f"not {_listed(engine.dimensions)}",
        )
        for symbol, sizes in engine.dimensions.items():
            _require(
                1 <= sizes.min <= sizes.opt <= sizes.max <= _MAX_SIZE,
                f"{at}.dimensions.{symbol}",
                f"must have 1 <= min <= opt <= max <= {_MAX_SIZE}, not {sizes.min}, {sizes.opt}, "
                f"{sizes.max}",
            )
    if component.golden is not None:
        _check_golden(component.golden, paths, f"{where}.golden")


def _check_tensor(spec: TensorSpec, where: str) -> set[str]:
    _require(
        spec.dtype in ("float32", "int32"),
        f"{where}.dtype",
        f"is {spec.dtype!r}; tensors are float32 or int32",
    )
    for index, size in enumerate(spec.shape):
        _require(
            size in SYMBOLS if isinstance(size, str) else 1 <= size <= _MAX_SIZE,
            f"{where}.shape[{index}]",
            f"is {size!r}; it must be a size from 1 to {_MAX_SIZE} or one of {_listed(SYMBOLS)}",
        )
    _require(
        math.prod(size for size in spec.shape if isinstance(size, int)) <= _MAX_ELEMENTS,
        f"{where}.shape",
        f"is {list(spec.shape)}, which has more than {_MAX_ELEMENTS} elements",
    )
    return {size for size in spec.shape if isinstance(size, str)}


def _check_golden(golden: GoldenRecord, paths: set[str], where: str) -> None:
    _require(
        golden.path in paths,
        f"{where}.path",
        f"is {golden.path!r}, which is not among the component's files",
    )
    _require(golden.max_error >= 0, f"{where}.max_error", "is negative")
    _require(-1 <= golden.min_cosine <= 1, f"{where}.min_cosine", "is not between -1 and 1")


def _check_tokenizer(tokenizer: TokenizerRecord, where: str) -> None:
    _require(
        tokenizer.path in {record.path for record in tokenizer.files},
        f"{where}.path",
        f"is {tokenizer.path!r}, which is not among the tokenizer's files",
    )
    ids = {"pad_id": tokenizer.pad_id}
    for name in ("prefix", "suffix"):
        ids |= {f"{name}[{i}]": token for i, token in enumerate(getattr(tokenizer, name))}
    for name, token in ids.items():
        _require(
            0 <= token < 2**31, join(where, name), f"is {token}; ids are from 0 to {2**31 - 1}"
        )
    shortest = max(1, len(tokenizer.prefix) + len(tokenizer.suffix))
    _require(
        shortest <= tokenizer.max_length <= _MAX_TOKENS,
        f"{where}.max_length",
        f"is {tokenizer.max_length}; with the prefix and the suffix it is at least {shortest}, and "
        f"at most {_MAX_TOKENS}",
    )
    for name in ("padding_side", "truncation_side"):
        side = getattr(tokenizer, name)
        _require(
            side in ("left", "right"), join(where, name), f"is {side!r}; it is 'left' or 'right'"
        )


def _check_quality(quality: QualityRecord) -> None:
    for name, ratio in (("min_psnr", quality.min_psnr), ("min_sqnr", quality.min_sqnr)):
        _require(
            ratio is None or 0 <= ratio <= _MAX_DECIBELS,
            f"quality.{name}",
            f"is {ratio}; it must be between 0 and {_MAX_DECIBELS} dB",
        )
    _require(
        0 <= quality.min_ssim <= 1,
        "quality.min_ssim",
        f"is {quality.min_ssim}; it must be between 0 and 1",
    )


def _check_constants(manifest: Manifest) -> None:
    latents, axes = manifest.latents, manifest.rope.axes_dims
    positive = {
        "latents": ("channels", "patch_size", "spatial_factor"),
        "defaults": ("height", "width", "num_inference_steps", "max_sequence_length"),
    }
    for part, names in positive.items():
        for name in names:
            value = getattr(getattr(manifest, part), name)
            _require(value > 0, join(part, name), f"is {value}; it must be positive")
    _check_range("latents.scaling_factor", abs(latents.scaling_factor), 1 / _LARGE, _LARGE)
    _check_range("latents.shift_factor", latents.shift_factor, -_LARGE, _LARGE)
    # Below 1, the frequencies would rise from one pair of channels to the next, without a bound.
    _check_range("rope.theta", manifest.rope.theta, 1, _LARGE**2)
    _require(
        len(axes) >= 2 and all(size > 0 and size % 2 == 0 for size in axes),
        "rope.axes_dims",
        f"is {list(axes)}; rows and columns take two axes, and each axis an even, positive number "
        "of channels",
    )


def _check_range(where: str, value: float, least: float, most: float) -> None:
    _require(least <= value <= most, where, f"is {value:g}; it must be from {least:g} to {most:g}")


def _check_schedule(manifest: Manifest) -> None:
    """What would make noise levels that are no numbers."""
    schedule = manifest.schedule
    _check_range("schedule.shift", schedule.shift, 1 / _LARGE, _LARGE)
    for name in ("base_shift", "max_shift"):
        _check_range(join("schedule", name), getattr(schedule, name), -_MAX_EXPONENT, _MAX_EXPONENT)
    terminal = schedule.shift_terminal
    _require(
        terminal is None or 0 <= terminal < 1,
        "schedule.shift_terminal",
        f"is {terminal}; it must be null, or from 0 to less than 1",
    )
    _require(
        not terminal or manifest.defaults.num_inference_steps > 1,
        "defaults.num_inference_steps",
        "is 1, and one step cannot reach schedule.shift_terminal",
    )
    _require(
        schedule.time_shift_type in ("exponential", "linear"),
        "schedule.time_shift_type",
        f"is {schedule.time_shift_type!r}; it must be 'exponential' or 'linear'",
    )
    _require(
        schedule.spacing is None or schedule.spacing in SPACINGS,
        "schedule.spacing",
        f"is {schedule.spacing!r}; it must be null or one of {_listed(SPACINGS)}",
    )
    if not schedule.use_dynamic_shifting:
        return
    _require(
        0 < schedule.base_image_seq_len < schedule.max_image_seq_len,
        "schedule.base_image_seq_len",
        "must be positive and less than max_image_seq_len where shifting is dynamic",
    )
    slope = (schedule.max_shift - schedule.base_shift) / (
        schedule.max_image_seq_len - schedule.base_image_seq_len
    )
    height, width = (_tokens(manifest, side) for side in ("height", "width"))
    mu = schedule.base_shift + slope * (height * width - schedule.base_image_seq_len)
    least = -_MAX_EXPONENT if schedule.time_shift_type == "exponential" else 1 / _LARGE
    most = _MAX_EXPONENT if schedule.time_shift_type == "exponential" else _LARGE
    _require(
        least <= mu <= most,
        "schedule.max_shift",
        f"and base_shift make a shift of {mu:g} for a picture of the default size: it must be from "
        f"{least:g} to {most:g}",
    )


def _check_skips(record: SkipRecord, earlier: tuple[SkipRecord, ...], where: str) -> None:
    count, most = record.num_inference_steps, _MOST["defaults.num_inference_steps"]
    _require(
        1 <= count <= most,
        f"{where}.num_inference_steps",
        f"is {count}; it must be from 1 to {most:g}",
    )
    _require(
        all(0 < step < count for step in record.steps)
        and all(a < b for a, b in zip(record.steps, record.steps[1:], strict=False)),
        f"{where}.steps",
        f"must rise, from 1 to at most {count - 1}",
    )
    _require(
        0 <= record.order <= MAX_ORDER,
        f"{where}.order",
        f"is {record.order}; it must be from 0 to {MAX_ORDER}",
    )
    for name in ("height", "width"):
        size, most = getattr(record, name), _MOST[join("defaults", name)]
        _require(1 <= size <= most, join(where, name), f"is {size}; it is 1 to {most:g}")
    _check_range(join(where, "min_psnr"), record.min_psnr, 0, _MAX_DECIBELS)
    _check_range(join(where, "psnr"), record.psnr, record.min_psnr, _MAX_DECIBELS)
    _require(record.pictures >= 1, f"{where}.pictures", f"is {record.pictures}; 1 is the least")
    _require(
        all((r.sampler, r.num_inference_steps) != (record.sampler, count) for r in earlier),
        where,
        "has the sampler and the steps of an earlier one",
    )


def _check_preview(preview: PreviewSpec, channels: int) -> None:
    _require(
        len(preview.matrix) == channels,
        "preview.matrix",
        f"has {len(preview.matrix)} rows; latents.channels is {channels}",
    )
    rows = {f"preview.matrix[{index}]": row for index, row in enumerate(preview.matrix)}
    for where, row in {**rows, "preview.bias": preview.bias}.items():
        _require(len(row) == 3, where, f"has {len(row)} numbers; there are 3 colours")
        for index, value in enumerate(row):
            _check_range(f"{where}[{index}]", value, -_LARGE, _LARGE)


def _tokens(manifest: Manifest, side: str) -> int:
    """Image tokens along a side of the default picture."""
    pixels: int = getattr(manifest.defaults, side)
    return pixels // (manifest.latents.patch_size * manifest.latents.spatial_factor)


def _check_boundary(manifest: Manifest) -> None:
    """What hosts give to components and take from them, and the sizes that both sides have."""
    latents = manifest.latents
    sizes = {
        "the latents' channels": (latents.channels, "latents.channels"),
        "a token's channels": (
            latents.token_channels,
            "latents, channels times patch_size squared,",
        ),
        "what a task reads": (
            latents.channels_read(manifest.tasks[0]),
            f"latents, for the task {manifest.tasks[0]},",
        ),
        "a head's channels": (sum(manifest.rope.axes_dims), "the sum of rope.axes_dims"),
    }
    if manifest.redux is not None:
        height, width = manifest.redux.size
        sizes |= {
            "the rows of its pixels": (height, "redux"),
            "the columns of its pixels": (width, "redux"),
        }
    if manifest.ip_adapter is not None:
        height, width = manifest.ip_adapter.pixels.size
        sizes |= {
            "the rows of what is seen": (height, "ip_adapter.pixels"),
            "the columns of what is seen": (width, "ip_adapter.pixels"),
        }
    if "clip" in manifest.tokenizers:
        length = manifest.tokenizers["clip"].max_length
        sizes["CLIP's tokens"] = (length, "tokenizers.clip.max_length")

    def tensors(specs: tuple[TensorSpec, ...]) -> Tensors:
        return {spec.name: (spec.dtype, spec.shape) for spec in specs}

    check_boundary(
        {
            name: (tensors(component.inputs), tensors(component.outputs))
            for name, component in manifest.components.items()
        },
        manifest.guidance_embedding,
        [record.component for record in manifest.controlnets],
        sizes,
    )


def _check_defaults(manifest: Manifest) -> None:
    """What a host uses where the caller says nothing must be what the engines take."""
    latents, defaults = manifest.latents, manifest.defaults
    _check_range("defaults.guidance_scale", defaults.guidance_scale, 0, _LARGE)
    _require(
        0 < defaults.strength <= 1,
        "defaults.strength",
        f"is {defaults.strength}; it must be above 0 and at most 1",
    )
    multiple = latents.patch_size * latents.spatial_factor
    for name in ("height", "width"):
        value = getattr(defaults, name)
        _require(
            value % multiple == 0,
            join("defaults", name),
            f"is {value}; it must be a multiple of {multiple}",
        )
    text, image = defaults.max_sequence_length, _tokens(manifest, "height")
    image *= _tokens(manifest, "width")
    if "t5" in manifest.tokenizers:
        t5 = manifest.tokenizers["t5"]
        shortest = len(t5.prefix) + len(t5.suffix)
        _require(
            shortest <= text <= t5.max_length,
            "defaults.max_sequence_length",
            f"is {text}; tokenizers.t5 makes {shortest} to {t5.max_length} tokens",
        )
    factor = latents.spatial_factor
    sizes = {
        "B": (1, "a picture"),
        "S": (text, "defaults.max_sequence_length"),
        "L": (image, "the default picture"),
        "T": (text + image, "the default picture with its text"),
        "V": (1, "a picture that sees no other"),
        "N": (defaults.num_inference_steps, "defaults.num_inference_steps"),
        "H": (defaults.height, "defaults.height"),
        "W": (defaults.width, "defaults.width"),
        "h": (defaults.height // factor, "defaults.height"),
        "w": (defaults.width // factor, "defaults.width"),
        RANK: (1, "a picture without a LoRA"),
    }
    for name, component in manifest.components.items():
        for index, engine in enumerate(component.engines):
            where = f"components.{name}.engines[{index}].dimensions"
            for symbol, allowed in engine.dimensions.items():
                size, what = sizes[symbol]
                _require(
                    allowed.min <= size <= allowed.max,
                    join(where, symbol),
                    f"is {allowed.min} to {allowed.max}; {what} needs {size}",
                )
            _check_sides(engine.dimensions, factor, where)


def _check_sides(dimensions: Mapping[str, DimensionRange], factor: int, where: str) -> None:
    """A picture has `factor` pixels a latent along each side, in each size that an engine takes."""
    for pixels, latents in (("H", "h"), ("W", "w")):
        if pixels in dimensions and latents in dimensions:
            many, few = dimensions[pixels], dimensions[latents]
            _require(
                all(getattr(many, n) // factor == getattr(few, n) for n in ("min", "opt", "max")),
                join(where, latents),
                f"does not fit {pixels}: latents.spatial_factor makes it {factor} times as large",
            )


def _listed(names: Mapping[str, object] | set[str] | set[int] | tuple[str, ...]) -> str:
    return ", ".join(map(str, sorted(names))) or "none"
