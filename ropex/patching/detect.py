"""Where a model rotates, found by looking and by probing; no model family is named here."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from ropex.kernels import Layout, rotate_with_table, table
from ropex.kernels.reference import full_table
from ropex.patching.config import UnsupportedModelError, pretraining_length, rope_parameters, scaling_type, unscaled
from ropex.patching.module import PatchedRotary
from ropex.patching.swap import rotary_function_name
from ropex.patching.tables import Pairing
from ropex.rotation import Geometry, Request, Rotation
from ropex.scaling import Unscaled

__all__ = ["Site", "check_in_effect", "find_patched", "find_site"]


@dataclass(frozen=True)
class Site:
    """Where and how a model rotates.

    Attributes:
        owner: the module that holds the rotary module as its attribute `name`.
        path: the rotary module's name in the model.
        rotary: transformers' rotary module; its `config` is the one that describes it.
        attentions: each attention instance with the name of the rotary function that its forward calls.
        pairing: the layouts, found by probing.
        geometry: how the model was pretrained.
        scaling: the type of scaling that the config carries, or None.
        length_known: whether the config tells the pretraining length; the geometry has the maximum length otherwise.
    """

    owner: nn.Module
    name: str
    path: str
    rotary: nn.Module
    attentions: tuple[tuple[nn.Module, str], ...]
    pairing: Pairing
    geometry: Geometry
    scaling: str | None
    length_known: bool


def find_patched(model: nn.Module) -> tuple[nn.Module, str, PatchedRotary] | None:
    """The patch's rotary module in a model, with its owner and attribute name; None where there is no patch."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r}: must be a torch.nn.Module; pass the loaded model")
    for owner in model.modules():
        for name, child in owner.named_children():
            if isinstance(child, PatchedRotary):
                return owner, name, child
    return None


def find_site(model: nn.Module) -> Site:
    """Find where the model rotates, and check that its own config explains the cos and sin that it makes.

    Raises:
        UnsupportedModelError: no rotary module, several, or one that does not do what its config says.
    """
    model_name = type(model).__name__
    paths = [name for name, module in model.named_modules() if _is_rotary(module)]
    if not paths:
        raise UnsupportedModelError(
            f"{model_name} has no rotary embedding module: only models whose attention rotates queries and keys can be "
            "patched; pass a model such as Llama, Mistral, Qwen or GPT-NeoX"
        )
    if len(paths) > 1:
        raise UnsupportedModelError(
            f"{model_name} has {len(paths)} rotary embedding modules ({', '.join(paths)}): "
            "only models in which all layers share one are supported"
        )
    path = paths[0]
    owner_path, _, name = path.rpartition(".")
    owner, rotary = model.get_submodule(owner_path), model.get_submodule(path)
    if list(inspect.signature(rotary.forward).parameters) != ["x", "position_ids"]:
        raise UnsupportedModelError(
            f"{model_name}'s {path}.forward{inspect.signature(rotary.forward)}: must take (x, position_ids) alone; "
            "embeddings per layer type are not supported"
        )
    config: Any = getattr(rotary, "config", None)
    if not hasattr(rotary, "inv_freq") or not hasattr(config, "max_position_embeddings"):
        raise UnsupportedModelError(
            f"{model_name}'s {path} ({type(rotary).__name__}): must hold inv_freq and a config with "
            "max_position_embeddings, as transformers' rotary modules do"
        )
    attentions = _find_attentions(model)
    if not attentions:
        raise UnsupportedModelError(
            f"{model_name} has a rotary embedding module ({path}) but no attention that calls a rotary function with "
            "its cos and sin, so a patch would change nothing"
        )
    if replaced := [attention for attention, _ in attentions if "forward" in vars(attention)]:
        raise UnsupportedModelError(
            f"{model_name}'s {type(replaced[0]).__name__}.forward was replaced on the instance, which would hide the "
            "patch: must be the class's own; patch before accelerate or another library hooks the model"
        )
    scaling = scaling_type(config)
    known = pretraining_length(config)
    geometry = Geometry(
        dim=2 * rotary.get_buffer("inv_freq").shape[-1],
        base=rope_parameters(config)["rope_theta"],
        trained_length=known if known is not None else config.max_position_embeddings,
    )
    kinds = {type(attention): (attention, function) for attention, function in attentions}
    with torch.device("cpu"):
        layout = _probe_table(model_name, rotary, geometry, scaled=scaling is not None)
        channels = {_probe_channels(model_name, *kind, layout, geometry) for kind in kinds.values()}
    if len(channels) > 1:
        raise UnsupportedModelError(f"{model_name}'s attentions pair channels in different ways; not supported")
    pairing = Pairing(layout, channels.pop())
    return Site(owner, name, path, rotary, attentions, pairing, geometry, scaling, known is not None)


