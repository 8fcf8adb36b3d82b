"""Schedules by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from ropex.scaling.base import FrequencySchedule, option_names, require_factor
from ropex.scaling.interpolation import PositionInterpolation, Unscaled
from ropex.scaling.ntk import DynamicNTK, NTKAware
from ropex.scaling.yarn import YaRN

__all__ = ["from_dict", "methods", "schedule", "schedule_class", "schedule_for"]

_METHODS: dict[str, type[FrequencySchedule]] = {
    cls.method: cls
    for cls in (
        Unscaled,
        PositionInterpolation,
        NTKAware,
        DynamicNTK,
        YaRN,
    )
}
_ALIASES = {"pi": "linear"}


def methods() -> dict[str, type[FrequencySchedule]]:
    """The names that `schedule` and `patch` accept, each with its class.

    Example:
        >>> "yarn" in methods()
        True
    """
    return dict(_METHODS)


def schedule_class(name: str) -> type[FrequencySchedule]:
    """The class behind a method's name or alias.

    Raises:
        ValueError: unknown name; the nearest one is suggested.
    """
    if isinstance(name, str) and (cls := _METHODS.get(_ALIASES.get(name, name))):
        return cls
    known = [*_METHODS, *_ALIASES]
    hint = _nearest(str(name).lower(), known, otherwise="pass one of them")
    raise ValueError(f"method={name!r}: must be one of {', '.join(known)}; {hint}")


def _nearest(word: str, known: list[str], *, otherwise: str) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f'did you mean "{near[0]}"?' if near else otherwise


def schedule(name: str, **options: Any) -> FrequencySchedule:
    """A schedule by its method's name.

    Args:
        name: see `methods()`; `pi` is an alias of `linear`.
        options: the arguments of the schedule's class.

    Raises:
        ValueError: unknown name or option, missing factor, or a value that the schedule refuses.

    Example:
        >>> schedule("linear", factor=4)
        PositionInterpolation(factor=4)
    """
    cls = schedule_class(name)
    accepted = option_names(cls)
    if unknown := [option for option in options if option not in accepted]:
        hint = _nearest(unknown[0], accepted, otherwise="remove it")
        accepts = f"accepts {', '.join(accepted)}" if accepted else "accepts no options"
        raise ValueError(f'option {unknown[0]}={options[unknown[0]]!r}: method "{name}" {accepts}; {hint}')
    required = [f.name for f in fields(cls) if f.init and f.default is MISSING]  # type: ignore[arg-type]
    if missing := [option for option in required if option not in options]:
        raise ValueError(
            f'method "{name}" without {missing[0]}: it needs {", ".join(missing)}; pass {missing[0]}= '
            "(factor is target length / trained length; ropex.patch takes length= in tokens instead)"
        )
    return cls(**options)


def schedule_for(
    method: str | FrequencySchedule,
    trained_length: int,
    *,
    factor: float | None = None,
    length: int | None = None,
    **options: Any,
) -> FrequencySchedule:
    """The schedule that takes a model of `trained_length` tokens to the target: `factor` times that, or `length`.

    Raises:
        ValueError: both are given and disagree, a target for a method that has none, no target for one that needs it.
    """
    if isinstance(method, FrequencySchedule):
        given = {"factor": factor, "length": length, **options}
        if given := {name: value for name, value in given.items() if value is not None}:
            name, value = next(iter(given.items()))
            raise ValueError(f"{name}={value!r} with the schedule {method!r}: it has its own options; set {name} there")
        return method
    target = schedule_class(method).target
    if factor is not None:
        if target is None:
            raise ValueError(f'factor={factor!r}: method "{method}" has no target length; leave factor out')
        options["factor"] = factor
    if length is not None:
        if target is None:
            raise ValueError(f'length={length!r}: method "{method}" has no target length; leave length out')
        if not isinstance(length, int) or isinstance(length, bool) or length < trained_length:
            raise ValueError(
                f"length={length!r}: must be an int >= the model's trained length of {trained_length} tokens; "
                f'a shorter context needs no scaling, so pass method="none"'
            )
        implied = {"factor": length / trained_length, "floor": length}[target]
        given = options.setdefault(target, implied)
        if given != implied and not (target == "factor" and _reaches(given, trained_length, length)):
            raise ValueError(
                f"length={length!r} and {target}={given!r} disagree: a length of {length} on a model trained at "
                f"{trained_length} tokens means {target}={implied!r}; pass one of them"
            )
    return schedule(method, **options)


def _reaches(factor: float, trained_length: int, length: int) -> bool:
    require_factor(factor)
    return round(factor * trained_length) == length


def from_dict(data: Mapping[str, Any]) -> FrequencySchedule:
    """The schedule that `FrequencySchedule.to_dict` described.

    Example:
        >>> from_dict({"method": "linear", "options": {"factor": 4}})
        PositionInterpolation(factor=4)
    """
    if not isinstance(data, Mapping) or set(data) != {"method", "options"}:
        raise ValueError(f"{data!r}: must be a dict with method and options alone; pass what to_dict() gave")
    return schedule(data["method"], **data["options"])
