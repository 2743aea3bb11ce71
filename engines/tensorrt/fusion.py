"""The fusion report: which kernels a TensorRT engine has, and in which types they compute.

TensorRT prints every kernel at build time, with the types that go in and out and the nodes of the
ONNX graph that it computes. Products are counted by node, not by kernel: q, k and v count as three
linears whether or not they were merged into one kernel. A node that several optimization profiles
have kernels for counts once, with the widest type.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from engines.base import EngineSource
from engines.tensorrt.formats import FORMATS
from fluxdeploy.errors import EngineError

__all__ = [
    "Expectation",
    "FusionReport",
    "Kernel",
    "Products",
    "check",
    "expect",
    "read_report",
    "unfused",
]

_TYPES = {
    "Float": "fp32",
    "Half": "fp16",
    "BFloat16": "bf16",
    "FP8": "fp8",
    "Int8": "int8",
    "FP4E2M1": "fp4",
    "Int4": "int4",
}
_WIDTHS = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "fp4": 0.5, "int4": 0.5}

_LAYER = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>.*)")
_TENSORS = re.compile(
    r"Inputs: \[(?P<inputs>.*?)\],(?: Constants: \[(?P<constants>.*?)\],)? "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_FACTOR = re.compile(r"\{ Name: \S*_(?:alpha|beta)_myl\d+, [^{}]*\}")
"""A product's constant factor, which is no operand."""
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_GENERATED = re.compile(r"__myl_(?P<before>\w*?)(?:Fc|Corr)")
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")

_WEIGHT_MARGIN = 1 << 16
_KERNEL_BYTES = 256 << 10
"""Bytes of an engine that one kernel's code takes at most; 50 to 60 KiB were seen."""
_MARGIN = 0.02
_NAMED = 4


@dataclass(frozen=True)
class Products:
    """The matrix products of a network, by the names of their ONNX nodes.

    `linears` multiply by a weight (convolutions are among them), `scores` are products of two
    activations, and `softmaxes` stand between two of those in an attention.
    """

    linears: frozenset[str]
    scores: frozenset[str]
    softmaxes: frozenset[str]


