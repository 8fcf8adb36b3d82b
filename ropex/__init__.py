"""Longer contexts for models with rotary position embeddings.

`ropex.patch(model, method="yarn", factor=8)` extends a transformers model in place. Below it stand the parts that can
be used alone: schedules (`ropex.schedule`), the rotation (`ropex.rotate`), a module (`ropex.RotaryEmbedding`), and the
measuring (`ropex.evaluation`).
"""

from typing import TYPE_CHECKING, Any

from ropex import draws, evaluation, kernels, precision, scaling
from ropex._version import __version__ as __version__
from ropex.kernels import rotate
from ropex.patching import (
    Export,
    Inspection,
    LayerKind,
    Patch,
    UnsupportedModelError,
    export,
    inspect,
    load,
    param_groups,
    patch,
    unpatch,
)
from ropex.recommend import Recommendation, recommend
from ropex.rotary import RotaryEmbedding
from ropex.rotation import Geometry, Request, Rotation
from ropex.scaling import FrequencySchedule, methods, schedule

if TYPE_CHECKING:
    from ropex.patching.training import RopexCallback

__all__ = [
    "Export",
    "FrequencySchedule",
    "Geometry",
    "Inspection",
    "LayerKind",
    "Patch",
    "Recommendation",
    "Request",
    "RopexCallback",
    "RotaryEmbedding",
    "Rotation",
    "UnsupportedModelError",
    "draws",
    "evaluation",
    "export",
    "inspect",
    "kernels",
    "load",
    "methods",
    "param_groups",
    "patch",
    "precision",
    "recommend",
    "rotate",
    "scaling",
    "schedule",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name == "RopexCallback":  # imports transformers, which `import ropex` must not
        from ropex.patching.training import RopexCallback

        return RopexCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
