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
        make = _compiled(_tables, dtype, second.dtype, second.shape[-1], second.shape[1] == 1, amplitude is not None)
        cos, sin = make(first, second.detach(), amplitude.detach() if amplitude is not None else None, dtype)
        if scale != 1:  # a number is part of the code that torch.compile makes
            cos, sin = cos * scale, sin * scale
    cos, sin = cos.detach(), (-sin if conjugate else sin).detach()
    for x, out in pairs:
        # The compiler would take a number and its rounding for one and find nothing left: the parts are made here.
        whole = torch.empty_like(x, dtype=dtype) if split else out
        sizes = (x.shape[0] == 1, x.shape[1], x.shape[-1], cos.shape[-1])
        options = (x.dtype, whole.dtype, dtype, interleaved, x is whole)
        turn = _compiled(_turn, *sizes, *options, _order(x), _order(whole))
        turn(whole if x is whole else x.detach(), cos, sin, whole, interleaved)
        if split:
            out[0] = whole
            out[1] = whole - out[0]


@torch.no_grad()
def angle_gradients(x: Tensor, grad: Tensor, half: int, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """`reference.angle_gradients` in one pass."""
    sizes = (x.shape[0] == 1, x.shape[1], x.shape[-1], half)
    make = _compiled(_angle_gradients, *sizes, x.dtype, grad.dtype, interleaved, _order(x), _order(grad))
    along, across = make(x.detach(), grad.detach(), half, interleaved)
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


# torch.compile keeps few variants of one code object, and falls back to eager beyond; each key has a code of its own.
_COMPILED: dict[tuple[Any, ...], Callable[..., Any]] = {}


def _compiled(function: Any, *key: Any) -> Callable[..., Any]:
    if (function, *key) not in _COMPILED:
        copied = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        _COMPILED[(function, *key)] = torch.compile(copied)
    return _COMPILED[(function, *key)]


def _order(x: Tensor) -> tuple[int, ...]:
    """The axes from the slowest to the fastest, which the generated code depends on."""
    strides = x.stride()
    return tuple(sorted(range(x.dim()), key=lambda axis: -strides[axis]))