@dataclass(frozen=True)
class Kernel:
    """One kernel: its name, its kind, and the types of its inputs, constants and outputs."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class FusionReport:
    """What became of a graph's products.

    `linears` gives each linear's type: that of its operands (`fp8`, `bf16`, ...), with
    `fp8-weights` for products in 16 bits that read FP8 weights. `attentions` gives the type of
    each softmax(Q Kᵀ) V that is one kernel, by its softmax; `materialized` are the softmaxes that
    have kernels of their own, with their scores in memory. `widened` are quantized linears whose
    result is float32. `weight_bytes` is what the builder says of its weights, 0 where it does not.
    """

    kernels: tuple[Kernel, ...]
    linears: Mapping[str, str]
    attentions: Mapping[str, str]
    materialized: tuple[str, ...]
    widened: tuple[str, ...]
    weight_bytes: int
    engine_bytes: int

    @property
    def gemms(self) -> dict[str, int]:
        """The number of linears by type."""
        return dict(sorted(Counter(self.linears.values()).items()))

    @property
    def fused_attentions(self) -> dict[str, int]:
        """The number of attentions in one kernel, by type."""
        return dict(sorted(Counter(self.attentions.values()).items()))

    def as_json(self) -> str:
        """The report as JSON text, with the counts for readers that want no more."""
        counts = {"gemms": self.gemms, "fused_attentions": self.fused_attentions}
        return json.dumps(counts | asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> FusionReport:
        """The report that `as_json` wrote. Raises `EngineError` for anything else."""
        try:
            plain = json.loads(text)
            kernels = tuple(
                Kernel(k["name"], k["kind"], *(tuple(k[p]) for p in _PLACES))
                for k in plain["kernels"]
            )
            return FusionReport(
                kernels,
                dict(plain["linears"]),
                dict(plain["attentions"]),
                tuple(plain["materialized"]),
                tuple(plain["widened"]),
                int(plain["weight_bytes"]),
                int(plain["engine_bytes"]),
            )
        except (ArithmeticError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise EngineError(f"This is not a fusion report: {error!r}. Build again.") from error


_PLACES = ("inputs", "constants", "outputs")


@dataclass(frozen=True)
class Expectation:
    """What an engine was asked to be.

    `attentions` softmaxes must each be fused into one kernel in `attention_type`, and no other
    softmax may be there; `wide_attentions` of them in `compute` instead. None fuses in fp32, and
    with None any form will do. `gemms` are the exact
    numbers of linears by type; quantized types that it does not name must not occur. `compute` is
    the type of what is not quantized, and `weight_bytes` the size of all weights in the types that
    the graph has them in.
    """

    attentions: int
    attention_type: str | None
    gemms: Mapping[str, int]
    compute: str
    weight_bytes: int
    wide_attentions: int = 0


def expect(source: EngineSource) -> Expectation:
    """What an engine must be made of, going by its precision and its graph."""
    quantization = source.precision.quantization
    gemms: dict[str, int] = {}
    attention = source.compute
    if quantization is not None:
        linear, eight_bits = FORMATS[quantization.format]
        kind = linear if quantization.activations is not None else f"{linear}-weights"
        gemms = {kind: source.quantized}
        if source.weights_only:
            gemms[f"{linear}-weights"] = source.weights_only
        if quantization.attention:
            attention = eight_bits
    return Expectation(
        source.attentions,
        None if source.one_head else attention,
        gemms,
        source.compute,
        source.weight_bytes,
        source.wide_attentions,
    )


def read_report(lines: Iterable[str], products: Products, engine_bytes: int) -> FusionReport:
    """Read the builder's messages at detailed verbosity.

    Raises `EngineError` where a product of the network is in no kernel's description: then nothing
    can be said about the engine.
    """
    kernels: list[Kernel] = []
    homes: dict[str, list[Kernel]] = {}
    computed: dict[Kernel, set[str]] = {}
    weight_bytes = 0
    for line in lines:
        if found := _WEIGHTS.search(line):
            weight_bytes = int(found[1])
        read = _read_kernel(line)
        if read is None:
            continue
        kernel, nodes = read
        kernels.append(kernel)
        computed[kernel] = nodes
        for node in nodes:
            homes.setdefault(node, []).append(kernel)
    lost = sorted((products.linears | products.softmaxes) - homes.keys())
    if lost:
        raise EngineError(
            f"The builder does not tell which kernel computes {_named(lost)}, so that the engine's "
            "precision cannot be checked; another version of the runtime may."
        )
    linears: dict[str, str] = {}
    widened: list[str] = []
    for node in sorted(products.linears):
        made = [(_product_type(kernel), kernel) for kernel in _product_kernels(homes[node])]
        linears[node] = _stored_type(
            max((kind for kind, _ in made), key=_width),
            homes.get(f"{node}/weight/DequantizeLinear", []),
        )
        if any(kind in ("fp8", "int8", "fp4") and "fp32" in k.outputs for kind, k in made):
            widened.append(node)
    attentions: dict[str, str] = {}
    materialized: list[str] = []
    for node in sorted(products.softmaxes):
        # Two products of activations and the softmax between them, all in one kernel.
        if all(len(computed[kernel] & products.scores) >= 2 for kernel in homes[node]):
            attentions[node] = max((_attention_type(k) for k in homes[node]), key=_width)
        else:
            materialized.append(node)
    return FusionReport(
        tuple(kernels),
        linears,
        attentions,
        tuple(materialized),
        tuple(widened),
        weight_bytes,
        engine_bytes,
    )


def _read_kernel(line: str) -> tuple[Kernel, set[str]] | None:
    found = _LAYER.match(line)
    tensors = _TENSORS.match(found["rest"]) if found else None
    if found is None or tensors is None:
        return None
    types = (
        tuple(
            _TYPES.get(t, t.lower())
            for t in _DATATYPE.findall(_FACTOR.sub("", tensors[place] or ""))
        )
        for place in _PLACES
    )
    kernel = Kernel(found["name"], found["kind"], *types)
    return kernel, set(_NODE.findall(found["rest"]))


def _product_kernels(homes: list[Kernel]) -> list[Kernel]:
    """Of the kernels that take part in a linear, those that multiply.

    A generated kernel (kgen) scales the inputs or the result of a product, unless there is no
    other kernel.
    """
    return [kernel for kernel in homes if kernel.kind != "kgen"] or homes


def _product_type(kernel: Kernel) -> str:
    activation = _narrowest(kernel.inputs)
    weight = _narrowest(kernel.constants)
    if activation is None or weight is None:
        return activation or weight or "unknown"
    generated = _GENERATED.match(kernel.name)
    if generated is not None and "Cast" in generated["before"]:
        # What comes before the product is a conversion to the type that it computes in.
        types = {*kernel.inputs, *kernel.constants, *kernel.outputs}
        wide = min((t for t in types if _width(t) >= 2), key=_width, default=activation)
        return f"{weight}-weights" if _width(weight) < 2 else wide
    if _width(weight) < 2 <= _width(activation):
        return f"{weight}-weights"
    return max(activation, weight, key=_width)


def _stored_type(kind: str, dequantizers: Iterable[Kernel]) -> str:
    """The type of a product of 16 bits whose weights a kernel of its own widens before it."""
    stored = _narrowest([t for kernel in dequantizers for t in kernel.constants])
    if stored is None or _width(stored) >= 2 or _width(kind) < 2:
        return kind
    return f"{stored}-weights"


def _attention_type(kernel: Kernel) -> str:
    """The widest type of Q, K and V; a float32 input beside 16-bit ones is a bias."""
    narrow = [t for t in kernel.inputs if t != "fp32"]
    return max(narrow, key=_width) if narrow else "fp32"


def _narrowest(types: Sequence[str]) -> str | None:
    return min((t for t in types if t in _WIDTHS), key=_width, default=None)


def _width(kind: str) -> float:
    # Products with narrow weights alone come between 8 and 16 bits.
    return 1.5 if kind.endswith("-weights") else _WIDTHS.get(kind, 8.0)


def check(report: FusionReport, expectation: Expectation) -> list[str]:
    """What is wrong with an engine, a sentence each; an empty list where nothing is."""
    return [
        *_attention_problems(report, expectation),
        *_linear_problems(report, expectation),
        *_size_problems(report, expectation),
    ]


def unfused(report: FusionReport, expectation: Expectation) -> str | None:
    """What is slower than was hoped, though its numbers are those that were asked for."""
    # There is no fused attention in float32 to be had.
    if not report.materialized or expectation.attention_type in (None, "fp32"):
        return None
    return (
        f"{len(report.materialized)} attentions are not fused and write their scores to memory, "
        f"which takes longer: {_named(report.materialized)}"
    )


def _attention_problems(report: FusionReport, expectation: Expectation) -> list[str]:
    problems = []
    asked = expectation.attention_type
    others = [n for n, kind in report.attentions.items() if asked not in (None, kind)]
    spared = [n for n in others if report.attentions[n] == expectation.compute]
    if spared and len(spared) == expectation.wide_attentions:
        others = [n for n in others if n not in spared]
    if others:
        found = ", ".join(sorted({report.attentions[node] for node in others}))
        problems.append(
            f"{len(others)} attentions run in {found} where {expectation.attention_type} was "
            f"asked: {_named(others)}"
        )
    total = len(report.attentions) + len(report.materialized)
    if total != expectation.attentions:
        problems.append(f"the engine has {total} attentions, not {expectation.attentions}")
    return problems


def _linear_problems(report: FusionReport, expectation: Expectation) -> list[str]:
    problems: list[str] = []
    quantized = {kind for kind in report.gemms if _width(kind) < 2}
    for kind in sorted({*expectation.gemms, *quantized}, key=_width):
        if problems and _width(kind) >= 2:
            break  # what is missing among the narrow types is too many here
        wanted, found = expectation.gemms.get(kind, 0), report.gemms.get(kind, 0)
        if found < wanted:
            rest = [node for node, k in report.linears.items() if k != kind]
            types = ", ".join(sorted({report.linears[node] for node in rest})) or "nothing else"
            problems.append(
                f"{found} linears run in {kind} where {wanted} were asked; the others run in "
                f"{types}: {_named(rest)}"
            )
        elif found > wanted:
            those = [node for node, k in report.linears.items() if k == kind]
            problems.append(
                f"{found} linears run in {kind}, more than the {wanted} that were asked: "
                f"{_named(those)}"
            )
    if report.widened and expectation.compute != "fp32":
        problems.append(
            f"{len(report.widened)} quantized linears give float32 instead of "
            f"{expectation.compute}, as with scales in float32: {_named(report.widened)}"
        )
    return problems


def _size_problems(report: FusionReport, expectation: Expectation) -> list[str]:
    expected = expectation.weight_bytes * (1 + _MARGIN) + _WEIGHT_MARGIN
    if report.weight_bytes > expected:
        return [
            f"the engine holds {report.weight_bytes} bytes of weights where "
            f"{expectation.weight_bytes} were expected: some are stored in a wider type"
        ]
    limit = expected + _KERNEL_BYTES * len(report.kernels)
    if report.engine_bytes > limit:
        return [
            f"the engine has {report.engine_bytes} bytes, more than {limit:.0f} for "
            f"{expectation.weight_bytes} bytes of weights and {len(report.kernels)} kernels"
        ]
    return []


def _named(nodes: Iterable[str]) -> str:
    names = sorted(nodes)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
