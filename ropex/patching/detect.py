"""Where a model rotates, found by looking and by probing; no model family is named here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ropex.patching.attention import Attention, norm_follows, rotary_functions, uses_tables, window_of
from ropex.patching.config import (
    UnsupportedModelError,
    pretraining_length,
    rope_parameters,
    scaling_type,
    text_config,
)
from ropex.patching.families import NOT_ROTARY, NOT_SUPPORTED
from ropex.patching.module import PatchedRotary
from ropex.patching.native import own_schedule
from ropex.patching.probe import axes_of_pairs, fresh_rotary, probe_function, probe_table
from ropex.patching.tables import RotaryFunction, TableLayout, laid_out
from ropex.rotation import Geometry
from ropex.scaling import FrequencySchedule

__all__ = ["Anatomy", "Kind", "Site", "Spot", "examine", "find_active", "find_patched", "require_module"]

# Modules that make cos and sin of places in an image or a sound.
_TOWER = re.compile("Vision|Image|Audio|Speech")


@dataclass(frozen=True)
class Kind:
    """One kind of table that a rotary module makes.

    Attributes:
        layer_type: of the layers that it is for; None where the module makes one kind for all.
        geometry: how those layers were pretrained.
        length_known: whether the config tells the pretraining length; the geometry has the maximum length otherwise.
        scaling: the type of scaling that the config carries for them, or None.
        own: the schedule of that scaling; None where its type is unknown.
        turning: which pairs turn, [half]; None: all.
    """

    layer_type: str | None
    geometry: Geometry
    length_known: bool
    scaling: str | None
    own: FrequencySchedule | None
    turning: tuple[bool, ...] | None


@dataclass(frozen=True)
class Site:
    """One rotary module.

    Attributes:
        owner: the module that holds it as its attribute `name`.
        path: its name in the model.
        rotary: transformers' rotary module; its `config` is the one that describes it.
        layout: of the tables that it makes.
        kinds: of tables that it makes.
        axes: of multi-axis positions, the axis that each pair follows; None: positions have one axis.
    """

    owner: nn.Module
    name: str
    path: str
    rotary: nn.Module
    layout: TableLayout
    kinds: tuple[Kind, ...]
    axes: tuple[int, ...] | None

    def kind_for(self, layer_type: str | None) -> Kind:
        """The kind of table that layers of this type get."""
        return next((kind for kind in self.kinds if kind.layer_type in (None, layer_type)), self.kinds[0])


@dataclass(frozen=True)
class Anatomy:
    """Where and how a model rotates.

    Attributes:
        sites: its rotary modules.
        attentions: those that rotate.
        functions: what each rotary function does, by the attention's class and its name.
        owner: the module that runs the layers with their cache.
    """

    sites: tuple[Site, ...]
    attentions: tuple[Attention, ...]
    functions: dict[tuple[type[nn.Module], str], RotaryFunction]
    owner: nn.Module

    def functions_of(self, attention: Attention) -> tuple[RotaryFunction, ...]:
        cls = type(attention.module)
        return tuple(self.functions[cls, name] for name in attention.functions)


@dataclass(frozen=True)
class Spot:
    """A patch's rotary module in a model."""

    owner: nn.Module
    name: str
    path: str
    patched: PatchedRotary


def require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r}: must be a torch.nn.Module; pass the loaded model")


def find_patched(model: nn.Module) -> list[Spot]:
    """The patch's rotary modules in a model; none where there is no patch."""
    require_module(model)
    return [
        Spot(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], path, module)
        for path, module in model.named_modules()
        if isinstance(module, PatchedRotary)
    ]


def find_active(model: nn.Module) -> list[Spot]:
    """Those that the model uses: PEFT keeps the module that it trains a copy of, as `original_module`."""
    return [spot for spot in find_patched(model) if "original_module" not in spot.path.split(".")]


