"""Measurements; each script writes JSON to `RESULTS`, from which `report` makes the tables of the docs."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
