"""Which method to take where nothing is trained."""

from __future__ import annotations

from typing import NamedTuple

from ropex._checks import require_int
from ropex.rotation import Geometry
from ropex.scaling import FrequencySchedule, schedule

__all__ = ["Recommendation", "recommend"]

# How far the rule was measured: benchmarks/results/perplexity*.json and retrieval.json.
_MEASURED = 2.0
# alpha over the factor: 1 falls behind in retrieval at twice the trained length, 4 costs most in perplexity.
_OVERSCALED = 2.0


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
        NTKAware(factor=2.0, alpha=4.0)
    """
    if not isinstance(geometry, Geometry):
        raise ValueError(f"geometry of the type {type(geometry).__name__}: must be one; pass inspect(model).geometry")
    require_int("length", length, minimum=1, remedy="pass the target length in tokens")
    trained = geometry.trained_length
    if length <= trained:
        return Recommendation(
            schedule("none"), f"{length} tokens are within the trained length of {trained}, where every scaling costs"
        )
    factor = length / trained
    reason = (
        f"at {factor:.3g} times the trained length, ntk with alpha twice the factor finds what stands far back as "
        "surely as within the trained length, where ntk and yarn at the factor itself do not"
    )
    if factor > _MEASURED:
        reason += f" (measured up to {_MEASURED:g} times, on one small model: compare before you rely on it)"
    return Recommendation(schedule("ntk", factor=factor, alpha=_OVERSCALED * factor), reason)
