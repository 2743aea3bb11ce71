"""Manifests for several runtimes, made of one for one."""

from __future__ import annotations

from dataclasses import replace

from fluxdeploy.bundle.manifest import Manifest, TensorSpec

__all__ = ["for_runtime", "with_editions"]

_FLOATS = "float32"
_INPUTS = (
    TensorSpec("hidden_states", _FLOATS, ("B", "L", 64)),
    TensorSpec("context", _FLOATS, ("B", "S", 3072)),
    TensorSpec("modulation", _FLOATS, ("B", 30, 3072)),
    TensorSpec("rope_cos", _FLOATS, ("T", 128)),
    TensorSpec("rope_sin", _FLOATS, ("T", 128)),
)


def for_runtime(manifest: Manifest, runtime: str, target: str = "cpu") -> Manifest:
    """The small manifest, with a transformer, for another runtime."""
    t5 = manifest.components["t5"]
    (engine,) = t5.engines
    ranges = engine.dimensions
    own = replace(engine, runtime=runtime, target=target)
    wide = {symbol: replace(ranges["S"], max=66048) for symbol in ("L", "T")}
    wide = {symbol: replace(sizes, opt=4608) for symbol, sizes in wide.items()}
    transformer = replace(
        t5,
        inputs=_INPUTS,
        outputs=(TensorSpec("velocity", _FLOATS, ("B", "L", 64)),),
        engines=(replace(own, dimensions={**ranges, **wide}),),
    )
    return replace(
        manifest, components={"t5": replace(t5, engines=(own,)), "transformer": transformer}
    )


def with_editions(manifest: Manifest, *runtimes: str) -> Manifest:
    """The small manifest, with a transformer, for each of the runtimes."""
    made = [for_runtime(manifest, runtime) for runtime in runtimes]
    return made[0].with_each(made)
