"""Finding the fastest launch of the Triton kernel on the GPU at hand."""

from __future__ import annotations

from torch import Tensor

from ropex.kernels.rotate import Layout, Order, rotate, source_of, to_heads
from ropex.rotation import Rotation

__all__ = ["tune"]


def tune(
    q: Tensor, k: Tensor | None, rotation: Rotation, *, layout: Layout = "half", order: Order = "bhsd"
) -> dict[str, int]:
    """Time the launches that could be fastest for these shapes, and use the best from here on in this process.

    The default launch needs none of this. What is found serves every rotation of the same device, dtype, heads,
    head_dim and rotary dimension whose number of tokens has the same next power of two. Takes about a second.

    Args:
        q, k, rotation, layout, order: as in `ropex.rotate`, on a GPU.

    Returns:
        The launch: tokens per program (`block_seq`), heads per program (`heads`), and `num_warps`.

    Raises:
        ValueError: not on a GPU, or what `ropex.rotate` raises.
    """
    rotate(q, k, rotation, layout=layout, order=order, backend="triton")  # whatever is wrong is raised here
    from ropex.kernels import triton_launch

    if not q.is_cuda:
        raise ValueError(f"tune with q on {q.device}: launches are timed on a GPU; move q, k and the rotation there")
    from triton.testing import do_bench

    source, _ = source_of(rotation, "exact")
    key = triton_launch.tuning_key(
        to_heads(q, order), to_heads(k, order) if k is not None else None, source.second.shape[-1]
    )
    times = {}
    for launch in triton_launch.candidates(q.shape[-1]):
        triton_launch.TUNED[key] = launch
        times[launch] = do_bench(lambda: rotate(q, k, rotation, layout=layout, order=order, backend="triton"))
    best = min(times, key=times.__getitem__)
    triton_launch.TUNED[key] = best
    return best._asdict()
