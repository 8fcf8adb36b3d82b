"""Which method to take where nothing is trained."""

from __future__ import annotations

from typing import NamedTuple

from ropex._checks import require_int
from ropex.rotation import Geometry
from ropex.scaling import FrequencySchedule, schedule

__all__ = ["MEASURED_FACTOR", "Recommendation", "recommend"]

# How far benchmarks.perplexity and benchmarks.retrieval, which the rule was made of, have gone.
MEASURED_FACTOR = 2.0


class Recommendation(NamedTuple):
    """A method that needs no training.

    Attributes:
        schedule: the method with its options.
        reason: why, in one sentence.
    """

    schedule: FrequencySchedule
    reason: str
