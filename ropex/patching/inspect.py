"""`inspect`: what a model's rotary embedding does, patched or not."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from ropex.kernels import Angles
from ropex.patching.config import text_config
from ropex.patching.detect import examine, find_active, find_patched
from ropex.patching.swap import Swap, channels_of
from ropex.patching.tables import Channels, TableLayout
from ropex.rotation import Geometry
from ropex.scaling import FrequencySchedule

__all__ = ["Inspection", "LayerKind", "depends_on_length", "explain", "inspect"]


@dataclass(frozen=True)
class LayerKind:
    """What the layers of one kind do.

    Attributes:
        name: their layer type in the config, or `all`.
        layers: how many there are.
        window: the tokens that each sees; None, all.
        geometry: how they were pretrained.
        schedule: what they follow; None where transformers rotates them.
        own: what they follow by the model's own config; None where ropex rotates them, or cannot read it.
    """

    name: str
    layers: int
    window: int | None
    geometry: Geometry
    schedule: FrequencySchedule | None
    own: FrequencySchedule | None


@dataclass(frozen=True)
class Inspection:
    """What a model's rotary embedding does; `print` it.

    Attributes:
        model: the model's class.
        patched: whether ropex rotates it.
        geometry: how it was pretrained.
        schedule: what it follows; None where the model is not patched.
        scaling: the type of scaling that its own config carries, or None. A patch overrides it.
        length: the context length that it is meant to reach, in tokens.
        length_known: whether the pretraining length is known; the geometry has the config's maximum otherwise.
        pinned_length: the length that every pass is served for, or None.
        attentions: the number of attention modules that rotate.
        rotary: the name of its rotary module.
        table_layout, channel_layout: how it lays out cos and sin, and the channels of a head.
        angles: `exact`, or `float32` as transformers computes them.
        precision: `model`, or `float32` where scores are computed in it.
        kinds: what differs from layer to layer.
        written: the type under which the config of a patched model says what the patch does, so that plain
            transformers does the same with a saved checkpoint; None where it cannot: `Patch.save` and `ropex export`.
        own: what a model that is not patched follows by its config; None where no reading of the config makes its cos
            and sin.
        notes: what else a user should know of the model.
    """

    model: str
    patched: bool
    geometry: Geometry
    schedule: FrequencySchedule | None
    scaling: str | None
    length: int
    pinned_length: int | None
    attentions: int
    rotary: str
    table_layout: TableLayout
    channel_layout: Channels
    angles: Angles
    precision: str
    kinds: tuple[LayerKind, ...]
    written: str | None
    length_known: bool = True
    own: FrequencySchedule | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        trained = self.geometry.trained_length
        relative = f"{self.length / trained:g} x the trained {trained}" if self.length_known else "trained at fewer"
        in_effect = repr(self.schedule) if self.patched else f"transformers' {self.scaling or 'default'}"
        if not self.patched and self.scaling is not None:
            in_effect += f", {self.own!r}" if self.own is not None else ", which ropex does not read"
        rows = {
            "model": f"{self.model}, {self.attentions} attention modules, rotary module {self.rotary}",
            "patched": "yes" if self.patched else "no",
            "schedule": in_effect,
            "geometry": f"rotary dimension {self.geometry.dim}, base {self.geometry.base:g}",
            "length": f"{self.length} tokens, {relative}",
            "angles": f"{self.angles}, scores in {'float32' if self.precision == 'float32' else 'the model dtype'}",
            "layout": f"tables {self.table_layout}, channels {self.channel_layout}",
        }
        if self.pinned_length is not None:
            rows["pinned to"] = f"{self.pinned_length} tokens"
        if self.patched:
            plain = "nothing that plain transformers would follow; use Patch.save or ropex export"
            rows["config"] = f'says "{self.written}"' if self.written else f"says {plain}"
        if len(self.kinds) > 1 or self.kinds[0].window is not None:
            for kind in self.kinds:
                sees = "all tokens" if kind.window is None else f"a window of {kind.window} tokens"
                own = kind.own if kind.own is not None else "a scaling that ropex does not read"
                follows = kind.schedule if self.patched else f"transformers, {own}"
                rows[f"{kind.layers} x {kind.name}"] = f"{sees}, base {kind.geometry.base:g}, {follows}"
        rows |= {f"note {number}": note for number, note in enumerate(self.notes, 1)}
        width = max(9, *map(len, rows))
        return "\n".join(f"{name:<{width}} {value}" for name, value in rows.items())


def inspect(model: nn.Module) -> Inspection:
    """What a model's rotary embedding does, read from the live model.

    Raises:
        UnsupportedModelError: the model has no rotary embedding, or one that ropex does not know.
    """
    spots = find_active(model)
    if not spots:
        return _inspect_plain(model)
    patched = spots[0].patched
    rope, config = patched.rope, patched.original.config
    kinds: dict[tuple[Any, ...], int] = {}
    for module in model.modules():
        if (swap := getattr(type(module), "ropex_made_from", None)) is not None and isinstance(swap, Swap):
            names = patched.tables.get(swap.layer_type) or next(iter(patched.tables.values()))
            followed = patched.ropes[names[swap.table or 0]]
            key = (swap.layer_type or "all", swap.window, followed.geometry, followed.schedule, None)
            kinds[key] = kinds.get(key, 0) + 1
    return Inspection(
        model=type(model).__name__,
        patched=True,
        geometry=rope.geometry,
        schedule=rope.schedule,
        scaling=patched.scaling,
        length=patched.target,
        length_known=patched.stated_length is not None,
        pinned_length=rope.pinned_length,
        attentions=sum(kinds.values()),
        rotary=spots[0].path,
        table_layout=patched.layout,
        channel_layout=channels_of(model),
        angles=patched.angles,
        precision=patched.settings["precision"],
        kinds=_layer_kinds(kinds),
        written=patched.written if _tells(model, config) else None,
    )


def explain(model: nn.Module) -> tuple[str, ...]:
    """What each step of detection sees in a model that is not patched; the last one says why it is refused."""
    steps: list[str] = []
    if find_patched(model):
        return (f"{type(model).__name__} is patched: what it was is seen after ropex.unpatch(model)",)
    with contextlib.suppress(ValueError):
        examine(model, steps=steps)
    return tuple(steps)


def _tells(model: nn.Module, config: Any) -> bool:
    """Whether it is this config that the model would save: not where a part of it was patched alone."""
    own = getattr(model, "config", None)
    return own is None or text_config(own) is config


def _inspect_plain(model: nn.Module) -> Inspection:
    anatomy = examine(model)
    site = anatomy.sites[0]
    kinds: dict[tuple[Any, ...], int] = {}
    for attention in anatomy.attentions:
        kind = site.kind_for(attention.layer_type)
        key = (attention.layer_type or "all", attention.window, kind.geometry, None, kind.own)
        kinds[key] = kinds.get(key, 0) + 1
    scaled = next((kind for kind in site.kinds if kind.scaling is not None), site.kinds[0])
    return Inspection(
        model=type(model).__name__,
        patched=False,
        geometry=scaled.geometry,
        schedule=None,
        own=scaled.own,
        scaling=scaled.scaling,
        length=scaled.length,
        length_known=scaled.length_known,
        pinned_length=None,
        attentions=len(anatomy.attentions),
        rotary=site.path,
        table_layout=site.layout,
        channel_layout=anatomy.functions_of(anatomy.attentions[0])[0].channels,
        angles="float32",
        precision="model",
        kinds=_layer_kinds(kinds),
        written=None,
        notes=anatomy.notes,
    )


def _layer_kinds(counted: dict[tuple[Any, ...], int]) -> tuple[LayerKind, ...]:
    return tuple(
        LayerKind(name, layers, window, geometry, schedule, own)
        for (name, window, geometry, schedule, own), layers in counted.items()
    )


def depends_on_length(model: nn.Module) -> bool:
    """Whether the model's frequencies depend on the length of the pass: by a patch, or by transformers' own scaling."""
    if spots := find_active(model):
        rope = spots[0].patched.rope
        return rope.schedule.length_dependent and rope.pinned_length is None
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        types = rope_type.values() if isinstance(rope_type, dict) else (rope_type,)
        if any(kind in ("dynamic", "longrope") for kind in types):
            return True
    return False
