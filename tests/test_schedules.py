"""Every schedule of the roster against every law."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ropex
from ropex import scaling
from ropex.scaling.base import Wrapper, innermost
from tests.oracles import GEOMETRIES, ROSTER, fitted, training_request

LENGTH = 3000
roster = pytest.mark.parametrize("schedule", ROSTER, ids=repr)
drawing = pytest.mark.parametrize("schedule", [s for s in ROSTER if s.augments], ids=repr)
geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"d{g.dim}-b{g.base:g}-L{g.trained_length}")


def at_the_last_token(rotation: ropex.Rotation) -> Tensor:
    return rotation.inv_freq.flatten(0, -2)[-1] if rotation.inv_freq.dim() > 1 else rotation.inv_freq


def same(one: ropex.Rotation, other: ropex.Rotation) -> bool:
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other, strict=True))


def test_the_roster_covers_every_method() -> None:
    assert {schedule.method for schedule in ROSTER} == set(ropex.methods())


@roster
@geometries
def test_the_rotation_is_finite_float64_and_broadcasts(schedule: ropex.FrequencySchedule, geometry: Any) -> None:
    schedule = fitted(schedule, geometry)
    positions, inv_freq, amplitude = schedule.at(geometry, length=LENGTH)
    assert positions.dtype == torch.int64
    assert torch.equal(positions, torch.arange(LENGTH)[None])
    assert inv_freq.dtype == torch.float64
    assert (positions[..., None] * inv_freq).shape == (1, LENGTH, geometry.dim // 2)
    assert bool(inv_freq.isfinite().all())
    assert bool((inv_freq >= 0).all())
    if not schedule.learned:
        rounding = 6.5 / 6 - 1 if "Resonance" in repr(schedule) else 0  # the shortest wavelength is 6.28 tokens
        assert bool((inv_freq <= geometry.inv_freq() * (1 + rounding + 1e-12)).all()), "extension never speeds up"
    assert math.isfinite(amplitude)
    assert amplitude >= 1


@roster
@geometries
def test_a_training_rotation_is_finite_float64_and_broadcasts(schedule: Any, geometry: Any) -> None:
    schedule = fitted(schedule, geometry)
    for tokens in (1, 2, 3, 40, geometry.trained_length + 9):
        positions, inv_freq, amplitude = schedule.rotation(training_request(geometry, tokens))
        assert positions.dtype == torch.int64
        assert positions.shape == (3, tokens)
        assert bool((positions >= 0).all())
        assert bool((positions.diff() > 0).all()) or "steps" in repr(schedule), "the order stays"
        assert inv_freq.dtype == torch.float64
        assert (positions[..., None] * inv_freq).shape == (3, tokens, geometry.dim // 2)
        assert bool(inv_freq.isfinite().all())
        assert bool(torch.as_tensor(amplitude).isfinite().all())


@roster
def test_per_row_lengths_give_each_row_its_own_frequencies(schedule: ropex.FrequencySchedule) -> None:
    geometry = GEOMETRIES[0]
    schedule = fitted(schedule, geometry)
    lengths = torch.tensor([100, 2048, 9000])
    request = ropex.Request(geometry, torch.arange(4).expand(3, 4), lengths)
    positions, inv_freq, amplitude = schedule.rotation(request)
    together = inv_freq.expand(3, 4, 64)
    for row, length in enumerate(lengths.tolist()):
        alone = schedule.rotation(ropex.Request(geometry, positions[row : row + 1], torch.tensor(length)))
        torch.testing.assert_close(together[row], alone.inv_freq.expand(1, 4, 64)[0], rtol=1e-15, atol=0)
        assert torch.as_tensor(amplitude, dtype=torch.float64).expand(3, 1, 1)[row].item() == alone.amplitude


@roster
@geometries
def test_only_length_dependent_schedules_depend_on_the_length(schedule: Any, geometry: Any) -> None:
    schedule = fitted(schedule, geometry)
    short, long = (
        at_the_last_token(schedule.at(geometry, length=n)) for n in (10, max(20 * geometry.trained_length, 6000))
    )
    # One pair alone has nothing to stretch: the first pair never changes under NTK.
    if geometry.dim > 2:
        assert torch.equal(short, long) is not schedule.length_dependent
    else:
        assert torch.equal(short, long) or schedule.length_dependent


@pytest.mark.parametrize("method", ["dynamic_ntk", "dynamic_yarn", "e2llm", "clex", "longrope"])
@geometries
def test_up_to_the_trained_length_nothing_changes(method: str, geometry: Any) -> None:
    options = {"factor": 4, "amplitude": 1.0} if method == "longrope" else {}
    schedule = fitted(ropex.schedule(method, **options), geometry)
    for length in (1, geometry.trained_length - 1, geometry.trained_length):
        rotation = schedule.at(geometry, length=length)
        assert torch.equal(rotation.inv_freq, geometry.inv_freq())
        assert rotation.amplitude == 1
    beyond = schedule.at(geometry, length=geometry.trained_length + 1)
    assert geometry.dim == 2 or not torch.equal(beyond.inv_freq, geometry.inv_freq())


@pytest.mark.parametrize(
    "method", ["linear", "ntk", "abf", "ntk_by_parts", "yarn", "llama3", "longrope", "e2llm", "clex"]
)
@geometries
def test_factor_one_is_the_identity(method: str, geometry: Any) -> None:
    _, inv_freq, amplitude = fitted(ropex.schedule(method, factor=1), geometry).at(geometry, length=10)
    assert torch.equal(inv_freq, geometry.inv_freq())
    assert amplitude == 1


@roster
def test_a_rotation_does_not_depend_on_earlier_ones(schedule: ropex.FrequencySchedule) -> None:
    geometry = GEOMETRIES[0]
    schedule = fitted(schedule, geometry)
    first, trained = schedule.at(geometry, length=100), schedule.rotation(training_request(geometry))
    schedule.at(geometry, length=100_000)
    schedule.rotation(training_request(geometry, tokens=90))
    assert same(schedule.at(geometry, length=100), first)
    assert same(schedule.rotation(training_request(geometry)), trained)


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
        assert type(twin) is type(schedule)
        assert repr(twin) == repr(schedule)
        assert twin.to_dict() == schedule.to_dict()
        for trait in ("length_dependent", "learned", "training_free", "augments"):
            assert getattr(twin, trait) == getattr(schedule, trait)
        # A learned one is its weights, too: it equals itself alone.
        assert (twin == schedule) is not schedule.learned
        assert (hash(twin) == hash(schedule)) is not schedule.learned
    assert schedule == schedule
    assert len(set(ROSTER)) == len(ROSTER)


@roster
def test_traits_are_declared(schedule: ropex.FrequencySchedule) -> None:
    assert type(schedule).paper
    assert schedule.learned is (schedule.method == "clex" or "CLEX" in repr(schedule))
    for trait in ("length_dependent", "learned", "training_free", "augments"):
        assert isinstance(getattr(schedule, trait), bool)
        if not isinstance(schedule, Wrapper) and trait != "length_dependent":
            assert getattr(schedule, trait) is getattr(type(schedule), trait)


def parameters(schedule: ropex.FrequencySchedule) -> list[Tensor]:
    return list(net.parameters()) if isinstance(net := innermost(schedule), nn.Module) else []


@pytest.mark.parametrize("schedule", [s for s in ROSTER if s.learned], ids=repr)
def test_learned_schedules_keep_their_weights_in_a_copy_and_in_the_state_dict(schedule: Any) -> None:
    geometry = GEOMETRIES[0]
    schedule = fitted(schedule, geometry)
    want = schedule.at(geometry, length=9000)
    for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert same(twin.at(geometry, length=9000), want)
        assert all(a is not b for a, b in zip(parameters(twin), parameters(schedule), strict=True))
    fresh = scaling.from_dict(schedule.to_dict())
    assert not same(fresh.at(geometry, length=9000), want)
    innermost(fresh).load_state_dict(innermost(schedule).state_dict())
    assert same(fresh.at(geometry, length=9000), want)


def frequencies(rotation: ropex.Rotation) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(part) for part in rotation)


@pytest.mark.parametrize(
    ("schedule", "training"), [(s, mode) for s in ROSTER for mode in (False, True) if s.augments or not mode], ids=repr
)
def test_rotation_compiles_without_a_graph_break(schedule: ropex.FrequencySchedule, training: bool) -> None:
    geometry = GEOMETRIES[0]
    schedule = fitted(schedule, geometry)

    def ask(positions: Tensor, length: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        return frequencies(schedule.rotation(ropex.Request(geometry, positions, length, training, key)))

    torch.compiler.reset()  # one function compiled for every schedule would meet the recompile limit
    compiled = torch.compile(ask, fullgraph=True, backend="aot_eager")
    for length in (100, 5000):
        arguments = (torch.arange(8).expand(2, 8), torch.tensor(length), torch.tensor([length, 3]))
        for got, want in zip(compiled(*arguments), ask(*arguments), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-15, atol=0)


@roster
def test_rotation_reads_no_tensor_value(schedule: ropex.FrequencySchedule) -> None:
    """On the meta device there is no value to read: `.item()` and branches on data raise."""
    geometry = GEOMETRIES[0]
    with torch.device("meta"):
        schedule = schedule.for_geometry(geometry)
    assert schedule.at(geometry, length=9000, device="meta").inv_freq.is_meta
    request = training_request(geometry)
    moved = {name: getattr(request, name).to("meta") for name in ("positions", "length", "key")}
    rotation = schedule.rotation(ropex.Request(geometry, training=True, **moved))
    assert rotation.inv_freq.is_meta
    assert rotation.positions.is_meta


# --- what is drawn in training ----------------------------------------------------------------------------------------


@drawing
def test_draws_depend_on_the_key_alone(schedule: ropex.FrequencySchedule) -> None:
    geometry = GEOMETRIES[0]
    schedule = fitted(schedule, geometry)
    request = training_request(geometry, tokens=64, batch=6)
    assert request.key is not None
    together = schedule.rotation(request)
    assert len({tuple(row) for row in together.positions.tolist()}) > 1, "per sample"
    other = schedule.rotation(training_request(geometry, tokens=64, batch=6, key=request.key + 1))
    assert not torch.equal(other.positions, together.positions)
    if schedule.learned:
        return  # one t per pass, of the first key
    alone = schedule.rotation(
        training_request(geometry, tokens=64, batch=1, key=request.key[2:3], length=request.length[2:3])
    )
    assert torch.equal(alone.positions[0], together.positions[2])
    assert torch.equal(alone.inv_freq.flatten(), together.inv_freq.expand(6, 1, 64)[2, 0])


@drawing
def test_a_training_request_without_keys_is_an_error(schedule: ropex.FrequencySchedule) -> None:
    request = training_request(GEOMETRIES[0], key=None)
    with pytest.raises(
        ValueError, match=r'key=None in a training request to ".*", which draws: must be int64 \[batch\]'
    ):
        schedule.rotation(request)


@pytest.mark.parametrize("length", [0, -3, 2.5, None])
def test_at_needs_a_length_in_tokens(length: Any) -> None:
    with pytest.raises(ValueError, match=r"length=.*: must be an int >= 1; pass a context length in tokens"):
        ropex.schedule("none").at(GEOMETRIES[0], length=length)


def test_target_lengths() -> None:
    lengths = {repr(schedule): schedule.target_length(2048) for schedule in ROSTER}
    assert set(lengths.values()) == {2048, 6144, 8192, 5000, 5120, 20 * 2048}
    assert all(isinstance(length, int) for length in lengths.values())
    assert ropex.schedule("yarn", factor=1.0005).target_length(2048) == 2049
