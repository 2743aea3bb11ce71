"""The manifest as JSON text, and back from text that may hold anything."""

from __future__ import annotations

import json
import re

from fluxdeploy.bundle.manifest import SCHEMA_VERSION, Manifest
from fluxdeploy.bundle.manifest_checks import check_manifest
from fluxdeploy.bundle.paths import HIDDEN
from fluxdeploy.bundle.typed_json import FieldError, join, load_strict, parse, require, to_plain
from fluxdeploy.errors import BundleError

__all__ = ["from_json", "to_json"]

_MAX_DEPTH = 32

_FREE = re.compile(r"(?:editions\[\d+\]\.)?provenance")
"""Where text is free-form."""


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
        check_manifest(manifest)
    except FieldError as error:
        raise BundleError(
            f"{source}: {error}. Build the bundle again with `fluxdeploy build`."
        ) from error
    return manifest


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
    require(depth <= _MAX_DEPTH, where, f"is nested more than {_MAX_DEPTH} deep")
    free = _FREE.fullmatch(where) is not None
    if isinstance(plain, str):
        hidden = None if free else HIDDEN.search(plain)
        require(hidden is None, where, f"is {plain!a}, which holds a control character")
    elif isinstance(plain, list):
        for index, entry in enumerate(plain):
            _check_text(entry, where if free else f"{where}[{index}]", depth + 1)
    elif isinstance(plain, dict):
        for key, entry in plain.items():
            _check_text(key, where, depth + 1)
            _check_text(entry, where if free else join(where, key), depth + 1)
