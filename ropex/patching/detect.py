"""Where a model rotates, found by looking and by probing; no model family is named here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ropex.patching.attention import Attention, norm_follows, rotary_functions, window_of
from ropex.patching.config import UnsupportedModelError, text_config
from ropex.patching.dry import Tables, dry_pass, within_module
from ropex.patching.families import NOT_ROTARY, NOT_SUPPORTED
from ropex.patching.module import PatchedRotary
from ropex.patching.probe import probe_function
from ropex.patching.sites import Site, examine_site, layer_types_of, meta_tables
from ropex.patching.tables import RotaryFunction

__all__ = ["Anatomy", "Spot", "examine", "find_active", "find_patched", "require_module"]

# Modules that make cos and sin of places in an image or a sound.
_TOWER = re.compile("Vision|Image|Audio|Speech")


@dataclass(frozen=True)
class Anatomy:
    """Where and how a model rotates.

    Attributes:
        sites: its rotary modules.
        attentions: those that rotate.
        functions: what each rotary function does, by the attention's class and its name.
        owner: the module that runs the layers with their cache.
        within: the attentions by their paths in the owner.
        rotaries: for a dry pass, the tables of each rotary module, by its path in the owner.
        unseen: why the dry pass could not be run, so that the first real one must tell which attentions rotate.
        notes: what a user should know of the model as it is.
    """

    sites: tuple[Site, ...]
    attentions: tuple[Attention, ...]
    functions: dict[tuple[type[nn.Module], str], RotaryFunction]
    owner: nn.Module
    within: dict[str, Attention]
    rotaries: dict[str, Tables]
    unseen: str | None
    notes: tuple[str, ...]

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


def examine(model: nn.Module, trained_length: int | None = None, steps: list[str] | None = None) -> Anatomy:
    """Find where the model rotates, and check that its own config explains the cos and sin that it makes.

    Args:
        trained_length: of pretraining, in tokens, where the config does not tell it.
        steps: gets a line for what each step saw.

    Raises:
        UnsupportedModelError: no rotary module, or one that does not do what its config says, or attentions that do
            not use it.
        ValueError: a trained length that the config contradicts.
    """
    steps = [] if steps is None else steps
    require_module(model)
    try:
        with torch.device("cpu"):
            return _examine(model, trained_length, steps)
    except ValueError as error:  # ours among them
        steps.append(f"refused: {error}")
        raise
    except Exception as error:
        steps.append(f"failed: {type(error).__name__}: {error}")
        raise UnsupportedModelError(
            f"{type(model).__name__} could not be examined: {type(error).__name__}: {error}; please report this with "
            "the model's config"
        ) from error


def _examine(model: nn.Module, trained_length: int | None, steps: list[str]) -> Anatomy:
    name = type(model).__name__
    rotaries = dict(_text_rotaries(model, name, steps))
    found = list(_find_attentions(model, list(rotaries)))
    used = [path for path in rotaries if any(within_module(attention, _owner(model, path)) for attention, *_ in found)]
    calls = sorted({each for _, _, names in found for each in names})
    steps.append(f"attentions: {len(found)} call a rotary function ({', '.join(calls) or 'none'})")
    if not used:
        raise UnsupportedModelError(
            f"{name} has a rotary embedding module ({', '.join(rotaries)}) but no attention that calls a rotary "
            "function with its cos and sin, so a patch would change nothing"
        )
    runner = _runner(model, [path for path, *_ in found])
    sites = tuple(examine_site(model, name, path, rotaries[path], trained_length, steps) for path in used)
    if len({(site.layout, *(kind.geometry.dim for kind in site.kinds)) for site in sites}) > 1:
        raise UnsupportedModelError(f"{name}'s rotary modules ({', '.join(used)}) make tables of different kinds")
    at = next(path for path, module in model.named_modules() if module is runner)
    within = {path: path.removeprefix(at).removeprefix(".") for path in (*used, *(path for path, *_ in found))}
    tables = {within[site.path]: meta_tables(site) for site in sites}
    dry = dry_pass(runner, tables, {within[path]: names for path, _, names in found})
    functions = {}
    attentions: list[Attention] = []
    for path, module, names in found:
        config = getattr(module, "config", None) or sites[0].rotary.config
        layer_type, window = window_of(module, config, path, dry.masks.get(within[path]))
        if (given := dry.kinds.get(within[path])) is not None:
            layer_type = given[1] or layer_type
        kind = sites[0].kind_for(layer_type)
        for each in names:
            if (key := (type(module), each)) not in functions:
                function = inspect.unwrap(type(module).forward).__globals__[each]
                width = _head_dim(module, kind.geometry.dim)
                functions[key] = probe_function(name, function, each, sites[0].layout, kind.geometry, width)
        if given is not None or dry.failure is not None:
            slides = window is not None and window <= kind.geometry.trained_length
            attentions.append(Attention(module, path, names, layer_type, window, slides, norm_follows(module)))
    steps += [f"{how.name}: pairs {how.channels} channels" for how in functions.values()]
    rotating = {each.path for each in attentions}
    without = [path for path, *_ in found if path not in rotating]
    if dry.failure is not None:
        steps.append(f"dry pass: could not be run ({dry.failure}); the first real pass will tell which layers rotate")
    else:
        steps.append(f"dry pass: {len(attentions)} of {len(found)} attentions are given cos and sin")
    if not attentions:
        raise UnsupportedModelError(
            f"{name} has a rotary embedding module ({used[0]}) but none of its attentions was seen to use its cos and "
            "sin, so a patch would change nothing"
        )
    notes = _notes(sites, without)
    steps.extend(notes)
    inside = {within[each.path]: each for each in attentions}
    return Anatomy(sites, tuple(attentions), functions, runner, inside, tables, dry.failure, notes)


def _notes(sites: Sequence[Site], without: list[str]) -> tuple[str, ...]:
    notes = []
    if without:
        few = f"{', '.join(without[:3])}{', ...' if len(without) > 3 else ''}"
        notes.append(f"{len(without)} attentions are given no cos and sin, and do not rotate: {few}")
    if getattr(sites[0].rotary.config, "dual_chunk_attention_config", None) is not None:
        length = sites[0].kinds[0].geometry.trained_length
        notes.append(
            f"the config's dual chunk attention is not run by transformers: the model is good for the {length} tokens "
            "that it was trained at, and a patch counts from these"
        )
    return tuple(notes)


def _text_rotaries(model: nn.Module, model_name: str, steps: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that make cos and sin of token positions, by their names."""
    types = [getattr(config, "model_type", None) for config in _configs(model)]
    for model_type in types:
        if reason := NOT_SUPPORTED.get(str(model_type)):
            raise UnsupportedModelError(f"{model_name} ({model_type}) cannot be patched: {reason}")
    found = [(path, module) for path, module in model.named_modules() if _is_rotary(module)]
    rotaries = [(path, module) for path, module in found if not _TOWER.search(type(module).__name__)]
    for path, module in found:
        of = "of an image or sound tower, left alone" if (path, module) not in rotaries else "of token positions"
        steps.append(f"rotary module {path} ({type(module).__name__}): {of}")
    if not rotaries:
        known = next((NOT_ROTARY[each] for each in types if each in NOT_ROTARY), None)
        raise UnsupportedModelError(
            f"{model_name} has no rotary embedding module{f': {known}' if known else ''}; only models whose attention "
            "rotates queries and keys can be patched; pass a model such as Llama, Mistral, Qwen or GPT-NeoX"
        )
    refusals = [(path, module, _why_not(model_name, path, module)) for path, module in rotaries]
    if all(why is not None for _, _, why in refusals):
        raise UnsupportedModelError(refusals[0][2])
    for path, module, why in refusals:
        if why is None:
            yield path, module
        else:
            steps.append(f"left out: {why}")


def _why_not(model_name: str, path: str, rotary: nn.Module) -> str | None:
    """Why a rotary module is not one of text models; None where it is."""
    parameters = list(inspect.signature(rotary.forward).parameters)
    if parameters[1:2] != ["position_ids"] or parameters[2:] not in ([], ["layer_type"]):
        return (
            f"{model_name}'s {path}.forward{inspect.signature(rotary.forward)}: must take (x, position_ids) or (x, "
            "position_ids, layer_type)"
        )
    if learned := [name for name, _ in rotary.named_parameters()]:
        return (
            f"{model_name}'s {path} ({type(rotary).__name__}) has parameters of its own ({', '.join(learned)}): its "
            "frequencies are learned, and a schedule would put others in their place; not supported"
        )
    if not list(layer_types_of(rotary)) or not hasattr(getattr(rotary, "config", None), "max_position_embeddings"):
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
            nearest = max((owner for owner in owners if within_module(path, owner)), key=len, default=None)
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
    return within_module(path, owner) and path != owner


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


def _head_dim(attention: nn.Module, default: int) -> int:
    return next((getattr(attention, name) for name in ("head_dim", "head_size") if hasattr(attention, name)), default)
