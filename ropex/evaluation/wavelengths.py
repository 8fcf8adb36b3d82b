"""What a schedule does to the spectrum, as a picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from ropex.evaluation.plots import save_figure
from ropex.rotation import Geometry, Request
from ropex.scaling import FrequencySchedule

__all__ = ["plot_wavelengths"]


@torch.no_grad()
def plot_wavelengths(
    path: Path, schedules: Mapping[str, FrequencySchedule], geometry: Geometry, *, length: int
) -> None:
    """Draw wavelength against pair index, a line per schedule, into a PNG or SVG file.

    A pair that does not turn is drawn at the upper edge.

    Args:
        path: where to write.
        schedules: by the names that the picture shall show.
        geometry: how the model was trained.
        length: the context length, in tokens, that the schedules are asked for.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    waves = {}
    for name, schedule in schedules.items():
        last = Request(geometry, torch.tensor([[length - 1]]), torch.tensor(length))
        waves[name] = 2 * math.pi / schedule.for_geometry(geometry).rotation(last).inv_freq.flatten()
    top = 3 * max(wave[wave.isfinite()].max().item() for wave in waves.values() if wave.isfinite().any())
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles = itertools.product(("-", "--", ":"), (f"C{color}" for color in range(10)))
    widths = torch.linspace(4, 1, len(waves)).tolist()  # so that a line shows below another that it equals
    for (name, wave), (line, color), width in zip(waves.items(), styles, widths, strict=False):
        axes.plot(wave.clamp(max=top), linestyle=line, color=color, label=name, linewidth=width)
    marks: list[tuple[float, str]] = [(geometry.trained_length, "trained length"), (length, "target length")]
    if any(not wave.isfinite().all() for wave in waves.values()):
        marks.append((top, "does not turn"))
    for tokens, what in marks:
        axes.axhline(tokens, color="0.6", linestyle="--", linewidth=1)
        axes.annotate(what, (0.01, tokens), xycoords=("axes fraction", "data"), va="bottom", color="0.4", size="small")
    axes.set(xlabel="pair index", ylabel="wavelength (tokens)", yscale="log", ylim=(None, 2 * top))
    factor = length / geometry.trained_length
    axes.set_title(f"rotary dimension {geometry.dim}, base {geometry.base:g}, factor {factor:g}", size="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    save_figure(figure, path, dpi=100)
