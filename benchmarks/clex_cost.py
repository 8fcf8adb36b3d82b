"""What CLEX costs and how exact it is: our residual solver beside the release's, of the same equation.

    python -m benchmarks.clex_cost [--rounds 15] [--tokens 1024]

The release integrates the whole equation with torchdiffeq's `rk4` and steps of 0.01; ours integrates the net's residual
around the closed-form NTK drift. Both solve forward and backward at t = max_factor = 16 on one net, and their results
are compared with a fine solution first. Then the net's part is timed against a whole training step of the default
model. Writes clex_cost.json to benchmarks/results.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

import ropex
from benchmarks import RESULTS, summary
from ropex.evaluation.loading import load_model, load_texts
from ropex.evaluation.results import environment, write_json
from ropex.scaling import CLEX, clex

Activation = Callable[[Tensor], Tensor]
MAX_FACTOR = 16
GEOMETRY = ropex.Geometry(dim=64, base=100_000.0, trained_length=8192)


class Evaluations:
    """Counts how often a net is evaluated: each evaluation calls its activation once."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.count += 1
        return torch.tanh(x)


def seeded(step: float) -> CLEX:
    """A net that moves the frequencies by some per cent at t = 16."""
    net = CLEX(dim=GEOMETRY.dim, max_factor=MAX_FACTOR, step=step)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        net.up_proj.copy_(torch.randn(net.up_proj.shape, generator=generator) / GEOMETRY.dim**0.5)
        net.down_proj.copy_(torch.randn(net.down_proj.shape, generator=generator) * 3e-4)
    return net


def ours(net: CLEX) -> Tensor:
    request = ropex.Request(GEOMETRY, torch.arange(2)[None], torch.tensor(MAX_FACTOR * GEOMETRY.trained_length))
    return net.rotation(request).inv_freq.flatten()


def released(net: CLEX, step: float, act: Activation, dtype: torch.dtype) -> Tensor:
    """The whole equation by torchdiffeq, in the dtype that is asked for; the release's is float32."""
    dim = GEOMETRY.dim
    up, down = net.up_proj.to(dtype), net.down_proj.to(dtype)
    index = torch.arange(dim // 2, dtype=dtype)

    def slope(t: Tensor, y: Tensor) -> Tensor:
        alpha = 2 * t - 1
        log_omega = -2 * index / dim * (math.log(GEOMETRY.base) + dim / (dim - 2) * alpha.log())
        return act((y + log_omega) @ up) @ down - 4 * index / ((dim - 2) * alpha)

    times = torch.tensor([1.0, MAX_FACTOR], dtype=dtype)
    solution: Tensor = odeint(
        slope, GEOMETRY.inv_freq().to(dtype).log(), times, method="rk4", options={"step_size": step}
    )
    return solution[-1].exp()


def seconds(action: Callable[..., Tensor], *arguments: Any) -> float:
    """Of a forward and a backward pass."""
    start = time.perf_counter()
    action(*arguments).sum().backward()
    return time.perf_counter() - start


def solvers(rounds: int) -> list[dict[str, Any]]:
    fine = released(seeded(0.01), 0.002, torch.tanh, torch.float64).detach()
    candidates: dict[tuple[str, float], Callable[[CLEX, Activation], Tensor]] = {
        ("released", 0.01): lambda net, act: released(net, 0.01, act, torch.float32),
        ("released", 0.1): lambda net, act: released(net, 0.1, act, torch.float32),
        ("ropex", 0.1): lambda net, act: ours(net),
        ("ropex", 0.5): lambda net, act: ours(net),
    }
    rows: list[dict[str, Any]] = []
    for (solver, step), solve in candidates.items():
        act, net = Evaluations(), seeded(step)
        clex._ACTIVATIONS["counted"] = act
        net.activation = "counted"  # type: ignore[assignment]
        error = ((solve(net, act).detach() - fine).abs() / fine).max().item()
        rows.append({"solver": solver, "step": step, "evaluations": act.count, "relative_error": error})
    times = [
        [seconds(solve, seeded(step), torch.tanh) for (_, step), solve in candidates.items()] for _ in range(rounds)
    ]
    for number, row in enumerate(rows):
        row["time_over_ropex"] = summary([values[number] / values[-1] for values in times])
    return rows


def training(rounds: int, tokens: int) -> tuple[dict[str, Any], Tensor]:
    """CLEX's part of a training step, forward and backward, in turn with the step of the model that has no net."""
    loaded = load_model(dtype=torch.float32)
    model = loaded.model.train()
    ids = loaded.tokenizer(load_texts().texts[0], return_tensors="pt")["input_ids"][:, :tokens]
    rope = ropex.RotaryEmbedding(GEOMETRY, seeded(0.5))
    ropex.patch(model, "linear", factor=MAX_FACTOR)
    shares = []
    for number in range(rounds + 1):
        model.zero_grad(set_to_none=True)
        net = seconds(lambda: rope(torch.arange(tokens)[None]).inv_freq)
        step = seconds(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
        if number:  # the first round warms up
            shares.append(net / step)
            print(f"training {number}/{rounds}: {shares[-1]:.4f}", flush=True)
    return {"model": loaded.name, "tokens": tokens, "share": summary(shares)}, next(model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = solvers(arguments.rounds)
    for row in rows:
        print(row, flush=True)
    if rows[-1]["evaluations"] > 120 or rows[-1]["relative_error"] > 1e-5:
        raise SystemExit("the default step costs more than 120 evaluations or errs by more than 1e-5")
    trained, parameter = training(arguments.rounds, arguments.tokens)
    result: dict[str, Any] = {
        "what": "cost and error of CLEX's solver at t = max_factor, and of a training step",
        "max_factor": MAX_FACTOR,
        "dim": GEOMETRY.dim,
        "rounds": arguments.rounds,
        "solvers": rows,
        "training": trained,
        "environment": environment(parameter),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "clex_cost.json", result)
    print(trained)


if __name__ == "__main__":
    main()
