"""LongRoPE: one searched factor per pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ropex._checks import require_int, require_number
from ropex.rotation import Request, Rotation
from ropex.scaling.base import FrequencySchedule, growth, ramp_by_index, require_factor, require_positive

__all__ = ["LongRoPE"]


@dataclass(frozen=True)
class LongRoPE(FrequencySchedule):
    """Each pair divided by a factor of its own, `theta_i / lambda_i`: one list up to the trained length L, one beyond.

    Cos and sin are multiplied by `sqrt(1 + ln s / ln L)`, at every length; s is the factor.

    Use it with the lists of a published checkpoint or of a search, or to write any other static schedule down. Without
    lists it is the seed of the published search: short factors of 1, and as long ones YaRN's scales,
    `ramp_i s + 1 - ramp_i`. A generation keeps one length (`Patch.pin_length`).

    Args:
        factor: target length / trained length, >= 1.
        short_factors: dim // 2 numbers > 0, for contexts up to the trained length; default 1 for each.
        long_factors: dim // 2 numbers > 0, for longer ones.
        keep_first: tokens at the beginning that are not scaled.
        amplitude: replaces `sqrt(1 + ln s / ln L)`, as transformers' `attention_factor` does; a pair is the one up to
            the trained length and the one beyond, as PhiMoE's `short_mscale` and `long_mscale`.

    Raises:
        ValueError: also at the first rotation, where a list does not fit the geometry.

    Example:
        >>> geometry = Geometry(dim=8, base=10_000.0, trained_length=2048)
        >>> schedule = LongRoPE(factor=4, long_factors=(1, 1.5, 3, 4))
        >>> (geometry.inv_freq() / schedule.at(geometry, length=8192).inv_freq).tolist()
        [1.0, 1.5, 3.0, 4.0]

    Reference: Ding et al., LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens, 2024, arXiv:2402.13753,
    eq. 3.
    """

    factor: float
    short_factors: Sequence[float] | None = None
    long_factors: Sequence[float] | None = None
    keep_first: int = 0
    amplitude: float | Sequence[float] | None = None
    method: ClassVar[str] = "longrope"
    paper: ClassVar[str] = "Ding et al. 2024, arXiv:2402.13753"
    length_dependent = True

    def __post_init__(self) -> None:
        require_factor(self.factor)
        for name in ("short_factors", "long_factors"):
            object.__setattr__(self, name, _factors(name, getattr(self, name)))
        require_int("keep_first", self.keep_first, minimum=0, remedy="pass a number of tokens, 0 for none")
        object.__setattr__(self, "amplitude", _amplitudes(self.amplitude))

    def rotation(self, request: Request) -> Rotation:
        theta, geometry = request.inv_freq(), request.geometry
        short = _fitted("short_factors", self.short_factors, theta)
        long = _fitted("long_factors", self.long_factors, theta)
        if long is None:
            long = 1 + ramp_by_index(geometry, theta, 32.0, 1.0) * (self.factor - 1)
        scale = torch.where(growth(request) > 1, long, torch.ones_like(theta) if short is None else short)
        inv_freq = theta / scale
        if self.keep_first:
            inv_freq = torch.where((request.positions < self.keep_first)[..., None], theta, inv_freq)
        return Rotation(request.positions, inv_freq, self._amplitude(request))

    def _amplitude(self, request: Request) -> float | Tensor:
        if isinstance(self.amplitude, Sequence):
            short, long = request.inv_freq().new_tensor(self.amplitude)
            return torch.where(growth(request) > 1, long, short)
        if self.amplitude is not None:
            return self.amplitude
        return math.sqrt(1 + math.log(self.factor) / math.log(max(request.geometry.trained_length, 2)))


def _amplitudes(values: float | Sequence[float] | None) -> float | tuple[float, ...] | None:
    """One amplitude or two, as a value that has a hash."""
    if values is None or not isinstance(values, Sequence) or isinstance(values, str):
        require_positive("amplitude", values)
        return values
    pair = _factors("amplitude", values)
    if pair is None or len(pair) != 2:
        raise ValueError(
            f"amplitude={values!r}: must be one number, or two, up to the trained length and beyond; pass one or two"
        )
    return pair


def _factors(name: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    """The list as a tuple, which has a hash."""
    if values is None:
        return None
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{name}={values!r}: must be a list of dim // 2 numbers, or None; convert it")
    for index, value in enumerate(values):
        require_number(f"{name}[{index}]", value, minimum=0, strict=True, remedy="pass one divisor per pair")
    return tuple(values)


def _fitted(name: str, values: Sequence[float] | None, theta: Tensor) -> Tensor | None:
    if values is None:
        return None
    if len(values) != len(theta):
        raise ValueError(
            f"{name} of {len(values)} numbers: must be {len(theta)}, one for each pair of the rotary dimension "
            f"{2 * len(theta)}; pass the list of this model"
        )
    return torch.tensor(values, dtype=theta.dtype, device=theta.device)
