"""The edits of a place in one launch, a program a token, which leaves at once where its token has row 0.

NOT RUN on a GPU so far: what was run is the plain form of `thinksteer_vllm.edits`, and this in Triton's interpreter.
"""

from collections.abc import Sequence

from torch import Tensor

from thinksteer_vllm.tables import ABLATE, ADD, CLAMP, ROTATE, SCALE, Place, Tokens

try:
    import triton
    import triton.language as tl
except ImportError:  # then the plain form runs
    triton = None


def runs_on(x: Tensor) -> bool:
    """Does the kernel do it? Else the plain form does."""
    return triton is not None and x.is_cuda


def edit(x: Tensor, residual: Tensor | None, at: Sequence[Place], tokens: Tokens) -> None:
    """In place, as `edits.edit_stream` with a residual, else as `edits.edit_whole`."""
    for place in at:
        part = x if place.part is None else x[:, place.part]
        n, width = part.shape
        assert place.order is not None
        _edit[(n,)](
            part, part if residual is None else residual, tokens.rows, tokens.multiples, tokens.strength,
            place.order, place.local, place.kinds, place.vectors, place.numbers,
            part.stride(0), part.stride(0) if residual is None else residual.stride(0), tokens.rows.stride(0), width,
            N_STEPS=len(place.steps), HAS_RESIDUAL=residual is not None, BLOCK=triton.next_power_of_2(width),
            ADD=ADD, ABLATE=ABLATE, SCALE=SCALE, CLAMP=CLAMP, ROTATE=ROTATE,
        )  # fmt: skip


if triton is not None:

    @triton.jit
    def _changed(  # noqa: PLR0913
        x, vector, kind, multiple, strength, numbers_ptr,
        ADD: tl.constexpr, ABLATE: tl.constexpr, SCALE: tl.constexpr, CLAMP: tl.constexpr, ROTATE: tl.constexpr,
    ):  # fmt: skip
        """One step; of an Add the multiple holds the request's strength, and the vector the step's."""
        own = strength * tl.load(numbers_ptr)
        projection = tl.sum(x * vector, axis=0)
        if kind == ADD:
            x = x + multiple * vector
        if kind == ABLATE:
            x = x + multiple * own * (tl.load(numbers_ptr + 1) - projection) * vector
        if kind == CLAMP:
            kept = tl.minimum(tl.maximum(projection, tl.load(numbers_ptr + 2)), tl.load(numbers_ptr + 3))
            x = x + multiple * own * (kept - projection) * vector
        if kind == SCALE:
            x = x * (1 + multiple * (own - 1))
        if kind == ROTATE:
            new = x + own * vector
            length = tl.maximum(tl.sqrt(tl.sum(new * new, axis=0)), 1.1754943508222875e-38)
            x = x + multiple * (new * (tl.sqrt(tl.sum(x * x, axis=0)) / length) - x)
        return x

    @triton.jit
    def _edit(  # noqa: PLR0913
        x_ptr, residual_ptr, rows_ptr, multiples_ptr, strength_ptr,
        order_ptr, local_ptr, kinds_ptr, vectors_ptr, numbers_ptr,
        x_stride, residual_stride, rows_stride, width,
        N_STEPS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
        ADD: tl.constexpr, ABLATE: tl.constexpr, SCALE: tl.constexpr, CLAMP: tl.constexpr, ROTATE: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        inside = at < width
        touched = 0
        for i in range(N_STEPS):
            touched += tl.load(local_ptr + tl.load(rows_ptr + tl.load(order_ptr + i) * rows_stride + token))
        if touched == 0:
            return
        dtype = x_ptr.dtype.element_ty
        x = tl.load(x_ptr + token * x_stride + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(residual_ptr + token * residual_stride + at, mask=inside, other=0.0).to(tl.float32)
            x = x.to(dtype).to(tl.float32)
        strength = tl.load(strength_ptr + token)
        for i in range(N_STEPS):
            cell = tl.load(order_ptr + i) * rows_stride + token
            row = tl.load(local_ptr + tl.load(rows_ptr + cell))
            kind = tl.load(kinds_ptr + row)
            if kind > 0:
                vector = tl.load(vectors_ptr + row * width + at, mask=inside, other=0.0)
                multiple = tl.load(multiples_ptr + cell)
                if kind == ADD:
                    multiple = (multiple * strength).to(dtype).to(tl.float32)
                x = _changed(x, vector, kind, multiple, strength, numbers_ptr + row * 4,
                             ADD, ABLATE, SCALE, CLAMP, ROTATE)  # fmt: skip
                x = x.to(dtype).to(tl.float32)
        if HAS_RESIDUAL:
            tl.store(residual_ptr + token * residual_stride + at, x.to(dtype), mask=inside)
            tl.store(x_ptr + token * x_stride + at, tl.zeros([BLOCK], dtype=tl.float32).to(dtype), mask=inside)
        else:
            tl.store(x_ptr + token * x_stride + at, x.to(dtype), mask=inside)
