"""A linear whose epilogue overlaps its products, in Gluon, Triton's language of layouts.

For Hopper only. One warp loads operands and runs ahead over the tiles of its program; groups of
four warps multiply, finish and store. What they pass to each other lies in shared memory:

    ring     STAGES pairs of operands. `full` of a stage: both have come. `empty`: all products that
             read them are done.
    order    of each of two groups that take tiles in turns: the other's operands have come.
    staged   pieces of 64 columns, from which the TMA stores.

FORM is one of

    pingpong  two groups take tiles in turns, so that one finishes while the other multiplies
    shared    two groups share each tile, half of its rows each; what overlaps is what one is behind

With a residual, `staged` is a whole tile of each group, and the residual is there first. `come` of
a group: its tile's residual is there; `gone`: its result has left.

Programs take tiles in turns. Where the last turn has tiles for half of them or fewer, each of these
tiles is shared out by its channels in: all but the last of PARTS programs leave their sums in
`partials`, and a mark for each thread in `marks`, where the same thread of the last one finds them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ["specialized"]

try:
    from triton.experimental.gluon import aggregate
except ImportError:  # Triton 3.7, where an aggregate has to say how it is made
    from triton.language.core import _aggregate

    def aggregate(cls: type) -> type:
        def make(self: object, *values: object) -> None:
            for name, value in zip(cls.__annotations__, values, strict=True):
                setattr(self, name, value)

        make.__triton_builtin__ = True  # type: ignore[attr-defined]
        cls.__init__ = make  # type: ignore[misc]
        return _aggregate(cls)  # type: ignore[no-any-return]


if hasattr(tma, "async_load"):
    _load, _send = tma.async_load, tma.async_store
    _reinterpret = gl.shared_memory_descriptor.reinterpret
else:  # their names in Triton 3.7
    _load, _send = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
    _reinterpret = gl.shared_memory_descriptor._reinterpret

PIECE = gl.constexpr(64)
GROUPS = gl.constexpr(2)
HEAD = gl.constexpr(128)
EPSILON = gl.constexpr(1e-6)


@aggregate
class Task:
    """What all warps know."""

    x: tma.tensor_descriptor
    weight: tma.tensor_descriptor
    out: tma.tensor_descriptor
    second: tma.tensor_descriptor
    scale: gl.tensor
    bias: gl.tensor
    gate: gl.tensor
    norms: gl.tensor
    cos: gl.tensor
    sin: gl.tensor
    rows: gl.tensor
    text_tokens: gl.tensor
    gate_text: gl.tensor
    gate_image: gl.tensor
    inverse_text: gl.tensor
    inverse_image: gl.tensor
    factor_q: gl.tensor
    factor_k: gl.tensor
    factor_v: gl.tensor
    partials: gl.tensor
    marks: gl.tensor
    whole: gl.tensor
    left: gl.tensor
    parts: gl.tensor
    a: gl.shared_memory_descriptor
    b: gl.shared_memory_descriptor
    staged: gl.shared_memory_descriptor
    vectors: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    come: gl.shared_memory_descriptor
    gone: gl.shared_memory_descriptor
    order: gl.shared_memory_descriptor
    COLUMNS: gl.constexpr
    STEPS: gl.constexpr
    DEPTH: gl.constexpr
    TILE_ROWS: gl.constexpr
    TILE_COLUMNS: gl.constexpr
    PART_ROWS: gl.constexpr
    PIECES: gl.constexpr
    STAGES: gl.constexpr
    EPILOGUE: gl.constexpr
    SPLIT: gl.constexpr
    GROUPED: gl.constexpr
    SCALED: gl.constexpr
    TURN: gl.constexpr
    VECTORS: gl.constexpr
    FORM: gl.constexpr
    PARTS: gl.constexpr

    @gluon.jit
    def place(self, tile):
        """First row and column of a tile. Those of one column of tiles follow each other."""
        down = gl.cdiv(self.rows, self.TILE_ROWS)
        return tile % down * self.TILE_ROWS, tile // down * self.TILE_COLUMNS

    @gluon.jit
    def turns(self):
        """Of all programs together: tiles, and the parts of those that are shared out."""
        return self.whole + self.left * self.parts

    @gluon.jit
    def share(self, turn):
        """A tile, which of how many parts of it, and its steps over the channels in."""
        tile, part, parts, first, last = turn, 0, 1, 0, self.STEPS
        # PARTS is known to the compiler, which leaves this out where it is 1.
        if self.PARTS > 1:  # noqa: SIM102
            if turn >= self.whole:
                tile = self.whole + (turn - self.whole) % self.left
                part, parts = (turn - self.whole) // self.left, self.parts
                first = part * self.STEPS // parts
                last = (part + 1) * self.STEPS // parts
        return tile, part, parts, first, last

    @gluon.jit
    def group(self, row):
        """Of the weights: text's lie above those of the image, and no tile holds both."""
        group = 0
        if self.GROUPED:
            group = gl.where(row < self.text_tokens, 0, 1)
        return group


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    """The stage after this one, and the parity of its turn."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _before(slot, STAGES: gl.constexpr):
    """The stage before this one.

    Computed anew, since a variable that holds the last slot is not carried from one round of a loop
    to the next: the compiler takes it for the slot that it is a copy of.
    """
    return gl.where(slot == 0, STAGES - 1, slot - 1)


@gluon.jit
def _produce(task):
    """Load operands, and residuals, of all tiles of this program."""
    HALVES: gl.constexpr = task.TILE_ROWS // task.PART_ROWS
    operands: gl.constexpr = task.TILE_ROWS + task.TILE_COLUMNS
    slot, phase, turn = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for share in range(gl.program_id(0), task.turns(), gl.num_programs(0)):
        tile, part, parts, begin, end = task.share(share)
        row, column = task.place(tile)
        first = task.group(row) * task.COLUMNS + column
        for k in range(begin, end):
            mbarrier.wait(task.empty.index(slot), phase ^ 1)
            full = task.full.index(slot)
            mbarrier.expect(full, operands * 128)
            for half in gl.static_range(HALVES):
                at = [row + half * task.PART_ROWS, k * task.DEPTH]
                _load(task.x, at, full, task.a.index(slot * HALVES + half))
            _load(task.weight, [first, k * task.DEPTH], full, task.b.index(slot))
            slot, phase = _next(slot, phase, task.STAGES)
        if task.EPILOGUE == "residual":
            # Behind the operands: a residual must not hold up the products before it.
            if task.FORM == "pingpong":
                _load_residual(task, row, column, turn % GROUPS, turn // GROUPS)
            elif part == parts - 1:
                for group in gl.static_range(GROUPS):
                    _load_residual(task, row + group * task.PART_ROWS, column, group, turn)
        turn += 1


@gluon.jit
def _load_residual(task, row, column, group, turn):
    mbarrier.wait(task.gone.index(group), (turn & 1) ^ 1)
    come = task.come.index(group)
    mbarrier.expect(come, task.PART_ROWS * task.TILE_COLUMNS * 2)
    for piece in gl.static_range(task.PIECES):
        at = [row, column + piece * PIECE]
        _load(task.out, at, come, task.staged.index(group * task.PIECES + piece))


@gluon.jit
def _consume(task, GROUP: gl.constexpr):
    """Multiply and finish this group's tiles, or its rows of all tiles."""
    programs = gl.num_programs(0)
    if task.FORM == "pingpong":
        for share in range(gl.program_id(0) + GROUP * programs, task.turns(), GROUPS * programs):
            turn = (share - gl.program_id(0)) // programs
            _compute(task, share, turn, turn // GROUPS, GROUP, 0)
    else:
        for share in range(gl.program_id(0), task.turns(), programs):
            turn = (share - gl.program_id(0)) // programs
            _compute(task, share, turn, turn, GROUP, GROUP)
    # Shared memory has to stay until the TMA has read the last pieces.
    tma.store_wait(0)


@gluon.jit
def _compute(task, share, turn, own_turn, GROUP: gl.constexpr, HALF: gl.constexpr):
    """One tile or a part of it: the program's `turn`th, and the `own_turn`th of this group."""
    tile, part, parts, begin, end = task.share(share)
    row, column = task.place(tile)
    text = row < task.text_tokens
    # What columns are multiplied with comes while products are computed.
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    columns = column + gl.arange(0, task.TILE_COLUMNS, flat)
    places = task.group(row) * task.COLUMNS + columns
    addend = gl.load(task.bias + places)
    if task.SCALED:
        factor = gl.load(task.scale + places)
    if task.EPILOGUE == "residual":
        gate_row = gl.where(text, task.gate_text, task.gate_image)
        gate = gl.load(task.gate + gate_row * task.COLUMNS + columns)
        addend *= gate
        if task.SCALED:
            factor *= gate
        else:
            factor = gate
    # A part is nobody's but the last turn's: all loads before are of whole tiles.
    total = _multiply(task, turn * task.STEPS, begin, end, own_turn, GROUP, HALF)
    if part == parts - 1:
        if task.PARTS > 1:
            total = _gather(task, total, tile - task.whole, parts, GROUP)
        task.vectors.index(GROUP * task.VECTORS).store(addend)
        if task.VECTORS == 2:
            task.vectors.index(GROUP * task.VECTORS + 1).store(factor)
        row += HALF * task.PART_ROWS
        inverse = gl.where(text, task.inverse_text, task.inverse_image)
        _finish(task, total, row, column, inverse, own_turn, GROUP)
    else:
        _hand_over(task, total, tile - task.whole, part, GROUP)


@gluon.jit
def _hand_over(task, total, tile, part, GROUP: gl.constexpr):
    """Leave sums for the program that has the last part of the tile."""
    slot = (tile * (task.parts - 1) + part) * GROUPS + GROUP
    gl.store(_sums_of(task, slot, total.type.layout), total)
    # Releases what this very thread has stored: no thread reads anything of another.
    _on_mark(task, slot, "st.release.gpu.global.u32 [place], 1;")


@gluon.jit
def _gather(task, total, tile, parts, GROUP: gl.constexpr):
    """Add what the programs with the other parts of the tile leave, and take their marks away."""
    for part in range(parts - 1):
        slot = (tile * (parts - 1) + part) * GROUPS + GROUP
        zero = _on_mark(
            task,
            slot,
            """again:
            ld.acquire.gpu.global.u32 mark, [place];
            setp.eq.u32 waiting, mark, 0;
            @waiting bra again;
            st.relaxed.gpu.global.u32 [place], 0;""",
        )
        # Added, so that no load comes before its mark.
        total += gl.load(_sums_of(task, slot, total.type.layout) + zero)
    return total


@gluon.jit
def _sums_of(task, slot, layout: gl.constexpr):
    """Where the sums of a group's part of a tile lie."""
    rows = slot * task.PART_ROWS + gl.arange(0, task.PART_ROWS, gl.SliceLayout(1, layout))
    columns = gl.arange(0, task.TILE_COLUMNS, gl.SliceLayout(0, layout))
    return task.partials + rows[:, None] * task.TILE_COLUMNS + columns[None, :]


@gluon.jit
def _on_mark(task, slot, WORK: gl.constexpr):
    """Do something with this thread's mark of a slot, of which each thread of a group has one."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred waiting; .reg .u32 mark; .reg .u64 place;"
        " mov.u32 mark, %tid.x; and.b32 mark, mark, 127; mad.wide.u32 place, mark, 4, $1; "
        + WORK
        + " mov.u32 $0, 0; }",
        "=r,l",
        [(task.marks + slot * 128).to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _multiply(task, first, begin, end, own_turn, GROUP: gl.constexpr, HALF: gl.constexpr):
    """The sums of a tile whose operands come with the `first` load, counted over all tiles."""
    if task.FORM == "pingpong":
        # A stage's parity says whether one load has come only to who knows of the one before it:
        # that is of the other group's tile, which thus has to have all its loads.
        mbarrier.wait(task.order.index(GROUP), (own_turn & 1) ^ (1 - GROUP))
    HALVES: gl.constexpr = task.TILE_ROWS // task.PART_ROWS
    deep: gl.constexpr = 256 // task.x.dtype.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, task.TILE_COLUMNS, deep])
    total = gl.zeros([task.PART_ROWS, task.TILE_COLUMNS], gl.float32, layout)
    slot, phase = first % task.STAGES, first // task.STAGES & 1
    for k in range(begin, end):
        mbarrier.wait(task.full.index(slot), phase)
        a, b = task.a.index(slot * HALVES + HALF), task.b.index(slot).permute((1, 0))
        token = warpgroup_mma(a, b, total, use_acc=k > begin, is_async=True)
        # All but this step's products are done.
        total = warpgroup_mma_wait(1, deps=(token,))
        mbarrier.arrive(task.empty.index(_before(slot, task.STAGES)), pred=k > begin)
        slot, phase = _next(slot, phase, task.STAGES)
    if task.FORM == "pingpong":
        # All of this tile's operands have come.
        mbarrier.arrive(task.order.index(1 - GROUP))
    total = warpgroup_mma_wait(0, deps=(total,))
    mbarrier.arrive(task.empty.index(_before(slot, task.STAGES)))
    return total


@gluon.jit
def _pieces(x, COUNT: gl.constexpr):
    """Equal shares of the columns, which no thread has to send to another."""
    shares = (x,)
    if COUNT > 1:
        left, right = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
        shares = _pieces(left, COUNT // 2) + _pieces(right, COUNT // 2)
    return shares


@gluon.jit
def _sums(task, total, NUMBER: gl.constexpr, GROUP: gl.constexpr):
    """A piece of x Wᵀ · scale + bias, all times the gate, as a product of so many columns lies."""
    layout: gl.constexpr = _piece_layout(256 // task.x.dtype.primitive_bitwidth)
    y = gl.convert_layout(_pieces(total, task.PIECES)[NUMBER], layout, assert_trivial=True)
    if task.VECTORS == 2:
        y *= _vector(task, GROUP * task.VECTORS + 1, NUMBER, layout)
    return y + _vector(task, GROUP * task.VECTORS, NUMBER, layout)


@gluon.jit
def _vector(task, WHICH: gl.constexpr, NUMBER: gl.constexpr, LAYOUT: gl.constexpr):
    """What a piece's columns are multiplied with, or what is added to them."""
    kept = task.vectors.index(WHICH).slice(NUMBER * PIECE, PIECE)
    return kept.load(gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def _finish(task, total, row, column, inverse, turn, GROUP: gl.constexpr):
    """What follows the products, piece by piece."""
    if task.EPILOGUE == "residual":
        mbarrier.wait(task.come.index(GROUP), turn & 1)
        for piece in gl.static_range(task.PIECES):
            staged = task.staged.index(GROUP * task.PIECES + piece)
            y = _sums(task, total, piece, GROUP)
            y += staged.load(y.type.layout).to(gl.float32)
            _store(task.out, staged, y, row, column + piece * PIECE)
        tma.store_wait(0)
        mbarrier.arrive(task.gone.index(GROUP))
    elif task.EPILOGUE == "gelu":
        _finish_gelu(task, task.out, total, row, column, inverse, GROUP)
    elif task.EPILOGUE == "plain":
        _finish_plain(task, total, row, column, GROUP)
    else:
        if column < task.SPLIT:
            _finish_plain(task, total, row, column, GROUP)
        else:
            _finish_gelu(task, task.second, total, row, column - task.SPLIT, inverse, GROUP)


@gluon.jit
def _finish_gelu(task, out, total, row, column, inverse, GROUP: gl.constexpr):
    for piece in gl.static_range(task.PIECES):
        y = _gelu(_sums(task, total, piece, GROUP), inverse, out.dtype.primitive_bitwidth == 8)
        _store(out, _free_stage(task, piece, GROUP), y, row, column + piece * PIECE)


@gluon.jit
def _finish_plain(task, total, row, column, GROUP: gl.constexpr):
    """With TURN each two pieces are a head."""
    for piece in gl.static_range(task.PIECES):
        y = _sums(task, total, piece, GROUP)
        if task.TURN:
            other = _sums(task, total, piece ^ 1, GROUP)
            part = (column + piece * PIECE) // (task.SPLIT // 3)
            if part < 2:
                spread = gl.rsqrt(gl.sum(y * y + other * other, 1) * (1.0 / HEAD) + EPSILON)
                y = _turned(task, y, spread, row, part, piece % 2 * PIECE)
            others = gl.where(part == 1, task.factor_k, task.factor_v)
            y *= gl.where(part == 0, task.factor_q, others)
        _store(task.out, _free_stage(task, piece, GROUP), y, row, column + piece * PIECE)


@gluon.jit
def _free_stage(task, NUMBER: gl.constexpr, GROUP: gl.constexpr):
    """One of two buffers in turns: what the TMA stored from it before the last has left."""
    tma.store_wait(1)
    return task.staged.index(GROUP * 2 + NUMBER % 2)


@gluon.jit
def _turned(task, y, spread, row, part, CHANNEL: gl.constexpr):
    """Columns of a head, from this channel on, after its norm, and RoPE of each pair."""
    rows: gl.constexpr = y.shape[0]
    width: gl.constexpr = y.shape[1]
    layout: gl.constexpr = y.type.layout
    if rows * width > 2048:
        # In two halves: there are no registers for more angles.
        left, right = y.reshape(rows, 2, width // 2).permute(0, 2, 1).split()
        left = _turned(task, left, spread, row, part, CHANNEL)
        right = _turned(task, right, spread, row, part, CHANNEL + width // 2)
        y = gl.join(left, right).permute(0, 2, 1).reshape(rows, width)
    else:
        spread = gl.convert_layout(spread, gl.SliceLayout(1, layout), assert_trivial=True)
        channels = CHANNEL + gl.arange(0, width, gl.SliceLayout(0, layout))
        weight = gl.load(task.norms + (2 * task.group(row) + part) * HEAD + channels)
        y *= spread[:, None] * weight[None, :]
        a, b = y.reshape(rows, width // 2, 2).split()
        pairs: gl.constexpr = a.type.layout
        lines = row + gl.arange(0, rows, gl.SliceLayout(1, pairs))
        # Both channels of a pair have the same angle.
        firsts = CHANNEL + 2 * gl.arange(0, width // 2, gl.SliceLayout(0, pairs))
        places = lines[:, None] * HEAD + firsts[None, :]
        known = (lines < task.rows)[:, None]
        c = gl.load(task.cos + places, mask=known, other=0.0)
        s = gl.load(task.sin + places, mask=known, other=0.0)
        y = gl.join(a * c - b * s, b * c + a * s).reshape(rows, width)
    return gl.convert_layout(y, layout, assert_trivial=True)


@gluon.constexpr_function
def _piece_layout(deep):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, deep])


@gluon.jit
def _store(out, staged, y, row, column):
    """Through shared memory, by the TMA, which leaves out rows that the tensor does not have."""
    if staged.dtype != out.dtype:
        staged = _reinterpret(staged, out.dtype, out.block_shape, out.layout)
    staged.store(y.to(out.dtype))
    fence_async_shared()
    _send(out, [row, column], staged)


@gluon.jit
def _gelu(y, inverse, NARROW: gl.constexpr):
    """GELU(y) · inverse, in one operation of the special function unit where 8 bits are enough."""
    if NARROW:
        half = 0.5 * inverse * y
        u = y * (0.7978845608 + 0.03567740814 * (y * y))
        y = half + half * _approximate(u, "tanh.approx.f32")
    else:
        # y · sigmoid(2u), with the powers of 2.
        power = _approximate(y * (-2.302208198 - 0.1029432396 * (y * y)), "ex2.approx.ftz.f32")
        y = y * inverse * _approximate(1.0 + power, "rcp.approx.ftz.f32")
    return y


@gluon.jit
def _approximate(x, OPERATION: gl.constexpr):
    """An operation of the special function unit."""
    return gl.inline_asm_elementwise(
        OPERATION + " $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def specialized(
    x, weight, out, second, scale, bias, gate, norms, cos, sin, rows, text_tokens, gate_text,
    gate_image, inverse_text, inverse_image, factor_q, factor_k, factor_v, partials, marks,
    COLUMNS: gl.constexpr, INNER: gl.constexpr, TILE_ROWS: gl.constexpr,
    TILE_COLUMNS: gl.constexpr, DEPTH: gl.constexpr, EPILOGUE: gl.constexpr, SPLIT: gl.constexpr,
    GROUPED: gl.constexpr, SCALED: gl.constexpr, TURN: gl.constexpr, FORM: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """As `engines.native.kernels.linear`, for tiles that divide the columns and their split."""
    gl.static_assert(COLUMNS % TILE_COLUMNS == 0 and SPLIT % TILE_COLUMNS == 0)
    # A stage is given back when the products of the one after it have begun.
    gl.static_assert(STAGES >= 2)
    PART_ROWS: gl.constexpr = x.block_shape[0]
    PIECES: gl.constexpr = TILE_COLUMNS // PIECE
    kept: gl.constexpr = second.dtype if second.dtype == gl.bfloat16 else out.dtype
    kept_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PART_ROWS, PIECE], kept)
    HALVES: gl.constexpr = TILE_ROWS // PART_ROWS
    buffers: gl.constexpr = GROUPS * (PIECES if EPILOGUE == "residual" else 2)
    a = gl.allocate_shared_memory(x.dtype, [STAGES * HALVES, PART_ROWS, DEPTH], x.layout)
    b = gl.allocate_shared_memory(weight.dtype, [STAGES, TILE_COLUMNS, DEPTH], weight.layout)
    staged = gl.allocate_shared_memory(kept, [buffers, PART_ROWS, PIECE], kept_layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    count: gl.constexpr = 2 if SCALED or EPILOGUE == "residual" else 1
    vectors = gl.allocate_shared_memory(gl.float32, [GROUPS * count, TILE_COLUMNS], flat)
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    come = mbarrier.allocate_mbarrier(batch=GROUPS)
    gone = mbarrier.allocate_mbarrier(batch=GROUPS)
    order = mbarrier.allocate_mbarrier(batch=GROUPS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=HALVES)
    for group in gl.static_range(GROUPS):
        mbarrier.init(come.index(group), count=1)
        mbarrier.init(gone.index(group), count=1)
    for group in gl.static_range(GROUPS):
        mbarrier.init(order.index(group), count=1)
    fence_async_shared()
    steps: gl.constexpr = (INNER + DEPTH - 1) // DEPTH
    programs = gl.num_programs(0)
    tiles = gl.cdiv(rows, TILE_ROWS) * (COLUMNS // TILE_COLUMNS)
    whole, left, parts = tiles, gl.to_tensor(0), gl.to_tensor(1)
    if PARTS > 1:
        whole = tiles // programs * programs
        left = tiles - whole
        parts = gl.minimum(programs // gl.maximum(left, 1), PARTS)
    task = Task(  # type: ignore[call-arg]
        x, weight, out, second, scale, bias, gate, norms, cos, sin, rows, text_tokens, gate_text,
        gate_image, inverse_text, inverse_image, factor_q, factor_k, factor_v,
        partials, marks, whole, left, parts, a, b, staged, vectors, full, empty, come, gone, order,
        COLUMNS, steps, DEPTH, TILE_ROWS, TILE_COLUMNS, PART_ROWS, PIECES, STAGES, EPILOGUE, SPLIT,
        GROUPED, SCALED, TURN, count, FORM, PARTS,
    )  # fmt: skip
    # The registers of the first are what the others leave.
    gl.warp_specialize(
        [(_consume, (task, 0)), (_consume, (task, 1)), (_produce, (task,))], [4, 1], [240, 24]
    )
