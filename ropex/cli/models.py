"""The commands about models and methods: `inspect`, `export`, `methods`."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import ropex
from ropex._checks import LONGEST, require_number
from ropex.cli.console import app, clear_errors, out, say, split
from ropex.evaluation.wavelengths import plot_wavelengths
from ropex.patching.files import DESCRIPTION
from ropex.rotation import Geometry
from ropex.scaling.base import Wrapper
from ropex.scaling.registry import schedule_class, schedule_for, target_option

__all__ = ["export", "inspect", "methods"]


class Engine(StrEnum):
    transformers = "transformers"
    vllm = "vllm"
    gguf = "gguf"


@app.command()
@clear_errors
def inspect(
    directory: Annotated[Path, typer.Argument(help="Model directory with config.json, and ropex.json if patched.")],
    why: Annotated[
        bool, typer.Option("--why", help="What each step of detection saw, also of a refused model.")
    ] = False,
) -> None:
    """What the rotary embedding of a saved model does, and what an export would carry. Reads no weights."""
    model = ropex.patching.empty_model(directory)
    if why:
        for number, step in enumerate(ropex.patching.explain(model), 1):
            say(f"{number}. {step}")
    if (directory / DESCRIPTION).exists():
        ropex.load(model, directory)
    say(ropex.inspect(model))


@app.command()
@clear_errors
def export(
    directory: Annotated[Path, typer.Argument(help="Where Patch.save wrote ropex.json.")],
    to: Annotated[Engine, typer.Option(help="The engine that shall load it.")],
    out_path: Annotated[Path, typer.Option("--out", help="The new directory; for gguf the new file.")],
    model: Annotated[
        Path | None, typer.Option(help="The model's directory, or for gguf its file. Default: the same directory.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens at which a method that depends on the length is frozen.")
    ] = None,
) -> None:
    """Write a patched model for an engine that does not know ropex."""
    say(ropex.export(directory, to.value, out_path, model=model, length=length))


@app.command()
@clear_errors
def methods(
    plot: Annotated[
        Path | None, typer.Option(help="Draw wavelength against pair index into this PNG or SVG file.")
    ] = None,
    names: Annotated[
        str | None, typer.Option("--methods", help="Methods to show, separated by commas. Default: all.")
    ] = None,
    factor: Annotated[float, typer.Option(help="Target length / trained length, of the picture.")] = 8.0,
    dim: Annotated[int, typer.Option(help="Rotary dimension, of the picture.")] = 128,
    base: Annotated[float, typer.Option(help="Base (rope_theta), of the picture.")] = 10_000.0,
    trained_length: Annotated[int, typer.Option(help="Trained length in tokens, of the picture.")] = 4096,
) -> None:
    """The methods there are; with --plot also what each does to the wavelengths."""
    chosen = split(names) if names is not None else list(ropex.methods())
    table = _methods_table(chosen)
    if plot is not None:
        _plot_methods(plot, chosen, factor, Geometry(dim, base, trained_length))
    out.print(table)
    if plot is not None:
        say(f"wrote {plot}")


def _methods_table(names: list[str]) -> Table:
    table = Table()
    for column in ("method", "training-free", "length-dependent", "learned", "paper"):
        table.add_column(column)
    for name in names:
        cls = schedule_class(name)
        label, yes, no = name, "yes", "no"
        if issubclass(cls, Wrapper):  # what it wraps decides what it leaves open
            label, yes, no = f"{name} ({cls.default_inner})", "as inner", "as inner"
        free = yes if cls.training_free else "no"
        table.add_row(label, free, *("yes" if has else no for has in (cls.length_dependent, cls.learned)), cls.paper)
    return table


def _plot_methods(path: Path, names: list[str], factor: float, geometry: Geometry) -> None:
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"plot={str(path)!r}: must end in .png or .svg; pass such a file")
    largest = LONGEST / geometry.trained_length
    require_number("factor", factor, minimum=1, maximum=largest, remedy="pass a smaller factor")
    length = round(factor * geometry.trained_length)
    schedules = {}
    for name in dict.fromkeys(("none", *names)):
        target = {} if target_option(name) is None else {"length": length}
        reach = {"max_factor": max(16, math.ceil(factor))} if name == "clex" else {}
        schedules[name] = schedule_for(name, geometry.trained_length, **target, **reach)
    try:
        plot_wavelengths(path, schedules, geometry, length=length)
    except OSError as error:
        raise ValueError(f"plot={str(path)!r}: must be a file that can be written; {error.strerror}") from error
