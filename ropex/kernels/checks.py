"""Checks of what callers pass to the kernels, all before anything is computed or written."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ropex._checks import describe
from ropex.kernels.backend import under_torch_func
from ropex.rotation import Rotation

__all__ = [
    "check_heads",
    "check_in_place",
    "check_output",
    "check_packed",
    "check_rotary_dim",
    "check_rotation",
    "check_table",
]

_AXES = {
    "bhsd": "[batch, heads, seq, head_dim]",
    "bshd": "[batch, seq, heads, head_dim]",
    "thd": "[tokens, heads, head_dim]",
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_rotation(rotation: Rotation) -> tuple[int, int]:
    """Raise unless the rotation's tensors fit each other; its [batch, seq]."""
    positions, inv_freq, amplitude = rotation
    if not isinstance(positions, Tensor) or not isinstance(inv_freq, Tensor):
        kinds = f"{type(positions).__name__} and {type(inv_freq).__name__}"
        raise ValueError(f"positions and inv_freq of the types {kinds}: must be tensors; convert them")
    if not isinstance(amplitude, Tensor):
        number = isinstance(amplitude, (int, float)) and not isinstance(amplitude, bool)
        # A compiler that looks for one graph for all values does not know whether this one is finite.
        if not number or not (torch.compiler.is_compiling() or math.isfinite(amplitude)):
            raise ValueError(f"amplitude={amplitude!r}: must be a finite number or a tensor; pass 1.0 for none")
    if positions.dim() != 2 or positions.dtype != torch.int64:
        raise ValueError(
            f"positions {describe(positions)}: must be int64 [batch, seq]; a fractional scale belongs in inv_freq"
        )
    batch, seq = positions.shape
    per_row = inv_freq.dim() == 3 and (batch == 1 or inv_freq.shape[0] in (1, batch)) and inv_freq.shape[1] in (1, seq)
    if not (inv_freq.dim() == 1 or per_row) or inv_freq.dtype not in _DTYPES or not inv_freq.shape[-1]:
        raise ValueError(
            f"inv_freq {describe(inv_freq)}: must be a floating-point [half], [batch, 1, half] or [batch, seq, half] "
            f"for positions {describe(positions)}; reshape it"
        )
    if inv_freq.dim() == 3:
        batch = max(batch, inv_freq.shape[0])
    half = inv_freq.shape[-1]
    if isinstance(amplitude, Tensor):
        if not _broadcasts(amplitude.shape, (batch, seq, half)) or amplitude.is_complex():
            raise ValueError(
                f"amplitude {describe(amplitude)}: must be real and broadcast against [{batch}, {seq}, {half}]; "
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


def check_table(cos: Tensor, sin: Tensor) -> None:
    """Raise unless cos and sin are tables of one shape."""
    if not isinstance(cos, Tensor) or not isinstance(sin, Tensor):
        kinds = f"{type(cos).__name__} and {type(sin).__name__}"
        raise ValueError(f"cos and sin of the types {kinds}: must be tensors; pass what ropex.kernels.table gave")
    fits = cos.dim() == 3 and cos.shape == sin.shape and cos.dtype == sin.dtype and cos.dtype in _DTYPES
    if not fits or not cos.shape[-1]:
        raise ValueError(
            f"cos {describe(cos)} and sin {describe(sin)}: must be equal floating-point tables [1 or batch, seq, "
            "half]; pass what ropex.kernels.table gave"
        )
    if cos.device != sin.device:
        raise ValueError(f"cos on {cos.device}, sin on {sin.device}: must be on one device; move one of them")


def check_heads(
    q: Tensor, k: Tensor | None, order: str, rows: tuple[int, int], half: int, device: torch.device, packed: bool
) -> None:
    """Raise unless q and k fit each other and a rotation of these [batch, seq] rows and `half` pairs."""
    axes = _AXES[order]
    for name, x in (("q", q), ("k", k)):
        if x is None and name == "k":
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} of the type {type(x).__name__}: must be a tensor {axes}; convert it")
        if x.dim() != len(order) or x.dtype not in _DTYPES or x.layout != torch.strided:
            kind = "" if x.layout == torch.strided else f" ({x.layout})"
            raise ValueError(f"{name} {describe(x)}{kind}: must be a floating-point {axes}; reshape or cast it")
        if x.shape[-1] < 2 * half:
            raise ValueError(
                f"{name} {describe(x)}: its head_dim must be >= the rotary dimension {2 * half}; "
                "pass a rotation of the model's own geometry"
            )
        batch, seq = (1, x.shape[0]) if order == "thd" else (x.shape[0], x.shape[order.index("s")])
        if not packed and (rows[0] not in (1, batch) or rows[1] != seq):
            raise ValueError(
                f"{name} {describe(x)} with a rotation of {list(rows)}: must be the same [batch, seq] (batch may be 1 "
                f"in the rotation), with {name} as {axes}; check positions and order"
            )
        if x.device != device:
            raise ValueError(f"{name} on {x.device}, rotation on {device}: must be on one device; move one of them")
    if k is None:
        return
    heads = order.index("h")
    alike = [size for axis, size in enumerate(q.shape) if axis != heads]
    if k.dtype != q.dtype or alike != [size for axis, size in enumerate(k.shape) if axis != heads]:
        raise ValueError(
            f"q {describe(q)} and k {describe(k)}: must agree in dtype, batch, seq and head_dim; cast or reshape one"
        )


