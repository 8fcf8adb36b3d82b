"""Give single attention instances another rotary function, and leave every other instance alone.

An attention's forward finds its rotary function as a global of its modeling file. Each instance to be patched gets a
generated subclass whose forward is the same code over other globals: those of a shadow module, a copy of the modeling
file's namespace with the one function replaced. A class, because torch.compile guards on the type of a module and not
on methods bound to an instance (two patched models in one process would get each other's graph); a module in
`sys.modules`, because the compiler looks a function's globals up by their module's name. The copy is made at the first
patch: what others bind in the modeling file later does not reach patched models.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ropex.kernels import Order, rotate_with_table
from ropex.kernels.reference import half_table
from ropex.patching.tables import Pairing

__all__ = ["Rotating", "rotary_function_name", "rotating_class"]

_PREFIX = "apply_rotary"


class Rotating:
    """Marks the generated attention classes; last in their method resolution order."""

    ropex_made_from: tuple[type[Any], str, Pairing]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is generated, so pickle cannot find it by name: name what generates it.
        return _new, self.ropex_made_from, self.__dict__.copy()


def _new(base: type[Any], function: str, pairing: Pairing) -> Any:
    return object.__new__(rotating_class(base, function, pairing))


def rotary_function_name(cls: type[nn.Module]) -> str | None:
    """The global by which the class's forward calls its rotary function; None where it calls none."""
    forward = inspect.unwrap(cls.forward)
    code = getattr(forward, "__code__", None)
    if code is None:
        return None
    named = [name for name in code.co_names if name.startswith(_PREFIX)]
    return next((name for name in named if callable(forward.__globals__.get(name))), None)


def rotating_function(original: Callable[..., Any], pairing: Pairing) -> Callable[..., Any]:
    """`rotate_with_table` with the signature of a modeling file's rotary function."""
    parameters = inspect.signature(original).parameters
    optional = list(parameters)[4:]
    default_axis = parameters["unsqueeze_dim"].default if "unsqueeze_dim" in parameters else 1

    def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = dict(zip(optional, args, strict=False)) | kwargs
        order: Order = "bhsd" if options.get("unsqueeze_dim", default_axis) == 1 else "bshd"
        cos, sin = half_table(cos, pairing.table), half_table(sin, pairing.table)
        return rotate_with_table(q, k, cos, sin, layout=pairing.channels, order=order)

    return apply_rotary


# The identity of a class is the point: one per attention class, function and pairing.
_CLASSES: dict[tuple[type[Any], str, Pairing], type[Any]] = {}


def rotating_class(base: type[Any], function: str, pairing: Pairing) -> type[Any]:
    """The subclass of an attention class that rotates by ropex where the base calls the global `function`."""
    made_from = (base, function, pairing)
    if made_from not in _CLASSES:
        _CLASSES[made_from] = _make_class(*made_from)
    return _CLASSES[made_from]


def _make_class(base: type[Any], function: str, pairing: Pairing) -> type[Any]:
    forward = inspect.unwrap(base.forward)
    shadow = _shadow_module(forward.__globals__["__name__"], function, pairing)
    copied = types.FunctionType(
        forward.__code__, shadow.__dict__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(copied, forward)
    del copied.__wrapped__  # type: ignore[attr-defined]  # it is no wrapper
    namespace = {
        "forward": copied,
        "ropex_made_from": (base, function, pairing),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return types.new_class(base.__name__, (base, Rotating), {}, lambda body: body.update(namespace))


def _shadow_module(name: str, function: str, pairing: Pairing) -> types.ModuleType:
    shadow_name = f"ropex_shadow.{function}.{pairing.table}.{pairing.channels}.{name}"
    if shadow_name not in sys.modules:
        original = sys.modules[name]
        shadow = types.ModuleType(shadow_name)
        replaced = rotating_function(getattr(original, function), pairing)
        shadow.__dict__.update({**original.__dict__, "__name__": shadow_name, function: replaced})
        sys.modules[shadow_name] = shadow
    return sys.modules[shadow_name]
