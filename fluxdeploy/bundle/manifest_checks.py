"""What the records of a manifest may say of each other, so that a host can run it."""

from __future__ import annotations

import math
import re

from fluxdeploy.bundle.boundary import REDUX, RESIDUALS, SEEN, Tensors, check_boundary
from fluxdeploy.bundle.manifest import (
    MANIFEST_NAME,
    SYMBOLS,
    TASKS,
    ComponentRecord,
    FileRecord,
    GoldenRecord,
    Manifest,
    TensorSpec,
)
from fluxdeploy.bundle.manifest_values import (
    check_constants,
    check_defaults,
    check_magnitudes,
    check_preview,
    check_quality,
    check_schedule,
    check_skips,
    check_tokenizer,
)
from fluxdeploy.bundle.paths import path_problem
from fluxdeploy.bundle.pixels import check_pixels
from fluxdeploy.bundle.recipe import check_recipe
from fluxdeploy.bundle.typed_json import FieldError, join, listed, require

__all__ = ["check_manifest"]

_CONTROLNET = re.compile(r"controlnet(?:_[2-9]\d?)?")
_MAX_MODES = 1000

_MAX_SIZE = 2**31 - 1
"""Of what an engine may take: runtimes count in 32 bits."""

_MAX_ELEMENTS = 2**31 - 1
_MAX_ENTRIES = 64
_MAX_FILES = 4096


def check_manifest(manifest: Manifest) -> None:
    """Raise `FieldError` for a manifest that could not be run."""
    _check_counts(manifest)
    _check_files(manifest)
    _check_editions(manifest)
    first, *others = manifest.each()
    _check_edition(first)
    for index, edition in enumerate(others):
        try:
            _check_counts(edition)
            _check_edition(edition)
        except FieldError as error:
            where = join(f"editions[{index}]", error.where) if error.where else f"editions[{index}]"
            raise FieldError(where, error.problem) from error


def _check_editions(manifest: Manifest) -> None:
    """Each is for a runtime of its own, by which a host asks for it."""
    if not manifest.editions:
        return
    known: set[str] = set()
    for where, components in (
        ("components", manifest.components),
        *((f"editions[{i}].components", e.components) for i, e in enumerate(manifest.editions)),
    ):
        transformer = components.get("transformer")
        require(
            transformer is not None and bool(transformer.engines),
            where,
            "has no transformer with an engine, by whose runtime an edition is known",
        )
        assert transformer is not None
        runtime = transformer.engines[0].runtime
        require(
            runtime not in known,
            f"{where}.transformer.engines[0].runtime",
            f"is {runtime!r}, as that of an earlier edition",
        )
        known.add(runtime)


def _check_edition(manifest: Manifest) -> None:
    for name, component in manifest.components.items():
        _check_component(component, f"components.{name}")
    for name, tokenizer in manifest.tokenizers.items():
        check_tokenizer(tokenizer, f"tokenizers.{name}")
    check_quality(manifest.quality)
    check_constants(manifest)
    check_magnitudes(manifest)
    check_schedule(manifest)
    _check_tasks(manifest)
    _check_controlnets(manifest)
    _check_ip_adapter(manifest)
    _check_redux(manifest)
    for index, record in enumerate(manifest.skips):
        check_skips(record, manifest.skips[:index], f"skips[{index}]")
    if manifest.preview is not None:
        check_preview(manifest.preview, manifest.latents.channels)
    _check_boundary(manifest)
    check_defaults(manifest)


def _check_counts(manifest: Manifest) -> None:
    """Refuse lists that would take long to check, before they are."""
    counts = {
        "components": len(manifest.components),
        "tokenizers": len(manifest.tokenizers),
        "rope.axes_dims": len(manifest.rope.axes_dims),
        "skips": len(manifest.skips),
        "tasks": len(manifest.tasks),
        "controlnets": len(manifest.controlnets),
        "editions": len(manifest.editions),
    }
    for name, component in manifest.components.items():
        specs = {"inputs": component.inputs, "outputs": component.outputs}
        counts |= {f"components.{name}.{side}": len(given) for side, given in specs.items()}
        counts[f"components.{name}.engines"] = len(component.engines)
        for side, given in specs.items():
            for index, spec in enumerate(given[:_MAX_ENTRIES]):
                counts[f"components.{name}.{side}[{index}].shape"] = len(spec.shape)
    for name, tokenizer in manifest.tokenizers.items():
        for side, ids in (("prefix", tokenizer.prefix), ("suffix", tokenizer.suffix)):
            counts[f"tokenizers.{name}.{side}"] = len(ids)
    for where, count in counts.items():
        require(count <= _MAX_ENTRIES, where, f"has {count} entries; {_MAX_ENTRIES} are the most")
    files = sum(1 for _ in manifest.files())
    require(files <= _MAX_FILES, "", f"It names {files} files; {_MAX_FILES} are the most")


