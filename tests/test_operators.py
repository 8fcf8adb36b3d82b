"""The operators as PyTorch sees them: opcheck, compile, export, vmap, in place, autocast, checkpointing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ropex
from ropex.kernels import choose_backend, norm_rotate, rotate_with_table, table
from ropex.kernels.backend import LARGE
from ropex.kernels.rotate import operators
from tests.oracles import ROTATION_ERROR

OPERATORS = operators()
# Each variant of the compiled form takes seconds to compile.
BACKENDS = ["triton", pytest.param("compiled", marks=pytest.mark.slow)]


def rotation_of(seq: int = 9, half: int = 8, batch: int = 2) -> ropex.Rotation:
    return ropex.Rotation(torch.randint(-100, 100, (batch, seq)), torch.rand(batch, 1, half, dtype=torch.float64))


def q_and_k(seq: int = 9, head_dim: int = 20) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, seq, head_dim), torch.randn(2, 1, seq, head_dim)


def arguments(*, table_mode: bool, gradients: bool) -> tuple[Any, ...]:
    q, k = q_and_k()
    rotation = rotation_of()
    amplitude = torch.rand(2, 1, 1)
    source = [*table(rotation), None] if table_mode else [rotation.positions, rotation.inv_freq, amplitude]
    if gradients:
        for x in (q, k, *source):
            if x is not None and x.is_floating_point():
                x.requires_grad_()
    return (q, k, *source, 1.0, table_mode)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("table_mode", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_opcheck_of_rotate(backend: str, table_mode: bool, split: bool) -> None:
    q, k, *source = arguments(table_mode=table_mode, gradients=True)
    torch.library.opcheck(OPERATORS.rotate.default, (q, k, *source, False, True, torch.float32, split, backend))
    if not split:
        q = q.detach().transpose(1, 2)[:, :, ::2].transpose(1, 2)  # neither contiguous nor dense
        torch.library.opcheck(OPERATORS.rotate.default, (q, None, *source, True, False, torch.bfloat16, split, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_others(backend: str) -> None:
    q, k, *source = arguments(table_mode=False, gradients=False)
    torch.library.opcheck(OPERATORS.rotate_.default, (q, k, *source, False, False, backend))
    backward = (q, k, q.clone(), k.clone(), *source, False, False, torch.float32, True, backend)
    torch.library.opcheck(OPERATORS.rotate_backward.default, backward)
    if backend == "triton":
        weights = torch.rand(20, requires_grad=True), torch.rand(20, requires_grad=True)
        q, k, *source = arguments(table_mode=False, gradients=True)
        norm = (q, k, *weights, *source, 1e-6, 1.0, False, torch.float32)
        torch.library.opcheck(OPERATORS.norm_rotate.default, norm)
        q, k, *source = arguments(table_mode=False, gradients=False)
        weights = torch.rand(20), torch.rand(20)
        backward = (q, k, q.clone(), k.clone(), *weights, *source, 1e-6, 1.0, False)
        torch.library.opcheck(OPERATORS.norm_rotate_backward.default, backward)


@pytest.mark.parametrize(
    ("backend", "compiler"),
    [
        ("triton", "aot_eager"),
        ("reference", "aot_eager"),
        ("triton", "inductor"),
        pytest.param("compiled", "inductor", marks=pytest.mark.slow),
        pytest.param("reference", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiles_whole_with_gradients(backend: Any, compiler: str) -> None:
    rotation = rotation_of(33)
    weight = torch.rand(20).requires_grad_()

    def run(q: Tensor, k: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        turn = rotation._replace(inv_freq=inv_freq)
        if backend == "triton":
            q, k = norm_rotate(q * 2, k, turn, q_weight=weight, k_weight=weight, backend=backend)
        q, k = ropex.rotate(q, k, turn, backend=backend)
        return ropex.rotate(q * 2, k * 2, turn, backend=backend, inplace=True)

    inputs = [x.requires_grad_() for x in (*q_and_k(33), rotation.inv_freq.clone())]
    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    results = []
    for function in (run, compiled):
        outputs = function(*inputs)
        results.append((*outputs, *torch.autograd.grad(outputs, inputs, [o.sin() for o in outputs])))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for got, want in zip(compiled(*inputs), run(*inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference", *BACKENDS])
def test_exports(backend: Any) -> None:
    class Turn(nn.Module):
        def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            rotation = ropex.Rotation(positions, ropex.Geometry(16, 1e4, 2048).inv_freq())
            return ropex.rotate(q, k, rotation, backend=backend)

    q, k = q_and_k()
    positions = torch.arange(9)[None]
    seq = torch.export.Dim("seq", min=2, max=64)
    program = torch.export.export(
        Turn(), (q, k, positions), dynamic_shapes={"q": {2: seq}, "k": {2: seq}, "positions": {1: seq}}
    )
    longer = (*q_and_k(31), torch.arange(31)[None])
    for got, want in zip(program.module()(*longer), Turn()(*longer), strict=True):
        assert (got - want).abs().max() <= ROTATION_ERROR
    named = any("ropex" in str(node.target) for node in program.graph.nodes)
    assert named == (backend in ("triton", "compiled"))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("mapped", ["q", "rotation", "both"])
def test_vmap_over_a_batch(backend: Any, mapped: str) -> None:
    qs = torch.randn(4, 2, 3, 9, 20) if mapped != "rotation" else torch.randn(2, 3, 9, 20)
    positions = torch.randint(-100, 100, (4, 1, 9) if mapped != "q" else (1, 9))
    inv_freq = torch.rand(4, 8) if mapped == "both" else torch.rand(8)

    def run(q: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
        rotation = ropex.Rotation(positions, inv_freq)
        with_k = ropex.rotate(q, q[:, :1], rotation, backend=backend)
        return ropex.rotate(q, rotation=rotation, split=True, backend=backend).sum(0) + with_k[0] + with_k[1]

    dims = (0 if mapped != "rotation" else None, 0 if mapped != "q" else None, 0 if mapped == "both" else None)
    together = torch.vmap(run, in_dims=dims)(qs, positions, inv_freq)
    for row in range(4):
        inputs = [x[row] if dim == 0 else x for x, dim in zip((qs, positions, inv_freq), dims, strict=True)]
        assert (together[row] - run(*inputs)).abs().max() <= 3 * ROTATION_ERROR


def test_per_sample_gradients() -> None:
    """torch.func's gradients go through the reference; the other backends refuse."""
    q = torch.randn(3, 1, 2, 9, 16, requires_grad=True)
    rotation = rotation_of(batch=1)

    def loss(q: Tensor, backend: Any) -> Tensor:
        return ropex.rotate(q, rotation=rotation, backend=backend).sin().sum()

    (want,) = torch.autograd.grad(sum(loss(row, "triton") for row in q), q)
    got = torch.vmap(torch.func.grad(lambda x: loss(x, "auto")))(q.detach())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: loss(x, "triton"))(q[0].detach())


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_in_place(backend: Any, layout: Any) -> None:
    rotation = rotation_of()
    q, k = q_and_k()
    want = ropex.rotate(q, k, rotation, layout=layout, backend="reference")
    got = ropex.rotate(q, k, rotation, layout=layout, backend=backend, inplace=True)
    assert got[0] is q
    assert got[1] is k
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() <= ROTATION_ERROR
    assert ropex.rotate(q, rotation=rotation, layout=layout, backend=backend, inplace=True) is q


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_in_place_where_autograd_records(backend: Any) -> None:
    """Through views, and autograd notices what it saved being overwritten."""
    rotation = rotation_of()
    leaf = torch.randn(2, 9, 4, 20, requires_grad=True)

    def run(inplace: bool) -> tuple[Tensor, Tensor]:
        packed = leaf * 2
        q, k = packed[:, :, :3], packed[:, :, 3:]
        return ropex.rotate(q, k, rotation, order="bshd", backend=backend, inplace=inplace)

    results = [torch.autograd.grad([o.sin().sum() for o in run(inplace)], leaf)[0] for inplace in (False, True)]
    torch.testing.assert_close(results[1], results[0])
    x = leaf * 2
    squared = x.square()  # saves x
    ropex.rotate(x, rotation=rotation, order="bshd", backend=backend, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_checkpointing_and_autocast(backend: Any, reentrant: bool) -> None:
    rotation = rotation_of()
    linear = nn.Linear(16, 16)
    x = torch.randn(2, 9, 2, 16, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return ropex.rotate(linear(x), rotation=rotation, order="bshd", backend=backend)

    grads = []
    for kept in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x) if kept else checkpoint(layer, x, use_reentrant=reentrant)
        assert out.dtype == torch.bfloat16
        linear.zero_grad()
        out.float().square().sum().backward()
        grads.append(linear.weight.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_without_gradients(backend: Any) -> None:
    rotation = rotation_of()
    q, k = q_and_k()
    want = ropex.rotate(q, k, rotation, backend="reference")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = ropex.rotate(q.requires_grad_(), k, rotation, backend=backend)
            assert not any(x.requires_grad for x in got)
            own = ropex.rotate(q.detach() * 1, k * 1, rotation, backend=backend, inplace=True)
        for g, o, w in zip(got, own, want, strict=True):
            assert (g - w).abs().max() <= ROTATION_ERROR
            assert torch.equal(g, o)
        q = q.detach()


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("half", torch.bfloat16),
        pytest.param("half", torch.float32, marks=pytest.mark.slow),
        pytest.param("interleaved", torch.bfloat16, marks=pytest.mark.slow),
        ("interleaved", torch.float32),
    ],
)
def test_the_compiled_form_is_the_reference_bit_for_bit(layout: Any, dtype: torch.dtype) -> None:
    for seq in (63, 130):
        rotation = rotation_of(seq)
        q, k = (x.to(dtype) for x in q_and_k(seq))
        cos, sin = table(rotation)
        got, want = (
            (
                *ropex.rotate(q, k, rotation, layout=layout, backend=backend),
                ropex.rotate(q, rotation=rotation, layout=layout, split=True, backend=backend),
                *rotate_with_table(q, k, cos, sin, layout=layout, backend=backend),
            )
            for backend in ("compiled", "reference")
        )
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_gradients_of_the_compiled_form() -> None:
    rotation = rotation_of(31)
    inv_freq = rotation.inv_freq.requires_grad_()
    q, k = (x.requires_grad_() for x in q_and_k(31))
    results = []
    for backend in ("compiled", "reference"):
        outputs = ropex.rotate(q, k, rotation, backend=backend)
        results.append(torch.autograd.grad(outputs, (q, k, inv_freq), [o.sin() for o in outputs]))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_compiled_form_is_never_left_for_eager() -> None:
    """More heads, lengths, batches, layouts and modes than torch.compile keeps variants of one function."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for heads, batch, seq in itertools.product((1, 2), (1, 2, 3), (1, 5, 6)):
            for layout, rows in itertools.product(("half", "interleaved"), {1, batch}):
                q = torch.randn(batch, heads, seq, 4)
                rotation = rotation_of(seq, half=2, batch=rows)
                results = []
                for backend in ("compiled", "reference"):
                    with torch.inference_mode(batch == 3):
                        results.append(ropex.rotate(q, rotation=rotation, layout=layout, backend=backend))
                assert torch.equal(*results)
        inv_freq = rotation.inv_freq.requires_grad_()
        q = torch.randn(3, 2, 6, 4, requires_grad=True)
        ropex.rotate(q, rotation=rotation._replace(inv_freq=inv_freq), backend="compiled").sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch.func.jvp itself
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_is_refused_where_there_is_none(backend: Any) -> None:
    """An operator that knows no tangents would drop them; the choice of `auto` does not."""
    rotation = rotation_of()
    q, _ = q_and_k()

    def turn(q: Tensor, backend: Any) -> Tensor:
        return ropex.rotate(q, rotation=rotation, backend=backend)

    _, tangent = torch.func.jvp(lambda x: turn(x, "auto"), (q,), (torch.ones_like(q),))
    assert (tangent - turn(torch.ones_like(q), "reference")).abs().max() <= ROTATION_ERROR
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        kept = torch.autograd.forward_ad.unpack_dual(turn(dual, "auto")).tangent
        assert (kept - tangent).abs().max() <= ROTATION_ERROR
        with pytest.raises(ValueError, match=r"in forward-mode differentiation: has a backward pass alone"):
            turn(dual, backend)


def test_what_torch_func_cannot_do_is_refused() -> None:
    rotation = rotation_of(batch=1)
    q = torch.randn(3, 1, 2, 9, 16)
    weight = torch.ones(16)
    with pytest.raises(ValueError, match=r"inplace=True under torch\.func: a transform needs what it was given"):
        torch.vmap(lambda x: ropex.rotate(x, rotation=rotation, backend="triton", inplace=True))(q)
    with pytest.raises(ValueError, match=r'backend="triton" under torch\.func: has no rule for its transforms'):
        torch.vmap(lambda x: norm_rotate(x, rotation=rotation, q_weight=weight, backend="triton"))(q)
    assert torch.vmap(lambda x: norm_rotate(x, rotation=rotation, q_weight=weight))(q).shape == q.shape


def test_bounds_are_not_looked_at_in_fake_tensors() -> None:
    from torch._subclasses import FakeTensorMode

    rotation = rotation_of(batch=1)
    with FakeTensorMode() as mode:
        q, bounds = mode.from_tensor(torch.randn(9, 2, 16)), mode.from_tensor(torch.tensor([0, 4, 9]))
        fake = ropex.Rotation(mode.from_tensor(rotation.positions), mode.from_tensor(rotation.inv_freq))
        assert ropex.rotate(q, rotation=fake, order="thd", cu_seqlens=bounds).shape == (9, 2, 16)


@pytest.mark.parametrize(
    ("device", "dtype", "elements", "changes", "want"),
    [
        ("cuda", torch.bfloat16, 1, {}, "triton"),
        ("cuda", torch.bfloat16, 1, {"tracing": True}, "triton"),
        ("cuda", torch.float64, LARGE, {}, "reference"),
        ("cuda", torch.float32, LARGE, {"triton": False}, "reference"),
        ("cpu", torch.float32, LARGE, {}, "compiled"),
        ("cpu", torch.bfloat16, LARGE, {}, "compiled"),
        ("cpu", torch.float32, LARGE - 1, {}, "reference"),
        ("cpu", torch.float32, LARGE, {"compiler": False}, "reference"),
        ("cpu", torch.float32, LARGE, {"tracing": True}, "reference"),
        ("cpu", torch.float64, LARGE, {}, "reference"),
        ("cuda", torch.float32, LARGE, {"transformed": True}, "reference"),
        ("mps", torch.float32, LARGE, {}, "reference"),
    ],
)
def test_auto_is_a_function_of_what_it_is_given(
    device: str, dtype: torch.dtype, elements: int, changes: dict[str, bool], want: str
) -> None:
    given = {"triton": True, "compiler": True, "tracing": False, "transformed": False, **changes}
    assert choose_backend(device, dtype, elements, **given) == want
