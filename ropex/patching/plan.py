"""What a patch will do to a model, decided before anything is done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from ropex._checks import require_length
from ropex.patching.attention import Attention, calls_interface, settings_under
from ropex.patching.config import UnsupportedModelError, unscaled, with_attributes, with_parameters
from ropex.patching.detect import Anatomy
from ropex.patching.dry import dry_pass
from ropex.patching.module import PatchedRotary
from ropex.patching.native import written
from ropex.patching.probe import Claim, fresh_rotary, live_frequencies, makes_tables_of
from ropex.patching.sites import Kind, Site
from ropex.patching.swap import Swap
from ropex.recommend import recommend
from ropex.rotary import RotaryEmbedding
from ropex.rotation import Geometry
from ropex.scaling import DynamicNTK, FrequencySchedule, LongRoPE, NTKAware, Unscaled, schedule_class, schedule_for
from ropex.scaling.base import innermost

__all__ = ["Plan", "Wish", "plan_for"]

DEFAULT_METHOD = "yarn"
AUTO = "auto"


@dataclass(frozen=True)
class Plan:
    """What a patch will do.

    Attributes:
        owner: the module that runs the layers.
        places: the owner, attribute name and mode of each rotary module.
        rotaries: what stands there next.
        swaps: the attentions, and what the class of each is made from.
        target: the context length in tokens that the model will be good for.
        parameters: the type and the attributes by which the config will say what the patch does; None: it cannot.
        attributes: what attentions read of their own, such as a softmax scale, with its new value.
        unseen: the attentions, by name, of which the first real pass must tell whether they rotate.
    """

    owner: nn.Module
    places: tuple[tuple[nn.Module, str, bool], ...]
    rotaries: tuple[PatchedRotary, ...]
    swaps: tuple[tuple[nn.Module, Swap], ...]
    target: int
    parameters: tuple[str, dict[str, Any]] | None
    attributes: tuple[tuple[nn.Module, str, Any], ...]
    unseen: dict[str, nn.Module]

    def changes(self, configs: list[tuple[nn.Module, str, Any, Any]]) -> Iterator[tuple[Any, str, Any]]:
        """Object, attribute and new value of all else that changes, in the copies that `own_configs` gives."""
        first = self.rotaries[0]
        copies = {id(before): config for _, _, before, config in configs}
        texts = {id(config): copies[id(config)] for patched in self.rotaries if (config := patched.original.config)}
        generations = {id(config): config for _, name, _, config in configs if name == "generation_config"}
        for config in texts.values():
            before = config.max_position_embeddings
            yield config, "ropex", {"trained_length": first.stated_length, **_described(first.rope.schedule)}
            yield config, "max_position_embeddings", self.target
            for key, value in self.parameters[1].items() if self.parameters is not None else ():
                yield config, key, value
            if first.rope.schedule.length_dependent:  # which a generation up to that length would be pinned to
                continue
            for generation in generations.values():
                if generation.max_length == before:
                    yield generation, "max_length", self.target


@dataclass(frozen=True)
class Wish:
    """What the user asked `patch` for: the method with its target and options, and the other arguments."""

    method: str | FrequencySchedule | None
    factor: float | Literal["auto"] | None
    length: int | None
    options: dict[str, Any]
    settings: dict[str, Any]
    loading: bool = False  # what was learned is loaded next


def plan_for(model: nn.Module, anatomy: Anatomy, wish: Wish) -> Plan:
    """The plan of a patch.

    Raises:
        UnsupportedModelError: the model cannot do what was asked.
        ValueError: a bad option, or a model that is already scaled.
    """
    name, settings = type(model).__name__, wish.settings
    scales = {a.path: settings["sliding"] == "scale" or not a.slides for a in anatomy.attentions}
    widens = wish.factor is not None or wish.length is not None
    if not any(scales.values()) and settings["on_scaled"] == "keep" and not widens:
        scales = dict.fromkeys(scales, True)  # what is kept needs no longer context to make sense
    if not any(scales.values()):
        windows = sorted({a.window for a in anatomy.attentions if a.window is not None})
        raise ValueError(
            f"every layer of {name} that rotates slides over a window ({', '.join(map(str, windows))} tokens), so a "
            "longer context takes no angle out of its range: must have a layer that sees all tokens; pass "
            'sliding="scale" to scale the sliding layers, too'
        )
    kinds = [
        kind for site in anatomy.sites for kind in site.kinds if any(scales[a.path] for a in _served(anatomy, kind))
    ]
    lengths = {kind.geometry.trained_length for kind in kinds}
    if len(lengths) > 1:
        raise UnsupportedModelError(
            f"{name}'s layers were trained at different lengths ({sorted(lengths)}): not supported"
        )
    main = next((kind for kind in kinds if kind.scaling is not None), kinds[0])
    config = anatomy.sites[0].rotary.config
    schedule, target = _schedule(name, main, wish)
    if schedule.learned:
        _require_unlearned(config, schedule, wish)
        if len(anatomy.sites) > 1:
            raise UnsupportedModelError(
                f"{name} has {len(anatomy.sites)} rotary modules, and {schedule.method!r} learns one net for all"
            )
    kept = main.scaling is not None and settings["on_scaled"] == "keep"
    unchanged = schedule == (main.own if kept else Unscaled()) and (kept or main.scaling is None)
    scaled = [kind for kind in kinds if kind.scaling is not None] if kept else kinds
    if kept and not unchanged and any(kind.own != main.own for kind in scaled):
        raise UnsupportedModelError(
            f"{name}'s layer types carry different scalings ({', '.join(repr(kind.own) for kind in scaled)}), and one "
            'factor cannot widen them; leave factor and length out, or pass on_scaled="replace"'
        )
    follows = {kind.layer_type: kind.own if kept and (unchanged or kind not in scaled) else schedule for kind in kinds}
    rotaries = tuple(_rotary(name, anatomy, site, follows, scales, settings) for site in anatomy.sites)
    swaps = tuple(_swap(name, anatomy, attention, rotaries[0], scales, settings) for attention in anatomy.attentions)
    # A scaling that is kept does what it does in transformers, where the norm cancels its amplitude.
    amplitudes = {} if kept else dict(_amplitudes(name, anatomy, schedule, rotaries[0].rope, scales))
    if unchanged:
        parameters: tuple[str, dict[str, Any]] | None = (main.scaling or "default", {})
    elif amplitudes:  # in plain transformers the norm after the rotation would cancel them
        parameters = None
    else:
        parameters = _parameters(name, anatomy, scaled, schedule, target, scales, widened=kept)
    equivalent = config if unchanged else _equivalent(config, main, parameters, target)
    attributes = _attributes(name, anatomy, config, equivalent, amplitudes)
    first = rotaries[0]
    first.softmax_factor = next(iter(amplitudes.values()), 1.0)
    first.scaling = main.scaling
    first.written = parameters[0] if parameters is not None else None
    first.unchanged = unchanged
    first.target = target
    first.stated_length = main.geometry.trained_length if main.length_known else None
    places = tuple((site.owner, site.name, site.owner.training) for site in anatomy.sites)
    inside = [site.path for site in anatomy.sites]  # one in an attention itself is used by it
    alone = (a for a in anatomy.attentions if not any(path.startswith(f"{a.path}.") for path in inside))
    unseen = {a.path: a.module for a in alone} if anatomy.unseen is not None else {}
    return Plan(anatomy.owner, places, rotaries, swaps, target, parameters, attributes, unseen)


def _require_unlearned(config: Any, schedule: FrequencySchedule, wish: Wish) -> None:
    """Raise where the config says that a schedule of this kind has been trained, and nothing would load it."""
    noted: dict[str, Any] = getattr(config, "ropex", None) or {}
    described = noted
    while "inner" in described:
        described = described["inner"]
    if not wish.loading and described.get("method") == innermost(schedule).method:
        place = getattr(config, "_name_or_path", None) or "directory"
        raise ValueError(
            f"method {schedule.method!r} on a model whose config says that it was trained with {noted['method']!r}: "
            "what that has learned would be lost, and a fresh net begin in its place; load it with "
            f"ropex.load(model, {place!r}), where Patch.save or RopexCallback wrote ropex.json, or begin anew after "
            "`del model.config.ropex`"
        )


def _served(anatomy: Anatomy, kind: Kind) -> list[Attention]:
    """The attentions that get a kind of table: those of its layer type, or all."""
    return [attention for attention in anatomy.attentions if kind.layer_type in (None, attention.layer_type)]


def _rotary(
    name: str,
    anatomy: Anatomy,
    site: Site,
    schedules: dict[str | None, FrequencySchedule | None],
    scales: dict[str, bool],
    settings: dict[str, Any],
) -> PatchedRotary:
    """What takes the place of a rotary module: for each kind of table the scaled one, the model's own, or both."""
    device = live_frequencies(site.rotary).device
    ropes: dict[str, RotaryEmbedding] = {}
    tables: dict[str | None, tuple[str, ...]] = {}
    turning: dict[str, tuple[bool, ...]] = {}
    for kind in site.kinds:
        wanted = {scales[attention.path] for attention in _served(anatomy, kind)} or {True}
        made = []
        for scaled in sorted(wanted, reverse=True):
            made.append("_".join(filter(None, (kind.layer_type, None if scaled else "kept"))) or "scaled")
            follows = schedules.get(kind.layer_type) if scaled else None
            follows = _own(name, kind) if follows is None else follows
            with device, torch.random.fork_rng(devices=[]):  # a net that is learned begins the same for each seed
                torch.manual_seed(settings["seed"])
                ropes[made[-1]] = RotaryEmbedding(
                    kind.geometry, follows, seed=settings["seed"], data_rank=settings["data_rank"]
                )
            if kind.turning is not None:
                turning[made[-1]] = kind.turning
        tables[kind.layer_type] = tuple(made)
    patched = PatchedRotary(
        ropes, tables, turning, site.rotary, layout=site.layout, axes=site.axes, angles=settings["angles"]
    )
    patched.settings = settings
    return patched


