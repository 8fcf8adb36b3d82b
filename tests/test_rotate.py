"""`ropex.rotate`: values, layouts, shapes, dtypes, gradients, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as apply_interleaved
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as apply_partial
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as apply_half

import ropex
from ropex.kernels import rotate_with_table, table
from tests.oracles import ROTATION_ERROR, tiny_config

GEOMETRY = ropex.Geometry(dim=64, base=10_000.0, trained_length=2048)


def make_rotation(seq: int, geometry: ropex.Geometry = GEOMETRY, **options: Any) -> ropex.Rotation:
    return ropex.schedule("yarn", factor=4, **options).at(geometry, length=seq)


def rotate_in_float64(x: Tensor, rotation: ropex.Rotation, layout: str) -> Tensor:
    """The definition, as a product of complex numbers: x is [batch, heads, seq, head_dim]."""
    positions, inv_freq, amplitude = rotation
    turning = torch.polar(torch.tensor(1.0, dtype=torch.float64), positions[..., None] * inv_freq)[:, None] * amplitude
    half = inv_freq.shape[-1]
    parts, rest = x[..., : 2 * half].double(), x[..., 2 * half :].double()
    pairs = parts.unflatten(-1, (2, half)).mT if layout == "half" else parts.unflatten(-1, (half, 2))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turning)
    return torch.cat(((turned.mT if layout == "half" else turned).flatten(-2), rest), dim=-1)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("order", ["bhsd", "bshd"])
@pytest.mark.parametrize(("seq", "head_dim", "dim"), [(63, 64, 64), (1000, 80, 80), (5, 80, 32), (1, 128, 2)])
def test_values(layout: str, order: str, seq: int, head_dim: int, dim: int) -> None:
    rotation = make_rotation(seq, ropex.Geometry(dim, 10_000.0, 2048))
    q, k = torch.randn(2, 6, seq, head_dim), torch.randn(2, 2, seq, head_dim)
    want = [rotate_in_float64(x, rotation, layout) for x in (q, k)]
    if order == "bshd":
        q, k, want = q.transpose(1, 2), k.transpose(1, 2), [w.transpose(1, 2) for w in want]
    got = ropex.rotate(q, k, rotation, layout=layout, order=order)
    alone = ropex.rotate(q, rotation=rotation, layout=layout, order=order)
    assert torch.equal(alone, got[0])
    for x, g, w in zip((q, k), got, want, strict=True):
        assert g.shape == x.shape
        assert g.dtype == x.dtype
        assert (g - w).abs().max() < ROTATION_ERROR


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding_to_the_dtype_of_the_input(layout: str, dtype: torch.dtype) -> None:
    rotation = make_rotation(257)
    q = torch.randn(2, 3, 257, 80).to(dtype)
    got = ropex.rotate(q, rotation=rotation, layout=layout)
    truth = rotate_in_float64(q, rotation, layout)
    assert got.dtype == dtype
    # float32 arithmetic before one rounding: all but ties within 1e-6 of one agree with the correctly rounded truth.
    assert (got != truth.to(dtype)).double().mean() < 1e-3


def test_float64_stays_float64() -> None:
    rotation = make_rotation(100)
    q = torch.randn(1, 2, 100, 64, dtype=torch.float64)
    got = ropex.rotate(q, rotation=rotation)
    assert got.dtype == torch.float64
    assert (got - rotate_in_float64(q, rotation, "half")).abs().max() < 1e-12


def test_any_strides() -> None:
    rotation = make_rotation(31)
    q = torch.randn(2, 31, 5, 64)
    views = [q.transpose(1, 2), q.transpose(1, 2).contiguous(), torch.stack((q, q), -1)[..., 1].transpose(1, 2)]
    expanded = torch.randn(2, 1, 31, 64).expand(2, 5, 31, 64)
    first, *others = [ropex.rotate(view, rotation=rotation) for view in views]
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(ropex.rotate(expanded, rotation=rotation), ropex.rotate(expanded.clone(), rotation=rotation))


def test_the_input_is_not_written() -> None:
    q = torch.randn(1, 2, 9, 80)
    before = q.clone()
    ropex.rotate(q, q, make_rotation(9))
    assert torch.equal(q, before)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rows_may_have_their_own_positions_frequencies_and_amplitudes(layout: str) -> None:
    positions = torch.stack((torch.arange(10), torch.arange(500, 510)))
    inv_freq = torch.stack((GEOMETRY.inv_freq(), GEOMETRY.inv_freq() / 3))[:, None]
    amplitude = torch.tensor([1.0, 1.5], dtype=torch.float64)[:, None, None]
    q = torch.randn(2, 3, 10, 64)
    together = ropex.rotate(q, rotation=ropex.Rotation(positions, inv_freq, amplitude), layout=layout)
    per_token = ropex.rotate(
        q, rotation=ropex.Rotation(positions, inv_freq.expand(2, 10, 32), amplitude), layout=layout
    )
    assert torch.equal(together, per_token)
    for row in range(2):
        alone = ropex.Rotation(positions[row : row + 1], inv_freq[row, 0], amplitude[row].item())
        assert torch.equal(together[row : row + 1], ropex.rotate(q[row : row + 1], rotation=alone, layout=layout))
    one_position = ropex.Rotation(positions[:1], inv_freq, amplitude)
    assert torch.equal(ropex.rotate(q, rotation=one_position, layout=layout)[0], together[0])


@settings(max_examples=50)
@given(
    shift=st.integers(-(10**7), 10**7),
    distance=st.integers(-4000, 4000),
    layout=st.sampled_from(["half", "interleaved"]),
)
def test_scores_depend_on_relative_positions_only(shift: int, distance: int, layout: Any) -> None:
    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(abs(shift)))
    inv_freq = GEOMETRY.inv_freq()

    def score(m: int, n: int) -> Tensor:
        at = [ropex.Rotation(torch.tensor([[p]]), inv_freq) for p in (m, n)]
        return (ropex.rotate(q, rotation=at[0], layout=layout) * ropex.rotate(k, rotation=at[1], layout=layout)).sum()

    # 64 products of unit-variance numbers with tables off by 1e-7.
    assert (score(distance + shift, shift) - score(distance, 0)).abs() < 2e-5


def test_norms_are_kept() -> None:
    q = torch.randn(2, 3, 50, 80)
    rotated = ropex.rotate(q, rotation=ropex.schedule("ntk", factor=4).at(GEOMETRY, length=50))
    torch.testing.assert_close(rotated.norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(rotated[..., 64:], q[..., 64:])
    assert torch.equal(rotated[:, :, 0], q[:, :, 0])


def test_float32_angles_are_transformers_bit_for_bit() -> None:
    module = LlamaRotaryEmbedding(tiny_config("llama", head_dim=64))
    seq = 5000
    positions = torch.arange(seq)[None]
    cos, sin = module(torch.zeros(()), positions)
    q, k = torch.randn(2, 4, seq, 64), torch.randn(2, 2, seq, 64)
    rotation = ropex.schedule("none").at(GEOMETRY, length=seq)
    half_cos, half_sin = table(rotation, angles="float32")
    assert torch.equal(torch.cat((half_cos, half_cos), -1), cos)
    assert torch.equal(torch.cat((half_sin, half_sin), -1), sin)
    for got, want in zip(ropex.rotate(q, k, rotation, angles="float32"), apply_half(q, k, cos, sin), strict=True):
        assert torch.equal(got, want)
    # The Triton kernel is given the same angles, and fuses multiply and add.
    short = ropex.Rotation(rotation.positions[:, -99:], rotation.inv_freq)
    fused = ropex.rotate(q[:, :, -99:], rotation=short, angles="float32", backend="triton")
    assert (fused - apply_half(q, k, cos, sin)[0][:, :, -99:]).abs().max() < ROTATION_ERROR
    wide_q, wide_k = torch.randn(2, 4, seq, 80), torch.randn(2, 4, seq, 80)
    for got, want in zip(
        ropex.rotate(wide_q, wide_k, rotation, angles="float32"), apply_partial(wide_q, wide_k, cos, sin), strict=True
    ):
        assert torch.equal(got, want)
    paired = [t.repeat_interleave(2, -1) for t in (half_cos, half_sin)]
    for got, want in zip(
        ropex.rotate(q, k, rotation, angles="float32", layout="interleaved"),
        apply_interleaved(q, k, *paired),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("shape", [(8,), (2, 1, 8), (2, 5, 8)])
def test_gradients_reach_everything(layout: str, shape: tuple[int, ...]) -> None:
    positions = torch.randint(-20, 20, (2, 5))
    inputs = (
        torch.randn(2, 3, 5, 20, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 1, 5, 20, dtype=torch.float64, requires_grad=True),
        torch.rand(shape, dtype=torch.float64, requires_grad=True),
        torch.rand((2, 1, 1), dtype=torch.float64, requires_grad=True),
    )

    def run(q: Tensor, k: Tensor, inv_freq: Tensor, amplitude: Tensor) -> tuple[Tensor, Tensor]:
        return ropex.rotate(q, k, ropex.Rotation(positions, inv_freq, amplitude), layout=layout)

    assert torch.autograd.gradcheck(run, inputs)

    def through_tables(q: Tensor, k: Tensor, inv_freq: Tensor, amplitude: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = table(ropex.Rotation(positions, inv_freq, amplitude), dtype=torch.float64)
        return rotate_with_table(q, k, cos, sin, layout=layout)

    assert torch.autograd.gradcheck(through_tables, inputs)


def test_frequency_gradient_is_the_sum_of_position_times_angle_gradient() -> None:
    positions = torch.arange(1, 40)[None]
    inv_freq = GEOMETRY.inv_freq().requires_grad_()
    q = torch.randn(1, 2, 39, 64, dtype=torch.float64)
    out = ropex.rotate(q, rotation=ropex.Rotation(positions, inv_freq))
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    first, second = out.detach().chunk(2, -1)
    grad_first, grad_second = grad_out.chunk(2, -1)
    grad_angle = (first * grad_second - second * grad_first).sum(1)
    torch.testing.assert_close(inv_freq.grad, (positions[..., None] * grad_angle).sum((0, 1)), rtol=1e-12, atol=1e-12)


def test_amplitude_and_float32_angles_have_gradients_too() -> None:
    inv_freq = GEOMETRY.inv_freq().requires_grad_()
    amplitude = torch.tensor(1.2, requires_grad=True)
    rotation = ropex.Rotation(torch.arange(9)[None], inv_freq, amplitude)
    grads = []
    for angles in ("exact", "float32"):
        out = ropex.rotate(torch.ones(1, 1, 9, 64), rotation=rotation, angles=angles)
        grads.append(torch.autograd.grad(out.square().sum() + out.sum(), (inv_freq, amplitude)))
    for exact, rounded in zip(*grads, strict=True):
        torch.testing.assert_close(exact, rounded, rtol=1e-4, atol=1e-4)
        assert bool((exact.abs() > 0).all())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend: str) -> None:
    rotation = make_rotation(17)
    inv_freq = rotation.inv_freq.requires_grad_()
    q, k = torch.randn(2, 4, 17, 80, requires_grad=True), torch.randn(2, 2, 17, 80)

    def loss(q: Tensor, inv_freq: Tensor) -> Tensor:
        rotated = ropex.rotate(q, k, ropex.Rotation(rotation.positions, inv_freq, 1.1))
        return rotated[0].square().sum() + rotated[1].sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    want = torch.autograd.grad(loss(q, inv_freq), (q, inv_freq))
    got = torch.autograd.grad(compiled(q, inv_freq), (q, inv_freq))
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-3)


BASE = {"q": torch.zeros(2, 4, 9, 64), "k": torch.zeros(2, 2, 9, 64), "rotation": make_rotation(9)}
POSITIONS, INV_FREQ, _ = BASE["rotation"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotation": None}, r"rotation=None: must be a ropex\.Rotation; pass what a schedule's rotation"),
        ({"rotation": (POSITIONS, INV_FREQ, 1.0)}, r"must be a ropex\.Rotation"),
        ({"layout": "halves"}, r'layout=\'halves\': must be one of "half", "interleaved"'),
        ({"order": "sbhd"}, r'order=\'sbhd\': must be one of "bhsd", "bshd", "thd"'),
        ({"angles": "float64"}, r'angles=\'float64\': must be one of "exact", "float32"'),
        ({"backend": "cuda"}, r'backend=\'cuda\': must be one of "auto", "reference", "compiled", "triton"'),
        (
            {"q": torch.zeros(2, 4, 9, 64, dtype=torch.int64)},
            r"q int64 \[2, 4, 9, 64\]: must be a floating-point \[batch",
        ),
        ({"q": torch.zeros(9, 64)}, r"q float32 \[9, 64\]: must be a floating-point \[batch, heads, seq, head_dim\]"),
        ({"q": torch.zeros(2, 4, 9, 62)}, r"q .*: its head_dim must be >= the rotary dimension 64"),
        ({"q": torch.zeros(2, 9, 4, 64)}, r"q .* with a rotation of \[1, 9\]: must be the same \[batch, seq\]"),
        ({"q": None}, r"q of the type NoneType: must be a tensor \[batch, heads, seq, head_dim\]"),
        ({"k": [1.0]}, r"k of the type list: must be a tensor"),
        ({"rotation": ropex.Rotation([0], INV_FREQ)}, r"positions and inv_freq of the types list and Tensor: must be"),
        ({"rotation": ropex.Rotation(POSITIONS, INV_FREQ, "1")}, r"amplitude='1': must be a finite number or a tensor"),
        (
            {"rotation": ropex.Rotation(POSITIONS, INV_FREQ, torch.ones(1, device="meta"))},
            r"positions on cpu, amplitude on meta: must be on one device",
        ),
        ({"k": torch.zeros(2, 2, 8, 64)}, r"k .* with a rotation of \[1, 9\]"),
        ({"k": torch.zeros(2, 2, 9, 80)}, r"q .* and k .*: must agree in dtype, batch, seq and head_dim"),
        ({"k": torch.zeros(2, 2, 9, 64, dtype=torch.float16)}, r"q .* and k float16 .*: must agree in dtype"),
        ({"k": torch.zeros(1, 2, 9, 64)}, r"must agree in dtype, batch, seq and head_dim"),
        ({"k": torch.zeros(2, 2, 9, 64, device="meta")}, r"k on meta, rotation on cpu: must be on one device"),
        ({"rotation": ropex.Rotation(POSITIONS.double(), INV_FREQ)}, r"positions float64 \[1, 9\]: must be int64"),
        ({"rotation": ropex.Rotation(POSITIONS[0], INV_FREQ)}, r"positions int64 \[9\]: must be int64 \[batch, seq\]"),
        ({"rotation": ropex.Rotation(POSITIONS.expand(3, 9), INV_FREQ)}, r"q .* with a rotation of \[3, 9\]"),
        (
            {"rotation": ropex.Rotation(POSITIONS, INV_FREQ[None])},
            r"inv_freq float64 \[1, 32\]: must be a floating-point",
        ),
        ({"rotation": ropex.Rotation(POSITIONS, INV_FREQ.long())}, r"inv_freq int64 \[32\]: must be a floating-point"),
        ({"rotation": ropex.Rotation(POSITIONS, INV_FREQ.expand(1, 5, 32))}, r"inv_freq float64 \[1, 5, 32\]"),
        ({"rotation": ropex.Rotation(POSITIONS, INV_FREQ.to("meta"))}, r"positions on cpu, inv_freq on meta"),
        (
            {"rotation": ropex.Rotation(POSITIONS, INV_FREQ, torch.ones(2))},
            r"amplitude float32 \[2\]: must be real and broadcast",
        ),
    ],
)
def test_bad_calls(change: dict[str, Any], message: str) -> None:
    arguments = {**BASE, **change}
    with pytest.raises(ValueError, match=message):
        ropex.rotate(arguments.pop("q"), arguments.pop("k"), **arguments)


@pytest.mark.parametrize(
    ("cos", "sin"),
    [
        (torch.zeros(1, 9, 32), torch.zeros(1, 9, 31)),
        (torch.zeros(9, 32), torch.zeros(9, 32)),
        (torch.zeros(1, 9, 32, dtype=torch.int64), torch.zeros(1, 9, 32, dtype=torch.int64)),
    ],
)
def test_bad_tables(cos: Tensor, sin: Tensor) -> None:
    with pytest.raises(ValueError, match=r"cos .* and sin .*: must be equal floating-point tables"):
        rotate_with_table(BASE["q"], None, cos, sin)


def test_tables_of_lower_precision_are_used_as_they_are() -> None:
    cos, sin = (t.to(torch.bfloat16) for t in table(make_rotation(9)))
    q = torch.randn(2, 4, 9, 64)
    got = rotate_with_table(q, None, cos, sin, rotary_dim=64)
    assert torch.equal(got, rotate_with_table(q, None, cos.float(), sin.float(), rotary_dim=64))
    assert math.isclose(got.norm().item(), q.norm().item() * 1.1386, rel_tol=1e-2)


@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_beyond_the_last_bound(rows: int) -> None:
    """The padding of a CUDA graph turns as the first column of the last row, in every backend, and disturbs nothing."""
    bounds = torch.tensor([0, 4, 4, 9])
    positions = torch.randint(1, 1000, (rows, 6), generator=torch.Generator().manual_seed(0))
    rotation = ropex.Rotation(positions, GEOMETRY.inv_freq(), 1.2)
    q = torch.randn(14, 2, 64)
    want = ropex.rotate(q[:9], rotation=rotation, order="thd", cu_seqlens=bounds)
    alone = ropex.Rotation(positions[-1:, :1].expand(5, 1).reshape(1, 5), GEOMETRY.inv_freq(), 1.2)
    beyond = ropex.rotate(q[9:], rotation=alone, order="thd")
    for backend in ("reference", "triton", "compiled"):
        got = ropex.rotate(q, rotation=rotation, order="thd", cu_seqlens=bounds, backend=backend)
        torch.testing.assert_close(got[:9], want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[9:], beyond, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"must rise from 0 to at most the number of tokens"):
        ropex.rotate(q, rotation=rotation, order="thd", cu_seqlens=bounds * 2)


def test_two_slices_of_packed_projections_in_place_compiled() -> None:
    """With gradients, and at the first length that compiles the graph anew."""
    torch.compiler.reset()
    rope = ropex.RotaryEmbedding(ropex.Geometry(16, 10_000.0, 64), ropex.schedule("yarn", factor=2))
    linear = torch.nn.Linear(32, 3 * 2 * 16)

    def scores(x: Tensor, positions: Tensor) -> Tensor:
        packed = linear(x).unflatten(-1, (3, 2, 16))
        q, k = packed[:, :, 0].transpose(1, 2), packed[:, :, 1].transpose(1, 2)
        q, k = ropex.rotate(q, k, rotation=rope(positions), inplace=True)
        return (q @ k.transpose(-1, -2)).sin().sum()

    compiled = torch.compile(scores, backend="aot_eager", fullgraph=True)
    for length in (10, 12, 20):
        x = torch.randn(2, length, 32, requires_grad=True)
        (want,) = torch.autograd.grad(scores(x, torch.arange(length)[None]), x)
        (got,) = torch.autograd.grad(compiled(x, torch.arange(length)[None]), x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_table_half_a_head_wide_may_be_two_things() -> None:
    """Every pair of a head once, or each of half as many pairs twice: the caller says which."""
    cos, sin = table(make_rotation(9))
    q = torch.randn(2, 4, 9, 64)
    with pytest.raises(
        ValueError, match=r"may be one value for each of 32 pairs, or each value twice for 16; pass rot"
    ):
        rotate_with_table(q, None, cos, sin)
    narrow = [t[..., :16] for t in (cos, sin)]
    partial = rotate_with_table(q, None, *(torch.cat((t, t), -1) for t in narrow), rotary_dim=32)
    assert torch.equal(partial, rotate_with_table(q, None, *narrow, rotary_dim=32))
    assert torch.equal(partial[..., 32:], q[..., 32:])
