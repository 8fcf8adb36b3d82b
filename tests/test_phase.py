"""Exact angles by integer phase."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ropex
from ropex.kernels import cos_sin, fixed_frequency, phase, table
from tests.oracles import TABLE_ERROR, true_cos_sin

positions_int64 = st.integers(-(2**40), 2**40)
frequencies = st.floats(1e-9, 1.0)


@pytest.mark.parametrize("base", [1e4, 5e5, 1e6, 1e7])
def test_error_against_200_bits_up_to_ten_million(base: float) -> None:
    geometry = ropex.Geometry(128, base, 8192)
    inv_freq = geometry.inv_freq()
    edges = torch.tensor([0, 1, 4095, 32_767, 131_071, 999_999, 9_999_999, 10_000_000])
    positions = torch.cat((edges, torch.randint(10_000_000, (24,)), -edges[1:]))
    cos, sin = table(ropex.Rotation(positions[None], inv_freq))
    assert cos.dtype == sin.dtype == torch.float32
    for row, position in enumerate(positions.tolist()):
        truth = torch.tensor([true_cos_sin(position, f) for f in inv_freq.tolist()], dtype=torch.float64)
        assert (cos[0, row].double() - truth[:, 0]).abs().max() <= TABLE_ERROR
        assert (sin[0, row].double() - truth[:, 1]).abs().max() <= TABLE_ERROR


def test_float32_angles_are_what_the_exact_ones_replace() -> None:
    """The test above can fail: transformers' arithmetic misses it by five orders of magnitude."""
    rotation = ropex.Rotation(torch.tensor([[9_999_999]]), ropex.Geometry(128, 1e4, 8192).inv_freq())
    exact, rounded = (table(rotation, angles=angles)[0] for angles in ("exact", "float32"))
    assert (exact - rounded).abs().max() > 1e-2


@given(m=positions_int64, n=positions_int64, inv_freq=frequencies)
def test_phase_is_shift_invariant_bit_for_bit(m: int, n: int, inv_freq: float) -> None:
    frequency = fixed_frequency(torch.tensor([inv_freq], dtype=torch.float64))
    of = {p: phase(torch.tensor([[p]]), frequency) for p in (m, n, m - n)}
    assert torch.equal(of[m] - of[n], of[m - n])


@given(position=st.integers(-(2**62), 2**62), inv_freq=frequencies)
def test_phase_is_the_product_modulo_one_turn(position: int, inv_freq: float) -> None:
    frequency = fixed_frequency(torch.tensor([inv_freq], dtype=torch.float64))
    got = phase(torch.tensor([[position]]), frequency).item()
    assert (position * int(frequency.item()) - int(got)) % 2**64 == 0


@pytest.mark.parametrize("inv_freq", [0.0, math.pi, -math.pi, 3 * math.pi, 2 * math.pi, 1e3, -0.25])
def test_any_frequency_fits(inv_freq: float) -> None:
    positions = torch.arange(-50, 50)[None]
    cos, sin = cos_sin(positions, torch.tensor([inv_freq], dtype=torch.float64), torch.float64)
    truth = [true_cos_sin(position, inv_freq) for position in positions[0].tolist()]
    # The float64 frequency in turns is off by 2**-53 of itself, times 50 positions.
    torch.testing.assert_close(
        cos.flatten(), torch.tensor([c for c, _ in truth], dtype=torch.float64), rtol=0, atol=3e-11
    )
    torch.testing.assert_close(
        sin.flatten(), torch.tensor([s for _, s in truth], dtype=torch.float64), rtol=0, atol=3e-11
    )


def test_a_zero_frequency_does_not_turn() -> None:
    cos, sin = cos_sin(torch.arange(1000)[None], torch.zeros(3, dtype=torch.float64), torch.float32)
    assert torch.equal(cos, torch.ones_like(cos))
    assert torch.equal(sin, torch.zeros_like(sin))


@pytest.mark.parametrize("shape", [(4,), (2, 1, 4), (2, 7, 4)])
def test_gradient_is_the_position_for_every_shape(shape: tuple[int, ...]) -> None:
    positions = torch.randint(-100, 100, (2, 7))
    inv_freq = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    weight_cos, weight_sin = torch.randn(2, 2, 7, 4, dtype=torch.float64)

    def loss(use: torch.Tensor, exact: bool) -> torch.Tensor:
        angle = positions[..., None] * use
        cos, sin = cos_sin(positions, use, torch.float64) if exact else (angle.cos(), angle.sin())
        return (cos * weight_cos + sin * weight_sin).sum()

    (ours,) = torch.autograd.grad(loss(inv_freq, exact=True), inv_freq)
    (by_autograd,) = torch.autograd.grad(loss(inv_freq, exact=False), inv_freq)
    assert ours.shape == shape
    torch.testing.assert_close(ours, by_autograd, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_angles_are_the_eager_ones(backend: str) -> None:
    geometry = ropex.Geometry(128, 1e4, 8192)
    positions = torch.randint(-(2**40), 2**40, (2, 33))
    compiled = torch.compile(cos_sin, fullgraph=True, backend=backend)
    eager = cos_sin(positions, geometry.inv_freq(), torch.float32)
    for got, want in zip(compiled(positions, geometry.inv_freq(), torch.float32), eager, strict=True):
        assert (got - want).abs().max() <= 1e-7
