"""Schedules by name: options, targets, dictionaries, and an error for everything else."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import ropex
from ropex import scaling
from ropex.scaling.registry import accepted_options
from tests.oracles import ROSTER

NAN, INF = float("nan"), float("inf")


def test_registry() -> None:
    assert list(ropex.methods()) == [
        *("none", "linear", "ntk", "dynamic_ntk", "abf", "ntk_by_parts", "yarn", "dynamic_yarn", "llama3", "longrope"),
        *("truncated", "power", "drope", "proportional", "resonance", "clex", "e2llm", "pose", "random_positions"),
    ]
    assert ropex.schedule("pi", factor=2) == ropex.schedule("linear", factor=2)
    ropex.methods().clear()
    assert ropex.methods(), "callers get a copy"


def test_wrappers_make_their_inner_schedule() -> None:
    schedule, yarn = ropex.schedule, ropex.schedule("yarn", factor=8)
    assert schedule("resonance", factor=8) == scaling.Resonance(yarn) == schedule("resonance", inner=yarn)
    assert schedule("resonance", inner="ntk", factor=8) == scaling.Resonance(schedule("ntk", factor=8))
    assert schedule("pose", factor=8) == scaling.PoSE(schedule("linear", factor=8))
    assert schedule("random_positions", factor=8) == scaling.RandomPositions(schedule("linear", factor=8))
    assert schedule("pose", inner="resonance", factor=8, beta_fast=16.0) == scaling.PoSE(
        scaling.Resonance(schedule("yarn", factor=8, beta_fast=16.0))
    )
    # Where the inner schedule takes no factor, the wrapper does.
    assert schedule("pose", inner="drope", factor=8) == scaling.PoSE(schedule("drope"), factor=8)
    assert schedule("pose", inner=yarn, factor=2) == scaling.PoSE(yarn, factor=2)
    assert accepted_options("pose", "drope") == ["inner", "factor"]
    assert accepted_options("resonance", "pi") == ["inner", "factor"]


FACTOR = r"must be a finite number >= 1; pass target length / trained length"
BAD_OPTIONS = [
    ("yarnn", {}, r'method=\'yarnn\': must be one of none, linear, .*; did you mean "yarn"\?'),
    ("YaRN", {}, r'method=\'YaRN\': .*did you mean "yarn"\?'),
    ("dynamic", {}, r'did you mean "dynamic_ntk"\?'),
    ("longrop", {}, r'did you mean "longrope"\?'),
    ("e2-llm", {}, r'did you mean "e2llm"\?'),
    ("zzz", {}, r"method='zzz': must be one of none, .*; pass one of them"),
    (None, {}, r"method=None: must be one of"),
    ("yarn", {}, r'method "yarn" without factor: it needs factor; pass factor='),
    ("none", {"factor": 2}, r'option factor=2: method "none" accepts no options; remove it'),
    ("drope", {"factor": 2}, r'option factor=2: method "drope" accepts no options; remove it'),
    ("proportional", {"factor": 2}, r'option factor=2: method "proportional" accepts fraction; '),
    (
        "dynamic_yarn",
        {"factor": 2},
        r'"dynamic_yarn" accepts floor, .*; pass floor=, or length= to ropex\.patch',
    ),
    ("yarn", {"factor": 2, "beta_fst": 1}, r'option beta_fst=1: method "yarn" accepts factor, .*"beta_fast"\?'),
    (
        "linear",
        {"factor": 2, "length": 10},
        r"option length=10: .* accepts factor; ropex\.patch takes length= in tokens",
    ),
    ("resonance", {"factr": 2}, r'option factr=2: method "resonance" accepts inner, factor, beta_fast.*"factor"\?'),
    *[
        (name, {"factor": value}, rf"factor={re.escape(repr(value))}: {FACTOR}")
        for name in ("linear", "ntk", "dynamic_ntk", "yarn", "ntk_by_parts", "llama3", "longrope", "truncated", "power")
        for value in (0.5, -2, NAN, INF, "8", None, True)
    ],
    *[(name, {"factor": 0.5}, rf"factor=0\.5: {FACTOR}") for name in ("abf", "e2llm", "pose", "resonance")],
    ("e2llm", {"factor": "Auto"}, rf"factor='Auto': {FACTOR}"),
    ("ntk", {"factor": 2, "alpha": 0.9}, r"alpha=0\.9: must be a finite number >= 1"),
    ("abf", {}, r'method "abf" without base and factor: it needs one of them; pass base=, such as 500000'),
    ("abf", {"base": -1e4}, r"base=-10000\.0: must be a finite number > 1; pass the new base, such as 500000"),
    ("abf", {"base": NAN}, r"base=nan: must be a finite number > 1"),
    ("dynamic_ntk", {"floor": 0}, r"floor=0: must be an int >= 1; pass a length in tokens"),
    ("dynamic_ntk", {"floor": 10.0}, r"floor=10\.0: must be an int >= 1"),
    ("dynamic_yarn", {"floor": -5}, r"floor=-5: must be an int >= 1; pass a length in tokens"),
    *[
        (name, {**factor, **options}, message)
        for name, factor in (("yarn", {"factor": 2}), ("ntk_by_parts", {"factor": 2}), ("dynamic_yarn", {}))
        for options, message in (
            (
                {"beta_fast": 1, "beta_slow": 2},
                r"beta_fast=1, beta_slow=2: beta_fast must not be the smaller.*swap them",
            ),
            ({"beta_fast": 1, "beta_slow": 32}, r"beta_fast=1, beta_slow=32: beta_fast must not be the smaller"),
            ({"beta_fast": -1}, r"beta_fast=-1: must be a finite number > 0"),
            ({"beta_slow": 0}, r"beta_slow=0: must be a finite number > 0"),
            ({"ramp": "linear"}, r'ramp=\'linear\': must be one of "index", "rotations"'),
            ({"blend": 1}, r'blend=1: must be one of "frequency", "wavelength"'),
            ({"truncate": 1}, r"truncate=1: must be True or False"),
        )
    ],
    ("ntk_by_parts", {"factor": 2, "variant": "v3"}, r'variant=\'v3\': must be one of "v1", "v2"'),
    ("ntk_by_parts", {"factor": 2, "variant": "v1", "beta_fast": 16}, r'variant="v1" has fixed ramps; leave out all'),
    ("yarn", {"factor": 2, "amplitude": 0}, r"amplitude=0: must be a finite number > 0"),
    ("yarn", {"factor": 2, "mscale": 1}, r"mscale=1, mscale_all_dim=None: one has no effect without the other"),
    (
        "yarn",
        {"factor": 2, "mscale": 1, "mscale_all_dim": 1, "amplitude": 1},
        r"amplitude=1 with mscale=1: amplitude re",
    ),
    ("llama3", {"factor": 2, "low_freq_factor": 5}, r"low_freq_factor=5, high_freq_factor=4\.0: high_freq_factor must"),
    ("llama3", {"factor": 2, "low_freq_factor": 0}, r"low_freq_factor=0: must be a finite number > 0"),
    ("longrope", {"factor": 2, "long_factors": 3}, r"long_factors=3: must be a list of dim // 2 numbers, or None"),
    ("longrope", {"factor": 2, "long_factors": "1,2"}, r"long_factors='1,2': must be a list of dim // 2 numbers"),
    ("longrope", {"factor": 2, "long_factors": []}, r"long_factors=\[\]: must be a list of dim // 2 numbers"),
    ("linear", {"factor": 10**400}, r"factor=1000.*: must be a finite number >= 1; pass target"),
    ("longrope", {"factor": 2, "short_factors": [1, 0]}, r"short_factors\[1\]=0: must be a finite number > 0"),
    ("longrope", {"factor": 2, "long_factors": [NAN]}, r"long_factors\[0\]=nan: must be a finite number > 0"),
    ("longrope", {"factor": 2, "keep_first": -1}, r"keep_first=-1: must be an int >= 0; pass a number of tokens"),
    ("longrope", {"factor": 2, "amplitude": -1}, r"amplitude=-1: must be a finite number > 0; pass a number, or None"),
    ("truncated", {"exponent": -0.1}, r"exponent=-0\.1: must be a finite number >= 0; .* 0 for no power step"),
    ("truncated", {"cutoff_length": 0}, r"cutoff_length=0: must be an int >= 1"),
    ("power", {"exponent": 0}, r"exponent=0: must be a finite number > 0; pass an exponent, such as 0\.5"),
    ("proportional", {"fraction": 1.5}, r"fraction=1\.5: must be a finite number >= 0 and <= 1; pass a share"),
    ("proportional", {"fraction": -0.5}, r"fraction=-0\.5: must be a finite number >= 0 and <= 1"),
    ("resonance", {"inner": 3}, r"inner=3: must be a method's name or a schedule; pass inner=\"yarn\""),
    ("resonance", {"inner": scaling.YaRN, "factor": 2}, r"inner=.*: must be a method's name or a schedule"),
    ("resonance", {"inner": "yarm", "factor": 2}, r'inner=\'yarm\': .*did you mean "yarn"\?'),
    ("resonance", {}, r'method "yarn" without factor: it needs factor'),
    (
        "pose",
        {"factor": 4, "inner": "ntk", "beta_fast": 3},
        r'option beta_fast=3: method "pose" accepts inner, factor, alpha',
    ),
    ("random_positions", {"factor": 4, "variant": "x"}, r'variant=\'x\': must be one of "subset", "steps"'),
    ("clex", {"max_factor": 1}, r"max_factor=1: must be an int >= 2; pass the largest factor to train for"),
    ("clex", {"max_factor": 2.5}, r"max_factor=2\.5: must be an int >= 2"),
    ("clex", {"factor": 17}, r"factor=17: must be a finite number >= 1 and <= 16; .* pass a larger max_factor="),
    ("clex", {"factor": 0.5}, r"factor=0\.5: must be a finite number >= 1 and <= 16"),
    ("clex", {"dim": 63}, r"dim=63: must be even"),
    ("clex", {"dim": 0}, r"dim=0: must be an int >= 2"),
    ("clex", {"step": 1e-9}, r"step=1e-09: must be a finite number >= 0\.001; pass the solver's step"),
    ("clex", {"width": 0}, r"width=0: must be an int >= 1"),
    ("clex", {"activation": "relu"}, r'activation=\'relu\': must be one of "tanh", "silu"'),
    ("clex", {"net_base": 1}, r"net_base=1: must be a finite number > 1"),
    ("e2llm", {"g_max": 0}, r"g_max=0: must be an int >= 1; pass the largest factor to train for"),
    ("e2llm", {"keep_first": 2.0}, r"keep_first=2\.0: must be an int >= 0"),
]


def test_there_are_enough_bad_options() -> None:
    assert len(BAD_OPTIONS) >= 60


@pytest.mark.parametrize(("name", "options", "message"), BAD_OPTIONS)
def test_bad_options(name: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ropex.schedule(name, **options)


@pytest.mark.parametrize("cls", [scaling.Resonance, scaling.PoSE, scaling.RandomPositions])
def test_a_wrapper_wraps_a_schedule(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"inner='yarn': must be a FrequencySchedule; pass ropex\.schedule\("):
        cls("yarn")


@pytest.mark.parametrize(
    "inner", [ropex.schedule(method, factor=2) for method in ("pose", "random_positions")], ids=repr
)
@pytest.mark.parametrize("method", ["resonance", "pose", "random_positions"])
def test_what_moves_positions_stands_outside(method: str, inner: ropex.FrequencySchedule) -> None:
    turned = rf'turn it round, as in ropex\.schedule\("{inner.method}", inner="resonance"'
    message = "inner=.*: must not move the positions; " + (turned if method == "resonance" else "leave one of the two")
    for options in ({"inner": inner}, {"inner": inner.method, "factor": 4}):
        with pytest.raises(ValueError, match=message):
            ropex.schedule(method, **options)


@pytest.mark.parametrize(
    "inner",
    [
        *("none", "drope", "proportional", "dynamic_yarn", "power", "truncated"),
        ropex.schedule("abf", base=1e6),
        ropex.schedule("resonance", inner="dynamic_yarn"),
    ],
)
@pytest.mark.parametrize("method", ["pose", "random_positions"])
def test_an_augmentation_needs_a_target(method: str, inner: Any) -> None:
    with pytest.raises(ValueError, match=r"factor=None around .*, which names no target: .*; pass factor="):
        ropex.schedule(method, inner=inner)


def test_an_augmentation_takes_a_factor_that_was_named() -> None:
    for schedule in (ropex.schedule("pose", factor=1), ropex.schedule("pose", factor=1.4)):
        assert schedule.target_length(1000) in (1000, 1400)


def test_a_learned_schedule_fits_one_rotary_dimension() -> None:
    schedule, geometry = ropex.schedule("clex", dim=64), ropex.Geometry(128, 1e4, 2048)
    for ask in (lambda: schedule.at(geometry, length=1), lambda: ropex.RotaryEmbedding(geometry, schedule)):
        with pytest.raises(
            ValueError, match=r"dim=64: must be the rotary dimension of Geometry\(dim=128.*leave dim out"
        ):
            ask()


@pytest.mark.parametrize(
    ("method", "target", "want"),
    [
        ("yarn", {"factor": 8}, ropex.schedule("yarn", factor=8)),
        ("yarn", {"length": 16384}, ropex.schedule("yarn", factor=8.0)),
        ("yarn", {"factor": 8, "length": 16384}, ropex.schedule("yarn", factor=8)),
        ("yarn", {"factor": 1.1, "length": round(1.1 * 2048)}, ropex.schedule("yarn", factor=1.1)),
        ("abf", {"base": 5e5, "length": 16384}, ropex.schedule("abf", base=5e5, factor=8.0)),
        ("dynamic_ntk", {"length": 16384}, ropex.schedule("dynamic_ntk", floor=16384)),
        ("dynamic_ntk", {"length": 16384, "factor": 4}, ropex.schedule("dynamic_ntk", factor=4, floor=16384)),
        ("dynamic_ntk", {}, ropex.schedule("dynamic_ntk", factor=2.0)),
        ("dynamic_yarn", {"length": 16384}, ropex.schedule("dynamic_yarn", floor=16384)),
        ("dynamic_yarn", {}, ropex.schedule("dynamic_yarn")),
        ("truncated", {}, ropex.schedule("truncated", factor=1.0)),
        ("truncated", {"length": 16384}, ropex.schedule("truncated", factor=8.0)),
        ("power", {"length": 16384}, ropex.schedule("power", factor=8.0)),
        ("e2llm", {}, ropex.schedule("e2llm", factor="auto")),
        ("e2llm", {"factor": "auto"}, ropex.schedule("e2llm")),
        ("e2llm", {"length": 16384}, ropex.schedule("e2llm", factor=8.0)),
        ("pose", {"length": 16384}, ropex.schedule("pose", factor=8.0)),
        ("pose", {"length": 16384, "inner": "none"}, scaling.PoSE(ropex.schedule("none"), factor=8.0)),
        ("pose", {"length": 16384, "inner": "dynamic_ntk"}, ropex.schedule("pose", inner="dynamic_ntk", floor=16384)),
        ("resonance", {"length": 16384}, ropex.schedule("resonance", factor=8.0)),
        ("resonance", {"length": 16384, "inner": "dynamic_ntk"}, scaling.Resonance(scaling.DynamicNTK(floor=16384))),
        ("none", {}, ropex.schedule("none")),
        ("drope", {}, ropex.schedule("drope")),
        (ropex.schedule("ntk", factor=2), {}, ropex.schedule("ntk", factor=2)),
    ],
)
def test_targets(method: Any, target: dict[str, Any], want: ropex.FrequencySchedule) -> None:
    assert scaling.schedule_for(method, 2048, **target) == want


def test_the_target_of_clex_fixes_t() -> None:
    assert scaling.schedule_for("clex", 2048, length=16384).to_dict() == ropex.schedule("clex", factor=8.0).to_dict()
    assert ropex.schedule("clex").target_length(2048) == 16 * 2048


@pytest.mark.parametrize(
    ("method", "target", "message"),
    [
        ("yarn", {"factor": 4, "length": 16384}, r"length=16384 and factor=4 disagree: .* means factor=8\.0; pass one"),
        ("yarn", {"factor": NAN, "length": 16384}, r"factor=nan: must be a finite number >= 1"),
        ("e2llm", {"factor": "auto", "length": 16384}, r"length=16384 and factor='auto' disagree"),
        ("dynamic_ntk", {"floor": 4096, "length": 16384}, r"length=16384 and floor=4096 disagree"),
        *[
            (method, {option: 4096}, rf'{option}=4096: method "{method}" has no target length; leave {option} out')
            for method in ("none", "drope", "proportional")
            for option in ("factor", "length")
        ],
        ("resonance", {"inner": "drope", "factor": 4}, r'factor=4: method "resonance" has no target length'),
        (
            "resonance",
            {"inner": ropex.schedule("ntk", factor=2), "length": 4096},
            r"length=4096 with the inner sched.*; leave length out",
        ),
        ("clex", {"length": 65536}, r"factor=32\.0: must be a finite number >= 1 and <= 16"),
        ("yarn", {"length": 1024}, r'length=1024: must be an int >= .* 2048 tokens; .*method="none"'),
        ("yarn", {"length": 4096.0}, r"length=4096\.0: must be an int >= 1; pass the target length in tokens"),
        ("yarn", {}, r'method "yarn" without factor: .* takes length='),
        (ropex.schedule("none"), {"factor": 2}, r"factor=2 with the schedule Unscaled\(\): it has its own options"),
        (ropex.schedule("none"), {"beta_fast": 2}, r"beta_fast=2 with the schedule Unscaled\(\)"),
    ],
)
def test_bad_targets(method: Any, target: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaling.schedule_for(method, 2048, **target)


def test_a_dictionary_names_method_options_and_inner() -> None:
    assert ropex.schedule("pi", factor=4).to_dict() == {"method": "linear", "options": {"factor": 4}}
    assert ropex.schedule("pose", factor=4).to_dict() == {
        "method": "pose",
        "options": {"factor": None},
        "inner": {"method": "linear", "options": {"factor": 4}},
    }
    clex = ropex.schedule("clex", dim=64).to_dict()
    assert clex["options"]["dim"] == 64
    assert not any(isinstance(value, torch.Tensor) for value in clex["options"].values())


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"method": "yarn"},
        {"method": "yarn", "options": {}, "extra": 1},
        {"method": "none", "options": None},
        {"method": "linear", "options": [2]},
        {"method": "linear", "options": {1: 2}},
        {"method": "pose", "options": {"inner": "linear"}, "inner": {"method": "none", "options": {}}},
    ],
)
def test_from_dict_refuses_anything_else(data: Any) -> None:
    with pytest.raises(ValueError, match=r": must be a dict with method and options \(a dict\), and inner for a wr"):
        scaling.from_dict(data)


def test_from_dict_wants_inner_for_wrappers_alone() -> None:
    linear = ropex.schedule("linear", factor=2).to_dict()
    with pytest.raises(ValueError, match=r'method "linear" wraps no other; remove inner'):
        scaling.from_dict({**linear, "inner": linear})
    with pytest.raises(ValueError, match=r'method "pose" wraps another schedule; add inner'):
        scaling.from_dict({"method": "pose", "options": {}})


def test_every_roster_line_is_reached_by_its_name() -> None:
    for schedule in ROSTER:
        assert ropex.methods()[schedule.method] is type(schedule)
