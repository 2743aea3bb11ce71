"""The opened components of a bundle: opened when they are needed, and closed where memory is short.

Every output is checked for NaN, and a call that was cancelled runs none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from engines.base import Array, Engine
from fluxdeploy.arguments import shown
from fluxdeploy.bundle.manifest import DimensionRange, Manifest
from fluxdeploy.errors import UsageError
from fluxdeploy.host.batches import run_in_parts
from fluxdeploy.host.cancel import Checked
from fluxdeploy.host.finite import check_finite

__all__ = ["Components", "Run", "check_range"]

Run = Callable[[str, Mapping[str, Array]], "dict[str, NDArray[np.float32]]"]
"""`run(component, inputs)`: the component's outputs by name, for one call of the pipeline."""

_SIZE_WORDS = {
    "S": "text tokens (max_sequence_length)",
    "L": "image tokens (they grow with height x width)",
    "T": "text and image tokens together",
    "V": "tokens of the pictures in ip_adapter_image",
    "N": "steps (num_inference_steps)",
    "H": "rows of pixels (height)",
    "W": "columns of pixels (width)",
    "h": "rows of latents (they grow with height)",
    "w": "columns of latents (they grow with width)",
    "R": "as the rank of LoRAs",
}


class Components:
    """The engines of a bundle. With `low_vram` one is open only until it is released."""

    def __init__(
        self, manifest: Manifest, open_component: Callable[[str], Engine], low_vram: bool
    ) -> None:
        self._manifest = manifest
        self._open_component = open_component
        self._low_vram = low_vram
        self._engines: dict[str, Engine] = {}

    def engine(self, component: str) -> Engine:
        """The component's engine, opened now where it is not."""
        if component not in self._engines:
            self._engines[component] = self._open_component(component)
        return self._engines[component]

    def run(
        self, cancel: Checked, component: str, inputs: Mapping[str, Array]
    ) -> dict[str, NDArray[np.float32]]:
        """Run a component, as a `Run` of the call that `cancel` ends.

        A batch that is larger than the engine takes runs in parts. Raises `Cancelled`, and
        `NumericError` where an output is not finite.
        """
        check = functools.partial(cancel.check, f"before the {component} ran")
        check()
        outputs = run_in_parts(self.engine(component), inputs, check)
        found = {name: np.asarray(values, np.float32) for name, values in outputs.items()}
        for values in found.values():
            check_finite(values, component)
        return found

    def release(self, *components: str) -> None:
        """Close engines that this call needs no more, where memory is short."""
        for component in components:
            if self._low_vram and component in self._engines:
                self._engines.pop(component).close()

    def release_all(self) -> None:
        """Close what a part of a call, or a call that failed, has opened, where memory is short."""
        self.release(*tuple(self._engines))

    def close(self) -> None:
        """Close all of them; they are opened again when they are needed."""
        while self._engines:
            self._engines.popitem()[1].close()

    def check_sizes(self, cancel: Checked, sizes: Mapping[str, Mapping[str, int]]) -> None:
        """Refuse what one of the engines cannot do, before the long work.

        sizes: for each component, what it is asked for by the symbols of the manifest. All of them
        are opened here, so that one that is broken is known as early, unless memory is to hold one
        at a time: then the manifest tells what they can do. Raises `UsageError`, and `Cancelled`.
        """
        for component, symbols in sizes.items():
            if self._low_vram:
                ranges = self._manifest.components[component].engines[0].dimensions
            else:
                cancel.check(f"before the {component} was opened")
                ranges = self.engine(component).dimensions
            for symbol, size in symbols.items():
                if symbol in ranges:
                    check_range(component, symbol, size, ranges[symbol])


def check_range(component: str, symbol: str, size: int, allowed: DimensionRange) -> None:
    """Raise `UsageError` for a size that a component's engine does not take."""
    if not allowed.min <= size <= allowed.max:
        raise UsageError(
            f"This bundle's {component} takes {allowed.min} to {allowed.max} "
            f"{_SIZE_WORDS[symbol]}, not {shown(size)}. Ask for a size in that range, or build the "
            "bundle with a wider one."
        )
