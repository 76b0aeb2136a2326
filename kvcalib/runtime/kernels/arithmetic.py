"""Numbers as all kernels treat them: rounding, products in a given type, two float16 in a word."""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def narrow(x, kind: tl.constexpr):
    """float32 `x` rounded to nearest even in `kind`. By hand for bfloat16, which Triton's interpreter truncates."""
    if kind == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(kind)


@triton.jit
def halves(both):
    """The two float16 numbers of a word, the low half first, as float32."""
    low = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def dot(left, right, acc, kind: tl.constexpr, WIDEN: tl.constexpr):
    """`acc + left @ right` in float32 of factors rounded to `kind`.

    WIDEN: the same numbers as float32 factors, for Triton's interpreter, whose dot misreads bfloat16.
    """
    if WIDEN:
        left = narrow(left, kind).to(tl.float32)
        right = narrow(right, kind).to(tl.float32)
    else:
        left = left.to(kind)
        right = right.to(kind)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def interleave(a, b, N: tl.constexpr):
    """`[8, N]` twice to `[16, N]`: a0, b0, a1, b1, ..."""
    return tl.join(a, b).permute(0, 2, 1).reshape(16, N)
