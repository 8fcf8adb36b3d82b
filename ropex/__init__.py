"""Longer contexts for models with rotary position embeddings.

`ropex.patch(model, method="yarn", factor=8)` extends a transformers model in place. Below it stand the parts that can
be used alone: schedules (`ropex.schedule`), the rotation (`ropex.rotate`), a module (`ropex.RotaryEmbedding`), and the
measuring (`ropex.evaluation`).
"""

from ropex import draws, evaluation, kernels, precision, scaling
from ropex._version import __version__ as __version__
from ropex.kernels import rotate
from ropex.patching import Inspection, LayerKind, Patch, UnsupportedModelError, inspect, load, patch, unpatch
from ropex.rotary import RotaryEmbedding
from ropex.rotation import Geometry, Request, Rotation
from ropex.scaling import FrequencySchedule, methods, schedule

__all__ = [
    "FrequencySchedule",
    "Geometry",
    "Inspection",
    "LayerKind",
    "Patch",
    "Request",
    "RotaryEmbedding",
    "Rotation",
    "UnsupportedModelError",
    "draws",
    "evaluation",
    "inspect",
    "kernels",
    "load",
    "methods",
    "patch",
    "precision",
    "rotate",
    "scaling",
    "schedule",
    "unpatch",
]