def examine(model: nn.Module) -> Anatomy:
    """Find where the model rotates, and check that its own config explains the cos and sin that it makes.

    Raises:
        UnsupportedModelError: no rotary module, or one that does not do what its config says, or attentions that do
            not use it.
    """
    name = type(model).__name__
    rotaries = dict(_text_rotaries(model, name))
    found = list(_find_attentions(model, list(rotaries)))
    used = [path for path in rotaries if any(_within(attention, _owner(model, path)) for attention, *_ in found)]
    if not used:
        raise UnsupportedModelError(
            f"{name} has a rotary embedding module ({', '.join(rotaries)}) but no attention that calls a rotary "
            "function with its cos and sin, so a patch would change nothing"
        )
    runner = _runner(model, [path for path, *_ in found])
    with torch.device("cpu"):
        sites = tuple(_examine_site(model, name, path, rotaries[path]) for path in used)
        if len({(site.layout, *(kind.geometry.dim for kind in site.kinds)) for site in sites}) > 1:
            raise UnsupportedModelError(f"{name}'s rotary modules ({', '.join(used)}) make tables of different kinds")
        functions = {}
        attentions: list[Attention] = []
        verdicts: dict[Any, bool | None] = {}
        for path, module, names in found:
            config = getattr(module, "config", None) or sites[0].rotary.config
            layer_type, window = window_of(module, config, path)
            kind = sites[0].kind_for(layer_type)
            for each in names:
                if (key := (type(module), each)) not in functions:
                    function = inspect.unwrap(type(module).forward).__globals__[each]
                    width = _head_dim(module, kind.geometry.dim)
                    functions[key] = probe_function(name, function, each, sites[0].layout, kind.geometry, width)
            group = (type(module), layer_type, window, _settings(module))
            if group not in verdicts:
                zeros = torch.zeros(1, 2, kind.geometry.dim // 2)
                verdicts[group] = uses_tables(module, config, names, laid_out(zeros, zeros, sites[0].layout))
            if verdicts[group] is not False:
                slides = window is not None and window <= kind.geometry.trained_length
                attentions.append(Attention(module, path, names, layer_type, window, slides, norm_follows(module)))
    if not any(verdicts.values()):
        raise UnsupportedModelError(
            f"{name} has a rotary embedding module ({used[0]}) but none of its attentions was seen to use its cos and "
            "sin, so a patch might change nothing"
        )
    return Anatomy(sites, tuple(attentions), functions, runner)


def _text_rotaries(model: nn.Module, model_name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that make cos and sin of token positions, by their names."""
    types = [getattr(config, "model_type", None) for config in _configs(model)]
    for model_type in types:
        if reason := NOT_SUPPORTED.get(str(model_type)):
            raise UnsupportedModelError(f"{model_name} ({model_type}) cannot be patched: {reason}")
    found = [(path, module) for path, module in model.named_modules() if _is_rotary(module)]
    rotaries = [(path, module) for path, module in found if not _TOWER.search(type(module).__name__)]
    if not rotaries:
        known = next((NOT_ROTARY[each] for each in types if each in NOT_ROTARY), None)
        raise UnsupportedModelError(
            f"{model_name} has no rotary embedding module{f': {known}' if known else ''}; only models whose attention "
            "rotates queries and keys can be patched; pass a model such as Llama, Mistral, Qwen or GPT-NeoX"
        )
    refusals = [(path, module, _why_not(model_name, path, module)) for path, module in rotaries]
    if all(why is not None for _, _, why in refusals):
        raise UnsupportedModelError(refusals[0][2])
    yield from ((path, module) for path, module, why in refusals if why is None)


def _why_not(model_name: str, path: str, rotary: nn.Module) -> str | None:
    """Why a rotary module is not one of text models; None where it is."""
    parameters = list(inspect.signature(rotary.forward).parameters)
    if parameters[1:2] != ["position_ids"] or parameters[2:] not in ([], ["layer_type"]):
        return (
            f"{model_name}'s {path}.forward{inspect.signature(rotary.forward)}: must take (x, position_ids) or (x, "
            "position_ids, layer_type)"
        )
    if not list(_layer_types(rotary)) or not hasattr(getattr(rotary, "config", None), "max_position_embeddings"):
        return (
            f"{model_name}'s {path} ({type(rotary).__name__}): must hold inv_freq and a config with "
            "max_position_embeddings, as transformers' rotary modules do"
        )
    return None


def _find_attentions(model: nn.Module, text: list[str]) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """Attentions that rotate for a text model: not those of an image tower with a rotary module of its own."""
    owners = {
        _owner(model, path) for path, module in model.named_modules() if "rotary" in type(module).__name__.lower()
    }
    of_text = {_owner(model, path) for path in text}
    for path, module in model.named_modules():
        cls: Any = type(module)
        if names := rotary_functions(cls):
            nearest = max((owner for owner in owners if _within(path, owner)), key=len, default=None)
            if nearest in of_text:
                _require_own_forward(type(model).__name__, module)
                yield path, module, names


def _require_own_forward(model_name: str, attention: nn.Module) -> None:
    """Raise where something on the instance would hide the class's forward, which accelerate's hooks do not."""
    own = vars(attention).get("_old_forward", vars(attention).get("forward"))
    if own is not None and getattr(own, "__func__", None) is not type(attention).forward:
        raise UnsupportedModelError(
            f"{model_name}'s {type(attention).__name__}.forward was replaced on the instance, which would hide the "
            "patch: must be the class's own; patch before another library wraps the model"
        )


def _examine_site(model: nn.Module, model_name: str, path: str, rotary: nn.Module) -> Site:
    config: Any = rotary.config
    fresh = fresh_rotary(model_name, rotary, config)
    kinds: list[Kind] = []
    layout: TableLayout = "half"
    axes = None
    for layer_type in _layer_types(rotary):
        buffer = fresh.get_buffer(f"{layer_type}_inv_freq" if layer_type else "inv_freq")
        known = pretraining_length(config, layer_type)
        geometry = Geometry(
            dim=2 * buffer.shape[-1],
            base=rope_parameters(config, layer_type)["rope_theta"],
            trained_length=known if known is not None else int(config.max_position_embeddings),
        )
        scaling = scaling_type(config, layer_type)
        turning = tuple((buffer != 0).tolist()) if bool((buffer == 0).any()) else None
        axes = axes_of_pairs(fresh, geometry.dim // 2) if layer_type is None else None
        mask = torch.tensor(turning) if turning is not None else None
        layout = probe_table(model_name, rotary, geometry, mask, layer_type, scaled=scaling is not None, axes=axes)
        own = own_schedule(config, geometry, layer_type)
        kinds.append(Kind(layer_type, geometry, known is not None, scaling, own, turning))
    owner = model.get_submodule(path.rpartition(".")[0])
    return Site(owner, path.rpartition(".")[2], path, rotary, layout, tuple(kinds), axes)


def _runner(model: nn.Module, paths: list[str]) -> nn.Module:
    """The innermost module that all attentions are in and that takes token ids or embeddings."""
    around = [(path, module) for path, module in model.named_modules() if all(_inside(each, path) for each in paths)]
    takes = {path: inspect.signature(type(module).forward).parameters for path, module in around}
    for name in ("inputs_embeds", "input_ids"):
        fitting: list[nn.Module] = [module for path, module in around if name in takes[path]]
        if fitting:
            return fitting[-1]
    raise UnsupportedModelError(
        f"{type(model).__name__}: no part of it takes token ids or embeddings and holds all attentions that rotate; "
        "patch each of the models in it by itself"
    )


def _inside(path: str, owner: str) -> bool:
    return _within(path, owner) and path != owner


def _layer_types(rotary: nn.Module) -> Iterator[str | None]:
    """The layer types whose frequencies a rotary module holds; None where it holds one set."""
    for name, _ in rotary.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            yield name.removesuffix("inv_freq").removesuffix("_") or None


def _is_rotary(module: nn.Module) -> bool:
    return "Rotary" in type(module).__name__ and any(name.endswith("inv_freq") for name, _ in module.named_buffers())


def _configs(model: nn.Module) -> Iterator[Any]:
    config = getattr(model, "config", None)
    if config is not None:
        yield config
        if (text := text_config(config)) is not config:
            yield text


def _owner(model: nn.Module, path: str) -> str:
    """The module that holds the one of this name; for one in a list or dict, that which holds the container."""
    owner = path.rpartition(".")[0]
    return _owner(model, owner) if isinstance(model.get_submodule(owner), nn.ModuleList | nn.ModuleDict) else owner


def _within(path: str, owner: str) -> bool:
    return owner == "" or path == owner or path.startswith(f"{owner}.")


def _head_dim(attention: nn.Module, default: int) -> int:
    return next((getattr(attention, name) for name in ("head_dim", "head_size") if hasattr(attention, name)), default)


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The plain settings of an instance, but for its place among the layers: those of equal settings behave alike."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        (name, value) for name, value in vars(module).items() if isinstance(value, plain) and name != "layer_idx"
    )
