"""The one interface behind which every way of scaling stands, and the forms that several of them share."""

from __future__ import annotations

import abc
import math
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from ropex import draws
from ropex._checks import LONGEST, require_bool, require_choice, require_length, require_number, require_type
from ropex.rotation import Geometry, Request, Rotation, widest_float

__all__ = ["FrequencySchedule", "Wrapper"]

RampKind = Literal["index", "rotations"]
Blend = Literal["frequency", "wavelength"]


class FrequencySchedule(abc.ABC):
    """Answers a `Request` with a `Rotation`.

    A concrete schedule is a frozen dataclass: it is a value, knows no model, keeps no state, and computes in float64
    tensor arithmetic without branching on data. See `docs/extending.md`.

    Class attributes:
        method: the name under which the registry finds it.
        paper: where it was published.
        target: what `patch(length=...)` sets: the option `"factor"` (length / trained length), the option `"floor"`
            (the length itself), or None where the method has no target.
        length_dependent: the frequencies depend on `Request.length`. An instance whose options decide it sets its own.
        learned: it has parameters.
        training_free: it is meant to be used on a model as it is.
        augments: in training it draws from `Request.key`.
        outermost: it moves the positions that others would build on, so that none may wrap it.
    """

    method: ClassVar[str]
    paper: ClassVar[str] = ""
    target: ClassVar[str | None] = "factor"
    length_dependent: bool = False
    learned: bool = False
    training_free: bool = True
    augments: bool = False
    outermost: bool = False

    @abc.abstractmethod
    def rotation(self, request: Request) -> Rotation:
        """By how much each pair turns at each token of this pass."""

    def target_length(self, trained_length: int) -> int:
        """The context length in tokens that this schedule is meant to reach: `floor`, or `factor` times the trained."""
        if (floor := getattr(self, "floor", None)) is not None:
            return int(floor)
        return round((getattr(self, "factor", None) or 1) * trained_length)

    def for_geometry(self, geometry: Geometry) -> FrequencySchedule:
        """This schedule for a model of this geometry: itself, unless it has parameters whose shapes depend on it."""
        return self

    def at(self, geometry: Geometry, *, length: int, device: torch.device | str | None = None) -> Rotation:
        """The rotation of positions 0 .. length - 1, one row, in evaluation mode; for plots, exports and tests."""
        require_type("geometry", geometry, Geometry, "a ropex.Geometry; pass Geometry(dim=, base=, trained_length=)")
        require_length("length", length)
        positions = torch.arange(length, device=device)[None]
        return self.rotation(Request(geometry, positions, torch.tensor(length, device=device)))

    def to_dict(self) -> dict[str, Any]:
        """`{"method": name, "options": {...}}`, and `"inner"` for a wrapper; made for JSON.

        `ropex.scaling.from_dict` gives an equal schedule back (of a learned one: the same options, fresh weights).
        """
        return {"method": self.method, "options": {name: getattr(self, name) for name in option_names(type(self))}}


@dataclass(frozen=True)
class Wrapper(FrequencySchedule):
    """A schedule that edits what another one answers, or what it is asked.

    It depends on the length, learns, draws and needs training where the inner one does.

    Args:
        inner: the schedule that it wraps; `ropex.schedule` takes its name, and gives it the options that it accepts.
    """

    inner: FrequencySchedule
    default_inner: ClassVar[str]

    def __post_init__(self) -> None:
        if not isinstance(self.inner, FrequencySchedule):
            raise ValueError(
                f"inner={self.inner!r}: must be a FrequencySchedule; "
                f'pass ropex.schedule("{self.default_inner}", ...), or use ropex.schedule("{self.method}", ...)'
            )
        if self.inner.outermost:
            turned = f'turn it round, as in ropex.schedule("{self.inner.method}", inner="{self.method}", ...)'
            remedy = "leave one of the two out" if self.outermost else turned
            raise ValueError(f"inner={self.inner!r}: must not move the positions; {remedy}")
        for name in ("length_dependent", "learned", "augments"):
            object.__setattr__(self, name, getattr(type(self), name) or getattr(self.inner, name))
        object.__setattr__(self, "training_free", type(self).training_free and self.inner.training_free)

    def target_length(self, trained_length: int) -> int:
        return self.inner.target_length(trained_length)

    def for_geometry(self, geometry: Geometry) -> Self:
        inner = self.inner.for_geometry(geometry)
        return self if inner is self.inner else replace(self, inner=inner)

    def to_dict(self) -> dict[str, Any]:
        described = super().to_dict()
        del described["options"]["inner"]
        return {**described, "inner": self.inner.to_dict()}


def innermost(schedule: FrequencySchedule) -> FrequencySchedule:
    """The schedule inside all wrappers."""
    return innermost(schedule.inner) if isinstance(schedule, Wrapper) else schedule


def option_names(schedule: type[FrequencySchedule], *, required: bool = False) -> list[str]:
    """The options that a schedule's constructor accepts, or those that it needs."""
    options = [f for f in fields(schedule) if f.init]  # type: ignore[arg-type]  # every concrete one is a dataclass
    return [f.name for f in options if f.default is MISSING or not required]


# --- checks -----------------------------------------------------------------------------------------------------------


def require_factor(factor: object) -> None:
    remedy = "pass target length / trained length, such as factor=4"
    require_number("factor", factor, minimum=1, remedy=remedy)
    require_number("factor", factor, minimum=1, maximum=LONGEST, remedy=remedy)  # the limit is told where it is passed


def require_floor(floor: object) -> None:
    if floor is not None:
        require_length("floor", floor, remedy="pass a length in tokens, or None for no floor")


