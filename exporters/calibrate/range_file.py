"""Files of a calibration: measured ranges as JSON, and prompts to measure with as text."""

from __future__ import annotations

import json
from pathlib import Path

from exporters.calibrate.ranges import ActivationRanges, attentions, linears
from exporters.checkpoint import Checkpoint
from exporters.components.registry import COMPONENTS
from fluxdeploy.bundle.files import read_whole, write_atomic
from fluxdeploy.bundle.typed_json import FieldError, load_strict, parse, to_plain
from fluxdeploy.errors import ExportError, UsageError

__all__ = ["read_prompts", "read_ranges", "write_ranges"]

_VERSION = 1
_MAX_RANGES = 4 << 20
"""FLUX.1's have 60 KiB, and the prompts."""
_MAX_PROMPTS = 16 << 20


def write_ranges(ranges: ActivationRanges, path: Path) -> None:
    """Write ranges as JSON, whole or not at all; equal ranges give equal bytes.

    Raises `BundleError` where the disk refuses.
    """
    plain = {"schema_version": _VERSION, **to_plain(ranges)}
    write_atomic(path, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")


def read_ranges(path: Path, checkpoint: Checkpoint, digest: str | None) -> ActivationRanges:
    """Read the ranges of a checkpoint whose weights have the SHA-256 `digest`, None for any.

    Raises `ExportError` for a file that is missing or broken, of another version, of another
    checkpoint, or without a value for each of the transformer's layers.
    """
    try:
        plain = load_strict(read_whole(path, _MAX_RANGES).decode("utf-8"))
    except OSError as error:
        raise ExportError(f"Cannot read the ranges {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise _broken(path, f"it is not valid JSON ({error})") from error
    if not isinstance(plain, dict) or "schema_version" not in plain:
        raise _broken(path, "it has no schema_version")
    version = plain.pop("schema_version")
    if version != _VERSION:
        raise ExportError(
            f"The ranges {path} are of version {version!r}, and this fluxdeploy reads version "
            f"{_VERSION}. Leave out --calibration to have them measured again."
        )
    try:
        ranges = parse(ActivationRanges, plain)
    except FieldError as error:
        raise _broken(path, str(error)) from error
    if digest is not None and ranges.checkpoint != digest:
        raise ExportError(
            f"The ranges {path} were measured on another checkpoint than {checkpoint.root}. Name "
            "the file of this checkpoint, or leave out --calibration to have them measured again."
        )
    try:
        _check_complete(ranges, checkpoint)
    except FieldError as error:
        raise _broken(path, str(error)) from error
    return ranges


def _broken(path: Path, problem: str) -> ExportError:
    return ExportError(
        f"{path} does not hold activation ranges: {problem}. Leave out --calibration to have them "
        "measured again."
    )


def _check_complete(ranges: ActivationRanges, checkpoint: Checkpoint) -> None:
    for i, size in enumerate(ranges.calibration.sizes):
        if len(size) != 2:
            raise FieldError(f"calibration.sizes[{i}]", "must be a height and a width")
    chain, _ = COMPONENTS["transformer"].source(checkpoint, "fp32")
    attention_names = set(attentions(chain))
    for field, names in (
        ("inputs", set(linears(chain))),
        ("values", attention_names),
        ("queries", attention_names),
        ("keys", attention_names),
    ):
        found = getattr(ranges, field)
        for name in sorted(names ^ set(found)):
            problem = "is missing" if name in names else "is no layer of this checkpoint"
            raise FieldError(f"{field}[{name}]", problem)
        for name, value in found.items():
            if value < 0:
                raise FieldError(f"{field}[{name}]", f"must be 0 or more, not {value}")


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
