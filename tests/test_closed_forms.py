"""Frequencies against independent closed forms, the published implementations' goldens, and transformers' functions."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import ropex
from tests.oracles import GEOMETRIES, GOLDEN, GOLDEN_RELATIVE, plain_frequency, relative_error, yarn_frequency

geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"d{g.dim}-b{g.base:g}-L{g.trained_length}")


def inv_freq(method: str, geometry: ropex.Geometry, length: int = 1, **options: Any) -> Tensor:
    return ropex.schedule(method, **options).at(geometry, length=length).inv_freq.flatten()


@geometries
@pytest.mark.parametrize("factor", [1.5, 8, 32.0])
def test_closed_forms(geometry: Any, factor: float) -> None:
    half = range(geometry.dim // 2)
    theta = [plain_frequency(geometry, i) for i in half]
    exponent = [2 * i / (geometry.dim - 2) if i else 0.0 for i in half]
    length = 5 * geometry.trained_length
    alpha = factor * length / geometry.trained_length - (factor - 1)
    ntk = [t * factor**-e for t, e in zip(theta, exponent, strict=True)]
    yarn = [yarn_frequency(geometry, i, factor) for i in half]
    want: dict[str, list[float]] = {
        "none": theta,
        "linear": [t / factor for t in theta],
        "ntk": ntk,
        "abf": ntk,
        "dynamic_ntk": [t * alpha**-e for t, e in zip(theta, exponent, strict=True)],
        "ntk_by_parts": yarn,
        "yarn": yarn,
        "dynamic_yarn": [yarn_frequency(geometry, i, 5) for i in half],
        "power": [t / factor * math.sqrt(1 - 2 * i / geometry.dim) for i, t in enumerate(theta)],
        "drope": [0.0 for _ in half],
        "proportional": [t if i < math.floor(0.75 * geometry.dim / 2) else 0.0 for i, t in enumerate(theta)],
        "resonance": [2 * math.pi / round(2 * math.pi / f) for f in yarn],
        "e2llm": [t / factor for t in theta],
        "pose": [t / factor for t in theta],
        "random_positions": [t / factor for t in theta],
    }
    for method, frequencies in want.items():
        options = {} if method in ("none", "drope", "proportional", "dynamic_yarn") else {"factor": factor}
        got = ropex.schedule(method, **options).at(geometry, length=length)
        assert relative_error(got.inv_freq, frequencies) < 1e-12, method
        scaled_by = {"yarn": factor, "resonance": factor, "dynamic_yarn": 5}.get(method, 1)
        assert got.amplitude == pytest.approx(0.1 * math.log(scaled_by) + 1, abs=1e-15), method


@geometries
def test_an_adjusted_base_is_the_series_of_that_base(geometry: Any) -> None:
    for base in (500.0, 8e6, 1.28e8):
        got = inv_freq("abf", geometry, base=base)
        exact = ropex.Geometry(geometry.dim, base, geometry.trained_length, rounded=False)
        # The model's own float32 rounding stays.
        assert relative_error(got, exact.inv_freq()) < (1e-6 if geometry.rounded else 1e-13)
        assert torch.equal(inv_freq("abf", geometry, base=base, factor=8), got), "the factor sets the target alone"
    assert torch.equal(inv_freq("abf", geometry, base=geometry.base), geometry.inv_freq())


def test_resonance_keeps_what_does_not_turn_and_the_amplitude() -> None:
    geometry = GEOMETRIES[0]
    assert torch.equal(inv_freq("resonance", geometry, inner="drope"), torch.zeros(64, dtype=torch.float64))
    plain, resonant = (ropex.schedule(m, factor=8).at(geometry, length=1) for m in ("yarn", "resonance"))
    assert resonant.amplitude == plain.amplitude
    wavelengths = 2 * math.pi / resonant.inv_freq
    assert (wavelengths - wavelengths.round()).abs().max() < 1e-9
    assert ((wavelengths - 2 * math.pi / plain.inv_freq).abs() <= 0.5 + 1e-9).all()


def test_longrope_lists_and_first_tokens() -> None:
    geometry = ropex.Geometry(dim=8, base=10_000.0, trained_length=64)
    theta = geometry.inv_freq()
    short, long = [1.0, 1.0, 1.5, 2.0], [1.0, 3.0, 5.5, 8]
    schedule = ropex.schedule("longrope", factor=8, short_factors=short, long_factors=long, keep_first=3)
    for length, divisors in ((64, short), (65, long)):
        rotation = schedule.at(geometry, length=length)
        assert rotation.inv_freq.shape == (1, length, 4)
        assert torch.equal(rotation.inv_freq[0, :3], theta.expand(3, 4))
        want = theta / torch.tensor(divisors, dtype=torch.float64)
        assert torch.equal(rotation.inv_freq[0, 3:], want.expand(length - 3, 4))
        assert rotation.amplitude == pytest.approx(math.sqrt(1 + math.log(8) / math.log(64)), abs=1e-15)
    assert schedule == ropex.schedule(
        "longrope", factor=8, short_factors=tuple(short), long_factors=tuple(long), keep_first=3
    )


@pytest.mark.parametrize("name", ["short_factors", "long_factors"])
def test_longrope_lists_must_fit_the_geometry(name: str) -> None:
    schedule = ropex.schedule("longrope", factor=8, **{name: [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match=rf"{name} of 3 numbers: must be 64, one for each pair .* 128; pass the list"):
        schedule.at(GEOMETRIES[0], length=1)


# --- goldens ----------------------------------------------------------------------------------------------------------


def golden_cases(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


def golden_schedule(name: str, case: dict[str, Any]) -> ropex.FrequencySchedule:
    return {
        "plain": lambda: ropex.schedule("none"),
        "linear": lambda: ropex.schedule("linear", factor=case["factor"]),
        "ntk_static": lambda: ropex.schedule("ntk", factor=case["alpha"]),
        "dynamic_ntk": lambda: ropex.schedule("dynamic_ntk", factor=case["factor"]),
        "ntk_by_parts_v1": lambda: ropex.schedule("ntk_by_parts", factor=case["factor"], variant="v1"),
        "yarn": lambda: ropex.schedule("yarn", factor=case["factor"]),
        "yarn_revised_pose": lambda: ropex.schedule("yarn", factor=case["factor"], blend="wavelength"),
        "llama3": lambda: ropex.schedule("llama3", factor=case["factor"]),
        "longrope_init": lambda: ropex.schedule("longrope", factor=case["factor"]),
        "giraffe": lambda: giraffe(case["scale"], case["power"], case["truncate"]),
    }[name]()


def giraffe(scale: float, power: float, truncate: int) -> ropex.FrequencySchedule:
    if truncate:
        return ropex.schedule("truncated", factor=scale, exponent=power, cutoff_length=truncate)
    return ropex.schedule("power", factor=scale, exponent=power)


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "linear",
        "ntk_static",
        "dynamic_ntk",
        "ntk_by_parts_v1",
        "yarn",
        "yarn_revised_pose",
        "llama3",
        "longrope_init",
        "giraffe",
    ],
)
def test_goldens(name: str) -> None:
    cases = golden_cases(name)
    assert cases
    for case in cases:
        trained_length = case.get("original_length", 2048)
        geometry = ropex.Geometry(case["dim"], float(case["base"]), trained_length, rounded=False)
        schedule = golden_schedule(name, case)
        length = trained_length + 1 if name == "longrope_init" else case.get("seq_len", 1)
        rotation = schedule.at(geometry, length=length)
        assert relative_error(rotation.inv_freq, case["inv_freq"]) < GOLDEN_RELATIVE
        assert rotation.amplitude == pytest.approx(case.get("attention_factor", 1.0), abs=1e-12)
        if name == "longrope_init":
            schedule = ropex.schedule("longrope", factor=case["factor"], long_factors=case["init_rescale_factors"])
            given = schedule.at(geometry, length=length).inv_freq
            assert relative_error(given, case["inv_freq"]) < GOLDEN_RELATIVE


def test_a_truncated_basis_keeps_levels_and_drops_as_many_as_published() -> None:
    got = inv_freq("truncated", ropex.Geometry(128, 1e4, 2048))
    plateau = 2 * math.pi / 2048 / 16
    level = (got - plateau).abs() < 1e-12
    assert (int((~level & (got > 0)).sum()), int(level.sum()), int((got == 0).sum())) == (41, 14, 9)


@pytest.mark.parametrize(
    ("geometry", "low", "high"),
    [
        (ropex.Geometry(128, 1e4, 2048), 16, 41),
        (ropex.Geometry(128, 1e4, 4096), 20, 46),
        (ropex.Geometry(64, 1e5, 8192), 10, 20),
        (ropex.Geometry(128, 5e5, 8192), 18, 35),
        (ropex.Geometry(128, 1e6, 32768), 23, 40),
    ],
)
def test_yarn_ramp_lies_where_the_released_code_puts_it(geometry: ropex.Geometry, low: int, high: int) -> None:
    ratio = inv_freq("yarn", geometry, factor=4) / geometry.inv_freq()
    kept, interpolated = (ratio > 1 - 1e-12).nonzero().flatten(), (ratio < 0.25 + 1e-12).nonzero().flatten()
    assert kept.tolist() == list(range(low + 1))
    assert interpolated.tolist() == list(range(high, geometry.dim // 2))


def test_yarn_ramp_by_rotations_is_linear_in_the_turns() -> None:
    geometry = ropex.Geometry(128, 1e4, 4096)
    theta = geometry.inv_freq()
    by_turns = inv_freq("yarn", geometry, factor=16, ramp="rotations")
    kept = ((4096 * theta / (2 * math.pi) - 1) / 31).clamp(0, 1)
    assert relative_error(by_turns, theta / 16 * (1 - kept) + theta * kept) < 1e-12
    by_index = inv_freq("yarn", geometry, factor=16)
    # The two published ramps differ by up to 3.04x here, so they cannot be confused.
    assert (by_index / by_turns).max().item() == pytest.approx(3.04, abs=0.01)


def test_yarn_amplitude_options() -> None:
    def amplitude(**options: float) -> Any:
        return ropex.schedule("yarn", factor=40, **options).at(GEOMETRIES[0], length=1).amplitude

    assert amplitude() == pytest.approx(0.1 * math.log(40) + 1, abs=1e-15)
    assert amplitude(amplitude=1.0) == 1.0
    assert amplitude(mscale=0.707, mscale_all_dim=0.707) == pytest.approx(1.0, abs=1e-15)
    assert amplitude(mscale=1.0, mscale_all_dim=0.5) == pytest.approx(
        (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1), abs=1e-15
    )


@geometries
@pytest.mark.parametrize("options", [{}, {"ramp": "rotations"}, {"blend": "wavelength", "beta_fast": 8.0}])
def test_dynamic_yarn_is_yarn_of_the_length(geometry: Any, options: dict[str, Any]) -> None:
    for growth in (1.25, 3.0, 40.0):
        length = round(growth * geometry.trained_length)
        static = ropex.schedule("yarn", factor=length / geometry.trained_length, **options).at(geometry, length=1)
        for schedule, n in (
            (ropex.schedule("dynamic_yarn", **options), length),
            (ropex.schedule("dynamic_yarn", floor=length, **options), 7),
        ):
            dynamic = schedule.at(geometry, length=n)
            assert relative_error(dynamic.inv_freq, static.inv_freq) < 1e-15
            assert dynamic.amplitude.item() == pytest.approx(static.amplitude, abs=1e-15)


# --- transformers' own functions --------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    half=st.integers(2, 128),
    base=st.floats(100, 1e7),
    trained=st.integers(64, 65536),
    factor=st.floats(1, 32),  # which magnifies transformers' float32 rounding of the ramp
    growth=st.floats(0.1, 16),
    truncate=st.booleans(),
    mscales=st.none() | st.tuples(st.floats(0.1, 2), st.floats(0.1, 2)),
    # Between low and high transformers' float32 rounding is magnified by high / (high - low).
    turns=st.tuples(st.floats(0.1, 4), st.floats(3, 30)),
    fraction=st.floats(0, 1),
    divisors=st.integers(0, 2**32),
)
def test_parity_with_transformers(
    half: int,
    base: float,
    trained: int,
    factor: float,
    growth: float,
    truncate: bool,
    mscales: Any,
    turns: tuple[float, float],
    fraction: float,
    divisors: int,
) -> None:
    geometry = ropex.Geometry(2 * half, base, trained)
    length = max(round(growth * trained), 1)
    mscale = dict(zip(("mscale", "mscale_all_dim"), mscales, strict=True)) if mscales else {}
    low_high = {"low_freq_factor": turns[0], "high_freq_factor": turns[0] * turns[1]}
    short, long = (1 + 63 * torch.rand(2, half, generator=torch.Generator().manual_seed(divisors))).tolist()
    original = {"original_max_position_embeddings": trained}
    cases: list[tuple[str, dict[str, Any], ropex.FrequencySchedule]] = [
        ("linear", {}, ropex.schedule("linear", factor=factor)),
        ("dynamic", {}, ropex.schedule("dynamic_ntk", factor=factor)),
        (
            "yarn",
            {**original, "truncate": truncate, **mscale},
            ropex.schedule("yarn", factor=factor, truncate=truncate, **mscale),
        ),
        ("llama3", {**original, **low_high}, ropex.schedule("llama3", factor=factor, **low_high)),
        (
            "longrope",
            {**original, "short_factor": short, "long_factor": long},
            ropex.schedule("longrope", factor=factor, short_factors=short, long_factors=long),
        ),
        (
            "proportional",
            {"partial_rotary_factor": fraction, "factor": 1.0},
            ropex.schedule("proportional", fraction=fraction),
        ),
    ]
    config = LlamaConfig(hidden_size=2 * half, num_attention_heads=1, max_position_embeddings=trained)
    config.rope_theta = base  # where transformers 4 looks for it
    for rope_type, extra, schedule in cases:
        if rope_type not in ROPE_INIT_FUNCTIONS:  # transformers 4 has no proportional
            continue
        parameters = {"rope_type": rope_type, "rope_theta": base, "factor": factor, **extra}
        setattr(config, "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling", parameters)
        theirs, scaling_factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=length)
        ours = schedule.at(geometry, length=length)
        # transformers rounds to float32 at every step: base ** x with an exponent near 1 loses about 20 ulp.
        assert relative_error(ours.inv_freq, theirs.double()) < 2e-6, rope_type
        assert ours.amplitude == pytest.approx(scaling_factor, rel=1e-12), rope_type