def _check_tasks(manifest: Manifest) -> None:
    """All tasks of a bundle are done by one transformer, which reads so many channels."""
    tasks = manifest.tasks
    require(bool(tasks), "tasks", "is empty; a bundle does something")
    for index, task in enumerate(tasks):
        where = f"tasks[{index}]"
        require(task in TASKS, where, f"is {task!r}; it must be one of {listed(TASKS)}")
        require(task not in tasks[:index], where, f"is {task!r}, as an earlier one")
    axes = len(manifest.rope.axes_dims)
    require(
        axes > 2 or "kontext" not in tasks,
        "tasks",
        f"has kontext, whose pictures take an axis of their own, and rope.axes_dims has {axes}",
    )
    read = {manifest.latents.channels_read(task) for task in tasks}
    require(len(read) == 1, "tasks", f"needs transformers of {listed(read)} channels at once")


def _check_controlnets(manifest: Manifest) -> None:
    """Each has its components, and the transformer takes what all of them give."""
    records, components = manifest.controlnets, manifest.components
    require(
        bool(records) == ("controlnet" in manifest.tasks),
        "controlnets",
        "must name one or more where tasks has controlnet, and none elsewhere",
    )
    for index, record in enumerate(records):
        where = f"controlnets[{index}]"
        name = record.component
        require(
            _CONTROLNET.fullmatch(name) is not None,
            f"{where}.component",
            f"is {name!r}; it must be controlnet, or controlnet_2 and so on",
        )
        require(
            all(other.component != name for other in records[:index]),
            where,
            "has the component of an earlier one",
        )
        for needed in (name, f"{name}_conditioner"):
            require(
                needed in components,
                f"{where}.component",
                f"needs the component {needed}, which there is not",
            )
        require(0 <= record.modes <= _MAX_MODES, f"{where}.modes", f"is {record.modes}")
        given = {spec.name for spec in components[f"{name}_conditioner"].inputs}
        require(
            (record.modes > 0) == ("control_mode" in given),
            f"{where}.modes",
            f"is {record.modes}, and {name}_conditioner takes "
            f"{', '.join(sorted(given)) or 'nothing'}",
        )
    transformer = components.get("transformer")
    for spec in () if transformer is None else transformer.inputs:
        if spec.name not in RESIDUALS:
            continue
        where = f"components.transformer.inputs.{spec.name}"
        require(bool(records), where, "is what ControlNets give, and controlnets names none")
        for record in records:
            for output in components[record.component].outputs:
                require(
                    output.name != spec.name or _rows(output) >= _rows(spec),
                    where,
                    f"has {_rows(spec)} residuals, and {record.component} gives {_rows(output)}",
                )


def _check_ip_adapter(manifest: Manifest) -> None:
    """It has its components, which take what its pixels are made into."""
    record, components = manifest.ip_adapter, manifest.components
    transformer = components.get("transformer")
    takes = {spec.name for spec in (() if transformer is None else transformer.inputs)}
    for name in SEEN:
        require(
            (name in takes) == (record is not None),
            "ip_adapter",
            f"must be there where the transformer takes {name}, and only there",
        )
    if record is None:
        return
    check_pixels(record.pixels, "ip_adapter.pixels")
    for name in ("ip_adapter", "ip_adapter_encoder"):
        require(name in components, "ip_adapter", f"needs the component {name}")


def _check_redux(manifest: Manifest) -> None:
    """Its pixels are those that its component reads."""
    record = manifest.components.get(REDUX)
    require(
        (manifest.redux is None) == (record is None),
        "redux",
        f"must be there where components has {REDUX}, and null elsewhere",
    )
    if manifest.redux is not None:
        check_pixels(manifest.redux, "redux")


def _rows(spec: TensorSpec) -> int:
    """The residuals in one tensor of them."""
    first = spec.shape[0] if spec.shape else 0
    return first if isinstance(first, int) else 0


def _check_path(path: str, where: str) -> None:
    problem = path_problem(path)
    require(problem is None, where, f"is {path!r}, which {problem}")


def _check_files(manifest: Manifest) -> None:
    known: dict[str, FileRecord] = {}
    for where, record in manifest.files():
        _check_path(record.path, f"{where}.path")
        require(record.path != MANIFEST_NAME, f"{where}.path", "is the manifest itself")
        require(record.size >= 0, f"{where}.size", f"is {record.size}; sizes are not negative")
        require(
            re.fullmatch("[0-9a-f]{64}", record.sha256) is not None,
            f"{where}.sha256",
            "must be 64 lower-case hexadecimal digits",
        )
        require(
            known.setdefault(record.path, record) == record,
            where,
            f"gives {record.path!r} another size or hash than an earlier record",
        )


