"""SIGKILL at random moments, and two processes in one place: what is on disk is whole, and nothing is lost."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import ropex
from ropex.evaluation.results import Cells
from ropex.patching import files
from tests.chaos.processes import Bench, Child, command, nap, result_of, traceback_in
from tests.oracles import tiny_model


def _learning() -> tuple[ropex.Patch, list[torch.nn.Parameter]]:
    patch = ropex.patch(tiny_model("llama", hidden_size=512), "clex", factor=4)
    learned = list(patch.rotary.parameters())
    with torch.no_grad():
        for parameter in learned:
            parameter.fill_(0.0)
    return patch, learned


def _saving_on(patch: ropex.Patch, learned: list[torch.nn.Parameter], folder: Path) -> None:
    """Save, change all weights by the same, and so on."""
    while True:
        with torch.no_grad():
            for parameter in learned:
                parameter.add_(1.0)
        patch.save(folder)


def _is_whole(folder: Path) -> bool:
    """Whether a save can be read, and is of one moment."""
    try:
        weights = files.read(folder).weights
    except ValueError:
        return False
    return len({value for each in weights.values() for value in each.unique().tolist()}) == 1


def kill_saves(count: int) -> dict[str, Any]:
    """`Patch.save` over an earlier save, killed; every fourth time with two writers."""
    patch, learned = _learning()
    bench, lost, left = Bench(), 0, 0
    for i in range(count):
        folder = Path(tempfile.mkdtemp(dir=bench.folder))
        patch.save(folder)
        writers = [Child(lambda f=folder: _saving_on(patch, learned, f)) for _ in range(1 + (i % 4 == 0))]  # type: ignore[misc]
        nap(0.005, 0.04, bench.random)
        for writer in writers:
            writer.kill()
        lost += not _is_whole(folder)
        patch.save(folder)  # the next run
        lost += not _is_whole(folder)
        left += len(list(folder.iterdir())) != 2
    return {"tried": count, "lost": lost, "left behind": left}


def read_beside_a_writer(count: int) -> dict[str, Any]:
    """Reads of a save while another process saves over it."""
    patch, learned = _learning()
    folder = Bench().new()
    patch.save(folder)
    writer = Child(lambda: _saving_on(patch, learned, folder))
    torn = sum(not _is_whole(folder) for _ in range(count))
    writer.kill()
    return {"tried": count, "lost": torn}


def kill_exports(count: int) -> dict[str, Any]:
    """`ropex export`, killed: the new directory is whole or not there, and the next export works and cleans up."""
    bench = Bench()
    model = tiny_model("llama", vocab_size=260)
    ropex.patch(model, "yarn", factor=4).save(bench.model)
    (bench.model / "large.bin").write_bytes(bytes(2**24))
    out = bench.new()
    began = time.monotonic()
    ropex.export(bench.model, "transformers", out)
    seconds = time.monotonic() - began
    whole = sorted(path.name for path in out.iterdir())
    half = left = killed = 0
    for _ in range(count):
        parent = bench.new()
        out = parent / "out"
        child = Child(lambda out=out: ropex.export(bench.model, "transformers", out) and None)  # type: ignore[misc]
        nap(0, 1.5 * seconds, bench.random)
        killed += child.kill()
        half += out.exists() and sorted(path.name for path in out.iterdir()) != whole
        again = parent / "again"
        ropex.export(bench.model, "transformers", again)
        half += sorted(path.name for path in again.iterdir()) != whole
        left += any(path.name.startswith(".ropex") for path in parent.iterdir())
    return {"tried": count, "killed": killed, "lost": half, "left behind": left}


def kill_measurements(count: int) -> dict[str, Any]:
    """The measuring commands, killed and run again until they end: as if nothing had happened."""
    bench, lost, kills, left = Bench(), 0, 0, 0
    kinds = ("retrieval", "perplexity", "compare")[:count]
    wanted: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for kind in kinds:
        out, began = bench.new(), time.monotonic()
        assert Child(command(*bench.measuring(kind, out)), bench.folder / "log").wait() == 0
        wanted[kind], seconds[kind] = result_of(out, kind), time.monotonic() - began
    runs = 0
    while kills < count:
        kind, out = kinds[runs % len(kinds)], bench.new()
        runs += 1
        before: dict[str, Any] = {}
        for attempt in range(20):
            child = Child(command(*bench.measuring(kind, out)), bench.folder / "log")
            nap(0.2 * seconds[kind], (0.9 + attempt / 10) * seconds[kind], bench.random)
            died = child.kill()
            kills += died
            cells = out / "cells.json"
            now = json.loads(cells.read_text())["cells"] if cells.exists() else {}
            lost += any(now.get(key) != value for key, value in before.items())
            before = now
            if not died:
                break
        lost += Child(command(*bench.measuring(kind, out)), bench.folder / "log").wait() != 0
        lost += result_of(out, kind) != wanted[kind]
        left += any(path.name.startswith(".ropex") for path in out.iterdir())
    return {"tried": kills, "runs": runs, "lost": lost, "left behind": left}


def cells_of_two(count: int) -> dict[str, Any]:
    """Two processes that measure into one file: each part is kept, and none is measured by both after it is there."""
    bench, lost, crashed = Bench(), 0, 0
    for _ in range(count):
        folder = bench.new()
        folder.mkdir()

        def measure(number: int, folder: Path = folder) -> None:
            cells = Cells(folder / "cells.json", {"model": "m"})
            for i in range(8):
                cells.get(f"run {number} part {i}", lambda: [1.0] * 100)
                cells.get(f"part {i} of both", lambda: [1.0] * 100)

        children = [Child(lambda n=n: measure(n), folder / f"log{n}") for n in range(2)]  # type: ignore[misc]
        crashed += sum(child.wait() != 0 for child in children)
        known = json.loads((folder / "cells.json").read_text())["cells"]
        lost += 24 - len(known)
    return {"tried": count, "lost": lost, "crashed": crashed}


def commands_of_two(count: int) -> dict[str, Any]:
    """Two commands with the same --out at once: one measures, the other is refused with the owner's process id."""
    bench, lost, crashed = Bench(), 0, 0
    for i in range(count):
        out = bench.new()
        kind = ("perplexity", "compare")[i % 2]
        logs = [bench.folder / f"log{n}" for n in range(2)]
        children = [Child(command(*bench.measuring(kind, out)), log) for log in logs]
        codes = [child.wait() for child in children]
        refused = [log for code, log in zip(codes, logs, strict=True) if code == 2]
        told = all("is in use by process" in log.read_text() for log in refused)
        crashed += sum(code not in (0, 2) for code in codes) + sum(map(traceback_in, logs)) + (not told)
        lost += 0 not in codes or not (out / f"{kind}.json").exists()
    return {"tried": count, "lost": lost, "crashed": crashed}
