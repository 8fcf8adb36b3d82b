"""Retrieval of the training-free methods beyond the trained length, on the default model.

    python -m benchmarks.retrieval [--factors 2,1.5] [--samples 1]

writes retrieval.json to benchmarks/results: the tasks passkey, needle_multikey and lines at each factor times the
trained length, for each method, and within the trained length for the unpatched model. Methods that depend on the
length are the static ones that they are at this length, and are measured once. A run that was killed goes on where it
stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import ropex
from benchmarks import RESULTS
from benchmarks.perplexity import PARTS, training_free
from ropex.cli.console import progress_bar
from ropex.evaluation import compare_methods
from ropex.evaluation.loading import load_model
from ropex.evaluation.results import write_json
from ropex.scaling import FrequencySchedule

# One text answers for all depths of the other two; of passkey each depth is a text of its own.
TASKS = {"passkey": (0.1, 0.5), "needle_multikey": (0.1, 0.3, 0.5, 0.7, 0.9), "lines": (0.1, 0.3, 0.5, 0.7, 0.9)}


def distinct(factor: float, geometry: ropex.Geometry) -> tuple[dict[str, FrequencySchedule], dict[str, str]]:
    """The methods that rotate differently at the target, and of the others which one each equals there."""
    length = round(factor * geometry.trained_length)
    rotations: dict[str, ropex.Rotation] = {}
    same: dict[str, str] = {}
    schedules = training_free(factor)
    # The static ones first.
    for name in sorted(schedules, key=lambda name: schedules[name].length_dependent):
        rotation = schedules[name].at(geometry, length=length)
        for other, known in rotations.items():
            if torch.equal(rotation.inv_freq, known.inv_freq) and rotation.amplitude == known.amplitude:
                same[name] = other
                break
        else:
            rotations[name] = rotation
    return {name: schedules[name] for name in rotations}, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", default="2,1.5")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.disable_progress_bar()
    loaded = load_model(dtype=getattr(torch, options.dtype))
    geometry = ropex.inspect(loaded.model).geometry
    trained = geometry.trained_length
    plan: dict[str, tuple[list[int], dict[str, FrequencySchedule], dict[str, str]]] = {
        "within": ([trained // 2, trained], {"none": ropex.schedule("none")}, {})
    }
    for factor in map(float, options.factors.split(",")):
        plan[f"{factor:g}"] = ([round(factor * trained)], *distinct(factor, geometry))
    parts: dict[str, Any] = {}
    result: dict[str, Any] = {"parts": parts}
    for name, (lengths, schedules, same) in plan.items():
        parts[name] = {"same": same, "lengths": lengths, "tasks": {}}
        for task, depths in TASKS.items():
            with progress_bar() as report:
                measured = compare_methods(
                    loaded.model,
                    schedules,
                    tokenizer=loaded.tokenizer,
                    tasks=[task],
                    lengths=lengths,
                    depths=depths,
                    samples=options.samples,
                    cells=PARTS / "retrieval.json",
                    model_name=loaded.name,
                    progress=report,
                )
            parts[name]["tasks"][task] = measured["retrieval"]
            result |= {key: measured[key] for key in ("model", "trained_length", "environment")}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "retrieval.json", result)


if __name__ == "__main__":
    main()
