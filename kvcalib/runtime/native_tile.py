"""Arithmetic on one tile, 64 tokens of one kv head, for `native_loops.py`: numba, compiled for the machine.

A tile is `[D, 64]`, a channel a row, so that every loop runs over 64 tokens that lie side by side.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

TILE = 64
LANES = 16
NOTHING = np.float32(-1e30)
FLAGS = {"reassoc", "contract", "nsz", "arcp"}


@intrinsic
def _field(_: Any, word: Any, shift: Any, mask: Any, place: Any) -> Any:
    """`((word >> shift) & mask) << place` in 32 bits; numba would widen it to 64 and halve the lanes twice."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, shift, mask, place = arguments
        return builder.shl(builder.and_(builder.lshr(word, shift), mask), place)

    return types.uint32(types.uint32, types.uint32, types.uint32, types.uint32), generate


@intrinsic
def _fetch(
    _: Any, turned: Any, row_a: Any, shift_a: Any, mask_a: Any, row_b: Any, shift_b: Any, mask_b: Any, place_b: Any,
    table: Any, out: Any,
) -> Any:  # fmt: skip
    """`out[0:64] = table[code[0:64]]`, a code below 16 made of a field in row a and one in row b of `turned [*, 64]`.

    One in-register permutation per 16 where the CPU has one: written as a permutation in LLVM's terms, since a loop
    over `table[code]` becomes one load per element.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, table, target = (
            context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 8, 9)
        )
        floats = ir.VectorType(ir.FloatType(), LANES)
        numbers = ir.VectorType(ir.IntType(32), LANES)
        number, wide = ir.IntType(32), ir.IntType(64)

        def spread(x: Any) -> Any:
            first = builder.insert_element(ir.Constant(numbers, ir.Undefined), x, ir.Constant(number, 0))
            return builder.shuffle_vector(first, ir.Constant(numbers, ir.Undefined), ir.Constant(numbers, [0] * LANES))

        def load(pointer: Any, start: Any, kind: Any) -> Any:
            found = builder.load(builder.bitcast(builder.gep(pointer, [start]), kind.as_pointer()))
            found.align = 4
            return found

        levels = load(table, ir.Constant(wide, 0), floats)
        shift_a, mask_a, shift_b, mask_b, place_b = (spread(arguments[i]) for i in (2, 3, 5, 6, 7))
        rows = [builder.mul(builder.zext(arguments[i], wide), ir.Constant(wide, TILE)) for i in (1, 4)]
        for start in range(0, TILE, LANES):
            a, b = (load(source, builder.add(row, ir.Constant(wide, start)), numbers) for row in rows)
            low = builder.and_(builder.lshr(a, shift_a), mask_a)
            high = builder.shl(builder.and_(builder.lshr(b, shift_b), mask_b), place_b)
            code = builder.and_(builder.or_(low, high), ir.Constant(numbers, [LANES - 1] * LANES))
            found = ir.Constant(floats, ir.Undefined)
            for lane in range(LANES):
                place = ir.Constant(number, lane)
                level = builder.extract_element(levels, builder.extract_element(code, place))
                found = builder.insert_element(found, level, place)
            to = builder.bitcast(builder.gep(target, [ir.Constant(wide, start)]), floats.as_pointer())
            builder.store(found, to).align = 4
        return context.get_dummy_value()

    field = (types.uint32,) * 3
    return types.void(turned, *field, *field, types.uint32, table, out), generate


@numba.njit(inline="always", fastmath=FLAGS)
def _exp(x: Any) -> Any:
    """e^x for x <= 0 in float32, within 2 ulp: 2^n times a polynomial of the fraction."""
    y = max(x, np.float32(-87.0)) * np.float32(1.4426950408889634)
    n = np.int32(y - np.float32(0.5))
    f = y - np.float32(n)
    p = np.float32(1.5403530e-4)
    p = p * f + np.float32(1.3333558e-3)
    p = p * f + np.float32(9.6181291e-3)
    p = p * f + np.float32(5.5504109e-2)
    p = p * f + np.float32(2.4022651e-1)
    p = p * f + np.float32(6.9314718e-1)
    p = p * f + np.float32(1.0)
    return p * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@numba.njit(fastmath=FLAGS, nogil=True, forceinline=True)
def look_up(head: Any, rows: Any, step: Any, n: Any, tables: Any, turned: Any, codes: Any, tile: Any) -> None:
    """Decode `n` tokens of one head into `tile [D, 64]`.

    `rows`: their words, `step` from one token to the next; `turned [words, 64]` and `codes [64]`: scratch.
    """
    used, amount, fields, count, narrow, centroids = tables
    for t in range(n):
        for w in range(amount[head]):
            turned[w, t] = rows[t * step + used[head, w]]
    for c in range(tile.shape[0]):
        if narrow[head, c]:
            _fetch(  # type: ignore[call-arg]
                turned, fields[0, head, c, 0], fields[1, head, c, 0], fields[2, head, c, 0], fields[0, head, c, 1],
                fields[1, head, c, 1], fields[2, head, c, 1], fields[3, head, c, 1], centroids[head, c], tile[c],
            )  # fmt: skip
            continue
        for t in range(TILE):
            codes[t] = np.uint32(0)
        for plane in range(count[head, c]):
            row, shift = turned[fields[0, head, c, plane]], fields[1, head, c, plane]
            mask, place = fields[2, head, c, plane], fields[3, head, c, plane]
            for t in range(TILE):
                codes[t] |= _field(row[t], shift, mask, place)  # type: ignore[call-arg]
        out, levels = tile[c], centroids[head, c]
        for t in range(TILE):
            out[t] = levels[codes[t]]


@numba.njit(fastmath=FLAGS, nogil=True, forceinline=True)
def turn(x: Any, out: Any, position: Any, sign: Any, angles: Any) -> None:
    """`out = R(sign * position) x`, both `[M, D]` in pair order; position >= 0.

    `angles`: cosines and sines of 0..1023, `[1024 * P]`, and of multiples of 1024, `[* * P]`.
    """
    fine, fine_sin, coarse, coarse_sin = angles
    pairs = fine.shape[0] // 1024
    a, b = (position >> 10) * pairs, (position & 1023) * pairs
    for p in range(pairs):
        cos = fine[b + p] * coarse[a + p] - fine_sin[b + p] * coarse_sin[a + p]
        sin = (fine_sin[b + p] * coarse[a + p] + fine[b + p] * coarse_sin[a + p]) * sign
        for m in range(x.shape[0]):
            first, second = x[m, 2 * p], x[m, 2 * p + 1]
            out[m, 2 * p] = first * cos - second * sin
            out[m, 2 * p + 1] = second * cos + first * sin


@numba.njit(fastmath=FLAGS, nogil=True, forceinline=True)
def turn_keys(flat: Any, turn: Any, dim: Any) -> None:
    """Rotate `flat [D * 64]`, pairs of rows, in place by `turn [P * 2 * 64]`, a row of cosines and one of sines each.

    Flat arrays with constant distances: only then the compiler sees that the rows do not overlap, and vectorises.
    """
    for p in range(dim // 2):
        i = 2 * p * TILE
        for t in range(TILE):
            x, y = flat[i + t], flat[i + TILE + t]
            c, s = turn[i + t], turn[i + TILE + t]
            flat[i + t] = x * c - y * s
            flat[i + TILE + t] = y * c + x * s


@intrinsic
def _turn_four(_: Any, flat: Any, cos: Any, sin: Any, place: Any, p: Any, t: Any) -> Any:
    """Rotate pairs p..p+3 of tokens t..t+15 of `flat [D * 64]` in place; token t's pair p turns by `cos[place[t] + p]`.

    Tables have a token's pairs side by side, the tile a pair's tokens: four loads of four pairs fill a register, and
    the 4 x 4 squares of four registers are transposed within their quarters, two permutations each.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flat, cos, sin, place = (
            context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in range(4)
        )
        p, t = arguments[4:]
        number, wide = ir.IntType(32), ir.IntType(64)
        floats, quads = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.FloatType(), 4)

        def load(pointer: Any, start: Any, kind: Any) -> Any:
            found = builder.load(builder.bitcast(builder.gep(pointer, [start]), kind.as_pointer()))
            found.align = 4
            return found

        def pick(a: Any, b: Any, chosen: list[int]) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(number, len(chosen)), chosen))

        def in_quarters(a: Any, b: Any, chosen: tuple[int, ...]) -> Any:
            """Every quarter the same four of the eight in this quarter of `a` and of `b`."""
            return pick(a, b, [4 * quarter + (i if i < 4 else 12 + i) for quarter in range(4) for i in chosen])

        starts = [
            builder.add(builder.load(builder.gep(place, [builder.add(t, ir.Constant(wide, i))])), p) for i in range(16)
        ]
        turns = []
        for table in (cos, sin):
            # Quarter i of the j-th: token 4 i + j.
            rows = []
            for j in range(4):
                four = [load(table, starts[4 * i + j], quads) for i in range(4)]
                halves = [pick(four[i], four[i + 1], list(range(8))) for i in (0, 2)]
                rows.append(pick(halves[0], halves[1], list(range(16))))
            low = [in_quarters(rows[i], rows[i + 1], (0, 4, 1, 5)) for i in (0, 2)]
            high = [in_quarters(rows[i], rows[i + 1], (2, 6, 3, 7)) for i in (0, 2)]
            made = []
            for a, b in (low, high):
                made += [in_quarters(a, b, chosen) for chosen in ((0, 1, 4, 5), (2, 3, 6, 7))]
            turns.append(made)
        fast = ("contract",)
        for r in range(4):
            row = builder.mul(builder.add(p, ir.Constant(wide, r)), ir.Constant(wide, 2 * TILE))
            at = [builder.add(builder.add(row, t), ir.Constant(wide, i)) for i in (0, TILE)]
            x, y = (load(flat, i, floats) for i in at)
            c, s = turns[0][r], turns[1][r]
            first = builder.fsub(builder.fmul(x, c, fast), builder.fmul(y, s, fast), fast)
            second = builder.fadd(builder.fmul(y, c, fast), builder.fmul(x, s, fast), fast)
            for i, found in zip(at, (first, second), strict=True):
                builder.store(found, builder.bitcast(builder.gep(flat, [i]), floats.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(flat, cos, sin, place, types.int64, types.int64), generate


@numba.njit(fastmath=FLAGS, nogil=True, forceinline=True)
def turn_keys_by(flat: Any, cos: Any, sin: Any, place: Any, dim: Any) -> None:
    """Rotate `flat [D * 64]` in place, token t's pairs by the P cosines and sines from `place[t]` on, int64 `[64]`."""
    pairs = dim // 2
    for t in range(0, TILE, 16):
        for p in range(0, pairs - 3, 4):
            _turn_four(flat, cos, sin, place, p, t)  # type: ignore[call-arg]
    for p in range(pairs // 4 * 4, pairs):
        i = 2 * p * TILE
        for t in range(TILE):
            x, y, c, s = flat[i + t], flat[i + TILE + t], cos[place[t] + p], sin[place[t] + p]
            flat[i + t] = x * c - y * s
            flat[i + TILE + t] = y * c + x * s


@intrinsic
def _add_angles(_: Any, angles: Any, b: Any, a: Any, cos: Any, sin: Any, at: Any) -> Any:
    """Eight cosines and sines, from `at` on, of angles that `fine` has from `b` on and `coarse` from `a` on.

    Written in LLVM's terms: a loop over the six arrays, which may overlap for all that it knows, took longer.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        eight = ir.VectorType(ir.FloatType(), 8)

        def place(kind: Any, array: Any, start: Any) -> Any:
            pointer = builder.gep(context.make_array(kind)(context, builder, array).data, [start])
            return builder.bitcast(pointer, eight.as_pointer())

        parts = []
        for i, start in enumerate((arguments[1], arguments[1], arguments[2], arguments[2])):
            part = builder.load(place(signature.args[0][i], builder.extract_value(arguments[0], i), start))
            part.align = 4
            parts.append(part)
        c, s, far_c, far_s = parts
        fast = ("contract",)
        made = (
            builder.fsub(builder.fmul(c, far_c, fast), builder.fmul(s, far_s, fast), fast),
            builder.fadd(builder.fmul(s, far_c, fast), builder.fmul(c, far_s, fast), fast),
        )
        for i, x in zip((3, 4), made, strict=True):
            builder.store(x, place(signature.args[i], arguments[i], arguments[5])).align = 4
        return context.get_dummy_value()

    return types.void(angles, types.int64, types.int64, cos, sin, types.int64), generate


@numba.njit(fastmath=FLAGS, nogil=True, forceinline=True)
def far_angles(place: Any, angles: Any, cos: Any, sin: Any) -> None:
    """Cosines and sines of 64 positions >= 0 into `cos`, `sin [64 * P]`; `place` becomes where each token's begin."""
    fine, fine_sin, coarse, coarse_sin = angles
    pairs = cos.shape[0] // TILE
    for t in range(TILE):
        a, b, at = (place[t] >> 10) * pairs, (place[t] & 1023) * pairs, t * pairs
        for p in range(0, pairs - 7, 8):
            _add_angles(angles, b + p, a + p, cos, sin, at + p)  # type: ignore[call-arg]
        for p in range(pairs // 8 * 8, pairs):
            cos[at + p] = fine[b + p] * coarse[a + p] - fine_sin[b + p] * coarse_sin[a + p]
            sin[at + p] = fine_sin[b + p] * coarse[a + p] + fine[b + p] * coarse_sin[a + p]
        place[t] = at


@numba.njit(nogil=True, forceinline=True)
def relative(position: Any, step: Any, start: Any, n: Any, place: Any) -> Any:
    """Positions `position[step * (start + t)]` of `n` tokens relative to the smallest, into `place [64]` int64.

    A negative position marks a slot that nobody reads; it gets 0, as do the tokens from `n` on.

    Returns:
        (the smallest, the largest, whether they follow one another from the first token on).
    """
    lowest, highest = np.int64(1 << 32), np.int64(-1)
    for t in range(n):
        here = np.int64(position[step * (start + t)])
        place[t] = here
        highest = max(highest, here)
        lowest = min(lowest, here if here >= 0 else np.int64(1 << 32))
    if highest < 0:
        lowest = highest = np.int64(0)
    follow = True
    for t in range(n):
        place[t] = max(place[t] - lowest, 0)
        follow &= place[t] == t
    for t in range(n, TILE):
        place[t] = 0
    return lowest, highest, follow


@numba.njit(fastmath=FLAGS, nogil=True, forceinline=True)
def weigh(raw: Any, base: Any, share: Any, out: Any) -> None:
    """`out [T] += share * e^(raw - base)` of scores `raw [T]` that are not masked; `base` is none of them exceeds."""
    for t in range(out.shape[0]):
        out[t] += _exp(raw[t] - base) * share if raw[t] > NOTHING / 2 else np.float32(0.0)


@numba.njit(fastmath=FLAGS, nogil=True, forceinline=True)
def score(query: Any, keys: Any, scores: Any) -> None:
    """`scores [M, 64] = query [M, D] @ keys [D, 64]`; four channels at a time, D is even."""
    for m in range(query.shape[0]):
        out = scores[m]
        for t in range(TILE):
            out[t] = np.float32(0.0)
        for c in range(0, keys.shape[0] - 3, 4):
            x, y, z, w = keys[c], keys[c + 1], keys[c + 2], keys[c + 3]
            qx, qy, qz, qw = query[m, c], query[m, c + 1], query[m, c + 2], query[m, c + 3]
            for t in range(TILE):
                out[t] += qx * x[t] + qy * y[t] + qz * z[t] + qw * w[t]
        for c in range(keys.shape[0] // 4 * 4, keys.shape[0]):
            x, qx = keys[c], query[m, c]
            for t in range(TILE):
                out[t] += qx * x[t]


@numba.njit(fastmath=FLAGS, nogil=True, forceinline=True)
def fold(scores: Any, n: Any, zero: Any, scale: Any, tile: Any, weighted: Any, peak: Any, norm: Any, sums: Any) -> None:
    """Take `n` scores and the values `zero[t] + scale[t] * tile[:, t]` of a tile into the running softmax."""
    for m in range(scores.shape[0]):
        row = scores[m]
        highest = NOTHING
        for t in range(n):
            highest = max(highest, row[t])
        if highest <= NOTHING / 2:
            row[:] = np.float32(0.0)
            continue
        highest = max(highest, peak[m])
        decay = _exp(peak[m] - highest) if peak[m] > NOTHING / 2 else np.float32(0.0)
        peak[m] = highest
        total, rise = np.float32(0.0), np.float32(0.0)
        for t in range(n):
            w = _exp(row[t] - highest) if row[t] > NOTHING / 2 else np.float32(0.0)
            total += w
            rise += w * zero[t]
            row[t] = w
        row[n:] = np.float32(0.0)
        norm[m] = norm[m] * decay + total
        out = sums[m]
        for c in range(tile.shape[0]):
            out[c] = out[c] * decay + rise
    for m in range(scores.shape[0]):
        row, out = scores[m], sums[m]
        for t in range(TILE):
            weighted[t] = row[t] * scale[t]
        for c in range(0, tile.shape[0] - 1, 2):
            x, y = tile[c], tile[c + 1]
            a, b = np.float32(0.0), np.float32(0.0)
            for t in range(TILE):
                a += weighted[t] * x[t]
                b += weighted[t] * y[t]
            out[c] += a
            out[c + 1] += b
        if tile.shape[0] % 2:
            x, a = tile[tile.shape[0] - 1], np.float32(0.0)
            for t in range(TILE):
                a += weighted[t] * x[t]
            out[tile.shape[0] - 1] += a
