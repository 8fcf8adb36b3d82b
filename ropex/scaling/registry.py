"""Schedules by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from ropex._checks import require_length
from ropex.scaling.base import FrequencySchedule, Wrapper, option_names, require_factor
from ropex.scaling.clex import CLEX
from ropex.scaling.e2llm import E2LLM
from ropex.scaling.interpolation import PositionInterpolation, Unscaled
from ropex.scaling.llama3 import Llama3
from ropex.scaling.longrope import LongRoPE
from ropex.scaling.ntk import AdjustedBase, DynamicNTK, NTKAware
from ropex.scaling.pose import PoSE, RandomPositions
from ropex.scaling.resonance import Resonance
from ropex.scaling.truncated import DroPE, PowerBasis, ProportionalRoPE, TruncatedBasis
from ropex.scaling.yarn import DynamicYaRN, NTKByParts, YaRN

__all__ = ["accepted_options", "from_dict", "methods", "schedule", "schedule_class", "schedule_for", "target_option"]

_METHODS: dict[str, type[FrequencySchedule]] = {
    cls.method: cls
    for cls in (
        Unscaled,
        PositionInterpolation,
        NTKAware,
        DynamicNTK,
        AdjustedBase,
        NTKByParts,
        YaRN,
        DynamicYaRN,
        Llama3,
        LongRoPE,
        TruncatedBasis,
        PowerBasis,
        DroPE,
        ProportionalRoPE,
        Resonance,
        CLEX,
        E2LLM,
        PoSE,
        RandomPositions,
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
    return _class_of(name, "method")


def _class_of(name: str, option: str) -> type[FrequencySchedule]:
    """The class behind a name that was passed as this option."""
    if isinstance(name, str) and (cls := _METHODS.get(_ALIASES.get(name, name))):
        return cls
    known = [*_METHODS, *_ALIASES]
    hint = _nearest(str(name).lower(), known, otherwise="pass one of them")
    raise ValueError(f"{option}={name!r}: must be one of {', '.join(known)}; {hint}")


def _nearest(word: str, known: list[str], *, otherwise: str) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f'did you mean "{near[0]}"?' if near else otherwise


def accepted_options(name: str, inner: str | FrequencySchedule | None = None) -> list[str]:
    """The options that `schedule(name, ...)` accepts: of a wrapper also those of the inner method that it makes.

    Args:
        name: a method's name or alias.
        inner: of a wrapper, what it shall wrap, if not its default.
    """
    cls = schedule_class(name)
    options = option_names(cls)
    inner = cls.default_inner if inner is None and issubclass(cls, Wrapper) else inner
    if issubclass(cls, Wrapper) and not isinstance(inner, FrequencySchedule):
        if not isinstance(inner, str):
            raise ValueError(
                f'inner={inner!r}: must be a method\'s name or a schedule; pass inner="{cls.default_inner}"'
            )
        _class_of(inner, "inner")
        options += [option for option in accepted_options(inner) if option not in options]
    return options


def schedule(name: str, **options: Any) -> FrequencySchedule:
    """A schedule by its method's name.

    Args:
        name: see `methods()`; `pi` is an alias of `linear`.
        options: the arguments of the schedule's class. A wrapper (`resonance`, `pose`, `random_positions`) takes
            `inner=`, a method's name or a schedule. It makes a named one, which gets the options that it accepts.

    Raises:
        ValueError: unknown name or option, missing factor, or a value that the schedule refuses.

    Example:
        >>> schedule("linear", factor=4)
        PositionInterpolation(factor=4)
        >>> schedule("pose", inner="ntk", factor=4)
        PoSE(inner=NTKAware(factor=4, alpha=None), factor=None)
    """
    cls = schedule_class(name)
    accepted = accepted_options(name, options.get("inner"))
    if unknown := [option for option in options if option not in accepted]:
        hint = _nearest(unknown[0], accepted, otherwise="remove it")
        if unknown[0] == "factor" and "floor" in accepted:
            hint = "pass floor=, or length= to ropex.patch"
        if unknown[0].endswith("length"):
            hint = "ropex.patch takes length= in tokens, and makes the factor of it"
        accepts = f"accepts {', '.join(accepted)}" if accepted else "accepts no options"
        raise ValueError(f'option {unknown[0]}={options[unknown[0]]!r}: method "{name}" {accepts}; {hint}')
    if issubclass(cls, Wrapper) and not isinstance(options.get("inner"), FrequencySchedule):
        options = _with_inner(cls, **options)
    if missing := [option for option in option_names(cls, required=True) if option not in options]:
        raise ValueError(
            f'method "{name}" without {missing[0]}: it needs {", ".join(missing)}; pass {missing[0]}= '
            "(factor is target length / trained length; ropex.patch takes length= in tokens instead)"
        )
    return cls(**options)


def _with_inner(cls: type[Wrapper], inner: str | None = None, **options: Any) -> dict[str, Any]:
    """A wrapper's options, with the inner schedule made of those that are meant for it."""
    inner = cls.default_inner if inner is None else inner
    accepted = accepted_options(inner)
    meant = {name: value for name, value in options.items() if name in accepted}
    kept = {name: value for name, value in options.items() if name not in meant}
    return {"inner": schedule(inner, **meant), **kept}


