"""Probes: whether a rotary module makes the tables that its config describes, and what a rotary function does."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from ropex.kernels import Order, rotate_with_table, table
from ropex.patching.config import UnsupportedModelError, unscaled
from ropex.patching.tables import Channels, RotaryFunction, Style, TableLayout, laid_out
from ropex.rotation import Geometry, Request, Rotation
from ropex.scaling import FrequencySchedule, Unscaled

__all__ = [
    "axes_of_pairs",
    "fresh_rotary",
    "live_frequencies",
    "makes_tables_of",
    "probe_function",
    "probe_positions",
    "probe_table",
    "tables_match",
]

# Libraries that bind their own kernel to a modeling file's rotary function. Ours takes its place, so that theirs need
# not be run to know what it pairs (on a CPU it cannot run).
_REBOUND: dict[str, Channels] = {"liger_kernel": "half", "unsloth": "half"}

_AXES = 3  # of positions in images and video: time, height, width


def probe_positions(trained_length: int) -> Tensor:
    """Positions that tell one frequency from another: the first ones, the last trained one, and some between."""
    generator = torch.Generator().manual_seed(trained_length)
    between = torch.randint(trained_length, (5,), generator=generator)
    fixed = torch.tensor([0, 1, 7, trained_length - 1]).clamp(max=trained_length - 1)
    return torch.cat((fixed, between))[None]


def fresh_rotary(model_name: str, rotary: nn.Module, config: Any) -> nn.Module:
    """A new module of the same class, made of this config on the CPU."""
    try:
        with torch.device("cpu"):
            return type(rotary)(config)
    except Exception as error:
        raise UnsupportedModelError(
            f"{model_name}'s {type(rotary).__name__} cannot be made from its config: {error}"
        ) from error


def probe_table(
    model_name: str,
    rotary: nn.Module,
    geometry: Geometry,
    turning: Tensor | None,
    layer_type: str | None,
    *,
    scaled: bool,
    axes: Sequence[int] | None,
) -> TableLayout:
    """The layout in which the model's own module makes the tables that its config describes.

    The live module may be on any device and its buffer may have been cast; a fresh one of the same class and config
    says what it should do. On the meta device only that one speaks.

    Args:
        turning: which pairs turn, bool [half]; None: all.
        axes: of multi-axis positions, the axis that each pair follows.
    """
    positions = probe_positions(geometry.trained_length)
    config: Any = rotary.config
    fresh = fresh_rotary(model_name, rotary, config)
    kinds = () if layer_type is None else (layer_type,)
    asked = positions if axes is None else positions.expand(_AXES, *positions.shape)
    plain = fresh_rotary(model_name, rotary, unscaled(config, layer_type)) if scaled else fresh
    request = Request(geometry, positions, positions.max() + 1)
    want = _exact(Unscaled().rotation(request), turning)
    error = 1e-6 + _angle_error(geometry, positions, torch.float32)
    got = plain(hidden_states_like(), asked, *kinds)
    layout = next((each for each in get_args(TableLayout) if _tables_close(got, want, error, each)), None)
    if layout is None:
        raise UnsupportedModelError(f"{model_name}'s cos and sin are not those of {geometry} in a known layout")
    device = live_frequencies(rotary).device
    if device.type != "meta":
        # transformers' dynamic modules change in a call: they keep a long one's frequencies until a short one comes.
        live = copy.deepcopy(rotary)
        _forget_length(live)
        live(hidden_states_like(device), torch.zeros_like(asked, device=device), *kinds)
        got = live(hidden_states_like(device), asked.to(device), *kinds)
        error = 1e-6 + _angle_error(geometry, positions, live_frequencies(rotary).dtype)
        tolerance = laid_out(error, error, layout)[0].abs()
        if not _match(got, _as_tuple(fresh(hidden_states_like(), asked, *kinds)), tolerance):
            raise UnsupportedModelError(
                f"{model_name}'s cos and sin are not those of its config: its frequencies were changed after it was "
                "made; load the model anew, or remove what changed them"
            )
    return cast(TableLayout, layout)


def live_frequencies(rotary: nn.Module) -> Tensor:
    """The first frequencies that a rotary module of transformers holds, wherever and in whatever dtype they now are."""
    return next(buffer for name, buffer in rotary.named_buffers() if "inv_freq" in name)


def _forget_length(rotary: nn.Module) -> None:
    """Bring a module back to its first frequencies; some versions of transformers' dynamic ones never find back."""
    if getattr(rotary, "rope_type", None) == "dynamic":
        rotary.inv_freq = rotary.original_inv_freq.clone()  # type: ignore[operator]
        rotary.max_seq_len_cached = rotary.original_max_seq_len


