"""A rotary embedding as a module, for people who own their model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ropex._checks import describe, require_int
from ropex.rotation import Geometry, Request, Rotation
from ropex.scaling import FrequencySchedule

__all__ = ["RotaryEmbedding"]


class RotaryEmbedding(nn.Module):
    """Asks a schedule for the rotation of each forward pass.

    Call it once per pass and hand its answer to every layer's `ropex.rotate`. It has no parameters and nothing in the
    state_dict unless the schedule does, and its frequencies keep their precision whatever `.to(torch.bfloat16)` does.

    Args:
        geometry: how the model was (or will be) trained.
        schedule: from `ropex.schedule`, or your own.

    Example:
        >>> rope = RotaryEmbedding(ropex.Geometry(64, 10_000.0, 2048), ropex.schedule("linear", factor=2))
        >>> rope(torch.arange(5)[None]).inv_freq.shape
        torch.Size([32])
    """

    inv_freq: Tensor
    pinned: Tensor

    def __init__(self, geometry: Geometry, schedule: FrequencySchedule) -> None:
        super().__init__()
        if not isinstance(geometry, Geometry):
            raise ValueError(
                f"geometry={geometry!r}: must be a ropex.Geometry; pass Geometry(dim=, base=, trained_length=)"
            )
        if not isinstance(schedule, FrequencySchedule):
            raise ValueError(
                f'schedule={schedule!r}: must be a FrequencySchedule; pass ropex.schedule("yarn", factor=4)'
            )
        self.geometry = geometry
        self.schedule = schedule
        self.pinned_length: int | None = None
        self._fill(torch.get_default_device())

    def forward(self, positions: Tensor) -> Rotation:
        """The rotation of these positions, int64 [batch, seq].

        The context length that a length-dependent schedule serves is each row's largest position + 1, unless pinned.
        """
        if positions.dim() != 2 or positions.is_floating_point():
            raise ValueError(
                f"positions {describe(positions)}: must be integers [batch, seq]; multi-axis and fractional positions "
                "are not supported"
            )
        positions = positions.to(torch.int64)
        length = positions.amax(dim=-1) + 1
        # The buffers are where the module was moved to, which need not be where its caller computes.
        pinned, inv_freq = self.pinned.to(positions.device), self.inv_freq.to(positions.device)
        length = torch.where(pinned > 0, pinned, length)
        request = Request(self.geometry, positions, length, self.training, base_inv_freq=inv_freq)
        return self.schedule.rotation(request)

    def pin_length(self, length: int | None) -> None:
        """Serve every pass as part of a context of `length` tokens; None: of the length that the positions show."""
        if length is not None:
            require_int("length", length, minimum=1, remedy="pass the tokens of the prompt plus those to be generated")
        self.pinned_length = length
        self.pinned.fill_(length or 0)  # in place, so that a captured graph sees it

    def extra_repr(self) -> str:
        pinned = f", pinned_length={self.pinned_length}" if self.pinned_length is not None else ""
        return f"{self.geometry}, {self.schedule}{pinned}"

    def _fill(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be pinned or trained with later
            inv_freq = self.geometry.inv_freq(device)
            pinned = torch.tensor(self.pinned_length or 0, device=device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("pinned", pinned, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        # A cast would round the frequencies, `to_empty` would leave them unset, and not every device has float64:
        # they do not take part, and are made anew where the module now is.
        del self.inv_freq
        try:
            super()._apply(fn, recurse)
        finally:
            self._fill(self.pinned.device)
        return self
