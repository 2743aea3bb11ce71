"""The native runtime's kernels and attention over PyTorch's tensors, for `gpu_kernels_worker.py`.

    python benchmarks/native_kernels.py FOLDER

compiles all of them into FOLDER, on a machine that need not have a GPU; where CUBINS names that
folder, nothing is compiled again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from engines.cuda import Argument, Cuda, TensorMap
from engines.native.attention import SCALAR_BYTES, Cudnn, scalars
from engines.native.compiler import compile_spec
from engines.native.launches import partials_bytes
from engines.native.plan import BYTES, Attention, Kind, Place, typed
from engines.native.specs import (
    PARAMETERS,
    Kernel,
    KernelSpec,
    TensorBox,
    linear_spec,
    norm_spec,
    rope_spec,
)
from engines.native.tiles import Tile
from engines.native.works import Launchable

__all__ = [
    "SPECIALIZED",
    "TILES",
    "Turn",
    "attention",
    "device",
    "linear",
    "norm",
    "rope",
    "specs",
    "step_of",
    "tiles",
]

Run = Callable[[], None]

TILES = (
    Tile(128, 256, 8, 4),
    Tile(128, 256, 8, 3),
    Tile(128, 256, 8, 3, flatten=True),
    Tile(128, 128, 4, 3, programs=2),
    Tile(128, 128, 4, 4, flatten=True),
    Tile(64, 256, 4, 2, programs=2),
    Tile(64, 256, 4, 4, flatten=True),
)

SPECIALIZED = (
    Tile(128, 128, 4, 6, form="pingpong"),
    Tile(128, 256, 4, 4, form="shared"),
)
"""Of the linear whose warps have different work."""

KINDS: Mapping[torch.dtype, Kind] = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8",
}

_cuda: list[Cuda] = []


def device() -> Cuda:
    """CUDA, on the device that PyTorch uses."""
    if not _cuda:
        _cuda.append(Cuda())
    return _cuda[0]


def _compiled(spec: KernelSpec) -> tuple[Kernel, bytes]:
    """A kernel and its cubin, from the folder where it is there."""
    named = os.environ.get("CUBINS")
    if not named:
        return compile_spec(spec)
    folder = Path(named)
    facts, cubin = folder / f"{spec.name}.json", folder / f"{spec.name}.cubin"
    if not cubin.exists():
        kernel, code = compile_spec(spec)
        cubin.write_bytes(code)
        facts.write_text(json.dumps(asdict(kernel)), encoding="utf-8")
    return typed(
        Kernel, json.loads(facts.read_text(encoding="utf-8")), "kernel"
    ), cubin.read_bytes()


def _launcher(
    compiled: tuple[Kernel, bytes],
    grid: tuple[int, int],
    given: Mapping[str, Argument],
    kept: Sequence[Tensor] = (),
) -> Run:
    """`kept` are tensors that nobody else keeps."""
    kernel, cubin = compiled
    cuda = device()
    function = cuda.function(cuda.load_module(cubin), kernel.entry, kernel.shared)
    # With what they point to.
    arguments = cuda.arguments([given[name] for name in PARAMETERS[kernel.function]]), kept

    def run() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        cuda.launch(function, grid, kernel.threads, kernel.shared, arguments[0], stream)

    return run


def _pointer(x: Tensor) -> Argument:
    return "pointer", x.data_ptr()


def _map(x: Tensor, box: TensorBox) -> TensorMap:
    size = x.element_size()
    rows, columns = x.shape
    sizes = (box.rows, box.columns)
    return TensorMap(x.data_ptr(), rows, columns, x.stride(0) * size, size, sizes, box.swizzle)


def _linear_spec(
    kind: Kind, columns: int, inner: int, epilogue: str, split: int, turned: Kind | None, tile: Tile
) -> KernelSpec:
    """As the plan's steps have them: text and image have weights of their own in double blocks.

    `turned` is the type of Q, K and V, which the linear also norms and turns; None where it does
    not.
    """
    grouped = not (split or inner > columns * 4)
    out: Kind = turned or (kind if epilogue == "gelu" else "bf16")
    second = kind if split else out
    places = columns if turned and not split else split
    scaled = kind == "fp8"
    return linear_spec(
        kind,
        out,
        second,
        columns,
        inner,
        epilogue,
        places,
        grouped,
        scaled,
        turned is not None,
        tile,
    )


@dataclass(frozen=True)
class Turn:
    """What norms and RoPE take: norms [4,head_dim], and tables [T,head_dim]; all float32."""

    norms: Tensor
    cos: Tensor
    sin: Tensor

    @property
    def given(self) -> dict[str, Argument]:
        factors = dict.fromkeys(("factor_q", "factor_k", "factor_v"), ("fp32", 1.0))
        return {name: _pointer(getattr(self, name)) for name in ("norms", "cos", "sin")} | factors


def linear(
    x: Tensor,
    weight: Tensor,
    vectors: tuple[Tensor, Tensor, Tensor],
    outs: tuple[Tensor, Tensor],
    epilogue: str,
    turn: Turn | None,
    text: int,
    tile: Tile,
) -> Run:
    """y = x Wᵀ · scale + bias with an epilogue, for tensors that stay where they are.

    x [T,K] and weight [groups N,K] in bfloat16 or E4M3; scale and bias float32 [groups N], gate
    [N]. `outs` are `out` and `second` of `engines.native.plan.Linear`; the first `text` rows take
    the first group. With `turn` the columns of `out` are Q, K and V, which get norms and RoPE.
    """
    (rows, inner), (out, second) = x.shape, outs
    split = out.shape[1] if epilogue == "split" else 0
    columns = out.shape[1] + (second.shape[1] if split else 0)
    turned = None if turn is None else KINDS[out.dtype]
    spec = _linear_spec(KINDS[x.dtype], columns, inner, epilogue, split, turned, tile)
    compiled = _compiled(spec)
    boxes = compiled[0].boxes
    scale, bias, gate = vectors
    given: dict[str, Argument] = {
        "x": _map(x, boxes[0]),
        "weight": _map(weight, boxes[1]),
        "out": _map(out, boxes[2]),
        "second": _map(second, boxes[3]),
        "scale": _pointer(scale),
        "bias": _pointer(bias),
        "gate": _pointer(gate),
        "rows": ("i32", rows),
        "text_tokens": ("i32", text),
        "gate_text": ("i32", 0),
        "gate_image": ("i32", 0),
        "inverse_text": ("fp32", 1.0),
        "inverse_image": ("fp32", 1.0),
        **(Turn(bias, bias, bias) if turn is None else turn).given,
    }
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    programs = multiprocessors * tile.programs
    kept: list[Tensor] = []
    if tile.form is None:
        programs = min(programs, -(-rows // tile.rows) * -(-columns // tile.columns))
    else:
        kept += (
            torch.zeros(size, dtype=torch.uint8, device="cuda")
            for size in partials_bytes([Launchable((), (compiled[0],))], multiprocessors)
        )
        given |= {"partials": _pointer(kept[0]), "marks": _pointer(kept[1])}
    return _launcher(compiled, (programs, 1), given, kept)


def norm(x: Tensor, out: Tensor, modulation: Tensor, text: int) -> Run:
    """LayerNorm of x [T,D]; rows 0 and 1 of the modulation are text's shift and gain, then 2, 3."""
    given: dict[str, Argument] = {
        "x": _pointer(x),
        "out": _pointer(out),
        "modulation": _pointer(modulation),
        "text_tokens": ("i32", text),
        "shift_text": ("i32", 0),
        "gain_text": ("i32", 1),
        "shift_image": ("i32", 2),
        "gain_image": ("i32", 3),
        "inverse_text": ("fp32", 1.0),
        "inverse_image": ("fp32", 1.0),
    }
    spec = norm_spec(KINDS[out.dtype], x.shape[1], out.shape[1])
    return _launcher(_compiled(spec), (len(x), 1), given)