def _swap(
    name: str,
    anatomy: Anatomy,
    attention: Attention,
    patched: PatchedRotary,
    scales: dict[str, bool],
    settings: dict[str, Any],
) -> tuple[nn.Module, Swap]:
    """An attention, and what its class is made from."""
    cls: Any = type(attention.module)
    float32 = settings["precision"] == "float32"
    if float32 and not calls_interface(cls):
        raise UnsupportedModelError(
            f'precision="float32" with {name}: {cls.__name__} does not attend through '
            'transformers\' attention interface; pass precision="model"'
        )
    kind = anatomy.sites[0].kind_for(attention.layer_type)
    several = len(patched.tables[kind.layer_type]) > 1
    table = int(not scales[attention.path]) if several else None
    functions, half = anatomy.functions_of(attention), kind.geometry.dim // 2
    return attention.module, Swap(cls, functions, table, half, float32, attention.layer_type, attention.window)


def _schedule(name: str, kind: Kind, wish: Wish) -> tuple[FrequencySchedule, int]:
    """The schedule to follow, and the context length in tokens that it reaches."""
    trained = kind.geometry.trained_length
    if kind.scaling is not None:
        if wish.settings["on_scaled"] == "error":
            raise ValueError(
                f'{_carries(name, kind)}: scaling twice is rarely meant; pass on_scaled="replace" to count from the '
                'pretraining length, on_scaled="keep" to keep that scaling and widen it if factor or length is given, '
                "or remove the scaling from the config and load the model anew"
            )
        if wish.settings["on_scaled"] == "keep":
            return _kept(name, kind, wish)
        _require_length(name, kind, 'on_scaled="replace"')
    method = DEFAULT_METHOD if wish.method is None else wish.method
    if method == AUTO:
        schedule = _recommended(kind.geometry, wish)
        return schedule, max(schedule.target_length(trained), wish.length or 0)
    schedule = schedule_for(method, trained, factor=wish.factor, length=wish.length, **wish.options)
    target = schedule.target_length(trained)
    wrong = f"pass a smaller factor or length, or mend {type(schedule).__name__}.target_length"
    require_length("target_length", target, remedy=wrong)
    return schedule, target


