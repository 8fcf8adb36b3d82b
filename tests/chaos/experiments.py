"""All that is tried, and how often: a few in `make test`, many in `make chaos`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.chaos.cycles import caches_without_a_collector, cycle_models
from tests.chaos.disks import broken_inputs, failing_writer, full_disks
from tests.chaos.fuzz import fuzz
from tests.chaos.interrupts import interrupt_patches, interrupt_saves, interrupt_twice
from tests.chaos.kills import (
    cells_of_two,
    commands_of_two,
    kill_exports,
    kill_measurements,
    kill_saves,
    read_beside_a_writer,
)

__all__ = ["EXPERIMENTS", "Experiment", "figures_of", "wrong"]


class Experiment(NamedTuple):
    """What is tried.

    Attributes:
        what: in a sentence, for the docs.
        run: takes a count, gives figures by name; `tried` is how many, and each of `NEVER` must be 0.
        few, many: the count in `make test`, and in `make chaos`.
    """

    what: str
    run: Callable[[int], dict[str, Any]]
    few: int
    many: int


NEVER = ("lost", "left behind", "crashed", "half patched", "foreign", "failed")

EXPERIMENTS = {
    "interrupt_patches": Experiment(
        "`patch`, `unpatch` and `load` interrupted (KeyboardInterrupt) before a line of ropex; four families, "
        "`yarn`, `dynamic_ntk`, `clex`",
        lambda stride: interrupt_patches(stride) if stride < 100 else interrupt_patches(stride, ("llama",)),
        150,
        3,
    ),
    "interrupt_twice": Experiment(
        "`patch` interrupted, and what puts the model back interrupted, too; then `unpatch`", interrupt_twice, 25, 8
    ),
    "interrupt_saves": Experiment(
        "`Patch.save` over an earlier save interrupted before a line of ropex", interrupt_saves, 40, 1
    ),
    "kill_saves": Experiment(
        "`Patch.save` over an earlier save killed (SIGKILL), every fourth time with two writers", kill_saves, 12, 400
    ),
    "read_beside_a_writer": Experiment(
        "saves read while another process saves over them", read_beside_a_writer, 100, 5000
    ),
    "kill_exports": Experiment("`ropex export` killed; then another export beside it", kill_exports, 4, 200),
    "kill_measurements": Experiment(
        "`ropex perplexity`, `retrieval` and `compare` killed, and run again with the same `--out` until they end",
        kill_measurements,
        1,
        100,
    ),
    "cells_of_two": Experiment("two processes that measure into one file of cells", cells_of_two, 6, 300),
    "commands_of_two": Experiment("two commands with the same `--out` at once", commands_of_two, 1, 60),
    "full_disks": Experiment(
        "disks that are full, become full or cannot be written: measuring, saving, exporting, drawing",
        lambda mounts: full_disks() if mounts else failing_writer(),
        0,
        1,
    ),
    "broken_inputs": Experiment(
        "commands with broken models, configs, YAML, texts, names and numbers: exit code 2 and a message, no traceback",
        lambda count: broken_inputs(every=count),
        9,
        1,
    ),
    "fuzz": Experiment("calls of public functions with values of mixed types (hypothesis)", fuzz, 300, 20_000),
    "cycle_models": Experiment(
        "fresh models of other shapes patched, used, and unpatched or dropped", cycle_models, 12, 2000
    ),
    "caches_without_a_collector": Experiment(
        "caches that a length-dependent patch has seen, freed without the garbage collector",
        caches_without_a_collector,
        20,
        1000,
    ),
}


def figures_of(counts: dict[str, int]) -> dict[str, dict[str, Any]]:
    """The figures of experiments, run one after the other in a process of their own."""
    root = Path(__file__).parents[2]
    asked = [str(each) for item in counts.items() for each in item]
    done = subprocess.run([sys.executable, "-m", "tests.chaos", *asked], capture_output=True, text=True, cwd=root)
    if done.returncode:
        raise RuntimeError(f"{counts}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    figures: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return figures


def wrong(figures: dict[str, Any]) -> dict[str, Any]:
    """What should never have happened, of an experiment's figures; empty: nothing of it did."""
    found = {name: figures[name] for name in NEVER if figures.get(name)}
    return found if figures["tried"] else {"tried": 0}
