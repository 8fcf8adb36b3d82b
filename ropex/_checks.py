"""Checks of user input, each with one form of message: what was passed, what is required, what to do."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["describe", "require_bool", "require_choice", "require_dim", "require_int", "require_number"]


def require_number(
    name: str, value: object, *, minimum: float, maximum: float = math.inf, strict: bool = False, remedy: str
) -> None:
    """Raise `ValueError` unless `value` is a finite int or float, >= `minimum` (> when `strict`) and <= `maximum`."""
    # An int beyond float's range has no finite value here either.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        if (value > minimum or (value == minimum and not strict)) and value <= maximum:
            return
    required = f"{'>' if strict else '>='} {minimum:g}{f' and <= {maximum:g}' if maximum < math.inf else ''}"
    raise ValueError(f"{name}={value!r}: must be a finite number {required}; {remedy}")


def require_int(name: str, value: object, *, minimum: int, remedy: str) -> None:
    """Raise `ValueError` unless `value` is an int that is >= `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}={value!r}: must be an int >= {minimum}; {remedy}")


def require_dim(value: object) -> None:
    """Raise `ValueError` unless `value` can be a rotary dimension."""
    require_int("dim", value, minimum=2, remedy="pass the number of rotated channels of a head")
    if value % 2:  # type: ignore[operator]  # an int by now
        raise ValueError(f"dim={value}: must be even, since channels rotate in pairs; pass the rotary dimension")


def require_bool(name: str, value: object, *, remedy: str) -> None:
    """Raise `ValueError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be True or False; {remedy}")


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    names = list(choices)
    if value not in names:
        quoted = ", ".join(f'"{choice}"' for choice in names)
        raise ValueError(f"{name}={value!r}: must be one of {quoted}; pass one of them")


def describe(x: Tensor) -> str:
    """A tensor in an error message: its dtype and shape."""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
