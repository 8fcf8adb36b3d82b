"""Measurements; each script writes JSON to `RESULTS`, from which `report` makes the tables of the docs."""

import statistics
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def summary(values: list[float]) -> dict[str, float]:
    """Median, quartiles and range of repeated measurements, for JSON."""
    quartiles = statistics.quantiles(values, n=4)
    return {
        "median": statistics.median(values),
        "quartile_1": quartiles[0],
        "quartile_3": quartiles[2],
        "min": min(values),
        "max": max(values),
    }
