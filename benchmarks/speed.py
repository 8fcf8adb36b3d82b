"""How fast a rotation is, beside its competitors and beside a copy of the same bytes, which is the floor.

    python -m benchmarks.speed [--device cpu] [--tokens 1 128 4096] [--rounds 15]

q has 32 heads and k 8, of 128 channels (Llama-3 8B). Whatever takes part must first be right: it is compared with the
rotation in float64. Competitors: transformers' function, torch.compile of it, and where they import, on a GPU, Liger,
flash-linear-attention and flash-attention's Triton kernel.

On a CPU all run in turn, round by round, and a round's times are divided by each other; the process starts itself anew
with an allocator that keeps large blocks (GLIBC_TUNABLES), since page faults of fresh ones would cost more than any
rotation. On a GPU times are absolute, the L2 cache being flushed before each run. Writes speed_DEVICE.json and .png to
benchmarks/results.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as transformers_interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as transformers_half

import ropex
from benchmarks import RESULTS, summary
from ropex.evaluation.results import environment, write_json
from ropex.kernels import Layout, rotate_with_table, table
from ropex.kernels.reference import full_table

Q_HEADS, K_HEADS, HEAD_DIM = 32, 8, 128
GEOMETRY = ropex.Geometry(HEAD_DIM, 500_000.0, 8192)
ALLOCATOR = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"
FLOOR, BASELINE, LEARNED = "copy", "transformers", "ropex, with the frequencies' gradient"
Pair = tuple[Tensor, Tensor]


class Setting(NamedTuple):
    """One line of the table: what is rotated."""

    batch: int
    tokens: int
    dtype: torch.dtype
    layout: Layout
    backward: bool


class Inputs(NamedTuple):
    """q and k, [batch, heads, tokens, head_dim]; on a GPU, as in models, views of [batch, tokens, heads, head_dim]."""

    q: Tensor
    k: Tensor
    rotation: ropex.Rotation
    cos: Tensor
    sin: Tensor


def make_inputs(setting: Setting, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def heads(number: int) -> Tensor:
        shape = (setting.batch, setting.tokens, number, HEAD_DIM)
        x = torch.randn(shape, generator=generator, device=device).to(setting.dtype).transpose(1, 2)
        x = x if device != "cpu" else x.contiguous()
        return x.requires_grad_(setting.backward)

    start = 4096 if setting.tokens == 1 else 0  # one token is a decoding step, behind a prompt
    positions = torch.arange(start, start + setting.tokens, device=device)[None]
    rotation = ropex.Rotation(positions, GEOMETRY.inv_freq(device))
    return Inputs(heads(Q_HEADS), heads(K_HEADS), rotation, *table(rotation))


def contenders(setting: Setting, inputs: Inputs, device: str) -> dict[str, Callable[[Tensor, Tensor], Pair]]:
    """Functions of q and k; what can be prepared once for all layers of a model is prepared here."""
    layout, (_, _, rotation, cos, sin) = setting.layout, inputs
    wide = [
        full_table(t, layout).to(setting.dtype) for t in (cos, sin)
    ]  # transformers' tables have the dtype of the model
    eager = transformers_half if layout == "half" else transformers_interleaved
    compiled = torch.compile(eager, dynamic=False)
    result: dict[str, Callable[[Tensor, Tensor], Pair]] = {
        FLOOR: lambda q, k: (torch.empty_like(q).copy_(q), torch.empty_like(k).copy_(k)),
        BASELINE: lambda q, k: eager(q, k, *wide),
        "torch.compile of it": lambda q, k: compiled(q, k, *wide),
        "ropex, table": lambda q, k: rotate_with_table(q, k, cos, sin, layout=layout, rotary_dim=2 * cos.shape[-1]),
        "ropex, angles inside": lambda q, k: ropex.rotate(q, k, rotation, layout=layout),
    }
    if device == "cuda":
        result |= gpu_competitors(layout, wide, [t[0].to(setting.dtype).contiguous() for t in (cos, sin)])
    return result


def gpu_competitors(layout: Layout, wide: list[Tensor], half: list[Tensor]) -> dict[str, Any]:
    """Those that can be imported, each called as its own documentation does."""
    interleaved = layout == "interleaved"
    found: dict[str, Any] = {}
    if not interleaved and (liger := imported("liger_kernel.ops.rope")):
        found["Liger"] = lambda q, k: liger.LigerRopeFunction.apply(q, k, *wide)
    others = {"flash-linear-attention": "fla.modules.rotary", "flash-attention": "flash_attn.layers.rotary"}
    for name, module in others.items():
        package = imported(module)
        function = getattr(package, "rotary_embedding", None) or getattr(package, "apply_rotary_emb", None)
        if function:
            found[name] = lambda q, k, function=function: tuple(
                function(x.transpose(1, 2), *half, interleaved).transpose(1, 2) for x in (q, k)
            )
    return found


def imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def largest_error(function: Callable[[Tensor, Tensor], Pair], setting: Setting, inputs: Inputs) -> float:
    """Of the result, or of the gradients, against float64, over what rounding to the dtype costs; wrong ones are
    hundreds off."""
    truth, got = (
        gradients_or_outputs(f, setting, x) for f, x in ((exact(setting, inputs), widened(inputs)), (function, inputs))
    )
    unit = torch.finfo(setting.dtype).eps
    return max(((g.double() - t).abs() / (1 + t.abs())).max().item() / unit for g, t in zip(got, truth, strict=True))


def widened(inputs: Inputs) -> Inputs:
    return inputs._replace(q=inputs.q.double(), k=inputs.k.double())


def exact(setting: Setting, inputs: Inputs) -> Callable[[Tensor, Tensor], Pair]:
    return lambda q, k: ropex.rotate(q, k, inputs.rotation, layout=setting.layout, backend="reference")


def gradients_or_outputs(function: Callable[[Tensor, Tensor], Pair], setting: Setting, inputs: Inputs) -> Pair:
    q, k = (x.detach().clone().requires_grad_(setting.backward) for x in (inputs.q, inputs.k))
    outputs = function(q.clone(), k.clone())  # Liger writes into what it is given
    if not setting.backward:
        return outputs
    generator = torch.Generator(q.device).manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator, device=x.device).to(setting.dtype).to(x.dtype) for x in outputs]
    return torch.autograd.grad(outputs, (q, k), grads)  # type: ignore[return-value]


def frequencies_error(setting: Setting, inputs: Inputs) -> float:
    """Of the frequencies' gradient, relative to its largest entry, against float64."""
    grads = []
    for x in (widened(inputs), inputs):
        inv_freq = inputs.rotation.inv_freq.clone().requires_grad_()
        outputs = ropex.rotate(
            x.q.detach(), x.k.detach(), inputs.rotation._replace(inv_freq=inv_freq), layout=setting.layout
        )
        grads.append(torch.autograd.grad(outputs, inv_freq, [torch.cos(o.detach()) for o in outputs])[0])
    return ((grads[1] - grads[0]).abs().max() / grads[0].abs().max()).item()


