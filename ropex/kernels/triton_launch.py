"""The rotation in Triton: how it is launched."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ropex.kernels import triton_kernels as kernels
from ropex.kernels.reference import Source

__all__ = [
    "TUNED",
    "Launch",
    "candidates",
    "default_launch",
    "norm_rotate",
    "norm_rotate_backward",
    "rotate",
    "rotate_backward",
]


class Launch(NamedTuple):
    """How the work is cut: tokens and heads of one program, and its warps."""

    block_seq: int
    heads: int
    num_warps: int


def default_launch(batch: int, seq: int, heads: int, pairs: int, *, lanes: int = 32) -> Launch:
    """The launch for `heads` heads of q and k together, on a device whose warps have this many lanes.

    `pairs` is a power of two, half the channels of the widest tile of a token that a program holds. 8 pairs per thread
    of 4 warps are 8 neighbouring channels, one 128-bit access in 16-bit types.
    Heads share a program's angles, and are spread over more programs where there are few tokens: a decoding step has
    one per sample, and waits for memory rather than for arithmetic.
    """
    block_seq = min(max(1, 8 * 4 * lanes // pairs), triton.next_power_of_2(seq))
    per_program = 8
    while per_program > 1 and batch * triton.cdiv(seq, block_seq) * triton.cdiv(heads, per_program) < 2048:
        per_program //= 2
    return Launch(block_seq, per_program, max(1, min(4, block_seq * pairs // (8 * lanes))))


def widest_tile(half: int, tail: int, *, whole: bool = False) -> int:
    """`default_launch`'s pairs: of what turns or of the rest, or, where a kernel holds a head as a whole, of both."""
    turning, rest = triton.next_power_of_2(half), triton.next_power_of_2(tail) // 2
    pairs: int = triton.next_power_of_2(turning + rest) if whole else max(turning, rest)
    return pairs


def candidates(pairs: int) -> list[Launch]:
    """The launches that may be fastest on some GPU: at least four pairs per thread, at most 32."""
    return [
        Launch(block_seq, heads, num_warps)
        for block_seq in (1, 2, 4, 8, 16, 32, 64)
        for heads in (1, 2, 4, 8, 16)
        for num_warps in (1, 2, 4, 8)
        if 4 <= block_seq * pairs / (32 * num_warps) <= 32
    ]


# What `ropex.kernels.tune` found, by `tuning_key`.
TUNED: dict[tuple[Any, ...], Launch] = {}


def tuning_key(q: Tensor, k: Tensor | None, half: int, interleaved: bool) -> tuple[Any, ...]:
    """What the launch of `rotate` depends on; tokens by their power of two."""
    heads = (q.shape[1], k.shape[1] if k is not None else 0)
    tokens = triton.next_power_of_2(q.shape[0] * q.shape[2])
    return (q.device, q.dtype, *heads, q.shape[-1], half, interleaved, tokens)


def rotate(
    q: Tensor,
    k: Tensor | None,
    q_out: Tensor,
    k_out: Tensor | None,
    source: Source,
    *,
    conjugate: bool,
    interleaved: bool,
    split: bool,
    in_place: bool,
    launch: Launch | None = None,
) -> None:
    """Write the rotated q and k, [batch, heads, seq, head_dim], into the outputs, which may be q and k themselves."""
    if launch is None and TUNED:
        launch = TUNED.get(tuning_key(q, k, source.second.shape[-1], interleaved))
    plan = _Plan(q, k, source, interleaved, launch)
    low = [out.stride(0) if split and out is not None else 0 for out in (q_out, k_out)]
    if split:
        q_out, k_out = q_out[0], k_out[0] if k_out is not None else None
    if in_place:
        plan.tail = 0
    plan.run(kernels.rotate_kernel, [(q, k), (q_out, k_out)], low, CONJUGATE=conjugate, SPLIT=split)


def rotate_backward(
    q_grad: Tensor,
    k_grad: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_out: Tensor,
    k_out: Tensor | None,
    source: Source,
    *,
    conjugate: bool,
    interleaved: bool,
    need_along: bool,
) -> tuple[Tensor, Tensor]:
    """Write the gradients turned back into the outputs.

    Returns:
        The sums of `reference.angle_gradients` over q and k, each float64 [batch, seq, half]; the first is empty unless
        needed.
    """
    plan = _Plan(q_grad, k_grad, source, interleaved)
    batch, _, seq, _ = q_grad.shape
    shape = (plan.groups, batch, seq, source.second.shape[-1])
    across = (q.new_zeros if plan.empty else q.new_empty)(shape, dtype=torch.float32)
    along = torch.empty_like(across) if need_along and not plan.empty else across
    plan.run(
        kernels.rotate_backward_kernel,
        [(q_grad, k_grad), (q, k), (q_out, k_out)],
        [along, across, batch],
        CONJUGATE=conjugate,
        ALONG=need_along,
    )
    total = across.sum(0, dtype=torch.float64)
    return along.sum(0, dtype=torch.float64) if need_along else total.new_empty(0), total


