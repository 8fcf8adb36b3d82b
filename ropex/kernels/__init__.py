"""The rotation itself: exact angles, float32 arithmetic, gradients to the frequencies."""

from ropex.kernels.backend import Backend, choose_backend
from ropex.kernels.norm import norm_rotate
from ropex.kernels.phase import cos_sin, fixed_frequency, phase
from ropex.kernels.rotate import Angles, Layout, Order, rotate, rotate_with_table, table
from ropex.kernels.tune import tune

__all__ = [
    "Angles",
    "Backend",
    "Layout",
    "Order",
    "choose_backend",
    "cos_sin",
    "fixed_frequency",
    "norm_rotate",
    "phase",
    "rotate",
    "rotate_with_table",
    "table",
    "tune",
]
