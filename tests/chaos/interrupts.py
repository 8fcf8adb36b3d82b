"""KeyboardInterrupt at any line of ropex, and what a model looks like afterwards."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

import ropex

ROOT = os.path.dirname(ropex.__file__) + os.sep  # noqa: PTH120  # compared with a frame's file name, a text


def run_until(operation: Callable[[], object], at: int | None = None, within: tuple[str, ...] = ()) -> int:
    """Run an operation, and raise KeyboardInterrupt in it before the line of ropex with this number; None: never.

    Args:
        within: names of functions, to count the lines that run while one of them does; none: all.

    Returns:
        How many lines of ropex were begun; `at` where it was interrupted.
    """
    count = inside = 0

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
            elif event == "line" and (inside or not within) and (at is None or count < at):
                count += 1
                if count == at:
                    raise KeyboardInterrupt
            return line

        return line

    before = sys.gettrace()
    sys.settrace(trace)
    try:
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
