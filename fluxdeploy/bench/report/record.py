"""What a benchmark found: frozen dataclasses that are JSON, and are read back from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from fluxdeploy.bench.clock import Ratio, Timing
from fluxdeploy.bundle.typed_json import FieldError, load_strict, parse, to_plain
from fluxdeploy.errors import UsageError

__all__ = [
    "QUANTITIES",
    "Agreement",
    "BenchReport",
    "ContenderReport",
    "Workload",
    "from_json",
    "to_json",
]

QUANTITIES: Mapping[str, str] = {
    "picture": "picture",
    "step": "step",
    "transformer": "transformer",
    "host": "host",
    "clip": "CLIP",
    "t5": "T5",
    "conditioner": "conditioner",
    "vae_decoder": "decoder",
    "cold start": "cold start",
}
"""What is timed, and what tables call it. `step`, `transformer` and `host`, which is all else in a
step, are those of one step. A contender has no timing of what it does not have: only bundles have a
conditioner, whose work the other transformers repeat in every step."""

_PARTS = ("clip", "t5", "conditioner", "transformer", "host", "vae_decoder")
_EVERY_STEP = ("transformer", "host")


@dataclass(frozen=True)
class Workload:
    """What every contender did: `batch` pictures of width x height pixels in one call.

    `tokens` are text tokens.
    """

    prompt: str
    width: int
    height: int
    steps: int
    batch: int
    tokens: int
    guidance: float
    threads: int
    device: str


@dataclass(frozen=True)
class Agreement:
    """How far a contender is from the first bundle, with equal noise and prompt.

    velocity_error: of the transformer's output in the first step, |own - bundle| / |bundle|.
    psnr: of the pictures, 8 bits, in dB; None where they are equal.
    """

    velocity_error: float
    psnr: float | None


@dataclass(frozen=True)
class ContenderReport:
    """A contender: a bundle by its path, or a peer by its name.

    load: median seconds for opening the model, of the cold starts and the process that was timed.
    memory: the most bytes of memory that its process had. gpu_memory: bytes of the GPU that its
    process took. energy: joules of the GPU for one call. None is what was not measured.
    """

    name: str
    title: str
    precision: str
    is_bundle: bool
    agreement: Agreement
    timings: Mapping[str, Timing]
    load: float
    memory: int | None
    gpu_memory: int | None
    energy: float | None

    def images_per_minute(self, batch: int) -> float:
        """Pictures that it makes in a minute, one call after the other."""
        return 60 * batch / self.timings["picture"].p50

    def parts(self, steps: int) -> dict[str, float]:
        """The median seconds of each part of a picture, all steps together, and of the rest."""
        parts = {}
        for name in _PARTS:
            timing = self.timings.get(name)
            if timing is not None:
                often = steps if name in _EVERY_STEP else 1
                parts[QUANTITIES[name]] = often * timing.p50
        # Medians of the parts need not add up to the median of the whole.
        parts["rest"] = max(self.timings["picture"].p50 - sum(parts.values()), 0.0)
        return parts


@dataclass(frozen=True)
class BenchReport:
    """All that was measured. Ratios are those to the contender `baseline`.

    noise: the ratios of the baseline to itself: a ratio within them says nothing. rounds, warmup,
    cold_starts: how many there were, fewer than were asked for where Ctrl-C ended the benchmark; a
    cold start finds its files in the system's cache.
    one_by_one: every turn had a process of its own, whose first picture does not count.
    """

    fluxdeploy: str
    machine: Mapping[str, object]
    workload: Workload
    baseline: str
    rounds: int
    warmup: int
    cold_starts: int
    one_by_one: bool
    noise: Mapping[str, Ratio]
    contenders: tuple[ContenderReport, ...]


def to_json(report: BenchReport) -> str:
    """The report as JSON text, with each contender's pictures a minute."""
    plain = to_plain(report)
    for own, contender in zip(plain["contenders"], report.contenders, strict=True):
        own["images_per_minute"] = contender.images_per_minute(report.workload.batch)
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str) -> BenchReport:
    """What `to_json` wrote. Raises `UsageError` for anything else."""
    try:
        plain = load_strict(text)
        if isinstance(plain, dict) and isinstance(plain.get("contenders"), list):
            for contender in plain["contenders"]:
                if isinstance(contender, dict):
                    contender.pop("images_per_minute", None)  # follows from the rest
        return parse(BenchReport, plain)
    except (FieldError, ValueError) as error:
        raise UsageError(f"This is no report of `fluxdeploy bench`: {error}.") from error
