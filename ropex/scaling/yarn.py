"""Interpolation by parts of the spectrum: YaRN, without its temperature, and by the length at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from ropex._checks import require_choice
from ropex.rotation import Request, Rotation
from ropex.scaling.base import (
    Blend,
    FrequencySchedule,
    RampKind,
    blended,
    growth,
    ntk_stretched,
    ramp_by_index,
    ramp_by_rotations,
    require_factor,
    require_floor,
    require_positive,
    require_ramp,
)

__all__ = ["DynamicYaRN", "NTKByParts", "YaRN"]


class ByParts(FrequencySchedule):
    """What the schedules of this file share: slow pairs are interpolated, fast pairs kept, with a ramp between."""

    beta_fast: float
    beta_slow: float
    ramp: RampKind
    blend: Blend
    truncate: bool

    def __post_init__(self) -> None:
        require_ramp(self.beta_fast, self.beta_slow, self.ramp, self.blend, self.truncate)

    def interpolated(self, request: Request, factor: float | Tensor) -> Tensor:
        """The frequencies for a factor: a number, 0-d, or [batch, 1, 1]."""
        inv_freq, betas = request.inv_freq(), (self.beta_fast, self.beta_slow)
        if self.ramp == "index":
            ramp = ramp_by_index(request.geometry, inv_freq, *betas, truncate=self.truncate)
        else:
            ramp = ramp_by_rotations(request.geometry, inv_freq, *betas)
        return blended(inv_freq, factor, ramp, self.blend)


@dataclass(frozen=True)
class NTKByParts(ByParts):
    """YaRN's frequencies without its temperature: `theta_i (ramp_i / s + 1 - ramp_i)`.

    Use it where attention must not be rescaled, such as a model that normalises queries and keys after the rotation.

    Args:
        factor: target length / trained length, >= 1.
        beta_fast, beta_slow, ramp, blend, truncate: as in `YaRN`.
        variant: `"v2"`, the rule that became YaRN; `"v1"`, the first published one, which takes two ramps: from
            NTK-aware to interpolated frequencies between 1.25 and 0.75 turns, then to unscaled ones between 16 and 2.
            Its ramps are fixed: the other options have no part in it.

    Example:
        >>> geometry = Geometry(dim=8, base=10_000.0, trained_length=2048)
        >>> NTKByParts(factor=4).at(geometry, length=4).amplitude
        1.0

    Reference: bloc97, NTK-by-parts, 2023; Peng et al., YaRN, 2023, arXiv:2309.00071, section 3.2.
    """

    factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    ramp: RampKind = "index"
    blend: Blend = "frequency"
    truncate: bool = True
    variant: Literal["v1", "v2"] = "v2"
    method: ClassVar[str] = "ntk_by_parts"
    paper: ClassVar[str] = "bloc97 2023; arXiv:2309.00071, section 3.2"

    def __post_init__(self) -> None:
        require_factor(self.factor)
        super().__post_init__()
        require_choice("variant", self.variant, ("v1", "v2"))
        if self.variant == "v1" and replace(self, variant="v2") != NTKByParts(self.factor):
            raise ValueError(f'{self!r}: variant="v1" has fixed ramps; leave out all options but factor, or use "v2"')

    def rotation(self, request: Request) -> Rotation:
        if self.variant == "v2":
            return Rotation(request.positions, self.interpolated(request, self.factor))
        theta = request.inv_freq()
        slow = ramp_by_index(request.geometry, theta, 1.25, 0.75)
        fast = ramp_by_index(request.geometry, theta, 16.0, 2.0)
        inner = theta / self.factor * slow + ntk_stretched(theta, self.factor) * (1 - slow)
        return Rotation(request.positions, inner * fast + theta * (1 - fast))


@dataclass(frozen=True)
class YaRN(ByParts):
    """Slow pairs are interpolated, fast pairs kept, with a ramp between: `theta_i (ramp_i / s + 1 - ramp_i)`.

    s is the factor and L the trained length. A pair that turns r times over L tokens sits at index
    `dim * ln(L / (2 pi r)) / (2 ln base)`; the ramp rises from 0 at the index of `beta_fast` turns to 1 at the index of
    `beta_slow`. Cos and sin are multiplied by `0.1 ln s + 1`, which lowers the attention's temperature.

    Use it first: without training it is the most robust of the closed forms, and it needs the least fine-tuning.

    Args:
        factor: target length / trained length, >= 1.
        beta_fast: pairs with more turns over the trained length keep their frequency.
        beta_slow: pairs with fewer turns are interpolated in full; at most `beta_fast` (Kimi K2: 1 and 1).
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
    ramp: RampKind = "index"
    blend: Blend = "frequency"
    truncate: bool = True
    amplitude: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    method: ClassVar[str] = "yarn"
    paper: ClassVar[str] = "Peng et al. 2023, arXiv:2309.00071"

    def __post_init__(self) -> None:
        require_factor(self.factor)
        super().__post_init__()
        _require_amplitude(self.amplitude, self.mscale, self.mscale_all_dim)

    def rotation(self, request: Request) -> Rotation:
        log = math.log(self.factor)
        mscale, mscale_all_dim = self.mscale or 1.0, self.mscale_all_dim or 0.0
        computed = (0.1 * mscale * log + 1) / (0.1 * mscale_all_dim * log + 1)
        amplitude = computed if self.amplitude is None else self.amplitude
        return Rotation(request.positions, self.interpolated(request, self.factor), amplitude)


