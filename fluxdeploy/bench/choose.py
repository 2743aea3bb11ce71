"""Who takes part in a benchmark: bundles and peers, checked before anything is started."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import choose_edition
from engines.base import EngineOptions
from engines.registry import AUTO, runtimes
from fluxdeploy.bench.job import PEERS, Job
from fluxdeploy.bench.measure import Contender
from fluxdeploy.build.checkpoint import checkpoint_record, open_recorded
from fluxdeploy.bundle import Bundle, open_bundle
from fluxdeploy.bundle.manifest import EngineRecord
from fluxdeploy.demo import DEMO_CHECKPOINTS
from fluxdeploy.errors import MissingDependencyError, UsageError
from fluxdeploy.host.request import GenerationRequest, check_request
from fluxdeploy.machine import usable_cpus
from fluxdeploy.progress import Progress
from fluxdeploy.sampling.latents import latent_shape, pack
from fluxdeploy.sampling.noise import standard_normal

__all__ = ["BenchRequest", "choose_contenders", "parse_peers"]

_PROMPT, _SEED = "a red circle above a blue square", 0


@dataclass(frozen=True)
class BenchRequest:
    """What is asked for. None is the first bundle's default.

    checkpoint: what the bundles were made from, for peers that read it. device: the index of the
    GPU. size: height and width.
    """

    bundles: tuple[Path, ...]
    peers: tuple[str, ...]
    checkpoint: str | None
    runtime: str
    size: tuple[int, int] | None
    steps: int | None
    batch: int
    threads: int | None
    device: int = 0


def parse_peers(text: str) -> tuple[str, ...]:
    """The names in a list with commas. Raises `UsageError` for one that there is not."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in PEERS]
    if unknown or not names:
        raise UsageError(
            f"--against has no peer {', '.join(unknown) or 'in it'}. The peers are "
            f"{', '.join(PEERS)}."
        )
    return names


def choose_contenders(
    request: BenchRequest, progress: Progress
) -> tuple[list[Contender], NDArray[np.float32]]:
    """The contenders, bundles first, and the noise [B, L, C] that their pictures begin with.

    Raises `UsageError` for what cannot be timed, `BundleError` for a broken bundle,
    `MissingDependencyError` where a peer's packages are not installed.
    """
    options = EngineOptions(request.threads, request.device)
    for name in request.peers:
        _check_installed(name)
    paths = dict.fromkeys(str(path) for path in request.bundles)
    bundles = {name: choose_edition(open_bundle(name), request.runtime) for name in paths}
    for bundle in bundles.values():
        bundle.manifest.require_text_to_image("bench")
    first = next(iter(bundles.values()))
    generation = _check_sizes(request, bundles)
    checkpoint = _find_checkpoint(first, request.checkpoint, progress) if request.peers else ""
    target = _engine(first, request.runtime).target
    job = Job(
        contender="bundle",
        bundle="",
        checkpoint=checkpoint,
        folder="",
        latents="",
        runtime=request.runtime,
        device="cpu" if target == "cpu" else "cuda",
        threads=options.threads or usable_cpus(),
        prompt=_PROMPT,
        seed=_SEED,
        height=generation.height,
        width=generation.width,
        steps=generation.num_inference_steps,
        guidance=generation.guidance_scale,
        batch=generation.batch,
        text_tokens=generation.max_sequence_length,
        gpu=request.device,
    )
    contenders = [_of_bundle(name, bundle, job) for name, bundle in bundles.items()]
    contenders += [_of_peer(name, job) for name in request.peers]
    spec = first.manifest.latents
    noise = standard_normal(latent_shape(job.batch, job.height, job.width, spec), job.seed)
    return contenders, pack(noise, spec)


def _check_installed(name: str) -> None:
    peer = PEERS[name]
    missing = [pip for module, pip in peer.packages if not _has(module)]
    if missing:
        raise MissingDependencyError(
            f"The peer {name} needs {' and '.join(missing)}: pip install {shlex.join(missing)}."
        )
    if name.startswith("compile") and _compiler() is None:
        raise MissingDependencyError(
            f"The peer {name} needs a C++ compiler, which torch.compile calls: install g++ or "
            "clang++, or name it in the variable CXX."
        )


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of a package around it
        return False


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def _check_sizes(request: BenchRequest, bundles: Mapping[str, Bundle]) -> GenerationRequest:
    """The picture that all of them make: the first bundle's defaults, where nothing else is asked.

    Raises `UsageError` for a picture that one of the bundles does not make.
    """
    defaults = next(iter(bundles.values())).manifest.defaults
    height, width = request.size or (defaults.height, defaults.width)
    wanted: dict[str, Any] = {
        "prompt": _PROMPT,
        "negative_prompt": None,
        "true_cfg_scale": 1.0,
        "height": height,
        "width": width,
        "num_inference_steps": request.steps or defaults.num_inference_steps,
        "guidance_scale": defaults.guidance_scale,
        "num_images_per_prompt": request.batch,
        "max_sequence_length": defaults.max_sequence_length,
        "seed": _SEED,
        "latents": None,
    }
    generations = [check_request(bundle.manifest, **wanted) for bundle in bundles.values()]
    return generations[0]


def _engine(bundle: Bundle, runtime: str) -> EngineRecord:
    """The transformer's engine that is tried first. Raises `UsageError` where there is none."""
    engines = bundle.manifest.components["transformer"].engines
    for engine in engines:
        if runtime in (AUTO, engine.runtime):
            return engine
    built = sorted({engine.runtime for engine in engines})
    raise UsageError(
        f"{bundle.root} has no engine for --runtime {runtime}; it has engines for "
        f"{', '.join(built)}."
    )


def _find_checkpoint(bundle: Bundle, given: str | None, progress: Progress) -> str:
    """The folder of the checkpoint that a bundle was made from, in diffusers layout."""
    name = given or checkpoint_record(bundle).get("name")
    if name is None or (given is None and name not in DEMO_CHECKPOINTS):
        raise UsageError(
            "Peers read the original weights and need --checkpoint, what "
            f"{bundle.root} was made from: the bundle names no place where it lies."
        )
    checkpoint = open_recorded(bundle, name, progress)
    if checkpoint.layout != "diffusers":
        raise UsageError(
            f"{name} is not in diffusers layout, which the peers read. Name a copy that is."
        )
    return str(checkpoint.root)


def _of_bundle(name: str, bundle: Bundle, job: Job) -> Contender:
    engine = _engine(bundle, job.runtime)
    return Contender(
        name=name,
        title=f"{engine.runtime} on {engine.target}",
        precision=bundle.manifest.components["transformer"].precision,
        versions={engine.runtime: runtimes(engine.runtime)[0].version()},
        job=replace(job, bundle=str(bundle.root), bundle_hash=bundle.content_hash),
    )


def _of_peer(name: str, job: Job) -> Contender:
    peer = PEERS[name]
    if peer.cpu_only and job.device != "cpu":
        raise UsageError(f"The peer {name} runs on the CPU: compare it with bundles for it.")
    packages = [pip.partition("[")[0] for _, pip in peer.packages]
    versions = {package: importlib.metadata.version(package) for package in packages}
    return Contender(name, peer.title, peer.precision, versions, replace(job, contender=name))
