"""One rotary module of a model: what its config says of it, held against the cos and sin that it makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ropex.patching.config import (
    UnsupportedModelError,
    pretraining_length,
    rope_parameters,
    scaling_type,
    stated_length,
    unscaled,
)
from ropex.patching.dry import Tables
from ropex.patching.native import readings
from ropex.patching.probe import Claim, axes_of_pairs, count_axes, fresh_rotary, layout_of, require_live
from ropex.patching.tables import TableLayout, laid_out
from ropex.rotation import Geometry
from ropex.scaling import FrequencySchedule, PositionInterpolation, Unscaled, YaRN

__all__ = ["Kind", "Site", "examine_site", "layer_types_of", "meta_tables"]


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


def examine_site(
    model: nn.Module, model_name: str, path: str, rotary: nn.Module, trained_length: int | None, steps: list[str]
) -> Site:
    config: Any = rotary.config
    fresh = fresh_rotary(model_name, rotary, config)
    kinds: list[Kind] = []
    layout: TableLayout = "half"
    axes = None
    for layer_type in layer_types_of(rotary):
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
        turning = (buffer != 0) if bool((buffer == 0).any()) else None
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


def meta_tables(site: Site) -> Tables:
    """For a dry pass: tables of two tokens, for each layer type that the site may be asked for."""

    def tables(kind: Kind) -> tuple[torch.Tensor, ...]:
        zeros = torch.zeros(1, 2, kind.geometry.dim // 2, device="meta")
        return laid_out(zeros, zeros.clone(), site.layout)

    return {kind.layer_type: tables(kind) for kind in site.kinds}


def layer_types_of(rotary: nn.Module) -> Iterator[str | None]:
    """The layer types whose frequencies a rotary module holds; None where it holds one set."""
    for name, _ in rotary.named_buffers():
        if name.endswith("inv_freq") and "original" not in name and "long" not in name:
            yield name.removesuffix("inv_freq").removesuffix("_") or None
