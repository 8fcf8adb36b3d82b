"""The rotation in Triton: what runs on the device.

A program serves one block of tokens of one sample and a group of heads of q or of k: it makes the angles of its tokens
once and uses them for each of its heads. q and k are [batch, heads, seq, head_dim] with any strides. Offsets are 64-bit
throughout. Arithmetic is float32 with explicit fused multiply-adds (launched with the compiler's own fusion off, so
that no version of Triton changes a result), rounded once.

What PyTorch and Triton share is compiled from `phase.py` itself.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

__all__ = [
    "INTERPRETED",
    "norm_rotate_backward_kernel",
    "norm_rotate_kernel",
    "rotate_backward_kernel",
    "rotate_kernel",
]

_phase = importlib.import_module("ropex.kernels.phase")  # the package has a function of this name


def _in_triton(function: Callable[..., Any]) -> Any:
    """A function over the names that `torch` and `triton.language` share, compiled by Triton."""
    names = {"xp": tl, "__name__": __name__}
    return triton.jit(types.FunctionType(function.__code__, names, function.__name__))


fixed_frequency = _in_triton(_phase.fixed_frequency)
cos_sin_of_phase = _in_triton(_phase.cos_sin_of_phase)

# Triton's interpreter, asked for by TRITON_INTERPRET=1 before this module was imported.
INTERPRETED = not isinstance(fixed_frequency, triton.JITFunction)
# It cuts a float32 to bfloat16 where hardware rounds.
_ROUNDS_IN_SOFTWARE = tl.constexpr(INTERPRETED)

# A kernel must not be compiled anew because a text has a multiple of 16 tokens. (Where each row has its own positions,
# it is: their stride is the length, and that of a table must be known to be a multiple.)
_SIZES = ("batches", "seq", "blocks", "q_heads", "k_heads", "q_groups")


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    if _ROUNDS_IN_SOFTWARE and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _store(pointers, x, mask, low, SPLIT: tl.constexpr):
    high = _rounded(x, pointers.dtype.element_ty)
    tl.store(pointers, high, mask=mask)
    if SPLIT:
        tl.store(pointers + low, _rounded(x - high.to(tl.float32), pointers.dtype.element_ty), mask=mask)


@triton.jit
def _load_pairs(
    x, rows, seq, stride_s, stride_d, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """The first and the second channels of the pairs of a block of tokens, in float32."""
    inside = (rows < seq)[:, None]
    if INTERLEAVED:
        channels = tl.arange(0, 2 * HALF_BLOCK)[None, :].to(tl.int64)
        pointers = x + rows[:, None] * stride_s + channels * stride_d
        both = tl.load(pointers, mask=inside & (channels < 2 * HALF), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(both, (rows.shape[0], HALF_BLOCK, 2)))
    pairs = tl.arange(0, HALF_BLOCK)[None, :].to(tl.int64)
    pointers = x + rows[:, None] * stride_s + pairs * stride_d
    mask = inside & (pairs < HALF)
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF * stride_d, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_pairs(
    x, first, second, rows, seq, stride_s, stride_d, low,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    inside = (rows < seq)[:, None]
    if INTERLEAVED:
        channels = tl.arange(0, 2 * HALF_BLOCK)[None, :].to(tl.int64)
        both = tl.reshape(tl.join(first, second), (rows.shape[0], 2 * HALF_BLOCK))
        _store(x + rows[:, None] * stride_s + channels * stride_d, both, inside & (channels < 2 * HALF), low, SPLIT)
    else:
        pairs = tl.arange(0, HALF_BLOCK)[None, :].to(tl.int64)
        pointers = x + rows[:, None] * stride_s + pairs * stride_d
        mask = inside & (pairs < HALF)
        _store(pointers, first, mask, low, SPLIT)
        _store(pointers + HALF * stride_d, second, mask, low, SPLIT)


@triton.jit
def _load_tail(x, rows, seq, stride_s, stride_d, HALF: tl.constexpr, TAIL: tl.constexpr, TAIL_BLOCK: tl.constexpr):
    """The channels that do not turn, in float32."""
    channels = tl.arange(0, TAIL_BLOCK)[None, :].to(tl.int64)
    pointers = x + rows[:, None] * stride_s + (2 * HALF + channels) * stride_d
    return tl.load(pointers, mask=(rows < seq)[:, None] & (channels < TAIL), other=0.0).to(tl.float32)


@triton.jit
def _store_tail(
    x, rest, rows, seq, stride_s, stride_d, low,
    HALF: tl.constexpr, TAIL: tl.constexpr, TAIL_BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, TAIL_BLOCK)[None, :].to(tl.int64)
    pointers = x + rows[:, None] * stride_s + (2 * HALF + channels) * stride_d
    _store(pointers, rest, (rows < seq)[:, None] & (channels < TAIL), low, SPLIT)


@triton.jit
def _cos_sin(
    first, second, amplitude, scale, batch, rows, seq,
    first_b, first_s, first_h, second_b, second_s, second_h, amplitude_b, amplitude_s, amplitude_h,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    TABLE: tl.constexpr, PER_TOKEN: tl.constexpr, AMPLITUDE: tl.constexpr, CONJUGATE: tl.constexpr,
):  # fmt: skip
    """Cos and sin of a block of tokens, [block, HALF_BLOCK]: read from tables, or made from position and frequency."""
    pairs = tl.arange(0, HALF_BLOCK).to(tl.int64)
    mask = (rows < seq)[:, None] & (pairs < HALF)[None, :]
    if TABLE:
        at = batch * first_b + rows[:, None] * first_s + pairs[None, :] * first_h
        cos = tl.load(first + at, mask=mask, other=0.0).to(tl.float32)
        at = batch * second_b + rows[:, None] * second_s + pairs[None, :] * second_h
        sin = tl.load(second + at, mask=mask, other=0.0).to(tl.float32)
    else:
        positions = tl.load(first + batch * first_b + rows * first_s, mask=rows < seq, other=0)
        if PER_TOKEN:
            at = batch * second_b + rows[:, None] * second_s + pairs[None, :] * second_h
            frequency = fixed_frequency(tl.load(second + at, mask=mask, other=0.0).to(tl.float64))
        else:
            at = batch * second_b + pairs * second_h
            frequency = fixed_frequency(tl.load(second + at, mask=pairs < HALF, other=0.0).to(tl.float64))[None, :]
        cos, sin = cos_sin_of_phase(positions[:, None] * frequency)
        if AMPLITUDE:
            at = batch * amplitude_b + rows[:, None] * amplitude_s + pairs[None, :] * amplitude_h
            factor = tl.load(amplitude + at, mask=mask, other=0.0).to(tl.float32)
            cos, sin = cos * factor, sin * factor
        cos, sin = cos * scale, sin * scale
    if CONJUGATE:
        sin = -sin
    return cos, sin


@triton.jit
def _turned(first, second, cos, sin):
    return tl.fma(first, cos, -(second * sin)), tl.fma(second, cos, first * sin)


@triton.jit
def _place(blocks, BLOCK_SEQ: tl.constexpr):
    """The sample and the tokens of this program."""
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_SEQ + tl.arange(0, BLOCK_SEQ)
    return batch, rows


@triton.jit
def _heads(q_heads, k_heads, q_groups, HEADS: tl.constexpr):
    """Whether this program's heads are of q, the first of them, and their number."""
    group = tl.program_id(1).to(tl.int64)
    of_q = group < q_groups
    head = tl.where(of_q, group, group - q_groups) * HEADS
    return of_q, head, tl.minimum(tl.where(of_q, q_heads, k_heads) - head, HEADS)