def _recommended(geometry: Geometry, wish: Wish) -> FrequencySchedule:
    """What `recommend` says of the length that was asked for."""
    if wish.options:
        option, value = next(iter(wish.options.items()))
        raise ValueError(f'option {option}={value!r}: method "auto" chooses its own options; leave {option} out')
    if wish.length is None or wish.factor is not None:
        raise ValueError(
            f'method "auto" with length={wish.length!r} and factor={wish.factor!r}: it needs the length and nothing '
            "else; pass length= in tokens"
        )
    return recommend(geometry, wish.length).schedule


def _kept(name: str, kind: Kind, wish: Wish) -> tuple[FrequencySchedule, int]:
    """The schedule that the config carries, widened if the user asked for it."""
    own, trained, method = _own(name, kind), kind.geometry.trained_length, wish.method
    reaches = wish.factor is not None or wish.length is not None
    if isinstance(method, type(own)) and not reaches:  # as a file says it
        return method, kind.length if method == own else method.target_length(trained)
    named = isinstance(method, str) and method != AUTO and schedule_class(method) is type(own)
    if not (method is None or named) or wish.options:
        raise ValueError(
            f'method={method!r} with on_scaled="keep": {name} keeps its own scaling, {own!r}, which factor= or length= '
            'may widen; leave the method and its options out, or pass on_scaled="replace"'
        )
    if not reaches:
        return own, kind.length
    if isinstance(own, LongRoPE | NTKAware):
        why = "lists of {}'s longrope were searched" if isinstance(own, LongRoPE) else "alpha of {} was chosen"
        raise ValueError(
            f'on_scaled="keep" with a longer target: the {why.format(name)} for one length; '
            'leave factor and length out, or pass on_scaled="replace"'
        )
    _require_length(name, kind, 'on_scaled="keep" with a longer target')
    growth = {"factor": own.factor} if isinstance(own, DynamicNTK) else {}  # which its target does not say
    wanted = schedule_for(own.method, trained, factor=wish.factor, length=wish.length, **growth)
    changed = {key: getattr(wanted, key) for key in ("factor", "floor") if hasattr(own, key)}
    widened: FrequencySchedule = replace(own, **changed)  # type: ignore[type-var]  # a dataclass
    return widened, widened.target_length(trained)


