"""Patching transformers models in place: this instance only, checked by a probe, undone bit for bit."""

from ropex.patching.config import UnsupportedModelError
from ropex.patching.inspect import Inspection, LayerKind, depends_on_length, inspect
from ropex.patching.patch import Patch, load, patch, unpatch

__all__ = [
    "Inspection",
    "LayerKind",
    "Patch",
    "UnsupportedModelError",
    "depends_on_length",
    "inspect",
    "load",
    "patch",
    "unpatch",
]
