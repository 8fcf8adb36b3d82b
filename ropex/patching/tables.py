"""How models lay out cos and sin, and the channels of a head."""

from __future__ import annotations

from typing import NamedTuple

from ropex.kernels import Layout

__all__ = ["Pairing"]


class Pairing(NamedTuple):
    """How a model lays out its cos and sin tables, and which channels of a head it pairs."""

    table: Layout
    channels: Layout
