"""Probes: whether a rotary module makes the tables that its config describes, and what a rotary function does."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ropex.kernels import Order, rotate_with_table, table
from ropex.patching.config import UnsupportedModelError
from ropex.patching.tables import Channels, RotaryFunction, Style, TableLayout, laid_out
from ropex.rotation import Geometry, Request, Rotation
from ropex.scaling import FrequencySchedule

__all__ = [
    "Claim",
    "axes_of_pairs",
    "count_axes",
    "fresh_rotary",
    "layout_of",
    "live_frequencies",
    "makes_tables_of",
    "probe_function",
    "probe_positions",
    "require_live",
    "tables_match",
]

# Libraries that bind their own kernel to a modeling file's rotary function. Ours takes its place, so that theirs need
# not be run to know what it pairs (on a CPU it cannot run).
_REBOUND: dict[str, Channels] = {"liger_kernel": "half", "unsloth": "half"}

# How many axes positions in images and video have: time, height, width; one more in some families.
_AXES = (3, 4, 2)


@dataclass(frozen=True)
class Claim:
    """What a config, or ropex's reading of it, says of a rotary module; the module itself tells whether it holds.

    Attributes:
        schedule: that the module follows.
        geometry: of the model.
        lengths: context lengths in tokens to ask it for, short ones and long ones.
        turning: which pairs turn, bool [half]; None: all.
        layer_type: to ask it for; None: it makes one kind of table.
        axes: how many axes its positions have; None: one.
        follows: the axis that each pair follows, where that is known.
    """

    schedule: FrequencySchedule
    geometry: Geometry
    lengths: tuple[int, ...]
    turning: Tensor | None = None
    layer_type: str | None = None
    axes: int | None = None
    follows: tuple[int, ...] | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        return _kinds(self.layer_type)

    def asked(self, positions: Tensor) -> Tensor:
        """Positions [1, seq] as the module takes them, the same on all axes."""
        return positions if self.axes is None else positions.expand(self.axes, *positions.shape)


def _kinds(layer_type: str | None) -> tuple[str, ...]:
    return () if layer_type is None else (layer_type,)


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


def layout_of(rotary: nn.Module, claim: Claim) -> TableLayout | None:
    """The layout in which a rotary module of transformers makes the tables of a schedule; None where it does not.

    It is asked for short contexts and for those beyond the trained length, and with other positions on each axis.
    """
    return next((layout for layout in get_args(TableLayout) if makes_tables_of(rotary, layout, claim)), None)


def require_live(model_name: str, rotary: nn.Module, fresh: nn.Module, layout: TableLayout, claim: Claim) -> None:
    """Raise unless the live module makes the tables of a fresh one of its class and config.

    It may be on any device, and its buffer may have been cast. On the meta device only the fresh one speaks.
    """
    device = live_frequencies(rotary).device
    if device.type == "meta":
        return
    positions = probe_positions(claim.geometry.trained_length)
    asked = claim.asked(positions)
    # transformers' dynamic modules change in a call: they keep a long one's frequencies until a short one comes.
    live, fresh = copy.deepcopy(rotary), copy.deepcopy(fresh)
    for module, where in ((live, device), (fresh, torch.device("cpu"))):
        _forget_length(module)
        module(hidden_states_like(where), torch.zeros_like(asked, device=where), *claim.kinds)
    got = live(hidden_states_like(device), asked.to(device), *claim.kinds)
    error = 1e-6 + _angle_error(claim.geometry, positions, live_frequencies(rotary).dtype)
    tolerance = laid_out(error, error, layout)[0].abs()
    if not _match(got, _as_tuple(fresh(hidden_states_like(), asked, *claim.kinds)), tolerance):
        raise UnsupportedModelError(
            f"{model_name}'s cos and sin are not those of its config: its frequencies were changed after it was "
            "made; load the model anew, or remove what changed them"
        )


def live_frequencies(rotary: nn.Module) -> Tensor:
    """The first frequencies that a rotary module of transformers holds, wherever and in whatever dtype they now are."""
    return next(buffer for name, buffer in rotary.named_buffers() if "inv_freq" in name)


def _forget_length(rotary: nn.Module) -> None:
    """Bring a module back to its first frequencies; some versions of transformers' dynamic ones never find back."""
    if getattr(rotary, "rope_type", None) == "dynamic":
        rotary.inv_freq = rotary.original_inv_freq.clone()  # type: ignore[operator]
        rotary.max_seq_len_cached = rotary.original_max_seq_len


