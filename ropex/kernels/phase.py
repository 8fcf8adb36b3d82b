"""Exact angles by integer phase.

A frequency is kept as a 64-bit fixed-point fraction of a turn. Its product with an int64 position wraps modulo 2**64,
which is modulo one turn: the range reduction is exact at any position, negative ones and those beyond 2**31 included,
and `phase(m) - phase(n) == phase(m - n)` holds bit for bit. The frequency itself is off by the rounding of float64,
which is 1e-9 radians at position ten million, 1e-7 at 2**31 and 1e-4 at 2**40.

`fixed_frequency`, `phase` and `cos_sin_of_phase` are written in what PyTorch and Triton have in common, under the name
`xp`: the Triton kernels compile these very functions, so that a table and a kernel hold the same numbers.
"""

from __future__ import annotations

import math

import torch
import torch as xp
from torch import Tensor

from ropex.rotation import widest_float

__all__ = ["cos_sin", "fixed_frequency", "phase"]


def fixed_frequency(inv_freq):  # type: ignore[no-untyped-def]
    """`inv_freq` (radians per token, float64, any shape) as int64 units of 2**-64 turns per token, within one turn."""
    turns = inv_freq * 0.15915494309189535
    turns = turns - xp.floor(turns + 0.5)  # [-1/2, 1/2), so that the product below fits int64
    return xp.floor(turns * 18446744073709551616.0 + 0.5).to(xp.int64)


def cos_sin_of_phase(wrapped):  # type: ignore[no-untyped-def]
    """Cos and sin in float32 of int64 units of 2**-64 turns, off by 1.1e-7 at most.

    The quadrant comes from the top bits, the rest from polynomials on [-1/8, 1/8] turns: interpolants in the square of
    the angle at Chebyshev nodes, of degree 7 for sin and 8 for cos, off by less than 1e-9 before rounding.
    """
    top = (wrapped >> 32).to(xp.int32)
    quadrant = (top >> 30) + ((top >> 29) & 1)
    turns = ((top << 2) >> 2).to(xp.float32) * 2.3283064365386963e-10
    square = turns * turns
    sin = turns * (
        6.283185287812946 + square * (-41.34166257054795 + square * (81.59254287130155 + square * -75.40161270274746))
    )
    cos = 1.0 + square * (
        -19.739208789987508 + square * (64.93936905141977 + square * (-85.44882008965106 + square * 59.424105981756476))
    )
    odd = (quadrant & 1) == 1
    return (
        xp.where(odd, sin, cos) * (1 - ((quadrant + 1) & 2)).to(xp.float32),
        xp.where(odd, cos, sin) * (1 - (quadrant & 2)).to(xp.float32),
    )


def phase(positions: Tensor, frequency: Tensor) -> Tensor:
    """`positions * frequency` modulo one turn, exactly: int64 units of 2**-64 turns.

    Args:
        positions: int64 [batch, seq].
        frequency: int64 [half], [batch, 1, half] or [batch, seq, half], from `fixed_frequency`.

    Returns:
        int64 [batch, seq, half].
    """
    return positions[..., None] * frequency


def cos_sin(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cos and sin of `positions * inv_freq`, exact to the rounding of `dtype` at any position.

    Args:
        positions: int64 [batch, seq].
        inv_freq: radians per token, [half], [batch, 1, half] or [batch, seq, half]; gradients reach it.
        dtype: of the result, float32 or float64.

    Returns:
        Two tensors [batch, seq, half].
    """
    widest = widest_float(inv_freq.device)
    wrapped = phase(positions, fixed_frequency(inv_freq.detach().to(widest)))
    if dtype == torch.float64:
        angle = wrapped.to(torch.float64) * (2 * math.pi / 2.0**64)
        cos, sin = angle.cos(), angle.sin()
    else:
        cos, sin = cos_sin_of_phase(wrapped)
    if inv_freq.requires_grad:
        # Integer phase has no derivative; that of the plain product, which is the position, comes in with a value of 0.
        product = positions[..., None] * inv_freq.to(widest)
        angle = (product - product.detach()).to(dtype)
        unit, zero = angle.cos(), angle.sin()
        cos, sin = cos * unit - sin * zero, sin * unit + cos * zero
    return cos, sin
