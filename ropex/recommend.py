"""Which method to take where nothing is trained."""

from __future__ import annotations

from typing import NamedTuple

from ropex._checks import require_length
from ropex.rotation import Geometry
from ropex.scaling import FrequencySchedule, schedule

__all__ = ["Recommendation", "recommend"]

# How far the rule was measured: benchmarks/results/perplexity*.json and retrieval.json.
_MEASURED = 2.0


class Recommendation(NamedTuple):
    """A method that needs no training.

    Attributes:
        schedule: the method with its options.
        reason: why, in one sentence.
    """

    schedule: FrequencySchedule
    reason: str


def recommend(geometry: Geometry, length: int) -> Recommendation:
    """The training-free method for a context of `length` tokens; `patch(model, method="auto", length=...)` takes it.

    The rule was made of what the training-free methods did on SmolLM2-135M at 1.5 and 2 times its trained length, by
    perplexity and by retrieval (docs/choosing.md has the figures). Measure your own model with `ropex compare`.

    Args:
        geometry: how the model was trained, as `inspect(model).geometry` tells.
        length: the target length in tokens.

    Raises:
        ValueError: a length that is no positive number of tokens.

    Example:
        >>> recommend(Geometry(dim=64, base=100_000.0, trained_length=8192), 16384).schedule
        DynamicNTK(factor=2.0, floor=None)
    """
    if not isinstance(geometry, Geometry):
        raise ValueError(f"geometry of the type {type(geometry).__name__}: must be one; pass inspect(model).geometry")
    require_length("length", length, remedy="pass the target length in tokens")
    trained = geometry.trained_length
    if length <= trained:
        return Recommendation(
            schedule("none"), f"{length} tokens are within the trained length of {trained}, where every scaling costs"
        )
    factor = length / trained
    reason = (
        "dynamic_ntk leaves texts within the trained length as they are, and over three retrieval tasks at 1.5 and 2 "
        "times that length only ntk with alpha twice the factor did as well, at a higher perplexity"
    )
    if factor > _MEASURED:
        reason += f"; at {factor:.3g} times nothing was measured, so compare before you rely on it"
    # Its alpha at `length` is factor ** 2 - factor + 1; beyond what was measured it grows as slowly as 2 * factor - 1.
    return Recommendation(schedule("dynamic_ntk", factor=min(factor, _MEASURED)), reason)
