"""How models lay out cos and sin, and the channels of a head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ropex.kernels import Layout

__all__ = ["Pairing", "full_table", "half_table"]


class Pairing(NamedTuple):
    """How a model lays out its cos and sin tables, and which channels of a head it pairs."""

    table: Layout
    channels: Layout


def full_table(half: Tensor, layout: Layout) -> Tensor:
    """A table that holds each pair's value twice, [..., 2 * half]."""
    return torch.cat((half, half), dim=-1) if layout == "half" else half.repeat_interleave(2, dim=-1)


def half_table(full: Tensor, layout: Layout) -> Tensor:
    """The view of a full table that holds each pair's value once, [..., half]."""
    return full[..., : full.shape[-1] // 2] if layout == "half" else full[..., ::2]
