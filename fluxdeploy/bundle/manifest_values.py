"""What a manifest's values may be, so that a host can compute with them.

Sizes, constants, ids, noise levels, and the defaults that engines have to take. Each check raises
`FieldError` with the place in the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping

from fluxdeploy.bundle.manifest import (
    MAX_ORDER,
    SPACINGS,
    DimensionRange,
    Manifest,
    PreviewSpec,
    QualityRecord,
    SkipRecord,
    TokenizerRecord,
)
from fluxdeploy.bundle.side_paths import RANK
from fluxdeploy.bundle.typed_json import join, listed, require

__all__ = [
    "check_constants",
    "check_defaults",
    "check_magnitudes",
    "check_preview",
    "check_quality",
    "check_schedule",
    "check_skips",
    "check_tokenizer",
]

_MAX_DECIBELS = 150
"""A float32 has about this many between its largest and its smallest digit: no gate needs more."""

_LARGE = 1e6
"""No constant of a model is larger, nor, where it is divided by, smaller than one in so many: what
float32 makes of others is infinity or zero."""

_MAX_EXPONENT = 80
"""A float32 holds e to this power, and its inverse."""

_MAX_TOKENS = 1 << 16

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


def check_magnitudes(manifest: Manifest) -> None:
    """Refuse sizes with which a host would allocate or compute without end."""
    for where, most in _MOST.items():
        part, name = where.split(".")
        value = getattr(getattr(manifest, part), name)
        require(abs(value) <= most, where, f"is {value}; it is at most {most:g}")
    for index, size in enumerate(manifest.rope.axes_dims):
        require(size <= 4096, f"rope.axes_dims[{index}]", f"is {size}; it is at most 4096")


def check_tokenizer(tokenizer: TokenizerRecord, where: str) -> None:
    """Ids, lengths and sides that a host can use, and a file that is there."""
    require(
        tokenizer.path in {record.path for record in tokenizer.files},
        f"{where}.path",
        f"is {tokenizer.path!r}, which is not among the tokenizer's files",
    )
    ids = {"pad_id": tokenizer.pad_id}
    for name in ("prefix", "suffix"):
        ids |= {f"{name}[{i}]": token for i, token in enumerate(getattr(tokenizer, name))}
    for name, token in ids.items():
        require(0 <= token < 2**31, join(where, name), f"is {token}; ids are from 0 to {2**31 - 1}")
    shortest = max(1, len(tokenizer.prefix) + len(tokenizer.suffix))
    require(
        shortest <= tokenizer.max_length <= _MAX_TOKENS,
        f"{where}.max_length",
        f"is {tokenizer.max_length}; with the prefix and the suffix it is at least {shortest}, and "
        f"at most {_MAX_TOKENS}",
    )
    for name in ("padding_side", "truncation_side"):
        side = getattr(tokenizer, name)
        require(
            side in ("left", "right"), join(where, name), f"is {side!r}; it is 'left' or 'right'"
        )


def check_quality(quality: QualityRecord) -> None:
    """Ratios and similarities that pictures can have."""
    for name, ratio in (("min_psnr", quality.min_psnr), ("min_sqnr", quality.min_sqnr)):
        require(
            ratio is None or 0 <= ratio <= _MAX_DECIBELS,
            f"quality.{name}",
            f"is {ratio}; it must be between 0 and {_MAX_DECIBELS} dB",
        )
    require(
        0 <= quality.min_ssim <= 1,
        "quality.min_ssim",
        f"is {quality.min_ssim}; it must be between 0 and 1",
    )


def check_constants(manifest: Manifest) -> None:
    """The model's sizes are positive, and its constants are numbers that float32 keeps."""
    latents, axes = manifest.latents, manifest.rope.axes_dims
    positive = {
        "latents": ("channels", "patch_size", "spatial_factor"),
        "defaults": ("height", "width", "num_inference_steps", "max_sequence_length"),
    }
    for part, names in positive.items():
        for name in names:
            value = getattr(getattr(manifest, part), name)
            require(value > 0, join(part, name), f"is {value}; it must be positive")
    _check_range("latents.scaling_factor", abs(latents.scaling_factor), 1 / _LARGE, _LARGE)
    _check_range("latents.shift_factor", latents.shift_factor, -_LARGE, _LARGE)
    # Below 1, the frequencies would rise from one pair of channels to the next, without a bound.
    _check_range("rope.theta", manifest.rope.theta, 1, _LARGE**2)
    require(
        len(axes) >= 2 and all(size > 0 and size % 2 == 0 for size in axes),
        "rope.axes_dims",
        f"is {list(axes)}; rows and columns take two axes, and each axis an even, positive number "
        "of channels",
    )


def _check_range(where: str, value: float, least: float, most: float) -> None:
    require(least <= value <= most, where, f"is {value:g}; it must be from {least:g} to {most:g}")


