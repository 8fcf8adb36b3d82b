"""The unscaled embedding, and position interpolation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ropex.rotation import Request, Rotation
from ropex.scaling.base import FrequencySchedule, require_factor

__all__ = ["PositionInterpolation", "Unscaled"]


@dataclass(frozen=True)
class Unscaled(FrequencySchedule):
    """The model as it was trained: `theta_i = base ** (-2 i / dim)`.

    Use it as the baseline, and where only the exact angles and the float32 rotation are wanted.

    Example:
        >>> Unscaled().at(Geometry(dim=8, base=10_000.0, trained_length=2048), length=4).inv_freq[0].item()
        1.0

    Reference: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv:2104.09864, eq. 15.
    """

    method: ClassVar[str] = "none"
    paper: ClassVar[str] = "Su et al. 2021, arXiv:2104.09864"
    target: ClassVar[str | None] = None

    def rotation(self, request: Request) -> Rotation:
        return Rotation(request.positions, request.inv_freq())


@dataclass(frozen=True)
class PositionInterpolation(FrequencySchedule):
    """Every frequency divided by the factor: `theta_i / factor`, so that no angle exceeds those seen in training.

    Use it before fine-tuning at the target length. Without training it blurs neighbouring tokens at every length.

    Args:
        factor: target length / trained length, >= 1.

    Example:
        >>> geometry = Geometry(dim=8, base=10_000.0, trained_length=2048)
        >>> PositionInterpolation(factor=4).at(geometry, length=4).inv_freq[0].item()
        0.25

    Reference: Chen et al., Extending Context Window of Large Language Models via Positional Interpolation, 2023,
    arXiv:2306.15595, eq. 4.
    """

    factor: float
    method: ClassVar[str] = "linear"
    paper: ClassVar[str] = "Chen et al. 2023, arXiv:2306.15595"
    training_free = False

    def __post_init__(self) -> None:
        require_factor(self.factor)

    def rotation(self, request: Request) -> Rotation:
        return Rotation(request.positions, request.inv_freq() / self.factor)
