"""Schedules as transformers writes them in a config: read from there, and written there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ropex._checks import require_length
from ropex.patching.config import rope_parameters, scaling_type
from ropex.rotation import Geometry, Request
from ropex.scaling import (
    DynamicNTK,
    FrequencySchedule,
    Llama3,
    LongRoPE,
    NTKAware,
    PositionInterpolation,
    Unscaled,
    YaRN,
)

__all__ = ["divisors_of", "frozen_frequencies", "readings", "written"]

_STANDS_STILL = 1e30  # the factor of a pair that does not turn: JSON has no infinity


def readings(config: Any, geometry: Geometry, layer_type: str | None = None) -> Iterator[FrequencySchedule]:
    """What the scaling that a config carries may mean, the most literal reading first; the module tells which holds.

    They follow transformers: a missing `factor` is the ratio of the lengths, `attention_factor` replaces the
    amplitude. Some words have no effect in some modules. No reading: the type is not known, or a word is missing.
    """
    parameters = rope_parameters(config, layer_type)
    kind = scaling_type(config, layer_type)
    get: Callable[..., Any] = parameters.get
    factor = get("factor") or config.max_position_embeddings / geometry.trained_length
    if kind is None:
        yield Unscaled()
    elif kind == "linear":
        yield PositionInterpolation(factor=factor)
    elif kind == "dynamic":
        if get("alpha"):  # fixed, whatever the length; the factor is a dummy
            yield NTKAware(factor=factor, alpha=get("alpha"))
        yield DynamicNTK(factor=factor)
    elif kind == "llama3":
        yield Llama3(factor, low_freq_factor=get("low_freq_factor"), high_freq_factor=get("high_freq_factor"))
    elif kind == "longrope":
        short, long = (tuple(get(name) or ()) for name in ("short_factor", "long_factor"))
        amplitude = get("attention_factor")
        if (pair := (get("short_mscale"), get("long_mscale"))) != (None, None):
            yield LongRoPE(factor, short_factors=short, long_factors=long, amplitude=pair)
            # PhiMoE's module in transformers never takes the long factors.
            yield LongRoPE(factor, short_factors=short, long_factors=short, amplitude=pair)
        yield LongRoPE(factor, short_factors=short, long_factors=long, amplitude=amplitude)
    elif kind == "yarn":
        betas: dict[str, Any] = {"beta_fast": get("beta_fast") or 32.0, "beta_slow": get("beta_slow") or 1.0}
        options: dict[str, Any] = {"amplitude": get("attention_factor")}
        if options["amplitude"] is None and get("mscale") and get("mscale_all_dim"):
            options |= {"mscale": get("mscale"), "mscale_all_dim": get("mscale_all_dim")}
        # transformers looks for `truncate` beside the layer types, and not for each of them.
        for truncate in dict.fromkeys((get("truncate", True), True, False)):
            yield YaRN(factor, **betas, **options, truncate=truncate)


def frozen_frequencies(
    schedule: FrequencySchedule, geometry: Geometry, length: int | None = None
) -> tuple[list[float], float]:
    """The inverse frequencies, radians per token, and the amplitude that a schedule has in evaluation, at one length.

    Args:
        length: in tokens; None: the schedule must have the same ones at every length.

    Raises:
        ValueError: they depend on the length and none is given, or on the position.
    """
    if length is not None:
        require_length("length", length)
    elif schedule.length_dependent:
        raise ValueError(
            f"{schedule!r} has other frequencies at every length, and a config has one list: pass the length in tokens "
            "that they shall be frozen at"
        )
    with torch.no_grad(), torch.device("cpu"):
        reach = length or schedule.target_length(geometry.trained_length)
        positions = torch.tensor([[0, 1, reach // 2, max(reach - 1, 0)]])
        request = Request(geometry, positions, torch.tensor([reach]))
        rotation = schedule.rotation(request)
    rows = rotation.inv_freq.reshape(-1, geometry.dim // 2)
    if not torch.equal(rotation.positions, positions) or not torch.equal(rows, rows[:1].expand_as(rows)):
        raise ValueError(
            f"{schedule!r} gives tokens other positions or frequencies than their neighbours, which no config can say; "
            "leave that option out (keep_first=0) to write it down"
        )
    return rows[0].tolist(), float(rotation.amplitude)


def written(
    schedule: FrequencySchedule,
    geometry: Geometry,
    turning: Sequence[bool] | None = None,
    length: int | None = None,
    *,
    own_types: bool = True,
    mscales: bool = True,
) -> dict[str, Any]:
    """A schedule as transformers' `rope_parameters`, theta included: its own type where it has one, or `longrope`.

    `longrope` holds one divisor per pair, the same up to and beyond the trained length, and the amplitude.

    Args:
        turning: which pairs turn in the model itself, [half]; None: all.
        length: freeze a schedule that depends on the length, or one that is learned, at this many tokens.
        own_types: False: always `longrope`, the one type that some configs take.
        mscales: whether `longrope` says its amplitude in the words `short_mscale` and `long_mscale`, too, the only ones
            that PhiMoE, vLLM and SGLang read.

    Raises:
        ValueError: see `frozen_frequencies`.
    """
    native = own_types and turning is None
    theta = {"rope_theta": geometry.base}
    original = {"original_max_position_embeddings": geometry.trained_length}
    if native and isinstance(schedule, Unscaled):
        return {"rope_type": "default", **theta}
    if native and isinstance(schedule, PositionInterpolation):
        return {"rope_type": "linear", "factor": float(schedule.factor), **theta}
    if native and isinstance(schedule, DynamicNTK) and schedule.floor is None and length is None:
        return {"rope_type": "dynamic", "factor": float(schedule.factor), **theta}
    if native and isinstance(schedule, Llama3):
        bounds = {name: float(getattr(schedule, name)) for name in ("low_freq_factor", "high_freq_factor")}
        return {"rope_type": "llama3", "factor": float(schedule.factor), **bounds, **original, **theta}
    if native and isinstance(schedule, YaRN) and (schedule.ramp, schedule.blend) == ("index", "frequency"):
        return {"rope_type": "yarn", **_yarn_options(schedule, geometry), **original, **theta}
    factors, amplitude = divisors_of(schedule, geometry, turning, length)
    target = length or schedule.target_length(geometry.trained_length)
    both = {"short_mscale": amplitude, "long_mscale": amplitude} if mscales else {}
    return {
        "rope_type": "longrope",
        "factor": max(target / geometry.trained_length, 1.0),
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": amplitude,
        **both,
        **original,
        **theta,
    }


def divisors_of(
    schedule: FrequencySchedule, geometry: Geometry, turning: Sequence[bool] | None = None, length: int | None = None
) -> tuple[list[float], float]:
    """By how much each pair turns slower than in the model itself, [half], and the amplitude; arguments as `written`.

    A pair that does not turn has 1e30.
    """
    inv_freq, amplitude = frozen_frequencies(schedule, geometry, length)
    turns = turning if turning is not None else [True] * len(inv_freq)
    each = zip(geometry.inv_freq().tolist(), inv_freq, turns, strict=True)
    return [base / value if value and turn else _STANDS_STILL for base, value, turn in each], amplitude


def _yarn_options(schedule: YaRN, geometry: Geometry) -> dict[str, Any]:
    """What differs from transformers' defaults: engines read fewer names than transformers writes."""
    options: dict[str, Any] = {"factor": float(schedule.factor)}
    _, amplitude = frozen_frequencies(schedule, geometry)
    if schedule.mscale is not None:  # which DeepSeek and its kin read for their softmax scale, too
        options |= {"mscale": float(schedule.mscale), "mscale_all_dim": float(schedule.mscale_all_dim or 0)}
    elif not math.isclose(amplitude, 0.1 * math.log(schedule.factor) + 1):
        options["attention_factor"] = amplitude
    for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if getattr(schedule, name) != default:
            options[name] = float(getattr(schedule, name))
    if not schedule.truncate:
        options["truncate"] = False
    return options