def rope(joint: Tensor, out: Tensor, turn: Turn, text: int) -> Run:
    """RMSNorm and RoPE of Q and K in [T,3,heads,head_dim]."""
    tokens, _, heads, head_dim = joint.shape
    given: dict[str, Argument] = {
        "x": _pointer(joint),
        "out": _pointer(out),
        "text_tokens": ("i32", text),
        **turn.given,
    }
    spec = rope_spec(KINDS[out.dtype], heads * head_dim, head_dim)
    return _launcher(_compiled(spec), (tokens, 2 if out is joint else 3), given)


def attention(q: Tensor, out: Tensor, step: Attention) -> Run:
    """Attention of [T,3,heads,head_dim], whose Q has its scale, to out [T,heads,head_dim]."""
    tokens, _, heads, head_dim = q.shape
    kind = KINDS[q.dtype]
    cudnn = Cudnn(torch.cuda.current_stream().cuda_stream)
    strides = {"x": q.stride(0), "out": out.stride(0)}
    prepared = cudnn.prepare(kind, tokens, heads, head_dim, strides)
    workspace = torch.empty(max(1, prepared.workspace), device="cuda", dtype=torch.uint8)
    numbers = torch.from_numpy(scalars(step)).cuda()
    assert numbers.nbytes == SCALAR_BYTES
    start, row = q.data_ptr(), heads * head_dim * BYTES[kind]
    kept = (q, out, workspace, numbers, cudnn)  # cuDNN knows only where they are

    def run() -> None:
        addresses = [start + row * part for part in range(3)]
        prepared.launch(addresses, kept[1].data_ptr(), numbers.data_ptr(), workspace.data_ptr())

    return run


