"""Bases in which some pairs turn more slowly than the series says, or not at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ropex._checks import require_int, require_number
from ropex.rotation import Request, Rotation
from ropex.scaling.base import FrequencySchedule, pair_index, require_factor

__all__ = ["DroPE", "PowerBasis", "ProportionalRoPE", "TruncatedBasis"]


@dataclass(frozen=True)
class PowerBasis(FrequencySchedule):
    """Slow pairs are slowed by a power of their index: `theta_i / factor * (1 - i / (dim / 2)) ** exponent`.

    Use it before fine-tuning. The slowest pairs, which see only part of a turn in training, hardly turn at all.

    Args:
        factor: >= 1, the linear step before it; 1 for none.
        exponent: > 0; the authors recommend 0.5.

    Example:
        >>> geometry = Geometry(dim=8, base=10_000.0, trained_length=2048)
        >>> (PowerBasis(exponent=1.0).at(geometry, length=4).inv_freq / geometry.inv_freq()).tolist()
        [1.0, 0.75, 0.5, 0.25]

    Reference: Pal et al., Giraffe: Adventures in Expanding Context Lengths in LLMs, 2023, arXiv:2308.10882, and the
    released code.
    """

    factor: float = 1.0
    exponent: float = 0.5
    method: ClassVar[str] = "power"
    paper: ClassVar[str] = "Pal et al. 2023, arXiv:2308.10882"
    training_free = False

    def __post_init__(self) -> None:
        require_factor(self.factor)
        require_number("exponent", self.exponent, minimum=0, strict=True, remedy="pass an exponent, such as 0.5")

    def rotation(self, request: Request) -> Rotation:
        return Rotation(request.positions, _powered(request.inv_freq() / self.factor, self.exponent))


@dataclass(frozen=True)
class TruncatedBasis(FrequencySchedule):
    """Pairs that do not finish a turn within T tokens lose their frequency.

    With the cutoff `c = 2 pi / T`, f becomes f where `f >= c`, `c / 16` where `c / 8 <= f < c`, and 0 below: so the
    positions that a fine-tuning sees cover every angle that a longer context will show.

    Use it before fine-tuning; the authors found that it extrapolates where interpolation does not.

    Args:
        factor: >= 1, the linear step before it; 1 for none.
        exponent: >= 0, that of the power step (`power`) between the two; 0 for none.
        cutoff_length: T in tokens; the trained length by default.

    Note:
        f is what the earlier steps gave, in the order of the released code: linear, power, truncation. So with a factor
        the cut falls earlier. The plateau c / 16 lies below the lower bound c / 8: that is the released code too.

    Example:
        >>> geometry = Geometry(dim=128, base=10_000.0, trained_length=2048)
        >>> int((TruncatedBasis().at(geometry, length=4).inv_freq == 0).sum())
        9

    Reference: Pal et al., Giraffe: Adventures in Expanding Context Lengths in LLMs, 2023, arXiv:2308.10882, and the
    released code.
    """

    factor: float = 1.0
    exponent: float = 0.0
    cutoff_length: int | None = None
    method: ClassVar[str] = "truncated"
    paper: ClassVar[str] = "Pal et al. 2023, arXiv:2308.10882"
    training_free = False

    def __post_init__(self) -> None:
        require_factor(self.factor)
        require_number("exponent", self.exponent, minimum=0, remedy="pass an exponent, or 0 for no power step")
        if self.cutoff_length is not None:
            require_int("cutoff_length", self.cutoff_length, minimum=1, remedy="pass a length in tokens, or None")

    def rotation(self, request: Request) -> Rotation:
        inv_freq = _powered(request.inv_freq() / self.factor, self.exponent)
        cutoff = 2 * math.pi / (self.cutoff_length or request.geometry.trained_length)
        cut = torch.where(inv_freq < cutoff, cutoff / 16, inv_freq)
        return Rotation(request.positions, torch.where(inv_freq < cutoff / 8, 0.0, cut))


@dataclass(frozen=True)
class DroPE(FrequencySchedule):
    """No rotation: every frequency 0.

    Use it to drop the positions of a pretrained model, then recalibrate it at its trained length for 0.5 to 2 % of the
    pretraining budget; it then reads contexts of several times that length. Without that training the model breaks.

    Example:
        >>> DroPE().at(Geometry(dim=8, base=10_000.0, trained_length=2048), length=4).inv_freq.tolist()
        [0.0, 0.0, 0.0, 0.0]

    Reference: Gelberg et al., Extending the Context of Pretrained LLMs by Dropping Their Positional Embeddings, 2025,
    arXiv:2512.12167.
    """

    method: ClassVar[str] = "drope"
    paper: ClassVar[str] = "Gelberg et al. 2025, arXiv:2512.12167"
    target: ClassVar[str | None] = None
    training_free = False

    def rotation(self, request: Request) -> Rotation:
        return Rotation(request.positions, torch.zeros_like(request.inv_freq()))


@dataclass(frozen=True)
class ProportionalRoPE(FrequencySchedule):
    """The fastest pairs turn, the rest do not: `theta_i` for the first `fraction` of the pairs, 0 for the others.

    Use it in training: the slowest pairs become channels of content that no position disturbs.

    Args:
        fraction: of the pairs, 0 to 1; `floor(fraction * dim / 2)` of them turn. The authors' best is 0.75.

    Example:
        >>> geometry = Geometry(dim=8, base=10_000.0, trained_length=2048)
        >>> ProportionalRoPE(0.5).at(geometry, length=4).inv_freq[2:].tolist()
        [0.0, 0.0]

    Reference: Barbero et al., Round and Round We Go! What makes Rotary Positional Encodings useful?, 2024,
    arXiv:2410.06205, section 6; as in transformers' `proportional`.
    """

    fraction: float = 0.75
    method: ClassVar[str] = "proportional"
    paper: ClassVar[str] = "Barbero et al. 2024, arXiv:2410.06205"
    target: ClassVar[str | None] = None
    training_free = False

    def __post_init__(self) -> None:
        require_number(
            "fraction", self.fraction, minimum=0, maximum=1, remedy="pass a share of the pairs, such as 0.75"
        )

    def rotation(self, request: Request) -> Rotation:
        inv_freq = request.inv_freq()
        turning = int(self.fraction * request.geometry.dim // 2)
        return Rotation(request.positions, torch.where(pair_index(inv_freq) < turning, inv_freq, 0.0))


def _powered(inv_freq: Tensor, exponent: float) -> Tensor:
    return inv_freq * (1 - pair_index(inv_freq) / inv_freq.shape[-1]) ** exponent
