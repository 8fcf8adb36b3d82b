"""Memory over many cycles: what a patch makes goes with the last model that uses it."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import torch

import ropex
from ropex.patching import cache_of
from ropex.patching.swap import Rotating
from tests.families import model_of


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.exists() else 0


def _objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def cycle_models(count: int) -> dict[str, Any]:
    """Patch a fresh model, use it, unpatch it or drop it as it is; each of another shape, so that nothing is shared."""
    families = ("llama", "gemma3_text")

    def cycle(i: int) -> None:
        model = model_of(families[i % 2], sliding_window=16 + i, head_dim=16 + 2 * (i % 24))
        patch = ropex.patch(model, ("yarn", "dynamic_ntk", "clex")[i % 3], factor=2)
        with torch.no_grad():
            model(input_ids=torch.arange(8)[None])
        if i % 4:
            patch.remove()

    for i in range(min(count, 100)):  # what is made once is made
        cycle(i)
    objects, memory = _objects(), resident()
    for i in range(count):
        cycle(i)
    more, grown = _objects() - objects, resident() - memory
    left = [name for name in sys.modules if name.startswith("ropex_shadow")]
    return {
        "tried": count,
        "objects more": more,
        "megabytes more": round(grown / 2**20, 1),
        "left behind": len(left) + len(Rotating.__subclasses__()),
    }


def caches_without_a_collector(count: int) -> dict[str, Any]:
    """Caches that a length-dependent patch has seen go with their last reference."""
    model = model_of("llama")
    ropex.patch(model, "dynamic_ntk", factor=2)
    kept = 0
    gc.collect()
    gc.disable()
    try:
        for _ in range(count):
            with torch.no_grad():
                cache = cache_of(model(input_ids=torch.arange(8)[None], use_cache=True))
            alive = weakref.ref(cache)
            del cache
            kept += alive() is not None
    finally:
        gc.enable()
    return {"tried": count, "left behind": kept}
