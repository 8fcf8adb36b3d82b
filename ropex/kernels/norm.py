"""`norm_rotate`: RMS normalisation of each head and the rotation after it, in one pass."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ropex._checks import describe, require_choice, require_number
from ropex.kernels import checks, reference
from ropex.kernels.backend import resolve_backend, under_torch_func
from ropex.kernels.rotate import LAYOUTS, ORDERS, Angles, Layout, Order, from_heads, operators, source_of, to_heads
from ropex.rotation import Rotation

__all__ = ["norm_rotate"]

NormBackend = Literal["auto", "reference", "triton"]


class _Options(TypedDict, total=False):
    q_weight: Tensor
    k_weight: Tensor | None
    eps: float
    offset: float
    layout: Layout
    order: Order
    out_dtype: torch.dtype | None
    angles: Angles
    backend: NormBackend


@overload
def norm_rotate(q: Tensor, k: None = None, rotation: Rotation | None = None, **options: Unpack[_Options]) -> Tensor: ...


@overload
def norm_rotate(
    q: Tensor, k: Tensor, rotation: Rotation | None = None, **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...


def norm_rotate(
    q: Tensor,
    k: Tensor | None = None,
    rotation: Rotation | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    layout: Layout = "half",
    order: Order = "bhsd",
    out_dtype: torch.dtype | None = None,
    angles: Angles = "exact",
    backend: NormBackend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise each head of q and k by its root mean square, and rotate them: `R(x / rms(x) * (offset + weight))`.

    What Qwen3, Gemma 3 and others do to q and k before attention, without writing and reading them in between. (OLMo 2
    normalises over all heads together, which this does not do.) The arithmetic is float32 with one rounding at the end;
    transformers rounds after the normalisation too. Gradients reach q, k, the weights, `inv_freq` and `amplitude`.

    Args:
        q, k, rotation, layout, order, out_dtype, angles: as in `ropex.rotate`.
        q_weight, k_weight: [head_dim], the weights of the norms of q and of k.
        eps: added to the mean square.
        offset: 1.0 for norms whose weight is kept as its difference from one (Gemma), 0.0 for the others.
        backend: `triton`, `reference` or `auto`; the reference is what torch.compile fuses on a CPU.

    Raises:
        ValueError: as `ropex.rotate`, and for weights that do not fit.

    Example:
        >>> import torch, ropex
        >>> rotation = ropex.schedule("none").at(ropex.Geometry(64, 10_000.0, 2048), length=16)
        >>> q, k, weight = torch.randn(1, 8, 16, 64), torch.randn(1, 2, 16, 64), torch.ones(64)
        >>> q, k = ropex.kernels.norm_rotate(q, k, rotation, q_weight=weight, k_weight=weight)

    Reference: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, eq. 4.
    """
    require_choice("layout", layout, LAYOUTS)
    require_choice("order", order, ORDERS)
    require_choice("backend", backend, ("auto", "reference", "triton"))
    source, rows = source_of(rotation, angles)
    half, device = source.second.shape[-1], source.first.device
    checks.check_heads(q, k, order, rows, half, device, False)
    checks.check_output(out_dtype, inplace=False, split=False, dtype=q.dtype)
    require_number("eps", eps, minimum=0, remedy="pass the norm's epsilon, such as 1e-6")
    require_number("offset", offset, minimum=0, remedy="pass 1.0 where the norm multiplies by 1 + weight, else 0.0")
    for name, x, weight in (("q_weight", q, q_weight), ("k_weight", k, k_weight)):
        if (x is None) != (weight is None):
            raise ValueError(f"{name}={'given' if x is None else None}: a weight goes with each of q and k; pass both")
        if x is not None and weight is not None:
            _check_weight(name, x, weight)
    dtype = q.dtype if out_dtype is None else out_dtype
    interleaved = layout == "interleaved"
    pairs = [(to_heads(x, order), w) for x, w in ((q, q_weight), (k, k_weight)) if x is not None and w is not None]
    chosen = resolve_backend(backend, [x for x, _ in pairs])
    if chosen == "triton" and under_torch_func():
        raise ValueError('backend="triton" under torch.func: has no rule for its transforms; pass backend="reference"')
    if chosen == "triton":
        (q, q_weight), (k, k_weight) = pairs[0], pairs[1] if len(pairs) == 2 else (None, None)
        outputs = operators().norm_rotate(q, k, q_weight, k_weight, *source, eps, offset, interleaved, dtype)
    else:
        cos, sin = source.tables(torch.promote_types(q.dtype, torch.float32))
        outputs = [
            reference.rotate_one(
                reference.norm_one(x, w, eps=eps, offset=offset), cos, sin, interleaved=interleaved, dtype=dtype
            )
            for x, w in pairs
        ]
    outputs = [from_heads(x, order) for x in outputs[: len(pairs)]]
    return outputs[0] if len(pairs) == 1 else (outputs[0], outputs[1])


def _check_weight(name: str, x: Tensor, weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise ValueError(f"{name} of the type {type(weight).__name__}: must be a tensor [head_dim]; convert it")
    if weight.shape != x.shape[-1:] or not weight.is_floating_point():
        raise ValueError(
            f"{name} {describe(weight)}: must be a floating-point [{x.shape[-1]}], one weight per channel of a head; "
            "a norm over all heads together is another one"
        )
    if weight.device != x.device:
        raise ValueError(f"{name} on {weight.device}, q on {x.device}: must be on one device; move one of them")
