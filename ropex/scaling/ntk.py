"""Larger bases: NTK-aware scaling, static and dynamic, and an adjusted base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ropex._checks import require_number
from ropex.rotation import Request, Rotation
from ropex.scaling.base import FrequencySchedule, growth, ntk_stretched, pair_index, require_factor, require_floor

__all__ = ["AdjustedBase", "DynamicNTK", "NTKAware"]


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
    paper: ClassVar[str] = "bloc97 2023; arXiv:2309.00071, eq. 16"

    def __post_init__(self) -> None:
        require_factor(self.factor)
        if self.alpha is not None:
            require_number("alpha", self.alpha, minimum=1, remedy="pass the stretch of the lowest frequency, or None")

    def rotation(self, request: Request) -> Rotation:
        alpha = self.factor if self.alpha is None else self.alpha
        return Rotation(request.positions, ntk_stretched(request.inv_freq(), alpha))


@dataclass(frozen=True)
class DynamicNTK(FrequencySchedule):
    """NTK-aware scaling by the length at hand: `alpha = factor * n / L - (factor - 1)` for n > L, else 1.

    n is the context length of the pass and L the trained length: up to L nothing changes. Use it without training when
    lengths vary. Cached keys carry the frequencies of the length at which they were made, so a generation keeps one
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
    paper: ClassVar[str] = "emozilla 2023; arXiv:2309.00071, section 3.3"
    target: ClassVar[str | None] = "floor"
    length_dependent = True

    def __post_init__(self) -> None:
        require_factor(self.factor)
        require_floor(self.floor)

    def rotation(self, request: Request) -> Rotation:
        grown = growth(request, self.floor)
        alpha = torch.where(grown > 1, self.factor * grown - (self.factor - 1), 1.0)
        return Rotation(request.positions, ntk_stretched(request.inv_freq(), alpha))


@dataclass(frozen=True)
class AdjustedBase(FrequencySchedule):
    """Another base: `base' ** (-2 i / dim)`.

    Use it before continued pretraining at the target length (ABF), with a base well above the NTK-aware one, such as
    500 000 in place of 10 000 for 32k tokens; or as `ntk` that says its base.

    Args:
        factor: target length / trained length, >= 1; it sets the target, and the base where `base` is left out.
        base: the new base, > 1; by default that of NTK-aware scaling, `base * factor ** (dim / (dim - 2))`.

    Note:
        The frequencies are the model's own times `(base' / base) ** (-2 i / dim)`: they keep the model's float32
        rounding, and differ from those of a model loaded with the new `rope_theta` by 1e-7 relative.

    Example:
        >>> geometry = Geometry(dim=8, base=10_000.0, trained_length=2048)
        >>> round(AdjustedBase(base=160_000.0).at(geometry, length=4).inv_freq[2].item(), 6)
        0.0025

    Reference: Xiong et al., Effective Long-Context Scaling of Foundation Models, 2023, arXiv:2309.16039, section 4.1.
    """

    factor: float | None = None
    base: float | None = None
    method: ClassVar[str] = "abf"
    paper: ClassVar[str] = "Xiong et al. 2023, arXiv:2309.16039"
    training_free = False

    def __post_init__(self) -> None:
        if self.factor is None and self.base is None:
            raise ValueError('method "abf" without base and factor: it needs one of them; pass base=, such as 500000.0')
        if self.factor is not None:
            require_factor(self.factor)
        if self.base is not None:
            require_number("base", self.base, minimum=1, strict=True, remedy="pass the new base, such as 500000.0")

    def rotation(self, request: Request) -> Rotation:
        inv_freq, geometry = request.inv_freq(), request.geometry
        if self.base is None:
            return Rotation(request.positions, ntk_stretched(inv_freq, self.factor or 1))
        exponent = -2 * pair_index(inv_freq) / geometry.dim
        return Rotation(request.positions, inv_freq * (self.base / geometry.base) ** exponent)
