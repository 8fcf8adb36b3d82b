"""A rotary embedding as a module, for people who own their model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ropex._checks import describe, require_int, require_length, require_type
from ropex.draws import sample_keys
from ropex.rotation import Geometry, Request, Rotation
from ropex.scaling import FrequencySchedule
from ropex.scaling.base import innermost

__all__ = ["RotaryEmbedding"]


class RotaryEmbedding(nn.Module):
    """Asks a schedule for the rotation of each forward pass.

    Call it once per pass and hand its answer to every layer's `ropex.rotate`. Its frequencies are no buffer, so that
    nothing that casts a model's buffers can round them. Parameters it has only with a learned schedule (`clex`), and of
    its own in the state_dict only `step`, where the schedule draws.

    In training mode a schedule that draws gets one key per row of the positions, made from the seed, the step, and the
    row's index among the rows of all data-parallel ranks. Every call in training mode is a step, so that none may be
    recomputed: checkpoint a model's layers, as transformers does, not a whole that contains this module.

    Args:
        geometry: how the model was (or will be) trained.
        schedule: from `ropex.schedule`, or your own.
        seed: of all that is drawn.
        data_rank: this process's rank among those that train on different data; ranks that share their data (tensor or
            context parallel) must pass the same. None: the process's rank in `torch.distributed`, 0 without it.

    Example:
        >>> rope = RotaryEmbedding(ropex.Geometry(64, 10_000.0, 2048), ropex.schedule("linear", factor=2))
        >>> rope(torch.arange(5)[None]).inv_freq.shape
        torch.Size([32])
    """

    step: Tensor
    schedule: FrequencySchedule

    def __init__(
        self, geometry: Geometry, schedule: FrequencySchedule, *, seed: int = 0, data_rank: int | None = None
    ) -> None:
        super().__init__()
        if not isinstance(geometry, Geometry):
            raise ValueError(
                f"geometry={geometry!r}: must be a ropex.Geometry; pass Geometry(dim=, base=, trained_length=)"
            )
        if not isinstance(schedule, FrequencySchedule):
            raise ValueError(
                f'schedule={schedule!r}: must be a FrequencySchedule; pass ropex.schedule("yarn", factor=4)'
            )
        require_int("seed", seed, minimum=0, remedy="pass the run's seed")
        if data_rank is not None:
            require_int("data_rank", data_rank, minimum=0, remedy="pass the data-parallel rank, or None")
        self.geometry = geometry
        with torch.inference_mode(False):  # a tensor made in inference mode could not be pinned or trained with later
            schedule = schedule.for_geometry(geometry)
        object.__setattr__(self, "schedule", schedule)  # what it learns has one name, inside a wrapper or not
        if isinstance(learned := innermost(schedule), nn.Module):
            self.learned = learned
        self.seed = seed
        self.data_rank = data_rank
        self.pinned_length: int | None = None
        self._kept: tuple[tuple[Any, ...], Rotation] | None = None
        with torch.inference_mode(False):  # as above
            self.inv_freq = geometry.inv_freq(torch.get_default_device())
            self.pinned = torch.tensor(0, device=torch.get_default_device())
        if self.schedule.augments:
            with torch.inference_mode(False):
                self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, positions: Tensor, length: Tensor | None = None) -> Rotation:
        """The rotation of these positions, int64 [batch, seq].

        Args:
            length: int64 [batch], the context length in tokens that a length-dependent schedule serves; None: each
                row's largest position + 1. A pinned length goes before both.
        """
        require_type("positions", positions, Tensor, "a tensor of integers, [batch, seq]; pass position ids")
        if positions.dim() != 2 or positions.is_floating_point():
            raise ValueError(
                f"positions {describe(positions)}: must be integers [batch, seq]; multi-axis and fractional positions "
                "are not supported"
            )
        positions = positions.to(torch.int64)
        if self.schedule.augments and self.step.dtype != torch.int64:
            raise RuntimeError(
                f"step has become {self.step.dtype}: must be int64, or what is drawn would repeat; something cast "
                "every buffer of the model; cast floating-point tensors alone, as model.to(dtype) does"
            )
        if self.inv_freq.device != positions.device and not torch.compiler.is_compiling():
            self._move(positions.device)
        # In a compiled pass they may still be elsewhere.
        pinned, inv_freq = self.pinned.to(positions.device), self.inv_freq.to(positions.device)
        if pinned.dim():
            positions, pinned = self._rows(positions, pinned)
        if (kept := self._kept_rotation(positions)) is not None:
            return kept
        length = torch.where(pinned > 0, pinned, positions.amax(dim=-1) + 1 if length is None else length)
        key = self._keys(positions) if self.training and self.schedule.augments else None
        rotation = self.schedule.rotation(Request(self.geometry, positions, length, self.training, key, inv_freq))
        if (version := self._version_under_pin(positions)) is not None and rotation.positions is positions:
            per_token = rotation.inv_freq.dim() == 3 and rotation.inv_freq.shape[1] > 1
            self._kept = None if per_token else (version, rotation)
        return rotation

    def pin_length(self, length: int | None, rows: Tensor | None = None) -> None:
        """Serve every pass as part of a context of `length` tokens; None: of the length that the positions show.

        In training it is the length of the window, for schedules that draw by it (`pose`, `e2llm`).

        Args:
            length: tokens of the prompt plus those to be generated.
            rows: int64 [batch], the same for each row of a padded batch; a batch of k times as many rows has k for
                each, one after the other. None: `length` holds for all.
        """
        if length is not None:
            require_length("length", length, remedy="pass the tokens of the prompt plus those to be generated")
        self.pinned_length = length
        self._kept = None
        if rows is None and self.pinned.dim() == 0:
            self.pinned.fill_(length or 0)  # in place, so that a captured graph sees it
            return
        device = self.pinned.device
        with torch.inference_mode(False):  # as in `_move`
            self.pinned = torch.tensor(length or 0, device=device) if rows is None else rows.to(torch.int64).clone()

    def _rows(self, positions: Tensor, pinned: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and pinned lengths of the same rows."""
        batch, rows = positions.shape[0], pinned.shape[0]
        if batch == 1:
            return positions.expand(rows, -1), pinned
        if batch % rows:
            raise ValueError(
                f"positions {describe(positions)} under a length pinned for each of {rows} rows: must have {rows} "
                "rows or a multiple; pin one length for all, or the lengths of this batch"
            )
        return positions, pinned.repeat_interleave(batch // rows)

    def _version_under_pin(self, positions: Tensor) -> tuple[Any, ...] | None:
        """What the frequencies of a learned schedule depend on under a pin; None where they must be computed anew."""
        # A compiled pass must not ask for the pinned length: it would be compiled anew for each.
        if torch.compiler.is_compiling() or not self.schedule.learned or self.pinned_length is None:
            return None
        if self.training or torch.is_grad_enabled() or any(p.is_inference() or p.is_meta for p in self.parameters()):
            return None
        weights = tuple((p._version, p.data_ptr(), p.dtype) for p in self.parameters())
        return (weights, positions.device, positions.shape[0])

    def _kept_rotation(self, positions: Tensor) -> Rotation | None:
        """The rotation of these positions by the frequencies of the pass before, under the same pin and weights."""
        if self._kept is None or self._kept[0] != self._version_under_pin(positions):
            return None
        return self._kept[1]._replace(positions=positions)

    def _keys(self, positions: Tensor) -> Tensor:
        """One key per row, for this step; the next call is the next step."""
        rank = self.data_rank
        if rank is None:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if distributed else 0
        batch = positions.shape[0]
        samples = torch.arange(rank * batch, (rank + 1) * batch, device=positions.device)
        keys = sample_keys(self.seed, self.step.to(positions.device), samples)
        self.step += 1  # in place, so that a captured graph sees it
        return keys

    def extra_repr(self) -> str:
        pinned = f", pinned_length={self.pinned_length}" if self.pinned_length is not None else ""
        return f"{self.geometry}, {self.schedule}{pinned}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The state of a model that never drew loads into one that does, and the other way round.
        if self.schedule.augments:
            state_dict.setdefault(prefix + "step", self.step)
        else:
            state_dict.pop(prefix + "step", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _move(self, device: torch.device) -> None:
        """Make the frequencies anew where they are needed, and take along what is pinned."""
        with torch.inference_mode(False):  # a tensor made in inference mode could not be pinned or trained with later
            self.inv_freq = self.geometry.inv_freq(device)
            unset = self.pinned.is_meta
            self.pinned = torch.tensor(self.pinned_length or 0, device=device) if unset else self.pinned.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        self._kept = None
        unset = self.schedule.augments and self.step.is_meta
        super()._apply(fn, recurse)
        self._move(fn(self.pinned).device)
        if unset:
            self.step.zero_()
        return self