def _carries(name: str, kind: Kind) -> str:
    return f'{name}\'s config already carries a scaling of the type "{kind.scaling}"'


def _require_length(name: str, kind: Kind, wish: str) -> None:
    if not kind.length_known:
        raise ValueError(
            f"{_carries(name, kind)} and does not tell the pretraining length, which {wish} needs; pass "
            "trained_length= in tokens, or set config.original_max_position_embeddings"
        )


def _own(name: str, kind: Kind) -> FrequencySchedule:
    if kind.own is None:
        raise UnsupportedModelError(f"{_carries(name, kind)}, which ropex cannot keep{kind.unread}")
    return kind.own


def _amplitudes(
    name: str, anatomy: Anatomy, schedule: FrequencySchedule, rope: RotaryEmbedding, scales: dict[str, bool]
) -> Iterator[tuple[Attention, float]]:
    """Where a norm after the rotation would cancel the amplitude, the softmax scale takes it: squared, for q and k."""
    after = [a for a in anatomy.attentions if a.norm_follows and scales[a.path]]
    if not after:
        return
    amplitude = rope.schedule.at(rope.geometry, length=1).amplitude
    if not isinstance(amplitude, (int, float)):
        raise UnsupportedModelError(
            f"{schedule!r} with {name}, which normalises queries and keys after their rotation: the norm cancels an "
            "amplitude, and the softmax scale can take one number, not one for each length; use a static method"
        )
    if amplitude == 1:
        return
    for attention in after:
        head_dim = getattr(attention.module, "head_dim", None)
        if not isinstance(getattr(attention.module, "scaling", None), float) or head_dim != rope.geometry.dim:
            raise UnsupportedModelError(
                f"{schedule!r} with {name}, which normalises queries and keys after their rotation: its attentions "
                'have no softmax scale that could take the amplitude instead; use "ntk_by_parts", which has none'
            )
        yield attention, amplitude**2