def target_option(method: str, inner: str | FrequencySchedule | None = None) -> str | None:
    """The option that says how far a method shall reach: of a wrapper, that of its inner schedule."""
    cls = schedule_class(method)
    if not issubclass(cls, Wrapper):
        return cls.target
    inner = cls.default_inner if inner is None else inner
    if not isinstance(inner, FrequencySchedule) and (target := target_option(inner)):
        return target
    return "factor" if "factor" in option_names(cls) else None


def schedule_for(
    method: str | FrequencySchedule,
    trained_length: int,
    *,
    factor: float | Literal["auto"] | None = None,
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
            raise ValueError(
                f"{name}={value!r} with the schedule {method!r}: it has its own options; leave {name} out, and make "
                "the schedule with them"
            )
        return method
    target = target_option(method, options.get("inner"))
    if factor is not None:
        if target is None:
            raise ValueError(_no_target(method, "factor", factor, options))
        options["factor"] = factor
    if length is not None:
        if target is None:
            raise ValueError(_no_target(method, "length", length, options))
        require_length("length", length, remedy="pass the target length in tokens")
        if length < trained_length:
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


def _no_target(method: str, name: str, value: object, options: Mapping[str, Any]) -> str:
    if isinstance(inner := options.get("inner"), FrequencySchedule):
        return f"{name}={value!r} with the inner schedule {inner!r}: it has its own options; leave {name} out"
    return f'{name}={value!r}: method "{method}" has no target length; leave {name} out'


def _reaches(factor: float | Literal["auto"], trained_length: int, length: int) -> bool:
    if factor == "auto":
        return False
    require_factor(factor)
    return round(factor * trained_length) == length


def from_dict(data: Mapping[str, Any]) -> FrequencySchedule:
    """The schedule that `FrequencySchedule.to_dict` described.

    Example:
        >>> from_dict({"method": "linear", "options": {"factor": 4}})
        PositionInterpolation(factor=4)
    """
    keys = {"method", "options"}
    options = data.get("options") if isinstance(data, Mapping) else None
    named = isinstance(options, Mapping) and all(isinstance(name, str) and name != "inner" for name in options)
    if not named or not keys <= set(data) <= {*keys, "inner"}:
        raise ValueError(
            f"{data!r}: must be a dict with method and options (a dict), and inner for a wrapper; "
            "pass what to_dict() gave"
        )
    wraps = issubclass(schedule_class(data["method"]), Wrapper)
    if wraps != ("inner" in data):
        raise ValueError(
            f'{data!r}: method "{data["method"]}" wraps {"another schedule" if wraps else "no other"}; '
            f"{'add' if wraps else 'remove'} inner, as in what to_dict() gave"
        )
    inner = {"inner": from_dict(data["inner"])} if wraps else {}
    return schedule(data["method"], **data["options"], **inner)
