"""The rotation compiled by TorchInductor, for large tensors on a CPU.

One pass over q and one over k, into outputs allocated beforehand: the eager form makes five. Compiling takes a few
seconds per combination of dtypes, heads and head_dim, once; a second length compiles once more, for all lengths.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropex.kernels import reference
from ropex.kernels.reference import Source

__all__ = ["HAS_COMPILER", "angle_gradients", "rotate"]


def _has_compiler() -> bool:
    if any(os.environ.get(name) == "1" for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")):
        return False
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", default).split()
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return bool(compiler) and shutil.which(compiler[0]) is not None and headers.exists()


# Whether torch.compile can make code for this CPU: a C++ compiler, Python's headers, and leave to compile.
HAS_COMPILER = _has_compiler()


@torch.no_grad()
def rotate(
    pairs: list[tuple[Tensor, Tensor]], source: Source, *, conjugate: bool, interleaved: bool, split: bool
) -> None:
    """Write each rotated x into its output, which may be x itself; [batch, heads, seq, head_dim]."""
    first, second, amplitude, scale, table = source
    dtype = torch.promote_types(pairs[0][0].dtype, torch.float32)
    if table:
        cos, sin = source.tables(dtype)
    else:
        cos, sin = _run(_tables, first, second, amplitude, dtype)
        if scale != 1:  # a number is part of the code that torch.compile makes
            cos, sin = cos * scale, sin * scale
    if conjugate:
        sin = -sin
    for x, out in pairs:
        # The compiler would take a number and its rounding for one and find nothing left: the parts are made here.
        whole = torch.empty_like(x, dtype=dtype) if split else out
        _run(_turn, x, cos, sin, whole, interleaved)
        if split:
            out[0] = whole
            out[1] = whole - out[0]


@torch.no_grad()
def angle_gradients(x: Tensor, grad: Tensor, half: int, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """`reference.angle_gradients` in one pass."""
    along, across = _run(_angle_gradients, x, grad, half, interleaved)
    return along, across


def _angle_gradients(x: Tensor, grad: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    return reference.angle_gradients(x, grad, half, interleaved=interleaved)


def _tables(first: Tensor, second: Tensor, amplitude: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return Source(first, second, amplitude).tables(dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, interleaved: bool) -> None:
    cos, sin = cos[:, None], sin[:, None]
    half = cos.shape[-1]
    turning = x[..., : 2 * half].to(cos.dtype)
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        both = turning.unflatten(-1, (2, half))
        turned = (both * cos.unsqueeze(-2) + both.flip(-2) * torch.stack((-sin, sin), dim=-2)).flatten(-2)
    out[..., 2 * half :].copy_(x[..., 2 * half :])
    out[..., : 2 * half].copy_(turned)


# torch.compile keeps few variants of one code object, and falls back to eager beyond them. So each of what it makes
# variants for has a code object of its own, where only lengths and batches differ.
_COMPILED: dict[tuple[Any, ...], Callable[..., Any]] = {}


def _run(function: Any, *arguments: Any) -> Any:
    tensors = {id(x): x.detach() for x in arguments if isinstance(x, Tensor)}  # one for one: in place x is the output
    arguments = tuple(tensors.get(id(x), x) for x in arguments)
    key = (function, len(tensors), torch.is_inference_mode_enabled(), *(_variant(x) for x in arguments))
    if key not in _COMPILED:
        copied = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        _COMPILED[key] = torch.compile(copied)
    return _COMPILED[key](*arguments)


def _variant(x: Any) -> Any:
    """What torch.compile's code depends on in an argument, lengths and batches left out."""
    if not isinstance(x, Tensor):
        return x
    sizes, strides = x.shape, x.stride()
    fixed = {4: (*sizes[-3:-2], *sizes[-1:]), 3: sizes[-1:]}.get(x.dim(), ())  # heads and channels
    order = sorted(range(x.dim()), key=lambda axis: -strides[axis])
    return (
        (x.dtype, x.is_inference(), *fixed, *order),
        tuple((size == 1, stride == 0, stride == 1) for size, stride in zip(sizes, strides, strict=True)),
    )
