"""What the bindings of TensorRT and CUDA have, of all that the adapter uses: names and signatures.

    python -m tests.engines.tensorrt.surface FOLDER

writes `surface.json` anew from the wheels of bindings in a folder, as `pip download --no-deps`
leaves them. The bindings are imported for it, over stand-ins for TensorRT's libraries and for the
driver, which a C compiler makes; no GPU is needed. Nothing of the wheels is kept but names,
signatures, and how the bindings call back.
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.engines.tensorrt.uses import Use, cuda_uses, uses

__all__ = ["Surface", "callbacks", "describe_cuda", "problem", "recorded"]

_RECORDED = Path(__file__).with_name("surface.json")
_SECTIONS = ("names", "callbacks")

_STAND_INS = (
    *(
        f"lib{name}.so.{n}"
        for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin")
        for n in (10, 11)
    ),
    "libtensorrt_rtx.so.1",
    "libtensorrt_onnxparser_rtx.so.1",
    "libcuda.so.1",
)
_FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
_SOURCE = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in _FUNCTIONS) + (
    # The driver's: the memory is unknown to it, and so the host's.
    "int cuPointerGetAttribute(void) { return 1; }\nint cuMemcpyHtoD_v2(void) { return 1; }\n"
)


class Surface(Mapping[str, str]):
    """What an imported module of bindings says of a name, in one line.

    `class`, `member of X`, `property: X` (`, writable`), `buffer`, or a signature for each
    overload, with ` | ` between them.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self.version = str(module.__version__)

    def __getitem__(self, name: str) -> str:
        *path, last = name.split(".")
        owner = self._module
        try:
            for part in path:
                owner = getattr(owner, part)
            if last == "buffer":
                return _buffer(owner)
            found = getattr(owner, last)
        except AttributeError:
            raise KeyError(name) from None
        if isinstance(found, property):
            kind = _signatures(found.fget)[0].rpartition(" -> ")[2]
            return f"property: {kind}" + (", writable" if found.fset else "")
        if isinstance(found, type):
            return "class"
        if hasattr(type(found), "__members__"):
            return f"member of {type(found).__qualname__}"
        return " | ".join(_signatures(found))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({use.name for use in uses(self)}))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _buffer(owner: type) -> str:
    # `tp_as_buffer` of a type is its 21st word.
    if not ctypes.c_void_p.from_address(id(owner) + 20 * ctypes.sizeof(ctypes.c_void_p)).value:
        raise KeyError(f"{owner.__name__}.buffer")
    return "buffer"


def _signatures(function: Any) -> list[str]:
    text = inspect.getdoc(function) or ""
    name = getattr(function, "__name__", "")
    found = re.findall(rf"^(?:\d+\. )?{name}(\(.*\) -> .*)$", text, re.M)
    found += [] if found else re.findall(r"\A(\(.*\) -> .*)$", text, re.M)
    if not found:
        return [str(inspect.signature(function))]
    return [_plain(signature) for signature in found]


def _plain(signature: str) -> str:
    for pattern, plain in (
        (r"\btensorrt\w*_bindings\.tensorrt\w*\.", ""),
        (r"nvonnxparser::IParserError", "ParserError"),
        (r"\b(typing\.)?SupportsInt\b( \| typing\.SupportsIndex)?", "int"),
        (r"\btyping_extensions\.Buffer\b", "buffer"),
        (r"\btyping_extensions\.CapsuleType\b", "capsule"),
        (r"\bList\[", "list["),
        (r"<[\w.]+: \d+>", "..."),
        (r"\b(self|arg0): \w+", r"\1"),
    ):
        signature = re.sub(pattern, plain, signature)
    return signature


def callbacks(trt: Any) -> dict[str, str]:
    """How the bindings call what the adapter overrides: with how many arguments.

    A reader is also asked again where it gave less than was wanted: `in pieces`.
    """
    log, monitor, reader = trt.ILogger, trt.IProgressMonitor, trt.IStreamReaderV2
    heard: dict[str, str] = {}

    def derived(base: Any, **answers: Any) -> Any:
        def method(name: str, answer: Any) -> Callable[..., Any]:
            def called(self: object, *arguments: Any) -> Any:
                heard[f"{base.__name__}.{name}"] = f"{len(arguments)} arguments"
                return answer

            return called

        members = {name: method(name, answer) for name, answer in answers.items()}
        return type("Derived", (base,), members)()

    log.log(derived(log, log=None), trt.ILogger.ERROR, "text")
    watching = derived(monitor, phase_start=None, step_complete=True, phase_finish=None)
    monitor.phase_start(watching, "phase", "parent", 3)
    monitor.step_complete(watching, "phase", 1)
    monitor.phase_finish(watching, "phase")
    try:
        reading = derived(reader, read=b"ab", seek=True)
    except RuntimeError:  # there is no driver
        return heard
    memory = ctypes.create_string_buffer(5)
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p] * 3
    reader.read(reading, capsule(ctypes.addressof(memory), None, None), 5, 0)
    reader.seek(reading, 1, trt.SeekPosition.CUR)
    if memory.raw == b"ababa":
        heard["IStreamReaderV2.read"] += ", in pieces"
    return heard


