"""E2-LLM: one training for every factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ropex import draws
from ropex._checks import require_int
from ropex.rotation import Request, Rotation
from ropex.scaling.base import FrequencySchedule, growth, require_factor, require_key

__all__ = ["E2LLM"]


@dataclass(frozen=True)
class E2LLM(FrequencySchedule):
    """Interpolation by a factor that training draws anew for each sample: angles `(m + t_m) / g * theta_i`.

    In training g is uniform on {1 .. g_max}, and t_m, the same for all tokens of a sample but the first `keep_first`,
    for which it is 0, is uniform on {0 .. max(0, g L - R)}; L is the trained length and R the length being trained on,
    `Request.length`. In evaluation t is 0 and g is the factor.

    Use it for one short fine-tuning, at the trained length, of a model that shall serve several lengths.

    Args:
        factor: g in evaluation, target length / trained length, >= 1; `"auto"`: ceil(n / L) for a context of n tokens.
        g_max: the largest g of training.
        keep_first: tokens at the beginning that are not shifted.

    Note:
        The paper draws g once per iteration; here every sample has its own, which is the same on average.

    Example:
        >>> geometry = Geometry(dim=8, base=10_000.0, trained_length=2048)
        >>> E2LLM().at(geometry, length=5000).inv_freq.flatten()[0].item() * 3
        1.0

    Reference: Liu et al., E2-LLM: Efficient and Extreme Length Extension of Large Language Models, 2024,
    arXiv:2401.06951, eq. 5 to 7.
    """

    factor: float | Literal["auto"] = "auto"
    g_max: int = 20
    keep_first: int = 4
    method: ClassVar[str] = "e2llm"
    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2401.06951"
    length_dependent = True  # unless the factor is given
    training_free = False
    augments = True

    def __post_init__(self) -> None:
        if self.factor != "auto":
            require_factor(self.factor)
        require_int("g_max", self.g_max, minimum=1, remedy="pass the largest factor to train for, such as 20")
        require_int("keep_first", self.keep_first, minimum=0, remedy="pass a number of tokens, 0 for none")
        object.__setattr__(self, "length_dependent", self.factor == "auto")

    def rotation(self, request: Request) -> Rotation:
        inv_freq, positions = request.inv_freq(), request.positions
        if not request.training:
            return Rotation(positions, inv_freq / (growth(request).ceil() if self.factor == "auto" else self.factor))
        key = require_key(request, self.method)
        g = 1 + draws.integers(key, 1, self.g_max)
        room = (g * request.geometry.trained_length - request.length[..., None]).clamp(min=0)
        shifted = positions + draws.integers(key, 1, room + 1, stream=1)
        return Rotation(torch.where(positions < self.keep_first, positions, shifted), inv_freq / g[..., None])

    def target_length(self, trained_length: int) -> int:
        return round((self.g_max if self.factor == "auto" else self.factor) * trained_length)
