"""Frequency schedules: every way of scaling behind one interface, and the registry of their names."""

from ropex.scaling.base import FrequencySchedule
from ropex.scaling.interpolation import PositionInterpolation, Unscaled
from ropex.scaling.ntk import DynamicNTK, NTKAware
from ropex.scaling.registry import from_dict, methods, schedule, schedule_class, schedule_for
from ropex.scaling.yarn import YaRN

__all__ = [
    "DynamicNTK",
    "FrequencySchedule",
    "NTKAware",
    "PositionInterpolation",
    "Unscaled",
    "YaRN",
    "from_dict",
    "methods",
    "schedule",
    "schedule_class",
    "schedule_for",
]
