"""The three values that everything else passes around: what the model is, what is asked, what is answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ropex._checks import require_bool, require_dim, require_length, require_number

__all__ = ["Geometry", "Request", "Rotation"]


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on the one device type that has no float64 (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Geometry:
    """How a model's rotary embedding was trained.

    Pair i of the `dim // 2` rotated pairs turns by `base ** (-2 i / dim)` radians per token.

    Args:
        dim: rotary dimension, even; smaller than the head dimension where rotation is partial.
        base: theta, the base of the geometric series of wavelengths.
        trained_length: context length of pretraining, in tokens.
        rounded: the frequencies are the float32 numbers that transformers computes and the model was
            trained with, taken as exact. False: the real numbers of the formula, in float64.

    Raises:
        ValueError: an odd or non-positive `dim`, a `base` that is not > 1, a `trained_length` < 1.

    Example:
        >>> Geometry(dim=64, base=100_000.0, trained_length=8192).inv_freq().shape
        torch.Size([32])

    Reference: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv:2104.09864, eq. 15.
    """

    dim: int
    base: float
    trained_length: int
    rounded: bool = True
    # The frequencies as Python floats: computed once and outside any graph, because another compiler's float32
    # power may differ from eager's in the last bit, which is 0.06 radians at position one million.
    _inv_freq: tuple[float, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        require_dim(self.dim)
        require_number("base", self.base, minimum=1, strict=True, remedy="pass the model's rope_theta, such as 10000.0")
        require_length("trained_length", self.trained_length, remedy="pass the pretraining length in tokens")
        require_bool("rounded", self.rounded, remedy="False computes in float64, as papers do")
        dtype = torch.float32 if self.rounded else torch.float64
        exponent = torch.arange(0, self.dim, 2, dtype=dtype, device="cpu") / self.dim
        values = (1.0 / self.base**exponent).to(torch.float64).tolist()
        object.__setattr__(self, "_inv_freq", tuple(values))

    def inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        """The unscaled inverse frequencies, radians per token: float64 [dim // 2] (float32 on MPS)."""
        device = torch.device(device if device is not None else "cpu")
        return torch.tensor(self._inv_freq, dtype=widest_float(device), device=device)


@dataclass(frozen=True)
class Request:
    """One forward pass, as a schedule sees it.

    Args:
        geometry: how the model was trained.
        positions: int64 [batch, seq], token positions.
        length: int64, 0-d or [batch]: the context length that this pass must serve, in tokens. It stays a tensor,
            so that a schedule which depends on it needs neither a branch nor a device synchronisation.
        training: whether the pass trains; schedules that augment do so only then.
        key: int64 [batch], one random key per sample, for schedules that augment.
        base_inv_freq: float64 [dim // 2] on the device of `positions`, where the caller keeps
            `geometry.inv_freq()` there; made from `geometry` otherwise.
    """

    geometry: Geometry
    positions: Tensor
    length: Tensor
    training: bool = False
    key: Tensor | None = None
    base_inv_freq: Tensor | None = None

    def inv_freq(self) -> Tensor:
        """The model's own inverse frequencies on the device of the positions: float64 [dim // 2]."""
        if self.base_inv_freq is not None:
            return self.base_inv_freq
        return self.geometry.inv_freq(self.positions.device)


class Rotation(NamedTuple):
    """By how much each pair turns at each token: `angle = positions * inv_freq`.

    Attributes:
        positions: int64 [batch, seq].
        inv_freq: radians per token, float64 [half], [batch, 1, half] or [batch, seq, half]; zero is a pair that does
            not turn.
        amplitude: factor on cos and sin; a number, or a tensor that broadcasts against [batch, seq, half].
    """

    positions: Tensor
    inv_freq: Tensor
    amplitude: float | Tensor = 1.0
