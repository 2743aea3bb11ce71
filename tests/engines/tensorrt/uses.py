"""What the adapter uses of TensorRT and of CUDA's runtime, as its source says it.

The objects of the libraries reach the adapter as `Any`. `_ENTERS` says what each of those is, and
from there the types follow from the signatures of the bindings: the type of `network.get_input(0)`
is what `INetworkDefinition.get_input` returns.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Use", "cuda_uses", "uses", "uses_of"]

_ENGINES = Path(__file__).parents[3] / "engines"

_ENTERS = {
    "trt": "module",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "tensor": "ITensor",
    "makers": "dict[ILayer]",
    "severity": "ILogger.Severity",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "where": "SeekPosition",
    "_configure": "IBuilderConfig",
    "_make_monitor": "IProgressMonitor",
    "_make_logger": "ILogger",
    "_make_reader": "IStreamReaderV2",
    "_import": "module",
}
"""The types of what the adapter annotates with `Any`: parameters, variables, results."""

_PLAIN = {"str", "int", "bool", "bytes", "None", "object", "tuple", "list", "buffer", "capsule"}
_PROTOCOLS = {"int": "__int__", "bytes": "buffer", "memoryview": "buffer", "tuple": "__getitem__"}
"""What a call of a built-in asks of an object."""


@dataclass(frozen=True)
class Use:
    """One use of a library's name, as in `IBuilderConfig.set_flag`, and how it is used.

    how: `read`, `written`, `called` or `overridden`. arguments: the library's types of what is
    given by place, None where it is no object of the library. keywords: the names of the rest.
    """

    name: str
    where: str
    how: str = "read"
    arguments: tuple[str | None, ...] = ()
    keywords: tuple[str, ...] = ()


def uses(surface: Mapping[str, str]) -> list[Use]:
    """All uses in the adapter. `surface` has what the bindings say of each name (`surface.py`)."""
    return [use for file, source in _sources() for use in uses_of(file, source, surface)]


@cache
def _sources() -> list[tuple[str, str]]:
    paths = sorted((_ENGINES / "tensorrt").glob("*.py"))
    return [(path.name, path.read_text(encoding="utf-8")) for path in paths]


def uses_of(file: str, source: str, surface: Mapping[str, str]) -> list[Use]:
    """The uses in one source, in its order, each once. Raises `KeyError` for an unknown `Any`."""
    walker = _Walker(file, surface)
    walker.visit(_parsed(source))
    return list(dict.fromkeys(walker.found))


@cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def cuda_uses() -> list[Use]:
    """All uses of `cuda.bindings.runtime` in `engines/cuda.py`: `_call`s, enums, constants."""
    tree = ast.parse((_ENGINES / "cuda.py").read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return [use for function in functions for use in _cuda_uses_in(function)]


def _cuda_uses_in(function: ast.FunctionDef) -> Iterator[Use]:
    nodes = list(ast.walk(function))
    short = {
        ast.unparse(node.targets[0]): ast.unparse(node.value).removeprefix("self._runtime.")
        for node in nodes
        if isinstance(node, ast.Assign)
        and ast.unparse(node.value).startswith("self._runtime.")
        and isinstance(node.value, ast.Attribute)
    }
    for node in nodes:
        where = f"cuda.py:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self._call":
            name = ast.literal_eval(node.args[0])
            yield Use(name, where, "called", (None,) * (len(node.args) - 1))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("self._runtime."):
            name = ast.unparse(node.func).removeprefix("self._runtime.")
            yield Use(name, where, "called", (None,) * len(node.args))
        elif isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            if head in short:
                yield Use(f"{short[head]}.{rest}", where)
            elif rest.startswith("_runtime."):
                yield Use(rest.removeprefix("_runtime."), where)


class _Walker(ast.NodeVisitor):
    """Walks one module. Visiting an expression gives its type, None where it is not the library's.

    Types are written as `IBuilderConfig` for an object, `class:X` for a class, `local:X` for a
    class of the adapter's over X, `method:X.y` and `unbound:X.y`, `list[X]` and `dict[X]`.
    """

    def __init__(self, file: str, surface: Mapping[str, str]) -> None:
        self.found: list[Use] = []
        self._file, self._surface = file, surface
        self._names: dict[str, str | None] = {}
        self._fields: dict[str, str] = {}

    @contextmanager
    def _scope(self) -> Iterator[None]:
        outer, self._names = self._names, dict(self._names)
        yield
        self._names = outer

    def _note(
        self, node: ast.AST, name: str, how: str = "read", call: ast.Call | None = None
    ) -> None:
        arguments = tuple(self.visit(a) for a in call.args) if call else ()
        keywords = tuple(k.arg or "**" for k in call.keywords) if call else ()
        where = f"{self._file}:{getattr(node, 'lineno', 0)}"
        self.found.append(Use(name, where, how, arguments, keywords))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        with self._scope():
            for argument in (*node.args.args, *node.args.kwonlyargs):
                annotation = argument.annotation
                entering = annotation is not None and ast.unparse(annotation) == "Any"
                self._names[argument.arg] = self._enters(argument.arg) if entering else None
            for statement in node.body:
                self.visit(statement)
        if node.returns is not None and ast.unparse(node.returns) == "Any":
            self._enters(node.name)

    def _enters(self, name: str) -> str:
        if name not in _ENTERS:
            raise KeyError(f"{self._file}: {name} is Any: say in _ENTERS of uses.py what it is")
        return _ENTERS[name]

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        base = next((t for t in map(self.visit, node.bases) if t and t.startswith("class:")), None)
        if base is not None:
            owner = base.removeprefix("class:")
            self._names[node.name] = f"local:{owner}"
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    given = (None,) * (len(method.args.args) - 1)
                    where = f"{self._file}:{method.lineno}"
                    self.found.append(Use(f"{owner}.{method.name}", where, "overridden", given))
        for statement in node.body:
            self.visit(statement)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for one, value in zip(target.elts, node.value.elts, strict=True):
                    self._bind(one, self.visit(value))
            else:
                self._bind(target, self.visit(node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if isinstance(node.target, ast.Name) and "Any" in ast.unparse(node.annotation):
            self._names[node.target.id] = self._enters(node.target.id)
        elif node.value is not None:
            self._bind(node.target, self.visit(node.value))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> str | None:
        kind: str | None = self.visit(node.value)
        self._bind(node.target, kind)
        return kind

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, _inner(self.visit(node.iter)))
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.name:
            self._names[node.name] = None
        for statement in node.body:
            self.visit(statement)

    def _bind(self, target: ast.expr, kind: str | None) -> None:
        if isinstance(target, ast.Name):
            self._names[target.id] = kind
        elif isinstance(target, ast.Tuple):
            for one in target.elts:
                self._bind(one, _inner(kind))
        elif isinstance(target, ast.Attribute):
            owner = self.visit(target.value)
            if owner is not None:
                self._note(target, f"{owner}.{target.attr}", "written")
            elif kind is not None:
                self._fields[target.attr] = kind
        else:
            self.visit(target)

    def visit_Name(self, node: ast.Name) -> str | None:
        return self._names.get(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> str | None:
        owner = self.visit(node.value)
        if owner is None:
            on_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            return self._fields.get(node.attr) if on_self else None
        return self._member(node, owner, node.attr)

    def _member(self, node: ast.AST, owner: str, attribute: str) -> str | None:
        if ":" in owner and not owner.startswith("class:"):
            return None
        name = attribute if owner == "module" else f"{owner.removeprefix('class:')}.{attribute}"
        if owner == "module" and attribute.startswith("__"):
            return None
        self._note(node, name)
        fact = self._surface.get(name, "")
        if fact == "class":
            return f"class:{name}"
        if fact.startswith("member of "):
            return fact.removeprefix("member of ")
        if fact.startswith("property: "):
            return _known(fact.removeprefix("property: ").removesuffix(", writable"))
        if fact.startswith("("):
            return f"{'unbound' if owner.startswith('class:') else 'method'}:{name}"
        return None

    def visit_Call(self, node: ast.Call) -> str | None:
        called = node.func.id if isinstance(node.func, ast.Name) else ""
        first = self.visit(node.args[0]) if node.args else None
        if called in ("hasattr", "getattr") and first is not None:
            return self._looked_up(node, called, first)
        if called in _PROTOCOLS and first is not None:
            self._note(node, f"{first}.{_PROTOCOLS[called]}")
            return None
        if (made := self._entering_call(node)) is not None:
            return made
        function = self.visit(node.func)
        if function is None:
            for value in (*node.args, *(k.value for k in node.keywords)):
                self.visit(value)
            return None
        kind, _, name = function.partition(":")
        if kind == "local":
            return name
        if kind == "class":
            self._note(node, f"{name}.__init__", "called", node)
            return name
        if kind == "unbound":  # the object itself is the first argument
            node = ast.copy_location(ast.Call(node.func, node.args[1:], node.keywords), node)
        self._note(node, name, "called", node)
        return _known(self._surface[name].rpartition(" -> ")[2])

    def _looked_up(self, node: ast.Call, called: str, owner: str) -> str | None:
        name = node.args[1]
        if called == "getattr" and not isinstance(name, ast.Constant):
            return owner.removeprefix("class:")  # any member of an enumeration
        if called == "getattr" and isinstance(name, ast.Constant):
            return self._member(node, owner, str(name.value))
        return None

    def _entering_call(self, node: ast.Call) -> str | None:
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr == "get":
            owner = self.visit(function.value)
            if owner is not None and owner.startswith("dict["):
                for value in node.args:
                    self.visit(value)
                return _inner(owner)
        name = function.attr if isinstance(function, ast.Attribute) else ""
        name = function.id if isinstance(function, ast.Name) else name
        if not name.startswith("_") or name not in _ENTERS:
            return None
        for value in node.args:
            self.visit(value)
        return _ENTERS[name]

    def visit_List(self, node: ast.List) -> str | None:
        kinds = [kind for value in node.elts if (kind := self.visit(value)) is not None]
        return f"list[{kinds[0]}]" if kinds else None

    def visit_ListComp(self, node: ast.ListComp) -> str | None:
        with self._scope():
            self._generators(node.generators)
            kind = self.visit(node.elt)
        return None if kind is None else f"list[{kind}]"

    def visit_SetComp(self, node: ast.SetComp) -> None:
        with self._scope():
            self._generators(node.generators)
            self.visit(node.elt)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        with self._scope():
            self._generators(node.generators)
            self.visit(node.elt)

    def visit_DictComp(self, node: ast.DictComp) -> None:
        with self._scope():
            self._generators(node.generators)
            self.visit(node.key)
            self.visit(node.value)

    def _generators(self, generators: list[ast.comprehension]) -> None:
        for generator in generators:
            self._bind(generator.target, _inner(self.visit(generator.iter)))
            for condition in generator.ifs:
                self.visit(condition)


def _inner(kind: str | None) -> str | None:
    """The type of what is in a list or a dictionary."""
    if kind is None or "[" not in kind:
        return None
    return _known(kind.partition("[")[2].removesuffix("]"))


def _known(kind: str) -> str | None:
    return None if kind.partition("[")[0] in _PLAIN - {"list"} or kind == "list" else kind
