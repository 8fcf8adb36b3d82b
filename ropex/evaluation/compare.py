"""Several methods on one model and one text."""

from __future__ import annotations

import functools
import itertools
import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ropex._version import __version__
from ropex.evaluation.perplexity import perplexity_by_length
from ropex.patching import patch
from ropex.scaling import FrequencySchedule

__all__ = ["compare_methods", "environment", "plot_perplexity", "write_json"]


def compare_methods(
    model: nn.Module,
    tokens: Tensor | Sequence[int],
    schedules: Mapping[str, FrequencySchedule],
    *,
    bins: int | Sequence[int] = 6,
    model_name: str = "",
    text_name: str = "",
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Perplexity by position for each schedule, as a result that can be written as JSON.

    Args:
        model: not patched; it is patched with one schedule after the other, and left as it was.
        tokens, bins: as in `perplexity_by_length`.
        schedules: by the names that the result shall show.
        model_name, text_name: what the result says of them.
        progress: called with the schedule's name and the fraction of it that is done.
    """
    stamp = environment(next(model.parameters()))
    results: dict[str, Any] = {}
    spans: list[list[int]] = []
    for name, schedule in schedules.items():
        report = functools.partial(progress, name) if progress is not None else None
        with patch(model, schedule):
            measured = perplexity_by_length(model, tokens, bins=bins, progress=report)
        spans = [list(span) for span in measured.bins]
        results[name] = {
            "schedule": schedule.to_dict(),
            "nll": list(measured.nll),
            "perplexity": list(measured.perplexity),
            "seconds": measured.seconds,
        }
    return {
        "protocol": "binned",
        "model": model_name,
        "text": text_name,
        "tokens": torch.as_tensor(tokens).numel(),
        "bins": spans,
        "results": results,
        "environment": stamp,
    }


def environment(parameter: Tensor | None = None) -> dict[str, Any]:
    """What a measurement ran on: processor, versions, commit, and a parameter's dtype and device."""
    stamp: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers")},
        "ropex": __version__,
        "commit": _commit(),
    }
    if parameter is not None:
        stamp["dtype"] = str(parameter.dtype).removeprefix("torch.")
        stamp["device"] = parameter.device.type
        if parameter.device.type == "cuda":
            stamp["gpu"] = torch.cuda.get_device_name(parameter.device)
    return stamp


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result so that the file is never seen half written."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def plot_perplexity(path: Path, result: Mapping[str, Any], *, trained_length: int | None = None) -> None:
    """Draw perplexity against position, a line per method, into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    middles = [(start + end) / 2 for start, end in result["bins"]]
    for (name, measured), marker in zip(result["results"].items(), itertools.cycle("os^Dvph*<>X"), strict=False):
        axes.plot(middles, measured["perplexity"], marker=marker, label=name)
    if trained_length is not None and trained_length < result["bins"][-1][1]:
        axes.axvline(trained_length, color="0.6", linestyle="--", linewidth=1)
        axes.annotate(
            "trained length",
            (trained_length, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -5),
            textcoords="offset points",
            ha="right",
            va="top",
            color="0.4",
        )
    axes.set(xlabel="position (tokens)", ylabel="perplexity", yscale="log", title=result["model"])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize="small")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _commit() -> str | None:
    """The commit of the checkout that ropex runs from, -dirty where files differ; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    # Results of earlier runs are no difference in what is measured.
    outside = [".", ":!benchmarks/results", ":!docs", ":!*.md"]
    try:
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "-C", root, "diff", "--quiet", "HEAD", "--", *outside], check=False)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")
