"""Which code runs a rotation."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, get_args

import torch

from ropex.kernels import compiled

__all__ = ["HAS_TRITON", "Backend", "choose_backend", "require_backend"]

Backend = Literal["auto", "reference", "compiled", "triton"]
BACKENDS = get_args(Backend)

# Elements of q and k together from which the compiled form pays on a CPU: it saves milliseconds per call and costs
# seconds once.
LARGE = 2**23


def choose_backend(
    device: str, dtype: torch.dtype, elements: int, *, triton: bool, compiler: bool, tracing: bool
) -> Backend:
    """What `backend="auto"` means: a function of its arguments and of nothing else.

    Args:
        device: type of the device, `cpu` or `cuda` (which is ROCm's too) or another.
        dtype: of q.
        elements: of q and k together.
        triton: whether Triton is installed.
        compiler: whether torch.compile can make code for the CPU.
        tracing: whether torch.compile or torch.export is looking, which fuses the reference by itself.

    Returns:
        `triton` on a GPU, `compiled` for large tensors on a CPU, `reference` otherwise and for float64 everywhere.
    """
    if dtype == torch.float64:
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


def _interprets(device: torch.device) -> bool:
    if device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return False
    from ropex.kernels.triton_kernels import INTERPRETED

    return INTERPRETED
