"""The operators that PyTorch knows: `torch.ops.ropex.*`, with gradients, fake tensors and vmap.

They take q and k as [batch, heads, seq, head_dim] views with any strides, and the angles' source spelled out (see
`reference.Source`). `backend` is "triton" or "compiled", never a choice: `ropex.rotate` chooses. The reference needs no
operator, since it is PyTorch's own.

Raw library operators, because `torch.library.custom_op` takes 6 us more per call, twice a decoding step's kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ropex.kernels import compiled, reference
from ropex.kernels.reference import Source, empty_output

__all__: list[str] = []

_library = torch.library.Library("ropex", "DEF")
_SOURCE = "Tensor first, Tensor second, Tensor? amplitude, float scale, bool table"
_SCHEMAS = {
    "rotate": f"(Tensor q, Tensor? k, {_SOURCE}, bool conjugate, bool interleaved, ScalarType dtype, bool split, "
    "str backend) -> (Tensor, Tensor)",
    "rotate_": f"(Tensor(a!) q, Tensor(b!)? k, {_SOURCE}, bool conjugate, bool interleaved, str backend) -> ()",
    "rotate_backward": f"(Tensor q_grad, Tensor? k_grad, Tensor q, Tensor? k, {_SOURCE}, bool conjugate, "
    "bool interleaved, ScalarType dtype, bool need_along, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "norm_rotate": f"(Tensor q, Tensor? k, Tensor q_weight, Tensor? k_weight, {_SOURCE}, float eps, float offset, "
    "bool interleaved, ScalarType dtype) -> (Tensor, Tensor)",
    "norm_rotate_backward": "(Tensor q_grad, Tensor? k_grad, Tensor q, Tensor? k, Tensor q_weight, Tensor? k_weight, "
    f"{_SOURCE}, float eps, float offset, bool interleaved) -> (Tensor, Tensor, Tensor, Tensor)",
}


def _operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an operator whose one implementation serves CPU and CUDA (which is ROCm's key too)."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
        _library.define(name + _SCHEMAS[name], tags=tags)
        for device in ("CPU", "CUDA"):
            _library.impl(name, function, device)
        torch.library.register_fake(f"ropex::{name}", fake, lib=_library)
        return function

    return register


def _outputs(q: Tensor, k: Tensor | None, dtype: torch.dtype, split: bool = False) -> tuple[Tensor, Tensor | None]:
    return empty_output(q, dtype, split=split), empty_output(k, dtype, split=split) if k is not None else None


def _filled(q_out: Tensor, k_out: Tensor | None) -> tuple[Tensor, Tensor]:
    """An operator returns tensors: without k an empty one."""
    return q_out, k_out if k_out is not None else q_out.new_empty(0)


def _fake_rotate(q: Tensor, k: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, dtype, split, _backend = rest
    return _filled(*_outputs(q, k, dtype, split))


@_operator("rotate", _fake_rotate)
def _rotate(
    q: Tensor, k: Tensor | None, first: Tensor, second: Tensor, amplitude: Tensor | None, scale: float, table: bool,
    conjugate: bool, interleaved: bool, dtype: torch.dtype, split: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    outputs = _outputs(q, k, dtype, split)
    source = Source(first, second, amplitude, scale, table)
    options: dict[str, Any] = {"conjugate": conjugate, "interleaved": interleaved, "split": split}
    _run(q, k, *outputs, source, backend, in_place=False, **options)
    return _filled(*outputs)


@_operator("rotate_", lambda q, k, *rest: None)
def _rotate_in_place(
    q: Tensor, k: Tensor | None, first: Tensor, second: Tensor, amplitude: Tensor | None, scale: float, table: bool,
    conjugate: bool, interleaved: bool, backend: str,
) -> None:  # fmt: skip
    source = Source(first, second, amplitude, scale, table)
    _run(q, k, q, k, source, backend, in_place=True, conjugate=conjugate, interleaved=interleaved, split=False)


def _run(
    q: Tensor,
    k: Tensor | None,
    q_out: Tensor,
    k_out: Tensor | None,
    source: Source,
    backend: str,
    *,
    in_place: bool,
    **options: Any,
) -> None:
    if backend == "triton":
        from ropex.kernels import triton_launch

        triton_launch.rotate(q, k, q_out, k_out, source, in_place=in_place, **options)
    else:
        compiled.rotate([(q, q_out)] + ([(k, k_out)] if k is not None and k_out is not None else []), source, **options)


def _fake_rotate_backward(
    q_grad: Tensor, k_grad: Tensor | None, q: Tensor, k: Tensor | None, first: Tensor, second: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, dtype, need_along, _backend = rest
    shape = (q.shape[0], q.shape[2], second.shape[-1])
    across = q.new_empty(shape, dtype=torch.float64)
    along = torch.empty_like(across) if need_along else across.new_empty(0)
    return *_filled(*_outputs(q_grad, k_grad, dtype)), along, across


@_operator("rotate_backward", _fake_rotate_backward)
def _rotate_backward(
    q_grad: Tensor, k_grad: Tensor | None, q: Tensor, k: Tensor | None,
    first: Tensor, second: Tensor, amplitude: Tensor | None, scale: float, table: bool,
    conjugate: bool, interleaved: bool, dtype: torch.dtype, need_along: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    source = Source(first, second, amplitude, scale, table)
    outputs = _outputs(q_grad, k_grad, dtype)
    if backend == "triton":
        from ropex.kernels import triton_launch

        along, across = triton_launch.rotate_backward(
            q_grad, k_grad, q, k, *outputs, source,
            conjugate=not conjugate, interleaved=interleaved, need_along=need_along,
        )  # fmt: skip
    else:
        options: dict[str, Any] = {"conjugate": not conjugate, "interleaved": interleaved, "split": False}
        _run(q_grad, k_grad, *outputs, source, backend, in_place=False, **options)
        along, across = _sums(compiled.angle_gradients, [(q, q_grad), (k, k_grad)], second.shape[-1], interleaved)
        along = along if need_along else across.new_empty(0)
    return *_filled(*outputs), along, across


def _sums(
    angle_gradients: Callable[..., tuple[Tensor, Tensor]],
    pairs: list[tuple[Tensor | None, Tensor | None]],
    half: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.angle_gradients` over q and k, in float64."""
    sums = [
        angle_gradients(x, grad, half, interleaved=interleaved)
        for x, grad in pairs
        if x is not None and grad is not None
    ]
    along, across = (torch.stack(parts).sum(0, dtype=torch.float64) for parts in zip(*sums, strict=True))
    return along, across


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save positions and frequencies alone; what the angles' gradients are made of, where they are asked for.

    That is the outputs, which attention keeps anyway, except where they do not determine the inputs.
    """
    q, k, first, second, amplitude, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.options, ctx.dtype, ctx.number = options, q.dtype, 1 if k is None else 2
    _, table, _, _, dtype, split, _ = options
    ctx.angles = any(ctx.needs_input_grad[2:5])
    ctx.of_outputs = dtype == q.dtype and not (table or split or ctx.needs_input_grad[4])
    saved = ((output[0], output[1] if k is not None else None) if ctx.of_outputs else (q, k)) if ctx.angles else ()
    ctx.save_for_backward(first, second, amplitude, *saved)


def _turn_back(ctx: Any, *output_grads: Tensor | None) -> tuple[Any, ...]:
    scale, table, conjugate, interleaved, _, split, backend = ctx.options
    first, second, amplitude, *saved = ctx.saved_tensors
    grads: list[Any] = [None] * 12
    present = [index for index, grad in enumerate(output_grads[: ctx.number]) if grad is not None]
    if not present:
        return tuple(grads)
    given: list[Any] = [output_grads[index] for index in present]
    given = [grad[0] if split else grad for grad in given]  # the low part is what rounding left: it has no slope
    given += [None] * (2 - len(given))
    source = (first, second, amplitude, scale, table)
    if not ctx.angles:
        turned = torch.ops.ropex.rotate(*given, *source, not conjugate, interleaved, ctx.dtype, False, backend)
    else:
        kept: list[Any] = [saved[index] for index in present]
        kept += [None] * (2 - len(kept))
        *turned, along, across = torch.ops.ropex.rotate_backward(
            *given, *kept, *source, conjugate, interleaved, ctx.dtype, not ctx.of_outputs, backend
        )
        grads[2:5] = reference.source_gradients(
            Source(*source), along, across, of_outputs=ctx.of_outputs, conjugate=conjugate
        )
    for index, grad in zip(present, turned, strict=False):
        grads[index] = grad
    return tuple(grads)


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f'second derivative of {name}: the fused backward has none; pass backend="reference" to differentiate twice'
        )

    return refuse


torch.library.register_autograd("ropex::rotate", _turn_back, setup_context=_remember, lib=_library)
torch.library.register_autograd("ropex::rotate_backward", _no_second_derivative("frequencies"), lib=_library)


def _vmap_rotate(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, tuple[int, int | None]]:
    """The mapped axis joins the batch."""
    size, (*tensors, scale, table, conjugate, interleaved, dtype, split, backend) = info.batch_size, inputs
    leading = [
        x if x is None else x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
        for x, dim in zip(tensors, in_dims[:5], strict=True)
    ]
    batch = leading[0].shape[1]  # type: ignore[union-attr]
    q, k, *source = [
        x if x is None else x.flatten(0, 1) if x.dim() == 5 else x.expand(size, batch, *x.shape[2:]).flatten(0, 1)
        for x in leading
    ]
    options = (scale, table, conjugate, interleaved, dtype, split, backend)
    q_out, k_out = torch.ops.ropex.rotate(q, k, *source, *options)
    axis = 1 if split else 0  # behind that of the two parts
    q_out = q_out.unflatten(axis, (size, batch))
    if k is None:
        return (q_out, k_out), (axis, None)
    return (q_out, k_out.unflatten(axis, (size, batch))), (axis, axis)


torch.library.register_vmap("ropex::rotate", _vmap_rotate, lib=_library)


@_operator("norm_rotate", lambda q, k, *rest: _filled(*_outputs(q, k, rest[-1])))
def _norm_rotate(
    q: Tensor, k: Tensor | None, q_weight: Tensor, k_weight: Tensor | None,
    first: Tensor, second: Tensor, amplitude: Tensor | None, scale: float, table: bool,
    eps: float, offset: float, interleaved: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from ropex.kernels import triton_launch

    outputs = _outputs(q, k, dtype)
    source = Source(first, second, amplitude, scale, table)
    weights = _as_read(q_weight), _as_read(k_weight)
    triton_launch.norm_rotate(q, k, *weights, *outputs, source, eps=eps, offset=offset, interleaved=interleaved)
    return _filled(*outputs)


def _fake_norm_backward(
    q_grad: Tensor, k_grad: Tensor | None, q: Tensor, k: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = q.new_empty(q.shape[-1], dtype=torch.float64)
    return *_filled(*_outputs(q_grad, k_grad, q.dtype)), weight, torch.empty_like(weight)


@_operator("norm_rotate_backward", _fake_norm_backward)
def _norm_rotate_backward(
    q_grad: Tensor, k_grad: Tensor | None, q: Tensor, k: Tensor | None, q_weight: Tensor, k_weight: Tensor | None,
    first: Tensor, second: Tensor, amplitude: Tensor | None, scale: float, table: bool,
    eps: float, offset: float, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from ropex.kernels import triton_launch

    outputs = _outputs(q_grad, k_grad, q.dtype)
    source = Source(first, second, amplitude, scale, table)
    weights = _as_read(q_weight), _as_read(k_weight)
    weight_grads = triton_launch.norm_rotate_backward(
        q_grad, k_grad, q, k, *weights, *outputs, source, eps=eps, offset=offset, interleaved=interleaved
    )
    return *_filled(*outputs), *weight_grads


def _as_read(weight: Any) -> Any:
    """A weight as the kernel reads it: both of one dtype, without strides."""
    return weight.to(torch.float32).contiguous() if weight is not None else None


def _remember_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, q_weight, k_weight, first, second, amplitude, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.angles = any(ctx.needs_input_grad[4:7])
    ctx.of_outputs = ctx.angles and options[-1] == q.dtype and not (options[1] or ctx.needs_input_grad[6])
    outputs = (output[0], output[1] if k is not None else None) if ctx.of_outputs else (None, None)
    ctx.save_for_backward(q, k, q_weight, k_weight, first, second, amplitude, *outputs)


def _turn_norm_back(ctx: Any, q_grad: Tensor | None, k_grad: Tensor | None) -> tuple[Any, ...]:
    scale, table, eps, offset, interleaved, _ = ctx.options
    q, k, q_weight, k_weight, first, second, amplitude, q_out, k_out = ctx.saved_tensors
    grads: list[Any] = [None] * 13
    if q_grad is None and (k is None or k_grad is None):
        return tuple(grads)
    q_grad = q_grad if q_grad is not None else torch.zeros_like(q)
    k_grad = None if k is None else k_grad if k_grad is not None else torch.zeros_like(k)
    source = Source(first, second, amplitude, scale, table)
    of_q, of_k, of_q_weight, of_k_weight = torch.ops.ropex.norm_rotate_backward(
        q_grad, k_grad, q, k, q_weight, k_weight, *source, eps, offset, interleaved
    )
    grads[0], grads[2] = of_q, of_q_weight.to(q_weight.dtype)
    if k is not None:
        grads[1], grads[3] = of_k, of_k_weight.to(k_weight.dtype)
    if ctx.angles:
        if not ctx.of_outputs:
            q_out = reference.norm_one(q, q_weight, eps=eps, offset=offset)
            k_out = reference.norm_one(k, k_weight, eps=eps, offset=offset) if k is not None else None
        along, across = _sums(
            reference.angle_gradients, [(q_out, q_grad), (k_out, k_grad)], second.shape[-1], interleaved
        )
        grads[4:7] = reference.source_gradients(source, along, across, of_outputs=ctx.of_outputs, conjugate=False)
    return tuple(grads)


torch.library.register_autograd("ropex::norm_rotate", _turn_norm_back, setup_context=_remember_norm, lib=_library)
torch.library.register_autograd("ropex::norm_rotate_backward", _no_second_derivative("norm_rotate"), lib=_library)
