"""Give single attention instances another rotary function, and leave every other instance alone.

An attention's forward finds its rotary function as a global of its modeling file. Each instance to be patched gets a
generated subclass whose forward is the same code over other globals: those of a shadow module, a copy of the modeling
file's namespace with the rotary functions replaced. A class, because torch.compile guards on the type of a module and
not on methods bound to an instance (two patched models in one process would get each other's graph); a module in
`sys.modules`, because the compiler looks a function's globals up by their module's name. The copy is made at the first
patch: what others bind in the modeling file later does not reach patched models. Class and copy are shared by all
patched models of a kind, and go with the last of them.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ropex.patching import float32
from ropex.patching.probe import rotated
from ropex.patching.tables import Channels, RotaryFunction

__all__ = [
    "Rotating",
    "Swap",
    "channels_of",
    "class_without",
    "generated_class",
    "rotating_class",
    "shared_class",
    "swap_class",
]


class Swap(NamedTuple):
    """What a generated attention class is made from.

    Attributes:
        base: the class that it stands for.
        functions: the rotary functions that its forward calls.
        table: which of the tables that the rotary module hands over is this attention's; None: it hands over one.
        half: the pairs that turn, so that tables of another width are noticed.
        float32: whether rotated queries and keys stay float32, and attention runs in it.
        layer_type, window: of its layer, as `Attention` has them.
    """

    base: type[Any]
    functions: tuple[RotaryFunction, ...]
    table: int | None
    half: int
    float32: bool
    layer_type: str | None
    window: int | None


class Rotating:
    """Marks the generated attention classes; last in their method resolution order."""

    ropex_made_from: Swap

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is generated, so pickle cannot find it by name: name what generates it.
        return _new, (self.ropex_made_from,), self.__dict__.copy()


def _new(swap: Swap) -> Any:
    return object.__new__(rotating_class(swap))


def swap_class(module: nn.Module, cls: type[Any]) -> None:
    """Make a module an instance of a class that is generated from its own, or of its own again."""
    # accelerate's hooks keep the forward that they wrap on the instance: theirs follows the class.
    bound = ((name, vars(module).get(name)) for name in ("_old_forward", "forward"))
    follow = [name for name, method in bound if getattr(method, "__func__", None) is type(module).forward]
    if issubclass(cls, type(module)):  # so that an interrupt leaves the generated class with the other's forward
        module.__class__ = cls
    for name in follow:
        module.__dict__[name] = types.MethodType(cls.forward, module)
    module.__class__ = cls


def class_without(cls: Any, marker: Any) -> Any:
    """The class that a module has once what was generated for a marker is gone from below what others put on top.

    FSDP gives a module a class of its own made from the one that it finds, which may be a generated one.
    """
    if "ropex_made_from" in vars(cls) and issubclass(cls, marker):
        return class_without(cls.__bases__[0], marker)
    bases = tuple(class_without(base, marker) for base in cls.__bases__)
    if bases == cls.__bases__:
        return cls
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return types.new_class(cls.__name__, bases, {}, lambda namespace: namespace.update(body))


def channels_of(model: nn.Module) -> Channels:
    """Which channels of a head a patched model pairs."""
    swaps = (module.ropex_made_from for module in model.modules() if isinstance(module, Rotating))
    return next(swaps).functions[0].channels


def generated_class(base: type[Any], mixin: type[Any], namespace: dict[str, Any]) -> type[Any]:
    """A class that passes for its base, name and all, with a marker among its bases."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return types.new_class(base.__name__, (base, mixin), {}, lambda body: body.update({**names, **namespace}))


def shared_class(make: Callable[[Any], type[Any]]) -> Callable[[Any], type[Any]]:
    """One class for each argument, as long as something uses it: the compiler tells patched models apart by it."""
    made: weakref.WeakValueDictionary[Any, type[Any]] = weakref.WeakValueDictionary()

    @functools.wraps(make)
    def get(key: Any) -> type[Any]:
        cls = made.get(key)
        return made.setdefault(key, make(key)) if cls is None else cls

    return get