def _check_component(component: ComponentRecord, where: str) -> None:
    if component.recipe is not None:
        check_recipe(component.recipe, join(where, "recipe"))
    paths = {record.path for record in component.files}
    symbols: set[str] = set()
    for side, specs in (("inputs", component.inputs), ("outputs", component.outputs)):
        names = [spec.name for spec in specs]
        require(len(set(names)) == len(names), f"{where}.{side}", "names a tensor twice")
        for index, spec in enumerate(specs):
            symbols |= _check_tensor(spec, f"{where}.{side}[{index}]")
    require(bool(component.engines), f"{where}.engines", "is empty; nothing can run it")
    for index, engine in enumerate(component.engines):
        at = f"{where}.engines[{index}]"
        require(
            engine.path in paths,
            f"{at}.path",
            f"is {engine.path!r}, which is not among the component's files",
        )
        require(
            set(engine.dimensions) == symbols,
            f"{at}.dimensions",
            f"must have exactly the symbols of the component's tensors: {listed(symbols)}, "
            f"not {listed(engine.dimensions)}",
        )
        for symbol, sizes in engine.dimensions.items():
            require(
                1 <= sizes.min <= sizes.opt <= sizes.max <= _MAX_SIZE,
                f"{at}.dimensions.{symbol}",
                f"must have 1 <= min <= opt <= max <= {_MAX_SIZE}, not {sizes.min}, {sizes.opt}, "
                f"{sizes.max}",
            )
    if component.golden is not None:
        _check_golden(component.golden, paths, f"{where}.golden")


def _check_tensor(spec: TensorSpec, where: str) -> set[str]:
    require(
        spec.dtype in ("float32", "int32"),
        f"{where}.dtype",
        f"is {spec.dtype!r}; tensors are float32 or int32",
    )
    for index, size in enumerate(spec.shape):
        require(
            size in SYMBOLS if isinstance(size, str) else 1 <= size <= _MAX_SIZE,
            f"{where}.shape[{index}]",
            f"is {size!r}; it must be a size from 1 to {_MAX_SIZE} or one of {listed(SYMBOLS)}",
        )
    require(
        math.prod(size for size in spec.shape if isinstance(size, int)) <= _MAX_ELEMENTS,
        f"{where}.shape",
        f"is {list(spec.shape)}, which has more than {_MAX_ELEMENTS} elements",
    )
    return {size for size in spec.shape if isinstance(size, str)}


def _check_golden(golden: GoldenRecord, paths: set[str], where: str) -> None:
    require(
        golden.path in paths,
        f"{where}.path",
        f"is {golden.path!r}, which is not among the component's files",
    )
    require(golden.max_error >= 0, f"{where}.max_error", "is negative")
    require(-1 <= golden.min_cosine <= 1, f"{where}.min_cosine", "is not between -1 and 1")


def _check_boundary(manifest: Manifest) -> None:
    """What hosts give to components and take from them, and the sizes that both sides have."""
    latents = manifest.latents
    sizes = {
        "the latents' channels": (latents.channels, "latents.channels"),
        "a token's channels": (
            latents.token_channels,
            "latents, channels times patch_size squared,",
        ),
        "what a task reads": (
            latents.channels_read(manifest.tasks[0]),
            f"latents, for the task {manifest.tasks[0]},",
        ),
        "a head's channels": (sum(manifest.rope.axes_dims), "the sum of rope.axes_dims"),
    }
    if manifest.redux is not None:
        height, width = manifest.redux.size
        sizes |= {
            "the rows of its pixels": (height, "redux"),
            "the columns of its pixels": (width, "redux"),
        }
    if manifest.ip_adapter is not None:
        height, width = manifest.ip_adapter.pixels.size
        sizes |= {
            "the rows of what is seen": (height, "ip_adapter.pixels"),
            "the columns of what is seen": (width, "ip_adapter.pixels"),
        }
    if "clip" in manifest.tokenizers:
        length = manifest.tokenizers["clip"].max_length
        sizes["CLIP's tokens"] = (length, "tokenizers.clip.max_length")

    def tensors(specs: tuple[TensorSpec, ...]) -> Tensors:
        return {spec.name: (spec.dtype, spec.shape) for spec in specs}

    check_boundary(
        {
            name: (tensors(component.inputs), tensors(component.outputs))
            for name, component in manifest.components.items()
        },
        manifest.guidance_embedding,
        [record.component for record in manifest.controlnets],
        sizes,
    )