def count_axes(rotary: nn.Module, layer_type: str | None) -> int | None:
    """How many axes the positions of a module may have, [axes, batch, seq]; None where they have one alone."""
    for axes in _AXES:
        try:
            got = _as_tuple(
                rotary(hidden_states_like(), torch.zeros(axes, 1, 1, dtype=torch.int64), *_kinds(layer_type))
            )
        except Exception:  # of a number of axes that it does not take
            continue
        if isinstance(got, tuple) and all(isinstance(each, Tensor) and each.shape[:-1] == (1, 1) for each in got):
            return axes
    return None


def axes_of_pairs(model_name: str, rotary: nn.Module, layout: TableLayout, claim: Claim) -> tuple[int, ...] | None:
    """Which axis of multi-axis positions each pair follows; None where they have one axis.

    One axis at a time is set to position 1: the pairs that turn then are those that follow it. (Position 1 turns the
    slowest pair of a base of 1e9 and 64 pairs by 1e-9, which float32 sines show.)

    Raises:
        UnsupportedModelError: the two channels of a pair follow different axes, or the pairs follow the axes in a way
            that one position does not show.
    """
    if claim.axes is None:
        return None
    half = claim.geometry.dim // 2
    follows: list[int] = [-1] * half
    for axis in range(claim.axes):
        moved = torch.zeros(claim.axes, 1, 1, dtype=torch.int64)
        moved[axis] = 1
        got = _as_tuple(rotary(hidden_states_like(), moved, *claim.kinds))
        sin = got[0].imag if layout == "complex" else got[1]
        for channels in _channels(sin[0, 0], layout):
            for pair in (channels != 0).nonzero().flatten().tolist():
                follows[pair] = axis if follows[pair] in (-1, axis) else -2
    turns = [True] * half if claim.turning is None else claim.turning.tolist()
    axes = tuple(max(axis, 0) if not turn else axis for axis, turn in zip(follows, turns, strict=True))
    if min(axes) < 0 or not makes_tables_of(rotary, layout, replace(claim, follows=axes)):
        raise UnsupportedModelError(
            f"{model_name}'s {type(rotary).__name__} takes positions with {claim.axes} axes, and the two channels of "
            "its pairs do not follow one axis each: not supported"
        )
    return axes


def _channels(table: Tensor, layout: TableLayout) -> tuple[Tensor, ...]:
    """The values of a table [width] at each of the channels that a pair has, [half]."""
    if layout == "half":
        return table.chunk(2)
    return (table[::2], table[1::2]) if layout == "interleaved" else (table,)


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
def makes_tables_of(rotary: nn.Module, layout: TableLayout, claim: Claim) -> bool:
    """Whether a rotary module of transformers makes the tables of a schedule, at each of the claim's lengths."""
    for reach in claim.lengths:
        positions = torch.linspace(0, reach - 1, 9, dtype=torch.float64).round().to(torch.int64)[None]
        positions = torch.cat((torch.tensor([[min(1, reach - 1), min(7, reach - 1)]]), positions), dim=1)
        asked = claim.asked(positions)
        followed = positions[..., None].expand(-1, -1, claim.geometry.dim // 2)
        if claim.follows is not None:
            offsets = torch.arange(len(asked))[:, None, None] * 3
            asked = (asked - offsets).clamp(min=0)
            followed = asked.movedim(0, -1)[..., list(claim.follows)]
        module = copy.deepcopy(rotary)  # some do not find back from a long context, and some fail in a second one
        _forget_length(module)
        got = module(hidden_states_like(), asked, *claim.kinds)
        error = 1e-6 + _angle_error(claim.geometry, positions, torch.float32)
        rotation = claim.schedule.rotation(Request(claim.geometry, positions, torch.tensor(reach)))
        if not _tables_close(got, _exact(rotation, claim.turning, followed), error, layout):
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
    width = 2 * cos.shape[-1]
    return rotate_with_table(q, k, cos, -sin if how.backward else sin, layout=how.layout, rotary_dim=width, **options)


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


def _exact(rotation: Rotation, turning: Tensor | None, followed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cos and sin [batch, seq, half] in float64; `followed` are the positions of each pair, where they differ."""
    positions, inv_freq, amplitude = rotation
    if turning is not None:
        inv_freq = inv_freq * turning.to(inv_freq.device)
    angle = (positions[..., None] if followed is None else followed) * inv_freq
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
