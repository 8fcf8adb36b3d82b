"""Draws: uniform, independent, and the same everywhere."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ropex import draws

KEYS = draws.sample_keys(0, torch.tensor(0), torch.arange(20_000))


def chi_square(counts: Tensor, expected: float) -> float:
    """How many standard deviations the statistic lies above its mean; beyond 4.5 is one chance in 300 000."""
    freedom = counts.numel() - 1
    statistic = ((counts - expected).square() / expected).sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_the_numbers_are_the_same_everywhere() -> None:
    """Fixed values: a run that is resumed with another version, device or compiler draws what it would have drawn."""
    keys = draws.sample_keys(42, torch.tensor(7), torch.arange(2))
    assert keys.tolist() == [-5002562575417668312, 8828201108751170864]
    assert draws.uniform(keys, 2).tolist() == [
        [0.8296845990069328, 0.22128410700738166],
        [0.901960633234321, 0.1668185183733314],
    ]
    assert draws.integers(keys, 4, 1000, stream=1).tolist() == [[582, 739, 324, 829], [732, 846, 833, 272]]
    assert draws.subset(keys, 3, 100, limit=200).tolist() == [[17, 56, 61], [62, 81, 87]]
    assert draws.next_key(keys).tolist() == [-7106076387290539325, -1872758164643950430]


def test_arithmetic_is_that_of_64_bit_words() -> None:
    """Against the mixing function written with Python's unbounded integers."""

    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    for word in (0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0x123456789ABCDEF0):
        signed = word - 2**64 if word >= 2**63 else word
        assert draws._mix(torch.tensor(signed)).item() % 2**64 == mixed(word)


@pytest.mark.parametrize("stream", [0, 1])
def test_uniform(stream: int) -> None:
    drawn = draws.uniform(KEYS, 50, stream=stream)
    assert drawn.dtype == torch.float64
    assert drawn.shape == (20_000, 50)
    assert 0 <= drawn.min().item() < 1e-5
    assert 1 - 1e-5 < drawn.max().item() < 1
    counts = torch.histc(drawn, bins=1000, min=0, max=1)
    assert abs(chi_square(counts, 1000.0)) < 4.5
    assert len(drawn.flatten().unique()) == drawn.numel()


@pytest.mark.parametrize("bound", [1, 2, 7, 20, 1000])
def test_integers(bound: int) -> None:
    drawn = draws.integers(KEYS, 10, bound)
    counts = drawn.flatten().bincount()
    assert len(counts) == bound
    assert bound == 1 or abs(chi_square(counts.double(), 200_000 / bound)) < 4.5


def test_a_bound_may_be_a_tensor() -> None:
    bounds = torch.arange(1, 20_001)[:, None]
    drawn = draws.integers(KEYS, 3, bounds)
    assert ((drawn >= 0) & (drawn < bounds)).all()
    assert torch.equal(drawn[9], draws.integers(KEYS[9:10], 3, 10)[0])
    assert (draws.integers(KEYS, 3, 2**31 - 1) >= 0).all()


def test_streams_keys_steps_and_seeds_are_independent() -> None:
    step = torch.tensor(1)
    columns = [
        *draws.uniform(KEYS, 2).T,
        draws.uniform(KEYS, 1, stream=1)[:, 0],
        draws.uniform(KEYS, 1, stream=2)[:, 0],
        draws.uniform(draws.next_key(KEYS), 1)[:, 0],
        draws.uniform(KEYS.roll(1), 1)[:, 0],
        draws.uniform(draws.sample_keys(0, step, torch.arange(20_000)), 1)[:, 0],
        draws.uniform(draws.sample_keys(1, step, torch.arange(20_000)), 1)[:, 0],
        draws.uniform(draws.sample_keys(2**63 + 5, step, torch.arange(20_000)), 1)[:, 0],
        # Keys that a caller counts up are as good.
        draws.uniform(torch.arange(20_000), 1)[:, 0],
    ]
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert correlation.abs().max() < 4.5 / math.sqrt(20_000)
    assert len(KEYS.unique()) == len(KEYS)


def test_every_subset_is_equally_likely() -> None:
    drawn = draws.subset(KEYS, 3, torch.tensor(6), limit=10)
    assert (drawn.diff() > 0).all()
    every = {subset: number for number, subset in enumerate(itertools.combinations(range(6), 3))}
    counts = torch.tensor([every[tuple(row)] for row in drawn.tolist()]).bincount(minlength=20)
    assert abs(chi_square(counts.double(), 1000.0)) < 4.5


def test_extreme_subsets() -> None:
    assert draws.subset(KEYS[:2], 5, 5, limit=5).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert draws.subset(KEYS[:2], 0, 0, limit=0).shape == (2, 0)


def test_compiled_draws_are_the_same() -> None:
    def draw(key: Tensor, bound: Tensor) -> tuple[Tensor, ...]:
        return draws.uniform(key, 5), draws.integers(key, 5, bound), draws.subset(key, 4, bound, limit=20)

    torch.compiler.reset()
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(KEYS[:8], torch.tensor(9)), draw(KEYS[:8], torch.tensor(9)), strict=True):
        assert torch.equal(got, want)


def test_draws_compiled_by_inductor_are_the_same() -> None:
    """Odd sizes, and keys made inside the graph: index arithmetic that overflows would overrun the output."""

    def draw(step: Tensor, bound: Tensor) -> tuple[Tensor, ...]:
        key = draws.sample_keys(3, step, torch.arange(5))
        return key, draws.uniform(key, 254), draws.integers(key, 61, bound), draws.next_key(key)

    torch.compiler.reset()
    compiled = torch.compile(draw, fullgraph=True)
    for step in range(20):
        arguments = torch.tensor(step), torch.tensor(9)
        for got, want in zip(compiled(*arguments), draw(*arguments), strict=True):
            assert torch.equal(got, want)
