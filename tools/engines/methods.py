"""How the checks of exports patch their models: every method at one factor, a learned one with something learned."""

from __future__ import annotations

from typing import Any

from torch import nn

FACTOR = 4


def options_of(method: str, trained_length: int) -> dict[str, Any]:
    """The options of a method that reach `FACTOR` times the trained length, where it has a target."""
    special: dict[str, dict[str, Any]] = {
        "abf": {"factor": FACTOR, "base": 80_000.0},
        "none": {},
        "drope": {},
        "proportional": {"fraction": 0.5},
        "dynamic_yarn": {"floor": FACTOR * trained_length},
    }
    return special.get(method, {"factor": FACTOR})


def learn_something(model: nn.Module) -> None:
    """Fill what a patch would learn, so that an export must carry it."""
    for name, parameter in model.named_parameters():
        if ".learned." in name:
            nn.init.normal_(parameter, std=0.02)
