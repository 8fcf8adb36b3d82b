"""Results as tables for the terminal, and as rows for a file."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ropex.evaluation.compare import TRUNCATED
from ropex.evaluation.curves import effective_length
from ropex.evaluation.retrieval import RetrievalResult

__all__ = ["perplexity_table", "retrieval_results", "retrieval_rows", "retrieval_table"]


def perplexity_table(measured: dict[str, Any]) -> Table:
    """Nats and perplexity of each method, of what `compare_methods` says under `perplexity`."""
    binned = measured["protocol"] == "binned"
    table = Table()
    table.add_column("positions" if binned else "length", justify="right")
    for name in measured["results"]:
        table.add_column(f"{name}\nnll     ppl", justify="right")
    for row, (start, end) in enumerate(measured["bins"]):
        cells = (f"{each['nll'][row]:.3f} {each['perplexity'][row]:7.2f}" for each in measured["results"].values())
        table.add_row(f"{start}-{end}" if binned else str(end), *cells)
    table.add_section()
    # What added context is worth, at the end of the curve: for each method nats below the truncated model.
    gains = (f"{each['gain'][-1][0]:+.3f}" for each in measured["results"].values())
    table.add_row("last row,\ngain over truncated", *gains)
    speeds = (f"{each['processed'] / each['seconds']:.0f}" for each in measured["results"].values())
    table.add_row("tokens / s", *speeds)
    return table


def retrieval_results(result: dict[str, Any]) -> dict[str, dict[str, RetrievalResult]]:
    """By task and method, of what `compare_methods` gives."""
    return {
        task: {
            name: RetrievalResult.from_dict({"task": task, "records": records}) for name, records in by_method.items()
        }
        for task, by_method in result["retrieval"]["results"].items()
    }


def retrieval_table(measured: dict[str, dict[str, RetrievalResult]], trained_length: int, scoring: str) -> Table:
    """Exact answers by task and length, with their log-probability, and the effective length of each method."""
    methods = list(next(iter(measured.values())))
    table = Table("task", "length", *methods)
    for task, by_method in measured.items():
        exact = {name: each.by_length() for name, each in by_method.items()}
        logprob = (
            {name: each.by_length("logprob") for name, each in by_method.items()} if scoring == "likelihood" else {}
        )
        lengths = list(exact[TRUNCATED])
        for length in lengths:
            cells = [
                f"{100 * exact[name][length]:.0f} %" + (f" {logprob[name][length]:6.1f}" if logprob else "")
                for name in methods
            ]
            table.add_row(task, f"{length:,}", *cells)
        short = [exact[TRUNCATED][length] for length in lengths if length <= trained_length // 2]
        if short and short[-1] > 0:
            threshold = 0.8 * short[-1]
            reached = (effective_length(exact[name], threshold) for name in methods)
            cells = [f"{length:,}" if length else "none" for length in reached]
            table.add_row(task, f"effective\nat {100 * threshold:.0f} %", *cells)
        table.add_section()
    return table


def retrieval_rows(measured: dict[str, dict[str, RetrievalResult]]) -> list[dict[str, Any]]:
    """A row for each answer of each method."""
    return [
        {"method": name, **record}
        for by_method in measured.values()
        for name, each in by_method.items()
        for record in each.to_dict()["records"]
    ]
