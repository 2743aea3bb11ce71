"""Filters that make a control image of a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image

from fluxdeploy.errors import MissingDependencyError, UsageError
from fluxdeploy.host.input_images import upright_picture
from fluxdeploy.install import install_command

__all__ = ["FILTERS", "canny", "find_filter"]

_LOW, _HIGH = 50, 200
"""The thresholds of FLUX.1 Canny's own code."""


def canny(image: Image.Image) -> Image.Image:
    """The edges of a picture, white on black, as FLUX.1 Canny was trained with.

    By OpenCV's filter of that name. Raises `MissingDependencyError` without the package.
    """
    try:
        import cv2
    except ImportError as error:
        raise MissingDependencyError(
            f"Finding edges needs the package opencv-python-headless: {install_command('control')}."
        ) from error
    edges = cv2.Canny(np.asarray(upright_picture(image, "control_image")), _LOW, _HIGH)
    return Image.fromarray(edges).convert("RGB")


FILTERS: Mapping[str, Callable[[Image.Image], Image.Image]] = MappingProxyType({"canny": canny})
"""What `--control` may name."""


def find_filter(name: str) -> Callable[[Image.Image], Image.Image]:
    """The filter of a name. Raises `UsageError` for one that there is not."""
    if name not in FILTERS:
        raise UsageError(
            f"There is no filter {name!r} for control images; there is {', '.join(FILTERS)}. "
            "Depths are found by a network of its own: give the picture of them."
        )
    return FILTERS[name]
