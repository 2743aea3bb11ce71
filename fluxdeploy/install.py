"""How to install what is missing: what works depends on how this package was installed."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from urllib.parse import unquote, urlparse

__all__ = ["install_command"]

_NAME = "fluxdeploy"


def install_command(extra: str | None = None) -> str:
    """The command that installs this package with an extra, quoted for every shell.

    From a checkout that is '.[extra]', with the checkout named where it is not the current folder.
    """
    quoted = f"[{extra}]" if extra else ""
    checkout, editable = _find_checkout()
    if checkout is None:
        return f"pip install '{_NAME}{quoted}'"
    where = "" if _is_current(checkout) else f" in {checkout}"
    return f"pip install {'--editable ' if editable else ''}'.{quoted}'{where}"


def _is_current(folder: Path) -> bool:
    try:
        return folder.samefile(os.curdir)
    except OSError:  # the current folder is gone
        return False


def _find_checkout() -> tuple[Path | None, bool]:
    """The checkout that this package is or was installed from, and whether it runs from there."""
    running = Path(__file__).resolve().parents[1]
    if (running / "pyproject.toml").is_file():
        return running, True
    source = _source_folder()
    if source is not None and (source / "pyproject.toml").is_file():
        return source, False
    return None, False


def _source_folder() -> Path | None:
    """The folder that pip says it installed this package from, if it was one."""
    try:
        text = importlib.metadata.distribution(_NAME).read_text("direct_url.json")
        url = urlparse(json.loads(text or "{}").get("url", ""))
    except (importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        return None
    return Path(unquote(url.path)) if url.scheme == "file" else None
