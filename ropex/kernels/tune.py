"""Finding the fastest launch of the Triton kernel on the GPU at hand."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ropex.kernels.rotate import Layout, Order, rotate, source_of, to_heads
from ropex.rotation import Rotation

__all__ = ["tune"]


def tune(
    q: Tensor, k: Tensor | None, rotation: Rotation, *, layout: Layout = "half", order: Order = "bhsd"
) -> dict[str, int]:
    """Time the launches that could be fastest for these shapes, and use the best from here on in this process.

    The default launch needs none of this. What is found serves every rotation of the same device, dtype, heads,
    head_dim, rotary dimension and layout whose number of tokens has the same next power of two; the backward pass that
    gives the frequencies' gradient, and `norm_rotate`, keep their own launches.

    Args:
        q, k, rotation, layout, order: as in `ropex.rotate`, on a GPU.

    Returns:
        The launch: tokens per program (`block_seq`), heads per program (`heads`), and `num_warps`.

    Raises:
        ValueError: not on a GPU, or what `ropex.rotate` raises.
    """
    rotate(q, k, rotation, layout=layout, order=order, backend="triton")  # whatever is wrong is raised here
    if not q.is_cuda:
        raise ValueError(f"tune with q on {q.device}: launches are timed on a GPU; move q, k and the rotation there")
    from triton.testing import do_bench

    from ropex.kernels import triton_launch

    source, _ = source_of(rotation, "exact")
    q = to_heads(q, order).detach()
    k = to_heads(k, order).detach() if k is not None else None
    outputs = torch.empty_like(q), torch.empty_like(k) if k is not None else None
    interleaved, half = layout == "interleaved", source.second.shape[-1]

    def run(launch: triton_launch.Launch) -> None:
        triton_launch.rotate(
            q, k, *outputs, source,
            conjugate=False, interleaved=interleaved, split=False, in_place=False, launch=launch,
        )  # fmt: skip

    launches = triton_launch.candidates(triton_launch.widest_tile(half, q.shape[-1] - 2 * half))
    times = {launch: do_bench(functools.partial(run, launch)) for launch in launches}
    best = min(times, key=times.__getitem__)
    triton_launch.TUNED[triton_launch.tuning_key(q, k, half, interleaved)] = best
    return best._asdict()
