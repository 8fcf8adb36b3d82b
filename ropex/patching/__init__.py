"""Patching transformers models in place: this instance only, checked by a probe, undone bit for bit."""

from ropex.patching.config import UnsupportedModelError
from ropex.patching.inspect import Inspection, depends_on_length, inspect
from ropex.patching.patch import Patch, patch, unpatch

__all__ = ["Inspection", "Patch", "UnsupportedModelError", "depends_on_length", "inspect", "patch", "unpatch"]