def require_positive(name: str, value: object) -> None:
    """Raise unless a number that may be left out is > 0."""
    if value is not None:
        require_number(name, value, minimum=0, strict=True, remedy="pass a number, or None")


def require_key(request: Request, method: str) -> Tensor:
    """The keys of a training request: int64 [batch]."""
    if request.key is None:
        raise ValueError(
            f'key=None in a training request to "{method}", which draws: must be int64 [batch]; use '
            "ropex.patch or ropex.RotaryEmbedding, which make the keys, or pass Request(key=)"
        )
    return request.key


# --- the length -------------------------------------------------------------------------------------------------------


def growth(request: Request, floor: int | None = None) -> Tensor:
    """Context length / trained length, the former at least `floor`: float64, 0-d or [batch, 1, 1]."""
    length = request.length if floor is None else request.length.clamp(min=floor)
    length = length[:, None, None] if length.dim() else length
    return length.to(widest_float(length.device)) / request.geometry.trained_length


# --- forms that several strategies share ------------------------------------------------------------------------------


def pair_index(inv_freq: Tensor) -> Tensor:
    """`i`, from 0 to `dim / 2 - 1`: [half], like the frequencies."""
    return torch.arange(inv_freq.shape[-1], dtype=inv_freq.dtype, device=inv_freq.device)


def ntk_exponent(inv_freq: Tensor) -> Tensor:
    """`2 i / (dim - 2)`, from 0 for the first pair to 1 for the last."""
    return pair_index(inv_freq) / max(inv_freq.shape[-1] - 1, 1)


def ntk_stretched(inv_freq: Tensor, alpha: float | Tensor) -> Tensor:
    """`theta_i * alpha ** (-2 i / (dim - 2))`: the first pair unchanged, the last one divided by alpha.

    The same as `theta_i` of the base `base * alpha ** (dim / (dim - 2))`, but it keeps the model's own rounding.
    `alpha` is a number, 0-d, or [batch, 1, 1].
    """
    return inv_freq * alpha ** -ntk_exponent(inv_freq)


def require_ramp(beta_fast: object, beta_slow: object, ramp: object, blend: object, truncate: object) -> None:
    """Raise unless these make a ramp and a blend."""
    require_number("beta_slow", beta_slow, minimum=0, strict=True, remedy="pass a number of turns, such as 1")
    require_number("beta_fast", beta_fast, minimum=0, strict=True, remedy="pass a number of turns, such as 32")
    if beta_fast < beta_slow:  # type: ignore[operator]  # numbers by now
        raise ValueError(
            f"beta_fast={beta_fast!r}, beta_slow={beta_slow!r}: beta_fast must not be the smaller, since fast pairs "
            "turn more often; swap them"
        )
    require_choice("ramp", ramp, ("index", "rotations"))
    require_choice("blend", blend, ("frequency", "wavelength"))
    require_bool("truncate", truncate, remedy="transformers' default is True")


def ramp_by_rotations(geometry: Geometry, inv_freq: Tensor, beta_fast: float, beta_slow: float) -> Tensor:
    """How much of each pair is interpolated, [half], linear in its turns over the trained length.

    0 from `beta_fast` turns on, 1 up to `beta_slow`; a step where the two are equal.
    """
    turns = inv_freq * (geometry.trained_length / (2 * math.pi))
    if beta_fast == beta_slow:
        return (turns < beta_slow).to(inv_freq.dtype)
    return 1 - ((turns - beta_slow) / (beta_fast - beta_slow)).clamp(0, 1)


def ramp_by_index(
    geometry: Geometry, inv_freq: Tensor, beta_fast: float, beta_slow: float, truncate: bool = True
) -> Tensor:
    """How much of each pair is interpolated, [half], linear in its index.

    A pair that turns r times over L tokens sits at index `dim * ln(L / (2 pi r)) / (2 ln base)`; the ramp rises from 0
    at the index of `beta_fast` turns to 1 at that of `beta_slow`, whole ones (floor and ceil) where `truncate`.
    """

    def index_of(turns: float) -> float:
        wavelengths = geometry.trained_length / (2 * math.pi * turns)
        return geometry.dim * math.log(wavelengths) / (2 * math.log(geometry.base))

    low, high = index_of(beta_fast), index_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, geometry.dim - 1)
    high += 0.001 if low == high else 0  # the released code's guard against a zero width
    return ((pair_index(inv_freq) - low) / (high - low)).clamp(0, 1)


def blended(inv_freq: Tensor, factor: float | Tensor, ramp: Tensor, blend: Blend = "frequency") -> Tensor:
    """Pairs interpolated as far as the ramp says; exactly `inv_freq` for a factor of 1.

    By frequency: `theta (ramp / factor + 1 - ramp)`; by wavelength: `theta / (ramp factor + 1 - ramp)`.
    """
    if blend == "wavelength":
        return inv_freq / (1 + ramp * (factor - 1))
    return inv_freq * (1 - ramp * (1 - 1 / factor))


# --- positions of training --------------------------------------------------------------------------------------------


def moved(request: Request, key: Tensor, positions: Tensor) -> Request:
    """The request as if its tokens stood at these positions, for an inner schedule: their length, and next keys."""
    return replace(request, positions=positions, length=positions.amax(dim=-1) + 1, key=draws.next_key(key))


def looked_up(table: Tensor, positions: Tensor) -> Tensor:
    """`table[row, position]`, [batch, seq]; positions beyond the table go on from its last entry, one by one.

    So padded and packed rows keep their order. `table` is int64 [batch, n].
    """
    last = table.shape[-1] - 1
    inside = table.gather(-1, positions.clamp(0, last).expand(table.shape[0], -1))
    return inside + (positions - last).clamp(min=0)