def rotating_function(original: Callable[..., Any], how: RotaryFunction, swap: Swap) -> Callable[..., Any]:
    """ropex's rotation with the signature of a modeling file's rotary function."""
    parameters = inspect.signature(original).parameters
    tensors = {"single": 3, "pair": 4, "complex": 3}[how.style]
    optional = list(parameters)[tensors:]
    default_axis = parameters["unsqueeze_dim"].default if "unsqueeze_dim" in parameters else None
    orders = {1: "bhsd", 2: "bshd", None: how.order}
    settings: dict[str, Any] = {"out_dtype": torch.float32} if swap.float32 else {}

    def rotate(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, args: tuple[Any, ...], kwargs: Any) -> Any:
        if cos.shape[-1] != swap.half:
            raise RuntimeError(
                f"{swap.base.__name__} was given cos {tuple(cos.shape)}, not the patch's [..., {swap.half}]: something "
                "put another rotary module in its place; patch the model anew"
            )
        if swap.table is not None:
            cos, sin = cos[swap.table], sin[swap.table]
        options = dict(zip(optional, args, strict=False)) | kwargs
        order = orders[options.get("unsqueeze_dim", default_axis)]
        return rotated(how, q, k, cos, sin, order=order, **settings)

    def apply_pair(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = rotate(q, k, cos, sin, args, kwargs)
        return out if k is not None else (out, None)

    def apply_single(x: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        return rotate(x, None, cos, sin, args, kwargs)

    def apply_complex(q: Tensor, k: Tensor, freqs_cis: Tensor, *args: Any, **kwargs: Any) -> Any:
        cos, sin = freqs_cis.unbind(0)
        return rotate(q, k, cos, sin, args, kwargs)

    styles: dict[str, Callable[..., Any]] = {"pair": apply_pair, "single": apply_single, "complex": apply_complex}
    return styles[how.style]


@shared_class
def rotating_class(swap: Swap) -> type[Any]:
    """The subclass of an attention class that rotates by ropex where the base calls its rotary functions."""
    forward = inspect.unwrap(swap.base.forward)
    module_name = forward.__globals__["__name__"]
    name = _shadow_name(module_name, swap)
    _SHADOW_USERS[name] += 1
    if (shadow := sys.modules.get(name)) is None:
        shadow = sys.modules[name] = _shadow_module(name, sys.modules[module_name], swap)
    copied = types.FunctionType(
        forward.__code__, shadow.__dict__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(copied, forward)
    del copied.__wrapped__  # type: ignore[attr-defined]  # it is no wrapper
    cls = generated_class(swap.base, Rotating, {"forward": copied, "ropex_made_from": swap})
    weakref.finalize(cls, _release_shadow, name).atexit = False
    return cls


_SHADOW_USERS: Counter[str] = Counter()  # how many classes use a shadow module


def _release_shadow(name: str) -> None:
    _SHADOW_USERS[name] -= 1
    if _SHADOW_USERS[name] <= 0:
        del _SHADOW_USERS[name]
        sys.modules.pop(name, None)


def _shadow_name(module_name: str, swap: Swap) -> str:
    functions = ".".join("-".join(map(str, how)) for how in swap.functions)
    table = "all" if swap.table is None else swap.table
    return f"ropex_shadow.{functions}.{table}.{swap.half}.{swap.float32}.{module_name}"


def _shadow_module(name: str, original: types.ModuleType, swap: Swap) -> types.ModuleType:
    shadow = types.ModuleType(name)
    replaced = {how.name: rotating_function(getattr(original, how.name), how, swap) for how in swap.functions}
    if swap.float32:
        replaced |= float32.interfaces(original)
    shadow.__dict__.update({**original.__dict__, "__name__": name, **replaced})
    return shadow
