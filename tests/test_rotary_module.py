"""`ropex.RotaryEmbedding`, for people who own their model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import ropex
from tests.oracles import GEOMETRIES, ROSTER, fitted

GEOMETRY = GEOMETRIES[0]


@pytest.mark.parametrize("schedule", ROSTER, ids=repr)
def test_it_asks_the_schedule(schedule: ropex.FrequencySchedule) -> None:
    schedule = fitted(schedule, GEOMETRY)
    rope = ropex.RotaryEmbedding(GEOMETRY, schedule).eval()
    got, want = rope(torch.arange(5000)[None]), schedule.at(GEOMETRY, length=5000)
    assert torch.equal(got.positions, want.positions)
    assert torch.equal(got.inv_freq.flatten(), want.inv_freq.flatten())
    assert got.amplitude == want.amplitude
    assert rope(torch.arange(5, dtype=torch.int32)[None]).positions.dtype == torch.int64


@pytest.mark.parametrize("schedule", ROSTER, ids=repr)
def test_life_of_a_module(schedule: ropex.FrequencySchedule) -> None:
    rope = ropex.RotaryEmbedding(GEOMETRY, schedule).eval()
    positions = torch.arange(5000)[None]
    want = rope(positions).inv_freq
    assert len(rope.state_dict()) == 2 * schedule.learned + schedule.augments
    assert len(list(rope.parameters())) == 2 * schedule.learned
    outer = nn.Sequential(nn.Linear(2, 2), rope)
    changed = [
        copy.deepcopy(rope),
        pickle.loads(pickle.dumps(rope)),
        outer.to(torch.bfloat16)[1],
        outer.half()[1],
    ]
    if not schedule.learned:  # `to_empty` leaves parameters unset
        changed.append(outer.to("meta").to_empty(device="cpu")[1])
    for module in changed:
        assert torch.equal(module(positions).inv_freq, want)
        assert module(positions).inv_freq.dtype == torch.float64


def test_rows_have_their_own_length_unless_pinned() -> None:
    schedule = ropex.schedule("dynamic_ntk", factor=2)
    rope = ropex.RotaryEmbedding(GEOMETRY, schedule)
    positions = torch.stack((torch.arange(10), torch.arange(8000, 8010)))
    rows = rope(positions).inv_freq
    for row, length in enumerate((10, 8010)):
        assert torch.equal(rows[row, 0], schedule.at(GEOMETRY, length=length).inv_freq)
    rope.pin_length(6000)
    assert rope.pinned_length == 6000
    for row in rope(positions).inv_freq.expand(2, 1, 64):
        assert torch.equal(row[0], schedule.at(GEOMETRY, length=6000).inv_freq)
    assert "pinned_length=6000" in repr(rope)
    moved = copy.deepcopy(rope).to("meta").to_empty(device="cpu")
    assert torch.equal(moved(positions).inv_freq, rope(positions).inv_freq)
    rope.pin_length(None)
    assert torch.equal(rope(positions).inv_freq, rows)


def test_pinning_is_seen_by_a_compiled_module_without_recompiling() -> None:
    rope = ropex.RotaryEmbedding(GEOMETRY, ropex.schedule("dynamic_ntk"))
    torch.compiler.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(rope, fullgraph=True, backend=count)
    positions = torch.arange(5000)[None]
    for pin in (None, 9000, 3000, None):
        rope.pin_length(pin)
        assert torch.equal(compiled(positions).inv_freq, rope(positions).inv_freq)
    assert graphs == 1


def test_training_mode_reaches_the_schedule() -> None:
    seen = []

    class Spy(ropex.FrequencySchedule):
        def rotation(self, request: ropex.Request) -> ropex.Rotation:
            seen.append(request.training)
            return ropex.Rotation(request.positions, request.inv_freq())

    rope = ropex.RotaryEmbedding(GEOMETRY, Spy())
    rope(torch.arange(3)[None])
    rope.eval()(torch.arange(3)[None])
    assert seen == [True, False]


def test_a_move_that_fails_leaves_it_whole() -> None:
    rope = ropex.RotaryEmbedding(GEOMETRY, ROSTER[0])

    def fail(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such device")

    with pytest.raises(RuntimeError, match="no such device"):
        rope._apply(fail)
    assert torch.equal(rope(torch.arange(3)[None]).inv_freq, GEOMETRY.inv_freq())


def test_made_in_inference_mode_it_can_be_pinned_and_trained_with_later() -> None:
    with torch.inference_mode():
        rope = ropex.RotaryEmbedding(GEOMETRY, ropex.schedule("dynamic_ntk"))
    rope.pin_length(9000)
    q = torch.randn(1, 2, 5, 128, requires_grad=True)
    ropex.rotate(q, rotation=rope(torch.arange(5)[None])).sum().backward()
    assert q.grad is not None


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"geometry=64: must be a ropex\.Geometry; pass Geometry\(dim="):
        ropex.RotaryEmbedding(64, ROSTER[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"schedule='yarn': must be a FrequencySchedule; pass ropex\.schedule"):
        ropex.RotaryEmbedding(GEOMETRY, "yarn")  # type: ignore[arg-type]
    rope = ropex.RotaryEmbedding(GEOMETRY, ROSTER[0])
    with pytest.raises(ValueError, match=r"positions float32 \[1, 3\]: must be integers \[batch, seq\]"):
        rope(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"positions int64 \[3, 1, 4\]: .*multi-axis .* not supported"):
        rope(torch.zeros(3, 1, 4, dtype=torch.int64))
    for length in (0, -1, 1.5, True, "9"):
        with pytest.raises(ValueError, match=r"length=.*: must be an int >= 1; pass the tokens of the prompt"):
            rope.pin_length(length)  # type: ignore[arg-type]
