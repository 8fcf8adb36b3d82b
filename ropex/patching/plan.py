"""What a patch will do to a model, decided before anything is done."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from ropex._checks import require_int
from ropex.patching.attention import Attention, calls_interface
from ropex.patching.config import UnsupportedModelError, rope_parameters, with_parameters
from ropex.patching.detect import Anatomy, Kind, Site
from ropex.patching.module import PatchedRotary
from ropex.patching.native import written
from ropex.patching.probe import fresh_rotary, live_frequencies, makes_tables_of
from ropex.patching.swap import Swap
from ropex.recommend import recommend
from ropex.rotary import RotaryEmbedding
from ropex.rotation import Geometry
from ropex.scaling import DynamicNTK, FrequencySchedule, LongRoPE, Unscaled, schedule_class, schedule_for

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
        amplitudes: the attentions whose softmax scale takes the amplitude, with the factor on it.
    """

    owner: nn.Module
    places: tuple[tuple[nn.Module, str, bool], ...]
    rotaries: tuple[PatchedRotary, ...]
    swaps: tuple[tuple[nn.Module, Swap], ...]
    target: int
    parameters: tuple[str, dict[str, Any]] | None
    amplitudes: tuple[tuple[nn.Module, float], ...]

    def changes(self, model: nn.Module) -> Iterator[tuple[Any, str, Any]]:
        """Object, attribute and new value of all else that changes; asked once the model owns its configs."""
        for module, factor in self.amplitudes:
            yield module, "scaling", module.scaling * factor  # type: ignore[operator]
        configs = {id(config): config for patched in self.rotaries if (config := patched.original.config)}
        schedule, geometry = self.rotaries[0].rope.schedule, self.rotaries[0].rope.geometry
        for config in configs.values():
            before = config.max_position_embeddings  # type: ignore[union-attr]
            yield config, "max_position_embeddings", self.target
            yield config, "ropex", {"trained_length": geometry.trained_length, **_described(schedule)}
            for key, value in self.parameters[1].items() if self.parameters is not None else ():
                yield config, key, value
            for module in model.modules():
                generation = module.__dict__.get("generation_config")
                if generation is not None and generation.max_length == before:
                    yield generation, "max_length", self.target


@dataclass(frozen=True)
class Wish:
    """What the user asked `patch` for: the method with its target and options, and the other arguments."""

    method: str | FrequencySchedule | None
    factor: float | Literal["auto"] | None
    length: int | None
    options: dict[str, Any]
    settings: dict[str, Any]


def plan_for(model: nn.Module, anatomy: Anatomy, wish: Wish) -> Plan:
    """The plan of a patch.

    Raises:
        UnsupportedModelError: the model cannot do what was asked.
        ValueError: a bad option, or a model that is already scaled.
    """
    name, settings = type(model).__name__, wish.settings
    scales = {a.path: settings["sliding"] == "scale" or not a.slides for a in anatomy.attentions}
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
    schedule, target = _schedule(name, kinds[0], anatomy.sites[0].rotary.config, wish)
    if schedule.learned and len(anatomy.sites) > 1:
        raise UnsupportedModelError(
            f"{name} has {len(anatomy.sites)} rotary modules, and {schedule.method!r} learns one net for all"
        )
    rotaries = tuple(_rotary(name, anatomy, site, schedule, scales, settings) for site in anatomy.sites)
    swaps = tuple(_swap(name, anatomy, attention, rotaries[0], scales, settings) for attention in anatomy.attentions)
    amplitudes = tuple(_amplitudes(name, anatomy, schedule, rotaries[0].rope, scales))
    # In plain transformers the norm after the rotation would cancel the amplitude.
    parameters = None if amplitudes else _parameters(name, anatomy, kinds, schedule, target, scales)
    rotaries[0].softmax_factor = amplitudes[0][1] if amplitudes else 1.0
    rotaries[0].scaling = kinds[0].scaling
    rotaries[0].written = parameters[0] if parameters is not None else None
    places = tuple((site.owner, site.name, site.owner.training) for site in anatomy.sites)
    return Plan(anatomy.owner, places, rotaries, swaps, target, parameters, amplitudes)


def _served(anatomy: Anatomy, kind: Kind) -> list[Attention]:
    """The attentions that get a kind of table: those of its layer type, or all."""
    return [attention for attention in anatomy.attentions if kind.layer_type in (None, attention.layer_type)]


