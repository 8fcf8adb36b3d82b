"""Pictures of results."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ropex._disk import writing

__all__ = ["plot_perplexity", "plot_retrieval", "save_figure"]


def save_figure(figure: Any, path: Path, *, dpi: int) -> None:
    """Write a picture so that it is never seen half written, in the format that its name ends with."""
    with writing(path.parent) as put:
        put(path.name, lambda partial: figure.savefig(partial, dpi=dpi, format=path.suffix[1:]))


def plot_perplexity(path: Path, result: Mapping[str, Any]) -> None:
    """Draw perplexity against position or length, a line per method, into a PNG file.

    Args:
        path: where to write.
        result: of `compare_methods`, with perplexity.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    trained_length, measured = result["trained_length"], result["perplexity"]
    binned = measured["protocol"] == "binned"
    places = [(start + end) / 2 if binned else end for start, end in measured["bins"]]
    for (name, row), marker in zip(measured["results"].items(), itertools.cycle("os^Dvph*<>X"), strict=False):
        axes.plot(places, row["perplexity"], marker=marker, label=name)
    if trained_length < measured["bins"][-1][1]:
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
    xlabel = "position (tokens)" if binned else "length (tokens)"
    ylabel = f"perplexity, {measured['protocol']}"
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log", title=result["model"])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize="small")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path, dpi=150)


def plot_retrieval(path: Path, grids: Mapping[str, Mapping[tuple[int, float], float]], *, title: str) -> None:
    """Draw the share of right answers at each length and depth, a heat map per method, into a PNG file.

    Args:
        path: where to write.
        grids: by the names that the picture shall show, what `RetrievalResult.grid` gives.
        title: above them all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = sorted({length for grid in grids.values() for length, _ in grid})
    depths = sorted({depth for grid in grids.values() for _, depth in grid})
    columns = min(len(grids), 3)
    rows = -(-len(grids) // columns)
    figure = Figure(figsize=(1.5 + 2.6 * columns, 1 + 1.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat[len(grids) :]:
        panel.set_axis_off()
    for (name, grid), panel in zip(grids.items(), panels.flat, strict=False):
        values = [[grid.get((length, depth), float("nan")) for length in lengths] for depth in depths]
        image = panel.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_title(name, size="small")
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, size="x-small")
        panel.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], size="x-small")
        for (row, line), column in itertools.product(enumerate(values), range(len(lengths))):
            if line[column] == line[column]:
                panel.text(column, row, f"{line[column]:.2g}", ha="center", va="center", size="x-small")
    figure.colorbar(image, ax=panels, label="share of exact answers", shrink=0.8)
    figure.supxlabel("length (tokens)", size="small")
    figure.supylabel("depth", size="small")
    figure.suptitle(title, size="medium")
    save_figure(figure, path, dpi=120)