def check_schedule(manifest: Manifest) -> None:
    """What would make noise levels that are no numbers."""
    schedule = manifest.schedule
    _check_range("schedule.shift", schedule.shift, 1 / _LARGE, _LARGE)
    for name in ("base_shift", "max_shift"):
        _check_range(join("schedule", name), getattr(schedule, name), -_MAX_EXPONENT, _MAX_EXPONENT)
    terminal = schedule.shift_terminal
    require(
        terminal is None or 0 <= terminal < 1,
        "schedule.shift_terminal",
        f"is {terminal}; it must be null, or from 0 to less than 1",
    )
    require(
        not terminal or manifest.defaults.num_inference_steps > 1,
        "defaults.num_inference_steps",
        "is 1, and one step cannot reach schedule.shift_terminal",
    )
    require(
        schedule.time_shift_type in ("exponential", "linear"),
        "schedule.time_shift_type",
        f"is {schedule.time_shift_type!r}; it must be 'exponential' or 'linear'",
    )
    require(
        schedule.spacing is None or schedule.spacing in SPACINGS,
        "schedule.spacing",
        f"is {schedule.spacing!r}; it must be null or one of {listed(SPACINGS)}",
    )
    if not schedule.use_dynamic_shifting:
        return
    require(
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
    require(
        least <= mu <= most,
        "schedule.max_shift",
        f"and base_shift make a shift of {mu:g} for a picture of the default size: it must be from "
        f"{least:g} to {most:g}",
    )


def check_skips(record: SkipRecord, earlier: tuple[SkipRecord, ...], where: str) -> None:
    """Steps of a call that it has, in rising order, once for each sampler and number of steps."""
    count, most = record.num_inference_steps, _MOST["defaults.num_inference_steps"]
    require(
        1 <= count <= most,
        f"{where}.num_inference_steps",
        f"is {count}; it must be from 1 to {most:g}",
    )
    require(
        all(0 < step < count for step in record.steps)
        and all(a < b for a, b in zip(record.steps, record.steps[1:], strict=False)),
        f"{where}.steps",
        f"must rise, from 1 to at most {count - 1}",
    )
    require(
        0 <= record.order <= MAX_ORDER,
        f"{where}.order",
        f"is {record.order}; it must be from 0 to {MAX_ORDER}",
    )
    for name in ("height", "width"):
        size, most = getattr(record, name), _MOST[join("defaults", name)]
        require(1 <= size <= most, join(where, name), f"is {size}; it is 1 to {most:g}")
    _check_range(join(where, "min_psnr"), record.min_psnr, 0, _MAX_DECIBELS)
    _check_range(join(where, "psnr"), record.psnr, record.min_psnr, _MAX_DECIBELS)
    require(record.pictures >= 1, f"{where}.pictures", f"is {record.pictures}; 1 is the least")
    require(
        all((r.sampler, r.num_inference_steps) != (record.sampler, count) for r in earlier),
        where,
        "has the sampler and the steps of an earlier one",
    )


def check_preview(preview: PreviewSpec, channels: int) -> None:
    """A row for each of the latents' `channels`, and three colours."""
    require(
        len(preview.matrix) == channels,
        "preview.matrix",
        f"has {len(preview.matrix)} rows; latents.channels is {channels}",
    )
    rows = {f"preview.matrix[{index}]": row for index, row in enumerate(preview.matrix)}
    for where, row in {**rows, "preview.bias": preview.bias}.items():
        require(len(row) == 3, where, f"has {len(row)} numbers; there are 3 colours")
        for index, value in enumerate(row):
            _check_range(f"{where}[{index}]", value, -_LARGE, _LARGE)


def _tokens(manifest: Manifest, side: str) -> int:
    """Image tokens along a side of the default picture."""
    pixels: int = getattr(manifest.defaults, side)
    return pixels // (manifest.latents.patch_size * manifest.latents.spatial_factor)


def check_defaults(manifest: Manifest) -> None:
    """What a host uses where the caller says nothing must be what the engines take."""
    latents, defaults = manifest.latents, manifest.defaults
    _check_range("defaults.guidance_scale", defaults.guidance_scale, 0, _LARGE)
    require(
        0 < defaults.strength <= 1,
        "defaults.strength",
        f"is {defaults.strength}; it must be above 0 and at most 1",
    )
    multiple = latents.patch_size * latents.spatial_factor
    for name in ("height", "width"):
        value = getattr(defaults, name)
        require(
            value % multiple == 0,
            join("defaults", name),
            f"is {value}; it must be a multiple of {multiple}",
        )
    text, image = defaults.max_sequence_length, _tokens(manifest, "height")
    image *= _tokens(manifest, "width")
    if "t5" in manifest.tokenizers:
        t5 = manifest.tokenizers["t5"]
        shortest = len(t5.prefix) + len(t5.suffix)
        require(
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
                require(
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
            require(
                all(getattr(many, n) // factor == getattr(few, n) for n in ("min", "opt", "max")),
                join(where, latents),
                f"does not fit {pixels}: latents.spatial_factor makes it {factor} times as large",
            )
