"""Several methods on one model: perplexity against length, and retrieval."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ropex._checks import require_int, require_list, require_path, require_type
from ropex._version import __version__
from ropex.evaluation.documents import Document, as_documents
from ropex.evaluation.losses import Progress, vocabulary_size
from ropex.evaluation.perplexity import PerplexityByLength, Protocol, bin_edges, perplexity_by_length
from ropex.evaluation.results import Cells, contents, environment, fingerprint
from ropex.evaluation.retrieval import Record, RetrievalResult, Scoring, ask, find_task
from ropex.evaluation.tasks import Sample, Task
from ropex.patching import OnScaled, depends_on_length, inspect, patch
from ropex.scaling import FrequencySchedule

__all__ = ["compare_methods"]

TRUNCATED = "truncated"


class _Method(NamedTuple):
    """A row of the comparison: a schedule, or the unpatched model that sees `window` tokens."""

    name: str
    schedule: FrequencySchedule | None
    window: int | None
    on_scaled: OnScaled

    @property
    def key(self) -> str:
        return f"{TRUNCATED} to {self.window}" if self.schedule is None else f"{self.schedule!r}, {self.on_scaled}"

    def applied(self, model: nn.Module) -> AbstractContextManager[object]:
        if self.schedule is not None:
            return patch(model, self.schedule, on_scaled=self.on_scaled)
        # A config's own scaling that depends on the length can be asked twice only under a pin.
        return patch(model, on_scaled="keep") if depends_on_length(model) else nullcontext()


class _Drawn(NamedTuple):
    """The texts of one number and length, and a digest of all that is asked of them."""

    number: int
    samples: Sequence[Sample]
    digest: str


class _Cell(NamedTuple):
    """A part that is measured and kept by itself."""

    key: str
    title: str
    cost: float
    measure: Callable[[Progress | None], Any]


def compare_methods(
    model: nn.Module,
    schedules: Mapping[str, FrequencySchedule],
    *,
    documents: Any = (),
    protocol: Protocol = "binned",
    bins: int | Sequence[int] = 6,
    stride: int = 256,
    tokenizer: Any = None,
    tasks: Sequence[str] = (),
    lengths: Sequence[int] = (),
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    samples: int = 1,
    seed: int = 0,
    scoring: Scoring = "likelihood",
    on_scaled: OnScaled = "error",
    cells: str | Path | None = None,
    model_name: str = "",
    text_name: str = "",
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Perplexity and retrieval of several methods on one model, as a result that can be written as JSON.

    One more row, `truncated`, is always there: the unpatched model that sees its own length of the last tokens only.
    What a method gains over it is what the added context is worth.

    Args:
        model: not patched; it is patched with one schedule after the other, and left as it was.
        schedules: by the names that the result shall show.
        documents: what the perplexity is measured on, as `perplexity_by_length` takes it; none: it is not.
        protocol, bins, stride: as in `perplexity_by_length`.
        tokenizer: the model's, for the tasks.
        tasks: what retrieval is measured on; none: it is not.
        lengths, depths, samples, seed, scoring: as in `retrieval`.
        on_scaled: as in `patch`, of a model whose config carries a scaling.
        cells: a file that keeps what is finished, so that a run that was killed goes on from there: one document or
            one sample of one method at a time.
        model_name, text_name: what the result says of them.
        progress: called with what is being measured and the fraction of all that is done.

    Returns:
        `perplexity`, with the numbers of each method and its `gain` over the truncated one; `retrieval`, with the
        records of each task and method; and what they were measured on.

    Raises:
        ValueError: nothing to measure, a method named `truncated`, or what the measurements raise.
    """
    require_type("schedules", schedules, Mapping, "a dict of schedules by name; pass such as {'yarn': schedule}")
    for name, schedule in schedules.items():
        require_type(
            f"schedules[{name!r}]", schedule, FrequencySchedule, 'a schedule; pass ropex.schedule("yarn", ...)'
        )
    for what, values in (("tasks", tasks), ("lengths", lengths), ("depths", depths)):
        require_list(what, values, "names" if what == "tasks" else "numbers")
    require_type("documents", documents, (Sequence, Tensor, Document), "documents, or token ids; pass a list of them")
    if TRUNCATED in schedules:
        raise ValueError(
            f"schedules with the name {TRUNCATED!r}: it is the row of the unpatched model; pass another name"
        )
    if tasks and (tokenizer is None or not lengths):
        raise ValueError("tasks without a tokenizer and lengths: must have both; pass tokenizer= and lengths=")
    any_given = isinstance(documents, Tensor) or len(documents) > 0
    found = as_documents(documents, vocabulary_size(model)) if any_given else []
    if not found and not tasks:
        raise ValueError("nothing to measure: must have documents or tasks; pass documents=, tasks=, or both")
    require_int("samples", samples, minimum=1, maximum=10**6, remedy="pass how many texts to read at each length")
    path = None if cells is None else require_path("cells", cells)
    inspection = inspect(model)
    methods = [_Method(name, schedule, None, on_scaled) for name, schedule in schedules.items()]
    methods.append(_Method(TRUNCATED, None, inspection.length, on_scaled))
    about = {"model": fingerprint(model), "ropex": __version__}
    state = "" if cells is None else f", weights and tokenizer {contents(model, tokenizer)}"
    store = Cells(path, about, state)
    edges = bin_edges(bins, min(map(len, found))) if found else []
    digests = [_document_digest(document) for document in found]
    perplexity = {
        method.name: [
            _perplexity_cell(model, method, document, digest, protocol, edges, stride)
            for document, digest in zip(found, digests, strict=True)
        ]
        for method in methods
    }
    numbers = list(itertools.product(range(samples), lengths))
    drawn: dict[str, list[_Drawn]] = {task: [] for task in tasks}
    for task, (number, length) in itertools.product(tasks, numbers):
        made = find_task(task).samples(tokenizer, length, depths, number=number, seed=seed)
        drawn[task].append(_Drawn(number, made, _samples_digest(made)))
    retrieval = {
        task: {
            method.name: [
                _retrieval_cell(model, tokenizer, method, find_task(task), each, scoring) for each in drawn[task]
            ]
            for method in methods
        }
        for task in tasks
    }
    # All methods on a document before the next one: what a killed run leaves is then a comparison.
    order = list(itertools.chain.from_iterable(zip(*perplexity.values(), strict=True)))
    for in_task in zip(*(zip(*of_task.values(), strict=True) for of_task in retrieval.values()), strict=True):
        order += itertools.chain.from_iterable(in_task)
    _measure(order, store, progress)

    def value(cell: _Cell) -> Any:
        return store.get(cell.key, lambda: None)

    result: dict[str, Any] = {
        "model": model_name,
        "trained_length": inspection.geometry.trained_length,
        "methods": {method.name: method.schedule and method.schedule.to_dict() for method in methods},
    }
    if found:
        measured = {name: _joined([value(cell) for cell in of_method]) for name, of_method in perplexity.items()}
        result["perplexity"] = {
            "protocol": protocol,
            "stride": stride if protocol in ("press", "window_mean") else None,
            "text": text_name,
            "documents": [document.name for document in found],
            "tokens": [len(document) for document in found],
            "bins": [list(span) for span in measured[TRUNCATED].bins],
            "results": {
                name: {**numbers.to_dict(), "gain": numbers.gain_over(measured[TRUNCATED])}
                for name, numbers in measured.items()
            },
        }
    if tasks:
        result["retrieval"] = {
            "lengths": list(lengths),
            "depths": list(depths),
            "samples": samples,
            "seed": seed,
            "scoring": scoring,
            "results": {
                task: {
                    name: RetrievalResult(
                        task, tuple(Record(**record) for cell in of_method for record in value(cell))
                    ).to_dict()["records"]
                    for name, of_method in of_task.items()
                }
                for task, of_task in retrieval.items()
            },
        }
    return {**result, "environment": environment(next(model.parameters()))}