def _rotary(
    name: str,
    anatomy: Anatomy,
    site: Site,
    schedule: FrequencySchedule,
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
            follows = schedule if scaled else _own(name, kind)
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
    return attention.module, Swap(cls, anatomy.functions_of(attention), table, kind.geometry.dim // 2, float32)


def _schedule(name: str, kind: Kind, config: Any, wish: Wish) -> tuple[FrequencySchedule, int]:
    """The schedule to follow, and the context length in tokens that it reaches."""
    trained = kind.geometry.trained_length
    if kind.scaling is not None:
        _require_replaceable(name, kind, config, wish.settings["on_scaled"])
        if wish.settings["on_scaled"] == "keep":
            return _kept(name, kind, config, wish)
    method = DEFAULT_METHOD if wish.method is None else wish.method
    if method == AUTO:
        schedule = _recommended(kind.geometry, wish)
        return schedule, max(schedule.target_length(trained), wish.length or 0)
    schedule = schedule_for(method, trained, factor=wish.factor, length=wish.length, **wish.options)
    target = schedule.target_length(trained)
    require_int("target_length", target, minimum=1, remedy=f"mend {type(schedule).__name__}.target_length")
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


def _kept(name: str, kind: Kind, config: Any, wish: Wish) -> tuple[FrequencySchedule, int]:
    """The schedule that the config carries, widened if the user asked for it."""
    own, trained, method = _own(name, kind), kind.geometry.trained_length, wish.method
    reaches = wish.factor is not None or wish.length is not None
    if isinstance(method, type(own)) and not reaches:  # as a file says it
        return method, int(config.max_position_embeddings) if method == own else method.target_length(trained)
    named = isinstance(method, str) and method != AUTO and schedule_class(method) is type(own)
    if not (method is None or named) or wish.options:
        raise ValueError(
            f'method={method!r} with on_scaled="keep": {name} keeps its own scaling, {own!r}, which factor= or length= '
            'may widen; leave the method and its options out, or pass on_scaled="replace"'
        )
    if not reaches:
        return own, int(config.max_position_embeddings)
    if isinstance(own, LongRoPE):
        raise ValueError(
            f'on_scaled="keep" with a longer target: the lists of {name}\'s longrope were searched for one length; '
            'leave factor and length out, or pass on_scaled="replace"'
        )
    growth = {"factor": own.factor} if isinstance(own, DynamicNTK) else {}  # which its target does not say
    wanted = schedule_for(own.method, trained, factor=wish.factor, length=wish.length, **growth)
    changed = {key: getattr(wanted, key) for key in ("factor", "floor") if hasattr(own, key)}
    widened: FrequencySchedule = replace(own, **changed)  # type: ignore[type-var]  # a dataclass
    return widened, widened.target_length(trained)


def _require_replaceable(name: str, kind: Kind, config: Any, on_scaled: str) -> None:
    carries = f'{name}\'s config already carries a scaling of the type "{kind.scaling}"'
    if on_scaled == "error":
        raise ValueError(
            f'{carries}: scaling twice is rarely meant; pass on_scaled="replace" to count from the pretraining length, '
            'on_scaled="keep" to keep that scaling and widen it if factor or length is given, '
            "or remove the scaling from the config and load the model anew"
        )
    if not kind.length_known:
        raise ValueError(
            f'{carries} and does not tell the pretraining length, which on_scaled="{on_scaled}" needs; '
            "set config.original_max_position_embeddings"
        )
    if on_scaled == "replace" and rope_parameters(config, kind.layer_type).get("mscale_all_dim"):
        raise UnsupportedModelError(
            f"{carries} with mscale_all_dim, by which its attentions multiplied their softmax scale when they were "
            'made: it cannot be replaced; pass on_scaled="keep", or load the model without the scaling'
        )


def _own(name: str, kind: Kind) -> FrequencySchedule:
    if kind.own is None:
        raise UnsupportedModelError(f'{name} carries a scaling of the type "{kind.scaling}", which ropex does not know')
    return kind.own


def _amplitudes(
    name: str, anatomy: Anatomy, schedule: FrequencySchedule, rope: RotaryEmbedding, scales: dict[str, bool]
) -> Iterator[tuple[nn.Module, float]]:
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
        yield attention.module, amplitude**2


def _parameters(
    name: str,
    anatomy: Anatomy,
    kinds: list[Kind],
    schedule: FrequencySchedule,
    target: int,
    scales: dict[str, bool],
) -> tuple[str, dict[str, Any]] | None:
    """The type and the attributes by which the config says what the patch does, so that transformers does the same.

    None where it cannot: layers that share their parameters go different ways, or the method has no such words.
    """
    kind, site = kinds[0], anatomy.sites[0]
    served = [scales[a.path] for kind in kinds for a in _served(anatomy, kind)]
    shared = len({id(site.rotary.config) for site in anatomy.sites}) == 1 and len({k.layer_type for k in kinds}) == 1
    unchanged = isinstance(schedule, Unscaled) and kind.scaling is None
    if not all(served) or not shared or unchanged or schedule.length_dependent or schedule.learned:
        return None
    for own_types in (True, False):
        try:
            parameters = written(schedule, kind.geometry, kind.turning, own_types=own_types)
            config = copy.deepcopy(site.rotary.config)
            attributes = with_parameters(config, parameters, kind.layer_type, kind.geometry.trained_length)
            for key, value in {"max_position_embeddings": target, **attributes}.items():
                setattr(config, key, value)
            getattr(config, "validate", lambda: None)()
            rotary = fresh_rotary(name, site.rotary, config)
        except Exception:  # this config does not take this type, and says so in a class of its own
            continue
        turning = None if kind.turning is None else torch.tensor(kind.turning)
        how = (rotary, site.layout, kind.geometry, schedule, turning, kind.layer_type)
        if makes_tables_of(*how, length=target, multi_axis=site.axes is not None):
            return parameters["rope_type"], attributes
    return None


def _described(schedule: FrequencySchedule) -> dict[str, Any]:
    described = schedule.to_dict()
    try:
        json.dumps(described)
    except TypeError:  # a schedule of the user's own
        return {"method": schedule.method}
    return described
