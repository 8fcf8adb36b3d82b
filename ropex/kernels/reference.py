"""The rotation in plain PyTorch: what every other backend must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from ropex.kernels.phase import cos_sin
from ropex.rotation import Rotation

__all__ = ["make_table", "rotate_one"]


def make_table(rotation: Rotation, *, angles: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cos and sin of a rotation's angles times its amplitude, each [batch, seq, half] in `dtype`."""
    positions, inv_freq, amplitude = rotation
    if angles == "exact":
        cos, sin = cos_sin(positions, inv_freq, dtype)
    else:
        # transformers' arithmetic, operation by operation: the product is rounded to float32 before the reduction.
        angle = positions[..., None].to(torch.float32) * inv_freq.to(torch.float32)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    if isinstance(amplitude, Tensor):
        amplitude = amplitude.to(dtype)
    return cos * amplitude, sin * amplitude


def rotate_one(x: Tensor, cos: Tensor, sin: Tensor, *, layout: str) -> Tensor:
    """`x` with its leading `2 * half` channels rotated.

    The products and sums are the ones of transformers, in its order, so that equal tables give equal bits in float32.

    Args:
        x: [..., head_dim], any strides.
        cos, sin: [..., half] in the dtype of the arithmetic, broadcasting against x's leading dimensions.
        layout: `half` pairs channel i with half + i, `interleaved` pairs 2 i with 2 i + 1.
    """
    half = cos.shape[-1]
    turning, passing = x[..., : 2 * half].to(cos.dtype), x[..., 2 * half :]
    first, second = turning.chunk(2, dim=-1) if layout == "half" else (turning[..., 0::2], turning[..., 1::2])
    turned = (
        (first * cos - second * sin).to(x.dtype),
        (second * cos + first * sin).to(x.dtype),
    )
    if layout == "half":
        return torch.cat((*turned, passing), dim=-1)
    return torch.cat((torch.stack(turned, dim=-1).flatten(-2), passing), dim=-1)
