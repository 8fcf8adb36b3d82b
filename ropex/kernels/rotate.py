"""`rotate`: the one verb of the kernels, and the only place where a backend is chosen."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, get_args, overload

import torch
from torch import Tensor

from ropex._checks import describe, require_choice
from ropex.kernels import checks, reference
from ropex.kernels.backend import BACKENDS, Backend, resolve_backend
from ropex.kernels.reference import Source
from ropex.rotation import Rotation

__all__ = [
    "Angles",
    "Layout",
    "Order",
    "from_heads",
    "operators",
    "rotate",
    "rotate_with_table",
    "source_of",
    "table",
    "to_heads",
]

Layout = Literal["half", "interleaved"]
Order = Literal["bhsd", "bshd", "thd"]
Angles = Literal["exact", "float32"]
LAYOUTS, ORDERS, _ANGLES = (get_args(words) for words in (Layout, Order, Angles))


class _Options(TypedDict, total=False):
    layout: Layout
    order: Order
    rotary_dim: int | None
    cu_seqlens: Tensor | None
    inplace: bool
    out_dtype: torch.dtype | None
    split: bool
    backend: Backend


class _RotateOptions(_Options, total=False):
    angles: Angles


@overload
def rotate(
    q: Tensor, k: None = None, rotation: Rotation | None = None, **options: Unpack[_RotateOptions]
) -> Tensor: ...


@overload
def rotate(
    q: Tensor, k: Tensor, rotation: Rotation | None = None, **options: Unpack[_RotateOptions]
) -> tuple[Tensor, Tensor]: ...


def rotate(
    q: Tensor,
    k: Tensor | None = None,
    rotation: Rotation | None = None,
    *,
    layout: Layout = "half",
    order: Order = "bhsd",
    rotary_dim: int | None = None,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
    out_dtype: torch.dtype | None = None,
    split: bool = False,
    angles: Angles = "exact",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotate queries, and keys with them, by `positions * inv_freq`.

    For the pair (x, y) of channels and its angle a, with amplitude c: `(c (x cos a - y sin a), c (y cos a + x sin a))`.
    The arithmetic is float32 (float64 for float64 input), rounded once. The leading `2 * half` channels of a head turn,
    the rest pass. Gradients reach q, k, `inv_freq` and `amplitude`; the backward pass keeps positions and frequencies,
    and for the frequencies' gradient its own output.

    Args:
        q: [batch, heads, seq, head_dim]; for `order="bshd"` [batch, seq, heads, head_dim], for "thd" [tokens, heads,
            head_dim]; any strides; float16, bfloat16, float32 or float64.
        k: like q, with any number of heads; None for q alone.
        rotation: from a schedule, or made by hand. Its positions are int64, so that they may be negative and exceed
            2**31. For packed tokens without `cu_seqlens` it has one row, [1, tokens].
        layout: `half` pairs channel i with half + i (Llama, GPT-NeoX), `interleaved` pairs 2 i with 2 i + 1 (GPT-J).
        order: what the axes of q and k are.
        rotary_dim: a check, that the rotation turns this many channels.
        cu_seqlens: for packed tokens, int [sequences + 1], where each sequence starts and the last ends. The j-th token
            of sequence i turns as column j of the rotation's row i, or of its only row. Tokens beyond the last bound,
            such as the padding of a CUDA graph, turn as column 0 of the last row. On a GPU its values are not checked.
        inplace: overwrite q and k and return them. Where autograd records, by way of a copy.
        out_dtype: of the result; that of q by default. float16 keeps eight times more of a rotated bfloat16.
        split: return the result's rounding and that of what rounding left, stacked, [2, ...]: `high, low = rotate(q,
            split=True, ...)`. Their sum is good to 16 bits where the dtype is bfloat16.
        angles: `exact`, by 64-bit integer phase, right to float32 at any position; `float32`, transformers' arithmetic
            bit for bit, whose error grows with the position (0.03 at one million).
        backend: `triton`, one kernel for q and k, on a GPU; `compiled`, one pass each, by torch.compile on a CPU;
            `reference`, PyTorch; `auto`, `ropex.kernels.choose_backend`. A named backend runs or raises.

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
    if isinstance(k, Rotation):
        raise ValueError("k is a Rotation: must be a tensor like q, or None; pass rotation= for q alone")
    source, rows = source_of(rotation, angles)
    return _rotate(
        q, k, source, rows,
        layout=layout, order=order, rotary_dim=rotary_dim, cu_seqlens=cu_seqlens,
        inplace=inplace, out_dtype=out_dtype, split=split, backend=backend,
    )  # fmt: skip


@overload
def rotate_with_table(q: Tensor, k: None, cos: Tensor, sin: Tensor, **options: Unpack[_Options]) -> Tensor: ...


@overload
def rotate_with_table(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...


def rotate_with_table(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: Layout = "half",
    order: Order = "bhsd",
    rotary_dim: int | None = None,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
    out_dtype: torch.dtype | None = None,
    split: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`rotate` for callers that have cos and sin, such as a model whose layers share one table.

    Args:
        q, k, layout, order, cu_seqlens, inplace, out_dtype, split, backend: as in `rotate`.
        cos, sin: [1 or batch, seq, half] in any floating-point dtype, with the amplitude in them; gradients reach them.
            Full-width tables as transformers makes them, [1 or batch, seq, rotary_dim] with each pair's value twice in
            the order of `layout`, are taken too: by default those wider than half a head.
        rotary_dim: how many channels turn, which tells a full table of a partial rotation from half a table. It must be
            given with a table that is half a head wide, which may be either.
    """
    checks.check_table(cos, sin)
    width = cos.shape[-1]
    if isinstance(q, Tensor) and q.dim():
        if rotary_dim is None and 2 * width == q.shape[-1] and width % 2 == 0:
            raise ValueError(
                f"cos {describe(cos)} for {q.shape[-1]} channels: may be one value for each of {width} pairs, "
                f"or each value twice for {width // 2}; pass rotary_dim={2 * width} for the one, {width} for the other"
            )
        full = width == rotary_dim if rotary_dim is not None else 2 * width > q.shape[-1]
        if full and width % 2 == 0:
            require_choice("layout", layout, LAYOUTS)
            cos, sin = reference.half_table(cos, layout), reference.half_table(sin, layout)
    return _rotate(
        q, k, Source(cos, sin, table=True), (cos.shape[0], cos.shape[1]),
        layout=layout, order=order, rotary_dim=rotary_dim, cu_seqlens=cu_seqlens,
        inplace=inplace, out_dtype=out_dtype, split=split, backend=backend,
    )  # fmt: skip


