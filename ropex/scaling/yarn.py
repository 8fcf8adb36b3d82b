"""YaRN: interpolation by parts of the spectrum, and a temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ropex._checks import require_choice, require_number
from ropex.rotation import Geometry, Request, Rotation
from ropex.scaling.base import FrequencySchedule, require_factor

__all__ = ["YaRN"]


@dataclass(frozen=True)
class YaRN(FrequencySchedule):
    """Slow pairs are interpolated, fast pairs kept, with a ramp between: `theta_i (ramp_i / s + 1 - ramp_i)`.

    s is the factor and L the trained length. A pair that turns r times over L tokens sits at index
    `dim * ln(L / (2 pi r)) / (2 ln base)`; the ramp rises from 0 at the index of `beta_fast` turns to 1 at the index of
    `beta_slow`. Cos and sin are multiplied by `0.1 ln s + 1`, which lowers the attention's temperature.

    Use it first: without training it is the most robust of the closed forms, and it needs the least fine-tuning.

    Args:
        factor: target length / trained length, >= 1.
        beta_fast: pairs with more turns over the trained length keep their frequency.
        beta_slow: pairs with fewer turns are interpolated in full.
        ramp: `"index"`, linear in the pair's index: the released code and every deployed checkpoint; `"rotations"`,
            linear in the number of turns: the paper's equation 18. They differ by up to 3x in a frequency.
        blend: `"frequency"` blends frequencies; `"wavelength"` blends scales, `theta_i / (ramp_i s + 1 - ramp_i)`, as
            PoSE's code does.
        truncate: the ramp's ends are whole indices (floor and ceil); only for `ramp="index"`.
        amplitude: replaces `0.1 ln s + 1`, as transformers' `attention_factor` does. (The YaRN repository's
            `attn_factor` multiplies instead: pass the product.)
        mscale, mscale_all_dim: DeepSeek's pair; the amplitude is then
            `(0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1)`.

    Example:
        >>> round(YaRN(factor=4).at(Geometry(dim=8, base=10_000.0, trained_length=2048), length=4).amplitude, 4)
        1.1386

    Reference: Peng et al., YaRN: Efficient Context Window Extension of Large Language Models, 2023, arXiv:2309.00071,
    eq. 18 to 22.
    """

    factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    ramp: Literal["index", "rotations"] = "index"
    blend: Literal["frequency", "wavelength"] = "frequency"
    truncate: bool = True
    amplitude: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    method: ClassVar[str] = "yarn"

    def __post_init__(self) -> None:
        require_factor(self.factor)
        require_number("beta_slow", self.beta_slow, minimum=0, strict=True, remedy="pass a number of turns, such as 1")
        require_number("beta_fast", self.beta_fast, minimum=0, strict=True, remedy="pass a number of turns, such as 32")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"beta_fast={self.beta_fast!r}, beta_slow={self.beta_slow!r}: beta_fast must be the larger, since fast "
                "pairs turn more often; swap them"
            )
        require_choice("ramp", self.ramp, ("index", "rotations"))
        require_choice("blend", self.blend, ("frequency", "wavelength"))
        if not isinstance(self.truncate, bool):
            raise ValueError(f"truncate={self.truncate!r}: must be True or False; transformers' default is True")
        for name in ("amplitude", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), minimum=0, strict=True, remedy="pass a number, or None")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError(
                f"mscale={self.mscale!r}, mscale_all_dim={self.mscale_all_dim!r}: one has no effect without the other; "
                "pass both, or amplitude="
            )
        if self.amplitude is not None and self.mscale is not None:
            raise ValueError(
                f"amplitude={self.amplitude!r} with mscale={self.mscale!r}: amplitude replaces what mscale computes; "
                "pass one of them"
            )

    def rotation(self, request: Request) -> Rotation:
        inv_freq = request.inv_freq()
        ramp = self._ramp(request.geometry, inv_freq)
        if self.blend == "frequency":
            inv_freq = inv_freq / self.factor * ramp + inv_freq * (1 - ramp)
        else:
            inv_freq = inv_freq / (ramp * self.factor + (1 - ramp))
        return Rotation(request.positions, inv_freq, self._amplitude())

    def _ramp(self, geometry: Geometry, inv_freq: Tensor) -> Tensor:
        """How much of each pair is interpolated, 0 to 1."""
        if self.ramp == "rotations":
            turns = inv_freq * (geometry.trained_length / (2 * math.pi))
            return 1 - ((turns - self.beta_slow) / (self.beta_fast - self.beta_slow)).clamp(0, 1)
        low, high = self._correction_range(geometry)
        index = torch.arange(geometry.dim // 2, dtype=inv_freq.dtype, device=inv_freq.device)
        return ((index - low) / (high - low)).clamp(0, 1)

    def _correction_range(self, geometry: Geometry) -> tuple[float, float]:
        """The pair indices between which the ramp rises."""

        def index_of(turns: float) -> float:
            wavelengths = geometry.trained_length / (2 * math.pi * turns)
            return geometry.dim * math.log(wavelengths) / (2 * math.log(geometry.base))

        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, geometry.dim - 1)
        return low, high + 0.001 if low == high else high  # the released code's guard against a zero width

    def _amplitude(self) -> float:
        if self.amplitude is not None:
            return self.amplitude
        log = math.log(self.factor)
        if self.mscale is not None and self.mscale_all_dim is not None:
            return (0.1 * self.mscale * log + 1) / (0.1 * self.mscale_all_dim * log + 1)
        return 0.1 * log + 1
