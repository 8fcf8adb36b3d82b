"""Where a model rotates, found by looking and by probing; no model family is named here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ropex.patching.attention import Attention, norm_follows, rotary_functions, window_of
from ropex.patching.config import (
    UnsupportedModelError,
    pretraining_length,
    rope_parameters,
    scaling_type,
    stated_length,
    text_config,
    unscaled,
)
from ropex.patching.dry import Tables, dry_pass
from ropex.patching.families import NOT_ROTARY, NOT_SUPPORTED
from ropex.patching.module import PatchedRotary
from ropex.patching.native import readings
from ropex.patching.probe import (
    Claim,
    axes_of_pairs,
    count_axes,
    fresh_rotary,
    layout_of,
    probe_function,
    require_live,
)
from ropex.patching.tables import RotaryFunction, TableLayout, laid_out
from ropex.rotation import Geometry
from ropex.scaling import FrequencySchedule, PositionInterpolation, Unscaled, YaRN

__all__ = ["Anatomy", "Kind", "Site", "Spot", "examine", "find_active", "find_patched", "require_module"]

# Modules that make cos and sin of places in an image or a sound.
_TOWER = re.compile("Vision|Image|Audio|Speech")


@dataclass(frozen=True)
class Kind:
    """One kind of table that a rotary module makes.

    Attributes:
        layer_type: of the layers that it is for; None where the module makes one kind for all.
        geometry: how those layers were pretrained.
        length_known: whether the pretraining length is known; the geometry has the maximum length otherwise.
        scaling: the type of scaling that the config carries for them, or None.
        own: the schedule of that scaling, which makes the module's own tables; None where no reading of it does.
        unread: why not.
        turning: which pairs turn, [half]; None: all.
        length: the context length that the model is meant to reach as it is, in tokens.
    """

    layer_type: str | None
    geometry: Geometry
    length_known: bool
    scaling: str | None
    own: FrequencySchedule | None
    unread: str | None
    turning: tuple[bool, ...] | None
    length: int


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
    used = [path for path in rotaries if any(_within(attention, _owner(model, path)) for attention, *_ in found)]
    calls = sorted({each for _, _, names in found for each in names})
    steps.append(f"attentions: {len(found)} call a rotary function ({', '.join(calls) or 'none'})")
    if not used:
        raise UnsupportedModelError(
            f"{name} has a rotary embedding module ({', '.join(rotaries)}) but no attention that calls a rotary "
            "function with its cos and sin, so a patch would change nothing"
        )
    runner = _runner(model, [path for path, *_ in found])
    sites = tuple(_examine_site(model, name, path, rotaries[path], trained_length, steps) for path in used)
    if len({(site.layout, *(kind.geometry.dim for kind in site.kinds)) for site in sites}) > 1:
        raise UnsupportedModelError(f"{name}'s rotary modules ({', '.join(used)}) make tables of different kinds")
    at = next(path for path, module in model.named_modules() if module is runner)
    within = {path: path.removeprefix(at).removeprefix(".") for path in (*used, *(path for path, *_ in found))}
    tables = {within[site.path]: _meta_tables(site) for site in sites}
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
    without = [path for path, *_ in found if path not in {each.path for each in attentions}]
    if dry.failure is not None:
        steps.append(f"dry pass: could not be run ({dry.failure}); the first real pass will tell which layers rotate")
    else:
        steps.append(f"dry pass: {len(attentions)} of {len(found)} attentions are given cos and sin")
    if not attentions:
        raise UnsupportedModelError(
            f"{name} has a rotary embedding module ({used[0]}) but none of its attentions was seen to use its cos and "
            "sin, so a patch would change nothing"
        )
    notes = _notes(sites, [*without])
    steps.extend(notes)
    inside = {within[each.path]: each for each in attentions}
    return Anatomy(sites, tuple(attentions), functions, runner, inside, tables, dry.failure, notes)


def _meta_tables(site: Site) -> Tables:
    """For a dry pass: tables of two tokens, for each layer type that the site may be asked for."""

    def tables(kind: Kind) -> tuple[torch.Tensor, ...]:
        zeros = torch.zeros(1, 2, kind.geometry.dim // 2, device="meta")
        return laid_out(zeros, zeros.clone(), site.layout)

    return {kind.layer_type: tables(kind) for kind in site.kinds}


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


def _examine_site(
    model: nn.Module, model_name: str, path: str, rotary: nn.Module, trained_length: int | None, steps: list[str]
) -> Site:
    config: Any = rotary.config
    fresh = fresh_rotary(model_name, rotary, config)
    kinds: list[Kind] = []
    layout: TableLayout = "half"
    axes = None
    for layer_type in _layer_types(rotary):
        where = f"{path}{f' for {layer_type}' if layer_type else ''}"
        buffer = fresh.get_buffer(f"{layer_type}_inv_freq" if layer_type else "inv_freq")
        known = _pretraining_length(model_name, config, layer_type, trained_length)
        maximum = int(config.max_position_embeddings)
        geometry = Geometry(
            dim=2 * buffer.shape[-1],
            base=rope_parameters(config, layer_type)["rope_theta"],
            trained_length=known if known is not None else maximum,
        )
        scaling = scaling_type(config, layer_type)
        turning = (buffer != 0).cpu() if bool((buffer == 0).any()) else None
        lengths = tuple(
            {min(geometry.trained_length, 64), geometry.trained_length, 2 * geometry.trained_length, maximum}
        )
        plain = Claim(Unscaled(), geometry, lengths, turning, layer_type, count_axes(fresh, layer_type))
        own, unread, made = None, None, fresh
        for claim in _claims(plain, config, layer_type):
            if (seen := layout_of(fresh, claim)) is not None:
                own, layout = claim.schedule, seen
                break
        else:
            unread = _unread(config, layer_type)
            claim = plain
            made = fresh_rotary(model_name, rotary, unscaled(config, layer_type))
            seen = layout_of(made, plain) if scaling is not None else None
            if seen is None:
                raise UnsupportedModelError(
                    f"{model_name}'s cos and sin ({where}) are not those of {geometry} in a known layout{unread}"
                )
            layout = seen
        axes = axes_of_pairs(model_name, made, layout, claim)
        require_live(model_name, rotary, fresh, layout, claim)
        reach = maximum
        # Some configs leave the maximum at the trained length. (llama3's factor is no ratio of lengths.)
        if isinstance(own, YaRN | PositionInterpolation) and known is not None:
            reach = max(reach, own.target_length(known))
        if getattr(config, "dual_chunk_attention_config", None) is not None:
            reach = geometry.trained_length
        pairs = tuple(turning.tolist()) if turning is not None else None
        kinds.append(Kind(layer_type, geometry, known is not None, scaling, own, unread, pairs, reach))
        reading = f"read as {own!r}" if own is not None else f"not read{unread}"
        trained = f"trained at {known}" if known is not None else "trained at a length that the config does not tell"
        steps.append(
            f"{where}: dimension {geometry.dim}, base {geometry.base:g}, {trained}, tables {layout}"
            f"{f', positions with {claim.axes} axes' if claim.axes else ''}; scaling {scaling or 'none'}, {reading}, "
            f"checked against its cos and sin at {', '.join(map(str, sorted(lengths)))} tokens"
        )
    if not kinds:
        raise UnsupportedModelError(f"{model_name}'s {path} has rotary parameters for none of its layer types")
    owner = model.get_submodule(path.rpartition(".")[0])
    return Site(owner, path.rpartition(".")[2], path, rotary, layout, tuple(kinds), axes)


def _pretraining_length(model_name: str, config: Any, layer_type: str | None, given: int | None) -> int | None:
    """The context length of pretraining: what the config tells, or else what the user says."""
    stated = stated_length(config, layer_type)
    if given is not None and stated is not None and given != stated:
        raise ValueError(
            f"trained_length={given}: {model_name}'s config says that it was trained at {stated} tokens; leave it out"
        )
    return given if given is not None else pretraining_length(config, layer_type)


def _claims(plain: Claim, config: Any, layer_type: str | None) -> Iterator[Claim]:
    """What the config's own scaling may mean."""
    try:
        for schedule in readings(config, plain.geometry, layer_type):
            yield replace(plain, schedule=schedule)
    except (ValueError, TypeError):  # a word that is missing, or none that a schedule takes
        return


def _unread(config: Any, layer_type: str | None) -> str:
    """What of a scaling does not agree with the module, in words that an error may end with."""
    parameters = rope_parameters(config, layer_type)
    words = {key: value for key, value in parameters.items() if key not in ("rope_theta", "rope_type", "type")}
    said = ", ".join(f"{key}={str(value)[:40]}" for key, value in words.items()) or "no options"
    return (
        f": no reading of its rotary parameters (type {parameters['rope_type']!r} with {said}) makes the module's cos "
        "and sin"
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
    return _within(path, owner) and path != owner


def _layer_types(rotary: nn.Module) -> Iterator[str | None]:
    """The layer types whose frequencies a rotary module holds; None where it holds one set."""
    for name, _ in rotary.named_buffers():
        if name.endswith("inv_freq") and "original" not in name and "long" not in name:
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
