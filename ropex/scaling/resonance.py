"""Resonance: wavelengths that are whole numbers of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ropex.rotation import Request, Rotation
from ropex.scaling.base import Wrapper

__all__ = ["Resonance"]


@dataclass(frozen=True)
class Resonance(Wrapper):
    """Each wavelength of another schedule rounded to whole tokens: `2 pi / round(2 pi / f_i)`.

    A pair then repeats its angles exactly, so that later positions show it no angle that it has not seen. Use it around
    YaRN, with fine-tuning or without.

    Args:
        inner: the schedule whose frequencies are rounded; its positions and amplitude stay.

    Note:
        Rounding has no slope. Gradients to a learned inner schedule pass as if it were not there.

    Example:
        >>> rotation = schedule("resonance", factor=4).at(Geometry(64, 10_000.0, 2048), length=1)
        >>> round((2 * torch.pi / rotation.inv_freq)[0].item(), 9)
        6.0

    Reference: Wang et al., Resonance RoPE: Improving Context Length Generalization of Large Language Models, 2024,
    arXiv:2403.00071, eq. 5.
    """

    method: ClassVar[str] = "resonance"
    paper: ClassVar[str] = "Wang et al. 2024, arXiv:2403.00071"
    default_inner: ClassVar[str] = "yarn"

    def rotation(self, request: Request) -> Rotation:
        positions, inv_freq, amplitude = self.inner.rotation(request)
        # A pair that does not turn has an infinite wavelength, and keeps it.
        rounded = 2 * math.pi / (2 * math.pi / inv_freq.detach()).round().clamp(min=1)
        return Rotation(positions, rounded + (inv_freq - inv_freq.detach()), amplitude)
