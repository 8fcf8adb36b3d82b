"""Calls of every public function with values of mixed types: each works, or is refused by ropex."""

from __future__ import annotations

import functools
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import hypothesis
import numpy
import torch
from hypothesis import strategies as st

import ropex
from ropex.evaluation import (
    compare_methods,
    documents,
    effective_length,
    fit_loss_curve,
    long_ppl,
    perplexity_by_length,
    retrieval,
    shift_deviation,
    tasks,
)
from ropex.kernels import norm_rotate, rotate, rotate_with_table, table
from ropex.patching import explain
from ropex.precision import angle_error, probe_precision
from ropex.scaling import PoSECollator, from_dict
from ropex.scaling.registry import accepted_options
from tests.chaos.interrupts import state_of
from tests.oracles import byte_tokenizer, tiny_model, tiny_tokens

# What people pass by mistake. (Objects that pretend to be something are not among them.)
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**9, 10**400,
    0.0, -0.0, 0.5, 1.5, 1e308, 5e-324, float("nan"), float("inf"), -float("inf"),
    "", "x", "yarn", "1", "4", "auto", "none", "a" * 5000, "\0", "\ud800", "λ", b"", b"yarn",
    [], [1], [[1]], ["yarn"], [None], (), (1, 2), (1, "x"), {}, {"a": 1}, {1: 2}, {"method": "yarn"}, set(), {1},
    object, object(), Exception("x"), print, 1j, Decimal("1.5"), Fraction(10, 3), range(3), range(0),
    Path("/dev/null/x"), slice(2), numpy.float64(1.5), numpy.int64(2), numpy.arange(3), numpy.nan,
    torch.tensor(1), torch.tensor(1.5), torch.tensor([]), torch.tensor([1, 2]), torch.tensor(float("nan")),
    torch.ones(2, 2), torch.zeros(1, dtype=torch.bool), torch.empty(2, device="meta"), torch.float16,
    torch.device("cpu"), torch.device("meta"), torch.nn.Linear(2, 2),
]  # fmt: skip


class Call:
    """A public function with arguments that fit."""

    def __init__(self, function: Callable[..., Any], **arguments: Any) -> None:
        self.function, self.arguments = function, arguments


@functools.cache
def model() -> Any:
    return tiny_model("llama", vocab_size=260)


@functools.cache
def directory() -> str:
    """A saved model with a saved patch that has learned something."""
    folder = tempfile.mkdtemp(prefix="ropex-fuzz-")
    with ropex.patch(model(), "clex", factor=2) as patch:
        patch.save(folder)
        model().save_pretrained(folder)
    return folder


def patched(model: Any, **arguments: Any) -> None:
    ropex.patch(model, **arguments).remove()


def loaded(model: Any, **arguments: Any) -> None:
    ropex.load(model, **arguments).remove()


def pinned(**arguments: Any) -> None:
    with ropex.patch(model(), "dynamic_ntk", factor=2) as patch:
        patch.pin_length(**arguments)


def saved(directory: Any) -> None:
    """In a place of its own; what is no text may be anything."""
    with tempfile.TemporaryDirectory() as folder, ropex.patch(model(), "clex", factor=2) as patch:
        patch.save(Path(folder) / directory if isinstance(directory, str) else directory)