@triton.jit
def _choose(of_q, q, k, batch, head, q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d):
    """The first head of this program in q or k, and the strides from head to head, token to token and in a head."""
    stride_h = tl.where(of_q, q_h, k_h).to(tl.int64)
    x = tl.where(of_q, q, k) + batch * tl.where(of_q, q_b, k_b) + head * stride_h
    return x, stride_h, tl.where(of_q, q_s, k_s).to(tl.int64), tl.where(of_q, q_d, k_d).to(tl.int64)


@triton.jit(do_not_specialize=_SIZES)
def rotate_kernel(
    q, k, q_out, k_out, q_low, k_low, first, second, amplitude, scale, seq, blocks, q_heads, k_heads, q_groups,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, q_out_b, q_out_h, q_out_s, q_out_d, k_out_b, k_out_h, k_out_s, k_out_d,
    first_b, first_s, first_h, second_b, second_s, second_h, amplitude_b, amplitude_s, amplitude_h,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, TAIL: tl.constexpr, TAIL_BLOCK: tl.constexpr,
    BLOCK_SEQ: tl.constexpr, HEADS: tl.constexpr, TABLE: tl.constexpr, PER_TOKEN: tl.constexpr,
    AMPLITUDE: tl.constexpr, CONJUGATE: tl.constexpr, INTERLEAVED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Rotated q and k. TAIL is the number of channels to copy: 0 in place, where they stay as they are."""
    batch, rows = _place(blocks, BLOCK_SEQ)
    cos, sin = _cos_sin(
        first, second, amplitude, scale, batch, rows, seq,
        first_b, first_s, first_h, second_b, second_s, second_h, amplitude_b, amplitude_s, amplitude_h,
        HALF, HALF_BLOCK, TABLE, PER_TOKEN, AMPLITUDE, CONJUGATE,
    )  # fmt: skip
    of_q, head, heads = _heads(q_heads, k_heads, q_groups, HEADS)
    x, x_h, x_s, x_d = _choose(of_q, q, k, batch, head, q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d)
    out, out_h, out_s, out_d = _choose(
        of_q, q_out, k_out, batch, head, q_out_b, q_out_h, q_out_s, q_out_d, k_out_b, k_out_h, k_out_s, k_out_d
    )
    low = tl.where(of_q, q_low, k_low)
    for _ in range(heads):
        x0, x1 = _load_pairs(x, rows, seq, x_s, x_d, HALF, HALF_BLOCK, INTERLEAVED)
        y0, y1 = _turned(x0, x1, cos, sin)
        _store_pairs(out, y0, y1, rows, seq, out_s, out_d, low, HALF, HALF_BLOCK, INTERLEAVED, SPLIT)
        if TAIL > 0:
            rest = _load_tail(x, rows, seq, x_s, x_d, HALF, TAIL, TAIL_BLOCK)
            _store_tail(out, rest, rows, seq, out_s, out_d, low, HALF, TAIL, TAIL_BLOCK, SPLIT)
        x += x_h
        out += out_h


@triton.jit(do_not_specialize=_SIZES)
def rotate_backward_kernel(
    q_grad, k_grad, q, k, q_out, k_out, along, across, batches,
    first, second, amplitude, scale, seq, blocks, q_heads, k_heads, q_groups,
    q_grad_b, q_grad_h, q_grad_s, q_grad_d, k_grad_b, k_grad_h, k_grad_s, k_grad_d,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, q_out_b, q_out_h, q_out_s, q_out_d, k_out_b, k_out_h, k_out_s, k_out_d,
    first_b, first_s, first_h, second_b, second_s, second_h, amplitude_b, amplitude_s, amplitude_h,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, TAIL: tl.constexpr, TAIL_BLOCK: tl.constexpr,
    BLOCK_SEQ: tl.constexpr, HEADS: tl.constexpr, TABLE: tl.constexpr, PER_TOKEN: tl.constexpr,
    AMPLITUDE: tl.constexpr, CONJUGATE: tl.constexpr, INTERLEAVED: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """The gradients turned back, and per group of heads, token and pair what the angles' gradients are made of.

    With x the saved q or k and g the gradient, `along` is the sum over heads of x0 g0 + x1 g1 (where ALONG) and
    `across` of x0 g1 - x1 g0: [groups, batch, seq, HALF] in float32. Every number is written by one program alone.
    """
    batch, rows = _place(blocks, BLOCK_SEQ)
    cos, sin = _cos_sin(
        first, second, amplitude, scale, batch, rows, seq,
        first_b, first_s, first_h, second_b, second_s, second_h, amplitude_b, amplitude_s, amplitude_h,
        HALF, HALF_BLOCK, TABLE, PER_TOKEN, AMPLITUDE, CONJUGATE,
    )  # fmt: skip
    of_q, head, heads = _heads(q_heads, k_heads, q_groups, HEADS)
    grad, grad_h, grad_s, grad_d = _choose(
        of_q, q_grad, k_grad, batch, head,
        q_grad_b, q_grad_h, q_grad_s, q_grad_d, k_grad_b, k_grad_h, k_grad_s, k_grad_d,
    )  # fmt: skip
    x, x_h, x_s, x_d = _choose(of_q, q, k, batch, head, q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d)
    out, out_h, out_s, out_d = _choose(
        of_q, q_out, k_out, batch, head, q_out_b, q_out_h, q_out_s, q_out_d, k_out_b, k_out_h, k_out_s, k_out_d
    )
    sum_along = tl.zeros((BLOCK_SEQ, HALF_BLOCK), tl.float32)
    sum_across = tl.zeros((BLOCK_SEQ, HALF_BLOCK), tl.float32)
    for _ in range(heads):
        g0, g1 = _load_pairs(grad, rows, seq, grad_s, grad_d, HALF, HALF_BLOCK, INTERLEAVED)
        x0, x1 = _load_pairs(x, rows, seq, x_s, x_d, HALF, HALF_BLOCK, INTERLEAVED)
        if ALONG:
            sum_along += tl.fma(x0, g0, x1 * g1)
        sum_across += tl.fma(x0, g1, -(x1 * g0))
        y0, y1 = _turned(g0, g1, cos, sin)
        _store_pairs(out, y0, y1, rows, seq, out_s, out_d, 0, HALF, HALF_BLOCK, INTERLEAVED, False)
        if TAIL > 0:
            rest = _load_tail(grad, rows, seq, grad_s, grad_d, HALF, TAIL, TAIL_BLOCK)
            _store_tail(out, rest, rows, seq, out_s, out_d, 0, HALF, TAIL, TAIL_BLOCK, False)
        grad += grad_h
        x += x_h
        out += out_h
    pairs = tl.arange(0, HALF_BLOCK)[None, :].to(tl.int64)
    at = ((tl.program_id(1).to(tl.int64) * batches + batch) * seq + rows[:, None]) * HALF + pairs
    mask = (rows < seq)[:, None] & (pairs < HALF)
    tl.store(across + at, sum_across, mask=mask)
    if ALONG:
        tl.store(along + at, sum_along, mask=mask)


@triton.jit
def _load_weight(weight, offset, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    pairs = tl.arange(0, HALF_BLOCK)
    mask = pairs < HALF
    first = weight + (2 * pairs if INTERLEAVED else pairs)
    second = first + (1 if INTERLEAVED else HALF)
    w0 = tl.load(first, mask=mask, other=0.0).to(tl.float32) + offset
    w1 = tl.load(second, mask=mask, other=0.0).to(tl.float32) + offset
    return w0[None, :], w1[None, :]


@triton.jit
def _load_weight_tail(weight, offset, HALF: tl.constexpr, TAIL: tl.constexpr, TAIL_BLOCK: tl.constexpr):
    channels = tl.arange(0, TAIL_BLOCK)
    return (tl.load(weight + 2 * HALF + channels, mask=channels < TAIL, other=0.0).to(tl.float32) + offset)[None, :]


@triton.jit(do_not_specialize=_SIZES)
def norm_rotate_kernel(
    q, k, q_out, k_out, q_weight, k_weight, eps, offset,
    first, second, amplitude, scale, seq, blocks, q_heads, k_heads, q_groups,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, q_out_b, q_out_h, q_out_s, q_out_d, k_out_b, k_out_h, k_out_s, k_out_d,
    first_b, first_s, first_h, second_b, second_s, second_h, amplitude_b, amplitude_s, amplitude_h,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, TAIL: tl.constexpr, TAIL_BLOCK: tl.constexpr,
    BLOCK_SEQ: tl.constexpr, HEADS: tl.constexpr, TABLE: tl.constexpr, PER_TOKEN: tl.constexpr,
    AMPLITUDE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Each head of q and k over its root mean square, times (offset + weight), rotated."""
    batch, rows = _place(blocks, BLOCK_SEQ)
    cos, sin = _cos_sin(
        first, second, amplitude, scale, batch, rows, seq,
        first_b, first_s, first_h, second_b, second_s, second_h, amplitude_b, amplitude_s, amplitude_h,
        HALF, HALF_BLOCK, TABLE, PER_TOKEN, AMPLITUDE, False,
    )  # fmt: skip
    of_q, head, heads = _heads(q_heads, k_heads, q_groups, HEADS)
    x, x_h, x_s, x_d = _choose(of_q, q, k, batch, head, q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d)
    out, out_h, out_s, out_d = _choose(
        of_q, q_out, k_out, batch, head, q_out_b, q_out_h, q_out_s, q_out_d, k_out_b, k_out_h, k_out_s, k_out_d
    )
    weight = tl.where(of_q, q_weight, k_weight)
    w0, w1 = _load_weight(weight, offset, HALF, HALF_BLOCK, INTERLEAVED)
    for _ in range(heads):
        x0, x1 = _load_pairs(x, rows, seq, x_s, x_d, HALF, HALF_BLOCK, INTERLEAVED)
        squares = tl.sum(x0 * x0 + x1 * x1, 1)
        if TAIL > 0:
            rest = _load_tail(x, rows, seq, x_s, x_d, HALF, TAIL, TAIL_BLOCK)
            squares += tl.sum(rest * rest, 1)
        inverse = tl.rsqrt(squares / (2 * HALF + TAIL) + eps)[:, None]
        y0, y1 = _turned(x0 * inverse * w0, x1 * inverse * w1, cos, sin)
        _store_pairs(out, y0, y1, rows, seq, out_s, out_d, 0, HALF, HALF_BLOCK, INTERLEAVED, False)
        if TAIL > 0:
            rest = rest * inverse * _load_weight_tail(weight, offset, HALF, TAIL, TAIL_BLOCK)
            _store_tail(out, rest, rows, seq, out_s, out_d, 0, HALF, TAIL, TAIL_BLOCK, False)
        x += x_h
        out += out_h


@triton.jit(do_not_specialize=_SIZES)
def norm_rotate_backward_kernel(
    q_grad, k_grad, q, k, q_out, k_out, weight_grad, q_weight, k_weight, eps, offset,
    first, second, amplitude, scale, seq, blocks, q_heads, k_heads, q_groups,
    q_grad_b, q_grad_h, q_grad_s, q_grad_d, k_grad_b, k_grad_h, k_grad_s, k_grad_d,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, q_out_b, q_out_h, q_out_s, q_out_d, k_out_b, k_out_h, k_out_s, k_out_d,
    first_b, first_s, first_h, second_b, second_s, second_h, amplitude_b, amplitude_s, amplitude_h,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, TAIL: tl.constexpr, TAIL_BLOCK: tl.constexpr,
    BLOCK_SEQ: tl.constexpr, HEADS: tl.constexpr, TABLE: tl.constexpr, PER_TOKEN: tl.constexpr,
    AMPLITUDE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k, and per program that of the weight: [programs of axis 0, programs of axis 1, head_dim].

    With n the normalised head and m the gradient turned back times the weight, that of x is
    `(m - n mean(m n)) / rms`, and the weight's the sum of the gradient turned back times n.
    """
    batch, rows = _place(blocks, BLOCK_SEQ)
    cos, sin = _cos_sin(
        first, second, amplitude, scale, batch, rows, seq,
        first_b, first_s, first_h, second_b, second_s, second_h, amplitude_b, amplitude_s, amplitude_h,
        HALF, HALF_BLOCK, TABLE, PER_TOKEN, AMPLITUDE, True,
    )  # fmt: skip
    of_q, head, heads = _heads(q_heads, k_heads, q_groups, HEADS)
    grad, grad_h, grad_s, grad_d = _choose(
        of_q, q_grad, k_grad, batch, head,
        q_grad_b, q_grad_h, q_grad_s, q_grad_d, k_grad_b, k_grad_h, k_grad_s, k_grad_d,
    )  # fmt: skip
    x, x_h, x_s, x_d = _choose(of_q, q, k, batch, head, q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d)
    out, out_h, out_s, out_d = _choose(
        of_q, q_out, k_out, batch, head, q_out_b, q_out_h, q_out_s, q_out_d, k_out_b, k_out_h, k_out_s, k_out_d
    )
    weight = tl.where(of_q, q_weight, k_weight)
    w0, w1 = _load_weight(weight, offset, HALF, HALF_BLOCK, INTERLEAVED)
    w0_grad = tl.zeros((BLOCK_SEQ, HALF_BLOCK), tl.float32)
    w1_grad = tl.zeros((BLOCK_SEQ, HALF_BLOCK), tl.float32)
    tail_grad = tl.zeros((BLOCK_SEQ, TAIL_BLOCK), tl.float32)
    size: tl.constexpr = 2 * HALF + TAIL
    for _ in range(heads):
        g0, g1 = _load_pairs(grad, rows, seq, grad_s, grad_d, HALF, HALF_BLOCK, INTERLEAVED)
        g0, g1 = _turned(g0, g1, cos, sin)
        x0, x1 = _load_pairs(x, rows, seq, x_s, x_d, HALF, HALF_BLOCK, INTERLEAVED)
        squares = tl.sum(x0 * x0 + x1 * x1, 1)
        products = tl.sum(x0 * g0 * w0 + x1 * g1 * w1, 1)
        if TAIL > 0:
            rest = _load_tail(x, rows, seq, x_s, x_d, HALF, TAIL, TAIL_BLOCK)
            rest_grad = _load_tail(grad, rows, seq, grad_s, grad_d, HALF, TAIL, TAIL_BLOCK)
            rest_weight = _load_weight_tail(weight, offset, HALF, TAIL, TAIL_BLOCK)
            squares += tl.sum(rest * rest, 1)
            products += tl.sum(rest * rest_grad * rest_weight, 1)
        inverse = tl.rsqrt(squares / size + eps)
        back = (products / size * inverse * inverse)[:, None]
        inverse = inverse[:, None]
        w0_grad += g0 * x0 * inverse
        w1_grad += g1 * x1 * inverse
        y0, y1 = (g0 * w0 - x0 * back) * inverse, (g1 * w1 - x1 * back) * inverse
        _store_pairs(out, y0, y1, rows, seq, out_s, out_d, 0, HALF, HALF_BLOCK, INTERLEAVED, False)
        if TAIL > 0:
            tail_grad += rest_grad * rest * inverse
            rest = (rest_grad * rest_weight - rest * back) * inverse
            _store_tail(out, rest, rows, seq, out_s, out_d, 0, HALF, TAIL, TAIL_BLOCK, False)
        grad += grad_h
        x += x_h
        out += out_h
    pairs = tl.arange(0, HALF_BLOCK)
    row = weight_grad + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * size
    at = row + (2 * pairs if INTERLEAVED else pairs)
    tl.store(at, tl.sum(w0_grad, 0), mask=pairs < HALF)
    tl.store(at + (1 if INTERLEAVED else HALF), tl.sum(w1_grad, 0), mask=pairs < HALF)
    if TAIL > 0:
        channels = tl.arange(0, TAIL_BLOCK)
        tl.store(row + 2 * HALF + channels, tl.sum(tail_grad, 0), mask=channels < TAIL)
