"""Frequency schedules: every way of scaling behind one interface, and the registry of their names."""

from ropex.scaling.base import FrequencySchedule
from ropex.scaling.clex import CLEX
from ropex.scaling.e2llm import E2LLM
from ropex.scaling.interpolation import PositionInterpolation, Unscaled
from ropex.scaling.llama3 import Llama3
from ropex.scaling.longrope import LongRoPE
from ropex.scaling.ntk import AdjustedBase, DynamicNTK, NTKAware
from ropex.scaling.pose import PoSE, PoSECollator, RandomPositions
from ropex.scaling.registry import from_dict, methods, schedule, schedule_class, schedule_for
from ropex.scaling.resonance import Resonance
from ropex.scaling.truncated import DroPE, PowerBasis, ProportionalRoPE, TruncatedBasis
from ropex.scaling.yarn import DynamicYaRN, NTKByParts, YaRN

__all__ = [
    "CLEX",
    "E2LLM",
    "AdjustedBase",
    "DroPE",
    "DynamicNTK",
    "DynamicYaRN",
    "FrequencySchedule",
    "Llama3",
    "LongRoPE",
    "NTKAware",
    "NTKByParts",
    "PoSE",
    "PoSECollator",
    "PositionInterpolation",
    "PowerBasis",
    "ProportionalRoPE",
    "RandomPositions",
    "Resonance",
    "TruncatedBasis",
    "Unscaled",
    "YaRN",
    "from_dict",
    "methods",
    "schedule",
    "schedule_class",
    "schedule_for",
]
