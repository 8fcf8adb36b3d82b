"""The values: Geometry, Request, Rotation."""

from __future__ import annotations

import pytest
import torch

import ropex
from ropex.rotation import widest_float
from tests.oracles import GEOMETRIES


def test_rounded_frequencies_are_the_bits_that_transformers_trains_with() -> None:
    for dim, base in ((128, 10_000.0), (64, 100_000.0), (80, 500_000.0), (96, 1e6)):
        theirs = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64).to(dtype=torch.float) / dim))
        ours = ropex.Geometry(dim, base, 2048).inv_freq()
        assert ours.dtype == torch.float64
        assert torch.equal(ours, theirs.double())


def test_unrounded_frequencies_are_the_formula() -> None:
    geometry = ropex.Geometry(dim=80, base=1e6, trained_length=1000, rounded=False)
    want = torch.tensor([1e6 ** (-2 * i / 80) for i in range(40)], dtype=torch.float64)
    torch.testing.assert_close(geometry.inv_freq(), want, rtol=1e-15, atol=0)
    assert not torch.equal(geometry.inv_freq(), ropex.Geometry(80, 1e6, 1000).inv_freq())


def test_geometry_is_a_value() -> None:
    geometry = GEOMETRIES[0]
    assert geometry == ropex.Geometry(dim=128, base=10_000.0, trained_length=2048)
    assert hash(geometry) == hash(ropex.Geometry(dim=128, base=10_000.0, trained_length=2048))
    assert geometry != ropex.Geometry(dim=128, base=10_000.0, trained_length=4096)
    assert eval(repr(geometry), {"Geometry": ropex.Geometry}) == geometry


def test_geometry_ignores_the_default_device_and_dtype() -> None:
    with torch.device("meta"):
        geometry = ropex.Geometry(64, 10_000.0, 2048)
    assert torch.equal(geometry.inv_freq("cpu"), ropex.Geometry(64, 10_000.0, 2048).inv_freq())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 63}, r"dim=63: must be even"),
        ({"dim": 0}, r"dim=0: must be an int >= 2"),
        ({"dim": 64.0}, r"dim=64\.0: must be an int >= 2"),
        ({"dim": True}, r"dim=True: must be an int"),
        ({"base": -1.0}, r"base=-1\.0: must be a finite number > 1; pass the model's rope_theta"),
        ({"base": 1.0}, r"base=1\.0: must be a finite number > 1"),
        ({"base": float("nan")}, r"base=nan: must be a finite number > 1"),
        ({"base": float("inf")}, r"base=inf: must be a finite number > 1"),
        ({"base": "10000"}, r"base='10000': must be a finite number > 1"),
        ({"trained_length": 0}, r"trained_length=0: must be an int >= 1"),
        ({"trained_length": -5}, r"trained_length=-5: must be an int >= 1"),
        ({"trained_length": 2048.0}, r"trained_length=2048\.0: must be an int >= 1; pass the pretraining length"),
    ],
)
def test_bad_geometry(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ropex.Geometry(**{"dim": 64, "base": 10_000.0, "trained_length": 2048, **arguments})


def test_a_request_uses_the_frequencies_that_it_is_given() -> None:
    geometry = GEOMETRIES[1]
    positions = torch.arange(4)[None]
    own = torch.ones(32, dtype=torch.float64)
    assert torch.equal(ropex.Request(geometry, positions, torch.tensor(4)).inv_freq(), geometry.inv_freq())
    assert ropex.Request(geometry, positions, torch.tensor(4), base_inv_freq=own).inv_freq() is own


def test_frequencies_are_float64_where_the_device_has_it() -> None:
    assert widest_float(torch.device("cpu")) == torch.float64
    assert widest_float(torch.device("cuda")) == torch.float64
    assert widest_float(torch.device("mps")) == torch.float32
