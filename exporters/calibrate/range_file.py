"""Files of a calibration: what was measured and found as JSON, and prompts to measure with."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from exporters.calibrate.means import Means, Moments, spread_means, spread_moments
from exporters.calibrate.ranges import ActivationRanges, attentions, linears
from exporters.checkpoint import Checkpoint
from exporters.components.chain import Chain
from exporters.components.registry import COMPONENTS
from exporters.components.run import shared_inputs
from fluxdeploy.bundle.files import read_whole, write_atomic
from fluxdeploy.bundle.recipe import RecipeRecord, check_recipe
from fluxdeploy.bundle.typed_json import (
    OPTIONAL,
    FieldError,
    join,
    load_strict,
    parse,
    to_plain,
)
from fluxdeploy.errors import ExportError, UsageError

__all__ = ["CalibrationFile", "read_calibration", "read_prompts", "write_calibration"]

_VERSION = 2
_MAX_RANGES = 128 << 20
"""FLUX.1's have 7 MiB, a byte and a bfloat16 for each channel, the prompts, and moments."""
_MAX_PROMPTS = 16 << 20


@dataclass(frozen=True)
class CalibrationFile:
    """What a build has measured and found, for the next one of the same checkpoint.

    ranges: None where no static scale was needed. recipes: by component, see `exporters.quality`.
    means, moments: by component, of what its linears read; none of one that was not judged, and
        moments only for formats whose numbers make up for each other's rounding.
    """

    checkpoint: str
    ranges: ActivationRanges | None
    recipes: Mapping[str, RecipeRecord]
    means: Mapping[str, Means] = field(default_factory=dict, metadata=OPTIONAL)
    moments: Mapping[str, Moments] = field(default_factory=dict, metadata=OPTIONAL)


def write_calibration(calibration: CalibrationFile, path: Path) -> None:
    """Write a calibration as JSON, whole or not at all; equal ones give equal bytes.

    Raises `BundleError` where the disk refuses.
    """
    plain = {"schema_version": _VERSION, **to_plain(calibration)}
    write_atomic(path, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


def read_calibration(path: Path, checkpoint: Checkpoint, digest: str | None) -> CalibrationFile:
    """Read the calibration of a checkpoint whose weights have the SHA-256 `digest`, None for any.

    Raises `ExportError` for a file that is missing or broken, of another version, of another
    checkpoint, or whose ranges lack one of the transformer's layers.
    """
    try:
        plain = load_strict(read_whole(path, _MAX_RANGES).decode("utf-8"))
    except OSError as error:
        raise ExportError(
            f"Cannot read the calibration {path}: {error.strerror or error}."
        ) from error
    except ValueError as error:
        raise _broken(path, f"it is not valid JSON ({error})") from error
    if not isinstance(plain, dict) or "schema_version" not in plain:
        raise _broken(path, "it has no schema_version")
    version = plain.pop("schema_version")
    if version != _VERSION:
        raise ExportError(
            f"The calibration {path} is of version {version!r}, and this fluxdeploy reads version "
            f"{_VERSION}. Leave out --calibration to have it measured again."
        )
    try:
        found = parse(CalibrationFile, plain)
        for name, record in found.recipes.items():
            check_recipe(record, join("recipes", name))
    except FieldError as error:
        raise _broken(path, str(error)) from error
    measured = {found.checkpoint, *([] if found.ranges is None else [found.ranges.checkpoint])}
    if digest is not None and measured != {digest}:
        raise ExportError(
            f"The calibration {path} was measured on another checkpoint than {checkpoint.root}. "
            "Name the file of this checkpoint, or leave out --calibration to have it measured "
            "again."
        )
    try:
        if found.ranges is not None:
            _check_complete(found.ranges, checkpoint)
        for name, means in found.means.items():
            _check("means", name, checkpoint, spread_means, means)
        for name, moments in found.moments.items():
            _check("moments", name, checkpoint, spread_moments, moments)
    except FieldError as error:
        raise _broken(path, str(error)) from error
    return found


def _broken(path: Path, problem: str) -> ExportError:
    return ExportError(
        f"{path} does not hold a calibration: {problem}. Leave out --calibration to have them "
        "measured again."
    )


def _check_complete(ranges: ActivationRanges, checkpoint: Checkpoint) -> None:
    for i, size in enumerate(ranges.calibration.sizes):
        if len(size) != 2:
            raise FieldError(f"calibration.sizes[{i}]", "must be a height and a width")
    chain, weights = COMPONENTS["transformer"].source(checkpoint, "fp32")
    attention_names = set(attentions(chain))
    first = shared_inputs(chain)
    for kind, names in (
        ("inputs", set(linears(chain))),
        ("values", attention_names),
        ("queries", attention_names),
        ("keys", attention_names),
        ("channels", {first[name] for name in linears(chain)}),
    ):
        found = getattr(ranges, kind)
        for name in sorted(names ^ set(found)):
            problem = "is missing" if name in names else "is no layer of this checkpoint"
            raise FieldError(f"{kind}[{name}]", problem)
        for name, value in found.items():
            if kind == "channels":
                _check_channels(name, value, weights[f"{name}.weight"].shape[1])
            elif value < 0:
                raise FieldError(f"{kind}[{name}]", f"must be 0 or more, not {value}")


def _check(
    kind: str,
    component: str,
    checkpoint: Checkpoint,
    spread: Callable[[Chain, Mapping[str, str]], object],
    texts: Mapping[str, str],
) -> None:
    where = join(kind, component)
    if component not in COMPONENTS or not COMPONENTS[component].present(checkpoint):
        raise FieldError(where, "is no component of this checkpoint")
    chain, _ = COMPONENTS[component].source(checkpoint, "fp32")
    try:
        spread(chain, texts)
    except FieldError as error:
        raise FieldError(f"{where}{error.where}", error.problem) from error


def _check_channels(name: str, value: str, columns: int) -> None:
    try:
        codes = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FieldError(f"channels[{name}]", f"is not base64 ({error})") from error
    if len(codes) != columns:
        raise FieldError(f"channels[{name}]", f"has {len(codes)} channels, not {columns}")


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts from a UTF-8 text file, one a line; empty lines and spaces around are left out.

    Raises `UsageError` for a file that cannot be read, is not UTF-8, or holds no prompt.
    """
    try:
        # Some editors begin a file with a byte order mark.
        text = read_whole(path, _MAX_PROMPTS).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"Cannot read the prompts {path}: {error.strerror or error}. Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8, one prompt a line."
        ) from error
    prompts = tuple(stripped for line in text.split("\n") if (stripped := line.strip()))
    if not prompts:
        raise UsageError(f"{path} holds no prompt. Write at least one, one a line.")
    return prompts
