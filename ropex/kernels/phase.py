"""Exact angles by integer phase.

A frequency is kept as a 64-bit fixed-point fraction of a turn. Its product with an int64 position wraps modulo 2**64,
which is modulo one turn: the range reduction is exact at any position, negative ones and those beyond 2**31 included,
and `phase(m) - phase(n) == phase(m - n)` holds bit for bit. The frequency itself is off by at most 2**-65 turns plus
the rounding of float64, which is 1e-9 radians at position ten million.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ropex.rotation import widest_float

__all__ = ["cos_sin", "fixed_frequency", "phase"]

_UNITS_PER_TURN = 2.0**64


def fixed_frequency(inv_freq: Tensor) -> Tensor:
    """`inv_freq` (radians per token, any shape) as int64 units of 2**-64 turns per token, wrapped to one turn."""
    turns = inv_freq.to(widest_float(inv_freq.device)) / (2 * math.pi)
    turns = turns - torch.floor(turns + 0.5)  # [-1/2, 1/2), so that the product below fits int64
    return torch.round(turns * _UNITS_PER_TURN).to(torch.int64)


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
    wrapped = phase(positions, fixed_frequency(inv_freq.detach()))
    angle = wrapped.to(widest_float(wrapped.device)) * (2 * math.pi / _UNITS_PER_TURN)
    if inv_freq.requires_grad:
        # Integer phase has no derivative; that of the plain product, which is the position, comes in with a value of 0.
        product = positions[..., None] * inv_freq
        angle = angle + (product - product.detach())
    return angle.cos().to(dtype), angle.sin().to(dtype)
