"""What one attention does: which rotary functions it calls, whether it slides, and what follows the rotation."""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ropex.patching.config import text_config

__all__ = ["Attention", "norm_follows", "rotary_functions", "uses_tables", "window_of"]

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


@functools.cache
def rotary_functions(cls: type[nn.Module]) -> tuple[str, ...]:
    """The globals by which the class's forward calls rotary functions."""
    forward = inspect.unwrap(cls.forward)
    code = getattr(forward, "__code__", None)
    if code is None:
        return ()
    return tuple(name for name in code.co_names if _ROTARY.match(name) and callable(forward.__globals__.get(name)))


@functools.cache
def calls_interface(cls: type[nn.Module]) -> bool:
    """Whether the class's forward attends through transformers' attention interface."""
    return _INTERFACE[0] in inspect.unwrap(cls.forward).__code__.co_names


def window_of(module: nn.Module, config: Any, path: str) -> tuple[str | None, int | None]:
    """The layer's type, and how many tokens it sees: None, all of them.

    An attention's own `sliding_window` says it best; else the type of its layer; else the config's window, which in
    the oldest families holds for all layers.
    """
    config = text_config(config)
    index = getattr(module, "layer_idx", None)
    if index is None and (numbers := re.findall(r"\.(\d+)\.", path)):
        index = int(numbers[0])
    types = getattr(config, "layer_types", None)
    layer_type = types[index] if types and index is not None and index < len(types) else None
    layer_type = getattr(module, "attention_type", getattr(module, "layer_type", None)) or layer_type
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "local_attention"))
    window = next((each for each in windows if isinstance(each, int)), None)
    if hasattr(module, "sliding_window"):
        own = module.sliding_window
        return layer_type, int(own) if own is not None else None  # type: ignore[arg-type]
    if isinstance(pair := getattr(module, "local_attention", None), tuple):  # tokens on both sides
        return layer_type, None if -1 in pair else sum(pair) + 1
    if layer_type is not None:
        return layer_type, window if any(word in layer_type for word in _SLIDING_TYPES) else None
    used = getattr(config, "use_sliding_window", True) is not False
    return None, getattr(config, "sliding_window", None) if used else None


def norm_follows(module: nn.Module) -> bool:
    """Whether the forward normalises queries and keys between its last rotation and its attention."""
    cls: Any = type(module)
    return any(isinstance(getattr(module, name, None), nn.Module) for name in _norms_after(cls))


@functools.cache
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


@torch.no_grad()
def uses_tables(module: nn.Module, config: Any, functions: tuple[str, ...], tables: tuple[Tensor, ...]) -> bool | None:
    """Whether a copy of the attention without weights hands these cos and sin to one of its rotary functions.

    Some layers of some models do not rotate, by a flag that no common name has. None where the copy cannot be run.

    Args:
        functions: the globals by which its forward calls rotary functions.
        tables: [1, 2, width], as the model's own rotary module would give them.
    """
    config = text_config(config)
    for device in ("meta", "cpu"):  # some forwards ask for values, which only the second has: zeros
        given = tuple(torch.zeros_like(table, device=device) for table in tables)
        try:
            copied = _light_copy(module, given, device)
            inputs = _inputs(module, config, given, device)
            with torch.device(device):
                _stopping_forward(type(module), functions, given)(copied, **inputs)
        except _Rotated:
            return True
        except Exception:  # perhaps the other device can
            continue
        return False
    return None


class _Rotated(Exception):
    """A rotary function was called with the tables: nothing more is to be seen."""


def _stopping_forward(
    cls: type[nn.Module], functions: tuple[str, ...], tables: tuple[Tensor, ...]
) -> Callable[..., Any]:
    """The class's forward over rotary functions that stop it when they are given one of the tables, or a view of it."""

    def stop(*args: Any, **kwargs: Any) -> Any:
        for given in (*args, *kwargs.values()):
            if any(given is table or getattr(given, "_base", None) is table for table in tables):
                raise _Rotated
        return args[0] if len(args) < 2 else args[:2]

    forward = inspect.unwrap(cls.forward)
    replaced = {**forward.__globals__, **dict.fromkeys(functions, stop)}
    stopping = types.FunctionType(forward.__code__, replaced, "forward", forward.__defaults__, forward.__closure__)
    stopping.__kwdefaults__ = forward.__kwdefaults__
    return stopping


class _Gives(nn.Module):
    """Stands for a rotary module inside an attention."""

    def __init__(self, tables: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.tables[0] if len(self.tables) == 1 else self.tables


def _light_copy(module: nn.Module, tables: tuple[Tensor, ...], device: str) -> nn.Module:
    """A copy with plain linear layers and zeros for weights, whatever has quantised, wrapped or offloaded them."""
    memo: dict[int, Any] = {}
    for child in module.modules():
        sizes = [getattr(child, name, None) for name in ("in_features", "out_features")]
        if child is module:
            continue
        if "Rotary" in type(child).__name__:
            memo[id(child)] = _Gives(tables)
        elif all(isinstance(size, int) for size in sizes):
            plain: Any = nn.Linear
            memo[id(child)] = plain(*sizes, bias=False, device=device, dtype=torch.float32)
    for tensor in (*module.parameters(), *module.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        memo[id(tensor)] = torch.zeros(tensor.shape, dtype=dtype, device=device)
    moved = ("_hf_hook", "_old_forward", "forward")  # what accelerate puts on instances, to move weights about
    for child in module.modules():
        memo |= {id(vars(child)[name]): None for name in moved if name in vars(child)}
    if (config := vars(module).get("config")) is not None:
        memo[id(config)] = config
    copied = copy.deepcopy(module, memo)
    for child in copied.modules():
        for name in moved:
            vars(child).pop(name, None)
        for hooks in (child._forward_pre_hooks, child._forward_hooks):
            hooks.clear()
    return copied.eval()


def _inputs(module: nn.Module, config: Any, tables: tuple[Tensor, ...], device: str) -> dict[str, Any]:
    given: Any = _Gives(tables)()
    known = {
        "hidden_states": torch.zeros(1, 2, config.hidden_size, device=device),
        "position_embeddings": given,
        "cos_sin": given,
        "position_ids": torch.zeros(1, 2, dtype=torch.int64, device=device),
        "shared_kv_states": {},
    }
    inputs = {}
    for name, parameter in inspect.signature(type(module).forward).parameters.items():
        if name in known:
            inputs[name] = known[name]
        elif parameter.default is parameter.empty and name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
            inputs[name] = None
    return inputs
