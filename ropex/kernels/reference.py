"""The rotation in plain PyTorch: what every other backend must equal."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ropex.kernels.phase import cos_sin

__all__ = [
    "Source",
    "angle_gradients",
    "empty_output",
    "full_table",
    "half_table",
    "norm_one",
    "rotate_one",
    "source_gradients",
]


class Source(NamedTuple):
    """Where cos and sin come from, in the one form that every backend takes.

    Attributes:
        first: int64 positions [1 or batch, seq]; or, as a table, cos [1 or batch, seq, half].
        second: inv_freq [1 or batch, 1 or seq, half]; or sin, like cos.
        amplitude: None, or a tensor of three dimensions that broadcasts against [batch, seq, half].
        scale: a number that multiplies cos and sin.
        table: which of the two `first` and `second` are; a table has its amplitude in it.
    """

    first: Tensor
    second: Tensor
    amplitude: Tensor | None = None
    scale: float = 1.0
    table: bool = False

    def tables(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cos and sin with the amplitude in them, each [1 or batch, seq, half]."""
        if self.table:
            return self.first.to(dtype), self.second.to(dtype)
        cos, sin = cos_sin(self.first, self.second, dtype)
        if self.amplitude is not None:
            amplitude = self.amplitude.to(dtype)
            cos, sin = cos * amplitude, sin * amplitude
        return (cos * self.scale, sin * self.scale) if self.scale != 1 else (cos, sin)


def empty_output(x: Tensor, dtype: torch.dtype, *, split: bool = False) -> Tensor:
    """Room for a rotated x, [batch, heads, seq, head_dim] in x's order of memory; for both its parts where split."""
    if split:
        return x.new_empty((2, *x.shape), dtype=dtype)
    return torch.empty_like(x, dtype=dtype)


def rotate_one(
    x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, dtype: torch.dtype, split: bool = False
) -> Tensor:
    """`x` with its leading `2 * half` channels rotated.

    The products and sums are the ones of transformers, in its order, so that equal tables give equal bits in float32.

    Args:
        x: [batch, heads, seq, head_dim], any strides.
        cos, sin: [1 or batch, seq, half] in the dtype of the arithmetic.
        interleaved: whether the pairs are (2 i, 2 i + 1) instead of (i, half + i).
        dtype: of the result.
        split: return the result's rounding to `dtype` and that of what the rounding left, [2, ...].
    """
    cos, sin = cos[:, None], sin[:, None]
    half = cos.shape[-1]
    wide = x.to(cos.dtype)
    turning, rest = wide[..., : 2 * half], wide[..., 2 * half :]
    first, second = _pairs(turning, interleaved)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if split:
        highs = [part.to(dtype) for part in (*parts, rest)]
        # What rounding left has no slope: it is not differentiated.
        lows = [
            (part - high.to(part.dtype)).detach().to(dtype) for part, high in zip((*parts, rest), highs, strict=True)
        ]
        return torch.stack([_joined(part, interleaved) for part in (highs, lows)])
    return _joined([*(part.to(dtype) for part in parts), rest.to(dtype)], interleaved)


def norm_one(x: Tensor, weight: Tensor, *, eps: float, offset: float) -> Tensor:
    """Each head over its root mean square, times (offset + weight); in the wider of x's dtype and float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.to(wide.dtype) + offset)


def angle_gradients(x: Tensor, grad: Tensor, half: int, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Sums over heads, [batch, seq, half], of `x0 g0 + x1 g1` and `x0 g1 - x1 g0`, in the wider of the dtypes."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, grad.dtype), torch.float32)
    (x0, x1), (g0, g1) = (_pairs(t[..., : 2 * half].to(dtype), interleaved) for t in (x, grad))
    return (x0 * g0 + x1 * g1).sum(1), (x0 * g1 - x1 * g0).sum(1)


def source_gradients(
    source: Source, along: Tensor, across: Tensor, *, of_outputs: bool, conjugate: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The gradients of a source's `first`, `second` and `amplitude`, from the sums of `angle_gradients`.

    With outputs o and their gradients g, an angle's gradient is the sum over heads of `o0 g1 - o1 g0`. Inputs x give
    those of cos and sin, `x0 g0 + x1 g1` and `x0 g1 - x1 g0`, from which the others follow.

    Args:
        source: of the forward pass.
        along, across: from `angle_gradients`, of the outputs where `of_outputs`, else of the inputs.
        conjugate: whether the forward pass turned backwards.
    """
    if conjugate:
        across = -across
    if source.table:
        cos_grad, sin_grad = along.sum_to_size(source.first.shape), across.sum_to_size(source.second.shape)
        return cos_grad.to(source.first.dtype), sin_grad.to(source.second.dtype), None
    amplitude_grad = None
    angle_grad = across
    if not of_outputs:
        cos, sin = cos_sin(source.first, source.second.detach(), torch.float32)
        angle_grad = (across * cos - along * sin) * source.scale
        if source.amplitude is not None:
            angle_grad = angle_grad * source.amplitude
            amplitude_grad = (along * cos + across * sin) * source.scale
            amplitude_grad = amplitude_grad.sum_to_size(source.amplitude.shape).to(source.amplitude.dtype)
    frequency_grad = (source.first[..., None] * angle_grad).sum_to_size(source.second.shape)
    return None, frequency_grad.to(source.second.dtype), amplitude_grad


def full_table(half: Tensor, layout: str) -> Tensor:
    """A table that holds each pair's value twice, [..., 2 * half]."""
    return torch.cat((half, half), dim=-1) if layout == "half" else half.repeat_interleave(2, dim=-1)


def half_table(full: Tensor, layout: str) -> Tensor:
    """The view of a full table that holds each pair's value once, [..., half]."""
    return full[..., : full.shape[-1] // 2] if layout == "half" else full[..., ::2]


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def _joined(parts: list[Tensor], interleaved: bool) -> Tensor:
    first, second, rest = parts
    if interleaved:
        return torch.cat((torch.stack((first, second), dim=-1).flatten(-2), rest), dim=-1)
    return torch.cat((first, second, rest), dim=-1)
