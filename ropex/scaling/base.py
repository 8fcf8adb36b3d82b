"""The one interface behind which every way of scaling stands."""

from __future__ import annotations

import abc
from dataclasses import fields
from typing import Any, ClassVar

import torch

from ropex._checks import require_int, require_number
from ropex.rotation import Geometry, Request, Rotation

__all__ = ["FrequencySchedule"]


class FrequencySchedule(abc.ABC):
    """Answers a `Request` with a `Rotation`.

    A concrete schedule is a frozen dataclass: it is a value, knows no model, keeps no state, and computes in float64
    tensor arithmetic without branching on data. See `docs/extending.md`.

    Class attributes:
        method: the name under which the registry finds it.
        target: what `patch(length=...)` sets: the option `"factor"` (length / trained length), the option `"floor"`
            (the length itself), or None where the method has no target.
        length_dependent: the frequencies depend on `Request.length`.
        learned: it has parameters.
        training_free: it is meant to be used on a model as it is.
    """

    method: ClassVar[str]
    target: ClassVar[str | None] = "factor"
    length_dependent: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    training_free: ClassVar[bool] = True

    @abc.abstractmethod
    def rotation(self, request: Request) -> Rotation:
        """By how much each pair turns at each token of this pass."""

    def target_length(self, trained_length: int) -> int:
        """The context length, in tokens, that this schedule is meant to reach: `factor` times the trained one."""
        return round(getattr(self, "factor", 1) * trained_length)

    def at(self, geometry: Geometry, *, length: int, device: torch.device | str | None = None) -> Rotation:
        """The rotation of positions 0 .. length - 1, one row, in evaluation mode; for plots, exports and tests."""
        require_int("length", length, minimum=1, remedy="pass a context length in tokens")
        positions = torch.arange(length, device=device)[None]
        return self.rotation(Request(geometry, positions, torch.tensor(length, device=device)))

    def to_dict(self) -> dict[str, Any]:
        """`{"method": name, "options": {...}}`; `ropex.scaling.from_dict` gives an equal schedule back."""
        return {"method": self.method, "options": {name: getattr(self, name) for name in option_names(type(self))}}


def option_names(schedule: type[FrequencySchedule]) -> list[str]:
    """The options that a schedule's constructor accepts."""
    return [f.name for f in fields(schedule) if f.init]  # type: ignore[arg-type]  # every concrete one is a dataclass


def require_factor(factor: object) -> None:
    require_number(
        "factor", factor, minimum=1, remedy="pass target length / trained length, such as factor=4, or leave it at 1"
    )
