"""A dry pass: which attentions are really given cos and sin, of which kind, and by what they are masked.

Whether a layer rotates is decided by its caller: some models give a layer no tables, or those of another kind than its
config names. So the part of the model that runs the layers is copied without weights to the meta device, its rotary
modules give tables that can be told apart, and two tokens are run through it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ropex.patching.config import ALONE, UnsupportedModelError

__all__ = ["DryPass", "FirstPass", "Tables", "bare_class", "dry_pass", "within_module"]

_DTYPE = torch.bfloat16  # the one that grouped matrix products of experts take
_MAKES_MASK = re.compile(r"create\w*_mask$")
# What accelerate and torch.compile put on instances.
_MOVED = ("_hf_hook", "_old_forward", "forward", "_compiled_call_impl")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")

Tables = Mapping[str | None, tuple[Tensor, ...]]


@dataclass(frozen=True)
class DryPass:
    """What a dry pass saw.

    Attributes:
        kinds: for each attention that rotated, by its path in the runner, the kind of its tables: the rotary module's
            path and the layer type that it was asked for.
        masks: the name of the function that made each attention's mask; None where none was seen.
        failure: why the runner could not be run; None: it could.
    """

    kinds: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    masks: dict[str, str | None] = field(default_factory=dict)
    failure: str | None = None


@torch.no_grad()
def dry_pass(
    runner: nn.Module,
    rotaries: Mapping[str, Tables],
    attentions: Mapping[str, tuple[str, ...]],
    configs: tuple[Any, Any] | None = None,
) -> DryPass:
    """Run two tokens through a weightless copy.

    Args:
        runner: the module that runs the layers.
        rotaries: for each rotary module, by its path in the runner, a table [1, 2, width] for each layer type that it
            may be asked for.
        attentions: for each attention, by its path, the globals by which its forward calls rotary functions.
        configs: one of its configs, and another to run it with instead; None: its own.
    """
    failures = []
    for lenient in (False, True):
        seen = DryPass()
        try:
            copied = _weightless(runner, rotaries, configs)
            _watch(copied, seen, attentions, lenient=lenient)
            with ALONE, torch.device("meta"), torch.compiler.set_stance("force_eager"):
                _run(copied, seen)
        except Exception as error:  # whatever a model may need that a copy without weights does not have
            failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        return seen
    return DryPass(failure=" | ".join(failures))


def bare_class(module: nn.Module) -> type[Any]:
    """The class that a module was made from, below those that FSDP and ropex put on top of it."""
    classes = [cls for cls in type(module).__mro__ if "__init__" in vars(cls)]
    return next(cls for cls in classes if not cls.__module__.startswith("torch.distributed"))


@dataclass
class FirstPass:
    """Where a dry pass could not be run: a watch over the first real one.

    Attributes:
        names: the attentions that must be given tables, by name.
        handed: the tables of this pass.
        given: the attentions that were given one, by name.
        handles: to end the watch.
    """

    names: frozenset[str]
    handed: list[Tensor] = field(default_factory=list)
    given: set[str] = field(default_factory=set)
    handles: list[Any] = field(default_factory=list)

    def watch(self, runner: nn.Module, rotaries: Iterable[nn.Module], attentions: Mapping[str, nn.Module]) -> None:
        self.handles += [rotary.register_forward_hook(self._note_tables) for rotary in rotaries]
        for name, module in attentions.items():
            look = functools.partial(self._note_given, name)
            self.handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
        self.handles.append(runner.register_forward_hook(self._judge))

    def _note_tables(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.handed += _tensors(output)

    def _note_given(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        # By their shape: mixed precision and other devices hand on copies.
        shapes = {table.shape for table in self.handed}
        if any(each.shape in shapes for each in _tensors((args, kwargs))):
            self.given.add(name)

    def _judge(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self.handed:
            return
        for handle in self.handles:
            handle.remove()
        self.handed.clear()
        if without := sorted(self.names - self.given):
            raise UnsupportedModelError(
                f"{len(without)} attentions of {type(module).__name__} were given no cos and sin in their first pass, "
                f"so that the patch changes nothing there: {', '.join(without[:8])}; they do not rotate, or something "
                "put other tables in the place of the patch's: call ropex.unpatch(model), and report this with the "
                "model's config"
            )


class _Gives(nn.Module):
    """Stands for a rotary module, and gives tables made beforehand; all else is asked of the module itself."""

    def __init__(self, original: nn.Module, tables: Tables) -> None:
        super().__init__()
        self.__dict__["original"] = original
        self.tables = tables

    def forward(self, x: Any = None, position_ids: Any = None, layer_type: str | None = None, **others: Any) -> Any:
        given = self.tables[layer_type if layer_type in self.tables else None]
        return given[0] if len(given) == 1 else given

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)


def _weightless(runner: nn.Module, rotaries: Mapping[str, Tables], configs: tuple[Any, Any] | None) -> nn.Module:
    """A copy on the meta device with plain linear layers, whatever has quantised, sharded, wrapped or offloaded them.

    Tensors become empty ones, configs are copied, and what is neither data nor a module is shared with the original.
    """
    memo: dict[int, Any] = {}
    if configs is not None:
        memo[id(configs[0])] = copy.deepcopy(configs[1])
    replaced: dict[nn.Module, nn.Module] = {}
    for path, tables in rotaries.items():
        original = runner.get_submodule(path)
        replaced[original] = _Gives(original, tables)
    modules = list(runner.modules())
    for child in modules:
        sizes = [getattr(child, name, None) for name in ("in_features", "out_features")]
        if child in replaced:
            continue
        if child is not runner and all(isinstance(size, int) for size in sizes) and not _is_dense(child, sizes):
            plain: Any = nn.Linear
            replaced[child] = plain(*sizes, bias=False, device="meta", dtype=_DTYPE)
        else:
            cls = next(cls for cls in type(child).__mro__ if not cls.__module__.startswith("torch.distributed"))
            replaced[child] = object.__new__(cls)
    for child in modules:  # a compiled layer stands for the one inside
        if isinstance(inner := child._modules.get("_orig_mod"), nn.Module):
            replaced[child] = replaced[inner]
    memo |= {id(child): copied for child, copied in replaced.items()}
    for child in modules:
        copied = replaced[child]
        if not vars(copied) and "_orig_mod" not in child._modules:
            copied.__dict__.update(
                {name: _light(value, memo) for name, value in vars(child).items() if name not in _MOVED}
            )
            for name in _HOOKS:
                copied.__dict__[name] = type(vars(child)[name])()
        own: Any = vars(copied).get("config")
        if hasattr(own, "_attn_implementation"):  # not what stands for a rotary module
            own._attn_implementation = "eager"
    return replaced[runner].eval()


def _light(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of an attribute without what is heavy or foreign in it."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        dtype = _DTYPE if value.is_floating_point() else value.dtype
        memo[id(value)] = torch.zeros(value.shape, dtype=dtype, device="meta")
    elif hasattr(value, "to_dict"):
        memo[id(value)] = copy.deepcopy(value, memo)
    elif type(value) in (dict, OrderedDict):
        return type(value)((key, _light(each, memo)) for key, each in value.items())
    elif type(value) in (list, tuple):
        return type(value)(_light(each, memo) for each in value)
    else:
        return value
    return memo[id(value)]


def _is_dense(linear: nn.Module, sizes: list[Any]) -> bool:
    """Whether a linear layer multiplies by the weights that it holds, in no packed form."""
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return False
    return list(weight.shape) == sizes[::-1]


def _watch(copied: nn.Module, seen: DryPass, attentions: Mapping[str, tuple[str, ...]], *, lenient: bool) -> None:
    """Let the copy note what its attentions are given."""
    gives = {path: module for path, module in copied.named_modules() if isinstance(module, _Gives)}
    # Each table with what it is for; kept, so that no other tensor gets its identity.
    marks = [
        (table, (path, layer_type))
        for path, module in gives.items()
        for layer_type, tables in module.tables.items()
        for table in tables
    ]
    made: list[tuple[Tensor, str]] = []

    def mask_maker(name: str) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            made.append((torch.zeros(1, 1, 2, 2, dtype=_DTYPE, device="meta"), name))
            return made[-1][0]

        return make

    def found(values: Any) -> tuple[str, str | None] | None:
        for value in _tensors(values):
            for table, what in marks:
                if _is_one_of(value, (table,)):
                    return what
        return None

    for path, names in attentions.items():
        place = _in_copy(path)
        attention = copied.get_submodule(place)
        own = next(((inside, None) for inside in gives if inside.startswith(f"{place}.")), None)

        def rotates(*args: Any, path: str = path, attention: Any = attention, own: Any = own, **kwargs: Any) -> Any:
            if what := found((args, kwargs)) or vars(attention).get("ropex_given") or own:
                seen.kinds[path] = what
            return args[0] if len(args) < 2 or args[1] is None or found(args[1:2]) else args[:2]

        def forward(self: Any, *args: Any, path: str = path, inner: Any = None, **kwargs: Any) -> Any:
            self.__dict__["ropex_given"] = found((args, kwargs))
            mask = kwargs.get("attention_mask")
            seen.masks[path] = next((name for each, name in made if each is mask), None)
            return inner(self, *args, **kwargs)

        inner = _with_globals(type(attention).forward, dict.fromkeys(names, rotates))
        attention.forward = types.MethodType(_bound(forward, inner), attention)
    makers = {
        name: mask_maker(name)
        for name in inspect.unwrap(type(copied).forward).__globals__
        if _MAKES_MASK.match(name) and "recurrent" not in name and "linear" not in name
    }
    copied.forward = types.MethodType(_with_globals(type(copied).forward, makers), copied)
    if lenient:
        _forgive(copied, set(map(_in_copy, attentions)))


def _bound(forward: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: forward(self, *args, inner=inner, **kwargs)


def _with_globals(function: Callable[..., Any], replaced: dict[str, Any]) -> Callable[..., Any]:
    """A function without its decorators, over other globals."""
    plain = inspect.unwrap(function)
    namespace = {**plain.__globals__, **replaced}
    made = types.FunctionType(plain.__code__, namespace, plain.__name__, plain.__defaults__, plain.__closure__)
    made.__kwdefaults__ = plain.__kwdefaults__
    return made


def _forgive(copied: nn.Module, attentions: set[str]) -> None:
    """Let parts beside the attentions that need values, such as routers, give back what they are given."""
    for path, module in copied.named_modules():
        apart = not any(within_module(each, path) or within_module(path, each) for each in attentions)
        if apart and not isinstance(module, _Gives | nn.ModuleList | nn.ModuleDict):
            module.forward = _forgiving(module.forward)


def _in_copy(path: str) -> str:
    """Where the module of this path is in a copy, in which compiled layers are plain ones."""
    return path.replace("._orig_mod", "")


def within_module(path: str, owner: str) -> bool:
    """Whether the module of this path is the owner, or in it."""
    return owner == "" or path == owner or path.startswith(f"{owner}.")


def _forgiving(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except Exception:
            return next(_tensors((args, kwargs)))

    return run


def _run(copied: nn.Module, seen: DryPass) -> None:
    takes = inspect.signature(copied.forward).parameters
    inputs: dict[str, Any] = {}
    if "input_ids" in takes:
        inputs["input_ids"] = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    else:
        size: Any = copied.config.hidden_size  # type: ignore[union-attr]
        inputs["inputs_embeds"] = torch.zeros(1, 2, size, device="meta")
    copied(**inputs)


def _is_one_of(tensor: Tensor, tables: Iterable[Tensor]) -> bool:
    """Whether a tensor is one of these, or a view of one."""
    return any(tensor is table or (tensor._base is not None and tensor._base is table) for table in tables)


def _tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in arguments, however deep."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