def prepared(
    name: str, function: Callable[[Tensor, Tensor], Pair], setting: Setting, inputs: Inputs
) -> Callable[[], Any]:
    """What is timed of a contender: the call, or the way back through one."""
    if name == FLOOR or not setting.backward:
        return functools.partial(function, inputs.q.detach(), inputs.k.detach())
    wanted = [inputs.q, inputs.k]
    if name == LEARNED:
        inv_freq = inputs.rotation.inv_freq.clone().requires_grad_()
        wanted.append(inv_freq)
        rotation = inputs.rotation._replace(inv_freq=inv_freq)
        outputs = ropex.rotate(inputs.q, inputs.k, rotation, layout=setting.layout)
    else:
        outputs = function(inputs.q.clone(), inputs.k.clone())
    grads = [torch.randn_like(x) for x in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)


def time_cpu(timed: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 2):
        for name, run in timed.items():
            start = time.perf_counter()
            result = run()
            seconds = time.perf_counter() - start
            del result
            if number >= 2:
                times[name].append(seconds)
    return times


def measure(setting: Setting, device: str, rounds: int) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    inputs = make_inputs(setting, device)
    functions = contenders(setting, inputs, device)
    place = {**setting._asdict(), "dtype": str(setting.dtype).removeprefix("torch.")}
    errors: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for name in [name for name in functions if name != FLOOR]:
        try:
            errors[name] = largest_error(functions[name], setting, inputs)
        except Exception as error:
            if name == BASELINE or name.startswith("ropex"):
                raise
            rows.append({"contender": name, **place, "failed": f"{type(error).__name__}: {error}"[:200]})
            del functions[name]
    wrong = {name: error for name, error in errors.items() if name != BASELINE and not error < 8}
    if setting.backward:
        functions[LEARNED] = functions["ropex, angles inside"]
        errors[LEARNED] = frequencies_error(setting, inputs)
        if not errors[LEARNED] < 0.01:
            wrong[LEARNED] = errors[LEARNED]
    if any(name.startswith("ropex") for name in wrong):
        raise SystemExit(f"{setting}: wrong by {wrong} roundings; nothing is timed")
    rows += [{"contender": name, **place, "wrong": error} for name, error in wrong.items()]
    times: dict[str, list[float]]
    right = {name: function for name, function in functions.items() if name not in wrong}
    if not setting.backward:
        right["ropex, angles alone"] = lambda q, k: table(inputs.rotation)
    if device == "cuda":
        from triton.testing import do_bench

        # One after the other, so that one graph at a time is held.
        times = {
            name: [ms / 1000 for ms in do_bench(prepared(name, function, setting, inputs), return_mode="all")]
            for name, function in right.items()
        }
    else:
        times = time_cpu({name: prepared(name, f, setting, inputs) for name, f in right.items()}, rounds)
    for name, seconds in times.items():
        row: dict[str, Any] = {"contender": name, **place, "error": errors.get(name)}
        if device == "cuda":
            middles = {key: statistics.median(values) for key, values in times.items()}
            row["seconds"] = summary(seconds)
            row["over_copy"] = middles[name] / middles[FLOOR]
            row["transformers_over"] = middles[BASELINE] / middles[name]
        else:
            row["over_copy"] = summary([a / b for a, b in zip(seconds, times[FLOOR], strict=True)])
            row["transformers_over"] = summary([b / a for a, b in zip(seconds, times[BASELINE], strict=True)])
        rows.append(row)
    return rows