def axes_of_pairs(rotary: nn.Module, half: int) -> tuple[int, ...] | None:
    """Which axis of positions [axes, batch, seq] each pair follows; None where the module takes one axis alone.

    One axis at a time is set to position 1: the pairs that turn then are those that follow it. (Position 1 turns the
    slowest pair of a base of 1e9 and 64 pairs by 1e-9, which float32 sines show.)
    """
    position = torch.zeros(_AXES, 1, 1, dtype=torch.int64)
    follows: list[int] = [-1] * half
    for axis in range(_AXES):
        moved = position.clone()
        moved[axis] = 1
        try:
            got = rotary(hidden_states_like(), moved)
        except Exception:
            return None
        if not isinstance(got, tuple) or got[1].dim() != 3 or got[1].shape[:2] != (1, 1):
            return None
        for pair in (got[1][0, 0, :half] != 0).nonzero().flatten().tolist():
            follows[pair] = axis if follows[pair] == -1 else -2
    return tuple(follows) if min(follows) >= 0 else None


@torch.no_grad()
def tables_match(
    got: tuple[Tensor, Tensor],
    positions: Tensor,
    geometry: Geometry,
    schedule: FrequencySchedule,
    turning: Tensor | None,
    *,
    float32_angles: bool,
) -> bool:
    """Whether these are the cos and sin of a schedule, computed here in another way."""
    error = torch.full((geometry.dim // 2,), 1e-6, device=positions.device, dtype=torch.float64)
    if float32_angles:
        error = error + _angle_error(geometry, positions, torch.float32)
    want = _exact(schedule.rotation(Request(geometry, positions, positions.max() + 1)), turning)
    return _tables_close(got, want, error, "narrow")


@torch.no_grad()
def makes_tables_of(
    rotary: nn.Module,
    layout: TableLayout,
    geometry: Geometry,
    schedule: FrequencySchedule,
    turning: Tensor | None,
    layer_type: str | None,
    *,
    length: int,
    multi_axis: bool,
) -> bool:
    """Whether a rotary module of transformers makes the tables of a schedule, up to a length and below the trained."""
    for reach in (length, min(length, geometry.trained_length)):
        positions = torch.arange(reach)[None, :: max(reach // 9, 1)]
        asked = positions.expand(_AXES, *positions.shape) if multi_axis else positions
        got = rotary(hidden_states_like(), asked, *(() if layer_type is None else (layer_type,)))
        error = 1e-6 + _angle_error(geometry, positions, torch.float32)
        request = Request(geometry, positions, torch.tensor(length))
        if not _tables_close(got, _exact(schedule.rotation(request), turning), error, layout):
            return False
    return True


def probe_function(
    model_name: str, function: Callable[..., Any], name: str, layout: TableLayout, geometry: Geometry, head_dim: int
) -> RotaryFunction:
    """What a rotary function pairs; it must do nothing but rotate."""
    style = _style(model_name, function, name)
    library = (getattr(function, "__module__", None) or "").partition(".")[0]
    if library in _REBOUND:
        return RotaryFunction(name, style, _REBOUND[library], "bhsd")
    positions = probe_positions(geometry.trained_length)
    cos, sin = table(Rotation(positions, geometry.inv_freq()))
    tables = laid_out(cos, sin, layout)
    generator = torch.Generator().manual_seed(geometry.dim)
    candidates = [
        RotaryFunction(name, style, channels, order, backward)
        for backward in (False, True)
        for channels in get_args(Channels)
        for order in get_args(Order)
        if order in ("bhsd", "bshd")
    ]
    asks_for_axis = "unsqueeze_dim" in inspect.signature(function).parameters
    # The second width tells whether channels beyond the rotary dimension pass; some functions take no such heads.
    for width in dict.fromkeys((geometry.dim, head_dim)):
        answers: dict[str, Any] = {}
        tokens = positions.shape[1]
        for order, shape in (("bhsd", (2, tokens)), ("bshd", (tokens, 2))):
            q, k = torch.randn(2, 1, *shape, width, generator=generator, dtype=torch.float32)
            options = {"unsqueeze_dim": 1 if order == "bhsd" else 2} if asks_for_axis else {}
            inputs = (q.clone(),) if style == "single" else (q.clone(), k.clone())
            try:
                answers[order] = (q, k, _as_tuple(function(*inputs, *tables, **options)))
            except Exception as error:
                answers[order] = error
        if all(isinstance(answer, Exception) for answer in answers.values()):
            if width != geometry.dim:
                continue
            raise UnsupportedModelError(
                f"{model_name}'s {name} cannot be called with (q, k, cos, sin): {answers['bhsd']}"
            ) from answers["bhsd"]
        candidates = [how for how in candidates if _rotates_so(how, answers[how.order], cos, sin)]
    if not candidates:
        raise UnsupportedModelError(
            f"{model_name}'s {name} pairs channels neither as halves nor interleaved: not supported"
        )
    return candidates[0]


def rotated(how: RotaryFunction, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, **options: Any) -> Any:
    """What the rotary function gives, by ropex: the rotated q, or q and k."""
    if how.channels == "deinterleaved":
        q, k = _deinterleaved(q), _deinterleaved(k) if k is not None else None
    return rotate_with_table(q, k, cos, -sin if how.backward else sin, layout=how.layout, **options)


def hidden_states_like(device: torch.device | None = None) -> Tensor:
    """What a rotary module takes for hidden states: it looks at the dtype and the device only."""
    return torch.zeros((), dtype=torch.float32, device=device)


def _deinterleaved(x: Tensor) -> Tensor:
    pairs: Tensor = x.unflatten(-1, (-1, 2))
    return pairs.transpose(-1, -2).flatten(-2)


def _style(model_name: str, function: Callable[..., Any], name: str) -> Style:
    parameters = list(inspect.signature(function).parameters)
    if parameters[1:3] == ["cos", "sin"]:
        return "single"
    if parameters[2:4] == ["cos", "sin"]:
        return "pair"
    if parameters[2:3] == ["freqs_cis"]:
        return "complex"
    raise UnsupportedModelError(
        f"{model_name}'s {name} cannot be called with (q, k, cos, sin), (x, cos, sin) or (q, k, freqs_cis): it takes "
        f"({', '.join(parameters)})"
    )


def _rotates_so(how: RotaryFunction, answer: Any, cos: Tensor, sin: Tensor) -> bool:
    if isinstance(answer, Exception):
        return False
    q, k, got = answer
    want = _as_tuple(rotated(how, q, None if how.style == "single" else k, cos, sin, order=how.order))
    return _match(got, want, torch.tensor(1e-5))


def _exact(rotation: Rotation, turning: Tensor | None) -> tuple[Tensor, Tensor]:
    positions, inv_freq, amplitude = rotation
    if turning is not None:
        inv_freq = inv_freq * turning.to(inv_freq.device)
    angle = positions[..., None] * inv_freq
    return angle.cos() * amplitude, angle.sin() * amplitude


def _angle_error(geometry: Geometry, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """How far angles may be off whose frequencies and products were rounded to `dtype`, [batch, seq, half]."""
    return 4 * torch.finfo(dtype).eps * positions[..., None] * geometry.inv_freq(positions.device)


def _tables_close(got: Any, want: tuple[Tensor, Tensor], error: Tensor, layout: TableLayout) -> bool:
    tolerance = laid_out(error, torch.zeros_like(error), layout)[0].abs()
    return _match(_as_tuple(got), laid_out(*want, layout), tolerance)


def _as_tuple(tables: Any) -> Any:
    return (tables,) if isinstance(tables, Tensor) else tables


def _match(got: Any, want: Sequence[Tensor], tolerance: Tensor) -> bool:
    """Whether tensors equal others within the tolerance."""
    got = _as_tuple(got)
    return (
        isinstance(got, tuple)
        and len(got) == len(want)
        and all(
            isinstance(g, Tensor)
            and g.shape == w.shape
            and g.is_complex() == w.is_complex()
            and bool(((g.cpu() - w.cpu()).abs() <= tolerance.cpu()).all())
            for g, w in zip(got, want, strict=True)
        )
    )
