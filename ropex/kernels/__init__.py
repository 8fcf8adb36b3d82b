"""The rotation itself: exact angles, float32 arithmetic, gradients to the frequencies."""

from ropex.kernels.phase import cos_sin, fixed_frequency, phase
from ropex.kernels.rotate import Angles, Backend, Layout, Order, rotate, rotate_with_table, table

__all__ = [
    "Angles",
    "Backend",
    "Layout",
    "Order",
    "cos_sin",
    "fixed_frequency",
    "phase",
    "rotate",
    "rotate_with_table",
    "table",
]
