"""Patching transformers models in place: this instance only, checked by a probe, undone bit for bit."""

from ropex.patching.config import UnsupportedModelError
from ropex.patching.export import Export, empty_model, export
from ropex.patching.generation import cache_argument, cache_of
from ropex.patching.groups import param_groups
from ropex.patching.inspect import Inspection, LayerKind, depends_on_length, explain, inspect
from ropex.patching.patch import OnScaled, Patch, find_patch, load, patch, unpatch

__all__ = [
    "Export",
    "Inspection",
    "LayerKind",
    "OnScaled",
    "Patch",
    "UnsupportedModelError",
    "cache_argument",
    "cache_of",
    "depends_on_length",
    "empty_model",
    "explain",
    "export",
    "find_patch",
    "inspect",
    "load",
    "param_groups",
    "patch",
    "unpatch",
]
