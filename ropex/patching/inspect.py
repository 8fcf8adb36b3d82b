"""`inspect`: what a model's rotary embedding does, patched or not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ropex.kernels import Angles, Layout
from ropex.patching.config import scaling_type
from ropex.patching.detect import find_patched, find_site
from ropex.patching.swap import Rotating
from ropex.rotation import Geometry
from ropex.scaling import FrequencySchedule

__all__ = ["Inspection", "depends_on_length", "inspect"]


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
        pinned_length: the length that every pass is served for, or None.
        attentions: the number of attention modules that rotate.
        rotary: the name of its rotary module.
        table_layout, channel_layout: how it lays out cos and sin, and the channels of a head.
        angles: `exact`, or `float32` as transformers computes them.
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
    table_layout: Layout
    channel_layout: Layout
    angles: Angles

    def __str__(self) -> str:
        factor = self.length / self.geometry.trained_length
        in_effect = repr(self.schedule) if self.schedule is not None else f"transformers' {self.scaling or 'default'}"
        rows = {
            "model": f"{self.model}, {self.attentions} attention modules, rotary module {self.rotary}",
            "patched": "yes" if self.patched else "no",
            "schedule": in_effect,
            "geometry": f"rotary dimension {self.geometry.dim}, base {self.geometry.base:g}",
            "length": f"{self.length} tokens, {factor:g} x the trained {self.geometry.trained_length}",
            "angles": self.angles,
            "layout": f"tables {self.table_layout}, channels {self.channel_layout}",
        }
        if self.pinned_length is not None:
            rows["pinned to"] = f"{self.pinned_length} tokens"
        return "\n".join(f"{name:<9} {value}" for name, value in rows.items())


def inspect(model: nn.Module) -> Inspection:
    """What a model's rotary embedding does, read from the live model.

    Raises:
        UnsupportedModelError: the model has no rotary embedding, or one that ropex does not know.
    """
    found = find_patched(model)
    if found is None:
        site = find_site(model)
        return Inspection(
            model=type(model).__name__,
            patched=False,
            geometry=site.geometry,
            schedule=None,
            scaling=site.scaling,
            length=site.rotary.config.max_position_embeddings,  # type: ignore[union-attr,arg-type]
            pinned_length=None,
            attentions=len(site.attentions),
            rotary=site.path,
            table_layout=site.pairing.table,
            channel_layout=site.pairing.channels,
            angles="float32",
        )
    patched = found[2]
    rope = patched.rope
    return Inspection(
        model=type(model).__name__,
        patched=True,
        geometry=rope.geometry,
        schedule=rope.schedule,
        scaling=scaling_type(patched.original.config),
        length=rope.schedule.target_length(rope.geometry.trained_length),
        pinned_length=rope.pinned_length,
        attentions=sum(isinstance(module, Rotating) for module in model.modules()),
        rotary=next(name for name, module in model.named_modules() if module is patched),
        table_layout=patched.pairing.table,
        channel_layout=patched.pairing.channels,
        angles=patched.angles,
    )


def depends_on_length(model: nn.Module) -> bool:
    """Whether the model's frequencies depend on the length of the pass: by a patch, or by transformers' own scaling."""
    if found := find_patched(model):
        return found[2].rope.schedule.length_dependent and found[2].rope.pinned_length is None
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        types = rope_type.values() if isinstance(rope_type, dict) else (rope_type,)
        if any(kind in ("dynamic", "longrope") for kind in types):
            return True
    return False