def table(rotation: Rotation, *, angles: Angles = "exact", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cos and sin of a rotation's angles, times its amplitude: two tensors [batch, seq, half] in `dtype`."""
    source, _ = source_of(rotation, angles)
    cos, sin = source.tables(dtype)
    return cos, sin


def source_of(rotation: Rotation | None, angles: str) -> tuple[Source, tuple[int, int]]:
    """The rotation as the backends take it, and its [batch, seq].

    float32 angles become a table here, by PyTorch's own cos and sin, so that no backend's are other bits.
    """
    require_choice("angles", angles, _ANGLES)
    if not isinstance(rotation, Rotation):
        raise ValueError(f"rotation={rotation!r}: must be a ropex.Rotation; pass what a schedule's rotation() gave")
    rows = checks.check_rotation(rotation)
    positions, inv_freq, amplitude = rotation
    inv_freq = inv_freq.to(positions.device)
    inv_freq = inv_freq[None, None] if inv_freq.dim() == 1 else inv_freq
    factors, scale = None, 1.0
    if isinstance(amplitude, Tensor) and amplitude.device != positions.device:
        if not (amplitude.requires_grad or torch.compiler.is_compiling()):
            amplitude = (
                amplitude.item()
            )  # a number on the CPU: no copy for each call, which a CUDA graph could not hold
    if isinstance(amplitude, Tensor):
        factors = amplitude.to(positions.device)
        factors = factors.reshape((1,) * (3 - factors.dim()) + factors.shape)
    else:
        scale = float(amplitude)
    source = Source(positions, inv_freq, factors, scale)
    if angles == "float32":
        # transformers' arithmetic, operation by operation: the product is rounded to float32 before the reduction.
        angle = positions[..., None].to(torch.float32) * inv_freq.to(torch.float32)
        factor = scale if factors is None else factors.to(torch.float32)
        source = Source(angle.cos() * factor, angle.sin() * factor, table=True)
    return source, rows


def _rotate(
    q: Tensor,
    k: Tensor | None,
    source: Source,
    rows: tuple[int, int],
    *,
    layout: Layout,
    order: Order,
    rotary_dim: int | None,
    cu_seqlens: Tensor | None,
    inplace: bool,
    out_dtype: torch.dtype | None,
    split: bool,
    backend: Backend,
) -> Tensor | tuple[Tensor, Tensor]:
    require_choice("layout", layout, LAYOUTS)
    require_choice("order", order, ORDERS)
    require_choice("backend", backend, BACKENDS)
    half, device = source.second.shape[-1], source.first.device
    checks.check_heads(q, k, order, rows, half, device, cu_seqlens is not None)
    checks.check_rotary_dim(rotary_dim, half, q.shape[-1])
    checks.check_output(out_dtype, inplace=inplace, split=split, dtype=q.dtype)
    if cu_seqlens is not None:
        checks.check_packed(cu_seqlens, order, q.shape[0], rows, device)
        source = _packed(source, cu_seqlens, q.shape[0])
    if inplace:
        checks.check_in_place(q, k)
    dtype = q.dtype if out_dtype is None else out_dtype
    interleaved = layout == "interleaved"
    inputs = [to_heads(x, order) for x in (q, k) if x is not None]
    chosen = resolve_backend(backend, inputs)
    recorded = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, source.first, source.second, source.amplitude)
    )
    if inplace and not recorded and chosen != "reference":
        operators().rotate_(*_two(inputs), *source, False, interleaved, chosen)
        return q if k is None else (q, k)
    if inplace and recorded:
        inputs = [x.clone() for x in inputs]  # what autograd keeps of them must not be overwritten
    if chosen == "reference":
        cos, sin = source.tables(torch.promote_types(q.dtype, torch.float32))
        outputs = [reference.rotate_one(x, cos, sin, interleaved=interleaved, dtype=dtype, split=split) for x in inputs]
    else:
        outputs = operators().rotate(*_two(inputs), *source, False, interleaved, dtype, split, chosen)
    outputs = [from_heads(x, order) for x in outputs[: len(inputs)]]
    if inplace:
        outputs = [x.copy_(out) for x, out in zip((q, k), outputs, strict=False) if x is not None]
    return outputs[0] if k is None else (outputs[0], outputs[1])


