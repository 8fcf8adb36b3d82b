"""Every schedule of the roster against every law, the goldens, and transformers' own functions."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import ropex
from ropex import scaling
from tests.oracles import GEOMETRIES, GOLDEN, GOLDEN_RELATIVE, ROSTER, plain_frequency, yarn_frequency

LENGTH = 3000
roster = pytest.mark.parametrize("schedule", ROSTER, ids=repr)
geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"d{g.dim}-b{g.base:g}-L{g.trained_length}")


def relative_error(got: Tensor, want: Any) -> float:
    want = torch.as_tensor(want, dtype=torch.float64)
    return ((got.flatten() - want).abs() / want.abs()).max().item()


# --- laws -------------------------------------------------------------------------------------------------------------


def test_the_roster_covers_every_method() -> None:
    assert {schedule.method for schedule in ROSTER} == set(ropex.methods())


@roster
@geometries
def test_the_rotation_is_finite_float64_and_broadcasts(schedule: ropex.FrequencySchedule, geometry: Any) -> None:
    positions, inv_freq, amplitude = schedule.at(geometry, length=LENGTH)
    assert positions.dtype == torch.int64
    assert positions.shape == (1, LENGTH)
    assert inv_freq.dtype == torch.float64
    assert (positions[..., None] * inv_freq).shape == (1, LENGTH, geometry.dim // 2)
    assert bool(inv_freq.isfinite().all())
    assert bool((inv_freq >= 0).all())
    assert bool((inv_freq <= geometry.inv_freq() * (1 + 1e-12)).all()), "extension never speeds a pair up"
    assert math.isfinite(amplitude)
    assert amplitude >= 1


@roster
def test_per_row_lengths_give_each_row_its_own_frequencies(schedule: ropex.FrequencySchedule) -> None:
    geometry = GEOMETRIES[0]
    lengths = torch.tensor([100, 2048, 9000])
    request = ropex.Request(geometry, torch.arange(4).expand(3, 4), lengths)
    together = schedule.rotation(request).inv_freq.expand(3, 1, 64)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(together[row].flatten(), schedule.at(geometry, length=length).inv_freq.flatten())


@roster
@geometries
def test_only_length_dependent_schedules_depend_on_the_length(schedule: Any, geometry: Any) -> None:
    short, long = (schedule.at(geometry, length=n).inv_freq for n in (10, 20 * geometry.trained_length))
    # One pair alone has nothing to stretch: the first pair never changes under NTK.
    depends = schedule.length_dependent and geometry.dim > 2
    assert torch.equal(short, long) is not depends


@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
@geometries
def test_dynamic_ntk_changes_nothing_up_to_the_trained_length(factor: float, geometry: Any) -> None:
    schedule = ropex.schedule("dynamic_ntk", factor=factor)
    for length in (1, geometry.trained_length - 1, geometry.trained_length):
        assert torch.equal(schedule.at(geometry, length=length).inv_freq, geometry.inv_freq())


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn"])
@geometries
def test_factor_one_is_the_identity(method: str, geometry: Any) -> None:
    _, inv_freq, amplitude = ropex.schedule(method, factor=1).at(geometry, length=10)
    assert relative_error(inv_freq, geometry.inv_freq()) < 1e-15
    assert amplitude == 1


@roster
def test_a_rotation_does_not_depend_on_earlier_ones(schedule: ropex.FrequencySchedule) -> None:
    geometry = GEOMETRIES[0]
    first = schedule.at(geometry, length=100)
    schedule.at(geometry, length=100_000)
    again = schedule.at(geometry, length=100)
    assert torch.equal(first.inv_freq, again.inv_freq)
    assert first.amplitude == again.amplitude


@roster
def test_schedules_are_values(schedule: ropex.FrequencySchedule) -> None:
    names = {cls.__name__: cls for cls in ropex.methods().values()}
    twins = [
        copy.deepcopy(schedule),
        pickle.loads(pickle.dumps(schedule)),
        eval(repr(schedule), names),
        scaling.from_dict(json.loads(json.dumps(schedule.to_dict()))),
    ]
    for twin in twins:
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert type(twin) is type(schedule)
    assert len(set(ROSTER)) == len(ROSTER)


@roster
def test_rotation_compiles_without_a_graph_break(schedule: ropex.FrequencySchedule) -> None:
    geometry = GEOMETRIES[0]

    def frequencies(positions: Tensor, length: Tensor) -> Tensor:
        return schedule.rotation(ropex.Request(geometry, positions, length)).inv_freq

    torch.compiler.reset()  # one function compiled for every schedule would meet the recompile limit
    compiled = torch.compile(frequencies, fullgraph=True, backend="aot_eager")
    for length in (100, 5000):
        arguments = (torch.arange(8)[None], torch.tensor(length))
        assert torch.equal(compiled(*arguments), frequencies(*arguments))


@roster
def test_rotation_reads_no_tensor_value(schedule: ropex.FrequencySchedule) -> None:
    """On the meta device there is no value to read: `.item()` and branches on data raise."""
    rotation = schedule.at(GEOMETRIES[0], length=9000, device="meta")
    assert rotation.inv_freq.is_meta


# --- closed forms and goldens -----------------------------------------------------------------------------------------


@geometries
@pytest.mark.parametrize("factor", [1.5, 8, 32.0])
def test_closed_forms(geometry: Any, factor: float) -> None:
    half = range(geometry.dim // 2)
    theta = [plain_frequency(geometry, i) for i in half]
    exponent = [2 * i / (geometry.dim - 2) if i else 0.0 for i in half]
    length = 5 * geometry.trained_length
    alpha = factor * length / geometry.trained_length - (factor - 1)
    want = {
        "none": theta,
        "linear": [t / factor for t in theta],
        "ntk": [t * factor**-e for t, e in zip(theta, exponent, strict=True)],
        "dynamic_ntk": [t * alpha**-e for t, e in zip(theta, exponent, strict=True)],
        "yarn": [yarn_frequency(geometry, i, factor) for i in half],
    }
    for method, frequencies in want.items():
        options = {} if method == "none" else {"factor": factor}
        got = ropex.schedule(method, **options).at(geometry, length=length)
        assert relative_error(got.inv_freq, frequencies) < 1e-12, method
        assert got.amplitude == pytest.approx(0.1 * math.log(factor) + 1 if method == "yarn" else 1, abs=1e-15)


def golden_cases(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


def golden_schedule(name: str, case: dict[str, Any]) -> ropex.FrequencySchedule:
    return {
        "plain": lambda: ropex.schedule("none"),
        "linear": lambda: ropex.schedule("linear", factor=case["factor"]),
        "ntk_static": lambda: ropex.schedule("ntk", factor=case["alpha"]),
        "dynamic_ntk": lambda: ropex.schedule("dynamic_ntk", factor=case["factor"]),
        "yarn": lambda: ropex.schedule("yarn", factor=case["factor"]),
        "yarn_revised_pose": lambda: ropex.schedule("yarn", factor=case["factor"], blend="wavelength"),
    }[name]()


@pytest.mark.parametrize("name", ["plain", "linear", "ntk_static", "dynamic_ntk", "yarn", "yarn_revised_pose"])
def test_goldens(name: str) -> None:
    cases = golden_cases(name)
    assert cases
    for case in cases:
        geometry = ropex.Geometry(case["dim"], float(case["base"]), case.get("original_length", 2048), rounded=False)
        rotation = golden_schedule(name, case).at(geometry, length=case.get("seq_len", 1))
        assert relative_error(rotation.inv_freq, case["inv_freq"]) < GOLDEN_RELATIVE
        assert rotation.amplitude == pytest.approx(case.get("attention_factor", 1.0), abs=1e-12)


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
    ratio = ropex.schedule("yarn", factor=4).at(geometry, length=1).inv_freq / geometry.inv_freq()
    kept, interpolated = (ratio > 1 - 1e-12).nonzero().flatten(), (ratio < 0.25 + 1e-12).nonzero().flatten()
    assert kept.tolist() == list(range(low + 1))
    assert interpolated.tolist() == list(range(high, geometry.dim // 2))


def test_yarn_ramp_by_rotations_is_linear_in_the_turns() -> None:
    geometry = ropex.Geometry(128, 1e4, 4096)
    theta = geometry.inv_freq()
    by_turns = ropex.schedule("yarn", factor=16, ramp="rotations").at(geometry, length=1).inv_freq
    kept = ((4096 * theta / (2 * math.pi) - 1) / 31).clamp(0, 1)
    assert relative_error(by_turns, theta / 16 * (1 - kept) + theta * kept) < 1e-12
    by_index = ropex.schedule("yarn", factor=16).at(geometry, length=1).inv_freq
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


# --- transformers' own functions --------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    half=st.integers(2, 128),
    base=st.floats(100, 1e7),
    trained=st.integers(64, 65536),
    factor=st.floats(1, 64),
    growth=st.floats(0.1, 16),
    truncate=st.booleans(),
    mscales=st.none() | st.tuples(st.floats(0.1, 2), st.floats(0.1, 2)),
)
def test_parity_with_transformers(
    half: int, base: float, trained: int, factor: float, growth: float, truncate: bool, mscales: Any
) -> None:
    geometry = ropex.Geometry(2 * half, base, trained)
    length = max(round(growth * trained), 1)
    mscale = dict(zip(("mscale", "mscale_all_dim"), mscales, strict=True)) if mscales else {}
    cases: list[tuple[str, dict[str, Any], ropex.FrequencySchedule]] = [
        ("linear", {}, ropex.schedule("linear", factor=factor)),
        ("dynamic", {}, ropex.schedule("dynamic_ntk", factor=factor)),
        (
            "yarn",
            {"original_max_position_embeddings": trained, "truncate": truncate, **mscale},
            ropex.schedule("yarn", factor=factor, truncate=truncate, **mscale),
        ),
    ]
    for rope_type, extra, schedule in cases:
        config = LlamaConfig(hidden_size=2 * half, num_attention_heads=1, max_position_embeddings=trained)
        config.rope_theta = base  # where transformers 4 looks for it
        parameters = {"rope_type": rope_type, "rope_theta": base, "factor": factor, **extra}
        setattr(config, "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling", parameters)
        theirs, scaling_factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=length)
        ours = schedule.at(geometry, length=length)
        # transformers rounds to float32 at every step: base ** x with an exponent near 1 loses about 20 ulp.
        assert relative_error(ours.inv_freq, theirs.double()) < 2e-6, rope_type
        assert ours.amplitude == pytest.approx(scaling_factor, rel=1e-12), rope_type


# --- names, options, targets ------------------------------------------------------------------------------------------


def test_registry() -> None:
    assert list(ropex.methods()) == ["none", "linear", "ntk", "dynamic_ntk", "yarn"]
    assert ropex.schedule("pi", factor=2) == ropex.schedule("linear", factor=2)
    ropex.methods().clear()
    assert ropex.methods(), "callers get a copy"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("yarnn", {}, r'method=\'yarnn\': must be one of none, linear, .*; did you mean "yarn"\?'),
        ("YaRN", {}, r'method=\'YaRN\': .*did you mean "yarn"\?'),
        ("dynamic", {}, r'did you mean "dynamic_ntk"\?'),
        ("zzz", {}, r"method='zzz': must be one of none, .*; pass one of them"),
        (None, {}, r"method=None: must be one of"),
        ("yarn", {}, r'method "yarn" without factor: it needs factor; pass factor='),
        ("none", {"factor": 2}, r'option factor=2: method "none" accepts no options; remove it'),
        ("yarn", {"factor": 2, "beta_fst": 1}, r'option beta_fst=1: method "yarn" accepts factor, .*"beta_fast"\?'),
        ("linear", {"factor": 2, "length": 10}, r'option length=10: method "linear" accepts factor; remove it'),
        *[
            (
                name,
                {"factor": value},
                rf"factor={re.escape(repr(value))}: must be a finite number >= 1; pass target length",
            )
            for name in ("linear", "ntk", "dynamic_ntk", "yarn")
            for value in (0.5, 0, -2, float("nan"), float("inf"), "8", None, True, (2,))
        ],
        ("ntk", {"factor": 2, "alpha": 0.9}, r"alpha=0\.9: must be a finite number >= 1"),
        ("dynamic_ntk", {"floor": 0}, r"floor=0: must be an int >= 1; pass a length in tokens"),
        ("dynamic_ntk", {"floor": 10.0}, r"floor=10\.0: must be an int >= 1"),
        ("yarn", {"factor": 2, "beta_fast": 1, "beta_slow": 1}, r"beta_fast=1, beta_slow=1: beta_fast must be the la"),
        ("yarn", {"factor": 2, "beta_fast": -1}, r"beta_fast=-1: must be a finite number > 0"),
        ("yarn", {"factor": 2, "beta_slow": 0}, r"beta_slow=0: must be a finite number > 0"),
        ("yarn", {"factor": 2, "ramp": "linear"}, r'ramp=\'linear\': must be one of "index", "rotations"'),
        ("yarn", {"factor": 2, "blend": 1}, r'blend=1: must be one of "frequency", "wavelength"'),
        ("yarn", {"factor": 2, "truncate": 1}, r"truncate=1: must be True or False"),
        ("yarn", {"factor": 2, "amplitude": 0}, r"amplitude=0: must be a finite number > 0"),
        ("yarn", {"factor": 2, "mscale": 1}, r"mscale=1, mscale_all_dim=None: one has no effect without the other"),
        (
            "yarn",
            {"factor": 2, "mscale": 1, "mscale_all_dim": 1, "amplitude": 1},
            r"amplitude=1 with mscale=1: amplitude replaces what mscale computes",
        ),
    ],
)
def test_bad_options(name: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ropex.schedule(name, **options)


@pytest.mark.parametrize(
    ("method", "target", "want"),
    [
        ("yarn", {"factor": 8}, ropex.schedule("yarn", factor=8)),
        ("yarn", {"length": 16384}, ropex.schedule("yarn", factor=8.0)),
        ("yarn", {"factor": 8, "length": 16384}, ropex.schedule("yarn", factor=8)),
        ("yarn", {"factor": 1.1, "length": round(1.1 * 2048)}, ropex.schedule("yarn", factor=1.1)),
        ("dynamic_ntk", {"length": 16384}, ropex.schedule("dynamic_ntk", floor=16384)),
        ("dynamic_ntk", {"length": 16384, "factor": 4}, ropex.schedule("dynamic_ntk", factor=4, floor=16384)),
        ("dynamic_ntk", {}, ropex.schedule("dynamic_ntk", factor=2.0)),
        ("none", {}, ropex.schedule("none")),
        (ropex.schedule("ntk", factor=2), {}, ropex.schedule("ntk", factor=2)),
    ],
)
def test_targets(method: Any, target: dict[str, Any], want: ropex.FrequencySchedule) -> None:
    assert scaling.schedule_for(method, 2048, **target) == want


@pytest.mark.parametrize(
    ("method", "target", "message"),
    [
        ("yarn", {"factor": 4, "length": 16384}, r"length=16384 and factor=4 disagree: .* means factor=8\.0; pass one"),
        ("yarn", {"factor": float("nan"), "length": 16384}, r"factor=nan: must be a finite number >= 1"),
        ("dynamic_ntk", {"floor": 4096, "length": 16384}, r"length=16384 and floor=4096 disagree"),
        ("none", {"factor": 4}, r'factor=4: method "none" has no target length; leave factor out'),
        ("none", {"length": 4096}, r'length=4096: method "none" has no target length; leave length out'),
        ("yarn", {"length": 1024}, r'length=1024: must be an int >= .* 2048 tokens; .*method="none"'),
        ("yarn", {"length": 4096.0}, r"length=4096\.0: must be an int"),
        ("yarn", {}, r'method "yarn" without factor: .* takes length='),
        (ropex.schedule("none"), {"factor": 2}, r"factor=2 with the schedule Unscaled\(\): it has its own options"),
        (ropex.schedule("none"), {"beta_fast": 2}, r"beta_fast=2 with the schedule Unscaled\(\)"),
    ],
)
def test_bad_targets(method: Any, target: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaling.schedule_for(method, 2048, **target)


@pytest.mark.parametrize("data", [None, {}, {"method": "yarn"}, {"method": "yarn", "options": {}, "extra": 1}])
def test_from_dict_refuses_anything_else(data: Any) -> None:
    with pytest.raises(ValueError, match=r": must be a dict with method and options alone; pass what to_dict"):
        scaling.from_dict(data)


@pytest.mark.parametrize("length", [0, -3, 2.5, None])
def test_at_needs_a_length_in_tokens(length: Any) -> None:
    with pytest.raises(ValueError, match=r"length=.*: must be an int >= 1; pass a context length in tokens"):
        ropex.schedule("none").at(GEOMETRIES[0], length=length)


def test_target_lengths() -> None:
    lengths = {repr(schedule): schedule.target_length(2048) for schedule in ROSTER}
    assert set(lengths.values()) == {2048, 6144, 8192, 5000}
    assert all(isinstance(length, int) for length in lengths.values())
    assert ropex.schedule("yarn", factor=1.0005).target_length(2048) == 2049
