"""Which code runs a rotation."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ropex.kernels import compiled

__all__ = ["BACKENDS", "Backend", "choose_backend", "require_backend", "resolve_backend", "under_torch_func"]

Backend = Literal["auto", "reference", "compiled", "triton"]
BACKENDS = get_args(Backend)

# Elements of q and k together from which the compiled form pays on a CPU: it saves milliseconds per call and costs
# seconds once.
LARGE = 2**22


def choose_backend(
    device: str, dtype: torch.dtype, elements: int, *, triton: bool, compiler: bool, tracing: bool, transformed: bool
) -> Backend:
    """What `backend="auto"` means: a function of its arguments and of nothing else.

    Args:
        device: type of the device, `cpu` or `cuda` (which is ROCm's too) or another.
        dtype: of q.
        elements: of q and k together.
        triton: whether Triton is installed.
        compiler: whether torch.compile can make code for the CPU.
        tracing: whether torch.compile or torch.export is looking, which fuses the reference by itself.
        transformed: whether a transform of torch.func or forward-mode differentiation is at work, which the reference
            alone follows everywhere.

    Returns:
        `triton` on a GPU and `compiled` for large tensors on a CPU; `reference` otherwise, and always for float64,
        under torch.func and in forward-mode differentiation.
    """
    if dtype == torch.float64 or transformed:
        return "reference"
    if device == "cuda" and triton:
        return "triton"
    if device == "cpu" and compiler and not tracing and elements >= LARGE:
        return "compiled"
    return "reference"


HAS_TRITON = importlib.util.find_spec("triton") is not None


def require_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `ValueError` unless the named backend can run on this device and dtype."""
    if backend in ("auto", "reference"):
        return
    if dtype == torch.float64:
        raise ValueError(f'backend="{backend}" with float64: must be a narrower dtype; pass backend="reference"')
    if backend == "compiled" and not (device.type == "cpu" and compiled.HAS_COMPILER):
        raise ValueError(
            f'backend="compiled" on {device}: needs tensors on the CPU, a C++ compiler, the headers of Python, and '
            'torch.compile enabled; install them or pass backend="reference"'
        )
    if backend == "triton" and not (HAS_TRITON and (device.type == "cuda" or _interprets(device))):
        raise ValueError(
            f'backend="triton" on {device}: needs Triton and a GPU; pass backend="auto", or, to run the interpreter on '
            "the CPU, set TRITON_INTERPRET=1 before the first rotation"
        )


def resolve_backend(backend: str, tensors: Sequence[Tensor]) -> str:
    """The backend that runs: the named one, or for `auto` what `choose_backend` says of q and k.

    Raises:
        ValueError: the named backend cannot run here.
    """
    q = tensors[0]
    require_backend(backend, q.device, q.dtype)
    if backend not in ("auto", "reference") and _in_forward_mode():
        raise ValueError(
            f'backend="{backend}" in forward-mode differentiation: has a backward pass alone; pass backend="reference"'
        )
    if backend != "auto":
        return backend
    return choose_backend(
        q.device.type,
        q.dtype,
        sum(x.numel() for x in tensors),
        triton=HAS_TRITON,
        compiler=compiled.HAS_COMPILER,
        tracing=torch.compiler.is_compiling(),
        transformed=under_torch_func() or _in_forward_mode(),
    )


def under_torch_func() -> bool:
    """Whether a transform such as torch.func.vmap or grad is at work; tracing sees none."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _in_forward_mode() -> bool:
    # An operator without a forward-mode rule would give a derivative of zero and no error.
    return torch.autograd.forward_ad._current_level >= 0


def _interprets(device: torch.device) -> bool:
    if device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return False
    from ropex.kernels.triton_kernels import INTERPRETED

    return INTERPRETED