def operators() -> Any:
    """`torch.ops.ropex`, with its operators."""
    from ropex.kernels import ops  # noqa: F401  # registers them

    return torch.ops.ropex


def _two(inputs: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    return inputs[0], inputs[1] if len(inputs) == 2 else None


def to_heads(x: Tensor, order: str) -> Tensor:
    """The view [batch, heads, seq, head_dim] of q or k."""
    if order == "thd":
        return x.transpose(0, 1)[None]
    return x.transpose(1, 2) if order == "bshd" else x


def from_heads(x: Tensor, order: str) -> Tensor:
    """`to_heads` undone, on the last four axes."""
    if order == "thd":
        x = x.squeeze(-4)
    return x if order == "bhsd" else x.transpose(-3, -2)


def _packed(source: Source, cu_seqlens: Tensor, tokens: int) -> Source:
    """The source that has one row for all packed tokens."""
    cu_seqlens = cu_seqlens.to(torch.int64)
    token = torch.arange(tokens, device=cu_seqlens.device)
    beyond = token >= cu_seqlens[-1]
    sequence = (torch.searchsorted(cu_seqlens, token, right=True) - 1).clamp(max=len(cu_seqlens) - 2)
    column = (token - cu_seqlens[sequence]).masked_fill(beyond, 0)

    def gathered(x: Tensor) -> Tensor:
        row = sequence if x.shape[0] > 1 else torch.zeros_like(sequence)
        return x[row, column if x.shape[1] > 1 else torch.zeros_like(column)][None]

    first, second, amplitude, scale, table = source
    second = gathered(second) if table or second.shape[0] > 1 or second.shape[1] > 1 else second
    return Source(gathered(first), second, gathered(amplitude) if amplitude is not None else None, scale, table)