def _measure(order: list[_Cell], store: Cells, progress: Callable[[str, float], None] | None) -> None:
    """Measure what is not finished; the time left is that of the rest."""
    order = [cell for cell in order if cell.key not in store]
    total = sum(cell.cost for cell in order)
    done = 0.0
    for cell in order:
        report = None if progress is None else _share(progress, cell, done, total)
        if report is not None:
            report(0.0)
        store.get(cell.key, functools.partial(cell.measure, report))
        if report is not None:
            report(1.0)
        done += cell.cost


def _share(progress: Callable[[str, float], None], cell: _Cell, done: float, total: float) -> Progress:
    return lambda fraction: progress(cell.title, (done + fraction * cell.cost) / total)


def _perplexity_cell(
    model: nn.Module,
    method: _Method,
    document: Document,
    digest: str,
    protocol: Protocol,
    edges: list[int],
    stride: int,
) -> _Cell:
    steps = f" stride {stride}" if protocol in ("press", "window_mean") else ""

    def measure(report: Progress | None) -> dict[str, Any]:
        with method.applied(model):
            return perplexity_by_length(
                model, document, protocol=protocol, bins=edges, stride=stride, window=method.window, progress=report
            ).to_dict()

    key = f"perplexity, {protocol}{steps}, bins {edges}, document {digest} of {len(document)} tokens, {method.key}"
    return _Cell(key, f"perplexity, {method.name}", float(len(document)), measure)


def _retrieval_cell(
    model: nn.Module,
    tokenizer: Any,
    method: _Method,
    task: Task,
    drawn: _Drawn,
    scoring: Scoring,
) -> _Cell:
    number, made, digest = drawn

    def measure(report: Progress | None) -> list[dict[str, Any]]:
        with method.applied(model):
            records = ask(model, tokenizer, task, made, number, scoring=scoring, window=method.window, progress=report)
        return [asdict(record) for record in records]

    length = made[0].length
    key = f"{task.name}, {length} tokens, sample {number}, {digest}, {scoring}, {method.key}"
    cost = float(length) * (1 if task.shared else len(made))
    return _Cell(key, f"{task.name} at {length:,}, {method.name}", cost, measure)


def _document_digest(document: Document) -> str:
    counts = None if document.bytes is None else document.bytes.tolist()
    return _digest((document.tokens.tolist(), document.bos, counts))


def _samples_digest(samples: Sequence[Sample]) -> str:
    return _digest([(sample.context.tolist(), sample.bos, sample.questions) for sample in samples])


def _digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _joined(parts: Sequence[Mapping[str, Any]]) -> PerplexityByLength:
    first, *others = (PerplexityByLength.from_dict(part) for part in parts)
    for other in others:
        first = first.joined(other)
    return first
