"""Kills, interrupts, full disks, two at once, mixed types, memory: what was tried, how often, and what was lost.

Run `make chaos`. It takes about half an hour on two cores; with names, only those experiments are run anew.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS
from ropex.evaluation.loading import load_model
from ropex.evaluation.results import contents, environment, write_json
from tests.chaos.experiments import EXPERIMENTS, figures_of, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EXPERIMENTS)}, digest; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability.json")
    options = parser.parse_args()
    known: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"experiments": {}}
    names = options.names or [*EXPERIMENTS, "digest"]
    if "digest" in names:
        known["digest"] = _digest()
    with ThreadPoolExecutor(2) as pool:
        running = {pool.submit(_run, name): name for name in names if name in EXPERIMENTS}
        for done in as_completed(running):
            known["experiments"][running[done]] = done.result()
            print(running[done], done.result(), flush=True)
            ordered = {name: known["experiments"][name] for name in EXPERIMENTS if name in known["experiments"]}
            write_json(options.out, {**known, "experiments": ordered, "environment": environment(torch.zeros(()))})
    if bad := {name: found for name, each in known["experiments"].items() if (found := wrong(each))}:
        raise SystemExit(f"it happened: {bad}")


def _run(name: str) -> dict[str, Any]:
    began = time.monotonic()
    experiment = EXPERIMENTS[name]
    (numbers,) = figures_of({name: experiment.many}).values()
    for detail in ("which", "examples"):
        numbers.pop(detail, None)
    minutes = round((time.monotonic() - began) / 60, 1)
    return {"what": experiment.what, **numbers, "minutes": minutes, "commit": environment()["commit"]}


def _digest() -> dict[str, Any]:
    """What it costs to compare all weights before a run goes on, beside a pass over 512 tokens."""
    torch.set_num_threads(1)
    loaded = load_model()
    ids = torch.arange(512)[None]
    size = sum(each.numel() * each.element_size() for each in loaded.model.parameters())
    times: dict[str, float] = {}
    for _ in range(3):
        began = time.perf_counter()
        contents(loaded.model, loaded.tokenizer)
        middle = time.perf_counter()
        with torch.no_grad():
            loaded.model(input_ids=ids, use_cache=False)
        ended = time.perf_counter()
        times["digest"] = min(times.get("digest", middle - began), middle - began)
        times["forward"] = min(times.get("forward", ended - middle), ended - middle)
    return {
        "model": loaded.name,
        "bytes": size,
        "forward passes of 512 tokens": round(times["digest"] / times["forward"], 2),
    }


if __name__ == "__main__":
    main()