def check_rotary_dim(rotary_dim: int | None, half: int, head_dim: int) -> None:
    """Raise unless the rotary dimension, where given, is that of `half` pairs and fits a head."""
    if rotary_dim is None:
        return
    if not isinstance(rotary_dim, int) or isinstance(rotary_dim, bool) or rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim={rotary_dim!r}: must be an even int >= 2; channels rotate in pairs")
    if rotary_dim > head_dim:
        raise ValueError(f"rotary_dim={rotary_dim}: must be <= head_dim {head_dim}; pass how many channels turn")
    if rotary_dim != 2 * half:
        raise ValueError(
            f"rotary_dim={rotary_dim} with {half} frequencies: must be twice their number; leave it out, or make the "
            f"rotation of a geometry with dim={rotary_dim}"
        )


def check_packed(cu_seqlens: Tensor, order: str, tokens: int, rows: tuple[int, int], device: torch.device) -> None:
    """Raise unless the bounds fit the packed tokens; their values are looked at on the CPU alone, without tracing."""
    if order != "thd":
        raise ValueError(f'cu_seqlens with order="{order}": belongs to packed tokens; pass order="thd"')
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens of the type {type(cu_seqlens).__name__}: must be a tensor; convert it")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens {describe(cu_seqlens)}: must be int32 or int64 [sequences + 1]; pass where each sequence "
            "starts, and where the last one ends"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens on {cu_seqlens.device}, rotation on {device}: must be on one device; move one")
    if rows[0] not in (1, len(cu_seqlens) - 1):
        raise ValueError(
            f"rotation of {rows[0]} rows for {len(cu_seqlens) - 1} sequences: must have one row, or one for each"
        )
    if device.type == "cpu" and type(cu_seqlens) is Tensor and not torch.compiler.is_compiling():
        lengths = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] > tokens or (lengths < 0).any() or lengths.max() > rows[1]:
            raise ValueError(
                f"cu_seqlens={cu_seqlens.tolist()} for {tokens} tokens and a rotation of {rows[1]} positions: must "
                "rise from 0 to at most the number of tokens, with no sequence longer than the rotation"
            )


def check_output(out_dtype: torch.dtype | None, *, inplace: bool, split: bool, dtype: torch.dtype) -> None:
    """Raise unless the result can be written as asked."""
    for name, value in (("inplace", inplace), ("split", split)):
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: must be True or False; pass one of them")
    if out_dtype is not None and out_dtype not in _DTYPES:
        names = ", ".join(str(one) for one in _DTYPES)
        raise ValueError(f"out_dtype={out_dtype!r}: must be one of {names}; leave it out for that of q")
    if inplace and (split or out_dtype not in (None, dtype)):
        raise ValueError(
            f"inplace=True with split={split}, out_dtype={out_dtype}: a result in place has the dtype of q; leave "
            "inplace out"
        )


def check_in_place(q: Tensor, k: Tensor | None) -> None:
    """Raise unless q and k may be overwritten."""
    if under_torch_func():
        raise ValueError("inplace=True under torch.func: a transform needs what it was given; leave inplace out")
    for name, x in (("q", q), ("k", k)):
        if x is None:
            continue
        if not torch.compiler.is_compiling() and _overlaps_itself(x):
            raise ValueError(
                f"inplace=True with {name} {describe(x)} of strides {list(x.stride())}: elements share memory; "
                "pass a copy, or leave inplace out"
            )
        if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
            raise ValueError(
                f"inplace=True with {name} a leaf that requires grad: autograd forbids to write it; leave inplace out, "
                "or call it under torch.no_grad()"
            )
    if k is not None and not torch.compiler.is_compiling() and _share_memory(q, k):
        raise ValueError("inplace=True with q and k of the same memory: it would turn twice; pass q alone, or copies")


def _axes(x: Tensor) -> list[tuple[int, int]]:
    """Stride and size of the axes that have more than one element, from the fastest."""
    return sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)


def _extent(axes: list[tuple[int, int]]) -> int:
    return 1 + sum(stride * (size - 1) for stride, size in axes)


def _overlaps_itself(x: Tensor) -> bool:
    axes = _axes(x)
    return any(stride < _extent(axes[:number]) for number, (stride, _) in enumerate(axes))


def _share_memory(q: Tensor, k: Tensor) -> bool:
    """Whether an element of q may be one of k: certain of all but views that no packing of q and k makes."""
    if not q.numel() or not k.numel() or q.untyped_storage()._cdata != k.untyped_storage()._cdata:
        return False
    axes, starts = (_axes(q), _axes(k)), (q.storage_offset(), k.storage_offset())
    extents = [_extent(one) for one in axes]
    if starts[0] + extents[0] <= starts[1] or starts[1] + extents[1] <= starts[0]:
        return False
    for period in {stride for stride, _ in axes[0]} & {stride for stride, _ in axes[1]}:
        # Both repeat with this period, such as a token's of packed q, k and v: they are apart if they are within it.
        if all(stride % period == 0 for one in axes for stride, _ in one if stride >= period):
            inner = [_extent([axis for axis in one if axis[0] < period]) for one in axes]
            apart = (starts[1] - starts[0]) % period
            if inner[0] <= apart and apart + inner[1] <= period:
                return False
    return True


def _broadcasts(shape: torch.Size, target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(
        have in (1, want) for have, want in zip(reversed(shape), reversed(target), strict=False)
    )