def _parameters(
    name: str,
    anatomy: Anatomy,
    kinds: list[Kind],
    schedule: FrequencySchedule,
    target: int,
    scales: dict[str, bool],
    *,
    widened: bool,
) -> tuple[str, dict[str, Any]] | None:
    """The type and the attributes by which the config says what the patch does, so that transformers does the same.

    None where it cannot: layers that share their parameters go different ways, or the method has no such words. What
    is written is tried: the rotary module made from it must give the patch's tables, and the model must run.

    Args:
        widened: the schedule is that of the config, with another factor.
    """
    kind, site = kinds[0], anatomy.sites[0]
    served = [scales[a.path] for kind in kinds for a in _served(anatomy, kind)]
    shared = len({id(site.rotary.config) for site in anatomy.sites}) == 1 and len({k.layer_type for k in kinds}) == 1
    if not all(served) or not shared or schedule.length_dependent or schedule.learned:
        return None
    trained = kind.geometry.trained_length
    turning = None if kind.turning is None else torch.tensor(kind.turning)
    count = max(site.axes) + 1 if site.axes is not None else None
    lengths = (min(64, trained), trained, max(target, trained))
    claim = Claim(schedule, kind.geometry, lengths, turning, kind.layer_type, count, site.axes)
    # What the other layer types do may follow the length that the config states.
    others = [
        replace(claim, schedule=each.own, geometry=each.geometry, turning=None, layer_type=each.layer_type)
        for each in site.kinds
        if each.layer_type != kind.layer_type and each.own is not None and each.turning is None
    ]
    attentions = {path: attention.functions for path, attention in anatomy.within.items()}
    for words in ({}, {"own_types": False}, {"own_types": False, "mscales": False}):
        try:
            parameters = written(schedule, kind.geometry, kind.turning, **words)
            attributes = with_parameters(site.rotary.config, parameters, kind.layer_type, trained, widened=widened)
            config = with_attributes(site.rotary.config, {"max_position_embeddings": target, **attributes})
            getattr(config, "validate", lambda: None)()
            fresh = fresh_rotary(name, site.rotary, config)
            same = all(makes_tables_of(fresh, site.layout, each) for each in (claim, *others))
        except Exception:  # this config does not take this type, and says so in a class of its own
            continue
        if not same:
            continue
        if anatomy.unseen is None:
            dry = dry_pass(anatomy.owner, anatomy.rotaries, attentions, (site.rotary.config, config))
            if dry.failure is not None or set(dry.kinds) != set(attentions):
                continue
        return parameters["rope_type"], attributes
    return None


def _equivalent(config: Any, kind: Kind, parameters: tuple[str, dict[str, Any]] | None, target: int) -> Any:
    """The config of a model of transformers that does what the patch does, as far as a config can say it."""
    if parameters is None:
        return config if kind.scaling is None else unscaled(config, kind.layer_type)
    return with_attributes(config, {"max_position_embeddings": target, **parameters[1]})


def _attributes(
    name: str, anatomy: Anatomy, config: Any, equivalent: Any, amplitudes: dict[Attention, float]
) -> tuple[tuple[nn.Module, str, Any], ...]:
    """What attentions made from the equivalent config have of their own, where it differs from what they have now.

    DeepSeek and its kin multiply their softmax scale for a scaling when they are made.
    """
    changes: dict[tuple[int, str], tuple[nn.Module, str, Any]] = {}
    known: Any = None
    different: dict[str, tuple[Any, Any]] = {}
    for attention in anatomy.attentions if equivalent is not config else ():
        module = attention.module
        if known != (known := (type(module), attention.layer_type)):
            before, after = (settings_under(module, each, config) or {} for each in (config, equivalent))
            different = {key: (before[key], after[key]) for key in before.keys() & after if before[key] != after[key]}
        for key, (was, becomes) in different.items():
            if (now := getattr(module, key, None)) != was:
                raise UnsupportedModelError(
                    f"{name}'s {attention.path}.{key} is {now!r}, and its config makes it {was!r}: it was changed "
                    "after the model was made; patch the model as loaded"
                )
            changes[id(module), key] = (module, key, becomes)
    for attention, factor in amplitudes.items():
        module = attention.module
        now = changes.get((id(module), "scaling"), (module, "scaling", module.scaling))[2]
        changes[id(module), "scaling"] = (module, "scaling", now * factor)
    return tuple(changes.values())


def _described(schedule: FrequencySchedule) -> dict[str, Any]:
    described = schedule.to_dict()
    try:
        json.dumps(described)
    except TypeError:  # a schedule of the user's own
        return {"method": schedule.method}
    return described