def describe_cuda(runtime: Any) -> dict[str, str]:
    """What `cuda.bindings.runtime` says of the names that the adapter uses."""
    facts = {}
    for use in cuda_uses():
        found = runtime
        for part in use.name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            facts[use.name] = (
                str(inspect.signature(found)).replace("'", "")
                if inspect.isroutine(found)
                else "value"
            )
    return facts


def problem(use: Use, surface: Mapping[str, str], called_back: Mapping[str, str]) -> str | None:
    """What is wrong with a use, going by what the bindings say; None where nothing is."""
    fact = surface.get(use.name)
    if fact is None:
        return f"{use.where}: {use.name} is not there"
    if use.how == "written" and not fact.endswith(", writable"):
        return f"{use.where}: {use.name} cannot be written: {fact}"
    if use.how == "called" and not any(_takes(s, use) for s in fact.split(" | ")):
        return f"{use.where}: {use.name} is given {use.arguments} {use.keywords}: {fact}"
    if use.how == "overridden":
        given = called_back.get(use.name, "nothing")
        if not given.startswith(f"{len(use.arguments)} arguments"):
            return f"{use.where}: {use.name} is called back with {given}"
    return None


def _takes(signature: str, use: Use) -> bool:
    """Whether an overload takes the arguments of a call."""
    function = ast.parse(f"def f{signature}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    every = [*function.args.posonlyargs, *function.args.args]
    optional = {p.arg for p in every[len(every) - len(function.args.defaults) :]}
    parameters = [p for p in every if p.arg != "self"]
    placed, rest = parameters[: len(use.arguments)], parameters[len(use.arguments) :]
    if len(use.arguments) > len(parameters) or not {*use.keywords} <= {p.arg for p in rest}:
        return False
    return all(p.arg in optional or p.arg in use.keywords for p in rest) and all(
        kind is None or p.annotation is None or ast.unparse(p.annotation) == kind
        for p, kind in zip(placed, use.arguments, strict=True)
    )


def recorded() -> dict[str, dict[str, dict[str, str]]]:
    """By version and by section, `names` and `callbacks`: what each name is there."""
    text = json.loads(_RECORDED.read_text(encoding="utf-8"))
    return {
        version: {
            section: {
                name: fact
                for name, facts in text[section].items()
                for fact, versions in facts.items()
                if index in versions
            }
            for section in _SECTIONS
        }
        for index, version in enumerate(text["versions"])
    }


def _record(folder: Path) -> None:
    versions = []
    sections: dict[str, dict[str, dict[str, list[int]]]] = {section: {} for section in _SECTIONS}
    for index, wheel in enumerate(sorted(folder.glob("*.whl"), key=_version)):
        module, numbers = _version(wheel)
        versions.append(f"{module.removesuffix('_bindings')} {'.'.join(map(str, numbers))}")
        for section, facts in _look_into(wheel, module).items():
            for name, fact in facts.items():
                sections[section].setdefault(name, {}).setdefault(fact, []).append(index)
    lines = [f' "versions": {json.dumps(versions)}']
    for section, entries in sections.items():
        inner = ",\n".join(f'  "{n}": {json.dumps(entries[n])}' for n in sorted(entries))
        lines.append(f' "{section}": {{\n{inner}\n }}')
    _RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _version(wheel: Path) -> tuple[str, list[int]]:
    package, version = wheel.name.split("-")[:2]
    return re.sub(r"_cu\d+", "", package), [int(n) for n in version.split(".") if n.isdigit()]


def _look_into(wheel: Path, module: str) -> dict[str, dict[str, str]]:
    """Describe a wheel in a process of its own: two versions of a library do not go together."""
    with tempfile.TemporaryDirectory() as place:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(place)
        source = Path(place, "stand_in.c")
        source.write_text(_SOURCE, encoding="utf-8")
        for name in _STAND_INS:
            made = ["cc", "-shared", "-fPIC", "-o", str(Path(place, name)), str(source)]
            subprocess.run(made, check=True)
        environment = os.environ | {
            "LD_LIBRARY_PATH": place,
            "PYTHONPATH": os.pathsep.join((place, str(Path(__file__).parents[3]))),
        }
        command = [sys.executable, "-m", "tests.engines.tensorrt.surface", "--describe", module]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        found: dict[str, dict[str, str]] = json.loads(done.stdout)
        return found


def _describe(module: str) -> dict[str, dict[str, str]]:
    if module == "cuda_bindings":
        return {"names": describe_cuda(importlib.import_module("cuda.bindings.runtime"))}
    trt = importlib.import_module(module)
    surface = Surface(trt)
    return {
        "names": {name: surface[name] for name in surface if name in surface},
        "callbacks": callbacks(trt),
    }


if __name__ == "__main__":
    if sys.argv[1] == "--describe":
        print(json.dumps(_describe(sys.argv[2])))
    else:
        _record(Path(sys.argv[1]))
