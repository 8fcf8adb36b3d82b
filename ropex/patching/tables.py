"""How models lay out cos and sin, how their attentions call a rotary function, and which channels it pairs."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ropex.kernels import Layout, Order
from ropex.kernels.reference import full_table

__all__ = ["Channels", "RotaryFunction", "Style", "TableLayout", "laid_out"]

TableLayout = Literal["half", "interleaved", "narrow", "complex"]
Style = Literal["pair", "single", "complex"]
Channels = Literal["half", "interleaved", "deinterleaved"]


class RotaryFunction(NamedTuple):
    """A modeling file's rotary function, as found by probing.

    Attributes:
        name: the global by which attentions call it.
        style: `pair`, called with (q, k, cos, sin); `single`, with (x, cos, sin); `complex`, with (q, k, cos + i sin).
        channels: which channels of a head it pairs; `deinterleaved`: neighbours, and lays them out as halves.
        order: of its inputs, where its call does not say.
        backward: whether it turns by the negative angle; scores are the same.
    """

    name: str
    style: Style
    channels: Channels
    order: Order
    backward: bool = False

    @property
    def layout(self) -> Layout:
        """The pairing after `deinterleaved` channels have been laid out as halves."""
        return "interleaved" if self.channels == "interleaved" else "half"


def laid_out(cos: Tensor, sin: Tensor, layout: TableLayout) -> tuple[Tensor, ...]:
    """Tables of one value per pair, [batch, seq, half], as a model of this layout would make them."""
    if layout == "complex":
        return (torch.complex(cos, sin),)
    if layout == "narrow":
        return cos, sin
    return full_table(cos, layout), full_table(sin, layout)