@torch.no_grad()
def check_in_effect(patched: PatchedRotary) -> None:
    """Raise unless the patch's module makes the cos and sin of its schedule, computed here in another way."""
    geometry, schedule = patched.rope.geometry, patched.rope.schedule
    device = patched.rope.inv_freq.device
    if device.type == "meta":
        return
    with torch.device("cpu"):
        positions = _probe_positions(geometry.trained_length).to(device)
        got = patched(_like_hidden_states(device), positions)
        layout = patched.pairing.table
        tolerance = torch.full((geometry.dim // 2,), 1e-6, device=device, dtype=torch.float64)
        if patched.angles == "float32":
            tolerance = tolerance + _angle_error(geometry, positions, torch.float32)
        request = Request(geometry, positions, positions.max() + 1)
        want = [full_table(t, layout) for t in _tables_in_float64(schedule.rotation(request))]
        in_effect = _match(got, want, full_table(tolerance, layout))
    if not in_effect:
        raise UnsupportedModelError(
            f"the patched cos and sin are not those of {schedule!r}; please report this with the model's config"
        )


def _probe_positions(trained_length: int) -> Tensor:
    """Positions that tell one frequency from another: the first ones, the last trained one, and some between."""
    generator = torch.Generator().manual_seed(trained_length)
    between = torch.randint(trained_length, (5,), generator=generator)
    fixed = torch.tensor([0, 1, 7, trained_length - 1]).clamp(max=trained_length - 1)
    return torch.cat((fixed, between))[None]


def _is_rotary(module: nn.Module) -> bool:
    return "Rotary" in type(module).__name__ and any(name.endswith("inv_freq") for name, _ in module.named_buffers())


def _find_attentions(model: nn.Module) -> tuple[tuple[nn.Module, str], ...]:
    names = {cls: rotary_function_name(cls) for cls in {type(module) for module in model.modules()}}
    return tuple((module, name) for module in model.modules() if (name := names[type(module)]) is not None)


def _probe_table(model_name: str, rotary: nn.Module, geometry: Geometry, *, scaled: bool) -> Layout:
    """The layout in which the model's own module makes the tables that its config describes.

    The live module may be on any device and its buffer may have been cast; a fresh one of the same class and config
    says what it should do.
    """
    positions = _probe_positions(geometry.trained_length)
    config: Any = rotary.config
    fresh = _rebuild(model_name, rotary, config)
    plain = _rebuild(model_name, rotary, unscaled(config)) if scaled else fresh
    layout = _layout_of(plain(_like_hidden_states(), positions), geometry, positions)
    if layout is None:
        raise UnsupportedModelError(f"{model_name}'s cos and sin are not those of {geometry} in a known layout")
    buffer = rotary.get_buffer("inv_freq")
    if not buffer.is_meta:
        # transformers' dynamic modules change in a call: they keep a long one's frequencies until a short one comes.
        live = copy.deepcopy(rotary)
        live(_like_hidden_states(buffer.device), torch.zeros_like(positions, device=buffer.device))
        got = live(_like_hidden_states(buffer.device), positions.to(buffer.device))
        tolerance = full_table(1e-6 + _angle_error(geometry, positions, buffer.dtype), layout)
        if not _match(got, fresh(_like_hidden_states(), positions), tolerance):
            raise UnsupportedModelError(
                f"{model_name}'s cos and sin are not those of its config: its frequencies were changed after it was "
                "made; load the model anew, or remove what changed them"
            )
    return layout


def _layout_of(got: Any, geometry: Geometry, positions: Tensor) -> Layout | None:
    """The layout in which these tables are those of the unscaled geometry."""
    want = _tables_in_float64(Unscaled().rotation(Request(geometry, positions, positions.max() + 1)))
    tolerance = 1e-6 + _angle_error(geometry, positions, torch.float32)
    for layout in get_args(Layout):
        if _match(got, [full_table(t, layout) for t in want], full_table(tolerance, layout)):
            return cast(Layout, layout)
    return None


def _rebuild(model_name: str, rotary: nn.Module, config: Any) -> nn.Module:
    try:
        return type(rotary)(config)
    except Exception as error:
        raise UnsupportedModelError(
            f"{model_name}'s {type(rotary).__name__} cannot be made from its config: {error}"
        ) from error


def _probe_channels(
    model_name: str, attention: nn.Module, function_name: str, layout: Layout, geometry: Geometry
) -> Layout:
    """Which channels the attention's rotary function pairs; it must do nothing but rotate them."""
    function = inspect.unwrap(type(attention).forward).__globals__[function_name]
    positions = _probe_positions(geometry.trained_length)
    rotation = Rotation(positions, geometry.inv_freq())
    cos, sin = table(rotation)
    full = [full_table(t, layout) for t in (cos, sin)]
    generator = torch.Generator().manual_seed(geometry.dim)
    candidates: list[Layout] = list(get_args(Layout))
    # The second width tells whether channels beyond the rotary dimension pass; some functions take no such heads.
    for width in (geometry.dim, _head_dim(attention, geometry.dim)):
        q, k = torch.randn(2, 1, 1, positions.shape[1], width, generator=generator, dtype=torch.float32)
        try:
            got = function(q.clone(), k.clone(), *full)
        except Exception as error:
            if width != geometry.dim:
                continue
            raise UnsupportedModelError(
                f"{model_name}'s {function_name} cannot be called with (q, k, cos, sin): {error}"
            ) from error
        candidates = [c for c in candidates if _match(got, rotate_with_table(q, k, cos, sin, layout=c), 1e-5)]
    if not candidates:
        raise UnsupportedModelError(
            f"{model_name}'s {function_name} pairs channels neither as halves nor interleaved: not supported"
        )
    return candidates[0]


def _head_dim(attention: nn.Module, default: int) -> int:
    return next((getattr(attention, name) for name in ("head_dim", "head_size") if hasattr(attention, name)), default)


def _tables_in_float64(rotation: Rotation) -> tuple[Tensor, Tensor]:
    positions, inv_freq, amplitude = rotation
    angle = positions[..., None] * inv_freq
    return angle.cos() * amplitude, angle.sin() * amplitude


def _angle_error(geometry: Geometry, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """How far angles may be off whose frequencies and products were rounded to `dtype`, [batch, seq, half]."""
    return 4 * torch.finfo(dtype).eps * positions[..., None] * geometry.inv_freq(positions.device)


def _like_hidden_states(device: torch.device | None = None) -> Tensor:
    """What a rotary module takes for hidden states: it looks at the dtype and the device only."""
    return torch.zeros((), dtype=torch.float32, device=device)


def _match(got: Any, want: Sequence[Tensor], tolerance: Tensor | float) -> bool:
    """Whether a pair of tensors equals another one within the tolerance."""
    return (
        isinstance(got, tuple)
        and len(got) == len(want)
        and all(
            g.shape == w.shape and bool(((g.cpu() - w.cpu()).abs() <= torch.as_tensor(tolerance).cpu()).all())
            for g, w in zip(got, want, strict=True)
        )
    )