def exported(directory: Any, to: Any, out: Any, **options: Any) -> None:
    """To a place of its own; what is no text may be anything."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / out if isinstance(out, str) else out
        ropex.export(directory, to, out, **options)


@functools.cache
def calls() -> tuple[Call, ...]:
    ids = tiny_tokens(200)[0]
    rotation = ropex.schedule("none").at(ropex.Geometry(8, 10_000.0, 64), length=5)
    q = torch.randn(1, 2, 5, 8)
    cos, sin = table(rotation)
    geometry = ropex.Geometry(dim=8, base=10_000.0, trained_length=64)
    schedules = {"pi": ropex.schedule("linear", factor=2)}
    options: dict[str, dict[str, Any]] = {
        "ntk": {"alpha": 4.0},
        "abf": {"base": 5e5, "factor": 2},
        "longrope": {"factor": 2, "short_factors": (1.0,) * 4, "long_factors": (2.0,) * 4, "amplitude": 1.1},
        "clex": {"dim": 8},
        "pose": {"inner": "linear"},
        "resonance": {"inner": "yarn"},
        "random_positions": {"target_length": 256},
        "proportional": {},
    }
    named = []
    for name in ropex.methods():
        accepted = accepted_options(name)
        given = options.get(name, {}) | ({"factor": 2} if "factor" in accepted and name not in ("ntk",) else {})
        named.append(Call(ropex.schedule, name=name, **dict.fromkeys(accepted, DEFAULT) | given))
    made = [
        Call(ropex.Geometry, dim=8, base=1e4, trained_length=64, rounded=True),
        Call(ropex.recommend, geometry=geometry, length=128),
        Call(from_dict, data={"method": "linear", "options": {"factor": 4}}),
        Call(ropex.RotaryEmbedding, geometry=geometry, schedule=schedules["pi"], seed=0, data_rank=None),
        Call(schedules["pi"].at, geometry=geometry, length=4),
        Call(ropex.inspect, model=model()),
        Call(explain, model=model()),
        Call(ropex.unpatch, model=model()),
        Call(ropex.param_groups, model=model(), weight_decay=0.1, schedule_lr=1e-3),
        Call(
            patched, model=model(), method="yarn", factor=2, length=DEFAULT, angles="exact", precision="model",
            sliding="keep", on_scaled="error", trained_length=None, tokenizer=None, seed=0, data_rank=None,
        ),
        Call(patched, model=model(), method="clex", factor=2, seed=0, max_factor=16),
        Call(patched, model=model(), method="pose", factor=2, inner="linear", window=DEFAULT),
        Call(pinned, length=100, outgrown="error"),
        Call(loaded, model=model(), directory=directory(), tokenizer=None),
        Call(exported, directory=directory(), to="transformers", out="new", model=None, length=128),
        Call(effective_length, results={512: 1.0, 1024: 0.5}, threshold=0.8),
        Call(fit_loss_curve, lengths=[512, 1024, 2048, 4096], losses=[3.0, 2.5, 2.2, 2.1]),
        Call(documents, texts=["one two three"] * 2, tokenizer=byte_tokenizer(), length=4, limit=2, names=["a", "b"]),
        Call(
            perplexity_by_length, model=model(), tokens=ids, protocol="binned", bins=2, stride=16, window=None, chunk=64
        ),
        Call(long_ppl, model=model(), tokens=ids, short=16, stride=8, gain=0.0, floor=-50.0, chunk=64),
        Call(shift_deviation, model=model(), tokens=ids[:20], shifts=[4]),
        Call(
            retrieval, model=model(), tokenizer=byte_tokenizer(), task="passkey", lengths=[500], depths=[0.5],
            samples=1, seed=0, scoring="likelihood", window=None, prose=None,
        ),
        Call(tasks()["lines"].samples, tokenizer=byte_tokenizer(), length=400, depths=(0.5,), number=0, seed=0),
        Call(
            compare_methods, model=model(), schedules=schedules, documents=[ids], protocol="binned", bins=2, stride=16,
            tasks=(), lengths=(), depths=(0.5,), samples=1, seed=0, scoring="likelihood", on_scaled="error", cells=None,
        ),
        Call(rotate, q=q, k=q, rotation=rotation, layout="half", order="bhsd", angles="exact", backend="auto"),
        Call(rotate_with_table, q=q, k=q, cos=cos, sin=sin, layout="half", order="bhsd", backend="auto"),
        Call(norm_rotate, q=q, k=q, rotation=rotation, q_weight=torch.ones(8), k_weight=torch.ones(8), eps=1e-6),
        Call(probe_precision, q=q, k=q, rotation=rotation, shifts=[4], layout="half"),
        Call(ropex.RotaryEmbedding(geometry, schedules["pi"]), positions=torch.arange(4)[None]),
        Call(PoSECollator, window=16, target_length=128, pad_token_id=0, generator=None),
        Call(PoSECollator(16, 128), features=[{"input_ids": [1, 2, 3]}]),
        Call(ropex.RopexCallback, max_length=100),
        Call(saved, directory="new"),
        Call(table, rotation=rotation, angles="exact", dtype=torch.float32),
        Call(angle_error, rotation=rotation, angles="exact", bits=200),
    ]  # fmt: skip
    return (*named, *made)


SECONDS = 20  # for a call on a tiny model
DEFAULT = object()  # an argument that is left out unless it is replaced


@st.composite
def drawn(draw: st.DrawFn) -> tuple[int, tuple[tuple[str, int], ...]]:
    """Which call, and which of its arguments become what."""
    number = draw(st.integers(0, len(calls()) - 1))
    names = sorted(calls()[number].arguments)
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    return number, tuple((name, draw(st.integers(0, len(JUNK) - 1))) for name in chosen)


def fuzz(count: int) -> dict[str, Any]:
    """That many calls; what is raised must be a ValueError that says enough, and the model stays as it was."""
    outcomes: Counter[str] = Counter()
    foreign: list[str] = []
    signal.signal(signal.SIGALRM, _too_slow)
    os.chdir(tempfile.mkdtemp(prefix="ropex-fuzz-"))  # where a name such as "yarn" makes a file
    calls()
    plain = state_of(model())

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(drawn())
    def each(case: tuple[int, tuple[tuple[str, int], ...]]) -> None:
        number, junk = case
        call = calls()[number]
        arguments = call.arguments | {name: JUNK[i] for name, i in junk}
        arguments = {name: value for name, value in arguments.items() if value is not DEFAULT}
        outcome = "worked"
        signal.alarm(SECONDS)
        try:
            call.function(**arguments)
        except ValueError as error:
            outcome = "refused"
            if len(str(error)) < 20 or type(error) not in (ValueError, ropex.UnsupportedModelError):
                outcome = "foreign"
                foreign.append(_described(call, junk, error))
        except OSError as error:  # which `Patch.save` says that it raises
            outcome = "refused" if call.function is saved else "foreign"
            if outcome == "foreign":
                foreign.append(_described(call, junk, error))
        except Exception as error:
            outcome = "foreign"
            foreign.append(_described(call, junk, error))
        finally:
            signal.alarm(0)
        outcomes[outcome] += 1
        if ropex.patching.find_patch(model()) is not None or state_of(model()) != plain:
            outcomes["half patched"] += 1
            foreign.append(_described(call, junk, None))
            if ropex.patching.find_patch(model()) is not None:
                ropex.unpatch(model())

    each()
    figures = {name: outcomes[name] for name in ("refused", "worked", "foreign", "half patched")}
    return {"tried": sum(figures.values()) - figures["half patched"], **figures, "examples": foreign}


def _too_slow(number: int, frame: object) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def _described(call: Call, junk: tuple[tuple[str, int], ...], error: Exception | None) -> str:
    replaced = {name: repr(JUNK[i])[:60] for name, i in junk}
    name = getattr(call.function, "__qualname__", str(call.function))
    return f"{name}({call.arguments.get('name', '')}) with {replaced}: {type(error).__name__}: {str(error)[:200]}"