def plot(path: Path, rows: list[dict[str, Any]], device: str) -> None:
    """Time over that of a copy, against tokens; bfloat16, the half layout, forward and backward."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, backward in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        shown = [
            row
            for row in rows
            if (row["dtype"], row["layout"], row["backward"]) == ("bfloat16", "half", backward) and "over_copy" in row
        ]
        for name in dict.fromkeys(row["contender"] for row in shown):
            points = [
                (row["batch"] * row["tokens"], middle(row["over_copy"])) for row in shown if row["contender"] == name
            ]
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axes.set(
            xscale="log", yscale="log", xlabel="tokens", title=f"{'backward' if backward else 'forward'}, {device}"
        )
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("time / time of a copy")
    figure.savefig(path, dpi=110)


def middle(value: Any) -> float:
    return float(value["median"] if isinstance(value, dict) else value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 1 to 8192 on a CPU, to 131072 on a GPU")
    parser.add_argument("--rounds", type=int, default=15, help="on a CPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cpu" and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.speed", *sys.argv[1:]])
    torch.set_num_threads(arguments.threads)
    tokens = arguments.tokens or [1, 128, 1024, 4096, *([8192] if device == "cpu" else [32_768, 131_072])]
    settings = [
        Setting(64 if number == 1 else 1, number, dtype, layout, backward)
        for number in tokens
        for dtype in (torch.bfloat16, torch.float32)
        for layout in ("half", "interleaved")
        for backward in (False, True)
    ]
    rows: list[dict[str, Any]] = []
    for setting in settings:
        measured = measure(setting, device, arguments.rounds)
        rows += measured
        for row in measured:
            figures = [f"{key} {middle(row[key]):.2f}" for key in ("over_copy", "transformers_over") if key in row]
            place = f"{setting.tokens} {row['dtype']} {setting.layout} {'backward' if setting.backward else 'forward'}"
            print(f"{place}: {row['contender']}: {', '.join(figures) or row}", flush=True)
    stamp = environment(torch.zeros((), device=device))
    stamp["allocator"] = os.environ.get("GLIBC_TUNABLES", "default")
    result = {
        "what": "time of rotating q and k; over that of a copy, and transformers' over it",
        "q_heads": Q_HEADS,
        "k_heads": K_HEADS,
        "head_dim": HEAD_DIM,
        "rounds": arguments.rounds,
        "rows": rows,
        "environment": stamp,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / f"speed_{device}.json", result)
    plot(arguments.out / f"speed_{device}.png", rows, device)


if __name__ == "__main__":
    main()
