"""The Triton kernels against the reference: in Triton's interpreter, or on a GPU (`pytest -m gpu`)."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import ropex
from ropex.kernels import norm_rotate, rotate_with_table, table
from ropex.kernels.reference import Source, empty_output
from ropex.kernels.reference import rotate_one as rotate_by_reference
from tests.oracles import ROTATION_ERROR

# seq, head_dim, half, heads of q, heads of k
SHAPES = [
    (63, 64, 32, 4, 2),
    (1000, 80, 40, 3, 1),
    (63, 80, 16, 2, 2),
    (65, 96, 48, 5, 1),
    (128, 128, 64, 9, 3),
    (33, 256, 128, 2, 1),
    (1, 128, 64, 8, 2),
    (7, 4, 1, 1, 1),
]
LAYOUTS = ["half", "interleaved"]


def close(got: Tensor, want: Tensor, error: float = ROTATION_ERROR) -> bool:
    return got.shape == want.shape and got.dtype == want.dtype and bool(((got - want).abs() <= error).all())


def frequencies_close(got: Tensor | None, want: Tensor | None) -> bool:
    """Within 1e-6 of the largest reference entry."""
    assert got is not None
    assert want is not None
    return got.shape == want.shape and bool((got - want).abs().max() <= 1e-6 * want.abs().max())


def rotation_of(batch: int, seq: int, half: int, device: str, kind: str = "per_sample") -> ropex.Rotation:
    shape = {"shared": (half,), "per_sample": (batch, 1, half), "per_token": (batch, seq, half)}[kind]
    positions = torch.randint(-(10**7), 10**7, (batch, seq), device=device)
    return ropex.Rotation(positions, torch.rand(shape, dtype=torch.float64, device=device), 1.25)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("seq", "head_dim", "half", "q_heads", "k_heads"), SHAPES)
def test_forward_and_gradients(
    device: str, layout: Any, seq: int, head_dim: int, half: int, q_heads: int, k_heads: int
) -> None:
    rotation = rotation_of(2, seq, half, device)
    q = torch.randn(2, q_heads, seq, head_dim, device=device, requires_grad=True)
    k = torch.randn(2, k_heads, seq, head_dim, device=device, requires_grad=True)
    inv_freq = rotation.inv_freq.requires_grad_()
    results = {}
    for backend in ("reference", "triton"):
        outputs = ropex.rotate(q, k, rotation._replace(inv_freq=inv_freq), layout=layout, backend=backend)
        weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device) for x in outputs]
        results[backend] = (*outputs, *torch.autograd.grad(outputs, (q, k, inv_freq), weights))
    *got, got_frequency = results["triton"]
    *want, want_frequency = results["reference"]
    assert all(close(g, w) for g, w in zip(got, want, strict=True))
    assert frequencies_close(got_frequency, want_frequency)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["shared", "per_sample", "per_token"])
def test_frequencies_and_amplitudes_of_every_shape(device: str, layout: Any, kind: str) -> None:
    rotation = rotation_of(2, 63, 16, device, kind)
    q = torch.randn(2, 3, 63, 40, device=device)
    for shape in ((), (2, 1, 1), (1, 63, 1), (2, 63, 16)):
        inv_freq = rotation.inv_freq.clone().requires_grad_()
        amplitude = (1 + torch.rand(shape, device=device)).requires_grad_()
        results = {}
        for backend in ("reference", "triton"):
            turn = ropex.Rotation(rotation.positions, inv_freq, amplitude)
            out = ropex.rotate(q, rotation=turn, layout=layout, backend=backend)
            results[backend] = (out, *torch.autograd.grad(out, (inv_freq, amplitude), torch.sin(out.detach())))
        (out, *grads), (want, *wanted) = results["triton"], results["reference"]
        assert close(out, want)
        # The reference sums the amplitude's gradient in float32.
        torch.testing.assert_close(grads[1], wanted[1], rtol=1e-4, atol=1e-4)
        assert frequencies_close(grads[0], wanted[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 2])
def test_table_mode(device: str, layout: Any, rows: int) -> None:
    cos, sin = (t.requires_grad_() for t in torch.randn(2, rows, 65, 20, device=device))
    q = torch.randn(2, 5, 65, 48, device=device, requires_grad=True)
    k = torch.randn(2, 1, 65, 48, device=device, requires_grad=True)
    results = {}
    for backend in ("reference", "triton"):
        outputs = rotate_with_table(q, k, cos, sin, layout=layout, backend=backend)
        results[backend] = (*outputs, *torch.autograd.grad(outputs, (q, k, cos, sin), [o.sin() for o in outputs]))
    for got, want in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-6 * math.sqrt(want.shape[-1]))


def test_tables_of_any_dtype_and_width(device: str) -> None:
    half_tables = table(rotation_of(1, 65, 32, device))
    q = torch.randn(2, 2, 65, 64, device=device)
    for layout in LAYOUTS:
        full = [torch.cat((t, t), -1) if layout == "half" else t.repeat_interleave(2, -1) for t in half_tables]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            cos, sin = (t.to(dtype) for t in half_tables)
            options: dict[str, Any] = {"layout": layout, "rotary_dim": 64}
            got = rotate_with_table(q, None, *(t.to(dtype) for t in full), **options, backend="triton")
            assert torch.equal(got, rotate_with_table(q, None, cos, sin, **options, backend="triton"))
            assert close(got, rotate_with_table(q, None, cos.float(), sin.float(), **options, backend="reference"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_orders(device: str, layout: Any) -> None:
    rotation = rotation_of(2, 63, 20, device)
    packed = torch.randn(2, 63, 9, 48, device=device)
    q, k = packed[:, :, :6].transpose(1, 2), packed[:, :, 6:8].transpose(1, 2)
    want = [x.clone() for x in ropex.rotate(q, k, rotation, layout=layout, backend="reference")]
    got = ropex.rotate(q, k, rotation, layout=layout, backend="triton")
    assert all(close(g, w) for g, w in zip(got, want, strict=True))
    got = ropex.rotate(q.transpose(1, 2), k.transpose(1, 2), rotation, layout=layout, order="bshd", backend="triton")
    assert all(close(g.transpose(1, 2), w) for g, w in zip(got, want, strict=True))
    spread = torch.stack((q, q), -1)[..., 1]  # no stride of 1
    assert close(ropex.rotate(spread, rotation=rotation, layout=layout, backend="triton"), want[0])
    expanded = q[:, :1].expand(-1, 6, -1, -1)
    alone = ropex.rotate(q[:, :1], rotation=rotation, layout=layout, backend="triton")
    assert torch.equal(ropex.rotate(expanded, rotation=rotation, layout=layout, backend="triton")[:, 3:4], alone)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sequences", [1, 3])
def test_packed_sequences(device: str, layout: Any, backend: Any, sequences: int) -> None:
    """Packed by cu_seqlens, by positions, and each sequence alone: the same, with the same gradients."""
    bounds = torch.tensor([0, 17, 17, 63] if sequences == 3 else [0, 63], device=device, dtype=torch.int32)
    rotation = rotation_of(sequences, 63, 16, device)
    q, k = torch.randn(63, 5, 40, device=device), torch.randn(63, 1, 40, device=device)
    inv_freq = rotation.inv_freq.requires_grad_()
    rotation = rotation._replace(inv_freq=inv_freq)
    packed = ropex.rotate(q, k, rotation, layout=layout, order="thd", cu_seqlens=bounds, backend=backend)
    (grad,) = torch.autograd.grad([x.sin().sum() for x in packed], inv_freq)
    total = torch.zeros_like(grad)
    for row, (start, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        alone = ropex.Rotation(rotation.positions[row : row + 1, : end - start], inv_freq[row : row + 1], 1.25)
        outputs = ropex.rotate(q[start:end], k[start:end], alone, layout=layout, order="thd", backend="reference")
        for got, want in zip(packed, outputs, strict=True):
            assert close(got[start:end], want)
        if end > start:
            total += torch.autograd.grad([x.sin().sum() for x in outputs], inv_freq)[0]
    assert frequencies_close(grad, total)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding(device: str, layout: Any, dtype: torch.dtype) -> None:
    """16-bit results are the correctly rounded truth in 99.9 % of elements, and never farther than the next number."""
    rotation = rotation_of(1, 128, 64, device)._replace(amplitude=1.0)
    q = torch.randn(1, 4, 128, 128, device=device).to(dtype)
    got = ropex.rotate(q, rotation=rotation, layout=layout, backend="triton")
    truth = ropex.rotate(q.double(), rotation=rotation, layout=layout)
    rounded = truth.to(dtype)
    assert got.dtype == dtype
    assert (got == rounded).double().mean() >= 0.999
    pairs = q.double().unflatten(-1, (2, 64) if layout == "half" else (64, 2)).abs().sum(-2 if layout == "half" else -1)
    sums = torch.cat((pairs, pairs), -1) if layout == "half" else pairs.repeat_interleave(2, -1)
    unit = torch.finfo(dtype).eps * torch.exp2(torch.log2(truth.abs().clamp_min(torch.finfo(dtype).tiny)).floor())
    assert ((got.double() - truth).abs() <= unit + 5e-7 * sums).all()


def test_output_dtypes_and_split(device: str) -> None:
    rotation = rotation_of(1, 65, 16, device)
    q = torch.randn(1, 3, 65, 40, device=device).bfloat16()
    truth = ropex.rotate(q.float(), rotation=rotation, backend="reference")
    assert close(ropex.rotate(q, rotation=rotation, out_dtype=torch.float32, backend="triton"), truth)
    narrow = ropex.rotate(q, rotation=rotation, out_dtype=torch.float16, backend="triton")
    assert narrow.dtype == torch.float16
    assert ((narrow.float() - truth).abs() <= 2**-11 * truth.abs() + 1e-6).all()
    for backend in ("reference", "triton"):
        high, low = ropex.rotate(q, rotation=rotation, split=True, backend=backend)
        assert high.dtype == low.dtype == torch.bfloat16
        assert torch.equal(high, ropex.rotate(q, rotation=rotation, backend=backend))
        assert ((high.float() + low.float() - truth).abs() <= 2**-16 * truth.abs() + 1e-6).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradients_of_other_dtypes_and_of_the_split(device: str, backend: Any) -> None:
    """What rounding left has no slope: the gradient is that of the high part."""
    rotation = rotation_of(1, 33, 16, device)
    inv_freq = rotation.inv_freq.requires_grad_()
    x = torch.randn(1, 3, 33, 40, device=device)
    weights = torch.randn(2, 1, 3, 33, 40, device=device)
    q = x.bfloat16().requires_grad_()
    split = ropex.rotate(q, rotation=rotation, split=True, backend=backend)
    grads = torch.autograd.grad((split.float() * weights).sum(), (q, inv_freq))
    wide = ropex.rotate(q.float(), rotation=rotation, backend="reference")
    wanted = torch.autograd.grad((wide * weights[0].bfloat16()).sum(), (q, inv_freq))
    assert grads[0].dtype == torch.bfloat16
    torch.testing.assert_close(grads[0], wanted[0], rtol=2**-7, atol=1e-6)
    assert frequencies_close(grads[1], wanted[1])
    narrow = ropex.rotate(q, rotation=rotation, out_dtype=torch.float32, backend=backend)
    grads = torch.autograd.grad((narrow * weights[0]).sum(), (q,))
    torch.testing.assert_close(grads[0], torch.autograd.grad((wide_of(q, rotation) * weights[0]).sum(), (q,))[0])


def wide_of(q: Tensor, rotation: ropex.Rotation) -> Tensor:
    return ropex.rotate(q.float(), rotation=rotation, backend="reference")


def test_one_definition_of_the_angles(device: str) -> None:
    """The kernel's cos and sin are the table's bits: it turns (1, 0) onto them."""
    rotation = rotation_of(1, 500, 64, device)._replace(amplitude=1.0)
    rotation = rotation._replace(positions=torch.randint(-(2**45), 2**45, (1, 500), device=device))
    x = torch.cat((torch.ones(1, 1, 500, 64), torch.zeros(1, 1, 500, 64)), -1).to(device)
    turned = ropex.rotate(x, rotation=rotation, backend="triton")[0, 0]
    cos, sin = table(rotation)
    assert torch.equal(turned, torch.cat((cos[0], sin[0]), -1))


def test_every_element_of_the_output_is_written(device: str) -> None:
    """Into memory full of NaN, by every cut of the work."""
    from ropex.kernels import triton_launch

    rotation = rotation_of(2, 37, 12, device)
    q, k = torch.randn(2, 5, 37, 40, device=device), torch.randn(2, 3, 37, 40, device=device)
    source = Source(rotation.positions, rotation.inv_freq, scale=1.25)
    cos, sin = source.tables(torch.float32)
    for layout in (False, True):
        want = [rotate_by_reference(x, cos, sin, interleaved=layout, dtype=x.dtype) for x in (q, k)]
        for launch in ((4, 8, 1), (16, 2, 2), (64, 4, 4)):
            outputs = [empty_output(x, x.dtype).fill_(math.nan) for x in (q, k)]
            triton_launch.rotate(
                q, k, *outputs, source, conjugate=False, interleaved=layout, split=False, in_place=False,
                launch=triton_launch.Launch(*launch),
            )  # fmt: skip
            assert all(close(g, w) for g, w in zip(outputs, want, strict=True))


def test_in_place_leaves_what_does_not_turn(device: str) -> None:
    rotation = rotation_of(2, 37, 12, device)
    packed = torch.randn(2, 37, 8, 40, device=device)
    before = packed.clone()
    q, k = packed[:, :, :5], packed[:, :, 5:7]
    want = ropex.rotate(q, k, rotation, order="bshd", backend="reference")
    got = ropex.rotate(q, k, rotation, order="bshd", backend="triton", inplace=True)
    assert got[0] is q
    assert got[1] is k
    assert close(packed[:, :, :5], want[0])
    assert close(packed[:, :, 5:7], want[1])
    assert torch.equal(packed[:, :, 7], before[:, :, 7])
    assert torch.equal(packed[..., 24:], before[..., 24:])


def test_gradients_are_not_written_and_are_deterministic(device: str) -> None:
    rotation = rotation_of(2, 63, 16, device)
    inv_freq = rotation.inv_freq.requires_grad_()
    q = torch.randn(2, 3, 63, 32, device=device, requires_grad=True)
    grad = torch.randn(2, 3, 63, 32, device=device)
    before = grad.clone()
    out = ropex.rotate(q, rotation=rotation, backend="triton")
    first = torch.autograd.grad(out, (q, inv_freq), grad, retain_graph=True)
    again = torch.autograd.grad(out, (q, inv_freq), grad)
    assert torch.equal(grad, before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    out = ropex.rotate(q, rotation=rotation, backend="triton")
    expanded = torch.ones((), device=device).expand_as(out)  # as of out.sum()
    got = torch.autograd.grad(out, q, expanded)[0]
    assert close(got, torch.autograd.grad(ropex.rotate(q, rotation=rotation, backend="reference").sum(), q)[0])


@pytest.mark.parametrize("used", ["q", "k", "neither"])
def test_gradients_where_one_output_is_unused(device: str, used: str) -> None:
    rotation = rotation_of(2, 33, 16, device)
    inv_freq = rotation.inv_freq.requires_grad_()
    q = torch.randn(2, 3, 33, 32, device=device, requires_grad=True)
    k = torch.randn(2, 1, 33, 32, device=device, requires_grad=True)
    results = {}
    for backend in ("reference", "triton"):
        outputs = ropex.rotate(q, k, rotation, backend=backend)
        chosen = {"q": outputs[0], "k": outputs[1], "neither": q}[used]
        results[backend] = torch.autograd.grad(chosen.sin().sum(), (q, k, inv_freq), allow_unused=True)
    for got, want in zip(results["triton"], results["reference"], strict=True):
        assert (got is None) == (want is None)
        assert got is None or frequencies_close(got, want)


def test_a_second_derivative_of_frequencies_is_refused(device: str) -> None:
    rotation = rotation_of(1, 9, 8, device)
    inv_freq = rotation.inv_freq.requires_grad_()
    q = torch.randn(1, 2, 9, 16, device=device, requires_grad=True)
    out = ropex.rotate(q, rotation=rotation, backend="triton")
    (grad,) = torch.autograd.grad(out.sin().sum(), inv_freq, create_graph=True)
    with pytest.raises(NotImplementedError, match='pass backend="reference" to differentiate twice'):
        grad.sum().backward()


def test_second_derivative_of_q(device: str) -> None:
    rotation = rotation_of(1, 9, 8, device)
    q = torch.randn(1, 2, 9, 16, device=device, requires_grad=True)
    results = []
    for backend in ("reference", "triton"):
        out = ropex.rotate(q, rotation=rotation, backend=backend)
        (grad,) = torch.autograd.grad(out.pow(3).sum(), q, create_graph=True)
        results.append(torch.autograd.grad(grad.pow(2).sum(), q)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 2, 9, 16), (2, 0, 9, 16), (2, 2, 0, 16)])
def test_empty_tensors(device: str, shape: tuple[int, ...]) -> None:
    rotation = rotation_of(1, shape[2], 8, device, "shared")
    inv_freq = rotation.inv_freq.requires_grad_()
    q = torch.randn(shape, device=device, requires_grad=True)
    out = ropex.rotate(q, rotation=rotation, backend="triton")
    assert out.shape == q.shape
    out.sum().backward()
    assert torch.equal(inv_freq.grad, torch.zeros_like(inv_freq))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (80, 16), (96, 48)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_and_rotation(device: str, layout: Any, head_dim: int, half: int, offset: float) -> None:
    rotation = rotation_of(2, 63, half, device)
    inv_freq = rotation.inv_freq.requires_grad_()
    q = (3 * torch.randn(2, 63, 5, head_dim, device=device)).requires_grad_()
    k = torch.randn(2, 63, 2, head_dim, device=device, requires_grad=True)
    weights = [torch.rand(head_dim, device=device).requires_grad_() for _ in "qk"]
    results = {}
    for backend in ("reference", "triton"):
        outputs = norm_rotate(
            q, k, rotation, q_weight=weights[0], k_weight=weights[1], offset=offset,
            layout=layout, order="bshd", backend=backend,
        )  # fmt: skip
        inputs = (q, k, *weights, inv_freq)
        results[backend] = (*outputs, *torch.autograd.grad(outputs, inputs, [o.sin().detach() for o in outputs]))
    *got, got_frequency = results["triton"]
    *want, want_frequency = results["reference"]
    for g, w in zip(got, want, strict=True):
        assert close(g, w, error=ROTATION_ERROR * max(1.0, w.abs().max().item()))
    assert frequencies_close(got_frequency, want_frequency)


def test_norm_of_q_alone_in_bfloat16_with_learned_amplitude(device: str) -> None:
    rotation = rotation_of(2, 33, 16, device)
    amplitude = torch.tensor(1.5, device=device, requires_grad=True)
    rotation = rotation._replace(amplitude=amplitude)
    q = torch.randn(2, 3, 33, 40, device=device).bfloat16().requires_grad_()
    weight = torch.rand(40, device=device, requires_grad=True)
    results = {}
    for backend in ("reference", "triton"):
        out = norm_rotate(q, rotation=rotation, q_weight=weight, out_dtype=torch.float32, backend=backend)
        results[backend] = (out, *torch.autograd.grad(out.sin().sum(), (q, weight, amplitude)))
    for got, want in zip(results["triton"], results["reference"], strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2**-7 if got.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize(("half", "tail"), [(1, 0), (16, 112), (32, 192), (40, 0), (64, 0), (128, 0)])
@pytest.mark.parametrize("heads", [1, 9, 40])
def test_the_default_launch(lanes: int, half: int, tail: int, heads: int) -> None:
    """Long inputs: four warps with eight neighbouring pairs per thread. A decoding step: small programs, and many."""
    from ropex.kernels.triton_launch import default_launch, widest_tile

    pairs = widest_tile(half, tail)
    assert pairs >= max(half, tail / 2)
    assert pairs <= widest_tile(half, tail, whole=True) <= 4 * pairs
    long = default_launch(1, 2**24, heads, pairs, lanes=lanes)
    assert long.num_warps == 4
    assert long.block_seq * pairs == 8 * 4 * lanes
    assert long.heads == 8
    decoding = default_launch(64, 1, heads, pairs, lanes=lanes)
    assert (decoding.block_seq, decoding.heads, decoding.num_warps) == (1, 1, 1)
    for batch, seq in ((1, 1), (7, 33), (256, 1), (1, 4096)):
        launch = default_launch(batch, seq, heads, pairs, lanes=lanes)
        assert launch.num_warps in (1, 2, 4)
        assert launch.block_seq <= max(1, 2 * seq - 1)


def test_the_frequencies_gradient_of_rounded_outputs(device: str) -> None:
    """Made of the outputs as attention keeps them, it is as good as they are; of other dtypes, of the inputs."""
    rotation = rotation_of(1, 257, 16, device)
    inv_freq = rotation.inv_freq.requires_grad_()
    q = torch.randn(1, 4, 257, 32, device=device).bfloat16()
    for out_dtype, bound in ((torch.bfloat16, 1e-2), (torch.float32, 1e-6), (torch.float16, 1e-6)):
        grads = []
        for backend in ("triton", "reference"):
            out = ropex.rotate(q, rotation=rotation, out_dtype=out_dtype, backend=backend)
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, out_dtype)
            grads += torch.autograd.grad(out, inv_freq, weights)
        assert (grads[0] - grads[1]).abs().max() <= bound * grads[1].abs().max()
    with numpy.errstate(over="ignore"):  # the interpreter's
        huge = ropex.rotate(q * 1e5, rotation=rotation, out_dtype=torch.float16, backend="triton")
    assert huge.isinf().any()
    (grad,) = torch.autograd.grad(huge, inv_freq, torch.ones_like(huge))
    assert grad.isfinite().all()


@pytest.mark.parametrize("kind", ["strided", "expanded", "mixed"])
def test_norm_weights_of_any_strides_and_dtypes(device: str, kind: str) -> None:
    rotation = rotation_of(2, 9, 8, device)
    q, k = torch.randn(2, 3, 9, 20, device=device), torch.randn(2, 1, 9, 20, device=device)
    q_weight, k_weight = {
        "strided": (torch.rand(40)[::2], torch.rand(60)[::3]),
        "expanded": (torch.rand(1).expand(20), torch.rand(1).expand(20)),
        "mixed": (torch.rand(20).bfloat16(), torch.rand(20).double()),
    }[kind]
    weights = {"q_weight": q_weight.to(device).requires_grad_(), "k_weight": k_weight.to(device).requires_grad_()}
    results = []
    for backend in ("triton", "reference"):
        outputs = norm_rotate(q, k, rotation, **weights, backend=backend)
        grads = torch.autograd.grad([o.sin().sum() for o in outputs], list(weights.values()))
        results.append((*outputs, *grads))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2**-7 if got.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiles_on_a_gpu(backend: str) -> None:
    rotation = rotation_of(2, 33, 16, "cuda")

    def run(q: Tensor, k: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ropex.rotate(q * 2, k, rotation._replace(inv_freq=inv_freq))
        return ropex.rotate(q * 2, k * 2, rotation, inplace=True)

    inputs = [torch.randn(2, h, 33, 40, device="cuda", requires_grad=True) for h in (3, 1)]
    inputs.append(rotation.inv_freq.clone().requires_grad_())
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend=backend)):
        outputs = function(*inputs)
        results.append((*outputs, *torch.autograd.grad(outputs, inputs, [o.sin() for o in outputs])))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_opcheck_on_a_gpu() -> None:
    rotation = rotation_of(2, 9, 8, "cuda")
    q, k = (torch.randn(2, h, 9, 20, device="cuda", requires_grad=True) for h in (3, 1))
    source = (rotation.positions, rotation.inv_freq.requires_grad_(), None, 1.25, False)
    operator = ropex.kernels.rotate.__globals__["operators"]().rotate.default
    torch.library.opcheck(operator, (q, k, *source, False, True, torch.float32, False, "triton"))


@pytest.mark.gpu
@pytest.mark.parametrize("inplace", [False, True])
def test_a_decoding_step_in_a_cuda_graph(inplace: bool) -> None:
    """The graph reads positions and an amplitude that change in place, and waits for nothing."""
    positions = torch.zeros(4, 1, dtype=torch.int64, device="cuda")
    inv_freq = ropex.Geometry(128, 1e4, 2048).inv_freq("cuda")
    rotation = ropex.Rotation(positions, inv_freq, torch.tensor(1.5))
    q, k = (torch.randn(4, h, 1, 128, device="cuda", dtype=torch.bfloat16) for h in (32, 8))
    before = q.clone(), k.clone()
    ropex.rotate(*before, rotation, inplace=inplace)  # compiles the kernel
    before = q.clone(), k.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = ropex.rotate(q, k, rotation, inplace=inplace)
    for position in (7, 100_000):
        for x, original in zip((q, k), before, strict=True):
            x.copy_(original)
        positions.fill_(position)
        graph.replay()
        want = ropex.rotate(*before, rotation)
        assert all(torch.equal(got, expected) for got, expected in zip(outputs, want, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["shared", "per_sample", "per_token"])
@pytest.mark.parametrize("order", ["bhsd", "bshd"])
@pytest.mark.parametrize(("seq", "head_dim", "half", "q_heads", "k_heads"), [*SHAPES, (4096, 128, 64, 2, 1)])
def test_the_whole_grid(
    device: str, layout: Any, kind: str, order: Any, seq: int, head_dim: int, half: int, q_heads: int, k_heads: int
) -> None:
    rotation = rotation_of(2, seq, half, device, kind)
    inv_freq = rotation.inv_freq.requires_grad_()
    shapes = [(2, h, seq, head_dim) if order == "bhsd" else (2, seq, h, head_dim) for h in (q_heads, k_heads)]
    q, k = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    results = {}
    for backend in ("reference", "triton"):
        outputs = ropex.rotate(q, k, rotation, layout=layout, order=order, backend=backend)
        results[backend] = (*outputs, *torch.autograd.grad(outputs, (q, k, inv_freq), [o.cos() for o in outputs]))
    *got, got_frequency = results["triton"]
    *want, want_frequency = results["reference"]
    assert all(close(g, w) for g, w in zip(got, want, strict=True))
    assert frequencies_close(got_frequency, want_frequency)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """2**31 elements and more: the last token must be right."""
    seq = 2**31 // (32 * 128) + 100
    q = torch.zeros(1, seq, 32, 128, dtype=torch.bfloat16, device="cuda")
    q[:, -1] = 1
    inv_freq = ropex.Geometry(128, 1e4, 2048).inv_freq("cuda")
    rotation = ropex.Rotation(torch.arange(seq, device="cuda")[None], inv_freq)
    got = ropex.rotate(q, rotation=rotation, order="bshd", backend="triton")
    last = ropex.Rotation(rotation.positions[:, -1:], inv_freq)
    assert torch.equal(got[:, -1:], ropex.rotate(q[:, -1:], rotation=last, order="bshd", backend="reference"))


@pytest.mark.gpu
def test_tuning_changes_no_result() -> None:
    rotation = rotation_of(1, 4096, 64, "cuda")
    q, k = torch.randn(1, 32, 4096, 128, device="cuda"), torch.randn(1, 8, 4096, 128, device="cuda")
    before = ropex.rotate(q, k, rotation, backend="triton")
    launch = ropex.kernels.tune(q, k, rotation)
    assert set(launch) == {"block_seq", "heads", "num_warps"}
    assert all(torch.equal(a, b) for a, b in zip(before, ropex.rotate(q, k, rotation, backend="triton"), strict=True))
