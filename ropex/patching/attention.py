"""What one attention does: which rotary functions it calls, whether it slides, and what follows the rotation."""

from __future__ import annotations

import dis
import functools
import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ropex.patching.config import text_config
from ropex.patching.dry import bare_class

__all__ = ["Attention", "norm_follows", "rotary_functions", "settings_under", "window_of"]

_ROTARY = re.compile(r"apply\w*(rotary|rope)")
_INTERFACE = ("ALL_ATTENTION_FUNCTIONS", "eager_attention_forward")
_SLIDING_TYPES = ("sliding", "chunked", "local")


@dataclass(frozen=True)
class Attention:
    """One attention instance that rotates.

    Attributes:
        module: the instance.
        path: its name in the model.
        functions: the globals by which its forward calls rotary functions.
        layer_type: what its layer is called in the config; None where all layers are of one type.
        window: the tokens that it sees, None: all.
        slides: whether its window ends within the trained length.
        norm_follows: whether queries and keys are normalised after the rotation.
    """

    module: nn.Module
    path: str
    functions: tuple[str, ...]
    layer_type: str | None
    window: int | None
    slides: bool
    norm_follows: bool


@functools.lru_cache(maxsize=256)
def rotary_functions(cls: type[nn.Module]) -> tuple[str, ...]:
    """The globals by which the class's forward calls rotary functions."""
    forward = inspect.unwrap(cls.forward)
    code = getattr(forward, "__code__", None)
    if code is None:
        return ()
    return tuple(name for name in code.co_names if _ROTARY.match(name) and callable(forward.__globals__.get(name)))


@functools.lru_cache(maxsize=256)
def calls_interface(cls: type[nn.Module]) -> bool:
    """Whether the class's forward attends through transformers' attention interface."""
    return _INTERFACE[0] in inspect.unwrap(cls.forward).__code__.co_names


def window_of(module: nn.Module, config: Any, path: str, mask: str | None) -> tuple[str | None, int | None]:
    """The layer's type, and how many tokens it sees: None, all of them.

    What made the attention's mask says it best; else its own `sliding_window`; else the type of its layer; else the
    config's window, which in the oldest families holds for all layers, where the code of the attention reads it.

    Args:
        mask: the name of the function that made the mask in a dry pass; None: it was not seen.
    """
    config = text_config(config)
    index = getattr(module, "layer_idx", None)
    if index is None and (numbers := re.findall(r"\.(\d+)\.", path)):
        index = int(numbers[0])
    types = getattr(config, "layer_types", None)
    layer_type = types[index] if types and index is not None and index < len(types) else None
    layer_type = getattr(module, "attention_type", getattr(module, "layer_type", None)) or layer_type
    if not isinstance(layer_type, str):
        layer_type = None
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "local_attention"))
    stated = next((each for each in windows if isinstance(each, int)), None)
    own = getattr(module, "sliding_window", None)
    if isinstance(pair := getattr(module, "local_attention", None), tuple):  # tokens on both sides
        return layer_type, None if -1 in pair else sum(pair) + 1
    if mask is not None:
        slides = any(word in mask for word in _SLIDING_TYPES)
        return layer_type, (int(own) if isinstance(own, int) else stated) if slides else None
    if hasattr(module, "sliding_window"):
        return layer_type, int(own) if own is not None else None
    if layer_type is not None:
        return layer_type, stated if any(word in layer_type for word in _SLIDING_TYPES) else None
    used = getattr(config, "use_sliding_window", True) is not False and _reads_window(type(module))
    return None, getattr(config, "sliding_window", None) if used else None


def _reads_window(cls: type[Any]) -> bool:
    """Whether the code of the class asks for a window."""
    code = inspect.unwrap(cls.forward).__code__
    return any("sliding_window" in names for names in (code.co_names, code.co_consts, code.co_varnames))


def norm_follows(module: nn.Module) -> bool:
    """Whether the forward normalises queries and keys between its last rotation and its attention."""
    cls: Any = type(module)
    return any(isinstance(getattr(module, name, None), nn.Module) for name in _norms_after(cls))


@functools.lru_cache(maxsize=256)
def _norms_after(cls: type[nn.Module]) -> tuple[str, ...]:
    """The attributes called like norms that the class's forward reads there."""
    norms: list[str] | None = None
    for step in dis.get_instructions(inspect.unwrap(cls.forward)):
        name = step.argval if isinstance(step.argval, str) else ""
        if step.opname.startswith("LOAD_GLOBAL"):
            if name in _INTERFACE and norms is not None:
                break
            norms = [] if _ROTARY.match(name) else norms
        elif norms is not None and step.opname in ("LOAD_ATTR", "LOAD_METHOD") and "norm" in name and name[0] != "v":
            norms.append(name)
    return tuple(norms or ())


def settings_under(module: nn.Module, config: Any, own: Any) -> dict[str, Any] | None:
    """The plain settings that an attention of this class has when it is made from a config; None: it cannot be made.

    Args:
        own: the config that it was made from; what else its constructor takes is what the instance has.
    """
    cls = bare_class(module)
    given: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if name == "config":
            given[name] = config
        elif hasattr(module, name):
            given[name] = getattr(module, name)
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            return None
    if "config" not in given or getattr(module, "config", own) is not own:
        return None
    try:
        with torch.device("meta"):
            made = cls(**given)
    except Exception:  # a constructor that takes more than its signature says
        return None
    return {name: value for name, value in vars(made).items() if isinstance(value, bool | int | float | str)}
