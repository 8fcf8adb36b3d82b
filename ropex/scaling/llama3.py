"""Llama 3.1's schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ropex._checks import require_number
from ropex.rotation import Request, Rotation
from ropex.scaling.base import FrequencySchedule, blended, ramp_by_rotations, require_factor

__all__ = ["Llama3"]


@dataclass(frozen=True)
class Llama3(FrequencySchedule):
    """Wavelengths above `L / low_freq_factor` are stretched by the factor, those below `L / high_freq_factor` kept.

    L is the trained length. Between the two the frequency is `(1 - c) theta_i / factor + c theta_i`, where
    `c = (L / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)`: YaRN's ramp by rotations with other
    bounds, and no temperature.

    Use it before continued pretraining, or to follow what Llama 3.1 and its kin were trained with.

    Args:
        factor: target length / trained length, >= 1.
        low_freq_factor: pairs with fewer turns over the trained length are interpolated in full.
        high_freq_factor: pairs with more turns keep their frequency. Where the two are equal there is no ramp
            (Llama 4 Scout: 1 and 1).

    Example:
        >>> geometry = Geometry(dim=128, base=500_000.0, trained_length=8192)
        >>> (Llama3(factor=8).at(geometry, length=4).inv_freq / geometry.inv_freq())[-1].item()
        0.125

    Reference: Grattafiori et al., The Llama 3 Herd of Models, 2024, arXiv:2407.21783; as in transformers' `llama3`.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    method: ClassVar[str] = "llama3"
    paper: ClassVar[str] = "Grattafiori et al. 2024, arXiv:2407.21783"
    training_free = False

    def __post_init__(self) -> None:
        require_factor(self.factor)
        for name in ("low_freq_factor", "high_freq_factor"):
            require_number(name, getattr(self, name), minimum=0, strict=True, remedy="pass a number of turns")
        if self.high_freq_factor < self.low_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor!r}, high_freq_factor={self.high_freq_factor!r}: "
                "high_freq_factor must not be the smaller, since fast pairs turn more often; swap them"
            )

    def rotation(self, request: Request) -> Rotation:
        inv_freq = request.inv_freq()
        ramp = ramp_by_rotations(request.geometry, inv_freq, self.high_freq_factor, self.low_freq_factor)
        return Rotation(request.positions, blended(inv_freq, self.factor, ramp))
