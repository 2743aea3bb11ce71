"""Writing a model repository for Triton: whole or not at all, with all that it needs inside."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from string import Template

from engines import runtimes
from fluxdeploy.bundle import Bundle
from fluxdeploy.bundle.files import disk_errors, link_or_copy, write_atomic
from fluxdeploy.bundle.manifest import MANIFEST_NAME, ComponentRecord, missing_component
from fluxdeploy.errors import BundleError, UsageError
from fluxdeploy.serve.triton.config import (
    FORMS,
    HEADER,
    Form,
    Settings,
    TritonEngines,
    component_config,
    component_model,
    pipeline_config,
    plan_name,
    triton_edition,
    triton_engines,
)
from fluxdeploy.serve.triton.fields import INPUTS, MODEL, OUTPUTS, Field

__all__ = ["BUNDLE", "VERSION", "write_repository"]

VERSION = "1"
"""The folder of a model's version, the first one."""

BUNDLE = "bundle"
"""The bundle's folder in the version's: another version of `flux` can have another bundle."""

_FILES = Path(__file__).parent / "files"

_BASE = ("click", "onnxruntime", "pillow", "rich", "tokenizers")
"""What the host needs, but NumPy."""

_NUMPY = "numpy==1.26.4"
"""The latest that every Triton's Python backend reads."""

_MODEL = '''\
"""The model `flux`. What it does is in fluxdeploy, which must be installed beside Triton."""

from fluxdeploy.serve.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_repository(
    bundle: Bundle, destination: str | os.PathLike[str], form: Form, settings: Settings
) -> list[str]:
    """Write a repository that Triton loads as it is; returns the names of its models.

    Files of the bundle are hard-linked where the disk allows it, else copied: nothing leads out of
    the repository. One that was there stays until the new one is whole. Raises `UsageError` for a
    form or a runtime that is none, and `BundleError` for a bundle that cannot be served in it, for
    a destination that holds something else, and where the disk refuses.
    """
    if form not in FORMS:
        raise UsageError(f"There is no form {form!r}; the forms are {', '.join(FORMS)}.")
    bundle = triton_edition(bundle, form)
    missing = missing_component(bundle.manifest)
    if missing is not None:
        raise BundleError(
            f"The bundle {bundle.root} has no {missing}, which every picture takes. Build the "
            "bundle again with `fluxdeploy build`."
        )
    runtimes(settings.runtime)
    engines = _engines(bundle, form)
    with disk_errors("find", destination):
        target = Path(os.path.realpath(destination))
    _check_replaceable(target, bundle)
    unfinished = target.with_name(f".{target.name}.writing")
    with disk_errors("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with disk_errors("write", unfinished):
            _write(bundle, unfinished, form, settings, engines)
        with disk_errors("replace", target):
            _put_in_place(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return [MODEL, *map(component_model, engines)]


def _engines(bundle: Bundle, form: Form) -> dict[str, TritonEngines]:
    """The engines of the models beside `flux`, by component."""
    if form == "pipeline":
        return {}
    components = bundle.manifest.components
    return {name: triton_engines(name, record) for name, record in components.items()}


def _check_replaceable(target: Path, bundle: Bundle) -> None:
    """Raise `BundleError` where a repository at `target` would destroy something."""
    if bundle.root.is_relative_to(target) or target.is_relative_to(bundle.root):
        raise BundleError(
            f"{target} and the bundle {bundle.root} lie in each other; name another folder."
        )
    if not os.path.lexists(target):
        return
    with disk_errors("read", target):
        if not target.is_dir():
            raise BundleError(f"{target} is a file, not a folder; choose another name.")
        if not any(target.iterdir()) or _is_ours(target):
            return
    raise BundleError(
        f"{target} holds files and is no repository of `fluxdeploy triton`, so it is not replaced; "
        "choose a new or an empty folder."
    )


def _is_ours(folder: Path) -> bool:
    config = folder / MODEL / "config.pbtxt"
    try:
        with config.open(encoding="utf-8", errors="replace") as file:
            return HEADER in file.readline(200)
    except OSError:
        return False


def _put_in_place(unfinished: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        os.rename(unfinished, target)  # an empty folder may be in its place
        return
    aside = target.with_name(f".{target.name}.previous")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(target, aside)
    try:
        os.rename(unfinished, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _write(
    bundle: Bundle, root: Path, form: Form, settings: Settings, engines: dict[str, TritonEngines]
) -> None:
    version = root / MODEL / VERSION
    version.mkdir(parents=True)
    for path in _files_of_host(bundle, form):
        link_or_copy(bundle.path(path), version / BUNDLE / path)
    config = pipeline_config(bundle.manifest, bundle.content_hash, form, settings)
    write_atomic(root / MODEL / "config.pbtxt", config)
    write_atomic(version / "model.py", _MODEL)
    for component, chosen in engines.items():
        record = bundle.manifest.components[component]
        _write_component(bundle, root / component_model(component), component, record, chosen)
    _write_texts(root, form)


def _files_of_host(bundle: Bundle, form: Form) -> Iterator[str]:
    """What of the bundle the model `flux` reads: all, or what the components' models do not."""
    yield MANIFEST_NAME
    owners = [*bundle.manifest.tokenizers.values()]
    held = {record.path for owner in owners for record in owner.files}
    if form == "pipeline":
        held |= {record.path for _, record in bundle.manifest.files()}
    yield from sorted(held)


def _write_component(
    bundle: Bundle, folder: Path, component: str, record: ComponentRecord, engines: TritonEngines
) -> None:
    version = folder / VERSION
    if engines.backend == "tensorrt":
        for engine in engines.records:
            link_or_copy(bundle.path(engine.path), version / plan_name(engine))
    else:
        # A folder, as Triton takes graphs with external data: weights stay where the graph, which
        # names them relative to itself, looks for them.
        graph = PurePosixPath(engines.records[0].path)
        weights = [file.path for file in record.files if _is_below(file.path, graph.parent)]
        for path in weights:
            place = PurePosixPath(path).relative_to(graph.parent)
            name = "model.onnx" if PurePosixPath(path) == graph else place
            if PurePosixPath(path).suffix != ".onnx" or name == "model.onnx":
                link_or_copy(bundle.path(path), version / "model.onnx" / name)
    write_atomic(folder / "config.pbtxt", component_config(component, record, engines))


def _is_below(path: str, folder: PurePosixPath) -> bool:
    return PurePosixPath(path).is_relative_to(folder)


def _write_texts(root: Path, form: Form) -> None:
    """What goes with the models: how to run them, and a client."""
    own = importlib.metadata.version("fluxdeploy")
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in _BASE]
    write_atomic(root / "requirements.txt", "\n".join([f"fluxdeploy=={own}", _NUMPY, *pins]) + "\n")
    for name in ("client.py", "run.sh"):
        write_atomic(root / name, (_FILES / name).read_text(encoding="utf-8"))
    page = Template((_FILES / "README.md").read_text(encoding="utf-8"))
    tables = {"inputs": _table(INPUTS), "outputs": _table(OUTPUTS)}
    write_atomic(root / "README.md", page.substitute(form=form, model=MODEL, **tables))
    (root / "run.sh").chmod(0o755)


def _table(fields: tuple[Field, ...]) -> str:
    rows = [
        f"| `{each.name}` | {each.dtype} | [{', '.join(map(str, each.dims))}] | {each.meaning} |"
        for each in fields
    ]
    return "\n".join(["| name | type | shape | what |", "| --- | --- | --- | --- |", *rows])
