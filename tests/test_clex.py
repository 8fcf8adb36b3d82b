"""CLEX: its goldens, its closed form without a net, an independent solver, and its training."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

import ropex
from ropex.scaling import CLEX
from tests.oracles import GOLDEN, fitted, relative_error, training_request

GEOMETRY = ropex.Geometry(dim=64, base=10_000.0, trained_length=2048, rounded=False)


def golden(activation: str, **options: Any) -> tuple[CLEX, dict[str, Any]]:
    data = json.loads((GOLDEN / f"clex_seeded_{activation}_d64_base10000.json").read_text())
    clex = ropex.schedule("clex", dim=64, max_factor=8, activation=activation, **options)
    assert isinstance(clex, CLEX)
    weights = {name: torch.tensor(data[name], dtype=torch.float64) for name in ("up_proj", "down_proj")}
    clex.double().load_state_dict(weights)
    return clex, data


@torch.no_grad()
def at(clex: CLEX, t: float, geometry: ropex.Geometry = GEOMETRY) -> Tensor:
    positions = torch.arange(4)[None]
    return clex.inv_freq(ropex.Request(geometry, positions, torch.tensor(4)), torch.tensor(t, dtype=torch.float64))


@pytest.mark.parametrize("activation", ["tanh", "silu"])
@pytest.mark.parametrize(
    ("step", "dtype", "tolerance"),
    [(0.01, torch.float64, 1e-8), (0.5, torch.float64, 1e-5), (0.5, torch.float32, 1e-4)],
)
def test_goldens(activation: str, step: float, dtype: torch.dtype, tolerance: float) -> None:
    clex, data = golden(activation, step=step)
    clex.to(dtype)
    for t, want in data["inv_freq_t"].items():
        assert relative_error(at(clex, float(t)), want) < tolerance
        fixed = CLEX(**{**clex.to_dict()["options"], "factor": float(t)}).to(dtype)
        fixed.load_state_dict(clex.state_dict())
        assert torch.equal(fixed.at(GEOMETRY, length=5).inv_freq, at(clex, float(t)))
    for t, want in data["inference_grid_cache_t"].items():
        got = clex.at(GEOMETRY, length=int(t) * 2048).inv_freq
        assert relative_error(got, want) < tolerance
        assert torch.equal(clex.at(GEOMETRY, length=(int(t) - 1) * 2048 + 1).inv_freq, got)


def test_golden_at_initialisation() -> None:
    data = json.loads((GOLDEN / "clex_init_d128_base10000.json").read_text())
    geometry = ropex.Geometry(128, 10_000.0, 2048, rounded=False)
    clex = CLEX(dim=128)
    for case in data["cases"]:
        for t, result in case["t"].items():
            if result["inv_freq"] is None:  # the coarser ones give their error alone
                continue
            # The published solver's own error, which it states, is all that may remain.
            error = result["max_rel_err_vs_closed_form"]
            assert relative_error(at(clex, float(t), geometry), result["inv_freq"]) < 1.01 * error + 1e-11


@pytest.mark.parametrize("base", [1e4, 5e5, 1e7])
@pytest.mark.parametrize("dim", [None, 80])
def test_untrained_it_is_ntk(base: float, dim: int | None) -> None:
    geometry = ropex.Geometry(80, base, 4096)
    for t in (1.0, 1.25, 2.0, 3.7, 15.99, 16.0):
        want = ropex.schedule("ntk", factor=2 * t - 1).at(geometry, length=1).inv_freq
        assert relative_error(at(CLEX(dim=dim), t, geometry), want) < 1e-9
    assert torch.equal(at(CLEX(dim=dim), 1.0, geometry), geometry.inv_freq())


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_an_independent_solver_of_the_whole_equation_agrees(activation: str) -> None:
    """dopri5 on both terms at once, as the paper writes them, with the model's base in the net's input."""
    geometry = ropex.Geometry(64, 5e5, 2048)
    clex = fitted(ropex.schedule("clex", activation=activation, step=0.25), geometry)
    assert isinstance(clex, CLEX)
    up, down = clex.up_proj.detach().double(), clex.down_proj.detach().double()
    index = torch.arange(32, dtype=torch.float64)
    act = torch.tanh if activation == "tanh" else torch.nn.functional.silu

    def slope(t: Tensor, y: Tensor) -> Tensor:
        omega = (5e5 * (2 * t - 1) ** (64 / 62)) ** (-2 * index / 64)
        return act((y + omega.log()) @ up) @ down - 4 * index / (62 * (2 * t - 1))

    times = torch.tensor([1, 2.3, 8, 16], dtype=torch.float64)
    solution = odeint(slope, geometry.inv_freq().log(), times, method="dopri5", rtol=1e-11, atol=1e-12).exp()
    for t, want in zip(times.tolist(), solution, strict=True):
        assert relative_error(at(clex, t, geometry), want) < 1e-6
    untrained = ropex.schedule("ntk", factor=31).at(geometry, length=1).inv_freq
    assert relative_error(solution[-1], untrained) > 0.02, "a net that changes nothing tests nothing"


@pytest.mark.parametrize(("step", "evaluations"), [(0.5, 120), (0.1, 600)])
def test_the_net_is_evaluated_as_often_for_every_t(step: float, evaluations: int, monkeypatch: Any) -> None:
    from ropex.scaling import clex as module

    calls = 0

    def count(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.tanh(x)

    monkeypatch.setitem(module._ACTIVATIONS, "tanh", count)
    for t in (1.0, 4.0, 16.0):
        calls = 0
        at(CLEX(dim=64, step=step), t)
        assert calls <= evaluations


def test_the_length_decides_t_and_a_batch_has_its_own() -> None:
    clex, _ = golden("tanh")
    for length, t in ((1, 1), (2048, 1), (2049, 2), (4 * 2048, 4), (7 * 2048 + 1, 8), (10**7, 8)):
        assert torch.equal(clex.at(GEOMETRY, length=length).inv_freq, at(clex, float(t)))


def test_released_weights_load_under_their_own_names() -> None:
    clex, _ = golden("tanh")
    released = {f"proj_func.ode_{name}": value for name, value in clex.state_dict().items()}
    fresh = CLEX(dim=64, max_factor=8).double()
    fresh.load_state_dict(released)
    assert torch.equal(at(fresh, 3.0), at(clex, 3.0))
    rope = ropex.RotaryEmbedding(GEOMETRY, CLEX(max_factor=8))
    rope.load_state_dict({f"learned.ode_{name}": value for name, value in clex.state_dict().items()}, strict=False)
    assert torch.equal(rope.schedule.up_proj, clex.up_proj.float())


def test_the_base_of_the_nets_input() -> None:
    geometry = ropex.Geometry(64, 5e5, 2048)
    own = fitted(ropex.schedule("clex"), geometry)
    released = copy.deepcopy(own)
    released.net_base = 10_000.0
    same = copy.deepcopy(own)
    same.net_base = 5e5
    assert torch.equal(at(same, 4.0, geometry), at(own, 4.0, geometry))
    assert not torch.allclose(at(released, 4.0, geometry), at(own, 4.0, geometry), rtol=1e-4)


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_draws_one_t_per_pass_and_positions_per_sample() -> None:
    clex, geometry, tokens = CLEX(max_factor=5), ropex.Geometry(64, 1e4, 32), 32
    seen = set()
    for key in range(60):
        request = training_request(geometry, tokens, batch=4, key=torch.arange(4) + 1000 * key)
        positions, inv_freq, _ = clex.rotation(request)
        assert inv_freq.shape == (32,)
        (last,) = set(positions[:, -1].tolist())
        t = (last + 1) // tokens
        assert last == t * tokens - 1
        assert (positions[:, 0] == 0).all()
        assert (positions.diff() > 0).all()
        assert torch.equal(inv_freq, at(clex, float(t), geometry))
        if t == 1:
            assert torch.equal(positions, request.positions)
            assert torch.equal(inv_freq, geometry.inv_freq())
        else:
            assert len({tuple(row) for row in positions.tolist()}) == 4
        seen.add(t)
    assert seen == {1, 2, 3, 4, 5}


def test_training_beyond_the_trained_length_counts_positions_less() -> None:
    clex, geometry = CLEX(max_factor=2), ropex.Geometry(64, 1e4, 16)
    for tokens, scale in ((16, 1), (31, 1), (32, 2), (50, 3)):
        positions, inv_freq, _ = clex.rotation(training_request(geometry, tokens))
        t = (positions[0, -1].item() + 1) / tokens
        assert torch.equal(inv_freq, at(clex, t, geometry) / scale)


def test_nothing_is_kept_across_an_update() -> None:
    clex = fitted(ropex.schedule("clex"), GEOMETRY)
    before = clex.at(GEOMETRY, length=9000).inv_freq
    with torch.no_grad():
        clex.down_proj.mul_(1.5)
    assert not torch.equal(clex.at(GEOMETRY, length=9000).inv_freq, before)


def test_gradients_are_those_of_finite_differences() -> None:
    geometry = ropex.Geometry(8, 1e4, 64)
    clex = fitted(ropex.schedule("clex", max_factor=3), geometry).double()

    def frequencies(up: Tensor, down: Tensor) -> Tensor:
        request = ropex.Request(geometry, torch.arange(3)[None], torch.tensor(180))
        return torch.func.functional_call(Asks(clex), {"clex.up_proj": up, "clex.down_proj": down}, request).log()

    weights = (clex.up_proj.detach().requires_grad_(), (10 * clex.down_proj.detach()).requires_grad_())
    assert torch.autograd.gradcheck(frequencies, weights)


class Asks(torch.nn.Module):
    def __init__(self, clex: CLEX) -> None:
        super().__init__()
        self.clex = clex

    def forward(self, request: ropex.Request) -> Tensor:
        return self.clex.rotation(request).inv_freq


@pytest.mark.parametrize("base", [1e4, pytest.param(5e5, marks=pytest.mark.slow), 1e7])
@pytest.mark.parametrize("activation", ["tanh", "silu"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("learning_rate", [pytest.param(1e-3, marks=pytest.mark.slow), 0.3])
def test_gradients_stay_finite(base: float, activation: Any, autocast: bool, learning_rate: float) -> None:
    """After 100 steps towards random targets, the second rate so high that the net runs wild."""
    geometry = ropex.Geometry(32, base, 64)
    clex = CLEX(dim=32, max_factor=32, activation=activation, step=1.0)
    optimizer = torch.optim.Adam(clex.parameters(), lr=learning_rate)
    for number in range(100):
        request = training_request(geometry, 16, batch=1, key=torch.tensor([number]))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rotation = clex.rotation(request)
        assert rotation.inv_freq.dtype == torch.float64
        assert bool(rotation.inv_freq.isfinite().all())
        assert bool((rotation.inv_freq <= 2 * math.pi * (1 + 1e-12)).all())
        cos, sin = ropex.kernels.table(rotation)
        loss = (cos - torch.randn_like(cos)).square().mean() + (sin - torch.randn_like(sin)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in clex.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.isfinite().all())
        optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in clex.parameters())


def test_autocast_changes_nothing() -> None:
    clex = fitted(ropex.schedule("clex"), GEOMETRY)
    want = clex.at(GEOMETRY, length=9000).inv_freq
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(clex.at(GEOMETRY, length=9000).inv_freq, want)


def test_it_learns() -> None:
    """From the frequencies of NTK to those of YaRN at t = 4."""
    geometry = ropex.Geometry(32, 1e4, 64)
    rope = ropex.RotaryEmbedding(geometry, CLEX(factor=4.0, max_factor=4)).eval()
    target = ropex.schedule("yarn", factor=4).at(geometry, length=256).inv_freq
    optimizer = torch.optim.Adam(rope.parameters(), lr=1e-3)
    losses = []
    for _ in range(100):
        loss = (rope(torch.arange(256)[None]).inv_freq / target).log().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_gradients_come_through_the_rotation() -> None:
    rope = ropex.RotaryEmbedding(ropex.Geometry(32, 1e4, 64), CLEX(factor=3.0, max_factor=4))
    q = torch.randn(2, 2, 64, 32)
    ropex.rotate(q, rotation=rope.eval()(torch.arange(64).expand(2, 64))).square()[..., :7].sum().backward()
    gradient = rope.get_parameter("learned.down_proj").grad
    assert gradient is not None
    assert gradient.abs().max() > 1e-3