def step_of(q: float, k: float, v: float, out: float) -> Attention:
    """The scales of an attention in 8 bits, with a softmax whose largest number is 1."""
    return Attention(Place("x"), Place("out"), (q, k, v), 1 / 448, out)


def specs() -> Iterator[KernelSpec]:
    """All that the stages of `gpu_kernels_worker.py` take."""
    from gpu_kernels_worker import HEAD_DIM, PRODUCTS, WIDTH

    for kind, (inner, columns, epilogue), specialized in product(
        ("fp8", "bf16"), PRODUCTS, (False, True)
    ):
        split = 3 * WIDTH if epilogue == "split" else 0
        for turned in (None, kind) if epilogue in ("plain", "split") else (None,):
            for tile in tiles(epilogue, turned is not None, specialized):
                yield _linear_spec(kind, columns, inner, epilogue, split, turned, tile)
    for kind in ("fp8", "bf16"):
        yield norm_spec(kind, WIDTH, WIDTH)
        yield rope_spec(kind, WIDTH, HEAD_DIM)


def tiles(epilogue: str, turned: bool, specialized: bool) -> list[Tile]:
    """Those that are tried for a linear of FLUX.1's, with norms and RoPE or without.

    Triton does not overlap the loads of tiles that may end in two ways.
    """

    def fits(tile: Tile) -> bool:
        if tile.form is None:
            return not turned and not (tile.flatten and epilogue == "split")
        head = tile.columns if tile.form == "pingpong" else tile.columns // 2
        return not turned or head == 128

    return [tile for tile in (SPECIALIZED if specialized else TILES) if fits(tile)]


def main(folder: str) -> None:
    """Compile what compiles; a tile that needs too much shared memory is no failure here."""
    from fluxdeploy.errors import EngineError

    Path(folder).mkdir(parents=True, exist_ok=True)
    os.environ["CUBINS"] = folder
    for spec in specs():
        try:
            _compiled(spec)
        except EngineError as error:
            print(str(error)[:200])


if __name__ == "__main__":
    main(*sys.argv[1:])