def norm_rotate(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    q_out: Tensor,
    k_out: Tensor | None,
    source: Source,
    *,
    eps: float,
    offset: float,
    interleaved: bool,
) -> None:
    """Write the normalised and rotated q and k into the outputs."""
    plan = _Plan(q, k, source, interleaved, whole=True)
    extra = [*_both(q_weight, k_weight), eps, offset]
    plan.run(kernels.norm_rotate_kernel, [(q, k), (q_out, k_out)], extra)


def norm_rotate_backward(
    q_grad: Tensor,
    k_grad: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    q_out: Tensor,
    k_out: Tensor | None,
    source: Source,
    *,
    eps: float,
    offset: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Write the gradients of q and k into the outputs; return those of the two weights, float64 [head_dim]."""
    plan = _Plan(q_grad, k_grad, source, interleaved, whole=True)
    shape = (plan.grid[0], plan.groups, q.shape[-1])
    weight_grad = (q.new_zeros if plan.empty else q.new_empty)(shape, dtype=torch.float32)
    extra = [weight_grad, *_both(q_weight, k_weight), eps, offset]
    plan.run(kernels.norm_rotate_backward_kernel, [(q_grad, k_grad), (q, k), (q_out, k_out)], extra)
    of_q, of_k = weight_grad.tensor_split([plan.q_groups], dim=1)
    return of_q.sum((0, 1), dtype=torch.float64), of_k.sum((0, 1), dtype=torch.float64)


class _Plan:
    """What all launches for q and k of these shapes have in common."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor | None,
        source: Source,
        interleaved: bool,
        launch: Launch | None = None,
        *,
        whole: bool = False,
    ) -> None:
        batch, q_heads, seq, head_dim = q.shape
        k_heads = k.shape[1] if k is not None else 0
        half = source.second.shape[-1]
        self.tail = head_dim - 2 * half
        if launch is None and kernels.INTERPRETED:
            launch = Launch(min(256, triton.next_power_of_2(max(seq, 1))), 8, 4)  # its time goes by programs
        if launch is None:
            pairs = widest_tile(half, self.tail, whole=whole)
            lanes = 64 if torch.version.hip else 32
            launch = default_launch(batch, max(seq, 1), q_heads + k_heads, pairs, lanes=lanes)
        blocks = triton.cdiv(seq, launch.block_seq)
        self.q_groups = triton.cdiv(q_heads, launch.heads)
        self.groups = self.q_groups + triton.cdiv(k_heads, launch.heads)
        self.grid = (batch * blocks, self.groups)
        self.empty = 0 in (*self.grid, head_dim)
        self.sizes = [seq, blocks, q_heads, k_heads, self.q_groups]
        amplitude = source.amplitude if source.amplitude is not None else source.second
        self.source = [source.first, source.second, amplitude, float(source.scale)]
        first = source.first if source.table else source.first[..., None]
        self.strides = [stride for x in (first, source.second, amplitude) for stride in _broadcast_strides(x)]
        self.device = q.device
        self.constants = {
            "HALF": half,
            "HALF_BLOCK": triton.next_power_of_2(half),
            "BLOCK_SEQ": launch.block_seq,
            "HEADS": launch.heads,
            "TABLE": source.table,
            "PER_TOKEN": source.second.shape[1] != 1,
            "AMPLITUDE": source.amplitude is not None,
            "INTERLEAVED": interleaved,
            "num_warps": launch.num_warps,
            "enable_fp_fusion": False,
        }

    def run(self, kernel: Any, pairs: list[tuple[Tensor, Tensor | None]], extra: list[Any], **constants: Any) -> None:
        """Launch a kernel on pairs of q and k and what else it takes, in the order that all kernels share."""
        if self.empty:
            return
        tensors = [x for q, k in pairs for x in _both(q, k)]
        strides = [stride for x in tensors for stride in x.stride()]
        constants |= {"TAIL": self.tail, "TAIL_BLOCK": triton.next_power_of_2(max(self.tail, 1))}
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            kernel[self.grid](
                *tensors, *extra, *self.source, *self.sizes, *strides, *self.strides, **self.constants, **constants
            )


def _both(q: Any, k: Any) -> tuple[Any, Any]:
    """A kernel without k has no program for it, but takes a pointer."""
    return (q, k) if k is not None else (q, q)


def _broadcast_strides(x: Tensor) -> list[int]:
    return [stride if size != 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True)]
