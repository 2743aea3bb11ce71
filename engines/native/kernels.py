"""The kernels of the native runtime, in Triton: compiled to cubins where an engine is built.

Written for Hopper: operands of products and their results go through the tensor memory accelerator,
products in bfloat16 or E4M3 with float32 sums. Everything else computes in float32 and rounds where
it is written. Rows are tokens, text first; `text_tokens` is the first row that is not text.

PyTorch's and the interpreter's numbers differ from the hardware's where bfloat16 and E4M3 are
rounded: `tests/engines/native/test_kernels.py` says how these kernels are tried without a GPU.
"""

import triton
import triton.language as tl

__all__ = ["convert", "linear", "norm", "rope"]

EPSILON = tl.constexpr(1e-6)


@triton.jit
def convert(
    x, out, text_tokens, inverse_text, inverse_image,
    COLUMNS: tl.constexpr, X_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x · inverse, in the type of out: a program for each row."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    inverse = tl.where(row < text_tokens, inverse_text, inverse_image)
    value = tl.load(x + row * X_STRIDE + columns, mask=inside).to(tl.float32) * inverse
    tl.store(out + row * OUT_STRIDE + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm(
    x, out, modulation, text_tokens, shift_text, shift_image, gain_text, gain_image,
    inverse_text, inverse_image,
    WIDTH: tl.constexpr, OUT_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LayerNorm, then · (1 + gain) + shift: a program for each row."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    text = row < text_tokens
    shift_row = tl.where(text, shift_text, shift_image)
    gain_row = tl.where(text, gain_text, gain_image)
    value = tl.load(x + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(modulation + gain_row * WIDTH + columns, mask=inside, other=0.0)
    shift = tl.load(modulation + shift_row * WIDTH + columns, mask=inside, other=0.0)
    centred = tl.where(inside, value - tl.sum(value) / WIDTH, 0.0)
    spread = tl.rsqrt(tl.sum(centred * centred) / WIDTH + EPSILON)
    value = centred * spread * (1.0 + gain) + shift
    value *= tl.where(text, inverse_text, inverse_image)
    tl.store(out + row * OUT_STRIDE + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rope(
    x, out, norms, cos, sin, text_tokens, factor_q, factor_k, factor_v,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """RMSNorm and RoPE of Q (part 0) and K (1) of a row, each times its factor; V (2) is copied."""
    row, part = tl.program_id(0), tl.program_id(1)
    heads, channels = tl.arange(0, BLOCK_HEADS), tl.arange(0, HEAD_DIM)
    places = row * (3 * WIDTH) + part * WIDTH + heads[:, None] * HEAD_DIM + channels[None, :]
    inside = (heads * HEAD_DIM < WIDTH)[:, None]
    value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    if part < 2:
        which = tl.where(row < text_tokens, 0, 2) + part
        spread = tl.rsqrt(tl.sum(value * value, 1) / HEAD_DIM + EPSILON)
        value *= spread[:, None] * tl.load(norms + which * HEAD_DIM + channels)[None, :]
        # Both channels of a pair have the same angle.
        pairs = row * HEAD_DIM + 2 * tl.arange(0, HEAD_DIM // 2)
        c, s = tl.load(cos + pairs)[None, :], tl.load(sin + pairs)[None, :]
        a, b = tl.split(tl.reshape(value, (BLOCK_HEADS, HEAD_DIM // 2, 2)))
        turned = tl.join(a * c - b * s, b * c + a * s)
        value = tl.reshape(turned, (BLOCK_HEADS, HEAD_DIM))
    value *= tl.where(part == 0, factor_q, tl.where(part == 1, factor_k, factor_v))
    tl.store(out + places, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gelu(y, NARROW: tl.constexpr):
    """The tanh form. For 8 bits the hardware's tanh will do: it is off by 2⁻¹¹ at most."""
    if NARROW:
        u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * y * (1.0 + t)
    # 0.5 · (1 + tanh(u)) is sigmoid(2u).
    return y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))


@triton.jit
def _finish(
    y, out, second, scale, bias, gate, row, column, group, inverse, gate_row,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, EPILOGUE: tl.constexpr, SPLIT: tl.constexpr,
    SCALED: tl.constexpr, EVEN: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """What follows a product, of WIDTH columns of a tile."""
    columns = column + tl.arange(0, WIDTH)
    inside = (columns < COLUMNS) | EVEN
    places = group * COLUMNS + columns
    if SCALED:
        y *= tl.load(scale + places, mask=inside, other=0.0)[None, :]
    y += tl.load(bias + places, mask=inside, other=0.0)[None, :]
    if EPILOGUE == "gelu":
        out.store([row, column], (_gelu(y, NARROW) * inverse).to(out.dtype))
    elif EPILOGUE == "residual":
        share = tl.load(gate + gate_row * COLUMNS + columns, mask=inside, other=0.0)[None, :]
        out.store([row, column], (out.load([row, column]).to(tl.float32) + share * y).to(out.dtype))
    elif EPILOGUE == "split" and column >= SPLIT:
        second.store([row, column - SPLIT], (_gelu(y, NARROW) * inverse).to(second.dtype))
    else:
        out.store([row, column], y.to(out.dtype))


@triton.jit
def linear(
    x, weight, out, second, scale, bias, gate, rows, text_tokens, gate_text, gate_image,
    inverse_text, inverse_image,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, EPILOGUE: tl.constexpr, SPLIT: tl.constexpr, GROUPED: tl.constexpr,
    SCALED: tl.constexpr, FLATTEN: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ · scale + bias with an epilogue: a persistent program takes tiles in turns.

    With GROUPED the weights of text lie above those of the image, and no tile holds both. Tiles of
    one column of tiles follow each other: x stays in the cache, and weights are read once.
    """
    down = tl.cdiv(rows, TILE_ROWS)
    total_tiles = down * tl.cdiv(COLUMNS, TILE_COLUMNS)
    for tile in tl.range(tl.program_id(0), total_tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = tile % down * TILE_ROWS, tile // down * TILE_COLUMNS
        text = row < text_tokens
        group = 0
        if GROUPED:
            group = tl.where(text, 0, 1)
        total = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
        for k in range(tl.cdiv(INNER, DEPTH)):
            a = x.load([row, k * DEPTH])
            b = weight.load([group * COLUMNS + column, k * DEPTH])
            total = tl.dot(a, b.T, total)
        inverse = tl.where(text, inverse_text, inverse_image)
        gate_row = tl.where(text, gate_text, gate_image)
        # In two halves: a whole tile with its epilogue does not fit the registers.
        half: tl.constexpr = TILE_COLUMNS // 2
        even: tl.constexpr = COLUMNS % TILE_COLUMNS == 0
        left, right = tl.split(total.reshape(TILE_ROWS, 2, half).permute(0, 2, 1))
        _finish(
            left, out, second, scale, bias, gate, row, column, group, inverse, gate_row,
            COLUMNS, half, EPILOGUE, SPLIT, SCALED, even, NARROW,
        )  # fmt: skip
        _finish(
            right, out, second, scale, bias, gate, row, column + half, group, inverse, gate_row,
            COLUMNS, half, EPILOGUE, SPLIT, SCALED, even, NARROW,
        )  # fmt: skip
