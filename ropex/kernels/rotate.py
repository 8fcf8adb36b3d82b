"""`rotate`: the one verb of the kernels, and the only place where a backend is chosen."""

from __future__ import annotations

from typing import Literal, get_args, overload

import torch
from torch import Tensor

from ropex._checks import describe, require_choice
from ropex.kernels import reference
from ropex.rotation import Rotation

__all__ = ["Angles", "Backend", "Layout", "Order", "rotate", "rotate_with_table", "table"]

Layout = Literal["half", "interleaved"]
Order = Literal["bhsd", "bshd"]
Angles = Literal["exact", "float32"]
Backend = Literal["auto", "reference"]
_LAYOUTS, _ORDERS, _ANGLES, _BACKENDS = (get_args(words) for words in (Layout, Order, Angles, Backend))


@overload
def rotate(
    q: Tensor,
    k: None = None,
    rotation: Rotation | None = None,
    *,
    layout: Layout = "half",
    order: Order = "bhsd",
    angles: Angles = "exact",
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def rotate(
    q: Tensor,
    k: Tensor,
    rotation: Rotation | None = None,
    *,
    layout: Layout = "half",
    order: Order = "bhsd",
    angles: Angles = "exact",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def rotate(
    q: Tensor,
    k: Tensor | None = None,
    rotation: Rotation | None = None,
    *,
    layout: Layout = "half",
    order: Order = "bhsd",
    angles: Angles = "exact",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotate queries, and keys with them, by `positions * inv_freq`.

    For the pair (x, y) of channels and its angle a, with amplitude c: `(c (x cos a - y sin a), c (y cos a + x sin a))`.
    The arithmetic is float32 (float64 for float64 input), rounded once to the dtype of the input. The leading
    `2 * half` channels of a head turn, the rest pass. Gradients reach q, k, `inv_freq` and `amplitude`.

    Args:
        q: [batch, heads, seq, head_dim], or [batch, seq, heads, head_dim] for `order="bshd"`; any strides.
        k: like q, with any number of heads; None for q alone.
        rotation: from a schedule, or made by hand.
        layout: `half` pairs channel i with half + i (Llama, GPT-NeoX), `interleaved` pairs 2 i with 2 i + 1 (GPT-J).
        order: which axis holds the heads.
        angles: `exact`, by 64-bit integer phase, right to float32 at any position; `float32`, transformers' arithmetic
            bit for bit, whose error grows with the position (0.03 at one million).
        backend: `reference`, PyTorch; `auto`, the fastest one at hand.

    Returns:
        The rotated q, or (q, k) where k is given.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, before anything is computed.

    Example:
        >>> import torch, ropex
        >>> rope = ropex.RotaryEmbedding(ropex.Geometry(64, 10_000.0, 2048), ropex.schedule("yarn", factor=4))
        >>> q, k = torch.randn(1, 8, 16, 64), torch.randn(1, 2, 16, 64)
        >>> q, k = ropex.rotate(q, k, rotation=rope(torch.arange(16)[None]))

    Reference: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv:2104.09864, eq. 34.
    """
    if not isinstance(rotation, Rotation):
        raise ValueError(f"rotation={rotation!r}: must be a ropex.Rotation; pass what a schedule's rotation() gave")
    _check_options(layout, order, backend)
    rows = _check_rotation(rotation, angles)
    _check_heads(q, k, order, rows, rotation.inv_freq.shape[-1], rotation.positions.device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    cos, sin = reference.make_table(rotation, angles=angles, dtype=dtype)
    return _rotate(q, k, cos, sin, layout, order)


@overload
def rotate_with_table(
    q: Tensor, k: None, cos: Tensor, sin: Tensor, *, layout: Layout = "half", order: Order = "bhsd"
) -> Tensor: ...


@overload
def rotate_with_table(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, layout: Layout = "half", order: Order = "bhsd"
) -> tuple[Tensor, Tensor]: ...


def rotate_with_table(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, layout: Layout = "half", order: Order = "bhsd"
) -> Tensor | tuple[Tensor, Tensor]:
    """`rotate` for callers that have cos and sin, such as a model whose layers share one table.

    Args:
        q, k, layout, order: as in `rotate`.
        cos, sin: [1 or batch, seq, half], with the amplitude in them; gradients reach them.
    """
    _check_options(layout, order, "auto")
    if cos.dim() != 3 or cos.shape != sin.shape or not cos.is_floating_point():
        raise ValueError(
            f"cos {describe(cos)} and sin {describe(sin)}: must be equal floating-point tables [1 or batch, seq, "
            "half]; pass what ropex.kernels.table gave"
        )
    _check_heads(q, k, order, (cos.shape[0], cos.shape[1]), cos.shape[-1], cos.device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    return _rotate(q, k, cos.to(dtype), sin.to(dtype), layout, order)


def table(rotation: Rotation, *, angles: Angles = "exact", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cos and sin of a rotation's angles, times its amplitude: two tensors [batch, seq, half] in `dtype`."""
    _check_rotation(rotation, angles)
    return reference.make_table(rotation, angles=angles, dtype=dtype)


def _rotate(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, layout: Layout, order: Order
) -> Tensor | tuple[Tensor, Tensor]:
    heads_axis = 1 if order == "bhsd" else 2
    cos, sin = cos.unsqueeze(heads_axis), sin.unsqueeze(heads_axis)
    rotated = reference.rotate_one(q, cos, sin, layout=layout)
    return rotated if k is None else (rotated, reference.rotate_one(k, cos, sin, layout=layout))


def _check_options(layout: str, order: str, backend: str) -> None:
    require_choice("layout", layout, _LAYOUTS)
    require_choice("order", order, _ORDERS)
    require_choice("backend", backend, _BACKENDS)


def _check_rotation(rotation: Rotation, angles: str) -> tuple[int, int]:
    """Raise unless the rotation's tensors fit each other; its [batch, seq]."""
    require_choice("angles", angles, _ANGLES)
    positions, inv_freq, amplitude = rotation
    if not isinstance(positions, Tensor) or not isinstance(inv_freq, Tensor):
        kinds = f"{type(positions).__name__} and {type(inv_freq).__name__}"
        raise ValueError(f"positions and inv_freq of the types {kinds}: must be tensors; convert them")
    if not isinstance(amplitude, (int, float, Tensor)):
        raise ValueError(f"amplitude={amplitude!r}: must be a number or a tensor; pass 1.0 for none")
    if positions.dim() != 2 or positions.dtype != torch.int64:
        raise ValueError(
            f"positions {describe(positions)}: must be int64 [batch, seq]; a fractional scale belongs in inv_freq"
        )
    batch, seq = positions.shape
    per_row = inv_freq.dim() == 3 and (batch == 1 or inv_freq.shape[0] in (1, batch)) and inv_freq.shape[1] in (1, seq)
    if not (inv_freq.dim() == 1 or per_row) or not inv_freq.is_floating_point():
        raise ValueError(
            f"inv_freq {describe(inv_freq)}: must be a floating-point [half], [batch, 1, half] or [batch, seq, half] "
            f"for positions {describe(positions)}; reshape it"
        )
    if inv_freq.dim() == 3:
        batch = max(batch, inv_freq.shape[0])
    half = inv_freq.shape[-1]
    if isinstance(amplitude, Tensor) and not _broadcasts(amplitude.shape, (batch, seq, half)):
        raise ValueError(
            f"amplitude {describe(amplitude)}: must broadcast against [{batch}, {seq}, {half}]; "
            "pass a number, or one value per sample as [batch, 1, 1]"
        )
    for name, value in (("inv_freq", inv_freq), ("amplitude", amplitude)):
        # A 0-d tensor on the CPU goes with every device.
        if (
            isinstance(value, Tensor)
            and value.device != positions.device
            and (value.dim() or value.device.type != "cpu")
        ):
            raise ValueError(
                f"positions on {positions.device}, {name} on {value.device}: must be on one device; move one of them"
            )
    return batch, seq


def _check_heads(
    q: Tensor, k: Tensor | None, order: str, rows: tuple[int, int], half: int, device: torch.device
) -> None:
    axes = "[batch, heads, seq, head_dim]" if order == "bhsd" else "[batch, seq, heads, head_dim]"
    seq_axis = 2 if order == "bhsd" else 1
    for name, x in (("q", q), ("k", k)):
        if x is None and name == "k":
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} of the type {type(x).__name__}: must be a tensor {axes}; convert it")
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"{name} {describe(x)}: must be a floating-point {axes}; reshape or cast it")
        if x.shape[-1] < 2 * half:
            raise ValueError(
                f"{name} {describe(x)}: its head_dim must be >= the rotary dimension {2 * half}; "
                "pass a rotation of the model's own geometry"
            )
        if rows[0] not in (1, x.shape[0]) or rows[1] != x.shape[seq_axis]:
            raise ValueError(
                f"{name} {describe(x)} with a rotation of {list(rows)}: must be the same [batch, seq] (batch may be 1 "
                f"in the rotation), with {name} as {axes}; check positions and order"
            )
        if x.device != device:
            raise ValueError(f"{name} on {x.device}, rotation on {device}: must be on one device; move one of them")
    if k is not None and (k.dtype != q.dtype or k.shape[-1] != q.shape[-1] or k.shape[0] != q.shape[0]):
        raise ValueError(
            f"q {describe(q)} and k {describe(k)}: must agree in dtype, batch and head_dim; cast or reshape one"
        )


def _broadcasts(shape: torch.Size, target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(
        have in (1, want) for have, want in zip(reversed(shape), reversed(target), strict=False)
    )
