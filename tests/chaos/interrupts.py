"""KeyboardInterrupt at any line of ropex, and what a model looks like afterwards."""

from __future__ import annotations

import functools
import itertools
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import nn

import ropex
from ropex.patching import files
from ropex.patching.patch import _restore
from tests.families import model_of

ROOT = os.path.dirname(ropex.__file__) + os.sep  # noqa: PTH120  # compared with a frame's file name, a text


def run_until(
    operation: Callable[[], object],
    at: int | None = None,
    within: tuple[str, ...] = (),
    again: int | None = None,
) -> int:
    """Run an operation, and raise KeyboardInterrupt in it before the line of ropex with this number; None: never.

    Args:
        within: names of functions, to count the lines that run while one of them does; none: all.
        again: raise it once more, before the line with this number of those that put the model back.

    Returns:
        How many lines of ropex were begun, since the first interrupt if there was one and `again` is given.
    """
    count = inside = 0
    stops = [at] if again is None else [at, again]

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal inside
        if not frame.f_code.co_filename.startswith(ROOT):
            return None
        enters = frame.f_code.co_name in within
        inside += enters

        def line(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal count, inside
            if event == "return":
                inside -= enters
            elif event == "line" and stops and (inside or not within or len(stops) < 1 + (again is not None)):
                count += 1
                if count == stops[0]:
                    stops.pop(0)
                    count = 0 if stops else count
                    raise KeyboardInterrupt
            return line

        return line

    def restore(model: nn.Module) -> list[Exception]:
        sys.settrace(trace)  # which ends with the first interrupt
        return restoring(model)

    restoring = _restore
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with mock.patch("ropex.patching.patch._restore", restoring if again is None else restore):
            operation()
    except KeyboardInterrupt:
        if at is None:
            raise
    finally:
        sys.settrace(before)
    return count


def state_of(model: nn.Module) -> list[object]:
    """All that a patch may touch: classes, hooks, attributes, configs, and which parts share a config."""
    return [*_states(model)]


def _states(model: nn.Module) -> Iterator[object]:
    configs: dict[int, int] = {}
    for name, module in model.named_modules():
        yield name, type(module)
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs"):
            yield kind, len(getattr(module, kind))
        for attribute in ("config", "generation_config"):
            if hasattr(each := module.__dict__.get(attribute), "to_dict"):
                yield configs.setdefault(id(each), len(configs)), each.to_dict()
        for attribute, value in vars(module).items():
            if isinstance(value, int | float | str | torch.dtype | None):
                yield attribute, value


FAMILIES = ("llama", "gpt_neox", "gemma3_text", "deepseek_v3")
METHODS = ("yarn", "dynamic_ntk", "clex")


def interrupt_patches(stride: int, families: tuple[str, ...] = FAMILIES) -> dict[str, Any]:
    """`patch`, `unpatch` and `load`, interrupted: the model is as it was, or fully changed.

    Of the lines that change the model, and of those of `unpatch`, each that `stride` reaches; of the much longer
    preparation one for about 40 of them.
    """
    counted: Counter[str] = Counter()
    for family, method in itertools.product(families, METHODS):
        model = model_of(family)
        plain = state_of(model)
        with tempfile.TemporaryDirectory() as folder:
            with ropex.patch(model, method, factor=2) as patch:
                done = state_of(model)
                patch.save(folder)
            assert state_of(model) == plain
            patch_it = functools.partial(ropex.patch, model, method, factor=2)
            operations: list[tuple[Callable[[], object], tuple[str, ...], int]] = [
                (patch_it, (), 40 * stride),
                (patch_it, ("_apply",), stride),
                (functools.partial(ropex.load, model, folder), ("_apply",), 3 * stride),
                (functools.partial(ropex.unpatch, model), (), stride),
            ]
            for operation, within, step in operations:
                for at in itertools.count(1 + counted["lines"] % step, step):
                    if operation is operations[-1][0]:
                        patch_it()
                    if run_until(operation, at, within) < at:
                        break
                    counted["lines"] += 1
                    state = state_of(model)
                    counted["as before" if state == plain else "changed" if state == done else "half patched"] += 1
                    if state != plain:
                        ropex.unpatch(model)
                    counted["half patched"] += state_of(model) != plain
                if ropex.patching.find_patch(model) is not None:
                    ropex.unpatch(model)
    return {"tried": counted["lines"], **{name: counted[name] for name in ("as before", "changed", "half patched")}}


def interrupt_twice(stride: int) -> dict[str, Any]:
    """`patch` interrupted, and what puts the model back interrupted, too: `unpatch` finds what is there."""
    model = model_of("llama")
    plain = state_of(model)
    tried = stuck = 0
    for method in METHODS:

        def patch(method: str = method) -> None:
            ropex.patch(model, method, factor=2)

        lines = run_until(patch, within=("_apply",))
        ropex.unpatch(model)
        for first in range(1, lines, 5 * stride):
            for again in itertools.count(1, 7 * stride):
                reached = run_until(patch, first, ("_apply",), again) == again
                if ropex.patching.find_patch(model) is not None or state_of(model) != plain:
                    ropex.unpatch(model)
                stuck += state_of(model) != plain
                if not reached:  # what puts the model back has fewer lines
                    break
                tried += 1
    return {"tried": tried, "half patched": stuck}


def interrupt_saves(stride: int) -> dict[str, Any]:
    """`Patch.save` over an earlier save, interrupted: one of the two loads, and the next save leaves two files."""
    patch = ropex.patch(model_of("llama"), "clex", factor=2)
    learned = list(patch.rotary.parameters())
    tried = lost = left = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        patch.save(folder)
        for at in itertools.count(1, stride):
            with torch.no_grad():
                for parameter in learned:
                    parameter.fill_(float(tried))
            if run_until(functools.partial(patch.save, folder), at) < at:
                break
            tried += 1
            try:
                files.read(folder)
            except ValueError:
                lost += 1
            patch.save(folder)
            left += len(list(folder.iterdir())) != 2
    return {"tried": tried, "lost": lost, "left behind": left}