@dataclass(frozen=True)
class DynamicYaRN(ByParts):
    """YaRN by the length at hand: `s = max(1, n / L)`, in the frequencies and in the amplitude `0.1 ln s + 1`.

    n is the context length of the pass and L the trained length: up to L nothing changes, so that short texts keep
    their quality, which a static YaRN costs them. A generation keeps one length (`Patch.pin_length`).

    Args:
        floor: tokens; shorter contexts are served as if they had this length, so that inside it the schedule is a
            static YaRN. None: no floor. `patch(length=...)` sets it.
        beta_fast, beta_slow, ramp, blend, truncate: as in `YaRN`.

    Note:
        The released code leaves the amplitude at the value it was made with; here it follows s.

    Example:
        >>> geometry = Geometry(dim=8, base=10_000.0, trained_length=2048)
        >>> round(DynamicYaRN().at(geometry, length=8192).amplitude.item(), 4)
        1.1386

    Reference: Peng et al., YaRN, 2023, arXiv:2309.00071, section 3.3.
    """

    floor: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    ramp: RampKind = "index"
    blend: Blend = "frequency"
    truncate: bool = True
    method: ClassVar[str] = "dynamic_yarn"
    paper: ClassVar[str] = "Peng et al. 2023, arXiv:2309.00071, section 3.3"
    target: ClassVar[str | None] = "floor"
    length_dependent = True

    def __post_init__(self) -> None:
        require_floor(self.floor)
        super().__post_init__()

    def rotation(self, request: Request) -> Rotation:
        factor = growth(request, self.floor).clamp(min=1)
        return Rotation(request.positions, self.interpolated(request, factor), 0.1 * factor.log() + 1)


def _require_amplitude(amplitude: float | None, mscale: float | None, mscale_all_dim: float | None) -> None:
    require_positive("amplitude", amplitude)
    require_positive("mscale", mscale)
    require_positive("mscale_all_dim", mscale_all_dim)
    if (mscale is None) != (mscale_all_dim is None):
        raise ValueError(
            f"mscale={mscale!r}, mscale_all_dim={mscale_all_dim!r}: one has no effect without the other; pass both, or "
            "amplitude="
        )
    if amplitude is not None and mscale is not None:
        raise ValueError(
            f"amplitude={amplitude!r} with mscale={mscale!r}: amplitude replaces what mscale computes; pass one of them"
        )
