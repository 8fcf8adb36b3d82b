"""NTK-aware scaling, static and dynamic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ropex._checks import require_int, require_number
from ropex.rotation import Request, Rotation
from ropex.scaling.base import FrequencySchedule, require_factor

__all__ = ["DynamicNTK", "NTKAware"]


def ntk_inv_freq(inv_freq: Tensor, alpha: float | Tensor) -> Tensor:
    """`theta_i * alpha ** (-2 i / (dim - 2))`: the first pair unchanged, the last one divided by alpha.

    The same as `theta_i` of the base `base * alpha ** (dim / (dim - 2))`, but it keeps the model's own rounding.
    `alpha` is a number, 0-d, or [batch, 1, 1].
    """
    half = inv_freq.shape[-1]
    exponent = torch.arange(half, dtype=inv_freq.dtype, device=inv_freq.device) / max(half - 1, 1)
    return inv_freq * alpha**-exponent


@dataclass(frozen=True)
class NTKAware(FrequencySchedule):
    """A larger base: high frequencies keep, low ones stretch, `theta_i * alpha ** (-2 i / (dim - 2))`.

    Use it without training. A window of `factor` times the trained length needs an alpha above the factor.

    Args:
        factor: target length / trained length, >= 1.
        alpha: the stretch of the lowest frequency, >= 1; the factor by default.

    Example:
        >>> NTKAware(factor=4).at(Geometry(dim=8, base=10_000.0, trained_length=2048), length=4).inv_freq[0].item()
        1.0

    Reference: bloc97, NTK-Aware Scaled RoPE, 2023; Peng et al., YaRN, 2023, arXiv:2309.00071, eq. 16.
    """

    factor: float
    alpha: float | None = None
    method: ClassVar[str] = "ntk"

    def __post_init__(self) -> None:
        require_factor(self.factor)
        if self.alpha is not None:
            require_number("alpha", self.alpha, minimum=1, remedy="pass the stretch of the lowest frequency, or None")

    def rotation(self, request: Request) -> Rotation:
        alpha = self.factor if self.alpha is None else self.alpha
        return Rotation(request.positions, ntk_inv_freq(request.inv_freq(), alpha))


@dataclass(frozen=True)
class DynamicNTK(FrequencySchedule):
    """NTK-aware scaling by the length at hand: `alpha = factor * n / L - (factor - 1)` for n > L, else 1.

    n is the context length of the pass and L the trained length: up to L nothing changes. Use it without training when
    lengths vary. Cached keys carry the frequencies of the length at which they were made, so generation needs a pinned
    length (`Patch.pin_length`).

    Args:
        factor: growth of alpha with n / L, >= 1. It is transformers' `factor` of the type `dynamic`, not
            target length / trained length; 2 by default, which makes alpha = 2 n / L - 1.
        floor: tokens; shorter contexts are served as if they had this length, so that inside it the schedule is a
            static one. None: no floor. `patch(length=...)` sets it.

    Note:
        transformers keeps the frequencies of the longest context seen so far and shares one length across a batch. Here
        the frequencies are a function of the request alone, per row where lengths are given per row.

    Example:
        >>> DynamicNTK().at(Geometry(dim=8, base=10_000.0, trained_length=2), length=4).inv_freq[0].item()
        1.0

    Reference: emozilla, Dynamically Scaled RoPE, 2023; Peng et al., YaRN, 2023, arXiv:2309.00071, section 3.3.
    """

    factor: float = 2.0
    floor: int | None = None
    method: ClassVar[str] = "dynamic_ntk"
    target: ClassVar[str | None] = "floor"
    length_dependent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_factor(self.factor)
        if self.floor is not None:
            require_int("floor", self.floor, minimum=1, remedy="pass a length in tokens, or None for no floor")

    def rotation(self, request: Request) -> Rotation:
        inv_freq = request.inv_freq()
        length = request.length if self.floor is None else request.length.clamp(min=self.floor)
        growth = length.to(inv_freq.dtype) / request.geometry.trained_length
        alpha = torch.where(growth > 1, self.factor * growth - (self.factor - 1), 1.0)
        return Rotation(request.positions, ntk_inv_freq(inv_freq, alpha[:, None, None] if alpha.dim() else alpha))

    def target_length(self, trained_length: int) -> int:
        return self.floor if self.floor is not None else super().target_length(trained_length)
